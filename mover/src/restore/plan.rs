//! Walks the tree in order: makes folders, decides about every file, fills windows and has them
//! carried out.

use std::io;
use std::sync::Arc;

use chunkstore::tree::{
    Body, Chunk, Content, EntryCursor, LeafAt, Node, NodeRef, TreeCursor, Xattrs,
};
use chunkstore::{Error, ErrorKind, Result};
use rustix::io::Errno;

use crate::fs::{ApplyOptions, Current, Dir, Kind, Meta, Target, apply};

use super::extras::{Extras, Remover};
use super::folders::ROOT;
use super::links::is_links_folder;
use super::window::{Piece, Window, Work, leaf_bytes, link_key, meta_of, name_of};
use super::write::Executor;
use super::{Filter, FilterResult, Overwrite, Request, Shared, count, is_plain_name, verify};

/// Entries below a pruned folder that are read before the rest is sought past.
const SKIPPED_BEFORE_SEEK: u32 = 1024;
/// What one folder waiting for its metadata takes.
const FOLDER_BYTES: usize = 256;

/// Metadata a folder gets when everything in it is restored.
struct FolderMeta {
    meta: Meta,
    xattrs: Xattrs,
}

/// A folder on the path to where the planner stands.
struct Level {
    key_len: usize,
    /// Its number, once it is there.
    folder: Option<u32>,
    meta: Option<Box<FolderMeta>>,
    /// Whether the filter takes it, rather than just what it holds.
    taken: bool,
    /// Whether nothing was in it before.
    fresh: bool,
    extras: Option<Extras>,
}

/// A place in the tree.
type At<'l> = (&'l Arc<LeafAt>, usize);

pub(super) struct Planner<'a> {
    shared: &'a Shared<'a>,
    filter: Option<&'a Filter<'a>>,
    root: (NodeRef, u8),
    subpath: &'a [u8],
    /// Where paths below the target begin in keys.
    base_len: usize,
    base_path: Vec<u8>,
    cursor: EntryCursor<'a>,
    levels: Vec<Level>,
    /// Key of the innermost level.
    key: Vec<u8>,
    /// Nothing below this key is restored.
    pruned: Option<Vec<u8>>,
    skipped: u32,
    window: Window,
    last_leaf: Option<Arc<LeafAt>>,
    /// The file whose extents are being met.
    growing: Option<u32>,
    /// Folders that ended, deepest first, with what they get.
    ended: Vec<(u32, Option<Box<FolderMeta>>)>,
    /// Whether a part of the tree could not be read.
    damaged: bool,
}

impl<'a> Planner<'a> {
    /// Finds the subpath. `fresh` says that the target has just been made.
    pub(super) fn new(shared: &'a Shared<'a>, request: &Request<'a>, fresh: bool) -> Result<Self> {
        let (root, subpath) = (request.root, request.subpath);
        let mut cursor = EntryCursor::new(TreeCursor::new(request.repository, root.0, root.1));
        cursor.seek(subpath)?;
        let first = cursor.peek_at()?.map(|(leaf, at)| (leaf.clone(), at));
        let first = first.filter(|(leaf, at)| leaf.leaf.entries[*at].key == subpath);
        let node = first.as_ref().and_then(|(leaf, at)| leaf.leaf.entries[*at].node());
        if node.is_none() && !subpath.is_empty() {
            let path = crate::monitor::display_path(&path_of(subpath));
            let message = format!("there is no '{path}' in the snapshot");
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        let is_file = node.is_some_and(|node| node.kind != Kind::Dir);
        let filter = if is_file { None } else { request.filter };
        let key = match (is_file, subpath.iter().rposition(|byte| *byte == 0)) {
            (true, Some(end)) => subpath[..end].to_vec(),
            (true, None) => Vec::new(),
            (false, _) => subpath.to_vec(),
        };
        let base_len = if key.is_empty() { 0 } else { key.len() + 1 };
        let mut base_path = path_of(&key);
        if !key.is_empty() {
            base_path.push(b'/');
        }
        let taken = !is_file && filter.is_none_or(|filter| filter(b"", true) == FilterResult::Take);
        let meta = node.filter(|_| taken).map(folder_meta);
        if node.is_some() && !is_file {
            cursor.advance();
            count(&shared.counters.dirs, u64::from(taken));
        }
        let mut planner = Self {
            shared,
            filter,
            root,
            subpath,
            base_len,
            base_path,
            cursor,
            levels: Vec::new(),
            key,
            pruned: None,
            skipped: 0,
            window: Window::default(),
            last_leaf: None,
            growing: None,
            ended: Vec::new(),
            damaged: false,
        };
        let extras = if taken && !fresh { planner.read_extras(ROOT) } else { None };
        let key_len = planner.key.len();
        planner.levels.push(Level { key_len, folder: Some(ROOT), meta, taken, fresh, extras });
        Ok(planner)
    }

    /// Restores everything but the metadata of the target itself.
    pub(super) fn run(&mut self) -> Result<()> {
        loop {
            self.shared.check()?;
            let next = match self.cursor.peek_at() {
                Ok(next) => next.map(|(leaf, at)| (leaf.clone(), at)),
                Err(error) => {
                    self.lose_part(error)?;
                    continue;
                }
            };
            let Some((leaf, at)) = next else { break };
            let key = &leaf.leaf.entries[at].key;
            if !is_within(key, self.subpath) {
                break;
            }
            self.cursor.advance();
            self.take((&leaf, at))?;
            if self.window.bytes >= self.shared.options.window_bytes {
                self.flush()?;
            }
        }
        self.end_file();
        while self.levels.len() > 1 {
            self.leave();
        }
        if let Some(mut root) = self.levels.pop() {
            self.remove_extras(&mut root, None);
            self.levels.push(root);
        }
        self.flush()?;
        self.shared.check()
    }

    /// Gives the target itself its metadata.
    pub(super) fn finish_root(&mut self) {
        let meta = self.levels.first_mut().and_then(|root| root.meta.take());
        self.finish_folder(ROOT, meta);
    }

    /// Removes incomplete files when the restore ends early.
    pub(super) fn remove_unfinished(&mut self) {
        self.shared.remove_unfinished(&self.window);
    }

    /// A part of the tree cannot be read: what is readable is restored.
    fn lose_part(&mut self, error: Error) -> Result<()> {
        if !matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) {
            return Err(error.context("the snapshot's tree cannot be read"));
        }
        let message = chunkstore::error::chain(&error);
        self.shared.fail(&[], format!("a part of the tree is lost with all it names: {message}"));
        self.damaged = true;
        // What is not met may well be in the snapshot.
        self.levels.iter_mut().for_each(|level| level.extras = None);
        if let Some(item) = self.growing.take() {
            // The lost part may have named more of it.
            let path = self.window.items[item as usize].path();
            if self.shared.discard(&self.window, item) {
                self.shared.fail(&path, "the part of the tree that names its content is lost");
            }
        }
        Ok(())
    }

    fn take(&mut self, (leaf, at): At<'_>) -> Result<()> {
        let entry = &leaf.leaf.entries[at];
        if let Some(pruned) = &self.pruned {
            if is_within(&entry.key, pruned) {
                return self.skip_one();
            }
            self.pruned = None;
        }
        match &entry.body {
            Body::Extent(chunks) => self.take_extent((leaf, at), chunks),
            Body::End(_) | Body::Absent(_) => {}
            Body::Node(node) => {
                self.end_file();
                self.take_node((leaf, at), node);
            }
        }
        Ok(())
    }

    fn skip_one(&mut self) -> Result<()> {
        self.skipped += 1;
        if let (SKIPPED_BEFORE_SEEK, Some(pruned)) = (self.skipped, &self.pruned) {
            // Everything below it continues its key with a zero byte.
            let behind = [&pruned[..], &[1]].concat();
            self.cursor.seek(&behind)?;
        }
        Ok(())
    }

    fn prune(&mut self, key: &[u8]) {
        self.pruned = Some(key.to_vec());
        self.skipped = 0;
    }

    fn take_extent(&mut self, (leaf, at): At<'_>, chunks: &[Chunk]) {
        let key = &leaf.leaf.entries[at].key;
        if let Some(item) = self.growing {
            let of = &self.window.items[item as usize].entry().key;
            if key.len() == of.len() + 10 && is_within(key, of) && key[of.len() + 1] == 0 {
                self.add_chunks(item, chunks);
            }
        }
    }

    fn take_node(&mut self, at: At<'_>, node: &Node) {
        let key = &at.0.leaf.entries[at.1].key;
        let shared_len = self.key.iter().zip(key).take_while(|(a, b)| a == b).count();
        while self.levels.len() > 1 {
            let end = self.levels.last().map_or(0, |level| level.key_len);
            if end <= shared_len && key.get(end) == Some(&0) {
                break;
            }
            self.leave();
        }
        let name = name_of(key);
        let is_dir = node.kind == Kind::Dir;
        if let Err(why) = self.check_place(key, name) {
            self.shared.fail(&path_of(key), format!("it is refused: {why}"));
            return self.prune(key);
        }
        let found = self.compare_extras(name);
        let verdict = self
            .filter
            .map_or(FilterResult::Take, |filter| filter(&path_of(&key[self.base_len..]), is_dir));
        match (verdict, is_dir) {
            (FilterResult::Prune, true) => self.prune(key),
            (FilterResult::Prune | FilterResult::Skip, false) => {}
            (FilterResult::Take | FilterResult::Skip, true) => {
                let taken = verdict == FilterResult::Take;
                self.enter(key, taken, Some(folder_meta(node)));
                if taken && !self.make_levels() {
                    self.prune(key);
                }
            }
            (FilterResult::Take, false) => {
                if self.make_levels() {
                    self.take_file(at, node, found);
                } else {
                    let end = key.len().saturating_sub(name.len() + 1);
                    self.prune(&key[..end]);
                }
            }
        }
    }

    /// Whether the entry `name` with this key may be restored below the innermost level.
    fn check_place(&mut self, key: &[u8], name: &[u8]) -> std::result::Result<(), &'static str> {
        if !is_plain_name(name) {
            return Err("its name is impossible");
        }
        let start = key.len() - name.len();
        if self.key.is_empty() && start == 0 {
            return if is_links_folder(name) { Err("its name is reserved") } else { Ok(()) };
        }
        let above = if self.key.is_empty() { 0 } else { self.key.len() + 1 };
        if above == start {
            let reserved = self.levels.len() == 1 && is_links_folder(name);
            return if reserved { Err("its name is reserved") } else { Ok(()) };
        }
        if !self.damaged || above > start {
            return Err("the folder it lies in is missing");
        }
        // The entries of its folders are lost; their names are not.
        let missing: Vec<&[u8]> = key[above..start - 1].split(|byte| *byte == 0).collect();
        if !missing.iter().all(|name| is_plain_name(name)) {
            return Err("the name of its folder is impossible");
        }
        let mut end = above;
        for name in missing {
            end += name.len() + 1;
            self.enter(&key[..end - 1], true, None);
        }
        Ok(())
    }

    /// Goes down into a folder, which is made when it is known to be needed.
    fn enter(&mut self, key: &[u8], taken: bool, meta: Option<Box<FolderMeta>>) {
        self.key.truncate(self.levels.last().map_or(0, |level| level.key_len));
        let from = self.key.len();
        self.key.extend_from_slice(&key[from..]);
        let (folder, extras) = (None, None);
        let key_len = key.len();
        self.levels.push(Level { key_len, folder, meta, taken, fresh: false, extras });
    }

    fn leave(&mut self) {
        let Some(mut level) = self.levels.pop() else {
            return;
        };
        self.remove_extras(&mut level, None);
        self.key.truncate(self.levels.last().map_or(0, |level| level.key_len));
        if let Some(folder) = level.folder {
            // A folder that was there and is not itself wanted stays as it is.
            let meta = level.meta.filter(|_| level.taken || level.fresh);
            self.window.bytes += FOLDER_BYTES;
            self.ended.push((folder, meta));
        }
    }

    /// Makes the folders up to the innermost level that are not there yet.
    fn make_levels(&mut self) -> bool {
        let first = self.levels.iter().rposition(|level| level.folder.is_some()).unwrap_or(0);
        for at in first + 1..self.levels.len() {
            let parent = &self.levels[at - 1];
            let parent_key_len = if parent.key_len == 0 { 0 } else { parent.key_len + 1 };
            let (above, above_fresh) = (parent.folder.unwrap_or(ROOT), parent.fresh);
            let name = self.key[parent_key_len..self.levels[at].key_len].to_vec();
            match self.shared.open_or_make(above, above_fresh, &name) {
                Ok((dir, fresh)) => {
                    let folder = self.shared.folders.add(above, &name, dir);
                    let extras = if fresh || !self.levels[at].taken {
                        None
                    } else {
                        self.read_extras(folder)
                    };
                    let level = &mut self.levels[at];
                    (level.folder, level.fresh, level.extras) = (Some(folder), fresh, extras);
                    count(&self.shared.counters.dirs, 1);
                    self.shared.monitor.advance(1, 0);
                }
                Err(error) => {
                    let path = path_of(&self.key[..self.levels[at].key_len]);
                    self.shared.fail_io(&path, "the folder cannot be made", &error);
                    let key = self.key[..self.levels[at].key_len].to_vec();
                    while self.levels.len() > at {
                        self.leave();
                    }
                    self.prune(&key);
                    return false;
                }
            }
        }
        true
    }

    fn read_extras(&self, folder: u32) -> Option<Extras> {
        if !self.shared.options.delete || self.damaged {
            return None;
        }
        let read = self.shared.folders.dir(folder).and_then(|dir| Extras::read(self.shared, &dir));
        read.unwrap_or_else(|error| {
            let path = [&self.base_path[..], &self.shared.folders.path(folder)].concat();
            self.shared.warn(&path, format!("what is too much in it stays: {error}"));
            None
        })
    }

    /// Removes what the innermost folder has before `name`. Tells whether `name` is there, if known.
    fn compare_extras(&mut self, name: &[u8]) -> Option<bool> {
        let mut level = self.levels.pop()?;
        let found = self.remove_extras(&mut level, Some(name));
        self.levels.push(level);
        found
    }

    fn remove_extras(&self, level: &mut Level, before: Option<&[u8]>) -> Option<bool> {
        let (Some(extras), Some(folder)) = (&mut level.extras, level.folder) else {
            return None;
        };
        let remover = Remover { shared: self.shared, filter: self.filter, base: &self.base_path };
        match extras.remove_before(before, folder, &remover) {
            Ok(found) => Some(found),
            Err(error) => {
                let path = [&self.base_path[..], &self.shared.folders.path(folder)].concat();
                self.shared.warn(&path, format!("what is too much in it stays: {error}"));
                level.extras = None;
                None
            }
        }
    }

    /// Decides about anything but a folder, in a folder that is there.
    fn take_file(&mut self, (leaf, at): At<'_>, node: &Node, found: Option<bool>) {
        let Some((folder, fresh)) =
            self.levels.last().and_then(|level| Some((level.folder?, level.fresh)))
        else {
            return;
        };
        let key = &leaf.leaf.entries[at].key;
        if !fresh && found != Some(false) && self.leave_existing(folder, key, node) {
            return;
        }
        if self.shared.options.dry_run {
            count(&self.shared.counters.files, 1);
            let bytes = if node.kind == Kind::File { node.size } else { 0 };
            count(&self.shared.counters.bytes, bytes);
            self.shared.monitor.advance(1, bytes);
            return;
        }
        self.count_leaf(leaf);
        if let Some(key) = link_key(node).filter(|_| self.shared.links.are_supported()) {
            if self.window.first_names.contains(&key) || self.shared.links.contains(key) {
                self.window.add(leaf, at, folder, Work::Link);
                return;
            }
            self.window.first_names.insert(key);
            self.window.bytes += 64;
        }
        self.add_content((leaf, at), node, folder);
    }

    /// Whether what is there already stays, or cannot be replaced.
    fn leave_existing(&self, folder: u32, key: &[u8], node: &Node) -> bool {
        let (shared, name) = (self.shared, name_of(key));
        let found = shared.folders.dir(folder).and_then(|dir| {
            let now = dir.lstat(name)?;
            let same = shared.options.overwrite == Overwrite::IfChanged
                && is_unchanged(&dir, name, &now, node)?;
            Ok((dir, now, same))
        });
        let (dir, now, same) = match found {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return false,
            Err(error) => {
                shared.fail_io(&path_of(key), "what is in its place cannot be looked at", &error);
                return true;
            }
        };
        match shared.options.overwrite {
            Overwrite::Always => return false,
            Overwrite::IfChanged if now.kind == Kind::Dir => {
                shared.fail(&path_of(key), "a folder is in its place");
                return true;
            }
            Overwrite::IfChanged if !same => return false,
            Overwrite::IfChanged if !shared.options.dry_run => {
                let current = Some(Current::from(&now));
                let options = ApplyOptions { owner: shared.options.owner, current };
                let target = Target::Name(&dir, name);
                let failures = apply(target, &meta_of(node), &node.xattrs, &options);
                if !failures.is_empty() {
                    shared.warn_attributes(&path_of(key), &failures);
                }
                if let Some(link) = link_key(node) {
                    shared.register_name(link, &dir, name, &path_of(key));
                }
            }
            Overwrite::IfChanged | Overwrite::Never => {}
        }
        count(&shared.counters.skipped_unchanged, 1);
        shared.monitor.advance(1, node.size);
        true
    }

    /// Adds what a file consists of to the window.
    fn add_content(&mut self, (leaf, at): At<'_>, node: &Node, folder: u32) {
        let verify = self.shared.options.verify;
        match &node.content {
            Content::None | Content::Inline(_) => {
                self.window.add(leaf, at, folder, Work::Immediate);
            }
            Content::Part { bundle, offset, .. } => {
                let item = self.window.add(leaf, at, folder, Work::Single);
                let len = node.size as u32;
                let piece = Piece { item, blob_offset: *offset, len, offset: 0 };
                self.window.add_piece(piece, *bundle, verify);
            }
            Content::Chunks(chunks) if chunks.len() == 1 => {
                let item = self.window.add(leaf, at, folder, Work::Single);
                self.add_chunks(item, chunks);
            }
            Content::Chunks(chunks) => {
                let item = self.window.add_multi(leaf, at, folder);
                self.add_chunks(item, chunks);
                self.window.end(item);
            }
            Content::Extents => {
                self.growing = Some(self.window.add_multi(leaf, at, folder));
            }
        }
    }

    fn add_chunks(&mut self, item: u32, chunks: &[Chunk]) {
        let owner = &self.window.items[item as usize];
        if owner.has_failed() {
            return;
        }
        let size = owner.node().size;
        if chunks.iter().any(|chunk| chunk.end() > size) {
            let path = owner.path();
            if self.shared.discard(&self.window, item) {
                self.shared.fail(&path, "the tree names content beyond its end");
            }
            return;
        }
        for chunk in chunks {
            let (len, offset) = (chunk.blob.len, chunk.offset);
            let piece = Piece { item, blob_offset: 0, len, offset };
            self.window.add_piece(piece, chunk.blob, self.shared.options.verify);
        }
    }

    /// No more extents follow for the file before.
    fn end_file(&mut self) {
        if let Some(item) = self.growing.take() {
            self.window.end(item);
        }
    }

    fn count_leaf(&mut self, leaf: &Arc<LeafAt>) {
        if self.last_leaf.as_ref().is_none_or(|last| !Arc::ptr_eq(last, leaf)) {
            self.window.bytes += leaf_bytes(leaf);
            self.last_leaf = Some(leaf.clone());
        }
    }

    /// Carries out the window and finishes the folders that ended.
    fn flush(&mut self) -> Result<()> {
        let own_content = self.execute()?;
        if !own_content.is_empty() {
            self.restore_own_content(own_content)?;
        }
        for (folder, meta) in std::mem::take(&mut self.ended) {
            self.finish_folder(folder, meta);
            self.shared.folders.remove(folder);
        }
        Ok(())
    }

    /// Carries out the window. Returns key and folder of files that could not be linked.
    fn execute(&mut self) -> Result<Vec<(Vec<u8>, u32)>> {
        self.window.bytes = 0;
        if self.window.is_empty() {
            return Ok(Vec::new());
        }
        let wants = std::mem::take(&mut self.window.wants);
        let executor = Executor::new(self.shared, &self.window);
        executor.run(wants);
        self.shared.check()?;
        if self.shared.options.verify {
            verify::verify(self.shared, &self.window);
        }
        let unlinked = executor.link_names();
        self.shared.check()?;
        let items = unlinked.into_iter().map(|number| &self.window.items[number as usize]);
        let own_content = items.map(|item| (item.entry().key.clone(), item.folder)).collect();
        self.window = match &mut self.growing {
            Some(item) => {
                let window = self.window.take_growing(*item);
                *item = 0;
                window
            }
            None => Window::default(),
        };
        Ok(own_content)
    }

    /// Restores files that were to be further names of others, but could not be linked.
    fn restore_own_content(&mut self, files: Vec<(Vec<u8>, u32)>) -> Result<()> {
        // The window may hold the begin of a large file, which goes on afterwards.
        let window = std::mem::take(&mut self.window);
        let growing = self.growing.take();
        let restored = self.restore_unlinked(files);
        if restored.is_err() {
            self.shared.remove_unfinished(&window);
        } else {
            (self.window, self.growing) = (window, growing);
        }
        restored
    }

    fn restore_unlinked(&mut self, files: Vec<(Vec<u8>, u32)>) -> Result<()> {
        // The first of them may be linked to the others; what fails again is not linked any more.
        let mut again = Vec::new();
        for (key, folder) in &files {
            self.restore_own(key, *folder, true, &mut again)?;
        }
        again.extend(self.execute()?);
        for (key, folder) in &std::mem::take(&mut again) {
            self.restore_own(key, *folder, false, &mut again)?;
        }
        again.extend(self.execute()?);
        debug_assert!(again.is_empty(), "nothing was linked");
        Ok(())
    }

    /// Restores one file found anew. `again` gets those that could not be linked to it.
    fn restore_own(
        &mut self,
        key: &[u8],
        folder: u32,
        may_link: bool,
        again: &mut Vec<(Vec<u8>, u32)>,
    ) -> Result<()> {
        let (root, level) = self.root;
        let source = self.shared.repository;
        let mut cursor = EntryCursor::new(TreeCursor::new(source, root, level));
        cursor.seek(key)?;
        while let Some((leaf, at)) = cursor.peek_at()?.map(|(leaf, at)| (leaf.clone(), at)) {
            let entry = &leaf.leaf.entries[at];
            match &entry.body {
                Body::Node(node) if entry.key == key => {
                    self.count_leaf(&leaf);
                    if let Some(key) = link_key(node).filter(|_| may_link) {
                        if self.window.first_names.contains(&key) {
                            again.extend(self.execute()?);
                        }
                        if self.shared.links.contains(key) {
                            self.window.add(&leaf, at, folder, Work::Link);
                            break;
                        }
                        self.window.first_names.insert(key);
                    }
                    self.add_content((&leaf, at), node, folder);
                }
                Body::Extent(chunks) if is_within(&entry.key, key) => {
                    self.take_extent((&leaf, at), chunks);
                }
                _ => break,
            }
            cursor.advance();
            if self.window.bytes >= self.shared.options.window_bytes {
                again.extend(self.execute()?);
            }
        }
        self.end_file();
        Ok(())
    }

    fn finish_folder(&self, folder: u32, meta: Option<Box<FolderMeta>>) {
        let Some(meta) = meta.filter(|_| !self.shared.options.dry_run) else {
            return;
        };
        let path = || [&self.base_path[..], &self.shared.folders.path(folder)].concat();
        match self.shared.folders.dir(folder) {
            Ok(dir) => {
                let options = ApplyOptions { owner: self.shared.options.owner, current: None };
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
    /// The folder `name`, and whether it was made just now; without a handle if a dry run would make it.
    fn open_or_make(
        &self,
        parent: u32,
        parent_fresh: bool,
        name: &[u8],
    ) -> io::Result<(Option<Dir>, bool)> {
        let is_other = |error: &io::Error| {
            matches!(Errno::from_io_error(error), Some(Errno::NOTDIR | Errno::LOOP))
        };
        let may_replace = self.options.overwrite != Overwrite::Never;
        if self.options.dry_run {
            if parent_fresh {
                return Ok((None, true));
            }
            return match self.folders.dir(parent)?.open_dir(name) {
                Ok(dir) => Ok((Some(dir), false)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok((None, true)),
                Err(error) if is_other(&error) && may_replace => Ok((None, true)),
                Err(error) => Err(error),
            };
        }
        let parent = self.folders.dir(parent)?;
        match parent.make_dir(name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|dir| (Some(dir), true)),
        }
        match parent.open_dir(name) {
            Err(error) if is_other(&error) && may_replace => {
                parent.unlink(name)?;
                parent.make_dir(name).map(|dir| (Some(dir), true))
            }
            opened => opened.map(|dir| (Some(dir), false)),
        }
    }
}

/// Whether what is there is what the snapshot has, by all that can be told without reading it.
fn is_unchanged(dir: &Dir, name: &[u8], now: &Meta, node: &Node) -> io::Result<bool> {
    if (now.kind, now.mtime) != (node.kind, node.mtime) {
        return Ok(false);
    }
    Ok(match (&node.kind, &node.content) {
        (Kind::File, _) => now.size == node.size,
        (Kind::Symlink, Content::Inline(to)) => dir.read_link(name)? == *to,
        (Kind::CharDevice | Kind::BlockDevice, _) => (now.rdev_major, now.rdev_minor) == node.rdev,
        _ => true,
    })
}

fn folder_meta(node: &Node) -> Box<FolderMeta> {
    Box::new(FolderMeta { meta: meta_of(node), xattrs: node.xattrs.clone() })
}

/// Whether `key` is `of` or lies below it.
fn is_within(key: &[u8], of: &[u8]) -> bool {
    of.is_empty() || (key.starts_with(of) && matches!(key.get(of.len()), None | Some(0)))
}

fn path_of(key: &[u8]) -> Vec<u8> {
    key.iter().map(|byte| if *byte == 0 { b'/' } else { *byte }).collect()
}
