//! Marking: which blobs of which packs the snapshots use.
//!
//! A reference names the place a blob was first stored at. If it was copied since, every copy counts as
//! used too; and the original is needed only while no copy can be relied on.
//!
//! No leaf is read, save those that are roots: level-1 nodes list what their leaves use. Every interior
//! node is visited once over all snapshots. Memory: 48 bytes a used pack and 16 bytes a node, and
//! what relocations take.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::error::{Error, ErrorKind, Result};
use crate::id::{GenerationId, PackId, SnapshotId};
use crate::pack::{Location, PackClass};
use crate::record::{self, Snapshot, Verdict};
use crate::relocation::Relocations;
use crate::repository::{Repository, SNAPSHOTS_AT_ONCE};
use crate::tree::{NodeRef, TreeCursor, for_each_node};

/// What snapshots use.
#[derive(Default)]
pub(super) struct Mark {
    /// As references say.
    data: HashMap<PackId, u128>,
    meta: HashMap<PackId, u128>,
    /// Copies of what references say, of both classes.
    copies: HashMap<PackId, u128>,
    relocations: Relocations,
    /// Packs whose copies can be relied on: they are there, and nobody is about to delete them.
    reliable: HashSet<PackId>,
    nodes: HashSet<[u8; 16]>,
    /// Snapshots counted so far.
    pub(super) snapshots: HashSet<SnapshotId>,
    /// How many of them lack something that could not be read.
    pub(super) incomplete: usize,
    /// Sessions known to be fenced.
    pub(super) fenced: HashSet<SnapshotId>,
    /// Snapshots marked forgotten, as of the last look, whose object is still there.
    pub(super) forgotten: Vec<SnapshotId>,
}

/// Those packs with copies that can be relied on. Tombstones are looked at first: a pack that is
/// deleted, and its tombstone removed, between the two looks is then seen missing.
fn look_for_copies(repository: &Repository, relocations: &Relocations) -> Result<HashSet<PackId>> {
    let copies = relocations.packs().flat_map(|(_, moved)| &moved.places);
    let mut wanted: HashSet<PackId> = copies.map(|(_, copy)| copy.pack).collect();
    let mut present = HashSet::new();
    if wanted.is_empty() {
        return Ok(present);
    }
    for id in repository.list_ids(record::TOMBSTONES)? {
        let id = GenerationId(id.0);
        match record::read_tombstones(repository.store(), repository.keys(), id) {
            Ok(tombstones) => tombstones.all().for_each(|pack| {
                wanted.remove(pack);
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    for class in [PackClass::Data, PackClass::Meta] {
        repository.store().list(class.folder(), &mut |meta| {
            let id = meta.key.rsplit('/').next().and_then(|name| name.parse::<PackId>().ok());
            present.extend(id.filter(|id| wanted.contains(id)));
            Ok(())
        })?;
    }
    Ok(present)
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
        let mut new = Vec::new();
        for id in ids {
            if forgotten.contains(&id) {
                self.forgotten.push(id);
            } else if !self.snapshots.contains(&id) && !self.fenced.contains(&id) {
                new.push(id);
            }
        }
        for ids in new.chunks(SNAPSHOTS_AT_ONCE) {
            for (id, verdict) in ids.iter().zip(repository.verdicts(ids)) {
                let counted = verdict.and_then(|verdict| self.count(repository, *id, verdict));
                counted.map_err(|error| unmarkable(*id, error))?;
            }
        }
        self.follow_relocations(repository)
    }

    /// Counts the copies of what is used.
    fn follow_relocations(&mut self, repository: &Repository) -> Result<()> {
        self.relocations = Relocations::load(repository.store(), repository.keys())?;
        if let Some((name, why)) = self.relocations.damaged().first() {
            let error = Error::corrupt(name, why);
            return Err(error.context(
                "nothing was deleted, because it is unknown where repacked blobs lie; run 'check'",
            ));
        }
        self.reliable = look_for_copies(repository, &self.relocations)?;
        // Copies may have been copied: until nothing is added any more.
        loop {
            let mut added = Vec::new();
            for (pack, moved) in self.relocations.packs() {
                let used = self.referred(moved.class, *pack);
                for (ordinal, copy) in &moved.places {
                    let known = self.copies.get(&copy.pack).copied().unwrap_or_default();
                    if used >> ordinal & 1 == 1 && known >> copy.ordinal & 1 == 0 {
                        added.push(*copy);
                    }
                }
            }
            if added.is_empty() {
                return Ok(());
            }
            added.into_iter().for_each(|copy| mark(&mut self.copies, copy));
        }
    }

    fn count(
        &mut self,
        repository: &Repository,
        id: SnapshotId,
        verdict: Option<Verdict>,
    ) -> Result<()> {
        match verdict {
            Some(Verdict::Snapshot(snapshot)) => {
                self.count_tree(repository, &snapshot)?;
                self.snapshots.insert(id);
                self.incomplete += usize::from(snapshot.summary.files_missing > 0);
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

    /// The blobs of a pack that snapshots refer to there, or of which it holds a copy.
    pub(super) fn referred(&self, class: PackClass, pack: PackId) -> u128 {
        let packs = match class {
            PackClass::Data => &self.data,
            PackClass::Meta => &self.meta,
        };
        let of = |packs: &HashMap<PackId, u128>| packs.get(&pack).copied().unwrap_or_default();
        of(packs) | of(&self.copies)
    }

    /// The blobs of a pack that must stay there: those used of which there is no copy elsewhere that
    /// can be relied on. 0 if the pack can go.
    pub(super) fn used(&self, class: PackClass, pack: PackId) -> u128 {
        let referred = self.referred(class, pack);
        if referred == 0 || !self.relocations.contains(pack) {
            return referred;
        }
        let elsewhere = |copy: PackId| copy != pack && self.reliable.contains(&copy);
        let is_copied = |ordinal: &u8| {
            self.relocations.is_backed(Location { pack, ordinal: *ordinal }, &elsewhere)
        };
        (0..128).filter(is_copied).fold(referred, |used, ordinal| used & !(1 << ordinal))
    }

    /// Relocated packs that nothing refers to any more, ascending.
    pub(super) fn unreferred(&self) -> Vec<PackId> {
        let packs = self.relocations.packs();
        let dead = packs.filter(|(pack, moved)| self.referred(moved.class, **pack) == 0);
        let mut dead: Vec<PackId> = dead.map(|(pack, _)| *pack).collect();
        dead.sort_unstable();
        dead
    }

    /// Repackings known to be declared dead.
    pub(super) fn repackings_fenced(&self) -> &BTreeSet<SnapshotId> {
        self.relocations.fenced()
    }

    /// Whether anything refers to a relocated pack.
    pub(super) fn is_referred(&self, pack: PackId) -> bool {
        [PackClass::Data, PackClass::Meta].iter().any(|class| self.referred(*class, pack) != 0)
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
