//! Finding the snapshot and the path within it that the user means.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Result, bail};
use chunkstore::Error;
use chunkstore::error::chain;
use chunkstore::id::SnapshotId;
use chunkstore::record::Snapshot;
use chunkstore::repository::Repository;
use jiff::SignedDuration;
use serde::Serialize;

use super::now;
use super::output::Output;

/// A snapshot as JSON shows it.
#[derive(Serialize)]
pub(super) struct SnapshotLine<'a> {
    id: SnapshotId,
    time: jiff::Timestamp,
    lineage: &'a str,
    host: &'a str,
    path: &'a str,
    tags: &'a BTreeMap<String, String>,
    bytes: u64,
    files: u64,
    dirs: u64,
    bytes_stored: u64,
    files_missing: u64,
    files_changed_while_read: u64,
    files_vanished: u64,
    warnings: u64,
    parent: Option<SnapshotId>,
    seconds: f64,
}

impl<'a> SnapshotLine<'a> {
    pub(super) fn new(id: SnapshotId, snapshot: &'a Snapshot) -> Self {
        Self {
            id,
            time: snapshot.started,
            lineage: &snapshot.lineage,
            host: &snapshot.host,
            path: &snapshot.path,
            tags: &snapshot.tags,
            bytes: snapshot.summary.bytes,
            files: snapshot.summary.files,
            dirs: snapshot.summary.dirs,
            bytes_stored: snapshot.summary.bytes_stored,
            files_missing: snapshot.summary.files_missing,
            files_changed_while_read: snapshot.summary.files_changed_while_read,
            files_vanished: snapshot.summary.files_vanished,
            warnings: snapshot.summary.warnings,
            parent: snapshot.parent,
            seconds: snapshot.finished.duration_since(snapshot.started).as_secs_f64(),
        }
    }
}

/// How far ahead of this machine's clock a snapshot may be dated and still count as made.
const CLOCKS_DIFFER: SignedDuration = SignedDuration::from_hours(24);

/// Objects named in one message, at most.
const NAMED: usize = 10;

/// Whether a snapshot comes from a machine whose clock was wrong.
pub(super) fn is_of_the_future(snapshot: &Snapshot) -> bool {
    snapshot.started.duration_since(now()) > CLOCKS_DIFFER
}

/// The snapshot called `name`: an id, the beginning of one, or `latest`, then of `lineage` if given.
///
/// # Errors
/// When there is none, or several; `latest` also when any cannot be read, since that may be the one.
pub(super) fn find(
    repository: &Repository,
    name: &str,
    lineage: Option<&str>,
    output: &Output,
) -> Result<(SnapshotId, Snapshot)> {
    let list = repository.list_snapshots()?;
    let mut matching: Vec<_> = list
        .snapshots
        .into_iter()
        .filter(|(_, snapshot)| lineage.is_none_or(|lineage| snapshot.lineage == lineage))
        .collect();
    if name == "latest" {
        refuse_damaged(&list.damaged)?;
        // One that is dated in the future would be the latest for as long.
        let newest = matching.iter().rposition(|(_, snapshot)| !is_of_the_future(snapshot));
        if let Some(newest) = newest {
            for (id, snapshot) in matching.drain(newest + 1..) {
                output.note(format_args!(
                    "warning: snapshot {} is dated {}, in the future, and is not taken for the latest",
                    id.short(),
                    snapshot.started
                ));
            }
        }
        let of = lineage.map(|lineage| format!(" of lineage '{lineage}'")).unwrap_or_default();
        return match matching.pop() {
            Some(newest) => Ok(newest),
            None => bail!("there is no snapshot{of}: see 'ebackup snapshots'"),
        };
    }
    matching.retain(|(id, _)| !name.is_empty() && id.to_string().starts_with(name));
    match (matching.pop(), matching.len()) {
        (Some(found), 0) => Ok(found),
        (Some(_), more) => bail!("'{name}' is the beginning of {} snapshots", more + 1),
        (None, _) => {
            let damaged_one = list.damaged.into_iter().find(|(object, _)| {
                object
                    .strip_prefix(chunkstore::record::SNAPSHOTS)
                    .is_some_and(|id| id.starts_with(name))
            });
            match damaged_one {
                Some((_, error)) => Err(error.into()),
                None => bail!("there is no snapshot '{name}': see 'ebackup snapshots'"),
            }
        }
    }
}

fn refuse_damaged(damaged: &[(String, Error)]) -> Result<()> {
    let Some((_, first)) = damaged.first() else {
        return Ok(());
    };
    let names: Vec<_> = damaged.iter().take(NAMED).map(|(object, _)| object.as_str()).collect();
    let more = match damaged.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    bail!(
        "which snapshot is the latest cannot be told: {}{more} cannot be read, and may be newer ({}); name \
         a snapshot of 'ebackup snapshots', or forget what is damaged by its full name",
        names.join(", "),
        chain(first)
    )
}

/// The snapshot to forget called `name`, and a description of it. Also one that cannot be read, so
/// that it does not stand in the way of `prune` for ever; that one must be named in full.
///
/// # Errors
/// As [`find`].
pub(super) fn find_to_forget(
    repository: &Repository,
    name: &str,
    lineage: Option<&str>,
    output: &Output,
) -> Result<(SnapshotId, String)> {
    if let Ok(id) = name.parse::<SnapshotId>() {
        let object = chunkstore::record::snapshot_name(id);
        let list = repository.list_snapshots()?;
        if list.damaged.iter().any(|(damaged, _)| *damaged == object) {
            return Ok((id, "(it cannot be read)".to_owned()));
        }
    }
    let (id, found) = find(repository, name, lineage, output)?;
    Ok((id, format!("{} {}", found.started, found.lineage)))
}

/// The name of a snapshot, and the path within it that may stand behind a colon.
pub(super) fn split(named: &OsStr) -> (String, &Path) {
    let bytes = named.as_bytes();
    let colon = bytes.iter().position(|byte| *byte == b':').unwrap_or(bytes.len());
    let (name, path) = bytes.split_at(colon);
    let path = path.get(1..).unwrap_or_default();
    (String::from_utf8_lossy(name).into_owned(), Path::new(OsStr::from_bytes(path)))
}

/// The key in a tree of a path that the user wrote: slashes at either end and `.` do not matter.
///
/// # Errors
/// When it leads upwards.
pub(super) fn key_of(path: &Path) -> Result<Vec<u8>> {
    let parts: Vec<&[u8]> = path
        .as_os_str()
        .as_bytes()
        .split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .collect();
    if parts.contains(&&b".."[..]) {
        bail!("'..' has no meaning in a snapshot");
    }
    Ok(parts.join(&0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_keys() {
        for (path, key) in [("", &b""[..]), ("/", b""), ("a", b"a"), ("./a//b/", b"a\0b")] {
            assert_eq!(key_of(Path::new(path)).unwrap(), key, "{path}");
        }
        assert!(key_of(Path::new("a/../b")).is_err());
    }
}
