//! Marking: which blobs of which packs the snapshots use.
//!
//! No leaf is read, save those that are roots: level-1 nodes list what their leaves use. Every interior
//! node is visited once over all snapshots. Memory: 48 bytes a used pack and 16 bytes a node.

use std::collections::{HashMap, HashSet};

use crate::error::{Error, ErrorKind, Result};
use crate::id::{PackId, SnapshotId};
use crate::pack::{Location, PackClass};
use crate::record::{self, Snapshot, Verdict};
use crate::repository::Repository;
use crate::tree::{NodeRef, TreeCursor, for_each_node};

/// What snapshots use.
#[derive(Default)]
pub(super) struct Mark {
    data: HashMap<PackId, u128>,
    meta: HashMap<PackId, u128>,
    nodes: HashSet<[u8; 16]>,
    /// Snapshots counted so far.
    pub(super) snapshots: HashSet<SnapshotId>,
    /// Sessions known to be fenced.
    pub(super) fenced: HashSet<SnapshotId>,
    /// Snapshots marked forgotten, as of the last look, whose object is still there.
    pub(super) forgotten: Vec<SnapshotId>,
}

impl Mark {
    /// Counts every snapshot that is there and not forgotten, in addition to those counted before: a
    /// snapshot forgotten in between still counts, which only defers what it frees.
    ///
    /// # Errors
    /// When any of them, or a node that says what it uses, cannot be read: then nothing may be
    /// deleted.
    pub(super) fn refresh(&mut self, repository: &Repository) -> Result<()> {
        // Snapshots first: one that is forgotten in between is then seen as forgotten.
        let ids = repository.list_ids(record::SNAPSHOTS)?;
        let forgotten: HashSet<_> = repository.list_ids(record::FORGOTTEN)?.into_iter().collect();
        self.forgotten.clear();
        for id in ids {
            if forgotten.contains(&id) {
                self.forgotten.push(id);
            } else if !self.snapshots.contains(&id) && !self.fenced.contains(&id) {
                self.count(repository, id).map_err(|error| unmarkable(id, error))?;
            }
        }
        Ok(())
    }

    fn count(&mut self, repository: &Repository, id: SnapshotId) -> Result<()> {
        match repository.verdict(id)? {
            Some(Verdict::Snapshot(snapshot)) => {
                self.count_tree(repository, &snapshot)?;
                self.snapshots.insert(id);
            }
            Some(Verdict::Fenced { .. }) => {
                self.fenced.insert(id);
            }
            // Forgotten and deleted since it was listed.
            None => {}
        }
        Ok(())
    }

    fn count_tree(&mut self, repository: &Repository, snapshot: &Snapshot) -> Result<()> {
        let Snapshot { root, level, .. } = snapshot;
        let Self { data, meta, nodes, .. } = self;
        mark(meta, root.location());
        if *level == 0 {
            if nodes.insert(key(root))
                && let Some(at) = TreeCursor::new(repository, *root, 0).next_leaf()?
            {
                let blobs = at.leaf.entries.iter().flat_map(|entry| entry.blobs());
                blobs.for_each(|blob| mark(data, blob.location));
            }
            return Ok(());
        }
        let mut visit = |node: &NodeRef| nodes.insert(key(node));
        for_each_node(repository, *root, *level, &mut visit, &mut |_, interior| {
            interior.children.iter().for_each(|child| mark(meta, child.node.location()));
            for (pack, blobs) in &interior.liveness.0 {
                *data.entry(*pack).or_default() |= blobs;
            }
            Ok(())
        })
    }

    /// The used blobs of a pack; 0 if it is dead.
    pub(super) fn used(&self, class: PackClass, pack: PackId) -> u128 {
        let packs = match class {
            PackClass::Data => &self.data,
            PackClass::Meta => &self.meta,
        };
        packs.get(&pack).copied().unwrap_or_default()
    }
}

fn mark(packs: &mut HashMap<PackId, u128>, location: Location) {
    *packs.entry(location.pack).or_default() |= 1 << location.ordinal;
}

/// Half an id names a node as surely as the index names blobs.
fn key(node: &NodeRef) -> [u8; 16] {
    *node.id.0.first_chunk().expect("32 is more than 16")
}

fn unmarkable(id: SnapshotId, error: Error) -> Error {
    let advice = match error.kind() {
        ErrorKind::Corrupt | ErrorKind::NotFound => {
            "nothing was deleted, because it is unknown what this snapshot uses; run 'check', and \
             'forget' the snapshot if it is lost"
        }
        _ => "nothing was deleted, because it could not be found out what this snapshot uses",
    };
    error.context(format!("snapshot {}: {advice}", id.short()))
}
