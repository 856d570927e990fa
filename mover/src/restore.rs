//! Puts the content of a snapshot back into a folder.
//!
//! ```text
//!  tree, in order ─> planner ─ folders: found, or made at once (0700); the names in them compared with the tree
//!                       │
//!                       └─ files ─> window: pieces (blob -> file, offset), up to a byte budget
//!                                      │
//!        fetch: each blob once, in pack order, by all threads ─> create, write, finish, close
//!                                      │
//!        read back and verify ─> names ─> hard links ─> folders that ended: owner … times, deepest first
//! ```
//! # Where files are written
//! In a folder that we have just made nobody else can do anything yet: small files get their names at once. Everywhere
//! else, and what is written piece by piece, waits in a hidden folder (`hidden`) until it is whole and has its
//! metadata; then one rename puts it in the place of what has its name. So an existing file goes only when the
//! new one is there. Writing into existing files has to be asked for.
//!
//! # What is left in the target
//! Exactly what the snapshot has, of everything that was asked for: attributes and ACLs that it lacks are removed, as is
//! what new entries inherit from the folder. What is not asked for stays as it is.
//!
//! # Memory
//! One window, one read a thread, and the path from the root to where the planner stands. Nothing
//! grows with the number of files, of links, or with the size of a file or folder.
//!
//! # Failures
//! What cannot be fetched or written fails only the files it belongs to: such a file is counted and
//! reported, all others are restored. Attributes that cannot be set are warnings. Only a full or
//! read-only target, an unreachable store and cancellation end the whole restore.
//!
//! # Whom it trusts
//! Neither the tree (names are checked one by one) nor whoever owns the target: everything goes through
//! [`crate::fs`], so nothing is ever written outside the target, and never through a symlink or an
//! existing hard link. Owner and special rights are given only to content that was written or compared by us.

mod existing;
mod folders;
mod handles;
mod hidden;
mod levels;
mod links;
mod place;
mod plan;
mod present;
mod relink;
mod settle;
mod verify;
mod window;
mod write;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use chunkstore::repository::Repository;
use chunkstore::tree::NodeRef;
use chunkstore::{Error, ErrorKind, Result};
use rustix::io::Errno;

use crate::fs::{AttrFailure, Dir, is_plain_name, open_files, out_of_files};
use crate::monitor::{Concern, Monitor, Warning, display_path};
use folders::{Folders, ROOT, Site};
use handles::Handles;
use hidden::HiddenFolders;
use links::Links;

pub use hidden::is_leftover;
pub use place::Protected;

/// What happens to files that are in the target already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overwrite {
    /// Whatever has the name of something in the snapshot is replaced, a folder in the place of a file
    /// with all it holds.
    #[default]
    Always,
    /// As `Always`, except that content of the same kind, size and modification time is left as it is
    /// and gets its metadata only, and that no folder is removed for a file. What belongs to another user, or would
    /// get special rights, is replaced all the same. With `verify`, the content is compared, too.
    IfChanged,
    /// Everything that exists is left as it is; what is missing in existing folders is added. Nothing is deleted.
    Never,
}

/// How to restore.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// What happens to files that are there already.
    pub overwrite: Overwrite,
    /// Remove names that the snapshot lacks from the folders that are restored: not what the backup did not look
    /// into, nor what lies in another file system than the target.
    pub delete: bool,
    /// Write large files (of more than one piece, from about a mebibyte) into the place of existing ones, for want of
    /// room for both: not those that get special rights, change their owner or have several names. Whatever
    /// ends the restore early then costs the file that is being written, the old and the new.
    pub in_place: bool,
    /// What is neither changed nor removed.
    pub protected: Protected,
    /// Read everything back and compare it with its keyed hashes.
    pub verify: bool,
    /// Touch nothing, tell what would be done.
    pub dry_run: bool,
    /// Set owner and group. Without it nothing gets special rights (setuid, setgid, capabilities) either.
    pub owner: bool,
    /// Wait at the end until everything is on stable storage.
    pub sync: bool,
    /// Threads that fetch and write.
    pub threads: usize,
    /// Memory for what is wanted at one time.
    pub window_bytes: usize,
    /// Folder for temporary files without a name.
    pub scratch: PathBuf,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self {
            overwrite: Overwrite::default(),
            delete: false,
            in_place: false,
            protected: Protected::default(),
            verify: false,
            dry_run: false,
            owner: rustix::process::geteuid().is_root(),
            sync: true,
            threads: std::thread::available_parallelism().map_or(1, Into::into),
            window_bytes: 32 << 20,
            scratch: std::env::temp_dir(),
        }
    }
}

/// What a filter says about a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FilterResult {
    /// Restore it.
    Take,
    /// Leave it out; if it is a folder, ask about what it holds. It is then made if something in it is
    /// restored.
    Skip,
    /// Leave it out with all it holds.
    Prune,
}

/// Decides by path below the restored folder (components separated by `/`, empty for that folder
/// itself) and whether it is a folder.
pub type Filter<'a> = dyn Fn(&[u8], bool) -> FilterResult + 'a;

/// What to restore.
pub struct Request<'a> {
    /// Where from.
    pub repository: &'a Repository,
    /// Root of the snapshot's tree, and its level.
    pub root: (NodeRef, u8),
    /// Key of what becomes the target: components joined by a zero byte, empty for everything. A
    /// single file lands in the target under its own name, whatever the filter says.
    pub subpath: &'a [u8],
    /// The folder to restore into, made if it is missing; its name only, if it is given opened.
    pub target: &'a Path,
    /// That folder, opened by a caller who does not trust the path.
    pub opened: Option<Dir>,
    /// What to restore; everything without one.
    pub filter: Option<&'a Filter<'a>>,
    /// How.
    pub options: RestoreOptions,
    /// Who is told.
    pub monitor: &'a dyn Monitor,
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct RestoreSummary {
    /// Files, links and special files restored, including further names of one file.
    pub files: u64,
    /// Folders restored or found.
    pub dirs: u64,
    /// Bytes of the restored files, holes included.
    pub bytes: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Existing files left as they were, or given metadata only.
    pub skipped_unchanged: u64,
    /// Names removed because the snapshot lacks them. A folder removed whole counts as one.
    pub deleted: u64,
    /// Everything reported that did not cost a file: attributes, links, damage to the tree.
    pub warnings: u64,
    /// Files and folders that are not, or not wholly, as the snapshot has them.
    pub files_failed: u64,
    /// How many of them the target would not take; what the others need is damaged in the repository.
    pub files_refused: u64,
    /// Files and folders that the snapshot has not, or not wholly, since they could not be read when they were saved.
    /// What there is of them is restored.
    pub files_incomplete: u64,
}

/// Restores what `request` says.
///
/// # Errors
/// When the target cannot be opened, is full or read-only, the subpath is not in the snapshot, the store
/// fails, or the monitor cancels. Single files that fail are counted instead.
pub fn restore(request: &Request<'_>) -> Result<RestoreSummary> {
    let dry_run = request.options.dry_run;
    let target = match &request.opened {
        Some(opened) => Opened { dir: Some(opened.clone()), fresh: false, made: false },
        None => open_target(request.target, dry_run)?,
    };
    let opened = |error: io::Error| {
        let message =
            format!("the folder '{}' cannot be looked at: {error}", request.target.display());
        Error::new(error_kind(&error), message)
    };
    let handles = Handles::new(open_files(), request.options.threads)?;
    let mut site = Site { fresh: target.fresh, dev: 0, base: ROOT };
    if let Some(dir) = &target.dir {
        site.dev = dir.stat().map_err(opened)?.dev;
        if request.options.protected.holds(dir).map_err(opened)? {
            let message = format!(
                "'{}' lies in the repository (its files, key or cache): restore to another folder",
                request.target.display()
            );
            return Err(Error::new(ErrorKind::Invalid, message));
        }
    }
    let shared = Shared {
        repository: request.repository,
        options: &request.options,
        monitor: request.monitor,
        folders: Folders::new(target.dir.clone(), site, handles.folders),
        handles,
        hidden: HiddenFolders::default(),
        waiting: AtomicU64::default(),
        links: Links::default(),
        counters: Counters::default(),
        stopped: AtomicBool::new(false),
        fatal: Mutex::default(),
    };
    let done = plan::Planner::new(&shared, request, target.fresh).and_then(|mut planner| {
        let done = planner.run();
        if done.is_err() {
            planner.remove_unfinished();
        }
        shared.remove_hidden(None);
        done.map(|()| planner.finish_target())
    });
    if let Err(error) = done {
        if target.made && error.kind() == ErrorKind::NotFound {
            // Nothing was asked for that there is. Only if it is empty.
            let _removed = std::fs::remove_dir(request.target);
        }
        return Err(error);
    }
    if request.options.sync && !dry_run {
        shared.sync()?;
    }
    Ok(shared.counters.summary())
}

/// The target.
struct Opened {
    /// Missing if a dry run would make it.
    dir: Option<Dir>,
    /// Whether nothing is in it, and nothing new in it inherits anything.
    fresh: bool,
    made: bool,
}

fn open_target(path: &Path, dry_run: bool) -> Result<Opened> {
    let fail = |error: io::Error| {
        let message = format!("cannot open the folder '{}' to restore to: {error}", path.display());
        Error::new(error_kind(&error), message)
    };
    match Dir::open_root(path) {
        Ok(dir) => return Ok(Opened { dir: Some(dir), fresh: false, made: false }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
    }
    if dry_run {
        return Ok(Opened { dir: None, fresh: true, made: false });
    }
    std::fs::create_dir_all(path).map_err(fail)?;
    let dir = Dir::open_root(path).map_err(fail)?;
    let fresh = dir.own_xattrs().is_ok_and(|xattrs| xattrs.entries.is_empty());
    Ok(Opened { dir: Some(dir), fresh, made: true })
}

fn error_kind(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::Full,
        _ => ErrorKind::Invalid,
    }
}

/// What everybody who takes part in a restore uses.
struct Shared<'a> {
    repository: &'a Repository,
    options: &'a RestoreOptions,
    monitor: &'a dyn Monitor,
    handles: Handles,
    folders: Folders,
    hidden: HiddenFolders,
    /// How many things have waited in hidden folders.
    waiting: AtomicU64,
    links: Links,
    counters: Counters,
    stopped: AtomicBool,
    fatal: Mutex<Option<Error>>,
}

#[derive(Default)]
struct Counters {
    files: AtomicU64,
    dirs: AtomicU64,
    bytes: AtomicU64,
    bytes_written: AtomicU64,
    skipped_unchanged: AtomicU64,
    deleted: AtomicU64,
    warnings: AtomicU64,
    files_failed: AtomicU64,
    files_refused: AtomicU64,
    files_incomplete: AtomicU64,
}

impl Counters {
    fn summary(&self) -> RestoreSummary {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RestoreSummary {
            files: read(&self.files),
            dirs: read(&self.dirs),
            bytes: read(&self.bytes),
            bytes_written: read(&self.bytes_written),
            skipped_unchanged: read(&self.skipped_unchanged),
            deleted: read(&self.deleted),
            warnings: read(&self.warnings),
            files_failed: read(&self.files_failed),
            files_refused: read(&self.files_refused),
            files_incomplete: read(&self.files_incomplete),
        }
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Shared<'_> {
    /// Reports something that costs no file.
    fn warn(&self, path: &[u8], message: impl Into<String>) {
        count(&self.counters.warnings, 1);
        self.monitor.warning(Warning {
            path: path.into(),
            message: message.into(),
            concern: Concern::Detail,
        });
    }

    /// Reports something that is restored as it was saved, while it changed.
    fn warn_changed(&self, path: &[u8], message: &str) {
        count(&self.counters.warnings, 1);
        let (path, message, concern) = (path.into(), message.into(), Concern::Changed);
        self.monitor.warning(Warning { path, message, concern });
    }

    /// Reports something that the snapshot does not have, or not wholly.
    fn tell_incomplete(&self, path: &[u8], message: &str) {
        count(&self.counters.files_incomplete, 1);
        let (path, message, concern) = (path.into(), message.into(), Concern::Missing);
        self.monitor.warning(Warning { path, message, concern });
    }

    /// Reports a file or folder that could not be restored.
    fn fail(&self, path: &[u8], message: impl Into<String>) {
        count(&self.counters.files_failed, 1);
        self.monitor.warning(Warning {
            path: path.into(),
            message: message.into(),
            concern: Concern::Missing,
        });
    }

    /// As [`fail`](Self::fail), for a failed call: one that no other file would survive ends everything.
    fn fail_io(&self, path: &[u8], what: &str, error: &io::Error) {
        self.fail(path, format!("{what}: {error}"));
        count(&self.counters.files_refused, 1);
        if let Some(error) = out_of_files(error) {
            self.stop(error);
        }
        let errno = Errno::from_io_error(error);
        if matches!(errno, Some(Errno::NOSPC | Errno::DQUOT | Errno::ROFS)) {
            let kind =
                if errno == Some(Errno::ROFS) { ErrorKind::Invalid } else { ErrorKind::Full };
            let message = format!("the target takes no more at '{}': {error}", display_path(path));
            self.stop(Error::new(kind, message));
        }
    }

    fn warn_attributes(&self, path: &[u8], failures: &[AttrFailure]) {
        for failure in failures {
            self.warn(path, failure.told());
        }
    }

    fn stop(&self, error: Error) {
        lock(&self.fatal).get_or_insert(error);
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Whether everybody should end what they do.
    fn is_stopped(&self) -> bool {
        if self.monitor.is_cancelled() && !self.stopped.load(Ordering::Relaxed) {
            self.stop(Error::cancelled());
        }
        self.stopped.load(Ordering::Relaxed)
    }

    fn check(&self) -> Result<()> {
        if !self.is_stopped() {
            return Ok(());
        }
        Err(lock(&self.fatal).as_ref().map_or_else(Error::cancelled, Error::duplicate))
    }

    fn sync(&self) -> Result<()> {
        let synced = self.folders.root().and_then(|root| Ok(rustix::fs::syncfs(&root)?));
        synced.map_err(|error| {
            Error::new(error_kind(&error), format!("the target cannot be made durable: {error}"))
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whoever panicked holding it ends the restore; others may still report.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
