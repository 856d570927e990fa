//! Copies snapshots from one repository to another, whose keys, chunks and store may be others.
//!
//! ```text
//!  source entries ─┬─ as in the copied parent? ──> its references in the destination
//!                  └─ window ─> fetch unknown blobs, in pack order ─> store ─┐
//!                                             tree of the destination <──────┘
//! ```
//! A blob is named by a key of its repository, so what the destination has is found out by storing:
//! every blob that is fetched is hashed anew and stored if it is not there. To fetch little, the
//! snapshot of the same lineage that was copied before is read in step, in both repositories, and
//! entries that did not change take over its references. Chunks stay as they were cut.
//!
//! Memory: a window of entries, and a bounded map of blobs met lately.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::codec::compress::Compressor;
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::{self, Want};
use crate::id::{BlobId, SnapshotId};
use crate::pack::{BlobKind, PackClass};
use crate::record::{self, Origin, Session, Snapshot};
use crate::repository::Repository;
use crate::tree::{
    BlobRef, Body, Content, Entry, EntryCursor, Liveness, Node, TreeBuilder, TreeCursor,
};
use crate::writer::{Writer, WriterSettings};

/// Entries rebuilt at once.
const WINDOW_ENTRIES: usize = 1024;
/// Wishes of a window: at some 1 MiB each, enough for reads in pack order.
const WINDOW_WANTS: usize = 4096;
/// Blobs remembered in each of two generations: 12 MB each.
const KNOWN_MAX: usize = 100_000;

/// How snapshots are copied.
#[derive(Debug, Clone)]
pub struct CopySettings {
    /// How the destination is written.
    pub writer: WriterSettings,
    /// Threads that fetch and store.
    pub threads: usize,
    /// Machine and process, for people.
    pub machine: String,
    /// Set to stop.
    pub cancelled: Arc<AtomicBool>,
}

/// What is copied.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// Name of the snapshot in the source.
    pub id: SnapshotId,
    /// The snapshot.
    pub snapshot: &'a Snapshot,
    /// One of the source that was copied before, and its copy.
    pub parent: Option<(&'a Snapshot, (SnapshotId, &'a Snapshot))>,
}

/// What copying a snapshot came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// Its name in the destination.
    pub id: SnapshotId,
    /// Entries that took over what the copied parent has.
    pub entries_known: u64,
    /// Blobs fetched.
    pub blobs_fetched: u64,
    /// Bytes added to the destination.
    pub bytes_stored: u64,
}

/// Where blobs of the source are in the destination, for the snapshots copied in one run.
#[derive(Default)]
pub struct Known {
    new: Generation,
    old: Generation,
}

#[derive(Default)]
struct Generation {
    blobs: HashMap<BlobId, BlobRef>,
    parts: HashMap<[u8; 16], [u8; 16]>,
}

impl Known {
    fn blob(&self, id: &BlobId, writer: &Writer) -> Option<BlobRef> {
        let blob = self.new.blobs.get(id).or_else(|| self.old.blobs.get(id))?;
        writer.is_usable_at(blob.location).then_some(*blob)
    }

    fn part(&self, hash: &[u8; 16]) -> Option<[u8; 16]> {
        self.new.parts.get(hash).or_else(|| self.old.parts.get(hash)).copied()
    }

    /// Makes room between windows.
    fn age(&mut self) {
        if self.new.blobs.len() + self.new.parts.len() > KNOWN_MAX {
            self.old = std::mem::take(&mut self.new);
        }
    }
}

/// Copies one snapshot.
///
/// # Errors
/// `Corrupt` or `NotFound` when the source is damaged, `Cancelled`, and those of both stores. The
/// destination is as it was, but for blobs that a later copy finds.
pub fn copy_snapshot(
    from: &Repository,
    to: &Arc<Repository>,
    job: Job<'_>,
    known: &mut Known,
    settings: &CopySettings,
    now: jiff::Timestamp,
) -> Result<Copied> {
    let Job { id, snapshot, parent } = job;
    let session = Session {
        purpose: record::BACKUP.to_owned(),
        writer: settings.machine.clone(),
        started: now,
        heartbeat: 0,
    };
    let writer = Writer::begin(to.clone(), settings.writer.clone(), &session)?;
    let mut copy = Copy {
        from,
        to,
        writer: &writer,
        threads: settings.threads,
        level: settings.writer.compression,
        cancelled: &settings.cancelled,
        known,
        parent: parent.map(|(source, (_, copy))| Parent::open(from, to, source, copy)),
        entries_known: 0,
        blobs_fetched: 0,
    };
    let copied = copy.tree(snapshot);
    let (entries_known, blobs_fetched) = (copy.entries_known, copy.blobs_fetched);
    let (root, level) = match copied {
        Ok(tree) => tree,
        Err(error) => {
            // What was stored is named, so that the next copy finds it. The first error counts.
            let _second = writer.abandon();
            return Err(error);
        }
    };
    let origin = Origin { repository: from.keys().repository, snapshot: id };
    let mut bytes_stored = 0;
    let id = writer.commit(|stored| {
        bytes_stored = stored;
        let parent = parent.map(|(_, (id, _))| id);
        // The places are those of the source.
        let sparse = Liveness::default();
        Snapshot { root, level, parent, sparse, copy_of: Some(origin), ..snapshot.clone() }
    })?;
    Ok(Copied { id, entries_known, blobs_fetched, bytes_stored })
}

struct Copy<'a> {
    from: &'a Repository,
    to: &'a Repository,
    writer: &'a Writer,
    threads: usize,
    level: crate::codec::compress::Level,
    cancelled: &'a AtomicBool,
    known: &'a mut Known,
    parent: Option<Parent<'a>>,
    entries_known: u64,
    blobs_fetched: u64,
}

/// An entry of a window: as it is to be, or as it is in the source.
enum Waiting {
    Ready(Entry),
    Source(Entry),
}

impl Copy<'_> {
    fn tree(&mut self, snapshot: &Snapshot) -> Result<(crate::tree::NodeRef, u8)> {
        let mut entries =
            EntryCursor::new(TreeCursor::new(self.from, snapshot.root, snapshot.level));
        let mut tree = TreeBuilder::new(self.writer, self.to.keys().cut());
        let mut window = Vec::new();
        let mut wants = Vec::new();
        loop {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(Error::cancelled());
            }
            let entry = entries.peek()?.cloned();
            entries.advance();
            let is_last = entry.is_none();
            if let Some(entry) = entry {
                window.push(self.wait(entry, window.len(), &mut wants)?);
            }
            if is_last || window.len() == WINDOW_ENTRIES || wants.len() >= WINDOW_WANTS {
                self.fetch(&window, std::mem::take(&mut wants))?;
                for waiting in window.drain(..) {
                    let entry = match waiting {
                        Waiting::Ready(entry) => entry,
                        Waiting::Source(entry) => self.translate(entry)?,
                    };
                    tree.push(&entry)?;
                }
                self.known.age();
            }
            if is_last {
                break;
            }
        }
        tree.finish()?.ok_or_else(|| Error::corrupt("the snapshot", "its tree is empty"))
    }

    /// Notes what an entry wants, unless the copied parent has it.
    fn wait(&mut self, entry: Entry, at: usize, wants: &mut Vec<Want>) -> Result<Waiting> {
        if let Some(parent) = &mut self.parent
            && let Some(body) = parent.find(&entry, self.writer)?
        {
            self.entries_known += 1;
            return Ok(Waiting::Ready(Entry { key: entry.key, body }));
        }
        // A part's own hash is made from its bytes: purposes above zero name the entry.
        let part = entry.node().and_then(part_hash).filter(|hash| self.known.part(hash).is_none());
        let purpose = if part.is_some() { at as u32 + 1 } else { 0 };
        for blob in entry.blobs() {
            if part.is_some() || self.known.blob(&blob.id, self.writer).is_none() {
                wants.push(Want { place: blob.location, id: blob.id, purpose });
            }
        }
        Ok(Waiting::Source(entry))
    }

    /// Fetches and stores what a window wants.
    fn fetch(&mut self, window: &[Waiting], wants: Vec<Want>) -> Result<()> {
        if wants.is_empty() {
            return Ok(());
        }
        let found = Mutex::new((Vec::new(), None::<Error>));
        let spare = Mutex::new(Vec::new());
        let (to, writer, level) = (self.to, self.writer, self.level);
        let lock = || found.lock().unwrap_or_else(PoisonError::into_inner);
        let deliver = |plain: Result<&[u8]>, wants: &[Want]| -> bool {
            let stored = plain.and_then(|plain| {
                let idle = spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
                let mut compressor = idle.unwrap_or_else(|| Compressor::new(level));
                let stored = writer.store_data(&mut compressor, plain);
                spare.lock().unwrap_or_else(PoisonError::into_inner).push(compressor);
                let stored = stored?;
                let mut parts = Vec::new();
                for want in wants.iter().filter(|want| want.purpose > 0) {
                    let entry = window.get(want.purpose as usize - 1);
                    if let Some(Waiting::Source(entry)) = entry
                        && let Some(node) = entry.node()
                    {
                        parts.push(part_of(to, node, plain)?);
                    }
                }
                Ok((stored, parts))
            });
            match (stored, wants.first()) {
                (Ok((stored, parts)), Some(want)) => {
                    lock().0.push((want.id, stored, parts));
                    true
                }
                (Ok(_), None) => true,
                (Err(error), _) => {
                    lock().1.get_or_insert(error);
                    false
                }
            }
        };
        fetch::fetch(self.from, PackClass::Data, wants, self.threads, &deliver);
        let (found, error) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        error.map_or(Ok(()), Err)?;
        self.blobs_fetched += found.len() as u64;
        for (id, stored, parts) in found {
            self.known.new.blobs.insert(id, stored);
            self.known.new.parts.extend(parts);
        }
        Ok(())
    }

    /// The entry with references to the destination.
    fn translate(&self, mut entry: Entry) -> Result<Entry> {
        let now = |blob: &BlobRef| {
            let known = self.known.blob(&blob.id, self.writer);
            known.ok_or_else(|| Error::new(ErrorKind::Store, "a blob that was copied is unknown"))
        };
        let chunks = match &mut entry.body {
            Body::Extent(chunks) => chunks,
            Body::End(_) | Body::Absent(_) => return Ok(entry),
            Body::Node(node) => match &mut node.content {
                Content::Chunks(chunks) => chunks,
                Content::Part { bundle, hash, .. } => {
                    *bundle = now(bundle)?;
                    let known = self.known.part(hash);
                    let none = || Error::new(ErrorKind::Store, "a part that was copied is unknown");
                    *hash = known.ok_or_else(none)?;
                    return Ok(entry);
                }
                Content::None | Content::Inline(_) | Content::Extents => return Ok(entry),
            },
        };
        for chunk in chunks {
            chunk.blob = now(&chunk.blob)?;
        }
        Ok(entry)
    }
}

fn part_hash(node: &Node) -> Option<[u8; 16]> {
    match &node.content {
        Content::Part { hash, .. } => Some(*hash),
        _ => None,
    }
}

/// The hash of a part in the source, and in the destination.
fn part_of(to: &Repository, node: &Node, bundle: &[u8]) -> Result<([u8; 16], [u8; 16])> {
    let Content::Part { offset, hash, .. } = &node.content else {
        return Err(Error::new(ErrorKind::Store, "the entry is no part of a bundle"));
    };
    let from = *offset as usize;
    let bytes =
        usize::try_from(node.size).ok().and_then(|len| bundle.get(from..from.checked_add(len)?));
    let bytes = bytes.ok_or_else(|| Error::corrupt("a bundle", "it is shorter than its parts"))?;
    let id = BlobKind::Data.id(to.keys(), bytes);
    Ok((*hash, *id.0.first_chunk().expect("32 is more than 16")))
}

/// The snapshot copied before, in both repositories.
struct Parent<'a> {
    source: EntryCursor<'a>,
    copy: EntryCursor<'a>,
}

impl<'a> Parent<'a> {
    fn open(from: &'a Repository, to: &'a Repository, source: &Snapshot, copy: &Snapshot) -> Self {
        Self {
            source: EntryCursor::new(TreeCursor::new(from, source.root, source.level)),
            copy: EntryCursor::new(TreeCursor::new(to, copy.root, copy.level)),
        }
    }

    /// The body of `entry` in the destination, if it has just this content there.
    fn find(&mut self, entry: &Entry, writer: &Writer) -> Result<Option<Body>> {
        let source = seek(&mut self.source, &entry.key)?;
        let copy = seek(&mut self.copy, &entry.key)?;
        let (Some(source), Some(copy)) = (source, copy) else {
            return Ok(None);
        };
        let same = match (&entry.body, &source.body) {
            (Body::Extent(new), Body::Extent(old)) => new == old,
            (Body::Node(new), Body::Node(old)) => new.content == old.content,
            _ => false,
        };
        if !same || !copy.blobs().all(|blob| writer.is_usable_at(blob.location)) {
            return Ok(None);
        }
        Ok(match (&entry.body, copy.body) {
            (Body::Extent(_), body @ Body::Extent(_)) => Some(body),
            // The content is as it was; mode, times and the like may have changed.
            (Body::Node(new), Body::Node(copy)) => {
                Some(Body::Node(Node { content: copy.content, ..new.clone() }))
            }
            _ => None,
        })
    }
}

/// The entry of this key, if there is one. Keys come in ascending order.
fn seek(cursor: &mut EntryCursor<'_>, key: &[u8]) -> Result<Option<Entry>> {
    while let Some(entry) = cursor.peek()? {
        match entry.key[..].cmp(key) {
            std::cmp::Ordering::Less => cursor.advance(),
            std::cmp::Ordering::Equal => return Ok(Some(entry.clone())),
            std::cmp::Ordering::Greater => break,
        }
    }
    Ok(None)
}
