//! Reads one file: opens it, tells how far its content is what it was, and cuts it piece by piece.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use chunkstore::Result;
use chunkstore::chunker::Chunker;
use chunkstore::limits::{CHUNK_BYTES_MAX, XATTR_BYTES_MAX};
use chunkstore::tree::{Absence, Body, Content, Kind, Node, State, Xattrs};

use super::assemble::Ticket;
use super::parent::ChangedBy;
use crate::fs::{self, Dir, Meta, data_ranges, file_xattrs, out_of_files};
use crate::monitor::{Concern, Monitor, Warning};

/// Files above this are cut by the walk itself and their chunks spread over the workers.
pub(super) const LARGE_FILE_BYTES: u64 = 16 << 20;

/// A file to be read.
pub(super) struct FileToRead {
    pub(super) ticket: Ticket,
    pub(super) dir: Dir,
    pub(super) name: Vec<u8>,
    /// Its path, for messages.
    pub(super) path: Vec<u8>,
    pub(super) fs: u32,
    /// How to tell that it changes.
    pub(super) changed_by: ChangedBy,
    /// What the parent has of it.
    pub(super) known: Option<Known>,
}

impl FileToRead {
    fn warning(&self, message: impl Into<String>, concern: Concern) -> Warning {
        Warning { path: self.path.clone(), message: message.into(), concern }
    }
}

/// What the parent has of a file whose content can be referred to again.
pub(super) struct Known {
    pub(super) node: Box<Node>,
    /// It looks unchanged, but its bundle is given up, and so it is stored anew.
    pub(super) given_up: bool,
}

/// Why a file was not read.
pub(super) enum Unread {
    /// It is not there any more.
    Vanished,
    /// It cannot be opened or read, which the text says.
    Unreadable(String),
}

impl Unread {
    /// What `error` means for the file, or for the whole backup.
    pub(super) fn of(what: &str, error: &io::Error) -> Result<Self> {
        if error.kind() == io::ErrorKind::NotFound {
            return Ok(Self::Vanished);
        }
        check_open_files(error)?;
        Ok(Self::Unreadable(format!("{what}: {error}")))
    }
}

/// Fails if it was for want of descriptors.
pub(super) fn check_open_files(error: &io::Error) -> Result<()> {
    out_of_files(error).map_or(Ok(()), Err)
}

/// Opens a file and reads its metadata.
pub(super) fn open(
    monitor: &dyn Monitor,
    file: &FileToRead,
) -> Result<std::result::Result<(File, Node), Unread>> {
    let (open, meta) = match file.dir.open_file(&file.name) {
        Ok(opened) => opened,
        Err(error) => return Unread::of("cannot be opened", &error).map(Err),
    };
    let (xattrs, state) = keep_xattrs(monitor, &file.path, file_xattrs(&open));
    let mut node = node(&meta, file.fs, xattrs, Content::None);
    node.state = state;
    Ok(Ok((open, node)))
}

/// What is to be saved of a file that was not read, of which it warns: what the parent has of it, or
/// that it was there.
pub(super) fn unread(monitor: &dyn Monitor, file: &FileToRead, why: Unread) -> Option<Body> {
    let message = match why {
        Unread::Vanished => {
            let message = "vanished before it could be read";
            monitor.warning(file.warning(message, Concern::Vanished));
            return None;
        }
        Unread::Unreadable(message) => message,
    };
    Some(match &file.known {
        Some(Known { node, given_up: true }) => {
            let message = format!("{message}; it is kept as the last snapshot has it");
            monitor.warning(file.warning(message, Concern::Detail));
            Body::Node((**node).clone())
        }
        Some(Known { node, .. }) => {
            let message = format!("{message}; what the last snapshot has of it is kept");
            monitor.warning(file.warning(message, Concern::Missing));
            Body::Node(kept(node, file.fs))
        }
        None => {
            monitor.warning(file.warning(message, Concern::Missing));
            Body::Absent(Absence::Unreadable)
        }
    })
}

/// The entry of a file that cannot be read, as the parent has it.
pub(super) fn kept(node: &Node, fs: u32) -> Node {
    let state = if node.state == State::Cut { State::Cut } else { State::Kept };
    Node { fs, state, ..node.clone() }
}

/// The entry of what `meta` describes.
pub(super) fn node(meta: &Meta, fs: u32, xattrs: Xattrs, content: Content) -> Node {
    let sized = matches!(meta.kind, Kind::File | Kind::Symlink);
    Node {
        kind: meta.kind,
        mode: meta.mode,
        uid: meta.uid,
        gid: meta.gid,
        size: if sized { meta.size } else { 0 },
        mtime: meta.mtime,
        ctime: meta.ctime,
        ino: meta.ino,
        fs,
        linked: meta.nlink > 1 && meta.kind != Kind::Dir,
        rdev: (meta.rdev_major, meta.rdev_minor),
        xattrs,
        state: State::Whole,
        content,
    }
}

/// The attributes that could be read, and whether these are all; warns of the others.
pub(super) fn keep_xattrs(
    monitor: &dyn Monitor,
    path: &[u8],
    read: io::Result<fs::Xattrs>,
) -> (Xattrs, State) {
    let warn = |message| {
        monitor.warning(Warning { path: path.to_vec(), message, concern: Concern::Detail });
    };
    let mut xattrs = match read {
        Ok(xattrs) => xattrs,
        Err(error) => {
            warn(format!("its extended attributes cannot be read: {error}"));
            return (Vec::new(), State::Stripped);
        }
    };
    for (name, error) in &xattrs.failures {
        let name = String::from_utf8_lossy(name);
        warn(format!("its extended attribute '{name}' cannot be read: {error}"));
    }
    let bytes: usize = xattrs.entries.iter().map(|(name, value)| name.len() + value.len()).sum();
    let too_large = bytes > XATTR_BYTES_MAX;
    if too_large {
        warn("its extended attributes exceed 4 MiB and are left out".to_owned());
        xattrs.entries.clear();
    }
    let all = xattrs.failures.is_empty() && !too_large;
    (xattrs.entries, if all { State::Whole } else { State::Stripped })
}

/// How far a file was read.
pub(super) struct Read {
    /// Bytes that were wanted: as many as it had when it was opened, unless that was not known.
    pub(super) wanted: u64,
    /// Up to here.
    pub(super) to: u64,
    /// Why no further.
    pub(super) failure: Option<io::Error>,
}

impl Read {
    /// Size and state of what was read of `file`, which was as `node` says when it was opened. Warns
    /// unless it is whole.
    pub(super) fn settle(
        self,
        monitor: &dyn Monitor,
        file: &FileToRead,
        open: &File,
        node: &Node,
    ) -> (u64, State) {
        let Self { wanted, to, failure } = self;
        if to < wanted {
            let why = failure.map_or_else(
                || "became shorter while it was read".to_owned(),
                |error| format!("cannot be read from byte {to} on: {error}"),
            );
            let message = format!("{why}; what was read before is saved");
            monitor.warning(file.warning(message, Concern::Missing));
            return (to, State::Cut);
        }
        // Elsewhere a server decides about the change time.
        let by_ctime = file.changed_by == ChangedBy::CtimeInode;
        let is_same = |now: Meta| {
            (now.size, now.mtime) == (node.size, node.mtime)
                && (!by_ctime || now.ctime == node.ctime)
        };
        let has_grown = node.size > wanted;
        if !has_grown && Meta::of_file(open).is_ok_and(is_same) {
            return (to, node.state);
        }
        let message = format!("changed while it was read: its first {to} bytes are saved");
        monitor.warning(file.warning(message, Concern::Changed));
        (to, State::Changed)
    }
}

/// Where the first `size` bytes of the file have data.
pub(super) fn ranges(open: &File, size: u64) -> Vec<(u64, u64)> {
    let sparse = Meta::of_file(open).is_ok_and(|meta| meta.blocks_512 * 512 < size);
    if sparse { data_ranges(open, size).collect() } else { vec![(0, size)] }
}

/// Whether the file has become shorter than `size`.
pub(super) fn is_shorter(open: &File, size: u64) -> bool {
    Meta::of_file(open).is_ok_and(|meta| meta.size < size)
}

/// Fills `buffer` from `offset` on; returns how much there was, and why no more could be read if that is
/// not the file's end.
pub(super) fn read_full(file: &File, buffer: &mut [u8], offset: u64) -> (usize, Option<io::Error>) {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (done, Some(error)),
        }
    }
    (done, None)
}

/// Whether all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // Most data differs from zero at once; equal neighbours are compared as fast as memory is read.
    bytes.first() == Some(&0) && bytes[1..] == bytes[..bytes.len() - 1]
}

/// Cuts one range of a file, reading ahead in one buffer.
pub(super) struct Window<'a> {
    chunker: &'a Chunker,
    file: &'a File,
    /// Where in the file the buffer's unread part ends, and where the range does.
    read_to: u64,
    end: u64,
    from: usize,
    to: usize,
    failure: Option<io::Error>,
}

impl<'a> Window<'a> {
    const BYTES: usize = 2 * CHUNK_BYTES_MAX;

    pub(super) fn new(chunker: &'a Chunker, file: &'a File, offset: u64, len: u64) -> Self {
        Self { chunker, file, read_to: offset, end: offset + len, from: 0, to: 0, failure: None }
    }

    /// Why it could not be read to its end, when there is no further chunk.
    pub(super) fn into_failure(self) -> Option<io::Error> {
        self.failure
    }

    /// The next chunk: its offset in the file and its place in the buffer. Where the file cannot be read
    /// further, the range ends.
    pub(super) fn next(&mut self, buffer: &mut Vec<u8>) -> Option<(u64, std::ops::Range<usize>)> {
        let lookahead = self.chunker.lookahead();
        if self.to - self.from < lookahead && self.read_to < self.end {
            buffer.resize(Self::BYTES.max(buffer.len()), 0);
            buffer.copy_within(self.from..self.to, 0);
            self.to -= self.from;
            self.from = 0;
            let room = (buffer.len() - self.to).min((self.end - self.read_to) as usize);
            let (read, failure) =
                read_full(self.file, &mut buffer[self.to..self.to + room], self.read_to);
            self.failure = failure;
            self.to += read;
            self.read_to += read as u64;
            if read < room {
                self.end = self.read_to;
            }
        }
        if self.from == self.to {
            return None;
        }
        let len = self.chunker.cut(&buffer[self.from..self.to]);
        let offset = self.read_to - (self.to - self.from) as u64;
        let piece = self.from..self.from + len;
        self.from += len;
        Some((offset, piece))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use chunkstore::chunker::ChunkerConfig;
    use proptest::prelude::*;

    use super::*;
    use crate::backup::large::{BlockReader, Blocks};

    const SMALL: ChunkerConfig = ChunkerConfig::Fastcdc { min: 4096, avg: 8192, max: 16_384 };

    fn chunker() -> Chunker {
        Chunker::new(SMALL, &[3; 32]).unwrap()
    }

    /// Noise with runs of zeros in it.
    fn data(seed: u8, len: usize, zeros: &[(usize, usize)]) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
        for (from, run) in zeros {
            let from = from % (len + 1);
            let to = (from + run).min(len);
            bytes[from..to].fill(0);
        }
        bytes
    }

    fn file(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    /// Where each chunk begins and ends when all bytes are at hand.
    fn whole(chunker: &Chunker, bytes: &[u8], base: u64) -> Vec<(u64, u64)> {
        let mut at = 0;
        let mut cuts = Vec::new();
        while at < bytes.len() {
            let len = chunker.cut(&bytes[at..]);
            cuts.push((base + at as u64, base + (at + len) as u64));
            at += len;
        }
        cuts
    }

    fn by_window(
        chunker: &Chunker,
        file: &File,
        bytes: &[u8],
        range: (u64, u64),
    ) -> Vec<(u64, u64)> {
        let mut window = Window::new(chunker, file, range.0, range.1);
        let mut buffer = Vec::new();
        let mut cuts = Vec::new();
        while let Some((at, piece)) = window.next(&mut buffer) {
            let end = at as usize + piece.len();
            assert_eq!(buffer[piece], bytes[at as usize..end]);
            cuts.push((at, end as u64));
        }
        cuts
    }

    fn by_blocks(
        chunker: &Chunker,
        file: &File,
        bytes: &[u8],
        range: (u64, u64),
        block_bytes: usize,
    ) -> Vec<(u64, u64)> {
        let blocks = Blocks::new(block_bytes);
        let mut reader = BlockReader::new(range.0, range.1);
        let mut cuts = Vec::new();
        while !reader.is_done() {
            let free = blocks.free().recv().unwrap();
            let cut = reader.next(blocks.block(free), file, chunker);
            for (at, from, to) in cut.chunks {
                let end = at as usize + (to - from);
                assert_eq!(*cut.block.bytes(from, to), bytes[at as usize..end]);
                cuts.push((at, end as u64));
            }
        }
        cuts
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn cuts_do_not_depend_on_how_a_file_is_read(
            seed: u8, len in 0..200_000_usize, from in 0..200_000_usize, to in 0..200_000_usize,
            zeros in proptest::collection::vec((0..200_000_usize, 0..60_000_usize), 0..4),
            block_bytes in 32_768..100_000_usize,
        ) {
            let (chunker, bytes) = (chunker(), data(seed, len, &zeros));
            let file = file(&bytes);
            let (from, to) = (from.min(to).min(len), from.max(to).min(len));
            let expected = whole(&chunker, &bytes[from..to], from as u64);
            let range = (from as u64, (to - from) as u64);
            prop_assert_eq!(&by_window(&chunker, &file, &bytes, range), &expected);
            prop_assert_eq!(&by_blocks(&chunker, &file, &bytes, range, block_bytes), &expected);
        }

        #[test]
        fn a_file_that_is_shorter_than_expected_is_cut_like_what_is_there(
            seed: u8, len in 0..100_000_usize, missing in 1..100_000_u64,
        ) {
            let (chunker, bytes) = (chunker(), data(seed, len, &[]));
            let file = file(&bytes);
            let expected = whole(&chunker, &bytes, 0);
            let range = (0, len as u64 + missing);
            prop_assert_eq!(&by_window(&chunker, &file, &bytes, range), &expected);
            prop_assert_eq!(&by_blocks(&chunker, &file, &bytes, range, 40_000), &expected);
        }
    }

    #[test]
    fn the_window_is_refilled_without_a_cut_where_it_ends() {
        let (chunker, bytes) = (chunker(), data(9, 3 * Window::BYTES + 12_345, &[]));
        let (file, range) = (file(&bytes), (0, bytes.len() as u64));
        let expected = whole(&chunker, &bytes, 0);
        assert!(by_window(&chunker, &file, &bytes, range) == expected);
        assert!(by_blocks(&chunker, &file, &bytes, range, 1 << 20) == expected);
    }

    #[test]
    fn only_zeros_count_as_zero() {
        assert!(is_zero(&[0]) && is_zero(&[0; 1000]));
        for at in [0, 1, 500, 999] {
            let mut bytes = [0; 1000];
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
        }
        assert!(!is_zero(&[]) && !is_zero(&[7; 100]));
    }
}
