//! Blobs that are copied out of mostly dead packs are found again, and what says where does not pile up.

use chunkstore::codec::compress::Compressor;
use chunkstore::pack::{PackClass, ReadScratch};
use chunkstore::relocation::Relocations;
use chunkstore::tree::{Body, Chunk, Content, Entry, Node};

use super::*;

/// A backup that takes over what its parent refers to, as far as the writer allows.
fn backup_after(repository: &Arc<Repository>, parent: &Snapshot) -> (SnapshotId, u64) {
    let writer = begin(repository).unwrap();
    let mut tree = TreeBuilder::new(&writer, repository.keys().cut());
    let cursor = TreeCursor::new(&**repository, parent.root, parent.level);
    let mut entries = EntryCursor::new(cursor);
    let mut compressor = Compressor::new(settings().compression);
    let mut stored_again = 0;
    while let Some(entry) = entries.peek().unwrap() {
        let mut entry = entry.clone();
        if let Body::Node(Node { content: Content::Chunks(chunks), .. }) = &mut entry.body {
            for chunk in chunks {
                if writer.is_usable_at(chunk.blob.location) {
                    continue;
                }
                let (mut scratch, blob) = (ReadScratch::default(), chunk.blob);
                let class = PackClass::Data;
                repository.read_blob(class, blob.location, &blob.id, &mut scratch).unwrap();
                chunk.blob = writer.store_data(&mut compressor, &scratch.plain).unwrap();
                stored_again += 1;
            }
        }
        tree.push(&entry).unwrap();
        entries.advance();
    }
    let (root, level) = tree.finish().unwrap().unwrap();
    let snapshot = Snapshot { root, level, ..parent.clone() };
    (writer.commit(|_| snapshot).unwrap(), stored_again)
}

#[test]
fn references_to_repacked_blobs_are_taken_over_and_followed() {
    let Three { store, repository, mut expected, ids } = three();
    // Of the first two, a third of the blobs is no longer used; nobody but the second refers to them.
    repository.forget(ids[0], time(hour(24))).unwrap();
    let before = bytes(&store);
    let report = run_prune(&repository);
    let repacked = report.repacked.clone().unwrap();
    assert!(repacked.packs >= 1 && repacked.blobs_copied > 0, "{report}");
    assert!(report.packs_deleted >= repacked.packs && bytes(&store) < before, "{report}");
    assert_eq!(keys(&*store, "relocations/").len(), 1);
    // An opened repository finds out, and so does a new one.
    assert_eq!(assert_intact(&repository, &expected, "same"), 2);
    assert_eq!(assert_intact(&open(store.clone()), &expected, "new"), 2);
    assert_converged(&open(store.clone()), "after");

    let Some(Verdict::Snapshot(parent)) = repository.verdict(ids[1]).unwrap() else {
        panic!("the snapshot is there");
    };
    let (id, stored_again) = backup_after(&open(store.clone()), &parent);
    assert_eq!(stored_again, 0, "copies are as good as originals");
    expected.insert(id, expected[&ids[1]].clone());
    // The copies stay as long as anybody refers to the old places.
    repository.forget(ids[1], time(hour(24))).unwrap();
    assert_converged(&open(store.clone()), "parent forgotten");
    assert_eq!(assert_intact(&open(store.clone()), &expected, "parent forgotten"), 2);
    // Copies are copied again.
    let mut part: Files = expected[&id].clone();
    part.retain(|name, _| name.as_str() < "f00010");
    expected.insert(backup(&repository, &part).unwrap(), part);
    repository.forget(id, time(hour(24))).unwrap();
    assert_converged(&open(store.clone()), "copied again");
    assert_eq!(assert_intact(&open(store.clone()), &expected, "copied again"), 2);
    // And in the end nothing is left of all that.
    for (id, _) in repository.list_snapshots().unwrap().snapshots {
        repository.forget(id, time(hour(24))).unwrap();
    }
    assert_converged(&open(store.clone()), "all forgotten");
    for folder in ["packs/", "meta/", "relocations/", "index/"] {
        assert_eq!(keys(&*store, folder), [""; 0], "{folder}");
    }
}

/// Each round one more blob of every pack is not used any more, so that the rest is copied once more.
#[test]
fn what_is_said_of_a_blob_does_not_grow_with_each_repacking() {
    const ROUNDS: usize = 14;
    let store = Arc::new(MemoryStore::new());
    let repository = create(&store);
    let saved = files(1, 64, 1200);
    let one_in_sixteen = |at: usize| -> Files {
        let numbered = saved.clone().into_iter().enumerate();
        numbered.filter(|(n, _)| n % 16 == at).map(|(_, file)| file).collect()
    };
    let all = backup(&repository, &saved).unwrap();
    let kept = one_in_sixteen(ROUNDS);
    let mut expected = Expected::from([(backup(&repository, &kept).unwrap(), kept)]);
    let used_once: Vec<SnapshotId> =
        (0..ROUNDS).map(|round| backup(&repository, &one_in_sixteen(round)).unwrap()).collect();
    expected.extend(used_once.iter().copied().zip((0..ROUNDS).map(one_in_sixteen)));
    store.set_now(hour(24));
    let mut copied = 0;
    for gone in std::iter::once(all).chain(used_once) {
        repository.forget(gone, time(hour(24))).unwrap();
        expected.remove(&gone);
        for _ in 0..2 {
            copied += run_prune(&repository).repacked.unwrap().blobs_copied;
        }
        assert_eq!(assert_intact(&repository, &expected, "moved"), expected.len());
    }
    assert!(copied > 200, "{copied}");
    assert_converged(&open(store.clone()), "moved");
    let relocations = Relocations::load(&*store, repository.keys()).unwrap();
    let places: usize = relocations.packs().map(|(_, moved)| moved.places.len()).sum();
    assert!(places <= 200, "{places} places of {} packs", relocations.packs().count());
}

/// A copy may outlive the relocation that leads to it: a session that begins when that is announced must
/// not count on it.
#[test]
fn a_relocation_about_to_go_is_not_taken_over() {
    let Three { store, repository, mut expected, ids } = three();
    repository.forget(ids[0], time(hour(24))).unwrap();
    run_prune(&repository);
    let parent = repository.snapshot(ids[1]).unwrap();
    let relocations = Relocations::load(&*store, repository.keys()).unwrap();
    let mut entries = EntryCursor::new(TreeCursor::new(&*repository, parent.root, parent.level));
    let mut moved = None;
    while let Some(entry) = entries.peek().unwrap() {
        moved =
            moved.or(entry.blobs().find(|blob| relocations.contains(blob.location.pack)).copied());
        entries.advance();
    }
    let moved = moved.unwrap();
    // Somebody finds the copy through the index, and refers to it itself.
    let same: Files = expected[&ids[1]].clone();
    expected.insert(backup(&repository, &same).unwrap(), same);
    let waited_for = begin(&repository).unwrap();
    assert!(waited_for.is_usable_at(moved.location));
    repository.forget(ids[1], time(hour(24))).unwrap();
    assert_eq!(run_prune(&repository).waiting.len(), 1);
    let late = begin(&repository).unwrap();
    assert!(!late.is_usable_at(moved.location), "its relocation may go before the session ends");
    let mut tree = TreeBuilder::new(&late, repository.keys().cut());
    let chunk = Chunk { offset: 0, blob: moved };
    let content = Content::Chunks(vec![chunk]);
    let body = Body::Node(node(u64::from(moved.len), content));
    tree.push(&Entry { key: b"a".to_vec(), body }).unwrap();
    assert!(tree.finish().is_err(), "nor can a tree");
    // The session that was there before may, and holds the relocation up.
    late.abandon().unwrap();
    waited_for.abandon().unwrap();
    store.set_now(hour(48));
    assert_converged(&repository, "after");
    let relocations = Relocations::load(&*store, repository.keys()).unwrap();
    assert!(!relocations.contains(moved.location.pack), "it has gone");
    assert_eq!(assert_intact(&repository, &expected, "after"), 2);
}

#[test]
fn a_reader_that_holds_tables_of_deleted_packs_finds_their_blobs() {
    let Three { store, repository, expected, ids } = three();
    // Reads every table once.
    assert_eq!(assert_intact(&repository, &expected, "before"), 3);
    open(store.clone()).forget(ids[0], time(hour(24))).unwrap();
    let report = run_prune(&open(store.clone()));
    assert!(report.packs_deleted > 0, "{report}");
    assert_eq!(assert_intact(&repository, &expected, "after"), 2);
}

#[test]
fn repacking_keeps_to_its_limits_and_a_dry_run_only_tells() {
    let Three { store, repository, ids, .. } = three();
    repository.forget(ids[0], time(hour(24))).unwrap();
    let run = |max_unused_percent, max_bytes, dry_run| {
        let pack_target_bytes = 16 << 10;
        let repack = RepackSettings { max_unused_percent, max_bytes, pack_target_bytes };
        let settings = PruneSettings { dry_run, repack: Some(repack), ..Default::default() };
        prune(&open(store.clone()), &settings, time(hour(24)), &|_| {}).unwrap().repacked.unwrap()
    };
    let before = store.keys();
    let told = run(0.0, u64::MAX, true);
    assert!(told.packs > 0 && told.unused_bytes > 5_000 && told.blobs_copied == 0, "{told}");
    assert_eq!(store.keys(), before);
    assert_eq!(run(90.0, u64::MAX, false).packs, 0, "the waste is tolerable");
    assert_eq!(run(0.0, 100, false).packs, 0, "nothing is that small");
    assert_eq!(run(0.0, u64::MAX, false).packs, told.packs);
    assert_eq!(run(0.0, u64::MAX, false).unused_bytes, 0);
}
