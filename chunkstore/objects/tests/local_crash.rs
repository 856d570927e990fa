//! Every write is cut before every one of its durable steps; the store opened anew is whole. And a
//! disk that fills up leaves nothing behind.

#![expect(clippy::unwrap_used, reason = "also in the functions that the tests share")]

use std::fs;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use objects::local::{LocalStore, Step};
use objects::testing::keys;
use objects::{Created, ErrorKind, ObjectStore, Result};

const KEY: &str = "packs/3f/3f9c";
const OLD: &[u8] = b"the old content";
const NEW: &[u8] = b"the new content, which is longer";

/// Runs `operation` on a store that dies before its step number `cut`; gives the steps begun, and
/// whether the operation got through.
fn cut_at(
    root: &Path,
    cut: usize,
    operation: &dyn Fn(&LocalStore) -> Result<()>,
) -> (Vec<Step>, bool) {
    let steps = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&steps);
    let folder = root.join("packs/3f");
    let store = LocalStore::open(root).unwrap().with_observer(Arc::new(move |step, key| {
        assert_eq!(key, KEY);
        let mut seen = seen.lock().unwrap();
        seen.push(step);
        if seen.len() <= cut {
            return Ok(());
        }
        if step == Step::Sync {
            tear(&folder);
        }
        Err(io::Error::other("cut"))
    }));
    let outcome = operation(&store);
    drop(store);
    let steps = Arc::into_inner(steps).unwrap().into_inner().unwrap();
    (steps, outcome.is_ok())
}

/// Truncates the temporary file, whose content may be lost until it is synced.
fn tear(folder: &Path) {
    let torn = temporaries(folder);
    assert_eq!(torn.len(), 1);
    fs::File::options().write(true).open(&torn[0]).unwrap().set_len(7).unwrap();
}

fn temporaries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with('.')).collect()
}

fn create(store: &LocalStore, body: &[u8]) -> Result<Created> {
    let (left, right) = body.split_at(body.len() / 2);
    store.create(KEY, &[IoSlice::new(left), IoSlice::new(right)])
}

/// What is in the store opened anew; checks that listing, stat and the reads agree on it.
fn content(root: &Path) -> Option<Vec<u8>> {
    let store = LocalStore::open(root).unwrap();
    match store.read(KEY, 1000) {
        Ok(body) => {
            assert_eq!(keys(&store, ""), [KEY]);
            assert_eq!(store.stat(KEY).unwrap().size, body.len() as u64);
            Some(body)
        }
        Err(err) => {
            assert_eq!(err.kind(), ErrorKind::NotFound);
            assert_eq!(keys(&store, ""), [""; 0]);
            None
        }
    }
}

/// Is given the steps begun and the content found.
type Check = dyn Fn(&[Step], Option<&[u8]>);

/// Cuts `operation` before each of its steps in turn, on the store that `prepare` left, and shows
/// `check` the steps begun and the content found. Returns the steps of the uncut operation.
fn for_every_cut(
    prepare: &dyn Fn(&LocalStore),
    operation: &dyn Fn(&LocalStore) -> Result<()>,
    check: &Check,
) -> Vec<Step> {
    for cut in 0.. {
        let dir = tempfile::tempdir().unwrap();
        prepare(&LocalStore::open(dir.path()).unwrap());
        let (steps, through) = cut_at(dir.path(), cut, operation);
        assert_eq!(through, steps.len() == cut, "an observer's error ends the operation");
        let found = content(dir.path());
        if through {
            return steps;
        }
        check(&steps, found.as_deref());

        // Life goes on: the key can be written, and what the dead process left can be removed.
        let store = LocalStore::open(dir.path()).unwrap();
        let created = create(&store, NEW).unwrap();
        assert_eq!(created == Created::AlreadyExists, found.is_some());
        let body = store.read(KEY, 1000).unwrap();
        assert_eq!(body, found.as_deref().unwrap_or(NEW));
        let folder = dir.path().join("packs/3f");
        let left = temporaries(&folder);
        let later = store.stat(KEY).unwrap().modified + Duration::from_secs(7200);
        let removed = store.remove_unfinished(Duration::from_secs(3600), later).unwrap();
        assert_eq!(removed, left.len() as u64);
        assert_eq!(temporaries(&folder), [""; 0].map(PathBuf::from));
        assert_eq!(content(dir.path()), Some(body));
    }
    unreachable!("the loop ends with the uncut operation")
}

#[test]
fn create_is_all_or_nothing_wherever_it_is_cut() {
    use Step::{CreateTemporary, MakeFolder, Publish, Sync, SyncFolder, Write};
    let steps = for_every_cut(
        &|_| {},
        &|store| create(store, NEW).map(|created| assert_eq!(created, Created::New)),
        &|steps, found| {
            let published = steps.iter().rev().nth(1) == Some(&Publish);
            assert_eq!(found, published.then_some(NEW), "{steps:?}");
        },
    );
    let folders = [MakeFolder, SyncFolder, MakeFolder, SyncFolder];
    let object = [CreateTemporary, Write, Sync, Publish, SyncFolder];
    assert_eq!(steps, [&folders[..], &object].concat());
}

#[test]
fn create_of_an_existing_object_makes_sure_that_it_is_durable() {
    let steps = for_every_cut(
        &|store| assert_eq!(create(store, OLD).unwrap(), Created::New),
        &|store| create(store, NEW).map(|created| assert_eq!(created, Created::AlreadyExists)),
        &|steps, found| assert_eq!(found, Some(OLD), "{steps:?}"),
    );
    // Both folders and the object may have been made by a process that died before syncing.
    assert_eq!(steps, [Step::SyncFolder; 3]);
}

#[test]
fn replace_leaves_the_old_or_the_new_wherever_it_is_cut() {
    let steps = for_every_cut(
        &|store| assert_eq!(create(store, OLD).unwrap(), Created::New),
        &|store| store.replace(KEY, NEW),
        &|steps, found| {
            let published = steps.contains(&Step::Publish) && steps.last() != Some(&Step::Publish);
            assert_eq!(found, Some(if published { NEW } else { OLD }), "{steps:?}");
        },
    );
    assert_eq!(steps.last(), Some(&Step::SyncFolder));
}

#[test]
fn delete_is_all_or_nothing_wherever_it_is_cut() {
    let steps = for_every_cut(
        &|store| assert_eq!(create(store, OLD).unwrap(), Created::New),
        &|store| store.delete(KEY),
        &|steps, found| {
            let deleted = steps.len() > 1;
            assert_eq!(found, (!deleted).then_some(OLD), "{steps:?}");
        },
    );
    assert_eq!(steps, [Step::Delete, Step::SyncFolder]);
}

#[test]
fn folders_are_synced_once_per_process() {
    let dir = tempfile::tempdir().unwrap();
    let steps = Arc::new(Mutex::new(0));
    let seen = Arc::clone(&steps);
    let store = LocalStore::open(dir.path()).unwrap().with_observer(Arc::new(move |step, _| {
        *seen.lock().unwrap() += u32::from(step == Step::SyncFolder);
        Ok(())
    }));
    let mut synced = Vec::new();
    for key in ["a/b/1", "a/b/2", "a/c/1", "1"] {
        let _ = store.create(key, &[]).unwrap();
        synced.push(std::mem::take(&mut *steps.lock().unwrap()));
    }
    assert_eq!(synced, [3, 1, 2, 1]);
}

/// A small file system that is unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "objects-test"])
            .arg(dir.path())
            .output()
            .is_ok_and(|output| output.status.success());
        mounted.then_some(Self(dir))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(unmounted.unwrap().success());
    }
}

#[test]
fn full_disk_leaves_nothing_and_can_be_freed() {
    let Some(disk) = SmallDisk::mount() else {
        eprintln!("NOT TESTED: a full disk, for this user cannot mount a tmpfs");
        return;
    };
    let store = LocalStore::open(disk.0.path()).unwrap();
    let half = vec![1; 600 << 10];
    assert_eq!(store.create("packs/1", &[IoSlice::new(&half)]).unwrap(), Created::New);
    let parts = [IoSlice::new(&half), IoSlice::new(&half)];
    assert_eq!(store.create("packs/2", &parts).unwrap_err().kind(), ErrorKind::Full);
    assert_eq!(store.replace("packs/1", &half).unwrap_err().kind(), ErrorKind::Full);
    assert_eq!(temporaries(&disk.0.path().join("packs")), [""; 0].map(PathBuf::from));
    assert_eq!(keys(&store, ""), ["packs/1"]);
    assert_eq!(store.read("packs/1", 1 << 20).unwrap(), half);
    store.read_at("packs/1", 0, &mut [0]).unwrap(); // the kept handle must not hold the space

    store.delete("packs/1").unwrap();
    assert_eq!(store.create("packs/2", &[IoSlice::new(&half)]).unwrap(), Created::New);
    assert_eq!(store.read("packs/2", 1 << 20).unwrap(), half);
}
