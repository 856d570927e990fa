//! A file system of the tests that fails as it is told: a real mount (FUSE), so that what is tested
//! meets the kernel's errors where they come from.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry,
    ReplyOpen, ReplyXattr, Request,
};
use tempfile::TempDir;

use super::not_tested;

/// What goes wrong with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It cannot be opened.
    Open(i32),
    /// From this byte on it cannot be read.
    Read(u64, i32),
    /// When its first byte is read, it becomes so short.
    Shrink(u64),
    /// When its first byte is read, it grows by so much.
    Grow(u64),
    /// When its first byte is read, its modification time moves.
    Touch,
    /// Its extended attributes cannot be read.
    Xattrs(i32),
    /// As a folder: its names cannot be read. As a link: its target cannot.
    List(i32),
}

/// What a name stands for.
#[derive(Debug, Clone)]
pub struct Item {
    pub kind: FileType,
    pub content: Vec<u8>,
    /// The size that is told.
    pub size: u64,
    /// Modification time, in seconds.
    pub mtime: u64,
    pub fault: Option<Fault>,
}

impl Item {
    pub fn file(content: Vec<u8>) -> Self {
        let size = content.len() as u64;
        Self { kind: FileType::RegularFile, content, size, mtime: 1_600_000_000, fault: None }
    }

    pub fn of_kind(kind: FileType) -> Self {
        Self { kind, ..Self::file(Vec::new()) }
    }

    pub fn with(self, fault: Fault) -> Self {
        Self { fault: Some(fault), ..self }
    }

    fn attr(&self, ino: u64) -> FileAttr {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(self.mtime);
        FileAttr {
            ino: INodeNo(ino),
            size: self.size,
            blocks: self.size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: self.kind,
            perm: if self.kind == FileType::Directory { 0o755 } else { 0o644 },
            nlink: 1,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

type Items = Arc<Mutex<BTreeMap<String, Item>>>;

/// The mounted file system: one folder of items. Unmounted when dropped.
pub struct FaultFs {
    session: Option<BackgroundSession>,
    at: TempDir,
    items: Items,
}

impl FaultFs {
    /// Mounts it; `None`, said loudly, where nothing can be mounted.
    pub fn mount(items: impl IntoIterator<Item = (&'static str, Item)>) -> Option<Self> {
        let items = items.into_iter().map(|(name, item)| (name.to_owned(), item)).collect();
        let items: Items = Arc::new(Mutex::new(items));
        let at = tempfile::tempdir().unwrap();
        match fuser::spawn_mount(Faulty(items.clone()), at.path(), &Config::default()) {
            Ok(session) => Some(Self { session: Some(session), at, items }),
            Err(error) => {
                not_tested(&format!("FUSE: nothing can be mounted ({error})"));
                None
            }
        }
    }

    pub fn path(&self) -> &Path {
        self.at.path()
    }

    /// Changes an item.
    pub fn change(&self, name: &str, change: impl FnOnce(&mut Item)) {
        change(self.items.lock().unwrap().get_mut(name).unwrap());
    }
}

impl Drop for FaultFs {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            session.umount_and_join().unwrap();
        }
    }
}

struct Faulty(Items);

/// Nothing is cached: what is told is what holds now.
const TTL: Duration = Duration::ZERO;

impl Faulty {
    /// The item with this number: its place in order, from 2 on. The folder itself is 1.
    fn with<T>(&self, ino: INodeNo, look: impl FnOnce(&mut Item) -> T) -> Option<T> {
        let mut items = self.0.lock().unwrap();
        let at = u64::from(ino).checked_sub(2)?;
        items.values_mut().nth(at as usize).map(look)
    }
}

fn errno(number: i32) -> Errno {
    Errno::from_i32(number)
}

impl Filesystem for Faulty {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let items = self.0.lock().unwrap();
        let found = items.iter().position(|(known, _)| known.as_bytes() == name.as_bytes());
        match found.filter(|_| parent == INodeNo::ROOT) {
            Some(at) => {
                let ino = at as u64 + 2;
                reply.entry(&TTL, &items.values().nth(at).unwrap().attr(ino), Generation(0));
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if ino == INodeNo::ROOT {
            return reply.attr(&TTL, &Item::of_kind(FileType::Directory).attr(1));
        }
        match self.with(ino, |item| item.attr(ino.into())) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.with(ino, |item| item.fault) {
            Some(Some(Fault::Open(number))) => reply.error(errno(number)),
            // Past the cache, so that each read comes here.
            _ => reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let bytes = self.with(ino, |item| {
            let len = item.content.len() as u64;
            match item.fault {
                Some(Fault::Read(from, number)) if offset + u64::from(size) > from => {
                    if offset >= from {
                        return Err(number);
                    }
                    return Ok(item.content[offset as usize..from as usize].to_vec());
                }
                Some(Fault::Shrink(to)) => {
                    item.content.truncate(to as usize);
                    item.size = to;
                }
                Some(Fault::Grow(by)) if item.size == len => item.size += by,
                Some(Fault::Touch) if offset == 0 => item.mtime += 1,
                _ => {}
            }
            let end = (offset + u64::from(size)).min(item.content.len() as u64);
            Ok(item.content.get(offset as usize..end as usize).unwrap_or_default().to_vec())
        });
        match bytes {
            Some(Ok(bytes)) => reply.data(&bytes),
            Some(Err(number)) => reply.error(errno(number)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.with(ino, |item| item.fault) {
            Some(Some(Fault::Open(number))) => reply.error(errno(number)),
            _ => reply.opened(FileHandle(0), FopenFlags::empty()),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if let Some(Some(Fault::List(number))) = self.with(ino, |item| item.fault) {
            return reply.error(errno(number));
        }
        let mut names = vec![(ino, FileType::Directory, ".".to_owned())];
        if ino == INodeNo::ROOT {
            let items = self.0.lock().unwrap();
            let items = items.iter().zip(2..);
            names.extend(items.map(|((name, item), ino)| (INodeNo(ino), item.kind, name.clone())));
        }
        for (at, (ino, kind, name)) in names.into_iter().enumerate().skip(offset as usize) {
            if reply.add(ino, at as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.with(ino, |item| (item.fault, item.content.clone())) {
            Some((Some(Fault::List(number)), _)) => reply.error(errno(number)),
            Some((_, target)) => reply.data(&target),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match self.with(ino, |item| item.fault) {
            Some(Some(Fault::Xattrs(number))) => reply.error(errno(number)),
            _ if size == 0 => reply.size(0),
            _ => reply.data(&[]),
        }
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(errno(libc::ENODATA));
    }
}
