//! Bodies of the fuzz targets: one for every decoder of bytes that come from a store.
//!
//! Each takes arbitrary bytes and says whether they were accepted. It must not panic, hang, or take
//! memory that its input does not justify; and what it accepts must hold together. Sealed objects are
//! also tried with a valid seal around the bytes, since no fuzzer would get through it.

use std::io::IoSlice;

use objects::testing::MemoryStore;
use objects::{Created, ObjectStore};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::MemoryNodes;
use crate::chunker::{Chunker, ChunkerConfig};
use crate::codec::compress::Compression;
use crate::codec::seal::{Header, Keyring, ObjectCipher, ObjectKind, Secret, seal_record};
use crate::id::{BlobId, GenerationId, PackId, RepositoryId, SegmentId, SnapshotId};
use crate::index::{Index, Record, SegmentWriter};
use crate::key_slot;
use crate::pack::{BlobKind, Location, Pack, PackBuilder, PackClass, ReadScratch};
use crate::record::{self, Config, Session, Tombstones, Verdict};
use crate::relocation::{self, Relocations};
use crate::tree::{
    Absence, Body, Chunk, Content, End, Entry, EntryCursor, Kind, Node, State, Timestamp,
    TreeBuilder, TreeCursor, decode_interior, decode_leaf, end_key, extent_key,
};

/// A body: whether the bytes were accepted.
pub type Target = fn(&[u8]) -> bool;

/// All targets by name, which is also the folder of their seeds.
pub const TARGETS: [(&str, Target); 13] = [
    ("chunker", chunker),
    ("header", header),
    ("interior", interior),
    ("key_slot", key_slot),
    ("leaf", leaf),
    ("pack_object", pack_object),
    ("pack_sealed", pack_sealed),
    ("pack_table", pack_table),
    ("record", record),
    ("relocations", relocations),
    ("segment_object", segment_object),
    ("segment_footer", segment_footer),
    ("tombstones", tombstones),
];

const PACK: PackId = PackId([5; 16]);
const SEGMENT: SegmentId = SegmentId([6; 16]);
const CUT: [u8; 32] = [8; 32];
const SMALL: ChunkerConfig = ChunkerConfig::Fastcdc { min: 4096, avg: 8192, max: 16_384 };

fn keys() -> Keyring {
    Keyring::new(RepositoryId([7; 16]), vec![Secret([1; 32])]).expect("one epoch is enough")
}

fn put(store: &MemoryStore, name: &str, bytes: &[u8]) {
    let created = store.create(name, &[IoSlice::new(bytes)]);
    assert_eq!(created.expect("memory does not fail"), Created::New);
}

/// Cuts do not depend on how the data is buffered.
pub fn chunker(data: &[u8]) -> bool {
    let chunker = Chunker::new(SMALL, &CUT).expect("the sizes are allowed");
    let mut at = 0;
    while at < data.len() {
        let len = chunker.cut(&data[at..]);
        let window = &data[at..data.len().min(at + chunker.lookahead())];
        assert_eq!(len, chunker.cut(window));
        assert!(len > 0 && len <= 16_384);
        at += len;
    }
    at == data.len()
}

/// The header of every object.
pub fn header(data: &[u8]) -> bool {
    let Ok(header) = Header::decode("name", data) else {
        return false;
    };
    assert_eq!(header.encode()[..], data[..header.encode().len()]);
    true
}

/// An interior node.
pub fn interior(data: &[u8]) -> bool {
    let Ok(interior) = decode_interior(data) else {
        return false;
    };
    let again = decode_interior(&interior.encode());
    assert_eq!(again.as_ref(), Ok(&interior));
    true
}

/// A leaf. What it holds can be put into a tree again.
pub fn leaf(data: &[u8]) -> bool {
    let Ok(leaf) = decode_leaf(data) else {
        return false;
    };
    let nodes = MemoryNodes::default();
    let mut builder = TreeBuilder::new(&nodes, &CUT);
    for entry in &leaf.entries {
        builder.push(entry).expect("they are in order");
    }
    let Some((root, level)) = builder.finish().expect("memory does not fail") else {
        return leaf.entries.is_empty();
    };
    let mut cursor = EntryCursor::new(TreeCursor::new(&nodes, root, level));
    for entry in &leaf.entries {
        let found = cursor.peek().expect("it was just written");
        assert_eq!(found.map(|found| &found.key), Some(&entry.key));
        cursor.advance();
    }
    true
}

/// A key slot.
pub fn key_slot(data: &[u8]) -> bool {
    key_slot::fuzz_decode(data);
    serde_json::from_slice::<key_slot::SlotInfo>(data).is_ok()
}

/// The table of a pack; the first byte chooses its class.
pub fn pack_table(data: &[u8]) -> bool {
    let Some((class, table)) = data.split_first() else {
        return false;
    };
    let class = if class % 2 == 0 { PackClass::Data } else { PackClass::Meta };
    let Ok(table) = crate::pack::decode_table(class, table) else {
        return false;
    };
    for pair in table.windows(2) {
        assert_eq!(pair[0].offset + pair[0].stored_len, pair[1].offset);
    }
    true
}

/// A whole pack.
pub fn pack_object(data: &[u8]) -> bool {
    let store = MemoryStore::new();
    put(&store, &PackClass::Data.object_name(PACK), data);
    let keys = keys();
    let Ok(pack) = Pack::open(&store, &keys, PackClass::Data, PACK) else {
        return false;
    };
    let mut scratch = ReadScratch::default();
    let read = |(at, entry): (usize, &crate::pack::TableEntry)| {
        pack.read(&store, &keys, at as u8, &entry.id, &mut scratch).is_ok()
    };
    pack.table().iter().enumerate().all(read)
}

/// A pack with any table, validly sealed, and any bytes as blobs: the first two bytes say how many.
pub fn pack_sealed(data: &[u8]) -> bool {
    let Some((len, rest)) = data.split_first_chunk() else {
        return false;
    };
    let blobs = usize::from(u16::from_le_bytes(*len)).min(rest.len());
    let (blobs, table) = rest.split_at(blobs);
    let name = PackClass::Data.object_name(PACK);
    let (header, cipher) = ObjectCipher::create(&keys(), ObjectKind::DataPack, &name);
    let mut object = header.encode().to_vec();
    object.extend_from_slice(blobs);
    let at = object.len();
    object.extend_from_slice(table);
    cipher.seal(u32::MAX, b"table", &mut object, at);
    let len = (object.len() - at) as u32;
    object.extend_from_slice(&header.encode());
    object.extend_from_slice(&len.to_le_bytes());
    object.extend_from_slice(b"EBPKTAIL");
    let store = MemoryStore::new();
    put(&store, &name, &object);
    let keys = keys();
    let Ok(pack) = Pack::open(&store, &keys, PackClass::Data, PACK) else {
        return false;
    };
    let mut scratch = ReadScratch::default();
    for (at, entry) in pack.table().iter().enumerate() {
        // The blobs are not sealed by anyone.
        let read = pack.read(&store, &keys, at as u8, &entry.id, &mut scratch);
        assert!(read.is_err());
    }
    true
}

/// The plaintext of every record that is JSON.
pub fn record(data: &[u8]) -> bool {
    fn accepts<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(
        data: &[u8],
    ) -> Option<T> {
        let value: T = serde_json::from_slice(data).ok()?;
        let again = serde_json::to_vec(&value).expect("records are plain data");
        assert_eq!(serde_json::from_slice::<T>(&again).ok().as_ref(), Some(&value));
        Some(value)
    }
    let config = accepts::<Config>(data);
    if let Some(config) = &config {
        // Either refused or usable.
        if let Ok(chunker) = Chunker::new(config.chunker, &CUT) {
            assert!(chunker.cut(&[0; 1000]) > 0);
        }
    }
    let verdict = accepts::<Verdict>(data).is_some();
    let session = accepts::<Session>(data).is_some();
    let marks = accepts::<record::Forgotten>(data).is_some();
    let waits = accepts::<record::Waits>(data).is_some();
    config.is_some() || verdict || session || marks || waits
}

fn opens_as_index(object: &[u8]) -> bool {
    let store = MemoryStore::new();
    put(&store, &format!("{}{SEGMENT}", crate::index::FOLDER), object);
    let keys = keys();
    let (index, _) = Index::open(&store, &keys, 1 << 20).expect("memory does not fail");
    let mut records = Vec::new();
    for segment in index.segments() {
        let read = segment.for_each(&store, &mut |record| {
            records.push(record);
            Ok(())
        });
        if read.is_ok() {
            assert_eq!(records.len() as u64, segment.len());
        }
    }
    for seed in 0..20_u8 {
        index.get(&store, &BlobId([seed.wrapping_mul(13); 32]));
    }
    !index.is_empty()
}

/// A whole index segment.
pub fn segment_object(data: &[u8]) -> bool {
    opens_as_index(data)
}

/// An index segment with any footer, validly sealed, and 4 KiB for each block it may have.
pub fn segment_footer(data: &[u8]) -> bool {
    let name = format!("{}{SEGMENT}", crate::index::FOLDER);
    let (header, cipher) = ObjectCipher::create(&keys(), ObjectKind::Segment, &name);
    let decoded = crate::index::fuzz_footer(data);
    let mut object = header.encode().to_vec();
    object.resize(object.len() + 4096 + 48, 0);
    let at = object.len();
    object.extend_from_slice(data);
    cipher.seal(u32::MAX, b"footer", &mut object, at);
    let len = (object.len() - at) as u32;
    object.extend_from_slice(&len.to_le_bytes());
    object.extend_from_slice(b"EBIXTAIL");
    let opened = opens_as_index(&object);
    assert!(decoded || !opened);
    decoded
}

/// A list of packs.
pub fn tombstones(data: &[u8]) -> bool {
    let decoded = Tombstones::decode(data);
    let id = GenerationId([9; 16]);
    let store = MemoryStore::new();
    let name = record::tombstones_name(id);
    let keys = keys();
    put(&store, &name, &seal_record(&keys, ObjectKind::Tombstones, &name, data));
    let read = record::read_tombstones(&store, &keys, id).ok();
    assert_eq!(read, decoded);
    decoded.is_some()
}

/// Where repacked blobs lie.
pub fn relocations(data: &[u8]) -> bool {
    let decoded = relocation::Record::decode(data).ok();
    let id = SnapshotId([9; 16]);
    let store = MemoryStore::new();
    let name = record::relocation_name(id);
    let keys = keys();
    put(&store, &name, &seal_record(&keys, ObjectKind::Relocations, &name, data));
    assert_eq!(relocation::Record::read(&store, &keys, id).ok(), decoded);
    if let Some(relocation::Record::Moved(packs)) = &decoded {
        let all = Relocations::load(&store, &keys).expect("it was just read");
        for (pack, moved) in packs {
            for (ordinal, _) in &moved.places {
                assert!(all.places(Location { pack: *pack, ordinal: *ordinal }).len() < 1000);
            }
        }
    }
    decoded.is_some()
}

/// Valid inputs for every target: name of the target and of the seed, and its bytes. Not the same
/// every time, as salts are random.
///
/// # Panics
/// When the library refuses its own output.
pub fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let (keys, nodes) = (keys(), MemoryNodes::default());
    let mut seeds = Vec::new();
    let mut noise = vec![0; 50_000];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    seeds.push(("chunker", "noise", noise));
    seeds.push(("chunker", "zeros", vec![0; 20_000]));

    let mut builder = TreeBuilder::new(&nodes, &CUT);
    sample_entries().iter().for_each(|entry| builder.push(entry).expect("in order"));
    builder.finish().expect("memory does not fail");
    let all = nodes.all();
    let first = |kind| all.iter().find(|(other, _)| *other == kind).expect("a node").1.clone();
    seeds.push(("leaf", "every-kind", first(BlobKind::Leaf)));
    seeds.push(("interior", "root", first(BlobKind::Interior)));

    let mut builder = PackBuilder::new(&keys, PackClass::Data, Vec::new());
    for plain in [&b"hello"[..], &[7; 300]] {
        let id = BlobKind::Data.id(&keys, plain);
        builder.push(id, BlobKind::Data, Compression::None, plain, plain.len());
    }
    let pack = builder.finish();
    let mut table = vec![0];
    for entry in &pack.entries {
        table.extend_from_slice(&entry.id.0);
        table.extend_from_slice(&[entry.kind as u8, entry.compression as u8]);
        table.extend_from_slice(&entry.stored_len.to_le_bytes());
        table.extend_from_slice(&entry.plain_len.to_le_bytes());
    }
    let blobs = pack.entries.iter().map(|entry| entry.stored_len).sum::<u32>();
    let mut sealed = (blobs as u16).to_le_bytes().to_vec();
    sealed.resize(2 + blobs as usize, 0);
    sealed.extend_from_slice(&table[1..]);
    seeds.push(("header", "pack", pack.buffer[..64].to_vec()));
    seeds.push(("pack_object", "two-blobs", renamed_pack(&keys)));
    seeds.push(("pack_sealed", "two-blobs", sealed));
    seeds.push(("pack_table", "two-blobs", table));

    let (object, footer) = sample_segment(&keys);
    seeds.push(("segment_object", "cut-off", object));
    seeds.push(("segment_footer", "one-block", footer));

    let text = br#"{"version":0,"repository":"07070707070707070707070707070707","slot":"0102030405060708","kind":"key-file","created":"2026-01-01T00:00:00Z","salt":"00","commitment":"00","sealed":"00"}"#;
    seeds.push(("key_slot", "key-file", text.to_vec()));
    for (name, text) in RECORDS {
        seeds.push(("record", name, text.as_bytes().to_vec()));
    }
    let mut list = 1_u64.to_le_bytes().to_vec();
    list.extend_from_slice(&0_u64.to_le_bytes());
    list.resize(16 + 32, 3);
    seeds.push(("tombstones", "two", list));
    // Two blobs of one pack, copied to another.
    let mut moved = vec![0, 1];
    moved.extend_from_slice(&[4; 16]);
    moved.push(1);
    moved.extend_from_slice(&[5; 16]);
    moved.extend_from_slice(&[0, 2, 3, 0, 0, 7, 0, 1]);
    seeds.push(("relocations", "two", moved));
    seeds.push(("relocations", "fenced", vec![1]));
    seeds
}

const RECORDS: [(&str, &str); 5] = [
    (
        "config",
        r#"{"created":"2026-01-01T00:00:00Z","chunker":{"kind":"fastcdc","min":262144,"avg":1048576,"max":2097152},"features":[]}"#,
    ),
    (
        "snapshot",
        r#"{"verdict":"snapshot","root":{"id":"0101010101010101010101010101010101010101010101010101010101010101","pack":"02020202020202020202020202020202","ordinal":3},"level":0,"lineage":"l","host":"h","path":"/","tags":{"a":"b"},"started":"2026-01-01T00:00:00Z","finished":"2026-01-01T00:00:01Z","parent":null,"summary":{"files":1},"program":"p"}"#,
    ),
    ("fenced", r#"{"verdict":"fenced","at":"2026-01-01T00:00:00Z"}"#),
    (
        "session",
        r#"{"purpose":"backup","writer":"w","started":"2026-01-01T00:00:00Z","heartbeat":7}"#,
    ),
    ("waits", r#"{"sessions":["02020202020202020202020202020202"]}"#),
];

/// A pack under the name at which [`pack_object`] looks: packs are bound to theirs, so it is sealed
/// here rather than by a builder.
fn renamed_pack(keys: &Keyring) -> Vec<u8> {
    let name = PackClass::Data.object_name(PACK);
    let (header, cipher) = ObjectCipher::create(keys, ObjectKind::DataPack, &name);
    let plain = b"hello";
    let mut object = header.encode().to_vec();
    object.extend_from_slice(plain);
    let len = (plain.len() as u32).to_le_bytes();
    cipher.seal(0, &[0, 0, len[0], len[1], len[2], len[3]], &mut object, 64);
    let stored = (object.len() - 64) as u32;
    let at = object.len();
    object.extend_from_slice(&BlobKind::Data.id(keys, plain).0);
    object.extend_from_slice(&[0, 0]);
    object.extend_from_slice(&stored.to_le_bytes());
    object.extend_from_slice(&len);
    cipher.seal(u32::MAX, b"table", &mut object, at);
    let table = (object.len() - at) as u32;
    object.extend_from_slice(&header.encode());
    object.extend_from_slice(&table.to_le_bytes());
    object.extend_from_slice(b"EBPKTAIL");
    object
}

/// A segment (under a random name, so it does not open under another), and a footer like its own.
fn sample_segment(keys: &Keyring) -> (Vec<u8>, Vec<u8>) {
    let store = MemoryStore::new();
    let mut writer = SegmentWriter::new(keys, 2, Vec::new());
    let mut footer = vec![2, 32, 0];
    footer.extend_from_slice(&u64::from_be_bytes([1; 8]).to_le_bytes());
    footer.extend_from_slice(&[2; 16]);
    for byte in [1, 2] {
        let location = Location { pack: PACK, ordinal: byte };
        writer.push(&Record::new(&BlobId([byte; 32]), location));
    }
    writer.finish(&store).expect("memory does not fail");
    let name = store.keys().remove(0);
    (store.read(&name, 1 << 20).expect("it was just written"), footer)
}

/// Entries of every kind, and enough of them for several leaves.
fn sample_entries() -> Vec<Entry> {
    let blob = |byte: u8| crate::tree::BlobRef {
        id: BlobId([byte; 32]),
        location: Location { pack: PackId([byte / 2; 16]), ordinal: byte },
        len: 1000,
    };
    let node = |kind, size, content| Node {
        kind,
        mode: 0o644,
        uid: 1000,
        gid: 100,
        size,
        mtime: Timestamp { seconds: -5, nanos: 999_999_999 },
        ctime: Timestamp { seconds: 1_700_000_000, nanos: 0 },
        ino: 12,
        fs: 0,
        linked: false,
        rdev: if kind == Kind::CharDevice { (1, 3) } else { (0, 0) },
        xattrs: Vec::new(),
        state: State::Whole,
        content,
    };
    let chunk = |offset, byte| Chunk { offset, blob: blob(byte) };
    let part = Content::Part { bundle: blob(1), offset: 10, hash: [4; 16] };
    let mut attributed = node(Kind::File, 0, Content::None);
    attributed.xattrs = vec![(b"user.a".to_vec(), b"b".to_vec())];
    let mut entries = vec![
        (b"".to_vec(), Body::Node(node(Kind::Dir, 0, Content::None))),
        (b"a".to_vec(), Body::Node(node(Kind::File, 3, Content::Inline(b"abc".to_vec())))),
        (b"b".to_vec(), Body::Node(node(Kind::File, 700, part))),
        (
            b"c".to_vec(),
            Body::Node(node(Kind::File, 9000, Content::Chunks(vec![chunk(0, 2), chunk(5000, 3)]))),
        ),
        (b"d".to_vec(), Body::Node(node(Kind::File, 1 << 30, Content::Extents))),
        (extent_key(b"d", 0), Body::Extent(vec![chunk(7, 4), chunk(9000, 2)])),
        (end_key(b"d"), Body::End(End { size: 1 << 20, state: State::Changed })),
        (b"da".to_vec(), Body::Absent(Absence::Unreadable)),
        (b"e".to_vec(), Body::Node(node(Kind::Symlink, 2, Content::Inline(b"to".to_vec())))),
        (b"f".to_vec(), Body::Node(node(Kind::CharDevice, 0, Content::None))),
        (b"g".to_vec(), Body::Node(attributed)),
        (b"ga".to_vec(), Body::Absent(Absence::Excluded)),
    ];
    for state in (1..).map_while(State::from_byte) {
        let kind = if state.suits(Kind::File) { Kind::File } else { Kind::Dir };
        let body = Body::Node(Node { state, ..node(kind, 0, Content::None) });
        entries.push((format!("gb{}", state as u8).into_bytes(), body));
    }
    for n in 0..1500 {
        let key = format!("h\0{n:05}").into_bytes();
        entries.push((key, Body::Node(node(Kind::Fifo, 0, Content::None))));
    }
    let entry = |(key, body)| Entry { key, body };
    entries.into_iter().map(entry).collect()
}
