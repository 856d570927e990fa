//! Planning a garbage collection: facts in, plan out. Nothing here touches a store.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::{Bytes, PruneSettings};
use crate::id::{GenerationId, PackId, SnapshotId};
use crate::limits::TOMBSTONES_BYTES_MAX;
use crate::pack::PackClass;
use crate::record::Tombstones;

/// A pack on the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PackFact {
    pub(super) class: PackClass,
    pub(super) id: PackId,
    pub(super) size: u64,
    /// How long ago it was stored, by the store's clock.
    pub(super) age: Duration,
}

/// An announced session.
#[derive(Debug, Clone, Serialize)]
pub struct SessionFact {
    /// Its name.
    pub id: SnapshotId,
    /// What it does.
    pub purpose: String,
    /// Machine and process.
    pub writer: String,
    /// Seconds since it last gave a sign of life, by the store's clock.
    pub silent_secs: u64,
    /// Seconds since it began, as far as its own clock can be trusted.
    pub age_secs: u64,
    /// Whether it has ended, and only its announcement is left.
    pub decided: bool,
}

impl fmt::Display for SessionFact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, purpose, writer, .. } = self;
        write!(f, "{purpose} {} of {writer}, silent for {}", id.short(), span(self.silent_secs))
    }
}

/// A garbage collection that was begun.
pub(super) struct GenerationFact {
    pub(super) id: GenerationId,
    pub(super) tombstones: Tombstones,
}

/// Everything a plan follows from.
pub(super) struct Facts<'a> {
    /// All packs, ascending.
    pub(super) packs: &'a [PackFact],
    /// Which blobs of a pack snapshots use.
    pub(super) used: &'a dyn Fn(PackClass, PackId) -> u128,
    pub(super) sessions: Vec<SessionFact>,
    pub(super) generations: &'a [GenerationFact],
    /// Relocated packs that nothing refers to, ascending.
    pub(super) unreferred: &'a [PackId],
    pub(super) snapshots: usize,
    pub(super) forgotten: usize,
}

/// Packs of one class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ClassPlan {
    /// All on the store.
    pub packs: u64,
    /// Their size.
    pub bytes: u64,
    /// Packs of which a snapshot uses at least one blob.
    pub used_packs: u64,
    /// Their size.
    pub used_bytes: u64,
    /// Packs that no snapshot uses.
    pub dead_packs: u64,
    /// Their size.
    pub dead_bytes: u64,
    /// Those of the dead ones that are young enough to belong to a backup under way: left alone.
    pub young_packs: u64,
    /// Their size.
    pub young_bytes: u64,
    /// Those of the dead ones that an earlier run has published as tombstones.
    pub buried_packs: u64,
    /// Their size.
    pub buried_bytes: u64,
    /// Those of the dead ones for which tombstones are published now.
    pub doomed_packs: u64,
    /// Their size.
    pub doomed_bytes: u64,
}

/// What a garbage collection found and is about to do.
#[derive(Debug, Clone, Serialize)]
pub struct PrunePlan {
    /// When it was made.
    pub at: jiff::Timestamp,
    /// How long a session may be silent before it is declared dead.
    pub grace_secs: u64,
    /// Snapshots that count.
    pub snapshots: usize,
    /// Forgotten snapshots whose object is deleted.
    pub forgotten: usize,
    /// Packs of chunks and bundles.
    pub data: ClassPlan,
    /// Packs of tree nodes.
    pub meta: ClassPlan,
    /// Announced sessions, without garbage collections.
    pub sessions: Vec<SessionFact>,
    /// Garbage collections begun by earlier runs and not finished.
    pub unfinished: Vec<GenerationId>,
    /// Packs to be published as tombstones.
    #[serde(skip)]
    pub tombstones: Tombstones,
}

impl PrunePlan {
    /// Bytes that this plan sets out to free, of both classes.
    pub fn doomed_bytes(&self) -> u64 {
        [self.data, self.meta].iter().map(|class| class.doomed_bytes + class.buried_bytes).sum()
    }

    /// The announced sessions that have not ended.
    pub fn running(&self) -> impl Iterator<Item = &SessionFact> {
        self.sessions.iter().filter(|session| !session.decided)
    }
}

/// A pack stored this long before the oldest running backup says it began may be its own: the two
/// times come from different clocks. Sparing a pack is always safe; see the module `gc`.
const CLOCKS_DIFFER_BY: Duration = Duration::from_secs(600);

/// Plans a garbage collection.
pub(super) fn plan(facts: Facts<'_>, settings: &PruneSettings, at: jiff::Timestamp) -> PrunePlan {
    let mut buried: Vec<PackId> = facts
        .generations
        .iter()
        .flat_map(|generation| generation.tombstones.all())
        .copied()
        .collect();
    buried.sort_unstable();
    let grace_secs = settings.grace.as_secs();
    let running = facts
        .sessions
        .iter()
        .filter(|session| !session.decided && session.silent_secs <= grace_secs)
        .map(|session| Duration::from_secs(session.age_secs) + CLOCKS_DIFFER_BY)
        .max();
    let mut plan = PrunePlan {
        at,
        grace_secs,
        snapshots: facts.snapshots,
        forgotten: facts.forgotten,
        data: ClassPlan::default(),
        meta: ClassPlan::default(),
        sessions: facts.sessions,
        unfinished: facts.generations.iter().map(|generation| generation.id).collect(),
        tombstones: Tombstones::default(),
    };
    // One list must fit its object; the rest is for the next run.
    let mut room = (TOMBSTONES_BYTES_MAX as usize - 1024) / PackId::LEN;
    for pack in facts.packs {
        let (class, list) = match pack.class {
            PackClass::Data => (&mut plan.data, &mut plan.tombstones.data),
            PackClass::Meta => (&mut plan.meta, &mut plan.tombstones.meta),
        };
        class.packs += 1;
        class.bytes += pack.size;
        if (facts.used)(pack.class, pack.id) != 0 {
            class.used_packs += 1;
            class.used_bytes += pack.size;
            continue;
        }
        class.dead_packs += 1;
        class.dead_bytes += pack.size;
        if buried.binary_search(&pack.id).is_ok() {
            class.buried_packs += 1;
            class.buried_bytes += pack.size;
        } else if running.is_some_and(|age| pack.age <= age) {
            class.young_packs += 1;
            class.young_bytes += pack.size;
        } else if room > 0 {
            room -= 1;
            class.doomed_packs += 1;
            class.doomed_bytes += pack.size;
            list.push(pack.id);
        }
    }
    // Their relocations go after they have gone.
    let mut present: Vec<PackId> = facts.packs.iter().map(|pack| pack.id).collect();
    present.sort_unstable();
    let gone = |pack: &&PackId| {
        present.binary_search(pack).is_err() && buried.binary_search(pack).is_err()
    };
    plan.tombstones.retired.extend(facts.unreferred.iter().filter(gone).take(room));
    plan
}

impl fmt::Display for PrunePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { snapshots, forgotten, .. } = self;
        writeln!(f, "snapshots  {snapshots} counted, {forgotten} forgotten")?;
        for (name, class) in [("data packs", &self.data), ("meta packs", &self.meta)] {
            let part = |packs, bytes| format!("{packs} ({})", Bytes(bytes));
            write!(f, "{name} {}", part(class.packs, class.bytes))?;
            write!(f, ": {} in use", part(class.used_packs, class.used_bytes))?;
            write!(f, ", {} to be deleted", part(class.doomed_packs, class.doomed_bytes))?;
            if class.buried_packs > 0 {
                write!(f, ", {} of earlier runs", part(class.buried_packs, class.buried_bytes))?;
            }
            if class.young_packs > 0 {
                let young = part(class.young_packs, class.young_bytes);
                write!(f, ", {young} that a running backup may need")?;
            }
            writeln!(f)?;
        }
        for session in self.running() {
            writeln!(f, "running    {session}")?;
        }
        Ok(())
    }
}

/// A duration as people say it.
pub(super) fn span(secs: u64) -> String {
    match secs {
        0..120 => format!("{secs} s"),
        120..7200 => format!("{} min", secs / 60),
        7200..172_800 => format!("{} h", secs / 3600),
        _ => format!("{} days", secs / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(id: u8, class: PackClass, age: u64) -> PackFact {
        PackFact { class, id: PackId([id; 16]), size: 1 << 20, age: Duration::from_secs(age) }
    }

    fn session(silent_secs: u64, age_secs: u64, decided: bool) -> SessionFact {
        let (purpose, writer) = ("backup".into(), "host x".into());
        SessionFact { id: SnapshotId([9; 16]), purpose, writer, silent_secs, age_secs, decided }
    }

    fn plan_with(sessions: Vec<SessionFact>) -> PrunePlan {
        let packs = [
            pack(1, PackClass::Data, 90_000),
            pack(2, PackClass::Data, 90_000),
            pack(3, PackClass::Data, 90_000),
            pack(4, PackClass::Data, 100),
            pack(5, PackClass::Meta, 90_000),
        ];
        let data = vec![PackId([2; 16])];
        let tombstones = Tombstones { data, ..Tombstones::default() };
        let generations = [GenerationFact { id: GenerationId([7; 16]), tombstones }];
        let facts = Facts {
            packs: &packs,
            used: &|_, id| u128::from(id.0[0] == 1),
            sessions,
            generations: &generations,
            unreferred: &[PackId([1; 16]), PackId([2; 16]), PackId([8; 16])],
            snapshots: 1,
            forgotten: 0,
        };
        let settings = PruneSettings { grace: Duration::from_secs(3600), ..Default::default() };
        plan(facts, &settings, jiff::Timestamp::UNIX_EPOCH)
    }

    fn doomed(plan: &PrunePlan) -> Vec<u8> {
        let Tombstones { data, meta, .. } = &plan.tombstones;
        data.iter().chain(meta).map(|id| id.0[0]).collect()
    }

    #[test]
    fn dead_packs_are_doomed_unless_buried_already() {
        let plan = plan_with(Vec::new());
        assert_eq!(doomed(&plan), [3, 4, 5]);
        assert_eq!((plan.data.used_packs, plan.data.dead_packs, plan.data.buried_packs), (1, 3, 1));
        assert_eq!(plan.doomed_bytes(), 4 << 20);
        assert_eq!(plan.tombstones.retired, [PackId([8; 16])], "gone, and not buried already");
        let text = plan.to_string();
        assert!(text.contains("data packs 4 (4.0 MiB): 1 (1.0 MiB) in use"), "{text}");
    }

    #[test]
    fn young_packs_are_spared_while_their_backup_may_run() {
        assert_eq!(doomed(&plan_with(vec![session(10, 300, false)])), [3, 5]);
        assert_eq!(doomed(&plan_with(vec![session(10, 300, true)])), [3, 4, 5], "it has ended");
        assert_eq!(doomed(&plan_with(vec![session(3601, 3700, false)])), [3, 4, 5], "it is dead");
    }
}
