//! Trees written directly, restores of them, and what is found afterwards.

pub(crate) use chunkstore::chunker::ChunkerConfig;
pub(crate) use chunkstore::codec::compress::{Compressor, Level};
pub(crate) use chunkstore::key_slot::{KdfCost, Unlock};
pub(crate) use chunkstore::limits::EXTENT_SPAN_BYTES;
pub(crate) use chunkstore::pack::BlobKind;
pub(crate) use chunkstore::record::Session;
pub(crate) use chunkstore::repository::Repository;
pub(crate) use chunkstore::tree::{
    Absence, Body, Chunk, Content, End, Entry, Node, NodeRef, State, TreeBuilder, Xattrs, end_key,
    extent_key,
};
pub(crate) use chunkstore::writer::{Writer, WriterSettings};
pub(crate) use mover::fs::{Dir, Kind, Listing, Timestamp};
pub(crate) use mover::monitor::{Concern, Monitor, Warning};
pub(crate) use mover::restore::{
    Filter, FilterResult, Overwrite, Request, RestoreOptions, RestoreSummary, restore,
};
pub(crate) use objects::ObjectStore;
pub(crate) use objects::testing::MemoryStore;
pub(crate) use std::collections::BTreeMap;
pub(crate) use std::os::unix::ffi::OsStrExt;
pub(crate) use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
pub(crate) use std::path::{Path, PathBuf};
pub(crate) use std::sync::atomic::{AtomicBool, Ordering};
pub(crate) use std::sync::{Arc, Mutex};

/// How the content of a file is stored.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Layout {
    Inline,
    Bundle,
    Chunks(usize),
    Extents(usize),
}

#[derive(Clone)]
pub(crate) struct Object {
    pub(crate) node: Node,
    /// Data of a file, by offset; the rest is holes.
    pub(crate) data: Vec<(u64, Vec<u8>)>,
    pub(crate) layout: Layout,
    /// An absence instead of the node, or an end behind it.
    pub(crate) special: Option<Body>,
}

/// A tree by path, components separated by `/`.
#[derive(Clone, Default)]
pub(crate) struct Model(pub(crate) BTreeMap<Vec<u8>, Object>);

pub(crate) fn key_of(path: &[u8]) -> Vec<u8> {
    path.iter().map(|byte| if *byte == b'/' { 0 } else { *byte }).collect()
}

pub(crate) fn node(kind: Kind, mode: u32) -> Node {
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
    pub(crate) fn new() -> Self {
        let mut model = Self::default();
        model.dir("");
        model
    }

    pub(crate) fn add(&mut self, path: &str, node: Node) -> &mut Object {
        let (data, layout, special) = (Vec::new(), Layout::Inline, None);
        let object = Object { node, data, layout, special };
        let key = key_of(path.as_bytes());
        self.0.insert(key.clone(), object);
        self.0.get_mut(&key).unwrap()
    }

    pub(crate) fn dir(&mut self, path: &str) -> &mut Object {
        self.add(path, node(Kind::Dir, 0o755))
    }

    pub(crate) fn file(&mut self, path: &str, data: &[u8], layout: Layout) -> &mut Object {
        self.sparse(path, data.len() as u64, vec![(0, data.to_vec())], layout)
    }

    pub(crate) fn sparse(
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

    /// A name that the source had and of which nothing is saved.
    pub(crate) fn absent(&mut self, path: &str, why: Absence) {
        self.add(path, node(Kind::File, 0)).special = Some(Body::Absent(why));
    }

    pub(crate) fn symlink(&mut self, path: &str, to: &str) -> &mut Object {
        let content = Content::Inline(to.into());
        let size = to.len() as u64;
        self.add(path, Node { content, size, ..node(Kind::Symlink, 0o777) })
    }
}

pub(crate) struct Repo {
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) repository: Arc<Repository>,
}

impl Repo {
    pub(crate) fn new() -> Self {
        let store = Arc::new(MemoryStore::new());
        let unlock = Unlock::Passphrase(b"x".to_vec());
        let (cost, now) = (KdfCost::WEAK, jiff::Timestamp::UNIX_EPOCH);
        let repository =
            Repository::create(store.clone(), &unlock, cost, ChunkerConfig::default(), now);
        Self { store, repository: Arc::new(repository.unwrap()) }
    }

    pub(crate) fn write(&self, model: &Model) -> (NodeRef, u8) {
        write(&self.repository, model.0.iter().map(|(key, object)| (key.clone(), object.clone())))
    }
}

/// Writes a tree of these objects, which are in order.
pub(crate) fn write(
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
        let Object { mut node, data, layout, special } = object;
        if let Some(body @ Body::Absent(_)) = special {
            waiting.push(Entry { key, body });
            continue;
        }
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
        let end = special.map(|body| Entry { key: end_key(&key), body });
        waiting.push(Entry { key, body: Body::Node(node) });
        for (key, chunks) in extents {
            waiting.push(Entry { key, body: Body::Extent(chunks) });
        }
        waiting.extend(end);
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
pub(crate) struct Log {
    pub(crate) warnings: Mutex<Vec<Warning>>,
    pub(crate) cancel: AtomicBool,
    pub(crate) advanced: Mutex<(u64, u64)>,
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
    pub(crate) fn paths(&self) -> Vec<String> {
        let warnings = self.warnings.lock().unwrap();
        let mut paths: Vec<_> = warnings
            .iter()
            .map(|warning| String::from_utf8_lossy(&warning.path).into_owned())
            .collect();
        paths.sort();
        paths
    }
}

pub(crate) fn options() -> RestoreOptions {
    RestoreOptions { threads: 2, sync: false, ..RestoreOptions::default() }
}

pub(crate) struct Run<'a> {
    pub(crate) repo: &'a Repo,
    pub(crate) root: (NodeRef, u8),
    pub(crate) target: PathBuf,
    pub(crate) options: RestoreOptions,
    pub(crate) subpath: Vec<u8>,
    pub(crate) filter: Option<&'a Filter<'a>>,
    pub(crate) log: Log,
}

impl<'a> Run<'a> {
    pub(crate) fn new(repo: &'a Repo, root: (NodeRef, u8), target: &Path) -> Self {
        let (subpath, filter, log) = (Vec::new(), None, Log::default());
        let target = target.to_owned();
        Self { repo, root, target, options: options(), subpath, filter, log }
    }

    pub(crate) fn try_go(&self) -> chunkstore::Result<RestoreSummary> {
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
    pub(crate) fn go(&self) -> RestoreSummary {
        self.try_go().unwrap()
    }

    /// Restores without a complaint.
    #[track_caller]
    pub(crate) fn clean(&self) -> RestoreSummary {
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
pub(crate) type Lines = BTreeMap<String, String>;

pub(crate) fn line(node: &Node, content: &str, xattrs: &Xattrs) -> String {
    let size = if matches!(node.kind, Kind::File | Kind::Symlink) { node.size } else { 0 };
    let mode = if node.kind == Kind::Symlink { 0o777 } else { node.mode };
    format!(
        "{:?} {mode:o} {}:{} {size} {:?} {:?} {content} {xattrs:?}",
        node.kind, node.uid, node.gid, node.mtime, node.rdev
    )
}

pub(crate) fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_owned()
}

pub(crate) fn expected(model: &Model) -> Lines {
    let mut lines = Lines::new();
    for (key, object) in &model.0 {
        if matches!(object.special, Some(Body::Absent(_))) {
            continue;
        }
        let path: Vec<u8> = key.iter().map(|byte| if *byte == 0 { b'/' } else { *byte }).collect();
        let node = &object.node;
        let content = match (&node.kind, &node.content) {
            (Kind::File, _) => {
                let mut all = vec![0; node.size as usize];
                if let Some(Body::End(end)) = &object.special {
                    all.resize(end.size as usize, 0);
                }
                for (at, bytes) in &object.data {
                    all[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
                }
                hash(&all)
            }
            (_, Content::Inline(to)) => String::from_utf8_lossy(to).into_owned(),
            _ => String::new(),
        };
        let mut node = node.clone();
        if let Some(Body::End(end)) = &object.special {
            node.size = end.size;
        }
        lines.insert(
            String::from_utf8_lossy(&path).into_owned(),
            line(&node, &content, &node.xattrs),
        );
    }
    lines
}

pub(crate) fn found(target: &Path) -> Lines {
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
pub(crate) fn assert_same(found: &Lines, expected: &Lines) {
    for (path, line) in expected {
        assert_eq!(found.get(path), Some(line), "'{path}'");
    }
    let extra: Vec<_> = found.keys().filter(|path| !expected.contains_key(*path)).collect();
    assert!(extra.is_empty(), "{extra:?}");
}

pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    (0..len).map(|_| random.next() as u8).collect()
}

pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// All kinds of objects, ways of storing content, and metadata.
pub(crate) fn full_model() -> Model {
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

/// Objects of the pack that holds the blob with this content.
pub(crate) fn packs_of(repo: &Repo, content: &[u8]) -> Vec<String> {
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

pub(crate) fn random_model(seed: u64) -> Model {
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

/// Prints past the test harness, which hides what passing tests print.
pub(crate) fn say_loudly(what: &str) {
    use std::io::Write;
    let line = format!("\n******** {what} ********\n");
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// An ACL with these permission bits (the middle ones are the mask), and a named user.
pub(crate) fn acl(mode: u32) -> Vec<u8> {
    let bits = |shift: u32| (mode >> shift & 7) as u16;
    let entries = [
        (0x01_u16, bits(6), u32::MAX),
        (0x02, 7, 1234),
        (0x04, 4, u32::MAX),
        (0x10, bits(3), u32::MAX),
        (0x20, bits(0), u32::MAX),
    ];
    let mut blob = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        blob.extend(tag.to_le_bytes());
        blob.extend(permissions.to_le_bytes());
        blob.extend(id.to_le_bytes());
    }
    blob
}

/// A file system in memory that is unmounted when dropped.
pub(crate) struct Mounted(pub(crate) PathBuf);

impl Mounted {
    pub(crate) fn tmpfs(at: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let options = format!("size={size},mode=755");
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "x"])
            .arg(at)
            .output();
        let mounted = mount.is_ok_and(|output| output.status.success());
        if !mounted {
            say_loudly("NO FILE SYSTEM CAN BE MOUNTED: FULL AND MOUNTED TARGETS ARE NOT TESTED");
        }
        mounted.then(|| Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
        assert!(unmounted.unwrap().success());
    }
}
