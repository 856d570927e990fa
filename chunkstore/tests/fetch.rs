//! Many blobs and tree nodes at once: all that is asked for is given, wherever it has moved to.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "each test uses its part")]
mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use chunkstore::ErrorKind;
use chunkstore::fetch::{Want, fetch};
use chunkstore::gc::{PruneSettings, RepackSettings, prune};
use chunkstore::id::SnapshotId;
use chunkstore::pack::PackClass;
use chunkstore::record::Snapshot;
use chunkstore::repository::Repository;
use chunkstore::tree::{EntryCursor, NodeRef, NodeSource, TreeCursor, for_each_node};
use common::*;
use objects::ObjectStore as _;
use objects::testing::{Fault, FaultyStore, MemoryStore, Op, keys};

/// Two snapshots that share files, so that the packs of either are partly used by the other, and the
/// files of the second.
fn two() -> (Arc<MemoryStore>, [SnapshotId; 2], Files) {
    let store = Arc::new(MemoryStore::new());
    let repository = create(&store);
    let small = |seed: u64| (0..16_000).map(move |n| (format!("s{n:05}"), noise(seed + n, 500)));
    let first: Files = files(1, 200, 5000).into_iter().chain(small(0)).collect();
    let mut second = first.clone();
    second.retain(|name, _| name.ends_with('0') || name.as_str() >= "s02000");
    let ids = [&first, &second].map(|files| backup(&repository, files).unwrap());
    store.set_now(hour(24));
    (store, ids, second)
}

fn snapshot_of(repository: &Repository, id: SnapshotId) -> Snapshot {
    let all = repository.list_snapshots().unwrap().snapshots;
    all.into_iter().find(|(other, _)| *other == id).unwrap().1
}

/// A repository that has just learnt where blobs have moved to.
fn knowing(store: &Arc<MemoryStore>) -> Arc<Repository> {
    let repository = open(store.clone());
    repository.reload_relocations().unwrap();
    repository
}

/// Every blob that the snapshot uses, numbered.
fn wants(repository: &Repository, snapshot: &Snapshot) -> Vec<Want> {
    let mut wants = Vec::new();
    let cursor = TreeCursor::new(repository, snapshot.root, snapshot.level);
    let mut entries = EntryCursor::new(cursor);
    while let Some(entry) = entries.peek().unwrap() {
        wants.extend(entry.blobs().map(|blob| Want {
            place: blob.location,
            id: blob.id,
            purpose: 0,
        }));
        entries.advance();
    }
    (0..).zip(&mut wants).for_each(|(n, want)| want.purpose = n);
    wants
}

/// What each wish was answered with.
fn fetched(
    repository: &Repository,
    wants: &[Want],
    threads: usize,
) -> BTreeMap<u32, Result<Vec<u8>, ErrorKind>> {
    let given = Mutex::new(BTreeMap::new());
    fetch(repository, PackClass::Data, wants.to_vec(), threads, &|plain, wants| {
        let plain = plain.map(<[u8]>::to_vec).map_err(|error| error.kind());
        for want in wants {
            let twice = given.lock().unwrap().insert(want.purpose, plain.clone());
            assert!(twice.is_none(), "a wish is answered once");
        }
        true
    });
    given.into_inner().unwrap()
}

/// Forgets the first snapshot and frees what only that used, copying the rest of its packs.
fn repack(store: &Arc<MemoryStore>, first: SnapshotId) {
    let repository = open(store.clone());
    repository.forget(first, time(hour(24))).unwrap();
    let repack = RepackSettings {
        max_unused_percent: 0.0,
        pack_target_bytes: 16 << 10,
        ..Default::default()
    };
    let settings = PruneSettings { repack: Some(repack), ..Default::default() };
    let report = prune(&repository, &settings, time(hour(1000)), &|_| {}).unwrap();
    assert!(report.repacked.as_ref().unwrap().blobs_copied > 0, "{report}");
    assert!(report.packs_deleted > 0, "{report}");
}

#[test]
fn blobs_are_found_in_any_of_their_places() {
    let (store, ids, files) = two();
    let snapshot = snapshot_of(&open(store.clone()), ids[1]);
    let wants = wants(&open(store.clone()), &snapshot);
    let plain = fetched(&open(store.clone()), &wants, 1);
    let whole: usize = plain.values().map(|plain| plain.as_ref().unwrap().len()).sum();
    assert_eq!(whole, files.values().map(Vec::len).filter(|len| *len > 512).sum::<usize>());
    let old: BTreeMap<String, Vec<u8>> = keys(&*store, "packs/")
        .into_iter()
        .map(|key| (key.clone(), store.read(&key, 1 << 20).unwrap()))
        .collect();
    // Opened before the blobs move, and sure of their old places.
    let before = [(1, open(store.clone())), (4, open(store.clone()))];
    assert!(before.iter().all(|(_, before)| fetched(before, &wants, 2) == plain));
    repack(&store, ids[0]);
    for (threads, before) in before {
        assert!(fetched(&before, &wants, threads) == plain, "found where they moved to");
        assert!(fetched(&knowing(&store), &wants, threads) == plain, "looked for there first");
    }

    // A copy is lost while the original is still there, as when a deletion was not carried out.
    let new: Vec<String> =
        keys(&*store, "packs/").into_iter().filter(|key| !old.contains_key(key)).collect();
    assert!(!new.is_empty());
    for (key, body) in &old {
        store.replace(key, body).unwrap();
    }
    for key in &new {
        store.delete(key).unwrap();
    }
    for threads in [1, 4] {
        assert!(fetched(&knowing(&store), &wants, threads) == plain, "found where they were");
    }

    // And now one of the originals too: its blobs fail, each by itself, and nothing else.
    let relocations = knowing(&store).relocations();
    let moved = wants.iter().map(|want| want.place.pack).find(|pack| relocations.contains(*pack));
    store.delete(&PackClass::Data.object_name(moved.unwrap())).unwrap();
    let given = fetched(&knowing(&store), &wants, 4);
    assert_eq!(given.len(), plain.len());
    let (lost, found): (Vec<_>, Vec<_>) = given.iter().partition(|(_, plain)| plain.is_err());
    assert!(!lost.is_empty() && !found.is_empty(), "{} lost", lost.len());
    assert!(found.iter().all(|(n, given)| plain[*n] == **given));
    assert!(lost.iter().all(|(_, given)| **given == Err(ErrorKind::NotFound)));
}

#[test]
fn fetching_ends_when_no_more_is_wanted() {
    let (store, ids, _) = two();
    let repository = open(store);
    let wants = wants(&repository, &snapshot_of(&repository, ids[1]));
    for threads in [1, 3] {
        let given = Mutex::new(0);
        fetch(&repository, PackClass::Data, wants.clone(), threads, &|_, _| {
            *given.lock().unwrap() += 1;
            false
        });
        assert!((1..=threads).contains(&*given.lock().unwrap()));
    }
}

/// All leaves below a snapshot, in order.
fn leaves(repository: &Repository, snapshot: &Snapshot) -> Vec<NodeRef> {
    let mut leaves = Vec::new();
    for_each_node(repository, snapshot.root, snapshot.level, &mut |_| true, &mut |_, interior| {
        if interior.level == 1 {
            leaves.extend(interior.children.iter().map(|child| child.node));
        }
        Ok(())
    })
    .unwrap();
    leaves
}

#[test]
fn tree_nodes_come_in_the_order_in_which_they_are_asked_for() {
    let (store, ids, _) = two();
    let repository = open(store.clone());
    let [first, second] = ids.map(|id| leaves(&repository, &snapshot_of(&repository, id)));
    // From packs in turn, forwards and backwards, some twice.
    let mixed: Vec<NodeRef> =
        second.iter().zip(first.iter().rev()).flat_map(|(a, b)| [*a, *b, *a]).collect();
    let packs: BTreeSet<_> = mixed.iter().map(|node| node.pack).collect();
    assert!(packs.len() >= 3 && mixed.len() > 20, "{} nodes in {}", mixed.len(), packs.len());
    let one_by_one = |nodes: &[NodeRef]| -> Vec<Vec<u8>> {
        nodes.iter().map(|node| repository.load_node(node).unwrap()).collect()
    };
    let together = |repository: &Repository, nodes: &[NodeRef]| -> Vec<Vec<u8>> {
        repository.load_nodes(nodes).into_iter().map(|plain| plain.unwrap()).collect()
    };
    let expected = one_by_one(&mixed);
    // As many as may be held at once, the first in any case.
    let given = together(&repository, &mixed);
    assert!((1..mixed.len()).contains(&given.len()), "{}", given.len());
    assert!(given == expected[..given.len()]);
    for (nodes, expected) in mixed.chunks(25).zip(expected.chunks(25)) {
        assert!(together(&repository, nodes) == expected);
    }

    // Nodes of the second snapshot, part of whose packs are written anew.
    let some: Vec<NodeRef> = second.iter().copied().step_by(second.len() / 30).collect();
    let expected = one_by_one(&some);
    repack(&store, ids[0]);
    assert!(together(&repository, &some) == expected, "by who knows the old places");
    assert!(together(&knowing(&store), &some) == expected, "by who knows the new ones");

    // Those of a damaged pack are said to be, each in its place.
    let relocations = knowing(&store).relocations();
    let pack_of = |node: &NodeRef| relocations.newest(node.location()).pack;
    let damaged = pack_of(&some[some.len() / 2]);
    store.damage(&PackClass::Meta.object_name(damaged), |bytes| bytes.truncate(bytes.len() / 2));
    let given = knowing(&store).load_nodes(&some);
    assert_eq!(given.len(), some.len());
    let mut whole = 0;
    for ((given, expected), node) in given.into_iter().zip(expected).zip(&some) {
        match given {
            Ok(plain) => {
                assert!(plain == expected);
                whole += 1;
            }
            Err(error) => {
                assert_eq!((error.kind(), pack_of(node)), (ErrorKind::Corrupt, damaged));
            }
        }
    }
    assert!((1..some.len()).contains(&whole), "{whole} of {} are whole", some.len());
}

/// Whoever needs the table of a pack that somebody else is reading waits for that.
#[test]
fn a_table_is_read_once_however_many_threads_need_it() {
    let (store, ids, _) = two();
    let wants = wants(&open(store.clone()), &snapshot_of(&open(store.clone()), ids[1]));
    let reads: Arc<Mutex<BTreeMap<String, u32>>> = Arc::default();
    let counted = {
        let reads = reads.clone();
        // A table is read at the end of its pack, whose size is asked for then.
        FaultyStore::new(store.clone(), move |op, key: &str, _| {
            if op == Op::Stat && key.starts_with("packs/") {
                *reads.lock().unwrap().entry(key.to_owned()).or_default() += 1;
                // Gives the others every chance to come and ask too.
                std::thread::yield_now();
            }
            Fault::None
        })
    };
    let repository = open(Arc::new(counted));
    // Single blobs in the order of their places within packs, so that all threads need the same pack.
    let packs: BTreeSet<_> = wants.iter().map(|want| want.place.pack).collect();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for pack in &packs {
                    let (store, keys) = (repository.store(), repository.keys());
                    repository.packs(PackClass::Data).get(store, keys, *pack).unwrap();
                }
            });
        }
    });
    let reads = reads.lock().unwrap();
    assert_eq!(reads.len(), packs.len());
    assert!(reads.values().all(|count| *count == 1), "{reads:?}");
}

#[test]
fn a_table_that_could_not_be_read_is_read_when_it_is_needed_again() {
    let (store, ids, _) = two();
    let want = wants(&open(store.clone()), &snapshot_of(&open(store.clone()), ids[1]))[0];
    let faulty = FaultyStore::new(store, |op, key: &str, n| {
        if op == Op::Stat && key.starts_with("packs/") && n < 3 {
            return Fault::FailBefore(objects::ErrorKind::Unavailable);
        }
        Fault::None
    });
    let repository = open(Arc::new(faulty));
    let get = || {
        let (store, keys) = (repository.store(), repository.keys());
        repository.packs(PackClass::Data).get(store, keys, want.place.pack).map(drop)
    };
    let failed = (0..8).take_while(|_| get().is_err()).count();
    assert!((1..=3).contains(&failed), "{failed}");
}
