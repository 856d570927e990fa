//! What is written is read back: records, packs, and the index, which finds all it holds and
//! nothing else.

#![expect(clippy::unwrap_used, reason = "also in the functions that the tests share")]

mod strategies;

use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSlice;

use chunkstore::ErrorKind;
use chunkstore::codec::compress::{Compression, Compressor, Level};
use chunkstore::codec::seal::{Keyring, ObjectKind, Secret};
use chunkstore::id::{BlobId, GenerationId, PackId, RepositoryId, SegmentId, SnapshotId};
use chunkstore::index::{Index, Record, Segment, SegmentWriter, merge};
use chunkstore::limits::PACK_BLOBS_MAX;
use chunkstore::pack::{BlobKind, Location, Pack, PackBuilder, PackClass, ReadScratch};
use chunkstore::record::{
    self, Session, Snapshot, Summary, Tombstones, Verdict, create_tombstones, read_tombstones,
    session_name, snapshot_name,
};
use chunkstore::tree::{Liveness, NodeRef};
use objects::testing::MemoryStore;
use objects::{Created, ObjectStore};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::prelude::*;

fn keys() -> Keyring {
    Keyring::new(RepositoryId([7; 16]), vec![Secret([1; 32])]).unwrap()
}

fn put(store: &MemoryStore, name: &str, object: &[u8]) {
    assert_eq!(store.create(name, &[IoSlice::new(object)]).unwrap(), Created::New);
}

fn time() -> impl Strategy<Value = jiff::Timestamp> {
    (0..4_000_000_000_i64, 0..1_000_000_000_i32)
        .prop_map(|(second, nano)| jiff::Timestamp::new(second, nano).unwrap())
}

fn snapshot() -> impl Strategy<Value = Snapshot> {
    let tags = btree_map(any::<String>(), any::<String>(), 0..4);
    let texts = (any::<String>(), any::<String>(), any::<String>(), tags);
    let root = (any::<[u8; 32]>(), any::<[u8; 16]>(), 0..128_u8, 0..10_u8);
    let counts = (any::<u64>(), any::<u64>(), any::<u64>());
    let parent = proptest::option::of(any::<[u8; 16]>());
    let sparse = btree_map(any::<[u8; 16]>(), any::<u128>(), 0..4);
    (texts, root, counts, parent, sparse, time(), time()).prop_map(
        |(
            (lineage, host, path, tags),
            (id, pack, ordinal, level),
            counts,
            parent,
            sparse,
            started,
            finished,
        )| {
            Snapshot {
                root: NodeRef { id: BlobId(id), pack: PackId(pack), ordinal },
                level,
                lineage,
                host,
                path,
                tags,
                started,
                finished,
                parent: parent.map(SnapshotId),
                summary: Summary {
                    files: counts.0,
                    bytes: counts.1,
                    bytes_stored: counts.2,
                    ..Summary::default()
                },
                sparse: Liveness(
                    sparse.into_iter().map(|(pack, blobs)| (PackId(pack), blobs)).collect(),
                ),
                program: "test".into(),
                copy_of: None,
            }
        },
    )
}

/// Advice that cannot be understood costs itself, not the snapshot.
#[test]
fn sparse_bundles_are_written_as_specified_and_read_as_far_as_they_are_understood() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    use proptest::strategy::ValueTree as _;
    let plain = snapshot().new_tree(&mut runner).unwrap().current();
    let pack = PackId([0xab; 16]);
    let sparse = Liveness([(pack, 1 << 127 | 0b1010)].into());
    let with = Snapshot { sparse: sparse.clone(), ..plain.clone() };
    let mut json = serde_json::to_value(&with).unwrap();
    let bits = format!("8{}a", "0".repeat(30));
    assert_eq!(json["sparse"], serde_json::json!({ "ab".repeat(16): bits }));
    json["sparse"]["nonsense"] = "1".into();
    json["sparse"]["cd".repeat(16)] = "1 and more".into();
    json["sparse"]["ef".repeat(16)] = 7.into();
    let read: Snapshot = serde_json::from_value(json.clone()).unwrap();
    assert_eq!(read.sparse, sparse);
    for other in [serde_json::json!([1, 2]), serde_json::json!(null), serde_json::json!("x")] {
        json["sparse"] = other;
        let read: Snapshot = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(read.sparse, Liveness::default());
    }
    let none = Snapshot { sparse: Liveness::default(), ..plain };
    let json = serde_json::to_value(&none).unwrap();
    assert!(json.get("sparse").is_none());
    assert_eq!(serde_json::from_value::<Snapshot>(json).unwrap(), none);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn snapshots_and_sessions_are_read_as_written(
        snapshot in snapshot(), started in time(), writer: String, heartbeat: u64, at in time(),
    ) {
        let (store, keys) = (MemoryStore::new(), keys());
        let ids = [1, 2, 3].map(|byte| SnapshotId([byte; 16]));
        let purpose = "backup".to_owned();
        let session = Session { purpose, writer, started, heartbeat };
        let verdicts = [Verdict::Snapshot(Box::new(snapshot)), Verdict::Fenced { at }];
        for (id, verdict) in ids.iter().zip(&verdicts) {
            let name = snapshot_name(*id);
            put(&store, &name, &record::seal_json(&keys, ObjectKind::Snapshot, &name, verdict));
            let read: Verdict = record::read_json(&store, &keys, ObjectKind::Snapshot, &name).unwrap();
            prop_assert_eq!(&read, verdict);
        }
        let name = session_name(ids[2]);
        put(&store, &name, &record::seal_json(&keys, ObjectKind::Session, &name, &session));
        let read: Session = record::read_json(&store, &keys, ObjectKind::Session, &name).unwrap();
        prop_assert_eq!(read, session);
        // Under another kind or name it is something else.
        let wrong = record::read_json::<Session>(&store, &keys, ObjectKind::Snapshot, &name);
        prop_assert_eq!(wrong.unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn tombstones_are_read_as_written(data: Vec<[u8; 16]>, meta: Vec<[u8; 16]>) {
        let (store, keys) = (MemoryStore::new(), keys());
        let ids = |ids: Vec<[u8; 16]>| ids.into_iter().map(PackId).collect();
        let retired = ids(vec![[3; 16]]);
        let tombstones = Tombstones { data: ids(data), meta: ids(meta), retired };
        let id = GenerationId([4; 16]);
        let created = create_tombstones(&store, &keys, id, &tombstones).unwrap();
        prop_assert_eq!(created, Created::New);
        prop_assert_eq!(read_tombstones(&store, &keys, id).unwrap(), tombstones);
    }

    #[test]
    fn packs_give_back_every_blob_and_notice_every_changed_byte(
        blobs in vec((any::<Vec<u8>>(), 1..50_usize), 1..20), at: prop::sample::Index, bit in 0..8_u8,
    ) {
        let (store, keys) = (MemoryStore::new(), keys());
        let mut compressor = Compressor::new(Level::default());
        let mut builder = PackBuilder::new(&keys, PackClass::Data, vec![1, 2, 3]);
        let blobs: Vec<_> = blobs.iter().map(|(bytes, times)| bytes.repeat(*times)).collect();
        for plain in &blobs {
            let id = BlobKind::Data.id(&keys, plain);
            let (compression, stored) = match compressor.compress(plain) {
                Some(stored) => (Compression::Zstd, stored),
                None => (Compression::None, &plain[..]),
            };
            builder.push(id, BlobKind::Data, compression, stored, plain.len());
        }
        let most = builder.len();
        let sealed = builder.finish();
        prop_assert!(sealed.buffer.len() <= most);
        let name = PackClass::Data.object_name(sealed.id);
        put(&store, &name, &sealed.buffer);
        let read_all = |store: &MemoryStore| -> chunkstore::Result<Vec<Vec<u8>>> {
            let pack = Pack::open(store, &keys, PackClass::Data, sealed.id)?;
            let mut scratch = ReadScratch::default();
            let mut read = |(at, entry): (usize, &chunkstore::pack::TableEntry)| {
                pack.read(store, &keys, at as u8, &entry.id, &mut scratch)?;
                Ok(scratch.plain.clone())
            };
            pack.table().iter().enumerate().map(&mut read).collect()
        };
        prop_assert_eq!(read_all(&store).unwrap(), blobs);

        // The header at the front is a copy; everything else is needed.
        let damaged = store.fork();
        let at = 64 + at.index(sealed.buffer.len() - 64);
        damaged.damage(&name, |object| object[at] ^= 1_u8 << bit);
        prop_assert!(read_all(&damaged).is_err(), "byte {}", at);
    }
}

#[test]
fn a_pack_holds_as_many_blobs_as_a_bitmap_has_bits() {
    let (store, keys) = (MemoryStore::new(), keys());
    let mut builder = PackBuilder::new(&keys, PackClass::Meta, Vec::new());
    while !builder.is_full() {
        let plain = builder.len().to_le_bytes();
        let id = BlobKind::Leaf.id(&keys, &plain);
        builder.push(id, BlobKind::Leaf, Compression::None, &plain, plain.len());
    }
    let sealed = builder.finish();
    assert_eq!(sealed.entries.len(), PACK_BLOBS_MAX);
    put(&store, &PackClass::Meta.object_name(sealed.id), &sealed.buffer);
    let pack = Pack::open(&store, &keys, PackClass::Meta, sealed.id).unwrap();
    assert_eq!(pack.table(), sealed.entries);
    // A data pack is not to be had under its name.
    let error = Pack::open(&store, &keys, PackClass::Data, sealed.id).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

/// A record with few different prefixes, so that some are equal.
fn entry() -> impl Strategy<Value = (u16, Location)> {
    (any::<u16>(), 0..5_u8, 0..128_u8).prop_map(|(id, pack, ordinal)| {
        let pack = PackId([pack; 16]);
        (id, Location { pack, ordinal })
    })
}

/// Blob number `number`: spread over all ids, as hashes are, with some that are close together.
fn blob(number: u16) -> BlobId {
    let mut id = *blake3::hash(&[number as u8]).as_bytes();
    id[12..14].copy_from_slice(&number.to_be_bytes());
    BlobId(id)
}

fn records(entries: &BTreeSet<(u16, Location)>) -> BTreeSet<Record> {
    let record = |(id, location): &(u16, Location)| Record::new(&blob(*id), *location);
    entries.iter().map(record).collect()
}

fn write(
    store: &MemoryStore,
    keys: &Keyring,
    records: &BTreeSet<Record>,
    guess: usize,
) -> Option<SegmentId> {
    let mut writer = SegmentWriter::new(keys, guess, Vec::new());
    records.iter().for_each(|record| writer.push(record));
    writer.finish(store).unwrap()
}

fn read(store: &MemoryStore, segment: &Segment) -> Vec<Record> {
    let mut records = Vec::new();
    let each = &mut |record| {
        records.push(record);
        Ok(())
    };
    segment.for_each(store, each).unwrap();
    records
}

fn segments() -> impl Strategy<Value = Vec<BTreeSet<(u16, Location)>>> {
    vec(btree_set(entry(), 0..400), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn the_index_finds_all_it_holds_and_nothing_else(
        segments in segments(), others: Vec<u16>, filter_bytes in prop_oneof![Just(0), Just(300), Just(1 << 20)],
        guess in 0..500_usize,
    ) {
        let (store, keys) = (MemoryStore::new(), keys());
        let mut all: BTreeMap<u16, Vec<Location>> = BTreeMap::new();
        let mut added = Index::empty(filter_bytes);
        for entries in &segments {
            for (id, location) in entries {
                all.entry(*id).or_default().push(*location);
            }
            if let Some(id) = write(&store, &keys, &records(entries), guess) {
                added.add(&store, Segment::open(&store, &keys, id).unwrap());
            }
        }
        let (opened, report) = Index::open(&store, &keys, filter_bytes).unwrap();
        prop_assert!(report.damaged.is_empty());
        for index in [added, opened] {
            prop_assert_eq!(index.len(), segments.iter().map(|one| one.len() as u64).sum::<u64>());
            for (id, locations) in &all {
                let found = index.get(&store, &blob(*id));
                prop_assert!(found.is_some_and(|found| locations.contains(&found)), "{}", id);
            }
            for id in others.iter().filter(|id| !all.contains_key(id)) {
                prop_assert_eq!(index.get(&store, &blob(*id)), None);
            }
        }
    }

    #[test]
    fn a_merge_is_the_union_of_what_is_kept_and_takes_the_place_of_its_sources(
        segments in segments(), dead in 0..5_u8,
    ) {
        let (store, keys) = (MemoryStore::new(), keys());
        let mut expected = BTreeSet::new();
        for entries in &segments {
            let records = records(entries);
            write(&store, &keys, &records, records.len());
            expected.extend(records);
        }
        let keep = |record: &Record| record.location.pack != PackId([dead; 16]);
        expected.retain(keep);
        let (index, _) = Index::open(&store, &keys, 0).unwrap();
        let sources: Vec<_> = index.segments().iter().collect();
        let merged = merge(&store, &keys, &sources, &keep).unwrap();
        let mut found = Vec::new();
        for id in &merged {
            found.extend(read(&store, &Segment::open(&store, &keys, *id).unwrap()));
        }
        prop_assert_eq!(&found, &expected.into_iter().collect::<Vec<_>>());
        if !found.is_empty() {
            // The sources are still there, but count no more.
            let (index, _) = Index::open(&store, &keys, 0).unwrap();
            prop_assert_eq!(index.len(), found.len() as u64);
        }
    }
}

#[test]
fn a_lookup_reads_one_block_or_none() {
    use objects::testing::{Op, RecordingStore};
    let (store, keys) = (MemoryStore::new(), keys());
    let all: BTreeSet<_> = (0..10_000_u32)
        .map(|n| {
            let location = Location { pack: PackId([1; 16]), ordinal: 0 };
            Record::new(&strategies::blob(n).id, location)
        })
        .collect();
    write(&store, &keys, &all, all.len()).unwrap();
    let store = RecordingStore::new(store);
    let (index, _) = Index::open(&store, &keys, 1 << 20).unwrap();
    let reads = || store.counts().of(Op::ReadAt).calls;
    let before = reads();
    for n in 0..1000 {
        assert!(index.get(&store, &strategies::blob(n).id).is_some());
    }
    let hits = reads() - before;
    assert!((1000..1030).contains(&hits), "{hits} reads for 1000 hits");
    for n in 20_000..21_000 {
        assert_eq!(index.get(&store, &strategies::blob(n).id), None);
    }
    let misses = reads() - before - hits;
    assert!(misses < 60, "{misses} reads for 1000 misses");
}
