//! The command line under bad conditions: what it says, how it ends, and what it leaves behind.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "also in the functions that the tests share"
)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::scan::{Tree, assert_same, scan};
use common::sources::Source;
use common::*;
use mover::monitor::Concern;
use tempfile::TempDir;

/// A repository, a folder to save and a password, used through the command line.
struct Site {
    dir: TempDir,
    /// What runs the program: nothing, or a command that drops privileges.
    prefix: Vec<&'static str>,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Others may be asked to run the program here.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let source = Source(dir.path());
        source.file("password", "secret\n");
        source.file("source/small", noise(1, 5000));
        source.file("source/d/medium", noise(2, 300_000));
        source.file("source/tiny", "tiny");
        let prefix = Vec::new();
        Self { dir, prefix }
    }

    /// With a repository that has one snapshot.
    fn saved() -> Self {
        let site = Self::new();
        site.succeeds(&["init"]);
        site.succeeds(&["backup", "source"]);
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn source(&self) -> Source<'_> {
        Source(self.dir.path())
    }

    fn command(&self, args: &[&str]) -> Command {
        let program = env!("CARGO_BIN_EXE_ebackup");
        let mut command = match self.prefix.split_first() {
            None => Command::new(program),
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
        };
        for name in ["PASSWORD", "KEY_FILE", "MEMORY"] {
            command.env_remove(format!("EBACKUP_{name}"));
        }
        command
            .current_dir(self.dir.path())
            .env("EBACKUP_REPO", self.path("repo"))
            .env("EBACKUP_PASSWORD_FILE", self.path("password"))
            .env("HOME", self.path("home"))
            .env_remove("XDG_CONFIG_HOME")
            .args(args);
        command
    }

    fn run(&self, args: &[&str]) -> Run {
        Run::new(args, self.command(args).output().unwrap())
    }

    #[track_caller]
    fn succeeds(&self, args: &[&str]) -> Run {
        self.run(args).ends_with(0)
    }

    /// The repository, byte for byte.
    fn repository(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut pending = vec![self.path("repo")];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    pending.push(path);
                } else {
                    files.insert(path.clone(), fs::read(path).unwrap());
                }
            }
        }
        files
    }

    /// Restores the newest snapshot and scans it.
    #[track_caller]
    fn restored(&self) -> Tree {
        let target = tempfile::tempdir().unwrap();
        self.succeeds(&["restore", "latest", "--target", target.path().to_str().unwrap()]);
        scan(target.path())
    }
}

struct Run {
    what: String,
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Run {
    fn new(args: &[&str], output: Output) -> Self {
        Self {
            what: args.join(" "),
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    fn ends_with(self, code: i32) -> Self {
        let Self { what, stdout, stderr, .. } = &self;
        assert_eq!(self.code, Some(code), "{what}:\n{stdout}\n{stderr}");
        self
    }

    #[track_caller]
    fn says(self, text: &str) -> Self {
        let Self { what, stderr, .. } = &self;
        assert!(stderr.contains(text), "{what} does not say '{text}':\n{stderr}");
        self
    }

    /// The last line of JSON.
    fn summary(&self) -> serde_json::Value {
        serde_json::from_str(self.stdout.lines().last().unwrap()).unwrap()
    }

    fn number(&self, name: &str) -> u64 {
        let summary = self.summary();
        let number = summary.get(name).and_then(serde_json::Value::as_u64);
        number.unwrap_or_else(|| panic!("{name} in {summary}"))
    }
}

const COMMANDS: [&[&str]; 4] = [
    &["snapshots"],
    &["backup", "source"],
    &["restore", "latest", "--target", "target"],
    &["prune"],
];

/// Every command fails, says why, and leaves the repository as it was.
#[track_caller]
fn refuses(site: &Site, text: &str) {
    let before = site.repository();
    for command in COMMANDS {
        site.run(command).ends_with(1).says(text);
        assert!(!site.path("target").exists());
    }
    assert!(site.repository() == before, "the repository was changed");
}

#[test]
fn a_backup_can_be_made_and_restored_with_a_password() {
    let site = Site::saved();
    assert_same(&scan(&site.path("source")), &site.restored(), "restored");
}

#[test]
fn wrong_password_is_told_from_other_failures() {
    let site = Site::saved();
    site.source().file("password", "another\n");
    refuses(&site, "does not open");
    site.source().file("password", "\n");
    refuses(&site, "is empty");
    fs::remove_file(site.path("password")).unwrap();
    refuses(&site, "cannot read the password file");
}

#[test]
fn wrong_key_file_is_told_from_none_and_from_no_key_file() {
    let site = Site::new();
    let with_key = |args: &[&str]| {
        let output = site.command(args).env_remove("EBACKUP_PASSWORD_FILE").output();
        Run::new(args, output.unwrap())
    };
    with_key(&["init"]).ends_with(0);
    with_key(&["backup", "source"]).ends_with(0);
    let keys = site.path("home/.config/ebackup/keys");
    let key = fs::read_dir(&keys).unwrap().next().unwrap().unwrap().path();
    let text = fs::read_to_string(&key).unwrap();
    let mode = fs::metadata(&key).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "a key is nobody else's business");

    let last = text.trim_end().chars().last().unwrap();
    let other = if last == '0' { "1" } else { "0" };
    let wrong = format!("{}{other}\n", &text.trim_end()[..text.trim_end().len() - 1]);
    fs::write(&key, wrong).unwrap();
    with_key(&["snapshots"]).ends_with(1).says("does not open");
    fs::write(&key, "something else\n").unwrap();
    with_key(&["snapshots"]).ends_with(1).says("is not a key file");
    fs::remove_file(&key).unwrap();
    with_key(&["snapshots"]).ends_with(1).says("no secret was given");
}

#[test]
fn what_is_no_repository_is_not_taken_for_one() {
    let site = Site::new();
    let says = |text: &str| {
        for command in COMMANDS {
            site.run(command).ends_with(1).says(text);
        }
    };
    says("there is no repository");
    assert!(!site.path("repo").exists());
    fs::create_dir(site.path("repo")).unwrap();
    says("there is no repository");
    site.source().file("repo/config", "[core]\n\trepositoryformatversion = 0\n");
    says("is not a repository of ebackup");
    fs::remove_file(site.path("repo/config")).unwrap();
    site.source().file("repo/holiday.jpg", "x");
    site.run(&["init"]).ends_with(1).says("holiday.jpg");
    let names = fs::read_dir(site.path("repo")).unwrap().count();
    assert_eq!(names, 1, "nothing is added to a folder of somebody else");
}

#[test]
fn a_newer_format_is_refused_with_the_advice_to_update() {
    let site = Site::saved();
    let config = site.path("repo/config");
    let mut bytes = fs::read(&config).unwrap();
    bytes[8] = 9;
    fs::write(&config, bytes).unwrap();
    refuses(&site, "format version 9");
}

#[test]
fn a_repository_is_made_only_once() {
    let site = Site::saved();
    let before = site.repository();
    site.run(&["init"]).ends_with(1).says("already");
    assert!(site.repository() == before);
    site.succeeds(&["backup", "--init", "source"]);
}

#[test]
fn a_read_only_repository_can_be_read_and_refuses_the_rest_clearly() {
    if !is_root() {
        return not_tested("a read-only repository, for this user cannot mount");
    }
    let site = Site::saved();
    let repo = site.path("repo");
    let mount = |options: &[&str]| {
        let status = Command::new("mount").args(options).arg(&repo).status();
        assert!(status.unwrap().success());
    };
    mount(&["--bind", repo.to_str().unwrap()]);
    let _mounted = Mounted(repo.clone());
    mount(&["-o", "remount,bind,ro"]);
    let before = site.repository();
    site.succeeds(&["snapshots"]);
    assert_same(&scan(&site.path("source")), &site.restored(), "restored");
    for command in [&["backup", "source"][..], &["forget", "--keep-last", "0"], &["prune"]] {
        let run = site.run(command);
        if command[0] != "forget" {
            run.ends_with(1).says("read-only");
        }
    }
    assert!(site.repository() == before);
}

#[test]
fn a_repository_without_write_permission_is_refused_clearly() {
    let Some(site) = unprivileged() else {
        return;
    };
    // It belongs to root and may be read by all.
    let status = Command::new("chmod").arg("-R").arg("a+rX").arg(site.path("repo")).status();
    assert!(status.unwrap().success());
    let before = site.repository();
    site.succeeds(&["snapshots"]);
    site.run(&["backup", "source"]).ends_with(1).says("permission denied");
    assert!(site.repository() == before);
}

/// A saved site whose commands run as a user without any rights.
fn unprivileged() -> Option<Site> {
    let mut site = Site::saved();
    site.prefix = vec!["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let able = site.command(&["--version"]).output();
    if is_root() && able.is_ok_and(|output| output.status.success()) {
        Some(site)
    } else {
        not_tested("another user, for this one is not root, or the other cannot run the program");
        None
    }
}

fn give_repository_away(site: &Site) {
    let status = Command::new("chown").args(["-R", "65534:65534"]).arg(site.path("repo")).status();
    assert!(status.unwrap().success());
    chown(site.dir.path(), Some(65534), Some(65534)).unwrap();
}

#[test]
fn what_cannot_be_read_is_named_and_the_rest_is_saved() {
    let Some(mut site) = unprivileged() else {
        return;
    };
    give_repository_away(&site);
    site.source().file("source/secret", "x");
    site.source().file("source/closed/inside", "x");
    site.source().mode("source/secret", 0);
    site.source().mode("source/closed", 0o700);
    let run = site.run(&["backup", "source", "--json"]).ends_with(3);
    let run = run.says("secret: cannot be opened").says("closed: ");
    assert_eq!((run.number("files_missing"), run.number("warnings")), (2, 2));
    let expected = scan(&site.path("source"));
    site.prefix.clear();
    // What is not in the snapshot is told by whoever restores it, too.
    let target = site.path("restored");
    let run = site.run(&["restore", "latest", "--target", target.to_str().unwrap()]).ends_with(3);
    run.says("secret: is not in the snapshot").says("closed: could not be read");
    let found = scan(&target);
    let kept: Vec<_> = found.keys().filter(|path| !path.is_empty()).collect();
    assert_eq!(kept, [&b"closed"[..], b"d", b"d/medium", b"small", b"tiny"]);
    for path in kept {
        assert_eq!(found[path].content, expected[path].content);
    }
}

#[test]
fn a_full_disk_is_reported_and_costs_nothing_that_was_saved() {
    let site = Site::saved();
    let disk = site.path("disk");
    let Some(_mounted) = Mounted::tmpfs(&disk, "24m") else {
        return not_tested("a full disk, for this user cannot mount a small one");
    };
    let on_disk = |args: &[&str]| {
        let output = site.command(args).env("EBACKUP_REPO", disk.join("repo")).output();
        Run::new(args, output.unwrap())
    };
    on_disk(&["init"]).ends_with(0);
    on_disk(&["backup", "source"]).ends_with(0);
    let before = scan(&site.path("source"));
    site.source().file("source/too-large", noise(9, 40 << 20));
    let run = on_disk(&["backup", "source", "--memory", "96M"]).ends_with(1);
    run.says("no space left").says("free space at the repository");
    let snapshots = on_disk(&["snapshots", "--json"]).ends_with(0);
    assert_eq!(snapshots.stdout.matches("\"lineage\"").count(), 1);
    let target = tempfile::tempdir().unwrap();
    let args = ["restore", "latest", "--target", target.path().to_str().unwrap()];
    on_disk(&args).ends_with(0);
    assert_same(&before, &scan(target.path()), "restored from a full disk");
    // With room again, by removing what is too large, life goes on.
    fs::remove_file(site.path("source/too-large")).unwrap();
    on_disk(&["prune", "--grace", "0s"]).ends_with(0);
    on_disk(&["backup", "source"]).ends_with(0);
}

#[test]
fn wrong_usage_ends_with_2() {
    let site = Site::new();
    let wrong: [&[&str]; 7] = [
        &[],
        &["backup"],
        &["bakcup", "source"],
        &["backup", "source", "--memory", "lots"],
        &["backup", "source", "--compression", "99"],
        &["restore", "latest"],
        &["snapshots", "--key-file", "a", "--password-file", "b"],
    ];
    for args in wrong {
        let run = site.run(args).ends_with(2);
        assert!(run.stderr.contains("Usage") || run.stderr.contains("--help"), "{}", run.stderr);
        assert_eq!(run.stdout, "");
    }
    site.run(&["backup", "source", "--memory", "32M"]).ends_with(2).says("at least 96M");
    site.run(&["--help"]).ends_with(0);
}

#[test]
fn an_interrupted_backup_is_continued_by_the_next() {
    let site = Site::new();
    const FILES: u64 = 40;
    const BYTES: usize = 4 << 20;
    for n in 0..FILES {
        site.source().file(format!("source/file{n}"), noise(100 + n, BYTES));
    }
    site.succeeds(&["init"]);
    let args = ["backup", "source", "--memory", "96M", "--json"];
    let mut child = site.command(&args);
    let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let packs = site.path("repo/packs");
    let begun = Instant::now();
    while !packs.exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "no pack is written");
        assert!(child.try_wait().unwrap().is_none(), "it ended before the first pack");
        std::thread::sleep(Duration::from_millis(2));
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let run = Run::new(&args, child.wait_with_output().unwrap());
    run.ends_with(1).says("interrupted").says("continues");
    let run = site.succeeds(&["snapshots", "--json"]);
    assert_eq!(run.stdout.matches("\"lineage\"").count(), 0, "nothing was committed");

    let uploaded = pack_bytes(&packs);
    let run = site.succeeds(&args);
    let total = FILES * BYTES as u64;
    assert!(uploaded >= 4 << 20 && uploaded < total, "{uploaded}");
    let stored = run.number("bytes_stored");
    // The files it was in the middle of are cut alike, so only nodes and the session's end differ.
    assert!(uploaded + stored < total + (4 << 20), "{uploaded} + {stored} for {total}");
    assert_same(&scan(&site.path("source")), &site.restored(), "restored");
}

fn pack_bytes(packs: &Path) -> u64 {
    let folders = fs::read_dir(packs).unwrap().map(|entry| entry.unwrap().path());
    let packs = folders.flat_map(|folder| fs::read_dir(folder).unwrap());
    packs.map(|pack| pack.unwrap().metadata().unwrap().len()).sum()
}

/// Saves a folder in which `interfere` does something each time work on a file begins; the snapshot
/// restores with no complaint but of what is missing in it. Gives the lines of warnings and what was restored.
fn saved_while(
    fill: impl Fn(&Source<'_>),
    interfere: impl Fn(&Source<'_>, &[u8]) + Sync,
) -> (Vec<String>, Vec<String>, Tree) {
    let dir = memory_dir();
    let source = Source(dir.path());
    fill(&source);
    let repo = Repo::new();
    let log = Log::on_begin(|path| interfere(&Source(dir.path()), path));
    let outcome = run(&repo.repository, &request(dir.path()), &log).unwrap();
    let target = memory_dir();
    let restoring = Log::default();
    let id = outcome.id.unwrap();
    let snapshot = snapshot(&repo.repository, id);
    try_restore(&repo.repository, &snapshot, target.path(), &restoring).unwrap();
    assert_eq!(restoring.missing(), log.missing());
    assert_eq!(restoring.lines().len(), restoring.missing().len(), "{:?}", restoring.lines());
    // And the next backup, undisturbed, has everything as it is.
    let next = save(&repo.repository, dir.path());
    let now = restored(&repo.repository, next.id.unwrap());
    assert_same(&scan(dir.path()), &scan(now.path()), "the next backup");
    (log.lines(), log.missing(), scan(target.path()))
}

#[test]
fn a_file_that_vanishes_is_a_warning() {
    let (warnings, missing, tree) = saved_while(
        |source| {
            for name in ["a", "b", "c"] {
                source.file(name, noise(1, 600));
            }
            source.file("large", noise(1, 17 << 20));
            source.file("medium", noise(1, 1 << 20));
        },
        |source, path| {
            if path != b"a" && path != b"c" {
                fs::remove_file(source.path(path)).unwrap();
            }
        },
    );
    let vanished = |name| format!("{name}: vanished before it could be read");
    assert_eq!(warnings, [vanished("b"), vanished("large"), vanished("medium")]);
    assert_eq!(missing, [""; 0]);
    let names: Vec<_> = tree.keys().map(|name| name.as_slice()).collect();
    assert_eq!(names, [&b""[..], b"a", b"c"]);
}

#[test]
fn files_that_change_size_while_they_are_read_are_saved_as_far_as_possible() {
    for size in [100, 600, 5000, 300_000, 20 << 20] {
        for new_size in [0, 1, 50, 700, 4000, 200_000, 18 << 20, 22 << 20] {
            let (warnings, missing, tree) = saved_while(
                |source| drop(source.file("file", noise(1, size))),
                |source, path| {
                    fs::write(source.path(path), noise(1, new_size)).unwrap();
                },
            );
            // It changed before it was opened: what was opened is consistent.
            assert_eq!(missing, [""; 0], "{size} {new_size}");
            assert_eq!(warnings, [""; 0], "{size} {new_size}");
            assert_eq!(tree[&b"file"[..]].size, new_size as u64);
            assert_eq!(tree[&b"file"[..]].content, blake3::hash(&noise(1, new_size)).as_bytes());
        }
    }
}

#[test]
fn a_file_that_shrinks_between_its_names_is_saved_under_both() {
    for size in [100, 600, 5000, 300_000, 3 << 20] {
        for new_size in [0, 1, 50, 550, 4000, 200_000, 4 << 20] {
            let done = AtomicBool::new(false);
            let (_, missing, tree) = saved_while(
                |source| {
                    source.file("a", noise(1, size));
                    fs::hard_link(source.path("a"), source.path("b")).unwrap();
                },
                |source, path| {
                    if !done.swap(true, Ordering::SeqCst) {
                        fs::write(source.path(path), noise(1, new_size)).unwrap();
                    }
                },
            );
            assert_eq!(missing, [""; 0], "{size} {new_size}");
            let (a, b) = (&tree[&b"a"[..]], &tree[&b"b"[..]]);
            assert_eq!((a.size, &a.content), (b.size, &b.content), "{size} {new_size}");
            let content = [size, new_size].map(|size| *blake3::hash(&noise(1, size)).as_bytes());
            assert!(content.iter().any(|one| one[..] == a.content[..]), "{size} {new_size}");
        }
    }
}

#[test]
fn files_written_to_all_the_time_never_break_a_backup() {
    let dir = memory_dir();
    let source = Source(dir.path());
    let names = ["small", "medium", "large", "small-link", "appended"];
    source.file("small", noise(1, 3000));
    fs::hard_link(source.path("small"), source.path("small-link")).unwrap();
    source.file("medium", noise(2, 1 << 20));
    source.file("large", noise(3, 20 << 20));
    source.file("appended", "");
    source.file("untouched", "x");
    let repo = Repo::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Whatever becomes of the assertions below.
        let stopped = StopOnDrop(&stop);
        scope.spawn(|| {
            for n in 0_u64.. {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                for name in &names[..3] {
                    let file = fs::File::options().write(true).open(source.path(name)).unwrap();
                    let size = (n * 7919) % [6000, 2 << 20, 40 << 20][n as usize % 3];
                    file.set_len(size).unwrap();
                    file.write_all_at(&n.to_le_bytes(), size / 2).unwrap();
                }
                let mut log =
                    fs::File::options().append(true).open(source.path("appended")).unwrap();
                log.write_all(b"another line\n").unwrap();
            }
        });
        for _ in 0..6 {
            let log = Log::default();
            let outcome = run(&repo.repository, &request(dir.path()), &log).unwrap();
            // What became shorter while it was read is not whole, and nothing else is missing.
            let warnings = log.warnings.lock().unwrap().clone();
            for warning in &warnings {
                let shrunk = warning.message.starts_with("became shorter while it was read");
                assert!(shrunk || warning.concern == Concern::Changed, "{warning}");
            }
            let target = memory_dir();
            let snapshot = snapshot(&repo.repository, outcome.id.unwrap());
            try_restore(&repo.repository, &snapshot, target.path(), &Log::default()).unwrap();
            let tree = scan(target.path());
            assert_eq!(tree.len(), 7);
            assert_eq!(tree[&b"untouched"[..]].content, blake3::hash(b"x").as_bytes());
        }
        drop(stopped);
    });
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn folders_and_files_exchanged_meanwhile_are_what_they_were_when_opened() {
    let (warnings, missing, tree) = saved_while(
        |source| {
            source.file("a", noise(1, 600));
            source.file("outside/passwd", "not to be saved under another name");
            source.file("z", noise(2, 600));
        },
        |source, path| {
            if path == b"a" {
                fs::remove_file(source.path("a")).unwrap();
                std::os::unix::fs::symlink("outside/passwd", source.path("a")).unwrap();
            }
        },
    );
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(missing, ["a"]);
    assert!(!tree.contains_key(&b"a"[..]));
}
