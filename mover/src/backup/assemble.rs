//! The queue of entries in path order, and the tree built from its front.
//!
//! Entries whose content is still being read wait in the queue; what stands behind them waits too.
//! The queue is bounded by [`Assembler::is_full`], which the scan asks before it goes on.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use chunkstore::record::Summary;
use chunkstore::tree::{
    Body, Content, Entry, Kind, LeafAt, Liveness, Node, NodeRef, Timestamp, TreeBuilder,
};
use chunkstore::{Error, Result};

use super::sparse::BundleUse;

/// Number of a place in the queue that waits for content.
pub(super) type Ticket = u64;

/// Hard links whose content is remembered; further ones are read again.
const LINKS_MAX: usize = 64 << 10;

enum Item {
    /// Complete.
    Ready(Entry),
    /// Consecutive unchanged entries of a leaf of the parent.
    Run { leaf: Arc<LeafAt>, from: usize, to: usize },
    /// Waits for its content.
    Waiting { key: Vec<u8> },
    /// Another name of a file met before.
    Link { key: Vec<u8>, node: Node },
    /// Turned out not to be there.
    Gone,
}

/// Builds the tree from entries that become complete out of order.
pub(super) struct Assembler<'a> {
    builder: TreeBuilder<'a>,
    queue: VecDeque<Item>,
    first: Ticket,
    bytes: usize,
    bytes_max: usize,
    links: HashMap<(u32, u64), Option<Read>>,
    /// Names of files whose first name could not be read, to be reported.
    unread_links: Vec<Vec<u8>>,
    summary: Summary,
    bundles: BundleUse,
}

/// What a file with several names was when it was read. All its names get that, lest the size of one
/// belong to another moment than its content.
struct Read {
    content: Content,
    size: u64,
    mtime: Timestamp,
    ctime: Timestamp,
}

/// A finished tree.
pub(super) struct Tree {
    pub(super) root: NodeRef,
    /// Its height.
    pub(super) level: u8,
    pub(super) summary: Summary,
    /// Bundles of which it uses little.
    pub(super) sparse: Liveness,
}

/// Bytes an entry takes in the queue besides its key: some chunks, mostly few.
const ITEM_BYTES: usize = 400;

impl<'a> Assembler<'a> {
    pub(super) fn new(builder: TreeBuilder<'a>, bytes_max: usize, bundles: BundleUse) -> Self {
        Self {
            builder,
            queue: VecDeque::new(),
            first: 0,
            bytes: 0,
            bytes_max,
            links: HashMap::new(),
            unread_links: Vec::new(),
            summary: Summary::default(),
            bundles,
        }
    }

    /// Whether the scan has to wait for content before it goes on.
    pub(super) fn is_full(&self) -> bool {
        self.bytes >= self.bytes_max
    }

    fn append(&mut self, item: Item, key_bytes: usize) -> Ticket {
        self.bytes += ITEM_BYTES + key_bytes;
        self.queue.push_back(item);
        self.first + self.queue.len() as u64 - 1
    }

    /// Appends a complete entry.
    pub(super) fn push(&mut self, entry: Entry) {
        let bytes = entry.key.len();
        self.append(Item::Ready(entry), bytes);
    }

    /// Appends an unchanged entry of the parent.
    pub(super) fn push_unchanged(&mut self, leaf: &Arc<LeafAt>, at: usize) {
        if let Some(Item::Run { leaf: last, to, .. }) = self.queue.back_mut()
            && Arc::ptr_eq(last, leaf)
            && *to == at
        {
            *to += 1;
            return;
        }
        // A run keeps its whole leaf in memory; a leaf encodes to at most about 64 KiB.
        let bytes = if at == 0 { 64 << 10 } else { 16 << 10 };
        self.append(Item::Run { leaf: leaf.clone(), from: at, to: at + 1 }, bytes - ITEM_BYTES);
    }

    /// Appends a place for an entry whose content is being read.
    pub(super) fn reserve(&mut self, key: Vec<u8>) -> Ticket {
        let bytes = key.len();
        self.append(Item::Waiting { key }, bytes)
    }

    /// Whether this file was met under another name, so that it need not be read again.
    pub(super) fn is_known_link(&self, fs: u32, ino: u64) -> bool {
        self.links.contains_key(&(fs, ino))
    }

    /// Notes that a file with several names is about to be read.
    pub(super) fn expect_link(&mut self, fs: u32, ino: u64) {
        if self.links.len() < LINKS_MAX {
            self.links.insert((fs, ino), None);
        }
    }

    /// Appends another name of a file met before.
    pub(super) fn push_link(&mut self, key: Vec<u8>, node: Node) {
        let bytes = key.len();
        self.append(Item::Link { key, node }, bytes);
    }

    /// Fills a place; `None` if there is nothing to be saved.
    pub(super) fn resolve(&mut self, ticket: Ticket, node: Option<Node>) {
        let place = &mut self.queue[(ticket - self.first) as usize];
        *place = match (std::mem::replace(place, Item::Gone), node) {
            (Item::Waiting { key }, Some(node)) => {
                Item::Ready(Entry { key, body: Body::Node(node) })
            }
            _ => Item::Gone,
        };
    }

    /// Moves what is complete from the front of the queue into the tree. A run at the very end may
    /// still grow and stays, unless this is the `last` call.
    pub(super) fn advance(&mut self, last: bool) -> Result<()> {
        loop {
            match self.queue.front() {
                None | Some(Item::Waiting { .. }) => return Ok(()),
                Some(Item::Run { leaf, to, .. })
                    if !last && self.queue.len() == 1 && *to < leaf.leaf.entries.len() =>
                {
                    return Ok(());
                }
                Some(_) => {}
            }
            let Some(item) = self.queue.pop_front() else {
                return Ok(());
            };
            self.first += 1;
            let bytes = self.build(item)?;
            self.bytes = if self.queue.is_empty() { 0 } else { self.bytes.saturating_sub(bytes) };
        }
    }

    /// Adds an item to the tree; returns the bytes it took in the queue.
    fn build(&mut self, item: Item) -> Result<usize> {
        match item {
            Item::Gone => Ok(ITEM_BYTES),
            Item::Ready(entry) => {
                self.note(&entry);
                self.builder.push(&entry)?;
                Ok(ITEM_BYTES + entry.key.len())
            }
            Item::Link { key, mut node } => {
                let bytes = ITEM_BYTES + key.len();
                match self.links.get(&(node.fs, node.ino)) {
                    Some(Some(read)) => {
                        node.content = read.content.clone();
                        (node.size, node.mtime, node.ctime) = (read.size, read.mtime, read.ctime);
                    }
                    _ => {
                        self.unread_links.push(key);
                        return Ok(bytes);
                    }
                }
                let entry = Entry { key, body: Body::Node(node) };
                count(&mut self.summary, &entry);
                self.builder.push(&entry)?;
                Ok(bytes)
            }
            Item::Run { leaf, from, to } => {
                self.add_run(&leaf, from, to)?;
                Ok(if from == 0 { 64 << 10 } else { 16 << 10 })
            }
            Item::Waiting { .. } => Err(Error::invalid("an entry was built before it was read")),
        }
    }

    fn add_run(&mut self, leaf: &LeafAt, from: usize, to: usize) -> Result<()> {
        let entries = &leaf.leaf.entries;
        for entry in &entries[from..to] {
            self.note(entry);
        }
        if from == 0 && to == entries.len() {
            return self.builder.push_leaf(leaf).map(drop);
        }
        entries[from..to].iter().try_for_each(|entry| self.builder.push(entry))
    }

    /// Counts an entry of the new tree, what it uses only if it is the first name of its file.
    fn note(&mut self, entry: &Entry) {
        count(&mut self.summary, entry);
        let is_further_name = entry.node().is_some_and(|node| {
            node.linked && matches!(self.links.get(&(node.fs, node.ino)), Some(Some(_)))
        });
        if !is_further_name {
            self.bundles.add(entry);
        }
        self.note_link(entry);
    }

    /// Remembers the content of a file with several names, for the other ones.
    fn note_link(&mut self, entry: &Entry) {
        let Some(node) = entry.node().filter(|node| node.linked && node.kind == Kind::File) else {
            return;
        };
        // The content of a large file is in the entries behind it: its other names are read again.
        if node.content == Content::Extents {
            self.links.remove(&(node.fs, node.ino));
        } else if self.links.len() < LINKS_MAX || self.links.contains_key(&(node.fs, node.ino)) {
            let read = Read {
                content: node.content.clone(),
                size: node.size,
                mtime: node.mtime,
                ctime: node.ctime,
            };
            self.links.insert((node.fs, node.ino), Some(read));
        }
    }

    /// Keys of entries left out because another name of the same file could not be read.
    pub(super) fn take_unread_links(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.unread_links)
    }

    /// Finishes the tree, all content having come.
    pub(super) fn finish(mut self) -> Result<Tree> {
        self.advance(true)?;
        if !self.queue.is_empty() {
            return Err(Error::invalid("an entry was never read"));
        }
        let root = self.builder.finish()?;
        let (root, level) = root.ok_or_else(|| Error::invalid("the folder has no entry"))?;
        Ok(Tree { root, level, summary: self.summary, sparse: self.bundles.sparse() })
    }
}

/// Counts an entry of the new tree.
pub(super) fn count(summary: &mut Summary, entry: &Entry) {
    match entry.node() {
        Some(node) if node.kind == Kind::Dir => summary.dirs += 1,
        Some(node) => {
            summary.files += 1;
            if node.kind == Kind::File {
                // Sparse files can be so large that their sum is not.
                summary.bytes = summary.bytes.saturating_add(node.size);
            }
        }
        None => {}
    }
}
