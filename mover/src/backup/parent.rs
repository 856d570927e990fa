//! The parent snapshot, read in step with the walk, and the decision that an entry is unchanged.

use std::sync::Arc;

use chunkstore::Result;
use chunkstore::record::Snapshot;
use chunkstore::repository::Repository;
use chunkstore::tree::{
    Body, Content, Entry, EntryCursor, Kind, LeafAt, Liveness, Node, NodeRef, State, Timestamp,
    TreeCursor, extent_key, for_each_node,
};
use chunkstore::writer::Writer;

use super::read::Known;
use crate::fs::{FsTraits, Meta};

/// How a changed file is told from an unchanged one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChangedBy {
    /// By size, modification time, change time and inode number: notices every change, even one that
    /// sets the modification time back. Needs a file system that keeps them.
    CtimeInode,
    /// By size, modification time, owner and mode: where a server decides about the others.
    Mtime,
    /// Read every file.
    Content,
}

impl ChangedBy {
    /// What a file system can be trusted with.
    pub fn for_file_system(traits: &FsTraits) -> Self {
        if traits.inodes_stable && traits.ctime_trusted { Self::CtimeInode } else { Self::Mtime }
    }
}

/// A change so shortly before the parent's backup began may have been followed by another one in the
/// same tick of the file system's clock. Two seconds is the coarsest clock in use (FAT).
const RACY_SECONDS: i64 = 2;

/// Entries of the parent snapshot, in step with the walk.
pub(super) struct Parent<'a> {
    repository: &'a Repository,
    root: (NodeRef, u8),
    cursor: EntryCursor<'a>,
    writer: Option<&'a Writer>,
    trusted_before: i64,
    /// Bundles that are given up.
    sparse: Liveness,
    /// The leaf last seen, and whether everything it refers to may be taken over.
    leaf: Option<(Arc<LeafAt>, bool)>,
}

/// Where an entry stands in the parent's tree.
pub(super) struct Found {
    pub(super) leaf: Arc<LeafAt>,
    pub(super) at: usize,
    usable: bool,
    /// Whether it is unchanged, and to be stored anew all the same.
    given_up: bool,
}

impl Found {
    pub(super) fn entry(&self) -> &Entry {
        &self.leaf.leaf.entries[self.at]
    }

    pub(super) fn node(&self) -> Option<&Node> {
        self.entry().node()
    }

    /// The same, to be stored anew although it is unchanged.
    pub(super) fn give_up(self) -> Self {
        Self { given_up: true, ..self }
    }

    /// What there is of it, if it is a file whose content can be referred to again by its entry alone.
    pub(super) fn known_file(&self) -> Option<Known> {
        let node = self.node().filter(|node| self.usable && node.kind == Kind::File)?;
        if node.content == Content::Extents {
            return None;
        }
        Some(Known { node: Box::new(node.clone()), given_up: self.given_up })
    }

    /// Whether it is a large file of which as much can be referred to again.
    pub(super) fn is_large_file(&self) -> bool {
        self.node().is_some_and(|node| self.usable && node.content == Content::Extents)
    }
}

/// What follows a large file in the parent's tree: extents, and perhaps an end.
pub(super) struct Extents {
    /// The first of them.
    first: Vec<Found>,
    count: usize,
    /// Whether everything they refer to may be referred to again.
    pub(super) are_usable: bool,
    /// Whether no end says that the file was not read as it should be.
    pub(super) are_whole: bool,
}

impl Extents {
    /// That many are kept, some 2 MiB, for files of up to 32 GiB; of larger ones they are read again.
    const KEPT_MAX: usize = 512;

    /// Those kept, if these are all.
    pub(super) fn all(&self) -> Option<&[Found]> {
        (self.first.len() == self.count).then_some(&self.first)
    }
}

impl<'a> Parent<'a> {
    /// Opens the tree of `snapshot`. Without a writer (dry run) everything counts as usable.
    pub(super) fn open(
        repository: &'a Repository,
        writer: Option<&'a Writer>,
        snapshot: &Snapshot,
    ) -> Result<Self> {
        if let Some(writer) = writer {
            let all = &mut |_: &_| true;
            for_each_node(repository, snapshot.root, snapshot.level, all, &mut |node, _| {
                writer.remember_node(*node);
                Ok(())
            })?;
        }
        let leaves = TreeCursor::new(repository, snapshot.root, snapshot.level);
        Ok(Self {
            repository,
            root: (snapshot.root, snapshot.level),
            cursor: EntryCursor::new(leaves),
            writer,
            trusted_before: snapshot.started.as_second() - RACY_SECONDS,
            sparse: snapshot.sparse.clone(),
            leaf: None,
        })
    }

    /// The parent's entry of this key, if it has one. Keys come in ascending order.
    pub(super) fn find(&mut self, key: &[u8]) -> Result<Option<Found>> {
        loop {
            let Some((leaf, at)) = self.cursor.peek_at()? else {
                return Ok(None);
            };
            let order = leaf.leaf.entries[at].key[..].cmp(key);
            if order.is_gt() {
                return Ok(None);
            }
            let found = order.is_eq().then(|| (leaf.clone(), at));
            self.cursor.advance();
            if let Some((leaf, at)) = found {
                let usable = self.usable(&leaf, at);
                return Ok(Some(Found { leaf, at, usable, given_up: false }));
            }
        }
    }

    /// What follows the large file just found.
    pub(super) fn extents(&mut self) -> Result<Extents> {
        let mut extents =
            Extents { first: Vec::new(), count: 0, are_usable: true, are_whole: true };
        while let Some((leaf, at)) = self.cursor.peek_at()? {
            let entry = &leaf.leaf.entries[at];
            if !entry.continues_file() {
                break;
            }
            extents.are_whole &= !matches!(entry.body, Body::End(_));
            let leaf = leaf.clone();
            self.cursor.advance();
            let usable = self.usable(&leaf, at);
            extents.are_usable &= usable;
            if extents.first.len() < Extents::KEPT_MAX {
                extents.first.push(Found { leaf, at, usable, given_up: false });
            }
            extents.count += 1;
        }
        Ok(extents)
    }

    /// Calls `each` for everything that follows the large file with this key, reading it again.
    pub(super) fn for_each_extent(
        &self,
        key: &[u8],
        each: &mut dyn FnMut(&Found) -> Result<()>,
    ) -> Result<()> {
        let (root, level) = self.root;
        let mut cursor = EntryCursor::new(TreeCursor::new(self.repository, root, level));
        cursor.seek(&extent_key(key, 0))?;
        while let Some((leaf, at)) = cursor.peek_at()? {
            let entry = &leaf.leaf.entries[at];
            if !entry.continues_file() || !entry.key.starts_with(key) {
                break;
            }
            each(&Found { leaf: leaf.clone(), at, usable: true, given_up: false })?;
            cursor.advance();
        }
        Ok(())
    }

    fn usable(&mut self, leaf: &Arc<LeafAt>, at: usize) -> bool {
        let Some(writer) = self.writer else {
            return true;
        };
        let known = self.leaf.as_ref().filter(|(known, _)| Arc::ptr_eq(known, leaf));
        let all = known.map(|(_, all)| *all).unwrap_or_else(|| {
            writer.remember_node(leaf.child.node);
            let all = leaf.leaf.packs.iter().all(|pack| writer.is_usable(*pack));
            self.leaf = Some((leaf.clone(), all));
            all
        });
        let blobs = || leaf.leaf.entries[at].blobs();
        all || blobs().all(|blob| writer.is_usable_at(blob.location))
    }

    /// Whether the entry found is what `meta` describes, in that state, and may be taken over unread.
    pub(super) fn is_unchanged(
        &self,
        found: &Found,
        meta: &Meta,
        state: State,
        fs: u32,
        changed_by: ChangedBy,
    ) -> bool {
        let Some(node) = found.node().filter(|_| found.usable) else {
            return false;
        };
        let sized = matches!(node.kind, Kind::File | Kind::Symlink);
        let same = node.kind == meta.kind
            && node.state == state
            && (!sized || node.size == meta.size)
            && node.mtime == meta.mtime
            && node.mode == meta.mode
            && node.uid == meta.uid
            && node.gid == meta.gid
            && node.fs == fs
            && node.linked == (meta.nlink > 1 && meta.kind != Kind::Dir);
        let settled = |time: Timestamp| time.seconds < self.trusted_before;
        same && match changed_by {
            ChangedBy::CtimeInode => {
                node.ctime == meta.ctime && node.ino == meta.ino && settled(node.ctime)
            }
            ChangedBy::Mtime => settled(node.mtime),
            ChangedBy::Content => node.kind != Kind::File && node.ctime == meta.ctime,
        }
    }

    /// Whether it lies in a bundle of which too little is used.
    pub(super) fn is_given_up(&self, found: &Found) -> bool {
        found.node().is_some_and(|node| match &node.content {
            Content::Part { bundle, .. } => self.sparse.contains(bundle.location),
            _ => false,
        })
    }
}
