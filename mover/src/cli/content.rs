//! The bytes of one saved file, in order.

use std::collections::VecDeque;
use std::io::{self, Read};

use chunkstore::id::BlobId;
use chunkstore::pack::{PackClass, ReadScratch};
use chunkstore::repository::Repository;
use chunkstore::tree::{BlobRef, Body, Content, EntryCursor, Node};

/// A part of a blob that lies at an offset of the file.
struct Piece {
    offset: u64,
    blob: BlobRef,
    from: usize,
    len: usize,
}

/// Reads the content of a file from a repository; holes are zeros.
pub(super) struct ContentReader<'a, 'c> {
    repository: &'a Repository,
    /// Where the extents of a large file follow.
    extents: Option<&'c mut EntryCursor<'a>>,
    pieces: VecDeque<Piece>,
    inline: Vec<u8>,
    at: u64,
    size: u64,
    last: &'c mut LastBlob,
    /// The piece whose blob is in `last`.
    loaded: Option<Piece>,
}

/// The blob read last: the next small file most often lies in the same bundle.
#[derive(Default)]
pub(super) struct LastBlob {
    scratch: ReadScratch,
    id: Option<BlobId>,
}

impl LastBlob {
    fn load(&mut self, repository: &Repository, blob: &BlobRef) -> chunkstore::Result<()> {
        if self.id == Some(blob.id) {
            return Ok(());
        }
        self.id = None;
        repository.read_blob(PackClass::Data, blob.location, &blob.id, &mut self.scratch)?;
        self.id = Some(blob.id);
        Ok(())
    }
}

impl<'a, 'c> ContentReader<'a, 'c> {
    /// A reader of `node`, of which `size` bytes are saved, and whose extents, if any, are what `cursor`
    /// comes to next.
    pub(super) fn new(
        repository: &'a Repository,
        node: &Node,
        size: u64,
        cursor: &'c mut EntryCursor<'a>,
        last: &'c mut LastBlob,
    ) -> Self {
        let mut reader = Self {
            repository,
            extents: None,
            pieces: VecDeque::new(),
            inline: Vec::new(),
            at: 0,
            size,
            last,
            loaded: None,
        };
        match &node.content {
            Content::None => {}
            Content::Inline(bytes) => reader.inline.clone_from(bytes),
            Content::Part { bundle, offset, .. } => reader.pieces.push_back(Piece {
                offset: 0,
                blob: *bundle,
                from: *offset as usize,
                len: node.size as usize,
            }),
            Content::Chunks(chunks) => reader.pieces.extend(chunks.iter().map(whole)),
            Content::Extents => reader.extents = Some(cursor),
        }
        reader
    }

    /// Goes on at `offset`, before which there is a hole or nothing.
    pub(super) fn skip_to(&mut self, offset: u64) {
        self.at = offset;
    }

    /// The piece that covers the current place, or the next one after it.
    fn piece(&mut self) -> io::Result<Option<&Piece>> {
        let at = self.at;
        if self.loaded.as_ref().is_some_and(|piece| at < piece.offset + piece.len as u64) {
            return Ok(self.loaded.as_ref());
        }
        self.loaded = None;
        while self.pieces.is_empty() {
            let Some(cursor) = &mut self.extents else {
                return Ok(None);
            };
            let entry = cursor.peek().map_err(io::Error::other)?;
            let Some(Body::Extent(chunks)) = entry.map(|entry| &entry.body) else {
                self.extents = None;
                return Ok(None);
            };
            self.pieces.extend(chunks.iter().map(whole));
            cursor.advance();
        }
        Ok(self.pieces.front())
    }

    fn load(&mut self) -> io::Result<()> {
        let Some(piece) = self.pieces.pop_front() else {
            return Ok(());
        };
        self.last.load(self.repository, &piece.blob).map_err(io::Error::other)?;
        if self.last.scratch.plain.len() < piece.from + piece.len {
            return Err(io::Error::other("a blob is shorter than its reference says"));
        }
        self.loaded = Some(piece);
        Ok(())
    }
}

fn whole(chunk: &chunkstore::tree::Chunk) -> Piece {
    Piece { offset: chunk.offset, blob: chunk.blob, from: 0, len: chunk.blob.len as usize }
}

impl Read for ContentReader<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.size.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let mut len = buffer.len().min(left);
        if len == 0 {
            return Ok(0);
        }
        if !self.inline.is_empty() {
            let from = self.at as usize;
            buffer[..len].copy_from_slice(&self.inline[from..from + len]);
            self.at += len as u64;
            return Ok(len);
        }
        let at = self.at;
        let next = self.piece()?.map(|piece| piece.offset);
        match next {
            Some(offset) if offset <= at => {
                if self.loaded.is_none() {
                    self.load()?;
                }
                let Some(piece) = &self.loaded else {
                    return Ok(0);
                };
                let skip = (at - piece.offset) as usize;
                len = len.min(piece.len - skip);
                let from = piece.from + skip;
                buffer[..len].copy_from_slice(&self.last.scratch.plain[from..from + len]);
            }
            hole_ends => {
                let hole = hole_ends.map_or(left as u64, |offset| offset - at);
                len = len.min(usize::try_from(hole).unwrap_or(usize::MAX));
                buffer[..len].fill(0);
            }
        }
        self.at += len as u64;
        Ok(len)
    }
}
