//! Rebuilds the index from the tables of the packs.

use std::collections::HashSet;
use std::fmt;

use serde::Serialize;

use super::finding::{Finding, FindingKind, Severity};
use crate::error::{ErrorKind, Result, chain};
use crate::gc::is_quiet;
use crate::id::{GenerationId, PackId, SegmentId};
use crate::index::{FOLDER, Record, Segment, SegmentWriter, list_segments};
use crate::limits::SEGMENT_RECORDS_MAX;
use crate::pack::{Location, Pack, PackClass};
use crate::record;
use crate::repository::Repository;

/// What a repair of the index did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RepairSummary {
    /// Packs in the new index.
    pub packs: u64,
    /// Packs that were left out because their table cannot be read.
    pub packs_damaged: u64,
    /// Records of the new index.
    pub records: u64,
    /// Segments written.
    pub segments_written: usize,
    /// Old segments deleted.
    pub segments_deleted: usize,
    /// Old segments left to running backups; the next prune merges them.
    pub segments_left: usize,
}

impl fmt::Display for RepairSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { packs, packs_damaged, records, segments_written, segments_deleted, .. } = self;
        write!(f, "wrote {segments_written} segments with {records} records of {packs} packs")?;
        write!(f, ", deleted {segments_deleted} old ones")?;
        if self.segments_left > 0 {
            write!(f, ", left {} to running backups", self.segments_left)?;
        }
        if *packs_damaged > 0 { write!(f, "; {packs_damaged} packs are damaged") } else { Ok(()) }
    }
}

/// Writes a new index of all data packs and deletes the old one. Backups may run meanwhile.
///
/// # Errors
/// When the store cannot be listed or written; the old index is untouched then. When it cannot be
/// read which packs are about to be deleted.
pub fn repair_index(
    repository: &Repository,
    report: &mut dyn FnMut(Finding),
    progress: &dyn Fn(&str),
) -> Result<RepairSummary> {
    let store = repository.store();
    // In this order: every pack that an old segment names is in the listing of packs, unless it was
    // deleted; and if no session is announced after that, none of the segments belongs to one. A
    // session reads its own segments again before it commits, so those of a running one must stay.
    let old = list_segments(store)?;
    let mut packs = Vec::new();
    store.list(PackClass::Data.folder(), &mut |meta| {
        packs.extend(meta.key.rsplit('/').next().and_then(|name| name.parse::<PackId>().ok()));
        Ok(())
    })?;
    let is_quiet = is_quiet(repository)?;
    let buried = buried(repository)?;
    packs.retain(|pack| !buried.contains(pack));
    progress("reading the tables of all packs");
    let mut build =
        Build { repository, old: &old, batch: Vec::new(), summary: RepairSummary::default() };
    for id in packs {
        match Pack::open(store, repository.keys(), PackClass::Data, id) {
            Ok(pack) => build.push(&pack)?,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                build.summary.packs_damaged += 1;
                let name = PackClass::Data.object_name(id);
                let kind = FindingKind::Pack;
                report(Finding::new(Severity::Error, kind, name, chain(&error)));
            }
            Err(error) => return Err(error),
        }
    }
    build.write(true)?;
    let mut summary = build.summary;
    progress("deleting the old index");
    for id in &old {
        if is_quiet || is_damaged(repository, *id)? {
            store.delete(&format!("{FOLDER}{id}"))?;
            summary.segments_deleted += 1;
        } else {
            summary.segments_left += 1;
        }
    }
    Ok(summary)
}

/// Whether a session that owns the segment could not use it either.
fn is_damaged(repository: &Repository, id: SegmentId) -> Result<bool> {
    let store = repository.store();
    let read = Segment::open(store, repository.keys(), id).and_then(|segment| {
        segment.for_each(store, &mut |_| Ok(()))?;
        segment.verify_filter(store)
    });
    match read {
        Ok(()) => Ok(false),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == ErrorKind::Corrupt => Ok(true),
        Err(error) => Err(error),
    }
}

fn buried(repository: &Repository) -> Result<HashSet<PackId>> {
    let mut buried = HashSet::new();
    for id in repository.list_ids(record::TOMBSTONES)? {
        let id = GenerationId(id.0);
        match record::read_tombstones(repository.store(), repository.keys(), id) {
            Ok(tombstones) => buried.extend(tombstones.data),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(buried)
}

/// Collects records: one segment of them in memory.
struct Build<'a> {
    repository: &'a Repository,
    old: &'a [SegmentId],
    batch: Vec<Record>,
    summary: RepairSummary,
}

impl Build<'_> {
    fn push(&mut self, pack: &Pack) -> Result<()> {
        if self.batch.len() + pack.table().len() > SEGMENT_RECORDS_MAX {
            self.write(false)?;
        }
        self.summary.packs += 1;
        for (ordinal, entry) in pack.table().iter().enumerate() {
            let location = Location { pack: pack.id, ordinal: ordinal as u8 };
            self.batch.push(Record::new(&entry.id, location));
        }
        Ok(())
    }

    /// Stores the batch. Only the last segment says what it replaces: until it is there, the old ones
    /// stay valid.
    fn write(&mut self, is_last: bool) -> Result<()> {
        self.batch.sort_unstable();
        let supersedes = if is_last { self.old.to_vec() } else { Vec::new() };
        let keys = self.repository.keys();
        let mut writer = SegmentWriter::new(keys, self.batch.len(), supersedes);
        self.batch.iter().for_each(|record| writer.push(record));
        let written = writer.finish(self.repository.store())?;
        self.summary.segments_written += usize::from(written.is_some());
        self.summary.records += self.batch.len() as u64;
        self.batch.clear();
        Ok(())
    }
}
