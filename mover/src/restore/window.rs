//! A window: files whose content is fetched together, and the pieces they consist of.

use std::collections::HashSet;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use chunkstore::fetch::Want;
use chunkstore::id::BlobId;
use chunkstore::tree::{BlobRef, Body, Content, End, Entry, LeafAt, Node};

use crate::fs::Meta;

use super::links::LinkKey;
use super::lock;

/// An object to be restored. It shares the memory of the leaf it stands in.
pub(super) struct Item {
    leaf: Arc<LeafAt>,
    at: u32,
    /// The folder it goes to.
    pub(super) folder: u32,
    pub(super) work: Work,
    /// Whether the folder listed this name when it was entered, where known.
    pub(super) existed: Option<bool>,
    /// Under which number it waits in a hidden folder; 0 when it does not.
    waiting: AtomicU64,
    /// The folder that this hidden one lies in.
    base: AtomicU32,
    /// It is not, or no longer, there as it should be; and this has been reported.
    pub(super) failed: AtomicBool,
}

/// How an item comes to its content.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// Everything is in the entry.
    Immediate,
    /// All of it lies in one blob.
    Single,
    /// In several; the number is that of its [`Multi`].
    Multi(u32),
    /// It is a further name of a restored file.
    Link,
}

/// A file of several pieces.
#[derive(Default)]
pub(super) struct Multi {
    pub(super) state: Mutex<MultiState>,
    /// Pieces of this window not yet written, and one while more may come.
    pub(super) remaining: AtomicU32,
}

#[derive(Default)]
pub(super) struct MultiState {
    /// Open for writing; may be closed meanwhile.
    pub(super) file: Option<Arc<File>>,
    /// Device and inode, once created.
    pub(super) created: Option<(u64, u64)>,
    /// How its reading ended, if the tree says so.
    pub(super) end: Option<End>,
    /// Where the last of its pieces ends.
    pub(super) pieces_end: u64,
    pub(super) finished: bool,
}

/// A part of a blob that belongs somewhere in a file.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) item: u32,
    pub(super) blob_offset: u32,
    pub(super) len: u32,
    pub(super) offset: u64,
}

#[derive(Default)]
pub(super) struct Window {
    pub(super) items: Vec<Item>,
    pub(super) multis: Vec<Multi>,
    pub(super) pieces: Vec<Piece>,
    /// Blobs of the pieces, kept only to verify them.
    pub(super) ids: Vec<BlobId>,
    pub(super) wants: Vec<Want>,
    /// Items that have nothing to wait for.
    pub(super) immediate: Vec<u32>,
    /// Files that ended without a piece in this window after their last.
    pub(super) ended: Vec<u32>,
    /// Items that are further names.
    pub(super) links: Vec<u32>,
    /// Items that have to be restored from their own content, after all.
    pub(super) again: Mutex<Vec<u32>>,
    /// Files whose first name is in this window, each with the folder in whose hidden one it will be known.
    pub(super) first_names: HashSet<(u32, LinkKey)>,
    /// Memory it takes.
    pub(super) bytes: usize,
}

const ITEM_BYTES: usize = size_of::<Item>() + 8;
const PIECE_BYTES: usize = size_of::<Piece>() + size_of::<Want>();

impl Item {
    pub(super) fn entry(&self) -> &Entry {
        &self.leaf.leaf.entries[self.at as usize]
    }

    pub(super) fn node(&self) -> &Node {
        match &self.entry().body {
            Body::Node(node) => node,
            Body::Extent(_) | Body::End(_) | Body::Absent(_) => {
                unreachable!("items are made from nodes only")
            }
        }
    }

    pub(super) fn name(&self) -> &[u8] {
        name_of(&self.entry().key)
    }

    pub(super) fn path(&self) -> Vec<u8> {
        self.entry().path()
    }

    pub(super) fn link_key(&self) -> Option<LinkKey> {
        LinkKey::of(self.node())
    }

    /// If it waits: the folder with the hidden one, and its number there.
    pub(super) fn waiting(&self) -> Option<(u32, u64)> {
        match self.waiting.load(Ordering::Acquire) {
            0 => None,
            number => Some((self.base.load(Ordering::Relaxed), number)),
        }
    }

    pub(super) fn set_waiting(&self, base: u32, number: u64) {
        self.base.store(base, Ordering::Relaxed);
        self.waiting.store(number, Ordering::Release);
    }

    /// Notes that it does not wait any more; tells what [`waiting`](Self::waiting) told.
    pub(super) fn end_waiting(&self) -> Option<(u32, u64)> {
        let was = self.waiting();
        self.waiting.store(0, Ordering::Release);
        was
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}

impl Window {
    pub(super) fn add(
        &mut self,
        (leaf, at): (&Arc<LeafAt>, usize),
        folder: u32,
        existed: Option<bool>,
        work: Work,
    ) -> u32 {
        let number = self.items.len() as u32;
        let (waiting, base) = (AtomicU64::new(0), AtomicU32::new(0));
        let (leaf, at, failed) = (leaf.clone(), at as u32, AtomicBool::new(false));
        self.items.push(Item { leaf, at, folder, work, existed, waiting, base, failed });
        self.bytes += ITEM_BYTES;
        match work {
            Work::Immediate => self.immediate.push(number),
            Work::Link => self.links.push(number),
            Work::Single | Work::Multi(_) => {}
        }
        number
    }

    /// Adds a file of several pieces, which may grow until [`end`](Self::end).
    pub(super) fn add_multi(
        &mut self,
        at: (&Arc<LeafAt>, usize),
        folder: u32,
        existed: Option<bool>,
    ) -> u32 {
        let multi = Multi { remaining: AtomicU32::new(1), ..Multi::default() };
        self.multis.push(multi);
        self.bytes += size_of::<Multi>();
        self.add(at, folder, existed, Work::Multi(self.multis.len() as u32 - 1))
    }

    pub(super) fn add_piece(&mut self, piece: Piece, blob: BlobRef, verify: bool) {
        if let Some(multi) = self.multi(piece.item) {
            multi.remaining.fetch_add(1, Ordering::Relaxed);
        }
        let purpose = self.pieces.len() as u32;
        self.wants.push(Want { place: blob.location, id: blob.id, purpose });
        self.pieces.push(piece);
        self.bytes += PIECE_BYTES;
        if verify {
            self.ids.push(blob.id);
            self.bytes += BlobId::LEN;
        }
    }

    /// No more pieces follow.
    pub(super) fn end(&mut self, item: u32) {
        let last = self
            .multi(item)
            .is_some_and(|multi| multi.remaining.fetch_sub(1, Ordering::Relaxed) == 1);
        if last {
            self.ended.push(item);
        }
    }

    pub(super) fn multi(&self, item: u32) -> Option<&Multi> {
        match self.items[item as usize].work {
            Work::Multi(number) => Some(&self.multis[number as usize]),
            Work::Immediate | Work::Single | Work::Link => None,
        }
    }

    /// Bytes of a file, as it is to be.
    pub(super) fn size(&self, item: u32) -> u64 {
        let end = self.multi(item).and_then(|multi| lock(&multi.state).end);
        end.map_or_else(|| self.items[item as usize].node().size, |end| end.size)
    }

    /// Takes out a file that goes on in the next window.
    pub(super) fn take_growing(&mut self, item: u32) -> Self {
        let mut next = Self::default();
        let Work::Multi(number) = self.items[item as usize].work else {
            return next;
        };
        // It is the last of the items, so no other changes its number.
        let mut item = self.items.remove(item as usize);
        item.work = Work::Multi(0);
        next.first_names
            .extend(self.first_names.iter().filter(|(_, key)| Some(*key) == item.link_key()));
        next.multis.push(self.multis.remove(number as usize));
        next.items.push(item);
        next
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

/// The last component of a key.
pub(super) fn name_of(key: &[u8]) -> &[u8] {
    key.rsplit(|byte| *byte == 0).next().unwrap_or_default()
}

/// The metadata of a node as the file system layer has it.
pub(super) fn meta_of(node: &Node) -> Meta {
    Meta {
        kind: node.kind,
        mode: node.mode,
        uid: node.uid,
        gid: node.gid,
        size: node.size,
        mtime: node.mtime,
        ctime: node.ctime,
        dev: 0,
        ino: node.ino,
        nlink: 1,
        rdev_major: node.rdev.0,
        rdev_minor: node.rdev.1,
        blocks_512: 0,
    }
}

/// Memory of a decoded leaf.
pub(super) fn leaf_bytes(leaf: &LeafAt) -> usize {
    leaf.leaf.entries.iter().map(entry_bytes).sum()
}

fn entry_bytes(entry: &Entry) -> usize {
    let chunk = size_of::<chunkstore::tree::Chunk>();
    let content = match &entry.body {
        Body::Extent(chunks) => chunks.len() * chunk,
        Body::End(_) | Body::Absent(_) => 0,
        Body::Node(node) => {
            let xattr = |(name, value): &(Vec<u8>, Vec<u8>)| name.len() + value.len() + 80;
            let xattrs: usize = node.xattrs.iter().map(xattr).sum();
            xattrs
                + match &node.content {
                    Content::Inline(bytes) => bytes.len() + 16,
                    Content::Chunks(chunks) => chunks.len() * chunk,
                    Content::None | Content::Part { .. } | Content::Extents => 0,
                }
        }
    };
    size_of::<Entry>() + entry.key.len() + 16 + content
}
