//! Walks the tree in order: enters folders, decides about every file, fills windows and has them
//! carried out.

use std::sync::Arc;

use chunkstore::tree::{
    Absence, Body, Chunk, Content, End, EntryCursor, LeafAt, Node, NodeRef, State, TreeCursor,
};
use chunkstore::{Error, ErrorKind, Result};

use crate::fs::Kind;

use super::hidden::is_leftover;
use super::levels::{FolderMeta, Level};
use super::links::LinkKey;
use super::window::{Piece, Window, Work, leaf_bytes, name_of};
use super::write::Executor;
use super::{Filter, FilterResult, Request, Shared, count, is_plain_name, lock, verify};

/// Entries below a pruned folder that are read before the rest is sought past.
const SKIPPED_BEFORE_SEEK: u32 = 1024;

/// A place in the tree.
pub(super) type At<'l> = (&'l Arc<LeafAt>, usize);

pub(super) struct Planner<'a> {
    pub(super) shared: &'a Shared<'a>,
    pub(super) filter: Option<&'a Filter<'a>>,
    pub(super) root: (NodeRef, u8),
    subpath: &'a [u8],
    /// Where paths below the target begin in keys.
    base_len: usize,
    pub(super) base_path: Vec<u8>,
    cursor: EntryCursor<'a>,
    pub(super) levels: Vec<Level>,
    /// Key of the innermost level.
    pub(super) key: Vec<u8>,
    /// Nothing below this key is restored.
    pruned: Option<Vec<u8>>,
    skipped: u32,
    pub(super) window: Window,
    last_leaf: Option<Arc<LeafAt>>,
    /// The file whose extents are being met.
    pub(super) growing: Option<u32>,
    /// Key of the file last taken, to which an end that follows belongs.
    last_taken: Vec<u8>,
    /// Folders that ended, deepest first, with what they get and whether they were made.
    pub(super) ended: Vec<(u32, Option<Box<FolderMeta>>, bool)>,
    /// Whether a part of the tree could not be read.
    pub(super) damaged: bool,
    /// Whether anything in the tree was asked for.
    matched: bool,
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
            let message = match first.as_ref().map(|(leaf, at)| &leaf.leaf.entries[*at].body) {
                Some(Body::Absent(why)) => format!("'{path}' {}", why.explained()),
                _ => format!("there is no '{path}' in the snapshot"),
            };
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
        let meta = node.filter(|_| !is_file).map(FolderMeta::of);
        if let Some(node) = node.filter(|_| !is_file) {
            cursor.advance();
            count(&shared.counters.dirs, u64::from(taken));
            if taken {
                shared.tell_state(&path_of(subpath), node.state);
            }
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
            last_taken: Vec::new(),
            ended: Vec::new(),
            damaged: false,
            matched: taken,
        };
        planner.enter_target(meta, taken, fresh);
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
            self.seek_present(&mut root, None);
            self.levels.push(root);
        }
        self.flush()?;
        self.shared.check()?;
        if !self.matched && !self.damaged {
            let message =
                "nothing in the snapshot matches what is to be restored; nothing was changed";
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        Ok(())
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
        self.levels.iter_mut().for_each(|level| level.delete = false);
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
            Body::End(end) => self.take_end(&entry.key, *end),
            Body::Absent(why) => {
                self.end_file();
                self.take_absent(&entry.key, *why);
            }
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

    pub(super) fn prune(&mut self, key: &[u8]) {
        self.pruned = Some(key.to_vec());
        self.skipped = 0;
    }

    pub(super) fn take_extent(&mut self, (leaf, at): At<'_>, chunks: &[Chunk]) {
        let key = &leaf.leaf.entries[at].key;
        if let Some(item) = self.growing
            && continues(key, &self.window.items[item as usize].entry().key)
        {
            self.add_chunks(item, chunks);
        }
    }

    /// How the reading of the file before ended.
    pub(super) fn take_end(&mut self, key: &[u8], end: End) {
        if let Some(item) = self.growing
            && continues(key, &self.window.items[item as usize].entry().key)
            && let Some(multi) = self.window.multi(item)
        {
            lock(&multi.state).end = Some(end);
        }
        if continues(key, &self.last_taken) {
            self.shared.tell_state(&path_of(&self.last_taken), end.state);
            self.last_taken.clear();
        }
    }

    /// A name of which nothing is saved: whatever has it in the target stays.
    fn take_absent(&mut self, key: &[u8], why: Absence) {
        self.leave_to(key);
        let name = name_of(key);
        if self.check_place(key, name).is_err() {
            return;
        }
        self.seek_innermost(name);
        let taken = self.ask(key, false) == FilterResult::Take;
        self.matched |= taken;
        if taken && why == Absence::Unreadable {
            self.shared.tell_incomplete(&path_of(key), why.explained());
        }
    }

    fn ask(&self, key: &[u8], is_dir: bool) -> FilterResult {
        let path = || path_of(&key[self.base_len..]);
        self.filter.map_or(FilterResult::Take, |filter| filter(&path(), is_dir))
    }

    fn take_node(&mut self, at: At<'_>, node: &Node) {
        let key = &at.0.leaf.entries[at.1].key;
        self.leave_to(key);
        self.last_taken.clear();
        let name = name_of(key);
        let is_dir = node.kind == Kind::Dir;
        if let Err(why) = self.check_place(key, name) {
            self.shared.fail(&path_of(key), format!("it is refused: {why}"));
            return self.prune(key);
        }
        if is_leftover(name) {
            let message =
                "it was left in the source by a restore that was killed, and is not restored";
            self.shared.warn(&path_of(key), message);
            return self.prune(key);
        }
        let verdict = self.ask(key, is_dir);
        self.matched |= verdict == FilterResult::Take;
        match (verdict, is_dir) {
            (FilterResult::Prune, true) => {
                self.seek_innermost(name);
                self.prune(key);
            }
            (FilterResult::Prune | FilterResult::Skip, false) => {
                self.seek_innermost(name);
            }
            (FilterResult::Take | FilterResult::Skip, true) => {
                let taken = verdict == FilterResult::Take;
                self.enter(key, taken, Some(FolderMeta::of(node)));
                if taken {
                    self.shared.tell_state(&path_of(key), node.state);
                    self.make_levels();
                } else {
                    self.step_over_innermost(name);
                }
            }
            (FilterResult::Take, false) => {
                self.last_taken.clone_from(key);
                if self.make_levels() {
                    self.shared.tell_state(&path_of(key), node.state);
                    self.take_file(at, node);
                }
            }
        }
    }

    /// Goes past the name of the folder just entered in the one above, where it may stay unmade.
    fn step_over_innermost(&mut self, name: &[u8]) {
        if let Some(level) = self.levels.pop() {
            self.seek_innermost(name);
            self.levels.push(level);
        }
    }

    /// Whether the entry `name` with this key may be restored below the innermost level.
    fn check_place(&mut self, key: &[u8], name: &[u8]) -> std::result::Result<(), &'static str> {
        if !is_plain_name(name) {
            return Err("its name is impossible");
        }
        let start = key.len() - name.len();
        if self.key.is_empty() && start == 0 {
            return Ok(());
        }
        let above = if self.key.is_empty() { 0 } else { self.key.len() + 1 };
        if above == start {
            return Ok(());
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

    /// Decides about anything but a folder, in a folder that is there.
    fn take_file(&mut self, (leaf, at): At<'_>, node: &Node) {
        let key = &leaf.leaf.entries[at].key;
        let Some((folder, fresh)) =
            self.levels.last().and_then(|level| Some((level.folder?, level.fresh)))
        else {
            return;
        };
        let existed = if fresh { Some(false) } else { self.seek_innermost(name_of(key)) };
        if existed != Some(false) && self.leave_existing(folder, (leaf, at), node) {
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
        if let Some(key) = LinkKey::of(node).filter(|_| self.shared.links.are_supported()) {
            if self.is_known(folder, key) {
                self.window.add((leaf, at), folder, existed, Work::Link);
                return;
            }
            self.add_first_name(folder, key);
        }
        self.add_content((leaf, at), node, folder, existed);
    }

    /// Whether the file with this key is restored already, or will be with this window.
    pub(super) fn is_known(&self, folder: u32, key: LinkKey) -> bool {
        let base = self.shared.folders.site(folder).base;
        self.window.first_names.contains(&(base, key)) || self.shared.is_linkable(base, key)
    }

    pub(super) fn add_first_name(&mut self, folder: u32, key: LinkKey) {
        let base = self.shared.folders.site(folder).base;
        self.window.first_names.insert((base, key));
        self.window.bytes += 64;
    }

    /// Adds what a file consists of to the window.
    pub(super) fn add_content(
        &mut self,
        (leaf, at): At<'_>,
        node: &Node,
        folder: u32,
        existed: Option<bool>,
    ) {
        let verify = self.shared.options.verify;
        match &node.content {
            Content::None | Content::Inline(_) => {
                self.window.add((leaf, at), folder, existed, Work::Immediate);
            }
            Content::Part { bundle, offset, .. } => {
                let item = self.window.add((leaf, at), folder, existed, Work::Single);
                let len = node.size as u32;
                let piece = Piece { item, blob_offset: *offset, len, offset: 0 };
                self.window.add_piece(piece, *bundle, verify);
            }
            Content::Chunks(chunks) if chunks.len() == 1 && chunks[0].end() <= node.size => {
                let item = self.window.add((leaf, at), folder, existed, Work::Single);
                self.add_chunks(item, chunks);
            }
            Content::Chunks(chunks) => {
                let item = self.window.add_multi((leaf, at), folder, existed);
                self.add_chunks(item, chunks);
                self.window.end(item);
            }
            Content::Extents => {
                self.growing = Some(self.window.add_multi((leaf, at), folder, existed));
            }
        }
    }

    fn add_chunks(&mut self, item: u32, chunks: &[Chunk]) {
        if self.window.items[item as usize].has_failed() {
            return;
        }
        if let Some(multi) = self.window.multi(item) {
            let mut state = lock(&multi.state);
            let ends = chunks.iter().map(Chunk::end);
            state.pieces_end = ends.fold(state.pieces_end, u64::max);
        }
        for chunk in chunks {
            let (len, offset) = (chunk.blob.len, chunk.offset);
            let piece = Piece { item, blob_offset: 0, len, offset };
            self.window.add_piece(piece, chunk.blob, self.shared.options.verify);
        }
    }

    /// No more extents follow for the file before.
    pub(super) fn end_file(&mut self) {
        if let Some(item) = self.growing.take() {
            self.window.end(item);
        }
    }

    pub(super) fn count_leaf(&mut self, leaf: &Arc<LeafAt>) {
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
        self.finish_ended();
        Ok(())
    }

    /// Carries out the window. Returns key and folder of files that have to be restored from their own content.
    pub(super) fn execute(&mut self) -> Result<Vec<(Vec<u8>, u32)>> {
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
        executor.link_names();
        self.shared.check()?;
        let again = std::mem::take(&mut *lock(&self.window.again));
        let items = again.into_iter().map(|number| &self.window.items[number as usize]);
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
}

impl Shared<'_> {
    /// Tells what the snapshot says about how an entry was saved.
    fn tell_state(&self, path: &[u8], state: State) {
        match (state, state.explained()) {
            (State::Changed, Some(text)) => self.warn_changed(path, text),
            (_, Some(text)) if state.is_incomplete() => self.tell_incomplete(path, text),
            _ => {}
        }
    }
}

/// Whether an entry belongs to the large file with the key `of`.
fn continues(key: &[u8], of: &[u8]) -> bool {
    !of.is_empty() && key.len() == of.len() + 10 && is_within(key, of) && key[of.len() + 1] == 0
}

/// Whether `key` is `of` or lies below it.
pub(super) fn is_within(key: &[u8], of: &[u8]) -> bool {
    of.is_empty() || (key.starts_with(of) && matches!(key.get(of.len()), None | Some(0)))
}

pub(super) fn path_of(key: &[u8]) -> Vec<u8> {
    key.iter().map(|byte| if *byte == 0 { b'/' } else { *byte }).collect()
}
