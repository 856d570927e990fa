//! Checks packs: their tables, and if asked to, every blob. In threads; each holds one whole pack.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::codec::compress::Decompressor;
use crate::codec::seal::HEADER_BYTES;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::id::{BlobId, PackId};
use crate::limits::PACK_BYTES_MAX;
use crate::pack::{Pack, PackBuilder, PackClass, TableEntry};
use crate::repository::Repository;

/// A pack to be checked.
#[derive(Clone, Copy)]
pub(super) struct Job {
    pub(super) class: PackClass,
    pub(super) id: PackId,
    pub(super) size: u64,
    /// Whether its blobs are read.
    pub(super) read: bool,
}

/// What was found out about a pack.
pub(super) struct Checked {
    pub(super) job: Job,
    /// Traces of its blobs; `None` when its table cannot be read.
    pub(super) traces: Option<Box<[Trace]>>,
    /// It has gone since it was listed.
    pub(super) is_gone: bool,
    /// What is wrong with it as a whole.
    pub(super) fault: Option<String>,
    /// What is wrong that does not keep its blobs from being read.
    pub(super) flaw: Option<String>,
    /// Blobs that cannot be read, and why.
    pub(super) blobs: Vec<(u8, String)>,
}

/// Four bytes to tell a blob by. References and tables are authentic, so a difference can only come
/// from a mistake of the program that wrote them; such a mistake does not hit 16 bits by chance twice.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Trace(u32);

impl Trace {
    pub(super) fn new(id: &BlobId, plain_len: u32) -> Self {
        let [a, b, c, d, ..] = id.0;
        let folded = plain_len ^ plain_len.rotate_left(16);
        Self(u32::from_be_bytes([a, b, c, d]) ^ (folded & 0xffff))
    }

    /// Whether it may be of a blob whose id begins with `prefix`.
    pub(super) fn begins(self, prefix: &[u8; 16]) -> bool {
        self.0 >> 16 == u32::from(u16::from_be_bytes([prefix[0], prefix[1]]))
    }
}

/// Checks all `jobs` and hands over each result, in the caller's thread.
pub(super) fn check_all(
    repository: &Repository,
    jobs: &[Job],
    threads: usize,
    each: &mut dyn FnMut(Checked),
) {
    let next = AtomicUsize::new(0);
    let (send, receive) = crossbeam_channel::bounded(64);
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, jobs.len().max(1)) {
            let (send, next) = (send.clone(), &next);
            scope.spawn(move || {
                let mut buffers = Buffers::default();
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if send.send(check_one(repository, *job, &mut buffers)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(send);
        receive.into_iter().for_each(each);
    });
}

#[derive(Default)]
struct Buffers {
    object: Vec<u8>,
    plain: Vec<u8>,
    decompressor: Decompressor,
}

fn check_one(repository: &Repository, job: Job, buffers: &mut Buffers) -> Checked {
    let (store, keys) = (repository.store(), repository.keys());
    let mut checked =
        Checked { job, traces: None, is_gone: false, fault: None, flaw: None, blobs: Vec::new() };
    let pack = match Pack::open(store, keys, job.class, job.id) {
        Ok(pack) => pack,
        Err(error) => {
            checked.is_gone = error.kind() == ErrorKind::NotFound;
            checked.fault = (!checked.is_gone).then(|| chain(&error));
            return checked;
        }
    };
    let trace = |entry: &TableEntry| Trace::new(&entry.id, entry.plain_len);
    checked.traces = Some(pack.table().iter().map(trace).collect());
    let mut head = [0; HEADER_BYTES];
    let read = store.read_at(pack.name(), 0, &mut head).map_err(Error::from);
    if let Err(error) = read.and_then(|()| pack.check_header(keys, job.class, &head)) {
        checked.flaw = Some(format!(
            "the copy of its header at its front is damaged; its content can be read: {}",
            chain(&error)
        ));
    }
    if job.read
        && let Err(error) = read_blobs(repository, &pack, job.size, buffers, &mut checked.blobs)
    {
        checked.fault = Some(chain(&error));
    }
    checked
}

fn read_blobs(
    repository: &Repository,
    pack: &Pack,
    size: u64,
    buffers: &mut Buffers,
    faults: &mut Vec<(u8, String)>,
) -> Result<()> {
    if size > PACK_BYTES_MAX + PackBuilder::OVERHEAD_BYTES as u64 {
        return Err(Error::corrupt(pack.name(), "it is larger than a pack can be"));
    }
    if buffers.object.capacity() < size as usize {
        // Growing would hold the old and the new buffer, of the size of a pack each, at once.
        buffers.object = Vec::new();
        buffers.object.reserve_exact(size as usize);
    }
    buffers.object.resize(size as usize, 0);
    repository.store().read_at(pack.name(), 0, &mut buffers.object)?;
    for (ordinal, entry) in pack.table().iter().enumerate() {
        let from = entry.offset as usize;
        let ordinal = ordinal as u8;
        let sealed = buffers.object.get_mut(from..from + entry.stored_len as usize);
        let decoded = sealed
            .ok_or_else(|| Error::corrupt(pack.name(), "it has changed while it was read"))
            .and_then(|sealed| {
                let Buffers { plain, decompressor, .. } = buffers;
                pack.decode(repository.keys(), ordinal, sealed, decompressor, plain)
            });
        faults.extend(decoded.err().map(|error| (ordinal, chain(&error))));
    }
    Ok(())
}
