//! Which small files make one bundle.
//!
//! Bundles are cut by names and sizes, which are known before anything is read: equal folders make
//! equal bundles, workers can read them independently, and a file whose content changes within its
//! size moves no cut.

use chunkstore::limits::{BUNDLE_BYTES_MAX, BUNDLE_BYTES_MEAN, BUNDLE_BYTES_MIN, INLINE_BYTES_MAX};

use super::read::FileToRead;

/// Collects small files until a bundle is full or the content-defined rule ends it.
pub(super) struct BundlePlanner {
    files: Vec<FileToRead>,
    bytes: usize,
    dirs: usize,
    dirs_max: usize,
    cut: [u8; 32],
}

impl BundlePlanner {
    /// Files in one bundle: their results return together.
    const FILES_MAX: usize = 4096;

    /// Nothing is collected yet. Of at most `dirs_max` folders, which are held open, files are put
    /// together.
    pub(super) fn new(cut: &[u8; 32], dirs_max: usize) -> Self {
        Self { files: Vec::new(), bytes: 0, dirs: 0, dirs_max, cut: *cut }
    }

    /// Adds a file of `size` bytes; returns the bundles that are now complete: at most the one before
    /// it, and the one it ends.
    pub(super) fn push(
        &mut self,
        file: FileToRead,
        size: u64,
        new_dir: bool,
    ) -> [Option<Vec<FileToRead>>; 2] {
        let mut complete = [None, None];
        let stored = if size as usize <= INLINE_BYTES_MAX { 0 } else { size as usize };
        if self.bytes + stored > BUNDLE_BYTES_MAX || self.dirs >= self.dirs_max {
            complete[0] = self.take();
        }
        let ends = stored > 0 && self.ends_bundle(&file.name, stored);
        self.dirs += usize::from(new_dir || self.files.is_empty());
        self.files.push(file);
        self.bytes += stored;
        let full = self.files.len() >= Self::FILES_MAX;
        if full || (ends && self.bytes >= BUNDLE_BYTES_MIN) {
            complete[1] = self.take();
        }
        complete
    }

    /// The bundle collected so far.
    pub(super) fn take(&mut self) -> Option<Vec<FileToRead>> {
        self.bytes = 0;
        self.dirs = 0;
        let files = std::mem::take(&mut self.files);
        (!files.is_empty()).then_some(files)
    }

    /// True for one file in so many that a bundle grows by [`BUNDLE_BYTES_MEAN`] in between.
    fn ends_bundle(&self, name: &[u8], size: usize) -> bool {
        let mut hasher = blake3::Hasher::new_keyed(&self.cut);
        hasher.update(b"bundle").update(&(size as u64).to_le_bytes()).update(name);
        let hash = hasher.finalize();
        let draw = u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("32 is more than 8"));
        (u128::from(draw) * BUNDLE_BYTES_MEAN as u128) >> 64 < size as u128
    }
}
