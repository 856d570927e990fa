//! Recursive removal: constant descriptors, bounded names in memory, no recursion.
//!
//! Only the current directory is open. Going up opens `..` and insists on the device and inode seen
//! on the way down, so that a directory moved meanwhile stops the removal instead of letting it
//! continue elsewhere. Another file system in the tree (a bind mount, a subvolume too) ends it with `EBUSY`.

use super::dir::{Dir, checked};
use super::meta::{Kind, kind_of};
use rustix::fs::{AtFlags, RawDir, unlinkat};
use rustix::io::Errno;
use std::io;

/// Names of sub-directories remembered over all levels; beyond it a level remembers one at a time.
const HELD_BYTES: usize = 4 << 20;
/// What one remembered name costs besides its bytes.
const HELD_OVERHEAD: usize = 48;
/// How often a directory may turn out not to be empty after all, because others fill it.
const PASSES: u32 = 16;

/// A directory being emptied.
struct Level {
    name: Vec<u8>,
    dev: u64,
    ino: u64,
    /// Sub-directories still to be removed.
    pending: Vec<Vec<u8>>,
    /// Whether everything else is removed and `pending` is all that was left.
    scanned: bool,
    passes: u32,
}

impl Dir {
    /// Removes the entry `name` and everything below it; stops at the first error.
    ///
    /// # Errors
    /// `EBUSY` when something is mounted in the tree; `NotFound` when there is no such entry.
    pub fn remove_tree(&self, name: &[u8]) -> io::Result<()> {
        match unlinkat(self, checked(name)?, AtFlags::empty()) {
            Err(Errno::ISDIR | Errno::PERM) => {}
            done => return Ok(done?),
        }
        let (mut here, top) = enter(self, name, self.stat()?.dev)?;
        let mut levels = vec![top];
        let mut held = 0;
        let mut buffer = Vec::with_capacity(32 << 10);
        while let Some(level) = levels.last_mut() {
            if let Some(name) = level.pending.pop() {
                held -= name.len() + HELD_OVERHEAD;
                let dev = level.dev;
                if let Some((dir, level)) = enter_or_unlink(&here, &name, dev)? {
                    here = dir;
                    levels.push(level);
                }
            } else if !level.scanned {
                level.scan(&here, &mut held, &mut buffer)?;
            } else {
                let parent = match levels.iter().nth_back(1) {
                    Some(above) => here.reopen_parent(above.dev, above.ino)?,
                    None => self.clone(),
                };
                if remove_emptied(&parent, &mut levels)? {
                    here = parent;
                }
            }
        }
        Ok(())
    }
}

/// Removes the innermost directory; false when somebody put something into it.
fn remove_emptied(parent: &Dir, levels: &mut Vec<Level>) -> io::Result<bool> {
    let Some(level) = levels.last_mut() else {
        return Ok(false);
    };
    match unlinkat(parent, level.name.as_slice(), AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => {
            levels.pop();
            Ok(true)
        }
        Err(Errno::NOTEMPTY | Errno::EXIST) if level.passes < PASSES => {
            level.passes += 1;
            level.scanned = false;
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

fn enter(parent: &Dir, name: &[u8], parent_dev: u64) -> io::Result<(Dir, Level)> {
    let dir = parent.open_closed_dir(name)?;
    let (meta, mounted) = dir.stat_mounted(parent_dev)?;
    if mounted {
        return Err(Errno::BUSY.into());
    }
    // A folder of one's own that is closed to oneself is no obstacle.
    dir.widen(&meta)?;
    let level = Level {
        name: name.to_vec(),
        dev: meta.dev,
        ino: meta.ino,
        pending: Vec::new(),
        scanned: false,
        passes: 0,
    };
    Ok((dir, level))
}

/// Enters what was a directory when it was listed; whatever it is by now is unlinked instead.
fn enter_or_unlink(parent: &Dir, name: &[u8], dev: u64) -> io::Result<Option<(Dir, Level)>> {
    let error = match enter(parent, name, dev) {
        Ok(entered) => return Ok(Some(entered)),
        Err(error) => error,
    };
    match Errno::from_io_error(&error) {
        Some(Errno::NOENT) => Ok(None),
        Some(Errno::NOTDIR | Errno::LOOP) => match unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT | Errno::ISDIR) => Ok(None), // a directory: the next pass
            Err(error) => Err(error.into()),
        },
        _ => Err(error),
    }
}

impl Level {
    /// Unlinks everything but the sub-directories, and remembers those.
    fn scan(&mut self, dir: &Dir, held: &mut usize, buffer: &mut Vec<u8>) -> io::Result<()> {
        let mut entries = RawDir::new(dir.reopen()?, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if kind_of(entry.file_type()) != Some(Kind::Dir) {
                match unlinkat(dir, name, AtFlags::empty()) {
                    Ok(()) | Err(Errno::NOENT) => continue,
                    Err(Errno::ISDIR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            *held += name.to_bytes().len() + HELD_OVERHEAD;
            self.pending.push(name.to_bytes().to_vec());
            if *held > HELD_BYTES {
                return Ok(()); // not `scanned`: there may be more
            }
        }
        self.scanned = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::testing::{fresh, is_root};
    use std::os::unix::fs::symlink;
    use std::path::Path;

    fn is_empty(path: &Path) -> bool {
        std::fs::read_dir(path).unwrap().next().is_none()
    }

    #[test]
    fn tree_deeper_than_paths_and_stacks_go_is_removed() {
        // In memory where possible: a disk that discards each freed block takes minutes for this.
        let (place, levels) = match Path::new("/dev/shm") {
            shm if shm.is_dir() => (shm.to_path_buf(), 100_000),
            _ => (std::env::temp_dir(), 10_000),
        };
        let temp = tempfile::tempdir_in(place).unwrap();
        let dir = Dir::open_root(temp.path()).unwrap();
        let mut here = dir.make_dir(b"deep").unwrap();
        for _ in 0..levels {
            here = here.make_dir(b"d").unwrap();
        }
        here.create_file(b"bottom").unwrap();
        drop(here);
        dir.remove_tree(b"deep").unwrap();
        assert!(is_empty(temp.path()));
    }

    #[test]
    fn wide_tree_is_removed_and_links_out_of_it_are_not_followed() {
        let (temp, dir) = fresh();
        std::fs::create_dir(temp.path().join("kept")).unwrap();
        std::fs::write(temp.path().join("kept/file"), b"x").unwrap();
        let wide = temp.path().join("wide");
        for sub in 0..300 {
            std::fs::create_dir_all(wide.join(format!("{sub}/below"))).unwrap();
            std::fs::write(wide.join(format!("{sub}/file")), b"x").unwrap();
            symlink("../../kept", wide.join(format!("{sub}/below/link"))).unwrap();
        }
        symlink("../kept", wide.join("link")).unwrap();
        dir.remove_tree(b"wide").unwrap();
        assert!(!wide.exists());
        assert!(temp.path().join("kept/file").exists());
    }

    #[test]
    fn more_subdirectories_than_are_remembered_are_removed() {
        let (temp, dir) = fresh();
        let top = dir.make_dir(b"top").unwrap();
        // 200 names of 255 bytes against a budget which is already used up but for a few.
        for sub in 0..200 {
            top.make_dir(format!("{sub:0>255}").as_bytes()).unwrap();
        }
        let dev = dir.stat().unwrap().dev;
        let mut level = enter(&dir, b"top", dev).unwrap().1;
        let mut held = HELD_BYTES - 3 * 255;
        level.scan(&top, &mut held, &mut Vec::with_capacity(4096)).unwrap();
        assert!(!level.scanned);
        assert_eq!(level.pending.len(), 3);
        dir.remove_tree(b"top").unwrap();
        assert!(is_empty(temp.path()));
    }

    #[test]
    fn single_files_and_links_are_removed_and_missing_ones_reported() {
        let (temp, dir) = fresh();
        dir.create_file(b"file").unwrap();
        symlink("/etc", temp.path().join("link")).unwrap();
        dir.remove_tree(b"file").unwrap();
        dir.remove_tree(b"link").unwrap();
        assert!(is_empty(temp.path()));
        assert_eq!(dir.remove_tree(b"file").unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn directory_that_became_a_link_is_unlinked_not_entered() {
        let (temp, dir) = fresh();
        symlink("/etc", temp.path().join("was-a-dir")).unwrap();
        assert!(enter_or_unlink(&dir, b"was-a-dir", 0).unwrap().is_none());
        assert!(is_empty(temp.path()));
    }

    #[test]
    fn mounted_file_systems_are_not_entered() {
        if !is_root("the refusal to cross mounts") {
            return;
        }
        let root = Dir::open_root("/".as_ref()).unwrap();
        let dev = root.stat().unwrap().dev;
        let error = enter(&root, b"proc", dev).map(|_| ()).unwrap_err();
        assert_eq!(Errno::from_io_error(&error), Some(Errno::BUSY));
    }
}
