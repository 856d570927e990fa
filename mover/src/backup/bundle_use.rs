//! Finds the bundles of which a snapshot uses little, so that the next backup stores that little anew.
//!
//! A bundle keeps the bytes of changed and deleted files until none of its files is used any more.
//! Where single files change here and there, that is hardly ever, and a repository would grow without
//! bound. What is stored anew costs the space of both copies until the older snapshots are forgotten,
//! so this pays only for bundles that are more than half unused, and not at all where snapshots are
//! kept for much longer than it takes files to change. A bundle that equal folders or other lineages
//! share stays for their sake.

use std::collections::HashMap;

use chunkstore::limits::SPARSE_PACKS_MAX;
use chunkstore::pack::Location;
use chunkstore::tree::{Content, Entry, Liveness};

/// Bundles counted at once, some 3 MiB: up to 16 GiB of small files. Of more, a share is looked at.
const COUNTED_MAX: usize = 16 << 10;

/// Bytes that the next backup may store anew, if a sixteenth of all small files is less: volumes are
/// saved for the first time at once, and so their bundles become sparse all at once.
const ANEW_BYTES: u64 = 64 << 20;

/// As many files likewise: each has to be opened.
const ANEW_FILES: u64 = 20_000;

/// How much of a bundle is used.
#[derive(Debug, Clone, Copy)]
struct Use {
    used: u64,
    len: u32,
    files: u32,
}

impl Use {
    fn join(&mut self, used: u64, files: u32) {
        self.used = self.used.saturating_add(used);
        self.files = self.files.saturating_add(files);
    }

    fn is_sparse(self) -> bool {
        2 * self.used < u64::from(self.len)
    }

    /// In thousandths of the bundle, for an order.
    fn thousandths(self) -> u64 {
        1000 * self.used / u64::from(self.len.max(1))
    }
}

/// Counts how much of each bundle the entries of a tree use.
pub(super) struct BundleUse {
    bundles: HashMap<Location, Use>,
    /// The bundle of the last entry, most likely also of the next.
    last: Option<(Location, Use)>,
    counted_max: usize,
    /// Only packs are looked at whose id, combined with `draw`, has none of these bits.
    mask: u64,
    draw: u64,
}

impl BundleUse {
    /// Nothing is counted yet. `draw` decides which share of very many bundles is looked at, and is to
    /// be another one each time.
    pub(super) fn new(draw: u64) -> Self {
        Self { bundles: HashMap::new(), last: None, counted_max: COUNTED_MAX, mask: 0, draw }
    }

    /// Counts an entry of the tree.
    pub(super) fn add(&mut self, entry: &Entry) {
        let Some(node) = entry.node() else { return };
        let Content::Part { bundle, .. } = &node.content else { return };
        match &mut self.last {
            Some((at, counted)) if *at == bundle.location => counted.join(node.size, 1),
            _ => {
                self.settle();
                self.last =
                    Some((bundle.location, Use { used: node.size, len: bundle.len, files: 1 }));
            }
        }
    }

    fn is_looked_at(&self, at: Location) -> bool {
        let id = at.pack.0.first_chunk().map_or(0, |start| u64::from_le_bytes(*start));
        (id ^ self.draw) & self.mask == 0
    }

    /// Notes what was counted of the last bundle.
    fn settle(&mut self) {
        let Some((at, counted)) = self.last.take() else { return };
        if !self.is_looked_at(at) {
            return;
        }
        self.bundles
            .entry(at)
            .and_modify(|known| known.join(counted.used, counted.files))
            .or_insert(counted);
        while self.bundles.len() > self.counted_max && self.mask < u64::MAX {
            self.mask = self.mask << 1 | 1;
            let mut bundles = std::mem::take(&mut self.bundles);
            bundles.retain(|at, _| self.is_looked_at(*at));
            self.bundles = bundles;
        }
    }

    /// The bundles to be stored anew, the emptiest if there are too many.
    pub(super) fn sparse(mut self) -> Liveness {
        self.settle();
        // As if all had been looked at.
        let share = self.mask.saturating_add(1);
        let sixteenth = |of: fn(&Use) -> u64| {
            self.bundles.values().map(of).fold(0, u64::saturating_add).saturating_mul(share) / 16
        };
        let mut bytes = ANEW_BYTES.max(sixteenth(|one| one.used));
        let mut files = ANEW_FILES.max(sixteenth(|one| one.files.into()));
        let mut sparse: Vec<_> =
            self.bundles.into_iter().filter(|(_, counted)| counted.is_sparse()).collect();
        sparse.sort_unstable_by_key(|(at, counted)| (counted.thousandths(), *at));
        let mut chosen = Liveness::default();
        for (at, counted) in sparse {
            if chosen.0.len() >= SPARSE_PACKS_MAX && !chosen.0.contains_key(&at.pack) {
                continue;
            }
            let left = (bytes.checked_sub(counted.used), files.checked_sub(counted.files.into()));
            let (Some(less_bytes), Some(less_files)) = left else { break };
            (bytes, files) = (less_bytes, less_files);
            chosen.mark(at);
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chunkstore::id::{BlobId, PackId};
    use chunkstore::tree::{BlobRef, Body, Kind, Node, State, Timestamp};

    fn at(pack: u8, ordinal: u8) -> Location {
        Location { pack: PackId([pack; 16]), ordinal }
    }

    fn file(location: Location, size: u64, len: u32) -> Entry {
        let bundle = BlobRef { id: BlobId([1; 32]), location, len };
        let node = Node {
            kind: Kind::File,
            mode: 0,
            uid: 0,
            gid: 0,
            size,
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
            ino: 0,
            fs: 0,
            linked: false,
            rdev: (0, 0),
            xattrs: Vec::new(),
            state: State::Whole,
            content: Content::Part { bundle, offset: 0, hash: [0; 16] },
        };
        Entry { key: b"file".to_vec(), body: Body::Node(node) }
    }

    fn sparse(entries: &[Entry]) -> Vec<(PackId, u128)> {
        let mut counted = BundleUse::new(7);
        entries.iter().for_each(|entry| counted.add(entry));
        counted.sparse().0.into_iter().collect()
    }

    #[test]
    fn bundles_of_which_less_than_half_is_used_are_found() {
        let entries = [
            file(at(1, 0), 300, 1000),
            file(at(1, 1), 500, 1000),
            file(at(2, 5), 200, 1000),
            // In parts, with others between them.
            file(at(1, 0), 199, 1000),
            file(at(2, 5), 299, 1000),
            file(at(2, 6), 499, 1000),
            file(at(1, 0), 1, 1000),
        ];
        assert_eq!(sparse(&entries), [(PackId([2; 16]), 1 << 5 | 1 << 6)]);
        assert_eq!(sparse(&[]), []);
    }

    #[test]
    fn no_more_than_a_part_is_stored_anew_at_once() {
        let mib = 1 << 20;
        // 100 packs of 100 bundles, the later the emptier.
        let entries: Vec<_> = (0..100u8)
            .flat_map(|pack| (0..100u8).map(move |n| (pack, n)))
            .map(|(pack, n)| file(at(pack, n), mib / 4 - 2000 * u64::from(pack), mib as u32))
            .collect();
        let found = sparse(&entries);
        let bundles: u32 = found.iter().map(|(_, blobs)| blobs.count_ones()).sum();
        // A sixteenth of some 1560 MiB, in bundles of which some 75 KiB are used.
        assert!((1300..1400).contains(&bundles), "{bundles}");
        assert!(found.iter().all(|(pack, _)| pack.0[0] >= 86), "the emptiest first");
    }

    #[test]
    fn a_snapshot_names_no_more_packs_than_it_may() {
        let entries: Vec<_> = (0..2 * SPARSE_PACKS_MAX as u16)
            .map(|n| {
                let mut location = at(0, 0);
                location.pack.0[..2].copy_from_slice(&n.to_be_bytes());
                file(location, 10, 1000)
            })
            .collect();
        assert_eq!(sparse(&entries).len(), SPARSE_PACKS_MAX);
    }

    #[test]
    fn of_very_many_bundles_a_share_is_looked_at_and_all_in_time() {
        let location = |n: u64| {
            let mut pack = PackId([0; 16]);
            pack.0[..8].copy_from_slice(&(n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes());
            Location { pack, ordinal: 0 }
        };
        let mut seen = Liveness::default();
        for draw in 0..64 {
            let mut counted = BundleUse { counted_max: 100, ..BundleUse::new(draw) };
            for n in 0..1000 {
                counted.add(&file(location(n), 10, 100));
                assert!(counted.bundles.len() <= 100);
            }
            let found = counted.sparse();
            assert!((20..=100).contains(&found.0.len()), "{}", found.0.len());
            seen.union(&found);
        }
        assert_eq!(seen.0.len(), 1000);
    }
}
