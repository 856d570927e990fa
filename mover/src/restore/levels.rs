//! The folders on the way from the target to where the planner stands: made when they are needed, given their metadata
//! when everything in them is restored.

use std::io;

use chunkstore::tree::{Node, State, Xattrs};
use rustix::io::Errno;

use crate::fs::{ApplyOptions, Current, Dir, Kind, Meta, Target, apply};

use super::folders::ROOT;
use super::place::{IS_PROTECTED, Spot, collision};
use super::plan::{Planner, path_of};
use super::present::{Present, Remover};
use super::window::meta_of;
use super::{Overwrite, Shared, count};

/// What one folder waiting for its metadata takes.
const FOLDER_BYTES: usize = 256;

/// Metadata a folder gets when everything in it is restored.
pub(super) struct FolderMeta {
    meta: Meta,
    xattrs: Xattrs,
    state: State,
    /// What it had when it was entered, if it was there.
    current: Option<Current>,
}

impl FolderMeta {
    pub(super) fn of(node: &Node) -> Box<Self> {
        let (meta, xattrs, state) = (meta_of(node), node.xattrs.clone(), node.state);
        Box::new(Self { meta, xattrs, state, current: None })
    }
}

/// A folder on the path to where the planner stands.
pub(super) struct Level {
    pub(super) key_len: usize,
    /// Its number, once it is there.
    pub(super) folder: Option<u32>,
    pub(super) meta: Option<Box<FolderMeta>>,
    /// Whether the filter takes it, rather than just what it holds.
    pub(super) taken: bool,
    /// Whether nothing was in it before.
    pub(super) fresh: bool,
    /// Whether it lies in another file system than the target.
    pub(super) foreign: bool,
    /// Whether names that the snapshot lacks go from it.
    pub(super) delete: bool,
    /// The names in it, if it was there.
    pub(super) present: Option<Present>,
}

/// A folder of the target, found or made.
struct Found {
    /// Missing if a dry run would make it.
    dir: Option<Dir>,
    fresh: bool,
    current: Option<Current>,
    /// Its device, where another file system begins with it.
    mounted: Option<u64>,
}

impl Found {
    fn made(dir: Option<Dir>) -> Option<Self> {
        Some(Self { dir, fresh: true, current: None, mounted: None })
    }
}

impl Planner<'_> {
    /// Puts the target itself on the stack.
    pub(super) fn enter_target(&mut self, meta: Option<Box<FolderMeta>>, taken: bool, fresh: bool) {
        let hides = meta.as_ref().is_some_and(|meta| meta.state.hides_names());
        let delete = self.may_delete() && taken && !hides;
        let present = if fresh { None } else { self.read_present(ROOT) };
        let (key_len, folder) = (self.key.len(), Some(ROOT));
        let foreign = false;
        let meta = meta.filter(|_| self.gets_metadata(taken, fresh));
        self.levels.push(Level { key_len, folder, meta, taken, fresh, foreign, delete, present });
    }

    fn may_delete(&self) -> bool {
        self.shared.options.delete
            && !self.damaged
            && self.shared.options.overwrite != Overwrite::Never
    }

    /// A folder that was there and is not asked for stays as it is.
    fn gets_metadata(&self, taken: bool, fresh: bool) -> bool {
        fresh || (taken && self.shared.options.overwrite != Overwrite::Never)
    }

    /// Goes down into a folder, which is made when it is known to be needed.
    pub(super) fn enter(&mut self, key: &[u8], taken: bool, meta: Option<Box<FolderMeta>>) {
        self.key.truncate(self.levels.last().map_or(0, |level| level.key_len));
        let from = self.key.len();
        self.key.extend_from_slice(&key[from..]);
        self.levels.push(Level {
            key_len: key.len(),
            folder: None,
            meta,
            taken,
            fresh: false,
            foreign: self.levels.last().is_some_and(|level| level.foreign),
            delete: false,
            present: None,
        });
    }

    /// Leaves the folders that the entry with this key does not lie in.
    pub(super) fn leave_to(&mut self, key: &[u8]) {
        let shared_len = self.key.iter().zip(key).take_while(|(a, b)| a == b).count();
        while self.levels.len() > 1 {
            let end = self.levels.last().map_or(0, |level| level.key_len);
            if end <= shared_len && key.get(end) == Some(&0) {
                break;
            }
            self.leave();
        }
    }

    pub(super) fn leave(&mut self) {
        let Some(mut level) = self.levels.pop() else {
            return;
        };
        self.seek_present(&mut level, None);
        self.key.truncate(self.levels.last().map_or(0, |level| level.key_len));
        if let Some(folder) = level.folder {
            self.window.bytes += FOLDER_BYTES;
            self.ended.push((folder, level.meta, level.fresh));
        }
    }

    /// Makes the folders up to the innermost level that are not there yet.
    pub(super) fn make_levels(&mut self) -> bool {
        let first = self.levels.iter().rposition(|level| level.folder.is_some()).unwrap_or(0);
        for at in first + 1..self.levels.len() {
            let made = self.make_level(at);
            if !matches!(made, Ok(true)) {
                let level = &self.levels[at];
                let key = self.key[..level.key_len].to_vec();
                let state = level.meta.as_ref().map_or(State::Whole, |meta| meta.state);
                match made {
                    Err(error) => {
                        self.shared.fail_io(&path_of(&key), "the folder cannot be made", &error);
                    }
                    // The backup left it out as well.
                    Ok(_) if state == State::Repository => {}
                    Ok(_) => self.shared.fail(&path_of(&key), IS_PROTECTED),
                }
                while self.levels.len() > at {
                    self.leave();
                }
                self.prune(&key);
                return false;
            }
        }
        true
    }

    /// Finds or makes one. `false` when it is there and must not be touched.
    fn make_level(&mut self, at: usize) -> io::Result<bool> {
        let parent = &self.levels[at - 1];
        let parent_key_len = if parent.key_len == 0 { 0 } else { parent.key_len + 1 };
        let (above, above_fresh) = (parent.folder.unwrap_or(ROOT), parent.fresh);
        let name = self.key[parent_key_len..self.levels[at].key_len].to_vec();
        let existed = if above_fresh { Some(false) } else { self.seek_name(at - 1, &name) };
        let taken = self.levels[at].taken;
        let found = self.shared.open_or_make(above, above_fresh, &name, existed, taken)?;
        let Some(found) = found else { return Ok(false) };
        let Found { dir, fresh, current, mounted } = found;
        let folder = self.shared.folders.add(above, &name, dir, fresh, mounted);
        let path = || path_of(&self.key[..self.levels[at].key_len]);
        let level = &self.levels[at];
        let state = level.meta.as_ref().map_or(State::Whole, |meta| meta.state);
        let foreign = level.foreign || mounted.is_some();
        let wishes = self.may_delete() && taken && !fresh && !state.hides_names();
        if wishes && mounted.is_some() {
            let message = "names in it that the snapshot lacks stay: it is another file system";
            self.shared.warn(&path(), message);
        }
        // What is mounted there need not be what the snapshot saw.
        let left_alone = mounted.is_some() && state == State::OtherFileSystem;
        let keeps = self.gets_metadata(taken, fresh) && !left_alone;
        let present = if fresh { None } else { self.read_present(folder) };
        let level = &mut self.levels[at];
        (level.folder, level.fresh, level.foreign) = (Some(folder), fresh, foreign);
        (level.delete, level.present) = (wishes && !foreign, present);
        level.meta = level.meta.take().filter(|_| keeps);
        if let Some(meta) = &mut level.meta {
            meta.current = current;
        }
        count(&self.shared.counters.dirs, 1);
        self.shared.monitor.advance(1, 0);
        Ok(true)
    }

    fn read_present(&self, folder: u32) -> Option<Present> {
        let read = self.shared.folders.dir(folder).and_then(|dir| Present::read(self.shared, &dir));
        match read {
            Ok(present) => Some(present),
            // A dry run on a target that is not there.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                self.warn_of_present(folder, &error);
                None
            }
        }
    }

    fn warn_of_present(&self, folder: u32, error: &io::Error) {
        let path = [&self.base_path[..], &self.shared.folders.path(folder)].concat();
        self.shared
            .warn(&path, format!("its names cannot be listed, so what is too much stays: {error}"));
    }

    /// Removes what the innermost folder has before `name`. Tells whether `name` is there, if known.
    pub(super) fn seek_innermost(&mut self, name: &[u8]) -> Option<bool> {
        self.seek_name(self.levels.len().checked_sub(1)?, name)
    }

    fn seek_name(&mut self, at: usize, name: &[u8]) -> Option<bool> {
        let mut present = self.levels[at].present.take();
        let (folder, delete) = (self.levels[at].folder?, self.levels[at].delete);
        let found = self.seek(&mut present, folder, delete, Some(name));
        self.levels[at].present = present;
        found
    }

    pub(super) fn seek_present(&self, level: &mut Level, before: Option<&[u8]>) {
        if let Some(folder) = level.folder {
            self.seek(&mut level.present, folder, level.delete, before);
        }
    }

    fn seek(
        &self,
        present: &mut Option<Present>,
        folder: u32,
        delete: bool,
        before: Option<&[u8]>,
    ) -> Option<bool> {
        let base = &self.base_path;
        let remover = Remover { shared: self.shared, filter: self.filter, base, delete };
        match present.as_mut()?.seek(before, folder, &remover) {
            Ok(found) => Some(found),
            Err(error) => {
                self.warn_of_present(folder, &error);
                *present = None;
                None
            }
        }
    }

    /// Finishes the folders that ended.
    pub(super) fn finish_ended(&mut self) {
        for (folder, meta, fresh) in std::mem::take(&mut self.ended) {
            self.shared.remove_hidden(Some(folder));
            self.finish_folder(folder, meta, fresh);
            self.shared.folders.remove(folder);
        }
    }

    /// Gives the target itself its metadata.
    pub(super) fn finish_target(&mut self) {
        if let Some(root) = self.levels.first_mut() {
            let (meta, fresh) = (root.meta.take(), root.fresh);
            self.finish_folder(ROOT, meta, fresh);
        }
    }

    fn finish_folder(&self, folder: u32, meta: Option<Box<FolderMeta>>, fresh: bool) {
        let Some(meta) = meta.filter(|_| !self.shared.options.dry_run) else {
            return;
        };
        let path = || [&self.base_path[..], &self.shared.folders.path(folder)].concat();
        match self.shared.folders.dir(folder) {
            Ok(dir) => {
                let owner = self.shared.options.owner;
                let options =
                    ApplyOptions { owner, current: meta.current, bare: fresh, inode: None };
                let failures = apply(Target::Dir(&dir), &meta.meta, &meta.xattrs, &options);
                if !failures.is_empty() {
                    self.shared.warn_attributes(&path(), &failures);
                }
            }
            Err(error) => {
                let message = format!("the folder's metadata cannot be set: {error}");
                self.shared.warn(&path(), message);
            }
        }
    }
}

impl Shared<'_> {
    /// The folder `name` in folder `above`; `None` for one that must not be touched.
    fn open_or_make(
        &self,
        above: u32,
        above_fresh: bool,
        name: &[u8],
        existed: Option<bool>,
        taken: bool,
    ) -> io::Result<Option<Found>> {
        let is_other = |error: &io::Error| {
            matches!(Errno::from_io_error(error), Some(Errno::NOTDIR | Errno::LOOP))
        };
        let may_replace = self.options.overwrite != Overwrite::Never;
        if self.options.dry_run {
            if above_fresh {
                return Ok(Found::made(None));
            }
            return match self.folders.dir(above)?.open_dir(name) {
                Ok(dir) => self.existing(above, dir, false),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Found::made(None)),
                Err(error) if is_other(&error) && may_replace => Ok(Found::made(None)),
                Err(error) => Err(error),
            };
        }
        let (parent, folder) = (self.folders.dir(above)?, above);
        let clean = |dir: Dir| {
            // In a folder of others, it may have got what they had laid out for new ones.
            if !above_fresh {
                dir.strip()?;
            }
            Ok(Found::made(Some(dir)))
        };
        match parent.make_dir(name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return clean(made?),
        }
        let dir = &parent;
        if let Some(other) = self.taken_for(Spot { dir, folder, name, existed })? {
            return Err(collision(&other));
        }
        let widens = taken && may_replace;
        let opened = if widens { dir.open_closed_dir(name) } else { dir.open_dir(name) };
        match opened {
            Err(error) if is_other(&error) && may_replace => {
                clean(self.replace_by_folder(folder, dir, name)?)
            }
            opened => self.existing(above, opened?, widens),
        }
    }

    /// A folder that was there. `widens` says that it may be made accessible to us, if it is ours.
    fn existing(&self, above: u32, dir: Dir, widens: bool) -> io::Result<Option<Found>> {
        let (meta, mounted) = dir.stat_mounted(self.folders.site(above).dev)?;
        if self.options.protected.contains(meta.dev, meta.ino) {
            return Ok(None);
        }
        debug_assert_eq!(meta.kind, Kind::Dir, "it was opened as one");
        let mut current = Current::from(&meta);
        if widens && meta.mode & 0o700 != 0o700 {
            dir.widen(&meta)?;
            current.mode = dir.stat()?.mode;
        }
        let mounted = mounted.then_some(meta.dev);
        Ok(Some(Found { dir: Some(dir), fresh: false, current: Some(current), mounted }))
    }
}
