//! Copies of repositories, as a crash would leave them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use objects::local::{LocalStore, Step};

/// Copies a folder of plain files.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// All files below a folder.
pub fn files(root: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(self::files(&path));
        } else {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// A process that dies before its step number `cut`, counted from 0.
#[derive(Clone)]
pub struct Dying(Arc<Mutex<State>>);

struct State {
    root: PathBuf,
    cut: usize,
    steps: usize,
    /// Objects whose name or removal is not synced yet, and what was there before.
    unsynced: BTreeMap<String, Option<Vec<u8>>>,
}

impl Dying {
    pub fn new(root: &Path, cut: usize) -> Self {
        let root = root.to_owned();
        Self(Arc::new(Mutex::new(State { root, cut, steps: 0, unsynced: BTreeMap::new() })))
    }

    /// The store as the process sees it.
    pub fn store(&self) -> Arc<LocalStore> {
        let state = self.0.clone();
        let store = LocalStore::open(&state.lock().unwrap().root).unwrap();
        Arc::new(
            store.with_observer(Arc::new(move |step, key| state.lock().unwrap().step(step, key))),
        )
    }

    /// Whether the process has died.
    pub fn is_dead(&self) -> bool {
        let state = self.0.lock().unwrap();
        state.steps > state.cut
    }

    /// Loses part of what was not synced: half of each temporary file.
    pub fn tear(&self) {
        let state = self.0.lock().unwrap();
        for path in files(&state.root) {
            if path.file_name().unwrap().as_encoded_bytes().starts_with(b".") {
                let file = fs::File::options().write(true).open(path).unwrap();
                file.set_len(file.metadata().unwrap().len() / 2).unwrap();
            }
        }
    }

    /// Also loses what was renamed or removed in folders that were not synced since. Says whether
    /// there was any such thing.
    pub fn lose_names(&self) -> bool {
        let state = self.0.lock().unwrap();
        for (key, before) in &state.unsynced {
            let path = state.root.join(key);
            match before {
                Some(bytes) => fs::write(path, bytes).unwrap(),
                None => fs::remove_file(path).unwrap_or_default(),
            }
        }
        !state.unsynced.is_empty()
    }
}

impl State {
    fn step(&mut self, step: Step, key: &str) -> io::Result<()> {
        self.steps += 1;
        if self.steps > self.cut {
            return Err(io::Error::other("the process is dead"));
        }
        match step {
            Step::Publish | Step::Delete => {
                let before = fs::read(self.root.join(key)).ok();
                self.unsynced.entry(key.to_owned()).or_insert(before);
            }
            Step::SyncFolder => drop(self.unsynced.remove(key)),
            Step::MakeFolder | Step::CreateTemporary | Step::Write | Step::Sync => {}
        }
        Ok(())
    }
}
