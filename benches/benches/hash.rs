//! Blob ids: keyed BLAKE3 of pieces of several sizes on one core.
use std::hint::black_box;

use benches::{data, repo};
use chunkstore::pack::BlobKind;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn hash(c: &mut Criterion) {
    let keys = repo::keys();
    let bytes = data::random(1, 2 << 20);
    let mut group = c.benchmark_group("hash");
    for len in [64, 1 << 10, 4 << 10, 16 << 10, 128 << 10, 1 << 20, 2 << 20] {
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_with_input(BenchmarkId::from_parameter(len), &bytes[..len], |b, bytes| {
            b.iter(|| BlobKind::Data.id(&keys, black_box(bytes)));
        });
    }
    group.finish();
}

criterion_group!(name = group; config = benches::criterion(); targets = hash);
criterion_main!(group);
