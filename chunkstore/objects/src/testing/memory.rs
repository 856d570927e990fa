//! A store in memory, as faithful as the contract, with a clock that tests set.

use std::collections::BTreeMap;
use std::io::{IoSlice, Read};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::conditions_ignored;
use crate::key;
use crate::{Created, DATE_TOLERANCE, Error, ErrorKind, ObjectMeta, ObjectStore, Result};

/// A store in memory.
///
/// Its clock stands still, from 2025-01-01 00:00 UTC on, until [`set_now`](Self::set_now) sets it.
/// It creates only what is absent, unless [`conditions_ignored`] says otherwise.
/// To share one, put it into an [`Arc`]; to get an independent copy, [`fork`](Self::fork) it.
#[derive(Debug)]
pub struct MemoryStore {
    conditional: bool,
    state: Mutex<State>,
}

#[derive(Debug, Clone)]
struct State {
    now: SystemTime,
    objects: BTreeMap<String, Object>,
}

#[derive(Debug, Clone)]
struct Object {
    body: Arc<[u8]>,
    modified: SystemTime,
}

impl Default for MemoryStore {
    fn default() -> Self {
        let now = UNIX_EPOCH + Duration::from_secs(1_735_689_600);
        let state = Mutex::new(State { now, objects: BTreeMap::new() });
        Self { conditional: !conditions_ignored(), state }
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the clock that dates objects written from now on.
    pub fn set_now(&self, now: SystemTime) {
        self.state().now = now;
    }

    /// A new store with the content and clock of this one at this moment, as a crash would leave
    /// it. Bodies are shared, so this is cheap; changes to either do not show in the other.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self { conditional: self.conditional, state: Mutex::new(self.state().clone()) }
    }

    /// All keys in order.
    pub fn keys(&self) -> Vec<String> {
        self.state().objects.keys().cloned().collect()
    }

    /// Changes the body of an object in place and leaves its time, as a failing disk would.
    ///
    /// # Panics
    /// When the object does not exist.
    pub fn damage(&self, key: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.state();
        let object = state.objects.get_mut(key).expect("only what exists can be damaged");
        let mut body = object.body.to_vec();
        change(&mut body);
        object.body = body.into();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn body(&self, op: &'static str, key: &str) -> Result<Object> {
        key::validate(op, key)?;
        let found = self.state().objects.get(key).cloned();
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, op, key))
    }
}

impl State {
    /// Refuses a key that is a folder, or that has an object as one of its folders.
    fn check_place(&self, op: &'static str, key: &str) -> Result<()> {
        let invalid = |reason| Err(Error::new(ErrorKind::Invalid, op, key).because(reason));
        let folders = key.match_indices('/').filter_map(|(at, _)| key.get(..at));
        for folder in folders {
            if self.objects.contains_key(folder) {
                return invalid(format!("'{folder}' is an object, so it is no folder"));
            }
        }
        let below = format!("{key}/");
        let next =
            self.objects.range::<str, _>((Bound::Included(below.as_str()), Bound::Unbounded));
        match next.map(|(key, _)| key).next() {
            Some(inner) if inner.starts_with(&below) => {
                invalid(format!("it is the folder of '{inner}'"))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a request that comes too long before or after its date.
    fn check_date(&self, op: &'static str, key: &str, date: SystemTime) -> Result<()> {
        let apart = self.now.duration_since(date).unwrap_or_else(|early| early.duration());
        if apart <= DATE_TOLERANCE { Ok(()) } else { Err(Error::new(ErrorKind::Expired, op, key)) }
    }

    fn put(&mut self, key: &str, body: Vec<u8>) {
        let object = Object { body: body.into(), modified: self.now };
        self.objects.insert(key.to_owned(), object);
    }
}

impl ObjectStore for MemoryStore {
    fn create(&self, key: &str, parts: &[IoSlice<'_>]) -> Result<Created> {
        key::validate("create", key)?;
        let body = parts.iter().flat_map(|part| part.iter().copied()).collect();
        let mut state = self.state();
        if self.conditional && state.objects.contains_key(key) {
            return Ok(Created::AlreadyExists);
        }
        state.check_place("create", key)?;
        state.put(key, body);
        Ok(Created::New)
    }

    fn replace(&self, key: &str, body: &[u8]) -> Result<()> {
        key::validate("replace", key)?;
        let mut state = self.state();
        state.check_place("replace", key)?;
        state.put(key, body.to_vec());
        Ok(())
    }

    fn create_from(&self, key: &str, body: &mut dyn Read) -> Result<Created> {
        let mut bytes = Vec::new();
        let read = body.read_to_end(&mut bytes);
        read.map_err(|err| Error::from_io("create", key, err))?;
        self.create(key, &[IoSlice::new(&bytes)])
    }

    fn replace_dated(&self, key: &str, body: &[u8], date: SystemTime) -> Result<()> {
        self.state().check_date("replace", key, date)?;
        self.replace(key, body)
    }

    fn delete_dated(&self, keys: &[String], date: SystemTime) -> Result<()> {
        for key in keys {
            self.state().check_date("delete", key, date)?;
            self.delete(key)?;
        }
        Ok(())
    }

    /// The store's own.
    fn clock(&self) -> SystemTime {
        self.state().now
    }

    fn read(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        let object = self.body("read", key)?;
        if object.body.len() as u64 > limit {
            return Err(Error::new(ErrorKind::TooLarge, "read", key));
        }
        Ok(object.body.to_vec())
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let object = self.body("read", key)?;
        if buf.is_empty() {
            return Ok(());
        }
        let start = usize::try_from(offset).ok();
        let range = start.and_then(|start| Some(start..start.checked_add(buf.len())?));
        let Some(bytes) = range.and_then(|range| object.body.get(range)) else {
            return Err(Error::new(ErrorKind::Truncated, "read", key));
        };
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn read_tail(&self, key: &str, limit: usize) -> Result<(u64, Vec<u8>)> {
        let object = self.body("read", key)?;
        let from = object.body.len().saturating_sub(limit);
        Ok((object.body.len() as u64, object.body[from..].to_vec()))
    }

    fn stat(&self, key: &str) -> Result<ObjectMeta> {
        let object = self.body("stat", key)?;
        Ok(object.meta(key))
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta) -> Result<()>) -> Result<()> {
        key::validate_prefix("list", prefix)?;
        let mut after = Bound::Included(prefix.to_owned());
        loop {
            // One by one, so that `each` can use the store and sees what others do meanwhile.
            let next = {
                let state = self.state();
                let mut rest = state.objects.range((after, Bound::Unbounded));
                rest.next().map(|(key, object)| object.meta(key))
            };
            let Some(meta) = next.filter(|meta| meta.key.starts_with(prefix)) else {
                return Ok(());
            };
            after = Bound::Excluded(meta.key.clone());
            each(meta)?;
        }
    }

    fn delete(&self, key: &str) -> Result<()> {
        key::validate("delete", key)?;
        self.state().objects.remove(key);
        Ok(())
    }

    fn remove_unfinished(&self, _: Duration, _: SystemTime) -> Result<u64> {
        Ok(0)
    }

    fn location(&self) -> String {
        "memory".to_owned()
    }
}

impl Object {
    fn meta(&self, key: &str) -> ObjectMeta {
        ObjectMeta { key: key.to_owned(), size: self.body.len() as u64, modified: self.modified }
    }
}
