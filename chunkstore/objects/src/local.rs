//! Objects as files below a directory: key `packs/3f/3f9c` is the file `<root>/packs/3f/3f9c`.
//!
//! ```text
//! create ─> make folders ─> .tmp-<random> ─write─> fsync ─rename, never over another─> fsync folder
//!                                                                    └ the commit point
//! ```
//!
//! - *Crash*: before the rename only a temporary file can be left. No listing or read shows it, and
//!   [`ObjectStore::remove_unfinished`] removes it. After the rename the object is whole.
//! - *Durability*: whoever finds an object or folder that another process made syncs the folder it
//!   is in before building on it, for that process may have died before it did.
//! - *Confinement*: paths are walked folder by folder from the opened root and symbolic links are
//!   never followed. Whatever is no regular file with a valid key is no object.
//!
//! It does not lock anything, does not remove empty folders, and does not watch for the root being
//! replaced: it stays with the directory it opened.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::key::{self, KEY_BYTES_MAX};
use crate::{Created, Error, ErrorKind, ObjectMeta, ObjectStore, Result};

mod folder;
mod handles;
mod read;
mod walk;
mod write;

use folder::KnownFolders;
use handles::Handles;

/// One durable step of a write, in the order they happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// Making one missing folder.
    MakeFolder,
    /// Creating the temporary file.
    CreateTemporary,
    /// Writing the body into the temporary file.
    Write,
    /// Syncing the temporary file.
    Sync,
    /// Renaming the temporary file to the object's name.
    Publish,
    /// Syncing a folder, after making a folder, publishing or deleting in it.
    SyncFolder,
    /// Unlinking an object.
    Delete,
}

/// Is told each step, with the key it is for, before it is taken; an error ends the operation
/// there as if the process had died: see [`LocalStore::with_observer`].
#[cfg(feature = "testing")]
pub type Observer = std::sync::Arc<dyn Fn(Step, &str) -> io::Result<()> + Send + Sync>;

/// A store of objects in a local directory.
pub struct LocalStore {
    path: PathBuf,
    root: OwnedFd,
    known: KnownFolders,
    handles: Handles,
    #[cfg(feature = "testing")]
    observer: Option<Observer>,
}

impl std::fmt::Debug for LocalStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalStore").field("path", &self.path).finish_non_exhaustive()
    }
}

impl LocalStore {
    /// Opens the store in the existing directory `root`; [`ErrorKind::Invalid`] when there is none.
    pub fn open(root: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(CWD, root, flags, Mode::empty())
            .map_err(|err| root_error("open", root, err.into()))?;
        Ok(Self {
            path: root.to_owned(),
            root: opened,
            known: KnownFolders::default(),
            handles: Handles::default(),
            #[cfg(feature = "testing")]
            observer: None,
        })
    }

    /// Makes the directory `root` and its missing parents, for the owner only and durably. One that
    /// exists is left as it is.
    pub fn create_root(root: &Path) -> Result<()> {
        let fail = |err| root_error("create", root, err);
        let missing: Vec<&Path> = root
            .ancestors()
            .take_while(|path| !path.as_os_str().is_empty() && !path.exists())
            .collect();
        for path in missing.into_iter().rev() {
            match DirBuilder::new().mode(0o700).create(path) {
                Err(err) if err.kind() != io::ErrorKind::AlreadyExists => return Err(fail(err)),
                Ok(()) | Err(_) => {}
            }
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let parent = File::open(parent.unwrap_or(Path::new("."))).map_err(fail)?;
            folder::sync(&parent).map_err(|err| fail(err.into()))?;
        }
        if root.is_dir() { Ok(()) } else { Err(fail(Errno::NOTDIR.into())) }
    }

    /// Has `observer` called before each durable step of a write.
    ///
    /// When it returns an error, the operation stops right there and cleans nothing up, as if the
    /// process had died. A torn write is made by an observer that truncates the temporary file
    /// (the name beginning with `.tmp-` in the folder of the key) and fails [`Step::Sync`]: until
    /// that step the content is not promised to be there.
    #[cfg(feature = "testing")]
    #[must_use]
    pub fn with_observer(mut self, observer: Observer) -> Self {
        self.observer = Some(observer);
        self
    }
}

impl ObjectStore for LocalStore {
    fn create(&self, key: &str, parts: &[io::IoSlice<'_>]) -> Result<Created> {
        key::validate("create", key)?;
        self.write("create", key, &mut write::Body::Parts(parts), write::Publish::IfAbsent)
    }

    fn create_from(&self, key: &str, body: &mut dyn io::Read) -> Result<Created> {
        key::validate("create", key)?;
        self.write("create", key, &mut write::Body::Stream(body), write::Publish::IfAbsent)
    }

    fn replace(&self, key: &str, body: &[u8]) -> Result<()> {
        key::validate("replace", key)?;
        let parts = [io::IoSlice::new(body)];
        self.write("replace", key, &mut write::Body::Parts(&parts), write::Publish::Always)
            .map(|_| ())?;
        self.handles.forget(key);
        Ok(())
    }

    fn read(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        key::validate("read", key)?;
        self.read_whole(key, limit)
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        key::validate("read", key)?;
        self.read_range(key, offset, buf)
    }

    fn stat(&self, key: &str) -> Result<ObjectMeta> {
        key::validate("stat", key)?;
        let (folder, name) = folder::split(key);
        let stat = folder::open(&self.root, folder)
            .and_then(|folder| rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW))
            .map_err(|err| read::error("stat", key, err))?;
        read::meta(key, &stat).ok_or_else(|| read::error("stat", key, Errno::NOENT))
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta) -> Result<()>) -> Result<()> {
        key::validate_prefix("list", prefix)?;
        self.walk("list", prefix, &mut |folder, path, name| {
            let bytes = name.to_bytes();
            if !key::is_segment(bytes) || path.len() + bytes.len() > KEY_BYTES_MAX {
                return Ok(());
            }
            let key = format!("{path}{}", name.to_string_lossy());
            match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => read::meta(&key, &stat).map_or(Ok(()), &mut *each),
                Err(Errno::NOENT) => Ok(()), // deleted since the folder was read
                Err(err) => Err(Error::from_io("list", key, err.into())),
            }
        })
    }

    fn delete(&self, key: &str) -> Result<()> {
        key::validate("delete", key)?;
        self.remove(key)
    }

    fn remove_unfinished(&self, older_than: Duration, now: SystemTime) -> Result<u64> {
        const OPERATION: &str = "remove stale temporaries below";
        let mut removed = 0;
        self.walk(OPERATION, "", &mut |folder, path, name| {
            if !write::is_temporary(name.to_bytes()) {
                return Ok(());
            }
            let fail = |err: Errno| {
                Error::from_io(OPERATION, format!("{path}{}", name.to_string_lossy()), err.into())
            };
            let stat = match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => return Ok(()),
                stat => stat.map_err(fail)?,
            };
            let stale =
                read::modified(&stat).checked_add(older_than).is_some_and(|expiry| expiry <= now);
            if !stale || FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return Ok(());
            }
            match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
                Ok(()) => removed += 1,
                Err(Errno::NOENT) => {}
                Err(err) => return Err(fail(err)),
            }
            Ok(())
        })?;
        Ok(removed)
    }

    fn location(&self) -> String {
        self.path.display().to_string()
    }
}

/// An error about the root, which is `Invalid` when it is not there or no directory.
fn root_error(operation: &'static str, root: &Path, err: io::Error) -> Error {
    let path = root.display().to_string();
    let reason = match err.kind() {
        io::ErrorKind::NotFound => "the directory does not exist",
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => "it is not a directory",
        _ => return Error::from_io(operation, path, err),
    };
    Error::new(ErrorKind::Invalid, operation, path).because(reason)
}
