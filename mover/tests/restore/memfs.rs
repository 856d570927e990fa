//! A file system in memory that takes writes, folds names if told, and fails one call if told: a real
//! mount (FUSE). It has no extended attributes, as that of a bucket.

use std::ffi::OsStr;
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};
use tempfile::TempDir;

use super::model::*;

/// A kind of call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Create,
    Write,
    MakeDir,
    Symlink,
    Rename,
    SetAttr,
    List,
    Lookup,
}

impl Call {
    pub(crate) const ALL: [Self; 8] = [
        Self::Create,
        Self::Write,
        Self::MakeDir,
        Self::Symlink,
        Self::Rename,
        Self::SetAttr,
        Self::List,
        Self::Lookup,
    ];
}

/// How it behaves.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Manner {
    /// It takes names that differ in case only for the same.
    pub(crate) folds: bool,
    /// The call that fails, after so many others of its kind.
    pub(crate) fails: Option<(Call, u64, i32)>,
}

struct Inode {
    attr: FileAttr,
    content: Vec<u8>,
    /// By the name as it is compared.
    names: BTreeMap<Vec<u8>, (Vec<u8>, u64)>,
}

struct State {
    inodes: BTreeMap<u64, Inode>,
    manner: Manner,
    calls: u64,
    failed: bool,
}

/// Mounted, until it is dropped.
pub(crate) struct MemFs {
    session: Option<BackgroundSession>,
    at: TempDir,
    state: Arc<Mutex<State>>,
}

impl MemFs {
    /// `None`, said loudly, where nothing can be mounted.
    pub(crate) fn mount(folds: bool) -> Option<Self> {
        let manner = Manner { folds, fails: None };
        let root = (1, State::inode(1, FileType::Directory, 0o755));
        let inodes = BTreeMap::from([root]);
        let state = Arc::new(Mutex::new(State { inodes, manner, calls: 0, failed: false }));
        let at = tempfile::tempdir().unwrap();
        match fuser::spawn_mount(Served(state.clone()), at.path(), &Config::default()) {
            Ok(session) => Some(Self { session: Some(session), at, state }),
            Err(error) => {
                use std::io::Write;
                let line =
                    format!("\n******** NOT TESTED: FUSE cannot be mounted ({error}) ********\n");
                std::io::stderr().write_all(line.as_bytes()).unwrap();
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.at.path()
    }

    /// Makes one call fail from now on.
    pub(crate) fn fail(&self, call: Call, after: u64, errno: i32) {
        let mut state = self.state.lock().unwrap();
        state.manner.fails = Some((call, after, errno));
        (state.calls, state.failed) = (0, false);
    }

    /// Whether it failed; nothing fails any more.
    pub(crate) fn mend(&self) -> bool {
        let mut state = self.state.lock().unwrap();
        state.manner.fails = None;
        state.failed
    }
}

impl Drop for MemFs {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            session.umount_and_join().unwrap();
        }
    }
}

/// When everything is made; each change is a step later.
const MADE: SystemTime = SystemTime::UNIX_EPOCH;
const STEP: Duration = Duration::from_millis(1);

type Answer<T> = Result<T, Errno>;

impl State {
    fn inode(ino: u64, kind: FileType, perm: u16) -> Inode {
        let now = MADE;
        let attr = FileAttr {
            ino: INodeNo(ino),
            size: 0,
            blocks: 0,
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            kind,
            perm,
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        };
        Inode { attr, content: Vec::new(), names: BTreeMap::new() }
    }

    /// Counts the call, and fails it if it is the one.
    fn call(&mut self, call: Call) -> Answer<()> {
        let Some((_, after, errno)) = self.manner.fails.filter(|(fails, ..)| *fails == call) else {
            return Ok(());
        };
        self.calls += 1;
        if self.calls == after + 1 {
            self.failed = true;
            return Err(Errno::from_i32(errno));
        }
        Ok(())
    }

    fn of(&mut self, ino: INodeNo) -> Answer<&mut Inode> {
        self.inodes.get_mut(&u64::from(ino)).ok_or(Errno::ENOENT)
    }

    fn folded(&self, name: &OsStr) -> Vec<u8> {
        let name = name.as_bytes();
        if self.manner.folds { name.to_ascii_lowercase() } else { name.to_vec() }
    }

    fn find(&mut self, parent: INodeNo, name: &OsStr) -> Answer<FileAttr> {
        let key = self.folded(name);
        let (_, ino) = self.of(parent)?.names.get(&key).ok_or(Errno::ENOENT)?;
        let ino = INodeNo(*ino);
        Ok(self.of(ino)?.attr)
    }

    fn make(
        &mut self,
        parent: INodeNo,
        name: &OsStr,
        kind: FileType,
        mode: u32,
    ) -> Answer<FileAttr> {
        if self.find(parent, name).is_ok() {
            return Err(Errno::EEXIST);
        }
        let ino = self.inodes.last_key_value().unwrap().0 + 1;
        let inode = Self::inode(ino, kind, (mode & 0o7777) as u16);
        let attr = inode.attr;
        self.inodes.insert(ino, inode);
        let key = self.folded(name);
        self.of(parent)?.names.insert(key, (name.as_bytes().to_vec(), ino));
        self.touch(parent);
        Ok(attr)
    }

    fn touch(&mut self, ino: INodeNo) {
        if let Ok(inode) = self.of(ino) {
            inode.attr.mtime += STEP;
        }
    }

    /// Inodes stay: somebody may have them open.
    fn remove(&mut self, parent: INodeNo, name: &OsStr) -> Answer<()> {
        let ino = self.find(parent, name)?.ino;
        if !self.of(ino)?.names.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        let key = self.folded(name);
        self.of(parent)?.names.remove(&key);
        self.touch(parent);
        Ok(())
    }

    fn rename(
        &mut self,
        (parent, name): (INodeNo, &OsStr),
        (to, new): (INodeNo, &OsStr),
        flags: RenameFlags,
    ) -> Answer<()> {
        if flags.contains(RenameFlags::RENAME_EXCHANGE) {
            return Err(Errno::EINVAL);
        }
        let moved = self.find(parent, name)?;
        match self.find(to, new) {
            Ok(old) if old.ino == moved.ino => {}
            Ok(_) if flags.contains(RenameFlags::RENAME_NOREPLACE) => return Err(Errno::EEXIST),
            Ok(old) if old.kind == FileType::Directory && moved.kind != old.kind => {
                return Err(Errno::EISDIR);
            }
            Ok(_) => self.remove(to, new)?,
            Err(_) => {}
        }
        let (from, into) = (self.folded(name), self.folded(new));
        self.of(parent)?.names.remove(&from);
        self.of(to)?.names.insert(into, (new.as_bytes().to_vec(), moved.ino.into()));
        self.touch(parent);
        self.touch(to);
        Ok(())
    }
}

struct Served(Arc<Mutex<State>>);

/// Nothing is cached: what is told is what holds now.
const TTL: Duration = Duration::ZERO;

impl Served {
    fn answer<T>(
        &self,
        call: Option<Call>,
        act: impl FnOnce(&mut State) -> Answer<T>,
    ) -> Answer<T> {
        let mut state = self.0.lock().unwrap();
        call.map_or(Ok(()), |call| state.call(call))?;
        act(&mut state)
    }
}

fn reply_entry(reply: ReplyEntry, answer: Answer<FileAttr>) {
    match answer {
        Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
        Err(error) => reply.error(error),
    }
}

fn reply_empty(reply: ReplyEmpty, answer: Answer<()>) {
    match answer {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

fn time_of(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => MADE,
    }
}

impl Filesystem for Served {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        reply_entry(reply, self.answer(Some(Call::Lookup), |state| state.find(parent, name)));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.answer(None, |state| Ok(state.of(ino)?.attr)) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = |state: &mut State| {
            let inode = state.of(ino)?;
            let attr = &mut inode.attr;
            attr.perm = mode.map_or(attr.perm, |mode| (mode & 0o7777) as u16);
            attr.uid = uid.unwrap_or(attr.uid);
            attr.gid = gid.unwrap_or(attr.gid);
            attr.atime = atime.map_or(attr.atime, time_of);
            attr.mtime = mtime.map_or(attr.mtime, time_of);
            if let Some(size) = size {
                inode.content.resize(size as usize, 0);
                attr.size = size;
            }
            Ok(*attr)
        };
        match self.answer(Some(Call::SetAttr), set) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self.answer(None, |state| Ok(state.of(ino)?.content.clone())) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(error),
        }
    }

    fn mkdir(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let make = |state: &mut State| state.make(parent, name, FileType::Directory, mode & !umask);
        reply_entry(reply, self.answer(Some(Call::MakeDir), make));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(reply, self.answer(None, |state| state.remove(parent, name)));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(reply, self.answer(None, |state| state.remove(parent, name)));
    }

    fn symlink(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let make = |state: &mut State| {
            let made = state.make(parent, name, FileType::Symlink, 0o777)?;
            let inode = state.of(made.ino)?;
            inode.content = target.as_os_str().as_bytes().to_vec();
            inode.attr.size = inode.content.len() as u64;
            Ok(inode.attr)
        };
        reply_entry(reply, self.answer(Some(Call::Symlink), make));
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        to: INodeNo,
        new: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let rename = |state: &mut State| state.rename((parent, name), (to, new), flags);
        reply_empty(reply, self.answer(Some(Call::Rename), rename));
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let make =
            |state: &mut State| state.make(parent, name, FileType::RegularFile, mode & !umask);
        match self.answer(Some(Call::Create), make) {
            Ok(attr) => {
                let direct = FopenFlags::FOPEN_DIRECT_IO;
                reply.created(&TTL, &attr, Generation(0), FileHandle(0), direct);
            }
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
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
        let read = |state: &mut State| {
            let content = &state.of(ino)?.content;
            let end = (offset as usize + size as usize).min(content.len());
            Ok(content.get(offset as usize..end).unwrap_or_default().to_vec())
        };
        match self.answer(None, read) {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let write = |state: &mut State| {
            let inode = state.of(ino)?;
            let (from, to) = (offset as usize, offset as usize + data.len());
            if inode.content.len() < to {
                inode.content.resize(to, 0);
            }
            inode.content[from..to].copy_from_slice(data);
            inode.attr.size = inode.content.len() as u64;
            inode.attr.mtime += STEP;
            Ok(data.len() as u32)
        };
        match self.answer(Some(Call::Write), write) {
            Ok(written) => reply.written(written),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let list = |state: &mut State| {
            let names: Vec<_> = state.of(ino)?.names.values().cloned().collect();
            names
                .into_iter()
                .map(|(name, ino)| Ok((name, state.of(INodeNo(ino))?.attr)))
                .collect::<Answer<Vec<_>>>()
        };
        match self.answer((offset == 0).then_some(Call::List), list) {
            Ok(names) => {
                for (at, (name, attr)) in names.iter().enumerate().skip(offset as usize) {
                    if reply.add(attr.ino, at as u64 + 1, attr.kind, OsStr::from_bytes(name)) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(error) => reply.error(error),
        }
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::EOPNOTSUPP);
    }
}
