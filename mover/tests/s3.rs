//! The whole command on a real S3 server: all that it does in a folder, and what only a bucket can do
//! to it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bucket;

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use bucket::*;
use objects::testing::conditions_ignored;
use objects::testing::proxy::Proxy;
use objects::testing::server::{SMALL_KEY, SMALL_USER, TestServer, fresh};

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
    let register = if conditions_ignored() { "time-fenced" } else { "create-if-absent" };
    assert!(
        text.contains(&format!("decided by {register}")) && text.contains("requests"),
        "{text}"
    );
    session.restores(&source);
}

#[test]
fn many_small_files_take_few_requests_to_look_through() {
    let session = Session::new();
    let source = session.dir.path().join("many");
    for folder in 0..40 {
        let folder = source.join(format!("a folder whose name fills the tree {folder}"));
        fs::create_dir_all(&folder).unwrap();
        for file in 0..1000 {
            fs::write(folder.join(format!("file {file}")), format!("{file} ").repeat(20)).unwrap();
        }
    }
    let text = source.to_str().unwrap();
    session.run(&["init"]);
    session.run(&["backup", text]);
    let target = session.dir.path().join("restored");
    for command in [
        &["backup", text][..],
        &["restore", "latest", "--target", target.to_str().unwrap()],
        &["check"],
    ] {
        let summary = session.summary(command);
        let reads = summary["requests"]["read"].as_u64().unwrap();
        // The tree has more than a hundred leaves.
        assert!((3..50).contains(&reads), "{command:?} read {reads} times: {summary}");
    }
    assert_same(&source, &target);
}

#[test]
fn a_repository_that_relies_on_the_condition_is_not_written_where_it_is_ignored() {
    let session = Session::on(TestServer::direct_from_env());
    let source = session.source();
    let text = source.to_str().unwrap();
    session.run(&["init"]);
    session.run(&["backup", text]);
    let proxy = Proxy::without_conditions(&session.server);
    let session = session.through(&proxy);
    for command in [&["backup", text][..], &["prune"]] {
        session.fails(command, &["replaces objects", "ebackup copy"]);
    }
    // Reading relies on nothing, and so the snapshots can be brought elsewhere.
    session.restores(&source);
}

#[test]
fn snapshots_are_copied_from_a_bucket_to_a_folder_and_back() {
    let session = Session::new();
    let source = session.source();
    session.run(&["init"]);
    session.run(&["backup", source.to_str().unwrap()]);
    fs::write(source.join("small/7"), b"changed").unwrap();
    session.run(&["backup", source.to_str().unwrap()]);
    let folder = session.dir.path().join("folder").to_str().unwrap().to_owned();
    let other = format!("s3://{BUCKET}/{}", fresh("other"));
    let copy = |from: &str, to: &str| {
        let mut command = session.command(&["copy", "--from", from, "--to", to, "--init"]);
        let output = command.env("EBACKUP_FROM_PASSWORD", "secret of the test").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    for (from, to) in [(&session.url, &folder), (&folder, &other)] {
        let text = copy(from, to);
        assert!(text.contains("2 snapshots copied, 0 were there already"), "{text}");
        let text = copy(from, to);
        assert!(text.contains("0 snapshots copied, 2 were there already"), "{text}");
    }
    let session = Session { url: other, ..session };
    session.restores(&source);
}

#[test]
fn an_upload_is_no_faster_than_its_limit() {
    let session = Session::new();
    let source = session.dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), noise(1, 3 << 20)).unwrap();
    session.run(&["init"]);
    let begun = Instant::now();
    session.run(&["--limit-upload", "1M", "backup", source.to_str().unwrap()]);
    // What is under way at the end, some pieces of 256 KiB, has not waited.
    assert!(begun.elapsed() > Duration::from_secs(2), "{:?}", begun.elapsed());
    session.restores(&source);
}

#[test]
fn a_user_who_may_not_delete_saves_and_restores_and_is_told_what_he_lacks() {
    let mut session = Session::new();
    let bucket = fresh("ebackup-keep");
    let owner = session.server.config(&bucket, "");
    session.server.make_bucket(&owner);
    let mut rights = vec!["s3:ListBucket", "s3:GetObject", "s3:PutObject"];
    session.server.allow(&owner, SMALL_USER, &rights);
    (session.key, session.url) = (SMALL_KEY.to_owned(), format!("s3://{bucket}/kept"));
    let source = session.source();
    // Enough packs for more than one segment of the index, which are merged at the end.
    let backup = ["--memory", "96M", "backup", source.to_str().unwrap()];
    fs::write(source.join("second"), noise(2, 40 << 20)).unwrap();
    session.run(&["init"]);
    session.run(&backup);
    fs::remove_file(source.join("second")).unwrap();
    session.run(&backup);
    session.restores(&source);
    // This makes a mark, and deletes nothing.
    session.run(&["forget", "--keep-last", "1"]);
    session.fails(&["prune"], &["cannot delete", "lacks the right"]);
    session.restores(&source);
    rights.extend(["s3:DeleteObject", "s3:ListBucketMultipartUploads"]);
    session.server.allow(&owner, SMALL_USER, &rights);
    if conditions_ignored() {
        // The first one could not say that it has ended.
        session.fails(&["prune"], &["another prune", "45 minutes after it has died"]);
    } else {
        let pruned = session.summary(&["prune"]);
        assert!(pruned["bytes_deleted"].as_u64().unwrap() > 30 << 20, "{pruned}");
    }
    session.restores(&source);
}

#[test]
fn copies_of_the_index_are_bounded_and_may_be_damaged() {
    let session = Session::new();
    let source = session.source();
    let text = source.to_str().unwrap();
    session.run(&["init"]);
    session.run(&["backup", text]);
    let cache = session.dir.path().join(".cache/ebackup");
    let copies = || -> Vec<_> {
        let own = fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
        fs::read_dir(own).unwrap().map(|file| file.unwrap().path()).collect()
    };
    for copy in copies() {
        let mut bytes = fs::read(&copy).unwrap();
        bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
        fs::write(&copy, bytes).unwrap();
    }
    // What is not in the snapshot before is found by the index alone.
    let again = ["backup", text, "--lineage", "another"];
    let stored = session.summary(&again)["bytes_stored"].as_u64().unwrap();
    assert!(stored < 1 << 20, "{stored} bytes stored again");
    fs::remove_dir_all(&cache).unwrap();
    let small = [&["--cache-size", "2K"][..], &again].concat();
    let stored = session.summary(&small)["bytes_stored"].as_u64().unwrap();
    assert!(stored < 1 << 20, "{stored} bytes stored again");
    let kept: u64 = copies().iter().map(|copy| fs::metadata(copy).unwrap().len()).sum();
    assert!(kept <= 2 << 10, "{kept} bytes kept");
    session.restores(&source);
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
        let endpoint = TestServer::direct_from_env().endpoint("s3.test");
        command.env("EBACKUP_ENDPOINT", endpoint).env_remove("EBACKUP_CA_FILE");
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
