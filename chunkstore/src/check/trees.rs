//! Checks trees: every node once over all snapshots; then, if anything is damaged, names the snapshots
//! and files that it hits.
//!
//! Memory: 16 bytes an interior node, some 100 bytes a leaf (which blobs of which packs it uses, so
//! that level-1 nodes that share it can be checked without reading it again).

use std::collections::{BTreeMap, HashMap, HashSet};

use super::finding::{Affected, Finding, FindingKind, Incomplete, Severity};
use super::packs::Trace;
use super::{Damage, FILES_NAMED};
use crate::error::{Error, ErrorKind, chain};
use crate::id::{PackId, SnapshotId};
use crate::limits::TREE_LEVELS_MAX;
use crate::pack::{Location, PackClass, ReadScratch};
use crate::record::Snapshot;
use crate::repository::Repository;
use crate::tree::{
    Absence, BlobRef, Body, ChildRef, Entry, Kind, Leaf, Liveness, NodeRef, ReadAhead, State,
    load_interior, load_leaf,
};

/// Half an id: names a node as surely as the index names blobs.
type Key = [u8; 16];

/// The blobs of each pack that a leaf uses.
type Uses = Box<[(PackId, u128)]>;

fn key(node: &NodeRef) -> Key {
    *node.id.0.first_chunk().expect("32 is more than 16")
}

/// What leads to a node: what its parent says about it, and the first key behind it.
struct Place<'a> {
    node: NodeRef,
    child: Option<&'a ChildRef>,
    upper: Option<&'a [u8]>,
}

/// The first pass.
pub(super) struct Walk<'a> {
    pub(super) repository: &'a Repository,
    /// Traces of the blobs of all readable data packs.
    pub(super) data: &'a HashMap<PackId, Box<[Trace]>>,
    pub(super) damage: &'a mut Damage,
    pub(super) used: HashSet<PackId>,
    pub(super) nodes: u64,
    pub(super) incomplete: Incomplete,
    interior: HashSet<Key>,
    leaves: HashMap<Key, Option<Uses>>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        repository: &'a Repository,
        data: &'a HashMap<PackId, Box<[Trace]>>,
        damage: &'a mut Damage,
    ) -> Self {
        let (used, interior, leaves) = (HashSet::new(), HashSet::new(), HashMap::new());
        let incomplete = Incomplete::default();
        Self { repository, data, damage, used, nodes: 0, incomplete, interior, leaves }
    }

    pub(super) fn snapshot(&mut self, snapshot: &Snapshot) {
        let place = Place { node: snapshot.root, child: None, upper: None };
        self.use_node(&place.node);
        if snapshot.level == 0 {
            self.leaf(&place, &mut ReadAhead::default(), std::iter::empty());
        } else if snapshot.level <= TREE_LEVELS_MAX {
            self.interior(&place, snapshot.level);
        } else {
            self.fault(&place.node, "its height is impossible");
        }
    }

    fn interior(&mut self, place: &Place<'_>, level: u8) {
        if !self.interior.insert(key(&place.node)) {
            return;
        }
        self.nodes += 1;
        let node = match load_interior(self.repository, &place.node, level) {
            Ok(node) => node,
            Err(error) => return self.unreadable(&place.node, &error),
        };
        let sum = |of: fn(&ChildRef) -> u64| {
            node.children.iter().fold(0_u64, |sum, child| sum.wrapping_add(of(child)))
        };
        let (entries, bytes) = (sum(|child| child.entries), sum(|child| child.bytes));
        let keys = node.children.first().zip(node.children.last());
        if let Some((first, last)) = keys {
            self.compare(place, &first.first_key, &last.first_key, entries, bytes);
        }
        let mut union = Some(Liveness::default());
        let mut ahead = ReadAhead::default();
        for (at, child) in node.children.iter().enumerate() {
            self.use_node(&child.node);
            let upper = node.children.get(at + 1).map(|next| &next.first_key[..]).or(place.upper);
            let place = Place { node: child.node, child: Some(child), upper };
            if level > 1 {
                self.interior(&place, level - 1);
                continue;
            }
            let following = node.children[at + 1..].iter().map(|child| child.node);
            match (self.leaf(&place, &mut ahead, following), &mut union) {
                (Some(uses), Some(union)) => {
                    uses.iter().for_each(|(pack, blobs)| {
                        *union.0.entry(*pack).or_default() |= blobs;
                    });
                }
                _ => union = None,
            }
        }
        self.used.extend(self.damage.packs_now(&node.liveness));
        if union.is_some_and(|union| union != node.liveness) {
            self.fault(
                &place.node,
                "its list of used blobs is not what its leaves use: do not prune",
            );
        }
    }

    /// What the leaf uses, unless it cannot be read; `following` are those that come after it.
    fn leaf(
        &mut self,
        place: &Place<'_>,
        ahead: &mut ReadAhead,
        following: impl Iterator<Item = NodeRef>,
    ) -> Option<Uses> {
        if let Some(known) = self.leaves.get(&key(&place.node)) {
            return known.clone();
        }
        self.nodes += 1;
        let following = following.filter(|node| !self.leaves.contains_key(&key(node)));
        let uses = match ahead.leaf(self.repository, &place.node, following) {
            Ok(leaf) => Some(self.entries(place, &leaf)),
            Err(error) => {
                self.unreadable(&place.node, &error);
                None
            }
        };
        self.leaves.insert(key(&place.node), uses.clone());
        uses
    }

    fn entries(&mut self, place: &Place<'_>, leaf: &Leaf) -> Uses {
        let bytes = leaf.entries.iter().filter_map(Entry::node).fold(0_u64, |sum, node| {
            if node.kind == Kind::File { sum.wrapping_add(node.size) } else { sum }
        });
        if let Some((first, last)) = leaf.entries.first().zip(leaf.entries.last()) {
            self.compare(place, &first.key, &last.key, leaf.entries.len() as u64, bytes);
        } else {
            self.fault(&place.node, "it has no entry");
        }
        self.incomplete.add(leaf);
        let mut uses = Liveness::default();
        let mut previous = None;
        for blob in leaf.entries.iter().flat_map(Entry::blobs) {
            if previous == Some(blob) {
                continue;
            }
            previous = Some(blob);
            uses.mark(blob.location);
            let Location { pack, ordinal } = self.damage.now(blob.location);
            match self.data.get(&pack) {
                None if self.damage.packs.contains_key(&pack) || self.is_relocated(blob) => {}
                None => self.damage.missing_pack(PackClass::Data, pack),
                Some(traces) => {
                    let expected = Trace::new(&blob.id, blob.len);
                    if traces.get(usize::from(ordinal)) != Some(&expected) {
                        let what = format!("there is another blob than {}", blob.id.short());
                        self.damage.blob(PackClass::Data, pack, ordinal, &what);
                    }
                }
            }
        }
        self.used.extend(self.damage.packs_now(&uses));
        uses.0.into_iter().collect()
    }

    fn use_node(&mut self, node: &NodeRef) {
        self.used.insert(self.damage.now(node.location()).pack);
    }

    /// Whether a blob that was not found was repacked since its pack was listed.
    fn is_relocated(&self, blob: &BlobRef) -> bool {
        let mut scratch = ReadScratch::default();
        let place = blob.location;
        self.repository.read_blob(PackClass::Data, place, &blob.id, &mut scratch).is_ok()
    }

    /// Compares a node with what its parent says.
    fn compare(&mut self, place: &Place<'_>, first: &[u8], last: &[u8], entries: u64, bytes: u64) {
        if place.upper.is_some_and(|upper| last >= upper) {
            self.fault(&place.node, "it reaches beyond the key its parent gives the next node");
        }
        let Some(child) = place.child else {
            return;
        };
        if child.first_key != first {
            self.fault(&place.node, "it begins with another key than its parent says");
        } else if (child.entries, child.bytes) != (entries, bytes) {
            self.fault(
                &place.node,
                "it holds another number of entries or bytes than its parent says",
            );
        }
    }

    fn unreadable(&mut self, node: &NodeRef, error: &Error) {
        if error.kind() == ErrorKind::NotFound {
            let pack = self.damage.now(node.location()).pack;
            self.damage.missing_pack(PackClass::Meta, pack);
        } else if self.damage.of_blob(node.location()).is_none() {
            self.fault(node, &chain(error));
        }
    }

    fn fault(&mut self, node: &NodeRef, why: &str) {
        let object = PackClass::Meta.object_name(node.pack);
        let message = format!("tree node {} at place {}: {why}", node.id.short(), node.ordinal);
        if !self.damage.nodes.contains_key(&key(node)) {
            let finding = Finding::new(Severity::Error, FindingKind::Node, object, message);
            let at = self.damage.add(finding);
            self.damage.nodes.insert(key(node), at);
        }
    }
}

/// The second pass: which snapshots and files are hit by the damage.
pub(super) struct Attribution<'a> {
    pub(super) repository: &'a Repository,
    damage: &'a mut Damage,
    /// Nodes below which all is well.
    clean: HashSet<Key>,
    /// Nodes whose files have been counted.
    counted: HashSet<Key>,
    /// Findings that concern the snapshot at hand.
    hit: HashSet<usize>,
}

impl<'a> Attribution<'a> {
    pub(super) fn new(repository: &'a Repository, damage: &'a mut Damage) -> Self {
        let (clean, counted, hit) = (HashSet::new(), HashSet::new(), HashSet::new());
        Self { repository, damage, clean, counted, hit }
    }

    pub(super) fn snapshot(&mut self, id: SnapshotId, snapshot: &Snapshot) {
        self.hit.clear();
        self.node(&snapshot.root, snapshot.level.min(TREE_LEVELS_MAX), None);
        let Snapshot { lineage, path, .. } = snapshot;
        for at in self.hit.drain() {
            let affected = Affected { id, lineage: lineage.clone(), path: path.clone() };
            self.damage.findings[at].snapshots.push(affected);
        }
    }

    /// Whether anything at or below the node is damaged.
    fn node(&mut self, node: &NodeRef, level: u8, child: Option<&ChildRef>) -> bool {
        if self.clean.contains(&key(node)) {
            return false;
        }
        let own = self.damage.of_node(node);
        let mut is_damaged = own.is_some();
        let read = if level == 0 {
            load_leaf(self.repository, node).map(|leaf| is_damaged |= self.leaf(node, &leaf))
        } else {
            load_interior(self.repository, node, level).map(|interior| {
                let touched = level > 1 || self.damage.touches(&interior.liveness);
                for child in &interior.children {
                    if touched || self.damage.of_node(&child.node).is_some() {
                        is_damaged |= self.node(&child.node, level - 1, Some(child));
                    }
                }
            })
        };
        if let Some(at) = own {
            self.hit.insert(at);
            if read.is_err() && self.counted.insert(key(node)) {
                let from = child.map_or_else(String::new, |child| text(&child.first_key));
                let named = format!("{from} … (all that follow in an unreadable part of the tree)");
                let count = child.map_or(1, |child| child.entries);
                self.damage.findings[at].add_files(named, count);
            }
        }
        if !is_damaged && read.is_ok() {
            self.clean.insert(key(node));
        }
        is_damaged || read.is_err()
    }

    fn leaf(&mut self, node: &NodeRef, leaf: &Leaf) -> bool {
        let is_new = self.counted.insert(key(node));
        let mut is_damaged = false;
        let mut last = BTreeMap::new();
        for entry in &leaf.entries {
            for blob in entry.blobs() {
                let Some(at) = self.damage.of_blob(blob.location) else {
                    continue;
                };
                is_damaged = true;
                self.hit.insert(at);
                let path = path(entry);
                if is_new && last.get(&at) != Some(&path) {
                    self.damage.findings[at].add_files(path.clone(), 1);
                    last.insert(at, path);
                }
            }
        }
        is_damaged
    }
}

impl Incomplete {
    fn add(&mut self, leaf: &Leaf) {
        // Of a large file, the entry behind its extents may say once more what its node says.
        let mut counted = false;
        for entry in &leaf.entries {
            let (kind, state) = match &entry.body {
                Body::Node(node) => (node.kind, node.state),
                Body::End(end) if !counted => (Kind::File, end.state),
                Body::Absent(Absence::Unreadable) => {
                    self.names += 1;
                    continue;
                }
                Body::Extent(_) | Body::End(_) | Body::Absent(Absence::Excluded) => continue,
            };
            counted = state != State::Whole;
            match (state.is_incomplete(), kind) {
                (true, Kind::Dir) => self.folders += 1,
                (true, _) => self.files += 1,
                (false, _) => self.files_changed += u64::from(state == State::Changed),
            }
        }
    }
}

impl Finding {
    fn add_files(&mut self, name: String, count: u64) {
        self.files_count += count;
        if self.files.len() < FILES_NAMED {
            self.files.push(name);
        }
    }
}

fn text(key: &[u8]) -> String {
    String::from_utf8_lossy(key).replace('\0', "/")
}

/// The path of the file an entry belongs to.
fn path(entry: &Entry) -> String {
    match entry.body {
        // Behind the file's key stand two zero bytes and the number of the span.
        Body::Extent(_) | Body::End(_) => text(&entry.key[..entry.key.len().saturating_sub(10)]),
        Body::Node(_) | Body::Absent(_) => text(&entry.key),
    }
}
