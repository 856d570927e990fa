//! The command line: what was typed, validated, and handed to the code that does it.
//!
//! Standard output carries results, standard error everything for people: progress, warnings, errors.

mod agent;
mod args;
mod backup;
mod browse;
mod content;
mod copy;
mod dump;
mod keys;
mod maintain;
mod output;
mod patterns;
mod progress;
mod restore;
mod secret;
mod signals;
mod snapshot;
mod tar;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use anyhow::Result;
use chunkstore::{Error, ErrorKind};

use crate::now;
use args::{Args, Command};
use output::{Output, ReaderGone};

/// Everything was done.
const DONE: u8 = 0;
/// The command failed.
const FAILED: u8 = 1;
/// What was typed cannot be meant.
const WRONG_USAGE: u8 = 2;
/// Done, but some files could not be read or restored, or damage was found.
const INCOMPLETE: u8 = 3;

/// Parses the command line, does what it says, and returns the exit code.
pub fn run() -> ExitCode {
    let args = match args::parse(std::env::args_os()) {
        Ok(args) => args,
        Err(asked) if !asked.use_stderr() => {
            // Help, or the version.
            let output = Output::new(false);
            output.text(&asked.render().to_string());
            return ExitCode::from(output.end(DONE, true));
        }
        Err(wrong) => {
            let _unheard = write!(std::io::stderr(), "{}", wrong.render());
            return ExitCode::from(WRONG_USAGE);
        }
    };
    crate::fs::raise_open_files();
    let output = Output::new(args.global.json);
    // A thread that panicked has said why.
    let done = catch_unwind(AssertUnwindSafe(|| dispatch(&args, &output))).unwrap_or_else(|_| {
        Err(anyhow::anyhow!("an error in the program itself ended it, see above: please report it"))
    });
    let code = done.unwrap_or_else(|error| code_of(&error, &output));
    ExitCode::from(output.end(code, only_tells(&args.command)))
}

/// Tells of an error that ended the command, and gives the exit code.
fn code_of(error: &anyhow::Error, output: &Output) -> u8 {
    if !error.is::<ReaderGone>() {
        output.error(error);
    }
    if error.is::<UsageError>() { WRONG_USAGE } else { FAILED }
}

/// What was typed cannot be meant.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

fn dispatch(args: &Args, output: &Output) -> Result<u8> {
    let global = &args.global;
    signals::end_first_process()?;
    match &args.command {
        Command::Init(init) => keys::init(global, init, output),
        Command::Backup(backup) => backup::run(global, backup, output, &signals::watch()?),
        Command::Snapshots(snapshots) => browse::snapshots(global, snapshots, output),
        Command::Restore(restore) => restore::run(global, restore, output, &signals::watch()?),
        Command::Ls(ls) => browse::ls(global, ls, output),
        Command::Diff(diff) => browse::diff(global, diff, output),
        Command::Dump(dump) => dump::dump(global, dump, output),
        Command::Copy(copy) => copy::run(global, copy, output, &signals::watch()?),
        Command::Check(check) => maintain::check(global, check, output),
        Command::Forget(forget) => maintain::forget(global, forget, output),
        Command::Prune(prune) => maintain::prune(global, prune, output),
        Command::Stats => maintain::stats(global, output),
        Command::Key(key) => keys::key(global, &key.command, output),
        Command::Agent(args) => agent::run(global, args),
        Command::RestoreWait(args) => agent::restore_wait(args, &*signals::watch()?),
        Command::Completions { shell } => {
            output.text(&args::completions(*shell));
            Ok(DONE)
        }
    }
}

/// Whether a command changes nothing and finds out nothing: all it is for is what it prints.
fn only_tells(command: &Command) -> bool {
    match command {
        Command::Snapshots(_)
        | Command::Ls(_)
        | Command::Diff(_)
        | Command::Stats
        | Command::Completions { .. } => true,
        Command::Key(key) => matches!(key.command, args::KeyCommand::List),
        _ => false,
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
