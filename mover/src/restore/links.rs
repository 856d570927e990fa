//! Hard links: the target's file system is the map from (file system, inode) to a restored file.
//!
//! Whatever had several names in the backup is also linked into a hidden folder in the target, from
//! which its other names are linked. So memory does not grow with their number. The folder goes at the
//! end; what a killed restore leaves is removed by the next.

use std::io;
use std::path::Path;
use std::sync::Mutex;

use rustix::io::Errno;

use crate::fs::{Dir, Listing};

use super::lock;

const PREFIX: &[u8] = b".ebackup-links-";
const LISTING_BYTES: usize = 1 << 20;

/// File system and inode number in the backup.
pub(super) type LinkKey = (u32, u64);

#[derive(Default)]
pub(super) struct Links(Mutex<State>);

#[derive(Default)]
struct State {
    folder: Option<(Vec<u8>, Dir)>,
    unsupported: bool,
}

/// Whether `name` is one of these hidden folders.
pub(super) fn is_links_folder(name: &[u8]) -> bool {
    name.strip_prefix(PREFIX)
        .is_some_and(|digits| digits.len() == 16 && digits.iter().all(u8::is_ascii_hexdigit))
}

/// Removes the folders of earlier restores.
pub(super) fn remove_stale(root: &Dir, scratch: &Path) -> io::Result<()> {
    let mut stale = Vec::new();
    let mut listing = Listing::read(root, LISTING_BYTES, scratch)?;
    while let Some(entry) = listing.next_entry()? {
        if is_links_folder(entry.name) {
            stale.push(entry.name.to_vec());
        }
    }
    stale.iter().try_for_each(|name| root.remove_tree(name))
}

/// Whether the file system cannot link here, as opposed to a failure.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::XDEV | Errno::MLINK)
    )
}

fn entry_name((fs, ino): LinkKey) -> Vec<u8> {
    format!("{fs}-{ino}").into_bytes()
}

impl Links {
    /// Whether links can be made, for all that is known.
    pub(super) fn are_supported(&self) -> bool {
        !lock(&self.0).unsupported
    }

    /// Whether this file has been restored under another name.
    pub(super) fn contains(&self, key: LinkKey) -> bool {
        self.folder().is_some_and(|folder| folder.lstat(&entry_name(key)).is_ok())
    }

    /// Makes `name` in `dir` the file from which other names are linked. `false` when it turns out
    /// that the file system has no links.
    pub(super) fn register(
        &self,
        root: &Dir,
        key: LinkKey,
        dir: &Dir,
        name: &[u8],
    ) -> io::Result<bool> {
        let mut state = lock(&self.0);
        if state.unsupported {
            return Ok(true);
        }
        let folder = match &state.folder {
            Some((_, folder)) => folder.clone(),
            None => {
                let mut random = [0; 8];
                getrandom::fill(&mut random).map_err(io::Error::other)?;
                let digits = format!("{:016x}", u64::from_be_bytes(random));
                let hidden = [PREFIX, digits.as_bytes()].concat();
                let folder = root.make_dir(&hidden)?;
                state.folder = Some((hidden, folder.clone()));
                folder
            }
        };
        match dir.link(name, &folder, &entry_name(key)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(true),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::XDEV) => Err(error),
            Err(error) if is_unsupported(&error) => {
                state.unsupported = true;
                Ok(false)
            }
            done => done.map(|()| true),
        }
    }

    /// Gives the file the further name `name` in `dir`.
    pub(super) fn link(&self, key: LinkKey, dir: &Dir, name: &[u8]) -> io::Result<()> {
        let folder = self.folder().ok_or(io::ErrorKind::NotFound)?;
        folder.link(&entry_name(key), dir, name)
    }

    /// Forgets a file, so that the next of its names is restored from its own content.
    pub(super) fn forget(&self, key: LinkKey) {
        if let Some(folder) = self.folder() {
            // If it is not there, that is what was wanted.
            let _gone = folder.unlink(&entry_name(key));
        }
    }

    /// Removes the hidden folder.
    pub(super) fn remove(&self, root: &Dir) -> io::Result<()> {
        match lock(&self.0).folder.take() {
            Some((name, _)) => root.remove_tree(&name),
            None => Ok(()),
        }
    }

    fn folder(&self) -> Option<Dir> {
        lock(&self.0).folder.as_ref().map(|(_, dir)| dir.clone())
    }
}
