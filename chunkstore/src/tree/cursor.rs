//! Reads a tree in order: a leaf at a time, from any key on.

use std::collections::VecDeque;
use std::sync::Arc;

use super::entry::Entry;
use super::node::{ChildRef, Interior, Leaf, NodeRef, decode_interior, decode_leaf};
use crate::error::{Error, Result};
use crate::limits::TREE_LEVELS_MAX;

/// Where nodes come from.
pub trait NodeSource {
    /// The verified plaintext of a node.
    ///
    /// # Errors
    /// `NotFound` or `Corrupt` when it cannot be had; those of the store.
    fn load_node(&self, node: &NodeRef) -> Result<Vec<u8>>;

    /// The first few of `nodes`, as [`load_node`](Self::load_node) gives them: at least one, and as
    /// many as can be had together for less.
    fn load_nodes(&self, nodes: &[NodeRef]) -> Vec<Result<Vec<u8>>> {
        nodes.iter().take(1).map(|node| self.load_node(node)).collect()
    }
}

/// Loads nodes that are wanted one after the other, and those that follow with them: on a store that
/// is far away, a request takes longer than all else. Memory: some [`AHEAD_BYTES`].
#[derive(Default)]
pub(crate) struct ReadAhead {
    loaded: VecDeque<(NodeRef, Vec<u8>)>,
    /// Further nodes asked for at a time: the more, the longer all that were loaded are wanted, and the
    /// smaller they are.
    ahead: usize,
}

/// Bytes of nodes asked for at a time, if they are as large as the largest of those before.
const AHEAD_BYTES: usize = 2 << 20;

impl ReadAhead {
    /// Most nodes asked for at a time.
    const MAX: usize = 64;

    /// Loads `node`; `following` are those that will likely be wanted after it.
    fn load(
        &mut self,
        source: &dyn NodeSource,
        node: &NodeRef,
        following: impl Iterator<Item = NodeRef>,
    ) -> Result<Vec<u8>> {
        match self.loaded.pop_front() {
            Some((loaded, plain)) if loaded == *node => return Ok(plain),
            Some(_) => self.ahead = 0,
            None => {}
        }
        let nodes: Vec<NodeRef> =
            std::iter::once(*node).chain(following.take(self.ahead)).collect();
        let mut plains = source.load_nodes(&nodes).into_iter();
        let first = plains.next();
        // What cannot be had is asked for again when it is wanted: others may have failed with it.
        let rest = nodes[1..].iter().copied().zip(plains);
        self.loaded = rest.map_while(|(node, plain)| Some((node, plain.ok()?))).collect();
        let plain = match first {
            Some(Ok(plain)) => plain,
            Some(Err(_)) | None => source.load_node(node)?,
        };
        let largest =
            self.loaded.iter().map(|(_, plain)| plain.len()).fold(plain.len(), usize::max);
        self.ahead = (4 * self.ahead + 3).min(Self::MAX - 1).min(AHEAD_BYTES / largest.max(1));
        Ok(plain)
    }

    pub(crate) fn interior(
        &mut self,
        source: &dyn NodeSource,
        node: &NodeRef,
        level: u8,
        following: impl Iterator<Item = NodeRef>,
    ) -> Result<Interior> {
        let plain = self.load(source, node, following)?;
        let interior = decode_interior(&plain).map_err(|why| damaged(node, why))?;
        if interior.level != level {
            return Err(damaged(node, "it is on another level than its parent says"));
        }
        Ok(interior)
    }

    pub(crate) fn leaf(
        &mut self,
        source: &dyn NodeSource,
        node: &NodeRef,
        following: impl Iterator<Item = NodeRef>,
    ) -> Result<Leaf> {
        decode_leaf(&self.load(source, node, following)?).map_err(|why| damaged(node, why))
    }
}

fn damaged(node: &NodeRef, why: impl std::fmt::Display) -> Error {
    Error::corrupt(format!("tree node {}", node.id.short()), why)
}

pub(crate) fn load_interior(
    source: &dyn NodeSource,
    node: &NodeRef,
    level: u8,
) -> Result<Interior> {
    ReadAhead::default().interior(source, node, level, std::iter::empty())
}

pub(crate) fn load_leaf(source: &dyn NodeSource, node: &NodeRef) -> Result<Leaf> {
    ReadAhead::default().leaf(source, node, std::iter::empty())
}

/// A leaf met by a cursor.
#[derive(Debug)]
pub struct LeafAt {
    /// Its content.
    pub leaf: Leaf,
    /// The reference it was found through. For a tree of one leaf, made up from the leaf.
    pub child: ChildRef,
    /// Whether no leaf follows.
    pub is_last: bool,
}

/// Reads the leaves of a tree in order. Memory: one interior node a level, and some 2 MiB of leaves read ahead.
pub struct TreeCursor<'a> {
    source: &'a dyn NodeSource,
    root: NodeRef,
    level: u8,
    /// Interior nodes from the root down, each with the number of its next child.
    path: Vec<(Interior, usize)>,
    leaves: ReadAhead,
    state: State,
}

#[derive(PartialEq)]
enum State {
    Start,
    Within,
    End,
}

impl<'a> TreeCursor<'a> {
    /// A cursor before the first leaf of the tree with this root, of which `level` is the height.
    pub fn new(source: &'a dyn NodeSource, root: NodeRef, level: u8) -> Self {
        Self {
            source,
            root,
            level,
            path: Vec::new(),
            leaves: ReadAhead::default(),
            state: State::Start,
        }
    }

    /// Moves the cursor before the leaf that holds the first key not below `key`.
    ///
    /// # Errors
    /// When an interior node cannot be read.
    pub fn seek(&mut self, key: &[u8]) -> Result<()> {
        self.path.clear();
        self.state = State::Start;
        if self.level == 0 {
            return Ok(());
        }
        self.state = State::Within;
        let mut node = self.root;
        for level in (1..=check_level(&self.root, self.level)?).rev() {
            let interior = load_interior(self.source, &node, level)?;
            let at = interior.children.partition_point(|child| child.first_key[..] <= *key);
            let at = at.saturating_sub(1);
            node = interior.children[at].node;
            self.path.push((interior, at + 1));
        }
        if let Some((_, next)) = self.path.last_mut() {
            *next -= 1;
        }
        Ok(())
    }

    /// The next leaf.
    ///
    /// # Errors
    /// When a node cannot be read; the cursor then stands behind the unreadable part.
    pub fn next_leaf(&mut self) -> Result<Option<LeafAt>> {
        if self.state == State::End {
            return Ok(None);
        }
        if self.level == 0 {
            self.state = State::End;
            let leaf = load_leaf(self.source, &self.root)?;
            let first_key = leaf.entries.first().map(|entry| entry.key.clone()).unwrap_or_default();
            let child = ChildRef {
                first_key,
                node: self.root,
                entries: leaf.entries.len() as u64,
                bytes: 0,
            };
            return Ok(Some(LeafAt { leaf, child, is_last: true }));
        }
        let Some(child) = self.next_child()? else {
            return Ok(None);
        };
        let is_last = self.path.iter().all(|(node, next)| *next == node.children.len());
        let siblings = self.path.last().map_or(&[][..], |(node, next)| &node.children[*next..]);
        let following = siblings.iter().map(|child| child.node);
        let leaf = self.leaves.leaf(self.source, &child.node, following)?;
        if leaf.entries.first().map(|entry| &entry.key) != Some(&child.first_key) {
            return Err(damaged(&child.node, "it begins with another key than its parent says"));
        }
        Ok(Some(LeafAt { leaf, child, is_last }))
    }

    /// The next reference to a leaf, in trees with interior nodes.
    fn next_child(&mut self) -> Result<Option<ChildRef>> {
        let level = check_level(&self.root, self.level)?;
        if self.state == State::Start {
            self.state = State::Within;
            match load_interior(self.source, &self.root, level) {
                Ok(interior) => self.path.push((interior, 0)),
                Err(error) => {
                    self.state = State::End;
                    return Err(error);
                }
            }
        }
        loop {
            let depth = self.path.len();
            let Some((node, next)) = self.path.last_mut() else {
                self.state = State::End;
                return Ok(None);
            };
            let Some(child) = node.children.get(*next) else {
                self.path.pop();
                continue;
            };
            *next += 1;
            if depth == usize::from(level) {
                return Ok(Some(child.clone()));
            }
            let (below, child) = (node.level - 1, child.node);
            let interior = load_interior(self.source, &child, below)?;
            self.path.push((interior, 0));
        }
    }
}

fn check_level(root: &NodeRef, level: u8) -> Result<u8> {
    if level > TREE_LEVELS_MAX {
        return Err(damaged(root, "its height is impossible"));
    }
    Ok(level)
}

/// Reads the entries of a tree one by one, sharing each leaf's memory.
pub struct EntryCursor<'a> {
    leaves: TreeCursor<'a>,
    current: Option<Arc<LeafAt>>,
    at: usize,
}

impl<'a> EntryCursor<'a> {
    /// The entries from where `leaves` stands.
    pub fn new(leaves: TreeCursor<'a>) -> Self {
        Self { leaves, current: None, at: 0 }
    }

    /// Moves before the first entry whose key is not below `key`.
    ///
    /// # Errors
    /// When a node cannot be read.
    pub fn seek(&mut self, key: &[u8]) -> Result<()> {
        self.leaves.seek(key)?;
        self.current = self.leaves.next_leaf()?.map(Arc::new);
        let entries = self.current.as_ref().map_or(&[][..], |leaf| &leaf.leaf.entries);
        self.at = entries.partition_point(|entry| entry.key[..] < *key);
        Ok(())
    }

    /// The leaf of the entry that comes next and its place in it, without moving.
    ///
    /// # Errors
    /// When a node cannot be read; the unreadable part is skipped.
    pub fn peek_at(&mut self) -> Result<Option<(&Arc<LeafAt>, usize)>> {
        while self.current.as_ref().is_none_or(|leaf| self.at >= leaf.leaf.entries.len()) {
            self.at = 0;
            self.current = None;
            match self.leaves.next_leaf()? {
                Some(leaf) => self.current = Some(Arc::new(leaf)),
                None => return Ok(None),
            }
        }
        Ok(self.current.as_ref().map(|leaf| (leaf, self.at)))
    }

    /// The entry that comes next, without moving.
    ///
    /// # Errors
    /// As [`peek_at`](Self::peek_at).
    pub fn peek(&mut self) -> Result<Option<&Entry>> {
        Ok(self.peek_at()?.map(|(leaf, at)| &leaf.leaf.entries[at]))
    }

    /// Moves past the entry that comes next.
    pub fn advance(&mut self) {
        self.at += 1;
    }
}

/// Calls `interior` for every interior node that `visit` lets in, level by level from the root down; `visit` is asked for each interior node before it is read, so that nodes shared by
/// many trees can be read once.
///
/// # Errors
/// When an interior node cannot be read.
pub fn for_each_node(
    source: &dyn NodeSource,
    root: NodeRef,
    level: u8,
    visit: &mut dyn FnMut(&NodeRef) -> bool,
    interior: &mut dyn FnMut(&NodeRef, &Interior) -> Result<()>,
) -> Result<()> {
    if check_level(&root, level)? == 0 {
        return Ok(());
    }
    let mut nodes = vec![root];
    for level in (1..=level).rev() {
        nodes.retain(&mut *visit);
        let mut below = Vec::new();
        let mut ahead = ReadAhead::default();
        for (at, node) in nodes.iter().enumerate() {
            let following = nodes[at + 1..].iter().copied();
            let decoded = ahead.interior(source, node, level, following)?;
            interior(node, &decoded)?;
            if level > 1 {
                below.extend(decoded.children.iter().map(|child| child.node));
            }
        }
        nodes = below;
    }
    Ok(())
}
