//! What workers do: read small and medium files, and hash, compress and store chunks of large ones.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use chunkstore::codec::compress::{Compressor, Level};
use chunkstore::limits::{BUNDLE_BYTES_MAX, INLINE_BYTES_MAX, SMALL_FILE_BYTES};
use chunkstore::pack::BlobKind;
use chunkstore::repository::Repository;
use chunkstore::tree::{BlobRef, Body, Chunk, Content, Node, State};
use chunkstore::writer::Writer;
use chunkstore::{Error, ErrorKind, Result};
use crossbeam_channel::{Receiver, Sender};

use super::assemble::Ticket;
use super::large::Block;
use super::read::{self, FileToRead, Read, Unread, Window, is_shorter, is_zero, ranges, read_full};
use crate::monitor::{Concern, Monitor, Warning};

/// Most that is read of a file whose size says 0, or which was small when it was listed: its chunks
/// stand in one entry.
const ONE_ENTRY_BYTES_MAX: u64 = 1 << 30;

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
    /// Files that were read, and what is to be saved of each, if anything.
    Files(Vec<(Ticket, Option<Body>)>),
    /// A chunk of the large file being cut; without reference, it is all zero.
    Chunk { number: u64, blob: Option<BlobRef> },
    /// The job could not be done, and so the backup cannot.
    Failed(Error),
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

/// Does jobs until there are no more. A job that panics fails, lest somebody wait for its result.
pub(super) fn work(shared: &Shared<'_>, jobs: &Receiver<Job>, done: &Sender<Done>) {
    let mut worker =
        Worker { shared, compressor: Compressor::new(shared.compression), buffer: Vec::new() };
    for job in jobs {
        // The backup ends with it, so nobody sees what the worker was left as.
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| worker.run(job)));
        let result = result.unwrap_or_else(|_| Err(worker_died()));
        if done.send(result.unwrap_or_else(Done::Failed)).is_err() {
            return;
        }
    }
}

pub(super) fn worker_died() -> Error {
    Error::new(ErrorKind::Store, "a worker thread ended unexpectedly")
}

struct Worker<'a> {
    shared: &'a Shared<'a>,
    compressor: Compressor,
    buffer: Vec<u8>,
}

/// A small file that was read: its entry, and where its bytes are in the bundle.
struct Member {
    ticket: Ticket,
    body: Option<Body>,
    place: Option<(u32, [u8; 16])>,
}

impl Worker<'_> {
    fn run(&mut self, job: Job) -> Result<Done> {
        match job {
            Job::Bundle(files) => self.bundle(&files).map(Done::Files),
            Job::File(file) => {
                let ticket = file.ticket;
                Ok(Done::Files(vec![(ticket, self.medium_file(&file)?)]))
            }
            Job::Chunk { block, from, to, number } => {
                let bytes = block.bytes(from, to);
                let blob = if is_zero(bytes) { None } else { Some(self.store(bytes)?) };
                self.shared.monitor.advance(0, bytes.len() as u64);
                Ok(Done::Chunk { number, blob })
            }
        }
    }

    fn store(&mut self, plain: &[u8]) -> Result<BlobRef> {
        self.shared.writer.store_data(&mut self.compressor, plain)
    }

    fn bundle(&mut self, files: &[FileToRead]) -> Result<Vec<(Ticket, Option<Body>)>> {
        let mut bundle = std::mem::take(&mut self.buffer);
        bundle.clear();
        let mut members = Vec::with_capacity(files.len());
        for file in files {
            if self.shared.monitor.is_cancelled() {
                return Err(Error::cancelled());
            }
            members.push(self.member(file, &mut bundle)?);
        }
        let stored = if bundle.is_empty() { None } else { Some(self.store(&bundle)?) };
        self.buffer = bundle;
        let finished = members.into_iter().map(|Member { ticket, mut body, place }| {
            if let (Some(Body::Node(node)), Some((offset, hash)), Some(bundle)) =
                (&mut body, place, stored)
            {
                node.content = Content::Part { bundle, offset, hash };
            }
            (ticket, body)
        });
        Ok(finished.collect())
    }

    /// Reads one small file, and appends it to the bundle unless it is inline or known.
    fn member(&mut self, file: &FileToRead, bundle: &mut Vec<u8>) -> Result<Member> {
        let ticket = file.ticket;
        let alone = |body| Ok(Member { ticket, body, place: None });
        let (open, mut node) = match self.open(file)? {
            Ok(opened) => opened,
            Err(why) => return alone(self.unread(file, why)),
        };
        let start = bundle.len();
        // It may have grown since it was listed; then it is cut like any larger file. So is one whose
        // file system does not know its size.
        if node.size >= SMALL_FILE_BYTES
            || start + node.size as usize > BUNDLE_BYTES_MAX
            || (node.size == 0 && has_content(&open))
        {
            return alone(self.cut(file, &open, node)?);
        }
        bundle.resize(start + node.size as usize, 0);
        let (read, failure) = read_full(&open, &mut bundle[start..], 0);
        bundle.truncate(start + read);
        if let Some(why) = given_up_for(file, read as u64, failure.as_ref()) {
            bundle.truncate(start);
            return alone(self.unread(file, why));
        }
        let read = Read { wanted: node.size, to: read as u64, failure };
        self.finish_reading(file, &open, &mut node, read);
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
                Some(known) if !known.given_up && is_part(&known.node, node.size, hash) => {
                    node.content = known.node.content.clone();
                    bundle.truncate(start);
                }
                known => {
                    if let Some(known) = known.as_ref().filter(|known| known.given_up) {
                        self.compare(file, &known.node, &node, hash);
                    }
                    place = Some((start as u32, hash));
                }
            }
        }
        Ok(Member { ticket, body: Some(Body::Node(node)), place })
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
            let concern = Concern::Detail;
            self.shared.monitor.warning(Warning { path, message, concern });
        }
    }

    fn medium_file(&mut self, file: &FileToRead) -> Result<Option<Body>> {
        match self.open(file)? {
            Ok((open, node)) => self.cut(file, &open, node),
            Err(why) => Ok(self.unread(file, why)),
        }
    }

    /// Reads a file chunk by chunk: up to its size when it was opened, or to its end if that says 0.
    fn cut(&mut self, file: &FileToRead, open: &File, mut node: Node) -> Result<Option<Body>> {
        let is_sized = node.size > 0;
        // One that has grown so far since it was listed is saved as far as one entry can hold it.
        let limit = if is_sized { node.size.min(ONE_ENTRY_BYTES_MAX) } else { ONE_ENTRY_BYTES_MAX };
        let ranges = if is_sized { ranges(open, limit) } else { vec![(0, limit)] };
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut chunks = Vec::new();
        let (mut to, mut failure) = (0, None);
        for (offset, len) in ranges {
            let mut window = Window::new(self.shared.repository.chunker(), open, offset, len);
            while let Some((at, piece)) = window.next(&mut buffer) {
                if self.shared.monitor.is_cancelled() {
                    return Err(Error::cancelled());
                }
                let bytes = &buffer[piece];
                to = at + bytes.len() as u64;
                if !is_zero(bytes) {
                    let blob = self.shared.writer.store_data(&mut self.compressor, bytes)?;
                    chunks.push(Chunk { offset: at, blob });
                }
            }
            failure = window.into_failure();
            if failure.is_some() {
                break;
            }
        }
        self.buffer = buffer;
        if let Some(why) = given_up_for(file, to, failure.as_ref()) {
            return Ok(self.unread(file, why));
        }
        let wanted = match (is_sized, &failure) {
            (true, _) => limit,
            (false, None) if to < limit => to,
            (false, _) => to + 1,
        };
        if failure.is_none() && is_sized && !is_shorter(open, limit) {
            to = limit;
        }
        self.finish_reading(file, open, &mut node, Read { wanted, to, failure });
        if !chunks.is_empty() {
            node.content = Content::Chunks(chunks);
        }
        Ok(Some(Body::Node(node)))
    }

    fn open(&self, file: &FileToRead) -> Result<std::result::Result<(File, Node), Unread>> {
        self.shared.monitor.begin(&file.path);
        read::open(self.shared.monitor, file)
    }

    fn unread(&self, file: &FileToRead, why: Unread) -> Option<Body> {
        read::unread(self.shared.monitor, file, why)
    }

    /// Notes how far the file was read, and counts it.
    fn finish_reading(&self, file: &FileToRead, open: &File, node: &mut Node, read: Read) {
        (node.size, node.state) = read.settle(self.shared.monitor, file, open, node);
        self.shared.counters.bytes_read.fetch_add(node.size, Ordering::Relaxed);
        self.shared.monitor.advance(0, node.size);
    }
}

/// Whether there is something to be read although the size says 0, as of kernel files and on some FUSE
/// file systems.
fn has_content(open: &File) -> bool {
    // One that cannot be read is found out where it is read.
    open.read_at(&mut [0], 0).map_or(true, |read| read > 0)
}

/// Why a file of which `read` bytes could be read is not saved that far: nothing was read, or the parent
/// has all of it.
pub(super) fn given_up_for(
    file: &FileToRead,
    read: u64,
    failure: Option<&std::io::Error>,
) -> Option<Unread> {
    let error = failure?;
    let has_older = file.known.as_ref().is_some_and(|known| known.node.state != State::Cut);
    (read == 0 || has_older)
        .then(|| Unread::Unreadable(format!("cannot be read from byte {read} on: {error}")))
}

fn is_part(node: &Node, size: u64, hash: [u8; 16]) -> bool {
    matches!(node.content, Content::Part { hash: known, .. } if known == hash && node.size == size)
}
