//! What a snapshot says of single names.

use chunkstore::id::SnapshotId;
use chunkstore::repository::Repository;
use chunkstore::tree::{Absence, Body, EntryCursor, State, TreeCursor};

use super::snapshot;

/// What a snapshot says of a file: its size and state, or why it is absent; nothing if it has no entry.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    Saved(u64, State),
    Absent(Absence),
    Nothing,
}

pub fn said(repository: &Repository, id: SnapshotId, key: &[u8]) -> Said {
    let snapshot = snapshot(repository, id);
    let mut cursor = EntryCursor::new(TreeCursor::new(repository, snapshot.root, snapshot.level));
    cursor.seek(key).unwrap();
    let mut said = Said::Nothing;
    while let Some(entry) = cursor.peek().unwrap() {
        match &entry.body {
            Body::Node(node) if entry.key == key => said = Said::Saved(node.size, node.state),
            Body::Absent(why) if entry.key == key => said = Said::Absent(*why),
            Body::Extent(_) => {}
            Body::End(end) => said = Said::Saved(end.size, end.state),
            _ => break,
        }
        cursor.advance();
    }
    said
}
