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

/// How far an entry is what the source had when it was saved. The number is part of the format.
///
/// Only an entry that is [`Whole`](Self::Whole) may be taken over by a later backup as unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum State {
    /// Just what it was.
    #[default]
    Whole = 0,
    /// A file that changed while it was read: as long as it was when it was opened, but parts of it may
    /// be of different moments.
    Changed = 1,
    /// A file that was not read to its end: its first bytes. A folder whose names could not all be
    /// read: some of them.
    Cut = 2,
    /// A file that could not be read: what the snapshot before had of it.
    Kept = 3,
    /// A folder of another file system, which was not looked into.
    OtherFileSystem = 4,
    /// A folder marked as a cache, of which only the mark is saved.
    Cache = 5,
    /// A folder that holds the repository itself, which was not looked into.
    Repository = 6,
    /// An object of which not all extended attributes could be read.
    Stripped = 7,
}

impl State {
    /// The state with this number.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use State::{Cache, Changed, Cut, Kept, OtherFileSystem, Repository, Stripped, Whole};
        [Whole, Changed, Cut, Kept, OtherFileSystem, Cache, Repository, Stripped]
            .get(usize::from(byte))
            .copied()
    }

    /// Whether an entry of this kind can be in this state.
    pub fn suits(self, kind: Kind) -> bool {
        match self {
            Self::Whole | Self::Stripped => true,
            Self::Changed | Self::Kept => kind == Kind::File,
            Self::Cut => matches!(kind, Kind::File | Kind::Dir),
            Self::OtherFileSystem | Self::Cache | Self::Repository => kind == Kind::Dir,
        }
    }

    /// Whether something that should have been saved was not: a restore must not pass it off as whole.
    pub fn is_incomplete(self) -> bool {
        matches!(self, Self::Cut | Self::Kept)
    }

    /// Whether a folder in this state may hold names in the source that the tree does not have.
    pub fn hides_names(self) -> bool {
        matches!(self, Self::Cut | Self::OtherFileSystem | Self::Cache | Self::Repository)
    }

    /// What is to be told of an entry in this state; nothing of a whole one.
    pub fn explained(self) -> Option<&'static str> {
        Some(match self {
            Self::Whole => return None,
            Self::Changed => "changed while it was saved",
            Self::Cut => "could not be read to its end when it was saved",
            Self::Kept => {
                "could not be read when it was saved: this is what the snapshot before had"
            }
            Self::OtherFileSystem => "another file system, left out when it was saved",
            Self::Cache => "a cache, left out when it was saved",
            Self::Stripped => "not all of its extended attributes could be read when it was saved",
            Self::Repository => "the repository itself, left out when it was saved",
        })
    }
}

/// Why a name that the source had is not in the tree. The number is part of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Absence {
    /// It could not be read.
    Unreadable = 0,
    /// It was excluded.
    Excluded = 1,
}

impl Absence {
    /// The reason with this number.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Unreadable, Self::Excluded].get(usize::from(byte)).copied()
    }

    /// What is to be told of it.
    pub fn explained(self) -> &'static str {
        match self {
            Self::Unreadable => "is not in the snapshot: it could not be read when it was saved",
            Self::Excluded => "is not in the snapshot: it was excluded when it was saved",
        }
    }
}

/// How the reading of a large file ended that was not [`State::Whole`]. It is known only when the
/// extents have been written, and stands behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Bytes of the file as it was read, instead of [`Node::size`].
    pub size: u64,
    /// Instead of [`Node::state`].
    pub state: State,
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
    /// How far it is what the source had. Of a file with [`Content::Extents`], an [`End`] may say
    /// otherwise.
    pub state: State,
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
    /// How the reading of the large file before it ended, if it did not end well. Follows the extents.
    End(End),
    /// About a name that the source had, of which nothing is saved.
    Absent(Absence),
}

impl Entry {
    /// The node, if it is about a file system object that is saved.
    pub fn node(&self) -> Option<&Node> {
        match &self.body {
            Body::Node(node) => Some(node),
            Body::Extent(_) | Body::End(_) | Body::Absent(_) => None,
        }
    }

    /// Whether it belongs to the large file before it.
    pub fn continues_file(&self) -> bool {
        matches!(self.body, Body::Extent(_) | Body::End(_))
    }

    /// All blobs the entry refers to, in order.
    pub fn blobs(&self) -> impl Iterator<Item = &BlobRef> {
        let (one, many): (Option<&BlobRef>, &[Chunk]) = match &self.body {
            Body::Extent(chunks) => (None, chunks),
            Body::End(_) | Body::Absent(_) => (None, &[]),
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

/// Key of the [`End`] of file `file`: behind all its extents.
pub fn end_key(file: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(file.len() + 10);
    key.extend_from_slice(file);
    key.extend_from_slice(&[0, 0]);
    key.extend_from_slice(&[0xff; 8]);
    key
}
