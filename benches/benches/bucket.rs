//! Backups and restores on a real S3 server beside plain parallel PUTs and GETs of the same bytes on it, with the same
//! client and so the same headers: what is lost to all else. The aim is at least 80 %.
//!
//! The server is the one of the tests: `cargo xtask s3 up; set -a; . target/s3/env; cargo bench -p benches --bench
//! bucket`. Without one, nothing is measured, and that is said.
#![expect(clippy::print_stdout, reason = "printing results is what this is for")]

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use benches::{data, machine, repo};
use chunkstore::chunker::ChunkerConfig;
use chunkstore::codec::compress::Level;
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use objects::ObjectStore;
use objects::testing::server::{TestServer, fresh};

/// Bytes of an object: those of a pack.
const OBJECT: usize = 40 << 20;
const OBJECTS: u64 = 25;

/// Calls `each` with the numbers of all objects, from so many threads.
fn parallel(threads: usize, each: &(dyn Fn(u64) + Sync)) -> Duration {
    let next = AtomicU64::new(0);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= OBJECTS {
                        return;
                    }
                    each(number);
                }
            });
        }
    });
    begun.elapsed()
}

fn bucket(c: &mut Criterion) {
    if !benches::is_bench() {
        return;
    }
    if std::env::var_os("EBACKUP_TEST_S3_PORT").is_none() {
        println!("bucket: NOT MEASURED: no S3 server; see the first lines of benches/bucket.rs");
        return;
    }
    let server = TestServer::from_env();
    let source = machine::temporary(machine::memory_folder());
    let bytes = data::random(1, OBJECT * OBJECTS as usize);
    std::fs::write(source.path().join("file"), &bytes).expect("there is room");
    let mut group = c.benchmark_group("bucket");
    group.sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_millis(1));
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    let plain = server.store(&fresh("plain"));
    // As many at once as a backup stores and a restore fetches.
    let uploads = repo::resources().writer(Level::default()).uploads;
    let fetches = repo::resources().fetch_threads(plain.read_cost());
    let name = |number: u64| format!("packs/{number:032}");
    group.bench_function("plain PUT", |b| {
        b.iter_custom(|times| {
            let put = |_| {
                (0..OBJECTS).for_each(|number| plain.delete(&name(number)).expect("it can go"));
                parallel(uploads, &|number| {
                    let from = number as usize * OBJECT;
                    let part = IoSlice::new(&bytes[from..from + OBJECT]);
                    let _new = plain.create(&name(number), &[part]).expect("the server works");
                })
            };
            (0..times).map(put).sum()
        });
    });
    group.bench_function("first backup", |b| {
        b.iter_custom(|times| {
            let save = |_| {
                let store = Arc::new(server.store(&fresh("backup")));
                let repository = repo::create(store.clone(), ChunkerConfig::default());
                let begun = Instant::now();
                repo::save(&repository, source.path());
                let elapsed = begun.elapsed();
                empty(&*store);
                elapsed
            };
            (0..times).map(save).sum()
        });
    });
    group.bench_function("plain GET", |b| {
        b.iter_custom(|times| {
            let get = |_| {
                parallel(fetches, &|number| {
                    plain.read(&name(number), OBJECT as u64).expect("the server works");
                })
            };
            (0..times).map(get).sum()
        });
    });
    let store = Arc::new(server.store(&fresh("restore")));
    let repository = repo::create(store.clone(), ChunkerConfig::default());
    repo::save(&repository, source.path());
    group.bench_function("restore", |b| {
        b.iter_custom(|times| {
            let restore = |_| {
                let folder = machine::temporary(machine::memory_folder());
                let begun = Instant::now();
                repo::get_back(&repository, &folder.path().join("target"));
                begun.elapsed()
            };
            (0..times).map(restore).sum()
        });
    });
    group.finish();
    empty(&plain);
    empty(&*store);
}

/// Deletes everything, so that the server keeps its room.
fn empty(store: &dyn ObjectStore) {
    let mut keys = Vec::new();
    let listed = store.list("", &mut |meta| {
        keys.push(meta.key);
        Ok(())
    });
    listed.and_then(|()| store.delete_all(&keys)).expect("the server works");
}

criterion_group!(name = group; config = benches::criterion(); targets = bucket);
criterion_main!(group);
