//! Saves a folder as a snapshot.
//!
//! ```text
//!  walk (this thread, path order)                     workers
//!  ───────────────────────────────                    ────────────────────────────────────────
//!  list, lstat ─┬─ as in the parent ──────┐
//!               ├─ small files ── batch ──┼──────────> read, bundle, hash ─┐
//!               ├─ medium file ───────────┼──────────> read, cut, hash ────┼─> Writer: compress,
//!               └─ large file: read, cut ─┼── chunks ─> hash ──────────────┘   seal, pack, upload
//!                                         ▼                    │
//!                      queue in path order <───────────────────┘ references
//!                                         ▼
//!                                   TreeBuilder ─> nodes ─> Writer
//! ```
//! The walk is the only producer and the only consumer of results, so nothing can deadlock: workers
//! wait for nobody but the writer, which waits only for uploads.
//!
//! An entry that has not changed since the parent snapshot costs one `lstat` and a comparison, unless its
//! bundle is given up (`bundle_use`); a leaf of
//! the parent's tree whose entries all recur is taken over without being encoded.

mod assemble;
mod bundle;
mod bundle_use;
mod large;
mod parent;
mod pipeline;
mod read;
mod settings;
mod walk;
mod worker;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use chunkstore::codec::compress::Level;
use chunkstore::id::SnapshotId;
use chunkstore::record::{Session, Snapshot, Summary};
use chunkstore::repository::Repository;
use chunkstore::writer::Writer;
use chunkstore::{Error, ErrorKind, Result};

pub use parent::ChangedBy;
pub use settings::{MEMORY_BYTES_MIN, Resources};

use assemble::Tree;
use settings::OpenDirs;

use crate::fs::Dir;
use crate::monitor::{Monitor, Warning, WarningCounts};

/// Whether to leave out the entry at a path from the root of the backup, which is a folder or not.
pub type Excludes<'a> = dyn Fn(&[u8], bool) -> bool + Sync + 'a;

/// What to save and how.
#[derive(Clone)]
pub struct Request<'a> {
    /// The folder; its name only, if it is given opened.
    pub source: PathBuf,
    /// The folder, opened by a caller who does not trust the path.
    pub opened: Option<Dir>,
    /// Identity of the folder across backups.
    pub lineage: String,
    /// The snapshot to compare with, if it is there and of this lineage; else the newest of it.
    pub parent: Option<SnapshotId>,
    /// Machine, for people.
    pub host: String,
    /// Tags of the snapshot.
    pub tags: BTreeMap<String, String>,
    /// Whether to leave out the entry at this path from the root of the backup.
    pub excludes: Option<&'a Excludes<'a>>,
    /// Leave out the content of folders marked by a `CACHEDIR.TAG`.
    pub exclude_caches: bool,
    /// Device and inode of a folder whose content is left out: the repository, should it lie within.
    pub skip: Option<(u64, u64)>,
    /// Do not descend into other file systems.
    pub one_file_system: bool,
    /// How to tell a changed file; `None` to decide by file system.
    pub changed_by: Option<ChangedBy>,
    /// Compression of file data.
    pub compression: Level,
    /// Read and store nothing, tell what would be done.
    pub dry_run: bool,
    /// Memory and threads.
    pub resources: Resources,
    /// Folder for temporary files without a name.
    pub scratch: PathBuf,
    /// When the backup begins.
    pub now: jiff::Timestamp,
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// The snapshot, unless it was a dry run.
    pub id: Option<SnapshotId>,
    /// The snapshot it was compared with.
    pub parent: Option<SnapshotId>,
    /// Counts.
    pub summary: Summary,
}

/// Saves `request.source` into `repository`.
///
/// # Errors
/// When the folder cannot be opened, the repository fails, or the monitor cancels. What was uploaded by
/// then is found again by the next backup.
pub fn backup(
    repository: &Arc<Repository>,
    request: &Request<'_>,
    clock: &dyn Fn() -> jiff::Timestamp,
    monitor: &dyn Monitor,
) -> Result<Outcome> {
    let monitor = &Counting { inner: monitor, counts: WarningCounts::default() };
    let root = match &request.opened {
        Some(opened) => opened.clone(),
        None => open_source(&request.source)?,
    };
    let open_dirs = OpenDirs::new(crate::fs::open_files(), request.resources.workers)?;
    if request.dry_run {
        let parent = find_parent(repository, request)?;
        let id = parent.as_ref().map(|(id, _)| *id);
        let summary = walk::dry_run(repository, request, root, parent, open_dirs, monitor)?;
        return Ok(Outcome { id: None, parent: id, summary });
    }
    let session = Session {
        purpose: "backup".to_owned(),
        writer: format!("{} process {}: {}", request.host, std::process::id(), request.lineage),
        started: request.now,
        heartbeat: 0,
    };
    let settings = request.resources.writer(request.compression);
    let writer = Writer::begin(repository.clone(), settings, &session)?;
    // The parent is chosen after the announcement: nothing it refers to can be deleted from here on,
    // unless it was marked before, which the writer knows.
    let mut parent_id = None;
    let scanned = find_parent(repository, request).and_then(|parent| {
        parent_id = parent.as_ref().map(|(id, _)| *id);
        walk::scan(repository, &writer, request, root, parent, open_dirs, monitor)
    });
    let Tree { root, level, mut summary, sparse } = match scanned {
        Ok(scanned) => scanned,
        Err(error) => {
            // Name what was uploaded, so that the next backup finds it. The first error counts.
            let _also_failed = writer.abandon();
            return Err(error);
        }
    };
    let counters = writer.counters();
    summary.blobs_new = counters.blobs_new.load(Ordering::Relaxed);
    summary.warnings = monitor.counts.all();
    summary.files_missing = monitor.counts.missing();
    summary.files_changed_while_read = monitor.counts.changed();
    summary.files_vanished = monitor.counts.vanished();
    let mut snapshot = Snapshot {
        root,
        level,
        lineage: request.lineage.clone(),
        host: request.host.clone(),
        path: crate::monitor::display_path(request.source.as_os_str().as_encoded_bytes()),
        tags: request.tags.clone(),
        started: request.now,
        finished: request.now,
        parent: parent_id,
        summary,
        sparse,
        program: concat!("ebackup ", env!("CARGO_PKG_VERSION")).to_owned(),
        copy_of: None,
    };
    let id = writer.commit(|bytes_stored| {
        snapshot.summary.bytes_stored = bytes_stored;
        snapshot.finished = clock();
        summary = snapshot.summary;
        snapshot
    })?;
    Ok(Outcome { id: Some(id), parent: parent_id, summary })
}

/// Counts warnings on their way, so that the snapshot has them.
struct Counting<'a> {
    inner: &'a dyn Monitor,
    counts: WarningCounts,
}

impl Monitor for Counting<'_> {
    fn begin(&self, path: &[u8]) {
        self.inner.begin(path);
    }

    fn advance(&self, entries: u64, bytes: u64) {
        self.inner.advance(entries, bytes);
    }

    fn warning(&self, warning: Warning) {
        self.counts.add(warning.concern);
        self.inner.warning(warning);
    }

    fn is_cancelled(&self) -> bool {
        self.inner.is_cancelled()
    }
}

fn open_source(path: &Path) -> Result<Dir> {
    Dir::open_root(path).map_err(|error| {
        let kind = match error.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
            _ => ErrorKind::Invalid,
        };
        let path = path.display();
        Error::new(kind, format!("cannot open the folder '{path}' to save: {error}"))
    })
}

fn find_parent(
    repository: &Repository,
    request: &Request<'_>,
) -> Result<Option<(SnapshotId, Snapshot)>> {
    if let Some(id) = request.parent {
        match repository.snapshot(id) {
            Ok(snapshot) if snapshot.lineage == request.lineage => {
                return Ok(Some((id, snapshot)));
            }
            // Damage costs reading more, not the backup; what the store refuses, it refuses again.
            Ok(_) | Err(_) => {}
        }
    }
    repository.newest_snapshot(&|snapshot| snapshot.lineage == request.lineage)
}
