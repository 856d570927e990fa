//! Walks the folder in path order, compares it with the parent, and hands out what is to be read.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;

use chunkstore::id::SnapshotId;
use chunkstore::limits::KEY_BYTES_MAX;
use chunkstore::record::{Snapshot, Summary};
use chunkstore::repository::Repository;
use chunkstore::tree::{Body, Content, Entry, Kind, TreeBuilder};
use chunkstore::writer::Writer;
use chunkstore::{Error, ErrorKind, Result};
use rustix::io::Errno;

use super::Request;
use super::assemble::{Tree, count};
use super::file::{self, Known, Shared};
use super::parent::{ChangedBy, Found, Parent};
use super::pipeline::Pipeline;
use super::sparse::BundleUse;
use crate::fs::{Dir, FsTraits, Listing, Meta};
use crate::monitor::{Concern, Monitor, Warning};

/// Folders held open on the way down; those above are opened again on the way up.
const OPEN_DIRS_MAX: usize = 256;

/// The first bytes of a tag file that marks a cache (<https://bford.info/cachedir/>).
const CACHE_TAG: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";

/// Saves everything below `root`.
pub(super) fn scan(
    repository: &Repository,
    writer: &Writer,
    request: &Request<'_>,
    root: Dir,
    parent: Option<(SnapshotId, Snapshot)>,
    monitor: &dyn Monitor,
) -> Result<Tree> {
    let parent =
        parent.as_ref().map(|(_, snapshot)| Parent::open(repository, Some(writer), snapshot));
    // An unreadable parent costs reading everything again, not the backup.
    let parent = parent.and_then(|opened| {
        let warn = |error: Error| {
            let why = chunkstore::error::chain(&error);
            let message = format!("the parent snapshot cannot be read, so all is read anew: {why}");
            monitor.warning(Warning { path: Vec::new(), message, concern: Concern::Detail });
        };
        opened.map_err(warn).ok()
    });
    let shared = Shared {
        repository,
        writer,
        monitor,
        counters: file::ReadCounters::default(),
        compression: request.compression,
    };
    let workers = request.resources.workers;
    let (jobs, todo) = crossbeam_channel::bounded(2 * workers);
    let (finished, done) = crossbeam_channel::unbounded();
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let (todo, finished, shared) = (todo.clone(), finished.clone(), &shared);
            scope.spawn(move || file::work(shared, &todo, &finished));
        }
        drop((todo, finished));
        let builder = TreeBuilder::new(writer, repository.keys().cut());
        let bundles = BundleUse::new(request.now.as_nanosecond() as u64);
        let sink = Pipeline::new(builder, bundles, &request.resources, jobs, done, &shared);
        let (sink, summary) = Walk::new(request, root, monitor, parent, sink)?.run()?;
        let tree = sink.finish()?;
        let bytes_read = shared.counters.bytes_read.load(std::sync::atomic::Ordering::Relaxed);
        Ok(Tree { summary: Summary { bytes_read, ..merge(summary, tree.summary) }, ..tree })
    })
}

/// Tells what a backup would read, without reading or writing anything.
pub(super) fn dry_run(
    repository: &Repository,
    request: &Request<'_>,
    root: Dir,
    parent: Option<(SnapshotId, Snapshot)>,
    monitor: &dyn Monitor,
) -> Result<Summary> {
    let parent = parent.map(|(_, snapshot)| Parent::open(repository, None, &snapshot));
    let sink = CountOnly::default();
    let (sink, summary) = Walk::new(request, root, monitor, parent.transpose()?, sink)?.run()?;
    Ok(merge(summary, sink.summary))
}

fn merge(walk: Summary, tree: Summary) -> Summary {
    Summary {
        files: tree.files,
        dirs: tree.dirs,
        bytes: tree.bytes,
        bytes_read: tree.bytes_read,
        ..walk
    }
}

/// Takes what the walk finds, in path order.
pub(super) trait Sink {
    /// An entry without content to be read.
    fn entry(&mut self, entry: Entry) -> Result<()>;
    /// An entry that is as in the parent.
    fn unchanged(&mut self, found: &Found) -> Result<()>;
    /// A file to be read.
    fn file(&mut self, file: NewFile) -> Result<()>;
    /// Makes room, if need be, before the walk goes on.
    fn make_room(&mut self) -> Result<()>;
}

/// A file to be read.
pub(super) struct NewFile {
    pub(super) key: Vec<u8>,
    pub(super) path: Vec<u8>,
    pub(super) dir: Dir,
    pub(super) name: Vec<u8>,
    pub(super) meta: Meta,
    pub(super) fs: u32,
    pub(super) known: Option<Known>,
}

/// One folder on the path from the root to where the walk stands.
struct Frame {
    /// Closed when the walk is far below.
    dir: Option<Dir>,
    dev: u64,
    ino: u64,
    listing: Listing,
    key_len: usize,
    fs: u32,
    changed_by: ChangedBy,
}

struct Walk<'a, S> {
    request: &'a Request<'a>,
    root: Dir,
    monitor: &'a dyn Monitor,
    parent: Option<Parent<'a>>,
    sink: S,
    frames: Vec<Frame>,
    key: Vec<u8>,
    /// Numbers of file systems by device, and how to tell changes there.
    file_systems: HashMap<u64, (u32, ChangedBy)>,
    scratch: PathBuf,
    summary: Summary,
}

impl<'a, S: Sink> Walk<'a, S> {
    fn new(
        request: &'a Request<'a>,
        root: Dir,
        monitor: &'a dyn Monitor,
        parent: Option<Parent<'a>>,
        sink: S,
    ) -> Result<Self> {
        Ok(Self {
            request,
            root,
            monitor,
            parent,
            sink,
            frames: Vec::new(),
            key: Vec::new(),
            file_systems: HashMap::new(),
            scratch: request.scratch.clone(),
            summary: Summary::default(),
        })
    }

    fn run(mut self) -> Result<(S, Summary)> {
        let meta = self.root.stat().map_err(|error| unreadable_root(&error))?;
        self.folder(self.root.clone(), &meta)?;
        while !self.frames.is_empty() {
            if self.monitor.is_cancelled() {
                return Err(Error::cancelled());
            }
            self.step()?;
        }
        Ok((self.sink, self.summary))
    }

    /// Handles the next name of the folder the walk is in, or leaves it.
    fn step(&mut self) -> Result<()> {
        let Some(frame) = self.frames.last_mut() else {
            return Ok(());
        };
        self.key.truncate(frame.key_len);
        let name = match frame.listing.next_entry() {
            Ok(Some(entry)) => entry.name,
            Ok(None) => return self.leave(),
            Err(error) => {
                let is_root = self.frames.len() == 1;
                self.unless_gone(is_root, &error)?;
                self.warn(format!("its names cannot be read on: {error}"), Concern::Missing);
                return self.leave();
            }
        };
        if frame.key_len > 0 {
            self.key.push(0);
        }
        self.key.extend_from_slice(name);
        let name_at = self.key.len() - name.len();
        let Some(dir) = frame.dir.clone() else {
            return Err(Error::invalid("a folder was closed while it was read"));
        };
        let name = self.key[name_at..].to_vec();
        match dir.lstat(&name) {
            Ok(meta) => self.found(&dir, name, &meta),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.warn("vanished before it could be read".to_owned(), Concern::Vanished);
                Ok(())
            }
            Err(error) => {
                self.unless_gone(false, &error)?;
                self.warn(format!("cannot be read: {error}"), Concern::Missing);
                Ok(())
            }
        }
    }

    /// Handles an entry by its kind.
    fn found(&mut self, dir: &Dir, name: Vec<u8>, meta: &Meta) -> Result<()> {
        if let Some(excludes) = self.request.excludes
            && excludes(&path(&self.key), meta.kind == Kind::Dir)
        {
            return Ok(());
        }
        // An extent's key is ten bytes longer than its file's.
        if self.key.len() > KEY_BYTES_MAX - 10 {
            self.warn(
                "its path is longer than 256 KiB, which the format cannot hold".into(),
                Concern::Missing,
            );
            return Ok(());
        }
        self.sink.make_room()?;
        if meta.kind == Kind::Dir {
            return match dir.open_dir(&name) {
                // It may have been exchanged since: what counts is what was opened.
                Ok(opened) => match opened.stat() {
                    Ok(meta) => self.folder(opened, &meta),
                    Err(error) => self.unreadable_folder(meta, &error),
                },
                Err(error) => self.unreadable_folder(meta, &error),
            };
        }
        let (fs, changed_by) = self.file_system(dir, meta.dev);
        let known = self.known(meta, fs, changed_by)?;
        let Err(found) = known else {
            return Ok(());
        };
        if meta.kind == Kind::File {
            self.summary.files_changed += 1;
            let known = found.as_ref().and_then(Found::small_file);
            return self.sink.file(NewFile {
                key: self.key.clone(),
                path: path(&self.key),
                dir: dir.clone(),
                name,
                meta: *meta,
                fs,
                known,
            });
        }
        let path = path(&self.key);
        let xattrs = file::keep_xattrs(self.monitor, &path, dir.xattrs(&name));
        let mut node = file::node(meta, fs, xattrs, Content::None);
        if meta.kind == Kind::Symlink {
            match dir.read_link(&name) {
                Ok(target) => {
                    node.size = target.len() as u64;
                    node.content = Content::Inline(target);
                }
                Err(error) => {
                    self.warn(format!("the link cannot be read: {error}"), Concern::Missing);
                    return Ok(());
                }
            }
        }
        self.monitor.advance(1, 0);
        self.sink.entry(Entry { key: self.key.clone(), body: Body::Node(node) })
    }

    /// Takes an entry over from the parent if it is unchanged: `Ok`. Otherwise `Err` with what the
    /// parent has under this name.
    fn known(
        &mut self,
        meta: &Meta,
        fs: u32,
        changed_by: ChangedBy,
    ) -> Result<std::result::Result<(), Option<Found>>> {
        let Some(parent) = &mut self.parent else {
            return Ok(Err(None));
        };
        let found = match parent.find(&self.key) {
            Ok(found) => found,
            Err(error) => {
                self.lose_parent(&error);
                return Ok(Err(None));
            }
        };
        let Some(found) = found else {
            return Ok(Err(None));
        };
        if !parent.is_unchanged(&found, meta, fs, changed_by) {
            return Ok(Err(Some(found)));
        }
        if parent.is_given_up(&found) {
            return Ok(Err(Some(found.give_up())));
        }
        let mut extents = Vec::new();
        if found.node().is_some_and(|node| node.content == Content::Extents) {
            loop {
                match parent.next_extent() {
                    Ok(Some(extent)) if extent.is_usable() => extents.push(extent),
                    Ok(None) => break,
                    Ok(Some(_)) => return Ok(Err(None)),
                    Err(error) => {
                        self.lose_parent(&error);
                        return Ok(Err(None));
                    }
                }
            }
        }
        self.monitor.advance(1, found.node().map_or(0, |node| node.size));
        if meta.kind == Kind::File {
            self.summary.files_unmodified += 1;
        }
        self.sink.unchanged(&found)?;
        extents.iter().try_for_each(|extent| self.sink.unchanged(extent))?;
        Ok(Ok(()))
    }

    /// Goes on without the parent from here: its tree is damaged.
    fn lose_parent(&mut self, error: &Error) {
        let why = chunkstore::error::chain(error);
        let message = format!(
            "from here on all is read anew, since the parent snapshot cannot be read: {why}"
        );
        self.warn(message, Concern::Detail);
        self.parent = None;
    }

    /// Adds a folder's own entry and descends into it.
    fn folder(&mut self, dir: Dir, meta: &Meta) -> Result<()> {
        let root_dev = self.frames.first().map_or(meta.dev, |root| root.dev);
        let (fs, changed_by) = self.file_system(&dir, meta.dev);
        if self.known(meta, fs, changed_by)?.is_err() {
            let path = path(&self.key);
            let xattrs = file::keep_xattrs(self.monitor, &path, dir.own_xattrs());
            let node = file::node(meta, fs, xattrs, Content::None);
            self.monitor.advance(1, 0);
            self.sink.entry(Entry { key: self.key.clone(), body: Body::Node(node) })?;
        }
        if self.request.skip == Some((meta.dev, meta.ino)) {
            let message = "the content of the repository itself is left out".to_owned();
            self.warn(message, Concern::Detail);
            return Ok(());
        }
        let other_fs = self.request.one_file_system && meta.dev != root_dev;
        if other_fs || (self.request.exclude_caches && is_cache(&dir)) {
            return Ok(());
        }
        let listing =
            match Listing::read(&dir, self.request.resources.listing_bytes(), &self.scratch) {
                Ok(listing) => listing,
                Err(error) => {
                    self.unless_gone(self.frames.is_empty(), &error)?;
                    self.warn(format!("its content cannot be listed: {error}"), Concern::Missing);
                    return Ok(());
                }
            };
        if let Some(far) = self.frames.len().checked_sub(OPEN_DIRS_MAX) {
            self.frames[far].dir = None;
        }
        let (dev, ino, key_len) = (meta.dev, meta.ino, self.key.len());
        self.frames.push(Frame { dir: Some(dir), dev, ino, listing, key_len, fs, changed_by });
        Ok(())
    }

    fn unreadable_folder(&mut self, meta: &Meta, error: &io::Error) -> Result<()> {
        if error.kind() == io::ErrorKind::NotFound {
            self.warn("vanished before it could be read".to_owned(), Concern::Vanished);
            return Ok(());
        }
        self.unless_gone(false, error)?;
        self.warn(format!("the folder cannot be opened: {error}"), Concern::Missing);
        let fs = self.file_systems.get(&meta.dev).map_or(0, |(number, _)| *number);
        let node = file::node(meta, fs, Vec::new(), Content::None);
        self.sink.entry(Entry { key: self.key.clone(), body: Body::Node(node) })
    }

    /// Leaves a folder, opening the one above again if it was closed.
    fn leave(&mut self) -> Result<()> {
        let Some(left) = self.frames.pop() else {
            return Ok(());
        };
        let (Some(above), Some(dir)) = (self.frames.last_mut(), &left.dir) else {
            return Ok(());
        };
        if above.dir.is_none() {
            let reopened = dir.reopen_parent(above.dev, above.ino).map_err(|error| {
                let below = path(&self.key[..left.key_len.min(self.key.len())]);
                let below = crate::monitor::display_path(&below);
                Error::new(
                    ErrorKind::Store,
                    format!("cannot go back up from '{below}', which was moved meanwhile: {error}"),
                )
            })?;
            above.dir = Some(reopened);
        }
        Ok(())
    }

    /// Number of the file system with device `dev`, and how to tell changes there.
    fn file_system(&mut self, dir: &Dir, dev: u64) -> (u32, ChangedBy) {
        if let Some(frame) = self.frames.last()
            && frame.dev == dev
        {
            return (frame.fs, frame.changed_by);
        }
        let next = self.file_systems.len() as u32;
        *self.file_systems.entry(dev).or_insert_with(|| {
            let by_traits = || {
                FsTraits::of(dir)
                    .map_or(ChangedBy::Mtime, |traits| ChangedBy::for_file_system(&traits))
            };
            (next, self.request.changed_by.unwrap_or_else(by_traits))
        })
    }

    /// Ends the walk if `error` is of the root itself, or means that all below the root is gone. A single
    /// file that another client removed, or a dead mount further down, cost no more than themselves.
    fn unless_gone(&self, is_root: bool, error: &io::Error) -> Result<()> {
        let may_be_gone = [Errno::STALE, Errno::NOTCONN, Errno::NODEV]
            .iter()
            .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()));
        if is_root || (may_be_gone && self.root.stat().is_err()) {
            return Err(unreadable_root(error));
        }
        Ok(())
    }

    fn warn(&self, message: String, concern: Concern) {
        self.monitor.warning(Warning { path: path(&self.key), message, concern });
    }
}

fn unreadable_root(error: &io::Error) -> Error {
    Error::new(ErrorKind::Invalid, format!("cannot read the folder to save: {error}"))
}

pub(super) fn path(key: &[u8]) -> Vec<u8> {
    key.iter().map(|byte| if *byte == 0 { b'/' } else { *byte }).collect()
}

fn is_cache(dir: &Dir) -> bool {
    use std::io::Read;
    let Ok((tag, _)) = dir.open_file(b"CACHEDIR.TAG") else {
        return false;
    };
    let mut start = Vec::new();
    let read = tag.take(CACHE_TAG.len() as u64).read_to_end(&mut start);
    read.is_ok() && start == CACHE_TAG
}

/// Only counts.
#[derive(Default)]
struct CountOnly {
    summary: Summary,
}

impl Sink for CountOnly {
    fn entry(&mut self, entry: Entry) -> Result<()> {
        count(&mut self.summary, &entry);
        Ok(())
    }

    fn unchanged(&mut self, found: &Found) -> Result<()> {
        count(&mut self.summary, found.entry());
        Ok(())
    }

    fn file(&mut self, file: NewFile) -> Result<()> {
        self.summary.files += 1;
        let summary = &mut self.summary;
        summary.bytes = summary.bytes.saturating_add(file.meta.size);
        summary.bytes_read = summary.bytes_read.saturating_add(file.meta.size);
        Ok(())
    }

    fn make_room(&mut self) -> Result<()> {
        Ok(())
    }
}
