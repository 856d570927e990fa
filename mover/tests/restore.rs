//! Restores of trees written directly, compared with what the trees say.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use chunkstore::chunker::ChunkerConfig;
use chunkstore::codec::compress::{Compressor, Level};
use chunkstore::key_slot::{KdfCost, Unlock};
use chunkstore::limits::EXTENT_SPAN_BYTES;
use chunkstore::pack::BlobKind;
use chunkstore::record::Session;
use chunkstore::repository::Repository;
use chunkstore::tree::{
    Body, Chunk, Content, Entry, Node, NodeRef, State, TreeBuilder, Xattrs, extent_key,
};
use chunkstore::writer::{Writer, WriterSettings};
use mover::fs::{Dir, Kind, Listing, Timestamp};
use mover::monitor::{Monitor, Warning};
use mover::restore::{
    Filter, FilterResult, Overwrite, Request, RestoreOptions, RestoreSummary, restore,
};
use objects::ObjectStore;
use objects::testing::MemoryStore;

/// How the content of a file is stored.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    Inline,
    Bundle,
    Chunks(usize),
    Extents(usize),
}

#[derive(Clone)]
struct Object {
    node: Node,
    /// Data of a file, by offset; the rest is holes.
    data: Vec<(u64, Vec<u8>)>,
    layout: Layout,
}

/// A tree by path, components separated by `/`.
#[derive(Clone, Default)]
struct Model(BTreeMap<Vec<u8>, Object>);

fn key_of(path: &[u8]) -> Vec<u8> {
    path.iter().map(|byte| if *byte == b'/' { 0 } else { *byte }).collect()
}

fn node(kind: Kind, mode: u32) -> Node {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Node {
        kind,
        mode,
        uid,
        gid,
        size: 0,
        mtime: Timestamp { seconds: 1_600_000_000, nanos: 123_456_789 },
        ctime: Timestamp::default(),
        ino: 1,
        fs: 0,
        linked: false,
        rdev: (0, 0),
        xattrs: Xattrs::new(),
        state: State::Whole,
        content: Content::None,
    }
}

impl Model {
    fn new() -> Self {
        let mut model = Self::default();
        model.dir("");
        model
    }

    fn add(&mut self, path: &str, node: Node) -> &mut Object {
        let object = Object { node, data: Vec::new(), layout: Layout::Inline };
        let key = key_of(path.as_bytes());
        self.0.insert(key.clone(), object);
        self.0.get_mut(&key).unwrap()
    }

    fn dir(&mut self, path: &str) -> &mut Object {
        self.add(path, node(Kind::Dir, 0o755))
    }

    fn file(&mut self, path: &str, data: &[u8], layout: Layout) -> &mut Object {
        self.sparse(path, data.len() as u64, vec![(0, data.to_vec())], layout)
    }

    fn sparse(
        &mut self,
        path: &str,
        size: u64,
        data: Vec<(u64, Vec<u8>)>,
        layout: Layout,
    ) -> &mut Object {
        let object = self.add(path, Node { size, ..node(Kind::File, 0o644) });
        (object.data, object.layout) = (data, layout);
        object
    }

    fn symlink(&mut self, path: &str, to: &str) -> &mut Object {
        let content = Content::Inline(to.into());
        let size = to.len() as u64;
        self.add(path, Node { content, size, ..node(Kind::Symlink, 0o777) })
    }
}

struct Repo {
    store: Arc<MemoryStore>,
    repository: Arc<Repository>,
}

impl Repo {
    fn new() -> Self {
        let store = Arc::new(MemoryStore::new());
        let unlock = Unlock::Passphrase(b"x".to_vec());
        let (cost, now) = (KdfCost::WEAK, jiff::Timestamp::UNIX_EPOCH);
        let repository =
            Repository::create(store.clone(), &unlock, cost, ChunkerConfig::default(), now);
        Self { store, repository: Arc::new(repository.unwrap()) }
    }

    fn write(&self, model: &Model) -> (NodeRef, u8) {
        write(&self.repository, model.0.iter().map(|(key, object)| (key.clone(), object.clone())))
    }
}

/// Writes a tree of these objects, which are in order.
fn write(
    repository: &Arc<Repository>,
    objects: impl Iterator<Item = (Vec<u8>, Object)>,
) -> (NodeRef, u8) {
    let session = Session {
        purpose: "backup".into(),
        writer: "test".into(),
        started: jiff::Timestamp::UNIX_EPOCH,
        heartbeat: 0,
    };
    let settings = WriterSettings {
        pack_target_bytes: 256 << 10,
        // As many uploads as buffers: a flush waits for whoever waits for a buffer.
        pack_buffers: 8,
        uploads: 8,
        ..WriterSettings::default()
    };
    let writer = Writer::begin(repository.clone(), settings, &session).unwrap();
    let mut compressor = Compressor::new(Level::Zstd(1));
    let mut builder = TreeBuilder::new(&writer, repository.keys().cut());
    let (mut bundle, mut waiting) = (Vec::new(), Vec::new());
    let mut store = |bytes: &[u8]| writer.store_data(&mut compressor, bytes).unwrap();
    let mut flush =
        |bundle: &mut Vec<u8>,
         waiting: &mut Vec<Entry>,
         store: &mut dyn FnMut(&[u8]) -> chunkstore::tree::BlobRef| {
            let blob = (!bundle.is_empty()).then(|| store(bundle));
            bundle.clear();
            for mut entry in waiting.drain(..) {
                if let Body::Node(Node { content: Content::Part { bundle, .. }, .. }) =
                    &mut entry.body
                {
                    *bundle = blob.unwrap();
                }
                builder.push(&entry).unwrap();
            }
        };
    let dummy = store(b"dummy");
    for (key, object) in objects {
        let Object { mut node, data, layout } = object;
        let mut extents: BTreeMap<Vec<u8>, Vec<Chunk>> = BTreeMap::new();
        let cut = |size: usize, store: &mut dyn FnMut(&[u8]) -> chunkstore::tree::BlobRef| {
            let mut chunks = Vec::new();
            for (start, bytes) in &data {
                let mut offset = *start;
                for piece in bytes.chunks(size) {
                    chunks.push(Chunk { offset, blob: store(piece) });
                    offset += piece.len() as u64;
                }
            }
            chunks
        };
        if node.kind == Kind::File && !data.iter().all(|(_, bytes)| bytes.is_empty()) {
            node.content = match layout {
                Layout::Inline => Content::Inline(data[0].1.clone()),
                Layout::Bundle => {
                    let offset = bundle.len() as u32;
                    bundle.extend_from_slice(&data[0].1);
                    let id = BlobKind::Data.id(repository.keys(), &data[0].1);
                    Content::Part { bundle: dummy, offset, hash: *id.0.first_chunk().unwrap() }
                }
                Layout::Chunks(size) => Content::Chunks(cut(size, &mut store)),
                Layout::Extents(size) => {
                    for chunk in cut(size, &mut store) {
                        extents.entry(extent_key(&key, chunk.offset)).or_default().push(chunk);
                    }
                    Content::Extents
                }
            };
        }
        waiting.push(Entry { key, body: Body::Node(node) });
        for (key, chunks) in extents {
            waiting.push(Entry { key, body: Body::Extent(chunks) });
        }
        if bundle.len() > 100_000 || waiting.len() > 5000 {
            flush(&mut bundle, &mut waiting, &mut store);
        }
    }
    flush(&mut bundle, &mut waiting, &mut store);
    let root = builder.finish().unwrap().unwrap();
    writer.abandon().unwrap();
    root
}

#[derive(Default)]
struct Log {
    warnings: Mutex<Vec<Warning>>,
    cancel: AtomicBool,
    advanced: Mutex<(u64, u64)>,
}

impl Monitor for Log {
    fn begin(&self, _: &[u8]) {}
    fn advance(&self, entries: u64, bytes: u64) {
        let mut advanced = self.advanced.lock().unwrap();
        *advanced = (advanced.0 + entries, advanced.1 + bytes);
    }
    fn warning(&self, warning: Warning) {
        self.warnings.lock().unwrap().push(warning);
    }
    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
}

impl Log {
    fn paths(&self) -> Vec<String> {
        let warnings = self.warnings.lock().unwrap();
        let mut paths: Vec<_> = warnings
            .iter()
            .map(|warning| String::from_utf8_lossy(&warning.path).into_owned())
            .collect();
        paths.sort();
        paths
    }
}

fn options() -> RestoreOptions {
    RestoreOptions { threads: 2, sync: false, ..RestoreOptions::default() }
}

struct Run<'a> {
    repo: &'a Repo,
    root: (NodeRef, u8),
    target: PathBuf,
    options: RestoreOptions,
    subpath: Vec<u8>,
    filter: Option<&'a Filter<'a>>,
    log: Log,
}

impl<'a> Run<'a> {
    fn new(repo: &'a Repo, root: (NodeRef, u8), target: &Path) -> Self {
        let (subpath, filter, log) = (Vec::new(), None, Log::default());
        let target = target.to_owned();
        Self { repo, root, target, options: options(), subpath, filter, log }
    }

    fn try_go(&self) -> chunkstore::Result<RestoreSummary> {
        restore(&Request {
            repository: &self.repo.repository,
            root: self.root,
            subpath: &self.subpath,
            target: &self.target,
            opened: None,
            filter: self.filter,
            options: self.options.clone(),
            monitor: &self.log,
        })
    }

    #[track_caller]
    fn go(&self) -> RestoreSummary {
        self.try_go().unwrap()
    }

    /// Restores without a complaint.
    #[track_caller]
    fn clean(&self) -> RestoreSummary {
        let summary = self.go();
        let warnings = self.log.warnings.lock().unwrap();
        assert!(
            warnings.is_empty(),
            "{:?}",
            warnings.iter().map(ToString::to_string).collect::<Vec<_>>()
        );
        assert_eq!((summary.warnings, summary.files_failed), (0, 0));
        summary
    }
}

/// One line for each entry.
type Lines = BTreeMap<String, String>;

fn line(node: &Node, content: &str, xattrs: &Xattrs) -> String {
    let size = if matches!(node.kind, Kind::File | Kind::Symlink) { node.size } else { 0 };
    let mode = if node.kind == Kind::Symlink { 0o777 } else { node.mode };
    format!(
        "{:?} {mode:o} {}:{} {size} {:?} {:?} {content} {xattrs:?}",
        node.kind, node.uid, node.gid, node.mtime, node.rdev
    )
}

fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_owned()
}

fn expected(model: &Model) -> Lines {
    let mut lines = Lines::new();
    for (key, object) in &model.0 {
        let path: Vec<u8> = key.iter().map(|byte| if *byte == 0 { b'/' } else { *byte }).collect();
        let node = &object.node;
        let content = match (&node.kind, &node.content) {
            (Kind::File, _) => {
                let mut all = vec![0; node.size as usize];
                for (at, bytes) in &object.data {
                    all[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
                }
                hash(&all)
            }
            (_, Content::Inline(to)) => String::from_utf8_lossy(to).into_owned(),
            _ => String::new(),
        };
        lines.insert(
            String::from_utf8_lossy(&path).into_owned(),
            line(node, &content, &node.xattrs),
        );
    }
    lines
}

fn found(target: &Path) -> Lines {
    let mut lines = Lines::new();
    let root = Dir::open_root(target).unwrap();
    let mut pending = vec![(String::new(), root.clone())];
    let describe = |meta: mover::fs::Meta, content: String, xattrs: Xattrs| {
        let node = Node {
            kind: meta.kind,
            mode: meta.mode,
            uid: meta.uid,
            gid: meta.gid,
            size: meta.size,
            mtime: meta.mtime,
            rdev: (meta.rdev_major, meta.rdev_minor),
            ..node(meta.kind, 0)
        };
        line(&node, &content, &xattrs)
    };
    while let Some((path, dir)) = pending.pop() {
        let xattrs = dir.own_xattrs().unwrap().entries;
        lines.insert(path.clone(), describe(dir.stat().unwrap(), String::new(), xattrs));
        let mut listing = Listing::read(&dir, 1 << 20, &std::env::temp_dir()).unwrap();
        while let Some(entry) = listing.next_entry().unwrap() {
            let name = entry.name.to_vec();
            let text = String::from_utf8_lossy(&name).into_owned();
            let path = if path.is_empty() { text } else { format!("{path}/{text}") };
            let meta = dir.lstat(&name).unwrap();
            let content = match meta.kind {
                Kind::Dir => {
                    pending.push((path, dir.open_dir(&name).unwrap()));
                    continue;
                }
                Kind::File => {
                    let mut bytes = vec![0; meta.size as usize];
                    dir.open_file(&name).unwrap().0.read_exact_at(&mut bytes, 0).unwrap();
                    hash(&bytes)
                }
                Kind::Symlink => String::from_utf8_lossy(&dir.read_link(&name).unwrap()).into(),
                _ => String::new(),
            };
            let xattrs = dir.xattrs(&name).unwrap().entries;
            lines.insert(path, describe(meta, content, xattrs));
        }
    }
    lines
}

#[track_caller]
fn assert_same(found: &Lines, expected: &Lines) {
    for (path, line) in expected {
        assert_eq!(found.get(path), Some(line), "'{path}'");
    }
    let extra: Vec<_> = found.keys().filter(|path| !expected.contains_key(*path)).collect();
    assert!(extra.is_empty(), "{extra:?}");
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    (0..len).map(|_| random.next() as u8).collect()
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// All kinds of objects, ways of storing content, and metadata.
fn full_model() -> Model {
    let mut model = Model::new();
    model.0.get_mut(&b""[..]).unwrap().node.mode = 0o751;
    model.dir("a").node.mtime.seconds = -5;
    model.dir("a/b").node.mode = 0o500;
    model.dir("a/b/empty").node.mode = 0o1777;
    model.file("a/b/inline", b"hello", Layout::Inline);
    model.file("a/b/none", b"", Layout::Inline);
    model.file("a/bundled", &noise(1, 5000), Layout::Bundle).node.mode = 0o400;
    model.file("a/bundled2", &noise(2, 70_000), Layout::Bundle).node.mode = 0o600;
    model.file("a/one", &noise(3, 150_000), Layout::Chunks(200_000));
    model.file("a/many", &noise(4, 950_000), Layout::Chunks(100_000)).node.mode = 0o777;
    model.sparse("a/hole", 3_000_000, vec![], Layout::Inline);
    model.sparse(
        "a/sparse",
        5_000_000,
        vec![(1_000_000, noise(5, 10_000)), (3_000_000, noise(6, 300_000))],
        Layout::Chunks(100_000),
    );
    model.sparse("a/tail", 500_000, vec![(100_000, noise(7, 1000))], Layout::Chunks(1000));
    let spans = [0, EXTENT_SPAN_BYTES + 5000, 2 * EXTENT_SPAN_BYTES + 1];
    let data = spans.map(|at| (at, noise(at, 40_000))).to_vec();
    model.sparse("a/huge", 3 * EXTENT_SPAN_BYTES, data, Layout::Extents(10_000));
    // After its extents in the order of keys.
    model.file("a/huge!", b"x", Layout::Inline);
    model.symlink("link", "../does/not/exist").node.mtime.seconds = 77;
    model.add("fifo", node(Kind::Fifo, 0o640));
    model.add("socket", node(Kind::Socket, 0o755));
    model.file("bytes\u{e4}\n", b"odd name", Layout::Bundle);
    let user = vec![(b"user.k".to_vec(), b"v\0w".to_vec())];
    model.file("xattr", &noise(8, 2000), Layout::Bundle).node.xattrs = user.clone();
    model.dir("xdir").node.xattrs = user;
    if is_root() {
        model.add("null", Node { rdev: (1, 3), ..node(Kind::CharDevice, 0o666) });
        model.add("disk", Node { rdev: (7, 200), ..node(Kind::BlockDevice, 0o600) });
        let object = model.file("setuid", &noise(9, 3000), Layout::Bundle);
        (object.node.uid, object.node.gid, object.node.mode) = (1234, 4321, 0o6755);
        model.file("owned", &noise(10, 3000), Layout::Bundle).node.uid = 1000;
        (model.symlink("owned-link", "x").node.gid, model.dir("odir").node.uid) = (55, 66);
    }
    model
}

#[test]
fn every_kind_comes_back_with_its_metadata() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let model = full_model();
    let root = repo.write(&model);
    let target = temp.path().join("made/with/parents");
    for verify in [false, true] {
        let mut run = Run::new(&repo, root, &target);
        (run.options.verify, run.options.sync) = (verify, verify);
        let summary = run.clean();
        assert_same(&found(&target), &expected(&model));
        let dirs = model.0.values().filter(|object| object.node.kind == Kind::Dir).count();
        assert_eq!(summary.dirs, dirs as u64);
        assert_eq!(summary.files, (model.0.len() - dirs) as u64);
        let is_file = |object: &&Object| object.node.kind == Kind::File;
        let files = model.0.values().filter(is_file);
        assert_eq!(summary.bytes, files.map(|object| object.node.size).sum::<u64>());
        let allocated = target.join("a/huge").metadata().unwrap().blocks() * 512;
        assert!(allocated < 1 << 20, "holes stay holes, not {allocated} bytes");
    }
}

#[test]
fn dry_run_counts_the_same_and_touches_nothing() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let root = repo.write(&full_model());
    let target = temp.path().join("t");
    let mut dry = Run::new(&repo, root, &target);
    dry.options.dry_run = true;
    let counted = dry.clean();
    assert!(!target.exists());
    let done = Run::new(&repo, root, &target).clean();
    assert_eq!(counted, RestoreSummary { bytes_written: 0, ..done });

    let before = found(&target);
    std::fs::write(target.join("extra"), "x").unwrap();
    let with_extra = found(&target);
    dry.options.delete = true;
    assert_eq!(dry.clean().deleted, 1);
    assert_eq!(found(&target), with_extra);
    let mut run = Run::new(&repo, root, &target);
    run.options.delete = true;
    assert_eq!(run.clean().deleted, 1);
    assert_same(&found(&target), &before);
}

#[test]
fn subpaths_land_directly_in_the_target() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let model = full_model();
    let root = repo.write(&model);
    let mut run = Run::new(&repo, root, &temp.path().join("dir"));
    run.subpath = key_of(b"a/b");
    run.clean();
    let below = |prefix: &str| {
        let all = expected(&model).into_iter();
        let below = all.filter_map(|(path, line)| {
            let rest = path.strip_prefix(prefix)?;
            (rest.is_empty() || rest.starts_with('/'))
                .then(|| (rest.trim_start_matches('/').to_owned(), line))
        });
        below.collect::<Lines>()
    };
    assert_same(&found(&temp.path().join("dir")), &below("a/b"));

    for name in ["huge", "bundled", "hole"] {
        let target = temp.path().join(name);
        std::fs::create_dir(&target).unwrap();
        let mut run = Run::new(&repo, root, &target);
        run.subpath = key_of(format!("a/{name}").as_bytes());
        assert_eq!(run.clean().files, 1);
        let mut lines = found(&target);
        lines.remove("");
        assert_same(&lines, &Lines::from([(name.into(), below(&format!("a/{name}"))[""].clone())]));
    }

    let mut run = Run::new(&repo, root, &temp.path().join("none"));
    run.subpath = key_of(b"a/missing");
    assert_eq!(run.try_go().unwrap_err().kind(), chunkstore::ErrorKind::NotFound);
}

#[test]
fn filters_choose_and_folders_above_the_chosen_are_made() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    for path in ["keep", "keep/deep", "skip", "skip/deep", "prune", "empty"] {
        model.dir(path).node.mode = 0o711;
    }
    for path in ["keep/deep/a.log", "skip/deep/b.log", "skip/c.txt", "prune/d.log", "keep/e.txt"] {
        model.file(path, &noise(1, 600), Layout::Bundle);
    }
    for number in 0..3000 {
        model.file(&format!("prune/{number}"), b"x", Layout::Inline);
    }
    model.file("z.log", b"last", Layout::Inline);
    let root = repo.write(&model);
    let filter = |path: &[u8], is_dir: bool| match path {
        b"prune" => FilterResult::Prune,
        b"" | b"keep" => FilterResult::Take,
        _ if !is_dir && path.ends_with(b".log") => FilterResult::Take,
        _ => FilterResult::Skip,
    };
    let mut run = Run::new(&repo, root, temp.path());
    run.filter = Some(&filter);
    run.clean();
    let chosen = [
        "",
        "keep",
        "keep/deep",
        "keep/deep/a.log",
        "skip",
        "skip/deep",
        "skip/deep/b.log",
        "z.log",
    ];
    let mut wanted = expected(&model);
    wanted.retain(|path, _| chosen.contains(&path.as_str()));
    assert_same(&found(temp.path()), &wanted);

    // What is there and not chosen stays, also with `delete`.
    for path in ["keep/x.log", "keep/x.txt", "skip/x.log", "prune"] {
        std::fs::write(temp.path().join(path), "mine").unwrap();
    }
    std::fs::create_dir_all(temp.path().join("keep/gone/deeper")).unwrap();
    std::fs::write(temp.path().join("keep/gone/deeper/y.log"), "mine").unwrap();
    std::fs::write(temp.path().join("keep/gone/deeper/y.txt"), "mine").unwrap();
    run.options.delete = true;
    assert_eq!(run.clean().deleted, 2);
    for (path, stays) in [
        ("keep/x.log", false),
        ("keep/x.txt", true),
        ("skip/x.log", true),
        ("prune", true),
        ("keep/gone/deeper/y.log", false),
        ("keep/gone/deeper/y.txt", true),
    ] {
        assert_eq!(temp.path().join(path).exists(), stays, "{path}");
    }
}

#[test]
fn hard_links_stay_links() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    model.dir("d");
    let mut inode = 100;
    for (layout, len) in [
        (Layout::Inline, 20),
        (Layout::Bundle, 3000),
        (Layout::Chunks(10_000), 100_000),
        (Layout::Extents(10_000), 100_000),
    ] {
        inode += 1;
        for name in ["d/first", "d/second", "zlast"] {
            let object = model.file(&format!("{name}{inode}"), &noise(inode, len), layout);
            (object.node.linked, object.node.ino) = (true, inode);
        }
    }
    for name in ["l1", "l2"] {
        let object = model.symlink(name, "somewhere");
        (object.node.linked, object.node.ino) = (true, 7);
    }
    // The same number on another file system is another file.
    let object = model.file("other", &noise(3, 10), Layout::Inline);
    (object.node.linked, object.node.ino, object.node.fs) = (true, 101, 1);
    let root = repo.write(&model);
    for window_bytes in [1, 1000, 10 << 20] {
        let target = temp.path().join(window_bytes.to_string());
        std::fs::create_dir_all(target.join(".ebackup-links-0123456789abcdef/x")).unwrap();
        let mut run = Run::new(&repo, root, &target);
        for _ in 0..2 {
            run.options.window_bytes = window_bytes;
            run.options.verify = true;
            let summary = run.clean();
            assert_eq!(summary.files, model.0.len() as u64 - 2);
            assert_same(&found(&target), &expected(&model));
            let inode = |name: &str| target.join(name).symlink_metadata().unwrap().ino();
            for number in 101..105 {
                let first = inode(&format!("d/first{number}"));
                assert_eq!(inode(&format!("d/second{number}")), first);
                assert_eq!(inode(&format!("zlast{number}")), first);
            }
            assert_eq!(inode("l1"), inode("l2"));
            assert_eq!(target.join("other").metadata().unwrap().nlink(), 1);
        }
    }
}

#[test]
fn first_name_that_fails_does_not_cost_the_others() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    // Stored separately, so one can be lost: the second, also in two windows.
    for (name, seed) in [("a", 1), ("b", 2), ("c", 2)] {
        let object = model.file(name, &noise(seed, 300_000), Layout::Extents(50_000));
        (object.node.linked, object.node.ino) = (true, 5);
    }
    let root = repo.write(&model);
    for key in packs_of(&repo, &noise(1, 300_000)[..50_000]) {
        repo.store.delete(&key).unwrap();
    }
    for window_bytes in [1, 1 << 20] {
        let target = temp.path().join(window_bytes.to_string());
        let mut run = Run::new(&repo, root, &target);
        run.options.window_bytes = window_bytes;
        let summary = run.go();
        assert_eq!(summary.files_failed, 1, "{:?}", run.log.warnings);
        assert!(!target.join("a").exists());
        for name in ["b", "c"] {
            assert_eq!(std::fs::read(target.join(name)).unwrap(), noise(2, 300_000));
        }
        assert_eq!(target.join("b").metadata().unwrap().nlink(), 2);
    }
}

/// Objects of the pack that holds the blob with this content.
fn packs_of(repo: &Repo, content: &[u8]) -> Vec<String> {
    use chunkstore::id::PackId;
    use chunkstore::pack::PackClass;
    let id = BlobKind::Data.id(repo.repository.keys(), content);
    let (store, keys) = (repo.repository.store(), repo.repository.keys());
    let mut found = repo.store.keys();
    found.retain(|key| {
        key.starts_with("packs/") && {
            let pack: PackId = key.rsplit('/').next().unwrap().parse().unwrap();
            let pack = chunkstore::pack::PackCache::new(PackClass::Data).get(store, keys, pack);
            pack.is_ok_and(|pack| pack.table().iter().any(|entry| entry.id == id))
        }
    });
    found
}

#[test]
fn missing_pack_fails_only_the_files_in_it() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    for number in 0..400 {
        model.file(&format!("{number:03}"), &noise(number, 5000), Layout::Bundle);
    }
    model.file("large", &noise(1000, 900_000), Layout::Chunks(90_000));
    model.file("vast", &noise(1001, 900_000), Layout::Extents(90_000));
    let root = repo.write(&model);
    let lost: Vec<String> =
        repo.store.keys().into_iter().filter(|key| key.starts_with("packs/")).step_by(3).collect();
    assert!(lost.len() > 2);
    for key in &lost {
        repo.store.delete(key).unwrap();
    }
    for (verify, window_bytes) in [(false, 32 << 20), (true, 5000)] {
        let target = temp.path().join(verify.to_string());
        std::fs::create_dir(&target).unwrap();
        for name in ["000", "large", "vast"] {
            std::fs::write(target.join(name), "older").unwrap();
        }
        let mut run = Run::new(&repo, root, &target);
        (run.options.verify, run.options.window_bytes) = (verify, window_bytes);
        let summary = run.go();
        let (mut wanted, mut lines) = (expected(&model), found(&target));
        let failed = run.log.paths();
        assert_eq!(summary.files_failed, failed.len() as u64);
        assert!(failed.len() > 50 && failed.len() < 390, "{}", failed.len());
        for path in &failed {
            wanted.remove(path);
            if let Ok(left) = std::fs::read(target.join(path)) {
                assert_eq!(left, b"older", "{path} is either what it was or not there");
                lines.remove(path);
            }
        }
        assert_same(&lines, &wanted);
        assert_eq!(summary.files + summary.files_failed, 402);
    }
}

#[test]
fn damaged_tree_restores_what_it_still_names_and_deletes_nothing() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    for number in 0..4000 {
        if number % 50 == 0 {
            model.dir(&format!("{number:04}"));
        }
        model.file(&format!("{:04}/{number}", number / 50 * 50), b"some content", Layout::Inline);
    }
    let root = repo.write(&model);
    // Damage some leaves, one byte each.
    let store = &repo.store;
    let keys = store.keys().into_iter().filter(|key| key.starts_with("meta/"));
    for key in keys.collect::<Vec<_>>() {
        store.damage(&key, |bytes| {
            let middle = bytes.len() / 3;
            bytes[middle] ^= 1;
        });
    }
    let mut run = Run::new(&repo, root, temp.path());
    run.options.delete = true;
    std::fs::write(temp.path().join("zzz"), "mine").unwrap();
    match run.try_go() {
        // The root itself may have been hit.
        Err(error) => assert_eq!(error.kind(), chunkstore::ErrorKind::Corrupt),
        Ok(summary) => {
            assert!(summary.files_failed > 0 && summary.files > 1000, "{summary:?}");
            assert!(temp.path().join("zzz").exists());
        }
    }
}

#[test]
fn overwrite_modes_decide_about_what_is_there() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    for name in ["same", "newer", "folder", "link", "linked"] {
        model.file(name, &noise(1, 5000), Layout::Bundle);
    }
    model.dir("dir");
    model.file("dir/in", b"x", Layout::Inline);
    model.symlink("sym", "to");
    let root = repo.write(&model);
    for overwrite in [Overwrite::Always, Overwrite::IfChanged, Overwrite::Never] {
        let target = temp.path().join(format!("{overwrite:?}"));
        let outside = temp.path().join(format!("{overwrite:?}-outside"));
        std::fs::create_dir_all(target.join("folder/with/content")).unwrap();
        std::fs::write(&outside, "outside").unwrap();
        symlink(&outside, target.join("link")).unwrap();
        std::fs::hard_link(&outside, target.join("linked")).unwrap();
        std::fs::write(target.join("newer"), noise(1, 5000)).unwrap();
        let changed = [&b"!"[..], &noise(1, 4999)].concat();
        std::fs::write(target.join("same"), &changed).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_600_000_000, 123_456_789);
        let file = std::fs::File::options().write(true).open(target.join("same")).unwrap();
        file.set_modified(time).unwrap();
        let inode = target.join("same").metadata().unwrap().ino();
        std::fs::write(target.join("dir"), "file in the place of a folder").unwrap();
        std::fs::write(target.join("sym"), "file").unwrap();
        let mut run = Run::new(&repo, root, &target);
        run.options.overwrite = overwrite;
        let summary = run.go();
        assert_eq!(std::fs::read(&outside).unwrap(), b"outside");
        let now = |name: &str| std::fs::read(target.join(name)).unwrap();
        let is_new = |name: &str| now(name) == noise(1, 5000);
        match overwrite {
            Overwrite::Always => {
                assert_same(&found(&target), &expected(&model));
                assert_eq!((summary.files, summary.files_failed), (7, 0));
            }
            Overwrite::IfChanged => {
                assert!(now("same") == changed && is_new("newer") && is_new("link"));
                assert_eq!(target.join("same").metadata().unwrap().ino(), inode);
                assert_eq!(target.join("same").metadata().unwrap().mode() & 0o777, 0o644);
                assert!(target.join("folder/with/content").exists() && is_new("linked"));
                assert_eq!((summary.skipped_unchanged, summary.files_failed), (1, 1));
            }
            Overwrite::Never => {
                assert!(now("same") == changed && now("linked") == b"outside");
                assert!(target.join("link").is_symlink() && target.join("folder/with").exists());
                assert_eq!(now("sym"), b"file");
                assert_eq!(now("dir"), b"file in the place of a folder");
                assert_eq!((summary.files, summary.files_failed), (0, 1));
                assert_eq!(summary.skipped_unchanged, 6);
            }
        }
    }
}

#[test]
fn restoring_twice_over_itself_writes_nothing_if_unchanged() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let model = full_model();
    let root = repo.write(&model);
    let mut run = Run::new(&repo, root, temp.path());
    run.clean();
    run.options.overwrite = Overwrite::IfChanged;
    let summary = run.clean();
    assert_eq!((summary.files, summary.bytes_written), (0, 0));
    assert_same(&found(temp.path()), &expected(&model));
    run.options.overwrite = Overwrite::Never;
    assert_eq!(run.clean().files, 0);
    run.options.overwrite = Overwrite::Always;
    assert_eq!(run.clean().skipped_unchanged, 0);
    assert_same(&found(temp.path()), &expected(&model));
}

#[test]
fn delete_leaves_exactly_the_snapshot() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let model = full_model();
    let root = repo.write(&model);
    let mut run = Run::new(&repo, root, temp.path());
    run.clean();
    for (path, is_dir) in [
        ("!first", false),
        ("a/b/empty/x", true),
        ("a/b/empty/y", false),
        ("a/many!", false),
        ("a/mane", true),
        ("zz", true),
        ("xdir/z", false),
    ] {
        let path = temp.path().join(path);
        if is_dir {
            std::fs::create_dir_all(path.join("deep/er")).unwrap();
            std::fs::write(path.join("deep/file"), "x").unwrap();
        } else {
            std::fs::write(path, "x").unwrap();
        }
    }
    symlink("/", temp.path().join("a/root")).unwrap();
    run.options.delete = true;
    run.options.overwrite = Overwrite::IfChanged;
    assert_eq!(run.clean().deleted, 8);
    assert_same(&found(temp.path()), &expected(&model));

    // Only within the subpath.
    std::fs::write(temp.path().join("stays"), "x").unwrap();
    std::fs::write(temp.path().join("a/goes"), "x").unwrap();
    run.target = temp.path().join("a");
    run.subpath = b"a".to_vec();
    assert_eq!(run.clean().deleted, 1);
    assert!(temp.path().join("stays").exists());
}

fn random_model(seed: u64) -> Model {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut model = Model::new();
    let mut dirs = vec![String::new()];
    for number in 0..30 + random.below(200) {
        let parent = dirs[random.below(dirs.len() as u64) as usize].clone();
        let name = format!("{}{number}", ["a", "b!", "c.d", "-"][random.below(4) as usize]);
        let path = if parent.is_empty() { name } else { format!("{parent}/{name}") };
        let mode = 0o400 | random.below(0o400) as u32;
        let object = match random.below(10) {
            0 | 1 => {
                dirs.push(path.clone());
                model.dir(&path)
            }
            2 => model.symlink(&path, "x"),
            3 => model.file(&path, &noise(number, random.below(500) as usize), Layout::Inline),
            4 => model.sparse(&path, 1 + random.below(100_000), vec![], Layout::Inline),
            5 | 6 => {
                let layout = if random.below(2) == 0 { Layout::Chunks } else { Layout::Extents };
                let chunk = 1 + random.below(20_000) as usize;
                let at = random.below(100_000);
                let first = noise(number, 1 + random.below(60_000) as usize);
                let second = at + first.len() as u64 + random.below(50_000);
                let data = vec![(at, first), (second, noise(9, 1 + random.below(5000) as usize))];
                let size = second + 5000 + random.below(1000);
                model.sparse(&path, size, data, layout(chunk))
            }
            _ => {
                let len = 1 + random.below(20_000) as usize;
                model.file(&path, &noise(random.below(50), len), Layout::Bundle)
            }
        };
        object.node.mode = mode | if object.node.kind == Kind::Dir { 0o700 } else { 0 };
        if object.node.kind == Kind::Symlink {
            object.node.mode = 0o777;
        }
        object.node.mtime.seconds = random.below(2_000_000_000) as i64;
        if matches!(object.node.kind, Kind::File) && random.below(4) == 0 {
            // Links only to itself, unless there is another with the same content and metadata.
            (object.node.linked, object.node.ino) = (true, number);
        }
    }
    let linked: Vec<_> =
        model.0.iter().filter(|(_, object)| object.node.linked).map(|at| at.1.clone()).collect();
    for (number, object) in linked.into_iter().enumerate() {
        for copy in 0..random.below(3) {
            let parent = &dirs[random.below(dirs.len() as u64) as usize];
            let path = format!("{parent}/link{number}-{copy}");
            model.0.insert(key_of(path.trim_start_matches('/').as_bytes()), object.clone());
        }
    }
    model
}

#[test]
fn windows_of_any_size_give_the_same_result() {
    let temp = tempfile::tempdir().unwrap();
    for seed in 1..=12 {
        let (repo, model) = (Repo::new(), random_model(seed));
        let root = repo.write(&model);
        for (number, window_bytes) in [1, 200, 3000, 40_000, 32 << 20].into_iter().enumerate() {
            let target = temp.path().join(format!("{seed}-{number}"));
            let mut run = Run::new(&repo, root, &target);
            run.options.window_bytes = window_bytes;
            run.options.threads = 1 + number % 4;
            run.options.verify = number % 2 == 0;
            run.clean();
            assert_same(&found(&target), &expected(&model));
            // And over what another seed has left there.
            if let Some(before) = seed.checked_sub(1).filter(|before| *before > 0) {
                let target = temp.path().join(format!("{before}-{number}"));
                run.target = target.clone();
                run.options.delete = true;
                run.options.overwrite = [Overwrite::Always, Overwrite::IfChanged][number % 2];
                let summary = run.go();
                if summary.files_failed == 0 && run.options.overwrite == Overwrite::Always {
                    assert_same(&found(&target), &expected(&model));
                }
                std::fs::remove_dir_all(&target).unwrap();
            }
        }
    }
}

#[test]
fn evil_names_are_refused() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let target = temp.path().join("inner/target");
    let long = vec![b'x'; 256];
    let evil: [&[u8]; 9] = [
        b"..",
        b".",
        b"a/b",
        b"/etc",
        b"a/../..",
        &long,
        b"d\0..",
        b"d\0x/y",
        b".ebackup-links-0123456789abcdef",
    ];
    let file = Object {
        node: Node {
            size: 4,
            content: Content::Inline(b"evil".to_vec()),
            ..node(Kind::File, 0o644)
        },
        data: vec![(0, b"evil".to_vec())],
        layout: Layout::Inline,
    };
    let dir = Object { node: node(Kind::Dir, 0o755), data: vec![], layout: Layout::Inline };
    let mut objects = BTreeMap::new();
    objects.insert(Vec::new(), dir.clone());
    objects.insert(b"d".to_vec(), dir.clone());
    objects.insert(b"good".to_vec(), file.clone());
    for name in evil {
        objects.insert(name.to_vec(), dir.clone());
        objects.insert([name, &b"\0in"[..]].concat(), file.clone());
    }
    // No folder of its own; a file as a folder; empty components.
    objects.insert(b"missing\0in".to_vec(), file.clone());
    objects.insert(b"good\0in".to_vec(), file.clone());
    objects.insert(b"\0in".to_vec(), file.clone());
    objects.insert(b"d\0\0in".to_vec(), file.clone());
    let root = write(&repo.repository, objects.into_iter());
    let run = Run::new(&repo, root, &target);
    let summary = run.go();
    assert_eq!(summary.files_failed, evil.len() as u64 + 4, "{:?}", run.log.paths());
    assert_eq!(found(&target).into_keys().collect::<Vec<_>>(), ["", "d", "good"]);
    assert_eq!(found(temp.path()).len(), 5);
}

#[test]
fn paths_beyond_the_limit_of_the_system_work() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    let mut path = String::new();
    for depth in 0..700 {
        path.push_str(&format!("{depth:0>40}"));
        model.dir(&path).node.mtime.seconds = depth;
        for (name, layout) in [("a", Layout::Bundle), ("z", Layout::Chunks(100))] {
            model.file(&format!("{path}/{name}"), &noise(1, 500), layout);
        }
        path.push('/');
    }
    let root = repo.write(&model);
    for window_bytes in [32 << 20, 10_000] {
        let target = temp.path().join(window_bytes.to_string());
        let mut run = Run::new(&repo, root, &target);
        run.options.window_bytes = window_bytes;
        run.clean();
        // Handles of a path this long would be too many to look at all at once.
        let mut dir = Dir::open_root(&target).unwrap();
        for depth in 0..700 {
            dir = dir.open_dir(format!("{depth:0>40}").as_bytes()).unwrap();
            assert_eq!(dir.stat().unwrap().mtime.seconds, depth);
            for name in [&b"a"[..], b"z"] {
                let mut bytes = vec![0; 500];
                dir.open_file(name).unwrap().0.read_exact_at(&mut bytes, 0).unwrap();
                assert_eq!(bytes, noise(1, 500));
            }
        }
        drop(dir);
        Dir::open_root(temp.path())
            .unwrap()
            .remove_tree(window_bytes.to_string().as_bytes())
            .unwrap();
    }
}

#[test]
fn planted_symlinks_are_not_followed() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    model.dir("dir");
    model.dir("dir/sub");
    model.file("dir/sub/file", &noise(1, 5000), Layout::Bundle);
    let root = repo.write(&model);
    for overwrite in [Overwrite::Always, Overwrite::IfChanged, Overwrite::Never] {
        let target = temp.path().join(format!("{overwrite:?}"));
        let outside = temp.path().join(format!("{overwrite:?}-outside"));
        std::fs::create_dir_all(target.join("dir")).unwrap();
        std::fs::create_dir_all(outside.join("sub")).unwrap();
        symlink(&outside, target.join("dir/sub")).unwrap();
        let mut run = Run::new(&repo, root, &target);
        (run.options.overwrite, run.options.delete) = (overwrite, true);
        let summary = run.go();
        assert_eq!(found(&outside).len(), 2, "nothing came in, nothing went");
        if overwrite == Overwrite::Never {
            assert_eq!(summary.files_failed, 1);
            assert!(target.join("dir/sub").is_symlink());
        } else {
            assert_same(&found(&target), &expected(&model));
        }
    }
}

#[test]
fn cancelling_leaves_no_incomplete_file_and_no_hidden_folder() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    for number in 0..30 {
        let object =
            model.file(&format!("{number}"), &noise(number, 200_000), Layout::Extents(20_000));
        (object.node.linked, object.node.ino) = (true, number);
    }
    let root = repo.write(&model);
    struct After(Log, u64);
    impl Monitor for After {
        fn begin(&self, _: &[u8]) {}
        fn advance(&self, entries: u64, bytes: u64) {
            self.0.advance(entries, bytes);
        }
        fn warning(&self, warning: Warning) {
            self.0.warning(warning);
        }
        fn is_cancelled(&self) -> bool {
            self.0.advanced.lock().unwrap().1 >= self.1
        }
    }
    for (number, (bytes, window_bytes)) in
        [(50_000, 1), (1_000_000, 2000), (3_000_000, 1 << 20)].into_iter().enumerate()
    {
        let target = temp.path().join(number.to_string());
        let monitor = After(Log::default(), bytes);
        let options = RestoreOptions { window_bytes, ..options() };
        let (repository, subpath, filter) = (&*repo.repository, &b""[..], None);
        let target_path = &target;
        let request = Request {
            repository,
            root,
            subpath,
            target: target_path,
            opened: None,
            filter,
            options,
            monitor: &monitor,
        };
        let error = restore(&request).unwrap_err();
        assert_eq!(error.kind(), chunkstore::ErrorKind::Cancelled);
        let wanted = expected(&model);
        for (path, line) in found(&target) {
            assert!(path.is_empty() || wanted.get(&path) == Some(&line), "{path}");
        }
    }
}

#[test]
fn newborn_owners_of_setgid_folders_are_corrected() {
    if !is_root() {
        return;
    }
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    model.dir("d");
    model.file("d/a", &noise(1, 1000), Layout::Bundle);
    model.file("d/b", &noise(2, 1000), Layout::Bundle);
    let root = repo.write(&model);
    std::os::unix::fs::chown(temp.path(), Some(0), Some(777)).unwrap();
    std::fs::set_permissions(temp.path(), PermissionsExt::from_mode(0o2775)).unwrap();
    Run::new(&repo, root, temp.path()).clean();
    assert_same(&found(temp.path()), &expected(&model));
}

#[test]
fn verify_finds_what_the_disk_has_changed() {
    // A monitor that spoils a file when the window it is in has been written.
    struct Spoil(PathBuf, Log);
    impl Monitor for Spoil {
        fn begin(&self, _: &[u8]) {}
        fn advance(&self, _: u64, bytes: u64) {
            if bytes == 777_000 {
                for name in ["a", "b"] {
                    let path = self.0.join(name);
                    let file = std::fs::File::options().write(true).open(path).unwrap();
                    file.write_all_at(b"spoilt", 400).unwrap();
                }
            }
        }
        fn warning(&self, warning: Warning) {
            self.1.warning(warning);
        }
        fn is_cancelled(&self) -> bool {
            false
        }
    }
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    model.file("a", &noise(1, 5000), Layout::Bundle);
    model.file("b", &noise(2, 50_000), Layout::Chunks(5000));
    model.file("c", &noise(3, 5000), Layout::Bundle);
    // Its blob comes last.
    model.file("z", &noise(4, 777_000), Layout::Chunks(800_000));
    let root = repo.write(&model);
    let monitor = Spoil(temp.path().to_owned(), Log::default());
    let options = RestoreOptions { verify: true, threads: 1, ..options() };
    let request = Request {
        repository: &repo.repository,
        root,
        subpath: b"",
        target: temp.path(),
        opened: None,
        filter: None,
        options,
        monitor: &monitor,
    };
    // The order of packs is by random name: only a run in which the spoiling comes last counts.
    for _ in 0..50 {
        monitor.1.warnings.lock().unwrap().clear();
        for name in ["a", "b"] {
            std::fs::write(temp.path().join(name), "").unwrap();
        }
        let summary = restore(&request).unwrap();
        let lost = monitor.1.paths();
        if lost == ["a", "b"] {
            assert_eq!((summary.files_failed, summary.files), (2, 2));
            assert!(!temp.path().join("a").exists() && !temp.path().join("b").exists());
            return;
        }
        let root = repo.write(&model);
        assert_ne!(root.0.id.0, [0; 32]);
    }
}

#[test]
fn names_of_any_bytes_come_back() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut objects = BTreeMap::new();
    let plain = |kind| Object { node: node(kind, 0o755), data: vec![], layout: Layout::Inline };
    objects.insert(Vec::new(), plain(Kind::Dir));
    objects.insert(b"\xff\xfe\x01".to_vec(), plain(Kind::Dir));
    objects.insert(b"\xff\xfe\x01\0\x80".to_vec(), plain(Kind::File));
    let root = write(&repo.repository, objects.into_iter());
    Run::new(&repo, root, temp.path()).clean();
    let path = Path::new(std::ffi::OsStr::from_bytes(b"\xff\xfe\x01/\x80"));
    assert!(temp.path().join(path).is_file());
}
