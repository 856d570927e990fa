//! Gathering: what is on the store.

use std::time::{Duration, SystemTime};

use objects::ObjectMeta;

use super::plan::{GenerationFact, PackFact, SessionFact};
use crate::codec::seal::ObjectKind;
use crate::error::{ErrorKind, Result};
use crate::id::{GenerationId, PackId, SnapshotId};
use crate::pack::PackClass;
use crate::record::{self, Session};
use crate::repository::{Register, Repository};
use crate::session::FENCE_WAIT;

/// Whether an object exists.
pub(super) fn exists(repository: &Repository, name: &str) -> Result<bool> {
    match repository.store().stat(name) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == objects::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// All packs, ascending. `now` is the store's time.
pub(super) fn packs(repository: &Repository, now: SystemTime) -> Result<Vec<PackFact>> {
    let mut packs = Vec::new();
    for class in [PackClass::Data, PackClass::Meta] {
        repository.store().list(class.folder(), &mut |meta| {
            let id = meta.key.rsplit('/').next().and_then(|name| name.parse::<PackId>().ok());
            // Only under its own name: another object of that name is not this pack.
            let id = id.filter(|id| class.object_name(*id) == meta.key);
            let age = age(&meta, now);
            packs.extend(id.map(|id| PackFact { class, id, size: meta.size, age }));
            Ok(())
        })?;
    }
    packs.sort_unstable();
    Ok(packs)
}

/// Objects of `folder` that are named by an identifier, with their age.
pub(super) fn ages(
    repository: &Repository,
    folder: &str,
    now: SystemTime,
) -> Result<Vec<(SnapshotId, Duration)>> {
    let mut found = Vec::new();
    repository.store().list(folder, &mut |meta| {
        let id = meta.key[folder.len()..].parse().ok();
        found.extend(id.map(|id| (id, age(&meta, now))));
        Ok(())
    })?;
    Ok(found)
}

/// By how much an object is older than `now`, by the store's clock.
pub(super) fn age(meta: &ObjectMeta, now: SystemTime) -> Duration {
    now.duration_since(meta.modified).unwrap_or_default()
}

/// All announced sessions, garbage collections included.
pub(super) fn sessions(repository: &Repository, now: SystemTime) -> Result<Vec<SessionFact>> {
    let mut found = Vec::new();
    for (id, silent) in ages(repository, record::SESSIONS, now)? {
        found.extend(session(repository, id, silent, now)?);
    }
    Ok(found)
}

/// One announced session; `None` if it is announced no more.
pub(super) fn session(
    repository: &Repository,
    id: SnapshotId,
    silent: Duration,
    now: SystemTime,
) -> Result<Option<SessionFact>> {
    let name = record::session_name(id);
    let read = record::read_json(repository.store(), repository.keys(), ObjectKind::Session, &name);
    let (purpose, writer, started) = match read {
        Ok(Session { purpose, writer, started, .. }) => (purpose, writer, Some(started)),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        // Whoever it is, it has announced itself.
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            ("session".to_owned(), "unknown (its announcement is damaged)".to_owned(), None)
        }
        Err(error) => return Err(error),
    };
    let age_secs = started
        .and_then(|started| SystemTime::try_from(started).ok())
        .and_then(|started| now.duration_since(started).ok())
        .map_or(0, |age| age.as_secs())
        .max(silent.as_secs());
    let decided = purpose != record::PRUNE && is_decided(repository, id, now)?;
    let silent_secs = silent.as_secs();
    Ok(Some(SessionFact { id, purpose, writer, silent_secs, age_secs, decided }))
}

/// The objects of which one decides how a session ends: what its purpose makes it commit. Both, if its
/// announcement cannot be read.
pub(super) fn registers(purpose: &str, id: SnapshotId) -> Vec<String> {
    match purpose {
        record::BACKUP => vec![record::snapshot_name(id)],
        record::REPACK => vec![record::relocation_name(id)],
        _ => vec![record::snapshot_name(id), record::relocation_name(id)],
    }
}

/// Whether the session can commit no more: its verdict is there, or was, and is forgotten.
pub(super) fn is_decided(repository: &Repository, id: SnapshotId, now: SystemTime) -> Result<bool> {
    // The verdict before the mark: it is deleted only while the mark is there.
    for name in [record::snapshot_name(id), record::relocation_name(id), record::forgotten_name(id)]
    {
        if exists(repository, &name)? {
            return Ok(true);
        }
    }
    if repository.register() == Register::CreateIfAbsent {
        return Ok(false);
    }
    match repository.store().stat(&record::fence_name(id)) {
        Ok(meta) => Ok(age(&meta, now) > FENCE_WAIT),
        Err(error) if error.kind() == objects::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Begun garbage collections, and what earlier ones have left behind.
pub(super) struct Generations {
    pub(super) begun: Vec<GenerationFact>,
    /// Objects that belong to a finished one.
    pub(super) orphans: Vec<String>,
}

/// All garbage collections on the store.
pub(super) fn generations(repository: &Repository) -> Result<Generations> {
    // Tombstones last: they are created first, so what has none is left over from a finished one.
    let mut others = Vec::new();
    for folder in [record::WAITS, record::DOOMED] {
        others.extend(repository.list_ids(folder)?.into_iter().map(|id| (folder, id)));
    }
    let ids = repository.list_ids(record::TOMBSTONES)?;
    others.retain(|(_, id)| !ids.contains(id));
    let orphans = others.into_iter().map(|(folder, id)| format!("{folder}{id}")).collect();
    let mut begun = Vec::new();
    for id in ids {
        let id = GenerationId(id.0);
        match record::read_tombstones(repository.store(), repository.keys(), id) {
            Ok(tombstones) => begun.push(GenerationFact { id, tombstones }),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error.context(
                    "an earlier prune left a list of packs that cannot be read; if no backup and no \
                     prune is running, delete it and run prune again",
                ));
            }
        }
    }
    Ok(Generations { begun, orphans })
}
