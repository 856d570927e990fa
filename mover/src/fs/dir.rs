//! An open directory, and everything done to the names in it.
//!
//! Invariants: a name is checked before every call (never empty, `.`, `..`, nor with `/` or NUL); no
//! call follows a symlink in the last component; every descriptor is close-on-exec. Names up to
//! 255 bytes are passed to the kernel from the stack (rustix), longer ones (some FUSE file
//! systems have them) cost an allocation.
//!
//! Who owns the tree can still exchange one entry for another of their own between two calls:
//! callers compare the [`Meta`] of what they opened, never that of the name they saw.

use super::meta::{Kind, Meta};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, RenameFlags, Statx, StatxAttributes, StatxFlags,
};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longer than the 45 seconds after which the system takes a lease away (`fs.lease-break-time`).
const LEASE_WAIT: Duration = Duration::from_secs(60);
const LEASE_LOOK: Duration = Duration::from_millis(20);

const READ_DIR: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// An open directory; clones share the descriptor.
#[derive(Clone, Debug)]
pub struct Dir(Arc<OwnedFd>);

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Dir {
    /// Opens the directory at `path`, following symlinks: the one place where a path is trusted.
    pub fn open_root(path: &Path) -> io::Result<Self> {
        open_quietly(CWD, path, READ_DIR).map(Self::of)
    }

    /// Opens the sub-directory `name`.
    pub fn open_dir(&self, name: &[u8]) -> io::Result<Self> {
        open_quietly(self, checked(name)?, READ_DIR | OFlags::NOFOLLOW).map(Self::of)
    }

    /// Opens the directory above, which must be the one with `expect_dev` and `expect_ino`.
    ///
    /// # Errors
    /// When this directory was moved elsewhere meanwhile, so that `..` leads somewhere else.
    pub fn reopen_parent(&self, expect_dev: u64, expect_ino: u64) -> io::Result<Self> {
        let parent = open_quietly(self, c"..", READ_DIR | OFlags::NOFOLLOW).map(Self::of)?;
        let meta = parent.stat()?;
        if (meta.dev, meta.ino) == (expect_dev, expect_ino) {
            Ok(parent)
        } else {
            Err(io::Error::other("the directory was moved meanwhile: its parent is another one"))
        }
    }

    /// Opens the directory above; `None` where there is none.
    pub fn open_above(&self) -> io::Result<Option<Self>> {
        let above = open_quietly(self, c"..", READ_DIR | OFlags::NOFOLLOW).map(Self::of)?;
        let (meta, own) = (above.stat()?, self.stat()?);
        Ok(((meta.dev, meta.ino) != (own.dev, own.ino)).then_some(above))
    }

    /// Opens this directory once more, with a read position of its own.
    pub(super) fn reopen(&self) -> io::Result<OwnedFd> {
        open_quietly(self, c".", READ_DIR | OFlags::NOFOLLOW)
    }

    /// Describes the directory itself.
    pub fn stat(&self) -> io::Result<Meta> {
        Meta::of(&statx_fd(self)?)
    }

    /// Describes the directory itself, and tells whether another file system begins with it: a mounted one, a bind
    /// mount too, or one that a device number of its own sets apart from `dev_above`.
    pub fn stat_mounted(&self, dev_above: u64) -> io::Result<(Meta, bool)> {
        let stat = statx_fd(self)?;
        let meta = Meta::of(&stat)?;
        let mounted = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        Ok((meta, mounted || meta.dev != dev_above))
    }

    /// Opens the sub-directory `name`, after making it accessible if it is a closed one of our own.
    pub fn open_closed_dir(&self, name: &[u8]) -> io::Result<Self> {
        match self.open_dir(name) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                super::attrs::widen_dir(self, name)?;
                self.open_dir(name)
            }
            opened => opened,
        }
    }

    /// Lets the owner read, write and enter the directory itself, if it is his own and he may not yet.
    /// `meta` describes it.
    pub fn widen(&self, meta: &Meta) -> io::Result<()> {
        if meta.mode & 0o700 != 0o700 && meta.uid == rustix::process::geteuid().as_raw() {
            rustix::fs::fchmod(self, Mode::from_raw_mode(meta.mode | 0o700))?;
        }
        Ok(())
    }

    /// The name by which the directory lists the entry that it finds as `name`: another one where the file system
    /// folds case or normalises names. `None` when no name is found for it.
    pub fn listed_name(&self, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let ino = self.lstat(name)?.ino;
        let mut buffer = Vec::with_capacity(32 << 10);
        let mut entries = RawDir::new(self.reopen()?, buffer.spare_capacity_mut());
        let mut other = None;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let listed = entry.file_name().to_bytes();
            if listed == name {
                return Ok(Some(name.to_vec()));
            }
            let folded = |name: &[u8]| String::from_utf8_lossy(name).to_lowercase();
            if entry.ino() == ino || folded(listed) == folded(name) {
                other = Some(listed.to_vec());
            }
        }
        Ok(other)
    }

    /// Whether the file system was told to fold case in this directory.
    pub fn has_case_folding_flag(&self) -> bool {
        // FS_CASEFOLD_FL of linux/fs.h. File systems without flags answer with an error.
        rustix::fs::ioctl_getflags(self).is_ok_and(|flags| flags.bits() & 0x4000_0000 != 0)
    }

    /// Describes the entry `name`, a symlink itself rather than its target.
    pub fn lstat(&self, name: &[u8]) -> io::Result<Meta> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        Meta::of(&rustix::fs::statx(self, checked(name)?, flags, StatxFlags::BASIC_STATS)?)
    }

    /// Opens the regular file `name` for reading and describes what was opened. Waits while somebody has a
    /// lease on it, as a file server for its clients, until the system takes that away.
    ///
    /// # Errors
    /// When the name is not a regular file (any more); a FIFO does not make it wait.
    pub fn open_file(&self, name: &[u8]) -> io::Result<(File, Meta)> {
        let flags =
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let begun = Instant::now();
        let file = loop {
            match open_quietly(self, checked(name)?, flags) {
                // To have asked is what makes the holder give it back. The call could wait by itself, but
                // would then wait for a FIFO that took the name, too, and for ever.
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock
                        && begun.elapsed() < LEASE_WAIT =>
                {
                    std::thread::sleep(LEASE_LOOK);
                }
                opened => break File::from(opened?),
            }
        };
        let meta = Meta::of(&statx_fd(&file)?)?;
        if meta.kind == Kind::File {
            Ok((file, meta))
        } else {
            Err(io::Error::other(format!("not a regular file any more but a {:?}", meta.kind)))
        }
    }

    /// Reads the target of the symlink `name`.
    pub fn read_link(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        Ok(rustix::fs::readlinkat(self, checked(name)?, Vec::new())?.into_bytes())
    }

    /// Creates the directory `name` with mode 0700 and opens it.
    pub fn make_dir(&self, name: &[u8]) -> io::Result<Self> {
        rustix::fs::mkdirat(self, checked(name)?, Mode::RWXU)?;
        self.open_dir(name)
    }

    /// Creates the file `name` with mode 0600 for writing; it must not exist.
    pub fn create_file(&self, name: &[u8]) -> io::Result<File> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        Ok(rustix::fs::openat(self, checked(name)?, flags, mode)?.into())
    }

    /// Creates the symlink `name` to `target`, which may be any bytes but NUL.
    pub fn make_symlink(&self, name: &[u8], target: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(target, self, checked(name)?)?)
    }

    /// Creates the FIFO, socket or device `name` with mode 0600; `major` and `minor` are for devices.
    pub fn make_node(&self, name: &[u8], kind: Kind, major: u32, minor: u32) -> io::Result<()> {
        let (file_type, dev) = match kind {
            Kind::Fifo => (FileType::Fifo, 0),
            Kind::Socket => (FileType::Socket, 0),
            Kind::CharDevice => (FileType::CharacterDevice, rustix::fs::makedev(major, minor)),
            Kind::BlockDevice => (FileType::BlockDevice, rustix::fs::makedev(major, minor)),
            Kind::File | Kind::Dir | Kind::Symlink => return Err(Errno::INVAL.into()),
        };
        let mode = Mode::RUSR | Mode::WUSR;
        Ok(rustix::fs::mknodat(self, checked(name)?, file_type, mode, dev)?)
    }

    /// Gives the entry `name` the further name `new_name` in `to`; a symlink itself is linked.
    pub fn link(&self, name: &[u8], to: &Self, new_name: &[u8]) -> io::Result<()> {
        let (name, new_name) = (checked(name)?, checked(new_name)?);
        Ok(rustix::fs::linkat(self, name, to, new_name, AtFlags::empty())?)
    }

    /// Renames the entry `name` to `new_name` in `to`, replacing what is there.
    pub fn rename(&self, name: &[u8], to: &Self, new_name: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::renameat(self, checked(name)?, to, checked(new_name)?)?)
    }

    /// As [`rename`](Self::rename), where `new_name` must not exist; `AlreadyExists` otherwise.
    pub fn rename_new(&self, name: &[u8], to: &Self, new_name: &[u8]) -> io::Result<()> {
        let (name, new_name) = (checked(name)?, checked(new_name)?);
        match rustix::fs::renameat_with(self, name, to, new_name, RenameFlags::NOREPLACE) {
            // Not every file system can; between the two calls nothing but a race can come.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => match to.lstat(new_name) {
                Ok(_) => Err(Errno::EXIST.into()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.rename(name, to, new_name)
                }
                Err(error) => Err(error),
            },
            done => Ok(done?),
        }
    }

    /// Exchanges two entries.
    pub fn exchange(&self, name: &[u8], to: &Self, other: &[u8]) -> io::Result<()> {
        let (name, other) = (checked(name)?, checked(other)?);
        Ok(rustix::fs::renameat_with(self, name, to, other, RenameFlags::EXCHANGE)?)
    }

    /// Removes the name of anything but a directory.
    pub fn unlink(&self, name: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(self, checked(name)?, AtFlags::empty())?)
    }

    /// Removes the empty directory `name`.
    pub fn remove_dir(&self, name: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(self, checked(name)?, AtFlags::REMOVEDIR)?)
    }

    fn of(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }
}

/// A name that may be made: one component of at most 255 bytes, and no way out of its folder.
pub fn is_plain_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..")
        && name.len() <= 255
        && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
}

/// Lets only plain names through; NUL bytes are refused by rustix.
pub(super) fn checked(name: &[u8]) -> io::Result<&[u8]> {
    if matches!(name, b"" | b"." | b"..") || name.contains(&b'/') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file name"));
    }
    Ok(name)
}

pub(super) fn statx_fd(fd: impl AsFd) -> io::Result<Statx> {
    Ok(rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?)
}

/// Opens without touching the access time where we may: only the owner and root can ask for that.
fn open_quietly<P: rustix::path::Arg + Copy>(
    at: impl AsFd,
    path: P,
    flags: OFlags,
) -> io::Result<OwnedFd> {
    match rustix::fs::openat(&at, path, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => Ok(rustix::fs::openat(&at, path, flags, Mode::empty())?),
        opened => Ok(opened?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::testing::{fresh, is_root};
    use std::io::{Read, Write};
    use std::os::unix::fs::symlink;

    #[test]
    fn weird_names_make_the_round_trip() {
        let (_temp, dir) = fresh();
        let longest = [b'n'; 255];
        let names: [&[u8]; 6] = [b"\xff\xfe", b"new\nline", b" ", b"...", b"-rf", &longest];
        for name in names {
            dir.create_file(name).unwrap().write_all(name).unwrap();
            let (mut file, meta) = dir.open_file(name).unwrap();
            let mut content = Vec::new();
            file.read_to_end(&mut content).unwrap();
            assert_eq!(content, name);
            assert_eq!((meta, meta.mode), (dir.lstat(name).unwrap(), 0o600));
            dir.unlink(name).unwrap();
        }
        assert_eq!(
            dir.create_file(&[b'n'; 256]).unwrap_err().raw_os_error(),
            Some(Errno::NAMETOOLONG.raw_os_error())
        );
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let (_temp, dir) = fresh();
        for name in [&b""[..], b".", b"..", b"/", b"a/b", b"../x", b"a\0b"] {
            let kind = io::ErrorKind::InvalidInput;
            assert_eq!(dir.lstat(name).unwrap_err().kind(), kind, "{name:?}");
            assert_eq!(dir.open_dir(name).unwrap_err().kind(), kind);
            assert_eq!(dir.open_file(name).unwrap_err().kind(), kind);
            assert_eq!(dir.make_dir(name).unwrap_err().kind(), kind);
            assert_eq!(dir.make_symlink(name, b"t").unwrap_err().kind(), kind);
            assert_eq!(dir.rename(b"a", &dir, name).unwrap_err().kind(), kind);
            assert_eq!(dir.link(b"a", &dir, name).unwrap_err().kind(), kind);
            assert_eq!(dir.remove_tree(name).unwrap_err().kind(), kind);
        }
    }

    #[test]
    fn swapped_symlinks_are_not_followed() {
        let (temp, dir) = fresh();
        symlink("/etc", temp.path().join("dir")).unwrap();
        symlink("/etc/passwd", temp.path().join("file")).unwrap();
        dir.open_dir(b"dir").unwrap_err();
        dir.open_file(b"file").unwrap_err();
        dir.create_file(b"file").unwrap_err();
        assert_eq!(dir.lstat(b"file").unwrap().kind, Kind::Symlink);
        assert_eq!(dir.read_link(b"file").unwrap(), b"/etc/passwd");
        dir.link(b"file", &dir, b"again").unwrap();
        assert_eq!(dir.lstat(b"again").unwrap().kind, Kind::Symlink);
    }

    #[test]
    fn file_swapped_for_a_fifo_is_refused_without_waiting() {
        let (_temp, dir) = fresh();
        dir.make_node(b"fifo", Kind::Fifo, 0, 0).unwrap();
        let error = dir.open_file(b"fifo").unwrap_err();
        assert_eq!(error.to_string(), "not a regular file any more but a Fifo");
    }

    #[test]
    fn nodes_are_created_with_their_numbers() {
        let (_temp, dir) = fresh();
        let mut nodes = vec![(Kind::Fifo, 0, 0), (Kind::Socket, 0, 0)];
        if is_root("the creation of devices") {
            nodes.extend([(Kind::CharDevice, 1, 3), (Kind::BlockDevice, 4095, 1_048_575)]);
        }
        for (kind, major, minor) in nodes {
            dir.make_node(b"node", kind, major, minor).unwrap();
            let meta = dir.lstat(b"node").unwrap();
            assert_eq!((meta.kind, meta.mode), (kind, 0o600));
            assert_eq!((meta.rdev_major, meta.rdev_minor), (major, minor));
            dir.unlink(b"node").unwrap();
        }
        dir.make_node(b"node", Kind::File, 0, 0).unwrap_err();
    }

    #[test]
    fn parent_is_reopened_only_when_it_is_the_expected_one() {
        let (_temp, dir) = fresh();
        let inner = dir.make_dir(b"one").unwrap().make_dir(b"inner").unwrap();
        let other = dir.make_dir(b"other").unwrap();
        let one = dir.lstat(b"one").unwrap();
        assert_eq!(inner.reopen_parent(one.dev, one.ino).unwrap().stat().unwrap().ino, one.ino);
        dir.open_dir(b"one").unwrap().rename(b"inner", &other, b"inner").unwrap();
        inner.reopen_parent(one.dev, one.ino).unwrap_err();
    }

    #[test]
    fn long_link_targets_are_read_whole() {
        let (_temp, dir) = fresh();
        let target = [b't'; 4000];
        dir.make_symlink(b"link", &target).unwrap();
        assert_eq!(dir.read_link(b"link").unwrap(), target);
        dir.make_symlink(b"link", b"x").unwrap_err();
    }
}
