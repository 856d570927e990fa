//! Hands files to the workers, cuts large ones itself, and puts what comes back in its place.
//!
//! The only producer of jobs and the only consumer of results: it never waits for a worker while holding
//! what the worker needs.

use std::sync::atomic::Ordering;
use std::time::Duration;

use chunkstore::limits::SMALL_FILE_BYTES;
use chunkstore::tree::{Body, Content, End, Entry, TreeBuilder, end_key};
use chunkstore::{Error, Result};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::Resources;
use super::assemble::{Assembler, Link, LinkKey, Tree, UnreadLink};
use super::bundle::BundlePlanner;
use super::bundle_use::BundleUse;
use super::large::{Block, BlockReader, Blocks, LargeFile};
use super::parent::Found;
use super::read::{self, FileToRead, LARGE_FILE_BYTES, Read, Unread, is_shorter};
use super::walk::{NewFile, Sink, path};
use super::worker::{self, Done, Job, Shared, worker_died};
use crate::fs::Dir;

/// How often waits look whether the backup is cancelled.
const CANCEL_CHECK: Duration = Duration::from_millis(200);

/// What is saved.
pub(super) struct Source {
    pub(super) root: Dir,
    /// Folders held open for the files of one bundle.
    pub(super) bundle_dirs: usize,
}

/// Who does the work: where jobs go, where results come from, and what all share.
pub(super) struct Workers<'a> {
    pub(super) jobs: Sender<Job>,
    pub(super) done: Receiver<Done>,
    pub(super) shared: &'a Shared<'a>,
}

/// Hands files to the workers and puts what comes back in its place.
pub(super) struct Pipeline<'a> {
    assembler: Assembler<'a>,
    /// The folder that is saved.
    root: Dir,
    bundle: BundlePlanner,
    /// The folder of the file last put into the bundle, to count folders.
    bundle_dir: Option<Vec<u8>>,
    jobs: Sender<Job>,
    done: Receiver<Done>,
    /// Jobs whose result has not come yet.
    outstanding: usize,
    blocks: Blocks,
    large: LargeFile,
    shared: &'a Shared<'a>,
}

impl Sink for Pipeline<'_> {
    fn entry(&mut self, entry: Entry) -> Result<()> {
        self.assembler.push(entry);
        Ok(())
    }

    fn unchanged(&mut self, found: &Found) -> Result<()> {
        self.assembler.push_unchanged(&found.leaf, found.at);
        Ok(())
    }

    fn file(&mut self, file: NewFile) -> Result<Option<Unread>> {
        self.shared.monitor.advance(1, 0);
        let NewFile { key, path, dir, name, meta, fs, changed_by, known } = file;
        let file = FileToRead { ticket: 0, dir, name, path, fs, changed_by, known };
        if meta.size > LARGE_FILE_BYTES {
            return self.large_file(&key, &file);
        }
        let link = (meta.nlink > 1).then(|| LinkKey::of(&meta, fs));
        if let Some(link) = link.filter(|link| self.assembler.is_known_link(link)) {
            let (xattrs, state) =
                read::keep_xattrs(self.shared.monitor, &file.path, file.dir.xattrs(&file.name));
            let mut node = read::node(&meta, fs, xattrs, Content::None);
            node.state = state;
            self.assembler.push_link(Link { key, node, link, changed_by });
            return Ok(None);
        }
        let folder = &key[..key.len() - file.name.len()];
        let new_dir = self.bundle_dir.as_deref() != Some(folder);
        if new_dir {
            self.bundle_dir = Some(folder.to_vec());
        }
        let ticket = self.assembler.reserve(key, link);
        let file = FileToRead { ticket, ..file };
        if meta.size >= SMALL_FILE_BYTES {
            self.submit(Job::File(file))?;
            return Ok(None);
        }
        for bundle in self.bundle.push(file, meta.size, new_dir).into_iter().flatten() {
            self.submit(Job::Bundle(bundle))?;
        }
        Ok(None)
    }

    fn make_room(&mut self) -> Result<()> {
        while let Ok(done) = self.done.try_recv() {
            self.accept(done)?;
        }
        if self.assembler.is_full() {
            self.advance()?;
        }
        if self.assembler.is_full() {
            self.flush_bundle()?;
        }
        while self.assembler.is_full() && self.outstanding > 0 {
            self.wait()?;
            self.advance()?;
        }
        Ok(())
    }
}

impl<'a> Pipeline<'a> {
    pub(super) fn new(
        source: Source,
        builder: TreeBuilder<'a>,
        bundles: BundleUse,
        resources: &Resources,
        Workers { jobs, done, shared }: Workers<'a>,
    ) -> Self {
        Self {
            assembler: Assembler::new(builder, resources.queue_bytes(), bundles),
            root: source.root,
            bundle: BundlePlanner::new(shared.repository.keys().cut(), source.bundle_dirs),
            bundle_dir: None,
            jobs,
            done,
            outstanding: 0,
            blocks: Blocks::new(resources.block_bytes()),
            large: LargeFile::default(),
            shared,
        }
    }

    /// Moves what is complete into the tree.
    fn advance(&mut self) -> Result<()> {
        while let Some(link) = self.assembler.advance(false)? {
            self.read_link_target(link)?;
        }
        Ok(())
    }

    /// Reads a file whose first name could not be read: that says nothing of its other names.
    fn read_link_target(&mut self, unread: UnreadLink) -> Result<()> {
        let UnreadLink { ticket, key, fs, changed_by } = unread;
        let path = path(&key);
        let mut names: Vec<&[u8]> = key.split(|byte| *byte == 0).collect();
        let name = names.pop().unwrap_or_default().to_vec();
        let opened = names.iter().try_fold(self.root.clone(), |dir, name| dir.open_dir(name));
        let dir = match opened {
            Ok(dir) => dir,
            Err(error) => {
                let file = FileToRead {
                    ticket,
                    dir: self.root.clone(),
                    name,
                    path,
                    fs,
                    changed_by,
                    known: None,
                };
                let why = Unread::of("its folder cannot be opened", &error)?;
                let body = read::unread(self.shared.monitor, &file, why);
                self.assembler.resolve(ticket, body);
                return Ok(());
            }
        };
        let file = FileToRead { ticket, dir, name, path, fs, changed_by, known: None };
        self.submit(Job::Bundle(vec![file]))
    }

    fn flush_bundle(&mut self) -> Result<()> {
        self.bundle_dir = None;
        match self.bundle.take() {
            Some(bundle) => self.submit(Job::Bundle(bundle)),
            None => Ok(()),
        }
    }

    /// Gives a job to the workers, taking results while they are busy.
    fn submit(&mut self, mut job: Job) -> Result<()> {
        loop {
            use crossbeam_channel::TrySendError;
            match self.jobs.try_send(job) {
                Ok(()) => {
                    self.outstanding += 1;
                    return Ok(());
                }
                Err(TrySendError::Full(back)) => job = back,
                Err(TrySendError::Disconnected(_)) => return Err(worker_died()),
            }
            self.wait()?;
        }
    }

    /// Waits for one result.
    fn wait(&mut self) -> Result<()> {
        loop {
            match self.done.recv_timeout(CANCEL_CHECK) {
                Ok(done) => return self.accept(done),
                Err(RecvTimeoutError::Timeout) => self.check_cancelled()?,
                Err(RecvTimeoutError::Disconnected) => return Err(worker_died()),
            }
        }
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.shared.monitor.is_cancelled() { Err(Error::cancelled()) } else { Ok(()) }
    }

    fn accept(&mut self, done: Done) -> Result<()> {
        self.outstanding -= 1;
        match done {
            Done::Files(files) => {
                for (ticket, body) in files {
                    self.assembler.resolve(ticket, body);
                }
            }
            Done::Chunk { number, blob } => self.large.resolve(number, blob),
            Done::Failed(error) => return Err(error),
        }
        Ok(())
    }

    /// Reads and cuts a large file here, and lets the workers do the rest. Its entry is made when the
    /// first of it has been read; how the reading ends is told behind its extents.
    fn large_file(&mut self, key: &[u8], file: &FileToRead) -> Result<Option<Unread>> {
        // What waits in the bundle would hold up the queue for as long as this file takes.
        self.flush_bundle()?;
        let monitor = self.shared.monitor;
        monitor.begin(&file.path);
        let (open, mut node) = match read::open(monitor, file)? {
            Ok(opened) => opened,
            Err(why) => return Ok(Some(why)),
        };
        node.content = Content::Extents;
        self.large = LargeFile::new(key);
        let mut is_begun = false;
        let mut read = Read { wanted: node.size, to: node.size, failure: None };
        for (offset, len) in read::ranges(&open, node.size) {
            let mut reader = BlockReader::new(offset, len);
            while !reader.is_done() {
                self.check_cancelled()?;
                let block = self.free_block()?;
                let before = reader.read_to();
                let cut = reader.next(block, &open, self.shared.repository.chunker());
                if !is_begun {
                    let failure = reader.failure();
                    if let Some(why) = worker::given_up_for(file, reader.read_to(), failure) {
                        return Ok(Some(why));
                    }
                    let body = Body::Node(node.clone());
                    self.assembler.push(Entry { key: key.to_vec(), body });
                    is_begun = true;
                }
                let bytes = reader.read_to() - before;
                self.shared.counters.bytes_read.fetch_add(bytes, Ordering::Relaxed);
                for (offset, from, to) in cut.chunks {
                    let number = self.large.expect(offset);
                    let block = cut.block.clone();
                    self.submit(Job::Chunk { block, from, to, number })?;
                }
                self.push_extents(false)?;
            }
            let to = reader.read_to();
            read.failure = reader.into_failure();
            if read.failure.is_some() || (to < offset + len && is_shorter(&open, node.size)) {
                read.to = to;
                break;
            }
        }
        if !is_begun {
            let body = Body::Node(node.clone());
            self.assembler.push(Entry { key: key.to_vec(), body });
        }
        while !self.large.is_complete() {
            self.wait()?;
            self.push_extents(false)?;
        }
        self.push_extents(true)?;
        let (size, state) = read.settle(monitor, file, &open, &node);
        if (size, state) != (node.size, node.state) {
            let body = Body::End(End { size, state });
            self.assembler.push(Entry { key: end_key(key), body });
        }
        Ok(None)
    }

    fn free_block(&mut self) -> Result<Block> {
        loop {
            let free = self.blocks.free().clone();
            crossbeam_channel::select! {
                recv(free) -> bytes => {
                    return Ok(self.blocks.block(bytes.map_err(|_| worker_died())?));
                }
                recv(self.done) -> done => {
                    let done = done.map_err(|_| worker_died())?;
                    self.accept(done)?;
                }
                default(CANCEL_CHECK) => self.check_cancelled()?,
            }
        }
    }

    fn push_extents(&mut self, last: bool) -> Result<()> {
        while let Some(extent) = self.large.next_extent(last) {
            self.assembler.push(extent);
        }
        self.make_room()
    }

    /// Finishes what is left; the root of the tree, its height, and counts.
    pub(super) fn finish(mut self) -> Result<Tree> {
        self.flush_bundle()?;
        loop {
            while self.outstanding > 0 {
                self.wait()?;
                if self.assembler.is_full() {
                    self.advance()?;
                }
            }
            match self.assembler.advance(true)? {
                Some(link) => self.read_link_target(link)?,
                None if self.outstanding == 0 => return self.assembler.finish(),
                None => {}
            }
        }
    }
}
