//! A store that counts the calls and bytes that go through it.

use std::collections::BTreeMap;
use std::io::{IoSlice, Read};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::{Op, len};
use crate::{Created, ObjectMeta, ObjectStore, ReadCost, Result, Traffic};

/// What was done by one kind of call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Calls, those that failed included.
    pub calls: u64,
    /// Bytes of the bodies offered for writing (also to a create that found the object there), or
    /// of those read successfully. None for `stat`, `list` and `delete`.
    pub bytes: u64,
}

/// What was done so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<Op, Count>);

impl Counts {
    /// Calls and bytes of `op`.
    pub fn of(&self, op: Op) -> Count {
        self.0.get(&op).copied().unwrap_or_default()
    }

    /// Calls of every kind.
    pub fn calls(&self) -> u64 {
        self.0.values().map(|count| count.calls).sum()
    }
}

/// A store in front of `S` that counts.
#[derive(Debug)]
pub struct RecordingStore<S> {
    inner: S,
    counts: Mutex<Counts>,
}

impl<S: ObjectStore> RecordingStore<S> {
    /// Counts what goes to `inner`.
    pub fn new(inner: S) -> Self {
        Self { inner, counts: Mutex::default() }
    }

    /// The store behind; calls to it are not counted.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.lock().clone()
    }

    /// Starts counting from nothing again, and returns what was done so far.
    pub fn reset(&self) -> Counts {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, op: Op, calls: u64, bytes: u64) {
        let mut counts = self.lock();
        let count = counts.0.entry(op).or_default();
        count.calls += calls;
        count.bytes += bytes;
    }
}

impl<S: ObjectStore> ObjectStore for RecordingStore<S> {
    fn create(&self, key: &str, parts: &[IoSlice<'_>]) -> Result<Created> {
        self.count(Op::Create, 1, len(parts));
        self.inner.create(key, parts)
    }

    fn replace(&self, key: &str, body: &[u8]) -> Result<()> {
        self.count(Op::Replace, 1, body.len() as u64);
        self.inner.replace(key, body)
    }

    fn create_from(&self, key: &str, body: &mut dyn Read) -> Result<Created> {
        self.count(Op::Create, 1, 0);
        let mut counting = Counting { inner: body, bytes: 0 };
        let created = self.inner.create_from(key, &mut counting);
        self.count(Op::Create, 0, counting.bytes);
        created
    }

    fn replace_dated(&self, key: &str, body: &[u8], date: SystemTime) -> Result<()> {
        self.count(Op::Replace, 1, body.len() as u64);
        self.inner.replace_dated(key, body, date)
    }

    fn delete_dated(&self, keys: &[String], date: SystemTime) -> Result<()> {
        self.count(Op::Delete, keys.len() as u64, 0);
        self.inner.delete_dated(keys, date)
    }

    fn clock(&self) -> SystemTime {
        self.inner.clock()
    }

    fn read_tail(&self, key: &str, limit: usize) -> Result<(u64, Vec<u8>)> {
        self.count(Op::ReadAt, 1, 0);
        let (size, tail) = self.inner.read_tail(key, limit)?;
        self.count(Op::ReadAt, 0, tail.len() as u64);
        Ok((size, tail))
    }

    fn read_cost(&self) -> ReadCost {
        self.inner.read_cost()
    }

    fn traffic(&self) -> Option<Traffic> {
        self.inner.traffic()
    }

    fn read(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        self.count(Op::Read, 1, 0);
        let body = self.inner.read(key, limit)?;
        self.count(Op::Read, 0, body.len() as u64);
        Ok(body)
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.count(Op::ReadAt, 1, 0);
        self.inner.read_at(key, offset, buf)?;
        self.count(Op::ReadAt, 0, buf.len() as u64);
        Ok(())
    }

    fn stat(&self, key: &str) -> Result<ObjectMeta> {
        self.count(Op::Stat, 1, 0);
        self.inner.stat(key)
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta) -> Result<()>) -> Result<()> {
        self.count(Op::List, 1, 0);
        self.inner.list(prefix, each)
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.count(Op::Delete, 1, 0);
        self.inner.delete(key)
    }

    fn remove_unfinished(&self, older_than: Duration, now: SystemTime) -> Result<u64> {
        self.inner.remove_unfinished(older_than, now)
    }

    fn location(&self) -> String {
        self.inner.location()
    }
}

/// Counts what is read through it.
struct Counting<'a> {
    inner: &'a mut dyn Read,
    bytes: u64,
}

impl Read for Counting<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = self.inner.read(buf)?;
        self.bytes += len as u64;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::super::MemoryStore;
    use super::*;

    #[test]
    fn calls_and_bytes_are_counted_by_operation() {
        let store = RecordingStore::new(MemoryStore::new());
        let _ = store.create("a", &[IoSlice::new(b"12"), IoSlice::new(b"345")]).unwrap();
        store.read("a", 10).unwrap();
        store.read("a", 4).unwrap_err();
        store.read_at("a", 1, &mut [0; 3]).unwrap();
        let counts = store.reset();
        assert_eq!(counts.of(Op::Create), Count { calls: 1, bytes: 5 });
        assert_eq!(counts.of(Op::Read), Count { calls: 2, bytes: 5 });
        assert_eq!(counts.of(Op::ReadAt), Count { calls: 1, bytes: 3 });
        assert_eq!(counts.of(Op::List), Count::default());
        assert_eq!((counts.calls(), store.counts().calls()), (4, 0));
    }
}
