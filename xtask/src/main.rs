//! `cargo xtask test`: everything that decides whether a change is good, in the order in which it
//! fails fastest. `cargo xtask s3 up` and `down`: the S3 server that some tests need, for running them
//! one by one.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

mod s3;

/// One step: what it is, and the command.
type Step = (&'static str, &'static [&'static str]);

const TEST: &[Step] = &[
    ("format", &["cargo", "fmt", "--all", "--check"]),
    (
        "lints",
        &[
            "cargo",
            "clippy",
            "--workspace",
            "--all-targets",
            "--all-features",
            "--locked",
            "--",
            "-D",
            "warnings",
        ],
    ),
    (
        "tests",
        &[
            "cargo",
            "test",
            "--workspace",
            "--all-features",
            "--locked",
            "--lib",
            "--bins",
            "--tests",
        ],
    ),
    (
        "examples in documentation",
        &["cargo", "test", "--workspace", "--all-features", "--locked", "--doc"],
    ),
    ("documentation", &["cargo", "doc", "--workspace", "--no-deps", "--locked"]),
    ("fuzz targets", &["cargo", "check", "--locked", "--manifest-path", "fuzz/Cargo.toml"]),
    (
        "dependencies",
        &[
            "cargo",
            "deny",
            "--all-features",
            "check",
            "--hide-inclusion-graph",
            "bans",
            "licenses",
            "sources",
        ],
    ),
];

fn main() -> ExitCode {
    let task = std::env::args().nth(1);
    let what = std::env::args().nth(2);
    let result = match (task.as_deref(), what.as_deref()) {
        (Some("test"), None) => run(TEST),
        (Some("s3"), Some("up")) => s3::up().map(|_| ()),
        (Some("s3"), Some("down")) => s3::down(),
        _ => Err(anyhow::anyhow!("usage: cargo xtask test | s3 up | s3 down")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("xtask: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(steps: &[Step]) -> Result<()> {
    let root =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?;
    check_layers(root)?;
    let server = Started(s3::up()?);
    for (name, command) in steps {
        say(&format!("== {name}: {}", command.join(" ")));
        let mut child = Command::new(command[0]);
        child.args(&command[1..]).current_dir(root).envs(server.0.iter().cloned());
        if *name == "documentation" {
            child.env("RUSTDOCFLAGS", "-D warnings");
        }
        let status = child.status().with_context(|| format!("cannot run '{}'", command[0]))?;
        if !status.success() {
            bail!("{name}: {status}");
        }
    }
    Ok(())
}

/// The S3 server of the tests, stopped whatever becomes of them.
struct Started(Vec<(String, String)>);

impl Drop for Started {
    fn drop(&mut self) {
        if let Err(error) = s3::down() {
            say(&format!("xtask: {error:#}"));
        }
    }
}

/// The chunk store knows no command line, no Kubernetes and no wire protocol, and its pure parts know
/// neither store nor clock.
fn check_layers(root: &Path) -> Result<()> {
    say("== layers");
    let output = Command::new("cargo")
        .args(["tree", "-p", "chunkstore", "-e", "normal", "--prefix", "none", "--locked"])
        .current_dir(root)
        .output()
        .context("cannot run 'cargo tree'")?;
    let tree = String::from_utf8(output.stdout)?;
    for forbidden in ["clap", "kube", "tonic", "prost", "tokio"] {
        if tree.lines().any(|line| line.split(' ').next() == Some(forbidden)) {
            bail!("chunkstore must not depend on {forbidden}");
        }
    }
    for pure in [
        "chunker.rs",
        "wire.rs",
        "retention.rs",
        "codec/seal.rs",
        "codec/compress.rs",
        "gc/plan.rs",
    ] {
        let path = root.join("chunkstore/src").join(pure);
        let text = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        for forbidden in ["ObjectStore", "Timestamp::now", "SystemTime::now", "Instant::now"] {
            if text.contains(forbidden) {
                bail!("{} must not use {forbidden}", path.display());
            }
        }
    }
    Ok(())
}

#[expect(clippy::print_stderr, reason = "this is what the program is for")]
fn say(text: &str) {
    eprintln!("{text}");
}
