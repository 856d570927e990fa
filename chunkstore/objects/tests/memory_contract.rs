//! The store in memory passes the contract, also behind the decorators, and forks.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use objects::testing::{Fault, FaultyStore, MemoryStore, Op, RecordingStore, contract};
use objects::{ErrorKind, ObjectStore as _};

#[test]
fn contract() {
    contract::run_all(&|| Box::new(MemoryStore::new()));
}

#[test]
fn decorators_change_nothing_unasked() {
    contract::run_all(&|| {
        let recording = RecordingStore::new(Arc::new(MemoryStore::new()));
        Box::new(FaultyStore::new(recording, |_: Op, _: &str, _: u64| Fault::None))
    });
}

#[test]
fn fork_is_independent() {
    let store = MemoryStore::new();
    let _ = store.create("a", &[IoSlice::new(b"1")]).unwrap();
    let fork = store.fork();
    store.delete("a").unwrap();
    store.replace("b", b"2").unwrap();
    assert_eq!(fork.keys(), ["a"]);
    assert_eq!(store.keys(), ["b"]);
}

#[test]
fn objects_carry_the_time_that_was_set() {
    let store = MemoryStore::new();
    store.replace("a", b"").unwrap();
    let start = store.stat("a").unwrap().modified;
    store.set_now(start + Duration::from_secs(60));
    store.replace("b", b"").unwrap();
    assert_eq!(store.stat("a").unwrap().modified, start);
    assert_eq!(store.stat("b").unwrap().modified, start + Duration::from_secs(60));
}

#[test]
fn damage_changes_the_body_only() {
    let store = MemoryStore::new();
    store.replace("a", b"12345").unwrap();
    let before = store.stat("a").unwrap();
    store.damage("a", |body| body.truncate(2));
    assert_eq!(store.read("a", 5).unwrap(), b"12");
    assert_eq!(store.stat("a").unwrap().modified, before.modified);
    assert_eq!(store.read_at("a", 0, &mut [0; 5]).unwrap_err().kind(), ErrorKind::Truncated);
}
