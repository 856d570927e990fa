//! A place for the command itself: a source, a repository and a key; and snapshots made by hand, of
//! things that a source cannot easily be brought to be.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;

use chunkstore::codec::compress::{Compressor, Level};
use chunkstore::id::SnapshotId;
use chunkstore::record::{Session, Snapshot, Summary};
use chunkstore::repository::Repository;
use chunkstore::tree::{
    Body, Chunk, Content, Entry, Kind, Liveness, Node, State, Timestamp, TreeBuilder,
};
use chunkstore::writer::Writer;
use jiff::Timestamp as Time;
use tempfile::TempDir;

use super::{create, local, memory_dir, request};

/// A folder with a source and a key file; the repository is `repo` in it.
pub struct Site(pub TempDir);

impl Site {
    pub fn new() -> Self {
        let site = Self(memory_dir());
        fs::create_dir(site.path("source")).unwrap();
        fs::write(site.path("source/file"), "content").unwrap();
        let key = "07".repeat(32);
        fs::write(site.path("key"), format!("ebackup key file of a test\n{key}\n")).unwrap();
        site
    }

    /// With a repository, opened.
    pub fn with_repository() -> (Self, Arc<Repository>) {
        let site = Self::new();
        fs::create_dir(site.path("repo")).unwrap();
        let repository = create(local(&site.path("repo"))).unwrap();
        (site, repository)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ebackup"));
        command.env_clear();
        for name in ["PATH", "TMPDIR"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command
            .current_dir(self.0.path())
            .env("HOME", self.0.path())
            .env("EBACKUP_REPO", self.path("repo"))
            .env("EBACKUP_KEY_FILE", self.path("key"))
            .args(args);
        command
    }

    /// Runs a command that ends with this code; what it says on both channels.
    #[track_caller]
    pub fn ends(&self, code: i32, args: &[&str]) -> (String, String) {
        let (out, err, ended) = texts(&self.command(args).output().unwrap());
        assert_eq!(ended, Some(code), "{args:?}\n{out}\n{err}");
        (out, err)
    }

    /// The JSON values that a command prints, which ends with this code.
    #[track_caller]
    pub fn json(&self, code: i32, args: &[&str]) -> Vec<serde_json::Value> {
        let (out, _) = self.ends(code, &[args, &["--json"]].concat());
        out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// What a process said, and how it ended.
pub fn texts(output: &Output) -> (String, String, Option<i32>) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr), output.status.code())
}

/// A plain node.
pub fn node(kind: Kind, size: u64, content: Content, state: State) -> Node {
    let time = Timestamp { seconds: 1_700_000_000, nanos: 5 };
    Node {
        kind,
        mode: if kind == Kind::Dir { 0o755 } else { 0o644 },
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        size,
        mtime: time,
        ctime: time,
        ino: 7,
        fs: 0,
        linked: false,
        rdev: (0, 0),
        xattrs: Vec::new(),
        state,
        content,
    }
}

pub fn inline(text: &str, state: State) -> Body {
    let content = Content::Inline(text.as_bytes().to_vec());
    Body::Node(node(Kind::File, text.len() as u64, content, state))
}

pub fn dir(state: State) -> Body {
    Body::Node(node(Kind::Dir, 0, Content::None, state))
}

/// Makes snapshots of entries made by hand.
pub struct ByHand {
    writer: Writer,
    repository: Arc<Repository>,
}

impl ByHand {
    pub fn new(repository: &Arc<Repository>) -> Self {
        let session = Session {
            purpose: "backup".to_owned(),
            writer: "by hand".to_owned(),
            started: Time::now(),
            heartbeat: 0,
        };
        let settings = request("/".as_ref()).resources.writer(Level::default());
        let writer = Writer::begin(repository.clone(), settings, &session).unwrap();
        Self { writer, repository: repository.clone() }
    }

    /// Stores bytes that lie at `offset` of a file.
    pub fn chunk(&self, offset: u64, bytes: &[u8]) -> Chunk {
        let mut compressor = Compressor::new(Level::default());
        Chunk { offset, blob: self.writer.store_data(&mut compressor, bytes).unwrap() }
    }

    /// Commits the tree of these entries, by keys, with `files_missing` files missing.
    pub fn commit(self, entries: Vec<(Vec<u8>, Body)>, files_missing: u64) -> SnapshotId {
        let mut tree = TreeBuilder::new(&self.writer, self.repository.keys().cut());
        let mut entries = entries;
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        for (key, body) in entries {
            tree.push(&Entry { key, body }).unwrap();
        }
        let (root, level) = tree.finish().unwrap().unwrap();
        let now = Time::now();
        let summary = Summary { files_missing, ..Summary::default() };
        self.writer
            .commit(|_| Snapshot {
                root,
                level,
                lineage: "by hand".to_owned(),
                host: "host".to_owned(),
                path: "/".to_owned(),
                tags: Default::default(),
                started: now,
                finished: now,
                parent: None,
                summary,
                sparse: Liveness::default(),
                program: "test".to_owned(),
                copy_of: None,
            })
            .unwrap()
    }
}
