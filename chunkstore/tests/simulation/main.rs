//! A deterministic simulation of many machines on one repository.
//!
//! Writers, readers, prunes and forgets run in interleavings that a seed decides, on a store with a
//! virtual clock, where requests are lost, answered wrongly, held up for hours or repeated, and where
//! machines crash or stop for days. After every change that could hurt, every listed snapshot must
//! be whole; in the end all of it must restore to what was saved, and nothing may be left over.
//!
//! Taking any one rule out of the protocol must make this fail: see the tests at the end.
//! `EBACKUP_SIM_SEEDS=100000` runs more seeds, `EBACKUP_SIM_SEED=17` one, with what happened.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
#[expect(dead_code, reason = "each test uses its part")]
mod common;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use chunkstore::ErrorKind;
use chunkstore::codec::compress::Compressor;
use chunkstore::error::Result;
use chunkstore::gc::{PruneSettings, RepackSettings, prune};
use chunkstore::id::SnapshotId;
use chunkstore::pack::{Location, PackClass};
use chunkstore::record::{Session, Snapshot};
use chunkstore::relocation::Relocations;
use chunkstore::repository::{Register, Repository};
use chunkstore::tree::{
    Body, Content, Entry, EntryCursor, NodeRef, TreeBuilder, TreeCursor, for_each_node,
};
use chunkstore::writer::{Writer, WriterSettings};
use common::{Expected, Files, noise, read_back, time};
use world::{Client, Coverage, Faults, Sabotage, World, next};

/// Contents that files choose from, so that writers share them.
const CONTENTS: u64 = 14;
const FILES: u64 = 8;

/// Packs of some four blobs, besides the room kept for the longest table.
const PACK: usize = 9000;

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

/// A blob that a snapshot refers to.
type Reference = (PackClass, Location);

/// Watches over the listed snapshots.
#[derive(Default)]
struct Oracle {
    references: BTreeMap<SnapshotId, Vec<Reference>>,
}

impl Oracle {
    /// Every listed snapshot has every blob, where its references or relocations say.
    fn check(&mut self, world: &Arc<World>, outside: &Repository) {
        let list = outside.list_snapshots().unwrap();
        assert!(list.damaged.is_empty(), "{:?}", list.damaged);
        let store = world.outside();
        let relocations = Relocations::load(&*store, outside.keys()).unwrap();
        for (id, snapshot) in &list.snapshots {
            if !self.references.contains_key(id) {
                let references = references(outside, snapshot).unwrap_or_else(|error| {
                    panic!("snapshot {id}: {}", chunkstore::error::chain(&error))
                });
                self.references.insert(*id, references);
            }
            for (class, place) in &self.references[id] {
                let places = relocations.places(*place);
                let there = |place: &Location| world.has(&class.object_name(place.pack));
                assert!(places.iter().any(there), "snapshot {id} has lost {place:?}");
            }
        }
    }
}

fn references(repository: &Repository, snapshot: &Snapshot) -> Result<Vec<Reference>> {
    let mut found = vec![(PackClass::Meta, snapshot.root.location())];
    let all = &mut |_: &NodeRef| true;
    for_each_node(repository, snapshot.root, snapshot.level, all, &mut |_, interior| {
        let children = interior.children.iter();
        found.extend(children.map(|child| (PackClass::Meta, child.node.location())));
        Ok(())
    })?;
    let mut entries = EntryCursor::new(TreeCursor::new(repository, snapshot.root, snapshot.level));
    while let Some(entry) = entries.peek()? {
        found.extend(entry.blobs().map(|blob| (PackClass::Data, blob.location)));
        entries.advance();
    }
    Ok(found)
}

/// Everything an actor needs.
struct Stage {
    world: Arc<World>,
    model: Mutex<Model>,
    /// The oracle looks from outside, while whoever has the baton waits.
    oracle: Mutex<(Oracle, Option<Arc<Repository>>)>,
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

fn settings() -> WriterSettings {
    WriterSettings {
        pack_target_bytes: PACK,
        uploads: 0,
        pack_buffers: 1,
        heartbeat: Duration::ZERO,
        ..WriterSettings::default()
    }
}

/// Opens the repository as a new process would.
fn open(stage: &Arc<Stage>, client: &Arc<Client>) -> Result<Arc<Repository>> {
    let store = Watched { client: client.clone(), stage: stage.clone() };
    Repository::open(Arc::new(store), &common::unlock()).map(Arc::new)
}

fn content(number: u64) -> Vec<u8> {
    noise(number, 900)
}

/// Saves a set of files, taking over what the last snapshot of the same lineage has, and returns it.
fn back_up(
    stage: &Arc<Stage>,
    client: &Arc<Client>,
    parent: Option<&(Snapshot, Files)>,
    choice: &mut u64,
) -> Result<Option<(Snapshot, Files)>> {
    let world = &stage.world;
    let repository = open(stage, client)?;
    let started = time(objects::ObjectStore::clock(&**client));
    let session =
        Session { purpose: "backup".into(), writer: "simulated".into(), started, heartbeat: 0 };
    let writer = Writer::begin(repository.clone(), settings(), &session)?;
    let mut files = parent.map(|(_, files)| files.clone()).unwrap_or_default();
    for _ in 0..2 + next(choice) % 3 {
        let name = format!("f{}", next(choice) % FILES);
        if next(choice).is_multiple_of(5) {
            files.remove(&name);
        } else {
            files.insert(name, content(next(choice) % CONTENTS));
        }
    }
    files.insert("last".into(), content(next(choice) % CONTENTS));
    let mut old = BTreeMap::new();
    if let Some((snapshot, old_files)) = parent
        && old_files.len() > 1
    {
        let cursor = TreeCursor::new(&*repository, snapshot.root, snapshot.level);
        let mut entries = EntryCursor::new(cursor);
        while let Some(entry) = entries.peek()? {
            let name = String::from_utf8(entry.path()).unwrap();
            if files.get(&name) == old_files.get(&name) {
                old.insert(name, entry.clone());
            }
            entries.advance();
        }
    }
    let mut compressor = Compressor::new(settings().compression);
    let mut tree = TreeBuilder::new(&writer, repository.keys().cut());
    for (name, bytes) in &files {
        let known = old
            .get(name)
            .filter(|entry| entry.blobs().all(|blob| writer.is_usable_at(blob.location)));
        let entry = match known {
            Some(entry) => entry.clone(),
            None => {
                let blob = writer.store_data(&mut compressor, bytes)?;
                let chunks = vec![chunkstore::tree::Chunk { offset: 0, blob }];
                let node = common::node(bytes.len() as u64, Content::Chunks(chunks));
                Entry { key: name.clone().into_bytes(), body: Body::Node(node) }
            }
        };
        tree.push(&entry)?;
        if next(choice).is_multiple_of(6) {
            world.sleep(client.id.unwrap(), next(choice) % 200);
            if next(choice).is_multiple_of(2) {
                writer.renew()?;
            }
        }
    }
    let (root, level) = tree.finish()?.unwrap();
    let snapshot = common::snapshot(root, level, started);
    let id = writer.id();
    stage.model.lock().unwrap().expected.insert(id, files.clone());
    let committed = writer.commit(|_| snapshot.clone());
    let mut model = stage.model.lock().unwrap();
    match committed {
        Ok(_) => {
            model.committed.insert(id);
            drop(model);
            world.cover(|coverage| coverage.commits += 1);
            Ok(Some((snapshot, files)))
        }
        Err(error) if error.kind() == ErrorKind::Fenced => {
            // Without create-if-absent, an attempt before may still have gone through.
            if repository.register() == Register::CreateIfAbsent {
                model.fenced.insert(id);
            }
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn run_writer(stage: &Arc<Stage>, client: &Arc<Client>, mut choice: u64) {
    let mut parent = None;
    for _ in 0..2 + next(&mut choice) % 3 {
        match back_up(stage, client, parent.as_ref(), &mut choice) {
            Ok(Some(saved)) => parent = Some(saved),
            Ok(None) => {}
            Err(_) => {
                // The parent may have been forgotten and pruned meanwhile: what was read from it is
                // no loss.
                parent = None;
            }
        }
        let gap = [60, 2000, 30_000][(next(&mut choice) % 3) as usize];
        stage.world.sleep(client.id.unwrap(), next(&mut choice) % gap);
    }
}

fn prune_once(stage: &Arc<Stage>, client: &Arc<Client>, repack: bool) -> Result<bool> {
    let repository = open(stage, client)?;
    let repack = repack.then(|| RepackSettings {
        max_unused_percent: 0.0,
        pack_target_bytes: PACK,
        ..RepackSettings::default()
    });
    let settings = PruneSettings {
        grace: Duration::from_secs(3600),
        dry_run: false,
        writer: "simulated".into(),
        repack,
    };
    let now = time(objects::ObjectStore::clock(&**client));
    {
        let mut model = stage.model.lock().unwrap();
        model.prunes += 1;
        let at_once = u64::from(model.prunes > 1);
        stage.world.cover(|coverage| coverage.prunes_at_once += at_once);
    }
    let result = prune(&repository, &settings, now, &|_| {});
    stage.model.lock().unwrap().prunes -= 1;
    let report = result?;
    stage.world.cover(|coverage| {
        coverage.fences += report.fenced.len() as u64;
        coverage.reused_doomed += report.packs_rescued;
        coverage.relocations += report.repacked.map_or(0, |repacked| repacked.packs);
    });
    Ok(report.plan.doomed_bytes() > 0 || !report.waiting.is_empty())
}

fn run_prune(stage: &Arc<Stage>, client: &Arc<Client>, mut choice: u64) {
    for _ in 0..3 + next(&mut choice) % 3 {
        let _failed = prune_once(stage, client, !next(&mut choice).is_multiple_of(3));
        let gap = [100, 4000, 40_000][(next(&mut choice) % 3) as usize];
        stage.world.sleep(client.id.unwrap(), next(&mut choice) % gap);
    }
}

fn run_forget(stage: &Arc<Stage>, client: &Arc<Client>, mut choice: u64) {
    for _ in 0..6 {
        stage.world.sleep(client.id.unwrap(), next(&mut choice) % 6000);
        let Ok(repository) = open(stage, client) else {
            continue;
        };
        let Ok(list) = repository.list_snapshots() else {
            continue;
        };
        if list.snapshots.len() > 1 {
            let pick = (next(&mut choice) % list.snapshots.len() as u64) as usize;
            let id = list.snapshots[pick].0;
            stage.model.lock().unwrap().forgotten.insert(id);
            let now = time(objects::ObjectStore::clock(&**client));
            let _failed = repository.forget(id, now);
        }
    }
}

fn run_reader(stage: &Arc<Stage>, client: &Arc<Client>, mut choice: u64) {
    for _ in 0..4 {
        stage.world.sleep(client.id.unwrap(), next(&mut choice) % 8000);
        let read = || -> Result<()> {
            let repository = open(stage, client)?;
            let list = repository.list_snapshots()?;
            let Some((id, snapshot)) = list.snapshots.last() else {
                return Ok(());
            };
            match read_back(&repository, snapshot) {
                Ok(files) => {
                    let model = stage.model.lock().unwrap();
                    assert!(files == model.expected[id], "snapshot {id} was read wrongly");
                    drop(model);
                    stage.world.cover(|coverage| coverage.reads += 1);
                    Ok(())
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    let forgotten = stage.model.lock().unwrap().forgotten.contains(id);
                    let why = chunkstore::error::chain(&error);
                    assert!(forgotten, "snapshot {id} could not be read: {why}");
                    Ok(())
                }
                Err(error) => Err(error),
            }
        };
        match read() {
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                panic!("a reader met damage: {}", chunkstore::error::chain(&error))
            }
            _ => {}
        }
    }
}

/// A repository's first objects, with or without create-if-absent.
fn base(conditional: bool) -> Vec<(String, Arc<[u8]>)> {
    let faults = Faults {
        lost_request: 0,
        lost_answer: 0,
        late_request: 0,
        repeated_request: 0,
        pause: 0,
        crash: 0,
    };
    let world = World::new(0, faults, Sabotage::None, conditional, &[]);
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
    objects::testing::keys(&*store, "")
        .into_iter()
        .map(|key| {
            let body = objects::ObjectStore::read(&*store, &key, u64::MAX).unwrap();
            (key, body.into())
        })
        .collect()
}

type Script = fn(&Arc<Stage>, &Arc<Client>, u64);

/// Runs one seed to its end, and checks all that must hold. The error says what does not.
fn run(
    seed: u64,
    sabotage: Sabotage,
    conditional: bool,
    base: &[(String, Arc<[u8]>)],
) -> std::result::Result<Coverage, String> {
    let mut choice = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
    let level = [0, 3, 12][(next(&mut choice) % 3) as usize];
    let faults = Faults {
        lost_request: level / 3,
        lost_answer: level / 3,
        late_request: level,
        repeated_request: level,
        pause: 4 + level,
        crash: level / 6 + next(&mut choice) % 2,
    };
    let world = World::new(seed, faults, sabotage, conditional, base);
    let oracle = Mutex::new((Oracle::default(), None));
    let stage = Arc::new(Stage { world: world.clone(), model: Mutex::default(), oracle });
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
    let ended = ended.and_then(|()| catch_unwind(AssertUnwindSafe(|| finish(&stage, conditional))));
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
        let files = read_back(&repository, snapshot).unwrap();
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
        let all = list.snapshots.iter();
        all.flat_map(|(_, snapshot)| references(&repository, snapshot).unwrap())
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

/// Seeds that once failed.
const REGRESSIONS: &[u64] = &[10_600, 12_806];

fn run_seeds(conditional: bool, count: u64) {
    let base = base(conditional);
    let mut sum = Coverage::default();
    let seeds = match env("EBACKUP_SIM_SEED") {
        Some(seed) => vec![seed],
        None => {
            let count = env("EBACKUP_SIM_SEEDS").unwrap_or(count);
            REGRESSIONS.iter().copied().chain(0..count).collect()
        }
    };
    for seed in &seeds {
        match run(*seed, Sabotage::None, conditional, &base) {
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

/// The simulation is worth something only if it notices what it is for.
fn assert_noticed(sabotage: Sabotage, conditional: bool) {
    let base = base(conditional);
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = (0..6000)
        .find_map(|seed| run(seed, sabotage, conditional, &base).err().map(|why| (seed, why)));
    std::panic::set_hook(quiet);
    let (seed, why) = found.unwrap_or_else(|| panic!("{sabotage:?} goes unnoticed"));
    // Noticed by what it does harm to, not by an accident of the simulation.
    let harm = ["has lost", "does not exist", "is not listed", "and is listed", "wrongly"];
    let known = harm.iter().any(|harm| why.contains(harm));
    assert!(known, "{sabotage:?} is noticed for the wrong reason, by seed {seed}: {why}");
}

#[test]
fn taking_any_rule_out_is_noticed() {
    for sabotage in [
        Sabotage::AnnounceLate,
        Sabotage::NoSecondMark,
        Sabotage::EarlyReceipt,
        Sabotage::NoRegister,
        Sabotage::StaleListing,
    ] {
        assert_noticed(sabotage, true);
    }
    for sabotage in [Sabotage::NoFenceCheck, Sabotage::AnyDate] {
        assert_noticed(sabotage, false);
    }
}
