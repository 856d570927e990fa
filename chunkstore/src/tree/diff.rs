//! What differs between two trees. Equal leaves are skipped without being compared.

use super::cursor::{EntryCursor, NodeSource, TreeCursor};
use super::entry::{Absence, Body, Content, Entry, Node};
use super::node::NodeRef;
use crate::error::Result;

/// A difference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Only the second tree has it.
    Added(Entry),
    /// Only the first tree has it.
    Removed(Entry),
    /// Both have it, and the content or kind differs.
    Content(Entry, Entry),
    /// Both have it with the same content, and owner, mode, times, attributes or state differ.
    Metadata(Entry, Entry),
    /// The second tree only says why it does not have it. The first has this of it, if anything; a name
    /// that was not saved for this very reason before is no difference, nor is one that was never saved
    /// and is now excluded.
    Lost(Option<Entry>, Entry, Absence),
}

/// Calls `each` for every difference, in order of paths.
///
/// # Errors
/// When a node of either tree cannot be read, and those of `each`.
pub fn diff(
    source: &dyn NodeSource,
    first: (NodeRef, u8),
    second: (NodeRef, u8),
    each: &mut dyn FnMut(Change) -> Result<()>,
) -> Result<()> {
    let mut old = EntryCursor::new(TreeCursor::new(source, first.0, first.1));
    let mut new = EntryCursor::new(TreeCursor::new(source, second.0, second.1));
    loop {
        while skip_equal_leaf(&mut old, &mut new)? {}
        let order = match (old.peek()?, new.peek()?) {
            (None, None) => return Ok(()),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(a), Some(b)) => a.key.cmp(&b.key),
        };
        let mut before = None;
        let mut after = None;
        if order.is_le() {
            before = take(&mut old)?;
        }
        if order.is_ge() {
            after = take(&mut new)?;
        }
        match (before, after) {
            (Some(a), Some(b)) => compare(a, b, each)?,
            (Some((a, _)), None) if a.node().is_some() => each(Change::Removed(a))?,
            (None, Some((b, _))) => compare_absent(None, b, each)?,
            (Some(_) | None, None) => {}
        }
    }
}

/// Steps over a leaf that both trees have, if both cursors stand at its beginning. A large file at its end
/// is left, since what differs may follow in the next leaf.
fn skip_equal_leaf(old: &mut EntryCursor<'_>, new: &mut EntryCursor<'_>) -> Result<bool> {
    let (Some((a, 0)), Some((b, 0))) = (old.peek_at()?, new.peek_at()?) else {
        return Ok(false);
    };
    if a.child.node.id != b.child.node.id {
        return Ok(false);
    }
    let entries = &a.leaf.entries;
    let own = entries.iter().rposition(|entry| !entry.continues_file()).unwrap_or(0);
    let is_large =
        entries.get(own).and_then(Entry::node).is_none_or(|node| node.content == Content::Extents);
    let skipped = if is_large { own } else { entries.len() };
    for _ in 0..skipped {
        old.advance();
        new.advance();
    }
    Ok(skipped > 0)
}

/// A node entry, with a hash of the extent entries that follow it; size and state are those at the end
/// of them.
fn take(cursor: &mut EntryCursor<'_>) -> Result<Option<(Entry, blake3::Hash)>> {
    let Some(mut entry) = cursor.peek()?.cloned() else {
        return Ok(None);
    };
    cursor.advance();
    let mut extents = blake3::Hasher::new();
    while let Some(following) = cursor.peek()?.filter(|following| following.continues_file()) {
        match (&following.body, &mut entry.body) {
            (Body::Extent(chunks), _) => {
                for chunk in chunks {
                    extents.update(&chunk.offset.to_le_bytes()).update(&chunk.blob.id.0);
                }
            }
            (Body::End(end), Body::Node(node)) => (node.size, node.state) = (end.size, end.state),
            _ => {}
        }
        cursor.advance();
    }
    Ok(Some((entry, extents.finalize())))
}

fn compare(
    (a, a_extents): (Entry, blake3::Hash),
    (b, b_extents): (Entry, blake3::Hash),
    each: &mut dyn FnMut(Change) -> Result<()>,
) -> Result<()> {
    let (before, after) = match (a.node(), b.node()) {
        (Some(before), Some(after)) => (before, after),
        (None, Some(_)) => return each(Change::Added(b)),
        (_, None) => return compare_absent(Some(a), b, each),
    };
    let same_content = before.kind == after.kind
        && before.size == after.size
        && before.rdev == after.rdev
        && a_extents == b_extents
        && content_key(before) == content_key(after);
    if !same_content {
        each(Change::Content(a, b))
    } else if metadata_key(before) != metadata_key(after) {
        each(Change::Metadata(a, b))
    } else {
        Ok(())
    }
}

/// Tells of an entry of the second tree that may be absent.
fn compare_absent(
    before: Option<Entry>,
    after: Entry,
    each: &mut dyn FnMut(Change) -> Result<()>,
) -> Result<()> {
    let Body::Absent(reason) = after.body else {
        return each(Change::Added(after));
    };
    match before.as_ref().map(|before| &before.body) {
        Some(Body::Absent(same)) if *same == reason => Ok(()),
        Some(Body::Absent(_)) | None if reason == Absence::Excluded => Ok(()),
        Some(Body::Node(_)) => each(Change::Lost(before, after, reason)),
        _ => each(Change::Lost(None, after, reason)),
    }
}

/// What identifies the content: names of blobs, not where they lie.
fn content_key(node: &Node) -> Vec<u8> {
    let mut key = Vec::new();
    match &node.content {
        Content::None | Content::Extents => {}
        Content::Inline(bytes) => key.extend_from_slice(bytes),
        Content::Part { hash, .. } => key.extend_from_slice(hash),
        Content::Chunks(chunks) => {
            for chunk in chunks {
                key.extend_from_slice(&chunk.offset.to_le_bytes());
                key.extend_from_slice(&chunk.blob.id.0);
            }
        }
    }
    key
}

fn metadata_key(node: &Node) -> impl PartialEq + '_ {
    (node.mode, node.uid, node.gid, node.mtime, node.state, &node.xattrs)
}
