//! The store of files passes the contract, and keeps to itself what is no object.

use std::fs;
use std::io::{IoSlice, Read};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::time::{Duration, SystemTime};

use objects::local::LocalStore;
use objects::testing::{contract, keys, temporary_local};
use objects::{Created, ErrorKind, ObjectMeta, ObjectStore, Result};

/// A store with the directory that it must not outlive.
struct Kept(LocalStore, #[expect(dead_code, reason = "only dropped")] tempfile::TempDir);

impl ObjectStore for Kept {
    fn create(&self, key: &str, parts: &[IoSlice<'_>]) -> Result<Created> {
        self.0.create(key, parts)
    }

    fn create_from(&self, key: &str, body: &mut dyn Read) -> Result<Created> {
        self.0.create_from(key, body)
    }

    fn replace(&self, key: &str, body: &[u8]) -> Result<()> {
        self.0.replace(key, body)
    }

    fn read(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        self.0.read(key, limit)
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.0.read_at(key, offset, buf)
    }

    fn stat(&self, key: &str) -> Result<ObjectMeta> {
        self.0.stat(key)
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(ObjectMeta) -> Result<()>) -> Result<()> {
        self.0.list(prefix, each)
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.0.delete(key)
    }

    fn remove_unfinished(&self, older_than: Duration, now: SystemTime) -> Result<u64> {
        self.0.remove_unfinished(older_than, now)
    }

    fn location(&self) -> String {
        self.0.location()
    }
}

#[test]
fn contract() {
    contract::run_all(&|| {
        let (dir, store) = temporary_local();
        Box::new(Kept(store, dir))
    });
}

#[test]
fn root_must_be_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    for path in [dir.path().join("missing"), file.clone(), file.join("below")] {
        assert_eq!(LocalStore::open(&path).unwrap_err().kind(), ErrorKind::Invalid, "{path:?}");
    }
    for path in [file.clone(), file.join("below")] {
        assert_eq!(LocalStore::create_root(&path).unwrap_err().kind(), ErrorKind::Invalid);
    }
}

#[test]
fn created_root_is_private_and_may_exist() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a/b/c");
    LocalStore::create_root(&root).unwrap();
    LocalStore::create_root(&root).unwrap();
    for path in ["a", "a/b", "a/b/c"] {
        let mode = fs::metadata(dir.path().join(path)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{path}");
    }
    assert_eq!(LocalStore::open(&root).unwrap().location(), root.display().to_string());
}

#[test]
fn files_are_private_and_at_the_path_of_the_key() {
    let (dir, store) = temporary_local();
    store.replace("packs/3f/3f9c", b"body").unwrap();
    let path = dir.path().join("packs/3f/3f9c");
    assert_eq!(fs::read(&path).unwrap(), b"body");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(dir.path().join("packs/3f")).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn only_regular_files_with_valid_names_are_objects() {
    let (dir, store) = temporary_local();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "x").unwrap();
    let at = |name: &str| dir.path().join(name);
    store.replace("folder/real", b"1").unwrap();
    symlink(outside.path().join("secret"), at("link")).unwrap();
    symlink(outside.path(), at("linked")).unwrap();
    symlink("folder", at("inner")).unwrap();
    symlink("nowhere", at("dangling")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    fs::create_dir(at("lost+found")).unwrap();
    fs::write(at("lost+found/1"), "").unwrap();
    fs::write(at("Upper"), "").unwrap();
    fs::write(at(".tmp-0123456789abcdef"), "").unwrap();

    assert_eq!(keys(&store, ""), ["folder/real"]);
    for key in ["link", "linked/secret", "inner/real", "dangling", "fifo"] {
        assert_eq!(store.read(key, 10).unwrap_err().kind(), ErrorKind::NotFound, "{key}");
        let ranged = store.read_at(key, 0, &mut [0]);
        assert_eq!(ranged.unwrap_err().kind(), ErrorKind::NotFound, "{key}");
        assert_eq!(store.stat(key).unwrap_err().kind(), ErrorKind::NotFound, "{key}");
        assert_eq!(store.create(key, &[]).unwrap_err().kind(), ErrorKind::Invalid, "{key}");
    }
    assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"x");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[test]
fn ranges_follow_what_other_processes_delete_and_replace() {
    let (dir, store) = temporary_local();
    let other = LocalStore::open(dir.path()).unwrap();
    let read = || {
        let mut buf = [0; 1];
        store.read_at("a", 0, &mut buf).map(|()| buf[0])
    };
    store.replace("a", b"1").unwrap();
    assert_eq!(read().unwrap(), b'1');
    other.replace("a", b"2").unwrap();
    assert_eq!(read().unwrap(), b'2');
    other.delete("a").unwrap();
    assert_eq!(read().unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn more_objects_than_kept_handles_can_be_read_in_ranges() {
    let (dir, store) = temporary_local();
    for n in 0..400_u16 {
        store.replace(&n.to_string(), &n.to_le_bytes()).unwrap();
    }
    for n in (0..400_u16).chain(0..400) {
        let mut buf = [0; 2];
        store.read_at(&n.to_string(), 0, &mut buf).unwrap();
        assert_eq!(buf, n.to_le_bytes());
    }
    let open = fs::read_dir("/proc/self/fd").unwrap().filter(|entry| {
        fs::read_link(entry.as_ref().unwrap().path())
            .is_ok_and(|target| target.starts_with(dir.path()))
    });
    assert!(open.count() <= 257, "256 handles and the root");
}

#[test]
fn only_stale_temporaries_are_removed() {
    let (dir, store) = temporary_local();
    store.replace("packs/aa/real", b"1").unwrap();
    let written = store.stat("packs/aa/real").unwrap().modified;
    let temporaries = [".tmp-0000000000000001", "packs/aa/.tmp-00000000000000ff"];
    for name in temporaries.iter().chain(&[".tmp-mine", "packs/.other"]) {
        fs::write(dir.path().join(name), "").unwrap();
    }
    let hour = Duration::from_secs(3600);
    assert_eq!(store.remove_unfinished(hour, written + hour / 2).unwrap(), 0);
    assert_eq!(store.remove_unfinished(hour, written - hour).unwrap(), 0);
    assert_eq!(store.remove_unfinished(hour, written + hour * 2).unwrap(), 2);
    for name in temporaries {
        assert!(!dir.path().join(name).exists(), "{name}");
    }
    for name in [".tmp-mine", "packs/.other", "packs/aa/real"] {
        assert!(dir.path().join(name).exists(), "{name}");
    }
}
