//! Which file systems' inode numbers and change times can be relied on.

use super::dir::Dir;
use std::borrow::Cow;
use std::io;

/// What to expect from a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsTraits {
    /// Its name, for messages.
    pub name: Cow<'static, str>,
    /// Whether a file keeps its inode number, over remounts too.
    pub inodes_stable: bool,
    /// Whether every change of a file moves its change time, and nothing else sets it.
    pub ctime_trusted: bool,
}

/// Magic number (see statfs(2)), name, inodes stable, change time trusted.
///
/// Not trusted: network file systems and FUSE, where a server decides; images (squashfs …), whose
/// numbers and times come from whoever built them; FAT and the like, which have neither. On overlayfs the
/// inode number of a file may change with a remount, its times are those of the file below.
const KNOWN: [(u32, &str, bool, bool); 29] = [
    (0xef53, "ext4", true, true),
    (0x5846_5342, "xfs", true, true),
    (0x9123_683e, "btrfs", true, true),
    (0x2fc1_2fc1, "zfs", true, true),
    (0xf2f5_2010, "f2fs", true, true),
    (0xca45_1a4e, "bcachefs", true, true),
    (0x3153_464a, "jfs", true, true),
    (0x5265_4973, "reiserfs", true, true),
    (0x0102_1994, "tmpfs", true, true),
    (0x8584_58f6, "ramfs", true, true),
    (0x794c_7630, "overlayfs", false, true),
    (0x6573_5546, "fuse", false, false),
    (0x6969, "nfs", false, false),
    (0xff53_4d42, "cifs", false, false),
    (0xfe53_4d42, "smb2", false, false),
    (0x517b, "smb", false, false),
    (0x0102_1997, "9p", false, false),
    (0x00c3_6400, "ceph", false, false),
    (0x5346_414f, "afs", false, false),
    (0x0bd0_0bd0, "lustre", false, false),
    (0x0116_1970, "gfs2", false, false),
    (0x7461_636f, "ocfs2", false, false),
    (0x7371_7368, "squashfs", false, false),
    (0xe0f5_e1e2, "erofs", false, false),
    (0x9660, "iso9660", false, false),
    (0x4d44, "vfat", false, false),
    (0x2011_bab0, "exfat", false, false),
    (0x7366_746e, "ntfs", false, false),
    (0x9fa0, "proc", false, false),
];

impl FsTraits {
    /// Looks up the file system `dir` is on; an unknown one is not trusted.
    pub fn of(dir: &Dir) -> io::Result<Self> {
        Ok(Self::of_magic(rustix::fs::fstatfs(dir)?.f_type as u32))
    }

    fn of_magic(magic: u32) -> Self {
        match KNOWN.iter().find(|known| known.0 == magic) {
            Some(&(_, name, inodes_stable, ctime_trusted)) => {
                Self { name: name.into(), inodes_stable, ctime_trusted }
            }
            None => Self {
                name: format!("unknown file system {magic:#x}").into(),
                inodes_stable: false,
                ctime_trusted: false,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn local_file_systems_are_trusted_and_servers_are_not() {
        let traits = FsTraits::of_magic(0xef53);
        assert!(traits.inodes_stable && traits.ctime_trusted);
        for magic in [0x6573_5546, 0x6969, 0xff53_4d42, 0xfe53_4d42, 0x0102_1997, 0x00c3_6400] {
            let traits = FsTraits::of_magic(magic);
            assert!(!traits.inodes_stable && !traits.ctime_trusted, "{}", traits.name);
        }
        let unknown = FsTraits::of_magic(0x1234);
        assert_eq!(unknown.name, "unknown file system 0x1234");
        assert!(!unknown.inodes_stable && !unknown.ctime_trusted);
    }

    #[test]
    fn magic_numbers_are_distinct() {
        let magics: BTreeSet<u32> = KNOWN.iter().map(|known| known.0).collect();
        assert_eq!(magics.len(), KNOWN.len());
    }

    #[test]
    fn proc_is_recognised() {
        let proc = Dir::open_root("/proc".as_ref()).unwrap();
        assert_eq!(FsTraits::of(&proc).unwrap().name, "proc");
    }
}
