//! A session's announcement, and the register that decides how it ended.
//!
//! Whoever writes packs announces itself first, gives a sign of life once a minute, and commits by
//! writing one object: its verdict. A garbage collection that waits for a session which has been silent
//! for too long declares it dead. Both cannot happen to one session; how that is made sure of depends
//! on what the store offers ([`Register`]):
//!
//! *Create-if-absent*: committing and fencing create the same object; whoever is first wins.
//!
//! *Time-fenced*, for stores that may ignore the condition silently:
//! ```text
//!  writer                                            collector
//!  C1 date := own clock                              D1 write fences/<sid>
//!  C2 renew the announcement, dated                  D2 wait until the store's clock is FENCE_WAIT
//!  C3 look: no fences/<sid>                             past the time of fences/<sid>
//!  C4 write the verdict, dated as C1                 D3 the session is decided: as committed if the
//!     (a failure: again from C1)                        verdict is there, else as dead
//! ```
//! The store refuses a dated request when its own clock is more than [`DATE_TOLERANCE`] from the date.
//! C2 was accepted at a time r, so `date <= r + tolerance`, whatever this machine's clock says. C3
//! came after C2; if it saw no fence, D1 took effect after r. C4 is refused after
//! `date + tolerance <= r + 2 tolerance`, which is before the end of D2. So when D2 ends, the verdict
//! is there or never will be. *It relies on*: the store refuses old requests by the time at which it
//! accepts their header (OBS: 15 minutes); it does not let an accepted request of a few KiB
//! take effect later than the margin (15 minutes) allows; its clock, and the times it gives objects,
//! agree within that margin. A writer that was slow loses its work, never a snapshot.

use std::io::IoSlice;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use objects::{Created, DATE_TOLERANCE};

use crate::codec::seal::ObjectKind;
use crate::error::{Error, ErrorKind, Result};
use crate::id::SnapshotId;
use crate::record::{self, Session, Verdict};
use crate::repository::{Register, Repository};

/// How long a fence must stand, by the store's clock, before it holds: twice the tolerance of dates,
/// and a margin as long for what the servers of a store may differ.
pub const FENCE_WAIT: Duration = Duration::from_secs(3 * DATE_TOLERANCE.as_secs());

/// A writer that was silent for longer than this does not try to commit: collectors remove the mark
/// that it was fenced after twice as long.
const SILENCE_MAX: Duration = Duration::from_secs(15 * 86_400);

/// Tries to commit where a request may come too late.
const COMMIT_ATTEMPTS: usize = 5;

/// An announced session.
pub(crate) struct Announced {
    /// Its name, and that of its verdict.
    pub(crate) id: SnapshotId,
    record: Session,
    /// How often the announcement was renewed, and when last, by the store's clock.
    renewed: Mutex<(u64, SystemTime)>,
}

impl Announced {
    /// Announces a session.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn begin(repository: &Repository, record: Session) -> Result<Self> {
        let id = SnapshotId::random();
        let name = record::session_name(id);
        let store = repository.store();
        let created =
            record::create_json(store, repository.keys(), ObjectKind::Session, &name, &record)?;
        if created == Created::AlreadyExists {
            return Err(Error::corrupt(name, "a random name was taken"));
        }
        let modified = store.stat(&name).map_err(Error::from).inspect_err(|_| {
            // Nothing was written yet: nobody needs to wait for this session.
            let _left_behind = store.delete(&name);
        })?;
        Ok(Self { id, record, renewed: Mutex::new((0, modified.modified)) })
    }

    /// When it was announced or last renewed, by the store's clock.
    pub(crate) fn renewed(&self) -> SystemTime {
        self.renewed.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    /// Gives a sign of life, in a request of this date.
    ///
    /// # Errors
    /// `Fenced` when the last time is so long ago that a mark of being fenced may have been removed
    /// since: only the store's clock can tell, this machine may have been suspended.
    pub(crate) fn renew(&self, repository: &Repository, date: SystemTime) -> Result<()> {
        let name = record::session_name(self.id);
        let (store, keys) = (repository.store(), repository.keys());
        let mut last = self.renewed.lock().unwrap_or_else(PoisonError::into_inner);
        let (heartbeat, before) = (last.0 + 1, last.1);
        let session = Session { heartbeat, ..self.record.clone() };
        let object = record::seal_json(keys, ObjectKind::Session, &name, &session);
        store.replace_dated(&name, &object, date)?;
        let now = store.stat(&name)?.modified;
        *last = (heartbeat, now);
        let silent = now.duration_since(before).unwrap_or_default();
        if silent > SILENCE_MAX { Err(fenced()) } else { Ok(()) }
    }

    /// Commits: writes `verdict`, the sealed object of `name`.
    ///
    /// # Errors
    /// `Fenced` when a garbage collection has declared the session dead; those of the store. After
    /// the latter the session may have been committed all the same, which the next collector finds
    /// out.
    pub(crate) fn commit(&self, repository: &Repository, name: &str, verdict: &[u8]) -> Result<()> {
        match repository.register() {
            Register::CreateIfAbsent => self.commit_if_absent(repository, name, verdict),
            Register::TimeFenced => self.commit_dated(repository, name, verdict),
        }
    }

    fn commit_if_absent(&self, repository: &Repository, name: &str, verdict: &[u8]) -> Result<()> {
        let store = repository.store();
        self.renew(repository, store.clock())?;
        let error = match store.create(name, &[IoSlice::new(verdict)]) {
            Ok(Created::New) => return Ok(()),
            // Somebody was first: a garbage collection, or this very request, repeated.
            Ok(Created::AlreadyExists) => None,
            // The request may have taken effect although its answer was lost.
            Err(error) => Some(Error::from(error)),
        };
        match (read_back(repository, name, verdict), error) {
            (Ok(Some(true)), _) => Ok(()),
            (Ok(Some(false)), _) => Err(fenced()),
            (Ok(None), Some(error)) | (Err(error), _) => Err(error),
            (Ok(None), None) => Err(Error::corrupt(name, "it was there and is gone")),
        }
    }

    fn commit_dated(&self, repository: &Repository, name: &str, verdict: &[u8]) -> Result<()> {
        let store = repository.store();
        let attempt = || -> Result<()> {
            let date = store.clock();
            self.renew(repository, date)?;
            if is_fenced(repository, self.id)? {
                return Err(fenced());
            }
            match store.replace_dated(name, verdict, date) {
                Ok(()) => Ok(()),
                // The request may have taken effect although its answer was lost.
                Err(error) => match read_back(repository, name, verdict) {
                    Ok(Some(true)) => Ok(()),
                    _ => Err(error.into()),
                },
            }
        };
        let mut result = attempt();
        for _ in 1..COMMIT_ATTEMPTS {
            match &result {
                Err(error) if error.kind() == ErrorKind::Store => result = attempt(),
                _ => break,
            }
        }
        result
    }

    /// Removes the announcement of a session that is decided. If that fails, a garbage collection
    /// finds it.
    pub(crate) fn end(&self, repository: &Repository) {
        let _left_behind = repository.store().delete(&record::session_name(self.id));
    }

    /// Removes the announcement after `committed` was tried, if the session is decided.
    pub(crate) fn end_after(&self, repository: &Repository, committed: &Result<()>) {
        let decided = match (committed, repository.register()) {
            (Ok(()), _) => true,
            // An earlier attempt may still arrive: only the collector can tell when it is too late.
            (Err(_), Register::TimeFenced) => false,
            (Err(error), Register::CreateIfAbsent) => error.kind() == ErrorKind::Fenced,
        };
        if decided {
            self.end(repository);
        }
    }
}

/// Whether the object is the one we wrote; `None` if there is none.
fn read_back(repository: &Repository, name: &str, ours: &[u8]) -> Result<Option<bool>> {
    match repository.store().read(name, ours.len() as u64) {
        Ok(theirs) => Ok(Some(theirs == ours)),
        Err(error) if error.kind() == objects::ErrorKind::TooLarge => Ok(Some(false)),
        Err(error) if error.kind() == objects::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether a session that saves files was declared dead, or is about to be.
///
/// # Errors
/// Those of the store.
pub(crate) fn is_dead(repository: &Repository, id: SnapshotId) -> Result<bool> {
    match repository.register() {
        Register::TimeFenced => is_fenced(repository, id),
        Register::CreateIfAbsent => {
            let verdict = record::snapshot_name(id);
            match repository.store().stat(&verdict) {
                Ok(_) => Ok(matches!(repository.verdict(id)?, Some(Verdict::Fenced { .. }))),
                Err(error) if error.kind() == objects::ErrorKind::NotFound => Ok(false),
                Err(error) => Err(error.into()),
            }
        }
    }
}

/// Whether the session is being declared dead, where the register is time-fenced.
pub(crate) fn is_fenced(repository: &Repository, id: SnapshotId) -> Result<bool> {
    match repository.store().stat(&record::fence_name(id)) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == objects::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn fenced() -> Error {
    Error::new(
        ErrorKind::Fenced,
        "a prune declared this session dead, because it gave no sign of life for longer than the \
         prune's --grace; run it again: it continues with what was uploaded",
    )
}
