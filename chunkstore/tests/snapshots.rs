//! Finding snapshots among many: which are found, and how many are read for it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "each test uses its part")]
mod common;

use std::sync::Arc;

use chunkstore::id::SnapshotId;
use chunkstore::record;
use chunkstore::repository::Repository;
use common::*;
use objects::testing::{MemoryStore, Op, RecordingStore};

const COUNT: u64 = 300;

/// A snapshot an hour, each fifth of lineage `rare` up to half of them, all others of lineage `often`.
fn many() -> (Arc<MemoryStore>, Vec<(SnapshotId, String)>) {
    let store = Arc::new(MemoryStore::new());
    let repository = create(&store);
    let all = (1..=COUNT).map(|number| {
        store.set_now(hour(number));
        let writer = begin(&repository).unwrap();
        let mut snapshot = fill(&writer, &repository, &files(number, 1, 10)).unwrap();
        let is_rare = number % 5 == 0 && number <= COUNT / 2;
        snapshot.lineage = if is_rare { "rare".to_owned() } else { "often".to_owned() };
        let lineage = snapshot.lineage.clone();
        (writer.commit(|_| snapshot).unwrap(), lineage)
    });
    let all = all.collect();
    (store, all)
}

fn newest(repository: &Repository, lineage: &str) -> Option<SnapshotId> {
    let found = repository.newest_snapshot(&|snapshot| snapshot.lineage == lineage).unwrap();
    found.map(|(id, _)| id)
}

#[test]
fn the_newest_is_found_without_reading_all() {
    let (store, all) = many();
    let recorded = Arc::new(RecordingStore::new(store.clone()));
    let repository = open(recorded.clone());
    let last = |lineage: &str| all.iter().rfind(|(_, of)| of == lineage).map(|(id, _)| *id);
    let reads = |lineage: &str| {
        let before = recorded.counts().of(Op::Read).calls;
        assert_eq!(newest(&repository, lineage), last(lineage), "{lineage}");
        recorded.counts().of(Op::Read).calls - before
    };
    assert!(reads("often") <= 16);
    assert!((COUNT / 2..COUNT).contains(&reads("rare")));
    assert_eq!(reads("never"), COUNT);
}

#[test]
fn what_is_forgotten_or_damaged_is_passed_over() {
    let (store, all) = many();
    let repository = open(store.clone());
    let often: Vec<SnapshotId> =
        all.iter().rev().filter(|(_, of)| of == "often").map(|(id, _)| *id).collect();
    repository.forget(often[0], time(hour(COUNT))).unwrap();
    store.damage(&record::snapshot_name(often[1]), |bytes| bytes.truncate(20));
    assert_eq!(newest(&repository, "often"), Some(often[2]));
    let list = repository.list_snapshots().unwrap();
    assert_eq!(list.forgotten, [often[0]]);
    assert_eq!(list.damaged.len(), 1);
    assert_eq!(list.snapshots.len() as u64, COUNT - 2);
    assert!(list.snapshots.is_sorted_by_key(|(_, snapshot)| snapshot.started));
}
