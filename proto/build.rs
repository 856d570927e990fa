//! Compiles the protocol without a system `protoc`.

use std::path::PathBuf;

use prost::Message;

fn main() -> anyhow::Result<()> {
    let files = protox::compile(["mover/v1/mover.proto"], ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    // For the test that refuses incompatible changes.
    std::fs::write(out.join("mover.v1.binpb"), files.encode_to_vec())?;
    // The derived form would print secrets; `lib.rs` has one that does not.
    tonic_prost_build::configure()
        .skip_debug(["mover.v1.Credentials", "mover.v1.Repository", "mover.v1.OpenRepository"])
        .compile_fds(files)?;
    println!("cargo:rerun-if-changed=proto");
    Ok(())
}
