//! Extended attributes, of open files and of names that must not be opened.
//!
//! Symlinks, devices, FIFOs and sockets are reached as `/proc/self/fd/<directory>/<name>` with the
//! calls that do not follow the last component. File systems without extended attributes simply have none.

use super::attrs::is_acl;
use super::dir::{Dir, checked};
use super::proc::by_path;
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// What is tried on the stack first.
const SMALL_BYTES: usize = 1024;
/// Neither a list nor a value can be longer on Linux.
const LONGEST_BYTES: usize = 64 << 10;

/// The extended attributes of one entry.
#[derive(Debug, Default)]
pub struct Xattrs {
    /// Names and values, sorted by name.
    pub entries: Vec<(Vec<u8>, Vec<u8>)>,
    /// Names that were listed but could not be read, with `ENODATA` when they vanished meanwhile.
    pub failures: Vec<(Vec<u8>, io::Error)>,
}

/// Reads the extended attributes of an open file: one system call when it has none.
pub fn file_xattrs(file: &File) -> io::Result<Xattrs> {
    read_all(&Place::Open(file.as_fd()))
}

/// Sets an extended attribute of an open file.
pub fn set_file_xattr(file: &File, attr: &[u8], value: &[u8]) -> io::Result<()> {
    Place::Open(file.as_fd()).set(attr, value)
}

impl Dir {
    /// Reads the extended attributes of the directory itself.
    pub fn own_xattrs(&self) -> io::Result<Xattrs> {
        read_all(&Place::Open(self.as_fd()))
    }

    /// Removes the access control lists that the directory got from the one above, and lets nobody else in.
    ///
    /// # Errors
    /// Those of the system.
    pub fn strip(&self) -> io::Result<()> {
        let names = list(|buffer| rustix::fs::flistxattr(self, buffer))?;
        let acls: Vec<_> = names.into_iter().filter(|name| is_acl(name)).collect();
        for name in &acls {
            rustix::fs::fremovexattr(self, name.as_slice())?;
        }
        if !acls.is_empty() {
            rustix::fs::fchmod(self, rustix::fs::Mode::RWXU)?;
        }
        Ok(())
    }

    /// Reads the extended attributes of the entry `name` without opening or following it.
    pub fn xattrs(&self, name: &[u8]) -> io::Result<Xattrs> {
        read_all(&self.place_of(name)?)
    }

    /// Sets an extended attribute of the directory itself.
    pub fn set_own_xattr(&self, attr: &[u8], value: &[u8]) -> io::Result<()> {
        Place::Open(self.as_fd()).set(attr, value)
    }

    /// Sets an extended attribute of the entry `name` without opening or following it.
    pub fn set_xattr(&self, name: &[u8], attr: &[u8], value: &[u8]) -> io::Result<()> {
        self.place_of(name)?.set(attr, value)
    }

    fn place_of(&self, name: &[u8]) -> io::Result<Place<'_>> {
        Ok(Place::Name(self.as_fd(), [b"/", checked(name)?].concat()))
    }
}

enum Place<'a> {
    Open(BorrowedFd<'a>),
    /// In this directory, after a slash; not followed.
    Name(BorrowedFd<'a>, Vec<u8>),
}

/// What [`read_all`] reads; tests put in their own.
trait Source {
    fn list(&self, buffer: &mut [u8]) -> rustix::io::Result<usize>;
    fn get(&self, attr: &[u8], buffer: &mut [u8]) -> rustix::io::Result<usize>;
}

impl Source for Place<'_> {
    fn list(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Self::Open(fd) => rustix::fs::flistxattr(fd, buffer),
            Self::Name(dir, name) => {
                by_path(*dir, name, |path| rustix::fs::llistxattr(path, buffer))
            }
        }
    }

    fn get(&self, attr: &[u8], buffer: &mut [u8]) -> rustix::io::Result<usize> {
        match self {
            Self::Open(fd) => rustix::fs::fgetxattr(fd, attr, buffer),
            Self::Name(dir, name) => {
                by_path(*dir, name, |path| rustix::fs::lgetxattr(path, attr, buffer))
            }
        }
    }
}

impl Place<'_> {
    fn set(&self, attr: &[u8], value: &[u8]) -> io::Result<()> {
        let flags = XattrFlags::empty();
        match self {
            Self::Open(fd) => rustix::fs::fsetxattr(fd, attr, value, flags)?,
            Self::Name(dir, name) => {
                by_path(*dir, name, |path| rustix::fs::lsetxattr(path, attr, value, flags))?;
            }
        }
        Ok(())
    }
}

fn read_all(place: &impl Source) -> io::Result<Xattrs> {
    let mut xattrs = Xattrs::default();
    for name in list(|buffer| place.list(buffer))? {
        match read_whole(|buffer| place.get(&name, buffer)) {
            Ok(value) => xattrs.entries.push((name, value)),
            Err(error) => xattrs.failures.push((name, error.into())),
        }
    }
    xattrs.entries.sort_unstable();
    Ok(xattrs)
}

/// The names that `read` lists; none where the file system has no extended attributes.
pub(super) fn list(
    read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
) -> io::Result<Vec<Vec<u8>>> {
    let names = match read_whole(read) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        names => names?,
    };
    let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(<[u8]>::to_vec).collect())
}

/// Calls `read` with a small buffer, then with one nothing can outgrow.
fn read_whole(
    read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<Vec<u8>> {
    let mut small = [0; SMALL_BYTES];
    match read(&mut small) {
        Err(Errno::RANGE) => {}
        read => return Ok(small[..read?].to_vec()),
    }
    let mut large = vec![0; LONGEST_BYTES];
    let len = read(&mut large)?;
    large.truncate(len);
    large.shrink_to_fit();
    Ok(large)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::meta::Kind;
    use crate::fs::testing::{fresh, is_root, say_loudly};

    fn entry(name: &[u8], value: &[u8]) -> (Vec<u8>, Vec<u8>) {
        (name.to_vec(), value.to_vec())
    }

    /// Whether the temporary directory's file system has `user.*` attributes.
    fn supported(file: &File) -> bool {
        let supported = set_file_xattr(file, b"user.probe", b"").is_ok();
        if !supported {
            say_loudly("NO user.* ATTRIBUTES HERE: THEY ARE NOT TESTED");
        }
        supported
    }

    #[test]
    fn attributes_make_the_round_trip_sorted() {
        let (_temp, dir) = fresh();
        let file = dir.create_file(b"f").unwrap();
        assert!(file_xattrs(&file).unwrap().entries.is_empty());
        if !supported(&file) {
            return;
        }
        let long = vec![7; 3000];
        set_file_xattr(&file, b"user.z", &long).unwrap();
        dir.set_xattr(b"f", b"user.\xff\n", b"\0\x01").unwrap();
        let expected =
            [entry(b"user.probe", b""), entry(b"user.z", &long), entry(b"user.\xff\n", b"\0\x01")];
        for found in [file_xattrs(&file).unwrap(), dir.xattrs(b"f").unwrap()] {
            assert_eq!(found.entries, expected);
            assert!(found.failures.is_empty());
        }
        dir.set_own_xattr(b"user.dir", b"d").unwrap();
        assert_eq!(dir.own_xattrs().unwrap().entries, [entry(b"user.dir", b"d")]);
    }

    #[test]
    fn lists_beyond_the_small_buffer_are_read_whole() {
        let (_temp, dir) = fresh();
        let file = dir.create_file(b"f").unwrap();
        if !supported(&file) {
            return;
        }
        for number in 0..30 {
            set_file_xattr(&file, format!("user.{number:0>90}").as_bytes(), b"v").unwrap();
        }
        assert_eq!(file_xattrs(&file).unwrap().entries.len(), 31);
    }

    #[test]
    fn links_and_nodes_are_reached_without_following() {
        let (_temp, dir) = fresh();
        let file = dir.create_file(b"target").unwrap();
        dir.make_symlink(b"link", b"target").unwrap();
        dir.make_node(b"fifo", Kind::Fifo, 0, 0).unwrap();
        if !is_root("attributes of symlinks and FIFOs") || !supported(&file) {
            return;
        }
        for name in [&b"link"[..], b"fifo"] {
            dir.set_xattr(name, b"trusted.t", name).unwrap();
            assert_eq!(dir.xattrs(name).unwrap().entries, [entry(b"trusted.t", name)]);
            dir.set_xattr(name, b"user.u", b"").unwrap_err(); // for files and directories only
        }
        assert_eq!(file_xattrs(&file).unwrap().entries, [entry(b"user.probe", b"")]);
    }

    #[test]
    fn vanished_values_are_reported_and_unsupported_lists_are_empty() {
        struct Vanishing;
        impl Source for Vanishing {
            fn list(&self, buffer: &mut [u8]) -> rustix::io::Result<usize> {
                buffer[..12].copy_from_slice(b"user.b\0user.");
                buffer[12..14].copy_from_slice(b"a\0");
                Ok(14)
            }
            fn get(&self, attr: &[u8], buffer: &mut [u8]) -> rustix::io::Result<usize> {
                if attr == b"user.a" {
                    return Err(Errno::NODATA);
                }
                buffer[0] = 9;
                Ok(1)
            }
        }
        struct Unsupported(Errno);
        impl Source for Unsupported {
            fn list(&self, _: &mut [u8]) -> rustix::io::Result<usize> {
                Err(self.0)
            }
            fn get(&self, _: &[u8], _: &mut [u8]) -> rustix::io::Result<usize> {
                Err(self.0)
            }
        }
        let found = read_all(&Vanishing).unwrap();
        assert_eq!(found.entries, [entry(b"user.b", &[9])]);
        assert_eq!(found.failures.len(), 1);
        assert_eq!(found.failures[0].0, b"user.a");
        assert!(read_all(&Unsupported(Errno::OPNOTSUPP)).unwrap().entries.is_empty());
        read_all(&Unsupported(Errno::IO)).unwrap_err();
    }
}
