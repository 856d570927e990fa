//! How commands end, whatever becomes of standard output and standard error, and when a signal tells them
//! to.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::leased::Leased;
use common::noise;
use common::site::{Site, texts};
use rustix::process::{Pid, Signal, kill_process};

/// What a command is for.
#[derive(Clone, Copy, PartialEq)]
enum Purpose {
    /// It only tells: a reader that has seen enough ends it quietly.
    Tell,
    /// Its output is the work.
    Write,
    /// It does something, and tells how that went.
    Do,
}
use Purpose::{Do, Tell, Write};

/// Every subcommand, and how it ends when all is well. `second` is a repository to copy to.
const COMMANDS: [(&[&str], Purpose); 18] = [
    (&["--help"], Tell),
    (&["--version"], Tell),
    (&["completions", "bash"], Tell),
    (&["snapshots"], Tell),
    (&["ls", "-R", "latest"], Tell),
    (&["diff", "latest", "latest"], Tell),
    (&["stats"], Tell),
    (&["key", "list"], Tell),
    (&["dump", "latest", "."], Write),
    (&["dump", "latest", "large"], Write),
    (&["check", "--read-data"], Do),
    (&["backup", "source"], Do),
    (&["restore", "latest", "--target", "target"], Do),
    (&["copy", "--from", "repo", "--to", "second", "--from-key-file", "key"], Do),
    (&["init", "--repo", "third"], Do),
    (&["key", "add", "--new-key-file", "new-key"], Do),
    (&["forget", "--keep-last", "1"], Do),
    (&["prune"], Do),
];

fn site() -> Site {
    let site = Site::new();
    for n in 0..300 {
        fs::write(site.path(&format!("source/a rather long name {n}")), n.to_string()).unwrap();
    }
    fs::write(site.path("source/large"), noise(1, 3 << 20)).unwrap();
    site.ends(0, &["backup", "source", "--init", "--lineage", "one"]);
    fs::write(site.path("source/file"), "other").unwrap();
    site.ends(0, &["backup", "source", "--lineage", "one"]);
    site.ends(0, &["init", "--repo", "second"]);
    site
}

/// A pipe that nobody reads any more.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    OwnedFd::from(writer).into()
}

fn full() -> Stdio {
    File::options().write(true).open("/dev/full").unwrap().into()
}

fn run(site: &Site, args: &[&str], out: Stdio, err: Stdio) -> (String, ExitStatus) {
    let output = site.command(args).stdout(out).stderr(err).output().unwrap();
    let (_, err, _) = texts(&output);
    assert!(!err.contains("panicked"), "{args:?}: {err}");
    (err, output.status)
}

#[test]
fn every_command_is_in_the_table() {
    let site = Site::new();
    let (help, _) = site.ends(0, &["--help"]);
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let commands = commands.take_while(|line| !line.is_empty());
    let names = commands.filter_map(|line| {
        line.split_whitespace()
            .next()
            .filter(|_| line.starts_with("  ") && !line.starts_with("   "))
    });
    for name in names.filter(|name| !matches!(*name, "help" | "agent" | "restore-wait")) {
        assert!(COMMANDS.iter().any(|(args, _)| args[0] == name), "{name}");
    }
}

#[test]
fn a_reader_that_goes_away_ends_a_listing_and_no_work() {
    let site = site();
    for (args, purpose) in COMMANDS {
        let (err, status) = run(&site, args, closed_pipe(), Stdio::piped());
        let expected = if purpose == Tell { 0 } else { 1 };
        assert_eq!(status.code(), Some(expected), "{args:?}: {err}");
        match purpose {
            Tell | Write => assert!(!err.contains("ebackup:"), "{args:?} ends quietly: {err}"),
            Do => assert!(err.contains("all else was carried out"), "{args:?}: {err}"),
        }
    }
    // What was to be done is done.
    assert!(site.path("target/large").exists() && site.path("third/config").exists());
    assert!(site.path("new-key").exists());
    let left = site.json(0, &["snapshots"]).remove(0);
    assert_eq!(left.as_array().unwrap().len(), 2, "one of each lineage");
    let copied = site.json(0, &["snapshots", "--repo", "second"]).remove(0);
    assert_eq!(copied.as_array().unwrap().len(), 3);
}

#[test]
fn what_cannot_be_written_is_an_error_after_the_work_is_done() {
    let site = site();
    for (args, purpose) in COMMANDS {
        let (err, status) = run(&site, args, full(), Stdio::piped());
        // 'diff' of equal snapshots has nothing to write.
        let expected = if args[0] == "diff" { 0 } else { 1 };
        assert_eq!(status.code(), Some(expected), "{args:?}: {err}");
        if expected == 1 {
            assert!(err.contains("standard output"), "{args:?}: {err}");
        }
        if purpose == Do {
            assert!(err.contains("all else was carried out"), "{args:?}: {err}");
        }
    }
    assert!(site.path("target/large").exists() && site.path("third/config").exists());
}

#[test]
fn nobody_to_hear_of_troubles_changes_no_outcome() {
    for make in [closed_pipe, full] {
        let site = site();
        for (args, _) in COMMANDS {
            let (_, status) = run(&site, args, Stdio::null(), make());
            assert_eq!(status.code(), Some(0), "{args:?}");
        }
        // And one that has something to say.
        let (_, status) = run(&site, &["ls", "nosuch"], Stdio::null(), make());
        assert_eq!(status.code(), Some(1));
        let (_, status) = run(&site, &["ls"], Stdio::null(), make());
        assert_eq!(status.code(), Some(2));
    }
}

#[test]
fn closed_channels_change_no_outcome_and_hit_no_file() {
    let site = site();
    for (args, _) in COMMANDS {
        let mut shell = Command::new("sh");
        let inner = site.command(args);
        shell
            .arg("-c")
            .arg("exec \"$@\" 0<&- 1>&- 2>&-")
            .arg("sh")
            .arg(inner.get_program())
            .args(args);
        shell.env_clear().current_dir(site.path("."));
        for (name, value) in inner.get_envs() {
            shell.env(name, value.unwrap_or_default());
        }
        let status = shell.status().unwrap();
        assert_eq!(status.code(), Some(0), "{args:?}");
    }
    site.ends(0, &["check", "--read-data"]);
}

#[test]
fn damage_is_never_a_success_whoever_listens() {
    let site = site();
    let packs = site.path("repo/packs");
    let largest = fs::read_dir(packs)
        .unwrap()
        .flat_map(|folder| fs::read_dir(folder.unwrap().path()).unwrap())
        .map(|pack| pack.unwrap().path())
        .max_by_key(|pack| pack.metadata().unwrap().len())
        .unwrap();
    let mut bytes = fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 50].fill(7);
    fs::write(&largest, bytes).unwrap();
    for out in [closed_pipe, full, Stdio::null] {
        for (args, code) in
            [(&["check", "--read-data"][..], 1), (&["restore", "latest", "--target", "target"], 3)]
        {
            for args in [args.to_vec(), [args, &["--json"]].concat()] {
                let _gone = fs::remove_dir_all(site.path("target"));
                let (err, status) = run(&site, &args, out(), Stdio::piped());
                assert_eq!(status.code(), Some(code), "{args:?}: {err}");
            }
        }
    }
}

/// How long a command may take to end after a signal: two seconds, and as many for a slow machine.
const BOUND: Duration = Duration::from_secs(4);

#[track_caller]
fn ends_by(child: &mut Child, signal: Signal, what: &str) {
    kill_process(Pid::from_child(child), signal).unwrap();
    let told = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(told.elapsed() < BOUND, "{what} does not end");
        std::thread::sleep(Duration::from_millis(10));
    };
    let by_signal = status.signal() == Some(signal.as_raw());
    assert!(by_signal || status.code() == Some(1), "{what}: {status:?}");
}

/// Waits until a process sleeps in a system call of this name, read from /proc.
#[track_caller]
fn wait_until_it_waits(child: &Child, channel: &[&str]) {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(60) {
        let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
        for task in tasks.flatten() {
            let waits = fs::read_to_string(task.path().join("wchan")).unwrap_or_default();
            let call = fs::read_to_string(task.path().join("syscall")).unwrap_or_default();
            if channel.iter().any(|name| waits.contains(name) || call.starts_with(name)) {
                return;
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("it never waits for {channel:?}");
}

/// A writer of a pipe that stands still: `write` (1 on x86-64, 64 on others), or asleep in the kernel's
/// function.
const WRITES: [&str; 3] = ["pipe_write", "1 0x", "64 0x"];
const READS: [&str; 3] = ["pipe_read", "0 0x", "63 0x"];

#[test]
fn a_signal_ends_what_writes_to_a_reader_that_does_not_read() {
    let site = site();
    for n in 0..2000 {
        fs::write(site.path(&format!("source/{}{n}", "x".repeat(200))), "").unwrap();
    }
    site.ends(0, &["backup", "source"]);
    let first = site.json(0, &["snapshots"]).remove(0)[0]["id"].as_str().unwrap().to_owned();
    for signal in [Signal::TERM, Signal::INT] {
        for args in [
            &["dump", "latest", "."][..],
            &["ls", "-R", "latest"],
            &["diff", &first, "latest"],
            &["completions", "bash"],
        ] {
            let mut child = site.command(args).stdout(Stdio::piped()).spawn().unwrap();
            wait_until_it_waits(&child, &WRITES);
            ends_by(&mut child, signal, &format!("{args:?}"));
        }
    }
}

#[test]
fn a_signal_ends_what_tells_somebody_who_does_not_read() {
    let site = site();
    for args in [
        &["backup", "source", "--json"][..],
        &["restore", "latest", "--target", "target", "--json"],
        &["copy", "--from", "repo", "--to", "second", "--from-key-file", "key", "--json"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        fill(&writer);
        let err = writer.try_clone().unwrap();
        let mut child = site
            .command(args)
            .stdout(OwnedFd::from(writer))
            .stderr(OwnedFd::from(err))
            .spawn()
            .unwrap();
        wait_until_it_waits(&child, &WRITES);
        ends_by(&mut child, Signal::TERM, &format!("{args:?}"));
        drop(reader);
    }
}

/// Leaves no room in a pipe.
fn fill(pipe: &std::io::PipeWriter) {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    let flags = fcntl_getfl(pipe).unwrap();
    fcntl_setfl(pipe, flags | OFlags::NONBLOCK).unwrap();
    use std::io::Write as _;
    let mut pipe_writer = pipe;
    while pipe_writer.write(&[b'x'; 4096]).is_ok() {}
    while pipe_writer.write(b"x").is_ok() {}
    fcntl_setfl(pipe, flags).unwrap();
}

#[test]
fn a_signal_ends_every_command_while_it_waits_for_its_password() {
    let site = site();
    let commands = [
        &["snapshots"][..],
        &["ls", "latest"],
        &["diff", "latest", "latest"],
        &["dump", "latest", "file"],
        &["stats"],
        &["check"],
        &["forget", "--keep-last", "1"],
        &["prune"],
        &["backup", "source"],
        &["restore", "latest", "--target", "target"],
        &["copy", "--from", "repo", "--to", "second", "--from-key-file", "key"],
        &["init", "--repo", "fourth"],
        &["key", "add", "--new-key-file", "another"],
        &["key", "remove", "0000000000000000"],
    ];
    for signal in [Signal::TERM, Signal::INT] {
        for args in commands {
            let args = [args, &["--password-file", "/dev/stdin"]].concat();
            let mut child = site.command(&args).stdin(Stdio::piped()).spawn().unwrap();
            wait_until_it_waits(&child, &READS);
            ends_by(&mut child, signal, &format!("{args:?}"));
        }
        let args = ["key", "add", "--new-password-file", "/dev/stdin"];
        let mut child = site.command(&args).stdin(Stdio::piped()).spawn().unwrap();
        wait_until_it_waits(&child, &READS);
        ends_by(&mut child, signal, "key add");
    }
    site.ends(0, &["check"]);
}

#[test]
fn a_signal_ends_every_command_while_a_store_does_not_answer() {
    let site = site();
    // It takes connections, and never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    for args in [
        &["snapshots"][..],
        &["ls", "latest"],
        &["dump", "latest", "file"],
        &["stats"],
        &["check"],
        &["forget", "--keep-last", "1"],
        &["prune"],
        &["key", "list"],
        &["init"],
        &["backup", "source"],
        &["restore", "latest", "--target", "target"],
        &["copy", "--from", "repo", "--from-key-file", "key"],
    ] {
        let mut command = site.command(args);
        command
            .env("EBACKUP_REPO", "s3://bucket/prefix")
            .env("EBACKUP_ENDPOINT", &endpoint)
            .env("EBACKUP_PATH_STYLE", "1")
            .env("AWS_ACCESS_KEY_ID", "key")
            .env("AWS_SECRET_ACCESS_KEY", "secret")
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let (mut connection, _) = silent.accept().unwrap();
        // It has asked, and waits.
        assert!(connection.read(&mut [0; 16]).unwrap() > 0, "{args:?}");
        ends_by(&mut child, Signal::TERM, &format!("{args:?} on a bucket"));
    }
}

#[test]
fn a_signal_ends_a_backup_while_its_source_does_not_answer() {
    let site = site();
    for name in ["file", "large"] {
        // What has not changed would not be opened.
        let path = site.path("source").join(name);
        let size = fs::metadata(&path).unwrap().len() as usize;
        fs::write(&path, noise(9, size + 1)).unwrap();
        let leased = Leased::take(&path);
        let mut child = site.command(&["backup", "source"]).spawn().unwrap();
        leased.is_wanted();
        ends_by(&mut child, Signal::TERM, "backup");
        // What is given back is saved.
        let child = site.command(&["backup", "source"]).spawn().unwrap();
        leased.is_wanted();
        drop(leased);
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    }
}

#[test]
fn a_signal_ends_waiting_for_a_restore() {
    let site = Site::new();
    fs::create_dir_all(site.path("volumes/data")).unwrap();
    let mut command = site.command(&["restore-wait", "some-uid", "--root", "volumes"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut seen = [0; 16];
    child.stderr.as_mut().unwrap().read_exact(&mut seen).unwrap();
    ends_by(&mut child, Signal::TERM, "restore-wait");
    // And it is not ended by the lack of somebody to tell.
    let mut command = site.command(&["restore-wait", "some-uid", "--root", "volumes"]);
    let mut child = command.stderr(closed_pipe()).spawn().unwrap();
    fs::create_dir_all(site.path("volumes/data/.velero")).unwrap();
    fs::write(site.path("volumes/data/.velero/some-uid"), "").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
