//! The table to tune by: what chunk size, level, threads and size of packs are worth on this machine.
//!
//! Each line moves one setting away from the default and leaves the others. Measured is what a backup
//! of new data in large files costs besides reading it: cutting, hashing, compressing, sealing, and
//! storing packs durably in the folder for large data (`EBACKUP_BENCH_DIR`, else `/var/tmp`).
#![expect(clippy::print_stdout, reason = "printing a table is what this is for")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use benches::data::{self, Numbers};
use benches::store::Hollow;
use benches::{machine, repo};
use chunkstore::chunker::ChunkerConfig;
use chunkstore::codec::compress::{Compressor, Level};
use chunkstore::writer::{Writer, WriterSettings};
use mover::backup::Resources;
use objects::ObjectStore;
use objects::local::LocalStore;

const LEN: usize = 64 << 20;
/// Files of which the data consists: the unit that threads divide among themselves.
const FILE: usize = 8 << 20;
const MIB: f64 = (1 << 20) as f64;

/// One line's settings.
#[derive(Clone, Copy)]
struct Setting {
    chunker: ChunkerConfig,
    level: Level,
    threads: usize,
    pack: usize,
}

impl Setting {
    fn default() -> Self {
        Self {
            chunker: ChunkerConfig::default(),
            level: Level::default(),
            threads: repo::resources().workers,
            pack: repo::resources().pack_target_bytes,
        }
    }

    fn writer(&self) -> WriterSettings {
        WriterSettings {
            pack_target_bytes: self.pack,
            ..repo::writer_settings(repo::resources(), self.level)
        }
    }
}

fn store_all(
    writer: &Writer,
    setting: &Setting,
    chunker: &chunkstore::chunker::Chunker,
    bytes: &[u8],
) {
    let files: Vec<_> = bytes.chunks(FILE).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..setting.threads {
            scope.spawn(|| {
                let mut compressor = Compressor::new(setting.level);
                while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut rest = *file;
                    while !rest.is_empty() {
                        let (chunk, more) = rest.split_at(chunker.cut(rest));
                        writer.store_data(&mut compressor, chunk).expect("the store works");
                        rest = more;
                    }
                }
            });
        }
    });
}

/// Seconds each of `versions` takes in a session of its own, and the bytes of all packs after it.
fn run(setting: &Setting, store: Arc<dyn ObjectStore>, versions: &[&[u8]]) -> Vec<(f64, u64)> {
    let repository = repo::create(store, setting.chunker);
    let run = |bytes: &&[u8]| {
        let begun = Instant::now();
        let writer = repo::begin(&repository, setting.writer());
        store_all(&writer, setting, repository.chunker(), bytes);
        writer.abandon().expect("the store works");
        (begun.elapsed().as_secs_f64(), stored(&repository))
    };
    versions.iter().map(run).collect()
}

/// Bytes of all data packs on the store.
fn stored(repository: &chunkstore::repository::Repository) -> u64 {
    let mut bytes = 0;
    let listed = repository.store().list("packs/", &mut |meta| {
        bytes += meta.size;
        Ok(())
    });
    listed.expect("the store works");
    bytes
}

/// The best of three runs in memory: throughput in MiB/s, and plain bytes over stored bytes.
fn measure(setting: &Setting, bytes: &[u8]) -> (f64, f64) {
    let mut best = (f64::INFINITY, 1);
    for _ in 0..3 {
        let folder = machine::temporary(machine::memory_folder());
        let run = run(setting, repo::local(folder.path()), &[bytes])[0];
        if run.0 < best.0 {
            best = run;
        }
    }
    (bytes.len() as f64 / MIB / best.0, bytes.len() as f64 / best.1 as f64)
}

/// A later version: 64 places changed by a few bytes, half of them inserting or removing some.
fn edited(bytes: &[u8], moves: bool) -> Vec<u8> {
    let mut numbers = Numbers::new(99);
    let mut out = Vec::with_capacity(bytes.len() + 4096);
    for (at, piece) in bytes.chunks(bytes.len() / 64).enumerate() {
        out.extend_from_slice(piece);
        let from = out.len() - piece.len() + numbers.below(piece.len() as u64 / 2) as usize;
        data::fill_random(at as u64, &mut out[from..from + 32]);
        if moves && at % 2 == 0 {
            drop(out.drain(from..from + 16));
        }
    }
    out
}

fn levels(kinds: &[(&str, Vec<u8>)]) {
    println!("\nCompression (`backup --compression LEVEL`), MiB/s and ratio\n");
    print!("| level |");
    kinds.iter().for_each(|(name, _)| print!(" {name} |"));
    print!("\n|---|");
    kinds.iter().for_each(|_| print!("---|"));
    println!();
    let levels = [-7, -3, -1, 1, 3, 6, 9].map(Level::Zstd);
    for level in [Level::Off].into_iter().chain(levels) {
        let mark = if level == Level::default() { " (default)" } else { "" };
        print!("| {level}{mark} |");
        for (_, bytes) in kinds {
            let setting = Setting { level, ..Setting::default() };
            let (speed, ratio) = measure(&setting, bytes);
            print!(" {speed:.0}, {ratio:.2} |");
        }
        println!();
    }
}

fn chunk_sizes(kinds: &[(&str, Vec<u8>)]) {
    println!(
        "\nChunks (`init --fixed-chunks SIZE`; other averages need a change of the program): MiB/s and ratio of \
              database pages, and MiB stored for a second version of {} MiB with 64 edits\n",
        LEN >> 20
    );
    println!(
        "| chunks | first, random | first, database | edits in place | edits that move the rest | index bytes in memory a TiB |"
    );
    println!("|---|---|---|---|---|---|");
    let fastcdc = |avg: usize| ChunkerConfig::Fastcdc { min: avg / 4, avg, max: avg * 2 };
    let configs = [
        ("64 KiB by content", fastcdc(64 << 10)),
        ("256 KiB by content", fastcdc(256 << 10)),
        ("512 KiB by content", fastcdc(512 << 10)),
        ("1 MiB by content (default)", ChunkerConfig::default()),
        ("64 KiB fixed", ChunkerConfig::Fixed { size: 64 << 10 }),
        ("1 MiB fixed", ChunkerConfig::Fixed { size: 1 << 20 }),
    ];
    for (name, chunker) in configs {
        let setting = Setting { chunker, ..Setting::default() };
        let (random, database) = (&kinds[3].1, &kinds[2].1);
        let (fast, (paged, ratio)) = (measure(&setting, random).0, measure(&setting, database));
        let second = |moves| {
            let folder = machine::temporary(machine::memory_folder());
            let runs = run(&setting, repo::local(folder.path()), &[random, &edited(random, moves)]);
            (runs[1].1 - runs[0].1) as f64 / MIB
        };
        let chunk = match chunker {
            ChunkerConfig::Fastcdc { avg, .. } => avg,
            ChunkerConfig::Fixed { size } => size,
        };
        // Fences always, a filter as far as the budget goes: see `index`.
        let index = (1_u64 << 40) as f64 / chunk as f64 * (8.0 / 123.0) / MIB;
        println!(
            "| {name} | {fast:.0} | {paged:.0}, {ratio:.2} | {:.1} | {:.1} | {index:.2} MiB, filters {:.0} MiB |",
            second(false),
            second(true),
            (1_u64 << 40) as f64 / chunk as f64 * 1.25 / MIB,
        );
    }
}

fn threads(kinds: &[(&str, Vec<u8>)]) {
    println!("\nThreads (follow from processors and `--memory`), MiB/s\n");
    println!("| threads | source, level 3 | random |\n|---|---|---|");
    for threads in [1, 2, 4, 8] {
        if threads > 2 * machine::cpus() {
            break;
        }
        let setting = Setting { threads, ..Setting::default() };
        let (source, random) = (measure(&setting, &kinds[1].1).0, measure(&setting, &kinds[3].1).0);
        println!("| {threads} | {source:.0} | {random:.0} |");
    }
}

fn packs(kinds: &[(&str, Vec<u8>)]) {
    println!("\nPacks (size follows from `--memory`), random data, MiB/s\n");
    println!(
        "| pack | into memory | into {} | without storing |\n|---|---|---|---|",
        machine::data_folder().display()
    );
    let bytes = &kinds[3].1;
    for mib in [4, 8, 16, 32] {
        let setting = Setting { pack: mib << 20, ..Setting::default() };
        let in_folder = |parent| {
            let folder = machine::temporary(parent);
            let (seconds, _) = run(&setting, repo::local(folder.path()), &[bytes])[0];
            LEN as f64 / MIB / seconds
        };
        let dropped = || {
            let folder = machine::temporary(machine::memory_folder());
            let store = LocalStore::open(folder.path()).expect("it was just made");
            let (seconds, _) = run(&setting, Arc::new(Hollow::new(store, 0)), &[bytes])[0];
            LEN as f64 / MIB / seconds
        };
        let best = |run: &dyn Fn() -> f64| (0..3).map(|_| run()).fold(0.0, f64::max);
        println!(
            "| {mib} MiB | {:.0} | {:.0} | {:.0} |",
            best(&|| in_folder(machine::memory_folder())),
            best(&|| in_folder(machine::data_folder())),
            best(&dropped)
        );
    }
}

fn budgets() {
    println!("\nWhat `--memory` gives on this machine\n");
    println!(
        "| --memory | workers | pack | index filters | blobs whose filters fit |\n|---|---|---|---|---|"
    );
    for mib in [96_u64, 128, 192, 256, 512, 1024, 2048] {
        let resources = Resources::new(mib << 20, machine::cpus());
        let filters = resources.writer(Level::default()).filter_bytes;
        println!(
            "| {mib}M | {} | {} MiB | {} MiB | {:.0} million |",
            resources.workers,
            resources.pack_target_bytes >> 20,
            filters >> 20,
            filters as f64 / 1.25 / 1e6
        );
    }
}

fn main() {
    if !benches::is_bench() {
        return;
    }
    let kinds: Vec<_> = data::KINDS.iter().map(|(name, make)| (*name, make(1, LEN))).collect();
    let default = Setting::default();
    println!(
        "\nTo tune by. {}. Default: FastCDC 1 MiB, level {}, {} threads, packs of {} MiB; {} MiB of each kind of data, best of three.",
        machine::describe(),
        default.level,
        default.threads,
        default.pack >> 20,
        LEN >> 20
    );
    levels(&kinds);
    chunk_sizes(&kinds);
    threads(&kinds);
    packs(&kinds);
    budgets();
}
