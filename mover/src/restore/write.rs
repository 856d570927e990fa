//! Carries out a window: creates files, writes pieces as they are delivered, finishes files.
//!
//! A file that lies whole in one delivered blob is created, written, given its metadata and closed in
//! one go by the thread that has the blob: six system calls. Files of several pieces are opened
//! when their first piece comes, finished with their last, and closed in between when too many are open.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use chunkstore::fetch::{Want, fetch};
use chunkstore::pack::PackClass;
use chunkstore::tree::Content;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::fs::{ApplyOptions, Current, Dir, Kind, Target, apply};

use super::links;
use super::window::{Item, Multi, MultiState, Piece, Window, Work, meta_of};
use super::{Overwrite, Shared, count, lock};

/// Files of several pieces open at a time.
const OPEN_MAX: usize = 256;
/// Items with nothing to fetch that a thread takes at a time.
const IMMEDIATE_AT_ONCE: usize = 64;

pub(super) struct Executor<'a> {
    shared: &'a Shared<'a>,
    window: &'a Window,
    /// Files of several pieces in the order they were opened.
    opened: Mutex<VecDeque<u32>>,
}

/// The folder used last, which is most often the next one too.
#[derive(Default)]
struct LastFolder(Option<(u32, Dir)>);

impl LastFolder {
    fn dir(&mut self, shared: &Shared<'_>, number: u32) -> io::Result<&Dir> {
        if self.0.as_ref().is_none_or(|(last, _)| *last != number) {
            self.0 = Some((number, shared.folders.dir(number)?));
        }
        self.0.as_ref().map(|(_, dir)| dir).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl<'a> Executor<'a> {
    pub(super) fn new(shared: &'a Shared<'a>, window: &'a Window) -> Self {
        Self { shared, window, opened: Mutex::default() }
    }

    /// Restores all items but the further names. `wants` are those of the window.
    pub(super) fn run(&self, wants: Vec<Want>) {
        self.make_immediate();
        let (repository, threads) = (self.shared.repository, self.shared.options.threads);
        fetch(repository, PackClass::Data, wants, threads, &|plain, wants| {
            match plain {
                Ok(plain) => self.deliver(plain, wants),
                Err(error) => {
                    let message = chunkstore::error::chain(&error);
                    for want in wants {
                        let piece = &self.window.pieces[want.purpose as usize];
                        self.fail(piece.item, &message);
                    }
                }
            }
            !self.shared.is_stopped()
        });
        for number in &self.window.ended {
            if !self.shared.is_stopped() {
                self.finish_multi(*number);
            }
        }
    }

    fn make_immediate(&self) {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut last = LastFolder::default();
            while !self.shared.is_stopped() {
                let from = next.fetch_add(IMMEDIATE_AT_ONCE, Ordering::Relaxed);
                let Some(rest) = self.window.immediate.get(from..).filter(|rest| !rest.is_empty())
                else {
                    return;
                };
                for number in rest.iter().take(IMMEDIATE_AT_ONCE) {
                    self.make_one(*number, &mut last);
                }
            }
        };
        let tasks = self.window.immediate.len().div_ceil(IMMEDIATE_AT_ONCE);
        let threads = self.shared.options.threads.min(tasks);
        if threads <= 1 {
            return work();
        }
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(work);
            }
        });
    }

    fn make_one(&self, number: u32, last: &mut LastFolder) {
        let item = &self.window.items[number as usize];
        let node = item.node();
        if node.kind == Kind::File {
            let bytes = match &node.content {
                Content::Inline(bytes) => &bytes[..],
                _ => &[],
            };
            return self.write_whole(number, bytes, 0, last);
        }
        if let Err(error) = self.make_special(item, last) {
            self.fail_io(number, "it cannot be created", &error);
        }
    }

    fn make_special(&self, item: &Item, last: &mut LastFolder) -> io::Result<()> {
        let (node, name) = (item.node(), item.name());
        let dir = last.dir(self.shared, item.folder)?;
        self.shared.place(dir, name, || match &node.content {
            Content::Inline(to) if node.kind == Kind::Symlink => dir.make_symlink(name, to),
            _ => dir.make_node(name, node.kind, node.rdev.0, node.rdev.1),
        })?;
        let options = ApplyOptions { owner: self.shared.options.owner, current: None };
        let failures = apply(Target::Name(dir, name), &meta_of(node), &node.xattrs, &options);
        self.shared.warn_attributes_of(item, &failures);
        self.shared.register(item, dir);
        count(&self.shared.counters.files, 1);
        self.shared.monitor.advance(1, 0);
        Ok(())
    }

    fn deliver(&self, plain: &[u8], wants: &[Want]) {
        let mut purposes: Vec<u32> = wants.iter().map(|want| want.purpose).collect();
        // In path order again: files of one folder one after the other.
        purposes.sort_unstable();
        let mut last = LastFolder::default();
        for purpose in purposes {
            let piece = self.window.pieces[purpose as usize];
            let from = piece.blob_offset as usize;
            let Some(bytes) = plain.get(from..from + piece.len as usize) else {
                self.fail(piece.item, "the blob is shorter than the tree says");
                continue;
            };
            match self.window.multi(piece.item) {
                None => self.write_whole(piece.item, bytes, piece.offset, &mut last),
                Some(multi) => self.write_piece(&piece, multi, bytes),
            }
            if self.shared.is_stopped() {
                return;
            }
        }
    }

    /// Restores a file with all it consists of.
    fn write_whole(&self, number: u32, bytes: &[u8], offset: u64, last: &mut LastFolder) {
        let item = &self.window.items[number as usize];
        self.shared.monitor.begin(&item.path());
        let dir = match last.dir(self.shared, item.folder) {
            Ok(dir) => dir,
            Err(error) => return self.fail_io(number, "its folder cannot be opened", &error),
        };
        let file = match self.shared.create(dir, item.name()) {
            Ok(file) => file,
            Err(error) => return self.fail_io(number, "it cannot be created", &error),
        };
        let size = item.node().size;
        let written = write_at(&file, bytes, offset).and_then(|()| {
            let end = offset + bytes.len() as u64;
            if end == size { Ok(()) } else { file.set_len(size) }
        });
        if let Err(error) = written {
            // The error that made it useless is the one to report.
            let _unlinked = dir.unlink(item.name());
            return self.fail_io(number, "it cannot be written", &error);
        }
        count(&self.shared.counters.bytes_written, bytes.len() as u64);
        self.shared.monitor.advance(1, size);
        self.finish(item, dir, &file);
    }

    /// Gives a complete file its metadata.
    fn finish(&self, item: &Item, dir: &Dir, file: &File) {
        let node = item.node();
        // A file that gets special rights is given its owner in any case, whatever is known about
        // new files in this folder.
        let known = if node.mode & 0o6000 == 0 { self.newborn(item.folder, file) } else { None };
        let options = ApplyOptions { owner: self.shared.options.owner, current: known };
        let failures = apply(Target::File(file), &meta_of(node), &node.xattrs, &options);
        self.shared.warn_attributes_of(item, &failures);
        self.shared.register(item, dir);
        count(&self.shared.counters.files, 1);
        count(&self.shared.counters.bytes, node.size);
    }

    /// Owner and mode of new files in the folder, learnt from the first.
    fn newborn(&self, folder: u32, file: &File) -> Option<Current> {
        if let Some(newborn) = self.shared.folders.newborn(folder) {
            return Some(newborn);
        }
        let stat = rustix::fs::fstat(file).ok()?;
        let newborn = Current { uid: stat.st_uid, gid: stat.st_gid, mode: stat.st_mode & 0o7777 };
        self.shared.folders.set_newborn(folder, newborn);
        Some(newborn)
    }

    fn write_piece(&self, piece: &Piece, multi: &Multi, bytes: &[u8]) {
        let item = &self.window.items[piece.item as usize];
        if item.has_failed() {
            return;
        }
        let file = match self.open(piece.item, multi) {
            Ok(file) => file,
            Err(error) => return self.fail_io(piece.item, "it cannot be created", &error),
        };
        if let Err(error) = write_at(&file, bytes, piece.offset) {
            return self.fail_io(piece.item, "it cannot be written", &error);
        }
        drop(file);
        count(&self.shared.counters.bytes_written, bytes.len() as u64);
        self.shared.monitor.advance(0, bytes.len() as u64);
        if multi.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish_multi(piece.item);
        }
    }

    /// The file opened for writing; created when this is its first piece.
    fn open(&self, number: u32, multi: &Multi) -> io::Result<Arc<File>> {
        let item = &self.window.items[number as usize];
        let mut state = lock(&multi.state);
        if let Some(file) = &state.file {
            return Ok(file.clone());
        }
        let dir = self.shared.folders.dir(item.folder)?;
        let file = match state.created {
            Some(inode) => reopen(&dir, item.name(), inode)?,
            None => self.create_multi(item, &dir, &mut state)?,
        };
        let file = Arc::new(file);
        state.file = Some(file.clone());
        drop(state);
        self.close_oldest(number);
        Ok(file)
    }

    fn create_multi(&self, item: &Item, dir: &Dir, state: &mut MultiState) -> io::Result<File> {
        self.shared.monitor.begin(&item.path());
        let file = self.shared.create(dir, item.name())?;
        let stat = rustix::fs::fstat(&file)?;
        state.created = Some((stat.st_dev, stat.st_ino));
        // What no piece covers is a hole.
        file.set_len(item.node().size)?;
        Ok(file)
    }

    /// Notes that a file was opened, and closes the one opened longest ago if there are too many. Called
    /// with no state locked, since it locks another.
    fn close_oldest(&self, number: u32) {
        let oldest = {
            let mut opened = lock(&self.opened);
            opened.push_back(number);
            if opened.len() > OPEN_MAX { opened.pop_front() } else { None }
        };
        if let Some(multi) = oldest.and_then(|oldest| self.window.multi(oldest)) {
            // Whoever is writing to it still holds it.
            lock(&multi.state).file = None;
        }
    }

    /// Finishes a file all of whose pieces are written.
    fn finish_multi(&self, number: u32) {
        let item = &self.window.items[number as usize];
        let Some(multi) = self.window.multi(number).filter(|_| !item.has_failed()) else {
            return;
        };
        let file = match self.open(number, multi) {
            Ok(file) => file,
            Err(error) => return self.fail_io(number, "it cannot be created", &error),
        };
        match self.shared.folders.dir(item.folder) {
            Ok(dir) => self.finish(item, &dir, &file),
            Err(error) => return self.fail_io(number, "its folder cannot be opened", &error),
        }
        let mut state = lock(&multi.state);
        state.finished = true;
        state.file = None;
        self.shared.monitor.advance(1, 0);
    }

    fn fail(&self, number: u32, message: &str) {
        if self.shared.discard(self.window, number) {
            self.shared.fail(&self.window.items[number as usize].path(), message);
        }
    }

    fn fail_io(&self, number: u32, what: &str, error: &io::Error) {
        if self.shared.discard(self.window, number) {
            self.shared.fail_io(&self.window.items[number as usize].path(), what, error);
        }
    }

    /// Gives restored files their further names. Returns those that must be restored from their own
    /// content.
    pub(super) fn link_names(&self) -> Vec<u32> {
        let mut own_content = Vec::new();
        let mut last = LastFolder::default();
        for number in &self.window.links {
            let item = &self.window.items[*number as usize];
            let (Some(key), false) = (item.link_key(), self.shared.is_stopped()) else {
                continue;
            };
            let linked = last.dir(self.shared, item.folder).and_then(|dir| {
                let name = item.name();
                self.shared.place(dir, name, || self.shared.links.link(key, dir, name))
            });
            match linked {
                Ok(()) => {
                    count(&self.shared.counters.files, 1);
                    self.shared.monitor.advance(1, 0);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => own_content.push(*number),
                Err(error) if links::is_unsupported(&error) => {
                    let message = format!("it is restored as a file of its own: {error}");
                    self.shared.warn(&item.path(), message);
                    if Errno::from_io_error(&error) == Some(Errno::MLINK) {
                        self.shared.links.forget(key);
                    }
                    own_content.push(*number);
                }
                Err(error) => self.fail_io(*number, "it cannot be linked", &error),
            }
        }
        own_content
    }
}

impl Shared<'_> {
    /// Creates a file; what has its name goes, if it may.
    fn create(&self, dir: &Dir, name: &[u8]) -> io::Result<File> {
        self.place(dir, name, || dir.create_file(name))
    }

    /// Calls `make`, and once more after removing what is in its way.
    fn place<T>(&self, dir: &Dir, name: &[u8], make: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match make() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made,
        }
        match self.options.overwrite {
            Overwrite::Always => dir.remove_tree(name)?,
            Overwrite::IfChanged => dir.unlink(name)?,
            Overwrite::Never => return Err(Errno::EXIST.into()),
        }
        make()
    }

    /// Makes a file that has more names known as the one to link them to.
    pub(super) fn register(&self, item: &Item, dir: &Dir) {
        if let Some(key) = item.link_key() {
            self.register_name(key, dir, item.name(), &item.path());
        }
    }

    /// As [`register`](Self::register), for a file that was there already.
    pub(super) fn register_name(&self, key: links::LinkKey, dir: &Dir, name: &[u8], path: &[u8]) {
        let registered =
            self.folders.root().and_then(|root| self.links.register(&root, key, dir, name));
        match registered {
            Ok(true) => {}
            Ok(false) => self.warn(path, "no hard links here: each name becomes a file of its own"),
            Err(error) => self.warn(path, format!("it cannot be linked to other names: {error}")),
        }
    }

    fn warn_attributes_of(&self, item: &Item, failures: &[crate::fs::AttrFailure]) {
        if !failures.is_empty() {
            self.warn_attributes(&item.path(), failures);
        }
    }

    /// Marks an item failed and removes what there is of it. `false` when that was done before.
    pub(super) fn discard(&self, window: &Window, number: u32) -> bool {
        let item = &window.items[number as usize];
        if item.failed.swap(true, Ordering::Relaxed) {
            return false;
        }
        if let Some(multi) = window.multi(number) {
            let mut state = lock(&multi.state);
            state.file = None;
            if let Some(inode) = state.created {
                self.remove_created(item, inode);
            }
        }
        true
    }

    /// Removes a file we created, if it is still the one of that name.
    fn remove_created(&self, item: &Item, inode: (u64, u64)) {
        let removed = self.folders.dir(item.folder).and_then(|dir| {
            let now = dir.lstat(item.name())?;
            if (now.dev, now.ino) == inode { dir.unlink(item.name()) } else { Ok(()) }
        });
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                self.warn(&item.path(), format!("the incomplete file cannot be removed: {error}"));
            }
            _ => {}
        }
    }

    /// Removes files of which only a part was written when the restore ended early.
    pub(super) fn remove_unfinished(&self, window: &Window) {
        for (number, item) in window.items.iter().enumerate() {
            if matches!(item.work, Work::Multi(_)) {
                let finished =
                    window.multi(number as u32).is_some_and(|multi| lock(&multi.state).finished);
                if !finished {
                    self.discard(window, number as u32);
                }
            }
        }
    }
}

fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    if bytes.is_empty() { Ok(()) } else { file.write_all_at(bytes, offset) }
}

/// Opens a file again that we created and closed.
fn reopen(dir: &Dir, name: &[u8], inode: (u64, u64)) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?);
    let stat = rustix::fs::fstat(&file)?;
    if (stat.st_dev, stat.st_ino) == inode {
        Ok(file)
    } else {
        Err(io::Error::other("another file has taken its place"))
    }
}
