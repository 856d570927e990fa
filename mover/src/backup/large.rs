//! Large files: read and cut block by block, and the extent entries made of their chunks.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::Arc;

use chunkstore::chunker::Chunker;
use chunkstore::limits::EXTENT_SPAN_BYTES;
use chunkstore::tree::{BlobRef, Body, Chunk, Entry, extent_key};
use crossbeam_channel::{Receiver, Sender};

use super::read::read_full;

/// A part of a large file, shared by the jobs of its chunks. Whatever becomes of it, its memory goes back
/// to the pool: who waits for a free block waits for that.
pub(super) struct Block {
    bytes: Vec<u8>,
    back: Sender<Vec<u8>>,
}

impl Block {
    pub(super) fn bytes(&self, from: usize, to: usize) -> &[u8] {
        &self.bytes[from..to]
    }
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

    /// The pool of free memory, to be waited for together with other things.
    pub(super) fn free(&self) -> &Receiver<Vec<u8>> {
        &self.free
    }

    /// A block in memory taken from the pool.
    pub(super) fn block(&self, mut bytes: Vec<u8>) -> Block {
        bytes.resize(self.bytes, 0);
        Block { bytes, back: self.back.clone() }
    }
}

/// Reads one range of a large file block by block, and says where to cut.
pub(super) struct BlockReader {
    rest: Vec<u8>,
    read_to: u64,
    end: u64,
    failure: Option<io::Error>,
}

/// A block with its cuts: offset in the file, and place in the block, of each chunk.
pub(super) struct CutBlock {
    pub(super) block: Arc<Block>,
    pub(super) chunks: VecDeque<(u64, usize, usize)>,
}

impl BlockReader {
    pub(super) fn new(offset: u64, len: u64) -> Self {
        Self { rest: Vec::new(), read_to: offset, end: offset + len, failure: None }
    }

    /// Whether everything has been read that can be.
    pub(super) fn is_done(&self) -> bool {
        self.read_to == self.end && self.rest.is_empty()
    }

    /// How far the file has been read.
    pub(super) fn read_to(&self) -> u64 {
        self.read_to
    }

    /// Why it cannot be read further, as far as is known.
    pub(super) fn failure(&self) -> Option<&io::Error> {
        self.failure.as_ref()
    }

    /// Why it could not be read further, once it is done.
    pub(super) fn into_failure(self) -> Option<io::Error> {
        self.failure
    }

    /// Fills a block behind what the last one left over, and cuts it. Where the file cannot be read
    /// further, it ends.
    pub(super) fn next(&mut self, mut block: Block, file: &File, chunker: &Chunker) -> CutBlock {
        let bytes = &mut block.bytes;
        let kept = self.rest.len();
        bytes[..kept].copy_from_slice(&self.rest);
        let start = self.read_to - kept as u64;
        let room = (bytes.len() - kept).min((self.end - self.read_to) as usize);
        let (read, failure) = read_full(file, &mut bytes[kept..kept + room], self.read_to);
        self.failure = failure;
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
        CutBlock { block: Arc::new(block), chunks }
    }
}

/// The large file being cut: its chunks on the way, and the extent entry being filled.
#[derive(Default)]
pub(super) struct LargeFile {
    key: Vec<u8>,
    /// Number of the first chunk in `pending`.
    first: u64,
    /// Offsets of chunks in order, and what is known of each: its blob, or that it is zero.
    pending: VecDeque<(u64, Option<Option<BlobRef>>)>,
    extent: Vec<Chunk>,
}

impl LargeFile {
    /// Nothing of the file with this key has been read.
    pub(super) fn new(key: &[u8]) -> Self {
        Self { key: key.to_vec(), ..Self::default() }
    }

    /// Expects a chunk at `offset`; returns its number.
    pub(super) fn expect(&mut self, offset: u64) -> u64 {
        self.pending.push_back((offset, None));
        self.first + self.pending.len() as u64 - 1
    }

    pub(super) fn resolve(&mut self, number: u64, blob: Option<BlobRef>) {
        self.pending[(number - self.first) as usize].1 = Some(blob);
    }

    pub(super) fn is_complete(&self) -> bool {
        self.pending.iter().all(|(_, known)| known.is_some())
    }

    /// The next extent entry, if its chunks are known; at the `last` call also an unfinished one.
    pub(super) fn next_extent(&mut self, last: bool) -> Option<Entry> {
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
