//! What the command line promises beyond saving and restoring: usage errors, notes, archives, and ways
//! out of damage.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// A folder with a source, a repository and a key.
struct Site(TempDir);

impl Site {
    fn new() -> Self {
        let site = Self(tempfile::tempdir().unwrap());
        fs::create_dir(site.path("source")).unwrap();
        fs::write(site.path("source/file"), "content").unwrap();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ebackup"));
        for name in ["PASSWORD", "PASSWORD_FILE", "KEY_FILE", "MEMORY"] {
            command.env_remove(format!("EBACKUP_{name}"));
        }
        command
            .current_dir(self.0.path())
            .env("EBACKUP_REPO", self.path("repo"))
            .env("XDG_CONFIG_HOME", self.path("config"))
            .args(args);
        command
    }

    /// Runs a command that ends with this code; what it says on both channels.
    #[track_caller]
    fn ends(&self, code: i32, args: &[&str]) -> (String, String) {
        let output = self.command(args).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{args:?}\n{out}\n{err}");
        (out, err)
    }

    /// Ids of all snapshots, the oldest first.
    fn snapshots(&self) -> Vec<String> {
        let (out, _) = self.ends(0, &["snapshots", "--json"]);
        let list: serde_json::Value = serde_json::from_str(&out).unwrap();
        list.as_array().unwrap().iter().map(|one| one["id"].as_str().unwrap().to_owned()).collect()
    }
}

#[test]
fn what_cannot_be_meant_ends_with_2_and_changes_nothing() {
    let site = Site::new();
    for args in [
        &["snapshots", "--memory", "95M"][..],
        &["snapshots", "--repo", ""],
        &["dump", "latest", "file", "--json"],
        &["forget", "--keep-last", "1", "--prune", "--dry-run"],
    ] {
        site.ends(2, args);
    }
    assert!(!site.path("repo").exists());
}

#[test]
fn a_dry_run_makes_no_repository() {
    let site = Site::new();
    let (_, err) = site.ends(1, &["backup", "source", "--init", "--dry-run"]);
    assert!(err.contains("a dry run makes none"), "{err}");
    assert!(!site.path("repo").exists() && !site.path("config").exists());
}

#[test]
fn a_repository_within_the_source_is_left_out() {
    let site = Site::new();
    let (_, err) = site.ends(0, &["--repo", "source/repo", "backup", "source", "--init"]);
    assert!(err.contains("the repository itself is left out"), "{err}");
    let (out, _) = site.ends(0, &["--repo", "source/repo", "ls", "-R", "latest"]);
    assert!(out.contains("repo") && !out.contains("repo/"), "{out}");
}

#[test]
fn a_path_that_is_not_in_the_snapshot_leaves_no_target_behind() {
    let site = Site::new();
    site.ends(0, &["backup", "source", "--init"]);
    let (_, err) = site.ends(1, &["restore", "latest:nowhere", "--target", "target"]);
    assert!(err.contains("the snapshot has no 'nowhere'"), "{err}");
    assert!(!site.path("target").exists());
}

#[test]
fn a_damaged_snapshot_is_told_of_and_can_be_forgotten() {
    let site = Site::new();
    site.ends(0, &["backup", "source", "--init"]);
    fs::write(site.path("source/file"), "other").unwrap();
    site.ends(0, &["backup", "source"]);
    let [_, newest] = &site.snapshots()[..] else { panic!("two snapshots") };
    fs::write(site.path("repo/snapshots").join(newest), "damaged").unwrap();
    let (_, err) = site.ends(0, &["restore", "latest", "--target", "target"]);
    assert!(err.contains("1 snapshots cannot be read"), "{err}");
    site.ends(1, &["prune"]);
    site.ends(0, &["forget", newest]);
    site.ends(0, &["prune"]);
    site.ends(0, &["check"]);
}

#[test]
fn an_archive_has_what_tar_can_hold() {
    let site = Site::new();
    // A socket comes first: it has no place in an archive, and must not leave its attributes there.
    let _socket = UnixListener::bind(site.path("source/a socket")).unwrap();
    let time = "1969-12-31T23:59:58.25Z";
    let touched = Command::new("touch").args(["-d", time]).arg(site.path("source/file")).status();
    assert!(touched.unwrap().success());
    fs::create_dir(site.path("source/many")).unwrap();
    for n in 0..50 {
        fs::write(site.path(&format!("source/many/{n}")), format!("{n}").repeat(1000)).unwrap();
    }
    site.ends(0, &["backup", "source", "--init"]);
    fs::create_dir(site.path("unpacked")).unwrap();
    let mut dump = site.command(&["dump", "latest", "."]).stdout(Stdio::piped()).spawn().unwrap();
    let archive = dump.stdout.take().unwrap();
    let unpacked =
        Command::new("tar").arg("xpC").arg(site.path("unpacked")).stdin(archive).status().unwrap();
    assert!(unpacked.success() && dump.wait().unwrap().success());
    let file = fs::metadata(site.path("unpacked/file")).unwrap();
    assert_eq!((file.mtime(), file.mtime_nsec()), (-2, 250_000_000));
    assert_eq!(fs::read(site.path("unpacked/file")).unwrap(), b"content");
    for n in 0..50 {
        let text = fs::read_to_string(site.path(&format!("unpacked/many/{n}"))).unwrap();
        assert_eq!(text, format!("{n}").repeat(1000));
    }
    assert!(!site.path("unpacked/a socket").exists());
}

#[test]
fn a_path_longer_than_the_format_holds_is_named_and_the_rest_is_saved() {
    let site = Site::new();
    let mut dir = mover::fs::Dir::open_root(&site.path("source")).unwrap();
    let name = [b'x'; 250];
    for _ in 0..1100 {
        dir = dir.make_dir(&name).unwrap();
    }
    let (_, err) = site.ends(3, &["backup", "source", "--init"]);
    assert!(err.contains("its path is longer than 256 KiB"), "{err}");
    site.ends(0, &["restore", "latest", "--target", "target"]);
    assert_eq!(fs::read(site.path("target/file")).unwrap(), b"content");
    for tree in ["source", "target"] {
        mover::fs::Dir::open_root(&site.path(tree)).unwrap().remove_tree(&name).unwrap();
    }
}
