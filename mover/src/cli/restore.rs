//! `restore`.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use chunkstore::id::SnapshotId;
use chunkstore::repository::Repository;
use chunkstore::{Error, ErrorKind};
use ignore::gitignore::{Gitignore, GitignoreBuilder};
use serde::Serialize;

use super::args::{Global, OverwriteArg, Restore};
use super::output::{Output, bytes, seconds};
use super::progress::Progress;
use super::secret::Place;
use super::{DONE, INCOMPLETE, UsageError, browse, secret, snapshot};
use crate::restore::{FilterResult, Protected, Request, RestoreOptions, RestoreSummary, restore};

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
    if args.delete && matches!(args.overwrite, OverwriteArg::Never) {
        let message = "--delete removes what exists, --overwrite never leaves it: give one of them";
        return Err(UsageError(message.to_owned()).into());
    }
    let resources = secret::resources(global)?;
    let filter = Filter::new(args)?;
    let repository = secret::open(global)?;
    let (name, subpath) = snapshot::split(&args.snapshot);
    let (id, snapshot) = snapshot::find(&repository, &name, args.which.lineage.as_deref(), output)?;
    let subpath = snapshot::key_of(subpath)?;
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
            in_place: args.in_place,
            protected: protected(global, &repository),
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
        if error.kind() == ErrorKind::Full {
            // Nothing is written to the repository.
            let text = chunkstore::error::chain(&error);
            return anyhow::anyhow!(
                "{text}; make room there, or restore large files with --in-place"
            );
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
    ));
    for (count, what) in [
        (summary.skipped_unchanged, "files were there already"),
        (summary.deleted, "names deleted that the snapshot lacks"),
        (summary.warnings, "warnings"),
        (summary.files_incomplete, "files or folders are not, or not wholly, in the snapshot"),
        (summary.files_failed, "FILES COULD NOT BE RESTORED"),
    ] {
        if count > 0 {
            output.line(format!("{count} {what}"));
        }
    }
    let dry_run = args.dry_run;
    output.summary(global, &SummaryLine { snapshot: id, summary, seconds: elapsed, dry_run });
    let mut code = DONE;
    if summary.files_failed > 0 || summary.files_incomplete > 0 {
        code = INCOMPLETE;
    }
    for glob in filter.iter().flat_map(Filter::unmatched) {
        output.note(format!("nothing in the snapshot matches --include '{glob}'"));
        code = INCOMPLETE;
    }
    Ok(code)
}

/// What must survive a restore into a folder that holds it.
fn protected(global: &Global, repository: &Repository) -> Protected {
    let mut protected = Protected::default();
    if let Ok(Place::Folder(path)) = secret::place(global.repo.as_deref()) {
        protected.add(&path);
    }
    let id = Repository::identify(repository.store()).ok();
    let default_key = id.and_then(|id| secret::default_key_file(id).ok());
    let cache = secret::cache_dir(&global.s3);
    let given = [&global.key_file, &global.password_file, &default_key, &cache];
    given.into_iter().flatten().for_each(|path| protected.add(path));
    protected
}

/// Which paths to restore.
struct Filter {
    include: Option<Gitignore>,
    exclude: Gitignore,
    /// Each pattern to include by itself, and whether it has matched.
    each: Vec<(String, Gitignore, AtomicBool)>,
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
        let mut each = Vec::new();
        for glob in args.include.iter().filter(|glob| !glob.starts_with('!')) {
            let alone = build(std::slice::from_ref(glob))?;
            each.push((glob.clone(), alone, AtomicBool::new(false)));
        }
        Ok(Some(Self { include, exclude: build(&args.exclude)?, each }))
    }

    /// Patterns to include that nothing has matched.
    fn unmatched(&self) -> impl Iterator<Item = &str> {
        let none = self.each.iter().filter(|(_, _, matched)| !matched.load(Ordering::Relaxed));
        none.map(|(glob, ..)| &glob[..])
    }

    fn decide(&self, path: &[u8], is_dir: bool) -> FilterResult {
        if path.is_empty() {
            // Who asks for something in it does not ask for the folder itself.
            let part = self.include.is_some();
            return if part { FilterResult::Skip } else { FilterResult::Take };
        }
        let path = Path::new(std::ffi::OsStr::from_bytes(path));
        if self.exclude.matched_path_or_any_parents(path, is_dir).is_ignore() {
            return FilterResult::Prune;
        }
        match &self.include {
            Some(include) if !include.matched_path_or_any_parents(path, is_dir).is_ignore() => {
                FilterResult::Skip
            }
            _ => {
                for (_, alone, matched) in &self.each {
                    if !matched.load(Ordering::Relaxed)
                        && alone.matched_path_or_any_parents(path, is_dir).is_ignore()
                    {
                        matched.store(true, Ordering::Relaxed);
                    }
                }
                FilterResult::Take
            }
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
