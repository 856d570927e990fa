//! Small repositories in memory, for the tests of garbage collection and check.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chunkstore::chunker::ChunkerConfig;
use chunkstore::codec::compress::Compressor;
use chunkstore::codec::seal::Secret;
use chunkstore::error::Result;
use chunkstore::id::SnapshotId;
use chunkstore::key_slot::{KdfCost, Unlock};
use chunkstore::pack::{PackClass, ReadScratch};
use chunkstore::record::{Session, Snapshot, Summary};
use chunkstore::repository::Repository;
use chunkstore::tree::{
    Chunk, Content, Entry, EntryCursor, Kind, Node, State, Timestamp, TreeBuilder, TreeCursor,
};
use chunkstore::writer::{Writer, WriterSettings};
use objects::ObjectStore;
use objects::testing::MemoryStore;

/// Content by name.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// What each snapshot must restore to.
pub(crate) type Expected = BTreeMap<SnapshotId, Files>;

pub(crate) const CHUNK: usize = 2000;

pub(crate) fn unlock() -> Unlock {
    Unlock::KeyFile(Secret([7; 32]))
}

/// The store's time, in hours after it was made.
pub(crate) fn hour(hour: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_735_689_600 + hour * 3600)
}

pub(crate) fn time(at: SystemTime) -> jiff::Timestamp {
    jiff::Timestamp::try_from(at).unwrap()
}

/// The store's clock, which a probe object shows.
pub(crate) fn now(store: &dyn ObjectStore) -> jiff::Timestamp {
    store.replace("probe", b"").unwrap();
    let at = store.stat("probe").unwrap().modified;
    store.delete("probe").unwrap();
    time(at)
}

pub(crate) fn create(store: &Arc<MemoryStore>) -> Arc<Repository> {
    let config = ChunkerConfig::default();
    let cost = KdfCost::WEAK;
    Arc::new(Repository::create(store.clone(), &unlock(), cost, config, time(hour(0))).unwrap())
}

pub(crate) fn open(store: Arc<dyn ObjectStore>) -> Arc<Repository> {
    Arc::new(Repository::open(store, &unlock()).unwrap())
}

/// Incompressible bytes that follow from `seed`.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// `count` files of `len` bytes that no other seed has.
pub(crate) fn files(seed: u64, count: usize, len: usize) -> Files {
    (0..count).map(|n| (format!("f{n:05}"), noise(seed * 1_000_000 + n as u64, len))).collect()
}

pub(crate) fn settings() -> WriterSettings {
    WriterSettings {
        pack_target_bytes: 16 << 10,
        // The least there can be: whoever waits while holding what an upload needs hangs here.
        uploads: 1,
        pack_buffers: 1,
        heartbeat: Duration::from_secs(3600),
        ..WriterSettings::default()
    }
}

pub(crate) fn begin(repository: &Arc<Repository>) -> Result<Writer> {
    let started = now(repository.store());
    let session =
        Session { purpose: "backup".into(), writer: "host x".into(), started, heartbeat: 0 };
    Writer::begin(repository.clone(), settings(), &session)
}

pub(crate) fn node(size: u64, content: Content) -> Node {
    Node {
        kind: Kind::File,
        mode: 0o644,
        uid: 0,
        gid: 0,
        size,
        mtime: Timestamp::default(),
        ctime: Timestamp::default(),
        ino: 1,
        fs: 0,
        linked: false,
        rdev: (0, 0),
        xattrs: Vec::new(),
        state: State::Whole,
        content,
    }
}

/// Stores `files` in a session, without committing it.
pub(crate) fn fill(writer: &Writer, repository: &Repository, files: &Files) -> Result<Snapshot> {
    let mut compressor = Compressor::new(settings().compression);
    let mut tree = TreeBuilder::new(writer, repository.keys().cut());
    for (name, bytes) in files {
        let content = if bytes.len() <= 512 {
            Content::Inline(bytes.clone())
        } else {
            let mut chunks = Vec::new();
            for (at, part) in bytes.chunks(CHUNK).enumerate() {
                let blob = writer.store_data(&mut compressor, part)?;
                chunks.push(Chunk { offset: (at * CHUNK) as u64, blob });
            }
            Content::Chunks(chunks)
        };
        let key = name.replace('/', "\0").into_bytes();
        let body = chunkstore::tree::Body::Node(node(bytes.len() as u64, content));
        tree.push(&Entry { key, body })?;
    }
    let (root, level) = tree.finish()?.expect("there are files");
    Ok(snapshot(root, level, now(repository.store())))
}

/// A snapshot of a tree.
pub(crate) fn snapshot(
    root: chunkstore::tree::NodeRef,
    level: u8,
    started: jiff::Timestamp,
) -> Snapshot {
    Snapshot {
        root,
        level,
        lineage: "ns/pvc".into(),
        host: "x".into(),
        path: "/data".into(),
        tags: BTreeMap::new(),
        started,
        finished: started,
        parent: None,
        summary: Summary::default(),
        sparse: chunkstore::tree::Liveness::default(),
        program: "test".into(),
        copy_of: None,
    }
}

pub(crate) fn backup(repository: &Arc<Repository>, files: &Files) -> Result<SnapshotId> {
    let writer = begin(repository)?;
    let snapshot = fill(&writer, repository, files)?;
    writer.commit(|_| snapshot)
}

pub(crate) fn read_back(repository: &Repository, snapshot: &Snapshot) -> Result<Files> {
    let mut files = Files::new();
    let mut entries = EntryCursor::new(TreeCursor::new(repository, snapshot.root, snapshot.level));
    let mut scratch = ReadScratch::default();
    while let Some(entry) = entries.peek()? {
        let mut bytes = Vec::new();
        if let Some(Content::Inline(inline)) = entry.node().map(|node| &node.content) {
            bytes.extend_from_slice(inline);
        }
        for blob in entry.blobs() {
            repository.read_blob(PackClass::Data, blob.location, &blob.id, &mut scratch)?;
            bytes.extend_from_slice(&scratch.plain);
        }
        files.insert(String::from_utf8(entry.path()).unwrap(), bytes);
        entries.advance();
    }
    Ok(files)
}

/// Every listed snapshot restores to what it was made from. Returns how many there are.
pub(crate) fn assert_intact(repository: &Repository, expected: &Expected, context: &str) -> usize {
    let list = repository.list_snapshots().unwrap();
    assert!(list.damaged.is_empty(), "{context}: {:?}", list.damaged);
    for (id, snapshot) in &list.snapshots {
        let files = read_back(repository, snapshot)
            .unwrap_or_else(|error| panic!("{context}: {}", chunkstore::error::chain(&error)));
        assert!(files == expected[id], "{context}: snapshot {id} differs");
    }
    list.snapshots.len()
}
