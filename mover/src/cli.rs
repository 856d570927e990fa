//! The command line: what was typed, validated, and handed to the code that does it.
//!
//! Standard output carries results, standard error everything for people: progress, warnings, errors.

mod args;
mod backup;
mod browse;
mod content;
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

use args::{Args, Command};
use output::Output;

/// Everything was done.
const DONE: u8 = 0;
/// The command failed.
const FAILED: u8 = 1;
/// Done, but some files could not be read or restored, or damage was found.
const INCOMPLETE: u8 = 3;

/// Parses the command line, does what it says, and returns the exit code. Wrong usage ends the process
/// with code 2.
pub fn run() -> ExitCode {
    let args = Args::parse();
    crate::fs::raise_open_files();
    let output = Output::new(args.global.json);
    let cancelled = Arc::new(AtomicBool::new(false));
    let result = watch_signals(&cancelled).and_then(|()| dispatch(&args, &output, &cancelled));
    ExitCode::from(result.unwrap_or_else(|error| {
        output.error(&error);
        FAILED
    }))
}

/// The first signal asks to end cleanly, the second ends at once.
fn watch_signals(cancelled: &Arc<AtomicBool>) -> Result<()> {
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
    Ok(())
}

fn dispatch(args: &Args, output: &Output, cancelled: &Arc<AtomicBool>) -> Result<u8> {
    let global = &args.global;
    match &args.command {
        Command::Init(init) => keys::init(global, init, output),
        Command::Backup(backup) => backup::run(global, backup, output, cancelled),
        Command::Snapshots(snapshots) => browse::snapshots(global, snapshots, output),
        Command::Restore(restore) => restore::run(global, restore, output, cancelled),
        Command::Ls(ls) => browse::ls(global, ls, output),
        Command::Diff(diff) => browse::diff(global, diff, output),
        Command::Dump(dump) => browse::dump(global, dump, output),
        Command::Check(check) => maintain::check(global, check, output),
        Command::Forget(forget) => maintain::forget(global, forget, output),
        Command::Prune(prune) => maintain::prune(global, prune, output),
        Command::Stats => maintain::stats(global, output),
        Command::Key(key) => keys::key(global, &key.command, output),
        Command::Completions { shell } => {
            args::completions(*shell);
            Ok(DONE)
        }
    }
}

/// The wall clock, for what is recorded for people; nothing depends on it being right.
fn now() -> jiff::Timestamp {
    jiff::Timestamp::now()
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
