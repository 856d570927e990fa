//! Walks the folder in path order, compares it with the parent, and hands out what is to be read.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;

use chunkstore::id::SnapshotId;
use chunkstore::limits::KEY_BYTES_MAX;
use chunkstore::record::{Snapshot, Summary};
use chunkstore::repository::Repository;
use chunkstore::tree::{Absence, Body, Content, Entry, Kind, State, TreeBuilder};
use chunkstore::writer::Writer;
use chunkstore::{Error, ErrorKind, Result};
use rustix::io::Errno;

use super::Request;
use super::assemble::{Tree, count};
use super::bundle_use::BundleUse;
use super::parent::{ChangedBy, Extents, Found, Parent};
use super::pipeline::{Pipeline, Source, Workers};
use super::read::{self, Known, Unread, check_open_files};
use super::settings::OpenDirs;
use super::worker::{self, ReadCounters, Shared};
use crate::fs::{Dir, FsTraits, Listing, Meta, is_scratch_failure};
use crate::monitor::{Concern, Monitor, Warning};
use crate::restore::is_leftover;

/// The file that marks a cache, and how it begins (<https://bford.info/cachedir/>).
const CACHE_TAG_NAME: &[u8] = b"CACHEDIR.TAG";
const CACHE_TAG: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";

/// Saves everything below `root`.
pub(super) fn scan(
    repository: &Repository,
    writer: &Writer,
    request: &Request<'_>,
    root: Dir,
    parent: Option<(SnapshotId, Snapshot)>,
    open_dirs: OpenDirs,
    monitor: &dyn Monitor,
) -> Result<Tree> {
    let parent = open_parent(repository, Some(writer), parent, monitor);
    let shared = Shared {
        repository,
        writer,
        monitor,
        counters: ReadCounters::default(),
        compression: request.compression,
    };
    let workers = open_dirs.workers;
    let (jobs, todo) = crossbeam_channel::bounded(2 * workers);
    let (finished, done) = crossbeam_channel::unbounded();
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let (todo, finished, shared) = (todo.clone(), finished.clone(), &shared);
            scope.spawn(move || worker::work(shared, &todo, &finished));
        }
        drop((todo, finished));
        let builder = TreeBuilder::new(writer, repository.keys().cut());
        let bundles = BundleUse::new(request.now.as_nanosecond() as u64);
        let source = Source { root: root.clone(), bundle_dirs: open_dirs.bundle };
        let workers = Workers { jobs, done, shared: &shared };
        let sink = Pipeline::new(source, builder, bundles, &request.resources, workers);
        let (sink, summary) = Walk::new(request, root, open_dirs, monitor, parent, sink).run()?;
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
    open_dirs: OpenDirs,
    monitor: &dyn Monitor,
) -> Result<Summary> {
    let parent = open_parent(repository, None, parent, monitor);
    let sink = CountOnly::default();
    let (sink, summary) = Walk::new(request, root, open_dirs, monitor, parent, sink).run()?;
    Ok(merge(summary, sink.summary))
}

/// The parent's tree. One that cannot be read costs reading everything again, not the backup.
fn open_parent<'a>(
    repository: &'a Repository,
    writer: Option<&'a Writer>,
    parent: Option<(SnapshotId, Snapshot)>,
    monitor: &dyn Monitor,
) -> Option<Parent<'a>> {
    let (_, snapshot) = parent?;
    let warn = |error: Error| {
        let why = chunkstore::error::chain(&error);
        let message = format!("the parent snapshot cannot be read, so all is read anew: {why}");
        monitor.warning(Warning { path: Vec::new(), message, concern: Concern::Detail });
    };
    Parent::open(repository, writer, &snapshot).map_err(warn).ok()
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
    /// A file to be read. Returns why a large one was not; small ones are seen to when they are read.
    fn file(&mut self, file: NewFile) -> Result<Option<Unread>>;
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
    pub(super) changed_by: ChangedBy,
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
    open_dirs: OpenDirs,
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
        open_dirs: OpenDirs,
        monitor: &'a dyn Monitor,
        parent: Option<Parent<'a>>,
        sink: S,
    ) -> Self {
        Self {
            request,
            root,
            monitor,
            parent,
            sink,
            open_dirs,
            frames: Vec::new(),
            key: Vec::new(),
            file_systems: HashMap::new(),
            scratch: request.scratch.clone(),
            summary: Summary::default(),
        }
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
            // They were read already, and wait on our own disk.
            Err(error) => {
                let path = self.request.scratch.display();
                let message = format!("cannot read names back from a file in '{path}': {error}");
                return Err(Error::new(ErrorKind::Store, message));
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
            Err(error) => self.unreadable(format!("cannot be read: {error}"), &error),
        }
    }

    /// Handles an entry by its kind.
    fn found(&mut self, dir: &Dir, name: Vec<u8>, meta: &Meta) -> Result<()> {
        // What a killed restore left behind is nobody's; the next restore removes it.
        if is_leftover(&name) {
            return Ok(());
        }
        if let Some(excludes) = self.request.excludes
            && excludes(&path(&self.key), meta.kind == Kind::Dir)
        {
            return self.absent(Absence::Excluded);
        }
        // An extent's key is ten bytes longer than its file's.
        if self.key.len() > KEY_BYTES_MAX - 10 {
            let message = "its path is longer than 256 KiB, which the format cannot hold";
            self.warn(message.to_owned(), Concern::Missing);
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
        let known = self.known(meta, State::Whole, fs, changed_by)?;
        let Err(found) = known else {
            return Ok(());
        };
        if meta.kind == Kind::File {
            self.summary.files_changed += 1;
            let known = found.as_ref().and_then(Found::known_file);
            let file = NewFile {
                key: self.key.clone(),
                path: path(&self.key),
                dir: dir.clone(),
                name,
                meta: *meta,
                fs,
                changed_by,
                known,
            };
            return match self.sink.file(file)? {
                Some(why) => self.unread(why, found, fs),
                None => Ok(()),
            };
        }
        let path = path(&self.key);
        let (xattrs, state) = read::keep_xattrs(self.monitor, &path, dir.xattrs(&name));
        let mut node = read::node(meta, fs, xattrs, Content::None);
        node.state = state;
        if meta.kind == Kind::Symlink {
            match dir.read_link(&name) {
                Ok(target) => {
                    node.size = target.len() as u64;
                    node.content = Content::Inline(target);
                }
                Err(error) => {
                    return self.unreadable(format!("the link cannot be read: {error}"), &error);
                }
            }
        }
        self.monitor.advance(1, 0);
        self.sink.entry(Entry { key: self.key.clone(), body: Body::Node(node) })
    }

    /// Notes that something cannot be read, or is gone.
    fn unreadable(&mut self, message: String, error: &io::Error) -> Result<()> {
        if error.kind() == io::ErrorKind::NotFound {
            self.warn("vanished before it could be read".to_owned(), Concern::Vanished);
            return Ok(());
        }
        self.unless_gone(false, error)?;
        self.warn(message, Concern::Missing);
        self.absent(Absence::Unreadable)
    }

    /// Notes a name of which nothing is saved.
    fn absent(&mut self, why: Absence) -> Result<()> {
        self.sink.make_room()?;
        let body = Body::Absent(why);
        let found = match self.parent.as_mut().map(|parent| parent.find(&self.key)) {
            Some(Ok(found)) => found.filter(|found| found.entry().body == body),
            Some(Err(error)) => {
                self.lose_parent(&error);
                None
            }
            None => None,
        };
        match found {
            Some(found) => self.sink.unchanged(&found),
            None => self.sink.entry(Entry { key: self.key.clone(), body }),
        }
    }

    /// Saves what the parent has of a large file that was not read, or that it was there.
    fn unread(&mut self, why: Unread, found: Option<Found>, fs: u32) -> Result<()> {
        let message = match why {
            Unread::Vanished => {
                self.warn("vanished before it could be read".to_owned(), Concern::Vanished);
                return Ok(());
            }
            Unread::Unreadable(message) => message,
        };
        let found = found.filter(Found::is_large_file);
        let extents = found.is_some().then(|| self.extents()).transpose()?.flatten();
        if let (Some(found), Some(extents)) = (&found, extents.filter(|all| all.are_usable))
            && let Some(node) = found.node()
        {
            let message = format!("{message}; what the last snapshot has of it is kept");
            self.warn(message, Concern::Missing);
            let body = Body::Node(read::kept(node, fs));
            self.sink.entry(Entry { key: self.key.clone(), body })?;
            return self.take_extents_over(&extents);
        }
        self.warn(message, Concern::Missing);
        self.sink.entry(Entry { key: self.key.clone(), body: Body::Absent(Absence::Unreadable) })
    }

    /// What follows the large file just found in the parent; nothing if that cannot be read.
    fn extents(&mut self) -> Result<Option<Extents>> {
        match self.parent.as_mut().map(Parent::extents) {
            Some(Ok(extents)) => Ok(Some(extents)),
            Some(Err(error)) => {
                self.lose_parent(&error);
                Ok(None)
            }
            None => Ok(None),
        }
    }

    /// Takes over what follows a large file whose own entry has been added.
    fn take_extents_over(&mut self, extents: &Extents) -> Result<()> {
        if let Some(all) = extents.all() {
            return all.iter().try_for_each(|extent| self.sink.unchanged(extent));
        }
        let Some(parent) = &self.parent else {
            return Err(Error::invalid("the parent snapshot was lost while a file was taken over"));
        };
        let sink = &mut self.sink;
        parent.for_each_extent(&self.key, &mut |extent| {
            sink.make_room()?;
            sink.unchanged(extent)
        })
    }

    /// Takes an entry over from the parent if it is unchanged, and in this state there: `Ok`. Otherwise
    /// `Err` with what the parent has under this name.
    fn known(
        &mut self,
        meta: &Meta,
        state: State,
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
        if !parent.is_unchanged(&found, meta, state, fs, changed_by) {
            return Ok(Err(Some(found)));
        }
        if parent.is_given_up(&found) {
            return Ok(Err(Some(found.give_up())));
        }
        let mut extents = None;
        if found.is_large_file() {
            extents = self.extents()?;
            if !extents.as_ref().is_some_and(|all| all.are_usable && all.are_whole) {
                return Ok(Err(None));
            }
        }
        self.monitor.advance(1, found.node().map_or(0, |node| node.size));
        if meta.kind == Kind::File {
            self.summary.files_unmodified += 1;
        }
        self.sink.unchanged(&found)?;
        if let Some(extents) = extents {
            self.take_extents_over(&extents)?;
        }
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

    /// Adds a folder's own entry and descends into it. What it is not looked into for is part of the
    /// entry, so its names are read first.
    fn folder(&mut self, dir: Dir, meta: &Meta) -> Result<()> {
        let is_root = self.frames.is_empty();
        let root_dev = self.frames.first().map_or(meta.dev, |root| root.dev);
        let (fs, changed_by) = self.file_system(&dir, meta.dev);
        let (state, listing) = if self.request.skip == Some((meta.dev, meta.ino)) {
            let message = "the content of the repository itself is left out".to_owned();
            self.warn(message, Concern::Detail);
            (State::Repository, None)
        } else if self.request.one_file_system && meta.dev != root_dev {
            (State::OtherFileSystem, None)
        } else if self.request.exclude_caches && self.is_cache(&dir, is_root) {
            (State::Cache, Some(Listing::only(CACHE_TAG_NAME)))
        } else {
            match Listing::read(&dir, self.request.resources.listing_bytes(), &self.scratch) {
                Ok(listing) => (State::Whole, Some(listing)),
                Err(error) if is_scratch_failure(&error) => {
                    let at = self.request.scratch.display();
                    let message = format!(
                        "cannot keep the names of a large folder in '{at}': {error}: set TMPDIR to a \
                         folder on a disk that has room"
                    );
                    return Err(Error::new(ErrorKind::Invalid, message));
                }
                Err(error) => {
                    check_open_files(&error)?;
                    self.unless_gone(is_root, &error)?;
                    let message = format!("its content cannot be listed: {error}");
                    self.warn(message, Concern::Missing);
                    (State::Cut, None)
                }
            }
        };
        if self.known(meta, state, fs, changed_by)?.is_err() {
            let path = path(&self.key);
            let (xattrs, read) = read::keep_xattrs(self.monitor, &path, dir.own_xattrs());
            let mut node = read::node(meta, fs, xattrs, Content::None);
            node.state = if state == State::Whole { read } else { state };
            self.monitor.advance(1, 0);
            self.sink.entry(Entry { key: self.key.clone(), body: Body::Node(node) })?;
        }
        let Some(listing) = listing else {
            return Ok(());
        };
        if let Some(far) = self.frames.len().checked_sub(self.open_dirs.descent) {
            self.frames[far].dir = None;
        }
        let (dev, ino, key_len) = (meta.dev, meta.ino, self.key.len());
        self.frames.push(Frame { dir: Some(dir), dev, ino, listing, key_len, fs, changed_by });
        Ok(())
    }

    /// Whether the folder is marked as a cache. What was asked for by name is saved all the same.
    fn is_cache(&self, dir: &Dir, is_root: bool) -> bool {
        let is_cache = is_cache(dir);
        if is_cache && is_root {
            let message =
                "the folder is marked as a cache, but saved, since it is what was asked for";
            self.warn(message.to_owned(), Concern::Detail);
        }
        is_cache && !is_root
    }

    fn unreadable_folder(&mut self, meta: &Meta, error: &io::Error) -> Result<()> {
        if error.kind() == io::ErrorKind::NotFound {
            self.warn("vanished before it could be read".to_owned(), Concern::Vanished);
            return Ok(());
        }
        check_open_files(error)?;
        self.unless_gone(false, error)?;
        self.warn(format!("the folder cannot be opened: {error}"), Concern::Missing);
        let fs = self.file_systems.get(&meta.dev).map_or(0, |(number, _)| *number);
        let mut node = read::node(meta, fs, Vec::new(), Content::None);
        node.state = State::Cut;
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
    let Ok((tag, _)) = dir.open_file(CACHE_TAG_NAME) else {
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

    fn file(&mut self, file: NewFile) -> Result<Option<Unread>> {
        // Nothing is read, but what cannot be opened is told.
        if let Err(error) = file.dir.open_file(&file.name) {
            return Unread::of("cannot be opened", &error).map(Some);
        }
        self.summary.files += 1;
        let summary = &mut self.summary;
        summary.bytes = summary.bytes.saturating_add(file.meta.size);
        summary.bytes_read = summary.bytes_read.saturating_add(file.meta.size);
        Ok(None)
    }

    fn make_room(&mut self) -> Result<()> {
        Ok(())
    }
}
