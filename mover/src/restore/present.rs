//! The names that a folder of the target has already: tells which of the snapshot's are there, and removes what the
//! snapshot lacks.
//!
//! The names of a folder and its entries in the tree come in the same order, so one pass over both
//! tells what is missing, with a bounded part of the names in memory.

use std::io;

use crate::fs::{Dir, Kind, Listing};

use super::hidden::{is_leftover, remove_leftover};
use super::place::IS_PROTECTED;
use super::{Filter, FilterResult, Shared, count};

/// Names of one folder in memory; more wait on disk.
const LISTING_BYTES: usize = 128 << 10;
/// Folders below an unwanted one that are looked into, each with an open handle, for what the filter
/// keeps. What lies deeper is left.
const DEPTH_MAX: u32 = 64;

/// The names of a folder being restored, up to the one the planner stands at.
pub(super) struct Present {
    listing: Listing,
    head: Option<(Vec<u8>, Option<Kind>)>,
}

/// What is needed to remove a name.
pub(super) struct Remover<'a> {
    pub(super) shared: &'a Shared<'a>,
    pub(super) filter: Option<&'a Filter<'a>>,
    /// Path of the target in the backup, with a `/` at its end unless it is the root.
    pub(super) base: &'a [u8],
    /// Whether what the snapshot lacks is to go.
    pub(super) delete: bool,
}

impl Present {
    pub(super) fn read(shared: &Shared<'_>, dir: &Dir) -> io::Result<Self> {
        let listing = Listing::read(dir, LISTING_BYTES, &shared.options.scratch)?;
        let mut present = Self { listing, head: None };
        present.advance()?;
        Ok(present)
    }

    fn advance(&mut self) -> io::Result<()> {
        let next = self.listing.next_entry()?;
        self.head = next.map(|entry| (entry.name.to_vec(), entry.kind));
        Ok(())
    }

    /// Goes to `name`, or to the end, and removes what lies before it. Tells whether `name` is there.
    pub(super) fn seek(
        &mut self,
        name: Option<&[u8]>,
        folder: u32,
        remover: &Remover<'_>,
    ) -> io::Result<bool> {
        while let Some((head, kind)) = self.head.take() {
            if name.is_some_and(|name| head[..] >= *name) {
                let found = name == Some(&head);
                if found {
                    self.advance()?;
                } else {
                    self.head = Some((head, kind));
                }
                return Ok(found);
            }
            if remover.shared.is_stopped() {
                return Ok(false);
            }
            if is_leftover(&head) {
                remover.remove_leftover(folder, &head);
            } else if remover.delete {
                remover.remove(folder, &head, kind);
            }
            self.advance()?;
        }
        Ok(false)
    }
}

impl Remover<'_> {
    fn path(&self, folder: u32, name: &[u8]) -> Vec<u8> {
        let mut path = self.shared.folders.path(folder);
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        path
    }

    fn remove_leftover(&self, folder: u32, name: &[u8]) {
        if self.shared.options.dry_run {
            return;
        }
        let dir = self.shared.folders.dir(folder);
        if let Err(error) = dir.and_then(|dir| remove_leftover(&dir, name)) {
            let path = [self.base, &self.path(folder, name)].concat();
            self.shared.warn(&path, format!("a leftover of an earlier restore stays: {error}"));
        }
    }

    fn remove(&self, folder: u32, name: &[u8], kind: Option<Kind>) {
        let path = self.path(folder, name);
        let removed = self.shared.folders.dir(folder).and_then(|dir| {
            let is_dir = match kind {
                Some(kind) => kind == Kind::Dir,
                None => dir.lstat(name)?.kind == Kind::Dir,
            };
            self.remove_at(&dir, name, is_dir, &path, DEPTH_MAX)
        });
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let path = [self.base, &path].concat();
                self.shared.warn(&path, format!("it is not in the snapshot, but stays: {error}"));
            }
            _ => {}
        }
    }

    /// Removes what the filter takes; tells whether nothing is left.
    fn remove_at(
        &self,
        dir: &Dir,
        name: &[u8],
        is_dir: bool,
        path: &[u8],
        depth: u32,
    ) -> io::Result<bool> {
        let taken = self.filter.map_or(FilterResult::Take, |filter| filter(path, is_dir));
        match (taken, is_dir) {
            (FilterResult::Prune, _) | (FilterResult::Skip, false) => return Ok(false),
            (FilterResult::Take | FilterResult::Skip, true) if self.filter.is_some() => {
                let inner = dir.open_dir(name)?;
                if inner.stat_mounted(dir.stat()?.dev)?.1 {
                    return Err(rustix::io::Errno::BUSY.into());
                }
                let emptied = depth > 0 && self.empty(&inner, path, depth)?;
                if !emptied || taken == FilterResult::Skip {
                    return Ok(false);
                }
            }
            _ => {}
        }
        let protected = &self.shared.options.protected;
        if !protected.is_empty() {
            let now = dir.lstat(name)?;
            if protected.is_in(now.dev, now.ino) {
                return Err(io::Error::other(IS_PROTECTED));
            }
        }
        if !self.shared.options.dry_run {
            dir.remove_tree(name)?;
        }
        count(&self.shared.counters.deleted, 1);
        Ok(true)
    }

    fn empty(&self, dir: &Dir, path: &[u8], depth: u32) -> io::Result<bool> {
        let mut listing = Listing::read(dir, LISTING_BYTES, &self.shared.options.scratch)?;
        let mut emptied = true;
        while let Some(entry) = listing.next_entry()? {
            let (name, kind) = (entry.name, entry.kind);
            let is_dir = match kind {
                Some(kind) => kind == Kind::Dir,
                None => dir.lstat(name)?.kind == Kind::Dir,
            };
            let path = [path, b"/", name].concat();
            emptied &= self.remove_at(dir, name, is_dir, &path, depth - 1)?;
        }
        Ok(emptied)
    }
}
