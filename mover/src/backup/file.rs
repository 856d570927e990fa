//! Reads files and turns them into content: inline bytes, parts of bundles, chunks, extents.
//!
//! Bundles are cut by names and sizes, which are known before anything is read: equal folders make
//! equal bundles, workers can read them independently, and a file whose content changes within its
//! size moves no cut.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use chunkstore::Result;
use chunkstore::chunker::Chunker;
use chunkstore::codec::compress::{Compressor, Level};
use chunkstore::limits::{
    BUNDLE_BYTES_MAX, BUNDLE_BYTES_MEAN, BUNDLE_BYTES_MIN, CHUNK_BYTES_MAX, INLINE_BYTES_MAX,
    SMALL_FILE_BYTES, XATTR_BYTES_MAX,
};
use chunkstore::pack::BlobKind;
use chunkstore::repository::Repository;
use chunkstore::tree::{BlobRef, Chunk, Content, Kind, Node, State, Xattrs};
use chunkstore::writer::Writer;
use crossbeam_channel::{Receiver, Sender};

use super::assemble::Ticket;
use crate::fs::{self, Dir, Meta, data_ranges, file_xattrs};
use crate::monitor::{Concern, Monitor, Warning};

/// Files above this are cut by the scan itself and their chunks spread over the workers.
pub(super) const LARGE_FILE_BYTES: u64 = 16 << 20;

/// A file to be read.
pub(super) struct FileToRead {
    pub(super) ticket: Ticket,
    pub(super) dir: Dir,
    pub(super) name: Vec<u8>,
    /// Its path, for messages.
    pub(super) path: Vec<u8>,
    pub(super) fs: u32,
    /// What the parent has of it.
    pub(super) known: Option<Known>,
}

/// A file that was to be opened.
pub(super) enum Opened {
    /// It is open; its entry, without content.
    Open(File, Node),
    /// It could not be opened, of which a warning was given; what is to be saved of it.
    Not(Option<Node>),
}

/// What the parent has of a small file, where that can be referred to again.
pub(super) enum Known {
    /// It may have changed: its part of a bundle, and its size.
    Part(Content, u64),
    /// It looks unchanged, but its bundle is given up, and so it is stored anew.
    GivenUp(Box<Node>),
}

/// Work for a worker.
pub(super) enum Job {
    /// Small files that make one bundle.
    Bundle(Vec<FileToRead>),
    /// A file of medium size.
    File(FileToRead),
    /// A chunk of a large file: where it lies in a block, and its number.
    Chunk { block: Arc<Block>, from: usize, to: usize, number: u64 },
}

/// What workers send back.
pub(super) enum Done {
    /// Files that were read; without node, there is nothing to save.
    Files(Vec<(Ticket, Option<Node>)>),
    /// A chunk of the large file being cut; without reference, it is all zero.
    Chunk { number: u64, blob: Option<BlobRef> },
    /// The job could not be done, and so the backup cannot.
    Failed(chunkstore::Error),
}

/// Counts kept by the workers.
#[derive(Default)]
pub(super) struct ReadCounters {
    pub(super) bytes_read: AtomicU64,
}

/// What all workers share.
pub(super) struct Shared<'a> {
    pub(super) repository: &'a Repository,
    pub(super) writer: &'a Writer,
    pub(super) monitor: &'a dyn Monitor,
    pub(super) counters: ReadCounters,
    pub(super) compression: Level,
}

/// Does jobs until there are no more.
pub(super) fn work(shared: &Shared<'_>, jobs: &Receiver<Job>, done: &Sender<Done>) {
    let mut worker =
        Worker { shared, compressor: Compressor::new(shared.compression), buffer: Vec::new() };
    for job in jobs {
        let result = worker.run(job).unwrap_or_else(Done::Failed);
        if done.send(result).is_err() {
            return;
        }
    }
}

struct Worker<'a> {
    shared: &'a Shared<'a>,
    compressor: Compressor,
    buffer: Vec<u8>,
}

/// A small file that was read: its entry, and where its bytes are in the bundle.
struct Member {
    ticket: Ticket,
    node: Option<Node>,
    place: Option<(u32, [u8; 16])>,
}

impl Worker<'_> {
    fn run(&mut self, job: Job) -> Result<Done> {
        match job {
            Job::Bundle(files) => self.bundle(files).map(Done::Files),
            Job::File(file) => {
                let ticket = file.ticket;
                Ok(Done::Files(vec![(ticket, self.medium_file(&file)?)]))
            }
            Job::Chunk { block, from, to, number } => {
                let bytes = &block.bytes[from..to];
                let blob = if is_zero(bytes) { None } else { Some(self.store(bytes)?) };
                self.shared.monitor.advance(0, bytes.len() as u64);
                Ok(Done::Chunk { number, blob })
            }
        }
    }

    fn store(&mut self, plain: &[u8]) -> Result<BlobRef> {
        self.shared.writer.store_data(&mut self.compressor, plain)
    }

    fn bundle(&mut self, files: Vec<FileToRead>) -> Result<Vec<(Ticket, Option<Node>)>> {
        let mut bundle = std::mem::take(&mut self.buffer);
        bundle.clear();
        let mut members = Vec::with_capacity(files.len());
        for file in &files {
            if self.shared.monitor.is_cancelled() {
                return Err(chunkstore::Error::cancelled());
            }
            members.push(self.member(file, &mut bundle)?);
        }
        let stored = if bundle.is_empty() { None } else { Some(self.store(&bundle)?) };
        self.buffer = bundle;
        let finished = members.into_iter().map(|Member { ticket, mut node, place }| {
            if let (Some(node), Some((offset, hash)), Some(bundle)) = (&mut node, place, stored) {
                node.content = Content::Part { bundle, offset, hash };
            }
            (ticket, node)
        });
        Ok(finished.collect())
    }

    /// Reads one small file, and appends it to the bundle unless it is inline or known.
    fn member(&mut self, file: &FileToRead, bundle: &mut Vec<u8>) -> Result<Member> {
        let ticket = file.ticket;
        let (open, mut node) = match self.open(file) {
            Opened::Open(open, node) => (open, node),
            Opened::Not(node) => return Ok(Member { ticket, node, place: None }),
        };
        let start = bundle.len();
        // It may have grown since it was listed; then it is cut like any larger file.
        if node.size >= SMALL_FILE_BYTES || start + node.size as usize > BUNDLE_BYTES_MAX {
            let node = self.cut(file, &open, node)?;
            return Ok(Member { ticket, node, place: None });
        }
        bundle.resize(start + node.size as usize, 0);
        let read = match read_full(&open, &mut bundle[start..], 0) {
            Ok(read) => read,
            Err(error) => {
                bundle.truncate(start);
                let message = format!("cannot be read: {error}");
                let node = unreadable(self.shared.monitor, file, message);
                return Ok(Member { ticket, node, place: None });
            }
        };
        bundle.truncate(start + read);
        self.finish_reading(file, &open, &mut node, read as u64);
        let bytes = &bundle[start..];
        let mut place = None;
        if bytes.len() <= INLINE_BYTES_MAX {
            if !bytes.is_empty() {
                node.content = Content::Inline(bytes.to_vec());
            }
            bundle.truncate(start);
        } else {
            let id = BlobKind::Data.id(self.shared.repository.keys(), bytes);
            let hash = *id.0.first_chunk().expect("32 is more than 16");
            match &file.known {
                Some(Known::Part(content @ Content::Part { hash: known, .. }, size))
                    if *known == hash && *size == node.size =>
                {
                    node.content = content.clone();
                    bundle.truncate(start);
                }
                known => {
                    if let Some(Known::GivenUp(known)) = known {
                        self.compare(file, known, &node, hash);
                    }
                    place = Some((start as u32, hash));
                }
            }
        }
        Ok(Member { ticket, node: Some(node), place })
    }

    /// Warns if a file that looks as it did has other bytes.
    fn compare(&self, file: &FileToRead, known: &Node, now: &Node, bytes: [u8; 16]) {
        if let Content::Part { hash, .. } = known.content
            && (known.size, known.mtime) == (now.size, now.mtime)
            && hash != bytes
        {
            let message = "has other bytes than the last snapshot has of it, though its \
                           modification time is the same: the disk may fail"
                .to_owned();
            let path = file.path.clone();
            self.shared.monitor.warning(Warning { path, message, concern: Concern::Detail });
        }
    }

    fn medium_file(&mut self, file: &FileToRead) -> Result<Option<Node>> {
        match self.open(file) {
            Opened::Open(open, node) => self.cut(file, &open, node),
            Opened::Not(node) => Ok(node),
        }
    }

    /// Reads a file chunk by chunk.
    fn cut(&mut self, file: &FileToRead, open: &File, mut node: Node) -> Result<Option<Node>> {
        let mut chunks = Vec::new();
        let mut end = 0;
        let chunker = self.shared.repository.chunker();
        let ranges = ranges(open, &node);
        let mut buffer = std::mem::take(&mut self.buffer);
        for (offset, len) in ranges {
            let mut window = Window::new(chunker, open, offset, len);
            loop {
                if self.shared.monitor.is_cancelled() {
                    return Err(chunkstore::Error::cancelled());
                }
                let (at, piece) = match window.next(&mut buffer) {
                    Ok(Some(piece)) => piece,
                    Ok(None) => break,
                    Err(error) => {
                        let message = format!("cannot be read: {error}");
                        return Ok(unreadable(self.shared.monitor, file, message));
                    }
                };
                let bytes = &buffer[piece];
                end = at + bytes.len() as u64;
                if !is_zero(bytes) {
                    let blob = self.shared.writer.store_data(&mut self.compressor, bytes)?;
                    chunks.push(Chunk { offset: at, blob });
                }
            }
        }
        self.buffer = buffer;
        let read = if node.size > end && is_shorter(open, node.size) { end } else { node.size };
        self.finish_reading(file, open, &mut node, read);
        if !chunks.is_empty() {
            node.content = Content::Chunks(chunks);
        }
        Ok(Some(node))
    }

    fn open(&self, file: &FileToRead) -> Opened {
        self.shared.monitor.begin(&file.path);
        open(self.shared.monitor, file)
    }

    /// Counts what was read, and tells if the file changed meanwhile.
    fn finish_reading(&self, file: &FileToRead, open: &File, node: &mut Node, read: u64) {
        note_changes(self.shared.monitor, &file.path, open, node, read);
        self.shared.counters.bytes_read.fetch_add(read, Ordering::Relaxed);
        self.shared.monitor.advance(0, read);
    }
}

/// Opens a file and reads its metadata.
pub(super) fn open(monitor: &dyn Monitor, file: &FileToRead) -> Opened {
    let (open, meta) = match file.dir.open_file(&file.name) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let message = "vanished before it could be read".to_owned();
            monitor.warning(Warning { path: file.path.clone(), message, concern: Concern::Detail });
            return Opened::Not(None);
        }
        Err(error) => {
            return Opened::Not(unreadable(monitor, file, format!("cannot be opened: {error}")));
        }
    };
    let xattrs = keep_xattrs(monitor, &file.path, file_xattrs(&open));
    let node = node(&meta, file.fs, xattrs, Content::None);
    Opened::Open(open, node)
}

/// What is to be saved of a file that cannot be read, of which `message` warns: nothing, unless the
/// parent has all of it.
fn unreadable(monitor: &dyn Monitor, file: &FileToRead, message: String) -> Option<Node> {
    let path = file.path.clone();
    match &file.known {
        Some(Known::GivenUp(node)) => {
            let message = format!("{message}; it is kept as the last snapshot has it");
            monitor.warning(Warning { path, message, concern: Concern::Detail });
            Some((**node).clone())
        }
        _ => {
            monitor.warning(Warning { path, message, concern: Concern::Missing });
            None
        }
    }
}

/// The entry of what `meta` describes.
pub(super) fn node(meta: &Meta, fs: u32, xattrs: Xattrs, content: Content) -> Node {
    let sized = matches!(meta.kind, Kind::File | Kind::Symlink);
    Node {
        kind: meta.kind,
        mode: meta.mode,
        uid: meta.uid,
        gid: meta.gid,
        size: if sized { meta.size } else { 0 },
        mtime: meta.mtime,
        ctime: meta.ctime,
        ino: meta.ino,
        fs,
        linked: meta.nlink > 1 && meta.kind != Kind::Dir,
        rdev: (meta.rdev_major, meta.rdev_minor),
        xattrs,
        state: State::Whole,
        content,
    }
}

/// The attributes that could be read; warns of the others.
pub(super) fn keep_xattrs(
    monitor: &dyn Monitor,
    path: &[u8],
    read: io::Result<fs::Xattrs>,
) -> Xattrs {
    let warn = |message| {
        monitor.warning(Warning { path: path.to_vec(), message, concern: Concern::Detail });
    };
    let mut xattrs = match read {
        Ok(xattrs) => xattrs,
        Err(error) => {
            warn(format!("its extended attributes cannot be read: {error}"));
            return Vec::new();
        }
    };
    for (name, error) in &xattrs.failures {
        let name = String::from_utf8_lossy(name);
        warn(format!("its extended attribute '{name}' cannot be read: {error}"));
    }
    let bytes = |entries: &Xattrs| -> usize {
        entries.iter().map(|(name, value)| name.len() + value.len()).sum()
    };
    if bytes(&xattrs.entries) > XATTR_BYTES_MAX {
        warn("its extended attributes exceed 4 MiB and are left out".to_owned());
        xattrs.entries.clear();
    }
    xattrs.entries
}

/// Warns if the file was changed while it was read, and corrects the size to what was read.
pub(super) fn note_changes(
    monitor: &dyn Monitor,
    path: &[u8],
    open: &File,
    node: &mut Node,
    read: u64,
) {
    let changed = match Meta::of_file(open) {
        Ok(now) => (now.size, now.mtime, now.ctime) != (node.size, node.mtime, node.ctime),
        Err(_) => true,
    };
    if changed || read != node.size {
        let message = "changed while it was read: saved as far as it was read".to_owned();
        monitor.warning(Warning { path: path.to_vec(), message, concern: Concern::Detail });
    }
    node.size = read;
}

/// Where the file has data.
pub(super) fn ranges(open: &File, node: &Node) -> Vec<(u64, u64)> {
    let sparse = Meta::of_file(open).is_ok_and(|meta| meta.blocks_512 * 512 < node.size);
    if sparse { data_ranges(open, node.size).collect() } else { vec![(0, node.size)] }
}

/// Whether the file has become shorter than `size`.
pub(super) fn is_shorter(open: &File, size: u64) -> bool {
    Meta::of_file(open).is_ok_and(|meta| meta.size < size)
}

/// Fills `buffer` from `offset` on; returns how much there was.
fn read_full(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Most data differs from zero at once; equal neighbours are compared as fast as memory is read.
    bytes.first() == Some(&0) && bytes[1..] == bytes[..bytes.len() - 1]
}

/// Cuts one range of a file, reading ahead in one buffer.
struct Window<'a> {
    chunker: &'a Chunker,
    file: &'a File,
    /// Where in the file the buffer's unread part ends, and where the range does.
    read_to: u64,
    end: u64,
    from: usize,
    to: usize,
}

impl<'a> Window<'a> {
    const BYTES: usize = 2 * CHUNK_BYTES_MAX;

    fn new(chunker: &'a Chunker, file: &'a File, offset: u64, len: u64) -> Self {
        Self { chunker, file, read_to: offset, end: offset + len, from: 0, to: 0 }
    }

    /// The next chunk: its offset in the file and its place in the buffer.
    fn next(&mut self, buffer: &mut Vec<u8>) -> io::Result<Option<(u64, std::ops::Range<usize>)>> {
        let lookahead = self.chunker.lookahead();
        if self.to - self.from < lookahead && self.read_to < self.end {
            buffer.resize(Self::BYTES.max(buffer.len()), 0);
            buffer.copy_within(self.from..self.to, 0);
            self.to -= self.from;
            self.from = 0;
            let room = (buffer.len() - self.to).min((self.end - self.read_to) as usize);
            let read = read_full(self.file, &mut buffer[self.to..self.to + room], self.read_to)?;
            self.to += read;
            self.read_to += read as u64;
            if read < room {
                self.end = self.read_to;
            }
        }
        if self.from == self.to {
            return Ok(None);
        }
        let len = self.chunker.cut(&buffer[self.from..self.to]);
        let offset = self.read_to - (self.to - self.from) as u64;
        let piece = self.from..self.from + len;
        self.from += len;
        Ok(Some((offset, piece)))
    }
}

/// A part of a large file, shared by the jobs of its chunks. Its memory is used again.
pub(super) struct Block {
    bytes: Vec<u8>,
    back: Sender<Vec<u8>>,
}

impl Drop for Block {
    fn drop(&mut self) {
        // Nobody waits for it once the backup has ended.
        let _unneeded = self.back.try_send(std::mem::take(&mut self.bytes));
    }
}

/// The blocks in which a large file is cut: three, so that one can be filled while the others are
/// worked on.
pub(super) struct Blocks {
    free: Receiver<Vec<u8>>,
    back: Sender<Vec<u8>>,
    bytes: usize,
}

impl Blocks {
    const COUNT: usize = 3;

    pub(super) fn new(bytes: usize) -> Self {
        let (back, free) = crossbeam_channel::bounded(Self::COUNT);
        for _ in 0..Self::COUNT {
            back.send(Vec::new()).expect("the receiver is held");
        }
        Self { free, back, bytes }
    }

    /// The pool of free blocks, to be waited for together with other things.
    pub(super) fn free(&self) -> &Receiver<Vec<u8>> {
        &self.free
    }
}

/// Reads one range of a large file block by block, and says where to cut.
pub(super) struct BlockReader {
    rest: Vec<u8>,
    read_to: u64,
    end: u64,
}

/// A block with its cuts: offset in the file, and place in the block, of each chunk.
pub(super) struct CutBlock {
    pub(super) block: Arc<Block>,
    pub(super) chunks: VecDeque<(u64, usize, usize)>,
}

impl BlockReader {
    pub(super) fn new(offset: u64, len: u64) -> Self {
        Self { rest: Vec::new(), read_to: offset, end: offset + len }
    }

    /// Whether everything has been read.
    pub(super) fn is_done(&self) -> bool {
        self.read_to == self.end && self.rest.is_empty()
    }

    /// How far the file has been read.
    pub(super) fn read_to(&self) -> u64 {
        self.read_to
    }

    /// Fills a free block behind what the last one left over, and cuts it.
    pub(super) fn next(
        &mut self,
        blocks: &Blocks,
        mut bytes: Vec<u8>,
        file: &File,
        chunker: &Chunker,
    ) -> io::Result<CutBlock> {
        bytes.resize(blocks.bytes, 0);
        let kept = self.rest.len();
        bytes[..kept].copy_from_slice(&self.rest);
        let start = self.read_to - kept as u64;
        let room = (bytes.len() - kept).min((self.end - self.read_to) as usize);
        let read = read_full(file, &mut bytes[kept..kept + room], self.read_to)?;
        self.read_to += read as u64;
        if read < room {
            self.end = self.read_to;
        }
        let filled = kept + read;
        let at_end = self.read_to == self.end;
        let mut chunks = VecDeque::new();
        let mut at = 0;
        while at < filled && (at_end || filled - at >= chunker.lookahead()) {
            let len = chunker.cut(&bytes[at..filled]);
            chunks.push_back((start + at as u64, at, at + len));
            at += len;
        }
        self.rest.clear();
        self.rest.extend_from_slice(&bytes[at..filled]);
        Ok(CutBlock { block: Arc::new(Block { bytes, back: blocks.back.clone() }), chunks })
    }
}

/// Collects small files until a bundle is full or the content-defined rule ends it.
pub(super) struct BundlePlanner {
    files: Vec<FileToRead>,
    bytes: usize,
    dirs: usize,
    cut: [u8; 32],
}

impl BundlePlanner {
    /// Files in one bundle: their results return together.
    const FILES_MAX: usize = 4096;
    /// Folders in one bundle: each is held open.
    const DIRS_MAX: usize = 128;

    pub(super) fn new(cut: &[u8; 32]) -> Self {
        Self { files: Vec::new(), bytes: 0, dirs: 0, cut: *cut }
    }

    /// Adds a file of `size` bytes; returns the bundles that are now complete: at most the one before
    /// it, and the one it ends.
    pub(super) fn push(
        &mut self,
        file: FileToRead,
        size: u64,
        new_dir: bool,
    ) -> [Option<Vec<FileToRead>>; 2] {
        let mut complete = [None, None];
        let stored = if size as usize <= INLINE_BYTES_MAX { 0 } else { size as usize };
        if self.bytes + stored > BUNDLE_BYTES_MAX || self.dirs >= Self::DIRS_MAX {
            complete[0] = self.take();
        }
        let ends = stored > 0 && self.ends_bundle(&file.name, stored);
        self.dirs += usize::from(new_dir || self.files.is_empty());
        self.files.push(file);
        self.bytes += stored;
        let full = self.files.len() >= Self::FILES_MAX;
        if full || (ends && self.bytes >= BUNDLE_BYTES_MIN) {
            complete[1] = self.take();
        }
        complete
    }

    /// The bundle collected so far.
    pub(super) fn take(&mut self) -> Option<Vec<FileToRead>> {
        self.bytes = 0;
        self.dirs = 0;
        let files = std::mem::take(&mut self.files);
        (!files.is_empty()).then_some(files)
    }

    /// True for one file in so many that a bundle grows by [`BUNDLE_BYTES_MEAN`] in between.
    fn ends_bundle(&self, name: &[u8], size: usize) -> bool {
        let mut hasher = blake3::Hasher::new_keyed(&self.cut);
        hasher.update(b"bundle").update(&(size as u64).to_le_bytes()).update(name);
        let hash = hasher.finalize();
        let draw = u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("32 is more than 8"));
        (u128::from(draw) * BUNDLE_BYTES_MEAN as u128) >> 64 < size as u128
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use chunkstore::chunker::ChunkerConfig;
    use proptest::prelude::*;

    use super::*;

    const SMALL: ChunkerConfig = ChunkerConfig::Fastcdc { min: 4096, avg: 8192, max: 16_384 };

    fn chunker() -> Chunker {
        Chunker::new(SMALL, &[3; 32]).unwrap()
    }

    /// Noise with runs of zeros in it.
    fn data(seed: u8, len: usize, zeros: &[(usize, usize)]) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
        for (from, run) in zeros {
            let from = from % (len + 1);
            let to = (from + run).min(len);
            bytes[from..to].fill(0);
        }
        bytes
    }

    fn file(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    /// Where each chunk begins and ends when all bytes are at hand.
    fn whole(chunker: &Chunker, bytes: &[u8], base: u64) -> Vec<(u64, u64)> {
        let mut at = 0;
        let mut cuts = Vec::new();
        while at < bytes.len() {
            let len = chunker.cut(&bytes[at..]);
            cuts.push((base + at as u64, base + (at + len) as u64));
            at += len;
        }
        cuts
    }

    fn by_window(
        chunker: &Chunker,
        file: &File,
        bytes: &[u8],
        range: (u64, u64),
    ) -> Vec<(u64, u64)> {
        let mut window = Window::new(chunker, file, range.0, range.1);
        let mut buffer = Vec::new();
        let mut cuts = Vec::new();
        while let Some((at, piece)) = window.next(&mut buffer).unwrap() {
            let end = at as usize + piece.len();
            assert_eq!(buffer[piece], bytes[at as usize..end]);
            cuts.push((at, end as u64));
        }
        cuts
    }

    fn by_blocks(
        chunker: &Chunker,
        file: &File,
        bytes: &[u8],
        range: (u64, u64),
        block_bytes: usize,
    ) -> Vec<(u64, u64)> {
        let blocks = Blocks::new(block_bytes);
        let mut reader = BlockReader::new(range.0, range.1);
        let mut cuts = Vec::new();
        while !reader.is_done() {
            let free = blocks.free().recv().unwrap();
            let cut = reader.next(&blocks, free, file, chunker).unwrap();
            for (at, from, to) in cut.chunks {
                let end = at as usize + (to - from);
                assert_eq!(cut.block.bytes[from..to], bytes[at as usize..end]);
                cuts.push((at, end as u64));
            }
        }
        cuts
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn cuts_do_not_depend_on_how_a_file_is_read(
            seed: u8, len in 0..200_000_usize, from in 0..200_000_usize, to in 0..200_000_usize,
            zeros in proptest::collection::vec((0..200_000_usize, 0..60_000_usize), 0..4),
            block_bytes in 32_768..100_000_usize,
        ) {
            let (chunker, bytes) = (chunker(), data(seed, len, &zeros));
            let file = file(&bytes);
            let (from, to) = (from.min(to).min(len), from.max(to).min(len));
            let expected = whole(&chunker, &bytes[from..to], from as u64);
            let range = (from as u64, (to - from) as u64);
            prop_assert_eq!(&by_window(&chunker, &file, &bytes, range), &expected);
            prop_assert_eq!(&by_blocks(&chunker, &file, &bytes, range, block_bytes), &expected);
        }

        #[test]
        fn a_file_that_is_shorter_than_expected_is_cut_like_what_is_there(
            seed: u8, len in 0..100_000_usize, missing in 1..100_000_u64,
        ) {
            let (chunker, bytes) = (chunker(), data(seed, len, &[]));
            let file = file(&bytes);
            let expected = whole(&chunker, &bytes, 0);
            let range = (0, len as u64 + missing);
            prop_assert_eq!(&by_window(&chunker, &file, &bytes, range), &expected);
            prop_assert_eq!(&by_blocks(&chunker, &file, &bytes, range, 40_000), &expected);
        }
    }

    #[test]
    fn the_window_is_refilled_without_a_cut_where_it_ends() {
        let (chunker, bytes) = (chunker(), data(9, 3 * Window::BYTES + 12_345, &[]));
        let (file, range) = (file(&bytes), (0, bytes.len() as u64));
        let expected = whole(&chunker, &bytes, 0);
        assert!(by_window(&chunker, &file, &bytes, range) == expected);
        assert!(by_blocks(&chunker, &file, &bytes, range, 1 << 20) == expected);
    }

    #[test]
    fn only_zeros_count_as_zero() {
        assert!(is_zero(&[0]) && is_zero(&[0; 1000]));
        for at in [0, 1, 500, 999] {
            let mut bytes = [0; 1000];
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
        }
        assert!(!is_zero(&[]) && !is_zero(&[7; 100]));
    }
}
