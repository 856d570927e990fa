//! What is saved comes back: every kind of entry, every attribute, after every kind of change.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "also in the functions that the tests share"
)]

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use chunkstore::codec::compress::Level;
use chunkstore::id::SnapshotId;
use chunkstore::repository::Repository;
use chunkstore::tree::{Entry, EntryCursor, TreeCursor};
use common::scan::{assert_same, differences, scan};
use common::sources::{Source, acl, everything, set_mtime};
use common::*;
use mover::backup::{ChangedBy, Request, Resources};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// Lets the clock of the file system tick, so that what follows gets other times.
fn tick() {
    std::thread::sleep(Duration::from_millis(15));
}

#[test]
fn everything_that_can_be_in_a_tree_comes_back_and_costs_nothing_the_second_time() {
    mover::fs::raise_open_files();
    let source = tempfile::tempdir().unwrap();
    everything(source.path());
    let before = scan(source.path());
    let repo = Repo::new();
    let first = save(&repo.repository, source.path());
    assert!(scan(source.path()) == before, "a backup changes nothing");

    let target = tempfile::tempdir().unwrap();
    restore_into(&repo.repository, first.id.unwrap(), target.path());
    let after = scan(target.path());
    assert_same(&before, &after, "restored");
    for (path, seen) in before.range(b"sparse/".to_vec()..b"sparse0".to_vec()) {
        // Small files share a bundle, where holes are zeros.
        if path != b"sparse/small" {
            assert_eq!(after[path].data, seen.data, "{}", path.escape_ascii());
        }
    }
    assert_eq!(after[&b"sizes/zeros"[..]].data, [], "zeros become a hole");

    let second = save(&repo.repository, source.path());
    assert_eq!(second.parent, first.id);
    let regular = before.values().filter(|seen| seen.mode >> 12 == 0o10).count();
    let summary = second.summary;
    assert_eq!((summary.bytes_stored, summary.bytes_read, summary.blobs_new), (0, 0, 0));
    assert_eq!((summary.files_changed, summary.files_unmodified), (0, regular as u64));
    assert_eq!((summary.files, summary.dirs, summary.bytes), {
        let summary = first.summary;
        (summary.files, summary.dirs, summary.bytes)
    });
    let root = |id| snapshot(&repo.repository, id).root;
    assert_eq!(root(first.id.unwrap()), root(second.id.unwrap()));

    // Read anew, whatever the means, it is the same tree.
    for (workers, memory_bytes) in [(1, 96 << 20), (4, 1 << 30)] {
        let again = save_as(
            &repo.repository,
            &Request {
                lineage: format!("{workers} workers"),
                resources: Resources { workers, ..Resources::new(memory_bytes, workers) },
                compression: Level::Off,
                ..request(source.path())
            },
        );
        assert_eq!(again.parent, None);
        assert_eq!(again.summary.blobs_new, 0, "{workers} workers");
        // Nodes were stored again, for want of a parent, so only what leaves say is equal.
        let entries = |id| entries(&repo.repository, id);
        assert!(entries(again.id.unwrap()) == entries(first.id.unwrap()), "{workers} workers");
    }
    let content = save_as(
        &repo.repository,
        &Request { changed_by: Some(ChangedBy::Content), ..request(source.path()) },
    );
    assert_eq!(content.summary.files_unmodified, 0);
    assert_eq!(content.summary.bytes_stored, 0);
}

fn entries(repository: &Repository, id: SnapshotId) -> Vec<Entry> {
    let snapshot = snapshot(repository, id);
    let mut cursor = EntryCursor::new(TreeCursor::new(repository, snapshot.root, snapshot.level));
    let mut entries = Vec::new();
    while let Some(entry) = cursor.peek().unwrap().cloned() {
        entries.push(entry);
        cursor.advance();
    }
    entries
}

/// Makes a change to a tree that is saved; returns files read by the next backup.
type Edit = (&'static str, fn(&Source<'_>), u64);

const EDITS: [Edit; 15] = [
    ("nothing", |_| {}, 0),
    (
        "append",
        |source| {
            let path = source.path("d/medium");
            let file = fs::File::options().append(true).open(path).unwrap();
            file.write_all_at(b"more", 300_000).unwrap();
        },
        1,
    ),
    (
        "change in place that keeps size and modification time",
        |source| {
            let path = source.path("d/small");
            let modified = fs::metadata(&path).unwrap().modified().unwrap();
            let file = fs::File::options().write(true).open(path).unwrap();
            file.write_all_at(b"!", 500).unwrap();
            file.set_modified(modified).unwrap();
        },
        1,
    ),
    (
        "change in a large file",
        |source| {
            let path = source.path("large");
            let file = fs::File::options().write(true).open(path).unwrap();
            file.write_all_at(b"changed", 9 << 20).unwrap();
        },
        1,
    ),
    ("touch", |source| source.mtime("d/tiny", 77, 0), 1),
    ("rename", |source| fs::rename(source.path("d/small"), source.path("d/renamed")).unwrap(), 1),
    ("rename of a folder", |source| fs::rename(source.path("d"), source.path("e")).unwrap(), 3),
    (
        "exchange of two files with the same size and time",
        |source| {
            fs::rename(source.path("twins/a"), source.path("twins/c")).unwrap();
            fs::rename(source.path("twins/b"), source.path("twins/a")).unwrap();
            fs::rename(source.path("twins/c"), source.path("twins/b")).unwrap();
        },
        2,
    ),
    ("removal", |source| fs::remove_file(source.path("d/small")).unwrap(), 0),
    ("removal of a folder", |source| fs::remove_dir_all(source.path("d")).unwrap(), 0),
    ("addition", |source| drop(source.file("new/folder/file", noise(5, 3000))), 1),
    ("mode", |source| source.mode("d/medium", 0o600), 1),
    (
        "attributes",
        |source| {
            source.xattr("d/small", "user.new", b"value");
            source.xattr("d", "system.posix_acl_default", &acl(4));
        },
        1,
    ),
    (
        "another link",
        |source| fs::hard_link(source.path("d/small"), source.path("another")).unwrap(),
        2,
    ),
    (
        "another kind",
        |source| {
            fs::remove_file(source.path("d/tiny")).unwrap();
            fs::create_dir(source.path("d/tiny")).unwrap();
            source.file("d/tiny/below", "x");
            fs::remove_dir_all(source.path("twins")).unwrap();
            symlink("d", source.path("twins")).unwrap();
            fs::remove_file(source.path("link")).unwrap();
            source.file("link", "is a file now");
        },
        2,
    ),
];

#[test]
fn every_edit_is_seen_by_the_next_backup_and_costs_no_more_than_itself() {
    for (what, edit, read) in EDITS {
        let dir = memory_dir();
        let source = Source(dir.path());
        source.file("d/tiny", "tiny");
        source.file("d/small", noise(1, 5000));
        source.file("d/medium", noise(2, 300_000));
        source.file("large", noise(3, 20 << 20));
        source.file("twins/a", noise(4, 600));
        source.file("twins/b", noise(5, 600));
        source.mtime("twins/a", 1000, 0);
        source.mtime("twins/b", 1000, 0);
        symlink("d/tiny", source.path("link")).unwrap();
        let repo = Repo::new();
        let first = save(&repo.repository, dir.path());
        tick();
        edit(&source);
        let second = save(&repo.repository, dir.path());
        let target = restored(&repo.repository, second.id.unwrap());
        assert_same(&scan(dir.path()), &scan(target.path()), what);
        assert_eq!(second.summary.files_changed, read, "{what}");
        // A chunk at each side of a change, at the most, and nodes.
        let stored = second.summary.bytes_stored;
        assert!(stored < 6 << 20, "{what}: {stored} bytes stored");
        assert_eq!(stored == 0, what == "nothing");
        assert_eq!(first.id, second.parent, "{what}");
    }
}

#[test]
fn a_change_right_after_a_backup_began_is_seen_whatever_the_times_say() {
    let dir = memory_dir();
    let source = Source(dir.path());
    source.file("f", noise(1, 5000));
    let repo = Repo::new();
    let honest = |now| Request { now, ..request(dir.path()) };
    save_as(&repo.repository, &honest(jiff::Timestamp::now()));
    // Too young to be trusted, so it is read; and since it is the same, nothing is stored.
    let second = save_as(&repo.repository, &honest(jiff::Timestamp::now()));
    assert_eq!(second.summary.files_changed, 1);
    assert_eq!(second.summary.blobs_new, 0);
}

#[test]
fn trust_in_the_modification_time_alone_can_be_chosen() {
    let dir = memory_dir();
    let source = Source(dir.path());
    let path = source.file("f", noise(1, 5000));
    let repo = Repo::new();
    let by = |how| {
        let changed_by = Some(how);
        save_as(&repo.repository, &Request { changed_by, ..request(dir.path()) })
    };
    save(&repo.repository, dir.path());
    tick();
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, noise(2, 5000)).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
    assert_eq!(by(ChangedBy::Mtime).summary.files_changed, 0);
    assert_eq!(by(ChangedBy::Content).summary.files_changed, 1);
    let last = by(ChangedBy::CtimeInode);
    let target = restored(&repo.repository, last.id.unwrap());
    assert_same(&scan(dir.path()), &scan(target.path()), "at last");
}

/// Something done to a tree, with numbers that choose where.
#[derive(Debug, Clone)]
enum Op {
    Write { at: u8, size: usize, seed: u64 },
    Patch { at: u8, offset: usize },
    Append { at: u8, len: usize },
    Truncate { at: u8, size: usize },
    Remove { at: u8 },
    Rename { at: u8, to: u8 },
    Link { at: u8, to: u8 },
    Symlink { to: u8 },
    Dir { to: u8 },
    Mode { at: u8, mode: u32 },
    Mtime { at: u8, seconds: i64 },
    Xattr { at: u8, value: u8 },
}

fn op() -> impl Strategy<Value = Op> {
    let size = prop_oneof![
        4 => 0..700_usize,
        4 => 0..60_000_usize,
        1 => 120_000..140_000_usize,
        1 => 1_000_000..3_000_000_usize,
    ];
    let at = any::<u8>;
    prop_oneof![
        6 => (at(), size.clone(), 0..6_u64).prop_map(|(at, size, seed)| Op::Write { at, size, seed }),
        2 => (at(), 0..100_000_usize).prop_map(|(at, offset)| Op::Patch { at, offset }),
        2 => (at(), 1..2000_usize).prop_map(|(at, len)| Op::Append { at, len }),
        1 => (at(), size).prop_map(|(at, size)| Op::Truncate { at, size }),
        2 => at().prop_map(|at| Op::Remove { at }),
        2 => (at(), at()).prop_map(|(at, to)| Op::Rename { at, to }),
        2 => (at(), at()).prop_map(|(at, to)| Op::Link { at, to }),
        1 => at().prop_map(|to| Op::Symlink { to }),
        2 => at().prop_map(|to| Op::Dir { to }),
        1 => (at(), 0..0o10000_u32).prop_map(|(at, mode)| Op::Mode { at, mode: mode | 0o700 }),
        1 => (at(), -5000..5000_i64).prop_map(|(at, seconds)| Op::Mtime { at, seconds }),
        1 => (at(), at()).prop_map(|(at, value)| Op::Xattr { at, value }),
    ]
}

/// Does `op`, as far as that is possible.
fn apply(root: &Path, op: &Op) {
    let source = Source(root);
    let names: Vec<Vec<u8>> = scan(root).into_keys().skip(1).collect();
    let old = |at: &u8| names.get(usize::from(*at) % names.len().max(1)).cloned();
    let new = |to: &u8| {
        // Half of the names lie in a folder that there is.
        let name = format!("{}{}", ["a", "b", "a-", "\u{e4}"][usize::from(to % 4)], to / 64);
        let folders = names.iter().filter(|name| source.path(name).is_dir());
        let folders: Vec<_> = folders.collect();
        match folders.get(usize::from(to / 4)) {
            Some(folder) if !source.path(folder).is_symlink() => {
                [&folder[..], name.as_bytes()].join(&b'/')
            }
            _ => name.into_bytes(),
        }
    };
    let change = |at: &u8, change: &dyn Fn(&Path)| {
        if let Some(name) = old(at) {
            change(&source.path(name));
        }
    };
    let regular = |path: &Path| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file());
    match op {
        Op::Write { at, size, seed } => {
            let path = source.path(new(at));
            if !path.is_symlink() && !path.is_dir() {
                fs::write(path, noise(*seed, *size)).unwrap();
            }
        }
        Op::Patch { at, offset } => change(at, &|path| {
            if regular(path) {
                let file = fs::File::options().write(true).open(path).unwrap();
                file.write_all_at(b"patched", *offset as u64).unwrap();
            }
        }),
        Op::Append { at, len } => change(at, &|path| {
            if regular(path) {
                let size = fs::metadata(path).unwrap().len();
                let file = fs::File::options().write(true).open(path).unwrap();
                file.write_all_at(&noise(99, *len), size).unwrap();
            }
        }),
        Op::Truncate { at, size } => change(at, &|path| {
            if regular(path) {
                let file = fs::File::options().write(true).open(path).unwrap();
                file.set_len(*size as u64).unwrap();
            }
        }),
        Op::Remove { at } => change(at, &|path| {
            let _gone = fs::remove_file(path).or_else(|_| fs::remove_dir_all(path));
        }),
        Op::Rename { at, to } => change(at, &|path| {
            let _refused = fs::rename(path, source.path(new(to)));
        }),
        Op::Link { at, to } => change(at, &|path| {
            let _refused = fs::hard_link(path, source.path(new(to)));
        }),
        Op::Symlink { to } => {
            let _refused = symlink(format!("target {to}"), source.path(new(to)));
        }
        Op::Dir { to } => {
            let _refused = fs::create_dir(source.path(new(to)));
        }
        Op::Mode { at, mode } => change(at, &|path| {
            if !path.is_symlink() {
                fs::set_permissions(path, fs::Permissions::from_mode(*mode)).unwrap();
            }
        }),
        Op::Mtime { at, seconds } => change(at, &|path| {
            set_mtime(path, *seconds, 5);
        }),
        Op::Xattr { at, value } => change(at, &|path| {
            if regular(path) || path.is_dir() && !path.is_symlink() {
                let flags = rustix::fs::XattrFlags::empty();
                rustix::fs::lsetxattr(path, "user.x", &[*value], flags).unwrap();
            }
        }),
    }
}

#[test]
fn any_history_of_edits_restores_like_a_copy_after_every_step() {
    let steps = proptest::collection::vec(proptest::collection::vec(op(), 1..25), 3);
    let config = ProptestConfig { cases: 40, max_shrink_iters: 200, ..ProptestConfig::default() };
    TestRunner::new(config)
        .run(&steps, |steps| {
            let (dir, repo) = (memory_dir(), Repo::new());
            let mut expected = Vec::new();
            for ops in &steps {
                tick();
                ops.iter().for_each(|op| apply(dir.path(), op));
                let outcome = save(&repo.repository, dir.path());
                expected.push((outcome.id.unwrap(), scan(dir.path())));
            }
            for (id, tree) in &expected {
                let target = restored(&repo.repository, *id);
                let differing = differences(tree, &scan(target.path()), false);
                prop_assert_eq!(differing, Vec::<String>::new());
            }
            // And onto one another, as an update of what is there.
            let target = memory_dir();
            for (id, _) in &expected {
                restore_into(&repo.repository, *id, target.path());
            }
            let last = &expected[expected.len() - 1].1;
            let found = scan(target.path());
            for (path, seen) in last {
                let there = found.get(path).unwrap();
                prop_assert_eq!(&there.content, &seen.content);
            }
            Ok(())
        })
        .unwrap();
}

/// Paths of a restored snapshot, without the root.
fn paths_of(repo: &Repo, outcome: &mover::backup::Outcome) -> Vec<String> {
    let target = restored(&repo.repository, outcome.id.unwrap());
    let paths = scan(target.path()).into_keys().skip(1);
    paths.map(|path| String::from_utf8(path).unwrap()).collect()
}

#[test]
fn what_is_excluded_is_left_out_with_all_below() {
    let dir = memory_dir();
    let source = Source(dir.path());
    for name in ["keep", "a.tmp", "d/b.tmp", "d/keep", "cache/x/y", "d/cache"] {
        source.file(name, name);
    }
    let repo = Repo::new();
    let excludes =
        |path: &[u8], is_dir: bool| path.ends_with(b".tmp") || (is_dir && path.ends_with(b"cache"));
    let outcome =
        save_as(&repo.repository, &Request { excludes: Some(&excludes), ..request(dir.path()) });
    assert_eq!(paths_of(&repo, &outcome), ["d", "d/cache", "d/keep", "keep"]);
    // Included again, they are there again.
    let all = save(&repo.repository, dir.path());
    assert_eq!(paths_of(&repo, &all).len(), 9);
}

#[test]
fn only_folders_with_the_right_tag_count_as_caches() {
    let dir = memory_dir();
    let source = Source(dir.path());
    let tag = "Signature: 8a477f597d28d172789f06886806bc55\n# a cache\n";
    source.file("cache/CACHEDIR.TAG", tag);
    source.file("cache/content", "x");
    source.file("no-cache/CACHEDIR.TAG", "Signature: something else");
    source.file("no-cache/content", "x");
    let repo = Repo::new();
    let outcome =
        save_as(&repo.repository, &Request { exclude_caches: true, ..request(dir.path()) });
    // The mark stays: what is restored is a cache again.
    let expected =
        ["cache", "cache/CACHEDIR.TAG", "no-cache", "no-cache/CACHEDIR.TAG", "no-cache/content"];
    assert_eq!(paths_of(&repo, &outcome), expected);
}

#[test]
fn other_file_systems_are_left_out_on_request_and_told_apart_otherwise() {
    let dir = memory_dir();
    let source = Source(dir.path());
    source.file("here", "x");
    let Some(_mounted) = Mounted::tmpfs(&source.path("mounted"), "1m") else {
        return not_tested("other file systems, for this user cannot mount one");
    };
    source.file("mounted/there", noise(1, 700));
    let repo = Repo::new();
    let one = save_as(&repo.repository, &Request { one_file_system: true, ..request(dir.path()) });
    assert_eq!(paths_of(&repo, &one), ["here", "mounted"]);
    let all = save(&repo.repository, dir.path());
    assert_eq!(paths_of(&repo, &all), ["here", "mounted", "mounted/there"]);
    let again = save(&repo.repository, dir.path());
    assert_eq!(again.summary.bytes_stored, 0);
}

#[test]
fn sizes_whose_sum_no_number_holds_are_saved() {
    let dir = memory_dir();
    let source = Source(dir.path());
    let largest = (1_u64 << 63) - 1;
    let page = 4096;
    for n in 0..5 {
        let file = fs::File::create(source.path(format!("huge{n}"))).unwrap();
        if file.set_len(largest - page).is_err() {
            return not_tested("files of 8 EiB, which this file system cannot have");
        }
    }
    let repo = Repo::new();
    let outcome = save(&repo.repository, dir.path());
    let entries = entries(&repo.repository, outcome.id.unwrap());
    let sizes = entries.iter().filter_map(Entry::node).map(|node| node.size);
    assert_eq!(sizes.filter(|size| *size == largest - page).count(), 5);
    assert_eq!(outcome.summary.bytes, u64::MAX, "the sum stops there");
}
