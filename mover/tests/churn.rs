//! Small files that change here and there, day after day: the repository grows no further than it has
//! to.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use chunkstore::gc::{PruneSettings, RepackSettings, prune};
use chunkstore::id::SnapshotId;
use chunkstore::record::Snapshot;
use chunkstore::repository::Repository;
use common::scan::{assert_same, scan};
use common::*;
use jiff::Timestamp;

const LEN: usize = 4000;

/// Noise that no other seed has, of nearly the same length: nobody can miss that it was written.
fn write(dir: &Path, file: usize, seed: u64) {
    let bytes = noise(seed, LEN + seed as usize % 97);
    fs::write(dir.join(format!("{file:04}")), bytes).unwrap();
}

fn files(dir: &Path, count: usize) {
    (0..count).for_each(|file| write(dir, file, file as u64));
}

/// Frees what is unused, to the last byte.
fn clean(repository: &Repository) {
    let repack = RepackSettings { max_unused_percent: 0.0, ..Default::default() };
    let settings = PruneSettings { repack: Some(repack), ..Default::default() };
    for _ in 0..2 {
        prune(repository, &settings, Timestamp::now(), &|_| {}).unwrap();
    }
}

/// Saves 100 files, and again when 60 of them have changed: the other 40 keep bundles of all 100.
fn saved_with_sparse_bundles(repository: &Arc<Repository>, source: &Path) {
    files(source, 100);
    save(repository, source);
    (0..100).filter(|n| n % 5 < 3).for_each(|n| write(source, n, 1000 + n as u64));
    let second = save(repository, source);
    assert!(!whole(repository, second.id.unwrap()).sparse.0.is_empty());
}

fn stored(repository: &Repository) -> usize {
    let mut bytes = 0;
    let each = &mut |meta: objects::ObjectMeta| {
        bytes += meta.size as usize;
        Ok(())
    };
    repository.store().list("packs/", each).unwrap();
    bytes
}

/// As the next backup reads it.
fn whole(repository: &Repository, id: SnapshotId) -> Snapshot {
    repository.newest_snapshot(&|_| true).unwrap().filter(|(newest, _)| *newest == id).unwrap().1
}

#[test]
fn what_little_is_used_of_a_bundle_is_stored_anew_once() {
    let (repo, source) = (Repo::new(), memory_dir());
    let repository = &repo.repository;
    files(source.path(), 400);
    let first = save(repository, source.path());
    assert!(whole(repository, first.id.unwrap()).sparse.0.is_empty());

    // Of 400 files, 240 change; the other 160 keep bundles of all 400.
    (0..400).filter(|n| n % 5 < 3).for_each(|n| write(source.path(), n, 1000 + n as u64));
    let second = save(repository, source.path());
    assert_eq!(second.summary.files_changed, 240);
    let snapshot = whole(repository, second.id.unwrap());
    assert!(!snapshot.sparse.0.is_empty());

    let dry = request(source.path());
    let dry = save_as(repository, &mover::backup::Request { dry_run: true, ..dry });
    assert_eq!(dry.summary.files_changed, 160, "it is told beforehand");
    let third = save(repository, source.path());
    assert_eq!(third.summary.files_changed, 160);
    let third_stored = third.summary.bytes_stored as usize;
    assert!((160 * LEN..170 * LEN).contains(&third_stored), "{third_stored}");
    assert!(whole(repository, third.id.unwrap()).sparse.0.is_empty());
    let fourth = save(repository, source.path());
    assert_eq!(fourth.summary.files_changed, 0, "once is enough");

    for outcome in [first, second, third] {
        repository.forget(outcome.id.unwrap(), Timestamp::now()).unwrap();
    }
    clean(repository);
    let stored = stored(repository);
    assert!((400 * LEN..410 * LEN).contains(&stored), "{stored} bytes");
    let target = restored(repository, fourth.id.unwrap());
    assert_same(&scan(source.path()), &scan(target.path()), "restored");
}

#[test]
fn what_cannot_be_read_again_is_kept_as_it_was() {
    let (repo, source) = (Repo::new(), memory_dir());
    let repository = &repo.repository;
    saved_with_sparse_bundles(repository, source.path());
    let before = scan(source.path());

    // At the moment when they are to be read, one of the unchanged files has become unreadable, one is gone.
    let [unreadable, gone] = ["0008", "0009"].map(|name| source.path().join(name));
    let aside = source.path().join("aside");
    let log = Log::on_begin(|path| match path {
        b"0008" => {
            fs::rename(&unreadable, &aside).unwrap();
            std::os::unix::fs::symlink("/", &unreadable).unwrap();
        }
        b"0009" => fs::remove_file(&gone).unwrap(),
        _ => {}
    });
    let outcome = run(repository, &request(source.path()), &log).unwrap();
    let lines = log.lines();
    assert!(lines[0].contains("kept as the last snapshot has it"), "{lines:?}");
    assert!(lines[1].contains("vanished"), "{lines:?}");
    assert_eq!((lines.len(), log.missing()), (2, Vec::new()));
    fs::rename(&aside, &unreadable).unwrap();

    let target = restored(repository, outcome.id.unwrap());
    let after = scan(target.path());
    assert!(!target.path().join("0009").exists());
    for (path, file) in before.iter().filter(|(path, _)| path.ends_with(b"0008")) {
        assert_eq!(after.get(path), Some(file), "{path:?}");
    }
    assert_eq!(fs::read(target.path().join("0008")).unwrap(), fs::read(&unreadable).unwrap());
}

#[test]
fn other_bytes_under_the_same_times_are_told() {
    let (repo, source) = (Repo::new(), memory_dir());
    let repository = &repo.repository;
    saved_with_sparse_bundles(repository, source.path());
    let rotten = source.path().join("0004");
    let (times, len) = (fs::metadata(&rotten).unwrap(), fs::metadata(&rotten).unwrap().len());
    fs::write(&rotten, noise(77, len as usize)).unwrap();
    let file = fs::File::options().write(true).open(&rotten).unwrap();
    file.set_modified(times.modified().unwrap()).unwrap();
    let log = Log::default();
    let request = request(source.path());
    let by_mtime = Some(mover::backup::ChangedBy::Mtime);
    let request = mover::backup::Request { changed_by: by_mtime, ..request };
    run(repository, &request, &log).unwrap();
    let lines = log.lines();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("0004") && lines[0].contains("other bytes"), "{lines:?}");
}

#[test]
fn a_repository_does_not_grow_while_files_change_for_months() {
    let (repo, source) = (Repo::new(), memory_dir());
    let repository = &repo.repository;
    let count = 1000;
    files(source.path(), count);
    let mut kept = std::collections::VecDeque::new();
    let mut state = 1_u64;
    for day in 0..150 {
        for n in 0..count / 50 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let file = (state >> 33) as usize % count;
            write(source.path(), file, (1 + day) * 1_000_000 + n as u64);
        }
        kept.push_back(save(repository, source.path()).id.unwrap());
        if kept.len() > 3 {
            repository.forget(kept.pop_front().unwrap(), Timestamp::now()).unwrap();
        }
        if day % 10 == 9 {
            clean(repository);
        }
    }
    // Each file was written three times over. Without storing anew, 3.8 times the live bytes would be there, and more
    // each day.
    let (stored, live) = (stored(repository), count * LEN);
    assert!(stored < 2 * live, "{:.2} times what there is", stored as f64 / live as f64);
    let target = restored(repository, kept[2]);
    assert_same(&scan(source.path()), &scan(target.path()), "restored");
}
