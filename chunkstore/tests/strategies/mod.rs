//! Arbitrary entries and nodes, as valid as the format demands.
#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]

use std::collections::{BTreeMap, BTreeSet};

use chunkstore::id::{BlobId, PackId};
use chunkstore::pack::Location;
use chunkstore::tree::{
    Absence, BlobRef, Body, ChildRef, Chunk, Content, End, Entry, Interior, Kind, Liveness, Node,
    NodeRef, PackUse, State, Timestamp, Xattrs,
};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

/// The blob with this number: always in the same place, and of the same length.
pub fn blob(number: u32) -> BlobRef {
    let id = *blake3::hash(&number.to_le_bytes()).as_bytes();
    BlobRef {
        id: BlobId(id),
        location: Location { pack: pack(number / 128), ordinal: (number % 128) as u8 },
        len: 1 + number * 7919 % 2_000_000,
    }
}

fn pack(number: u32) -> PackId {
    let hash = blake3::hash(&[&b"pack"[..], &number.to_le_bytes()].concat());
    PackId(*hash.as_bytes().first_chunk().unwrap())
}

pub fn any_blob() -> impl Strategy<Value = BlobRef> {
    (0..1000_u32).prop_map(blob)
}

pub fn timestamp() -> impl Strategy<Value = Timestamp> {
    let seconds = prop_oneof![any::<i64>(), -10..10_i64, 1_700_000_000..1_800_000_000_i64];
    (seconds, 0..1_000_000_000_u32).prop_map(|(seconds, nanos)| Timestamp { seconds, nanos })
}

/// Chunks in order, with gaps, and where the last one ends.
pub fn chunks(count: std::ops::Range<usize>) -> impl Strategy<Value = (Vec<Chunk>, u64)> {
    let gap = prop_oneof![Just(0), 0..5_000_000_u64, 0..1_u64 << 50];
    vec((gap, any_blob()), count).prop_map(|parts| {
        let mut end = 0;
        let mut chunks = Vec::new();
        for (gap, blob) in parts {
            let chunk = Chunk { offset: end + gap, blob };
            end = chunk.end();
            chunks.push(chunk);
        }
        (chunks, end)
    })
}

/// Kind, size and content that go together.
fn content() -> impl Strategy<Value = (Kind, u64, Content)> {
    let bytes = || vec(any::<u8>(), 0..600);
    let large = || 0..1_u64 << 50;
    let sized = |kind, bytes: Vec<u8>| (kind, bytes.len() as u64, Content::Inline(bytes));
    let part = (any_blob(), any::<[u8; 16]>(), any::<u32>(), any::<u32>());
    prop_oneof![
        (0..7_u8).prop_map(|kind| match Kind::from_byte(kind).unwrap() {
            Kind::Symlink => (Kind::Dir, 0, Content::None),
            kind => (kind, 0, Content::None),
        }),
        large().prop_map(|size| (Kind::File, size, Content::None)),
        large().prop_map(|size| (Kind::File, size, Content::Extents)),
        bytes().prop_map(move |bytes| sized(Kind::File, bytes)),
        bytes().prop_map(move |bytes| sized(Kind::Symlink, bytes)),
        part.prop_map(|(bundle, hash, from, to)| {
            let (from, to) = (from % (bundle.len + 1), to % (bundle.len + 1));
            let (offset, end) = (from.min(to), from.max(to));
            let part = Content::Part { bundle, offset, hash };
            (Kind::File, u64::from(end - offset), part)
        }),
        (chunks(1..20), 0..100_u64).prop_map(|((chunks, end), more)| (
            Kind::File,
            end + more,
            Content::Chunks(chunks)
        )),
    ]
}

fn xattrs() -> impl Strategy<Value = Xattrs> {
    let some = btree_map(vec(any::<u8>(), 1..30), vec(any::<u8>(), 0..60), 1..4);
    prop_oneof![
        4 => Just(Vec::new()),
        1 => some.prop_map(|some| some.into_iter().collect()),
    ]
}

pub fn node() -> impl Strategy<Value = Node> {
    let owner = prop_oneof![Just((0o644, 0, 0)), (0..0o10000_u32, any::<u32>(), any::<u32>())];
    let identity = (any::<u64>(), 0..5_u32, any::<bool>(), any::<(u32, u32)>());
    (content(), owner, timestamp(), timestamp(), identity, xattrs(), state()).prop_map(
        |((kind, size, content), (mode, uid, gid), mtime, ctime, identity, xattrs, state)| {
            let (ino, fs, linked, rdev) = identity;
            let is_device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
            Node {
                kind,
                mode,
                uid,
                gid,
                size,
                mtime,
                ctime,
                ino,
                fs,
                linked,
                rdev: if is_device { rdev } else { (0, 0) },
                xattrs,
                state: if state.suits(kind) { state } else { State::Whole },
                content,
            }
        },
    )
}

fn state() -> impl Strategy<Value = State> {
    (0..8_u8).prop_map(|state| State::from_byte(state).unwrap())
}

fn end() -> impl Strategy<Value = End> {
    let state = (1..4_u8).prop_map(|state| State::from_byte(state).unwrap());
    (any::<u64>(), state).prop_map(|(size, state)| End { size, state })
}

pub fn body() -> impl Strategy<Value = Body> {
    prop_oneof![
        9 => node().prop_map(Body::Node),
        1 => chunks(0..30).prop_map(|(chunks, _)| Body::Extent(chunks)),
        1 => end().prop_map(Body::End),
        1 => (0..2_u8).prop_map(|why| Body::Absent(Absence::from_byte(why).unwrap())),
    ]
}

/// A key, often the beginning of another one.
pub fn key() -> impl Strategy<Value = Vec<u8>> {
    let few = prop_oneof![Just(0_u8), Just(b'a'), Just(b'b'), Just(255)];
    prop_oneof![vec(few, 0..6), vec(any::<u8>(), 0..40), vec(b'a'..=b'z', 3..8)]
}

/// Entries in order of keys.
pub fn entries(count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Entry>> {
    btree_map(key(), body(), count).prop_map(|entries| {
        let entry = |(key, body)| Entry { key, body };
        entries.into_iter().map(entry).collect()
    })
}

fn node_ref() -> impl Strategy<Value = NodeRef> {
    (any::<[u8; 32]>(), 0..20_u32, 0..128_u8).prop_map(|(id, number, ordinal)| NodeRef {
        id: BlobId(id),
        pack: pack(number),
        ordinal,
    })
}

fn children() -> impl Strategy<Value = Vec<ChildRef>> {
    let child = (node_ref(), any::<u32>(), any::<u32>());
    (btree_set(key(), 1..40), vec(child, 40)).prop_map(|(keys, children): (BTreeSet<_>, Vec<_>)| {
        let parts = keys.into_iter().zip(children);
        let child = |(first_key, (node, entries, bytes)): (_, (_, u32, u32))| ChildRef {
            first_key,
            node,
            entries: entries.into(),
            bytes: bytes.into(),
        };
        parts.map(child).collect()
    })
}

pub fn interior() -> impl Strategy<Value = Interior> {
    let uses = btree_map(any::<[u8; 16]>(), 1..=u128::MAX, 0..20);
    (1..=10_u8, children(), uses).prop_map(|(level, children, uses): (_, _, BTreeMap<_, _>)| {
        let uses = uses.into_iter().map(|(pack, blobs)| {
            let PackUse { pack, blobs } = PackUse { pack: PackId(pack), blobs };
            (pack, blobs)
        });
        let liveness = if level == 1 { Liveness(uses.collect()) } else { Liveness::default() };
        Interior { level, children, liveness }
    })
}
