//! What the end-to-end tests share: repositories, jobs, and a scanner of its own that compares two
//! trees attribute by attribute.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test uses its part, and fails if that does"
)]

pub mod faultfs;
pub mod images;
pub mod leased;
pub mod said;
pub mod scan;
pub mod site;
pub mod sources;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use chunkstore::chunker::ChunkerConfig;
use chunkstore::codec::compress::Level;
use chunkstore::codec::seal::Secret;
use chunkstore::id::SnapshotId;
use chunkstore::key_slot::{KdfCost, Unlock};
use chunkstore::record::Snapshot;
use chunkstore::repository::Repository;
use jiff::Timestamp;
use mover::backup::{Outcome, Request, Resources, backup};
use mover::monitor::{Concern, Monitor, Warning, display_path};
use mover::restore::{Request as RestoreRequest, RestoreOptions, RestoreSummary, restore};
use objects::ObjectStore;
use objects::local::LocalStore;
use tempfile::TempDir;

/// A temporary folder; in memory if there is a file system for that, as nothing of it has to last.
pub fn memory_dir() -> TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { tempfile::tempdir_in(shm).unwrap() } else { tempfile::tempdir().unwrap() }
}

pub fn unlock() -> Unlock {
    Unlock::KeyFile(Secret([7; 32]))
}

pub fn create(store: Arc<dyn ObjectStore>) -> chunkstore::Result<Arc<Repository>> {
    let chunker = ChunkerConfig::default();
    Repository::create(store, &unlock(), KdfCost::WEAK, chunker, Timestamp::now()).map(Arc::new)
}

pub fn open(store: Arc<dyn ObjectStore>) -> chunkstore::Result<Arc<Repository>> {
    Repository::open(store, &unlock()).map(Arc::new)
}

pub fn local(path: &Path) -> Arc<LocalStore> {
    Arc::new(LocalStore::open(path).unwrap())
}

/// A repository in a temporary folder.
pub struct Repo {
    pub dir: TempDir,
    pub repository: Arc<Repository>,
}

impl Repo {
    pub fn new() -> Self {
        let dir = memory_dir();
        let repository = create(local(dir.path())).unwrap();
        Self { dir, repository }
    }
}

/// Called with the path of each file that is about to be read.
pub type OnBegin<'a> = Box<dyn Fn(&[u8]) + Sync + 'a>;

/// Told of everything, and may interfere when work on a file begins.
#[derive(Default)]
pub struct Log<'a> {
    pub warnings: Mutex<Vec<Warning>>,
    pub cancel: AtomicBool,
    pub on_begin: Option<OnBegin<'a>>,
}

impl Monitor for Log<'_> {
    fn begin(&self, path: &[u8]) {
        if let Some(on_begin) = &self.on_begin {
            on_begin(path);
        }
    }

    fn advance(&self, _: u64, _: u64) {}

    fn warning(&self, warning: Warning) {
        self.warnings.lock().unwrap().push(warning);
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
}

impl<'a> Log<'a> {
    pub fn on_begin(on_begin: impl Fn(&[u8]) + Sync + 'a) -> Self {
        Self { on_begin: Some(Box::new(on_begin)), ..Self::default() }
    }

    /// All warnings as lines, in order of paths.
    pub fn lines(&self) -> Vec<String> {
        let mut warnings = self.warnings.lock().unwrap().clone();
        warnings.sort_by(|a, b| a.path.cmp(&b.path));
        warnings.iter().map(ToString::to_string).collect()
    }

    /// Paths of the warnings of files that are missing altogether.
    pub fn missing(&self) -> Vec<String> {
        let warnings = self.warnings.lock().unwrap();
        let missing = warnings.iter().filter(|warning| warning.concern == Concern::Missing);
        let mut paths: Vec<_> = missing.map(|one| display_path(&one.path)).collect();
        paths.sort();
        paths
    }
}

/// A plain backup of `source`. It claims to begin in ten seconds, so that the next one trusts the
/// times of files made just now.
pub fn request(source: &Path) -> Request<'static> {
    Request {
        source: source.to_owned(),
        opened: None,
        lineage: "test".into(),
        parent: None,
        host: "host".into(),
        tags: BTreeMap::new(),
        excludes: None,
        exclude_caches: false,
        skip: None,
        one_file_system: false,
        changed_by: None,
        compression: Level::default(),
        dry_run: false,
        resources: Resources { memory_bytes: 96 << 20, workers: 2, pack_target_bytes: 4 << 20 },
        scratch: std::env::temp_dir(),
        now: Timestamp::now() + jiff::SignedDuration::from_secs(10),
    }
}

pub fn run(
    repository: &Arc<Repository>,
    request: &Request<'_>,
    log: &Log<'_>,
) -> chunkstore::Result<Outcome> {
    backup(repository, request, &Timestamp::now, log)
}

/// Saves what `request` says, without a complaint.
#[track_caller]
pub fn save_as(repository: &Arc<Repository>, request: &Request<'_>) -> Outcome {
    let log = Log::default();
    let outcome = match run(repository, request, &log) {
        Ok(outcome) => outcome,
        Err(error) => panic!("backup: {}", chunkstore::error::chain(&error)),
    };
    assert_eq!(log.lines(), [""; 0], "backup");
    outcome
}

#[track_caller]
pub fn save(repository: &Arc<Repository>, source: &Path) -> Outcome {
    save_as(repository, &request(source))
}

pub fn snapshot(repository: &Repository, id: SnapshotId) -> Snapshot {
    let list = repository.list_snapshots().unwrap();
    let found = list.snapshots.into_iter().find(|(other, _)| *other == id);
    found.unwrap().1
}

pub fn restore_options() -> RestoreOptions {
    RestoreOptions { threads: 2, sync: false, verify: true, ..RestoreOptions::default() }
}

pub fn try_restore(
    repository: &Repository,
    snapshot: &Snapshot,
    target: &Path,
    log: &Log<'_>,
) -> chunkstore::Result<RestoreSummary> {
    restore(&RestoreRequest {
        repository,
        root: (snapshot.root, snapshot.level),
        subpath: b"",
        target,
        opened: None,
        filter: None,
        options: restore_options(),
        monitor: log,
    })
}

/// Restores snapshot `id` into a new folder, without a complaint.
#[track_caller]
pub fn restored(repository: &Repository, id: SnapshotId) -> TempDir {
    let target = memory_dir();
    restore_into(repository, id, target.path());
    target
}

#[track_caller]
pub fn restore_into(repository: &Repository, id: SnapshotId, target: &Path) {
    let log = Log::default();
    let done = try_restore(repository, &snapshot(repository, id), target, &log);
    let summary = match done {
        Ok(summary) => summary,
        Err(error) => panic!("restore: {}", chunkstore::error::chain(&error)),
    };
    assert_eq!(log.lines(), [""; 0], "restore");
    assert_eq!((summary.files_failed, summary.warnings), (0, 0));
}

/// Prints past the test harness, which hides what passing tests print.
pub fn not_tested(what: &str) {
    use std::io::Write;
    let line = format!("\n******** NOT TESTED: {what} ********\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A file system in memory that is unmounted when dropped.
pub struct Mounted(pub PathBuf);

impl Mounted {
    pub fn tmpfs(at: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let options = format!("size={size},mode=755");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "ebackup-test"])
            .arg(at)
            .output();
        let mounted = mounted.is_ok_and(|output| output.status.success());
        mounted.then(|| Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
        assert!(unmounted.unwrap().success());
    }
}

/// Incompressible bytes that follow from `seed`.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}
