//! Reads many data blobs: each once, in pack order, in large ranged reads, by several threads.
//!
//! The caller says which blobs it wants and what for; this module sorts the wishes by place, merges
//! neighbours into one read, opens and verifies each blob once, and hands it over together with all
//! wishes for it. Memory: each thread holds one read of at most [`READ_BYTES`] (or one blob, if
//! larger) and one plaintext.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::codec::compress::Decompressor;
use crate::error::{Error, Result};
use crate::pack::{Pack, PackClass};
use crate::repository::Repository;
use crate::tree::BlobRef;

/// Bytes read at once, unless one blob is larger.
pub const READ_BYTES: usize = 4 << 20;

/// Unwanted bytes between two wanted blobs that are read rather than skipped.
const GAP_BYTES: u32 = 256 << 10;

/// Wishes handled by one thread at a time: some 16 MiB, so that small restores are spread as well.
const BLOBS_PER_TASK: usize = 16;

/// Takes a blob's plaintext, or the error that prevents it, and all wishes for it; answers whether to
/// go on.
pub type Deliver<'a> = dyn Fn(Result<&[u8]>, &[Want]) -> bool + Sync + 'a;

/// A blob and what it is wanted for.
#[derive(Debug, Clone, Copy)]
pub struct Want {
    /// The blob.
    pub blob: BlobRef,
    /// The caller's number for the purpose.
    pub purpose: u32,
}

/// Fetches every blob of `wants`, and calls `deliver` for each with its plaintext, or with the error
/// that prevents it, and all wishes for it. `deliver` is called from `threads` threads; after it has
/// answered `false` once, the rest is left out.
pub fn fetch(repository: &Repository, mut wants: Vec<Want>, threads: usize, deliver: &Deliver<'_>) {
    wants.sort_unstable_by_key(|want| want.blob.location);
    let tasks = divide(&wants);
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let work = || {
        let mut reader = Reader::default();
        while !stop.load(Ordering::Relaxed) {
            let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            if !reader.run(repository, task, deliver) {
                stop.store(true, Ordering::Relaxed);
            }
        }
    };
    let threads = threads.clamp(1, tasks.len().max(1));
    if threads == 1 {
        return work();
    }
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
}

/// Divides sorted wishes into tasks of one pack and a few blobs each.
fn divide(wants: &[Want]) -> Vec<&[Want]> {
    wants
        .chunk_by(|a, b| a.blob.location.pack == b.blob.location.pack)
        .flat_map(|pack| {
            let mut tasks = Vec::new();
            let mut rest = pack;
            while !rest.is_empty() {
                let mut blobs = 0;
                let end = rest.iter().enumerate().position(|(at, want)| {
                    let new = at == 0 || rest[at - 1].blob.location != want.blob.location;
                    blobs += usize::from(new);
                    blobs > BLOBS_PER_TASK
                });
                let (task, more) = rest.split_at(end.unwrap_or(rest.len()));
                tasks.push(task);
                rest = more;
            }
            tasks
        })
        .collect()
}

#[derive(Default)]
struct Reader {
    sealed: Vec<u8>,
    plain: Vec<u8>,
    decompressor: Decompressor,
}

impl Reader {
    fn run(&mut self, repository: &Repository, task: &[Want], deliver: &Deliver<'_>) -> bool {
        let (store, keys) = (repository.store(), repository.keys());
        let id = task[0].blob.location.pack;
        let pack = match repository.packs(PackClass::Data).get(store, keys, id) {
            Ok(pack) => pack,
            Err(error) => return fail_all(&error, task, deliver),
        };
        let blobs: Vec<_> = task.chunk_by(|a, b| a.blob.location == b.blob.location).collect();
        let mut rest = &blobs[..];
        while !rest.is_empty() {
            let len = run_length(&pack, rest);
            let (run, more) = rest.split_at(len);
            if !self.read_run(repository, &pack, run, deliver) {
                return false;
            }
            rest = more;
        }
        true
    }

    /// Reads neighbouring blobs at once and delivers them.
    fn read_run(
        &mut self,
        repository: &Repository,
        pack: &Pack,
        run: &[&[Want]],
        deliver: &Deliver<'_>,
    ) -> bool {
        let place = |wants: &[Want]| {
            let blob = &wants[0].blob;
            pack.entry(blob.location.ordinal, &blob.id)
        };
        let (first, last) = match (place(run[0]), place(run[run.len() - 1])) {
            (Ok(first), Ok(last)) => (first, last),
            // Only a run of one can be missing from the table: see `run_length`.
            (Err(error), _) | (_, Err(error)) => return fail_all(&error, &run.concat(), deliver),
        };
        let from = first.offset;
        self.sealed.resize((last.offset + last.stored_len - from) as usize, 0);
        if let Err(error) =
            repository.store().read_at(pack.name(), u64::from(from), &mut self.sealed)
        {
            return fail_all(&error.into(), &run.concat(), deliver);
        }
        run.iter().all(|wants| {
            let ordinal = wants[0].blob.location.ordinal;
            let decoded = place(wants).and_then(|entry| {
                let at = (entry.offset - from) as usize;
                let sealed = &mut self.sealed[at..at + entry.stored_len as usize];
                let keys = repository.keys();
                pack.decode(keys, ordinal, sealed, &mut self.decompressor, &mut self.plain)
            });
            deliver(decoded.map(|()| &self.plain[..]), wants)
        })
    }
}

/// How many of the first of `blobs` are close enough together to be read at once.
fn run_length(pack: &Pack, blobs: &[&[Want]]) -> usize {
    let place = |wants: &[Want]| pack.entry(wants[0].blob.location.ordinal, &wants[0].blob.id).ok();
    let Some(first) = place(blobs[0]) else {
        return 1;
    };
    let mut end = first.offset + first.stored_len;
    let follows = |wants: &&&[Want]| {
        let Some(next) = place(wants) else {
            return false;
        };
        let near = next.offset - end <= GAP_BYTES;
        end = next.offset + next.stored_len;
        near && (end - first.offset) as usize <= READ_BYTES
    };
    1 + blobs[1..].iter().take_while(follows).count()
}

fn fail_all(error: &Error, wants: &[Want], deliver: &Deliver<'_>) -> bool {
    wants
        .chunk_by(|a, b| a.blob.location == b.blob.location)
        .all(|wants| deliver(Err(error.duplicate()), wants))
}
