//! The queue of entries in path order, and the tree built from its front.
//!
//! Entries whose content is still being read wait in the queue; what stands behind them waits too.
//! The queue is bounded by [`Assembler::is_full`], which the walk asks before it goes on.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use chunkstore::record::Summary;
use chunkstore::tree::{
    Body, Content, Entry, Kind, LeafAt, Liveness, Node, NodeRef, State, Timestamp, TreeBuilder,
};
use chunkstore::{Error, Result};

use super::bundle_use::BundleUse;
use super::parent::ChangedBy;
use crate::fs::Meta;

/// Number of a place in the queue that waits for content.
pub(super) type Ticket = u64;

/// Hard links whose content is remembered; further ones are read again.
const LINKS_MAX: usize = 64 << 10;

enum Item {
    /// Complete.
    Ready(Entry),
    /// Consecutive unchanged entries of a leaf of the parent.
    Run { leaf: Arc<LeafAt>, from: usize, to: usize },
    /// Waits for its content, and others that are names of the same file with it.
    Waiting { key: Vec<u8>, link: Option<LinkKey> },
    /// It has come.
    Read { entry: Entry, link: LinkKey },
    /// Another name of a file met before.
    Link(Link),
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
    /// Files with several names that are being read, or were.
    links: HashMap<LinkKey, Option<ReadOnce>>,
    summary: Summary,
    bundles: BundleUse,
}

/// What tells that two names are of one file. An inode number alone says nothing: it is used again as soon
/// as a file is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct LinkKey {
    fs: u32,
    ino: u64,
    size: u64,
    mtime: Timestamp,
    ctime: Timestamp,
}

impl LinkKey {
    /// That of the file `meta` describes.
    pub(super) fn of(meta: &Meta, fs: u32) -> Self {
        let Meta { ino, size, mtime, ctime, .. } = *meta;
        Self { fs, ino, size, mtime, ctime }
    }

    fn of_node(node: &Node) -> Self {
        let Node { fs, ino, size, mtime, ctime, .. } = *node;
        Self { fs, ino, size, mtime, ctime }
    }
}

/// Another name of a file met before.
pub(super) struct Link {
    pub(super) key: Vec<u8>,
    pub(super) node: Node,
    pub(super) link: LinkKey,
    /// How to tell that the file changes, should this be the name it is read by.
    pub(super) changed_by: ChangedBy,
}

/// Another name of a file whose first name could not be read. Its place in the queue waits for it.
pub(super) struct UnreadLink {
    pub(super) ticket: Ticket,
    pub(super) key: Vec<u8>,
    pub(super) fs: u32,
    pub(super) changed_by: ChangedBy,
}

/// What a file with several names was when it was read. All its names get that, lest the size of one
/// belong to another moment than its content.
struct ReadOnce {
    content: Content,
    state: State,
    size: u64,
    mtime: Timestamp,
    ctime: Timestamp,
}

impl ReadOnce {
    fn of(node: &Node) -> Self {
        let Node { state, size, mtime, ctime, .. } = *node;
        Self { content: node.content.clone(), state, size, mtime, ctime }
    }
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

    /// Appends a place for an entry whose content is being read; that of all names of `link`, if it has
    /// several.
    pub(super) fn reserve(&mut self, key: Vec<u8>, link: Option<LinkKey>) -> Ticket {
        let link = link.filter(|_| self.links.len() < LINKS_MAX);
        if let Some(link) = link {
            self.links.insert(link, None);
        }
        let bytes = key.len();
        self.append(Item::Waiting { key, link }, bytes)
    }

    /// Whether this file was met under another name, so that it need not be read again.
    pub(super) fn is_known_link(&self, link: &LinkKey) -> bool {
        self.links.contains_key(link)
    }

    /// Appends another name of a file met before.
    pub(super) fn push_link(&mut self, link: Link) {
        let bytes = link.key.len();
        self.append(Item::Link(link), bytes);
    }

    /// Fills a place; `None` if there is nothing to be saved.
    pub(super) fn resolve(&mut self, ticket: Ticket, body: Option<Body>) {
        let place = &mut self.queue[(ticket - self.first) as usize];
        let Item::Waiting { key, link } = std::mem::replace(place, Item::Gone) else {
            return;
        };
        *place = match (body, link) {
            (Some(body @ Body::Node(_)), Some(link)) => {
                Item::Read { entry: Entry { key, body }, link }
            }
            (body, link) => {
                if let Some(link) = link {
                    self.links.remove(&link);
                }
                body.map_or(Item::Gone, |body| Item::Ready(Entry { key, body }))
            }
        };
    }

    /// Moves what is complete from the front of the queue into the tree. A run at the very end may
    /// still grow and stays, unless this is the `last` call. Returns a name by which a file has to be
    /// read after all.
    pub(super) fn advance(&mut self, last: bool) -> Result<Option<UnreadLink>> {
        loop {
            let is_alone = self.queue.len() == 1;
            match self.queue.front_mut() {
                None | Some(Item::Waiting { .. }) => return Ok(None),
                Some(Item::Run { leaf, to, .. })
                    if !last && is_alone && *to < leaf.leaf.entries.len() =>
                {
                    return Ok(None);
                }
                Some(front @ Item::Link(_)) => {
                    if let Some(unread) = unread_link(front, &mut self.links, self.first) {
                        return Ok(Some(unread));
                    }
                }
                Some(_) => {}
            }
            let Some(item) = self.queue.pop_front() else {
                return Ok(None);
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
            Item::Read { entry, link } => {
                self.note(&entry);
                if let Some(node) = entry.node() {
                    self.links.insert(link, Some(ReadOnce::of(node)));
                }
                self.builder.push(&entry)?;
                Ok(ITEM_BYTES + entry.key.len())
            }
            Item::Link(Link { key, mut node, link, .. }) => {
                let Some(Some(read)) = self.links.get(&link) else {
                    return Err(Error::invalid("a further name was built before its file"));
                };
                node.content = read.content.clone();
                (node.size, node.mtime, node.ctime) = (read.size, read.mtime, read.ctime);
                if read.state != State::Whole {
                    node.state = read.state;
                }
                let entry = Entry { key, body: Body::Node(node) };
                count(&mut self.summary, &entry);
                self.builder.push(&entry)?;
                Ok(ITEM_BYTES + entry.key.len())
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
        let link = entry.node().filter(|node| node.linked && node.kind == Kind::File);
        let link = link.map(|node| (LinkKey::of_node(node), node));
        let is_further_name =
            link.is_some_and(|(key, _)| matches!(self.links.get(&key), Some(Some(_))));
        if !is_further_name {
            self.bundles.add(entry);
        }
        // The content of a large file is in the entries behind it: its other names are read again.
        if let Some((key, node)) = link
            && node.content != Content::Extents
            && (self.links.len() < LINKS_MAX || self.links.contains_key(&key))
        {
            self.links.insert(key, Some(ReadOnce::of(node)));
        }
    }

    /// Finishes the tree, all having been moved into it.
    pub(super) fn finish(self) -> Result<Tree> {
        if !self.queue.is_empty() {
            return Err(Error::invalid("an entry was never read"));
        }
        let root = self.builder.finish()?;
        let (root, level) = root.ok_or_else(|| Error::invalid("the folder has no entry"))?;
        Ok(Tree { root, level, summary: self.summary, sparse: self.bundles.sparse() })
    }
}

/// If the file that `front` is another name of could not be read by the first one, has it read by this
/// one, and all further ones wait for that.
fn unread_link(
    front: &mut Item,
    links: &mut HashMap<LinkKey, Option<ReadOnce>>,
    ticket: Ticket,
) -> Option<UnreadLink> {
    let Item::Link(unread) = &*front else { return None };
    let link = unread.link;
    if matches!(links.get(&link), Some(Some(_))) {
        return None;
    }
    links.insert(link, None);
    let key = unread.key.clone();
    let (fs, changed_by) = (unread.node.fs, unread.changed_by);
    *front = Item::Waiting { key: key.clone(), link: Some(link) };
    Some(UnreadLink { ticket, key, fs, changed_by })
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
