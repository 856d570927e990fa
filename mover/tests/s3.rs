//! The whole command on a real S3 server: all that it does in a folder, and what only a bucket can do
//! to it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bucket;

use std::fs;
use std::process::Command;

use bucket::*;
use objects::testing::server::{SMALL_KEY, TestServer, fresh};

#[test]
fn everything_works_as_in_a_folder() {
    let session = Session::new();
    let source = session.source();
    let text = source.to_str().unwrap();
    session.run(&["init"]);
    let first = session.summary(&["backup", text]);
    assert!(first["bytes_stored"].as_u64().unwrap() > 20 << 20, "{first}");
    assert!(first["requests"]["write"].as_u64().unwrap() >= 3, "{first}");
    fs::write(source.join("small/7"), b"changed").unwrap();
    fs::remove_file(source.join("small/8")).unwrap();
    let cache = session.dir.path().join(".cache/ebackup");
    let segments = || {
        let own = fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
        fs::read_dir(own).unwrap().count()
    };
    assert_eq!(segments(), 1, "the index is kept on the node");
    // And may be lost.
    fs::remove_dir_all(&cache).unwrap();
    let second = session.summary(&["backup", text]);
    assert!(segments() >= 1, "it is fetched again");
    assert!(second["bytes_stored"].as_u64().unwrap() < 1 << 20, "{second}");
    assert_eq!(session.run(&["snapshots"]).lines().count(), 3);
    let target = session.dir.path().join("restored");
    let target_text = target.to_str().unwrap();
    session.run(&["restore", "latest", "--target", target_text]);
    assert_same(&source, &target);
    assert_eq!(session.run(&["dump", "latest", "small/7"]), "changed");
    assert!(
        session.run(&["diff", first["snapshot"].as_str().unwrap(), "latest"]).contains("small/8")
    );
    session.run(&["check", "--read-data"]);
    session.run(&["forget", "--keep-last", "1"]);
    let pruned = session.summary(&["prune", "--max-unused", "0%"]);
    assert_eq!(pruned["type"], "summary");
    let text = session.run(&["stats"]);
    assert!(text.contains("decided by create-if-absent") && text.contains("requests"), "{text}");
    session.run(&["check", "--read-data"]);
    fs::remove_dir_all(&target).unwrap();
    session.run(&["restore", "latest", "--target", target_text]);
    assert_same(&source, &target);
}

#[test]
fn what_is_wrong_is_said_with_what_helps() {
    let session = Session::new();
    session.run(&["init"]);
    let run = |change: &dyn Fn(&mut Command)| {
        let mut command = session.command(&["snapshots"]);
        change(&mut command);
        command.output().unwrap()
    };
    let wrong_secret = run(&|command| {
        command.env("AWS_SECRET_ACCESS_KEY", "wrong");
    });
    refused(&wrong_secret, &["secret key is wrong", "cannot use 's3://"]);
    let no_key = run(&|command| {
        command.env_remove("AWS_ACCESS_KEY_ID");
    });
    refused(&no_key, &["no access key was given"]);
    let no_bucket = run(&|command| {
        command.env("EBACKUP_REPO", "s3://ebackup-never-made/x");
    });
    refused(&no_bucket, &["make the bucket"]);
    let no_repository = run(&|command| {
        command.env("EBACKUP_REPO", format!("s3://{BUCKET}/nothing-here"));
    });
    refused(&no_repository, &["ebackup init"]);
    let no_authority = run(&|command| {
        command.env_remove("EBACKUP_CA_FILE");
    });
    refused(&no_authority, &["--ca-file"]);
    let wrong_password = run(&|command| {
        command.env("EBACKUP_PASSWORD", "wrong");
    });
    refused(&wrong_password, &["--password-file"]);
}

#[test]
fn a_full_bucket_ends_a_backup_with_advice_and_loses_nothing() {
    let mut session = Session::new();
    session.key = SMALL_KEY.to_owned();
    session.url = format!("s3://ebackup-full/{}", fresh("test"));
    let small = TestServer { key: SMALL_KEY.to_owned(), ..session.server.clone() };
    small.make_bucket(&small.config("ebackup-full", ""));
    let source = session.source();
    let little = session.dir.path().join("little");
    fs::create_dir(&little).unwrap();
    fs::write(little.join("file"), noise(5, 100_000)).unwrap();
    session.run(&["init"]);
    session.run(&["backup", little.to_str().unwrap()]);
    let output = session.command(&["backup", source.to_str().unwrap()]).output().unwrap();
    refused(&output, &["quota", "prune"]);
    session.run(&["check", "--read-data"]);
    assert_eq!(session.run(&["snapshots"]).lines().count(), 2);
}
