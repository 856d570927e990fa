//! The one object client of the project: a flat store of small and large immutable objects.
//!
//! A store maps a key (`packs/3f/3f9c…`) to bytes. Objects are created whole or not at all, never
//! changed, and deleted; the one exception is [`ObjectStore::replace`], which a session's heartbeat
//! uses. All calls block: concurrency is the caller's threads, so that their number, and the
//! memory they hold, is decided in one place.
//!
//! [`local::LocalStore`] keeps objects as files below a directory. Every implementation passes the
//! same contract suite (`testing::contract`).

use std::io::{IoSlice, Read};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub mod cached;
mod error;
mod key;
pub mod local;
pub mod probe;
#[cfg(feature = "s3")]
pub mod s3;
#[cfg(feature = "testing")]
pub mod testing;
mod traffic;

pub use error::{Error, ErrorKind, Result};
pub use traffic::{Kind, Traffic};

/// A store refuses a dated request when its own clock differs by more than this from the date.
pub const DATE_TOLERANCE: Duration = Duration::from_secs(15 * 60);

/// This machine's clock: the one place of the crate that reads it.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
fn system_clock() -> SystemTime {
    SystemTime::now()
}

/// What a listing tells about one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectMeta {
    /// Full key, from the root of the store.
    pub key: String,
    /// Size in bytes.
    pub size: u64,
    /// When the object was written, by the store's clock.
    pub modified: SystemTime,
}

/// Outcome of a create-if-absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Created {
    /// The object did not exist and is now durable with exactly the given bytes.
    New,
    /// An object of that name was there already; it was left as it is.
    AlreadyExists,
}

/// What a read costs on a store, so that callers know what to read together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadCost {
    /// So many unwanted bytes between two wanted ranges are cheaper read than skipped.
    pub gap_bytes: u32,
    /// A read of so many bytes is long enough for its fixed cost not to matter.
    pub read_bytes: u32,
    /// So many reads at once keep the way to the store full, however few processors there are.
    pub parallel: usize,
}

/// A flat store of objects.
///
/// Keys consist of `/`-separated, non-empty segments of `[a-z0-9._-]`, none of which starts with a
/// dot; a segment has at most 255 bytes and a key at most 512. An implementation rejects other keys
/// with [`ErrorKind::Invalid`]. A key is never also the folder of other keys: while `a/b` exists,
/// creating or replacing `a` or `a/b/c` is [`ErrorKind::Invalid`] too.
///
/// # Guarantees every implementation gives
/// - *Atomic*: an object is never visible in part, whatever crashes.
/// - *Durable*: when [`create`](Self::create), [`replace`](Self::replace) or
///   [`delete`](Self::delete) returns `Ok`, the effect survives a crash of the machine.
/// - *Create-if-absent*: of any number of racing creators of one key exactly one gets
///   [`Created::New`]. Some object stores ignore the condition silently and replace the object:
///   `probe::create_if_absent` finds out, and callers who need it must ask.
/// - *Read after write*: a listing or read begun after an acknowledged write sees it.
pub trait ObjectStore: Send + Sync {
    /// Creates `key` with the concatenation of `parts`, unless it exists.
    fn create(&self, key: &str, parts: &[IoSlice<'_>]) -> Result<Created>;

    /// Creates `key` or replaces its content, atomically. Only for heartbeats: everything else in
    /// a repository is written once.
    fn replace(&self, key: &str, body: &[u8]) -> Result<()>;

    /// As [`create`](Self::create), with a body whose length is not known beforehand and which is not
    /// held in memory. When `body` fails, nothing is created.
    fn create_from(&self, key: &str, body: &mut dyn Read) -> Result<Created>;

    /// As [`replace`](Self::replace), but the store refuses the request with [`ErrorKind::Expired`] if
    /// it arrives at a time that, by the store's clock, differs by more than [`DATE_TOLERANCE`] from
    /// `date`, whatever held it up. A request that was not refused took effect within that time.
    ///
    /// `date` is a reading of [`clock`](Self::clock). A store that cannot hold up a request (a folder)
    /// need not look at it.
    fn replace_dated(&self, key: &str, body: &[u8], _date: SystemTime) -> Result<()> {
        self.replace(key, body)
    }

    /// Deletes many objects, in requests dated as for [`replace_dated`](Self::replace_dated). After an
    /// error some of them may be deleted. Keys that do not exist are no error.
    fn delete_dated(&self, keys: &[String], _date: SystemTime) -> Result<()> {
        keys.iter().try_for_each(|key| self.delete(key))
    }

    /// Deletes many objects, in as few requests as the store allows.
    fn delete_all(&self, keys: &[String]) -> Result<()> {
        self.delete_dated(keys, self.clock())
    }

    /// This machine's clock, by which requests are dated. Only simulations have another one.
    fn clock(&self) -> SystemTime {
        system_clock()
    }

    /// Reads the whole object, refusing one larger than `limit` bytes before memory is taken.
    fn read(&self, key: &str, limit: u64) -> Result<Vec<u8>>;

    /// Fills `buf` from byte `offset` of the object on. [`ErrorKind::Truncated`] when the object
    /// ends before `buf` is full.
    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()>;

    /// Reads the last bytes of the object, at most `limit` of them, and returns them with its size.
    fn read_tail(&self, key: &str, limit: usize) -> Result<(u64, Vec<u8>)> {
        let size = self.stat(key)?.size;
        let len = size.min(limit as u64);
        let mut tail = vec![0; len as usize];
        self.read_at(key, size - len, &mut tail)?;
        Ok((size, tail))
    }

    /// Size and time of one object; [`ErrorKind::NotFound`] when it does not exist.
    fn stat(&self, key: &str) -> Result<ObjectMeta>;

    /// Calls `each` for every object whose key starts with the folder `prefix` (which ends in `/`,
    /// or is empty for all), in no particular order. Memory does not grow with the number of objects.
    /// An error from `each` ends the listing and is returned.
    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta) -> Result<()>) -> Result<()>;

    /// Deletes the object. Deleting one that does not exist is no error.
    fn delete(&self, key: &str) -> Result<()>;

    /// Removes what writes that never ended have left behind (temporary files, unfinished uploads), if
    /// nothing was written to it for `older_than` before `now`, by the store's clock. Returns how many
    /// there were.
    ///
    /// A writer whose unfinished write disappears fails, so `older_than` must exceed the longest time
    /// that a live writer can go between two steps, and the difference of clocks: hours, not minutes.
    fn remove_unfinished(&self, older_than: Duration, now: SystemTime) -> Result<u64>;

    /// Where the store is, for messages: a path or URL without secrets.
    fn location(&self) -> String;

    /// What reads cost. The default fits a folder.
    fn read_cost(&self) -> ReadCost {
        ReadCost { gap_bytes: 256 << 10, read_bytes: 4 << 20, parallel: 1 }
    }

    /// Requests and bytes so far, where they are billed; `None` for a folder.
    fn traffic(&self) -> Option<Traffic> {
        None
    }
}

/// A shared store is a store, so that one can be watched and used at the same time.
impl<S: ObjectStore + ?Sized> ObjectStore for Arc<S> {
    fn create(&self, key: &str, parts: &[IoSlice<'_>]) -> Result<Created> {
        (**self).create(key, parts)
    }

    fn replace(&self, key: &str, body: &[u8]) -> Result<()> {
        (**self).replace(key, body)
    }

    fn create_from(&self, key: &str, body: &mut dyn Read) -> Result<Created> {
        (**self).create_from(key, body)
    }

    fn replace_dated(&self, key: &str, body: &[u8], date: SystemTime) -> Result<()> {
        (**self).replace_dated(key, body, date)
    }

    fn delete_dated(&self, keys: &[String], date: SystemTime) -> Result<()> {
        (**self).delete_dated(keys, date)
    }

    fn clock(&self) -> SystemTime {
        (**self).clock()
    }

    fn read(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        (**self).read(key, limit)
    }

    fn read_tail(&self, key: &str, limit: usize) -> Result<(u64, Vec<u8>)> {
        (**self).read_tail(key, limit)
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        (**self).read_at(key, offset, buf)
    }

    fn stat(&self, key: &str) -> Result<ObjectMeta> {
        (**self).stat(key)
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta) -> Result<()>) -> Result<()> {
        (**self).list(prefix, each)
    }

    fn delete(&self, key: &str) -> Result<()> {
        (**self).delete(key)
    }

    fn remove_unfinished(&self, older_than: Duration, now: SystemTime) -> Result<u64> {
        (**self).remove_unfinished(older_than, now)
    }

    fn location(&self) -> String {
        (**self).location()
    }

    fn read_cost(&self) -> ReadCost {
        (**self).read_cost()
    }

    fn traffic(&self) -> Option<Traffic> {
        (**self).traffic()
    }
}
