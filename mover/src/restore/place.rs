//! Gives what waits in a hidden folder its name, and decides about what has that name.
//!
//! One rename puts the new in the place of the old: at any moment there is one of them, whole.

use std::io;
use std::sync::Arc;

use rustix::io::Errno;

use crate::fs::Dir;
use crate::monitor::display_path;

use super::hidden::{Hidden, waiting_name};
use super::links::LinkKey;
use super::{Overwrite, Shared};

/// Files and folders that a restore neither changes nor removes, by device and inode: the repository that it reads
/// from, its key, its cache.
#[derive(Debug, Clone, Default)]
pub struct Protected {
    own: Vec<(u64, u64)>,
    above: Vec<(u64, u64)>,
}

impl Protected {
    /// Adds the file or folder `path`, if there is one.
    pub fn add(&mut self, path: &std::path::Path) {
        use std::os::unix::fs::MetadataExt;
        let Ok(path) = path.canonicalize() else { return };
        for (number, at) in path.ancestors().enumerate() {
            let Ok(meta) = at.symlink_metadata() else { continue };
            let list = if number == 0 { &mut self.own } else { &mut self.above };
            let inode = (meta.dev(), meta.ino());
            if !list.contains(&inode) {
                list.push(inode);
            }
        }
    }

    /// Whether it is one of them.
    pub(super) fn contains(&self, dev: u64, ino: u64) -> bool {
        self.own.contains(&(dev, ino))
    }

    /// Whether it is one of them, or a folder that holds one.
    pub(super) fn is_in(&self, dev: u64, ino: u64) -> bool {
        self.contains(dev, ino) || self.above.contains(&(dev, ino))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.own.is_empty()
    }

    /// Whether the open folder is one of them, or lies in one.
    ///
    /// # Errors
    /// When a folder above cannot be looked at.
    pub fn holds(&self, dir: &Dir) -> io::Result<bool> {
        if self.is_empty() {
            return Ok(false);
        }
        let mut at = dir.clone();
        loop {
            let meta = at.stat()?;
            if self.contains(meta.dev, meta.ino) {
                return Ok(true);
            }
            let Some(above) = at.open_above()? else { return Ok(false) };
            at = above;
        }
    }
}

/// What is said of a thing that is not touched.
pub(super) const IS_PROTECTED: &str = "it belongs to the repository that is restored from (its files, key or cache) and stays as it is";

/// What became of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placed {
    /// It is the new file's.
    New,
    /// What was there stays, as was asked for.
    Old,
}

/// A folder in which something is to get its name.
#[derive(Clone, Copy)]
pub(super) struct Spot<'a> {
    pub(super) dir: &'a Dir,
    pub(super) folder: u32,
    pub(super) name: &'a [u8],
    /// Whether the folder listed just this name when it was entered, where known.
    pub(super) existed: Option<bool>,
}

impl Shared<'_> {
    /// The hidden folder for the files of `folder`.
    pub(super) fn hidden(&self, folder: u32) -> io::Result<Arc<Hidden>> {
        self.hidden_and_base(folder).map(|(hidden, _)| hidden)
    }

    /// As [`hidden`](Self::hidden), and the folder in which it lies.
    pub(super) fn hidden_and_base(&self, folder: u32) -> io::Result<(Arc<Hidden>, u32)> {
        let base = self.folders.site(folder).base;
        let made = match self.hidden.get_or_make(base, || self.folders.dir(base)) {
            // One may be allowed to write to this folder, but not to the one above.
            Err(error)
                if base != folder
                    && matches!(
                        Errno::from_io_error(&error),
                        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS)
                    ) =>
            {
                self.folders.separate(folder);
                let hidden = self.hidden.get_or_make(folder, || self.folders.dir(folder))?;
                return Ok((hidden, folder));
            }
            made => made?,
        };
        Ok((made, base))
    }

    /// The hidden folder that was made in folder `base`.
    pub(super) fn hidden_in(&self, base: u32) -> io::Result<Arc<Hidden>> {
        self.hidden.get(base).ok_or_else(|| io::Error::other("the hidden folder is gone"))
    }

    /// Whether a name can be linked to the file with this key, in the file system of folder `base`.
    pub(super) fn is_linkable(&self, base: u32, key: LinkKey) -> bool {
        self.hidden.get(base).is_some_and(|hidden| hidden.dir().lstat(&key.name()).is_ok())
    }

    /// A name for something that waits.
    pub(super) fn next_waiting(&self) -> u64 {
        self.waiting.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1
    }

    /// Removes hidden folders that are not needed any more: that of `folder`, or all.
    pub(super) fn remove_hidden(&self, folder: Option<u32>) {
        let next = || match folder {
            Some(folder) => self.hidden.take(folder).map(|hidden| (folder, hidden)),
            None => self.hidden.take_any(),
        };
        while let Some((at, hidden)) = next() {
            let removed = self.folders.dir(at).and_then(|parent| hidden.remove(&parent));
            if let Err(error) = removed {
                let path = self.folders.path(at);
                self.warn(&path, format!("the hidden folder in it cannot be removed: {error}"));
            }
        }
    }

    /// Gives `waiting` in the hidden folder the name of `spot`, in the place of what has it now.
    pub(super) fn place(
        &self,
        hidden: &Hidden,
        waiting: &[u8],
        spot: Spot<'_>,
    ) -> io::Result<Placed> {
        let Spot { dir, name, .. } = spot;
        let never = self.options.overwrite == Overwrite::Never;
        if never || spot.existed != Some(true) {
            match hidden.dir().rename_new(waiting, dir, name) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                done => return done.map(|()| Placed::New),
            }
            if let Some(other) = self.taken_for(spot)? {
                return Err(collision(&other));
            }
            if never {
                return Ok(Placed::Old);
            }
        }
        self.check_protected(dir, name)?;
        match hidden.dir().rename(waiting, dir, name) {
            Err(error)
                if matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::ISDIR | Errno::NOTEMPTY | Errno::EXIST)
                ) => {}
            done => return done.map(|()| Placed::New),
        }
        match self.options.overwrite {
            Overwrite::Always => {}
            Overwrite::IfChanged | Overwrite::Never => {
                return Err(io::Error::other("a folder is in its place"));
            }
        }
        self.replace_folder(hidden, waiting, dir, name).map(|()| Placed::New)
    }

    fn replace_folder(
        &self,
        hidden: &Hidden,
        waiting: &[u8],
        dir: &Dir,
        name: &[u8],
    ) -> io::Result<()> {
        let hidden = hidden.dir();
        match hidden.exchange(waiting, dir, name) {
            Ok(()) => {
                return hidden.remove_tree(waiting).inspect_err(|_| {
                    // What is left of the old, a mounted file system perhaps, shall be where it was.
                    let _back = hidden.exchange(waiting, dir, name);
                });
            }
            Err(error)
                if matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP)
                ) => {}
            Err(error) => return Err(error),
        }
        let old = waiting_name(self.next_waiting());
        dir.rename(name, hidden, &old)?;
        let done = hidden.rename_new(waiting, dir, name).and_then(|()| {
            hidden.remove_tree(&old).inspect_err(|_| {
                let _away = dir.rename(name, hidden, waiting);
            })
        });
        done.inspect_err(|_| {
            let _back = hidden.rename(&old, dir, name);
        })
    }

    /// Makes a folder in the place of something that is none.
    pub(super) fn replace_by_folder(&self, folder: u32, dir: &Dir, name: &[u8]) -> io::Result<Dir> {
        self.check_protected(dir, name)?;
        let hidden = self.hidden(folder)?;
        let old = waiting_name(self.next_waiting());
        dir.rename(name, hidden.dir(), &old)?;
        let made = dir.make_dir(name).inspect_err(|_| {
            let _back = hidden.dir().rename(&old, dir, name);
        })?;
        // It would go with the hidden folder.
        let _removed = hidden.dir().unlink(&old);
        Ok(made)
    }

    /// # Errors
    /// When `name` is protected.
    pub(super) fn check_protected(&self, dir: &Dir, name: &[u8]) -> io::Result<()> {
        let protected = &self.options.protected;
        if protected.is_empty() {
            return Ok(());
        }
        match dir.lstat(name) {
            Ok(now) if protected.is_in(now.dev, now.ino) => Err(io::Error::other(IS_PROTECTED)),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The other name that the file system takes for this one, which exists.
    pub(super) fn taken_for(&self, spot: Spot<'_>) -> io::Result<Option<Vec<u8>>> {
        let Spot { dir, folder, name, existed } = spot;
        if existed == Some(true) {
            return Ok(None);
        }
        // Where names are what they are, somebody else has just made it.
        if !(dir.has_case_folding_flag() || self.hidden(folder)?.folds_names()) {
            return Ok(None);
        }
        match dir.listed_name(name) {
            Ok(Some(listed)) => Ok((listed != name).then_some(listed)),
            Ok(None) => Ok(Some(Vec::new())),
            // Gone meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Two names that fall together in the target.
pub(super) fn collision(other: &[u8]) -> io::Error {
    let other = if other.is_empty() { "another".to_owned() } else { display_path(other) };
    io::Error::other(format!(
        "the target takes its name for the same as '{other}'; restore to a file system that tells them apart"
    ))
}
