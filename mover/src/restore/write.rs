//! Carries out a window: creates files, writes pieces as they are delivered, finishes files.
//!
//! A file that lies whole in one delivered blob is created, written, given its metadata and closed in
//! one go by the thread that has the blob: six system calls in a folder that we have made ourselves, and a
//! rename from the hidden folder elsewhere. Files of several pieces are opened when their first piece
//! comes, finished with their last, and closed in between when too many are open; they always wait in the hidden
//! folder until they are whole.

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

use crate::fs::{ApplyOptions, Current, Dir, Kind, Target, apply, close, gives_rights};

use super::folders::Site;
use super::hidden::{Hidden, waiting_name};
use super::place::{Spot, collision};
use super::window::{Item, Multi, MultiState, Piece, Window, meta_of};
use super::{Shared, count, lock};

/// Items with nothing to fetch that a thread takes at a time.
const IMMEDIATE_AT_ONCE: usize = 64;

pub(super) struct Executor<'a> {
    pub(super) shared: &'a Shared<'a>,
    pub(super) window: &'a Window,
    /// Files of several pieces in the order they were opened.
    opened: Mutex<VecDeque<u32>>,
}

/// The folder used last, which is most often the next one too.
#[derive(Default)]
pub(super) struct LastFolder(Option<(u32, Dir, Site)>);

impl LastFolder {
    pub(super) fn place(&mut self, shared: &Shared<'_>, number: u32) -> io::Result<(&Dir, Site)> {
        if self.0.as_ref().is_none_or(|(last, ..)| *last != number) {
            let (dir, site) = shared.folders.place(number)?;
            self.0 = Some((number, dir, site));
        }
        let last = self.0.as_ref().map(|(_, dir, site)| (dir, *site));
        last.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// A file that has been created.
struct Draft {
    file: File,
    /// The hidden folder it waits in; without one it has its own name already.
    hidden: Option<Arc<Hidden>>,
}

impl<'a> Executor<'a> {
    pub(super) fn new(shared: &'a Shared<'a>, window: &'a Window) -> Self {
        Self { shared, window, opened: Mutex::default() }
    }

    /// Restores all items but the further names. `wants` are those of the window.
    pub(super) fn run(&self, wants: Vec<Want>) {
        self.make_immediate();
        let (repository, threads) = (self.shared.repository, self.shared.handles.threads);
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
        let threads = self.shared.handles.threads.min(tasks);
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
        match self.make_special(item, last) {
            Ok(()) => self.settle_unless_verified(number),
            Err(error) => self.fail_io(number, "it cannot be created", &error),
        }
    }

    fn make_special(&self, item: &Item, last: &mut LastFolder) -> io::Result<()> {
        let node = item.node();
        let (dir, site) = last.place(self.shared, item.folder)?;
        let make = |dir: &Dir, name: &[u8]| match &node.content {
            Content::Inline(to) if node.kind == Kind::Symlink => dir.make_symlink(name, to),
            _ => dir.make_node(name, node.kind, node.rdev.0, node.rdev.1),
        };
        let finish = |dir: &Dir, name: &[u8]| {
            let owner = self.shared.options.owner;
            let options = ApplyOptions { owner, bare: true, ..ApplyOptions::default() };
            let failures = apply(Target::Name(dir, name), &meta_of(node), &node.xattrs, &options);
            self.shared.warn_attributes_of(item, &failures);
        };
        if self.directly(item, dir, site, || make(dir, item.name()))?.is_some() {
            finish(dir, item.name());
            return Ok(());
        }
        let (hidden, base) = self.shared.hidden_and_base(item.folder)?;
        let number = self.shared.next_waiting();
        let name = waiting_name(number);
        make(hidden.dir(), &name)?;
        item.set_waiting(base, number);
        finish(hidden.dir(), &name);
        Ok(())
    }

    /// Makes an item under its own name, where that is safe: in a folder that we made ourselves. `None` where it
    /// has to wait for its name.
    fn directly<T>(
        &self,
        item: &Item,
        dir: &Dir,
        site: Site,
        make: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<Option<T>> {
        if !site.fresh || item.node().linked {
            return Ok(None);
        }
        match make() {
            // It falls together with another name, or another restore was faster.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let (folder, name, existed) = (item.folder, item.name(), item.existed);
                match self.shared.taken_for(Spot { dir, folder, name, existed })? {
                    Some(other) => Err(collision(&other)),
                    None => Ok(None),
                }
            }
            made => made.map(Some),
        }
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
        let (dir, site) = match last.place(self.shared, item.folder) {
            Ok(place) => place,
            Err(error) => return self.fail_io(number, "its folder cannot be opened", &error),
        };
        let draft = match self.create(item, dir, site) {
            Ok(draft) => draft,
            Err(error) => return self.fail_io(number, "it cannot be created", &error),
        };
        let size = item.node().size;
        let written = write_at(&draft.file, bytes, offset)
            .and_then(|()| {
                let end = offset + bytes.len() as u64;
                if end == size { Ok(()) } else { draft.file.set_len(size) }
            })
            .and_then(|()| self.finish(item, draft));
        if let Err(error) = written {
            if item.waiting().is_none() {
                // The error that made it useless is the one to report.
                let _unlinked = dir.unlink(item.name());
            }
            return self.fail_io(number, "it cannot be written", &error);
        }
        count(&self.shared.counters.bytes_written, bytes.len() as u64);
        self.shared.monitor.advance(1, size);
        self.settle_unless_verified(number);
    }

    /// Creates a file of one piece.
    fn create(&self, item: &Item, dir: &Dir, site: Site) -> io::Result<Draft> {
        match self.directly(item, dir, site, || dir.create_file(item.name()))? {
            Some(file) => Ok(Draft { file, hidden: None }),
            None => self.create_waiting(item),
        }
    }

    fn create_waiting(&self, item: &Item) -> io::Result<Draft> {
        let (hidden, base) = self.shared.hidden_and_base(item.folder)?;
        let number = self.shared.next_waiting();
        let file = hidden.dir().create_file(&waiting_name(number))?;
        item.set_waiting(base, number);
        Ok(Draft { file, hidden: Some(hidden) })
    }

    /// Gives a complete file its metadata, and closes it.
    fn finish(&self, item: &Item, draft: Draft) -> io::Result<()> {
        let node = item.node();
        let Draft { file, hidden } = draft;
        // A file that gets special rights is given its owner in any case, whatever is known about
        // new files in this folder.
        let current = if node.mode & 0o6000 == 0 {
            self.newborn(item.folder, hidden.as_deref(), &file)
        } else {
            None
        };
        self.apply_to(item, &file, current, true);
        close(file)
    }

    fn apply_to(&self, item: &Item, file: &File, current: Option<Current>, bare: bool) {
        let node = item.node();
        let options = ApplyOptions { owner: self.shared.options.owner, current, bare, inode: None };
        let failures = apply(Target::File(file), &meta_of(node), &node.xattrs, &options);
        self.shared.warn_attributes_of(item, &failures);
    }

    /// Owner and mode of new files in the folder, or in the hidden one, learnt from the first.
    fn newborn(&self, folder: u32, hidden: Option<&Hidden>, file: &File) -> Option<Current> {
        let known = match hidden {
            Some(hidden) => *lock(hidden.newborn()),
            None => self.shared.folders.newborn(folder),
        };
        if known.is_some() {
            return known;
        }
        let stat = rustix::fs::fstat(file).ok()?;
        let newborn = Current { uid: stat.st_uid, gid: stat.st_gid, mode: stat.st_mode & 0o7777 };
        match hidden {
            Some(hidden) => *lock(hidden.newborn()) = Some(newborn),
            None => self.shared.folders.set_newborn(folder, newborn),
        }
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
        self.release(piece.item, file);
        count(&self.shared.counters.bytes_written, bytes.len() as u64);
        self.shared.monitor.advance(0, bytes.len() as u64);
        if multi.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish_multi(piece.item);
        }
    }

    /// Lets go of a file; who is the last to do so closes it.
    fn release(&self, number: u32, file: Arc<File>) {
        if let Some(Err(error)) = Arc::into_inner(file).map(close) {
            self.fail_io(number, "it cannot be written", &error);
        }
    }

    /// The file opened for writing; created when this is its first piece.
    fn open(&self, number: u32, multi: &Multi) -> io::Result<Arc<File>> {
        let item = &self.window.items[number as usize];
        let mut state = lock(&multi.state);
        if let Some(file) = &state.file {
            return Ok(file.clone());
        }
        let file = match (state.created, item.waiting()) {
            (Some(inode), Some((base, number))) => {
                let hidden = self.shared.hidden_in(base)?;
                reopen(hidden.dir(), &waiting_name(number), inode)?
            }
            (Some(inode), None) => {
                reopen(&self.shared.folders.dir(item.folder)?, item.name(), inode)?
            }
            (None, _) => self.create_multi(item, &mut state)?,
        };
        let file = Arc::new(file);
        state.file = Some(file.clone());
        drop(state);
        self.close_oldest(number);
        Ok(file)
    }

    fn create_multi(&self, item: &Item, state: &mut MultiState) -> io::Result<File> {
        self.shared.monitor.begin(&item.path());
        let file = match self.open_in_place(item)? {
            Some(file) => file,
            None => self.create_waiting(item)?.file,
        };
        let stat = rustix::fs::fstat(&file)?;
        state.created = Some((stat.st_dev, stat.st_ino));
        // What no piece covers is a hole.
        file.set_len(item.node().size)?;
        Ok(file)
    }

    /// The existing file, emptied, if its place is to be written to: never one that others have a hand in.
    fn open_in_place(&self, item: &Item) -> io::Result<Option<File>> {
        let node = item.node();
        let options = &self.shared.options;
        if !options.in_place || item.existed == Some(false) || gives_rights(node.mode, &node.xattrs)
        {
            return Ok(None);
        }
        let dir = self.shared.folders.dir(item.folder)?;
        self.shared.check_protected(&dir, item.name())?;
        let Ok(file) = open_for_writing(&dir, item.name()) else { return Ok(None) };
        let stat = rustix::fs::fstat(&file)?;
        let owner = if options.owner { node.uid } else { rustix::process::geteuid().as_raw() };
        let is_file = stat.st_mode & 0o170_000 == 0o100_000;
        if !is_file || stat.st_nlink != 1 || stat.st_uid != owner {
            return Ok(None);
        }
        file.set_len(0)?;
        Ok(Some(file))
    }

    /// Notes that a file was opened, and closes the one opened longest ago if there are too many. Called
    /// with no state locked, since it locks another.
    fn close_oldest(&self, number: u32) {
        let oldest = {
            let mut opened = lock(&self.opened);
            opened.push_back(number);
            if opened.len() > self.shared.handles.files { opened.pop_front() } else { None }
        };
        let Some(oldest) = oldest else { return };
        let file = self.window.multi(oldest).and_then(|multi| lock(&multi.state).file.take());
        if let Some(file) = file {
            // Whoever is writing to it still holds it.
            self.release(oldest, file);
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
        let size = self.window.size(number);
        let pieces_end = lock(&multi.state).pieces_end;
        if pieces_end > size {
            return self.fail(number, "the tree names content beyond its end");
        }
        if size != item.node().size
            && let Err(error) = file.set_len(size)
        {
            return self.fail_io(number, "it cannot be written", &error);
        }
        self.apply_to(item, &file, None, item.waiting().is_some());
        {
            let mut state = lock(&multi.state);
            state.finished = true;
            state.file = None;
        }
        self.release(number, file);
        if item.has_failed() {
            return;
        }
        self.shared.monitor.advance(1, 0);
        self.settle_unless_verified(number);
    }

    fn settle_unless_verified(&self, number: u32) {
        if self.window.items[number as usize].waiting().is_none() {
            self.shared.count_restored(self.window, number);
        } else if !self.shared.options.verify {
            self.shared.settle(self.window, number);
        }
    }

    fn fail(&self, number: u32, message: &str) {
        if self.shared.discard(self.window, number) {
            self.shared.fail(&self.window.items[number as usize].path(), message);
        }
    }

    pub(super) fn fail_io(&self, number: u32, what: &str, error: &io::Error) {
        if self.shared.discard(self.window, number) {
            self.shared.fail_io(&self.window.items[number as usize].path(), what, error);
        }
    }
}

fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    if bytes.is_empty() { Ok(()) } else { file.write_all_at(bytes, offset) }
}

fn open_for_writing(dir: &Dir, name: &[u8]) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?))
}

/// Opens a file again that we created and closed.
fn reopen(dir: &Dir, name: &[u8], inode: (u64, u64)) -> io::Result<File> {
    let file = open_for_writing(dir, name)?;
    let stat = rustix::fs::fstat(&file)?;
    if (stat.st_dev, stat.st_ino) == inode {
        Ok(file)
    } else {
        Err(io::Error::other("another file has taken its place"))
    }
}
