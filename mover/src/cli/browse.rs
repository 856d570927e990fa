//! Looking into a repository: `snapshots`, `ls` and `diff`.
//!
//! They only tell: when nobody reads any more, they end.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Result;
use chunkstore::id::SnapshotId;
use chunkstore::repository::Repository;
use chunkstore::tree::{
    self, Absence, Body, Change, Content, End, Entry, EntryCursor, Kind, Node, State, TreeCursor,
};
use chunkstore::{Error, ErrorKind, record::Snapshot};
use serde::Serialize;

use super::args::{Diff, Global, Ls, Snapshots};
use super::output::{Output, bytes, printable};
use super::snapshot::{self, SnapshotLine};
use super::{DONE, INCOMPLETE, secret};
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
    output.line(format!("{:8}  {:19}  {:>10}  {:>9}  lineage", "id", "time", "size", "files"));
    for (id, snapshot) in &snapshots {
        output.line(snapshot_line(*id, snapshot));
    }
    let lines: Vec<_> =
        snapshots.iter().map(|(id, snapshot)| SnapshotLine::new(*id, snapshot)).collect();
    output.object(&lines);
    for (object, error) in &list.damaged {
        let why = chunkstore::error::chain(error);
        output.note(format_args!("warning: snapshot '{object}' cannot be read: {why}"));
    }
    Ok(if list.damaged.is_empty() { DONE } else { INCOMPLETE })
}

fn snapshot_line(id: SnapshotId, snapshot: &Snapshot) -> String {
    let local = snapshot.started.to_zoned_datetime(jiff::tz::TimeZone::system());
    let tags = snapshot.tags.iter().map(|(key, value)| format!(" {key}={value}"));
    let mut words = printable(&(snapshot.lineage.clone() + " " + &tags.collect::<String>()));
    if snapshot.summary.files_missing > 0 {
        let missing = snapshot.summary.files_missing;
        words.push_str(&format!("  [incomplete: {missing} could not be read]"));
    }
    if snapshot::is_of_the_future(snapshot) {
        words.push_str("  [dated in the future]");
    }
    format!(
        "{:8}  {:19}  {:>10}  {:>9}  {words}",
        id.short(),
        local.strftime("%Y-%m-%d %H:%M:%S"),
        bytes(snapshot.summary.bytes),
        snapshot.summary.files,
    )
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
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<State>,
}

impl EntryLine {
    fn new(entry: &Entry, node: &Node, end: Option<End>) -> Self {
        let target = match (&node.content, node.kind) {
            (Content::Inline(target), Kind::Symlink) => Some(display_path(target)),
            _ => None,
        };
        let End { size, state } = end.unwrap_or(End { size: node.size, state: node.state });
        Self {
            path: display_path(&entry.path()),
            kind: kind_name(node.kind),
            mode: format!("{:04o}", node.mode),
            uid: node.uid,
            gid: node.gid,
            size,
            mtime: time(node),
            target,
            state: (state != State::Whole).then_some(state),
        }
    }
}

/// A name of which nothing is saved, as JSON shows it.
#[derive(Serialize)]
struct AbsentLine {
    path: String,
    kind: &'static str,
    reason: Absence,
}

pub(super) fn kind_name(kind: Kind) -> &'static str {
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

/// Fails unless something is saved of the entry with this key.
pub(super) fn require(repository: &Repository, snapshot: &Snapshot, key: &[u8]) -> Result<()> {
    if key.is_empty() {
        return Ok(());
    }
    let mut cursor = EntryCursor::new(TreeCursor::new(repository, snapshot.root, snapshot.level));
    cursor.seek(key)?;
    let path: Vec<u8> = key.iter().map(|byte| if *byte == 0 { b'/' } else { *byte }).collect();
    let path = display_path(&path);
    let message = match cursor.peek()?.filter(|entry| entry.key == key).map(|entry| &entry.body) {
        Some(Body::Node(_)) => return Ok(()),
        Some(Body::Absent(absence)) => format!("'{path}' {}", absence.explained()),
        Some(Body::Extent(_) | Body::End(_)) | None => format!("the snapshot has no '{path}'"),
    };
    Err(Error::new(ErrorKind::NotFound, message).into())
}

/// Called for an entry, with the cursor behind it.
type Each<'e, 'a> = dyn FnMut(&Entry, &mut EntryCursor<'a>) -> Result<ControlFlow<()>> + 'e;

/// Calls `each` for the entry at `key` and all below it, with the cursor behind the entry: for nodes, and
/// for names of which nothing is saved.
pub(super) fn for_each_below<'a>(
    repository: &'a Repository,
    snapshot: &Snapshot,
    key: &[u8],
    each: &mut Each<'_, 'a>,
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
        if !entry.continues_file() && each(&entry, &mut cursor)?.is_break() {
            break;
        }
    }
    Ok(())
}

/// How the large file whose node was just passed ended, if not well; the cursor is then behind it.
fn end_of(node: &Node, cursor: &mut EntryCursor<'_>) -> Result<Option<End>> {
    if node.content == Content::Extents {
        while let Some(following) = cursor.peek()?.filter(|entry| entry.continues_file()) {
            if let Body::End(end) = following.body {
                return Ok(Some(end));
            }
            cursor.advance();
        }
    }
    Ok(None)
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
    for_each_below(&repository, &snapshot, &key, &mut |entry, cursor| {
        if !output.is_heard() {
            return Ok(ControlFlow::Break(()));
        }
        if depth(&entry.key) <= deepest {
            match &entry.body {
                Body::Node(node) => print_node(entry, node, end_of(node, cursor)?, output),
                Body::Absent(Absence::Excluded) if !args.excluded => {}
                Body::Absent(absence) => print_absent(entry, *absence, output),
                Body::Extent(_) | Body::End(_) => {}
            }
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(DONE)
}

fn print_node(entry: &Entry, node: &Node, end: Option<End>, output: &Output) {
    let line = EntryLine::new(entry, node, end);
    output.object(&line);
    let target = line.target.map(|target| format!(" -> {target}")).unwrap_or_default();
    let state = line.state.and_then(State::explained);
    let state = state.map(|state| format!("  [{state}]")).unwrap_or_default();
    let (uid, gid, size, mtime, path) = (line.uid, line.gid, line.size, line.mtime, line.path);
    let permissions = permissions(node);
    output.line(format_args!(
        "{permissions} {uid:>5} {gid:>5} {size:>12} {mtime:30} {path}{target}{state}"
    ));
}

fn print_absent(entry: &Entry, reason: Absence, output: &Output) {
    let path = display_path(&entry.path());
    let unknown = "?";
    output.line(format_args!(
        "?????????? {unknown:>5} {unknown:>5} {unknown:>12} {unknown:30} {path}  [{}]",
        reason.explained()
    ));
    output.object(&AbsentLine { path, kind: "absent", reason });
}

pub(super) fn diff(global: &Global, args: &Diff, output: &Output) -> Result<u8> {
    #[derive(Serialize)]
    struct ChangeLine {
        change: &'static str,
        path: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        state_before: Option<State>,
        #[serde(skip_serializing_if = "Option::is_none")]
        state: Option<State>,
        #[serde(skip_serializing_if = "Option::is_none")]
        reason: Option<Absence>,
    }
    let repository = secret::open(global)?;
    let lineage = args.which.lineage.as_deref();
    let (_, first) = snapshot::find(&repository, &args.first, lineage, output)?;
    let (_, second) = snapshot::find(&repository, &args.second, lineage, output)?;
    let (first, second) = ((first.root, first.level), (second.root, second.level));
    let done = tree::diff(&*repository, first, second, &mut |change| {
        let state = |entry: &Entry| {
            entry.node().map(|node| node.state).filter(|state| *state != State::Whole)
        };
        let (mark, name, before, entry, reason) = match &change {
            Change::Added(entry) => ('+', "added", None, entry, None),
            Change::Removed(entry) => ('-', "removed", Some(entry), entry, None),
            Change::Content(before, entry) => ('M', "content", Some(before), entry, None),
            Change::Metadata(before, entry) => ('U', "metadata", Some(before), entry, None),
            Change::Lost(before, entry, absence) => {
                ('!', "absent", before.as_ref(), entry, Some(*absence))
            }
        };
        let after = state(entry).filter(|_| name != "removed");
        let before = before.and_then(state);
        let told = match (reason, after, before) {
            (Some(absence), ..) => Some(absence.explained()),
            (None, Some(after), _) => after.explained(),
            (None, None, Some(_)) if name != "removed" => Some("wholly saved again"),
            _ => None,
        };
        let told = told.map(|told| format!("  [{told}]")).unwrap_or_default();
        let path = display_path(&entry.path());
        output.line(format_args!("{mark} {path}{told}"));
        let (state_before, state) = (before, after);
        output.object(&ChangeLine { change: name, path, state_before, state, reason });
        if output.is_heard() { Ok(()) } else { Err(Error::cancelled()) }
    });
    // Nobody reads any more: that ended it.
    if output.is_heard() {
        done?;
    }
    Ok(DONE)
}
