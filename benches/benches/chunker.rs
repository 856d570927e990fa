//! Cut points: bytes a second of one core.
use std::hint::black_box;

use benches::data;
use chunkstore::chunker::{Chunker, ChunkerConfig};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const LEN: usize = 64 << 20;

fn chunker(c: &mut Criterion) {
    let fastcdc = |avg: usize| ChunkerConfig::Fastcdc { min: avg / 4, avg, max: avg * 2 };
    let configs = [
        ("fastcdc-64K", fastcdc(64 << 10)),
        ("fastcdc-256K", fastcdc(256 << 10)),
        ("fastcdc-1M", fastcdc(1 << 20)),
        ("fixed-1M", ChunkerConfig::Fixed { size: 1 << 20 }),
    ];
    let mut group = c.benchmark_group("chunker");
    group.throughput(Throughput::Bytes(LEN as u64));
    for (kind, make) in [data::KINDS[3], data::KINDS[2]] {
        let bytes = make(1, LEN);
        for (name, config) in configs {
            let chunker = Chunker::new(config, &[3; 32]).expect("the sizes are allowed");
            group.bench_with_input(BenchmarkId::new(name, kind), &bytes, |b, bytes| {
                b.iter(|| {
                    let mut at = 0;
                    while at < bytes.len() {
                        at += chunker.cut(black_box(&bytes[at..]));
                    }
                });
            });
        }
    }
    group.finish();
}

criterion_group!(name = group; config = benches::criterion(); targets = chunker);
criterion_main!(group);
