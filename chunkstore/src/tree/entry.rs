//! Entries: what a tree says about one file, folder or part of a large file.

use crate::id::BlobId;
use crate::limits::EXTENT_SPAN_BYTES;
use crate::pack::Location;

/// Kind of a file system object. The number is part of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Regular file.
    File = 0,
    /// Folder.
    Dir = 1,
    /// Symbolic link.
    Symlink = 2,
    /// Named pipe.
    Fifo = 3,
    /// Unix domain socket.
    Socket = 4,
    /// Character device.
    CharDevice = 5,
    /// Block device.
    BlockDevice = 6,
}

impl Kind {
    /// The kind with this number.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use Kind::{BlockDevice, CharDevice, Dir, Fifo, File, Socket, Symlink};
        [File, Dir, Symlink, Fifo, Socket, CharDevice, BlockDevice].get(usize::from(byte)).copied()
    }
}

/// A point in time as file systems keep it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Seconds since 1970, negative before.
    pub seconds: i64,
    /// Nanoseconds within the second, below 10^9.
    pub nanos: u32,
}

/// A blob and where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlobRef {
    /// Its name.
    pub id: BlobId,
    /// Where it was when the reference was made.
    pub location: Location,
    /// Bytes of its plaintext.
    pub len: u32,
}

/// A piece of a file: a whole blob at an offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Where in the file it begins.
    pub offset: u64,
    /// Its bytes.
    pub blob: BlobRef,
}

impl Chunk {
    /// Where in the file it ends.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.blob.len)
    }
}

/// Where the bytes of a file are. What no chunk covers is a hole.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Content {
    /// Nothing: empty, all hole, or of a kind that has no content.
    #[default]
    None,
    /// In the entry itself; for a symbolic link, its target.
    Inline(Vec<u8>),
    /// A part of a bundle; the length is the file's size.
    Part {
        /// The bundle.
        bundle: BlobRef,
        /// Where in the bundle the file begins.
        offset: u32,
        /// First half of the file's own keyed hash: tells a file that was only touched, or moved
        /// between bundles, from one that changed.
        hash: [u8; 16],
    },
    /// Chunks in ascending order.
    Chunks(Vec<Chunk>),
    /// Chunks in the extent entries that follow this one.
    Extents,
}

/// Extended attributes, by ascending name.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// What a tree says about a file system object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// The twelve permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes, of a regular file or a link's target.
    pub size: u64,
    /// Last modification of the content.
    pub mtime: Timestamp,
    /// Last change of content or metadata. Not restored; tells whether the file changed.
    pub ctime: Timestamp,
    /// Inode number. With [`fs`](Self::fs) it tells hard links of one file.
    pub ino: u64,
    /// Which of the file systems met during the walk, from 0 for that of the root.
    pub fs: u32,
    /// Whether the file had other hard links.
    pub linked: bool,
    /// Major and minor number of a device.
    pub rdev: (u32, u32),
    /// Extended attributes.
    pub xattrs: Xattrs,
    /// Where the bytes are.
    pub content: Content,
}

/// One entry of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path from the root of the backup: its components, joined by a zero byte. Empty for the root.
    pub key: Vec<u8>,
    /// What it says.
    pub body: Body,
}

/// What an entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// About a file system object.
    Node(Node),
    /// Chunks of the large file before it that begin within one span of the grid of
    /// [`EXTENT_SPAN_BYTES`].
    Extent(Vec<Chunk>),
}

impl Entry {
    /// The node, unless it is an extent.
    pub fn node(&self) -> Option<&Node> {
        match &self.body {
            Body::Node(node) => Some(node),
            Body::Extent(_) => None,
        }
    }

    /// All blobs the entry refers to, in order.
    pub fn blobs(&self) -> impl Iterator<Item = &BlobRef> {
        let (one, many): (Option<&BlobRef>, &[Chunk]) = match &self.body {
            Body::Extent(chunks) => (None, chunks),
            Body::Node(node) => match &node.content {
                Content::Part { bundle, .. } => (Some(bundle), &[]),
                Content::Chunks(chunks) => (None, chunks),
                Content::None | Content::Inline(_) | Content::Extents => (None, &[]),
            },
        };
        one.into_iter().chain(many.iter().map(|chunk| &chunk.blob))
    }

    /// The path, with `/` between components.
    pub fn path(&self) -> Vec<u8> {
        self.key.iter().map(|byte| if *byte == 0 { b'/' } else { *byte }).collect()
    }
}

/// Key of the child called `name` of the entry with key `parent`.
pub fn child_key(parent: &[u8], name: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(parent.len() + 1 + name.len());
    key.extend_from_slice(parent);
    if !parent.is_empty() {
        key.push(0);
    }
    key.extend_from_slice(name);
    key
}

/// Key of the extent entry of file `file` for the span in which `offset` lies.
///
/// The grid number stands behind two zero bytes: no component is empty, so no child has such a key.
pub fn extent_key(file: &[u8], offset: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(file.len() + 10);
    key.extend_from_slice(file);
    key.extend_from_slice(&[0, 0]);
    key.extend_from_slice(&(offset / EXTENT_SPAN_BYTES).to_be_bytes());
    key
}
