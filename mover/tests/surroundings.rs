//! Backups and restores where the system around them is poor: few open files, no `/proc`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::process::Command;

use common::scan::{assert_same, scan};
use common::site::{Site, texts};
use common::sources::{Source, everything};
use common::{is_root, noise, not_tested};

/// Runs the command of `args` by a shell that makes the surroundings first; what it said, and its code.
fn within(site: &Site, surroundings: &str, args: &[&str]) -> (String, Option<i32>) {
    let program = site.command(args);
    let script = format!("{surroundings}; exec \"$0\" \"$@\"");
    let mut shell = Command::new("sh");
    if surroundings.contains("umount") {
        shell = Command::new("unshare");
        shell.args(["--mount", "sh"]);
    }
    shell.args(["-c", &script]).arg(program.get_program()).args(program.get_args());
    shell.current_dir(site.path("")).env_clear();
    for (name, value) in program.get_envs() {
        if let Some(value) = value {
            shell.env(name, value);
        }
    }
    let (out, err, code) = texts(&shell.output().unwrap());
    (out + &err, code)
}

/// Saves the source and restores it to `target`, twice; everything is there, and nothing was said.
#[track_caller]
fn assert_comes_back(site: &Site, surroundings: &str, target: &str) {
    let (said, code) = within(site, surroundings, &["backup", "source", "--init"]);
    assert_eq!((code, said.contains("warning")), (Some(0), false), "{surroundings}: {said}");
    for _ in 0..2 {
        let (said, code) = within(site, surroundings, &["restore", "latest", "--target", target]);
        assert_eq!((code, said.contains("warning")), (Some(0), false), "{surroundings}: {said}");
        assert_same(&scan(&site.path("source")), &scan(&site.path(target)), surroundings);
    }
}

#[test]
fn few_open_files_leave_nothing_out() {
    let site = Site::new();
    let source = site.path("source");
    let source = Source(&source);
    for n in 0..120 {
        source.file(format!("many/{n}/x"), n.to_string());
        source.file(format!("deep/{}/f", vec!["d"; n].join("/")), n.to_string());
    }
    for n in 0..60 {
        source.file(format!("large{n}"), noise(n, 1_500_000));
    }
    for limit in [95, 128, 256] {
        assert_comes_back(&site, &format!("ulimit -n {limit}"), &format!("target{limit}"));
    }
    for args in [&["backup", "source"][..], &["restore", "latest", "--target", "none"]] {
        let (said, code) = within(&site, "ulimit -n 94", args);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("this process may open 94 files, and needs 95 at least"), "{said}");
        let snapshots = site.json(0, &["snapshots"]).remove(0);
        assert_eq!(snapshots.as_array().map(Vec::len), Some(3));
    }
}

#[test]
fn attributes_come_back_without_proc() {
    if !is_root() {
        return not_tested("a system without /proc, which takes root to make");
    }
    let site = Site::new();
    everything(&site.path("source"));
    let gone = "umount --lazy --recursive /proc && test ! -e /proc/self";
    let (said, code) = within(&site, gone, &["--version"]);
    assert_eq!(code, Some(0), "{said}");
    assert_comes_back(&site, gone, "target");
}
