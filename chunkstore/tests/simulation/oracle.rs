//! Watches over the listed snapshots.

use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::sync::Arc;

use chunkstore::error::Result;
use chunkstore::id::{BlobId, SnapshotId};
use chunkstore::pack::{Location, PackClass};
use chunkstore::record::Snapshot;
use chunkstore::relocation::Relocations;
use chunkstore::repository::Repository;
use chunkstore::tree::{Entry, NodeRef, TreeCursor, for_each_node};

use crate::world::World;

/// A blob that a snapshot refers to.
pub(crate) type Reference = (PackClass, Location);

#[derive(Default)]
pub(crate) struct Oracle {
    references: BTreeMap<SnapshotId, BTreeSet<Reference>>,
    /// Data that leaves refer to: trees share them.
    leaves: BTreeMap<BlobId, BTreeSet<Reference>>,
}

impl Oracle {
    /// Every listed snapshot has every blob, where its references or relocations say.
    pub(crate) fn check(&mut self, world: &Arc<World>, outside: &Repository) {
        let list = outside.list_snapshots().unwrap();
        assert!(list.damaged.is_empty(), "{:?}", list.damaged);
        let store = world.outside();
        let relocations = Relocations::load(&*store, outside.keys()).unwrap();
        for (id, snapshot) in &list.snapshots {
            if !self.references.contains_key(id) {
                let references = self.references_of(outside, snapshot).unwrap_or_else(|error| {
                    panic!("snapshot {id}: {}", chunkstore::error::chain(&error))
                });
                self.references.insert(*id, references);
            }
            for (class, place) in &self.references[id] {
                let places = relocations.places(*place);
                let there = |place: &Location| world.has(&class.object_name(place.pack));
                assert!(places.iter().any(there), "snapshot {id} has lost {place:?}");
            }
        }
    }

    /// Everything that a snapshot refers to.
    pub(crate) fn references_of(
        &mut self,
        repository: &Repository,
        snapshot: &Snapshot,
    ) -> Result<BTreeSet<Reference>> {
        let mut found = BTreeSet::from([(PackClass::Meta, snapshot.root.location())]);
        let mut leaves = Vec::new();
        let all = &mut |_: &NodeRef| true;
        for_each_node(repository, snapshot.root, snapshot.level, all, &mut |_, interior| {
            let nodes = interior.children.iter().map(|child| child.node);
            found.extend(nodes.clone().map(|node| (PackClass::Meta, node.location())));
            if interior.level == 1 {
                leaves.extend(nodes);
            }
            Ok(())
        })?;
        if snapshot.level == 0 {
            leaves.push(snapshot.root);
        }
        for leaf in leaves {
            if let btree_map::Entry::Vacant(unknown) = self.leaves.entry(leaf.id) {
                let at = TreeCursor::new(repository, leaf, 0).next_leaf()?.unwrap();
                let blobs = at.leaf.entries.iter().flat_map(Entry::blobs);
                let data = blobs.map(|blob| (PackClass::Data, blob.location)).collect();
                unknown.insert(data);
            }
            found.extend(&self.leaves[&leaf.id]);
        }
        Ok(found)
    }
}
