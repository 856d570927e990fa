//! The index: which data blobs the repository has, and where.
//!
//! It serves one purpose, to find duplicates while writing. Restoring never needs it, because every
//! reference carries its location; and it can be rebuilt from the packs' own tables at any time. So a
//! damaged or missing segment costs deduplication, never data.
//!
//! A segment is an immutable object of sorted fixed-size records in separately sealed 4 KiB blocks.
//! In memory stand only the first eight bytes of each block (the fences: 0.07 bytes a blob) and,
//! as far as the budget goes, a small filter (1.25 bytes a blob). A lookup costs one ranged read per
//! segment that may hold the id: ids are uniform, so fences find the block directly.

mod filter;
mod segment;

use objects::ObjectStore;

pub use segment::{Record, Segment, SegmentWriter, merge};

use crate::codec::seal::Keyring;
use crate::error::Result;
use crate::id::{BlobId, SegmentId};
use crate::pack::Location;

/// Folder of the index segments.
pub const FOLDER: &str = "index/";

/// All segments of a repository, ready for lookups.
pub struct Index {
    segments: Vec<Segment>,
    /// First and last id of each segment, cut to eight bytes, side by side: in a large index most
    /// segments are told apart by these alone.
    ranges: Vec<(u64, u64)>,
    filter_bytes_left: usize,
}

/// What opening the index found.
#[derive(Debug, Default)]
pub struct OpenReport {
    /// Segments that could not be read, and why: they are left out.
    pub damaged: Vec<(String, crate::error::Error)>,
}

impl Index {
    /// An index without segments, whose filters may take `filter_bytes`.
    pub fn empty(filter_bytes: usize) -> Self {
        Self { segments: Vec::new(), ranges: Vec::new(), filter_bytes_left: filter_bytes }
    }

    /// Opens every segment on the store that no other one supersedes.
    ///
    /// # Errors
    /// When the folder cannot be listed. A damaged segment is reported, not an error.
    pub fn open(
        store: &dyn ObjectStore,
        keys: &Keyring,
        filter_bytes: usize,
    ) -> Result<(Self, OpenReport)> {
        let mut index = Self::empty(filter_bytes);
        let mut report = OpenReport::default();
        let mut superseded = std::collections::HashSet::new();
        for id in list_segments(store)? {
            match Segment::open(store, keys, id) {
                Ok(segment) => {
                    superseded.extend(segment.supersedes().iter().copied());
                    index.segments.push(segment);
                }
                // It may have been superseded and deleted since it was listed.
                Err(error) if error.kind() == crate::error::ErrorKind::NotFound => {}
                Err(error) => report.damaged.push((segment::object_name(id), error)),
            }
        }
        index.segments.retain(|segment| !superseded.contains(&segment.id()));
        // Filters are worth most for small segments: they are many, and each spares one read.
        index.segments.sort_by_key(Segment::len);
        for segment in &mut index.segments {
            segment.load_filter(store, &mut index.filter_bytes_left);
            index.ranges.push(segment.range());
        }
        Ok((index, report))
    }

    /// Adds a segment that was just written.
    pub fn add(&mut self, store: &dyn ObjectStore, mut segment: Segment) {
        segment.load_filter(store, &mut self.filter_bytes_left);
        self.ranges.push(segment.range());
        self.segments.push(segment);
    }

    /// Where blob `id` lies, if the repository is known to have it. A block that cannot be read
    /// counts as not having it.
    pub fn get(&self, store: &dyn ObjectStore, id: &BlobId) -> Option<Location> {
        let key = segment::fence(id);
        let mut block = Vec::new();
        let near = self.ranges.iter().zip(&self.segments);
        let mut near = near.filter(|((first, last), _)| (*first..=*last).contains(&key));
        near.find_map(|(_, segment)| segment.get(store, id, &mut block))
    }

    /// The segments.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Number of records; a blob stored twice counts twice.
    pub fn len(&self) -> u64 {
        self.segments.iter().map(Segment::len).sum()
    }

    /// Whether it has no record.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Names of all segments on the store.
///
/// # Errors
/// When the folder cannot be listed.
pub fn list_segments(store: &dyn ObjectStore) -> Result<Vec<SegmentId>> {
    let mut ids = Vec::new();
    store.list(FOLDER, &mut |meta| {
        ids.extend(meta.key[FOLDER.len()..].parse::<SegmentId>().ok());
        Ok(())
    })?;
    Ok(ids)
}

/// Fuzzing entry: whether these are the plain bytes of a footer.
#[cfg(feature = "testing")]
pub(crate) fn fuzz_footer(bytes: &[u8]) -> bool {
    segment::Footer::decode(bytes).is_ok()
}
