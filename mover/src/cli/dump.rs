//! `dump`: a file, or a folder as a tar archive, to standard output.

use std::collections::HashMap;
use std::io::{self, Read, StdoutLock, Write};
use std::ops::ControlFlow;

use anyhow::{Context, Result, bail};
use chunkstore::record::Snapshot;
use chunkstore::repository::Repository;
use chunkstore::tree::{
    Absence, Body, Content, End, Entry, EntryCursor, Kind, Node, State, Timestamp, TreeCursor,
    extent_key,
};

use super::args::{Dump, Global};
use super::browse::{self, kind_name};
use super::content::{ContentReader, LastBlob};
use super::output::{Output, ReaderGone};
use super::tar::{self, Map, Member};
use super::{DONE, INCOMPLETE, UsageError, secret, snapshot};
use crate::monitor::display_path;

/// Memory for the paths of files that may have further names. A file beyond is written once for each.
const LINKS_BYTES_MAX: usize = 64 << 20;

pub(super) fn dump(global: &Global, args: &Dump, output: &Output) -> Result<u8> {
    if output.json {
        let message = "'dump' writes the file itself and has no JSON form".to_owned();
        return Err(UsageError(message).into());
    }
    let repository = secret::open(global)?;
    let (_, snapshot) =
        snapshot::find(&repository, &args.snapshot, args.which.lineage.as_deref(), output)?;
    let key = snapshot::key_of(&args.path)?;
    // The folder itself, and what the archive holds so far.
    let mut archive: Option<(Entry, Links)> = None;
    let mut dumping = Dumping {
        repository: &repository,
        snapshot: &snapshot,
        output,
        out: io::BufWriter::with_capacity(1 << 20, io::stdout().lock()),
        blob: LastBlob::default(),
        incomplete: 0,
    };
    browse::for_each_below(&repository, &snapshot, &key, &mut |entry, cursor| {
        match (&entry.body, &mut archive) {
            (Body::Node(node), None) if node.kind == Kind::File => {
                let found = dumping.survey(entry, node)?;
                dumping.tell(entry, found.state);
                dumping.content(node, &found, false, cursor)?;
            }
            (Body::Node(node), None) if node.kind != Kind::Dir => {
                let (path, kind) = (args.path.display(), kind_name(node.kind));
                bail!("'{path}' is a {kind}, which has no content");
            }
            (Body::Node(_), None) => {
                // It comes last: bsdtar gives the folder that it unpacks into its times at once, and not
                // again when the content is there.
                archive = Some((entry.clone(), Links::default()));
            }
            (Body::Node(node), Some((_, links))) => {
                dumping.member(&key, entry, node, links, cursor)?;
            }
            (Body::Absent(Absence::Unreadable), _) => {
                dumping.incomplete += 1;
                let path = display_path(&entry.path());
                let why = Absence::Unreadable.explained();
                output.note(format_args!("warning: {path}: {why}"));
            }
            _ => {}
        }
        Ok(ControlFlow::Continue(()))
    })?;
    if let Some((root, mut links)) = archive {
        if let Some(node) = root.node() {
            let Snapshot { root: top, level, .. } = snapshot;
            // A folder has no content to go on to.
            let mut cursor = EntryCursor::new(TreeCursor::new(&*repository, top, level));
            dumping.member(&key, &root, node, &mut links, &mut cursor)?;
        }
        dumping.put(&tar::END)?;
    }
    dumping.out.flush().map_err(cannot_write)?;
    if dumping.incomplete > 0 {
        let count = dumping.incomplete;
        output.note(format_args!(
            "warning: {count} files and folders are not wholly in the snapshot"
        ));
        return Ok(INCOMPLETE);
    }
    Ok(DONE)
}

fn cannot_write(error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return ReaderGone.into();
    }
    anyhow::Error::new(error).context("cannot write to standard output")
}

/// Where the bytes go, and what was found on the way.
struct Dumping<'a> {
    repository: &'a Repository,
    snapshot: &'a Snapshot,
    output: &'a Output,
    out: io::BufWriter<StdoutLock<'static>>,
    blob: LastBlob,
    incomplete: u64,
}

/// What has to be known of a file before its content is written.
struct Found {
    size: u64,
    state: State,
    /// `None` if it has no holes.
    map: Option<Map>,
}

impl<'a> Dumping<'a> {
    /// Size, state and holes of a file. Of a large one, its extents are read for that, with a cursor of
    /// their own.
    fn survey(&self, entry: &Entry, node: &Node) -> Result<Found> {
        let mut map = Map::default();
        let (mut size, mut state) = (node.size, node.state);
        match &node.content {
            Content::None => {}
            Content::Inline(_) | Content::Part { .. } => map.add(0, node.size),
            Content::Chunks(chunks) => {
                chunks.iter().for_each(|chunk| map.add(chunk.offset, chunk.blob.len.into()));
            }
            Content::Extents => {
                let Snapshot { root, level, .. } = *self.snapshot;
                let mut cursor = EntryCursor::new(TreeCursor::new(self.repository, root, level));
                cursor.seek(&extent_key(&entry.key, 0))?;
                while let Some(following) = cursor.peek()? {
                    match &following.body {
                        Body::Extent(chunks) => chunks
                            .iter()
                            .for_each(|chunk| map.add(chunk.offset, chunk.blob.len.into())),
                        Body::End(end) => End { size, state } = *end,
                        Body::Node(_) | Body::Absent(_) => break,
                    }
                    cursor.advance();
                }
            }
        }
        Ok(Found { size, state, map: map.of_size(size) })
    }

    /// Warns of what is not as the source had it.
    fn tell(&mut self, entry: &Entry, state: State) {
        self.incomplete += u64::from(state.is_incomplete());
        if let Some(why) = state.explained()
            && (state.is_incomplete() || state == State::Changed)
        {
            let path = display_path(&entry.path());
            self.output.note(format_args!("warning: {path}: {why}"));
        }
    }

    /// Appends a member to the archive of what lies below `base`.
    fn member(
        &mut self,
        base: &[u8],
        entry: &Entry,
        node: &Node,
        links: &mut Links,
        cursor: &mut EntryCursor<'a>,
    ) -> Result<()> {
        let path = path_below(base, &entry.key);
        let found = match node.kind {
            Kind::File => self.survey(entry, node)?,
            _ => Found { size: 0, state: node.state, map: None },
        };
        self.tell(entry, found.state);
        let linked_to = links.first_name(node, &found, &path);
        if links.just_full() {
            self.output.note(
                "warning: the snapshot has too many files with several names to remember: further ones \
                 are written once for each name",
            );
        }
        let target = match (&node.content, node.kind) {
            (Content::Inline(target), Kind::Symlink) => &target[..],
            _ => b"",
        };
        let member = Member {
            path: &path,
            node,
            size: found.size,
            linked_to: linked_to.as_deref(),
            target,
            map: found.map.as_ref(),
            comment: found.state.explained(),
        };
        let Some(head) = member.head() else {
            return Ok(());
        };
        if head.records_bytes > tar::LIBARCHIVE_RECORDS_BYTES_MAX {
            self.output.note(format_args!(
                "warning: {}: its attributes take {} bytes; bsdtar and others that use libarchive stop at \
                 more than {}, GNU tar does not",
                display_path(&entry.path()),
                head.records_bytes,
                tar::LIBARCHIVE_RECORDS_BYTES_MAX,
            ));
        }
        self.put(&head.bytes)?;
        if linked_to.is_none() && node.kind == Kind::File {
            let written = self.content(node, &found, true, cursor)?;
            self.put(tar::padding(written))?;
        }
        Ok(())
    }

    /// Writes the content of a file, with its holes as zeros or without them; returns the bytes written.
    fn content(
        &mut self,
        node: &Node,
        found: &Found,
        sparse: bool,
        cursor: &mut EntryCursor<'a>,
    ) -> Result<u64> {
        let whole = [(0, found.size)];
        let pieces = match &found.map {
            Some(map) if sparse => map.pieces(),
            _ => &whole,
        };
        let mut reader =
            ContentReader::new(self.repository, node, found.size, cursor, &mut self.blob);
        let mut buffer = vec![0; 256 << 10];
        let mut written = 0;
        for (offset, len) in pieces {
            reader.skip_to(*offset);
            let mut left = *len;
            while left > 0 {
                let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let read = reader.read(&mut buffer[..most]);
                let read = read.context("cannot read from the repository")?;
                if read == 0 {
                    bail!("a file ends before its size: run 'ebackup check'");
                }
                self.out.write_all(&buffer[..read]).map_err(cannot_write)?;
                left -= read as u64;
                written += read as u64;
            }
        }
        Ok(written)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(cannot_write)
    }
}

/// The path in an archive of what lies below `base`.
fn path_below(base: &[u8], key: &[u8]) -> Vec<u8> {
    let below = key.strip_prefix(base).unwrap_or(key);
    let below = below.strip_prefix(&[0]).unwrap_or(below);
    if below.is_empty() {
        return b".".to_vec();
    }
    below.iter().map(|byte| if *byte == 0 { b'/' } else { *byte }).collect()
}

/// Files with several names, by what tells a file from others, and the first name each has in the archive.
#[derive(Default)]
struct Links {
    paths: HashMap<LinkKey, Vec<u8>>,
    bytes: usize,
    full: Fullness,
}

#[derive(Default, PartialEq)]
enum Fullness {
    #[default]
    Room,
    Full,
    Told,
}

/// An inode number alone tells nothing: it may have been given to another file while the backup ran.
#[derive(PartialEq, Eq, Hash)]
struct LinkKey {
    fs: u32,
    ino: u64,
    kind: Kind,
    size: u64,
    times: (Timestamp, Timestamp),
    rdev: (u32, u32),
    content: Option<[u8; 16]>,
}

impl Links {
    /// The first name of this file, if it has another; else this one is.
    fn first_name(&mut self, node: &Node, found: &Found, path: &[u8]) -> Option<Vec<u8>> {
        if !node.linked || node.kind == Kind::Dir {
            return None;
        }
        let key = LinkKey {
            fs: node.fs,
            ino: node.ino,
            kind: node.kind,
            size: found.size,
            times: (node.mtime, node.ctime),
            rdev: node.rdev,
            content: content_hash(&node.content),
        };
        if let Some(first) = self.paths.get(&key) {
            return Some(first.clone());
        }
        let bytes = path.len() + size_of::<LinkKey>() + 64;
        if self.bytes + bytes <= LINKS_BYTES_MAX {
            self.bytes += bytes;
            self.paths.insert(key, path.to_vec());
        } else if self.full == Fullness::Room {
            self.full = Fullness::Full;
        }
        None
    }

    /// Whether it could not remember a name, for the first time.
    fn just_full(&mut self) -> bool {
        let full = self.full == Fullness::Full;
        if full {
            self.full = Fullness::Told;
        }
        full
    }
}

/// Names the content, as far as the entry itself tells it.
fn content_hash(content: &Content) -> Option<[u8; 16]> {
    let mut hasher = blake3::Hasher::new();
    match content {
        Content::None | Content::Extents => return None,
        Content::Inline(bytes) => {
            hasher.update(bytes);
        }
        Content::Part { hash, .. } => return Some(*hash),
        Content::Chunks(chunks) => chunks.iter().for_each(|chunk| {
            hasher.update(&chunk.offset.to_le_bytes()).update(&chunk.blob.id.0);
        }),
    }
    hasher.finalize().as_bytes().first_chunk().copied()
}
