//! What the actors do: save, prune, forget, read.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use chunkstore::ErrorKind;
use chunkstore::codec::compress::Compressor;
use chunkstore::error::Result;
use chunkstore::gc::{PruneSettings, RepackSettings, prune};
use chunkstore::id::PackId;
use chunkstore::pack::BlobKind;
use chunkstore::record::{Session, Snapshot};
use chunkstore::repository::{Register, Repository};
use chunkstore::tree::{
    Body, Content, Entry, LeafAt, NodeRef, NodeSink, TreeBuilder, TreeCursor, for_each_node,
};
use chunkstore::writer::{Writer, WriterSettings};

use crate::common::{self, Files, noise, read_back, time};
use crate::world::{Client, Sabotage, next};
use crate::{Kind, Stage, Watched};

/// Contents that files choose from, so that writers share them.
const CONTENTS: u64 = 14;
const FILES: u64 = 8;
/// Entries between two files in a wide world: they never change, and have no content.
const FILLERS: usize = 300;

/// Packs of some four blobs, besides the room kept for the longest table.
const PACK: usize = 9000;

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
pub(crate) fn open(stage: &Arc<Stage>, client: &Arc<Client>) -> Result<Arc<Repository>> {
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
    let leaves = match parent {
        Some((snapshot, _)) => leaves_of(&repository, snapshot, &writer)?,
        None => Vec::new(),
    };
    let mut old = BTreeMap::new();
    for entry in leaves.iter().flat_map(|at| &at.leaf.entries) {
        let name = String::from_utf8(entry.path()).unwrap();
        if files.get(&name).is_some_and(|new| parent.unwrap().1.get(&name) == Some(new)) {
            old.insert(name, entry);
        }
    }
    let mut compressor = Compressor::new(settings().compression);
    let mut entries: Vec<Entry> = stage.fillers.to_vec();
    for (name, bytes) in &files {
        let known = old
            .get(name)
            .filter(|entry| entry.blobs().all(|blob| writer.is_usable_at(blob.location)));
        entries.push(match known {
            Some(entry) => (*entry).clone(),
            None => {
                let blob = writer.store_data(&mut compressor, bytes)?;
                let chunks = vec![chunkstore::tree::Chunk { offset: 0, blob }];
                let node = common::node(bytes.len() as u64, Content::Chunks(chunks));
                Entry { key: name.clone().into_bytes(), body: Body::Node(node) }
            }
        });
        if next(choice).is_multiple_of(6) {
            world.sleep(client.id.unwrap(), next(choice) % 200);
            if next(choice).is_multiple_of(2) {
                writer.renew()?;
            }
        }
    }
    entries.sort_by(|a, b| a.key.cmp(&b.key));
    let (root, level) = build(stage, &writer, repository.keys().cut(), &leaves, &entries)?;
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

/// All leaves of the tree of an older snapshot, whose nodes the writer need not store again.
fn leaves_of(repository: &Repository, snapshot: &Snapshot, writer: &Writer) -> Result<Vec<LeafAt>> {
    let all = &mut |_: &NodeRef| true;
    for_each_node(repository, snapshot.root, snapshot.level, all, &mut |node, _| {
        writer.remember_node(*node);
        Ok(())
    })?;
    let mut cursor = TreeCursor::new(repository, snapshot.root, snapshot.level);
    let mut leaves = Vec::new();
    while let Some(at) = cursor.next_leaf()? {
        writer.remember_node(at.child.node);
        leaves.push(at);
    }
    Ok(leaves)
}

/// Builds a tree as a backup does: leaves of the older one are taken over where all their entries recur.
fn build(
    stage: &Stage,
    writer: &Writer,
    cut: &[u8; 32],
    old: &[LeafAt],
    entries: &[Entry],
) -> Result<(NodeRef, u8)> {
    let ungated = Ungated(writer);
    let sink: &dyn NodeSink = if stage.sabotage == Sabotage::NoGate { &ungated } else { writer };
    let mut tree = TreeBuilder::new(sink, cut);
    let mut old = old.iter().peekable();
    let mut rest = entries;
    while let Some(entry) = rest.first() {
        while old.next_if(|at| at.child.first_key < entry.key).is_some() {}
        match old.next_if(|at| rest.starts_with(&at.leaf.entries)) {
            Some(at) => {
                let taken = tree.push_leaf(at)?;
                let refused = !at.is_last && !writer.is_usable_at(at.child.node.location());
                stage.world.cover(|coverage| {
                    coverage.leaves_taken_over += u64::from(taken);
                    coverage.leaves_refused += u64::from(refused);
                });
                rest = &rest[at.leaf.entries.len()..];
            }
            None => {
                tree.push(entry)?;
                rest = &rest[1..];
            }
        }
    }
    Ok(tree.finish()?.unwrap())
}

/// A writer that is not asked what may be referred to.
struct Ungated<'a>(&'a Writer);

impl NodeSink for Ungated<'_> {
    fn store_node(&self, kind: BlobKind, plain: &[u8]) -> Result<NodeRef> {
        self.0.store_node(kind, plain)
    }

    fn may_refer(&self, _: PackId, _: u128) -> bool {
        true
    }
}

/// Entries that lie between the files f0, f1, …
pub(crate) fn fillers() -> Arc<Vec<Entry>> {
    let entry = |at: usize| {
        let key = format!("f{}-{:04}", at / FILLERS, at % FILLERS).into_bytes();
        Entry { key, body: Body::Node(common::node(0, Content::None)) }
    };
    Arc::new((0..FILLERS * FILES as usize).map(entry).collect())
}

/// What a snapshot restores to, without the fillers.
pub(crate) fn restore(
    stage: &Stage,
    repository: &Repository,
    snapshot: &Snapshot,
) -> Result<Files> {
    let mut files = read_back(repository, snapshot)?;
    let all = files.len();
    files.retain(|name, _| !name.contains('-'));
    assert_eq!(all - files.len(), stage.fillers.len(), "the tree was read wrongly");
    Ok(files)
}

pub(crate) fn run_writer(stage: &Arc<Stage>, client: &Arc<Client>, mut choice: u64) {
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

pub(crate) fn prune_once(stage: &Arc<Stage>, client: &Arc<Client>, repack: bool) -> Result<bool> {
    let repository = open(stage, client)?;
    let repack = repack.then(|| RepackSettings {
        max_unused_percent: 0.0,
        pack_target_bytes: PACK,
        ..RepackSettings::default()
    });
    let grace = if stage.kind == Kind::Crowded { 60 } else { 3600 };
    let settings = PruneSettings {
        grace: Duration::from_secs(grace),
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

pub(crate) fn run_prune(stage: &Arc<Stage>, client: &Arc<Client>, mut choice: u64) {
    let (most, gaps) = match stage.kind {
        Kind::Crowded => (12, [20, 200, 2000]),
        _ => (3, [100, 4000, 40_000]),
    };
    for _ in 0..most + next(&mut choice) % 3 {
        let _failed = prune_once(stage, client, !next(&mut choice).is_multiple_of(3));
        let gap = gaps[(next(&mut choice) % 3) as usize];
        stage.world.sleep(client.id.unwrap(), next(&mut choice) % gap);
    }
}

pub(crate) fn run_forget(stage: &Arc<Stage>, client: &Arc<Client>, mut choice: u64) {
    let (most, gap) = match stage.kind {
        Kind::Crowded => (30, 600),
        Kind::Wide => (12, 1500),
        Kind::Plain | Kind::Slow => (6, 6000),
    };
    for _ in 0..most {
        stage.world.sleep(client.id.unwrap(), next(&mut choice) % gap);
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

pub(crate) fn run_reader(stage: &Arc<Stage>, client: &Arc<Client>, mut choice: u64) {
    for _ in 0..4 {
        stage.world.sleep(client.id.unwrap(), next(&mut choice) % 8000);
        let read = || -> Result<()> {
            let repository = open(stage, client)?;
            let list = repository.list_snapshots()?;
            let Some((id, snapshot)) = list.snapshots.last() else {
                return Ok(());
            };
            match restore(stage, &repository, snapshot) {
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
