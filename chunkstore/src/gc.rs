//! Garbage collection: deletes packs that no snapshot uses, while backups go on, without locks.
//!
//! ```text
//!  writer                                     prune
//!  W1 create sessions/<sid>                   P1 mark what snapshots use; list packs
//!  W2 read all tombstones/*                   P2 create tombstones/<gen>: the unused packs
//!  W3 open index, list packs; from now on     P3 list sessions; create waits/<gen> with them
//!     use no pack that is tombstoned          P4 wait until each of them is decided (see below)
//!     or not listed                           P5 mark again; create doomed/<gen>: what is unused
//!  W4 write packs, segments                   P6 see that tombstones/<gen> is still there
//!  W5 create snapshots/<sid>: the commit      P7 index without doomed packs; delete doomed packs
//!  W6 delete sessions/<sid>                   P8 delete waits/, tombstones/, doomed/<gen>
//! ```
//! P1 to P3 and P4 to P8 may be two runs of prune, or two processes, or the second may fail at any
//! place and be done over: every step can be repeated. With no session announced, one run does all.
//!
//! A session is *decided* when it can commit no more: `snapshots/<sid>` exists (its own snapshot, or
//! the mark that it was fenced), its snapshot was forgotten, or its announcement is gone, which it
//! removes only after it ended. A session that has given no sign of life for longer than the grace is
//! fenced: prune creates `snapshots/<sid>` itself. Whoever creates that object first wins, so a writer
//! that was only slow fails to commit and runs again.
//!
//! # Safety
//! *No listed snapshot refers to a deleted pack.* Let prune delete pack p of generation g, and let a
//! session S commit a snapshot that refers to p, and is not forgotten.
//! - If W1 of S came after P2 of g, S read its tombstones at W2, unless g was finished by then. In the
//!   first case it does not use p. In the second p was deleted before (P7 is before P8) and W3 does
//!   not list it; or p was not doomed, and it is not g that deletes it.
//! - If W1 came before P2, S is in the listing of P3, unless it had ended. Either way it was decided
//!   when P4 was done, so its snapshot, if any, was there for the mark of P5, and p is not doomed.
//!
//! *Several prunes at once* take the same decision, because `doomed/<gen>` is created if absent and
//! everyone follows what it says. It is deleted last, after the tombstones, and whoever has read or
//! created it then looks for the tombstones (P6): as generations have random names, finding them
//! proves that no earlier decision existed and was deleted. Without this, a slow prune could doom
//! anew what a fast one had spared, if its snapshot was forgotten in between, when new sessions use
//! it already. Any decision taken after P4 is right: what refers to the packs of g only gets less
//! while its tombstones stand.
//! *A lost answer* or a crash leaves objects that the next prune takes up, or that stand without
//! tombstones and are removed.
//!
//! *Marking all or nothing*: a snapshot or interior node that cannot be read ends the run before
//! anything is deleted, unless the snapshot is forgotten.
//!
//! # Clocks
//! No clock decides what is deleted. The grace is measured by the store's clock, and only decides when
//! a session is declared dead, which costs that session its work, never a snapshot. Marks that a
//! snapshot is forgotten or a session fenced are removed when they are 30 days old; a session that was
//! fenced and then stopped for that long must not try to commit after all.
//!
//! # Memory
//! 50 bytes a pack and again 50 for each used one, and 16 bytes an interior node over all snapshots.

mod facts;
mod mark;
mod plan;
mod repack;
mod segments;
mod stats;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, SystemTime};

use objects::Created;
use serde::Serialize;

pub use plan::{ClassPlan, PrunePlan, SessionFact};
pub use repack::{RepackReport, RepackSettings};
pub use stats::{ClassStats, Stats, stats};

use crate::codec::seal::ObjectKind;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{GenerationId, PackId, SnapshotId};
use crate::pack::PackClass;
use crate::record::{self, Session, Tombstones, Verdict, Waits};
use crate::relocation;
use crate::repository::{Register, Repository};
use crate::session::{Announced, FENCE_WAIT};
use mark::Mark;
use plan::{Facts, PackFact};

pub(crate) use segments::is_quiet;

/// Age at which marks on forgotten snapshots and fenced sessions are removed.
const MARKS_KEPT: Duration = Duration::from_secs(30 * 86_400);

/// Objects deleted in one request.
const DELETE_BATCH: usize = 1000;

/// Age at which writes that never ended are removed.
const UNFINISHED_KEPT: Duration = Duration::from_secs(86_400);

/// How a garbage collection is done.
#[derive(Debug, Clone)]
pub struct PruneSettings {
    /// How long a session may give no sign of life before it is declared dead. Sessions give one a
    /// minute.
    pub grace: Duration,
    /// Only plan: nothing is written.
    pub dry_run: bool,
    /// Machine and process, for people.
    pub writer: String,
    /// Whether, and how much, packs that are only partly used are repacked before.
    pub repack: Option<RepackSettings>,
}

impl Default for PruneSettings {
    fn default() -> Self {
        let grace = Duration::from_secs(1800);
        Self { grace, dry_run: false, writer: String::new(), repack: None }
    }
}

/// Packs that cannot be deleted yet.
#[derive(Debug, Clone, Serialize)]
pub struct Waiting {
    /// The garbage collection they belong to.
    pub generation: GenerationId,
    /// How many.
    pub packs: u64,
    /// Their size.
    pub bytes: u64,
    /// Sessions that must end first.
    pub sessions: Vec<SessionFact>,
}

/// What a garbage collection did.
#[derive(Debug, Clone, Serialize)]
pub struct PruneReport {
    /// What was planned.
    pub plan: PrunePlan,
    /// What was repacked, if it was asked for.
    pub repacked: Option<RepackReport>,
    /// Whether that was all.
    pub dry_run: bool,
    /// Packs deleted.
    pub packs_deleted: u64,
    /// Their size.
    pub bytes_deleted: u64,
    /// Tombstoned packs that a snapshot turned out to use.
    pub packs_rescued: u64,
    /// Index segments written.
    pub segments_written: usize,
    /// Index segments deleted.
    pub segments_deleted: usize,
    /// Objects of forgotten snapshots deleted.
    pub snapshots_deleted: usize,
    /// Sessions declared dead.
    pub fenced: Vec<SessionFact>,
    /// What is left for a later run, and for whom it waits.
    pub waiting: Vec<Waiting>,
    /// Index segments that cannot be read, and why.
    pub damaged_segments: Vec<String>,
}

/// Deletes what no snapshot uses, as far as no running backup may need it.
///
/// # Errors
/// When not everything that snapshots use can be found out; nothing is deleted then. Those of the
/// store: run again, it goes on where it stopped.
pub fn prune(
    repository: &Repository,
    settings: &PruneSettings,
    now: jiff::Timestamp,
    progress: &dyn Fn(&str),
) -> Result<PruneReport> {
    let announcement = |purpose: &str| Session {
        purpose: purpose.to_owned(),
        writer: settings.writer.clone(),
        started: now,
        heartbeat: 0,
    };
    let mut mark = Mark::default();
    let repacked = settings.repack.map(|repack| {
        let session = announcement(record::REPACK);
        repack::repack(repository, &repack, session, settings.dry_run, &mut mark, progress)
    });
    let repacked = repacked.transpose()?;
    if settings.dry_run {
        let store_now = SystemTime::try_from(now).unwrap_or(SystemTime::UNIX_EPOCH);
        let run = Run { repository, settings, now, store_now, progress, session: None };
        let begun = run.plan(mark)?;
        return Ok(PruneReport { repacked, ..begun.report });
    }
    let session = Announced::begin(repository, announcement(record::PRUNE))?;
    // What the store says about an object written just now is its time.
    let store_now = session.renewed();
    let session = Some(&session);
    let run = Run { repository, settings, now, store_now, progress, session };
    let result = run.run(mark).map(|report| PruneReport { repacked, ..report });
    // If that fails, a later run finds it silent and removes it.
    session.inspect(|session| session.end(repository));
    result
}

struct Run<'a> {
    repository: &'a Repository,
    settings: &'a PruneSettings,
    now: jiff::Timestamp,
    store_now: SystemTime,
    progress: &'a dyn Fn(&str),
    /// None in a dry run.
    session: Option<&'a Announced>,
}

/// A run whose plan is made.
struct Begun {
    mark: Mark,
    packs: Vec<PackFact>,
    generations: BTreeMap<GenerationId, Tombstones>,
    orphans: Vec<String>,
    report: PruneReport,
}

/// A generation whose packs may be deleted now.
struct Ready {
    id: GenerationId,
    doomed: Tombstones,
}

impl Run<'_> {
    fn plan(&self, mut mark: Mark) -> Result<Begun> {
        let Self { repository, settings, .. } = *self;
        (self.progress)("looking for packs");
        // The order spares work, it is not needed for safety: a session that ends before the mark
        // counts there, and one that is still announced has its packs recognised as young.
        let found = facts::generations(repository)?;
        let packs = facts::packs(repository, self.store_now)?;
        let mut sessions = facts::sessions(repository, self.store_now)?;
        sessions.retain(|session| session.purpose != record::PRUNE);
        (self.progress)("marking what snapshots use");
        mark.refresh(repository)?;
        let plan = plan::plan(
            Facts {
                packs: &packs,
                used: &|class, pack| mark.used(class, pack),
                sessions,
                generations: &found.begun,
                unreferred: &mark.unreferred(),
                snapshots: mark.snapshots.len(),
                forgotten: mark.forgotten.len(),
            },
            settings,
            self.now,
        );
        let report = PruneReport {
            plan,
            repacked: None,
            dry_run: settings.dry_run,
            packs_deleted: 0,
            bytes_deleted: 0,
            packs_rescued: 0,
            segments_written: 0,
            segments_deleted: 0,
            snapshots_deleted: 0,
            fenced: Vec::new(),
            waiting: Vec::new(),
            damaged_segments: Vec::new(),
        };
        let begun = found.begun.into_iter();
        let generations = begun.map(|begun| (begun.id, begun.tombstones)).collect();
        Ok(Begun { mark, packs, generations, orphans: found.orphans, report })
    }

    fn run(&self, mark: Mark) -> Result<PruneReport> {
        let mut begun = self.plan(mark)?;
        self.delete(&std::mem::take(&mut begun.orphans))?;
        self.publish(&mut begun)?;
        let undecided = self.wait(&mut begun)?;
        let ready = self.decide(&mut begun, &undecided)?;
        self.sweep(&mut begun, &ready)?;
        self.delete_snapshots(&mut begun)?;
        self.delete_marks(&begun)?;
        Ok(begun.report)
    }

    /// Makes sure that it is this run's turn to delete, and returns the date for its requests. With
    /// create-if-absent it always is; see the module.
    fn turn(&self) -> Result<SystemTime> {
        let date = self.repository.store().clock();
        let Some(session) = self.session else {
            return Err(Error::invalid("a dry run deletes nothing"));
        };
        if self.repository.register() == Register::CreateIfAbsent {
            return Ok(date);
        }
        session.renew(self.repository, date)?;
        let now = session.renewed();
        for (id, silent) in facts::ages(self.repository, record::SESSIONS, now)? {
            if id == session.id || silent > FENCE_WAIT {
                continue;
            }
            let other = facts::session(self.repository, id, silent, now)?;
            if let Some(other) = other.filter(|other| other.purpose == record::PRUNE) {
                let message = format!(
                    "there is another {other}; on a store without create-if-absent only one prune can \
                     work at a time: run again when it has ended, or {} minutes after it has died",
                    FENCE_WAIT.as_secs() / 60
                );
                return Err(Error::new(ErrorKind::Store, message));
            }
        }
        Ok(date)
    }

    fn delete(&self, names: &[String]) -> Result<()> {
        for names in names.chunks(DELETE_BATCH) {
            let date = self.turn()?;
            self.repository.store().delete_dated(names, date)?;
        }
        Ok(())
    }

    /// P2.
    fn publish(&self, begun: &mut Begun) -> Result<()> {
        let tombstones = begun.report.plan.tombstones.clone();
        if tombstones.is_empty() {
            return Ok(());
        }
        self.turn()?;
        let id = GenerationId::random();
        let (store, keys) = (self.repository.store(), self.repository.keys());
        match record::create_tombstones(store, keys, id, &tombstones)? {
            Created::New => drop(begun.generations.insert(id, tombstones)),
            Created::AlreadyExists => {
                return Err(Error::corrupt(record::tombstones_name(id), "a random name was taken"));
            }
        }
        Ok(())
    }

    /// P3 and P4: the undecided sessions of every generation that has any.
    fn wait(&self, begun: &mut Begun) -> Result<BTreeMap<GenerationId, Vec<SessionFact>>> {
        let mut waits = BTreeMap::new();
        for id in begun.generations.keys() {
            waits.insert(*id, self.waits(*id)?);
        }
        let mut sessions: BTreeSet<_> = waits.values().flatten().copied().collect();
        // Nobody waits for these, but their announcements have to go in time.
        let over = |session: &&SessionFact| {
            session.decided || Duration::from_secs(session.silent_secs) > self.settings.grace
        };
        sessions.extend(begun.report.plan.sessions.iter().filter(over).map(|session| session.id));
        let mut pending = BTreeMap::new();
        for id in sessions {
            if let Some(session) = self.decide_session(id, &mut begun.report)? {
                pending.insert(id, session);
            }
        }
        let mut undecided = BTreeMap::new();
        for (generation, sessions) in waits {
            let open: Vec<SessionFact> =
                sessions.iter().filter_map(|id| pending.get(id).cloned()).collect();
            if !open.is_empty() {
                undecided.insert(generation, open);
            }
        }
        Ok(undecided)
    }

    /// The sessions that a generation waits for. Any listing made after its tombstones were
    /// published will do; the first that is recorded holds, so that later sessions do not count.
    fn waits(&self, id: GenerationId) -> Result<Vec<SnapshotId>> {
        let (store, keys) = (self.repository.store(), self.repository.keys());
        let name = record::waits_name(id);
        let read = || record::read_json(store, keys, ObjectKind::Tombstones, &name);
        match read() {
            Ok(Waits { sessions }) => return Ok(sessions),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut sessions = facts::sessions(self.repository, self.store_now)?;
        sessions.retain(|session| session.purpose != record::PRUNE && !session.decided);
        let waits = Waits { sessions: sessions.iter().map(|session| session.id).collect() };
        match record::create_json(store, keys, ObjectKind::Tombstones, &name, &waits)? {
            Created::New => Ok(waits.sessions),
            Created::AlreadyExists => match read() {
                Ok(Waits { sessions }) => Ok(sessions),
                // Another prune has finished this generation meanwhile; ours is as good.
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(waits.sessions),
                Err(error) => Err(error),
            },
        }
    }

    /// Returns the session if it is not decided and cannot be declared dead yet.
    fn decide_session(
        &self,
        id: SnapshotId,
        report: &mut PruneReport,
    ) -> Result<Option<SessionFact>> {
        let name = record::session_name(id);
        let store = self.repository.store();
        if !facts::is_decided(self.repository, id, self.store_now)? {
            // Looked at again, because it may have given a sign of life since it was listed.
            let meta = match store.stat(&name) {
                Ok(meta) => meta,
                Err(error) if error.kind() == objects::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            let silent = facts::age(&meta, self.store_now);
            let session = facts::session(self.repository, id, silent, self.store_now)?;
            let Some(session) = session else {
                return Ok(None);
            };
            if session.decided {
                store.delete(&name)?;
                return Ok(None);
            }
            if silent <= self.settings.grace {
                return Ok(Some(session));
            }
            if !self.fence(&session, report)? {
                return Ok(Some(session));
            }
        }
        store.delete(&name)?;
        Ok(None)
    }

    /// Declares a session dead; answers whether that decides it already.
    fn fence(&self, session: &SessionFact, report: &mut PruneReport) -> Result<bool> {
        let (store, keys) = (self.repository.store(), self.repository.keys());
        let verdict = Verdict::Fenced { at: self.now };
        let kind = ObjectKind::Snapshot;
        let mut first = false;
        match self.repository.register() {
            Register::TimeFenced => {
                let name = record::fence_name(session.id);
                if !facts::exists(self.repository, &name)? {
                    first =
                        record::create_json(store, keys, kind, &name, &verdict)? == Created::New;
                }
            }
            Register::CreateIfAbsent => {
                for register in facts::registers(&session.purpose, session.id) {
                    let created = if register.starts_with(record::SNAPSHOTS) {
                        record::create_json(store, keys, kind, &register, &verdict)?
                    } else {
                        relocation::Record::Fenced.create(store, keys, session.id)?
                    };
                    first |= created == Created::New;
                }
            }
        }
        if first {
            (self.progress)(&format!("declared dead: {session}"));
            report.fenced.push(session.clone());
        }
        Ok(self.repository.register() == Register::CreateIfAbsent)
    }

    /// P5 and P6 for every generation that nobody holds up.
    fn decide(
        &self,
        begun: &mut Begun,
        undecided: &BTreeMap<GenerationId, Vec<SessionFact>>,
    ) -> Result<Vec<Ready>> {
        let (store, keys) = (self.repository.store(), self.repository.keys());
        let mut is_fresh = false;
        let mut ready = Vec::new();
        for (id, tombstones) in &begun.generations {
            let id = *id;
            let mut doomed = match record::read_doomed(store, keys, id) {
                Ok(doomed) => Some(doomed),
                Err(error) if error.kind() == ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
            if doomed.is_none()
                && let Some(sessions) = undecided.get(&id)
            {
                let (packs, bytes) = begun.size_of(tombstones);
                let sessions = sessions.clone();
                let waiting = Waiting { generation: id, packs, bytes, sessions };
                begun.report.waiting.push(waiting);
                continue;
            }
            if doomed.is_none() {
                if !is_fresh {
                    (self.progress)("marking what snapshots use, once more");
                    begun.mark.refresh(self.repository)?;
                    is_fresh = true;
                }
                let dead = unused(tombstones, &begun.mark);
                doomed = match record::create_doomed(store, keys, id, &dead)? {
                    Created::New => Some(dead),
                    Created::AlreadyExists => match record::read_doomed(store, keys, id) {
                        Ok(doomed) => Some(doomed),
                        Err(error) if error.kind() == ErrorKind::NotFound => None,
                        Err(error) => return Err(error),
                    },
                };
            }
            let is_begun = facts::exists(self.repository, &record::tombstones_name(id))?;
            match doomed {
                Some(doomed) if is_begun => ready.push(Ready { id, doomed }),
                // Another prune has finished it; this decision came too late and counts for nothing.
                _ => self.delete(&[record::waits_name(id), record::doomed_name(id)])?,
            }
        }
        Ok(ready)
    }

    /// P7 and P8.
    fn sweep(&self, begun: &mut Begun, ready: &[Ready]) -> Result<()> {
        let store = self.repository.store();
        let mut doomed: Vec<PackId> =
            ready.iter().flat_map(|ready| ready.doomed.data.iter().copied()).collect();
        doomed.sort_unstable();
        (self.progress)("cleaning the index");
        let rewritten = segments::rewrite(self.repository, &doomed)?;
        let report = &mut begun.report;
        report.segments_written = rewritten.written;
        report.segments_deleted = rewritten.deleted;
        report.damaged_segments = rewritten.damaged;
        (self.progress)("deleting packs");
        let time_fenced = self.repository.register() == Register::TimeFenced;
        let mut retired = BTreeSet::new();
        'generations: for Ready { id, doomed } in ready {
            let classes = [(PackClass::Data, &doomed.data), (PackClass::Meta, &doomed.meta)];
            let packs: Vec<(PackClass, PackId)> = classes
                .iter()
                .flat_map(|(class, packs)| packs.iter().map(|pack| (*class, *pack)))
                .collect();
            for packs in packs.chunks(DELETE_BATCH) {
                let names: Vec<String> =
                    packs.iter().map(|(class, pack)| class.object_name(*pack)).collect();
                let date = self.turn()?;
                // Where another prune may have come to another decision, and finished.
                if time_fenced && !facts::exists(self.repository, &record::tombstones_name(*id))? {
                    continue 'generations;
                }
                store.delete_dated(&names, date)?;
                for (class, pack) in packs {
                    let size = size_of(&begun.packs, *class, *pack);
                    begun.report.packs_deleted += u64::from(size.is_some());
                    begun.report.bytes_deleted += size.unwrap_or_default();
                }
            }
            retired.extend(doomed.retired.iter().copied());
            let all = begun.generations.get(id).map_or(0, Tombstones::len);
            begun.report.packs_rescued += all.saturating_sub(doomed.len()) as u64;
        }
        let announced = self.repository.list_ids(record::SESSIONS)?;
        repack::merge_relocations(self.repository, &retired, &announced, &|names| {
            self.delete(names)
        })?;
        for Ready { id, .. } in ready {
            self.delete(&[record::waits_name(*id), record::tombstones_name(*id)])?;
            self.delete(&[record::doomed_name(*id)])?;
        }
        Ok(())
    }

    /// Forgotten snapshots: nothing counts them any more. Their marks stay.
    fn delete_snapshots(&self, begun: &mut Begun) -> Result<()> {
        let forgotten = &begun.mark.forgotten;
        let names: Vec<String> = forgotten
            .iter()
            .flat_map(|id| [record::session_name(*id), record::snapshot_name(*id)])
            .collect();
        self.delete(&names)?;
        begun.report.snapshots_deleted += forgotten.len();
        Ok(())
    }

    /// Old marks, probes and writes that never ended, and announcements of garbage collections that
    /// have died.
    fn delete_marks(&self, begun: &Begun) -> Result<()> {
        let Self { repository, store_now, .. } = *self;
        let store = repository.store();
        let verdicts = facts::ages(repository, record::SNAPSHOTS, store_now)?;
        let announced: BTreeSet<_> = repository.list_ids(record::SESSIONS)?.into_iter().collect();
        let mut stale = Vec::new();
        let mut marks = |ids: Vec<(SnapshotId, Duration)>, name: fn(SnapshotId) -> String| {
            let old =
                |(id, age): &(SnapshotId, Duration)| *age > MARKS_KEPT && !announced.contains(id);
            stale.extend(ids.into_iter().filter(old).map(|(id, _)| name(id)));
        };
        let fenced = |(id, _): &&(SnapshotId, Duration)| begun.mark.fenced.contains(id);
        marks(verdicts.iter().filter(fenced).copied().collect(), record::snapshot_name);
        let mut repackings = facts::ages(repository, record::RELOCATIONS, store_now)?;
        repackings.retain(|(id, _)| begun.mark.repackings_fenced().contains(id));
        marks(repackings, record::relocation_name);
        marks(facts::ages(repository, record::FENCES, store_now)?, record::fence_name);
        let kept: BTreeSet<_> = verdicts.into_iter().map(|(id, _)| id).collect();
        for (id, age) in facts::ages(repository, record::FORGOTTEN, store_now)? {
            if age > MARKS_KEPT && !kept.contains(&id) {
                stale.push(record::forgotten_name(id));
            }
        }
        store.list(record::PROBES, &mut |probe| {
            if facts::age(&probe, store_now) > UNFINISHED_KEPT {
                stale.push(probe.key);
            }
            Ok(())
        })?;
        self.delete(&stale)?;
        store.remove_unfinished(UNFINISHED_KEPT, store_now)?;
        for session in facts::sessions(repository, store_now)? {
            let silent = Duration::from_secs(session.silent_secs);
            if session.purpose == record::PRUNE && silent > self.settings.grace {
                store.delete(&record::session_name(session.id))?;
            }
        }
        Ok(())
    }
}

impl Begun {
    /// How many of these packs are there, and their size.
    fn size_of(&self, packs: &Tombstones) -> (u64, u64) {
        let data = packs.data.iter().map(|pack| (PackClass::Data, *pack));
        let meta = packs.meta.iter().map(|pack| (PackClass::Meta, *pack));
        let sizes = data.chain(meta).filter_map(|(class, id)| size_of(&self.packs, class, id));
        sizes.fold((0, 0), |(packs, bytes), size| (packs + 1, bytes + size))
    }
}

fn size_of(packs: &[PackFact], class: PackClass, id: PackId) -> Option<u64> {
    let at = packs.binary_search_by_key(&(class, id), |pack| (pack.class, pack.id)).ok()?;
    packs.get(at).map(|pack| pack.size)
}

/// Those of `packs` of which no blob is used, and whose relocations nothing refers to.
fn unused(packs: &Tombstones, mark: &Mark) -> Tombstones {
    let of = |class, packs: &[PackId]| {
        packs.iter().copied().filter(|pack| mark.used(class, *pack) == 0).collect()
    };
    let retired = packs.retired.iter().copied().filter(|pack| !mark.is_referred(*pack)).collect();
    let (data, meta) = (of(PackClass::Data, &packs.data), of(PackClass::Meta, &packs.meta));
    Tombstones { data, meta, retired }
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let noun = if self.packs == 1 { "pack" } else { "packs" };
        let verb = if self.packs == 1 { "waits" } else { "wait" };
        let names: Vec<_> = self.sessions.iter().map(ToString::to_string).collect();
        write!(f, "{} {noun} ({}) {verb} for ", self.packs, Bytes(self.bytes))?;
        write!(f, "{}; run prune again, or lower --grace", names.join("; "))
    }
}

impl fmt::Display for PruneReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(repacked) = &self.repacked {
            writeln!(f, "{repacked}")?;
            repacked.damaged.iter().try_for_each(|why| writeln!(f, "left as it is: {why}"))?;
        }
        write!(f, "{}", self.plan)?;
        if self.dry_run {
            return writeln!(f, "nothing was changed: this was a dry run");
        }
        for session in &self.fenced {
            writeln!(f, "declared dead: {session}")?;
        }
        let Self { packs_deleted, packs_rescued, .. } = self;
        writeln!(f, "deleted {packs_deleted} packs ({})", Bytes(self.bytes_deleted))?;
        if *packs_rescued > 0 {
            writeln!(f, "kept {packs_rescued} packs that a backup has come to use meanwhile")?;
        }
        self.waiting.iter().try_for_each(|waiting| writeln!(f, "{waiting}"))?;
        for damaged in &self.damaged_segments {
            writeln!(f, "{damaged}; run 'repair-index'")?;
        }
        Ok(())
    }
}

/// Bytes as people read them.
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        let mut value = self.0 as f64;
        let mut unit = "B";
        for next in units {
            if value < 1024.0 {
                break;
            }
            value /= 1024.0;
            unit = next;
        }
        if unit == "B" { write!(f, "{value} B") } else { write!(f, "{value:.1} {unit}") }
    }
}
