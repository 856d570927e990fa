//! One budget of bytes, divided among everything a backup keeps in memory.

use std::time::Duration;

use chunkstore::Result;
use chunkstore::codec::compress::Level;
use chunkstore::fetch::READ_BYTES;
use chunkstore::limits::{
    CHUNK_BYTES_MAX, PACK_BYTES_MAX, PACK_TARGET_BYTES_MAX, PACK_TARGET_BYTES_MIN,
};
use chunkstore::writer::WriterSettings;
use objects::ReadCost;

use crate::fs::{files_for_jobs, too_few_files};

/// Least memory the program accepts.
pub const MEMORY_BYTES_MIN: u64 = 96 << 20;

/// What the program itself takes, whatever it does: code, the runtime of connections, the allocator's
/// slack.
const PROGRAM_BYTES: u64 = 24 << 20;

/// What a job takes whatever its size: stacks, the directory listing buffers, tree nodes, connections.
const JOB_BYTES: u64 = 16 << 20;

/// Both, where there is one job.
const FIXED_BYTES: u64 = PROGRAM_BYTES + JOB_BYTES;

/// What one worker takes.
const WORKER_BYTES: u64 = 8 << 20;

/// What a thread takes that fetches blobs: one read, one plaintext, and what its connection holds.
const FETCH_BYTES: u64 = READ_BYTES as u64 + CHUNK_BYTES_MAX as u64 + (2 << 20);

/// How many folders of the source are held open at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OpenDirs {
    /// On the way down; those above are opened again on the way up.
    pub(super) descent: usize,
    /// For the files of one bundle, until they are read.
    pub(super) bundle: usize,
    /// Workers for whose bundles that is enough.
    pub(super) workers: usize,
}

impl OpenDirs {
    /// Divides what is left of the process's `limit`: a quarter for the descent, half for the bundles that
    /// `workers` have or wait for, and that is collected.
    ///
    /// # Errors
    /// When it is too low for one worker.
    pub(super) fn new(limit: u64, workers: usize) -> Result<Self> {
        let left = files_for_jobs(limit);
        let in_flight = |workers: usize| 3 * workers + 1;
        let Some(workers) = (1..=workers).rev().find(|workers| left / 2 >= in_flight(*workers))
        else {
            return Err(too_few_files(limit, 2 * in_flight(1)));
        };
        let bundle = (left / 2 / in_flight(workers)).min(128);
        Ok(Self { descent: (left / 4).clamp(2, 256), bundle, workers })
    }
}

/// Memory and threads of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    /// Resident bytes of the whole program, were this its only job.
    pub memory_bytes: u64,
    /// Threads that read, hash, compress and seal.
    pub workers: usize,
    /// Size at which a pack is closed.
    pub pack_target_bytes: usize,
}

impl Resources {
    /// Divides `memory_bytes`, for at most `cpus` workers.
    ///
    /// ```text
    /// 40 MiB          the program itself
    /// 3 packs         one being filled, two being uploaded
    /// 3 blocks        of a large file being cut: 1/32 each, from 4 to 8 MiB
    /// 3/24            index filters, names of a large folder, entries waiting in the queue
    /// per worker      8 MiB: 4 read ahead, 2 compressed, 2 for the compressor's tables
    /// ```
    ///
    /// # Panics
    /// Never: too small a budget counts as the least one.
    pub fn new(memory_bytes: u64, cpus: usize) -> Self {
        let memory_bytes = memory_bytes.max(MEMORY_BYTES_MIN);
        let free = memory_bytes - FIXED_BYTES;
        // With a tenth of the rest for each pack, the least budget leaves room for one worker.
        let pack = ((free / 10) as usize).clamp(PACK_TARGET_BYTES_MIN, PACK_TARGET_BYTES_MAX);
        let mut resources = Self { memory_bytes, workers: 1, pack_target_bytes: pack };
        let left = |resources: &Self| free.saturating_sub(resources.shared_bytes());
        let workers = (left(&resources) / WORKER_BYTES) as usize;
        resources.workers = workers.clamp(1, cpus.max(1));
        // What the workers leave makes larger packs, which are fewer requests.
        let spare = left(&resources).saturating_sub(resources.workers as u64 * WORKER_BYTES) / 3;
        resources.pack_target_bytes = (pack + spare as usize).min(PACK_TARGET_BYTES_MAX);
        resources
    }

    /// Jobs that can run at once in one process of `memory_bytes`, each with what [`new`](Self::new) needs
    /// at least; at least one.
    pub fn jobs_in(memory_bytes: u64) -> usize {
        let each = MEMORY_BYTES_MIN - PROGRAM_BYTES;
        (memory_bytes.saturating_sub(PROGRAM_BYTES) / each).max(1) as usize
    }

    /// Divides `memory_bytes` among `jobs` that run at once in one process, and each part as
    /// [`new`](Self::new) does: the program itself is there only once.
    pub fn of_each(memory_bytes: u64, cpus: usize, jobs: usize) -> Self {
        let share = memory_bytes.saturating_sub(PROGRAM_BYTES) / jobs.max(1) as u64;
        Self::new(share + PROGRAM_BYTES, cpus)
    }

    /// Bytes of everything but the program itself and its workers.
    fn shared_bytes(&self) -> u64 {
        let packs = 3 * (self.pack_target_bytes + CHUNK_BYTES_MAX);
        let blocks = 3 * self.block_bytes();
        let shares = self.filter_bytes() + self.listing_bytes() + self.queue_bytes();
        (packs + blocks + shares) as u64
    }

    fn filter_bytes(&self) -> usize {
        (self.memory_bytes / 24) as usize
    }

    /// Settings of a writer within this budget.
    pub fn writer(&self, compression: Level) -> WriterSettings {
        WriterSettings {
            compression,
            pack_target_bytes: self.pack_target_bytes,
            pack_buffers: 3,
            uploads: 2,
            filter_bytes: self.filter_bytes(),
            heartbeat: Duration::from_secs(60),
        }
    }

    /// Bytes for the names of one large folder, before they are sorted on disk.
    pub fn listing_bytes(&self) -> usize {
        (self.memory_bytes / 24) as usize
    }

    /// Bytes of entries that wait for content that is still being read.
    pub fn queue_bytes(&self) -> usize {
        (self.memory_bytes / 24) as usize
    }

    /// Threads that read whole packs.
    pub fn check_threads(&self) -> usize {
        let packs = self.memory_bytes.saturating_sub(FIXED_BYTES) / (2 * PACK_BYTES_MAX);
        (packs as usize).clamp(1, self.workers.max(2))
    }

    /// Threads that fetch blobs of a store where reads cost so much: on one that is far away, more than
    /// there are processors.
    pub fn fetch_threads(&self, cost: ReadCost) -> usize {
        let used = FIXED_BYTES + (self.window_bytes() + self.filter_bytes()) as u64;
        let fitting = self.memory_bytes.saturating_sub(used) / FETCH_BYTES;
        self.workers.max(2).max(cost.parallel.min(fitting as usize))
    }

    /// The same for a copy, whose threads store what they have fetched.
    pub fn copy_threads(&self, cost: ReadCost) -> usize {
        let left = self.memory_bytes.saturating_sub(FIXED_BYTES + self.shared_bytes());
        let fitting = left / (FETCH_BYTES + WORKER_BYTES);
        self.workers.max(2).max(cost.parallel.min(fitting as usize))
    }

    /// Bytes of what a restore wants at one time.
    pub fn window_bytes(&self) -> usize {
        (self.memory_bytes / 8) as usize
    }

    /// Bytes of each of the three blocks in which a large file is cut.
    pub fn block_bytes(&self) -> usize {
        ((self.memory_bytes / 32) as usize).clamp(2 * CHUNK_BYTES_MAX, 8 << 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_divided_or_refused() {
        for limit in [0, 40, 64, 94] {
            let error = OpenDirs::new(limit, 4).unwrap_err().to_string();
            assert!(error.contains("needs 95 at least"), "{error}");
        }
        for limit in [95, 100, 256, 1024, 1 << 20, u64::MAX] {
            for workers in [1, 2, 16] {
                let dirs = OpenDirs::new(limit, workers).unwrap();
                assert!(dirs.workers >= 1 && dirs.workers <= workers && dirs.bundle >= 1);
                let held = dirs.descent + (3 * dirs.workers + 1) * dirs.bundle;
                assert!(held <= files_for_jobs(limit), "{limit}, {workers}: {dirs:?}");
            }
        }
        let plenty = OpenDirs { descent: 256, bundle: 128, workers: 4 };
        assert_eq!(OpenDirs::new(1 << 20, 4).unwrap(), plenty);
    }

    #[test]
    fn the_parts_stay_within_the_whole() {
        for mib in [1_u64, 96, 112, 128, 192, 256, 1024, 16 << 10] {
            for cpus in [0, 1, 2, 8, 64] {
                let resources = Resources::new(mib << 20, cpus);
                let workers = resources.workers as u64 * WORKER_BYTES;
                let total = FIXED_BYTES + resources.shared_bytes() + workers;
                let whole = (mib << 20).max(MEMORY_BYTES_MIN);
                assert!(total <= whole, "{mib} MiB, {cpus} cpus: {total} in {resources:?}");
                assert!(resources.workers >= 1);
                let largest = resources.pack_target_bytes == PACK_TARGET_BYTES_MAX;
                assert!(largest || mib < 256 || cpus > 2, "{mib} MiB, {cpus} cpus: {resources:?}");
            }
        }
    }

    #[test]
    fn what_is_far_away_is_fetched_by_as_many_threads_as_fit() {
        let (near, far) = (1, 8);
        for (mib, cpus, parallel, expected) in [
            (96, 2, near, 2),
            (96, 2, far, 5),
            (128, 2, far, 8),
            (1024, 16, near, 16),
            (1024, 16, far, 16),
        ] {
            let cost = ReadCost { gap_bytes: 0, read_bytes: 0, parallel };
            let threads = Resources::new(mib << 20, cpus).fetch_threads(cost);
            assert_eq!(threads, expected, "{mib} MiB, {cpus} cpus, {parallel} reads at once");
            let copying = Resources::new(mib << 20, cpus).copy_threads(cost);
            assert!(copying <= threads && (copying == 2 || mib >= 1024), "{mib} MiB: {copying}");
        }
    }

    #[test]
    fn several_jobs_of_one_process_stay_within_the_whole() {
        for (mib, jobs) in [(1, 1), (96, 1), (167, 1), (168, 2), (192, 2), (512, 6), (1024, 13)] {
            let whole = (mib << 20).max(MEMORY_BYTES_MIN);
            assert_eq!(Resources::jobs_in(mib << 20), jobs, "{mib} MiB");
            for jobs in 1..=jobs {
                let each = Resources::of_each(whole, 4, jobs);
                let workers = each.workers as u64 * WORKER_BYTES;
                let job = JOB_BYTES + each.shared_bytes() + workers;
                let total = PROGRAM_BYTES + jobs as u64 * job;
                assert!(total <= whole, "{mib} MiB, {jobs} jobs: {total} in {each:?}");
            }
        }
        assert_eq!(Resources::of_each(256 << 20, 4, 1), Resources::new(256 << 20, 4));
    }
}
