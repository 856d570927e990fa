//! Every object of a repository, damaged in every way. Nothing wrong is ever restored without a word;
//! what does not need the object restores whole; the next backup works; `check` names the object.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "also in the functions that the tests share"
)]

mod common;

use std::collections::BTreeMap;
use std::fmt;
use std::io::IoSlice;
use std::sync::Arc;

use chunkstore::ErrorKind;
use chunkstore::check::{CheckOptions, Finding, ReadData, check};
use chunkstore::id::SnapshotId;
use chunkstore::key_slot::{self, KdfCost, Unlock};
use chunkstore::record::Session;
use chunkstore::repository::Repository;
use chunkstore::writer::Writer;
use common::scan::{Tree, assert_same, scan};
use common::sources::Source;
use common::*;
use mover::backup::{Request, Resources};
use objects::testing::MemoryStore;
use objects::{Created, ObjectStore};
use tempfile::TempDir;

/// What an object is, by its folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Config,
    KeySlot,
    Data,
    Meta,
    Index,
    Snapshot,
    Forgotten,
    Session,
}

fn kind(key: &str) -> Kind {
    match key.split('/').next().unwrap() {
        "config" => Kind::Config,
        "keys" => Kind::KeySlot,
        "packs" => Kind::Data,
        "meta" => Kind::Meta,
        "index" => Kind::Index,
        "snapshots" => Kind::Snapshot,
        "forgotten" => Kind::Forgotten,
        "sessions" => Kind::Session,
        other => panic!("{other} is no folder of a repository"),
    }
}

/// What happens to an object.
#[derive(Clone, Copy, PartialEq)]
enum Action {
    Delete,
    /// Leaves this many 64ths.
    Truncate(usize),
    Extend,
    /// Flips a bit in the byte at this many 64ths of the length, 64 being the last byte.
    Flip(usize),
    /// Exchanges it with another one of its kind.
    Swap,
    /// Puts an object of its kind from another repository in its place.
    Foreign,
}

const ACTIONS: [Action; 15] = [
    Action::Delete,
    Action::Truncate(0),
    Action::Truncate(32),
    Action::Truncate(63),
    Action::Extend,
    Action::Flip(0),
    Action::Flip(1),
    Action::Flip(5),
    Action::Flip(20),
    Action::Flip(40),
    Action::Flip(58),
    Action::Flip(63),
    Action::Flip(64),
    Action::Swap,
    Action::Foreign,
];

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delete => f.write_str("deleted"),
            Self::Truncate(part) => write!(f, "cut to {part}/64"),
            Self::Extend => f.write_str("extended"),
            Self::Flip(part) => write!(f, "with a bit flipped at {part}/64"),
            Self::Swap => f.write_str("swapped"),
            Self::Foreign => f.write_str("replaced by that of another repository"),
        }
    }
}

/// A repository with two snapshots that have nothing in common, a forgotten one, a session that
/// never ended, and two keys.
struct Site {
    store: MemoryStore,
    sources: Vec<TempDir>,
    /// The listed snapshots, in order, with what they restore to.
    snapshots: Vec<(SnapshotId, Tree)>,
    forgotten: SnapshotId,
    /// Which of the snapshots made an object.
    made_by: BTreeMap<String, usize>,
}

fn request_of(source: &TempDir, lineage: usize) -> Request<'static> {
    let plain = request(source.path());
    Request {
        lineage: lineage.to_string(),
        resources: Resources { pack_target_bytes: 64 << 10, workers: 1, ..plain.resources },
        ..plain
    }
}

impl Site {
    fn new(seed: u64) -> Self {
        let store = Arc::new(MemoryStore::new());
        let repository = create(store.clone()).unwrap();
        let other = Unlock::Passphrase(b"another key".to_vec());
        let now = jiff::Timestamp::now();
        key_slot::add(&*store, repository.keys(), &other, KdfCost::WEAK, "", now).unwrap();
        let (mut sources, mut snapshots) = (Vec::new(), Vec::new());
        let mut made_by = BTreeMap::new();
        let mut known = store.keys();
        for number in 0..2_u64 {
            let dir = memory_dir();
            let source = Source(dir.path());
            let seed = seed + 100 * number;
            source.file("medium", noise(seed, 300_000));
            source.file("sparse", noise(seed + 1, 140_000));
            source.sparse("sparse", 3 << 20, &[((1 + number) << 20, 200_000)]);
            for n in 2..6 {
                source.file(format!("d/small{n}"), noise(seed + n, 2000));
            }
            source.file("tiny", format!("tiny {seed}"));
            // More than fits one leaf, so that there are interior nodes.
            for n in 10..50 {
                let target = "far/away/".repeat(400 - n);
                std::os::unix::fs::symlink(target, source.path(format!("d/link{seed}-{n}")))
                    .unwrap();
            }
            let outcome = save_as(&repository, &request_of(&dir, number as usize));
            snapshots.push((outcome.id.unwrap(), scan(dir.path())));
            sources.push(dir);
            for key in store.keys().into_iter().filter(|key| !known.contains(key)) {
                made_by.insert(key, number as usize);
            }
            known = store.keys();
        }
        let forgotten = save_as(&repository, &request_of(&sources[0], 2)).id.unwrap();
        repository.forget(forgotten, now).unwrap();
        let session = Session {
            purpose: "backup".into(),
            writer: "a machine that has died".into(),
            started: now,
            heartbeat: 0,
        };
        let settings = request_of(&sources[0], 2).resources.writer(Default::default());
        drop(Writer::begin(repository, settings, &session).unwrap());
        let store = store.fork();
        Self { store, sources, snapshots, forgotten, made_by }
    }

    /// A copy in which `action` has happened to `key`; `None` if it cannot happen.
    fn damaged(&self, key: &str, action: Action, foreign: &Self) -> Option<Arc<MemoryStore>> {
        let store = self.store.fork();
        let read = |store: &MemoryStore, key: &str| store.read(key, 64 << 20).unwrap();
        let body = read(&store, key);
        let twin = |keys: Vec<String>| {
            let mut twins = keys.into_iter();
            // The farthest is of another snapshot, if it has one.
            twins.rfind(|other| kind(other) == kind(key) && other != key)
        };
        let at = |part: usize| (body.len() * part / 64).min(body.len() - 1);
        match action {
            Action::Delete => store.delete(key).unwrap(),
            Action::Truncate(part) => store.damage(key, |body| body.truncate(at(part))),
            Action::Extend => store.damage(key, |body| body.extend_from_slice(b"more bytes")),
            Action::Flip(part) => store.damage(key, |body| body[at(part)] ^= 4),
            Action::Swap => {
                let other = twin(store.keys())?;
                let theirs = read(&store, &other);
                store.damage(key, |body| *body = theirs);
                store.damage(&other, |theirs| *theirs = body.clone());
            }
            Action::Foreign => {
                let keys = foreign.store.keys();
                let other = keys.iter().find(|other| kind(other) == kind(key)).unwrap();
                let theirs = read(&foreign.store, other);
                store.damage(key, |body| *body = theirs);
            }
        }
        Some(Arc::new(store))
    }
}

/// Restores a snapshot of a damaged repository, and makes sure that nothing is wrong without a word.
/// Says whether everything came back.
fn restores(repository: &Repository, id: SnapshotId, expected: &Tree, what: &str) -> bool {
    let target = memory_dir();
    let log = Log::default();
    let outcome = try_restore(repository, &snapshot(repository, id), target.path(), &log);
    let found = scan(target.path());
    let complained = match &outcome {
        Ok(summary) => summary.files_failed > 0,
        Err(error) => {
            assert_ne!(error.to_string(), "", "{what}");
            true
        }
    };
    if !complained {
        assert_same(expected, &found, what);
        return true;
    }
    let is_regular = |mode: u16| mode >> 12 == 0o10;
    for (path, seen) in &found {
        let name = path.escape_ascii();
        let wanted = expected.get(path).unwrap_or_else(|| panic!("{what}: {name} is new"));
        if is_regular(seen.mode) {
            assert!(seen.content == wanted.content, "{what}: {name} is wrong");
        }
    }
    // What is not there is named: itself, or the part of the tree that cannot be read.
    let lines = log.lines();
    let missing = expected.keys().filter(|path| !found.contains_key(*path));
    let named = |path: &[u8]| log.warnings.lock().unwrap().iter().any(|one| one.path == path);
    let unnamed: Vec<_> = missing.filter(|path| !named(path)).collect();
    let tree_is_damaged = outcome.is_err() || lines.iter().any(|line| line.contains("tree node"));
    let tree_is_damaged = tree_is_damaged || lines.iter().any(|line| line.contains("meta/"));
    assert!(unnamed.is_empty() || tree_is_damaged, "{what}: {unnamed:?} not among {lines:?}");
    false
}

fn findings(repository: &Repository) -> Vec<Finding> {
    let options = CheckOptions { read_data: ReadData::All, threads: 1, unlock: Some(unlock()) };
    let mut findings = Vec::new();
    check(repository, &options, &mut |finding| findings.push(finding), &|_| {}).unwrap();
    findings
}

/// Whether `check` can see it: what is gone without a trace, and a key that is not ours, it cannot.
fn is_visible(kind: Kind, action: Action, is_used: bool) -> bool {
    match (kind, action) {
        (Kind::Data | Kind::Meta, Action::Delete) => is_used,
        (Kind::Data | Kind::Meta, _) => true,
        // What is forgotten is nobody's concern.
        (Kind::Snapshot, _) => is_used && action != Action::Delete,
        (_, Action::Delete) => false,
        (Kind::KeySlot, Action::Flip(_)) => false,
        _ => true,
    }
}

fn examine(site: &Site, store: Arc<MemoryStore>, key: &str, action: Action) {
    let what = format!("{key} {action}");
    let kind = kind(key);
    let before = store.keys();
    let repository = match open(store.clone()) {
        Ok(repository) => repository,
        Err(error) => {
            assert!(matches!(kind, Kind::Config | Kind::KeySlot), "{what}: {error}");
            let kinds = [
                ErrorKind::NotFound,
                ErrorKind::Corrupt,
                ErrorKind::WrongKey,
                ErrorKind::Unsupported,
            ];
            assert!(kinds.contains(&error.kind()), "{what}: {error:?}");
            assert!(chunkstore::error::chain(&error).len() > 20, "{what}: {error}");
            assert_eq!(store.keys(), before, "{what}: opening changes nothing");
            return;
        }
    };
    assert_ne!(kind, Kind::Config, "{what} is not noticed");
    let findings = findings(&repository);
    if is_visible(kind, action, site.made_by.contains_key(key)) {
        let named =
            findings.iter().any(|one| one.object.contains(key) || one.message.contains(key));
        assert!(named, "{what}: check does not say so, but {findings:?}");
    }

    let list = repository.list_snapshots().unwrap();
    let listed: Vec<_> = list.snapshots.iter().map(|(id, _)| *id).collect();
    if !(kind == Kind::Forgotten && action == Action::Delete) {
        assert!(!listed.contains(&site.forgotten), "{what}: a forgotten snapshot is back");
    }
    for (number, (id, tree)) in site.snapshots.iter().enumerate() {
        let own = site.made_by.get(key) == Some(&number);
        let needs = own || action == Action::Swap;
        if !listed.contains(id) {
            assert!(needs && kind == Kind::Snapshot, "{what}: {id} is not listed");
            let told = list.damaged.iter().any(|(name, _)| name.contains(&id.to_string()));
            assert!(told || action == Action::Delete, "{what}: {:?}", list.damaged);
            continue;
        }
        let whole = restores(&repository, *id, tree, &what);
        let harmful = matches!(kind, Kind::Data | Kind::Meta);
        assert!(whole || (needs && harmful), "{what}: snapshot {number} suffers");
        if own && harmful && action == Action::Delete {
            assert!(!whole, "{what}, and nobody misses it");
        }
    }

    // Life goes on.
    for (number, source) in site.sources.iter().enumerate() {
        let log = Log::default();
        let outcome = run(&repository, &request_of(source, number), &log);
        let outcome = outcome.unwrap_or_else(|error| {
            panic!("{what}: backup: {}", chunkstore::error::chain(&error));
        });
        assert_eq!(log.missing(), [""; 0], "{what}");
        // Damage within a data pack is not noticed by a backup, which reads none.
        if kind != Kind::Data || action == Action::Delete {
            let tree = &site.snapshots[number].1;
            let what = format!("{what}, saved again");
            // Opened anew, lest something is remembered from before.
            let repository = open(store.clone()).unwrap();
            assert!(restores(&repository, outcome.id.unwrap(), tree, &what), "{what}");
        }
    }
}

/// Examines every object of these kinds with every kind of damage. Gives the number of cases.
fn damage_all(kinds: &[Kind]) -> usize {
    let (site, foreign) = (Site::new(1000), Site::new(2000));
    let keys = site.store.keys();
    for kind in kinds {
        assert!(keys.iter().any(|key| self::kind(key) == *kind), "no {kind:?} to damage");
    }
    let mut cases = 0;
    for key in keys.iter().filter(|key| kinds.contains(&kind(key))) {
        for action in ACTIONS {
            if let Some(store) = site.damaged(key, action, &foreign) {
                examine(&site, store, key, action);
                cases += 1;
            }
        }
    }
    cases
}

#[test]
fn the_site_is_whole_to_begin_with() {
    let site = Site::new(1);
    let repository = open(Arc::new(site.store.fork())).unwrap();
    let errors = findings(&repository);
    let errors = errors.iter().filter(|one| one.severity == chunkstore::check::Severity::Error);
    assert_eq!(errors.count(), 0);
    for (id, tree) in &site.snapshots {
        assert!(restores(&repository, *id, tree, "whole"));
    }
    let of = |wanted| site.store.keys().iter().filter(|key| kind(key) == wanted).count();
    assert!(of(Kind::Data) >= 6 && of(Kind::Meta) >= 2 && of(Kind::Snapshot) == 3);
    assert!(site.snapshots.iter().all(|(id, _)| snapshot(&repository, *id).level > 0));
}

#[test]
fn damage_to_data_packs_costs_only_their_files() {
    assert!(damage_all(&[Kind::Data]) >= 80);
}

#[test]
fn damage_to_meta_packs_costs_only_their_snapshots() {
    assert!(damage_all(&[Kind::Meta]) >= 28);
}

#[test]
fn damage_to_the_index_costs_no_data() {
    assert!(damage_all(&[Kind::Index]) >= 14);
}

#[test]
fn damage_to_snapshots_and_marks_stays_with_them() {
    assert!(damage_all(&[Kind::Snapshot, Kind::Forgotten, Kind::Session]) >= 60);
}

#[test]
fn damage_to_configuration_and_keys_is_a_clear_error_or_harmless() {
    assert!(damage_all(&[Kind::Config, Kind::KeySlot]) >= 40);
}

#[test]
fn without_any_key_slot_the_repository_says_so() {
    let site = Site::new(1);
    let store = Arc::new(site.store.fork());
    for key in store.keys().iter().filter(|key| kind(key) == Kind::KeySlot) {
        store.damage(key, |body| body.truncate(40));
    }
    let error = open(store).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::WrongKey);
    assert!(error.to_string().contains("no readable key slot"), "{error}");
}

#[test]
fn things_that_are_no_part_of_a_repository_disturb_nobody() {
    let site = Site::new(1);
    let store = Arc::new(site.store.fork());
    for key in ["packs/00/hello", "packs/hello", "snapshots/hello", "hello", "index/hello"] {
        assert_eq!(store.create(key, &[IoSlice::new(b"x")]).unwrap(), Created::New);
    }
    let repository = open(store).unwrap();
    for (id, tree) in &site.snapshots {
        assert!(restores(&repository, *id, tree, "with strangers"));
    }
    save_as(&repository, &request_of(&site.sources[0], 0));
}
