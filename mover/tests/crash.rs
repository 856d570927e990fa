//! Every operation is cut before every one of its steps on storage, and what was not synced by then
//! is lost. The repository that is left is whole: all that is listed restores, the next backup works,
//! and garbage collection gets everything back.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "also in the functions that the tests share"
)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chunkstore::check::{CheckOptions, ReadData, Severity, check};
use chunkstore::gc::{PruneReport, PruneSettings, prune};
use chunkstore::id::SnapshotId;
use chunkstore::pack::PackClass;
use chunkstore::repository::Repository;
use common::images::{Dying, copy, files};
use common::scan::{Tree, assert_same, scan};
use common::sources::{Source, set_mtime};
use common::*;
use mover::backup::{Request, Resources};
use objects::ObjectStore;
use objects::local::LocalStore;
use objects::testing::keys;
use tempfile::TempDir;

/// What each snapshot must restore to.
type Expected = BTreeMap<SnapshotId, Tree>;

/// A backup that fills many small packs.
fn small_packs(source: &Path) -> Request<'static> {
    Request {
        resources: Resources { pack_target_bytes: 64 << 10, ..request(source).resources },
        ..request(source)
    }
}

/// Enough files for several packs and index segments.
fn first_source(dir: &Path) {
    let source = Source(dir);
    for n in 0..5 {
        source.file(format!("medium{n}"), noise(n, 140_000));
    }
    source.file("small", noise(10, 2000));
    source.file("d/tiny", "x");
}

/// Most of it changes.
fn second_source(dir: &Path) {
    std::thread::sleep(Duration::from_millis(15));
    let source = Source(dir);
    for n in 1..5 {
        source.file(format!("medium{n}"), noise(20 + n, 140_000));
    }
    source.file("small", noise(30, 3000));
    fs::remove_file(source.path("d/tiny")).unwrap();
}

/// Makes announced sessions look as if they had given no sign of life for longer than the grace.
fn age_sessions(repository: &Path) {
    let folder = repository.join("sessions");
    if folder.exists() {
        let long_ago = jiff::Timestamp::now().as_second() - 7200;
        for session in files(&folder) {
            set_mtime(&session, long_ago, 0);
        }
    }
}

fn try_prune(repository: &Repository) -> chunkstore::Result<PruneReport> {
    prune(repository, &PruneSettings::default(), jiff::Timestamp::now(), &|_| {})
}

/// Every error that a check of everything finds, a line each.
fn errors(repository: &Repository) -> Vec<String> {
    let options = CheckOptions { read_data: ReadData::All, threads: 1, unlock: Some(unlock()) };
    let mut errors = Vec::new();
    let mut note = |finding: chunkstore::check::Finding| {
        if finding.severity == Severity::Error {
            errors.push(format!("{}: {}", finding.object, finding.message));
        }
    };
    check(repository, &options, &mut note, &|_| {}).unwrap();
    errors
}

/// A repository that is left by a crash, and what has to be in it.
struct Left<'a> {
    path: &'a Path,
    /// What must be listed, and what it restores to.
    expected: &'a Expected,
    /// What may be listed or not.
    optional: &'a Expected,
    source: &'a Path,
    /// What a snapshot that is not yet known restores to.
    now: &'a Tree,
    what: String,
}

impl Left<'_> {
    fn open(&self) -> (Arc<LocalStore>, Arc<Repository>) {
        let store = local(self.path);
        let repository = open(store.clone()).unwrap_or_else(|error| {
            panic!("{}: {}", self.what, chunkstore::error::chain(&error));
        });
        (store, repository)
    }

    fn recovers(&self) {
        let what = &self.what;
        let (store, repository) = self.open();
        let list = repository.list_snapshots().unwrap();
        assert!(list.damaged.is_empty(), "{what}: {:?}", list.damaged);
        let listed: Vec<_> = list.snapshots.iter().map(|(id, _)| *id).collect();
        for id in self.expected.keys() {
            assert!(listed.contains(id), "{what}: snapshot {id} is lost");
        }
        for id in listed {
            let known = self.expected.get(&id).or(self.optional.get(&id));
            let target = restored(&repository, id);
            assert_same(known.unwrap_or(self.now), &scan(target.path()), what);
        }
        let next = save_as(&repository, &small_packs(self.source));
        let target = restored(&repository, next.id.unwrap());
        assert_same(self.now, &scan(target.path()), what);
        assert_eq!(errors(&repository), [""; 0], "{what}");

        for (id, _) in repository.list_snapshots().unwrap().snapshots {
            repository.forget(id, jiff::Timestamp::now()).unwrap();
        }
        age_sessions(self.path);
        let report = try_prune(&repository).unwrap();
        assert_eq!(report.waiting.len(), 0, "{what}: {report}");
        for folder in [PackClass::Data, PackClass::Meta].map(PackClass::folder) {
            assert_eq!(keys(&*store, folder), [""; 0], "{what}: not reclaimed:\n{report}");
        }
        for folder in ["sessions/", "tombstones/", "waits/", "doomed/", "index/"] {
            assert_eq!(keys(&*store, folder), [""; 0], "{what}: left behind");
        }
    }
}

/// Runs `operation` on a copy of `base`, cut before every one of its steps in turn, and lets `check`
/// look at what is left, with and without names that were not synced. Gives the number of steps.
fn for_every_crash(
    base: &Path,
    operation: &dyn Fn(Arc<LocalStore>) -> chunkstore::Result<()>,
    check: &dyn Fn(&Path, String),
) -> usize {
    for cut in 0.. {
        let dir = memory_dir();
        copy(base, dir.path());
        let dying = Dying::new(dir.path(), cut);
        let outcome = operation(dying.store());
        if !dying.is_dead() {
            outcome.unwrap();
            check(dir.path(), "uncut".into());
            return cut;
        }
        dying.tear();
        let image = memory_dir();
        copy(dir.path(), image.path());
        check(image.path(), format!("cut before step {cut}"));
        if dying.lose_names() {
            check(dir.path(), format!("cut before step {cut}, names lost"));
        }
    }
    unreachable!("the loop ends with the uncut operation")
}

fn empty() -> TempDir {
    memory_dir()
}

#[test]
fn a_repository_is_made_whole_or_can_be_made_again() {
    let base = empty();
    let made = |store: Arc<LocalStore>| create(store).map(drop);
    let steps = for_every_crash(base.path(), &made, &|path, what| {
        match open(local(path)) {
            Ok(repository) => assert_eq!(errors(&repository), [""; 0], "{what}"),
            Err(error) => {
                assert_eq!(error.kind(), chunkstore::ErrorKind::NotFound, "{what}");
                let repository = create(local(path)).unwrap();
                // All that may be left is a key slot, which opens nothing.
                let errors = errors(&repository);
                assert!(errors.iter().all(|line| line.starts_with("keys/")), "{errors:?}");
            }
        }
    });
    assert!(steps > 10, "{steps} steps");
}

#[test]
fn a_first_backup_cut_anywhere_leaves_nothing_or_all() {
    let (base, source) = (empty(), memory_dir());
    create(local(base.path())).unwrap();
    first_source(source.path());
    let now = scan(source.path());
    let backup = |store: Arc<LocalStore>| {
        let log = Log::default();
        run(&open(store)?, &small_packs(source.path()), &log).map(drop)
    };
    let none = Expected::new();
    let steps = for_every_crash(base.path(), &backup, &|path, what| {
        let left =
            Left { path, expected: &none, optional: &none, source: source.path(), now: &now, what };
        left.recovers();
    });
    assert!(steps > 80, "{steps} steps");
}

/// A repository with one snapshot of the first source, and a source changed since.
struct Saved {
    base: TempDir,
    source: TempDir,
    expected: Expected,
    now: Tree,
}

impl Saved {
    fn new() -> Self {
        let (base, source) = (empty(), memory_dir());
        let repository = create(local(base.path())).unwrap();
        first_source(source.path());
        let first = save_as(&repository, &small_packs(source.path()));
        let expected = Expected::from([(first.id.unwrap(), scan(source.path()))]);
        second_source(source.path());
        let now = scan(source.path());
        Self { base, source, expected, now }
    }

    /// With a second snapshot. Gives the first, which is no longer expected, and its tree.
    fn twice() -> (Self, Expected) {
        let mut saved = Self::new();
        let repository = open(local(saved.base.path())).unwrap();
        let second = save_as(&repository, &small_packs(saved.source.path()));
        let newest = Expected::from([(second.id.unwrap(), saved.now.clone())]);
        let first = std::mem::replace(&mut saved.expected, newest);
        (saved, first)
    }

    fn for_every_crash(
        &self,
        optional: &Expected,
        operation: &dyn Fn(Arc<LocalStore>) -> chunkstore::Result<()>,
    ) -> usize {
        for_every_crash(self.base.path(), operation, &|path, what| {
            let left = Left {
                path,
                expected: &self.expected,
                optional,
                source: self.source.path(),
                now: &self.now,
                what,
            };
            left.recovers();
        })
    }
}

#[test]
fn an_incremental_backup_cut_anywhere_leaves_the_old_snapshot_and_perhaps_the_new() {
    let saved = Saved::new();
    let steps = saved.for_every_crash(&Expected::new(), &|store| {
        let log = Log::default();
        run(&open(store)?, &small_packs(saved.source.path()), &log).map(drop)
    });
    assert!(steps > 60, "{steps} steps");
}

#[test]
fn forgetting_cut_anywhere_leaves_the_snapshot_or_not() {
    let (saved, first) = Saved::twice();
    let id = *first.keys().next().unwrap();
    let steps =
        saved.for_every_crash(&first, &|store| open(store)?.forget(id, jiff::Timestamp::now()));
    assert!(steps > 5, "{steps} steps");
}

#[test]
fn a_prune_cut_anywhere_harms_no_snapshot_and_is_finished_by_the_next() {
    let (saved, first) = Saved::twice();
    let repository = open(local(saved.base.path())).unwrap();
    for id in first.keys() {
        repository.forget(*id, jiff::Timestamp::now()).unwrap();
    }
    // And what a backup that died has left.
    let dying = Dying::new(saved.base.path(), 22);
    let log = Log::default();
    let other = memory_dir();
    Source(other.path()).file("unsaved", noise(40, 300_000));
    Source(other.path()).file("unsaved2", noise(41, 300_000));
    let lost = Request { lineage: "another".into(), ..small_packs(other.path()) };
    run(&open(dying.store()).unwrap(), &lost, &log).unwrap_err();
    assert!(files(saved.base.path()).len() > 15);
    let steps = saved.for_every_crash(&Expected::new(), &|store| {
        age_sessions(Path::new(&store.location()));
        let repository = open(store)?;
        let report = try_prune(&repository)?;
        assert_eq!(report.fenced.len(), 1, "{report}");
        assert!(report.packs_deleted >= 6, "{report}");
        Ok(())
    });
    assert!(steps > 60, "{steps} steps");
}
