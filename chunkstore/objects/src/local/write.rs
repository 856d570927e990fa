//! Writing objects whole or not at all: a temporary file, synced, then given its name.

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::{LocalStore, Step, folder};
use crate::{Created, Error, ErrorKind, Result};

const TEMPORARY_PREFIX: &str = ".tmp-";

/// Slices handed to the system at once, its limit (`IOV_MAX`).
const SLICES_MAX: usize = 1024;

/// Size from which on the space of a body is reserved before writing; below, the call would cost
/// more than it saves.
const RESERVED_MIN: u64 = 1 << 20;

/// What to do about an object that has the name already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Publish {
    IfAbsent,
    Always,
}

/// What an object is made of.
pub(super) enum Body<'a> {
    Parts(&'a [IoSlice<'a>]),
    Stream(&'a mut dyn Read),
}

/// Why a write ended early.
pub(super) struct Halt {
    error: Error,
    /// The observer cut it: nothing may be cleaned up.
    cut: bool,
}

/// Result of what the observer can cut.
pub(super) type Halted<T> = std::result::Result<T, Halt>;

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self { error, cut: false }
    }
}

/// Whether a file name is one of a temporary file.
pub(super) fn is_temporary(name: &[u8]) -> bool {
    name.strip_prefix(TEMPORARY_PREFIX.as_bytes())
        .is_some_and(|hex| hex.len() == 16 && hex.iter().all(u8::is_ascii_hexdigit))
}

/// An error of writing. What vanishes underneath a writer is no missing object, and what stands in
/// the way of a folder or object makes the key unusable.
pub(super) fn error(operation: &'static str, key: &str, err: Errno) -> Error {
    let kind = match err {
        Errno::NOENT => ErrorKind::Io,
        Errno::NOTDIR | Errno::LOOP | Errno::ISDIR => ErrorKind::Invalid,
        err => return Error::from_io(operation, key, err.into()),
    };
    Error::new(kind, operation, key).because(io::Error::from(err))
}

impl LocalStore {
    /// Writes `body` as the object `key`.
    pub(super) fn write(
        &self,
        operation: &'static str,
        key: &str,
        body: &mut Body<'_>,
        publish: Publish,
    ) -> Result<Created> {
        self.try_write(operation, key, body, publish).map_err(|halt| halt.error)
    }

    fn try_write(
        &self,
        operation: &'static str,
        key: &str,
        body: &mut Body<'_>,
        publish: Publish,
    ) -> Halted<Created> {
        let (path, name) = folder::split(key);
        let folder = self.make_folder(operation, key, path)?;
        let job = Job { operation, key, name, folder: &folder };
        let created = if publish == Publish::IfAbsent && job.exists()? {
            Created::AlreadyExists
        } else {
            self.write_and_publish(&job, body, publish)?
        };
        // Also when the object was there: whoever created it may have died before this.
        self.sync_folder(operation, key, &folder)?;
        Ok(created)
    }

    fn write_and_publish(
        &self,
        job: &Job<'_>,
        body: &mut Body<'_>,
        publish: Publish,
    ) -> Halted<Created> {
        self.before(Step::CreateTemporary, job.operation, job.key)?;
        let (temporary, file) = job.create_temporary()?;
        let outcome = self.fill(job, &file, body).and_then(|()| {
            self.before(Step::Publish, job.operation, job.key)?;
            Ok(job.publish(&temporary, publish)?)
        });
        let remove = match &outcome {
            Ok(created) => *created == Created::AlreadyExists,
            Err(halt) => !halt.cut,
        };
        if remove {
            // What cannot be removed now is removed as stale later.
            let _ = rustix::fs::unlinkat(job.folder, temporary.as_str(), AtFlags::empty());
        }
        outcome
    }

    fn fill(&self, job: &Job<'_>, mut file: &File, body: &mut Body<'_>) -> Halted<()> {
        let fail = |err| Error::from_io(job.operation, job.key, err);
        self.before(Step::Write, job.operation, job.key)?;
        match body {
            Body::Parts(parts) => {
                reserve(file, parts);
                write_all(&mut file, parts).map_err(fail)?;
            }
            Body::Stream(stream) => {
                io::copy(stream, &mut file).map_err(fail)?;
            }
        }
        self.before(Step::Sync, job.operation, job.key)?;
        // Not only the data: the time of the object must survive too, and costs nothing more here.
        Ok(file.sync_all().map_err(fail)?)
    }

    /// Deletes the object `key`, if it exists.
    pub(super) fn remove(&self, key: &str) -> Result<()> {
        self.try_remove(key).map_err(|halt| halt.error)
    }

    fn try_remove(&self, key: &str) -> Halted<()> {
        const OPERATION: &str = "delete";
        let (path, name) = folder::split(key);
        let folder = match folder::open(&self.root, path) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            folder => folder.map_err(|err| error(OPERATION, key, err))?,
        };
        self.before(Step::Delete, OPERATION, key)?;
        let unlinked = rustix::fs::unlinkat(&folder, name, AtFlags::empty());
        self.handles.forget(key);
        match unlinked {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR) => return Ok(()), // a folder of keys, so no object
            Err(err) => return Err(error(OPERATION, key, err).into()),
        }
        // Also when it was gone: whoever deleted it may have died before this.
        self.sync_folder(OPERATION, key, &folder)
    }

    /// Tells the observer about a step; `Err` when it wants the operation cut there.
    #[cfg(feature = "testing")]
    pub(super) fn before(&self, step: Step, operation: &'static str, key: &str) -> Halted<()> {
        let Some(observer) = &self.observer else {
            return Ok(());
        };
        observer(step, key)
            .map_err(|err| Halt { error: Error::from_io(operation, key, err), cut: true })
    }

    #[cfg(not(feature = "testing"))]
    pub(super) fn before(&self, _: Step, _: &'static str, _: &str) -> Halted<()> {
        Ok(())
    }
}

/// One object on its way.
struct Job<'a> {
    operation: &'static str,
    key: &'a str,
    name: &'a str,
    folder: &'a OwnedFd,
}

impl Job<'_> {
    fn fail(&self, err: Errno) -> Error {
        error(self.operation, self.key, err)
    }

    /// Whether the object exists; an error when something else has its name.
    fn exists(&self) -> Result<bool> {
        let stat = match rustix::fs::statat(self.folder, self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(false),
            stat => stat.map_err(|err| self.fail(err))?,
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok(true),
            kind => Err(Error::new(ErrorKind::Invalid, self.operation, self.key)
                .because(format!("in its place is a {kind:?}, which is no object"))),
        }
    }

    fn create_temporary(&self) -> Result<(String, File)> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        loop {
            let random = getrandom::u64().map_err(|err| {
                Error::new(ErrorKind::Io, self.operation, self.key).because(err.to_string())
            })?;
            let name = format!("{TEMPORARY_PREFIX}{random:016x}");
            match rustix::fs::openat(self.folder, name.as_str(), flags, Mode::RUSR | Mode::WUSR) {
                Ok(file) => return Ok((name, File::from(file))),
                Err(Errno::EXIST | Errno::INTR) => {}
                Err(err) => return Err(self.fail(err)),
            }
        }
    }

    /// Gives the temporary file the object's name.
    fn publish(&self, temporary: &str, publish: Publish) -> Result<Created> {
        if publish == Publish::Always {
            return rustix::fs::renameat(self.folder, temporary, self.folder, self.name)
                .map(|()| Created::New)
                .map_err(|err| self.fail(err));
        }
        let flags = RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(self.folder, temporary, self.folder, self.name, flags) {
            Ok(()) => Ok(Created::New),
            Err(Errno::EXIST) => self.lost(),
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => self.publish_by_link(temporary),
            Err(err) => Err(self.fail(err)),
        }
    }

    /// The way of file systems without a rename that never replaces. A crash between the two calls
    /// leaves a second name of the file, which goes with the stale temporary files.
    fn publish_by_link(&self, temporary: &str) -> Result<Created> {
        let flags = AtFlags::empty();
        match rustix::fs::linkat(self.folder, temporary, self.folder, self.name, flags) {
            Ok(()) => {
                let _ = rustix::fs::unlinkat(self.folder, temporary, AtFlags::empty());
                Ok(Created::New)
            }
            Err(Errno::EXIST) => self.lost(),
            Err(Errno::PERM | Errno::NOTSUP | Errno::NOSYS) => {
                Err(Error::new(ErrorKind::Io, self.operation, self.key)
                    .because("the file system can neither rename without replacing nor link"))
            }
            Err(err) => Err(self.fail(err)),
        }
    }

    /// Another creator was first, unless what has the name is no object.
    fn lost(&self) -> Result<Created> {
        self.exists().map(|_| Created::AlreadyExists)
    }
}

/// Has the space for a large body allocated in one piece, which made creates of 32 MiB on ext4 about
/// a tenth faster. Where that is not possible, writing will tell.
fn reserve(file: &File, parts: &[IoSlice<'_>]) {
    let size: u64 = parts.iter().map(|part| part.len() as u64).sum();
    if size >= RESERVED_MIN {
        let _ = rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size);
    }
}

/// Writes all of `parts`, in as few calls as the system allows and without joining them.
fn write_all(file: &mut impl io::Write, parts: &[IoSlice<'_>]) -> io::Result<()> {
    for parts in parts.chunks(SLICES_MAX) {
        let mut parts = parts.to_vec(); // the slices, not what they point to
        let mut rest = parts.as_mut_slice();
        IoSlice::advance_slices(&mut rest, 0); // drops empty ones at the front
        while !rest.is_empty() {
            match file.write_vectored(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut rest, written),
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    /// Takes at most three bytes at a time, and is interrupted in between.
    #[derive(Default)]
    struct Reluctant {
        taken: Vec<u8>,
        calls: u32,
    }

    impl io::Write for Reluctant {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.write_vectored(&[IoSlice::new(buf)])
        }

        fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
            assert!(bufs.len() <= SLICES_MAX);
            self.calls += 1;
            if self.calls.is_multiple_of(5) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let before = self.taken.len();
            self.taken.extend(bufs.iter().flat_map(|buf| buf.iter()).take(3));
            Ok(self.taken.len() - before)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn partial_writes_are_continued_in_the_right_place() {
        let bytes: Vec<u8> = (0..=255).cycle().take(5000).collect();
        let mut parts: Vec<_> = bytes.chunks(2).map(IoSlice::new).collect();
        for at in [0, 0, 1, 1000, 1024, 2000] {
            parts.insert(at, IoSlice::new(&[]));
        }
        parts.push(IoSlice::new(&[]));
        let mut writer = Reluctant::default();
        write_all(&mut writer, &parts).unwrap();
        assert_eq!(writer.taken, bytes);
    }

    #[test]
    fn publishing_by_link_never_replaces_either() {
        let dir = tempfile::tempdir().unwrap();
        let folder = OwnedFd::from(File::open(dir.path()).unwrap());
        let job = Job { operation: "create", key: "a", name: "a", folder: &folder };
        for (body, expected) in [("1", Created::New), ("2", Created::AlreadyExists)] {
            let (temporary, mut file) = job.create_temporary().unwrap();
            assert!(is_temporary(temporary.as_bytes()));
            file.write_all(body.as_bytes()).unwrap();
            assert_eq!(job.publish_by_link(&temporary).unwrap(), expected);
            let left = dir.path().join(&temporary).exists();
            assert_eq!(left, expected == Created::AlreadyExists, "the caller removes it");
            assert_eq!(std::fs::read(dir.path().join("a")).unwrap(), b"1");
        }
    }

    #[test]
    fn only_our_temporaries_are_recognised() {
        assert!(is_temporary(b".tmp-0123456789abcdef"));
        for name in [".tmp-", ".tmp-0123456789abcde", ".tmp-0123456789abcdeg", "tmp", ".x"] {
            assert!(!is_temporary(name.as_bytes()), "{name}");
        }
    }
}
