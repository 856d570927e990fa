//! Reaching repositories in buckets: what the command line and the agent do alike.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use chunkstore::record;
use objects::cached::CachedStore;
use objects::s3::{S3Config, S3Store};
use objects::{ErrorKind, ObjectStore, Result};

/// How long a session may give no sign of life, which it does once a minute, before a prune declares it
/// dead.
pub const SESSION_GRACE: Duration = Duration::from_secs(3600);

/// Where copies of the index segments of any number of repositories are kept on this machine. All of it
/// may be deleted at any time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexCache {
    /// The directory, with one below it for each repository.
    pub dir: PathBuf,
    /// Most bytes for one repository.
    pub max_bytes: u64,
}

impl IndexCache {
    /// The directory for the store at `location`. One store, one folder; a location is too long for a
    /// name.
    pub fn folder(&self, location: &str) -> PathBuf {
        self.dir.join(blake3::hash(location.as_bytes()).to_hex().as_str())
    }

    /// Removes the copies of whole repositories, the least lately used first, until those that are left
    /// take at most `max_bytes`, whatever `in_use` (names in the directory) takes.
    ///
    /// # Errors
    /// When the directory cannot be read, or something in it not removed.
    pub fn trim(&self, in_use: &BTreeSet<PathBuf>) -> io::Result<()> {
        let mut others = Vec::new();
        let mut total = 0;
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let (bytes, used) = size_and_age(&path)?;
            total += bytes;
            if !in_use.contains(&path) {
                others.push((used, bytes, path));
            }
        }
        others.sort();
        for (_, bytes, path) in others {
            if total <= self.max_bytes {
                break;
            }
            std::fs::remove_dir_all(path)?;
            total -= bytes;
        }
        Ok(())
    }
}

/// Bytes in a folder of files, and when one of them was last used.
fn size_and_age(folder: &Path) -> io::Result<(u64, SystemTime)> {
    let (mut bytes, mut used) = (0, SystemTime::UNIX_EPOCH);
    for entry in std::fs::read_dir(folder)? {
        let meta = entry?.metadata()?;
        bytes += meta.len();
        used = used.max(meta.modified()?);
    }
    Ok((bytes, used))
}

/// Opens the store of a repository in a bucket, with copies of its index on this machine if `cache` says
/// where.
///
/// # Errors
/// As [`S3Store::open`]. Without a cache all works, only slower.
pub fn open_bucket(config: S3Config, cache: Option<&IndexCache>) -> Result<Arc<dyn ObjectStore>> {
    let store = Arc::new(S3Store::open(config)?);
    let Some(cache) = cache else {
        return Ok(store);
    };
    let own = cache.folder(&store.location());
    let folder = chunkstore::index::FOLDER;
    let cached = CachedStore::new(store.clone(), folder, &own, cache.max_bytes);
    Ok(cached.map_or(store as Arc<dyn ObjectStore>, |cached| Arc::new(cached)))
}

/// The key of an object that keeps a repository from being made in a store: one that neither a
/// repository has, nor an interrupted attempt to make one leaves. `None` also if there is a repository.
///
/// # Errors
/// Those of the store.
pub fn other_object(store: &dyn ObjectStore) -> Result<Option<String>> {
    match store.stat(record::CONFIG) {
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut other = None;
    let found = store.list("", &mut |meta| {
        if meta.key.starts_with(chunkstore::key_slot::FOLDER)
            || meta.key.starts_with(record::PROBES)
        {
            return Ok(());
        }
        other = Some(meta.key);
        Err(objects::Error::new(ErrorKind::Invalid, "list", ""))
    });
    if other.is_some() {
        return Ok(other);
    }
    found.map(|()| None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn copies_of_repositories_that_were_not_used_for_longest_go_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = IndexCache { dir: dir.path().to_owned(), max_bytes: 250 };
        let paths: Vec<_> = ["a", "b", "c", "d"].map(|name| cache.folder(name)).into();
        for (age, path) in paths.iter().enumerate() {
            fs::create_dir(path).unwrap();
            let file = fs::File::create(path.join("segment")).unwrap();
            file.set_len(100).unwrap();
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1000 - age as u64);
            file.set_modified(time).unwrap();
        }
        cache.trim(&BTreeSet::from([paths[3].clone()])).unwrap();
        let left: Vec<_> = paths.iter().map(|path| path.exists()).collect();
        assert_eq!(left, [true, false, false, true], "the oldest is in use");
        cache.trim(&BTreeSet::new()).unwrap();
        assert!(paths[3].exists(), "what fits stays");
    }
}
