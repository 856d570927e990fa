//! Entries that are not what the source had: every command that shows them says so.

mod common;

use std::fs;
use std::process::{Command, Stdio};
use std::sync::Arc;

use chunkstore::repository::Repository;
use chunkstore::tree::{Absence, Body, Content, End, Kind, State, end_key, extent_key};
use common::noise;
use common::site::{ByHand, Site, dir, inline, node, texts};
use serde_json::{Value, json};

/// Bytes of the large file that were read.
const READ: usize = 70_000;
/// What its size was said to be.
const SIZE: u64 = 20 << 20;

/// A snapshot with an entry of every state.
fn broken(repository: &Arc<Repository>) -> String {
    let hand = ByHand::new(repository);
    let large = Body::Node(node(Kind::File, SIZE, Content::Extents, State::Whole));
    let chunk = hand.chunk(0, &noise(1, READ));
    let end = End { size: READ as u64, state: State::Cut };
    let entries = vec![
        (b"".to_vec(), dir(State::Whole)),
        (b"cache".to_vec(), dir(State::Cache)),
        (b"changed".to_vec(), inline("changed", State::Changed)),
        (b"cut".to_vec(), inline("only the beg", State::Cut)),
        (b"dir".to_vec(), dir(State::Cut)),
        (b"dir\0inside".to_vec(), inline("seen", State::Whole)),
        (b"excluded".to_vec(), Body::Absent(Absence::Excluded)),
        (b"kept".to_vec(), inline("as it was", State::Kept)),
        (b"large".to_vec(), large),
        (extent_key(b"large", 0), Body::Extent(vec![chunk])),
        (end_key(b"large"), Body::End(end)),
        (b"other".to_vec(), dir(State::OtherFileSystem)),
        (b"unreadable".to_vec(), Body::Absent(Absence::Unreadable)),
        (b"whole".to_vec(), inline("whole", State::Whole)),
    ];
    hand.commit(entries, 5).to_string()
}

/// The same names, all well.
fn mended(repository: &Arc<Repository>) -> String {
    let hand = ByHand::new(repository);
    let mut entries = vec![(b"".to_vec(), dir(State::Whole)), (b"dir".to_vec(), dir(State::Whole))];
    for name in ["changed", "cut", "dir\0inside", "excluded", "kept", "unreadable", "whole"] {
        entries.push((name.as_bytes().to_vec(), inline("all of it", State::Whole)));
    }
    let chunks = vec![hand.chunk(0, &noise(1, READ))];
    let large = Body::Node(node(Kind::File, SIZE, Content::Extents, State::Whole));
    entries.push((b"large".to_vec(), large));
    entries.push((extent_key(b"large", 0), Body::Extent(chunks)));
    hand.commit(entries, 0).to_string()
}

fn by_path(lines: Vec<Value>) -> impl Fn(&str) -> Option<Value> {
    move |path| lines.iter().find(|line| line["path"] == path).cloned()
}

#[test]
fn ls_tells_what_is_not_whole_and_what_is_absent() {
    let (site, repository) = Site::with_repository();
    broken(&repository);
    let of = by_path(site.json(0, &["ls", "-R", "latest"]));
    for (path, state) in [
        ("cache", "cache"),
        ("changed", "changed"),
        ("cut", "cut"),
        ("dir", "cut"),
        ("kept", "kept"),
        ("large", "cut"),
        ("other", "other-file-system"),
    ] {
        assert_eq!(of(path).unwrap()["state"], state, "{path}");
    }
    assert_eq!(of("large").unwrap()["size"], READ);
    assert!(of("whole").unwrap().get("state").is_none());
    let absent = of("unreadable").unwrap();
    assert_eq!((&absent["kind"], &absent["reason"]), (&json!("absent"), &json!("unreadable")));
    assert!(of("excluded").is_none(), "what was meant to be left out is shown only when asked for");
    let of = by_path(site.json(0, &["ls", "-R", "--excluded", "latest"]));
    assert_eq!(of("excluded").unwrap()["reason"], "excluded");
    let (text, _) = site.ends(0, &["ls", "latest"]);
    for (path, told) in [
        ("cut", "could not be read to its end"),
        ("large", "could not be read to its end"),
        ("kept", "what the snapshot before had"),
        ("unreadable", "is not in the snapshot: it could not be read"),
    ] {
        let line = text.lines().find(|line| line.contains(&format!(" {path}  ["))).unwrap();
        assert!(line.contains(told), "{line}");
    }
    let (_, why) = site.ends(1, &["ls", "latest", "unreadable"]);
    assert!(why.contains("it could not be read when it was saved"), "{why}");
}

#[test]
fn diff_tells_when_a_state_differs_or_a_name_is_lost() {
    let (site, repository) = Site::with_repository();
    let (broken, mended) = (broken(&repository), mended(&repository));
    let of = by_path(site.json(0, &["diff", &mended, &broken]));
    assert_eq!(of("unreadable").unwrap()["change"], "absent");
    assert_eq!(of("unreadable").unwrap()["reason"], "unreadable");
    assert_eq!(of("excluded").unwrap()["reason"], "excluded");
    assert_eq!(of("large").unwrap()["state"], "cut");
    assert_eq!(of("dir").unwrap()["state"], "cut");
    let of = by_path(site.json(0, &["diff", &broken, &mended]));
    assert_eq!(of("unreadable").unwrap()["change"], "added");
    assert_eq!(of("kept").unwrap()["state_before"], "kept");
    assert_eq!(of("dir").unwrap()["change"], "metadata");
    assert!(site.json(0, &["diff", &broken, &broken]).is_empty());
    let (text, _) = site.ends(0, &["diff", &mended, &broken]);
    assert!(text.contains("! unreadable  [is not in the snapshot"), "{text}");
}

#[test]
fn check_counts_what_is_incomplete_and_calls_it_no_damage() {
    let (site, repository) = Site::with_repository();
    broken(&repository);
    let lines = site.json(0, &["check", "--read-data"]);
    let counts = &lines.last().unwrap()["incomplete"];
    let expected = json!({"files": 3, "folders": 1, "names": 1, "files_changed": 1});
    assert_eq!(*counts, expected, "{lines:?}");
    assert_eq!(lines.last().unwrap()["errors"], 0);
    let (text, _) = site.ends(0, &["check"]);
    assert!(text.contains("no damage: 3 files, 1 folders, and 1 names"), "{text}");
}

#[test]
fn snapshots_and_stats_tell_which_are_incomplete() {
    let (site, repository) = Site::with_repository();
    broken(&repository);
    let list = site.json(0, &["snapshots"]).remove(0);
    assert_eq!(list[0]["files_missing"], 5);
    let (text, _) = site.ends(0, &["snapshots"]);
    assert!(text.contains("[incomplete: 5 could not be read]"), "{text}");
    assert_eq!(site.json(0, &["stats"]).last().unwrap()["snapshots_incomplete"], 1);
}

#[test]
fn an_archive_with_incomplete_files_is_well_formed_and_says_so() {
    let (site, repository) = Site::with_repository();
    broken(&repository);
    let dumped = site.command(&["dump", "latest", "."]).output().unwrap();
    let (_, told, code) = texts(&dumped);
    assert_eq!(code, Some(3), "{told}");
    for path in ["cut", "dir", "kept", "large", "unreadable"] {
        assert!(told.contains(&format!("warning: {path}: ")), "{path}: {told}");
    }
    assert!(told.contains("warning: changed: changed while it was saved"), "{told}");
    fs::write(site.path("archive"), &dumped.stdout).unwrap();
    for program in ["tar", "bsdtar"] {
        let target = site.path(program);
        fs::create_dir(&target).unwrap();
        let mut unpack = Command::new(program);
        unpack.arg("-xpf").arg(site.path("archive")).arg("-C").arg(&target);
        let unpacked = unpack.output().unwrap();
        assert!(unpacked.status.success(), "{program}: {:?}", texts(&unpacked));
        assert_eq!(fs::read(target.join("cut")).unwrap(), b"only the beg");
        assert_eq!(fs::read(target.join("kept")).unwrap(), b"as it was");
        assert_eq!(fs::read(target.join("large")).unwrap(), noise(1, READ));
        assert_eq!(fs::read(target.join("whole")).unwrap(), b"whole", "what follows is there");
        assert!(!target.join("unreadable").exists());
    }
    for (path, code) in [("cut", 3), ("kept", 3), ("large", 3), ("changed", 0), ("whole", 0)] {
        let dumped = site.command(&["dump", "latest", path]).stderr(Stdio::null()).output();
        assert_eq!(dumped.unwrap().status.code(), Some(code), "{path}");
    }
    let large = site.command(&["dump", "latest", "large"]).output().unwrap();
    assert_eq!(large.stdout, noise(1, READ));
}

#[test]
fn latest_is_refused_while_a_snapshot_cannot_be_read() {
    let (site, repository) = Site::with_repository();
    let id = mended(&repository);
    let damaged = broken(&repository);
    fs::write(site.path("repo/snapshots").join(&damaged), "damaged").unwrap();
    for args in [
        &["restore", "latest", "--target", "target"][..],
        &["dump", "latest", "whole"],
        &["ls", "latest"],
        &["diff", &id, "latest"],
    ] {
        let (_, why) = site.ends(1, args);
        assert!(why.contains(&format!("snapshots/{damaged}")), "{args:?}: {why}");
    }
    assert!(!site.path("target").exists());
    site.ends(0, &["restore", &id, "--target", "target"]);
    site.ends(0, &["forget", &damaged]);
    site.ends(0, &["ls", "latest"]);
}
