//! Hard links: the target's file system is the map from a file of the backup to a restored one.
//!
//! Whatever had several names in the backup is also linked into the hidden folder of the target, from
//! which its other names are linked. So memory does not grow with their number.

use std::collections::HashSet;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use chunkstore::tree::{Content, Kind, Node};
use rustix::io::Errno;

use crate::fs::{Dir, Meta};

use super::hidden::Hidden;
use super::lock;

/// Tells the files of a backup that had several names apart, by everything that is known of them: an inode number may
/// have been used for another file while the backup ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct LinkKey([u8; 16]);

impl LinkKey {
    /// That of a node which had other names.
    pub(super) fn of(node: &Node) -> Option<Self> {
        if !node.linked || node.kind == Kind::Dir {
            return None;
        }
        let mut hash = blake3::Hasher::new();
        for number in [
            u64::from(node.fs),
            node.ino,
            node.kind as u64,
            node.size,
            node.mtime.seconds as u64,
            u64::from(node.mtime.nanos),
            u64::from(node.rdev.0),
            u64::from(node.rdev.1),
        ] {
            hash.update(&number.to_le_bytes());
        }
        match &node.content {
            Content::None => {}
            // Their content follows in entries of its own.
            Content::Extents => {
                hash.update(b"extents");
            }
            Content::Inline(bytes) => {
                hash.update(b"inline").update(bytes);
            }
            Content::Part { hash: own, .. } => {
                hash.update(b"part").update(own);
            }
            Content::Chunks(chunks) => {
                hash.update(b"chunks");
                for chunk in chunks {
                    hash.update(&chunk.offset.to_le_bytes()).update(&chunk.blob.id.0);
                }
            }
        }
        let bytes = hash.finalize();
        Some(Self(bytes.as_bytes().first_chunk().copied().unwrap_or_default()))
    }

    /// The name of its link in the hidden folder.
    pub(super) fn name(self) -> Vec<u8> {
        format!("l{:032x}", u128::from_be_bytes(self.0)).into_bytes()
    }
}

/// Whether the file system cannot link here, as opposed to a failure.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::PERM | Errno::OPNOTSUPP | Errno::NOSYS | Errno::XDEV | Errno::MLINK)
    )
}

/// What came of [`Links::register`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Registered {
    /// Other names can be linked to it.
    Done,
    /// It turned out that the file system has no links; told once.
    Unsupported,
}

/// What is known of hard links in the target.
#[derive(Default)]
pub(super) struct Links {
    unsupported: AtomicBool,
    /// Files that have as many names as a file can have: few, for it takes tens of thousands.
    full: Mutex<HashSet<LinkKey>>,
}

impl Links {
    /// Whether links can be made, for all that is known.
    pub(super) fn are_supported(&self) -> bool {
        !self.unsupported.load(Ordering::Relaxed)
    }

    /// Makes `name` in `dir` the file from which other names are linked.
    pub(super) fn register(
        &self,
        hidden: &Hidden,
        key: LinkKey,
        dir: &Dir,
        name: &[u8],
    ) -> io::Result<Registered> {
        if !self.are_supported() {
            return Ok(Registered::Done);
        }
        match dir.link(name, hidden.dir(), &key.name()) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Registered::Done),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::XDEV) => Err(error),
            Err(error) if is_unsupported(&error) => {
                self.unsupported.store(true, Ordering::Relaxed);
                Ok(Registered::Unsupported)
            }
            done => done.map(|()| Registered::Done),
        }
    }

    /// Notes that the file can have no more names, so that the next one becomes another file.
    pub(super) fn set_full(&self, key: LinkKey) {
        lock(&self.full).insert(key);
    }

    /// Whether the file has as many names as a file can have.
    pub(super) fn is_full(&self, key: LinkKey) -> bool {
        lock(&self.full).contains(&key)
    }
}

/// What is known of an existing file with several names.
pub(super) enum Known {
    /// Nothing yet.
    No,
    /// It was taken for the file with this key.
    As(bool),
}

fn kept_name(meta: &Meta) -> Vec<u8> {
    format!("k{:x}-{:x}", meta.dev, meta.ino).into_bytes()
}

/// Whether the existing file that `meta` describes was taken for the one with this key.
pub(super) fn known(hidden: &Hidden, key: LinkKey, meta: &Meta) -> Known {
    hidden.dir().read_link(&kept_name(meta)).map_or(Known::No, |of| Known::As(of == key.name()))
}

/// Notes that the existing file that `meta` describes is taken for the one with this key.
pub(super) fn set_known(hidden: &Hidden, key: LinkKey, meta: &Meta) -> io::Result<()> {
    hidden.dir().make_symlink(&kept_name(meta), &key.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use chunkstore::tree::{State, Timestamp};

    #[test]
    fn files_that_differ_in_anything_are_no_links_of_each_other() {
        let node = Node {
            kind: Kind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 3,
            mtime: Timestamp { seconds: 5, nanos: 6 },
            ctime: Timestamp::default(),
            ino: 7,
            fs: 0,
            linked: true,
            rdev: (0, 0),
            xattrs: Vec::new(),
            state: State::Whole,
            content: Content::Inline(b"abc".to_vec()),
        };
        let key = LinkKey::of(&node).unwrap();
        // What may change while the backup runs, and what each new name changes.
        let mut same = node.clone();
        (same.mode, same.ctime) = (0o600, Timestamp { seconds: 9, nanos: 9 });
        assert_eq!(LinkKey::of(&same), Some(key));
        let others: [fn(&mut Node); 6] = [
            |node| node.ino = 8,
            |node| node.fs = 1,
            |node| node.size = 4,
            |node| node.mtime.nanos = 7,
            |node| node.kind = Kind::Symlink,
            |node| node.content = Content::Inline(b"abd".to_vec()),
        ];
        for change in others {
            let mut other = node.clone();
            change(&mut other);
            assert_ne!(LinkKey::of(&other), Some(key), "{other:?}");
        }
        assert_eq!(LinkKey::of(&Node { linked: false, ..node }), None);
    }
}
