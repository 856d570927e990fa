//! A scanner of file trees that shares no code with the one under test.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, SeekFrom, StatxFlags};

use super::display_path;

/// Everything a restore must bring back of one name. What names share an inode is told by `same_as`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Type and permission bits.
    pub mode: u16,
    pub owner: (u32, u32),
    pub mtime: (i64, u32),
    pub device: (u32, u32),
    pub size: u64,
    /// Hash of a file's content, target of a link.
    pub content: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first name of the same file, in order, if there are several.
    pub same_as: Option<Vec<u8>>,
    /// Where a file has data rather than holes.
    pub data: Vec<(u64, u64)>,
}

/// By path, components separated by `/`.
pub type Tree = BTreeMap<Vec<u8>, Seen>;

/// Scans everything below `root`. Paths may be longer than the system's limit.
pub fn scan(root: &Path) -> Tree {
    let dir = rustix::fs::openat(CWD, root, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty());
    let mut scanner = Scanner::default();
    let dir = dir.unwrap();
    let itself = scanner.seen(&dir, b".", b"");
    scanner.tree.insert(Vec::new(), itself);
    scanner.folder(&dir, b"");
    scanner.tree
}

#[derive(Default)]
struct Scanner {
    tree: Tree,
    links: HashMap<(u32, u32, u64), Vec<u8>>,
}

impl Scanner {
    fn folder(&mut self, dir: &OwnedFd, path: &[u8]) {
        let mut names: Vec<Vec<u8>> = rustix::fs::Dir::read_from(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_bytes().to_vec())
            .filter(|name| name != b"." && name != b"..")
            .collect();
        names.sort();
        for name in names {
            let path = if path.is_empty() { name.clone() } else { [path, &name].join(&b'/') };
            let seen = self.seen(dir, &name, &path);
            let is_dir = seen.mode >> 12 == 0o4;
            self.tree.insert(path.clone(), seen);
            if is_dir {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
                let below = rustix::fs::openat(dir, &name[..], flags, Mode::empty()).unwrap();
                self.folder(&below, &path);
            }
        }
    }

    fn seen(&mut self, dir: &OwnedFd, name: &[u8], path: &[u8]) -> Seen {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let stat = rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS).unwrap();
        let kind = stat.stx_mode >> 12;
        let mut same_as = None;
        if stat.stx_nlink > 1 && kind != 0o4 {
            let inode = (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino);
            let first = self.links.entry(inode).or_insert_with(|| path.to_vec());
            same_as = Some(first.clone());
        }
        let (content, data) = match kind {
            0o10 => file(dir, name, stat.stx_size),
            0o12 => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new()).unwrap();
                (target.into_bytes(), Vec::new())
            }
            _ => Default::default(),
        };
        Seen {
            mode: stat.stx_mode,
            owner: (stat.stx_uid, stat.stx_gid),
            mtime: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
            device: (stat.stx_rdev_major, stat.stx_rdev_minor),
            size: if matches!(kind, 0o10 | 0o12) { stat.stx_size } else { 0 },
            content,
            xattrs: xattrs(dir, name),
            same_as,
            data,
        }
    }
}

fn file(dir: &OwnedFd, name: &[u8], size: u64) -> (Vec<u8>, Vec<(u64, u64)>) {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NOATIME;
    let opened = rustix::fs::openat(dir, name, flags, Mode::empty()).unwrap();
    let mut data = Vec::new();
    let mut at = 0;
    while let Ok(from) = rustix::fs::seek(&opened, SeekFrom::Data(at)) {
        at = rustix::fs::seek(&opened, SeekFrom::Hole(from)).unwrap();
        data.push((from, at));
    }
    rustix::fs::seek(&opened, SeekFrom::Start(0)).unwrap();
    let mut file = File::from(opened);
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        let read = file.read(&mut buffer).unwrap();
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        total += read as u64;
    }
    assert_eq!(total, size, "read to its end");
    (hasher.finalize().as_bytes().to_vec(), data)
}

fn xattrs(dir: &OwnedFd, name: &[u8]) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_fd().as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    let mut buffer = vec![0; 64 << 10];
    let len = rustix::fs::llistxattr(&path[..], &mut buffer[..]).unwrap_or_default();
    let names = buffer[..len].to_vec();
    let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let len = rustix::fs::lgetxattr(&path[..], name, &mut buffer[..]).unwrap();
            (name.to_vec(), buffer[..len].to_vec())
        })
        .collect()
}

/// What differs, a line each; holes count only if `holes` is set.
pub fn differences(expected: &Tree, found: &Tree, holes: bool) -> Vec<String> {
    let mut lines = Vec::new();
    let mut all: Vec<_> = expected.keys().chain(found.keys()).collect();
    all.sort();
    all.dedup();
    for path in all {
        let mut say = |what: &str| lines.push(format!("{}: {what}", display_path(path)));
        let (a, b) = match (expected.get(path), found.get(path)) {
            (Some(a), Some(b)) => (a, b),
            (Some(_), None) => {
                say("is missing");
                continue;
            }
            _ => {
                say("should not be there");
                continue;
            }
        };
        let mut text = String::new();
        let mut compare =
            |what: &str, equal: bool, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| {
                if !equal {
                    write!(text, " {what} {a:?} became {b:?}").unwrap();
                }
            };
        compare("mode", a.mode == b.mode, &a.mode, &b.mode);
        compare("owner", a.owner == b.owner, &a.owner, &b.owner);
        compare("mtime", a.mtime == b.mtime, &a.mtime, &b.mtime);
        compare("device", a.device == b.device, &a.device, &b.device);
        compare("size", a.size == b.size, &a.size, &b.size);
        compare("content", a.content == b.content, &(), &());
        compare("xattrs", a.xattrs == b.xattrs, &a.xattrs, &b.xattrs);
        compare("links", a.same_as == b.same_as, &a.same_as, &b.same_as);
        compare("holes", !holes || a.data == b.data, &a.data, &b.data);
        if !text.is_empty() {
            say(text.trim());
        }
    }
    lines
}

#[track_caller]
pub fn assert_same(expected: &Tree, found: &Tree, context: &str) {
    let lines = differences(expected, found, false);
    assert!(
        lines.is_empty(),
        "{context}: {} differences:\n{}",
        lines.len(),
        lines[..lines.len().min(20)].join("\n")
    );
}
