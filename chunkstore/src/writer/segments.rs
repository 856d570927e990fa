//! Index segments of a session: from receipts of durable packs.

use std::sync::PoisonError;

use super::{Shared, lock};
use crate::error::{ErrorKind, Result};
use crate::id::BlobId;
use crate::index::{self, Record, Segment, SegmentWriter};
use crate::pack::{Location, PackClass, SealedPack};

/// A pack that the store has acknowledged: the only thing a segment can be made from.
pub(super) struct DurablePack {
    records: Vec<Record>,
    ids: Vec<BlobId>,
}

impl Shared {
    /// Takes a receipt for a pack, and flushes a segment when enough have come together: a crash
    /// loses knowledge of four packs, or of 5 % of a long session.
    pub(super) fn note_durable(&self, pack: &SealedPack, packs: u64) -> Result<()> {
        if pack.class == PackClass::Meta {
            return Ok(());
        }
        let place = |ordinal: usize| Location { pack: pack.id, ordinal: ordinal as u8 };
        let numbered = || pack.entries.iter().enumerate();
        let receipt = DurablePack {
            records: numbered().map(|(at, entry)| Record::new(&entry.id, place(at))).collect(),
            ids: numbered().map(|(_, entry)| entry.id).collect(),
        };
        let due = {
            let mut unflushed = lock(&self.unflushed);
            unflushed.push(receipt);
            let enough = (packs / 20).clamp(4, 512);
            (unflushed.len() as u64 >= enough).then(|| std::mem::take(&mut *unflushed))
        };
        due.map_or(Ok(()), |packs| self.flush(packs))
    }

    /// Writes what is left of the receipts.
    pub(super) fn flush_rest(&self) -> Result<()> {
        let packs = std::mem::take(&mut *lock(&self.unflushed));
        self.flush(packs)
    }

    fn flush(&self, packs: Vec<DurablePack>) -> Result<()> {
        if packs.is_empty() {
            return Ok(());
        }
        let (store, keys) = (self.repository.store(), self.repository.keys());
        let mut records: Vec<_> = packs.iter().flat_map(|pack| &pack.records).collect();
        records.sort_unstable();
        let mut segment = SegmentWriter::new(keys, records.len(), Vec::new());
        records.into_iter().for_each(|record| segment.push(record));
        if let Some(id) = segment.finish(store)? {
            let segment = Segment::open(store, keys, id)?;
            let mut own = self.own.write().unwrap_or_else(PoisonError::into_inner);
            own.add(store, segment);
            drop(own);
            lock(&self.own_segments).push(id);
        }
        let mut fresh = lock(&self.fresh);
        for id in packs.iter().flat_map(|pack| &pack.ids) {
            fresh.remove(id);
        }
        Ok(())
    }

    /// Replaces the segments of this session by few: readers open every segment there is.
    pub(super) fn consolidate_segments(&self) -> Result<()> {
        let old = std::mem::take(&mut *lock(&self.own_segments));
        if old.len() < 2 {
            return Ok(());
        }
        let (store, keys) = (self.repository.store(), self.repository.keys());
        let own = self.own.read().unwrap_or_else(PoisonError::into_inner);
        let segments: Vec<_> = own.segments().iter().collect();
        match index::merge(store, keys, &segments, &|_| true) {
            // Somebody else has merged and deleted them already.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            merged => merged?,
        };
        let names: Vec<String> = segments.iter().map(|one| one.name().to_owned()).collect();
        // What is left says the same once more, and goes with the next prune. A key may have no right
        // to delete, and a snapshot is not to fail for that.
        let _left = store.delete_all(&names);
        Ok(())
    }
}
