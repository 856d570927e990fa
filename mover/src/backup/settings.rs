//! One budget of bytes, divided among everything a backup keeps in memory.

use std::time::Duration;

use chunkstore::codec::compress::Level;
use chunkstore::limits::{CHUNK_BYTES_MAX, PACK_BYTES_MAX, PACK_TARGET_BYTES_MAX, PACK_TARGET_BYTES_MIN};
use chunkstore::writer::WriterSettings;

/// Least memory the program accepts.
pub(crate) const MEMORY_BYTES_MIN: u64 = 96 << 20;

/// What the program itself takes: code, stacks, the directory listing buffers, tree nodes, the
/// allocator's slack.
const FIXED_BYTES: u64 = 40 << 20;

/// Memory and threads of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    /// Resident bytes of the whole program.
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
    /// 1 pack          tree nodes
    /// per worker      10 MiB: 4 read ahead, 2 compressed, 4 for the compressor's tables
    /// 3 blocks        of a large file being cut
    /// 1/16            index filters, and as much for names of a large folder, and for the queue
    /// ```
    pub fn new(memory_bytes: u64, cpus: usize) -> Self {
        let free = memory_bytes.max(MEMORY_BYTES_MIN) - FIXED_BYTES;
        // A quarter of what is free for packs leaves, at 96 MiB, enough for two workers.
        let pack = (free / 6).min(PACK_TARGET_BYTES_MAX as u64) as usize;
        let pack_target_bytes = pack.max(PACK_TARGET_BYTES_MIN);
        let packs = 3 * (pack_target_bytes + CHUNK_BYTES_MAX) as u64;
        let shares = 3 * memory_bytes / 16;
        let left = free.saturating_sub(packs + shares) / (10 << 20);
        let workers = (left as usize).clamp(1, cpus.max(1));
        Self {
            memory_bytes,
            workers,
            pack_target_bytes,
        }
    }

    /// Settings of a writer within this budget.
    pub fn writer(&self, compression: Level) -> WriterSettings {
        WriterSettings {
            compression,
            pack_target_bytes: self.pack_target_bytes,
            pack_buffers: 3,
            uploads: 2,
            filter_bytes: (self.memory_bytes / 16) as usize,
            heartbeat: Duration::from_secs(60),
        }
    }

    /// Bytes for the names of one large folder, before they are sorted on disk.
    pub fn listing_bytes(&self) -> usize {
        (self.memory_bytes / 16) as usize
    }

    /// Bytes of entries that wait for content that is still being read.
    pub fn queue_bytes(&self) -> usize {
        (self.memory_bytes / 16) as usize
    }

    /// Threads that read whole packs.
    pub fn check_threads(&self) -> usize {
        let packs = self.memory_bytes.saturating_sub(FIXED_BYTES) / (2 * PACK_BYTES_MAX);
        (packs as usize).clamp(1, self.workers.max(2))
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
    fn the_parts_stay_within_the_whole() {
        for mib in [96_u64, 128, 192, 256, 1024, 16 << 10] {
            for cpus in [1, 2, 8, 64] {
                let resources = Resources::new(mib << 20, cpus);
                let packs = 3 * (resources.pack_target_bytes + CHUNK_BYTES_MAX) as u64;
                let total = FIXED_BYTES
                    + packs
                    + (resources.workers as u64) * (10 << 20)
                    + resources.writer(Level::Off).filter_bytes as u64
                    + resources.listing_bytes() as u64
                    + resources.queue_bytes() as u64;
                assert!(
                    total <= (mib << 20) + (4 << 20),
                    "{mib} MiB, {cpus} cpus: {total}"
                );
                assert!(resources.workers >= 1);
            }
        }
    }
}
