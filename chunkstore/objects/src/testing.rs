//! Doubles of object stores and the suite that every real one passes, for the tests of this and
//! other crates.
//!
//! [`MemoryStore`] is a whole store whose content can be forked and damaged; [`FaultyStore`] and
//! [`RecordingStore`] wrap any store to make its calls fail and to count them; [`contract`] is the
//! suite. `server` is a real S3 server, and `proxy` what goes wrong on the way to it. Misuse of these
//! panics: they are no part of the product.

use std::io::IoSlice;

use crate::ObjectStore;
use crate::local::LocalStore;

pub mod contract;
mod faulty;
mod memory;
#[cfg(feature = "s3")]
pub mod proxy;
mod recording;
#[cfg(feature = "s3")]
pub mod server;

pub use faulty::{Fault, FaultyStore};
pub use memory::MemoryStore;
pub use recording::{Count, Counts, RecordingStore};

/// One method of [`ObjectStore`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// `create`
    Create,
    /// `replace`
    Replace,
    /// `read`
    Read,
    /// `read_at`
    ReadAt,
    /// `stat`
    Stat,
    /// `list`
    List,
    /// `delete`
    Delete,
}

impl Op {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Create,
        Self::Replace,
        Self::Read,
        Self::ReadAt,
        Self::Stat,
        Self::List,
        Self::Delete,
    ];

    /// The verb that errors of this operation carry.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Replace => "replace",
            Self::Read | Self::ReadAt => "read",
            Self::Stat => "stat",
            Self::List => "list",
            Self::Delete => "delete",
        }
    }
}

/// Whether [`MemoryStore`] and the S3 server shall ignore that an object is to be created only if it
/// is absent, as OBS may: so everything that relies on it can be tested once with and once without.
/// The environment says so, `EBACKUP_TEST_CONDITIONS=ignored`.
///
/// # Panics
/// When it says something else.
pub fn conditions_ignored() -> bool {
    match std::env::var("EBACKUP_TEST_CONDITIONS").as_deref() {
        Err(_) => false,
        Ok("ignored") => true,
        Ok(other) => panic!("EBACKUP_TEST_CONDITIONS is '{other}', and can only be 'ignored'"),
    }
}

/// A local store in a new temporary directory, which goes when the first value is dropped.
///
/// # Panics
/// When there is no room for temporary files.
pub fn temporary_local() -> (tempfile::TempDir, LocalStore) {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    let store = LocalStore::open(dir.path()).expect("the new directory can be opened");
    (dir, store)
}

/// The keys below `prefix`, in order.
///
/// # Panics
/// When the listing fails.
pub fn keys(store: &dyn ObjectStore, prefix: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let listing = store.list(prefix, &mut |meta| {
        keys.push(meta.key);
        Ok(())
    });
    listing.expect("list");
    keys.sort();
    keys
}

/// Number of bytes in all `parts`.
fn len(parts: &[IoSlice<'_>]) -> u64 {
    parts.iter().map(|part| part.len() as u64).sum()
}
