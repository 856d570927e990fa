//! Reads many blobs: each once, in pack order, in large ranged reads, by several threads.
//!
//! The caller says which blobs it wants and what for; this module sorts the wishes by place, merges
//! neighbours into one read, opens and verifies each blob once, and hands it over together with all
//! wishes for it. Memory: each thread holds one read of at most [`READ_BYTES`] (or one blob, if
//! larger) and one plaintext.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::codec::compress::Decompressor;
use crate::error::{Error, ErrorKind, Result};
use crate::id::BlobId;
use crate::limits::PACK_BLOBS_MAX;
use crate::pack::{Location, Pack, PackClass, ReadScratch};
use crate::relocation::Relocations;
use crate::repository::Repository;

/// Bytes read at once, unless one blob is larger.
pub const READ_BYTES: usize = 4 << 20;

/// Takes a blob's plaintext, or the error that prevents it, and all wishes for it; answers whether to
/// go on.
pub type Deliver<'a> = dyn Fn(Result<&[u8]>, &[Want]) -> bool + Sync + 'a;

/// A blob and what it is wanted for.
#[derive(Debug, Clone, Copy)]
pub struct Want {
    /// Where a reference says that it lies.
    pub place: Location,
    /// Its name.
    pub id: BlobId,
    /// The caller's number for the purpose.
    pub purpose: u32,
}

/// A wish, and where its blob is now.
#[derive(Debug, Clone, Copy)]
struct Placed {
    at: Location,
    want: Want,
}

impl Placed {
    /// By what wishes for the same blob are told. A damaged tree may give one place to two of them.
    fn blob(&self) -> (Location, BlobId) {
        (self.at, self.want.id)
    }
}

/// Fetches every blob of `wants` from packs of `class`, and calls `deliver` for each with its
/// plaintext, or with the error that prevents it, and all wishes for it. `deliver` is called from
/// `threads` threads; after it has answered `false` once, the rest is left out.
pub fn fetch(
    repository: &Repository,
    class: PackClass,
    wants: Vec<Want>,
    threads: usize,
    deliver: &Deliver<'_>,
) {
    let relocations = repository.relocations();
    let placed = wants
        .into_iter()
        .map(|want| Placed { at: relocations.newest(want.place), want })
        .collect::<Vec<_>>();
    let mut fetch = Fetch { repository, class, relocations, deliver };
    let _stopped = fetch.run(placed, threads);
}

/// Fetching with one state of the relocations.
struct Fetch<'a> {
    repository: &'a Repository,
    class: PackClass,
    relocations: Arc<Relocations>,
    deliver: &'a Deliver<'a>,
}

impl Fetch<'_> {
    /// Fetches all, and what is missing once more where it was relocated to since. Answers whether to
    /// go on.
    fn run(&mut self, mut placed: Vec<Placed>, threads: usize) -> bool {
        placed.sort_unstable_by_key(Placed::blob);
        let missing = Mutex::new(Vec::new());
        if !self.run_once(&placed, threads, &missing) {
            return false;
        }
        let missing = missing.into_inner().unwrap_or_else(PoisonError::into_inner);
        if missing.is_empty() {
            return true;
        }
        // They may have been relocated since; if the relocations are as before, they are missing.
        let new = match self.repository.reload_relocations() {
            Ok(new) => new,
            Err(error) => {
                let failed = missing.into_iter().map(|(placed, _)| (placed, error.duplicate()));
                return fail_all(&failed.collect::<Vec<_>>(), self.deliver);
            }
        };
        let known = std::mem::replace(&mut self.relocations, new);
        if Arc::ptr_eq(&known, &self.relocations) {
            return self.find_elsewhere(missing);
        }
        let again = missing.into_iter().map(|(Placed { want, .. }, _)| {
            let at = self.relocations.newest(want.place);
            Placed { at, want }
        });
        let again = again.collect();
        self.run(again, threads)
    }

    /// Looks for what is missing in its newest place in all the others.
    fn find_elsewhere(&self, mut missing: Vec<(Placed, Error)>) -> bool {
        let mut scratch = ReadScratch::default();
        missing.sort_unstable_by_key(|(placed, _)| placed.blob());
        missing.chunk_by(|(a, _), (b, _)| a.blob() == b.blob()).all(|same| {
            let wants: Vec<Want> = same.iter().map(|(placed, _)| placed.want).collect();
            let Some(((placed, error), want)) = same.first().zip(wants.first()) else {
                return true;
            };
            let places = self.relocations.places(want.place);
            let found = places.into_iter().filter(|at| *at != placed.at).find_map(|at| {
                let (store, keys) = (self.repository.store(), self.repository.keys());
                let pack = self.repository.packs(self.class).get(store, keys, at.pack).ok()?;
                pack.read(store, keys, at.ordinal, &want.id, &mut scratch).ok()
            });
            match found {
                Some(()) => (self.deliver)(Ok(&scratch.plain), &wants),
                None => (self.deliver)(Err(error.duplicate()), &wants),
            }
        })
    }

    fn run_once(&self, placed: &[Placed], threads: usize, missing: &Missing) -> bool {
        let tasks = divide(placed, blobs_per_task(self.class));
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let work = || {
            let mut reader = Reader::default();
            while !stop.load(Ordering::Relaxed) {
                let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) else {
                    return;
                };
                if !reader.run(self, task, missing) {
                    stop.store(true, Ordering::Relaxed);
                }
            }
        };
        let threads = threads.clamp(1, tasks.len().max(1));
        if threads == 1 {
            work();
        } else {
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(work);
                }
            });
        }
        !stop.into_inner()
    }
}

/// Wishes whose pack is gone, and the error that says so.
type Missing = Mutex<Vec<(Placed, Error)>>;

/// Blobs handled by one thread at a time: some 16 MiB of data, so that small restores are spread as
/// well; of the small tree nodes, all of one pack.
fn blobs_per_task(class: PackClass) -> usize {
    match class {
        PackClass::Data => 16,
        PackClass::Meta => PACK_BLOBS_MAX,
    }
}

/// Divides sorted wishes into tasks of one pack and a few blobs each.
fn divide(placed: &[Placed], blobs_per_task: usize) -> Vec<&[Placed]> {
    placed
        .chunk_by(|a, b| a.at.pack == b.at.pack)
        .flat_map(|pack| {
            let mut tasks = Vec::new();
            let mut rest = pack;
            while !rest.is_empty() {
                let mut blobs = 0;
                let end = rest.iter().enumerate().position(|(at, placed)| {
                    let new = at == 0 || rest[at - 1].blob() != placed.blob();
                    blobs += usize::from(new);
                    blobs > blobs_per_task
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
    wants: Vec<Want>,
}

impl Reader {
    fn run(&mut self, fetch: &Fetch<'_>, task: &[Placed], missing: &Missing) -> bool {
        let (store, keys) = (fetch.repository.store(), fetch.repository.keys());
        let pack = match fetch.repository.packs(fetch.class).get(store, keys, task[0].at.pack) {
            Ok(pack) => pack,
            Err(error) => return fail(&error, task, fetch.deliver, missing),
        };
        let blobs: Vec<_> = task.chunk_by(|a, b| a.blob() == b.blob()).collect();
        let cost = store.read_cost();
        let mut rest = &blobs[..];
        while !rest.is_empty() {
            let len = run_length(&pack, rest, cost.gap_bytes);
            let (run, more) = rest.split_at(len);
            if !self.read_run(fetch, &pack, run, missing) {
                return false;
            }
            rest = more;
        }
        true
    }

    /// Reads neighbouring blobs at once and delivers them.
    fn read_run(
        &mut self,
        fetch: &Fetch<'_>,
        pack: &Pack,
        run: &[&[Placed]],
        missing: &Missing,
    ) -> bool {
        let Fetch { repository, deliver, .. } = *fetch;
        let place = |placed: &[Placed]| pack.entry(placed[0].at.ordinal, &placed[0].want.id);
        let (first, last) = match (place(run[0]), place(run[run.len() - 1])) {
            (Ok(first), Ok(last)) => (first, last),
            // Only a run of one can be missing from the table: see `run_length`.
            (Err(error), _) | (_, Err(error)) => {
                return fail(&error, &run.concat(), deliver, missing);
            }
        };
        let from = first.offset;
        self.sealed.resize((last.offset + last.stored_len - from) as usize, 0);
        if let Err(error) =
            repository.store().read_at(pack.name(), u64::from(from), &mut self.sealed)
        {
            return fail(&error.into(), &run.concat(), deliver, missing);
        }
        run.iter().all(|placed| {
            let ordinal = placed[0].at.ordinal;
            let decoded = place(placed).and_then(|entry| {
                let at = (entry.offset - from) as usize;
                let sealed = &mut self.sealed[at..at + entry.stored_len as usize];
                let keys = repository.keys();
                pack.decode(keys, ordinal, sealed, &mut self.decompressor, &mut self.plain)
            });
            self.wants.clear();
            self.wants.extend(placed.iter().map(|placed| placed.want));
            deliver(decoded.map(|()| &self.plain[..]), &self.wants)
        })
    }
}

/// How many of the first of `blobs` are close enough together to be read at once.
fn run_length(pack: &Pack, blobs: &[&[Placed]], gap_bytes: u32) -> usize {
    let place = |placed: &[Placed]| pack.entry(placed[0].at.ordinal, &placed[0].want.id).ok();
    let Some(first) = place(blobs[0]) else {
        return 1;
    };
    let mut end = first.offset + first.stored_len;
    let follows = |placed: &&&[Placed]| {
        let Some(next) = place(placed) else {
            return false;
        };
        let near = next.offset - end <= gap_bytes;
        end = next.offset + next.stored_len;
        near && (end - first.offset) as usize <= READ_BYTES
    };
    1 + blobs[1..].iter().take_while(follows).count()
}

/// Delivers an error for all wishes, unless they may be found elsewhere.
fn fail(error: &Error, placed: &[Placed], deliver: &Deliver<'_>, missing: &Missing) -> bool {
    let failed: Vec<_> = placed.iter().map(|placed| (*placed, error.duplicate())).collect();
    if error.kind() == ErrorKind::NotFound {
        missing.lock().unwrap_or_else(PoisonError::into_inner).extend(failed);
        return true;
    }
    fail_all(&failed, deliver)
}

/// Delivers the errors, one for each blob.
fn fail_all(failed: &[(Placed, Error)], deliver: &Deliver<'_>) -> bool {
    failed.chunk_by(|(a, _), (b, _)| a.blob() == b.blob()).all(|failed| {
        let wants: Vec<Want> = failed.iter().map(|(placed, _)| placed.want).collect();
        failed.first().is_none_or(|(_, error)| deliver(Err(error.duplicate()), &wants))
    })
}
