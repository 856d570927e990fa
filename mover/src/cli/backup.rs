//! `backup`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use chunkstore::id::SnapshotId;
use chunkstore::repository::Repository;
use chunkstore::{Error, ErrorKind};
use serde::Serialize;

use super::args::{Backup, Global, Init};
use super::output::{Output, bytes, seconds};
use super::patterns::Patterns;
use super::progress::Progress;
use super::{DONE, INCOMPLETE, keys, now, secret};
use crate::backup::{Outcome, Request, backup};
use crate::monitor::{Monitor, Warning};

/// The last line of `backup --json`.
#[derive(Serialize)]
struct SummaryLine {
    snapshot: Option<SnapshotId>,
    parent: Option<SnapshotId>,
    files: u64,
    dirs: u64,
    bytes: u64,
    bytes_read: u64,
    bytes_stored: u64,
    blobs_new: u64,
    files_changed: u64,
    files_unmodified: u64,
    files_missing: u64,
    files_changed_while_read: u64,
    files_vanished: u64,
    warnings: u64,
    seconds: f64,
    dry_run: bool,
}

pub(super) fn run(
    global: &Global,
    args: &Backup,
    output: &Output,
    cancelled: &Arc<AtomicBool>,
) -> Result<u8> {
    let resources = secret::resources(global)?;
    let source = std::path::absolute(&args.path)
        .with_context(|| format!("cannot tell where '{}' is", args.path.display()))?;
    let patterns = Patterns::new(&source, &args.exclude, &args.exclude_file)?;
    let repository = open_or_create(global, args, output)?;
    let host = host();
    let lineage = args.lineage.clone().unwrap_or_else(|| default_lineage(&host, &source));
    let matcher = |path: &[u8], is_dir: bool| {
        patterns.as_ref().is_some_and(|patterns| patterns.exclude(path, is_dir))
    };
    let request = Request {
        source,
        opened: None,
        lineage,
        parent: None,
        host,
        tags: args.tag.iter().cloned().collect::<BTreeMap<_, _>>(),
        excludes: patterns.is_some().then_some(&matcher),
        exclude_caches: args.exclude_caches,
        skip: inode_of(global.repo.as_deref()),
        one_file_system: args.one_file_system,
        changed_by: args.changed_by.map(Into::into),
        compression: args.compression,
        dry_run: args.dry_run,
        resources,
        scratch: secret::scratch(),
        now: now(),
    };
    let mut progress = Progress::start("saved", global.quiet, output, cancelled);
    let known = expect_as_last_time(&repository, &request.lineage, &progress);
    let done = AtomicBool::new(false);
    let result = std::thread::scope(|scope| {
        if !known && progress.is_live() {
            let (request, progress, done) = (&request, &progress, &done);
            let repository = &repository;
            scope.spawn(move || estimate(repository, request, progress, done));
        }
        // Also if it panics: the estimate is not to go on then.
        let _done = SetAtEnd(&done);
        backup(&repository, &request, &now, &progress)
    });
    progress.end();
    let outcome = result.map_err(|error| {
        if error.kind() == ErrorKind::Cancelled {
            let message =
                "interrupted; what was uploaded is kept, and the next backup continues there";
            return anyhow::Error::new(Error::new(ErrorKind::Cancelled, message));
        }
        error.into()
    })?;
    for pattern in patterns.iter().flat_map(Patterns::unused) {
        // A typo, or a path elsewhere, would else be found out when the backup is too large.
        output.note(format_args!(
            "note: nothing was excluded by the pattern '{pattern}' (patterns are relative to the folder)"
        ));
    }
    report(&outcome, &progress, global, args, output)
}

fn open_or_create(global: &Global, args: &Backup, output: &Output) -> Result<Arc<Repository>> {
    if !args.init {
        return if args.dry_run { secret::open(global) } else { secret::open_to_write(global) };
    }
    let exists = match secret::store(global).ok().map(|store| Repository::identify(&*store)) {
        None => false,
        Some(Ok(_)) => true,
        Some(Err(error)) if error.kind() == ErrorKind::NotFound => false,
        Some(Err(error)) => return Err(error.into()),
    };
    if !exists && args.dry_run {
        bail!(
            "there is no repository yet, and a dry run makes none: leave out --dry-run or --init"
        );
    }
    if exists {
        secret::open_to_write(global)
    } else {
        keys::create(global, &Init::default(), output)
    }
}

/// Device and inode of the repository's folder.
fn inode_of(repo: Option<&str>) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let folder = std::fs::metadata(repo?).ok()?;
    Some((folder.dev(), folder.ino()))
}

fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn default_lineage(host: &str, source: &Path) -> String {
    // Components are what counts: 'a/' and 'a/.' are the folder 'a'.
    let path: PathBuf = source.components().collect();
    use std::os::unix::ffi::OsStrExt;
    format!("{host}:{}", crate::monitor::display_path(path.as_os_str().as_bytes()))
}

/// The size of the previous snapshot is the best guess for this one. Whether there is one.
fn expect_as_last_time(repository: &Repository, lineage: &str, progress: &Progress) -> bool {
    let last = repository.newest_snapshot(&|snapshot| snapshot.lineage == lineage);
    let Ok(Some((_, last))) = last else {
        return false;
    };
    progress.expect(last.summary.bytes);
    true
}

/// Sets a flag when it goes.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Adds up the sizes of all files beside the backup, so that a terminal shows how long a first one
/// takes.
fn estimate(
    repository: &Arc<Repository>,
    request: &Request<'_>,
    progress: &Progress,
    done: &AtomicBool,
) {
    /// Stops when the backup is faster.
    struct Until<'a>(&'a AtomicBool);
    impl Monitor for Until<'_> {
        fn begin(&self, _: &[u8]) {}
        fn advance(&self, _: u64, _: u64) {}
        fn warning(&self, _: Warning) {}
        fn is_cancelled(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }
    let request = Request { dry_run: true, ..request.clone() };
    if let Ok(outcome) = backup(repository, &request, &now, &Until(done)) {
        progress.expect(outcome.summary.bytes);
    }
}

fn report(
    outcome: &Outcome,
    progress: &Progress,
    global: &Global,
    args: &Backup,
    output: &Output,
) -> Result<u8> {
    let summary = outcome.summary;
    let warnings = progress.warnings();
    let elapsed = progress.seconds();
    let changed = format!(
        "{} files and {} folders, {}; {} read, {} unchanged",
        summary.files,
        summary.dirs,
        bytes(summary.bytes),
        summary.files_changed,
        summary.files_unmodified,
    );
    match outcome.id {
        Some(id) => {
            output.line(changed);
            let parent = match outcome.parent {
                Some(parent) => format!(" (compared with {})", parent.short()),
                None => String::new(),
            };
            output.line(format!(
                "saved snapshot {}{parent}: {} read, {} stored, in {}",
                id.short(),
                bytes(summary.bytes_read),
                bytes(summary.bytes_stored),
                seconds(elapsed as u64),
            ));
        }
        None => output.line(format!("would save {changed} ({})", bytes(summary.bytes_read))),
    }
    if warnings.all() > 0 {
        output.line(format!(
            "{} warnings; not or not wholly saved: {}; changed while they were read: {}; vanished: {}",
            warnings.all(),
            warnings.missing(),
            warnings.changed(),
            warnings.vanished(),
        ));
    }
    let line = SummaryLine {
        snapshot: outcome.id,
        parent: outcome.parent,
        files: summary.files,
        dirs: summary.dirs,
        bytes: summary.bytes,
        bytes_read: summary.bytes_read,
        bytes_stored: summary.bytes_stored,
        blobs_new: summary.blobs_new,
        files_changed: summary.files_changed,
        files_unmodified: summary.files_unmodified,
        files_missing: warnings.missing(),
        files_changed_while_read: warnings.changed(),
        files_vanished: warnings.vanished(),
        warnings: warnings.all(),
        seconds: elapsed,
        dry_run: args.dry_run,
    };
    output.summary(global, &line);
    Ok(if warnings.missing() > 0 { INCOMPLETE } else { DONE })
}
