//! What check reports about damage of every kind, and what still restores.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use chunkstore::check::{
    CheckOptions, CheckSummary, Finding, FindingKind, ReadData, Severity, check, repair_index,
};
use chunkstore::id::{GenerationId, SnapshotId};
use chunkstore::record::{self, Tombstones};
use chunkstore::relocation;
use chunkstore::repository::Repository;
use common::*;
use objects::ObjectStore;
use objects::testing::{MemoryStore, keys};

fn options() -> CheckOptions {
    CheckOptions { read_data: ReadData::All, threads: 2, unlock: Some(unlock()) }
}

fn run(repository: &Repository, options: &CheckOptions) -> (CheckSummary, Vec<Finding>) {
    let mut findings = Vec::new();
    let summary = check(repository, options, &mut |f| findings.push(f), &|_| {}).unwrap();
    let errors = findings.iter().filter(|f| f.severity == Severity::Error).count();
    assert_eq!(
        (summary.errors, summary.warnings),
        (errors as u64, (findings.len() - errors) as u64)
    );
    (summary, findings)
}

/// A repository with at least two objects of every kind, and what its snapshots hold.
fn full() -> (Arc<MemoryStore>, Expected) {
    let store = Arc::new(MemoryStore::new());
    let repository = create(&store);
    let mut expected = Expected::new();
    let mut many = files(1, 30, 1500);
    many.extend((0..1200).map(|n| (format!("small{n:05}"), noise(n, 20))));
    for files in [many, files(2, 40, 5000), files(3, 3, 1500)] {
        expected.insert(backup(&repository, &files).unwrap(), files);
    }
    let forgotten = [4, 5].map(|seed| backup(&repository, &files(seed, 3, 1500)).unwrap());
    forgotten.iter().for_each(|id| repository.forget(*id, time(hour(1))).unwrap());
    drop(begin(&repository).unwrap());
    drop(begin(&repository).unwrap());
    let keys = repository.keys();
    for n in [1, 2] {
        let id = GenerationId([n; 16]);
        for create in [record::create_tombstones, record::create_doomed] {
            let _ = create(&*store, keys, id, &Tombstones::default()).unwrap();
        }
        let kind = chunkstore::codec::seal::ObjectKind::Tombstones;
        let waits = record::Waits { sessions: vec![SnapshotId([n; 16])] };
        let moved = relocation::Record::Moved(BTreeMap::new());
        let _ = moved.create(&*store, keys, SnapshotId([n; 16])).unwrap();
        let name = record::waits_name(id);
        let _ = record::create_json(&*store, keys, kind, &name, &waits).unwrap();
    }
    let cost = chunkstore::key_slot::KdfCost::WEAK;
    let other = chunkstore::key_slot::Unlock::Passphrase(b"x".to_vec());
    chunkstore::key_slot::add(&*store, keys, &other, cost, "", time(hour(1))).unwrap();
    (store, expected)
}

#[test]
fn a_sound_repository_has_no_findings() {
    let (store, _) = full();
    let repository = open(store.clone());
    let (summary, findings) = run(&repository, &options());
    assert_eq!(findings, []);
    assert_eq!((summary.snapshots, summary.packs), (3, summary.packs_read));
    // Where leaves are cut depends on the random key.
    assert!(summary.nodes >= 5 && summary.unused_packs > 0, "{summary}");
    let half = CheckOptions { read_data: ReadData::Percent(50.0), ..options() };
    let (half, _) = run(&repository, &half);
    assert_eq!(half.packs_read, half.packs.div_ceil(2));
    assert_eq!(run(&repository, &CheckOptions::default()).0.packs_read, 0);
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Action {
    Delete,
    Truncate,
    Empty,
    Extend,
    Flip(usize),
    Swap,
}

/// Applies `action`; says which objects were changed.
fn apply(store: &MemoryStore, key: &str, other: &str, action: Action) -> Vec<String> {
    match action {
        Action::Delete => store.delete(key).unwrap(),
        Action::Truncate => store.damage(key, |body| body.truncate(body.len() - 1)),
        Action::Empty => store.damage(key, Vec::clear),
        Action::Extend => store.damage(key, |body| body.push(0)),
        Action::Flip(share) => store.damage(key, |body| {
            let at = (body.len() - 1) * share / 100;
            body[at] ^= 4;
        }),
        Action::Swap => {
            let (a, b) = (store.read(key, 1 << 30).unwrap(), store.read(other, 1 << 30).unwrap());
            store.damage(key, |body| *body = b);
            store.damage(other, |body| *body = a);
            return vec![key.to_owned(), other.to_owned()];
        }
    }
    vec![key.to_owned()]
}

/// What nothing refers to can vanish unnoticed.
fn is_missed(folder: &str) -> bool {
    ["packs/", "meta/", "config", "index/"].contains(&folder)
}

#[test]
fn damage_of_every_kind_to_every_kind_of_object_is_reported_and_spares_the_rest() {
    let (base, expected) = full();
    let used: BTreeSet<String> = {
        let (_, findings) = run(&open(base.clone()), &options());
        assert_eq!(findings, []);
        // A pack is in use if a snapshot suffers from its loss.
        let packs = keys(&*base, "packs/").into_iter().chain(keys(&*base, "meta/"));
        let hurts = |key: &String| {
            let store = Arc::new(base.fork());
            store.delete(key).unwrap();
            let (_, findings) = run(&open(store), &CheckOptions::default());
            findings.iter().any(|f| f.severity == Severity::Error && !f.snapshots.is_empty())
        };
        packs.filter(hurts).collect()
    };
    assert!(used.len() > 10);
    let folders = [
        "packs/",
        "meta/",
        "index/",
        "snapshots/",
        "forgotten/",
        "sessions/",
        "tombstones/",
        "waits/",
        "doomed/",
        "relocations/",
        "keys/",
    ];
    let mut actions =
        vec![Action::Delete, Action::Truncate, Action::Empty, Action::Extend, Action::Swap];
    actions.extend([0, 12, 25, 40, 55, 70, 85, 100].map(Action::Flip));
    for folder in folders {
        let mut of_kind = keys(&*base, folder);
        match folder {
            "packs/" | "meta/" => of_kind.retain(|key| used.contains(key)),
            "snapshots/" => of_kind.retain(|key| {
                expected.contains_key(&key[folder.len()..].parse::<SnapshotId>().unwrap())
            }),
            // The largest first: its loss is noticed, as snapshots use what it names.
            "index/" => of_kind.sort_by_key(|key| std::cmp::Reverse(base.stat(key).unwrap().size)),
            _ => {}
        }
        assert!(of_kind.len() >= 2, "{folder}");
        for action in &actions {
            if *action == Action::Delete && !is_missed(folder)
                || folder == "keys/" && matches!(action, Action::Extend | Action::Flip(_))
            {
                continue;
            }
            let context = format!("{action:?} {folder}");
            let store = Arc::new(base.fork());
            let repository = open(store.clone());
            let changed = apply(&store, &of_kind[0], &of_kind[1], *action);
            let (_, findings) = run(&repository, &options());
            let least = match folder {
                "forgotten/" | "sessions/" => Severity::Warning,
                "index/" if *action == Action::Delete => Severity::Warning,
                _ => Severity::Error,
            };
            for key in &changed {
                let named = findings.iter().any(|finding| {
                    (finding.object == *key || folder == "index/" && finding.object == folder)
                        && finding.severity >= least
                });
                assert!(named, "{context}: {key} not in {findings:#?}");
            }
            // What no finding names restores; what one names does not, or at least is whole.
            let repository = if folder == "keys/" { repository } else { open(store.clone()) };
            let hit: BTreeSet<_> =
                findings.iter().flat_map(|f| &f.snapshots).map(|affected| affected.id).collect();
            for (id, snapshot) in repository.list_snapshots().unwrap().snapshots {
                match read_back(&repository, &snapshot) {
                    Ok(files) => assert!(files == expected[&id], "{context}: wrong data"),
                    Err(error) => assert!(hit.contains(&id), "{context}: {id}: {error}"),
                }
            }
            assert!(hit.len() < 3, "{context}: every snapshot was hit");
        }
    }
}

#[test]
fn damage_to_the_configuration_and_the_only_key_is_reported() {
    for (folder, action) in [
        ("config", Action::Delete),
        ("config", Action::Truncate),
        ("config", Action::Flip(90)),
        ("keys/", Action::Delete),
        ("keys/", Action::Flip(98)),
        ("keys/", Action::Truncate),
    ] {
        let store = Arc::new(MemoryStore::new());
        let repository = create(&store);
        let key =
            if folder == "config" { "config".into() } else { keys(&*store, folder).remove(0) };
        apply(&store, &key, "", action);
        let (summary, findings) = run(&repository, &options());
        assert!(summary.errors > 0, "{action:?} {folder}");
        assert!(findings.iter().any(|f| key.starts_with(&f.object)), "{findings:#?}");
    }
}

#[test]
fn a_damaged_chunk_names_the_snapshots_and_files_that_use_it() {
    let store = Arc::new(MemoryStore::new());
    let repository = create(&store);
    let shared = files(1, 60, 1500);
    let mut ids = BTreeSet::new();
    for extra in [2, 3] {
        let mut all = shared.clone();
        all.extend(files(extra, 2, 1500).into_iter().map(|(name, bytes)| (name + "x", bytes)));
        ids.insert(backup(&repository, &all).unwrap());
    }
    let other = backup(&repository, &files(9, 5, 1500)).unwrap();
    // The pack of the shared files.
    let list = repository.list_snapshots().unwrap();
    let all_packs = keys(&*store, "packs/");
    let key = all_packs.iter().find(|key| {
        let fork = Arc::new(store.fork());
        fork.delete(key).unwrap();
        let (_, findings) = run(&open(fork), &CheckOptions::default());
        findings.iter().any(|f| f.snapshots.len() == 2)
    });
    let key = key.unwrap();
    store.damage(key, |body| body[100] ^= 1);
    let repository = open(store.clone());
    let (_, findings) = run(&repository, &CheckOptions::default());
    assert_eq!(findings, [], "tables are sound");
    let (_, findings) = run(&repository, &options());
    assert_eq!(findings.len(), 1, "{findings:#?}");
    let finding = &findings[0];
    assert_eq!((finding.kind, &finding.object), (FindingKind::Blob, key));
    assert_eq!(finding.snapshots.iter().map(|a| a.id).collect::<BTreeSet<_>>(), ids);
    assert!((1..=20).contains(&finding.files.len()) && finding.files_count >= 1);
    assert!(shared.contains_key(&finding.files[0]), "{finding}");
    let text = finding.to_string();
    assert!(text.contains("of ns/pvc (/data)") && text.contains("file f0"), "{text}");
    // With the whole pack gone, more files are named, at most 20.
    store.delete(key).unwrap();
    let (_, findings) = run(&open(store), &CheckOptions::default());
    let finding = findings.iter().find(|f| f.object == *key).unwrap();
    assert!(finding.files_count >= finding.files.len() as u64 && finding.files.len() > 1);
    assert!(list.snapshots.iter().any(|(id, _)| *id == other));
}

#[test]
fn strange_objects_are_warned_of() {
    let (store, _) = full();
    for key in ["stray", "packs/xx", "index/note", "snapshots/readme", "keys/00"] {
        let _ = store.create(key, &[]).unwrap();
        let (summary, findings) = run(&open(store.clone()), &options());
        assert_eq!((summary.errors, summary.warnings), (0, 1), "{findings:#?}");
        assert_eq!((findings[0].kind, &findings[0].object[..]), (FindingKind::Unknown, key));
        store.delete(key).unwrap();
    }
}

#[test]
fn a_lost_index_is_rebuilt_and_finds_duplicates_again() {
    for quiet in [true, false] {
        let store = Arc::new(MemoryStore::new());
        let repository = create(&store);
        let data = files(2, 40, 5000);
        backup(&repository, &data).unwrap();
        backup(&repository, &files(3, 5, 1500)).unwrap();
        let segments = keys(&*store, "index/");
        store.delete(&segments[0]).unwrap();
        store.damage(&segments[1], |body| body[70] ^= 1);
        let session = (!quiet).then(|| begin(&repository).unwrap());
        let (summary, _) = run(&repository, &options());
        assert!(summary.errors + summary.warnings >= 2);
        let mut findings = Vec::new();
        let summary = repair_index(&repository, &mut |f| findings.push(f), &|_| {}).unwrap();
        assert_eq!((findings.len(), summary.packs_damaged), (0, 0));
        assert_eq!((summary.segments_written, summary.segments_deleted), (1, 1), "{summary:?}");
        let (_, findings) = run(&repository, &options());
        assert_eq!(findings, []);
        let writer = begin(&repository).unwrap();
        fill(&writer, &repository, &data).unwrap();
        assert_eq!(writer.counters().blobs_new.load(std::sync::atomic::Ordering::Relaxed), 0);
        drop((writer, session));
    }
}

#[test]
fn repair_leaves_the_segments_of_a_running_backup_and_skips_damaged_packs() {
    let store = Arc::new(MemoryStore::new());
    let repository = create(&store);
    let old = files(2, 10, 1500);
    let expected_old = backup(&repository, &old).unwrap();
    let writer = begin(&repository).unwrap();
    let added = files(4, 300, 1500);
    let snapshot = fill(&writer, &repository, &added).unwrap();
    let summary = repair_index(&repository, &mut |_| {}, &|_| {}).unwrap();
    assert_eq!(summary.segments_deleted, 0);
    let id = writer.commit(|_| snapshot).unwrap();
    let expected = [(expected_old, old), (id, added)].into();
    assert_eq!(assert_intact(&repository, &expected, "after"), 2);
    assert_eq!(run(&repository, &options()).1, []);
    let key = keys(&*store, "packs/").remove(0);
    store.damage(&key, |body| body.truncate(100));
    let mut findings = Vec::new();
    let summary = repair_index(&open(store), &mut |f| findings.push(f), &|_| {}).unwrap();
    assert_eq!((summary.packs_damaged, &findings[0].object), (1, &key));
}
