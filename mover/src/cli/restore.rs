//! `restore`.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};
use chunkstore::id::SnapshotId;
use chunkstore::{Error, ErrorKind};
use ignore::gitignore::{Gitignore, GitignoreBuilder};
use serde::Serialize;

use super::args::{Global, Restore};
use super::output::{Output, bytes, seconds};
use super::progress::Progress;
use super::{DONE, INCOMPLETE, browse, secret, snapshot};
use crate::restore::{FilterResult, Request, RestoreOptions, RestoreSummary, restore};

/// The last line of `restore --json`.
#[derive(Serialize)]
struct SummaryLine {
    snapshot: SnapshotId,
    #[serde(flatten)]
    summary: RestoreSummary,
    seconds: f64,
    dry_run: bool,
}

pub(super) fn run(
    global: &Global,
    args: &Restore,
    output: &Output,
    cancelled: &Arc<AtomicBool>,
) -> Result<u8> {
    let resources = secret::resources(global)?;
    let filter = Filter::new(args)?;
    let repository = secret::open(global)?;
    let (name, subpath) = args.snapshot.split_once(':').unwrap_or((&args.snapshot, ""));
    let (id, snapshot) = snapshot::find(&repository, name, args.which.lineage.as_deref(), output)?;
    let subpath = snapshot::key_of(Path::new(subpath))?;
    // Before anything is made for it.
    browse::require(&repository, &snapshot, &subpath)?;
    let mut progress = Progress::start("restored", global.quiet, output, cancelled);
    if subpath.is_empty() && filter.is_none() {
        progress.expect(snapshot.summary.bytes);
    }
    let decide = |path: &[u8], is_dir: bool| match &filter {
        Some(filter) => filter.decide(path, is_dir),
        None => FilterResult::Take,
    };
    let result = restore(&Request {
        repository: &repository,
        root: (snapshot.root, snapshot.level),
        subpath: &subpath,
        target: &args.target,
        opened: None,
        filter: filter.is_some().then_some(&decide),
        options: RestoreOptions {
            overwrite: args.overwrite.into(),
            delete: args.delete,
            verify: args.verify,
            dry_run: args.dry_run,
            owner: !args.no_owner,
            sync: args.sync,
            threads: resources.fetch_threads(repository.store().read_cost()),
            window_bytes: resources.window_bytes(),
            scratch: secret::scratch(),
        },
        monitor: &progress,
    });
    progress.end();
    let summary = result.map_err(|error| {
        if error.kind() == ErrorKind::Cancelled {
            let message =
                "interrupted; run the same command again, it leaves what is restored already";
            return anyhow::Error::new(Error::new(ErrorKind::Cancelled, message));
        }
        error.into()
    })?;
    let elapsed = progress.seconds();
    let verb = if args.dry_run { "would restore" } else { "restored" };
    output.line(format!(
        "{verb} {} files and {} folders of snapshot {}, {}, in {}",
        summary.files,
        summary.dirs,
        id.short(),
        bytes(summary.bytes),
        seconds(elapsed as u64),
    ))?;
    for (count, what) in [
        (summary.skipped_unchanged, "files were there already"),
        (summary.deleted, "names deleted that the snapshot lacks"),
        (summary.warnings, "warnings"),
        (summary.files_failed, "FILES COULD NOT BE RESTORED"),
    ] {
        if count > 0 {
            output.line(format!("{count} {what}"))?;
        }
    }
    let dry_run = args.dry_run;
    output.summary(global, &SummaryLine { snapshot: id, summary, seconds: elapsed, dry_run })?;
    Ok(if summary.files_failed > 0 { INCOMPLETE } else { DONE })
}

/// Which paths to restore.
struct Filter {
    include: Option<Gitignore>,
    exclude: Gitignore,
}

impl Filter {
    fn new(args: &Restore) -> Result<Option<Self>> {
        if args.include.is_empty() && args.exclude.is_empty() {
            return Ok(None);
        }
        let build = |globs: &[String]| {
            let mut rules = GitignoreBuilder::new("");
            for glob in globs {
                if glob.is_empty() {
                    bail!("an empty pattern matches nothing");
                }
                rules
                    .add_line(None, glob)
                    .with_context(|| format!("'{glob}' is not a usable pattern"))?;
            }
            Ok(rules.build()?)
        };
        let include = if args.include.is_empty() { None } else { Some(build(&args.include)?) };
        Ok(Some(Self { include, exclude: build(&args.exclude)? }))
    }

    fn decide(&self, path: &[u8], is_dir: bool) -> FilterResult {
        if path.is_empty() {
            return FilterResult::Take;
        }
        let path = Path::new(std::ffi::OsStr::from_bytes(path));
        if self.exclude.matched_path_or_any_parents(path, is_dir).is_ignore() {
            return FilterResult::Prune;
        }
        match &self.include {
            Some(include) if !include.matched_path_or_any_parents(path, is_dir).is_ignore() => {
                FilterResult::Skip
            }
            _ => FilterResult::Take,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn filter(options: &[&str]) -> Filter {
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            restore: Restore,
        }
        let line = [&["x", "latest", "--target", "/t"], options].concat();
        Filter::new(&Line::parse_from(line).restore).unwrap().unwrap()
    }

    #[test]
    fn patterns_choose_files_with_what_lies_below() {
        let filter = filter(&["--include", "*.txt", "--include", "docs/", "--exclude", "/old"]);
        let table = [
            (&b"a.txt"[..], false, FilterResult::Take),
            (b"deep/down/a.txt", false, FilterResult::Take),
            (b"docs", true, FilterResult::Take),
            (b"docs/picture.png", false, FilterResult::Take),
            (b"picture.png", false, FilterResult::Skip),
            (b"deep", true, FilterResult::Skip),
            (b"old", true, FilterResult::Prune),
            (b"old/a.txt", false, FilterResult::Prune),
        ];
        for (path, is_dir, expected) in table {
            assert_eq!(filter.decide(path, is_dir), expected, "{}", path.escape_ascii());
        }
    }
}
