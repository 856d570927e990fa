//! Repacking: copies what is used out of packs that are mostly not, so that these can be deleted.
//!
//! ```text
//!  R1 announce a session            R4 copy the used blobs of chosen packs into new packs
//!  R2 read tombstones               R5 write an index segment that names the copies
//!  R3 mark; choose packs            R6 commit: relocations/<sid>, old place -> new place
//! ```
//! A repacking is a writer like any other: whoever collects garbage meanwhile waits for it, so its new
//! packs are safe until its relocations count for them, and it can be declared dead. Nothing is
//! deleted here. Once the relocations are published, nothing needs the old packs any more, and the
//! next garbage collection treats them as it treats any dead pack: a backup that was announced
//! before, and has come to refer to a blob that was not copied, keeps the pack alive.
//!
//! Blobs are not compressed or hashed again: they are authentic, and what they were sealed as is sealed
//! anew under the key of their new pack.
//!
//! Memory: one open pack, one read, and 100 bytes a copied blob, of which there is a most.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::IoSlice;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use objects::Created;
use serde::Serialize;

use super::mark::Mark;
use super::plan::PackFact;
use super::{Bytes, facts};
use crate::error::{Error, ErrorKind, Result, chain};
use crate::id::{BlobId, PackId, SnapshotId};
use crate::index::{Record, SegmentWriter};
use crate::limits::{CHUNK_BYTES_MAX, SEGMENT_RECORDS_MAX};
use crate::pack::{Location, Pack, PackBuilder, PackClass, TableEntry};
use crate::record::{self, Session};
use crate::relocation::{self, Moved, Relocations};
use crate::repository::Repository;
use crate::session::Announced;

/// How much is repacked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RepackSettings {
    /// Unused bytes that may stay, in percent of all bytes of packs in use.
    pub max_unused_percent: f64,
    /// Most bytes copied in one run.
    pub max_bytes: u64,
    /// Size at which a new pack is closed.
    pub pack_target_bytes: usize,
}

impl Default for RepackSettings {
    fn default() -> Self {
        Self { max_unused_percent: 5.0, max_bytes: u64::MAX, pack_target_bytes: 16 << 20 }
    }
}

/// What a repacking did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct RepackReport {
    /// Bytes of unused blobs in packs that are in use.
    pub unused_bytes: u64,
    /// Packs emptied, or in a dry run to be emptied.
    pub packs: u64,
    /// Their size.
    pub bytes: u64,
    /// Blobs copied.
    pub blobs_copied: u64,
    /// Bytes copied.
    pub bytes_copied: u64,
    /// Packs that could not be read and stay as they are, and why.
    pub damaged: Vec<String>,
}

impl std::fmt::Display for RepackReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { packs, blobs_copied, .. } = self;
        write!(f, "repacked   {packs} packs ({}): ", Bytes(self.bytes))?;
        write!(f, "{blobs_copied} blobs ({}) copied; ", Bytes(self.bytes_copied))?;
        write!(f, "{} were unused in packs in use", Bytes(self.unused_bytes))
    }
}

/// Most blobs copied in one run, which bounds its memory to 20 MB: 200 GiB of chunks.
const BLOBS_MAX: usize = 200_000;

/// Tables read at once: a read is mostly waiting.
const TABLE_READERS: usize = 8;

/// Relocation objects beyond which they are merged.
const OBJECTS_MAX: usize = 8;

/// Relocated packs named in one merged object: 1.5 MB.
const MERGED_PACKS_MAX: usize = 10_000;

/// How often the session is renewed.
const HEARTBEAT: Duration = Duration::from_secs(60);

/// A pack of which some blobs are used.
struct Candidate {
    fact: PackFact,
    used: u128,
    used_bytes: u64,
    unused_bytes: u64,
}

/// Repacks what the settings ask for. `mark` is brought up to date.
///
/// # Errors
/// Those of marking and of the store, and `Fenced`. A pack that cannot be read is left alone.
pub(super) fn repack(
    repository: &Repository,
    settings: &RepackSettings,
    session: Session,
    dry_run: bool,
    mark: &mut Mark,
    progress: &dyn Fn(&str),
) -> Result<RepackReport> {
    if dry_run {
        mark.refresh(repository)?;
        let packs = facts::packs(repository, std::time::UNIX_EPOCH)?;
        let mut report = RepackReport::default();
        choose(repository, settings, packs, mark, &mut report)?;
        return Ok(report);
    }
    let session = Announced::begin(repository, session)?;
    let mut report = RepackReport::default();
    let done = run(repository, settings, &session, mark, progress, &mut report);
    match &done {
        // Nothing was published, and nothing will be.
        Err(_) | Ok(None) => session.end(repository),
        Ok(Some(committed)) => session.end_after(repository, committed),
    }
    match done? {
        Some(Err(error)) => Err(error),
        Some(Ok(())) | None => Ok(report),
    }
}

/// `None` if there was nothing to do; else how the commit ended.
fn run(
    repository: &Repository,
    settings: &RepackSettings,
    session: &Announced,
    mark: &mut Mark,
    progress: &dyn Fn(&str),
    report: &mut RepackReport,
) -> Result<Option<Result<()>>> {
    let tombstoned: BTreeSet<PackId> = facts::generations(repository)?
        .begun
        .iter()
        .flat_map(|generation| generation.tombstones.all().copied())
        .collect();
    progress("marking what snapshots use");
    mark.refresh(repository)?;
    let mut packs = facts::packs(repository, session.renewed())?;
    packs.retain(|pack| !tombstoned.contains(&pack.id));
    progress("looking for packs that are mostly unused");
    let chosen = choose(repository, settings, packs, mark, report)?;
    if chosen.is_empty() {
        return Ok(None);
    }
    let bytes = chosen.iter().map(|one| one.used_bytes).sum();
    progress(&format!("repacking {} packs: copying {}", chosen.len(), Bytes(bytes)));
    let mut copier = Copier::new(repository, settings, session);
    for candidate in &chosen {
        copier.empty(candidate, report)?;
    }
    let moved = copier.finish()?;
    if moved.is_empty() {
        return Ok(None);
    }
    let name = record::relocation_name(session.id);
    let object = relocation::Record::Moved(moved).seal(repository.keys(), session.id)?;
    Ok(Some(session.commit(repository, &name, &object)))
}

/// The packs to be emptied: those with most waste first, until the rest is tolerable.
fn choose(
    repository: &Repository,
    settings: &RepackSettings,
    packs: Vec<PackFact>,
    mark: &Mark,
    report: &mut RepackReport,
) -> Result<Vec<Candidate>> {
    let partly = packs.into_iter().filter_map(|fact| {
        let used = mark.used(fact.class, fact.id);
        (used != 0).then_some((fact, used))
    });
    let mut candidates = read_tables(repository, &partly.collect::<Vec<_>>(), report)?;
    let used: u64 = candidates.iter().map(|one| one.used_bytes).sum();
    let mut unused: u64 = candidates.iter().map(|one| one.unused_bytes).sum();
    report.unused_bytes = unused;
    // Of all that is there afterwards, not of what is used.
    let percent = settings.max_unused_percent.clamp(0.0, 99.0);
    let tolerable = (used as f64 * percent / (100.0 - percent)) as u64;
    candidates.retain(|one| one.unused_bytes > 0);
    let waste = |one: &Candidate| one.unused_bytes as f64 / one.used_bytes.max(1) as f64;
    candidates.sort_by(|a, b| waste(b).total_cmp(&waste(a)).then(a.fact.id.cmp(&b.fact.id)));
    let (mut bytes, mut blobs) = (0, 0);
    let mut chosen = Vec::new();
    for one in candidates {
        let count = one.used.count_ones() as usize;
        if unused <= tolerable
            || bytes + one.used_bytes > settings.max_bytes
            || blobs + count > BLOBS_MAX
        {
            break;
        }
        (bytes, blobs) = (bytes + one.used_bytes, blobs + count);
        unused -= one.unused_bytes;
        report.packs += 1;
        report.bytes += one.fact.size;
        chosen.push(one);
    }
    // Blobs that were written together, and so belong together, stay so.
    chosen.sort_by_key(|one| (one.fact.class, std::cmp::Reverse(one.fact.age), one.fact.id));
    Ok(chosen)
}

/// Weighs packs by their tables.
fn read_tables(
    repository: &Repository,
    packs: &[(PackFact, u128)],
    report: &mut RepackReport,
) -> Result<Vec<Candidate>> {
    let next = AtomicUsize::new(0);
    let found = Mutex::new((Vec::with_capacity(packs.len()), Vec::new()));
    let work = || -> Result<()> {
        while let Some((fact, used)) = packs.get(next.fetch_add(1, Ordering::Relaxed)).copied() {
            let (store, keys) = (repository.store(), repository.keys());
            let weighed = match Pack::open(store, keys, fact.class, fact.id) {
                Ok(pack) => Ok(weigh(fact, used, pack.table())),
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) if error.kind() == ErrorKind::Corrupt => Err(chain(&error)),
                Err(error) => return Err(error),
            };
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            match weighed {
                Ok(candidate) => found.0.push(candidate),
                Err(why) => found.1.push(why),
            }
        }
        Ok(())
    };
    if packs.len() < 2 * TABLE_READERS {
        work()?;
    } else {
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..TABLE_READERS).map(|_| scope.spawn(work)).collect();
            readers.into_iter().try_for_each(|reader| {
                let panicked = || Error::new(ErrorKind::Store, "a reader panicked");
                reader.join().unwrap_or_else(|_| Err(panicked()))
            })
        })?;
    }
    let (candidates, damaged) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.damaged.extend(damaged);
    Ok(candidates)
}

fn weigh(fact: PackFact, used: u128, table: &[TableEntry]) -> Candidate {
    let (mut used_bytes, mut unused_bytes) = (0, 0);
    for (ordinal, entry) in table.iter().enumerate() {
        let bytes = if used >> ordinal & 1 == 1 { &mut used_bytes } else { &mut unused_bytes };
        *bytes += u64::from(entry.stored_len);
    }
    Candidate { fact, used, used_bytes, unused_bytes }
}

/// Copies blobs into new packs.
struct Copier<'a> {
    repository: &'a Repository,
    settings: &'a RepackSettings,
    session: &'a Announced,
    renewed: Instant,
    open: Option<(PackClass, PackBuilder)>,
    spare: Vec<u8>,
    sealed: Vec<u8>,
    /// Copies made, so that a blob stored twice is copied once.
    copies: HashMap<BlobId, Location>,
    /// Records of copies in packs that are durable, for the index.
    records: Vec<Record>,
    moved: BTreeMap<PackId, Moved>,
}

impl<'a> Copier<'a> {
    fn new(
        repository: &'a Repository,
        settings: &'a RepackSettings,
        session: &'a Announced,
    ) -> Self {
        Self {
            repository,
            settings,
            session,
            renewed: Instant::now(),
            open: None,
            spare: Vec::new(),
            sealed: Vec::new(),
            copies: HashMap::new(),
            records: Vec::new(),
            moved: BTreeMap::new(),
        }
    }

    /// Copies the used blobs of a pack. One that cannot be read is left as it is.
    fn empty(&mut self, candidate: &Candidate, report: &mut RepackReport) -> Result<()> {
        let PackFact { class, id, .. } = candidate.fact;
        let mut places = Vec::new();
        match self.copy(candidate, &mut places, report) {
            Ok(()) => {
                self.moved.insert(id, Moved { class, places });
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                report.damaged.push(chain(&error));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn copy(
        &mut self,
        candidate: &Candidate,
        places: &mut Vec<(u8, Location)>,
        report: &mut RepackReport,
    ) -> Result<()> {
        let (store, keys) = (self.repository.store(), self.repository.keys());
        let PackFact { class, id, .. } = candidate.fact;
        let pack = Pack::open(store, keys, class, id)?;
        let wanted: Vec<(u8, TableEntry)> = (0_u8..)
            .zip(pack.table().iter().copied())
            .filter(|(ordinal, _)| candidate.used >> ordinal & 1 == 1)
            .collect();
        let cost = store.read_cost();
        // Neighbours are read at once.
        let mut rest = &wanted[..];
        while let Some((_, first)) = rest.first() {
            let from = first.offset;
            let mut end = from + first.stored_len;
            let follow = rest[1..].iter().take_while(|(_, entry)| {
                let near = entry.offset - end <= cost.gap_bytes;
                let until = entry.offset + entry.stored_len;
                let fits = near && until - from <= cost.read_bytes;
                end = if fits { until } else { end };
                fits
            });
            let (run, more) = rest.split_at(1 + follow.count());
            rest = more;
            let mut sealed = std::mem::take(&mut self.sealed);
            sealed.resize((end - from) as usize, 0);
            store.read_at(pack.name(), u64::from(from), &mut sealed)?;
            for (ordinal, entry) in run {
                let at = (entry.offset - from) as usize;
                let stored =
                    pack.open_stored(*ordinal, &mut sealed[at..at + entry.stored_len as usize])?;
                let copy = match self.copies.get(&entry.id) {
                    Some(copy) => *copy,
                    None => {
                        report.blobs_copied += 1;
                        report.bytes_copied += u64::from(entry.stored_len);
                        self.push(class, entry, stored)?
                    }
                };
                places.push((*ordinal, copy));
            }
            self.sealed = sealed;
        }
        Ok(())
    }

    fn push(&mut self, class: PackClass, entry: &TableEntry, stored: &[u8]) -> Result<Location> {
        let most = self.settings.pack_target_bytes + CHUNK_BYTES_MAX;
        let fits = |open: &(PackClass, PackBuilder)| {
            open.0 == class && !open.1.is_full() && open.1.len() + stored.len() <= most
        };
        if !self.open.as_ref().is_some_and(fits) {
            self.close()?;
        }
        let (_, pack) = match &mut self.open {
            Some(open) => open,
            none => {
                let buffer = std::mem::take(&mut self.spare);
                none.insert((class, PackBuilder::new(self.repository.keys(), class, buffer)))
            }
        };
        let TableEntry { id, kind, compression, plain_len, .. } = *entry;
        let copy = pack.push(id, kind, compression, stored, plain_len as usize);
        let is_full = pack.len() >= self.settings.pack_target_bytes;
        self.copies.insert(id, copy);
        if is_full {
            self.close()?;
        }
        Ok(copy)
    }

    fn close(&mut self) -> Result<()> {
        let Some((class, pack)) = self.open.take() else {
            return Ok(());
        };
        let pack = pack.finish();
        let name = class.object_name(pack.id);
        let store = self.repository.store();
        match store.create(&name, &[IoSlice::new(&pack.buffer)])? {
            Created::New => {}
            Created::AlreadyExists => return Err(Error::corrupt(name, "a random name was taken")),
        }
        if class == PackClass::Data {
            let numbered = (0_u8..).zip(&pack.entries);
            self.records.extend(numbered.map(|(ordinal, entry)| {
                Record::new(&entry.id, Location { pack: pack.id, ordinal })
            }));
            if self.records.len() + 128 > SEGMENT_RECORDS_MAX {
                self.write_segment()?;
            }
        }
        self.spare = pack.buffer;
        if self.renewed.elapsed() > HEARTBEAT {
            self.session.renew(self.repository, store.clock())?;
            self.renewed = Instant::now();
        }
        Ok(())
    }

    fn write_segment(&mut self) -> Result<()> {
        let mut records = std::mem::take(&mut self.records);
        records.sort_unstable();
        let mut segment = SegmentWriter::new(self.repository.keys(), records.len(), Vec::new());
        records.iter().for_each(|record| segment.push(record));
        segment.finish(self.repository.store()).map(drop)
    }

    fn finish(mut self) -> Result<BTreeMap<PackId, Moved>> {
        self.close()?;
        if !self.records.is_empty() {
            self.write_segment()?;
        }
        Ok(self.moved)
    }
}

/// Takes the packs in `retired` out of the relocations, and merges relocation objects when they are
/// many.
///
/// The merged object is there before those it replaces are deleted, and what two of them say is right
/// twice. Objects of `announced` sessions stay: they are what decides those.
pub(super) fn merge_relocations(
    repository: &Repository,
    retired: &BTreeSet<PackId>,
    announced: &[SnapshotId],
    delete: &dyn Fn(&[String]) -> Result<()>,
) -> Result<()> {
    let (store, keys) = (repository.store(), repository.keys());
    let mut ids = relocation::list(store)?;
    ids.retain(|id| !announced.contains(id));
    if ids.is_empty() || (retired.is_empty() && ids.len() <= OBJECTS_MAX) {
        return Ok(());
    }
    let mut all = Relocations::default();
    for id in ids {
        match relocation::Record::read(store, keys, id) {
            Ok(relocation::Record::Moved(packs)) => all.add(id, packs),
            Ok(relocation::Record::Fenced) => {}
            // Another prune has merged it.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    // Listed after the objects were read, which name no pack that was not durable before: what is missing
    // was deleted, and no session counts on it. While it is there, one may count on it alone.
    let mut present: BTreeSet<PackId> = BTreeSet::new();
    if all.packs().any(|(_, moved)| moved.places.iter().any(|(_, copy)| all.contains(copy.pack))) {
        present.extend(facts::packs(repository, std::time::UNIX_EPOCH)?.iter().map(|pack| pack.id));
        all.shorten(&|pack| !present.contains(&pack));
    }
    let old: Vec<String> = all.objects().iter().map(|id| record::relocation_name(*id)).collect();
    let kept = all.packs().filter(|(pack, _)| !retired.contains(pack));
    let kept: Vec<_> = kept.map(|(pack, moved)| (*pack, moved.clone())).collect();
    for packs in kept.chunks(MERGED_PACKS_MAX) {
        let merged = relocation::Record::Moved(packs.iter().cloned().collect());
        match merged.create(store, keys, SnapshotId::random())? {
            Created::New => {}
            Created::AlreadyExists => {
                return Err(Error::corrupt(record::RELOCATIONS, "a random name was taken"));
            }
        }
    }
    delete(&old)
}
