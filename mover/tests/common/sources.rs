//! Trees to be saved.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use mover::fs::{Dir, Kind};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags};

use super::{is_root, noise, not_tested};

/// Writes files below a folder, making the folders on the way.
pub struct Source<'a>(pub &'a Path);

impl Source<'_> {
    pub fn path(&self, name: impl AsRef<[u8]>) -> PathBuf {
        self.0.join(OsStr::from_bytes(name.as_ref()))
    }

    pub fn file(&self, name: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    /// A file of `size` bytes with data at these ranges only.
    pub fn sparse(&self, name: &str, size: u64, data: &[(u64, usize)]) {
        let path = self.file(name, "");
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_len(size).unwrap();
        for (offset, len) in data {
            file.write_all_at(&noise(*offset, *len), *offset).unwrap();
        }
    }

    pub fn dir(&self, name: &str) {
        fs::create_dir_all(self.path(name)).unwrap();
    }

    pub fn mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    pub fn xattr(&self, name: impl AsRef<[u8]>, attribute: &str, value: &[u8]) {
        let path = self.path(name);
        rustix::fs::lsetxattr(&path, attribute, value, XattrFlags::empty()).unwrap();
    }

    pub fn mtime(&self, name: impl AsRef<[u8]>, seconds: i64, nanos: i64) {
        set_mtime(&self.path(name), seconds, nanos);
    }
}

pub fn set_mtime(path: &Path, seconds: i64, nanos: i64) {
    let (tv_sec, tv_nsec) = (seconds, nanos);
    let time = Timespec { tv_sec, tv_nsec };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// The extended attribute in which a POSIX ACL is kept: version 2, then tag, permissions and id of
/// each entry. Grants read to user 1234.
pub fn acl(mask: u16) -> Vec<u8> {
    const NONE: u32 = u32::MAX;
    let entries: [(u16, u16, u32); 5] =
        [(0x01, 6, NONE), (0x02, 4, 1234), (0x04, 4, NONE), (0x10, mask, NONE), (0x20, 0, NONE)];
    let mut blob = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        blob.extend_from_slice(&tag.to_le_bytes());
        blob.extend_from_slice(&permissions.to_le_bytes());
        blob.extend_from_slice(&id.to_le_bytes());
    }
    blob
}

/// Sizes at which something in the format changes, except the largest.
pub const SIZES: [usize; 12] = [
    0,
    1,
    511,
    512,
    513,
    (128 << 10) - 1,
    128 << 10,
    (128 << 10) + 1,
    (2 << 20) - 1,
    2 << 20,
    16 << 20,
    (16 << 20) + 1,
];

/// A tree with everything that can be in one.
pub fn everything(root: &Path) {
    let source = Source(root);
    for size in SIZES {
        source.file(format!("sizes/{size:08}"), noise(size as u64, size));
    }
    source.file("sizes/large", noise(70, 70 << 20));
    source.file("sizes/text", "the same line again\n".repeat(300_000));
    source.file("sizes/zeros", vec![0; 3 << 20]);

    // Larger than the limit for small files, below and above the one for large ones.
    let mib = 1 << 20;
    source.sparse("sparse/both-ends", 8 * mib, &[(mib, 300_000), (5 * mib, 4096)]);
    source.sparse("sparse/large", 200 * mib, &[(3 * mib, 9 << 20), (130 * mib, 5)]);
    source.sparse("sparse/only-hole", 50 * mib, &[]);
    source.sparse("sparse/small", 100_000, &[(40_000, 5000)]);
    source.sparse("sparse/at-start", 4 * mib, &[(0, 1)]);
    source.sparse("sparse/at-end", 4 * mib, &[(4 * mib - 1, 1)]);

    let link = |from: &str, to: &str| {
        fs::create_dir_all(source.path(to).parent().unwrap()).unwrap();
        fs::hard_link(source.path(from), source.path(to)).unwrap();
    };
    source.file("links/small", noise(1, 700));
    source.file("links/tiny", "x");
    source.file("links/medium", noise(2, 500_000));
    source.file("zzz/large", noise(3, 17 << 20));
    for name in ["small", "tiny", "medium"] {
        link(&format!("links/{name}"), &format!("elsewhere/deep/{name}"));
        link(&format!("links/{name}"), &format!("links/{name}-again"));
    }
    link("zzz/large", "elsewhere/large");

    source.dir("kinds/empty");
    let kinds = Dir::open_root(&source.path("kinds")).unwrap();
    symlink("nowhere/at/all", source.path("kinds/dangling")).unwrap();
    symlink(OsStr::from_bytes(b"\xff/\n"), source.path("kinds/odd-target")).unwrap();
    symlink("empty", source.path("kinds/link")).unwrap();
    fs::hard_link(source.path("kinds/link"), source.path("kinds/link-again")).unwrap();
    kinds.make_node(b"fifo", Kind::Fifo, 0, 0).unwrap();
    kinds.make_node(b"socket", Kind::Socket, 0, 0).unwrap();
    fs::hard_link(source.path("kinds/fifo"), source.path("kinds/fifo-again")).unwrap();
    if is_root() {
        kinds.make_node(b"null", Kind::CharDevice, 1, 3).unwrap();
        kinds.make_node(b"disk", Kind::BlockDevice, 259, 70_000).unwrap();
        std::os::unix::fs::chown(source.file("owned", "by others"), Some(1234), Some(5678))
            .unwrap();
        std::os::unix::fs::lchown(source.path("kinds/link"), Some(1), Some(2)).unwrap();
        source.xattr("kinds/dangling", "trusted.on-a-link", b"yes");
        source.xattr("kinds/null", "trusted.on-a-device", b"yes");
        let mut capability = 0x0200_0001_u32.to_le_bytes().to_vec();
        capability.extend_from_slice(&[0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        source.xattr("owned", "security.capability", &capability);
    } else {
        not_tested("devices, foreign owners and trusted attributes, for this user is not root");
    }

    for (name, mode) in [("setuid", 0o4755), ("setgid", 0o2711), ("none", 0), ("all", 0o7777)] {
        source.file(format!("modes/{name}"), name);
        source.mode(&format!("modes/{name}"), mode);
    }
    source.dir("modes/sticky");
    source.mode("modes/sticky", 0o1777);
    source.dir("modes/setgid-dir");
    source.mode("modes/setgid-dir", 0o2750);
    source.file("modes/closed/inside", "a folder without permissions");

    source.file("attributes/file", "x");
    source.xattr("attributes/file", "user.empty", b"");
    source.xattr("attributes/file", "user.binary", &[0, 255, 10]);
    source.xattr("attributes/file", "user.long", &noise(9, 2000));
    source.xattr("attributes", "user.on-a-folder", b"yes");
    source.file("attributes/acl", "x");
    source.xattr("attributes/acl", "system.posix_acl_access", &acl(4));
    source.dir("attributes/acl-folder");
    source.xattr("attributes/acl-folder", "system.posix_acl_default", &acl(5));
    source.xattr("attributes/acl-folder", "system.posix_acl_access", &acl(6));

    let long = [b'n'; 255];
    let names: [&[u8]; 9] =
        [b"\xff\xfe not UTF-8", b"new\nline", b" ", b"...", b"-rf", b"\x01", b"a", b"a-b", &long];
    for name in names {
        source.file([&b"names/"[..], name].concat(), name);
    }
    // `a` is a folder elsewhere, so that its content stands between `a` and `a-b`.
    source.file("names2/a/inside", "x");
    source.file("names2/a-b", "x");
    source.file("names2/a.b", "x");
    deep(root);

    // Last, since making files changes the times of folders.
    source.mtime("modes/setuid", -1, 999_999_999);
    source.mtime("modes/setgid", -2_000_000_000, 1);
    source.mtime("modes/all", 4_000_000_000, 123_456_789);
    source.mtime("kinds/dangling", -86_400, 5);
    source.mtime("kinds/fifo", 1, 0);
    source.mtime("kinds/empty", 0, 0);
    source.mtime("sparse", 1_000_000_000, 7);
    source.mode("modes/closed", 0);
}

/// Folders whose path is longer than the system lets one name at once.
fn deep(root: &Path) {
    let mut dir = Dir::open_root(root).unwrap();
    for level in 0..20 {
        dir = dir.make_dir(&[b'd' + level; 250]).unwrap();
    }
    use std::io::Write;
    let mut file = dir.create_file(b"bottom").unwrap();
    file.write_all(&noise(4, 1000)).unwrap();
    // Deeper than the number of folders that are held open.
    let mut dir = Dir::open_root(root).unwrap();
    for _ in 0..300 {
        dir = dir.make_dir(b"down").unwrap();
        dir.make_dir(b"aside").unwrap();
        dir.create_file(b"zlast").unwrap().write_all(b"z").unwrap();
    }
}
