//! The folders in use, by number: those on the way to where the planner stands, and those with files
//! in the current window. Few are open at a time; others are opened again from the nearest open one
//! above, name by name, so that paths may be of any length.

use std::io;
use std::sync::Mutex;

use crate::fs::{Current, Dir};

use super::lock;

/// Number of the target itself, which is always open.
pub(super) const ROOT: u32 = 0;
pub(super) struct Folders(Mutex<Table>);

struct Table {
    folders: Vec<Folder>,
    free: Vec<u32>,
    open: Vec<u32>,
    /// How many may be.
    open_max: usize,
    clock: u64,
}

/// What is known of a folder besides its name.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Site {
    /// Whether we made it: then nothing is in it but what we put there, and nobody else may enter it yet.
    pub(super) fresh: bool,
    /// Device of its file system.
    pub(super) dev: u64,
    /// The folder in which the hidden folder for its files lies: the target, or the root of a file system
    /// mounted below.
    pub(super) base: u32,
}

#[derive(Default)]
struct Folder {
    parent: u32,
    name: Box<[u8]>,
    dir: Option<Dir>,
    used: u64,
    site: Site,
    newborn: Option<Current>,
}

impl Folders {
    /// `root` is missing in a dry run on a target that does not exist; at most `open_max` others are held open.
    pub(super) fn new(root: Option<Dir>, site: Site, open_max: usize) -> Self {
        let root = Folder { dir: root, site, ..Folder::default() };
        let (free, open) = (Vec::new(), Vec::new());
        Self(Mutex::new(Table { folders: vec![root], free, open, open_max, clock: 0 }))
    }

    pub(super) fn root(&self) -> io::Result<Dir> {
        self.dir(ROOT)
    }

    /// Adds a folder; `dir` is missing for one that a dry run would have made. `dev` is its device, where that
    /// makes it the root of a file system of its own.
    pub(super) fn add(
        &self,
        parent: u32,
        name: &[u8],
        dir: Option<Dir>,
        fresh: bool,
        mounted: Option<u64>,
    ) -> u32 {
        let table = &mut *lock(&self.0);
        let above = table.folders[parent as usize].site;
        let site = Site { fresh, dev: mounted.unwrap_or(above.dev), base: above.base };
        let folder = Folder { parent, name: name.into(), site, ..Folder::default() };
        let number = match table.free.pop() {
            Some(number) => {
                table.folders[number as usize] = folder;
                number
            }
            None => {
                table.folders.push(folder);
                table.folders.len() as u32 - 1
            }
        };
        if mounted.is_some() {
            table.folders[number as usize].site.base = number;
        }
        if let Some(dir) = dir {
            table.keep(number, dir);
        }
        number
    }

    /// Forgets a folder that has no folders below it any more.
    pub(super) fn remove(&self, number: u32) {
        let table = &mut *lock(&self.0);
        let folder = std::mem::take(&mut table.folders[number as usize]);
        if folder.dir.is_some() {
            table.open.retain(|open| *open != number);
        }
        table.free.push(number);
    }

    /// An open handle.
    pub(super) fn dir(&self, number: u32) -> io::Result<Dir> {
        Ok(self.place(number)?.0)
    }

    /// An open handle, and what is known of the folder.
    pub(super) fn place(&self, number: u32) -> io::Result<(Dir, Site)> {
        let table = &mut *lock(&self.0);
        let mut closed = Vec::new();
        let mut at = number;
        let mut dir = loop {
            if let Some(dir) = table.touch(at) {
                break dir;
            }
            if at == ROOT {
                return Err(io::ErrorKind::NotFound.into());
            }
            closed.push(at);
            at = table.folders[at as usize].parent;
        };
        for number in closed.into_iter().rev() {
            dir = dir.open_dir(&table.folders[number as usize].name)?;
            table.keep(number, dir.clone());
        }
        Ok((dir, table.folders[number as usize].site))
    }

    pub(super) fn site(&self, number: u32) -> Site {
        lock(&self.0).folders[number as usize].site
    }

    /// Gives a folder a hidden folder of its own: files cannot be moved to it from the one above.
    pub(super) fn separate(&self, number: u32) {
        lock(&self.0).folders[number as usize].site.base = number;
    }

    /// Owner and mode of files as they are created in this folder, once known.
    pub(super) fn newborn(&self, number: u32) -> Option<Current> {
        lock(&self.0).folders[number as usize].newborn
    }

    pub(super) fn set_newborn(&self, number: u32, newborn: Current) {
        lock(&self.0).folders[number as usize].newborn = Some(newborn);
    }

    /// The path below the target, with `/` between components.
    pub(super) fn path(&self, number: u32) -> Vec<u8> {
        let table = lock(&self.0);
        let mut names = Vec::new();
        let mut at = number;
        while at != ROOT {
            let folder = &table.folders[at as usize];
            names.push(&folder.name[..]);
            at = folder.parent;
        }
        names.reverse();
        names.join(&b'/')
    }
}

impl Table {
    fn touch(&mut self, number: u32) -> Option<Dir> {
        self.clock += 1;
        let folder = &mut self.folders[number as usize];
        folder.used = self.clock;
        folder.dir.clone()
    }

    fn keep(&mut self, number: u32, dir: Dir) {
        if self.open.len() >= self.open_max {
            // Several at once: to find the longest unused means to sort them.
            let closed = (self.open_max / 4).max(1);
            let folders = &mut self.folders;
            self.open.sort_unstable_by_key(|open| folders[*open as usize].used);
            for closed in self.open.drain(..closed) {
                folders[closed as usize].dir = None;
            }
        }
        self.clock += 1;
        let folder = &mut self.folders[number as usize];
        folder.used = self.clock;
        folder.dir = Some(dir);
        self.open.push(number);
    }
}
