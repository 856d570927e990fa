//! Folders of files, and entries of trees, as people have them.

use std::fs;
use std::path::Path;

use chunkstore::id::BlobId;
use chunkstore::pack::Location;
use chunkstore::tree::{BlobRef, Body, Content, Entry, Kind, Node, State, Timestamp};

use crate::data::{self, Numbers};
use crate::repo;

/// Makes `files` text files of 200 to 3,000 bytes in folders of 500; returns their bytes.
///
/// # Panics
/// When they cannot be made.
pub fn small_files(root: &Path, files: u64) -> u64 {
    let pool = data::text(3, 8 << 20);
    let mut numbers = Numbers::new(5);
    let mut bytes = 0;
    for number in 0..files {
        let folder = root.join(format!("d{:04}", number / 500));
        if number % 500 == 0 {
            fs::create_dir_all(&folder).expect("a folder can be made");
        }
        let len = 200 + numbers.below(2800) as usize;
        let from = numbers.below((pool.len() - len) as u64) as usize;
        let path = folder.join(format!("file-{number:06}.txt"));
        fs::write(path, &pool[from..from + len]).expect("a file can be written");
        bytes += len as u64;
    }
    bytes
}

/// Makes a tree like a checkout of program text: folders three deep, files of 8 KiB on average, a few
/// far larger; returns its bytes.
///
/// # Panics
/// When it cannot be made.
pub fn checkout(root: &Path, files: u64) -> u64 {
    let mut numbers = Numbers::new(11);
    let pool = data::source(4, 32 << 20);
    let mut bytes = 0;
    for number in 0..files {
        let (a, b) = (numbers.skewed(40), numbers.skewed(30));
        let folder = root.join(format!("module{a}/part{b}/src"));
        fs::create_dir_all(&folder).expect("a folder can be made");
        // Skewed twice: most files are a few KiB, one in some hundred exceeds 64.
        let scale = 1 << (10 + numbers.below(8));
        let len = 100 + numbers.skewed(scale) as usize;
        let from = numbers.below((pool.len() - len) as u64) as usize;
        let path = folder.join(format!("file_{number}.rs"));
        fs::write(path, &pool[from..from + len]).expect("a file can be written");
        bytes += len as u64;
    }
    bytes
}

/// Entry `number` of a tree of folders of 1,000 files each, whose small files lie in bundles of about a
/// hundred. `version` makes its content and times differ.
pub fn entry(number: u64, version: u64) -> Entry {
    let key = format!("folder-{:05}\0file-{number:08}.dat", number / 1000).into_bytes();
    let mut numbers = Numbers::new(number ^ version << 40);
    let bundle = (number / 100) ^ version << 40;
    let size = 1000 + numbers.below(9000);
    let time = Timestamp {
        seconds: 1_700_000_000 + numbers.below(1_000_000) as i64,
        nanos: numbers.below(1_000_000_000) as u32,
    };
    let mut hash = [0; 16];
    hash[..8].copy_from_slice(&numbers.draw().to_le_bytes());
    hash[8..].copy_from_slice(&numbers.draw().to_le_bytes());
    let content =
        Content::Part { bundle: blob(bundle), offset: (number % 100 * 10_000) as u32, hash };
    Entry {
        key,
        body: Body::Node(Node {
            kind: Kind::File,
            mode: 0o644,
            uid: 1000,
            gid: 1000,
            size,
            mtime: time,
            ctime: time,
            ino: 1_000_000 + number,
            fs: 0,
            linked: false,
            rdev: (0, 0),
            xattrs: Vec::new(),
            state: State::Whole,
            content,
        }),
    }
}

/// A reference to a blob, 30 of them to a pack.
pub fn blob(number: u64) -> BlobRef {
    BlobRef {
        id: BlobId(*blake3::hash(&number.to_le_bytes()).as_bytes()),
        location: Location { pack: repo::pack_id(number / 30), ordinal: (number % 30) as u8 },
        len: 1_000_000,
    }
}
