//! Makes the seeds of the fuzz targets and the golden repository anew, after a change of the format:
//! `cargo run -p chunkstore --all-features --example make_fixture`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use chunkstore::chunker::ChunkerConfig;
use chunkstore::codec::compress::{Compressor, Level};
use chunkstore::codec::seal::Secret;
use chunkstore::gc::{PruneSettings, RepackSettings, prune};
use chunkstore::key_slot::{self, KdfCost, Unlock};
use chunkstore::record::{Session, Snapshot, Summary};
use chunkstore::repository::Repository;
use chunkstore::testing::{fuzz, golden};
use chunkstore::tree::TreeBuilder;
use chunkstore::writer::{Writer, WriterSettings};
use objects::local::LocalStore;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (target, name, bytes) in fuzz::seeds() {
        let folder = here.join("../fuzz/seeds").join(target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(name), bytes)?;
    }
    let folder = here.join("testdata/format-v1");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(folder.join("repository"))?;
    fs::write(folder.join("password"), "correct horse battery staple\n")?;
    fs::write(folder.join("key"), "07".repeat(32))?;
    make_repository(&folder.join("repository"))?;
    let opened = golden::open(&folder.join("repository"), &golden::key_file())?;
    fs::write(folder.join("manifest"), golden::manifest(&opened)?)?;
    Ok(())
}

/// Two snapshots of one lineage, one of which is forgotten and pruned, so that the other's blobs were
/// relocated; and two keys.
fn make_repository(path: &Path) -> Result<(), Failure> {
    let store = Arc::new(LocalStore::open(path)?);
    let now = |second: i64| jiff::Timestamp::from_second(1_790_000_000 + second);
    let repository = Repository::create(
        store.clone(),
        &golden::key_file(),
        KdfCost::WEAK,
        ChunkerConfig::default(),
        now(0)?,
    )?;
    let password = Unlock::Passphrase(b"correct horse battery staple".to_vec());
    key_slot::add(&*store, repository.keys(), &password, KdfCost::WEAK, "a label", now(1)?)?;
    let repository = Arc::new(repository);
    assert_eq!(golden::key_file_secret(), Secret([7; 32]).0);
    let mut parent = None;
    for round in 0..2 {
        let session = Session {
            purpose: "backup".into(),
            writer: "make_fixture".into(),
            started: now(10 * round + 2)?,
            heartbeat: 0,
        };
        let settings = WriterSettings { pack_target_bytes: 16 << 10, ..WriterSettings::default() };
        let writer = Writer::begin(repository.clone(), settings, &session)?;
        let mut compressor = Compressor::new(Level::default());
        let entries =
            golden::entries(round as u64, &mut |plain| writer.store_data(&mut compressor, plain))?;
        let mut tree = TreeBuilder::new(&writer, repository.keys().cut());
        entries.iter().try_for_each(|entry| tree.push(entry))?;
        let (root, level) = tree.finish()?.ok_or("no entries")?;
        let snapshot = Snapshot {
            root,
            level,
            lineage: "golden".into(),
            host: "host".into(),
            path: "/data".into(),
            tags: BTreeMap::from([("key".into(), "value".into())]),
            started: session.started,
            finished: now(10 * round + 3)?,
            parent,
            summary: Summary { files: entries.len() as u64, ..Summary::default() },
            sparse: chunkstore::tree::Liveness::default(),
            program: "make_fixture".into(),
            copy_of: None,
        };
        let id = writer.commit(|_| snapshot)?;
        if let Some(parent) = parent.replace(id) {
            repository.forget(parent, now(30)?)?;
        }
    }
    let repack = RepackSettings { max_unused_percent: 0.0, ..RepackSettings::default() };
    let settings = PruneSettings { repack: Some(repack), ..PruneSettings::default() };
    let report = prune(&repository, &settings, now(40)?, &|_| {})?;
    assert!(report.repacked.is_some_and(|repacked| repacked.blobs_copied > 0));
    assert!(report.packs_deleted > 0);
    Ok(())
}
