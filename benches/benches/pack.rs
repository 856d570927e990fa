//! A pack of 32 MiB on one core: built from blobs that have their ids, and read back.
use benches::{data, machine, repo};
use chunkstore::codec::compress::Compression;
use chunkstore::id::BlobId;
use chunkstore::pack::{BlobKind, Pack, PackBuilder, PackClass, ReadScratch, SealedPack};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use objects::ObjectStore;

const LEN: usize = 32 << 20;

fn build(
    keys: &chunkstore::codec::seal::Keyring,
    blobs: &[(BlobId, &[u8])],
    buffer: Vec<u8>,
) -> SealedPack {
    let mut pack = PackBuilder::new(keys, PackClass::Data, buffer);
    for (id, blob) in blobs {
        pack.push(*id, BlobKind::Data, Compression::None, blob, blob.len());
    }
    pack.finish()
}

fn pack(c: &mut Criterion) {
    let keys = repo::keys();
    let bytes = data::random(1, LEN);
    let folder = machine::temporary(machine::memory_folder());
    let store = repo::local(folder.path());
    let mut group = c.benchmark_group("pack");
    group.throughput(Throughput::Bytes(LEN as u64));
    for blob in [256 << 10, 1 << 20] {
        let blobs = bytes.chunks(blob);
        let blobs: Vec<_> = blobs.map(|blob| (BlobKind::Data.id(&keys, blob), blob)).collect();
        let mut buffer = Vec::with_capacity(LEN + (1 << 20));
        group.bench_function(BenchmarkId::new("build", blob), |b| {
            b.iter(|| buffer = build(&keys, &blobs, std::mem::take(&mut buffer)).buffer);
        });
        group.bench_function(BenchmarkId::new("hash and build", blob), |b| {
            b.iter(|| {
                let hashed: Vec<_> =
                    blobs.iter().map(|(_, blob)| (BlobKind::Data.id(&keys, blob), *blob)).collect();
                buffer = build(&keys, &hashed, std::mem::take(&mut buffer)).buffer;
            });
        });
        let sealed = build(&keys, &blobs, Vec::new());
        let created = store.create(
            &PackClass::Data.object_name(sealed.id),
            &[std::io::IoSlice::new(&sealed.buffer)],
        );
        created.map(drop).expect("the folder takes it");
        group.bench_function(BenchmarkId::new("open and read", blob), |b| {
            let mut scratch = ReadScratch::default();
            b.iter(|| {
                let opened = Pack::open(&*store, &keys, PackClass::Data, sealed.id);
                let pack = opened.expect("it is whole");
                for (ordinal, (id, _)) in blobs.iter().enumerate() {
                    let read = pack.read(&*store, &keys, ordinal as u8, id, &mut scratch);
                    read.expect("it is whole");
                }
            });
        });
    }
    group.finish();
}

criterion_group!(name = group; config = benches::criterion(); targets = pack);
criterion_main!(group);
