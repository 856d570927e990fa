//! Hidden folders: where files wait until they are whole, and from where they get their names.
//!
//! ```text
//! target/.ebackup-links-0123456789abcdef/   0700, without inherited ACLs, locked while we live
//!     t<number>    being written; renamed to its name when it is whole, has its metadata and was verified
//!     l<key>       a further link of a restored file that has more names; its other names are linked from it
//!     k<inode>     a link that says which key an existing file with several names was taken for
//! ```
//! There is one in the target, and one in each file system that is mounted below it. Nobody but us can look
//! into it: so whoever owns the target cannot change a file between the moment when it gets its owner and the one
//! when it gets its special rights. Neither memory nor open files grow with the number of files.
//!
//! A restore that is killed leaves its folder, without the lock: the next removes it, and a backup never saves it.

use std::io;
use std::sync::{Mutex, OnceLock};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::fs::{Current, Dir, Timestamp};

use super::lock;

const PREFIX: &[u8] = b".ebackup-links-";
/// Names tried until one is not taken away by somebody else.
const ATTEMPTS: u32 = 16;

/// Whether `name` is that of a hidden folder in which a restore keeps what it is about to name. A restore that was
/// killed leaves it; it is no content of the folder it lies in.
pub fn is_leftover(name: &[u8]) -> bool {
    name.strip_prefix(PREFIX)
        .is_some_and(|digits| digits.len() == 16 && digits.iter().all(u8::is_ascii_hexdigit))
}

/// Removes the hidden folder `name`, unless a restore that is running works in it.
///
/// # Errors
/// Those of the file system.
pub(super) fn remove_leftover(parent: &Dir, name: &[u8]) -> io::Result<()> {
    match parent.open_dir(name) {
        Ok(dir) => match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(()),
            Err(error) => {
                let message = format!("it cannot be told whether another restore uses it: {error}");
                return Err(io::Error::other(message));
            }
        },
        // Whatever else has such a name was put there.
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOTDIR | Errno::LOOP)) => {
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    match parent.remove_tree(name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A hidden folder of ours.
pub(super) struct Hidden {
    name: Vec<u8>,
    /// Holds the lock as well.
    dir: Dir,
    /// Modification times of the folder it lies in, before and after it was made.
    times: (Timestamp, Timestamp),
    folds: OnceLock<bool>,
    newborn: Mutex<Option<Current>>,
}

impl Hidden {
    /// Makes one in `parent`.
    pub(super) fn make(parent: &Dir) -> io::Result<Self> {
        let before = parent.stat()?.mtime;
        for _ in 0..ATTEMPTS {
            let mut random = [0; 8];
            getrandom::fill(&mut random).map_err(io::Error::other)?;
            let digits = format!("{:016x}", u64::from_be_bytes(random));
            let name = [PREFIX, digits.as_bytes()].concat();
            let dir = match parent.make_dir(&name) {
                // Another restore took it for a leftover between the two calls.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                made => made?,
            };
            // On file systems without locks, others will leave it alone.
            let locked = flock(&dir, FlockOperation::NonBlockingLockExclusive);
            if locked == Err(Errno::WOULDBLOCK) {
                continue;
            }
            let is_there = parent.lstat(&name).is_ok_and(|now| {
                dir.stat().is_ok_and(|dir| (now.dev, now.ino) == (dir.dev, dir.ino))
            });
            if is_there {
                dir.strip()?;
                let times = (before, parent.stat()?.mtime);
                let (folds, newborn) = (OnceLock::new(), Mutex::default());
                return Ok(Self { name, dir, times, folds, newborn });
            }
        }
        Err(io::Error::other("somebody keeps removing the hidden folder in the target"))
    }

    pub(super) fn dir(&self) -> &Dir {
        &self.dir
    }

    /// Owner and mode of files as they are made in it, once known.
    pub(super) fn newborn(&self) -> &Mutex<Option<Current>> {
        &self.newborn
    }

    /// Whether the file system takes different names for the same.
    pub(super) fn folds_names(&self) -> bool {
        *self.folds.get_or_init(|| {
            // Capital E with acute, as one character; then another case, and as two characters.
            let (name, other_case, other_form) = ("P\u{c9}", "p\u{c9}", "PE\u{301}");
            let made = self.dir.create_file(name.as_bytes());
            let finds = |name: &str| self.dir.lstat(name.as_bytes()).is_ok();
            let folds = made.is_err() || finds(other_case) || finds(other_form);
            // It would go with the folder.
            let _removed = self.dir.unlink(name.as_bytes());
            folds
        })
    }

    /// Removes it with all that still waits. The folder it lies in is as before, if nothing else has come or gone.
    pub(super) fn remove(&self, parent: &Dir) -> io::Result<()> {
        let untouched = parent.stat()?.mtime == self.times.1;
        match parent.remove_tree(&self.name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if untouched {
            // Where we may not, nothing was asked for about it.
            let _set = parent.set_mtime(self.times.0);
        }
        Ok(())
    }
}

/// The name under which a file waits.
pub(super) fn waiting_name(number: u64) -> Vec<u8> {
    format!("t{number}").into_bytes()
}

/// The hidden folders of a restore, each by the folder it lies in.
#[derive(Default)]
pub(super) struct HiddenFolders(Mutex<Vec<(u32, std::sync::Arc<Hidden>)>>);

impl HiddenFolders {
    /// That in folder `number`, made if it is missing.
    pub(super) fn get_or_make(
        &self,
        number: u32,
        parent: impl FnOnce() -> io::Result<Dir>,
    ) -> io::Result<std::sync::Arc<Hidden>> {
        let mut all = lock(&self.0);
        if let Some((_, hidden)) = all.iter().find(|(at, _)| *at == number) {
            return Ok(hidden.clone());
        }
        let hidden = std::sync::Arc::new(Hidden::make(&parent()?)?);
        all.push((number, hidden.clone()));
        Ok(hidden)
    }

    pub(super) fn get(&self, number: u32) -> Option<std::sync::Arc<Hidden>> {
        lock(&self.0).iter().find(|(at, _)| *at == number).map(|(_, hidden)| hidden.clone())
    }

    /// Takes that of folder `number` out of the list.
    pub(super) fn take(&self, number: u32) -> Option<std::sync::Arc<Hidden>> {
        let mut all = lock(&self.0);
        let at = all.iter().position(|(at, _)| *at == number)?;
        Some(all.swap_remove(at).1)
    }

    /// Takes any.
    pub(super) fn take_any(&self) -> Option<(u32, std::sync::Arc<Hidden>)> {
        lock(&self.0).pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(path: &std::path::Path) -> usize {
        std::fs::read_dir(path).unwrap().count()
    }

    #[test]
    fn a_folder_that_is_in_use_is_no_leftover() {
        let temp = tempfile::tempdir().unwrap();
        let parent = Dir::open_root(temp.path()).unwrap();
        let hidden = Hidden::make(&parent).unwrap();
        let name = hidden.name.clone();
        assert!(is_leftover(&name));
        hidden.dir().create_file(b"t1").unwrap();
        remove_leftover(&parent, &name).unwrap();
        assert_eq!(names(temp.path()), 1);
        drop(hidden);
        remove_leftover(&parent, &name).unwrap();
        assert_eq!(names(temp.path()), 0);
        remove_leftover(&parent, &name).unwrap();
    }

    #[test]
    fn only_our_names_are_those_of_leftovers() {
        for (name, ours) in [
            (&b".ebackup-links-0123456789abcdef"[..], true),
            (b".ebackup-links-0123456789abcdeg", false),
            (b".ebackup-links-", false),
            (b".ebackup-links-0123456789abcdef0", false),
            (b"ebackup-links-0123456789abcdef", false),
        ] {
            assert_eq!(is_leftover(name), ours, "{}", name.escape_ascii());
        }
    }
}
