//! Proofs that memory stays within its bounds, whatever is saved: every case runs in a process of its
//! own, with the allocator of `ebackup`, and tells its own peaks.
//!
//! ```text
//! cargo run --release -p benches --bin memory                    all cases, some ten minutes
//! cargo run --release -p benches --bin memory -- index prune     some: index, million, sparse, dense,
//!                                                                prune, check, commands
//! EBACKUP_BENCH_DIR=/data …       where the data goes [/var/tmp]; up to 10 GB
//! EBACKUP_BENCH_FULL=1 …          the dense stream in its full length of 512 GiB [64 GiB]
//! EBACKUP_BENCH_QUICK=1 …         everything a hundredth as large, to see that it runs
//! ```
//! Commands are run by this very program, which then is `ebackup` and nothing else. "resident" is the
//! peak of the whole resident size (`VmHWM`), code included; "anonymous" what of it no file backs,
//! looked at every 5 ms.
#![expect(clippy::print_stdout, reason = "printing results is what this is for")]

use std::collections::VecDeque;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use benches::data::{Numbers, Stream};
use benches::machine::{self, AnonymousPeak};
use benches::store::{Hollow, later};
use benches::{repo, trees};
use chunkstore::chunker::ChunkerConfig;
use chunkstore::codec::compress::{Compressor, Level};
use chunkstore::gc::{PruneSettings, prune};
use chunkstore::id::BlobId;
use chunkstore::index::{Index, Record, SegmentWriter};
use chunkstore::limits::{EXTENT_SPAN_BYTES, SEGMENT_RECORDS_MAX};
use chunkstore::pack::{BlobKind, Location};
use chunkstore::repository::Repository;
use chunkstore::tree::{
    Body, ChildRef, Chunk, Content, Entry, Interior, Liveness, NodeRef, NodeSink, TreeBuilder,
    extent_key,
};
use mover::backup::Resources;
use objects::local::LocalStore;

const MIB: u64 = 1 << 20;
/// What `--memory` is set to, the least the program accepts.
const BUDGET: u64 = 96 * MIB;

/// Names the file into which a child writes what it measured; that it is set makes a process a child.
const REPORT: &str = "EBACKUP_BENCH_REPORT";
/// Makes a child the command itself.
const AS_COMMAND: &str = "EBACKUP_BENCH_AS_COMMAND";

/// What a child measured.
struct Measured {
    resident: u64,
    anonymous: u64,
    seconds: f64,
    /// Processor time: on a busy machine it tells more than the clock.
    cpu: f64,
    /// Lookups, files or bytes, as the case counts.
    done: u64,
}

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| !value.is_empty() && value != "0")
}

/// A number of things, or a hundredth of it in a quick run.
fn scaled(count: u64) -> u64 {
    if is_set("EBACKUP_BENCH_QUICK") { (count / 100).max(1) } else { count }
}

fn main() -> ExitCode {
    mover::allocator::give_back();
    let Some(report) = std::env::var_os(REPORT) else {
        return all();
    };
    let peak = AnonymousPeak::watch();
    let begun = Instant::now();
    let (code, done) =
        if is_set(AS_COMMAND) { (mover::cli::run(), 0) } else { (ExitCode::SUCCESS, child()) };
    let seconds = begun.elapsed().as_secs_f64();
    let anonymous = peak.end();
    let cpu = machine::cpu_seconds();
    let resident = machine::status_bytes("VmHWM");
    fs::write(report, format!("{resident} {anonymous} {seconds} {cpu} {done}"))
        .expect("the folder takes a line");
    code
}

/// Runs a child and returns what it measured, unless it failed.
fn spawn(folder: &Path, args: &[&str], command: bool) -> Option<Measured> {
    let report = folder.join("report");
    let mut child = Command::new(std::env::current_exe().expect("this program is somewhere"));
    child.args(args).env(REPORT, &report).stdout(Stdio::null());
    child.env("XDG_CONFIG_HOME", folder.join("config"));
    if command {
        child.env(AS_COMMAND, "1");
    }
    // What an earlier child wrote must not pass for what this one did.
    let _absent = fs::remove_file(&report);
    let status = child.status().expect("this program can be started");
    if !status.success() {
        println!("\n{args:?} FAILED: {status}\n");
        return None;
    }
    let line = fs::read_to_string(&report).expect("the child wrote it");
    let mut fields = line.split(' ');
    let mut next = || fields.next().expect("it has five fields");
    let wrong = "the fields are numbers";
    Some(Measured {
        resident: next().parse().expect(wrong),
        anonymous: next().parse().expect(wrong),
        seconds: next().parse().expect(wrong),
        cpu: next().parse().expect(wrong),
        done: next().parse().expect(wrong),
    })
}

/// Runs a step of a case, which must not fail.
fn step(folder: &Path, name: &str) -> Measured {
    let path = text(folder);
    spawn(folder, &[name, path], false).expect("the step of a case works")
}

/// Prints lines of the table, and remembers whether all bounds were kept.
struct Table {
    passed: bool,
}

impl Table {
    /// `rate` is what was done a second, in words.
    fn line(&mut self, case: &str, measured: &Measured, rate: &str, bound: &str, kept: bool) {
        self.passed &= kept;
        let verdict = if kept { "PASS" } else { "FAIL" };
        println!(
            "| {case} | {:.1} | {:.1} | {:.1} | {:.1} | {rate} | {bound} | {verdict} |",
            measured.resident as f64 / MIB as f64,
            measured.anonymous as f64 / MIB as f64,
            measured.seconds,
            measured.cpu,
        );
    }

    /// Runs a command of `ebackup` with the least memory, and holds it to that.
    fn command(&mut self, folder: &Path, case: &str, args: &[&str], units: (u64, &str)) {
        let args = [args, &["--memory", "96M", "--quiet"]].concat();
        let Some(measured) = spawn(folder, &args, true) else {
            self.passed = false;
            return;
        };
        let (count, unit) = units;
        let rate = match count as f64 / measured.seconds {
            _ if count == 0 => String::new(),
            rate if rate >= 10_000.0 => format!("{:.0}k {unit}/s", rate / 1000.0),
            rate => format!("{rate:.0} {unit}/s"),
        };
        let kept = measured.resident < BUDGET;
        self.line(case, &measured, &rate, "96 MiB resident", kept);
    }
}

fn all() -> ExitCode {
    let wanted: Vec<_> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    type Case = fn(&Path, &mut Table);
    let cases: [(&str, Case); 7] = [
        ("index", index),
        ("million", million),
        ("sparse", sparse),
        ("dense", dense),
        ("prune", prune_large),
        ("check", check_large),
        ("commands", commands),
    ];
    println!("{}; data below {}\n", machine::describe(), machine::data_folder().display());
    println!(
        "| case | resident MiB | anonymous MiB | s | CPU s | rate | bound | |\n|---|---|---|---|---|---|---|---|"
    );
    let mut table = Table { passed: true };
    for (name, case) in cases {
        if wanted.is_empty() || wanted.iter().any(|one| one == name) {
            let folder = machine::temporary(machine::data_folder());
            case(folder.path(), &mut table);
        }
    }
    if table.passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The work of a child that is no command; its arguments are a step and a folder.
fn child() -> u64 {
    let args: Vec<_> = std::env::args().skip(1).collect();
    let folder = PathBuf::from(&args[1]);
    match &args[0][..] {
        "index-build" => index_build(&folder),
        "index-look-up" => index_look_up(&folder, 1),
        "index-look-up-by-all" => index_look_up(&folder, machine::cpus()),
        "dense" => dense_run(&folder),
        "prune-build" => prune_build(&folder),
        "prune-plan" => prune_run(&folder, true),
        "prune" => prune_run(&folder, false),
        "check-build" => check_build(&folder),
        other => panic!("'{other}' is no step"),
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}

// Lookups of absent ids in an index of 100 million blobs.

const INDEX_SEGMENTS: u64 = 191;

fn index(folder: &Path, table: &mut Table) {
    let built = step(folder, "index-build");
    let rate = format!("{:.1}M records/s", built.done as f64 / built.seconds / 1e6);
    let case = format!("index: write {:.1}M blobs, sorted", built.done as f64 / 1e6);
    table.line(&case, &built, &rate, "64 MiB anonymous", built.anonymous < 64 * MIB);
    for (name, threads) in [("index-look-up", 1), ("index-look-up-by-all", machine::cpus())] {
        let looked = step(folder, name);
        let rate = looked.done as f64 / looked.cpu.max(0.01);
        table.line(
            &format!("index: look up absent ids, {threads} threads, filters 16 MiB"),
            &looked,
            &format!("{:.0}k lookups/s of CPU", rate / 1000.0),
            "64 MiB anonymous, 200k lookups/s a core",
            looked.anonymous < 64 * MIB && rate >= 200_000.0,
        );
    }
}

/// Writes segments that divide the space of ids among themselves, as merging leaves them.
fn index_build(folder: &Path) -> u64 {
    let store = repo::local(folder);
    let keys = repo::keys();
    let segments = scaled(INDEX_SEGMENTS);
    let each = SEGMENT_RECORDS_MAX as u64;
    let step = u64::MAX / (segments * each);
    let mut numbers = Numbers::new(1);
    for segment in 0..segments {
        let mut writer = SegmentWriter::new(&keys, SEGMENT_RECORDS_MAX, Vec::new());
        for number in segment * each..(segment + 1) * each {
            let mut prefix = [0; 16];
            prefix[..8].copy_from_slice(&(number * step + numbers.below(step)).to_be_bytes());
            prefix[8..].copy_from_slice(&numbers.draw().to_le_bytes());
            let mut pack = [0; 16];
            pack[..8].copy_from_slice(&numbers.draw().to_le_bytes());
            writer.push(&Record {
                prefix,
                location: Location {
                    pack: chunkstore::id::PackId(pack),
                    ordinal: (number % 100) as u8,
                },
            });
        }
        writer.finish(&*store).map(drop).expect("the store works");
    }
    segments * each
}

fn index_look_up(folder: &Path, threads: usize) -> u64 {
    let store = repo::local(folder);
    let (index, report) = Index::open(&*store, &repo::keys(), 16 << 20).expect("it was just built");
    assert!(report.damaged.is_empty());
    let each = scaled(2_000_000);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (index, store) = (&index, &store);
            scope.spawn(move || {
                let mut numbers = Numbers::new(77 + thread as u64);
                for _ in 0..each {
                    let mut id = [0; 32];
                    id.as_chunks_mut::<8>()
                        .0
                        .iter_mut()
                        .for_each(|word| *word = numbers.draw().to_le_bytes());
                    assert!(index.get(&**store, &BlobId(id)).is_none());
                }
            });
        }
    });
    each * threads as u64
}

// A million files in one folder.

fn million(folder: &Path, table: &mut Table) {
    let files = scaled(1_000_000);
    let (source, repository, target) = (folder.join("s"), folder.join("r"), folder.join("t"));
    fs::create_dir(&source).expect("the folder is new");
    // Most are empty, as many lie in their entry, and some in bundles.
    let content = benches::data::text(1, 2000);
    for number in 0..files {
        let len = match number % 16 {
            0 => 1500,
            1..4 => 60,
            _ => 0,
        };
        let name = source.join(format!("{number:07}-a-name-of-usual-length.txt"));
        fs::write(name, &content[..len]).expect("a file can be made");
    }
    std::thread::sleep(std::time::Duration::from_secs(3));
    let (source, repository, target) = (text(&source), text(&repository), text(&target));
    let units = (files, "files");
    let case = |what| format!("{files} files in one folder: {what}");
    table.command(
        folder,
        &case("backup"),
        &["--repo", repository, "backup", "--init", source],
        units,
    );
    table.command(folder, &case("unchanged"), &["--repo", repository, "backup", source], units);
    table.command(
        folder,
        &case("restore"),
        &["--repo", repository, "restore", "latest", "--target", target],
        units,
    );
    let restored = fs::read_dir(target).expect("it was restored").count() as u64;
    assert_eq!(restored, files);
}

// A sparse file of 512 GiB with 2 GiB of data.

const SPARSE_LEN: u64 = 512 << 30;

/// Where the pieces of 1 MiB lie: about one each 256 MiB.
fn sparse_places() -> Vec<u64> {
    let count = scaled(2048);
    let every = SPARSE_LEN / count;
    let mut numbers = Numbers::new(3);
    let place = |at| at * every + numbers.below((every - (2 << 20)) / 4096) * 4096;
    (0..count).map(place).collect()
}

fn sparse(folder: &Path, table: &mut Table) {
    let (source, repository, target) = (folder.join("s"), folder.join("r"), folder.join("t"));
    fs::create_dir(&source).expect("the folder is new");
    let places = sparse_places();
    let piece = |at: u64| benches::data::random(at, 1 << 20);
    {
        let file = File::create(source.join("disk")).expect("a file can be made");
        file.set_len(SPARSE_LEN).expect("the file system takes large files");
        for at in &places {
            file.write_all_at(&piece(*at), *at).expect("there is room");
        }
    }
    std::thread::sleep(std::time::Duration::from_secs(3));
    let units = (places.len() as u64, "MiB of data");
    let case = |what| format!("512 GiB with {} MiB of data: {what}", places.len());
    let (s, r, t) = (text(&source), text(&repository), text(&target));
    table.command(folder, &case("backup"), &["--repo", r, "backup", "--init", s], units);
    table.command(
        folder,
        &case("restore"),
        &["--repo", r, "restore", "latest", "--target", t],
        units,
    );
    let restored = File::open(target.join("disk")).expect("it was restored");
    let meta = restored.metadata().expect("it is there");
    assert_eq!(meta.len(), SPARSE_LEN);
    let allocated = meta.blocks() * 512;
    assert!(
        allocated <= (places.len() as u64 + 64) * MIB * 5 / 4,
        "{allocated} bytes are allocated"
    );
    let mut buffer = vec![0; 1 << 20];
    for at in &places {
        restored.read_exact_at(&mut buffer, *at).expect("it is long enough");
        assert!(buffer == piece(*at), "the piece at {at} differs");
    }
}

// A dense stream of 512 GiB into a store that drops what it gets.

fn dense(folder: &Path, table: &mut Table) {
    let run = step(folder, "dense");
    let gib = run.done >> 30;
    let rate = run.done as f64 / f64::from(1 << 30) / run.seconds;
    let mut rate = format!("{rate:.2} GiB/s");
    if gib < 512 {
        rate += &format!(" (512 GiB would take {:.0} s)", run.seconds * 512.0 / gib as f64);
    }
    let case = format!("dense stream of {gib} GiB, packs dropped");
    table.line(&case, &run, &rate, "96 MiB resident", run.resident < BUDGET);
}

/// Stores one large file through the library, its pieces of 1 GiB by several threads; the tree with its
/// extents is built as a backup builds it.
fn dense_run(folder: &Path) -> u64 {
    const PIECE: u64 = 1 << 30;
    let pieces = if is_set("EBACKUP_BENCH_FULL") { 512 } else { scaled(64) };
    let store = LocalStore::open(folder).expect("the folder is there");
    let store = Arc::new(Hollow::new(store, 0));
    let repository = repo::create(store.clone(), ChunkerConfig::default());
    let resources = Resources::new(BUDGET, machine::cpus());
    let settings = repo::writer_settings(resources, Level::default());
    let writer = repo::begin(&repository, settings);
    let stream = Stream::new(1);
    let next = AtomicU64::new(0);
    let threads = machine::cpus();
    let (done, finished) = crossbeam_channel::bounded::<(u64, Vec<Chunk>)>(threads);
    let mut tree = TreeBuilder::new(&writer, repository.keys().cut());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (writer, repository, stream, next, done) =
                (&writer, &repository, &stream, &next, done.clone());
            scope.spawn(move || {
                let mut compressor = Compressor::new(Level::default());
                loop {
                    let piece = next.fetch_add(1, Ordering::Relaxed);
                    if piece >= pieces {
                        return;
                    }
                    let chunks = store_piece(
                        writer,
                        repository,
                        stream,
                        &mut compressor,
                        piece * PIECE,
                        PIECE,
                    );
                    done.send((piece, chunks)).expect("the main thread waits for it");
                }
            });
        }
        drop(done);
        // Pieces end out of order, but close to it.
        let mut waiting: VecDeque<Option<Vec<Chunk>>> = VecDeque::new();
        let mut first = 0;
        for (piece, chunks) in finished {
            let at = (piece - first) as usize;
            waiting.resize(waiting.len().max(at + 1), None);
            waiting[at] = Some(chunks);
            while let Some(Some(_)) = waiting.front() {
                let chunks = waiting.pop_front().flatten().expect("it was just looked at");
                first += 1;
                for span in chunks
                    .chunk_by(|a, b| a.offset / EXTENT_SPAN_BYTES == b.offset / EXTENT_SPAN_BYTES)
                {
                    let key = extent_key(b"file", span[0].offset);
                    let body = Body::Extent(span.to_vec());
                    tree.push(&Entry { key, body }).expect("extents ascend");
                }
            }
        }
    });
    let root = tree.finish().expect("the store works").expect("there are entries");
    writer.commit(|_| repo::snapshot(root)).map(drop).expect("the store works");
    assert!(store.bytes() >= pieces * PIECE, "something was found twice");
    pieces * PIECE
}

/// Cuts and stores the bytes `from..from + len` of the stream.
fn store_piece(
    writer: &chunkstore::writer::Writer,
    repository: &Repository,
    stream: &Stream,
    compressor: &mut Compressor,
    from: u64,
    len: u64,
) -> Vec<Chunk> {
    const READ: usize = 2 << 20;
    let chunker = repository.chunker();
    let mut buffer: Vec<u8> = Vec::with_capacity(2 * READ + chunker.lookahead());
    let (mut read, mut at, mut offset) = (0, 0, from);
    let mut chunks = Vec::new();
    loop {
        if buffer.len() - at < chunker.lookahead() && read < len {
            buffer.drain(..at);
            at = 0;
            let end = buffer.len();
            buffer.resize(end + READ, 0);
            stream.read(from + read, &mut buffer[end..]);
            read += READ as u64;
            continue;
        }
        let cut = chunker.cut(&buffer[at..]);
        if cut == 0 {
            return chunks;
        }
        let blob = writer.store_data(compressor, &buffer[at..at + cut]).expect("the store works");
        chunks.push(Chunk { offset, blob });
        at += cut;
        offset += cut as u64;
    }
}

// Prune over snapshots that reach 10 million blobs.

const PRUNE_PACKS: u64 = 100_000;
const PRUNE_PACK_BLOBS: u64 = 100;
/// Beyond those in use: packs that no snapshot needs.
const PRUNE_DEAD_PACKS: u64 = 20_000;
const PRUNE_SNAPSHOTS: u64 = 20;
const PRUNE_NODE_PACKS: u64 = 4000;

fn prune_large(folder: &Path, table: &mut Table) {
    let built = step(folder, "prune-build");
    for (name, what) in [
        ("prune-plan", "plan only"),
        ("prune", "mark, write the index anew, delete"),
        ("prune", "again, nothing to do"),
    ] {
        let run = step(folder, name);
        let rate = format!(
            "{:.1}M blobs/s, {} packs doomed",
            built.done as f64 / run.seconds / 1e6,
            run.done
        );
        let case = format!(
            "prune {:.1}M blobs of {PRUNE_SNAPSHOTS} snapshots: {what}",
            built.done as f64 / 1e6
        );
        table.line(&case, &run, &rate, "96 MiB resident", run.resident < BUDGET);
    }
}

fn hollow(folder: &Path, listed: u64) -> Arc<Hollow> {
    let store = LocalStore::open(folder).expect("the folder is there");
    Arc::new(Hollow::new(store, listed))
}

/// Snapshots that share most of their interior nodes; the leaves of those do not exist, as marking does
/// not read them. The index names every blob, dead ones too.
fn prune_build(folder: &Path) -> u64 {
    let repository = repo::create(hollow(folder, 0), ChunkerConfig::default());
    let packs = scaled(PRUNE_PACKS);
    let mut shared = Vec::new();
    for number in 0..PRUNE_SNAPSHOTS {
        let settings = repo::writer_settings(Resources::new(BUDGET, 1), Level::default());
        let writer = repo::begin(&repository, settings);
        let node = |key: String, from: u64, to: u64| store_level_1(&writer, key, from..to);
        if shared.is_empty() {
            // The last tenth of the packs is not shared: each snapshot has its part of it.
            let end = packs * 9 / 10;
            shared = (0..end)
                .step_by(PRUNE_NODE_PACKS as usize)
                .map(|from| node(format!("a{from:08}"), from, (from + PRUNE_NODE_PACKS).min(end)))
                .collect();
        }
        let part = |number| packs * 9 / 10 + packs / 10 * number / PRUNE_SNAPSHOTS;
        let own = node(format!("b{number:08}"), part(number), part(number + 1));
        let mut children = shared.clone();
        children.push(own);
        let root = Interior { level: 2, children, liveness: Liveness::default() };
        let root = writer.store_node(BlobKind::Interior, &root.encode()).expect("the store works");
        writer.commit(|_| repo::snapshot((root, 2))).map(drop).expect("the store works");
    }
    let dead = scaled(PRUNE_DEAD_PACKS);
    let mut records = Vec::new();
    for pack in 0..packs + dead {
        for ordinal in 0..PRUNE_PACK_BLOBS {
            let id = trees::blob((1 << 50) | (pack * 128 + ordinal)).id;
            let location = Location { pack: repo::pack_id(pack), ordinal: ordinal as u8 };
            records.push(Record::new(&id, location));
        }
        if records.len() + PRUNE_PACK_BLOBS as usize > SEGMENT_RECORDS_MAX
            || pack + 1 == packs + dead
        {
            records.sort_unstable();
            let mut segment = SegmentWriter::new(repository.keys(), records.len(), Vec::new());
            records.iter().for_each(|record| segment.push(record));
            segment.finish(repository.store()).map(drop).expect("the store works");
            records.clear();
        }
    }
    packs * PRUNE_PACK_BLOBS
}

fn store_level_1(
    writer: &chunkstore::writer::Writer,
    first_key: String,
    packs: std::ops::Range<u64>,
) -> ChildRef {
    let mut liveness = Liveness::default();
    for pack in packs.clone() {
        liveness.0.insert(repo::pack_id(pack), (1 << PRUNE_PACK_BLOBS) - 1);
    }
    let first_key = first_key.into_bytes();
    let leaf =
        NodeRef { id: trees::blob(packs.start).id, pack: repo::pack_id(1 << 60), ordinal: 0 };
    let children =
        vec![ChildRef { first_key: first_key.clone(), node: leaf, entries: 1, bytes: 0 }];
    let interior = Interior { level: 1, children, liveness };
    let node = writer.store_node(BlobKind::Interior, &interior.encode()).expect("the store works");
    ChildRef { first_key, node, entries: 1, bytes: 0 }
}

fn prune_run(folder: &Path, dry_run: bool) -> u64 {
    // What was deleted by an earlier process is not listed again: the second run has nothing to do.
    let done = folder.join("deleted");
    let dead = if done.exists() { 0 } else { scaled(PRUNE_DEAD_PACKS) };
    let store = hollow(folder, scaled(PRUNE_PACKS) + dead);
    let repository = Repository::open(store, &repo::unlock()).expect("it was just built");
    let settings = PruneSettings { dry_run, ..PruneSettings::default() };
    let report = prune(&repository, &settings, later(), &|_| {}).expect("the store works");
    assert_eq!(report.plan.data.used_packs, scaled(PRUNE_PACKS));
    assert_eq!(report.plan.data.doomed_packs, dead);
    if !dry_run {
        assert!(report.packs_deleted >= dead, "{report:?}");
        fs::write(done, "").expect("the folder takes it");
    }
    report.plan.data.doomed_packs
}

// Check of 10 million blobs, all of which are there.

const CHECK_BLOBS: u64 = 10_000_000;
/// Chunks of one file: as many as stand in its entry.
const CHECK_FILE_CHUNKS: u64 = 64;
/// Bytes of a blob: what counts is their number.
const CHECK_BLOB_BYTES: u64 = 16;

fn check_large(folder: &Path, table: &mut Table) {
    let built = step(folder, "check-build");
    let key = folder.join("key");
    fs::write(&key, format!("ebackup key file\n{}\n", "07".repeat(32))).expect("there is room");
    let (repository, key) = (text(folder).to_owned() + "/r", text(&key).to_owned());
    let case = format!("check of {:.1}M blobs", built.done as f64 / 1e6);
    let args = ["--repo", &repository, "--key-file", &key, "check"];
    table.command(folder, &case, &args, (built.done, "blobs"));
}

/// Files of many tiny chunks, so that all packs, leaves and segments are as many as large ones make.
fn check_build(folder: &Path) -> u64 {
    let path = folder.join("r");
    LocalStore::create_root(&path).expect("the folder is new");
    let repository = repo::create(repo::local(&path), ChunkerConfig::default());
    // Building is not measured: with room for filters, what is new is known to be without reading.
    let settings = repo::writer_settings(Resources::new(4 << 30, 1), Level::default());
    let writer = repo::begin(&repository, settings);
    let mut tree = TreeBuilder::new(&writer, repository.keys().cut());
    let mut compressor = Compressor::new(Level::default());
    let mut numbers = Numbers::new(11);
    let blobs = scaled(CHECK_BLOBS);
    for file in 0..blobs / CHECK_FILE_CHUNKS {
        let chunk = |at: u64| {
            let plain = [numbers.draw().to_le_bytes(), numbers.draw().to_le_bytes()].concat();
            let blob = writer.store_data(&mut compressor, &plain).expect("the store works");
            Chunk { offset: at * CHECK_BLOB_BYTES, blob }
        };
        let mut entry = trees::entry(file, 0);
        if let Body::Node(node) = &mut entry.body {
            node.content = Content::Chunks((0..CHECK_FILE_CHUNKS).map(chunk).collect());
            node.size = CHECK_FILE_CHUNKS * CHECK_BLOB_BYTES;
        }
        tree.push(&entry).expect("keys ascend");
    }
    let root = tree.finish().expect("the store works").expect("there are entries");
    writer.commit(|_| repo::snapshot(root)).map(drop).expect("the store works");
    blobs
}

// Every command on a repository of 200,000 files with a password.

fn commands(folder: &Path, table: &mut Table) {
    let files = scaled(200_000);
    let (source, target) = (folder.join("s"), folder.join("t"));
    let bytes = trees::small_files(&source, files);
    std::thread::sleep(std::time::Duration::from_secs(3));
    let password = folder.join("password");
    fs::write(&password, "correct horse battery staple").expect("the folder takes it");
    let repository = folder.join("r");
    let global = ["--repo", text(&repository), "--password-file", text(&password)];
    let mut run = |what: &str, args: &[&str]| {
        let case = format!("{files} files, password: {what}");
        table.command(folder, &case, &[&global, args].concat(), (files, "files"));
    };
    let source_text = text(&source).to_owned();
    run("backup", &["backup", "--init", &source_text]);
    for number in 0..files / 100 {
        let path = source.join(format!("d{:04}/file-{:06}.txt", number * 100 / 500, number * 100));
        fs::write(path, format!("changed {number}")).expect("it can be written");
    }
    fs::remove_dir_all(source.join("d0001")).expect("it was made");
    run("backup, 1 % changed", &["backup", &source_text]);
    run("backup, unchanged", &["backup", &source_text]);
    run("restore", &["restore", "latest", "--target", text(&target)]);
    run(
        "restore over what is there, verified",
        &["restore", "latest", "--target", text(&target), "--delete", "--verify"],
    );
    run("snapshots", &["snapshots"]);
    run("ls -R", &["ls", "-R", "latest"]);
    run("dump of everything", &["dump", "latest", "."]);
    let list = list_snapshots(&repository, &password);
    run("diff", &["diff", &list[0], &list[1]]);
    run("stats", &["stats"]);
    run("check", &["check"]);
    run("check --read-data", &["check", "--read-data"]);
    run("check --repair-index", &["check", "--repair-index"]);
    run("forget", &["forget", "--keep-last", "1"]);
    run("prune", &["prune"]);
    println!("\n({} MiB in {files} files)", bytes >> 20);
}

fn list_snapshots(repository: &Path, password: &Path) -> Vec<String> {
    let unlock =
        chunkstore::key_slot::Unlock::Passphrase(fs::read(password).expect("it was just written"));
    let repository = Repository::open(repo::local(repository), &unlock).expect("it was just made");
    let list = repository.list_snapshots().expect("the store works");
    list.snapshots.iter().map(|(id, _)| id.to_string()).collect()
}
