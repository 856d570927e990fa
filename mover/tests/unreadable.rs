//! What cannot be read, or not to its end, is never taken for whole: not by the snapshot, not by later
//! backups, not by a restore. On a file system that fails as it is told, for every size at which files
//! are read in another way.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use std::fs;

use chunkstore::id::SnapshotId;
use chunkstore::tree::{Absence, State};
use common::faultfs::{Fault, FaultFs, Item};
use common::said::{Said, said};
use common::{Log, Repo, memory_dir, noise, request, run, snapshot, try_restore};
use fuser::FileType;
use mover::backup::Request;
use mover::monitor::Concern;

/// Inline, in a bundle, cut by a worker, cut by the walk in several blocks.
const SIZES: [u64; 4] = [300, 5000, 3 << 20, 40 << 20];

/// One backup: what the snapshot says of 'file', how many files are missing, and the concerns of the
/// warnings.
fn backup(repo: &Repo, source: &FaultFs) -> (SnapshotId, Said, u64, Vec<Concern>) {
    let log = Log::default();
    let outcome = run(&repo.repository, &request(source.path()), &log).unwrap();
    let id = outcome.id.unwrap();
    let concerns = log.warnings.lock().unwrap().iter().map(|warning| warning.concern).collect();
    (id, said(&repo.repository, id, b"file"), outcome.summary.files_missing, concerns)
}

/// The bytes that a restore gives 'file', if any, and how many files it tells to be incomplete.
fn restored(repo: &Repo, id: SnapshotId) -> (Option<Vec<u8>>, u64, u64) {
    let target = memory_dir();
    let log = Log::default();
    let snapshot = snapshot(&repo.repository, id);
    let summary = try_restore(&repo.repository, &snapshot, target.path(), &log).unwrap();
    assert_eq!(summary.files_failed, 0, "{:?}", log.lines());
    (fs::read(target.path().join("file")).ok(), summary.files_incomplete, summary.warnings)
}

fn assert_content(repo: &Repo, id: SnapshotId, expected: Option<&[u8]>, incomplete: u64, at: &str) {
    let (bytes, told, _) = restored(repo, id);
    assert!(bytes.as_deref() == expected, "{at}: {:?} bytes", bytes.map(|bytes| bytes.len()));
    assert_eq!(told, incomplete, "{at}: incomplete files");
}

#[test]
fn a_file_that_cannot_be_read_to_its_end_is_never_taken_for_whole() {
    for size in SIZES {
        let half = size / 2;
        for fault in [
            Fault::Open(libc::EACCES),
            Fault::Read(0, libc::EIO),
            Fault::Read(half, libc::EIO),
            Fault::Read(half, libc::ESTALE),
        ] {
            let at = format!("{size} bytes, {fault:?}");
            let (old, new) = (noise(1, size as usize), noise(2, size as usize));
            let items =
                [("file", Item::file(old.clone()).with(fault)), ("other", Item::file(vec![7]))];
            let Some(source) = FaultFs::mount(items) else { return };
            let repo = Repo::new();
            // Nothing older is known.
            let readable = if let Fault::Read(from @ 1.., _) = fault { from } else { 0 };
            for round in 0..2 {
                let (id, said, missing, _) = backup(&repo, &source);
                let expected = match readable {
                    0 => Said::Absent(Absence::Unreadable),
                    bytes => Said::Saved(bytes, State::Cut),
                };
                assert_eq!((said, missing), (expected, 1), "{at}, {round}");
                let expected = (readable > 0).then(|| &old[..readable as usize]);
                assert_content(&repo, id, expected, 1, &at);
            }
            // It can be read again, though it looks as it did.
            source.change("file", |file| file.fault = None);
            let (id, said, missing, _) = backup(&repo, &source);
            assert_eq!((said, missing), (Said::Saved(size, State::Whole), 0), "{at}, healed");
            assert_content(&repo, id, Some(&old), 0, &at);
            // It is other, and fails again: the older one is kept, unless a part of the new one, which
            // is too large to wait, is in the tree already.
            source.change("file", |file| {
                file.content.clone_from(&new);
                file.mtime += 5;
                file.fault = Some(fault);
            });
            for round in 0..2 {
                let (id, said, missing, _) = backup(&repo, &source);
                if readable > 0 && size > 16 << 20 {
                    assert_eq!(said, Said::Saved(readable, State::Cut), "{at}, {round}");
                    assert_content(&repo, id, Some(&new[..readable as usize]), 1, &at);
                } else {
                    assert_eq!(said, Said::Saved(size, State::Kept), "{at}, {round}");
                    assert_content(&repo, id, Some(&old), 1, &at);
                }
                assert_eq!(missing, 1, "{at}, {round}");
            }
            source.change("file", |file| file.fault = None);
            let (id, said, missing, _) = backup(&repo, &source);
            assert_eq!((said, missing), (Said::Saved(size, State::Whole), 0), "{at}, at last");
            assert_content(&repo, id, Some(&new), 0, &at);
        }
    }
}

#[test]
fn a_file_that_becomes_shorter_while_it_is_read_is_cut() {
    for size in SIZES {
        let to = size / 3;
        let item = Item::file(noise(1, size as usize)).with(Fault::Shrink(to));
        let Some(source) = FaultFs::mount([("file", item)]) else { return };
        let repo = Repo::new();
        let (id, said, missing, _) = backup(&repo, &source);
        assert_eq!((said, missing), (Said::Saved(to, State::Cut), 1), "{size}");
        assert_content(&repo, id, Some(&noise(1, size as usize)[..to as usize]), 1, "cut");
        // It has its new size already, and is read all the same.
        source.change("file", |file| file.fault = None);
        let (_, said, missing, _) = backup(&repo, &source);
        assert_eq!((said, missing), (Said::Saved(to, State::Whole), 0), "{size}");
    }
}

#[test]
fn a_file_that_changes_while_it_is_read_is_marked_and_read_again() {
    for size in SIZES {
        for fault in [Fault::Touch, Fault::Grow(10)] {
            let at = format!("{size} bytes, {fault:?}");
            let content = noise(1, size as usize);
            let Some(source) = FaultFs::mount([("file", Item::file(content.clone()).with(fault))])
            else {
                return;
            };
            let repo = Repo::new();
            let (id, said, missing, concerns) = backup(&repo, &source);
            assert_eq!((said, missing), (Said::Saved(size, State::Changed), 0), "{at}");
            assert_eq!(concerns, [Concern::Changed], "{at}");
            let (bytes, incomplete, warnings) = restored(&repo, id);
            assert!(bytes.is_some_and(|bytes| bytes == content), "{at}");
            assert_eq!((incomplete, warnings), (0, 1), "{at}");
            // Nothing tells that it changed but what the snapshot says.
            source.change("file", |file| {
                file.fault = None;
                file.mtime = 1_600_000_000;
                file.size = size;
            });
            let log = Log::default();
            let outcome = run(&repo.repository, &request(source.path()), &log).unwrap();
            assert_eq!((outcome.summary.files_changed, log.lines()), (1, vec![]), "{at}");
            assert_eq!(outcome.summary.files_missing, 0, "{at}");
            assert_eq!(backup(&repo, &source).1, Said::Saved(size, State::Whole), "{at}");
        }
    }
}

#[test]
fn a_file_whose_size_says_0_is_read_to_its_end() {
    for size in [1, 300, 5000, 300_000, 20 << 20] {
        let content = noise(1, size);
        let mut item = Item::file(content.clone());
        item.size = 0;
        let Some(source) = FaultFs::mount([("empty", Item::file(Vec::new())), ("file", item)])
        else {
            return;
        };
        let repo = Repo::new();
        let (id, said, missing, _) = backup(&repo, &source);
        assert_eq!((said, missing), (Said::Saved(size as u64, State::Whole), 0), "{size}");
        assert_content(&repo, id, Some(&content), 0, "size 0");
        // What it holds now, nobody knows without reading it.
        source.change("file", |file| file.content[0] ^= 1);
        let (id, ..) = backup(&repo, &source);
        let (bytes, ..) = restored(&repo, id);
        assert!(bytes.unwrap()[1..] == content[1..], "{size}");
        assert_ne!(restored(&repo, id).0.unwrap()[0], content[0], "{size}");
        // It fails in the middle.
        source.change("file", |file| file.fault = Some(Fault::Read(size as u64 / 2, libc::EIO)));
        let (_, said, missing, _) = backup(&Repo::new(), &source);
        let cut = if size == 1 {
            Said::Absent(Absence::Unreadable)
        } else {
            Said::Saved(size as u64 / 2, State::Cut)
        };
        assert_eq!((said, missing), (cut, 1), "{size}");
    }
}

#[test]
fn folders_links_and_attributes_that_cannot_be_read_are_marked_until_they_can() {
    let items = [
        ("attributes", Item::file(vec![1]).with(Fault::Xattrs(libc::EIO))),
        ("closed", Item::of_kind(FileType::Directory).with(Fault::Open(libc::EACCES))),
        (
            "link",
            Item { content: b"to".to_vec(), ..Item::of_kind(FileType::Symlink) }
                .with(Fault::List(libc::EIO)),
        ),
        ("unlisted", Item::of_kind(FileType::Directory).with(Fault::List(libc::EIO))),
    ];
    let Some(source) = FaultFs::mount(items) else { return };
    let repo = Repo::new();
    for round in 0..2 {
        let (id, ..) = backup(&repo, &source);
        let said = |key: &str| said(&repo.repository, id, key.as_bytes());
        assert_eq!(said("attributes"), Said::Saved(1, State::Stripped), "{round}");
        assert_eq!(said("closed"), Said::Saved(0, State::Cut), "{round}");
        assert_eq!(said("link"), Said::Absent(Absence::Unreadable), "{round}");
        assert_eq!(said("unlisted"), Said::Saved(0, State::Cut), "{round}");
    }
    for name in ["attributes", "closed", "link", "unlisted"] {
        source.change(name, |item| item.fault = None);
    }
    let (id, _, missing, concerns) = backup(&repo, &source);
    assert_eq!((missing, concerns), (0, vec![]));
    for (name, size) in [("attributes", 1), ("closed", 0), ("link", 2), ("unlisted", 0)] {
        let said = said(&repo.repository, id, name.as_bytes());
        assert_eq!(said, Said::Saved(size, State::Whole), "{name}");
    }
}

#[test]
fn more_failing_large_files_than_there_are_blocks_do_not_stop_a_backup() {
    let names = ["a", "b", "c", "d", "e"];
    let failing = Item::file(noise(1, 20 << 20)).with(Fault::Read(18 << 20, libc::EIO));
    let Some(source) = FaultFs::mount(names.map(|name| (name, failing.clone()))) else { return };
    let repo = Repo::new();
    let (id, _, missing, _) = backup(&repo, &source);
    assert_eq!(missing, 5);
    for name in names {
        let said = said(&repo.repository, id, name.as_bytes());
        assert_eq!(said, Said::Saved(18 << 20, State::Cut), "{name}");
    }
}

#[test]
fn a_dry_run_tells_what_cannot_be_opened_and_does_not_trust_what_is_not_whole() {
    let items = [
        ("closed", Item::file(vec![1]).with(Fault::Open(libc::EACCES))),
        ("file", Item::file(noise(1, 20 << 20)).with(Fault::Read(10 << 20, libc::EIO))),
    ];
    let Some(source) = FaultFs::mount(items) else { return };
    let repo = Repo::new();
    backup(&repo, &source);
    let log = Log::default();
    let dry = Request { dry_run: true, ..request(source.path()) };
    let outcome = run(&repo.repository, &dry, &log).unwrap();
    assert_eq!(log.missing(), ["closed"]);
    assert_eq!((outcome.summary.files_unmodified, outcome.summary.bytes_read), (0, 20 << 20));
}
