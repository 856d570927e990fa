//! Reading objects: whole, with a limit, and in ranges through kept handles.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::{Errno, retry_on_intr};

use super::{LocalStore, folder};
use crate::{Error, ErrorKind, ObjectMeta, Result};

/// An error of reading. A path that leads through something that is no folder, or to something
/// that is no regular file, has no object.
pub(super) fn error(operation: &'static str, key: &str, err: Errno) -> Error {
    match err {
        Errno::NOTDIR | Errno::LOOP => Error::from_io(operation, key, Errno::NOENT.into()),
        err => Error::from_io(operation, key, err.into()),
    }
}

/// When a file was last written to.
pub(super) fn modified(stat: &Stat) -> SystemTime {
    let seconds = stat.st_mtime;
    let nanoseconds = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let whole =
        if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    whole
        .and_then(|whole| whole.checked_add(Duration::from_nanos(nanoseconds.into())))
        .unwrap_or(UNIX_EPOCH)
}

/// What a listing tells of a file, unless it is no object.
pub(super) fn meta(key: &str, stat: &Stat) -> Option<ObjectMeta> {
    (FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then(|| ObjectMeta {
        key: key.to_owned(),
        size: size(stat),
        modified: modified(stat),
    })
}

fn size(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

impl LocalStore {
    pub(super) fn read_whole(&self, key: &str, limit: u64) -> Result<Vec<u8>> {
        let fail = |err| error("read", key, err);
        let (file, stat) = self.open_object(key).map_err(fail)?;
        let size = size(&stat);
        if size > limit {
            return Err(Error::new(ErrorKind::TooLarge, "read", key)
                .because(format!("it has {size} bytes, the limit is {limit}")));
        }
        let size = usize::try_from(size).map_err(|_| fail(Errno::NOMEM))?;
        let mut body = Vec::new();
        body.try_reserve_exact(size).map_err(|_| fail(Errno::NOMEM))?;
        while body.len() < size {
            let offset = body.len() as u64;
            let got = retry_on_intr(|| {
                rustix::io::pread(&file, rustix::buffer::spare_capacity(&mut body), offset)
            });
            if got.map_err(fail)? == 0 {
                return Err(truncated(key, size as u64));
            }
        }
        body.truncate(size); // the allocator may have given more than was asked for
        Ok(body)
    }

    pub(super) fn read_range(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        let fail = |err| error("read", key, err);
        let file = match self.handles.find(key) {
            Some(file) if is_linked(&file).map_err(fail)? => file,
            _ => {
                self.handles.forget(key);
                let file = Arc::new(self.open_object(key).map_err(fail)?.0);
                self.handles.keep(key, Arc::clone(&file));
                file
            }
        };
        let end = offset.saturating_add(buf.len() as u64);
        let truncated = || truncated(key, end);
        if !buf.is_empty() && i64::try_from(end).is_err() {
            return Err(truncated()); // no file is that long
        }
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            match retry_on_intr(|| rustix::io::pread(&file, &mut *rest, at)).map_err(fail)? {
                0 => return Err(truncated()),
                got => {
                    at += got as u64;
                    rest = rest.get_mut(got..).unwrap_or_default();
                }
            }
        }
        Ok(())
    }

    fn open_object(&self, key: &str) -> rustix::io::Result<(File, Stat)> {
        let (folder, name) = folder::split(key);
        let folder = folder::open(&self.root, folder)?;
        // NONBLOCK, for opening a fifo would wait for a writer; it means nothing to regular files.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(folder, name, flags, Mode::empty())?);
        let stat = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Errno::NOENT);
        }
        Ok((file, stat))
    }
}

/// Whether the file still has a name: another process may have deleted or replaced the object.
fn is_linked(file: impl AsFd) -> rustix::io::Result<bool> {
    match rustix::fs::fstat(file) {
        Err(Errno::STALE) => Ok(false), // how a network file system tells it
        stat => Ok(stat?.st_nlink > 0),
    }
}

fn truncated(key: &str, wanted: u64) -> Error {
    Error::new(ErrorKind::Truncated, "read", key).because(format!("it ends before byte {wanted}"))
}
