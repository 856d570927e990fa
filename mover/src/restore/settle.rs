//! The end of an item's way: it gets its name, becomes another name of a restored file, or is discarded.

use std::io;
use std::sync::atomic::Ordering;

use rustix::io::Errno;

use crate::fs::AttrFailure;

use super::hidden::{Hidden, waiting_name};
use super::links::{LinkKey, Registered, is_unsupported};
use super::place::{Placed, Spot};
use super::window::{Item, Window, Work};
use super::write::{Executor, LastFolder};
use super::{Shared, count, lock};

impl Executor<'_> {
    /// Gives restored files their further names. Those that must be restored from their own content are noted in the
    /// window.
    pub(super) fn link_names(&self) {
        let mut last = LastFolder::default();
        for number in &self.window.links {
            let item = &self.window.items[*number as usize];
            let (Some(key), false) = (item.link_key(), self.shared.is_stopped()) else {
                continue;
            };
            let linked = last.place(self.shared, item.folder).and_then(|(dir, _)| {
                let (folder, name, existed) = (item.folder, item.name(), item.existed);
                self.shared.link(key, Spot { dir, folder, name, existed })
            });
            match linked {
                Ok(Placed::New) => {
                    count(&self.shared.counters.files, 1);
                    self.shared.monitor.advance(1, 0);
                }
                Ok(Placed::Old) => self.shared.count_left(1),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    lock(&self.window.again).push(*number);
                }
                Err(error) if is_unsupported(&error) => {
                    let message = format!("it is restored as a file of its own: {error}");
                    self.shared.warn(&item.path(), message);
                    lock(&self.window.again).push(*number);
                }
                Err(error) => self.fail_io(*number, "it cannot be linked", &error),
            }
        }
    }
}

impl Shared<'_> {
    /// Gives an item that waits its name.
    pub(super) fn settle(&self, window: &Window, number: u32) {
        let item = &window.items[number as usize];
        match self.try_settle(item) {
            Ok(Placed::New) => {
                item.end_waiting();
                self.count_restored(window, number);
            }
            Ok(Placed::Old) => {
                self.drop_waiting(item);
                self.count_left(0);
            }
            Err(error)
                if Errno::from_io_error(&error) == Some(Errno::XDEV)
                    && item.waiting().is_some_and(|(base, _)| base != item.folder) =>
            {
                // The folder takes nothing from elsewhere, for a quota perhaps.
                self.folders.separate(item.folder);
                self.drop_waiting(item);
                lock(&window.again).push(number);
            }
            Err(error) => {
                if self.discard(window, number) {
                    self.fail_io(&item.path(), "it cannot be put in its place", &error);
                }
            }
        }
    }

    fn try_settle(&self, item: &Item) -> io::Result<Placed> {
        let (base, number) = item.waiting().unwrap_or_default();
        let (hidden, waiting) = (self.hidden_in(base)?, waiting_name(number));
        self.register(item, &hidden, &waiting);
        let dir = self.folders.dir(item.folder)?;
        let (folder, name, existed) = (item.folder, item.name(), item.existed);
        self.place(&hidden, &waiting, Spot { dir: &dir, folder, name, existed })
    }

    /// Makes a file that has more names known as the one to link them to.
    fn register(&self, item: &Item, hidden: &Hidden, waiting: &[u8]) {
        let Some(key) = item.link_key() else { return };
        if self.links.is_full(key) {
            let message = "a file can have no more names here: it begins another file";
            self.warn(&item.path(), message);
        }
        match self.links.register(hidden, key, hidden.dir(), waiting) {
            Ok(Registered::Done) => {}
            Ok(Registered::Unsupported) => {
                self.warn(&item.path(), "no hard links here: each name becomes a file of its own");
            }
            Err(error) => {
                let message = format!("it cannot be linked to other names: {error}");
                self.warn(&item.path(), message);
            }
        }
    }

    /// Makes a name one more of the restored file with this key.
    fn link(&self, key: LinkKey, spot: Spot<'_>) -> io::Result<Placed> {
        let Spot { dir, folder, name, existed } = spot;
        let base = self.folders.site(folder).base;
        let hidden = self.hidden.get(base).ok_or(io::ErrorKind::NotFound)?;
        let own = key.name();
        if existed != Some(false)
            && let Ok(now) = dir.lstat(name)
        {
            let file = hidden.dir().lstat(&own)?;
            if (now.dev, now.ino) == (file.dev, file.ino) {
                return Ok(Placed::New);
            }
        }
        let is_full = |error: &io::Error| Errno::from_io_error(error) == Some(Errno::MLINK);
        let waiting = waiting_name(self.next_waiting());
        let (from, placed) = match hidden.dir().link(&own, dir, name) {
            Ok(()) => return Ok(Placed::New),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                match hidden.dir().link(&own, hidden.dir(), &waiting) {
                    Err(error) if is_full(&error) => (&own, self.place(&hidden, &own, spot)?),
                    linked => {
                        linked?;
                        (
                            &waiting,
                            self.place(&hidden, &waiting, spot).inspect_err(|_| {
                                let _removed = hidden.dir().unlink(&waiting);
                            })?,
                        )
                    }
                }
            }
            // One name is left: that in the hidden folder.
            Err(error) if is_full(&error) => (&own, self.place(&hidden, &own, spot)?),
            Err(error) => return Err(error),
        };
        if from == &own {
            self.links.set_full(key);
        } else if hidden.dir().lstat(from).is_ok() {
            // A rename between two names of one file does nothing.
            hidden.dir().unlink(from)?;
        }
        Ok(placed)
    }

    pub(super) fn count_restored(&self, window: &Window, number: u32) {
        count(&self.counters.files, 1);
        let item = &window.items[number as usize];
        if item.node().kind == crate::fs::Kind::File {
            count(&self.counters.bytes, window.size(number));
        }
        if item.work == Work::Immediate && item.node().kind != crate::fs::Kind::File {
            self.monitor.advance(1, 0);
        }
    }

    /// Counts something that was there and stays.
    pub(super) fn count_left(&self, entries: u64) {
        count(&self.counters.skipped_unchanged, 1);
        self.monitor.advance(entries, 0);
    }

    /// Whether all of an item has been written.
    pub(super) fn is_finished(&self, window: &Window, number: u32) -> bool {
        match window.items[number as usize].work {
            Work::Multi(_) => window.multi(number).is_some_and(|multi| lock(&multi.state).finished),
            Work::Immediate | Work::Single => true,
            Work::Link => false,
        }
    }

    pub(super) fn warn_attributes_of(&self, item: &Item, failures: &[AttrFailure]) {
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
        let created = window.multi(number).and_then(|multi| {
            let mut state = lock(&multi.state);
            state.file = None;
            state.created
        });
        if item.waiting().is_some() {
            self.drop_waiting(item);
        } else if let Some(inode) = created {
            self.remove_created(item, inode);
        }
        true
    }

    fn drop_waiting(&self, item: &Item) {
        let Some((base, number)) = item.end_waiting() else { return };
        if let Some(hidden) = self.hidden.get(base) {
            // What stays goes with the hidden folder.
            let _removed = hidden.dir().unlink(&waiting_name(number));
        }
    }

    /// Removes a file that was written in its place, if it is still the one of that name.
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

    /// Removes files written in their place of which only a part was written when the restore ended early. All
    /// others wait in the hidden folder, and go with it.
    pub(super) fn remove_unfinished(&self, window: &Window) {
        for number in 0..window.items.len() as u32 {
            if !self.is_finished(window, number) {
                self.discard(window, number);
            }
        }
    }
}
