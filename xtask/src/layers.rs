//! Who may know whom: the chunk store knows no command line, no Kubernetes and no wire protocol, and its pure parts
//! know neither store nor clock.

use anyhow::{Context, Result, bail};

use crate::outputs::cargo;
use crate::runner::Log;
use crate::service::root;

/// What the chunk store must not depend on.
const FORBIDDEN: [&str; 5] = ["clap", "kube", "tonic", "prost", "tokio"];

/// Its files that take facts and the time, and return what to do.
const PURE: [&str; 6] =
    ["chunker.rs", "wire.rs", "retention.rs", "codec/seal.rs", "codec/compress.rs", "gc/plan.rs"];

const STORES_AND_CLOCKS: [&str; 4] =
    ["ObjectStore", "Timestamp::now", "SystemTime::now", "Instant::now"];

pub(crate) fn check(log: &Log) -> Result<()> {
    let mut cargo = cargo()?;
    cargo.args(["tree", "-p", "chunkstore", "-e", "normal", "--prefix", "none", "--locked"]);
    let tree = log.output(&mut cargo)?;
    for forbidden in FORBIDDEN {
        if tree.lines().any(|line| line.split(' ').next() == Some(forbidden)) {
            bail!("chunkstore must not depend on {forbidden}");
        }
    }
    for pure in PURE {
        let path = root()?.join("chunkstore/src").join(pure);
        let text = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        for forbidden in STORES_AND_CLOCKS {
            if text.contains(forbidden) {
                bail!("{} must not use {forbidden}", path.display());
            }
        }
    }
    Ok(())
}
