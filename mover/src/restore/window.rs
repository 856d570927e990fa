//! A window: files whose content is fetched together, and the pieces they consist of.

use std::collections::HashSet;
use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use chunkstore::fetch::Want;
use chunkstore::id::BlobId;
use chunkstore::tree::{BlobRef, Body, Content, Entry, LeafAt, Node};

use crate::fs::{Kind, Meta};

use super::links::LinkKey;

/// An object to be restored. It shares the memory of the leaf it stands in.
pub(super) struct Item {
    leaf: Arc<LeafAt>,
    at: u32,
    /// The folder it goes to.
    pub(super) folder: u32,
    pub(super) work: Work,
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
    /// Files whose first name is in this window.
    pub(super) first_names: HashSet<LinkKey>,
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
        link_key(self.node())
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}

impl Window {
    pub(super) fn add(&mut self, leaf: &Arc<LeafAt>, at: usize, folder: u32, work: Work) -> u32 {
        let number = self.items.len() as u32;
        let failed = AtomicBool::new(false);
        self.items.push(Item { leaf: leaf.clone(), at: at as u32, folder, work, failed });
        self.bytes += ITEM_BYTES;
        match work {
            Work::Immediate => self.immediate.push(number),
            Work::Link => self.links.push(number),
            Work::Single | Work::Multi(_) => {}
        }
        number
    }

    /// Adds a file of several pieces, which may grow until [`end`](Self::end).
    pub(super) fn add_multi(&mut self, leaf: &Arc<LeafAt>, at: usize, folder: u32) -> u32 {
        let multi = Multi { remaining: AtomicU32::new(1), ..Multi::default() };
        self.multis.push(multi);
        self.bytes += size_of::<Multi>();
        self.add(leaf, at, folder, Work::Multi(self.multis.len() as u32 - 1))
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

    /// Takes out a file that goes on in the next window.
    pub(super) fn take_growing(&mut self, item: u32) -> Self {
        let mut next = Self::default();
        let Work::Multi(number) = self.items[item as usize].work else {
            return next;
        };
        // It is the last of the items, so no other changes its number.
        let mut item = self.items.remove(item as usize);
        item.work = Work::Multi(0);
        next.first_names.extend(item.link_key());
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

pub(super) fn link_key(node: &Node) -> Option<LinkKey> {
    (node.linked && node.kind != Kind::Dir).then_some((node.fs, node.ino))
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
