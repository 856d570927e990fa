//! Hands files to the workers, cuts large ones itself, and puts what comes back in its place.
//!
//! The only producer of jobs and the only consumer of results: it never waits for a worker while holding
//! what the worker needs.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;

use chunkstore::limits::{EXTENT_SPAN_BYTES, SMALL_FILE_BYTES};
use chunkstore::tree::{BlobRef, Body, Chunk, Content, Entry, TreeBuilder, extent_key};
use chunkstore::{Error, ErrorKind, Result};
use crossbeam_channel::{Receiver, Sender};

use super::Resources;
use super::assemble::{Assembler, Tree};
use super::file::{
    self, BlockReader, Blocks, BundlePlanner, Done, FileToRead, Job, LARGE_FILE_BYTES, Opened,
    Shared,
};
use super::parent::Found;
use super::scan::{NewFile, Sink, path};
use super::sparse::BundleUse;
use crate::monitor::{Concern, Warning};

/// Hands files to the workers and puts what comes back in its place.
pub(super) struct Pipeline<'a> {
    assembler: Assembler<'a>,
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

    fn file(&mut self, file: NewFile) -> Result<()> {
        self.shared.monitor.advance(1, 0);
        let NewFile { key, path, dir, name, meta, fs, known } = file;
        let linked = meta.nlink > 1 && meta.size <= LARGE_FILE_BYTES;
        if linked && self.assembler.is_known_link(fs, meta.ino) {
            let xattrs = file::keep_xattrs(self.shared.monitor, &path, dir.xattrs(&name));
            let node = file::node(&meta, fs, xattrs, Content::None);
            self.assembler.push_link(key, node);
            return Ok(());
        }
        if linked {
            self.assembler.expect_link(fs, meta.ino);
        }
        if meta.size > LARGE_FILE_BYTES {
            let file = FileToRead { ticket: 0, dir, name, path, fs, known };
            return self.large_file(&key, &file);
        }
        let folder_len = key.len() - name.len();
        let folder = &key[..folder_len];
        let new_dir = self.bundle_dir.as_deref() != Some(folder);
        if new_dir {
            self.bundle_dir = Some(folder.to_vec());
        }
        let ticket = self.assembler.reserve(key);
        let file = FileToRead { ticket, dir, name, path, fs, known };
        if meta.size >= SMALL_FILE_BYTES {
            return self.submit(Job::File(file));
        }
        for bundle in self.bundle.push(file, meta.size, new_dir).into_iter().flatten() {
            self.submit(Job::Bundle(bundle))?;
        }
        Ok(())
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
        builder: TreeBuilder<'a>,
        bundles: BundleUse,
        resources: &Resources,
        jobs: Sender<Job>,
        done: Receiver<Done>,
        shared: &'a Shared<'a>,
    ) -> Self {
        Self {
            assembler: Assembler::new(builder, resources.queue_bytes(), bundles),
            bundle: BundlePlanner::new(shared.repository.keys().cut()),
            bundle_dir: None,
            jobs,
            done,
            outstanding: 0,
            blocks: Blocks::new(resources.block_bytes()),
            large: LargeFile::default(),
            shared,
        }
    }

    fn advance(&mut self) -> Result<()> {
        self.assembler.advance(false)?;
        for key in self.assembler.take_unread_links() {
            let message = "another name of this file could not be read".to_owned();
            let warning = Warning { path: path(&key), message, concern: Concern::Missing };
            self.shared.monitor.warning(warning);
        }
        Ok(())
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
        let done = self.done.recv().map_err(|_| worker_died())?;
        self.accept(done)
    }

    fn accept(&mut self, done: Done) -> Result<()> {
        self.outstanding -= 1;
        match done {
            Done::Files(files) => {
                for (ticket, node) in files {
                    self.assembler.resolve(ticket, node);
                }
            }
            Done::Chunk { number, blob } => self.large.resolve(number, blob),
            Done::Failed(error) => return Err(error),
        }
        Ok(())
    }

    /// Reads and cuts a large file here, and lets the workers do the rest.
    fn large_file(&mut self, key: &[u8], file: &FileToRead) -> Result<()> {
        // What waits in the bundle would hold up the queue for as long as this file takes.
        self.flush_bundle()?;
        let monitor = self.shared.monitor;
        monitor.begin(&file.path);
        let Opened::Open(open, mut node) = file::open(monitor, file) else {
            return Ok(());
        };
        let ranges = file::ranges(&open, &node);
        node.content = Content::Extents;
        let body = Body::Node(node.clone());
        self.assembler.push(Entry { key: key.to_vec(), body });
        self.large = LargeFile { key: key.to_vec(), ..LargeFile::default() };
        let mut read = node.size;
        for (offset, len) in ranges {
            let mut reader = BlockReader::new(offset, len);
            if let Err(error) = self.cut_range(&open, &mut reader)? {
                let message = format!("cannot be read from byte {} on: {error}", reader.read_to());
                monitor.warning(Warning {
                    path: file.path.clone(),
                    message,
                    concern: Concern::Missing,
                });
                break;
            }
            if reader.read_to() < offset + len && file::is_shorter(&open, node.size) {
                read = reader.read_to();
                break;
            }
        }
        while !self.large.is_complete() {
            self.wait()?;
            self.push_extents(false)?;
        }
        self.push_extents(true)?;
        file::note_changes(monitor, &file.path, &open, &mut node, read);
        Ok(())
    }

    /// Hands out the chunks of one range. The inner result is that of reading.
    fn cut_range(&mut self, open: &File, reader: &mut BlockReader) -> Result<io::Result<()>> {
        let chunker = self.shared.repository.chunker();
        while !reader.is_done() {
            if self.shared.monitor.is_cancelled() {
                return Err(Error::cancelled());
            }
            let bytes = self.free_block()?;
            let before = reader.read_to();
            let cut = match reader.next(&self.blocks, bytes, open, chunker) {
                Ok(cut) => cut,
                Err(error) => return Ok(Err(error)),
            };
            let read = reader.read_to() - before;
            let counters = &self.shared.counters;
            counters.bytes_read.fetch_add(read, Ordering::Relaxed);
            for (offset, from, to) in cut.chunks {
                let number = self.large.expect(offset);
                let block = cut.block.clone();
                self.submit(Job::Chunk { block, from, to, number })?;
            }
            self.push_extents(false)?;
        }
        Ok(Ok(()))
    }

    fn free_block(&mut self) -> Result<Vec<u8>> {
        loop {
            let free = self.blocks.free().clone();
            crossbeam_channel::select! {
                recv(free) -> bytes => return bytes.map_err(|_| worker_died()),
                recv(self.done) -> done => {
                    let done = done.map_err(|_| worker_died())?;
                    self.accept(done)?;
                }
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
        while self.outstanding > 0 {
            self.wait()?;
            if self.assembler.is_full() {
                self.advance()?;
            }
        }
        self.advance()?;
        self.assembler.finish()
    }
}

/// The large file being cut: its chunks on the way, and the extent entry being filled.
#[derive(Default)]
struct LargeFile {
    key: Vec<u8>,
    /// Number of the first chunk in `pending`.
    first: u64,
    /// Offsets of chunks in order, and what is known of each: its blob, or that it is zero.
    pending: VecDeque<(u64, Option<Option<BlobRef>>)>,
    extent: Vec<Chunk>,
}

impl LargeFile {
    /// Expects a chunk at `offset`; returns its number.
    fn expect(&mut self, offset: u64) -> u64 {
        self.pending.push_back((offset, None));
        self.first + self.pending.len() as u64 - 1
    }

    fn resolve(&mut self, number: u64, blob: Option<BlobRef>) {
        self.pending[(number - self.first) as usize].1 = Some(blob);
    }

    fn is_complete(&self) -> bool {
        self.pending.iter().all(|(_, known)| known.is_some())
    }

    /// The next extent entry, if its chunks are known; at the `last` call also an unfinished one.
    fn next_extent(&mut self, last: bool) -> Option<Entry> {
        let grid = |offset: u64| offset / EXTENT_SPAN_BYTES;
        while let Some((offset, Some(blob))) = self.pending.front().copied() {
            let ends = self.extent.first().is_some_and(|first| grid(first.offset) != grid(offset));
            if ends {
                return self.take_extent();
            }
            self.pending.pop_front();
            self.first += 1;
            self.extent.extend(blob.map(|blob| Chunk { offset, blob }));
        }
        if last { self.take_extent() } else { None }
    }

    fn take_extent(&mut self) -> Option<Entry> {
        let first = self.extent.first()?.offset;
        let key = extent_key(&self.key, first);
        Some(Entry { key, body: Body::Extent(std::mem::take(&mut self.extent)) })
    }
}

fn worker_died() -> Error {
    Error::new(ErrorKind::Store, "a worker thread ended unexpectedly")
}
