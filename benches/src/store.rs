//! Stores that leave out what a benchmark is not about.

use std::collections::HashMap;
use std::io::{IoSlice, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chunkstore::id::{BlobId, PackId};
use chunkstore::pack::{BlobKind, PackClass};
use chunkstore::tree::{NodeRef, NodeSink, NodeSource};
use objects::local::LocalStore;
use objects::{Created, Error, ErrorKind, ObjectMeta, ObjectStore, Result};

use crate::repo;

const DATA: &str = "packs/";

/// A local store without its data packs: their bytes are counted and dropped, and a number of packs
/// that never were is listed. All else (index, nodes, records) is on disk.
pub struct Hollow {
    inner: LocalStore,
    /// Packs `0..listed` are listed, minus those deleted.
    listed: u64,
    bytes: AtomicU64,
    deleted: Mutex<std::collections::HashSet<PackId>>,
}

impl Hollow {
    /// A store around `inner` that lists `listed` packs: those that [`repo::pack_id`] names.
    pub fn new(inner: LocalStore, listed: u64) -> Self {
        Self { inner, listed, bytes: AtomicU64::new(0), deleted: Mutex::default() }
    }

    /// Bytes of the packs that were dropped.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn meta(key: String) -> ObjectMeta {
        let (size, modified) = (32 << 20, UNIX_EPOCH + Duration::from_secs(1_735_689_600));
        ObjectMeta { key, size, modified }
    }
}

impl ObjectStore for Hollow {
    fn create(&self, key: &str, parts: &[IoSlice<'_>]) -> Result<Created> {
        if key.starts_with(DATA) {
            let len: usize = parts.iter().map(|part| part.len()).sum();
            self.bytes.fetch_add(len as u64, Ordering::Relaxed);
            return Ok(Created::New);
        }
        self.inner.create(key, parts)
    }

    fn create_from(&self, key: &str, body: &mut dyn Read) -> Result<Created> {
        self.inner.create_from(key, body)
    }

    fn replace(&self, key: &str, body: &[u8]) -> Result<()> {
        self.inner.replace(key, body)
    }

    fn read(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        self.inner.read(key, limit)
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        if key.starts_with(DATA) {
            return Err(Error::new(ErrorKind::NotFound, "read", key));
        }
        self.inner.read_at(key, offset, buf)
    }

    fn stat(&self, key: &str) -> Result<ObjectMeta> {
        if key.starts_with(DATA) {
            return Ok(Self::meta(key.to_owned()));
        }
        self.inner.stat(key)
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta) -> Result<()>) -> Result<()> {
        if prefix != DATA {
            return self.inner.list(prefix, each);
        }
        for number in 0..self.listed {
            let id = repo::pack_id(number);
            let gone = self.deleted.lock().unwrap_or_else(PoisonError::into_inner);
            if gone.contains(&id) {
                continue;
            }
            drop(gone);
            each(Self::meta(PackClass::Data.object_name(id)))?;
        }
        Ok(())
    }

    fn delete(&self, key: &str) -> Result<()> {
        let Some(name) = key.strip_prefix(DATA) else {
            return self.inner.delete(key);
        };
        if let Some(Ok(id)) = name.rsplit('/').next().map(str::parse) {
            let mut gone = self.deleted.lock().unwrap_or_else(PoisonError::into_inner);
            gone.insert(id);
        }
        Ok(())
    }

    fn remove_unfinished(&self, older_than: Duration, now: SystemTime) -> Result<u64> {
        self.inner.remove_unfinished(older_than, now)
    }

    fn location(&self) -> String {
        self.inner.location()
    }
}

/// Tree nodes in memory.
#[derive(Default)]
pub struct Nodes(Mutex<HashMap<BlobId, Vec<u8>>>);

impl Nodes {
    /// How many there are, and their bytes.
    pub fn size(&self) -> (usize, usize) {
        let nodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (nodes.len(), nodes.values().map(Vec::len).sum())
    }
}

impl NodeSink for Nodes {
    fn store_node(&self, _: BlobKind, plain: &[u8]) -> chunkstore::Result<NodeRef> {
        let id = BlobId(*blake3::hash(plain).as_bytes());
        let mut nodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.entry(id).or_insert_with(|| plain.to_vec());
        let (pack, ordinal) = (PackId([9; 16]), 0);
        Ok(NodeRef { id, pack, ordinal })
    }

    fn may_refer(&self, _: PackId, _: u128) -> bool {
        true
    }
}

impl NodeSource for Nodes {
    fn load_node(&self, node: &NodeRef) -> chunkstore::Result<Vec<u8>> {
        let nodes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.get(&node.id).cloned().ok_or_else(|| {
            chunkstore::Error::new(chunkstore::ErrorKind::NotFound, "there is no such node")
        })
    }
}

/// The time at which a store with [`Hollow`] packs is looked at: long after they were written.
pub fn later() -> jiff::Timestamp {
    jiff::Timestamp::try_from(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000))
        .expect("2027 is a time")
}
