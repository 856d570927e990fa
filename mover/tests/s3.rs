//! The whole command on a real S3 server: all that it does in a folder, and what only a bucket can do
//! to it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use objects::testing::server::{SMALL_KEY, TestServer, fresh};

const BUCKET: &str = "ebackup-cli";

/// A repository in a prefix of its own, and a folder for everything else.
struct Session {
    server: TestServer,
    url: String,
    key: String,
    dir: tempfile::TempDir,
}

impl Session {
    fn new() -> Self {
        let server = TestServer::from_env();
        server.make_bucket(&server.config(BUCKET, ""));
        let url = format!("s3://{BUCKET}/{}", fresh("test"));
        let dir = tempfile::tempdir().unwrap();
        Self { key: server.key.clone(), server, url, dir }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ebackup"));
        command
            .args(args)
            .env_clear()
            .env("HOME", self.dir.path())
            .env("EBACKUP_REPO", &self.url)
            .env("EBACKUP_ENDPOINT", format!("https://s3.test:{}", self.server.tls_port))
            .env("EBACKUP_CA_FILE", &self.server.ca)
            .env("EBACKUP_RESOLVE", "s3.test:127.0.0.1")
            .env("EBACKUP_PASSWORD", "secret of the test")
            .env("AWS_ACCESS_KEY_ID", &self.key)
            .env("AWS_SECRET_ACCESS_KEY", &self.server.secret);
        command
    }

    /// Runs a command that has to succeed; its standard output.
    fn run(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {text}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The last object that a command prints.
    fn summary(&self, args: &[&str]) -> serde_json::Value {
        let text = self.run(&[&["--json"], args].concat());
        serde_json::from_str(text.lines().last().unwrap()).unwrap()
    }

    fn source(&self) -> std::path::PathBuf {
        let source = self.dir.path().join("source");
        fs::create_dir_all(source.join("small")).unwrap();
        fs::write(source.join("large"), noise(1, 20 << 20)).unwrap();
        for n in 0..200 {
            fs::write(source.join(format!("small/{n}")), noise(n, 3000)).unwrap();
        }
        source
    }
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn assert_same(a: &Path, b: &Path) {
    let diff = Command::new("diff").arg("-r").arg(a).arg(b).output().unwrap();
    assert!(diff.status.success(), "{}", String::from_utf8_lossy(&diff.stdout));
}

fn refused(output: &Output, parts: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    parts.iter().for_each(|part| assert!(text.contains(part), "{text}"));
    assert!(!text.contains("testsecretkey") && !text.contains("panicked"), "{text}");
}

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
