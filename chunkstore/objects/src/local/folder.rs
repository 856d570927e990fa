//! The folders objects are in: opened from the root down without following links, made when
//! missing, and synced until their own entries are known to be durable.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};

use super::write::{self, Halted};
use super::{LocalStore, Step};

/// Known folders kept at most. A repository has below a thousand; a user of another layout loses
/// time at this bound, not correctness.
const KNOWN_MAX: usize = 4096;

/// Paths of the folders whose entry in the folder above was synced by this process. One that it
/// finds may have been made by a process that died before syncing it.
#[derive(Default)]
pub(super) struct KnownFolders(Mutex<HashSet<String>>);

impl KnownFolders {
    fn contains(&self, path: &str) -> bool {
        self.lock().contains(path)
    }

    fn insert(&self, path: &str) {
        let mut known = self.lock();
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        known.insert(path.to_owned());
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Folder (empty for the root) and file name of a key.
pub(super) fn split(key: &str) -> (&str, &str) {
    key.rsplit_once('/').unwrap_or(("", key))
}

/// Opens one folder in `parent`.
pub(super) fn enter<P: rustix::path::Arg>(
    parent: impl AsFd,
    name: P,
) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Opens the existing folder `path` below `root`.
pub(super) fn open(root: &OwnedFd, path: &str) -> rustix::io::Result<OwnedFd> {
    let mut folder = enter(root, c".")?;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        folder = enter(&folder, name)?;
    }
    Ok(folder)
}

/// Makes the entries of a folder durable.
pub(super) fn sync(folder: impl AsFd) -> rustix::io::Result<()> {
    match retry_on_intr(|| rustix::fs::fsync(&folder)) {
        // The answer of file systems that have no such thing, some network ones for instance.
        Err(Errno::INVAL) => Ok(()),
        result => result,
    }
}

impl LocalStore {
    /// Opens the folder `path`, making what is missing of it; its existence is durable afterwards.
    pub(super) fn make_folder(
        &self,
        operation: &'static str,
        key: &str,
        path: &str,
    ) -> Halted<OwnedFd> {
        let fail = |err| write::error(operation, key, err);
        let mut folder = enter(&self.root, c".").map_err(fail)?;
        let mut end = 0;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            end += name.len();
            let upto = &path[..end];
            end += 1; // the slash
            let (next, made) = match enter(&folder, name) {
                Err(Errno::NOENT) => {
                    self.before(Step::MakeFolder, operation, key)?;
                    match rustix::fs::mkdirat(&folder, name, Mode::RWXU) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(err) => return Err(fail(err).into()),
                    }
                    (enter(&folder, name).map_err(fail)?, true)
                }
                next => (next.map_err(fail)?, false),
            };
            if made || !self.known.contains(upto) {
                self.sync_folder(operation, key, &folder)?;
                self.known.insert(upto);
            }
            folder = next;
        }
        Ok(folder)
    }

    /// Takes the step of syncing `folder`.
    pub(super) fn sync_folder(
        &self,
        operation: &'static str,
        key: &str,
        folder: &OwnedFd,
    ) -> Halted<()> {
        self.before(Step::SyncFolder, operation, key)?;
        sync(folder).map_err(|err| write::error(operation, key, err).into())
    }
}
