//! Compression and decompression of chunks of 1 MiB on one core, by level and kind of data. The ratio
//! stands in the name of each benchmark.
use std::hint::black_box;

use benches::data;
use chunkstore::codec::compress::{Compressor, Decompressor, Level, looks_incompressible};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const LEN: usize = 4 << 20;
const CHUNK: usize = 1 << 20;
const LEVELS: [Level; 8] = [
    Level::Off,
    Level::Zstd(-7),
    Level::Zstd(-3),
    Level::Zstd(-1),
    Level::Zstd(1),
    Level::Zstd(3),
    Level::Zstd(6),
    Level::Zstd(9),
];

fn compress(c: &mut Criterion) {
    let mut group = c.benchmark_group("compress");
    group.throughput(Throughput::Bytes(LEN as u64));
    for (kind, make) in data::KINDS {
        let bytes = make(1, LEN);
        for level in LEVELS {
            let mut compressor = Compressor::new(level);
            let mut stored = |chunk: &[u8]| {
                let stored = compressor.compress(black_box(chunk));
                stored.map_or(chunk.len(), <[u8]>::len)
            };
            let total: usize = bytes.chunks(CHUNK).map(&mut stored).sum();
            let name = format!("level {level}, ratio {:.2}", LEN as f64 / total as f64);
            group.bench_with_input(BenchmarkId::new(kind, name), &bytes, |b, bytes| {
                b.iter(|| bytes.chunks(CHUNK).map(&mut stored).sum::<usize>());
            });
        }
    }
    group.finish();
}

fn decompress(c: &mut Criterion) {
    let mut group = c.benchmark_group("decompress");
    group.throughput(Throughput::Bytes(CHUNK as u64));
    for (kind, make) in &data::KINDS[..3] {
        for level in [Level::Zstd(-7), Level::Zstd(3), Level::Zstd(9)] {
            let mut compressor = Compressor::new(level);
            let stored = compressor.compress(&make(1, CHUNK)).map(<[u8]>::to_vec);
            let stored = stored.expect("these kinds shrink");
            let (mut decompressor, mut plain) = (Decompressor::default(), Vec::new());
            group.bench_with_input(BenchmarkId::new(*kind, level), &stored, |b, stored| {
                b.iter(|| {
                    let done = decompressor.decompress(black_box(stored), CHUNK, &mut plain);
                    done.expect("it was just compressed");
                });
            });
        }
    }
    group.finish();
}

fn detect(c: &mut Criterion) {
    let bytes = data::random(1, CHUNK);
    let mut group = c.benchmark_group("detect incompressible");
    group.throughput(Throughput::Bytes(CHUNK as u64));
    group.bench_function("1 MiB", |b| b.iter(|| looks_incompressible(black_box(&bytes))));
    group.finish();
}

criterion_group!(name = group; config = benches::criterion(); targets = compress, decompress, detect);
criterion_main!(group);
