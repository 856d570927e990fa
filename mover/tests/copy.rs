//! Copying snapshots between repositories: everything comes along, little is fetched twice.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

mod common;

use chunkstore::chunker::ChunkerConfig;
use chunkstore::copy::{Copied, CopySettings, Job, Known, copy_snapshot};
use chunkstore::id::SnapshotId;
use chunkstore::key_slot::KdfCost;
use chunkstore::repository::Repository;
use chunkstore::writer::WriterSettings;
use chunkstore::{ErrorKind, Result};
use common::*;
use objects::testing::{MemoryStore, Op, RecordingStore};

type Recorded = Arc<RecordingStore<Arc<MemoryStore>>>;

/// An empty repository in memory that cuts files otherwise than the source.
fn destination() -> (Recorded, Arc<Repository>) {
    let store: Recorded = Arc::new(RecordingStore::new(Arc::new(MemoryStore::new())));
    let chunker = ChunkerConfig::Fixed { size: 512 << 10 };
    let now = jiff::Timestamp::now();
    let made = Repository::create(store.clone(), &unlock(), KdfCost::WEAK, chunker, now).unwrap();
    (store, Arc::new(made))
}

fn settings() -> CopySettings {
    CopySettings {
        writer: WriterSettings::default(),
        threads: 2,
        machine: "test".into(),
        cancelled: Arc::default(),
    }
}

fn copy(
    from: &Repository,
    to: &Arc<Repository>,
    id: SnapshotId,
    parent: Option<(SnapshotId, SnapshotId)>,
) -> Result<Copied> {
    let source = snapshot(from, id);
    let parent = parent.map(|(old, copy)| (snapshot(from, old), copy, snapshot(to, copy)));
    let job = Job {
        id,
        snapshot: &source,
        parent: parent.as_ref().map(|(old, id, copy)| (old, (*id, copy))),
    };
    copy_snapshot(from, to, job, &mut Known::default(), &settings(), jiff::Timestamp::now())
}

/// A source with everything: bundles, inline files, extents, holes, links, attributes.
fn everything(dir: &Path) {
    for n in 0..300 {
        fs::write(dir.join(format!("small{n}")), noise(n, 2000 + n as usize)).unwrap();
    }
    fs::write(dir.join("inline"), "little").unwrap();
    fs::write(dir.join("large"), noise(1, 70 << 20)).unwrap();
    let hole = fs::File::create(dir.join("hole")).unwrap();
    hole.set_len(5 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&hole, b"end", (5 << 20) - 3).unwrap();
    fs::hard_link(dir.join("small1"), dir.join("linked")).unwrap();
    std::os::unix::fs::symlink("small1", dir.join("symlink")).unwrap();
    fs::create_dir_all(dir.join("a/b/c")).unwrap();
    fs::write(dir.join("a/b/c/deep"), noise(9, 300 << 10)).unwrap();
}

#[test]
fn everything_comes_along_and_a_second_copy_fetches_what_changed() {
    let source = memory_dir();
    everything(source.path());
    let from = Repo::new();
    let first = save(&from.repository, source.path()).id.unwrap();
    let (store, to) = destination();
    let copied = copy(&from.repository, &to, first, None).unwrap();
    assert!(copied.blobs_fetched > 60 && copied.entries_known == 0, "{copied:?}");
    let seen = scan::scan(source.path());
    scan::assert_same(&seen, &scan::scan(restored(&to, copied.id).path()), "first");
    let copy_of = snapshot(&to, copied.id).copy_of.unwrap();
    assert_eq!((copy_of.repository, copy_of.snapshot), (from.repository.keys().repository, first));

    fs::write(source.path().join("small7"), noise(1007, 2100)).unwrap();
    fs::write(source.path().join("new"), noise(1008, 200 << 10)).unwrap();
    fs::remove_file(source.path().join("small8")).unwrap();
    let second = save(&from.repository, source.path()).id.unwrap();
    store.reset();
    let again = copy(&from.repository, &to, second, Some((first, copied.id))).unwrap();
    assert!(again.blobs_fetched <= 3 && again.entries_known > 300, "{again:?}");
    assert!(again.bytes_stored < 1 << 20, "{again:?}");
    let sent = store.counts().of(Op::Create).bytes;
    assert!(sent < 1 << 20, "{sent} bytes were sent");
    let seen = scan::scan(source.path());
    scan::assert_same(&seen, &scan::scan(restored(&to, again.id).path()), "second");

    // Without knowing of the first copy, nothing is stored twice either.
    let (_, third) = (store.reset(), copy(&from.repository, &to, second, None).unwrap());
    assert_eq!(third.entries_known, 0);
    assert!(third.bytes_stored < 1 << 20, "{third:?}");
    let mut findings = Vec::new();
    let options = chunkstore::check::CheckOptions {
        read_data: chunkstore::check::ReadData::All,
        ..Default::default()
    };
    let report = &mut |finding: chunkstore::check::Finding| findings.push(finding.to_string());
    chunkstore::check::check(&to, &options, report, &|_| {}).unwrap();
    assert_eq!(findings, [""; 0]);
}

#[test]
fn damage_in_the_source_and_cancelling_leave_the_destination_as_it_was() {
    let source = memory_dir();
    everything(source.path());
    let memory = Arc::new(MemoryStore::new());
    let from = create(memory.clone()).unwrap();
    let id = save(&from, source.path()).id.unwrap();
    let (store, to) = destination();
    let stopped = CopySettings { cancelled: Arc::new(true.into()), ..settings() };
    let whole = snapshot(&from, id);
    let job = Job { id, snapshot: &whole, parent: None };
    let known = &mut Known::default();
    let now = jiff::Timestamp::now();
    let error = copy_snapshot(&from, &to, job, known, &stopped, now).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    let pack = memory.keys().into_iter().find(|key| key.starts_with("packs/")).unwrap();
    memory.damage(&pack, |body| body[5000] ^= 1);
    let error = copy(&from, &to, id, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(to.list_snapshots().unwrap().snapshots.is_empty());
    assert_eq!(objects::testing::keys(&*store, "sessions/"), [""; 0]);
    // What was stored before it was met is not stored again.
    memory.damage(&pack, |body| body[5000] ^= 1);
    store.reset();
    copy(&open(memory).unwrap(), &to, id, None).unwrap();
    assert_eq!(to.list_snapshots().unwrap().snapshots.len(), 1);
}

/// The command, between two folders with a secret each.
struct Site(tempfile::TempDir);

impl Site {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn ends(&self, code: i32, args: &[&str]) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_ebackup"))
            .args(args)
            .env_clear()
            .current_dir(self.0.path())
            .env("HOME", self.0.path())
            .env("EBACKUP_PASSWORD", "of the destination")
            .env("EBACKUP_FROM_PASSWORD", "of the source")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
        String::from_utf8(output.stdout).unwrap() + &text
    }
}

#[test]
fn the_command_copies_what_is_not_there_yet() {
    let site = Site(tempfile::tempdir().unwrap());
    fs::create_dir(site.path("source")).unwrap();
    fs::write(site.path("password"), "of the source").unwrap();
    let saved = ["--repo", "a", "--password-file", "password", "backup", "source", "--init"];
    for n in 0..3 {
        fs::write(site.path(&format!("source/{n}")), noise(n, 50_000)).unwrap();
        site.ends(0, &saved);
    }
    let copy = ["copy", "--from", "a", "--to", "b"];
    assert!(site.ends(1, &copy).contains("ebackup init"));
    let dry = [&copy[..], &["--init"]].concat();
    assert!(site.ends(0, &[&dry[..], &["latest"]].concat()).contains("1 snapshots copied"));
    assert!(site.ends(0, &[&copy[..], &["--dry-run"]].concat()).contains("would copy"));
    let text = site.ends(0, &copy);
    assert!(text.contains("2 snapshots copied, 1 were there already"), "{text}");
    let text = site.ends(0, &[&copy[..], &["--json"]].concat());
    let summary: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(summary["type"], "summary");
    assert_eq!((&summary["copied"], &summary["there_already"]), (&0.into(), &3.into()));
    assert_eq!(site.ends(0, &["--repo", "b", "snapshots", "--json"]).matches("\"id\"").count(), 3);
    site.ends(0, &["--repo", "b", "restore", "latest", "--target", "out"]);
    let diff =
        Command::new("diff").arg("-r").arg(site.path("source")).arg(site.path("out")).status();
    assert!(diff.unwrap().success());
    assert!(
        site.ends(1, &["copy", "--from", "a", "--to", "b", "--from-password-file", "none"])
            .contains("password file")
    );
}
