//! The index after a garbage collection: without the deleted packs, and in few segments.
//!
//! None of this matters to safety: a writer refers only to packs it has seen in a listing. It spares
//! lookups that lead nowhere, and keeps the number of segments that every writer opens small.

use crate::error::{Error, ErrorKind, Result};
use crate::id::PackId;
use crate::index::{self, Record, Segment};
use crate::pack::PackClass;
use crate::record;
use crate::repository::Repository;

use super::facts;

/// A segment with fewer records is small: 2 MiB.
const SMALL_RECORDS: u64 = 64 << 10;
/// So many small segments are left as they are.
const SMALL_MAX: usize = 8;
/// Segments merged at once: each costs a block of memory.
const MERGE_MAX: usize = 256;
/// Tries to finish before another process changes the folder.
const ATTEMPTS: usize = 5;

/// What was done to the index.
#[derive(Default)]
pub(super) struct Rewritten {
    pub(super) written: usize,
    pub(super) deleted: usize,
    /// Segments that could not be read and stay as they are.
    pub(super) damaged: Vec<String>,
}

/// Takes the packs in `doomed` (ascending), and those that are gone, out of the index, and merges
/// small segments.
pub(super) fn rewrite(repository: &Repository, doomed: &[PackId]) -> Result<Rewritten> {
    let mut done = Rewritten::default();
    for _ in 0..ATTEMPTS {
        match attempt(repository, doomed, &mut done) {
            // Somebody else has merged a segment under our hands.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            result => return result.map(|()| done),
        }
    }
    Err(Error::new(ErrorKind::Store, "the index keeps changing: run prune again"))
}

fn attempt(repository: &Repository, doomed: &[PackId], done: &mut Rewritten) -> Result<()> {
    let (store, keys) = (repository.store(), repository.keys());
    // Segments before packs: what a segment names was durable before it, so what is missing from the
    // later listing was deleted. And before sessions: a segment of a running session must stay,
    // because the session itself reads it again; if none is announced now, none of these is one.
    let ids = index::list_segments(store)?;
    if doomed.is_empty() && ids.len() <= SMALL_MAX {
        return Ok(());
    }
    let mut present = Vec::new();
    store.list(PackClass::Data.folder(), &mut |meta| {
        present.extend(meta.key.rsplit('/').next().and_then(|name| name.parse::<PackId>().ok()));
        Ok(())
    })?;
    present.sort_unstable();
    let is_quiet = is_quiet(repository)?;
    let keep = |record: &Record| {
        let pack = record.location.pack;
        present.binary_search(&pack).is_ok() && doomed.binary_search(&pack).is_err()
    };
    let (mut stale, mut small) = (Vec::new(), Vec::new());
    for id in ids {
        let judged = Segment::open(store, keys, id).and_then(|segment| {
            let is_stale = !doomed.is_empty() && has_other(repository, &segment, &keep)?;
            Ok((segment, is_stale))
        });
        match judged {
            Ok((segment, true)) => stale.push(segment),
            Ok((segment, false)) if segment.len() < SMALL_RECORDS => small.push(segment),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) if error.kind() == ErrorKind::Corrupt => done.note(&error),
            Err(error) => return Err(error),
        }
    }
    if is_quiet && small.len() > SMALL_MAX {
        stale.append(&mut small);
    }
    for batch in stale.chunks(MERGE_MAX) {
        let segments: Vec<_> = batch.iter().collect();
        match index::merge(store, keys, &segments, &keep) {
            Ok(written) => done.written += written.len(),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                done.note(&error);
                continue;
            }
            Err(error) => return Err(error),
        }
        for segment in batch {
            store.delete(segment.name())?;
            done.deleted += 1;
        }
    }
    Ok(())
}

impl Rewritten {
    fn note(&mut self, error: &Error) {
        let text = crate::error::chain(error);
        if !self.damaged.contains(&text) {
            self.damaged.push(text);
        }
    }
}

/// Whether no session is announced that may still write.
pub(crate) fn is_quiet(repository: &Repository) -> Result<bool> {
    let sessions = facts::sessions(repository, std::time::UNIX_EPOCH)?;
    Ok(sessions.iter().all(|session| session.decided || session.purpose == record::PRUNE))
}

/// Whether the segment has a record that is not to be kept.
fn has_other(
    repository: &Repository,
    segment: &Segment,
    keep: &dyn Fn(&Record) -> bool,
) -> Result<bool> {
    let mut found = false;
    segment.for_each(repository.store(), &mut |record| {
        found |= !keep(&record);
        Ok(())
    })?;
    Ok(found)
}
