//! The command on a repository in a bucket of the tests' S3 server, for the tests that share it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use objects::testing::proxy::Proxy;
use objects::testing::server::{TestServer, fresh};

pub(crate) const BUCKET: &str = "ebackup-cli";

/// A repository in a prefix of its own, and a folder for everything else.
pub(crate) struct Session {
    pub(crate) server: TestServer,
    /// Where the server is reached.
    pub(crate) endpoint: String,
    pub(crate) url: String,
    pub(crate) key: String,
    pub(crate) dir: tempfile::TempDir,
}

impl Session {
    pub(crate) fn new() -> Self {
        Self::on(TestServer::from_env())
    }

    pub(crate) fn on(server: TestServer) -> Self {
        server.make_bucket(&server.config(BUCKET, ""));
        let url = format!("s3://{BUCKET}/{}", fresh("test"));
        let dir = tempfile::tempdir().unwrap();
        let endpoint = server.endpoint("s3.test");
        Self { key: server.key.clone(), server, endpoint, url, dir }
    }

    /// In front of whose server a proxy stands from now on.
    pub(crate) fn through(mut self, proxy: &Proxy) -> Self {
        self.endpoint = proxy.server().endpoint("s3.test");
        self
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ebackup"));
        command
            .args(args)
            .env_clear()
            .env("HOME", self.dir.path())
            .env("EBACKUP_REPO", &self.url)
            .env("EBACKUP_ENDPOINT", &self.endpoint)
            .env("EBACKUP_CA_FILE", &self.server.ca)
            .env("EBACKUP_RESOLVE", "s3.test:127.0.0.1")
            .env("EBACKUP_PASSWORD", "secret of the test")
            .env("AWS_ACCESS_KEY_ID", &self.key)
            .env("AWS_SECRET_ACCESS_KEY", &self.server.secret);
        command
    }

    /// Runs a command that has to fail with advice.
    pub(crate) fn fails(&self, args: &[&str], parts: &[&str]) {
        refused(&self.command(args).output().unwrap(), parts);
    }

    /// Restores the newest snapshot, which has to be the same as `source`, and checks everything.
    pub(crate) fn restores(&self, source: &Path) {
        let target = self.dir.path().join(fresh("restored"));
        self.run(&["restore", "latest", "--target", target.to_str().unwrap()]);
        assert_same(source, &target);
        self.run(&["check", "--read-data"]);
    }

    /// Runs a command that has to succeed; its standard output.
    pub(crate) fn run(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{args:?}: {text}{said}");
        said
    }

    /// The last object that a command prints.
    pub(crate) fn summary(&self, args: &[&str]) -> serde_json::Value {
        let text = self.run(&[&["--json"], args].concat());
        serde_json::from_str(text.lines().last().unwrap()).unwrap()
    }

    pub(crate) fn source(&self) -> std::path::PathBuf {
        let source = self.dir.path().join("source");
        fs::create_dir_all(source.join("small")).unwrap();
        fs::write(source.join("large"), noise(1, 20 << 20)).unwrap();
        for n in 0..200 {
            fs::write(source.join(format!("small/{n}")), noise(n, 3000)).unwrap();
        }
        source
    }
}

pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

pub(crate) fn assert_same(a: &Path, b: &Path) {
    let diff = Command::new("diff").arg("-r").arg(a).arg(b).output().unwrap();
    assert!(diff.status.success(), "{}", String::from_utf8_lossy(&diff.stdout));
}

pub(crate) fn refused(output: &Output, parts: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    parts.iter().for_each(|part| assert!(text.contains(part), "{text}"));
    assert!(!text.contains("testsecretkey") && !text.contains("panicked"), "{text}");
}
