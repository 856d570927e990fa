//! Relocations: where repacked blobs lie now.
//!
//! References in trees say in which pack a blob lies. Trees are never rewritten, so when blobs are
//! copied out of a mostly dead pack, a relocation object says for each of them where the copy is. A
//! reader looks here when a pack is gone; a garbage collection counts a reference to the old place as
//! one to every copy; a writer may go on referring to the old place as long as a copy is there.
//!
//! A blob may be relocated again, and may have several copies, if two repackings met: each is right.
//!
//! Memory: some 20 bytes a relocated blob and 80 a relocated pack. Merging leaves out what lies between
//! (`Relocations::shorten`), so that this does not grow with each repacking.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::IoSlice;

use objects::{Created, ObjectStore};

use crate::codec::seal::{Keyring, ObjectKind, open_record, seal_record};
use crate::error::{Error, ErrorKind, Result, chain};
use crate::id::{PackId, SnapshotId};
use crate::limits::{PACK_BLOBS_MAX, RELOCATIONS_BYTES_MAX};
use crate::pack::{Location, PackClass};
use crate::record;
use crate::wire::{DecodeError, DecodeResult, Decoder, put_varint};

/// Where the blobs of one pack were copied to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// What the pack holds.
    pub class: PackClass,
    /// Old ordinal and new place, ascending.
    pub places: Vec<(u8, Location)>,
}

/// What one relocation object says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// Blobs were copied.
    Moved(BTreeMap<PackId, Moved>),
    /// A garbage collection declared the repacking of this name dead; it can never publish.
    Fenced,
}

impl Record {
    fn encode(&self) -> Vec<u8> {
        let Self::Moved(packs) = self else {
            return vec![1];
        };
        let targets: BTreeSet<PackId> =
            packs.values().flat_map(|moved| &moved.places).map(|(_, place)| place.pack).collect();
        let numbers: HashMap<PackId, u64> = targets.iter().copied().zip(0..).collect();
        let mut out = vec![0];
        put_varint(&mut out, targets.len() as u64);
        targets.iter().for_each(|pack| out.extend_from_slice(&pack.0));
        put_varint(&mut out, packs.len() as u64);
        for (pack, moved) in packs {
            out.extend_from_slice(&pack.0);
            out.push(moved.class as u8);
            put_varint(&mut out, moved.places.len() as u64);
            for (ordinal, place) in &moved.places {
                out.push(*ordinal);
                put_varint(&mut out, numbers.get(&place.pack).copied().unwrap_or_default());
                out.push(place.ordinal);
            }
        }
        out
    }

    /// Decodes the plaintext of an object. Pure: fuzzed.
    pub(crate) fn decode(bytes: &[u8]) -> DecodeResult<Self> {
        let mut decoder = Decoder::new(bytes);
        match decoder.u8()? {
            0 => {}
            1 => return decoder.finish().map(|()| Self::Fenced),
            _ => return Err(DecodeError("it is of an unknown kind")),
        }
        let count = decoder.count(PackId::LEN)?;
        let mut targets = Vec::with_capacity(count);
        for _ in 0..count {
            targets.push(PackId(decoder.array()?));
        }
        let mut packs = BTreeMap::new();
        for _ in 0..decoder.count(PackId::LEN + 2)? {
            let pack = PackId(decoder.array()?);
            let class = match decoder.u8()? {
                0 => PackClass::Data,
                1 => PackClass::Meta,
                _ => return Err(DecodeError("it names an unknown class of packs")),
            };
            let count = decoder.count(3)?;
            let mut places = Vec::with_capacity(count);
            for _ in 0..count {
                let ordinal = decoder.u8()?;
                let target = usize::try_from(decoder.varint()?).ok();
                let target = target.and_then(|at| targets.get(at)).copied();
                let pack = target.ok_or(DecodeError("it refers to a pack it does not name"))?;
                let place = Location { pack, ordinal: decoder.u8()? };
                let bounded = |ordinal| usize::from(ordinal) < PACK_BLOBS_MAX;
                if !bounded(ordinal) || !bounded(place.ordinal) {
                    return Err(DecodeError("it names a place beyond the end of a pack"));
                }
                places.push((ordinal, place));
            }
            if !places.is_sorted() || packs.insert(pack, Moved { class, places }).is_some() {
                return Err(DecodeError("its places are out of order"));
            }
        }
        decoder.finish()?;
        Ok(Self::Moved(packs))
    }

    /// Creates the object of this name, unless it exists.
    ///
    /// # Errors
    /// `Invalid` when it is too large for one object; those of the store.
    pub fn create(
        &self,
        store: &dyn ObjectStore,
        keys: &Keyring,
        id: SnapshotId,
    ) -> Result<Created> {
        let object = self.seal(keys, id)?;
        Ok(store.create(&record::relocation_name(id), &[IoSlice::new(&object)])?)
    }

    /// The sealed object of this name.
    ///
    /// # Errors
    /// `Invalid` when it is too large.
    pub fn seal(&self, keys: &Keyring, id: SnapshotId) -> Result<Vec<u8>> {
        let plain = self.encode();
        if plain.len() as u64 + 1024 > RELOCATIONS_BYTES_MAX {
            return Err(Error::invalid("too many relocations for one object"));
        }
        Ok(seal_record(keys, ObjectKind::Relocations, &record::relocation_name(id), &plain))
    }

    /// Reads the object of this name.
    ///
    /// # Errors
    /// `NotFound`, `Corrupt`, and those of the store.
    pub fn read(store: &dyn ObjectStore, keys: &Keyring, id: SnapshotId) -> Result<Self> {
        let name = record::relocation_name(id);
        let object = store.read(&name, RELOCATIONS_BYTES_MAX)?;
        let plain = open_record(keys, ObjectKind::Relocations, &name, object)?;
        Self::decode(&plain).map_err(|error| Error::corrupt(&name, error.0))
    }
}

/// All relocations of a repository.
#[derive(Debug, Default)]
pub struct Relocations {
    moved: HashMap<PackId, Moved>,
    /// The objects they were read from.
    objects: BTreeSet<SnapshotId>,
    /// Repackings that were declared dead.
    fenced: BTreeSet<SnapshotId>,
    /// Objects that cannot be read, and why.
    damaged: Vec<(String, String)>,
}

impl Relocations {
    /// Reads all of them.
    ///
    /// # Errors
    /// When they cannot be listed. An object that is damaged is noted, no error.
    pub fn load(store: &dyn ObjectStore, keys: &Keyring) -> Result<Self> {
        // What vanishes between listing and reading was merged into another object, which a later
        // listing shows.
        const ATTEMPTS: usize = 5;
        'attempt: for _ in 0..ATTEMPTS {
            let mut all = Self::default();
            for id in list(store)? {
                match Record::read(store, keys, id) {
                    Ok(Record::Moved(packs)) => all.add(id, packs),
                    Ok(Record::Fenced) => drop(all.fenced.insert(id)),
                    Err(error) if error.kind() == ErrorKind::NotFound => continue 'attempt,
                    Err(error)
                        if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) =>
                    {
                        all.damaged.push((record::relocation_name(id), chain(&error)));
                    }
                    Err(error) => return Err(error),
                }
            }
            return Ok(all);
        }
        Err(Error::new(ErrorKind::Store, "the relocations keep changing: try again"))
    }

    /// Adds what object `id` says.
    pub(crate) fn add(&mut self, id: SnapshotId, packs: BTreeMap<PackId, Moved>) {
        self.objects.insert(id);
        for (pack, moved) in packs {
            let class = moved.class;
            let known = self.moved.entry(pack).or_insert(Moved { class, places: Vec::new() });
            known.places.extend(moved.places);
            known.places.sort_unstable();
            known.places.dedup();
        }
    }

    /// Leaves out places in packs that are gone, if the blob was copied on from there: otherwise what is
    /// said of a blob would grow with each repacking. What is left leads to the same copies.
    pub(crate) fn shorten(&mut self, is_gone: &dyn Fn(PackId) -> bool) {
        let is_passed =
            |place: &Location| is_gone(place.pack) && self.copies(*place).next().is_some();
        let mut shorter = Vec::new();
        for (pack, moved) in &self.moved {
            if !moved.places.iter().any(|(_, copy)| is_passed(copy)) {
                continue;
            }
            let mut places = Vec::new();
            for (ordinal, copy) in &moved.places {
                let mut last = self.places(*copy);
                last.retain(|place| !is_passed(place));
                // Only a forged cycle leads nowhere.
                let last = if last.is_empty() { vec![*copy] } else { last };
                places.extend(last.into_iter().map(|place| (*ordinal, place)));
            }
            places.sort_unstable();
            places.dedup();
            shorter.push((*pack, places));
        }
        for (pack, places) in shorter {
            self.moved.entry(pack).and_modify(|moved| moved.places = places);
        }
    }

    /// Whether nothing was relocated.
    pub fn is_empty(&self) -> bool {
        self.moved.is_empty()
    }

    /// The objects that were read.
    pub fn objects(&self) -> &BTreeSet<SnapshotId> {
        &self.objects
    }

    /// Repackings that were declared dead.
    pub fn fenced(&self) -> &BTreeSet<SnapshotId> {
        &self.fenced
    }

    /// Objects that cannot be read, and why.
    pub fn damaged(&self) -> &[(String, String)] {
        &self.damaged
    }

    /// The relocated packs.
    pub fn packs(&self) -> impl Iterator<Item = (&PackId, &Moved)> {
        self.moved.iter()
    }

    /// Whether any blob of the pack was relocated.
    pub fn contains(&self, pack: PackId) -> bool {
        self.moved.contains_key(&pack)
    }

    /// The copies of the blob at a place; copies of copies are not followed.
    pub fn copies(&self, place: Location) -> impl Iterator<Item = Location> + '_ {
        let places = self.moved.get(&place.pack).map_or(&[][..], |moved| &moved.places);
        let from = places.partition_point(|(ordinal, _)| *ordinal < place.ordinal);
        places[from..]
            .iter()
            .take_while(move |(ordinal, _)| *ordinal == place.ordinal)
            .map(|(_, copy)| *copy)
    }

    /// Every place where the blob may be, the newest copies first and `place` itself last.
    pub fn places(&self, place: Location) -> Vec<Location> {
        let mut found = vec![place];
        let mut at = 0;
        // Copies lie in packs written later, so this ends; a forged cycle ends by the second test.
        while let Some(next) = found.get(at).copied() {
            for copy in self.copies(next) {
                if !found.contains(&copy) {
                    found.push(copy);
                }
            }
            at += 1;
        }
        found.reverse();
        found
    }

    /// Where a reader looks for the blob first.
    pub fn newest(&self, place: Location) -> Location {
        if self.contains(place.pack) { self.places(place)[0] } else { place }
    }

    /// Whether the blob is at `place`, or one of its copies where it is said to be, in a pack that
    /// `is_there`.
    pub fn is_backed(&self, place: Location, is_there: &dyn Fn(PackId) -> bool) -> bool {
        is_there(place.pack)
            || (self.contains(place.pack)
                && self.places(place).iter().any(|place| is_there(place.pack)))
    }
}

/// Names of all relocation objects.
///
/// # Errors
/// When the folder cannot be listed.
pub fn list(store: &dyn ObjectStore) -> Result<Vec<SnapshotId>> {
    let mut ids = Vec::new();
    store.list(record::RELOCATIONS, &mut |meta| {
        ids.extend(meta.key[record::RELOCATIONS.len()..].parse::<SnapshotId>().ok());
        Ok(())
    })?;
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn place(pack: u8, ordinal: u8) -> Location {
        Location { pack: PackId([pack; 16]), ordinal }
    }

    fn moved(pack: u8, places: &[(u8, Location)]) -> BTreeMap<PackId, Moved> {
        let class = PackClass::Data;
        [(PackId([pack; 16]), Moved { class, places: places.to_vec() })].into()
    }

    #[test]
    fn copies_of_copies_are_found_newest_first() {
        let mut all = Relocations::default();
        all.add(SnapshotId([1; 16]), moved(1, &[(3, place(2, 0)), (7, place(2, 1))]));
        all.add(SnapshotId([2; 16]), moved(2, &[(1, place(3, 9))]));
        assert_eq!(all.places(place(1, 7)), [place(3, 9), place(2, 1), place(1, 7)]);
        assert_eq!(all.newest(place(1, 3)), place(2, 0));
        assert_eq!(all.places(place(1, 4)), [place(1, 4)], "it was not copied");
        assert_eq!(all.newest(place(9, 0)), place(9, 0));
    }

    #[test]
    fn two_copies_of_one_blob_are_both_known() {
        let mut all = Relocations::default();
        all.add(SnapshotId([1; 16]), moved(1, &[(3, place(2, 0))]));
        all.add(SnapshotId([2; 16]), moved(1, &[(3, place(4, 5))]));
        let copies: Vec<_> = all.copies(place(1, 3)).collect();
        assert_eq!(copies, [place(2, 0), place(4, 5)]);
        assert!(all.is_backed(place(1, 3), &|pack| pack == PackId([4; 16])));
        assert!(!all.is_backed(place(1, 2), &|pack| pack == PackId([4; 16])));
    }

    #[test]
    fn a_forged_cycle_ends() {
        let mut all = Relocations::default();
        all.add(SnapshotId([1; 16]), moved(1, &[(0, place(2, 0))]));
        all.add(SnapshotId([2; 16]), moved(2, &[(0, place(1, 0))]));
        assert_eq!(all.places(place(1, 0)).len(), 2);
        all.shorten(&|_| true);
        assert_eq!(all.places(place(1, 0)).len(), 2);
    }

    #[test]
    fn places_that_are_gone_are_left_out_if_the_blob_was_copied_on() {
        let mut all = Relocations::default();
        all.add(SnapshotId([1; 16]), moved(1, &[(0, place(2, 0)), (1, place(2, 1))]));
        all.add(SnapshotId([2; 16]), moved(2, &[(0, place(3, 0)), (0, place(4, 0))]));
        all.add(SnapshotId([3; 16]), moved(3, &[(0, place(5, 0))]));
        let before = all.places(place(1, 0));
        all.shorten(&|_| false);
        assert_eq!(all.places(place(1, 0)), before, "all of them are there");
        all.shorten(&|pack| [2, 3].contains(&pack.0[0]));
        assert_eq!(all.copies(place(1, 0)).collect::<Vec<_>>(), [place(4, 0), place(5, 0)]);
        assert_eq!(all.copies(place(2, 0)).collect::<Vec<_>>(), [place(4, 0), place(5, 0)]);
        assert_eq!(all.newest(place(1, 1)), place(2, 1), "nothing else is known of it");
    }

    proptest! {
        #[test]
        fn records_round_trip(packs in proptest::collection::btree_map(
            any::<[u8; 16]>().prop_map(PackId),
            proptest::collection::btree_set(
                (0_u8..128, any::<[u8; 16]>(), 0_u8..128), 1..20), 0..10)) {
            let packs = packs.into_iter().map(|(pack, places)| {
                let mut places: Vec<_> = places.into_iter()
                    .map(|(old, pack, ordinal)| (old, Location { pack: PackId(pack), ordinal }))
                    .collect();
                places.sort_unstable();
                (pack, Moved { class: PackClass::Meta, places })
            }).collect();
            let record = Record::Moved(packs);
            prop_assert_eq!(Record::decode(&record.encode()).unwrap(), record);
        }

        #[test]
        fn any_bytes_decode_or_fail(bytes: Vec<u8>) {
            let _accepted = Record::decode(&bytes);
        }
    }
}
