//! A repository written by an earlier build still reads the same, to the byte.
//!
//! If this fails and the format was meant to change:
//! `cargo run -p chunkstore --all-features --example make_fixture`, and say so in the change.

use std::fs;
use std::path::{Path, PathBuf};

use chunkstore::ErrorKind;
use chunkstore::check::{CheckOptions, ReadData, check};
use chunkstore::key_slot::Unlock;
use chunkstore::testing::golden;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/format-v1")
}

#[test]
fn the_golden_repository_opens_with_either_key_and_reads_as_recorded() {
    let recorded = fs::read_to_string(folder().join("manifest")).unwrap();
    let password = fs::read_to_string(folder().join("password")).unwrap();
    let password = Unlock::Passphrase(password.trim_end().into());
    for unlock in [golden::key_file(), password] {
        let repository = golden::open(&folder().join("repository"), &unlock).unwrap();
        let found = golden::manifest(&repository).unwrap();
        for (recorded, found) in recorded.lines().zip(found.lines()) {
            assert_eq!(recorded, found);
        }
        assert_eq!(recorded, found);
    }
    let wrong = Unlock::Passphrase(b"wrong".to_vec());
    let refused = golden::open(&folder().join("repository"), &wrong);
    assert_eq!(refused.err().map(|error| error.kind()), Some(ErrorKind::WrongKey));
}

#[test]
fn the_golden_repository_passes_a_full_check() {
    let repository = golden::open(&folder().join("repository"), &golden::key_file()).unwrap();
    let options = CheckOptions { read_data: ReadData::All, ..CheckOptions::default() };
    let mut findings = Vec::new();
    check(&repository, &options, &mut |finding| findings.push(finding), &|_| {}).unwrap();
    assert_eq!(findings, []);
}

#[test]
fn the_golden_repository_is_small_and_has_every_folder() {
    let mut bytes = 0;
    let mut pending = vec![folder()];
    while let Some(folder) = pending.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                pending.push(entry.path());
            } else {
                bytes += entry.metadata().unwrap().len();
            }
        }
    }
    assert!(bytes < 200 << 10, "{bytes} bytes");
    for name in
        ["config", "keys", "packs", "meta", "index", "snapshots", "forgotten", "relocations"]
    {
        assert!(folder().join("repository").join(name).exists(), "{name}");
    }
}
