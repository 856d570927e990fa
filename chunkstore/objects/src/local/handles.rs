//! Open files of the objects read in ranges, so that an index lookup costs one read, not a walk
//! down the path.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Files kept open: a few index objects and the packs a restore is busy with; but no more than a quarter
/// of those that the process may open.
const HANDLES_MAX: usize = 256;

/// A bounded set of open files, of which the one unused for longest gives way.
pub(super) struct Handles {
    table: Mutex<Table>,
    max: usize,
}

impl Default for Handles {
    fn default() -> Self {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let quarter = limit.map_or(u64::MAX, |limit| limit / 4);
        let max = usize::try_from(quarter).unwrap_or(usize::MAX).clamp(1, HANDLES_MAX);
        Self { table: Mutex::default(), max }
    }
}

#[derive(Default)]
struct Table {
    uses: u64,
    by_key: HashMap<String, Handle>,
}

struct Handle {
    file: Arc<File>,
    last_use: u64,
}

impl Handles {
    /// The open file of `key`, if it is kept.
    pub(super) fn find(&self, key: &str) -> Option<Arc<File>> {
        let mut table = self.lock();
        table.uses += 1;
        let uses = table.uses;
        let handle = table.by_key.get_mut(key)?;
        handle.last_use = uses;
        Some(Arc::clone(&handle.file))
    }

    /// Keeps `file` for `key`.
    pub(super) fn keep(&self, key: &str, file: Arc<File>) {
        let mut table = self.lock();
        table.uses += 1;
        let handle = Handle { file, last_use: table.uses };
        let oldest = if table.by_key.len() >= self.max && !table.by_key.contains_key(key) {
            let oldest = table.by_key.iter().min_by_key(|(_, handle)| handle.last_use);
            oldest.map(|(key, _)| key.clone())
        } else {
            None
        };
        let evicted = oldest.and_then(|oldest| table.by_key.remove(&oldest));
        let former = table.by_key.insert(key.to_owned(), handle);
        drop(table); // closing the last handle of a deleted file can take long
        drop((evicted, former));
    }

    /// Closes the file of `key`, if it is kept.
    pub(super) fn forget(&self, key: &str) {
        let former = self.lock().by_key.remove(key);
        drop(former);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_bounded_and_the_recently_used_stay() {
        let handles = Handles::default();
        let file = Arc::new(tempfile::tempfile().unwrap());
        for n in 0..2 * HANDLES_MAX {
            handles.keep(&format!("k{n}"), Arc::clone(&file));
            handles.find("k0").expect("is in use all the time");
        }
        assert_eq!(handles.lock().by_key.len(), HANDLES_MAX);
        assert!(handles.find(&format!("k{}", 2 * HANDLES_MAX - 1)).is_some());
        assert!(handles.find(&format!("k{}", HANDLES_MAX / 2)).is_none());
        handles.forget("k0");
        assert!(handles.find("k0").is_none());
    }
}
