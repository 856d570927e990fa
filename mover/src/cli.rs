//! The command line: what was typed, validated, and handed to the code that does it.
//!
//! Standard output carries results, standard error everything for people: progress, warnings, errors.

mod agent;
mod args;
mod backup;
mod browse;
mod content;
mod copy;
mod keys;
mod maintain;
mod output;
mod progress;
mod restore;
mod secret;
mod snapshot;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use chunkstore::{Error, ErrorKind};
use clap::Parser;

use crate::now;
use args::{Args, Command};
use output::Output;

/// Everything was done.
const DONE: u8 = 0;
/// The command failed.
const FAILED: u8 = 1;
/// What was typed cannot be meant.
const WRONG_USAGE: u8 = 2;
/// Done, but some files could not be read or restored, or damage was found.
const INCOMPLETE: u8 = 3;

/// Parses the command line, does what it says, and returns the exit code. Wrong usage ends the process
/// with code 2.
pub fn run() -> ExitCode {
    let args = Args::parse();
    crate::fs::raise_open_files();
    let output = Output::new(args.global.json);
    ExitCode::from(dispatch(&args, &output).unwrap_or_else(|error| {
        output.error(&error);
        if error.is::<UsageError>() { WRONG_USAGE } else { FAILED }
    }))
}

/// What was typed cannot be meant.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

/// A flag that the first signal sets, to end cleanly; the second ends at once. Commands that have
/// nothing to tidy up do without: a signal ends them like any other program, which harms nothing.
fn watch_signals() -> Result<Arc<AtomicBool>> {
    let cancelled = Arc::new(AtomicBool::new(false));
    use signal_hook::consts::{SIGINT, SIGTERM};
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(
            signal,
            i32::from(FAILED),
            cancelled.clone(),
        )
        .and_then(|_| signal_hook::flag::register(signal, cancelled.clone()))
        .context("cannot watch for signals")?;
    }
    Ok(cancelled)
}

fn dispatch(args: &Args, output: &Output) -> Result<u8> {
    let global = &args.global;
    match &args.command {
        Command::Init(init) => keys::init(global, init, output),
        Command::Backup(backup) => backup::run(global, backup, output, &watch_signals()?),
        Command::Snapshots(snapshots) => browse::snapshots(global, snapshots, output),
        Command::Restore(restore) => restore::run(global, restore, output, &watch_signals()?),
        Command::Ls(ls) => browse::ls(global, ls, output),
        Command::Diff(diff) => browse::diff(global, diff, output),
        Command::Dump(dump) => browse::dump(global, dump, output),
        Command::Copy(copy) => copy::run(global, copy, output, &watch_signals()?),
        Command::Check(check) => maintain::check(global, check, output),
        Command::Forget(forget) => maintain::forget(global, forget, output),
        Command::Prune(prune) => maintain::prune(global, prune, output),
        Command::Stats => maintain::stats(global, output),
        Command::Key(key) => keys::key(global, &key.command, output),
        Command::Agent(args) => agent::run(global, args),
        Command::RestoreWait(args) => agent::restore_wait(args, &*watch_signals()?),
        Command::Completions { shell } => {
            args::completions(*shell);
            Ok(DONE)
        }
    }
}

/// What to do about an error, where that is not said by the error itself.
fn advice(error: &anyhow::Error) -> Option<&'static str> {
    let kind = error.chain().find_map(|cause| cause.downcast_ref::<Error>()).map(Error::kind)?;
    match kind {
        ErrorKind::Corrupt => Some("run 'ebackup check' to learn what is damaged"),
        ErrorKind::Full => {
            Some("free space at the repository, or run 'ebackup prune', and try again")
        }
        ErrorKind::PermissionDenied => {
            Some("check who owns the repository and whether it is read-only")
        }
        ErrorKind::WrongKey => {
            Some("give the right one with --password-file, EBACKUP_PASSWORD or --key-file")
        }
        _ => None,
    }
}
