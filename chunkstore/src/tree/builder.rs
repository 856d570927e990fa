//! Builds a tree from entries in ascending order.
//!
//! Memory: one unfinished node a level. A leaf of an older tree whose entries all recur unchanged is
//! taken over as it is ([`TreeBuilder::push_leaf`]), without encoding anything.

use super::entry::Entry;
use super::node::{ChildRef, Interior, LeafEncoder, Liveness, NodeRef};
use crate::error::{Error, Result};
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

    /// Whether a leaf can be taken over now: only between leaves.
    pub fn is_between_leaves(&self) -> bool {
        self.leaf.count() == 0
    }

    /// Takes over a leaf of an older tree, which was not that tree's last.
    ///
    /// # Errors
    /// Those of the sink.
    ///
    /// # Panics
    /// When an unfinished leaf stands before it.
    pub fn push_leaf(
        &mut self,
        leaf: ChildRef,
        last_key: &[u8],
        liveness: &Liveness,
    ) -> Result<()> {
        assert!(self.is_between_leaves());
        self.check_order(&leaf.first_key)?;
        self.last_key = Some(last_key.to_vec());
        self.push_child(1, leaf, liveness)
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

    fn push_child(&mut self, level: u8, child: ChildRef, liveness: &Liveness) -> Result<()> {
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
