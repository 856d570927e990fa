//! Walking the folders of a store as streams: memory and open files follow the depth, never the
//! number of objects.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;

use rustix::fs::{Dir, FileType};
use rustix::io::Errno;

use super::{LocalStore, folder};
use crate::key::{self, KEY_BYTES_MAX};
use crate::{Error, Result};

/// Is given the opened folder, its path (empty or with a final `/`) and a name in it.
pub(super) type Visit<'a> = dyn FnMut(BorrowedFd<'_>, &str, &CStr) -> Result<()> + 'a;

impl LocalStore {
    /// Calls `visit` for every name below the folder `prefix` that is no folder itself.
    ///
    /// Folders that vanish meanwhile count as empty, and those whose name no key can have are left
    /// out. A folder that cannot be read is an error: a listing must not be silently incomplete.
    pub(super) fn walk(
        &self,
        operation: &'static str,
        prefix: &str,
        visit: &mut Visit<'_>,
    ) -> Result<()> {
        let fail = |path: &str, err: Errno| Error::from_io(operation, path, err.into());
        let top = match folder::open(&self.root, prefix) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            top => top.map_err(|err| fail(prefix, err))?,
        };
        let mut path = prefix.to_owned();
        let mut open = vec![(Dir::new(top).map_err(|err| fail(prefix, err))?, path.len())];
        while let Some((dir, len)) = open.last_mut() {
            path.truncate(*len);
            let entry = match dir.read() {
                None | Some(Err(Errno::NOENT)) => {
                    open.pop();
                    continue;
                }
                Some(entry) => entry.map_err(|err| fail(&path, err))?,
            };
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let here = dir.fd().map_err(|err| fail(&path, err))?;
            let kind = entry.file_type();
            if !matches!(kind, FileType::Directory | FileType::Unknown) {
                visit(here, &path, name)?;
                continue;
            }
            if !key::is_segment(name.to_bytes()) || path.len() + name.count_bytes() >= KEY_BYTES_MAX
            {
                if kind == FileType::Unknown {
                    visit(here, &path, name)?;
                }
                continue;
            }
            match folder::enter(here, name).and_then(Dir::new) {
                Ok(inner) => {
                    path.push_str(&name.to_string_lossy());
                    path.push('/');
                    open.push((inner, path.len()));
                }
                Err(Errno::NOTDIR | Errno::LOOP) => visit(here, &path, name)?,
                Err(Errno::NOENT) => {}
                Err(err) => return Err(fail(&path, err)),
            }
        }
        Ok(())
    }
}
