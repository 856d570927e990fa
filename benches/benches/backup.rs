//! Whole backups and restores through the library, sources and repositories in memory where there is a
//! file system for that: first backup, unchanged backup, restore.
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use benches::{data, machine, repo, trees};
use chunkstore::chunker::ChunkerConfig;
use criterion::measurement::WallTime;
use criterion::{
    Bencher, BenchmarkGroup, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};

/// Makes a source in a folder and returns its bytes.
type Make<'a> = dyn Fn(&Path) -> u64 + 'a;

const BYTES: usize = 512 << 20;

/// Measures `work` in a fresh folder each time; making and removing the folder does not count.
fn fresh(b: &mut Bencher<'_>, work: impl Fn(&Path) -> Duration) {
    b.iter_custom(|times| {
        let measure = |_| {
            let folder = machine::temporary(machine::memory_folder());
            work(folder.path())
        };
        (0..times).map(measure).sum()
    });
}

fn jobs(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, source: &Path) {
    let first = |folder: &Path| {
        let repository = repo::create(repo::local(folder), ChunkerConfig::default());
        let begun = Instant::now();
        repo::save(&repository, source);
        begun.elapsed()
    };
    group.bench_function(format!("{name}: first backup"), |b| fresh(b, first));
    let folder = machine::temporary(machine::memory_folder());
    let repository = repo::create(repo::local(folder.path()), ChunkerConfig::default());
    repo::save(&repository, source);
    group.bench_function(format!("{name}: unchanged backup"), |b| {
        b.iter(|| {
            let summary = repo::save(&repository, source).summary;
            assert_eq!(summary.files_changed, 0);
        });
    });
    let restore = |folder: &Path| {
        let target: PathBuf = folder.join("target");
        let begun = Instant::now();
        repo::get_back(&repository, &target);
        begun.elapsed()
    };
    group.bench_function(format!("{name}: restore"), |b| fresh(b, restore));
}

fn backup(c: &mut Criterion) {
    if !benches::is_bench() {
        return;
    }
    let file = |make: data::Make, path: &Path| {
        std::fs::write(path.join("file"), make(1, BYTES)).expect("there is room");
        BYTES as u64
    };
    let sources: [(&str, Box<Make<'_>>); 4] = [
        ("random 512 MiB", Box::new(move |path| file(data::random, path))),
        ("database 512 MiB", Box::new(move |path| file(data::database, path))),
        ("checkout of 20,000 files", Box::new(|path| trees::checkout(path, 20_000))),
        ("200,000 small files", Box::new(|path| trees::small_files(path, 200_000))),
    ];
    for (name, make) in sources {
        let source = machine::temporary(machine::memory_folder());
        let bytes = make(source.path());
        // A file younger than two seconds is read again: its times could not tell another change.
        std::thread::sleep(Duration::from_secs(3));
        let mut group = c.benchmark_group("backup");
        group.sampling_mode(SamplingMode::Flat);
        group.warm_up_time(Duration::from_millis(1));
        group.throughput(Throughput::Bytes(bytes));
        jobs(&mut group, name, source.path());
        group.finish();
    }
}

criterion_group!(name = group; config = benches::criterion(); targets = backup);
criterion_main!(group);
