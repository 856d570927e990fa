//! What the command line promises beyond saving and restoring: usage errors, notes, archives, and ways
//! out of damage.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::fs;
use std::path::PathBuf;
use std::process::Command;

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
    let (_, err) = site.ends(1, &["restore", "latest", "--target", "target"]);
    assert!(err.contains(&format!("snapshots/{newest} cannot be read")), "{err}");
    site.ends(1, &["prune"]);
    site.ends(0, &["forget", newest]);
    site.ends(0, &["prune"]);
    site.ends(0, &["check"]);
}

#[test]
fn absolute_paths_below_the_source_are_excluded_and_what_excludes_nothing_is_told() {
    let site = Site::new();
    fs::create_dir_all(site.path("source/cache/deep")).unwrap();
    fs::write(site.path("source/cache/deep/file"), "x").unwrap();
    let cache = site.path("source/cache").to_str().unwrap().to_owned();
    let (_, err) = site.ends(0, &["backup", "source", "--init", "--exclude", &cache]);
    assert!(!err.contains("nothing was excluded"), "{err}");
    let (out, _) = site.ends(0, &["ls", "-R", "latest"]);
    assert!(out.contains("file") && !out.contains("cache"), "{out}");
    let (_, err) =
        site.ends(0, &["backup", "source", "--exclude", "/elsewhere", "--exclude", "*.tpm"]);
    for pattern in ["/elsewhere", "*.tpm"] {
        assert!(err.contains(&format!("by the pattern '{pattern}'")), "{err}");
    }
    site.ends(1, &["backup", "source", "--exclude", ""]);
}

#[test]
fn the_command_line_goes_before_the_environment() {
    let site = Site::new();
    fs::write(site.path("password"), "secret").unwrap();
    fs::write(site.path("wrong"), "wrong").unwrap();
    site.ends(0, &["init", "--password-file", "password"]);
    site.ends(0, &["key", "add", "--password-file", "password", "--new-key-file", "key"]);
    let with = |code, variable: &str, value: &str, args: &[&str]| {
        let output = site.command(args).env(variable, value).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{variable} {args:?}");
    };
    with(0, "EBACKUP_PASSWORD_FILE", "wrong", &["snapshots", "--key-file", "key"]);
    with(0, "EBACKUP_KEY_FILE", "/nonexistent", &["snapshots", "--password-file", "password"]);
    with(0, "EBACKUP_PASSWORD", "wrong", &["snapshots", "--password-file", "password"]);
    with(2, "X", "x", &["snapshots", "--password-file", "password", "--key-file", "key"]);
}

#[test]
fn a_secret_may_come_through_a_pipe() {
    let site = Site::new();
    fs::write(site.path("password"), "secret").unwrap();
    site.ends(0, &["backup", "source", "--init", "--password-file", "password"]);
    for args in [&["check"][..], &["forget", "--keep-last", "1", "--prune"]] {
        let args = [args, &["--password-file", "/dev/stdin"]].concat();
        let mut cat = Command::new("cat")
            .arg(site.path("password"))
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let output = site.command(&args).stdin(cat.stdout.take().unwrap()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
        cat.wait().unwrap();
    }
}

#[test]
fn a_repository_is_not_copied_to_itself() {
    let site = Site::new();
    site.ends(0, &["backup", "source", "--init"]);
    let (_, err) = site.ends(1, &["copy", "--from", "repo"]);
    assert!(err.contains("the same repository"), "{err}");
    assert_eq!(site.snapshots().len(), 1);
}

#[test]
fn a_bare_environment_is_enough() {
    let site = Site::new();
    let key = format!("ebackup key file of a test\n{}\n", "07".repeat(32));
    fs::write(site.path("key"), key).unwrap();
    for args in [
        &["init"][..],
        &["backup", "source"],
        &["snapshots"],
        &["check"],
        &["restore", "latest", "--target", "target"],
        &["restore", "latest", "--target", "target"],
        &["prune"],
    ] {
        let mut command = site.command(args);
        command.env_clear().env("TMPDIR", "/nonexistent");
        command.args(["--repo", "repo", "--key-file", "key"]);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{args:?}: {output:?}");
    }
    // Without a secret there is nowhere to keep one.
    let mut command = site.command(&["init", "--repo", "other"]);
    let output = command.env_clear().output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("give a secret"), "{output:?}");
    assert!(!site.path("other/config").exists());
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
