//! Copies of the objects of one folder on this machine, so that small reads of them cost no requests.
//!
//! For folders whose objects are immutable and read in many small pieces, like an index. An object is
//! fetched whole when it is first read, and kept as a file whose name ends in a hash of its content;
//! a file that does not match its name is thrown away. Any number of processes may share the
//! directory: files appear by renaming, and one that is deleted under a reader stays open for it.
//!
//! The cache is never needed: whatever goes wrong with it, the object is read from the store instead.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, IoSlice, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use crate::{Created, Error, ErrorKind, ObjectMeta, ObjectStore, ReadCost, Result, Traffic};

/// Bytes fetched, hashed and written at once.
const PIECE: usize = 4 << 20;

/// Name of a file that is being written.
const TEMPORARY: &str = ".tmp-";

/// A store in front of another one, with copies of the objects of one folder.
pub struct CachedStore {
    inner: Arc<dyn ObjectStore>,
    folder: &'static str,
    dir: PathBuf,
    max_bytes: u64,
    open: Mutex<BTreeMap<String, Arc<File>>>,
}

impl CachedStore {
    /// Keeps objects of `folder` of the store `inner` in the directory `dir`, which is made if need be:
    /// at most `max_bytes`, the least lately opened go first. Each store needs a directory of its own.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new(
        inner: Arc<dyn ObjectStore>,
        folder: &'static str,
        dir: &Path,
        max_bytes: u64,
    ) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let cached = Self { inner, folder, dir: dir.to_owned(), max_bytes, open: Mutex::default() };
        cached.remove_leftovers()?;
        Ok(cached)
    }

    fn open_files(&self) -> MutexGuard<'_, BTreeMap<String, Arc<File>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name of an object in the folder.
    fn name<'k>(&self, key: &'k str) -> Option<&'k str> {
        key.strip_prefix(self.folder).filter(|name| !name.contains('/'))
    }

    /// The copy of an object, fetched if need be; `None` if it cannot be had.
    fn copy(&self, key: &str) -> Option<Arc<File>> {
        let name = self.name(key)?;
        if let Some(file) = self.open_files().get(name) {
            return Some(Arc::clone(file));
        }
        let file = match self.find(name) {
            Some(file) => file,
            None => self.fetch(key, name)?,
        };
        let file = Arc::new(file);
        self.open_files().insert(name.to_owned(), Arc::clone(&file));
        Some(file)
    }

    /// A file that is there and is what its name says.
    fn find(&self, name: &str) -> Option<File> {
        let prefix = format!("{name}-");
        for entry in fs::read_dir(&self.dir).ok()?.flatten() {
            let file_name = entry.file_name();
            let Some(hash) = file_name.to_str().and_then(|found| found.strip_prefix(&prefix))
            else {
                continue;
            };
            let file = File::open(entry.path()).ok()?;
            if hash_of(&file).is_ok_and(|found| found == hash) {
                // What was used last goes last. If that fails, it only goes sooner.
                let _untouched = file.set_modified(crate::system_clock());
                return Some(file);
            }
            let _gone = fs::remove_file(entry.path());
        }
        None
    }

    /// Fetches an object into a file.
    fn fetch(&self, key: &str, name: &str) -> Option<File> {
        let size = self.inner.stat(key).ok()?.size;
        if size > self.max_bytes / 2 {
            return None;
        }
        let mut piece = vec![0; PIECE.min(size as usize)];
        let mut at = 0;
        self.keep(name, size, &mut |file| {
            while at < size {
                let len = (size - at).min(PIECE as u64) as usize;
                let piece = piece.get_mut(..len).unwrap_or_default();
                self.inner.read_at(key, at, piece).map_err(io::Error::other)?;
                file.write_all(piece)?;
                at += len as u64;
            }
            Ok(())
        })
        .ok()
    }

    /// Writes a file and gives it its name.
    fn keep(
        &self,
        name: &str,
        size: u64,
        fill: &mut dyn FnMut(&mut Hashing) -> io::Result<()>,
    ) -> io::Result<File> {
        self.make_room(size)?;
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let temporary = self.dir.join(format!("{TEMPORARY}{:016x}", u64::from_le_bytes(random)));
        let file =
            File::options().read(true).write(true).create_new(true).mode(0o600).open(&temporary)?;
        let mut hashing = Hashing { file, hasher: blake3::Hasher::new() };
        let filled = fill(&mut hashing).and_then(|()| {
            let hash = hashing.hasher.finalize().to_hex();
            fs::rename(&temporary, self.dir.join(format!("{name}-{hash}")))
        });
        if filled.is_err() {
            let _gone = fs::remove_file(&temporary);
        }
        filled.map(|()| hashing.file)
    }

    /// Deletes the least lately opened files until `bytes` more fit.
    fn make_room(&self, bytes: u64) -> io::Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir)?.flatten() {
            let meta = entry.metadata()?;
            files.push((meta.modified()?, meta.len(), entry.path()));
        }
        let mut total: u64 = files.iter().map(|(_, len, _)| len).sum();
        files.sort();
        for (_, len, path) in files {
            if total + bytes <= self.max_bytes {
                break;
            }
            fs::remove_file(path)?;
            total -= len;
        }
        Ok(())
    }

    /// Files of writers that have died.
    fn remove_leftovers(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)?.flatten() {
            let is_temporary = entry.file_name().to_string_lossy().starts_with(TEMPORARY);
            let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
            if is_temporary && age > Duration::from_secs(86_400) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// Forgets copies of objects that are no more.
    fn forget(&self, is_gone: &dyn Fn(&str) -> bool) {
        self.open_files().retain(|name, _| !is_gone(name));
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        for entry in entries.flatten() {
            let file_name = entry.file_name();
            let name = file_name.to_str().and_then(|name| name.rsplit_once('-'));
            if name.is_some_and(|(name, _)| !name.starts_with('.') && is_gone(name)) {
                let _gone = fs::remove_file(entry.path());
            }
        }
    }
}

/// Hashes what is written.
struct Hashing {
    file: File,
    hasher: blake3::Hasher,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.file.write(bytes)?;
        self.hasher.update(bytes.get(..len).unwrap_or_default());
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn hash_of(file: &File) -> io::Result<String> {
    let size = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    let mut piece = vec![0; PIECE.min(size as usize)];
    let mut at = 0;
    while at < size {
        let len = (size - at).min(PIECE as u64) as usize;
        let piece = piece.get_mut(..len).unwrap_or_default();
        file.read_exact_at(piece, at)?;
        hasher.update(piece);
        at += len as u64;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

impl ObjectStore for CachedStore {
    fn create(&self, key: &str, parts: &[IoSlice<'_>]) -> Result<Created> {
        let created = self.inner.create(key, parts)?;
        if let Some(name) = self.name(key).filter(|_| created == Created::New) {
            let size: u64 = parts.iter().map(|part| part.len() as u64).sum();
            if size <= self.max_bytes / 2 {
                let mut fill =
                    |file: &mut Hashing| parts.iter().try_for_each(|part| file.write_all(part));
                if let Ok(file) = self.keep(name, size, &mut fill) {
                    self.open_files().insert(name.to_owned(), Arc::new(file));
                }
            }
        }
        Ok(created)
    }

    fn replace(&self, key: &str, body: &[u8]) -> Result<()> {
        self.inner.replace(key, body)
    }

    fn create_from(&self, key: &str, body: &mut dyn Read) -> Result<Created> {
        self.inner.create_from(key, body)
    }

    fn replace_dated(&self, key: &str, body: &[u8], date: SystemTime) -> Result<()> {
        self.inner.replace_dated(key, body, date)
    }

    fn delete_dated(&self, keys: &[String], date: SystemTime) -> Result<()> {
        self.inner.delete_dated(keys, date)?;
        let gone: HashSet<_> = keys.iter().filter_map(|key| self.name(key)).collect();
        if !gone.is_empty() {
            self.forget(&|name| gone.contains(name));
        }
        Ok(())
    }

    fn delete_all(&self, keys: &[String]) -> Result<()> {
        self.inner.delete_all(keys)?;
        let gone: HashSet<_> = keys.iter().filter_map(|key| self.name(key)).collect();
        if !gone.is_empty() {
            self.forget(&|name| gone.contains(name));
        }
        Ok(())
    }

    fn clock(&self) -> SystemTime {
        self.inner.clock()
    }

    fn read(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        self.inner.read(key, limit)
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let Some(file) = self.copy(key) else {
            return self.inner.read_at(key, offset, buf);
        };
        match file.read_exact_at(buf, offset) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(Error::new(ErrorKind::Truncated, "read", key).because(error))
            }
            Err(_) => self.inner.read_at(key, offset, buf),
        }
    }

    fn read_tail(&self, key: &str, limit: usize) -> Result<(u64, Vec<u8>)> {
        let tail = self.copy(key).and_then(|file| {
            let size = file.metadata().ok()?.len();
            let mut tail = vec![0; limit.min(size as usize)];
            let from = size - tail.len() as u64;
            file.read_exact_at(&mut tail, from).ok()?;
            Some((size, tail))
        });
        tail.map_or_else(|| self.inner.read_tail(key, limit), Ok)
    }

    fn stat(&self, key: &str) -> Result<ObjectMeta> {
        self.inner.stat(key)
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta) -> Result<()>) -> Result<()> {
        if prefix != self.folder {
            return self.inner.list(prefix, each);
        }
        let mut listed = HashSet::new();
        self.inner.list(prefix, &mut |meta| {
            listed.extend(self.name(&meta.key).map(str::to_owned));
            each(meta)
        })?;
        self.forget(&|name| !listed.contains(name));
        Ok(())
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.inner.delete(key)?;
        if let Some(gone) = self.name(key) {
            self.forget(&|name| name == gone);
        }
        Ok(())
    }

    fn remove_unfinished(&self, older_than: Duration, now: SystemTime) -> Result<u64> {
        self.inner.remove_unfinished(older_than, now)
    }

    fn location(&self) -> String {
        self.inner.location()
    }

    fn read_cost(&self) -> ReadCost {
        self.inner.read_cost()
    }

    fn traffic(&self) -> Option<Traffic> {
        self.inner.traffic()
    }
}

#[cfg(all(test, feature = "testing"))]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::testing::{MemoryStore, Op, RecordingStore, contract};

    type Counted = Arc<RecordingStore<Arc<MemoryStore>>>;

    fn cached(inner: &Counted, dir: &Path, max_bytes: u64) -> CachedStore {
        CachedStore::new(inner.clone(), "index/", dir, max_bytes).unwrap()
    }

    fn counted() -> Counted {
        Arc::new(RecordingStore::new(Arc::new(MemoryStore::new())))
    }

    fn files(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn contract() {
        let dir = tempfile::tempdir().unwrap();
        let count = std::cell::Cell::new(0);
        contract::run_all(&|| {
            count.set(count.get() + 1);
            let own = dir.path().join(count.get().to_string());
            let store = CachedStore::new(Arc::new(MemoryStore::new()), "packs/", &own, 1 << 30);
            Box::new(store.unwrap())
        });
    }

    #[test]
    fn an_object_is_fetched_once_for_all_processes() {
        let dir = tempfile::tempdir().unwrap();
        let inner = counted();
        let body = vec![7; 5 << 20];
        let _ = inner.create("index/a", &[IoSlice::new(&body)]).unwrap();
        let _ = inner.create("packs/a", &[IoSlice::new(&body)]).unwrap();
        for process in 0..3 {
            let store = cached(&inner, dir.path(), 1 << 30);
            inner.reset();
            let mut buf = [0; 100];
            for at in [0, 1000, (5 << 20) - 100] {
                store.read_at("index/a", at, &mut buf).unwrap();
                assert_eq!(buf, [7; 100]);
            }
            assert_eq!(store.read_tail("index/a", 10).unwrap(), (5 << 20, vec![7; 10]));
            let reads = inner.counts().of(Op::ReadAt).calls;
            assert_eq!(reads, if process == 0 { 2 } else { 0 }, "5 MiB are two pieces");
        }
        // Other folders are not kept.
        let store = cached(&inner, dir.path(), 1 << 30);
        store.read_at("packs/a", 0, &mut [0; 10]).unwrap();
        assert_eq!(files(dir.path()), 1);
        // What is written here is not fetched at all.
        let _ = store.create("index/b", &[IoSlice::new(b"own"), IoSlice::new(b" object")]).unwrap();
        inner.reset();
        assert_eq!(store.read_tail("index/b", 100).unwrap().1, b"own object");
        assert_eq!(inner.counts().calls(), 0);
    }

    #[test]
    fn a_damaged_or_lost_copy_is_fetched_again_and_a_broken_cache_is_done_without() {
        let dir = tempfile::tempdir().unwrap();
        let inner = counted();
        let _ = inner.create("index/a", &[IoSlice::new(b"content")]).unwrap();
        let read = |store: &CachedStore| store.read_tail("index/a", 100).unwrap().1;
        assert_eq!(read(&cached(&inner, dir.path(), 1 << 30)), b"content");
        let path = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        for damage in [&b"CONTENT"[..], b"cont", b""] {
            fs::write(&path, damage).unwrap();
            assert_eq!(read(&cached(&inner, dir.path(), 1 << 30)), b"content");
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(read(&cached(&inner, dir.path(), 1 << 30)), b"content");
        let store = cached(&inner, dir.path(), 1 << 30);
        fs::remove_dir_all(dir.path()).unwrap();
        assert_eq!(read(&store), b"content");
        let _ = store.create("index/b", &[IoSlice::new(b"x")]).unwrap();
        fs::create_dir(dir.path()).unwrap();
    }

    #[test]
    fn the_cache_is_bounded_and_drops_what_is_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let inner = counted();
        let store = cached(&inner, dir.path(), 1000);
        for n in 0..10 {
            let _ = store.create(&format!("index/{n}"), &[IoSlice::new(&[1; 300])]).unwrap();
        }
        assert_eq!(files(dir.path()), 3);
        let _ = store.create("index/large", &[IoSlice::new(&[1; 600])]).unwrap();
        assert_eq!(files(dir.path()), 3, "more than half of the room is too large");
        store.read_at("index/large", 0, &mut [0; 10]).unwrap();
        inner.delete("index/9").unwrap();
        store.list("index/", &mut |_| Ok(())).unwrap();
        assert_eq!(files(dir.path()), 2);
        assert_eq!(store.read_tail("index/9", 1).unwrap_err().kind(), ErrorKind::NotFound);
        store.delete_all(&["index/8".to_owned(), "index/7".to_owned()]).unwrap();
        assert_eq!(files(dir.path()), 0);
    }
}
