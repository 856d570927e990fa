//! What one `statx` says about an entry.
//!
//! `statx` and `fstatat` cost the same (1.1 µs warm on ext4, Linux 6.18, whatever the mask); `statx`
//! has the same field widths on every architecture.

pub use chunkstore::tree::{Kind, Timestamp};
use rustix::fs::{FileType, Statx, StatxTimestamp, makedev};
use std::fs::File;
use std::io;

use super::dir::statx_fd;

/// `None` for [`FileType::Unknown`]: the file system does not say.
pub(super) fn kind_of(file_type: FileType) -> Option<Kind> {
    Some(match file_type {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Dir,
        FileType::Symlink => Kind::Symlink,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        FileType::CharacterDevice => Kind::CharDevice,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::Unknown => return None,
    })
}

fn timestamp(time: StatxTimestamp) -> Timestamp {
    Timestamp { seconds: time.tv_sec, nanos: time.tv_nsec }
}

/// The metadata of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// What the entry is.
    pub kind: Kind,
    /// The 12 permission bits.
    pub mode: u32,
    /// The owning user.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last change of content or metadata; cannot be set.
    pub ctime: Timestamp,
    /// The device of the file system.
    pub dev: u64,
    /// The inode number on that device.
    pub ino: u64,
    /// The number of names.
    pub nlink: u64,
    /// The major number of a device entry.
    pub rdev_major: u32,
    /// The minor number of a device entry.
    pub rdev_minor: u32,
    /// Allocated space in units of 512 bytes.
    pub blocks_512: u64,
}

impl Meta {
    /// What an open file is now.
    pub fn of_file(file: &File) -> io::Result<Self> {
        Self::of(&statx_fd(file)?)
    }

    pub(super) fn of(stat: &Statx) -> io::Result<Self> {
        let raw = u32::from(stat.stx_mode);
        let kind = kind_of(FileType::from_raw_mode(raw))
            .ok_or_else(|| io::Error::other(format!("the entry has an unknown type ({raw:o})")))?;
        Ok(Self {
            kind,
            mode: raw & 0o7777,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            size: stat.stx_size,
            mtime: timestamp(stat.stx_mtime),
            ctime: timestamp(stat.stx_ctime),
            dev: makedev(stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            nlink: u64::from(stat.stx_nlink),
            rdev_major: stat.stx_rdev_major,
            rdev_minor: stat.stx_rdev_minor,
            blocks_512: stat.stx_blocks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::testing::fresh;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn meta_agrees_with_std() {
        let (temp, dir) = fresh();
        std::fs::write(temp.path().join("file"), [7; 5000]).unwrap();
        let ours = dir.lstat(b"file").unwrap();
        let std = std::fs::metadata(temp.path().join("file")).unwrap();
        assert_eq!(ours.kind, Kind::File);
        assert_eq!(ours.mode, std.mode() & 0o7777);
        assert_eq!((ours.uid, ours.gid), (std.uid(), std.gid()));
        assert_eq!((ours.dev, ours.ino, ours.nlink), (std.dev(), std.ino(), std.nlink()));
        assert_eq!((ours.size, ours.blocks_512), (5000, std.blocks()));
        assert_eq!(ours.mtime.seconds, std.mtime());
        assert_eq!(i64::from(ours.mtime.nanos), std.mtime_nsec());
        assert_eq!(ours.ctime.seconds, std.ctime());
    }

    #[test]
    fn timestamps_order_across_1970() {
        let before = Timestamp { seconds: -1, nanos: 999_999_999 };
        let after = Timestamp { seconds: 0, nanos: 0 };
        assert!(before < after);
        assert!(before > Timestamp { seconds: -1, nanos: 0 });
    }

    #[test]
    fn device_numbers_are_read() {
        let dev = crate::fs::Dir::open_root("/dev".as_ref()).unwrap();
        let null = dev.lstat(b"null").unwrap();
        assert_eq!(null.kind, Kind::CharDevice);
        assert_eq!((null.rdev_major, null.rdev_minor), (1, 3));
    }
}
