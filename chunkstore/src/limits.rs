//! Every bound of the format, with its arithmetic.
//!
//! What is read from a store is checked against these before memory is taken for it, so that a
//! hostile store can make an operation fail but not exhaust the machine.

/// Blobs in one pack: a pack's liveness is one `u128`, so garbage collection needs 32 bytes a pack.
pub const PACK_BLOBS_MAX: usize = 128;

/// Plaintext of one blob. Chunks and bundles stay at or below 2 MiB; tree nodes are far smaller,
/// unless one entry carries megabytes of extended attributes.
pub const BLOB_BYTES_MAX: usize = 8 << 20;

/// A whole pack: the largest target, and one blob over.
pub const PACK_BYTES_MAX: u64 = 48 << 20;

/// Smallest and largest target size of a pack; the memory budget chooses within.
pub const PACK_TARGET_BYTES_MIN: usize = 4 << 20;
/// See [`PACK_TARGET_BYTES_MIN`]. An upload of 1 GiB takes 26 requests for packs, and one for an
/// index segment every four of them at first, later every 5 %: at most 40 a GiB, all in all.
pub const PACK_TARGET_BYTES_MAX: usize = 40 << 20;

/// Chunk sizes of FastCDC. With normalisation level 2 a chunk outgrows the average by its own
/// length with probability e^-4, so a maximum of twice the average forces under 2 % of the cuts
/// and halves the buffers.
pub const CHUNK_BYTES_MIN: usize = 256 << 10;
/// See [`CHUNK_BYTES_MIN`].
pub const CHUNK_BYTES_AVG: usize = 1 << 20;
/// See [`CHUNK_BYTES_MIN`].
pub const CHUNK_BYTES_MAX: usize = 2 << 20;

/// Files below this size go into bundles.
pub const SMALL_FILE_BYTES: u64 = 128 << 10;
/// Files up to this size lie in their tree entry.
pub const INLINE_BYTES_MAX: usize = 512;
/// A bundle is not cut before it has this many bytes.
pub const BUNDLE_BYTES_MIN: usize = 512 << 10;
/// The mean length at which the content-defined rule cuts a bundle, past the minimum.
pub const BUNDLE_BYTES_MEAN: usize = 512 << 10;
/// A bundle is always cut before it exceeds this.
pub const BUNDLE_BYTES_MAX: usize = 2 << 20;

/// Entries of a tree leaf: it is cut by content from the minimum on, always at the maximum.
pub const LEAF_ENTRIES_MIN: usize = 64;
/// See [`LEAF_ENTRIES_MIN`].
pub const LEAF_ENTRIES_MAX: usize = 1024;
/// Encoded size at which a leaf is cut whatever its entries.
pub const LEAF_BYTES_TARGET: usize = 64 << 10;
/// Children of an interior node, as for leaves.
pub const INTERIOR_CHILDREN_MIN: usize = 64;
/// See [`INTERIOR_CHILDREN_MIN`].
pub const INTERIOR_CHILDREN_MAX: usize = 1024;
/// Packs in the liveness list of a node at which it is cut: 4096 x 32 bytes is 128 KiB.
pub const INTERIOR_PACKS_TARGET: usize = 4096;
/// Encoded size at which an interior node is cut; long paths reach it.
pub const INTERIOR_BYTES_TARGET: usize = 256 << 10;
/// Height of a tree: 64^10 leaves are more than any file system holds.
pub const TREE_LEVELS_MAX: u8 = 10;

/// Length of an entry's key (its path).
pub const KEY_BYTES_MAX: usize = 256 << 10;
/// All extended attributes of one entry together.
pub const XATTR_BYTES_MAX: usize = 4 << 20;
/// Span of a file described by one extent entry: on a grid, so that an edit in the middle of a
/// file leaves the entries behind it as they are.
pub const EXTENT_SPAN_BYTES: u64 = 64 << 20;

/// Snapshot, session, configuration and key slot objects: JSON of a few hundred bytes, plus tags
/// and up to 37 KiB of sparse bundles.
pub const RECORD_BYTES_MAX: u64 = 1 << 20;
/// Packs named by a snapshot for their sparse bundles: some 75 bytes each, so 37 KiB.
pub const SPARSE_PACKS_MAX: usize = 512;
/// A tombstone list: 16 bytes a pack, 4 million packs (128 TiB).
pub const TOMBSTONES_BYTES_MAX: u64 = 64 << 20;

/// A relocation object: some 4 bytes a relocated blob, 150 a pack, so 400,000 packs (12 TiB).
pub const RELOCATIONS_BYTES_MAX: u64 = 64 << 20;

/// Records of one index segment: 33 bytes each, so that building one takes 17 MiB.
pub const SEGMENT_RECORDS_MAX: usize = 512 << 10;
