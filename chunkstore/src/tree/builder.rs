//! Builds a tree from entries in ascending order.
//!
//! Memory: one unfinished node a level. A leaf of an older tree whose entries all recur unchanged is
//! taken over as it is ([`TreeBuilder::push_leaf`]), without encoding anything.
//!
//! Every reference of the tree, to a node or to data, stored now or taken over, passes
//! `TreeBuilder::push_child`, which asks the sink whether it may be made.

use super::cursor::LeafAt;
use super::entry::Entry;
use super::node::{ChildRef, Interior, LeafEncoder, Liveness, NodeRef};
use crate::error::{Error, Result};
use crate::id::PackId;
use crate::limits::{
    INTERIOR_BYTES_TARGET, INTERIOR_CHILDREN_MAX, INTERIOR_CHILDREN_MIN, INTERIOR_PACKS_TARGET,
    KEY_BYTES_MAX, LEAF_BYTES_TARGET, LEAF_ENTRIES_MAX, LEAF_ENTRIES_MIN, TREE_LEVELS_MAX,
};
use crate::pack::BlobKind;

/// Where finished nodes go.
pub trait NodeSink {
    /// Stores an encoded node, or finds that it is stored.
    ///
    /// # Errors
    /// Those of the store.
    fn store_node(&self, kind: BlobKind, plain: &[u8]) -> Result<NodeRef>;

    /// Whether a new tree may refer to these blobs of a pack (bit n stands for ordinal n): they are
    /// there, and no garbage collection is about to delete them.
    fn may_refer(&self, pack: PackId, blobs: u128) -> bool;
}

/// Builds a tree.
pub struct TreeBuilder<'a> {
    sink: &'a dyn NodeSink,
    cut: &'a [u8; 32],
    leaf: LeafEncoder,
    levels: Vec<Level>,
    last_key: Option<Vec<u8>>,
}

/// The unfinished node of one interior level.
struct Level {
    node: Interior,
    key_bytes: usize,
}

impl Level {
    fn new(level: u8) -> Self {
        let node = Interior { level, children: Vec::new(), liveness: Liveness::default() };
        Self { node, key_bytes: 0 }
    }
}

impl<'a> TreeBuilder<'a> {
    /// A builder that stores nodes in `sink` and ends them where the repository's secret `cut` says.
    pub fn new(sink: &'a dyn NodeSink, cut: &'a [u8; 32]) -> Self {
        Self { sink, cut, leaf: LeafEncoder::default(), levels: Vec::new(), last_key: None }
    }

    /// Adds an entry, which follows all others.
    ///
    /// # Errors
    /// When the key is too long or out of order, and those of the sink.
    pub fn push(&mut self, entry: &Entry) -> Result<()> {
        if entry.key.len() > KEY_BYTES_MAX {
            return Err(Error::invalid("a path is longer than 256 KiB"));
        }
        self.check_order(&entry.key)?;
        self.leaf.push(entry);
        let count = self.leaf.count();
        let full = count >= LEAF_ENTRIES_MAX || self.leaf.encoded_len() >= LEAF_BYTES_TARGET;
        if full || (count >= LEAF_ENTRIES_MIN && self.is_boundary(0, &entry.key)) {
            self.finish_leaf()?;
        }
        Ok(())
    }

    /// Adds all entries of a leaf of an older tree. The leaf is taken over as it is if it begins where a
    /// leaf of this tree does, it was not the last of its tree, and it may be referred to; else its
    /// entries are encoded anew. Returns whether it was taken over.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn push_leaf(&mut self, at: &LeafAt) -> Result<bool> {
        let entries = &at.leaf.entries;
        let Some(last) = entries.last() else {
            return Ok(false);
        };
        let begins_here = self.leaf.count() == 0 && !at.is_last;
        if !begins_here || !self.may_refer_to_node(&at.child.node) {
            entries.iter().try_for_each(|entry| self.push(entry))?;
            return Ok(false);
        }
        let mut liveness = Liveness::default();
        let mut previous = None;
        for blob in entries.iter().flat_map(Entry::blobs) {
            if previous != Some(blob.location) {
                liveness.mark(blob.location);
                previous = Some(blob.location);
            }
        }
        self.check_order(&at.child.first_key)?;
        self.last_key = Some(last.key.clone());
        self.push_child(1, at.child.clone(), &liveness)?;
        Ok(true)
    }

    /// Finishes all nodes and returns the root and its level; `None` if there is no entry.
    ///
    /// # Errors
    /// Those of the sink.
    pub fn finish(mut self) -> Result<Option<(NodeRef, u8)>> {
        if self.leaf.count() > 0 {
            self.finish_leaf()?;
        }
        let mut level = 1;
        while let Some(at) = self.levels.get(level as usize - 1) {
            let top = self.levels.len() == level as usize;
            if top && at.node.children.len() == 1 {
                return Ok(Some((at.node.children[0].node, level - 1)));
            }
            if !at.node.children.is_empty() {
                self.finish_interior(level)?;
            }
            level += 1;
        }
        Ok(None)
    }

    fn check_order(&mut self, key: &[u8]) -> Result<()> {
        if self.last_key.as_deref().is_some_and(|last| last >= key) {
            let path = String::from_utf8_lossy(key).replace('\0', "/");
            return Err(Error::invalid(format!("entry '{path}' is out of order")));
        }
        let last = self.last_key.get_or_insert_default();
        last.clear();
        last.extend_from_slice(key);
        Ok(())
    }

    /// One key in 256 ends a node of this level.
    fn is_boundary(&self, level: u8, key: &[u8]) -> bool {
        let mut hasher = blake3::Hasher::new_keyed(self.cut);
        hasher.update(&[level]).update(key);
        hasher.finalize().as_bytes()[0] == 0
    }

    fn finish_leaf(&mut self) -> Result<()> {
        let leaf = std::mem::take(&mut self.leaf);
        let node = self.sink.store_node(BlobKind::Leaf, &leaf.encode())?;
        let (entries, bytes) = (leaf.count() as u64, leaf.bytes);
        let child = ChildRef { first_key: leaf.first_key, node, entries, bytes };
        self.push_child(1, child, &leaf.liveness)
    }

    fn may_refer_to_node(&self, node: &NodeRef) -> bool {
        self.sink.may_refer(node.pack, 1 << node.ordinal)
    }

    /// Adds a reference to a node, and with it, on level 1, those to the data that its leaf uses.
    fn push_child(&mut self, level: u8, child: ChildRef, liveness: &Liveness) -> Result<()> {
        let mut packs = liveness.0.iter();
        let refused = packs.find(|(pack, blobs)| !self.sink.may_refer(**pack, **blobs));
        let refused = refused.map(|(pack, _)| *pack);
        let node = (!self.may_refer_to_node(&child.node)).then_some(child.node.pack);
        if let Some(pack) = refused.or(node) {
            // Whoever adds an entry asks first, and stores anew what must not be referred to.
            let path = String::from_utf8_lossy(&child.first_key).replace('\0', "/");
            let message = format!(
                "entries from '{path}' on refer to pack {pack}, which is gone or about to be deleted: \
                 nothing was saved; run the backup again, and report this, because it should have \
                 stored them anew"
            );
            return Err(Error::invalid(message));
        }
        if level > TREE_LEVELS_MAX {
            return Err(Error::invalid("the tree has more entries than the format can hold"));
        }
        if self.levels.len() < usize::from(level) {
            self.levels.push(Level::new(level));
        }
        let boundary = self.is_boundary(level, &child.first_key);
        let at = &mut self.levels[usize::from(level) - 1];
        at.key_bytes += child.first_key.len() + 64;
        at.node.children.push(child);
        at.node.liveness.union(liveness);
        let count = at.node.children.len();
        let full = count >= INTERIOR_CHILDREN_MAX
            || at.node.liveness.0.len() >= INTERIOR_PACKS_TARGET
            || at.key_bytes >= INTERIOR_BYTES_TARGET;
        if count > 1 && (full || (count >= INTERIOR_CHILDREN_MIN && boundary)) {
            self.finish_interior(level)?;
        }
        Ok(())
    }

    fn finish_interior(&mut self, level: u8) -> Result<()> {
        let at = &mut self.levels[usize::from(level) - 1];
        let Level { node, .. } = std::mem::replace(at, Level::new(level));
        let reference = self.sink.store_node(BlobKind::Interior, &node.encode())?;
        let child = ChildRef {
            node: reference,
            entries: node.children.iter().map(|child| child.entries).sum(),
            bytes: node.children.iter().fold(0, |sum, child| sum.saturating_add(child.bytes)),
            first_key: node
                .children
                .into_iter()
                .next()
                .map(|child| child.first_key)
                .unwrap_or_default(),
        };
        // Packs are listed on level 1 only: above, they would be counted again.
        self.push_child(level + 1, child, &Liveness::default())
    }
}
