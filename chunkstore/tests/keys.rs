//! Keys: ways in are added and removed, and one is always left.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "each test uses its part")]
mod common;

use std::sync::{Arc, Mutex};

use chunkstore::ErrorKind;
use chunkstore::id::SlotId;
use chunkstore::key_slot::{self, KdfCost, Unlock};
use chunkstore::repository::Repository;
use common::*;
use objects::testing::{Fault, FaultyStore, MemoryStore, Op};

/// A repository with a second way in, and both slots.
fn two_keys() -> (Arc<MemoryStore>, [SlotId; 2], Unlock) {
    let store = Arc::new(MemoryStore::new());
    let repository = create(&store);
    let first = key_slot::list(&*store).unwrap()[0].slot;
    let other = Unlock::Passphrase(b"another".to_vec());
    let second =
        key_slot::add(&*store, repository.keys(), &other, KdfCost::WEAK, "", time(hour(1)));
    (store, [first, second.unwrap().slot], other)
}

#[test]
fn the_last_key_stays() {
    let (store, [first, second], other) = two_keys();
    key_slot::remove(&*store, first).unwrap();
    assert_eq!(key_slot::remove(&*store, second).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(key_slot::remove(&*store, first).unwrap_err().kind(), ErrorKind::NotFound);
    Repository::open(store, &other).unwrap();
}

/// Both have seen that there is another key before either deletes its own.
#[test]
fn two_removals_at_once_leave_a_key() {
    let (store, [first, second], _) = two_keys();
    let meanwhile = Mutex::new(Some(store.clone()));
    let faulty = FaultyStore::new(store.clone(), move |op, _: &str, _| {
        if op == Op::Delete
            && let Some(store) = meanwhile.lock().unwrap().take()
        {
            key_slot::remove(&*store, second).unwrap();
        }
        Fault::None
    });
    let error = key_slot::remove(&faulty, first).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    Repository::open(store, &unlock()).unwrap();
}
