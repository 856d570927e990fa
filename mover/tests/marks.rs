//! What a backup leaves out is marked, and files that are told apart by nothing but an inode number are
//! not taken for one.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use chunkstore::tree::{Absence, State};
use common::said::{Said, said};
use common::scan::scan;
use common::sources::Source;
use common::{Log, Mounted, Repo, memory_dir, noise, not_tested, request, restored, run, save_as};
use mover::backup::Request;

const WHOLE: Said = Said::Saved(0, State::Whole);

#[test]
fn what_is_left_out_is_marked_and_a_later_backup_takes_the_mark_over_only_while_it_holds() {
    let dir = memory_dir();
    let source = Source(dir.path());
    let tag = "Signature: 8a477f597d28d172789f06886806bc55";
    source.file("cache/CACHEDIR.TAG", tag);
    source.file("cache/content", "x");
    source.file("kept.tmp", "x");
    source.file("repository/config", "x");
    source.file("d/inside", "x");
    let Some(_mounted) = Mounted::tmpfs(&source.path("mounted"), "1m") else {
        return not_tested("mount points: nothing can be mounted");
    };
    source.file("mounted/inside", "x");
    let meta = fs::metadata(source.path("repository")).unwrap();
    let repo = Repo::new();
    let excludes = |path: &[u8], is_dir: bool| path.ends_with(b".tmp") || (is_dir && path == b"d");
    let partly = Request {
        excludes: Some(&excludes),
        exclude_caches: true,
        one_file_system: true,
        skip: Some((meta.dev(), meta.ino())),
        ..request(dir.path())
    };
    for round in 0..2 {
        let log = Log::default();
        let id = run(&repo.repository, &partly, &log).unwrap().id.unwrap();
        assert_eq!(log.lines(), ["repository: the content of the repository itself is left out"]);
        let said = |key: &str| said(&repo.repository, id, key.replace('/', "\0").as_bytes());
        for (key, expected) in [
            ("cache", Said::Saved(0, State::Cache)),
            ("cache/CACHEDIR.TAG", Said::Saved(tag.len() as u64, State::Whole)),
            ("cache/content", Said::Nothing),
            ("d", Said::Absent(Absence::Excluded)),
            ("d/inside", Said::Nothing),
            ("kept.tmp", Said::Absent(Absence::Excluded)),
            ("mounted", Said::Saved(0, State::OtherFileSystem)),
            ("mounted/inside", Said::Nothing),
            ("repository", Said::Saved(0, State::Repository)),
            ("repository/config", Said::Nothing),
        ] {
            assert_eq!(said(key), expected, "{key}, {round}");
        }
    }
    let id = save_as(&repo.repository, &request(dir.path())).id.unwrap();
    for key in ["cache", "d", "mounted", "repository"] {
        assert_eq!(said(&repo.repository, id, key.as_bytes()), WHOLE, "{key}");
        let inside = if key == "cache" { "content" } else { "inside" };
        let inside = if key == "repository" { "config" } else { inside };
        let key = format!("{key}\0{inside}");
        let saved = Said::Saved(1, State::Whole);
        assert_eq!(said(&repo.repository, id, key.as_bytes()), saved, "{key}");
    }
}

#[test]
fn a_folder_that_is_asked_for_is_saved_though_it_is_marked_as_a_cache() {
    let dir = memory_dir();
    let source = Source(dir.path());
    source.file("CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55");
    source.file("content", "x");
    let repo = Repo::new();
    let log = Log::default();
    let request = Request { exclude_caches: true, ..request(dir.path()) };
    let id = run(&repo.repository, &request, &log).unwrap().id.unwrap();
    assert_eq!(said(&repo.repository, id, b"content"), Said::Saved(1, State::Whole));
    assert_eq!(log.lines().len(), 1, "{:?}", log.lines());
}

#[test]
fn names_of_a_file_whose_first_name_vanishes_are_saved() {
    for size in [100, 5000, 300_000] {
        let dir = memory_dir();
        let source = Source(dir.path());
        source.file("a", noise(1, size));
        for name in ["b", "d/c", "d/e/f"] {
            fs::create_dir_all(source.path("d/e")).unwrap();
            fs::hard_link(source.path("a"), source.path(name)).unwrap();
        }
        source.file("z", noise(2, 20 << 20));
        let repo = Repo::new();
        let log = Log::on_begin(|path| {
            if path == b"a" {
                fs::remove_file(dir.path().join("a")).unwrap();
            }
        });
        let id = run(&repo.repository, &request(dir.path()), &log).unwrap().id.unwrap();
        assert_eq!(log.lines(), ["a: vanished before it could be read"], "{size}");
        let target = restored(&repo.repository, id);
        let tree = scan(target.path());
        for name in ["b", "d/c", "d/e/f"] {
            let content = &tree[name.as_bytes()].content;
            assert_eq!(*content, blake3::hash(&noise(1, size)).as_bytes(), "{name}, {size}");
        }
        let inode = |name: &str| fs::metadata(target.path().join(name)).unwrap().ino();
        assert_eq!((inode("b"), inode("b")), (inode("d/c"), inode("d/e/f")), "{size}");
    }
}

#[test]
fn a_folder_that_vanishes_with_a_further_name_costs_only_that() {
    let dir = memory_dir();
    let source = Source(dir.path());
    source.file("a", noise(1, 5000));
    source.file("d/other", "x");
    fs::hard_link(source.path("a"), source.path("d/b")).unwrap();
    let repo = Repo::new();
    let log = Log::on_begin(|path| {
        if path == b"a" {
            fs::remove_file(dir.path().join("a")).unwrap();
            fs::remove_dir_all(dir.path().join("d")).unwrap();
        }
    });
    let outcome = run(&repo.repository, &request(dir.path()), &log).unwrap();
    assert_eq!((outcome.summary.files_missing, outcome.summary.files_vanished), (0, 3));
}

/// Makes files in `folder` until one has this inode number; nothing if that does not come.
fn file_with_inode(folder: &Path, ino: u64) -> Option<std::path::PathBuf> {
    (0..3000).find_map(|n| {
        let path = folder.join(format!("{n:04}"));
        fs::write(&path, format!("another file, number {n}")).unwrap();
        (fs::metadata(&path).unwrap().ino() == ino).then_some(path)
    })
}

#[test]
fn a_file_is_not_taken_for_another_that_had_its_inode_number() {
    // A file system in memory does not use numbers again.
    let dir = tempfile::tempdir().unwrap();
    let source = Source(dir.path());
    source.file("a", "the first file, which has two names");
    source.file("b", noise(1, 20 << 20));
    fs::create_dir_all(source.path("c")).unwrap();
    fs::create_dir_all(source.path("z")).unwrap();
    fs::hard_link(source.path("a"), source.path("z/other name")).unwrap();
    let ino = fs::metadata(source.path("a")).unwrap().ino();
    let reused = AtomicBool::new(false);
    let log = Log::on_begin(|path| {
        // The walk itself reads this one: it is behind 'a', and has not seen 'c'.
        if path == b"b" {
            fs::remove_file(source.path("a")).unwrap();
            fs::remove_file(source.path("z/other name")).unwrap();
            if let Some(file) = file_with_inode(&source.path("c"), ino) {
                fs::hard_link(file, source.path("z/of the new file")).unwrap();
                reused.store(true, Ordering::SeqCst);
            }
        }
    });
    let repo = Repo::new();
    let id = run(&repo.repository, &request(dir.path()), &log).unwrap().id.unwrap();
    if !reused.load(Ordering::SeqCst) {
        return not_tested("inode numbers that are used again: this file system did not");
    }
    let now = scan(dir.path());
    let target = memory_dir();
    let restoring = Log::default();
    let snapshot = common::snapshot(&repo.repository, id);
    common::try_restore(&repo.repository, &snapshot, target.path(), &restoring).unwrap();
    let then = scan(target.path());
    for (path, entry) in
        now.iter().filter(|(path, _)| path.starts_with(b"c/") || path.starts_with(b"z/"))
    {
        let path_shown = path.escape_ascii();
        assert_eq!(then[path].content, entry.content, "{path_shown}");
    }
}

#[test]
fn leftovers_of_a_killed_restore_are_not_saved() {
    let dir = memory_dir();
    let source = Source(dir.path());
    source.file(".ebackup-links-0123456789abcdef/0", "x");
    source.file(".ebackup-links-mine/0", "x");
    let repo = Repo::new();
    let id = save_as(&repo.repository, &request(dir.path())).id.unwrap();
    let said = |key: &[u8]| said(&repo.repository, id, key);
    assert_eq!(said(b".ebackup-links-0123456789abcdef"), Said::Nothing);
    assert_eq!(said(b".ebackup-links-mine"), WHOLE);
}

#[test]
fn a_large_folder_without_room_for_its_names_fails_the_backup_rather_than_be_left_out() {
    let dir = memory_dir();
    for n in 0..60_000 {
        fs::write(dir.path().join(format!("a rather long name to fill the memory {n:060}")), "")
            .unwrap();
    }
    let repo = Repo::new();
    let nowhere = Request { scratch: "/nowhere".into(), ..request(dir.path()) };
    let error = run(&repo.repository, &nowhere, &Log::default()).unwrap_err().to_string();
    assert!(error.contains("'/nowhere'") && error.contains("TMPDIR"), "{error}");
    assert_eq!(repo.repository.list_snapshots().unwrap().snapshots.len(), 0);
}
