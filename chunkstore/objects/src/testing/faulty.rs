//! A store whose calls fail when the test says so, before or after taking effect.

use std::io::{IoSlice, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::Op;
use crate::{Created, Error, ErrorKind, ObjectMeta, ObjectStore, Result};

/// What happens to one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It goes through.
    None,
    /// It fails and nothing is done.
    FailBefore(ErrorKind),
    /// It is carried out, and the caller sees this error instead of its outcome.
    FailAfter(ErrorKind),
}

/// A store in front of `S` in which `decide(op, key, n)` chooses the fault of each call, where `n`
/// counts the earlier calls of the same `op`: the first has 0. The key of a listing is its prefix.
#[derive(Debug)]
pub struct FaultyStore<S, F> {
    inner: S,
    decide: F,
    calls: [AtomicU64; Op::ALL.len()],
}

impl<S: ObjectStore, F: Fn(Op, &str, u64) -> Fault + Send + Sync> FaultyStore<S, F> {
    /// Puts faults in front of `inner`.
    pub fn new(inner: S, decide: F) -> Self {
        Self { inner, decide, calls: Default::default() }
    }

    /// The store behind, without faults.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// Calls of `op` so far, those that failed included.
    pub fn calls(&self, op: Op) -> u64 {
        self.counter(op).load(Ordering::SeqCst)
    }

    fn counter(&self, op: Op) -> &AtomicU64 {
        &self.calls[op as usize]
    }

    fn call<T>(&self, op: Op, key: &str, call: impl FnOnce() -> Result<T>) -> Result<T> {
        let fail = |kind| Err(Error::new(kind, op.verb(), key).because("injected fault"));
        let n = self.counter(op).fetch_add(1, Ordering::SeqCst);
        match (self.decide)(op, key, n) {
            Fault::None => call(),
            Fault::FailBefore(kind) => fail(kind),
            Fault::FailAfter(kind) => call().and_then(|_| fail(kind)),
        }
    }
}

impl<S: ObjectStore, F: Fn(Op, &str, u64) -> Fault + Send + Sync> ObjectStore
    for FaultyStore<S, F>
{
    fn create(&self, key: &str, parts: &[IoSlice<'_>]) -> Result<Created> {
        self.call(Op::Create, key, || self.inner.create(key, parts))
    }

    fn create_from(&self, key: &str, body: &mut dyn Read) -> Result<Created> {
        self.call(Op::Create, key, || self.inner.create_from(key, body))
    }

    fn replace(&self, key: &str, body: &[u8]) -> Result<()> {
        self.call(Op::Replace, key, || self.inner.replace(key, body))
    }

    fn read(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        self.call(Op::Read, key, || self.inner.read(key, limit))
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.call(Op::ReadAt, key, || self.inner.read_at(key, offset, buf))
    }

    fn stat(&self, key: &str) -> Result<ObjectMeta> {
        self.call(Op::Stat, key, || self.inner.stat(key))
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta) -> Result<()>) -> Result<()> {
        self.call(Op::List, prefix, || self.inner.list(prefix, each))
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.call(Op::Delete, key, || self.inner.delete(key))
    }

    fn remove_unfinished(&self, older_than: Duration, now: SystemTime) -> Result<u64> {
        self.inner.remove_unfinished(older_than, now)
    }

    fn location(&self) -> String {
        self.inner.location()
    }
}

#[cfg(test)]
mod tests {
    use super::super::MemoryStore;
    use super::*;

    #[test]
    fn a_fault_before_does_nothing_and_one_after_did_everything() {
        let store = FaultyStore::new(MemoryStore::new(), |op, _: &str, n| match (op, n) {
            (Op::Create, 0) => Fault::FailBefore(ErrorKind::Full),
            (Op::Create, 1) | (Op::Delete, 0) => Fault::FailAfter(ErrorKind::Io),
            _ => Fault::None,
        });
        let create = |key| store.create(key, &[IoSlice::new(b"x")]);
        assert_eq!(create("a").unwrap_err().kind(), ErrorKind::Full);
        assert_eq!(create("b").unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(create("c").unwrap(), Created::New);
        assert_eq!(store.inner().keys(), ["b", "c"]);
        assert_eq!(store.delete("b").unwrap_err().kind(), ErrorKind::Io);
        store.delete("b").unwrap();
        assert_eq!(store.inner().keys(), ["c"]);
        assert_eq!((store.calls(Op::Create), store.calls(Op::Delete)), (3, 2));
    }
}
