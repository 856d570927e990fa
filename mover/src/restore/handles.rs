//! How many files and folders of the target a restore holds open, by what the process may.

use chunkstore::error::Result;

use crate::fs::{files_for_jobs, too_few_files};

/// Held by each thread: the folder it was in last, a hidden folder, a file, and one more on the way to them.
const THREAD_HANDLES: usize = 4;

/// How many of each are open at a time; what has to be is closed and opened again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Handles {
    /// Folders that are on the way, or were used last.
    pub(super) folders: usize,
    /// Files of several pieces.
    pub(super) files: usize,
    /// Threads for which that is enough.
    pub(super) threads: usize,
}

impl Handles {
    /// Divides what is left of the process's `limit`: half for `threads`, the rest for the folders and files.
    ///
    /// # Errors
    /// When it is too low for one thread.
    pub(super) fn new(limit: u64, threads: usize) -> Result<Self> {
        let left = files_for_jobs(limit);
        let Some(threads) =
            (1..=threads.max(1)).rev().find(|threads| threads * THREAD_HANDLES <= left / 2)
        else {
            return Err(too_few_files(limit, 2 * THREAD_HANDLES));
        };
        let left = left - threads * THREAD_HANDLES;
        Ok(Self { folders: (left / 2).min(256), files: (left / 2).min(256), threads })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_open_stays_below_the_limit() {
        for limit in [0, 20, 64, 94] {
            let error = Handles::new(limit, 4).unwrap_err().to_string();
            assert!(error.contains("needs 95 at least"), "{error}");
        }
        for limit in [95, 100, 128, 256, 1024, 1 << 20, u64::MAX] {
            for threads in [0, 1, 2, 16, 1000] {
                let handles = Handles::new(limit, threads).unwrap();
                let Handles { folders, files, threads: fewer } = handles;
                assert!(folders >= 2 && files >= 2 && (1..=threads.max(1)).contains(&fewer));
                let held = folders + files + fewer * THREAD_HANDLES;
                assert!(held <= files_for_jobs(limit), "{limit}, {threads}: {handles:?}");
            }
        }
        let plenty = Handles { folders: 256, files: 256, threads: 8 };
        assert_eq!(Handles::new(1 << 20, 8).unwrap(), plenty);
    }
}
