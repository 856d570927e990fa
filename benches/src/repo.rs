//! Repositories and jobs of the benchmarks.
//!
//! Whatever fails here ends the benchmark: hence all the `expect`.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chunkstore::chunker::ChunkerConfig;
use chunkstore::codec::compress::Level;
use chunkstore::codec::seal::{Keyring, Secret};
use chunkstore::id::{PackId, RepositoryId};
use chunkstore::key_slot::{KdfCost, Unlock};
use chunkstore::record::{Session, Snapshot, Summary};
use chunkstore::repository::Repository;
use chunkstore::tree::NodeRef;
use chunkstore::writer::{Writer, WriterSettings};
use jiff::Timestamp;
use mover::backup::{Outcome, Request, Resources, backup};
use mover::monitor::Silent;
use mover::restore::{Request as RestoreRequest, RestoreOptions, RestoreSummary, restore};
use objects::ObjectStore;
use objects::local::LocalStore;

/// What opens every repository of the benchmarks.
pub fn unlock() -> Unlock {
    Unlock::KeyFile(Secret([7; 32]))
}

/// Keys that belong to no repository on a store.
///
/// # Panics
/// Never: one epoch is a key ring.
pub fn keys() -> Keyring {
    Keyring::new(RepositoryId([1; 16]), vec![Secret([2; 32])]).expect("one epoch is enough")
}

/// A name of a pack that nobody else has.
pub fn pack_id(number: u64) -> PackId {
    let mut id = [0; 16];
    id.copy_from_slice(&blake3::hash(&number.to_le_bytes()).as_bytes()[..16]);
    PackId(id)
}

/// The store in a folder.
///
/// # Panics
/// When the folder cannot be opened.
pub fn local(path: &Path) -> Arc<LocalStore> {
    Arc::new(LocalStore::open(path).expect("the folder was just made"))
}

/// A new repository on `store`.
///
/// # Panics
/// When it cannot be made.
pub fn create(store: Arc<dyn ObjectStore>, chunker: ChunkerConfig) -> Arc<Repository> {
    let created = Repository::create(store, &unlock(), KdfCost::WEAK, chunker, Timestamp::now());
    Arc::new(created.expect("the store is empty"))
}

/// A session that nobody waits for.
///
/// # Panics
/// When the store fails.
pub fn begin(repository: &Arc<Repository>, settings: WriterSettings) -> Writer {
    let session = Session {
        purpose: "backup".into(),
        writer: "benches".into(),
        started: Timestamp::now(),
        heartbeat: 0,
    };
    Writer::begin(repository.clone(), settings, &session).expect("the store works")
}

/// Settings that keep the announcement quiet for as long as a benchmark takes.
pub fn writer_settings(resources: Resources, level: Level) -> WriterSettings {
    WriterSettings { heartbeat: Duration::from_secs(3600), ..resources.writer(level) }
}

/// A snapshot of the tree with this root.
pub fn snapshot(root: (NodeRef, u8)) -> Snapshot {
    Snapshot {
        root: root.0,
        level: root.1,
        lineage: "benches".into(),
        host: "benches".into(),
        path: "/".into(),
        tags: BTreeMap::new(),
        started: Timestamp::now(),
        finished: Timestamp::now(),
        parent: None,
        summary: Summary::default(),
        sparse: chunkstore::tree::Liveness::default(),
        program: "benches".into(),
        copy_of: None,
    }
}

/// Memory and threads as the command takes them by default.
pub fn resources() -> Resources {
    Resources::new(256 << 20, crate::machine::cpus())
}

/// Saves a folder.
///
/// # Panics
/// When that fails, or something could not be saved.
pub fn save(repository: &Arc<Repository>, source: &Path) -> Outcome {
    let request = Request {
        source: source.to_owned(),
        opened: None,
        lineage: "benches".into(),
        parent: None,
        host: "benches".into(),
        tags: BTreeMap::new(),
        excludes: None,
        exclude_caches: false,
        skip: None,
        one_file_system: false,
        changed_by: None,
        compression: Level::default(),
        dry_run: false,
        resources: resources(),
        scratch: std::env::temp_dir(),
        now: Timestamp::now(),
    };
    let outcome = backup(repository, &request, &Timestamp::now, &Silent).expect("the backup works");
    assert_eq!(outcome.summary.warnings, 0);
    outcome
}

/// Restores the newest snapshot into a folder that does not exist yet.
///
/// # Panics
/// When that fails, or some file does.
pub fn get_back(repository: &Repository, target: &Path) -> RestoreSummary {
    let list = repository.list_snapshots().expect("the store works");
    let (_, snapshot) = list.snapshots.last().expect("a backup was made");
    let resources = resources();
    let summary = restore(&RestoreRequest {
        repository,
        root: (snapshot.root, snapshot.level),
        subpath: b"",
        target,
        opened: None,
        filter: None,
        options: RestoreOptions {
            threads: resources.fetch_threads(repository.store().read_cost()),
            window_bytes: resources.window_bytes(),
            ..RestoreOptions::default()
        },
        monitor: &Silent,
    });
    let summary = summary.expect("the restore works");
    assert_eq!(summary.files_failed, 0);
    summary
}
