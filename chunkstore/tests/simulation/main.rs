//! A deterministic simulation of many machines on one repository.
//!
//! Writers, readers, prunes and forgets run in interleavings that a seed decides, on a store with a
//! virtual clock, where requests are lost, answered wrongly, held up for hours or repeated, and where
//! machines crash or stop for days. After every change that could hurt, every listed snapshot must
//! be whole; in the end all of it must restore to what was saved, and nothing may be left over.
//! In some worlds trees have thousands of entries, so that backups take leaves over; in some all goes
//! so slowly that marks grow old.
//!
//! Taking a rule out of the protocol must make this fail: the test at the end says for which.
//! `EBACKUP_SIM_SEEDS=100000` runs more seeds, `EBACKUP_SIM_SEED=17` one, with what happened.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod actors;
#[path = "../common/mod.rs"]
#[expect(dead_code, reason = "each test uses its part")]
mod common;
mod oracle;
mod world;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actors::{fillers, open, prune_once, restore, run_forget, run_prune, run_reader, run_writer};
use chunkstore::id::SnapshotId;
use chunkstore::relocation::Relocations;
use chunkstore::repository::{Register, Repository};
use chunkstore::tree::Entry;
use common::{Expected, time};
use oracle::Oracle;
use world::{Client, Coverage, Faults, Sabotage, Tempo, World, next};

/// What is known about a run besides the store.
#[derive(Default)]
struct Model {
    /// What a snapshot of this name holds, if it is there.
    expected: Expected,
    committed: BTreeSet<SnapshotId>,
    fenced: BTreeSet<SnapshotId>,
    forgotten: BTreeSet<SnapshotId>,
    prunes: u32,
}

/// Everything an actor needs.
struct Stage {
    world: Arc<World>,
    model: Mutex<Model>,
    /// The oracle looks from outside, while whoever has the baton waits.
    oracle: Mutex<(Oracle, Option<Arc<Repository>>)>,
    /// What every tree has besides its files.
    fillers: Arc<Vec<Entry>>,
    kind: Kind,
    sabotage: Sabotage,
}

impl Stage {
    /// Looks at everything, if something happened that could have hurt.
    fn look(&self) {
        if self.world.take_dirty() {
            let (oracle, outside) = &mut *self.oracle.lock().unwrap();
            oracle.check(&self.world, outside.as_ref().unwrap());
        }
    }
}

/// A store of an actor that has every change watched.
struct Watched {
    client: Arc<Client>,
    stage: Arc<Stage>,
}

macro_rules! watched {
    ($($name:ident($($arg:ident: $type:ty),*) -> $out:ty;)*) => {
        impl objects::ObjectStore for Watched {
            $(fn $name(&self, $($arg: $type),*) -> $out {
                let result = self.client.$name($($arg),*);
                self.stage.look();
                result
            })*
            fn clock(&self) -> std::time::SystemTime {
                self.client.clock()
            }
            fn location(&self) -> String {
                self.client.location()
            }
        }
    };
}

watched! {
    create(key: &str, parts: &[std::io::IoSlice<'_>]) -> objects::Result<objects::Created>;
    create_from(key: &str, body: &mut dyn std::io::Read) -> objects::Result<objects::Created>;
    replace(key: &str, body: &[u8]) -> objects::Result<()>;
    replace_dated(key: &str, body: &[u8], date: std::time::SystemTime) -> objects::Result<()>;
    delete_dated(keys: &[String], date: std::time::SystemTime) -> objects::Result<()>;
    read(key: &str, limit: u64) -> objects::Result<Vec<u8>>;
    read_at(key: &str, offset: u64, buf: &mut [u8]) -> objects::Result<()>;
    stat(key: &str) -> objects::Result<objects::ObjectMeta>;
    list(prefix: &str, each: &mut dyn FnMut(objects::ObjectMeta) -> objects::Result<()>)
        -> objects::Result<()>;
    delete(key: &str) -> objects::Result<()>;
    remove_unfinished(older_than: Duration, now: std::time::SystemTime) -> objects::Result<u64>;
}

/// What all worlds have in common.
struct Base {
    /// A repository's first objects, with or without create-if-absent.
    objects: Vec<(String, Arc<[u8]>)>,
    fillers: Arc<Vec<Entry>>,
    conditional: bool,
}

fn base(conditional: bool) -> Base {
    let faults = Faults {
        lost_request: 0,
        lost_answer: 0,
        late_request: 0,
        repeated_request: 0,
        pause: 0,
        crash: 0,
    };
    let world = World::new(0, faults, Sabotage::None, conditional, Kind::Plain.tempo(), &[]);
    let repository = Repository::create(
        world.outside(),
        &common::unlock(),
        chunkstore::key_slot::KdfCost::WEAK,
        chunkstore::chunker::ChunkerConfig::default(),
        time(common::hour(0)),
    )
    .unwrap();
    let expected = if conditional { Register::CreateIfAbsent } else { Register::TimeFenced };
    assert_eq!(repository.register(), expected);
    let store = world.outside();
    let read = |key: String| {
        let body = objects::ObjectStore::read(&*store, &key, u64::MAX).unwrap();
        (key, body.into())
    };
    let objects = objects::testing::keys(&*store, "").into_iter().map(read).collect();
    Base { objects, fillers: fillers(), conditional }
}

/// What is special about a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    /// Trees have thousands of entries.
    Wide,
    /// Weeks pass.
    Slow,
    /// Prunes and forgets follow each other closely.
    Crowded,
}

/// One world in so many is of each special kind.
const KINDS: u64 = 16;

impl Kind {
    fn of(seed: u64) -> Self {
        match seed % KINDS {
            0 => Self::Wide,
            1 => Self::Slow,
            2 => Self::Crowded,
            _ => Self::Plain,
        }
    }

    fn tempo(self) -> Tempo {
        match self {
            Self::Plain | Self::Wide | Self::Crowded => {
                Tempo { sleep: 1, pauses: [60, 4000, 20_000, 200_000] }
            }
            Self::Slow => Tempo { sleep: 40, pauses: [2400, 160_000, 800_000, 8_000_000] },
        }
    }
}

type Script = fn(&Arc<Stage>, &Arc<Client>, u64);

/// Runs one seed to its end, and checks all that must hold. The error says what does not.
fn run(seed: u64, sabotage: Sabotage, base: &Base) -> Result<Coverage, String> {
    let mut choice = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
    let kind = Kind::of(seed);
    let level = [0, 3, 12][(next(&mut choice) % 3) as usize];
    let faults = Faults {
        lost_request: level / 3,
        lost_answer: level / 3,
        late_request: level,
        repeated_request: level,
        pause: 4 + level,
        crash: level / 6 + next(&mut choice) % 2,
    };
    let world = World::new(seed, faults, sabotage, base.conditional, kind.tempo(), &base.objects);
    let stage = Arc::new(Stage {
        world: world.clone(),
        model: Mutex::default(),
        oracle: Mutex::new((Oracle::default(), None)),
        fillers: if kind == Kind::Wide { base.fillers.clone() } else { Arc::default() },
        kind,
        sabotage,
    });
    let outside = Repository::open(world.outside(), &common::unlock()).unwrap();
    stage.oracle.lock().unwrap().1 = Some(Arc::new(outside));
    let scripts: [(&str, bool, Script); 7] = [
        ("writer-a", true, run_writer),
        ("writer-b", true, run_writer),
        ("writer-c", true, run_writer),
        ("prune-a", false, run_prune),
        ("prune-b", false, run_prune),
        ("forget", false, run_forget),
        ("reader", false, run_reader),
    ];
    let clients: Vec<_> =
        scripts.iter().map(|(name, writer, _)| world.actor(name, *writer)).collect();
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for (client, (_, _, script)) in clients.iter().zip(scripts) {
            let (stage, world, failure) = (&stage, &world, &failure);
            let choice = next(&mut choice);
            scope.spawn(move || {
                let id = client.id.unwrap();
                world.wait_turn(id);
                let result = catch_unwind(AssertUnwindSafe(|| script(stage, client, choice)));
                if let Err(panic) = result {
                    failure.lock().unwrap().get_or_insert(panic);
                }
                world.end(id);
            });
        }
        world.begin();
    });
    let ended = failure.into_inner().unwrap().map_or(Ok(()), Err);
    let ended =
        ended.and_then(|()| catch_unwind(AssertUnwindSafe(|| finish(&stage, base.conditional))));
    match ended {
        Ok(()) => Ok(world.coverage()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).into()));
            let trace = env("EBACKUP_SIM_SEED").map(|_| world.trace()).unwrap_or_default();
            Err(format!("{}\n{trace}", text.unwrap_or_default()))
        }
    }
}

/// With everybody gone, prunes clean up; then all that was committed is there.
fn finish(stage: &Arc<Stage>, conditional: bool) {
    let world = &stage.world;
    let outside = world.outside();
    let quiet = {
        let mut rounds = 0;
        loop {
            world.settle();
            let again = prune_once(stage, &outside, true).unwrap_or_else(|error| {
                panic!("a prune with nobody else fails: {}", chunkstore::error::chain(&error))
            });
            rounds += 1;
            if !again && rounds > 3 || rounds == 9 {
                break !again;
            }
        }
    };
    assert!(quiet, "prunes do not come to an end");
    stage.world.take_dirty();
    let repository = open(stage, &outside).unwrap();
    stage.oracle.lock().unwrap().0.check(world, &repository);
    let list = repository.list_snapshots().unwrap();
    let model = stage.model.lock().unwrap();
    for (id, snapshot) in &list.snapshots {
        let files = restore(stage, &repository, snapshot).unwrap();
        assert!(files == model.expected[id], "snapshot {id} restores to something else");
        assert!(!model.fenced.contains(id), "snapshot {id} was declared dead, and is listed");
    }
    let listed: BTreeSet<_> = list.snapshots.iter().map(|(id, _)| *id).collect();
    for id in model.committed.difference(&model.forgotten) {
        assert!(listed.contains(id), "snapshot {id} was committed, and is not listed");
    }
    let left = |folder: &str| objects::testing::keys(&*outside, folder);
    for folder in ["sessions/", "tombstones/", "waits/", "doomed/"] {
        assert_eq!(left(folder), [""; 0], "left over");
    }
    let used: BTreeSet<String> = {
        let relocations = Relocations::load(&*outside, repository.keys()).unwrap();
        let oracle = &mut stage.oracle.lock().unwrap().0;
        let all = list.snapshots.iter();
        all.flat_map(|(_, snapshot)| oracle.references_of(&repository, snapshot).unwrap())
            .map(|(class, place)| class.object_name(relocations.newest(place).pack))
            .collect()
    };
    let packs: BTreeSet<_> = left("packs/").into_iter().chain(left("meta/")).collect();
    // Where two repackings met, a blob has two copies, and both stay.
    if conditional && packs.len() > used.len() + 8 || packs.is_empty() != used.is_empty() {
        panic!("of {} packs only {} are used", packs.len(), used.len());
    }
}

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

fn run_seeds(conditional: bool, count: u64) {
    let base = base(conditional);
    let mut sum = Coverage::default();
    let seeds = match env("EBACKUP_SIM_SEED") {
        Some(seed) => vec![seed],
        None => {
            let count = env("EBACKUP_SIM_SEEDS").unwrap_or(count);
            (0..count).collect()
        }
    };
    for seed in &seeds {
        match run(*seed, Sabotage::None, &base) {
            Ok(found) => {
                sum.calls += found.calls;
                sum.late_effects += found.late_effects;
                sum.refused_late += found.refused_late;
                sum.late_commits += found.late_commits;
                sum.crashes += found.crashes;
                sum.fences += found.fences;
                sum.pack_deletes += found.pack_deletes;
                sum.relocations += found.relocations;
                sum.commits += found.commits;
                sum.reused_doomed += found.reused_doomed;
                sum.prunes_at_once += found.prunes_at_once;
                sum.reads += found.reads;
                sum.leaves_taken_over += found.leaves_taken_over;
                sum.leaves_refused += found.leaves_refused;
            }
            Err(why) => panic!("seed {seed}: {why}"),
        }
    }
    if seeds.len() < 100 {
        return;
    }
    // A simulation in which nothing happens finds nothing.
    let n = seeds.len() as u64;
    let enough = sum.commits > 3 * n
        && sum.pack_deletes > 5 * n
        && sum.relocations > n / 2
        && sum.reads > n
        && sum.crashes > n / 4
        && sum.fences > n / 10
        && sum.late_effects > n / 4
        && sum.late_commits > n / 200
        && sum.prunes_at_once > n / 4
        && sum.reused_doomed > n / 20
        && sum.leaves_taken_over > n / 3
        && sum.leaves_refused > 0
        && (conditional || sum.refused_late > n / 50);
    assert!(enough, "in {n} seeds: {sum:?}");
}

#[test]
fn no_interleaving_loses_a_snapshot() {
    run_seeds(true, 2000);
}

#[test]
fn no_interleaving_loses_a_snapshot_without_create_if_absent() {
    run_seeds(false, 2000);
}

/// Rules of FORMAT.md, section 8 (for P6 see `tests/gc`); whether the store has create-if-absent, and of which kind the worlds
/// are in which it soonest shows that the rule is missing.
const RULES: [(Sabotage, bool, Option<Kind>); 11] = [
    (Sabotage::AnnounceLate, true, None),
    (Sabotage::NoTombstones, true, None),
    (Sabotage::StaleListing, true, None),
    (Sabotage::NoGate, true, Some(Kind::Wide)),
    (Sabotage::EarlyReceipt, true, None),
    (Sabotage::NoWait, true, None),
    (Sabotage::NoSecondMark, true, None),
    (Sabotage::AnySilence, true, Some(Kind::Slow)),
    (Sabotage::NoRegister, true, None),
    (Sabotage::NoFenceCheck, false, None),
    (Sabotage::AnyDate, false, None),
];

/// Worlds that are looked at: ten times as many as it took to notice any of them.
const WORLDS: usize = 4000;

/// The simulation is worth something only if it notices what it is for.
#[test]
fn taking_a_rule_out_is_noticed() {
    let bases = [base(false), base(true)];
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = RULES.map(|(sabotage, conditional, kind)| {
        let base = &bases[usize::from(conditional)];
        let is_wanted = |seed: &u64| kind.is_none_or(|kind| Kind::of(*seed) == kind);
        let mut seeds = (0..).filter(is_wanted).take(WORLDS);
        seeds.find_map(|seed| run(seed, sabotage, base).err().map(|why| (seed, why)))
    });
    std::panic::set_hook(quiet);
    for ((sabotage, ..), found) in RULES.into_iter().zip(found) {
        let (seed, why) = found.unwrap_or_else(|| panic!("{sabotage:?} goes unnoticed"));
        // Noticed by what it does harm to, not by an accident of the simulation.
        let harm = ["has lost", "does not exist", "is not listed", "and is listed", "wrongly"];
        let known = harm.iter().any(|harm| why.contains(harm));
        assert!(known, "{sabotage:?} is noticed for the wrong reason, by seed {seed}: {why}");
    }
}
