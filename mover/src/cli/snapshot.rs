//! Finding the snapshot and the path within it that the user means.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Result, bail};
use chunkstore::id::SnapshotId;
use chunkstore::record::Snapshot;
use chunkstore::repository::Repository;
use serde::Serialize;

use super::output::Output;
use std::collections::BTreeMap;

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
            parent: snapshot.parent,
            seconds: snapshot.finished.duration_since(snapshot.started).as_secs_f64(),
        }
    }
}

/// The snapshot called `name`: an id, the beginning of one, or `latest`, then of `lineage` if given.
///
/// # Errors
/// When there is none, or several.
pub(super) fn find(
    repository: &Repository,
    name: &str,
    lineage: Option<&str>,
    output: &Output,
) -> Result<(SnapshotId, Snapshot)> {
    let list = repository.list_snapshots()?;
    let damaged = list.damaged.len();
    if name == "latest" && damaged > 0 {
        // One of them may be the one that is meant.
        output
            .note(format_args!("warning: {damaged} snapshots cannot be read: run 'ebackup check'"));
    }
    let mut matching: Vec<_> = list
        .snapshots
        .into_iter()
        .filter(|(_, snapshot)| lineage.is_none_or(|lineage| snapshot.lineage == lineage))
        .collect();
    if name == "latest" {
        let of = lineage.map(|lineage| format!(" of lineage '{lineage}'")).unwrap_or_default();
        return match matching.pop() {
            Some(newest) => Ok(newest),
            None if damaged > 0 => {
                bail!("there is no readable snapshot{of}, and {damaged} that cannot be read")
            }
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
