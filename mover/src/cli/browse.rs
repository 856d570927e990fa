//! Looking into a repository: `snapshots`, `ls`, `diff` and `dump`.

use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use chunkstore::repository::Repository;
use chunkstore::tree::{self, Body, Change, Content, Entry, EntryCursor, Kind, Node, TreeCursor};
use chunkstore::{Error, ErrorKind, record::Snapshot};
use serde::Serialize;

use super::args::{Diff, Dump, Global, Ls, Snapshots};
use super::content::{ContentReader, LastBlob};
use super::output::{Output, bytes, end_on_closed_pipe};
use super::snapshot::{self, SnapshotLine};
use super::{DONE, INCOMPLETE, UsageError, secret};
use crate::monitor::display_path;

pub(super) fn snapshots(global: &Global, args: &Snapshots, output: &Output) -> Result<u8> {
    let repository = secret::open(global)?;
    let list = repository.list_snapshots()?;
    let wanted = |snapshot: &Snapshot| {
        args.lineage.as_ref().is_none_or(|lineage| *lineage == snapshot.lineage)
            && args.tag.iter().all(|(key, value)| snapshot.tags.get(key) == Some(value))
    };
    let snapshots: Vec<_> =
        list.snapshots.iter().filter(|(_, snapshot)| wanted(snapshot)).collect();
    output.line(format!("{:8}  {:19}  {:>10}  {:>9}  lineage", "id", "time", "size", "files"))?;
    for (id, snapshot) in &snapshots {
        let local = snapshot.started.to_zoned_datetime(jiff::tz::TimeZone::system());
        let tags: Vec<_> =
            snapshot.tags.iter().map(|(key, value)| format!("{key}={value}")).collect();
        output.line(format!(
            "{:8}  {:19}  {:>10}  {:>9}  {} {}",
            id.short(),
            local.strftime("%Y-%m-%d %H:%M:%S"),
            bytes(snapshot.summary.bytes),
            snapshot.summary.files,
            snapshot.lineage,
            tags.join(" ")
        ))?;
    }
    let lines: Vec<_> =
        snapshots.iter().map(|(id, snapshot)| SnapshotLine::new(*id, snapshot)).collect();
    output.object(&lines)?;
    for (object, error) in &list.damaged {
        let why = chunkstore::error::chain(error);
        output.note(format_args!("warning: snapshot '{object}' cannot be read: {why}"));
    }
    Ok(if list.damaged.is_empty() { DONE } else { INCOMPLETE })
}

/// An entry as JSON shows it.
#[derive(Serialize)]
struct EntryLine {
    path: String,
    kind: &'static str,
    mode: String,
    uid: u32,
    gid: u32,
    size: u64,
    mtime: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

impl EntryLine {
    fn new(entry: &Entry, node: &Node) -> Self {
        let target = match (&node.content, node.kind) {
            (Content::Inline(target), Kind::Symlink) => Some(display_path(target)),
            _ => None,
        };
        Self {
            path: display_path(&entry.path()),
            kind: kind_name(node.kind),
            mode: format!("{:04o}", node.mode),
            uid: node.uid,
            gid: node.gid,
            size: node.size,
            mtime: time(node),
            target,
        }
    }
}

fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::File => "file",
        Kind::Dir => "dir",
        Kind::Symlink => "symlink",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
        Kind::CharDevice => "chardev",
        Kind::BlockDevice => "blockdev",
    }
}

fn time(node: &Node) -> String {
    let time = jiff::Timestamp::new(node.mtime.seconds, node.mtime.nanos as i32);
    time.map_or_else(|_| format!("@{}", node.mtime.seconds), |time| time.to_string())
}

/// Permissions as `ls -l` shows them.
fn permissions(node: &Node) -> String {
    let kind = match node.kind {
        Kind::File => '-',
        Kind::Dir => 'd',
        Kind::Symlink => 'l',
        Kind::Fifo => 'p',
        Kind::Socket => 's',
        Kind::CharDevice => 'c',
        Kind::BlockDevice => 'b',
    };
    let mut text = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = node.mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (node.mode & special != 0, bits & 1 != 0) {
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// Fails unless the snapshot has an entry with this key.
pub(super) fn require(repository: &Repository, snapshot: &Snapshot, key: &[u8]) -> Result<()> {
    if key.is_empty() {
        return Ok(());
    }
    let mut cursor = EntryCursor::new(TreeCursor::new(repository, snapshot.root, snapshot.level));
    cursor.seek(key)?;
    match cursor.peek()? {
        Some(entry) if entry.key == key => Ok(()),
        _ => {
            let path: Vec<u8> =
                key.iter().map(|byte| if *byte == 0 { b'/' } else { *byte }).collect();
            let message = format!("the snapshot has no '{}'", display_path(&path));
            Err(Error::new(ErrorKind::NotFound, message).into())
        }
    }
}

/// Calls `each` for the node at `key` and for all nodes below it, with the cursor behind the node.
fn for_each_below<'a>(
    repository: &'a Repository,
    snapshot: &Snapshot,
    key: &[u8],
    each: &mut dyn FnMut(&Entry, &Node, &mut EntryCursor<'a>) -> Result<()>,
) -> Result<()> {
    require(repository, snapshot, key)?;
    let leaves = TreeCursor::new(repository, snapshot.root, snapshot.level);
    let mut cursor = EntryCursor::new(leaves);
    cursor.seek(key)?;
    while let Some(entry) = cursor.peek()?.cloned() {
        let below = key.is_empty()
            || entry.key == key
            || entry.key.strip_prefix(key).is_some_and(|rest| rest[0] == 0);
        if !below {
            break;
        }
        cursor.advance();
        if let Body::Node(node) = &entry.body {
            each(&entry, node, &mut cursor)?;
        }
    }
    Ok(())
}

pub(super) fn ls(global: &Global, args: &Ls, output: &Output) -> Result<u8> {
    let repository = secret::open(global)?;
    let (_, snapshot) =
        snapshot::find(&repository, &args.snapshot, args.which.lineage.as_deref(), output)?;
    let key = snapshot::key_of(args.subpath.as_deref().unwrap_or(Path::new("")))?;
    let depth = |key: &[u8]| match key {
        b"" => 0,
        key => 1 + key.iter().filter(|byte| **byte == 0).count(),
    };
    let deepest = if args.recursive { usize::MAX } else { depth(&key) + 1 };
    for_each_below(&repository, &snapshot, &key, &mut |entry, node, _| {
        if depth(&entry.key) > deepest {
            return Ok(());
        }
        let line = EntryLine::new(entry, node);
        if output.json {
            return Ok(output.object(&line)?);
        }
        let target = line.target.map(|target| format!(" -> {target}")).unwrap_or_default();
        let (uid, gid, size, mtime, path) = (line.uid, line.gid, line.size, line.mtime, line.path);
        let permissions = permissions(node);
        Ok(output.line(format!(
            "{permissions} {uid:>5} {gid:>5} {size:>12} {mtime:30} {path}{target}"
        ))?)
    })?;
    Ok(DONE)
}

pub(super) fn diff(global: &Global, args: &Diff, output: &Output) -> Result<u8> {
    #[derive(Serialize)]
    struct ChangeLine {
        change: &'static str,
        path: String,
    }
    let repository = secret::open(global)?;
    let lineage = args.which.lineage.as_deref();
    let (_, first) = snapshot::find(&repository, &args.first, lineage, output)?;
    let (_, second) = snapshot::find(&repository, &args.second, lineage, output)?;
    let mut failed = Ok(());
    let (first, second) = ((first.root, first.level), (second.root, second.level));
    tree::diff(&*repository, first, second, &mut |change| {
        let (mark, change, entry) = match change {
            Change::Added(entry) => ('+', "added", entry),
            Change::Removed(entry) => ('-', "removed", entry),
            Change::Content(_, entry) => ('M', "content", entry),
            Change::Metadata(_, entry) => ('U', "metadata", entry),
        };
        let path = display_path(&entry.path());
        let printed = output
            .line(format!("{mark} {path}"))
            .and_then(|()| output.object(&ChangeLine { change, path }));
        printed.map_err(|error| {
            failed = Err(error);
            Error::cancelled()
        })
    })
    .or_else(|error| if failed.is_err() { Ok(()) } else { Err(error) })?;
    failed?;
    Ok(DONE)
}

pub(super) fn dump(global: &Global, args: &Dump, output: &Output) -> Result<u8> {
    if output.json {
        let message = "'dump' writes the file itself and has no JSON form".to_owned();
        return Err(UsageError(message).into());
    }
    let repository = secret::open(global)?;
    let (_, snapshot) =
        snapshot::find(&repository, &args.snapshot, args.which.lineage.as_deref(), output)?;
    let key = snapshot::key_of(&args.path)?;
    let mut out = io::BufWriter::with_capacity(1 << 20, io::stdout().lock());
    let mut archive = None;
    let mut blob = LastBlob::default();
    for_each_below(&repository, &snapshot, &key, &mut |entry, node, cursor| {
        if entry.key == key && node.kind == Kind::File {
            let mut content = ContentReader::new(&repository, node, cursor, &mut blob);
            copy(&mut content, &mut out)?;
            return Ok(());
        }
        if entry.key == key && node.kind != Kind::Dir {
            bail!("'{}' is a {}, which has no content", args.path.display(), kind_name(node.kind));
        }
        let archive = archive.get_or_insert_with(|| tar::Builder::new(Vec::new()));
        let mut tar = Tar { archive, blob: &mut blob, out: &mut out };
        tar.append(&repository, &key, entry, node, cursor)
    })?;
    if let Some(archive) = archive {
        let end = archive.into_inner()?;
        out.write_all(&end).map_err(end_on_closed_pipe)?;
    }
    out.flush().map_err(end_on_closed_pipe)?;
    Ok(DONE)
}

fn copy(from: &mut impl Read, out: &mut impl Write) -> Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        let read = from.read(&mut buffer).context("cannot read from the repository")?;
        if read == 0 {
            return Ok(());
        }
        out.write_all(&buffer[..read]).map_err(end_on_closed_pipe)?;
    }
}

/// Writes a tar archive. Headers go through the archive's own buffer, which is emptied at once; content
/// goes straight to `out`.
struct Tar<'t, W> {
    archive: &'t mut tar::Builder<Vec<u8>>,
    blob: &'t mut LastBlob,
    out: &'t mut W,
}

impl<W: Write> Tar<'_, W> {
    /// Appends an entry.
    fn append<'a>(
        &mut self,
        repository: &'a Repository,
        base: &[u8],
        entry: &Entry,
        node: &Node,
        cursor: &mut EntryCursor<'a>,
    ) -> Result<()> {
        let Self { archive, blob, out } = self;
        let below = entry.key.strip_prefix(base).unwrap_or(&entry.key);
        let below = below.strip_prefix(&[0]).unwrap_or(below);
        let path: Vec<u8> =
            below.iter().map(|byte| if *byte == 0 { b'/' } else { *byte }).collect();
        let path = if path.is_empty() { b".".to_vec() } else { path };
        let path = Path::new(std::ffi::OsStr::from_bytes(&path));
        if node.kind == Kind::Socket {
            // Tar has no sockets; they are nothing without the program that listens.
            return Ok(());
        }
        let mut header = tar::Header::new_gnu();
        header.set_mode(node.mode);
        header.set_uid(node.uid.into());
        header.set_gid(node.gid.into());
        header.set_mtime(u64::try_from(node.mtime.seconds).unwrap_or(0));
        header.set_size(0);
        let mut extensions: Vec<(String, Vec<u8>)> = Vec::new();
        if node.mtime.nanos != 0 || node.mtime.seconds < 0 {
            extensions.push(("mtime".to_owned(), pax_time(node).into_bytes()));
        }
        for (name, value) in &node.xattrs {
            if let Ok(name) = std::str::from_utf8(name) {
                extensions.push((format!("SCHILY.xattr.{name}"), value.clone()));
            }
        }
        let records = extensions.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
        archive.append_pax_extensions(records)?;
        header.set_entry_type(match node.kind {
            Kind::File => tar::EntryType::Regular,
            Kind::Dir => tar::EntryType::Directory,
            Kind::Symlink => tar::EntryType::Symlink,
            Kind::Fifo => tar::EntryType::Fifo,
            Kind::CharDevice => tar::EntryType::Char,
            Kind::BlockDevice => tar::EntryType::Block,
            Kind::Socket => return Ok(()),
        });
        if matches!(node.kind, Kind::CharDevice | Kind::BlockDevice) {
            header.set_device_major(node.rdev.0)?;
            header.set_device_minor(node.rdev.1)?;
        }
        let mut content = ContentReader::new(repository, node, cursor, blob);
        match (&node.content, node.kind) {
            (Content::Inline(target), Kind::Symlink) => {
                archive.append_link(&mut header, path, std::ffi::OsStr::from_bytes(target))?;
                flush(archive, out)
            }
            (_, Kind::File) => {
                // The archive would write the content through its buffer: give it the header alone.
                header.set_size(node.size);
                header.set_cksum();
                archive.append_data(&mut header, path, io::empty())?;
                flush(archive, out)?;
                copy(&mut content, out)?;
                let padding = node.size.next_multiple_of(512) - node.size;
                out.write_all(&[0; 512][..padding as usize]).map_err(end_on_closed_pipe)?;
                Ok(())
            }
            _ => {
                archive.append_data(&mut header, path, io::empty())?;
                flush(archive, out)
            }
        }
    }
}

/// The modification time as PAX has it: seconds with a fraction, negative before 1970.
fn pax_time(node: &Node) -> String {
    let nanos = i128::from(node.mtime.seconds) * 1_000_000_000 + i128::from(node.mtime.nanos);
    let sign = if nanos < 0 { "-" } else { "" };
    let nanos = nanos.unsigned_abs();
    format!("{sign}{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000)
}

fn flush(archive: &mut tar::Builder<Vec<u8>>, out: &mut impl Write) -> Result<()> {
    let headers = archive.get_mut();
    out.write_all(headers).map_err(end_on_closed_pipe)?;
    headers.clear();
    Ok(())
}
