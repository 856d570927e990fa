//! The gate: which blobs a new snapshot may refer to.
//!
//! Rule W3 of `FORMAT.md` (8.2): a session refers only to packs that it has listed after it read the
//! tombstones, and that no tombstone names, or to copies in such packs; and to the packs it writes
//! itself. What breaks the rule is lost as soon as a garbage collection ends that does not wait for
//! this session. So every reference of a tree is asked about here, in
//! [`TreeBuilder`](crate::tree::TreeBuilder), whatever it came from: a lookup of the index, an entry
//! or a leaf of an older tree, a node that recurs.
//!
//! Memory: 8 bytes a pack of the repository, 4096 nodes, and what relocations take.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError, RwLock};

use super::lock;
use crate::error::{ErrorKind, Result};
use crate::id::{BlobId, GenerationId, PackId};
use crate::pack::{Location, PackClass};
use crate::record;
use crate::relocation::Relocations;
use crate::repository::Repository;
use crate::tree::NodeRef;

/// Nodes of older trees that are remembered at once.
const NODES_MAX: usize = 4096;

/// What a session may refer to.
pub(super) struct Usable {
    /// Packs that were listed and have no tombstone, and the session's own.
    packs: RwLock<PackSet>,
    tombstoned: PackSet,
    /// As of after the tombstones were read.
    relocations: Relocations,
    /// Nodes of older trees that are not to be stored again.
    nodes: Mutex<HashMap<BlobId, NodeRef>>,
}

impl Usable {
    /// Looks at the store, after the session was announced. The order matters: what is deleted after
    /// the tombstones were read has a tombstone among them, and what was deleted before is not listed.
    pub(super) fn learn(repository: &Repository) -> Result<Self> {
        let tombstoned = read_all_tombstones(repository)?;
        let relocations = Relocations::load(repository.store(), repository.keys())?;
        let mut packs = PackSet::default();
        for class in [PackClass::Data, PackClass::Meta] {
            repository.store().list(class.folder(), &mut |meta| {
                let name = meta.key.rsplit('/').next();
                let pack = name.and_then(|name| name.parse::<PackId>().ok());
                if let Some(pack) = pack.filter(|pack| !tombstoned.contains(*pack)) {
                    packs.insert(pack);
                }
                Ok(())
            })?;
        }
        let (packs, nodes) = (RwLock::new(packs), Mutex::default());
        Ok(Self { packs, tombstoned, relocations, nodes })
    }

    /// Notes a pack that the session is about to write: no snapshot comes to be before it is durable.
    pub(super) fn add_own(&self, pack: PackId) {
        self.packs.write().unwrap_or_else(PoisonError::into_inner).insert(pack);
    }

    /// Whether any reference to `pack` may be made.
    pub(super) fn contains(&self, pack: PackId) -> bool {
        self.packs.read().unwrap_or_else(PoisonError::into_inner).contains(pack)
    }

    /// Whether a reference to `place` may be made: the blob is there, or a copy of it. A tombstone on
    /// the old pack also announces that its relocations go.
    pub(super) fn backs(&self, place: Location) -> bool {
        self.contains(place.pack)
            || (!self.tombstoned.contains(place.pack)
                && self.relocations.is_backed(place, &|pack| self.contains(pack)))
    }

    /// Whether references to all these blobs of a pack may be made; bit n stands for ordinal n.
    pub(super) fn backs_all(&self, pack: PackId, blobs: u128) -> bool {
        let mut ordinals = (0..128).filter(|ordinal| blobs >> ordinal & 1 == 1);
        self.contains(pack) || ordinals.all(|ordinal| self.backs(Location { pack, ordinal }))
    }

    /// Remembers a node of an older tree, if it may be referred to.
    pub(super) fn remember_node(&self, node: NodeRef) {
        if self.backs(node.location()) {
            let mut nodes = lock(&self.nodes);
            // Nodes recur close to where they were; forgetting all now and then loses little.
            if nodes.len() >= NODES_MAX {
                nodes.clear();
            }
            nodes.insert(node.id, node);
        }
    }

    /// The node of this name, if it is remembered.
    pub(super) fn node(&self, id: &BlobId) -> Option<NodeRef> {
        lock(&self.nodes).get(id).copied()
    }
}

/// Names of packs: by the first byte, the eight bytes after it, ascending. Names are random, so that
/// of ten million packs here and as many deleted ones two agree in nine bytes once in 10^7 repositories.
struct PackSet(Vec<Vec<u64>>);

impl Default for PackSet {
    fn default() -> Self {
        Self(vec![Vec::new(); 256])
    }
}

impl PackSet {
    fn split(pack: PackId) -> (usize, u64) {
        let [first, a, b, c, d, e, f, g, h, ..] = pack.0;
        (usize::from(first), u64::from_be_bytes([a, b, c, d, e, f, g, h]))
    }

    /// A store lists names in ascending order, so this mostly appends.
    fn insert(&mut self, pack: PackId) {
        let (first, rest) = Self::split(pack);
        let known = &mut self.0[first];
        if let Err(at) = known.binary_search(&rest) {
            if known.len() == known.capacity() {
                // Doubling could take twice what is needed.
                known.reserve_exact(16 + known.len() / 8);
            }
            known.insert(at, rest);
        }
    }

    fn contains(&self, pack: PackId) -> bool {
        let (first, rest) = Self::split(pack);
        self.0[first].binary_search(&rest).is_ok()
    }
}

/// All packs that any garbage collection is about to delete.
fn read_all_tombstones(repository: &Repository) -> Result<PackSet> {
    let mut packs = PackSet::default();
    for id in repository.list_ids(record::TOMBSTONES)? {
        let id = GenerationId(id.0);
        match record::read_tombstones(repository.store(), repository.keys(), id) {
            Ok(tombstones) => tombstones.all().for_each(|pack| packs.insert(*pack)),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error.context("cannot tell which packs are about to be deleted"));
            }
        }
    }
    Ok(packs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_pack_is_in_the_set_if_it_was_put_there(
            packs in proptest::collection::vec(any::<[u8; 16]>().prop_map(PackId), 0..400),
            others in proptest::collection::vec(any::<[u8; 16]>().prop_map(PackId), 0..100),
        ) {
            let mut set = PackSet::default();
            packs.iter().for_each(|pack| set.insert(*pack));
            prop_assert!(packs.iter().all(|pack| set.contains(*pack)));
            let is_new = |pack: &&PackId| !packs.contains(pack);
            prop_assert!(others.iter().filter(is_new).all(|pack| !set.contains(*pack)));
        }
    }

    #[test]
    fn a_million_packs_take_nine_megabytes() {
        let mut set = PackSet::default();
        for n in 0..1_000_000_u64 {
            let hash = blake3::hash(&n.to_le_bytes());
            set.insert(PackId(*hash.as_bytes().first_chunk().expect("32 is more than 16")));
        }
        let bytes: usize = set.0.iter().map(|known| 8 * known.capacity()).sum();
        assert!(bytes < 9_500_000, "{bytes}");
    }
}
