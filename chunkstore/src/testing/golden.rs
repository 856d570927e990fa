//! The golden repository: what is in it, and a manifest of everything that is read from it.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use objects::local::LocalStore;

use crate::codec::seal::Secret;
use crate::error::Result;
use crate::key_slot::Unlock;
use crate::pack::{PackClass, ReadScratch};
use crate::repository::Repository;
use crate::tree::{
    Absence, BlobRef, Body, Chunk, Content, End, Entry, EntryCursor, Kind, Node, State, Timestamp,
    TreeCursor, child_key, end_key, extent_key,
};

/// The secret of the key slot that no passphrase opens.
pub fn key_file_secret() -> [u8; 32] {
    [7; 32]
}

/// What opens that slot.
pub fn key_file() -> Unlock {
    Unlock::KeyFile(Secret(key_file_secret()))
}

/// Opens a repository in a folder.
///
/// # Errors
/// As [`Repository::open`].
pub fn open(path: &Path, unlock: &Unlock) -> Result<Repository> {
    Repository::open(Arc::new(LocalStore::open(path)?), unlock)
}

/// Bytes that follow from `seed`: random if it is even, text if it is odd.
fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    if seed % 2 == 1 {
        let text = format!("line {seed} of a text that is the same again and again\n");
        bytes.iter_mut().zip(text.bytes().cycle()).for_each(|(to, from)| *to = from);
    } else {
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    }
    bytes
}

/// Entries of every form, whose data goes to `store`.
///
/// # Errors
/// Those of `store`.
pub fn entries(round: u64, store: &mut dyn FnMut(&[u8]) -> Result<BlobRef>) -> Result<Vec<Entry>> {
    let node = |kind, size, content| Node {
        kind,
        mode: 0o640 + round as u32,
        uid: 1000,
        gid: 100,
        size,
        mtime: Timestamp { seconds: -1, nanos: 999_999_999 },
        ctime: Timestamp { seconds: 1_790_000_000, nanos: 1 },
        ino: 77,
        fs: 0,
        linked: false,
        rdev: (0, 0),
        xattrs: Vec::new(),
        state: State::Whole,
        content,
    };
    let file = |size, content| node(Kind::File, size, content);
    let bundle = store(&[bytes(2, 3000), bytes(3 + 2 * round, 2000)].concat())?;
    let part = |offset, hash: u8| Content::Part { bundle, offset, hash: [hash; 16] };
    let mut chunks = Vec::new();
    for (at, seed) in [4, 5, 6 + round].into_iter().enumerate() {
        let blob = store(&bytes(seed, 6000))?;
        let offset = at as u64 * 10_000;
        chunks.push(Chunk { offset, blob });
    }
    let extent = Chunk { offset: 70 << 20, blob: store(&bytes(8, 9000))? };
    let mut attributed = file(0, Content::None);
    attributed.xattrs = vec![(b"user.name".to_vec(), b"value".to_vec())];
    attributed.linked = true;
    let mut device = node(Kind::CharDevice, 0, Content::None);
    device.rdev = (1, 3);
    let mut entries = vec![
        (b"".to_vec(), Body::Node(node(Kind::Dir, 0, Content::None))),
        (b"attributed".to_vec(), Body::Node(attributed)),
        (b"chunks".to_vec(), Body::Node(file(40_000, Content::Chunks(chunks)))),
        (b"device".to_vec(), Body::Node(device)),
        (b"inline".to_vec(), Body::Node(file(7, Content::Inline(b"content".to_vec())))),
        (b"large".to_vec(), Body::Node(file(100 << 20, Content::Extents))),
        (extent_key(b"large", extent.offset), Body::Extent(vec![extent])),
        (end_key(b"large"), Body::End(End { size: 80 << 20, state: State::Cut })),
        (b"left out".to_vec(), Body::Absent(Absence::Excluded)),
        (b"link".to_vec(), Body::Node(node(Kind::Symlink, 2, Content::Inline(b"to".to_vec())))),
        (b"names \xff\n".to_vec(), Body::Node(node(Kind::Fifo, 0, Content::None))),
        (b"part 1".to_vec(), Body::Node(file(3000, part(0, 1)))),
        (b"part 2".to_vec(), Body::Node(file(2000, part(3000, 2)))),
    ];
    for state in (1..).map_while(State::from_byte) {
        let kind = if state.suits(Kind::File) { Kind::File } else { Kind::Dir };
        let body = Body::Node(Node { state, ..node(kind, 0, Content::None) });
        entries.push((format!("state {}", state as u8).into_bytes(), body));
    }
    entries.push((b"unreadable".to_vec(), Body::Absent(Absence::Unreadable)));
    entries.push((b"z".to_vec(), Body::Node(node(Kind::Dir, 0, Content::None))));
    // Enough for several leaves.
    for n in 0..1200 + round {
        let key = child_key(b"z", format!("{n:05}").as_bytes());
        entries.push((key, Body::Node(file(0, Content::None))));
    }
    let entry = |(key, body)| Entry { key, body };
    Ok(entries.into_iter().map(entry).collect())
}

/// Everything read from a repository, as text: its configuration, snapshots, entries, and the hash of
/// every blob.
///
/// # Errors
/// When anything of it cannot be read.
pub fn manifest(repository: &Repository) -> Result<String> {
    let mut text = String::new();
    let mut line = |line: String| writeln!(text, "{line}").expect("memory does not fail");
    line(format!("repository {}", repository.keys().repository));
    line(format!("{:?}", repository.config()));
    let list = repository.list_snapshots()?;
    let mut scratch = ReadScratch::default();
    for (id, snapshot) in &list.snapshots {
        line(format!("snapshot {id} {snapshot:?}"));
        let leaves = TreeCursor::new(repository, snapshot.root, snapshot.level);
        let mut cursor = EntryCursor::new(leaves);
        // Most entries are alike: their hash will do.
        let (mut count, mut all) = (0, blake3::Hasher::new());
        while let Some(entry) = cursor.peek()?.cloned() {
            let described = format!("{} {:?}", entry.key.escape_ascii(), entry.body);
            count += 1;
            all.update(described.as_bytes());
            if count <= 30 {
                line(described);
            }
            for blob in entry.blobs() {
                repository.read_blob(PackClass::Data, blob.location, &blob.id, &mut scratch)?;
                let hash = blake3::hash(&scratch.plain).to_hex();
                line(format!("  blob of {} bytes: {hash}", scratch.plain.len()));
            }
            cursor.advance();
        }
        line(format!("{count} entries: {}", all.finalize().to_hex()));
    }
    for id in &list.forgotten {
        line(format!("forgotten {id}"));
    }
    Ok(text)
}
