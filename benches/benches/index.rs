//! The index on one core: building, opening and merging segments; lookups of ids that are there and
//! that are not, with filters in memory and without.
use benches::data::Numbers;
use benches::{machine, repo};
use chunkstore::id::BlobId;
use chunkstore::index::{Index, Record, SegmentWriter, merge};
use chunkstore::limits::SEGMENT_RECORDS_MAX;
use chunkstore::pack::Location;
use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use objects::local::LocalStore;

const SEGMENTS: u64 = 8;

fn id(number: u64) -> BlobId {
    BlobId(*blake3::hash(&number.to_le_bytes()).as_bytes())
}

/// Records of ids `from..from + count`, ascending.
fn records(from: u64, count: u64) -> Vec<Record> {
    let record = |number: u64| {
        let (pack, ordinal) = (repo::pack_id(number / 100), (number % 100) as u8);
        Record::new(&id(number), Location { pack, ordinal })
    };
    let mut records: Vec<_> = (from..from + count).map(record).collect();
    records.sort_unstable();
    records
}

fn write(store: &LocalStore, records: &[Record]) {
    let mut segment = SegmentWriter::new(&repo::keys(), records.len(), Vec::new());
    records.iter().for_each(|record| segment.push(record));
    let written = segment.finish(store).expect("the folder takes it");
    assert!(written.is_some());
}

fn build(c: &mut Criterion) {
    let records = records(0, SEGMENT_RECORDS_MAX as u64);
    let folder = machine::temporary(machine::memory_folder());
    let store = repo::local(folder.path());
    let mut group = c.benchmark_group("index");
    group.sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Elements(records.len() as u64));
    group.bench_function("build a full segment", |b| b.iter(|| write(&store, &records)));
    group.finish();
}

fn use_segments(c: &mut Criterion) {
    let keys = repo::keys();
    let folder = machine::temporary(machine::memory_folder());
    let store = repo::local(folder.path());
    let each = (SEGMENT_RECORDS_MAX / 4) as u64;
    (0..SEGMENTS).for_each(|at| write(&store, &records(at * each, each)));
    let mut group = c.benchmark_group("index");
    for (filters, bytes) in [("with filters", 64 << 20), ("without filters", 0)] {
        let (index, report) = Index::open(&*store, &keys, bytes).expect("the segments are whole");
        assert!(report.damaged.is_empty());
        group.throughput(Throughput::Elements(1));
        for (what, from) in [("absent", 1 << 40), ("present", 0)] {
            let mut numbers = Numbers::new(1);
            let name = BenchmarkId::new(format!("look up {what}"), filters);
            group.bench_function(name, |b| {
                b.iter(|| {
                    let id = id(from + numbers.below(SEGMENTS * each));
                    assert_eq!(index.get(&*store, &id).is_some(), from == 0);
                });
            });
        }
    }
    group.sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Elements(SEGMENTS * each));
    group.bench_function("open 8 segments", |b| {
        b.iter(|| Index::open(&*store, &keys, 64 << 20).expect("the segments are whole"));
    });
    group.bench_function("merge 8 segments", |b| {
        let (index, _) = Index::open(&*store, &keys, 0).expect("the segments are whole");
        let segments: Vec<_> = index.segments().iter().collect();
        b.iter(|| {
            let merged = merge(&*store, &keys, &segments, &|_| true);
            merged.expect("the segments are whole")
        });
    });
    group.finish();
}

criterion_group!(name = group; config = benches::criterion(); targets = build, use_segments);
criterion_main!(group);
