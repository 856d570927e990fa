//! A second S3 server of the tests, of another make: Garage, from its crate. Building it takes ten minutes of two
//! processors, so it is done only when asked for, and kept.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::service::{READY, Service, Variables, cache, free_ports, path_with, root};

const VERSION: &str = "2.5.0";

/// Builds it, unless that was done.
pub(crate) fn build() -> Result<()> {
    if program()?.exists() {
        return Ok(());
    }
    let status = Command::new("cargo")
        .args(["install", "garage", "--version", VERSION, "--locked", "--no-default-features"])
        .args(["--features", "bundled-libs,sqlite", "--root"])
        .arg(folder()?)
        // Enough for tests, and half the time.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
        .status()
        .context("cannot run 'cargo install'")?;
    if !status.success() {
        bail!("building Garage: {status}");
    }
    Ok(())
}

/// Starts it, unless it runs, and returns the variables that tests find it by. `None` where it was not built.
pub(crate) fn up() -> Result<Option<Variables>> {
    if !program()?.exists() {
        return Ok(None);
    }
    let service = service()?;
    if let Some(variables) = service.running() {
        return Ok(Some(variables));
    }
    // What an interrupted run left.
    down()?;
    let script = root()?.join("chunkstore/objects/tests/garage.sh");
    let path: OsString = path_with(folder()?.join("bin"))?;
    let mut command = Command::new(script);
    command.arg(&service.folder).arg(free_ports()?.to_string()).env("PATH", path);
    service.start(&mut command).map(Some)
}

/// Stops it and forgets what it stored.
pub(crate) fn down() -> Result<()> {
    let service = service()?;
    service.stop()?;
    service.forget()
}

fn service() -> Result<Service> {
    Service::new("garage", "a second S3 server, Garage", READY)
}

fn folder() -> Result<PathBuf> {
    Ok(cache()?.join(format!("garage-{VERSION}")))
}

fn program() -> Result<PathBuf> {
    Ok(folder()?.join("bin/garage"))
}
