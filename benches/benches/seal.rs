//! Sealing and opening of parts of an object on one core, and the cost of an object's key.
use std::hint::black_box;

use benches::{data, repo};
use chunkstore::codec::seal::{ObjectCipher, ObjectKind};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const NAME: &str = "packs/00/00000000000000000000000000000000";

fn seal(c: &mut Criterion) {
    let keys = repo::keys();
    let (_, cipher) = ObjectCipher::create(&keys, ObjectKind::DataPack, NAME);
    let mut group = c.benchmark_group("seal");
    for len in [64, 4 << 10, 64 << 10, 1 << 20] {
        let plain = data::random(1, len);
        let mut buffer = Vec::with_capacity(len + 64);
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_with_input(BenchmarkId::new("seal", len), &plain, |b, plain| {
            b.iter(|| {
                buffer.clear();
                buffer.extend_from_slice(black_box(plain));
                cipher.seal(1, b"aad", &mut buffer, 0);
            });
        });
        let mut sealed = plain.clone();
        cipher.seal(1, b"aad", &mut sealed, 0);
        group.bench_with_input(BenchmarkId::new("open", len), &sealed, |b, sealed| {
            b.iter_batched_ref(
                || sealed.clone(),
                |sealed| cipher.open_part(1, b"aad", sealed).is_some(),
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
    c.bench_function("seal/key of an object", |b| {
        b.iter(|| ObjectCipher::create(&keys, ObjectKind::DataPack, black_box(NAME)));
    });
}

criterion_group!(name = group; config = benches::criterion(); targets = seal);
criterion_main!(group);
