//! The tree of a snapshot: one path-ordered Merkle search tree of entries.
//!
//! ```text
//!            interior (level 2)                       key = path components joined by 0x00,
//!           /                  \                       so byte order is depth-first order and a
//!   interior (level 1)    interior (level 1)           folder's content follows it directly
//!   + packs its leaves use   + packs …
//!    /     |      \             …
//!  leaf   leaf    leaf                                 leaf = about 200 encoded entries
//! ```
//! Where a node ends is decided by the keys alone (and size limits), so equal regions of two
//! snapshots are equal nodes, whatever was inserted before them. A folder with ten million entries is
//! many leaves; a file of ten terabytes is many extent entries behind its own: no unit grows with the
//! data. Every reference carries where its blob lies, so reading a tree needs no index; and a level-1
//! node lists which blobs of which packs its leaves use, so that garbage collection reads no leaf.

mod builder;
mod cursor;
mod diff;
mod entry;
mod node;

pub use builder::{NodeSink, TreeBuilder};
pub use cursor::{EntryCursor, LeafAt, NodeSource, TreeCursor, for_each_node};
pub(crate) use cursor::{ReadAhead, load_interior, load_leaf};
pub use diff::{Change, diff};
pub use entry::{
    Absence, BlobRef, Body, Chunk, Content, End, Entry, Kind, Node, State, Timestamp, Xattrs,
    child_key, end_key, extent_key,
};
pub use node::{
    ChildRef, Interior, Leaf, Liveness, NodeRef, PackUse, decode_interior, decode_leaf,
};
