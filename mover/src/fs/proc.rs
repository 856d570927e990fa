//! Names for what is open, for calls that take no descriptor of it: the magic links of `/proc`.
//!
//! Where `/proc` is not mounted, as in a rescue system or after chroot, one of our own serves, which only
//! root can have. It is nowhere in the file tree: for each call a thread goes there that shares its
//! working folder with no other.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{PROC_SUPER_MAGIC, statfs};
use rustix::io::{Errno, Result};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use rustix::process::fchdir;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Calls `call` with a path of what is open as `fd`, followed by `below`. Of `fd` alone the last component is a
/// link, which leads to the entry itself and nothing beyond.
pub(super) fn by_path<T: Send>(
    fd: BorrowedFd<'_>,
    below: &[u8],
    call: impl FnOnce(&[u8]) -> Result<T> + Send,
) -> Result<T> {
    static OWN: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let own = OWN.get_or_init(|| if is_mounted() { None } else { mount().ok() });
    let link = format!("self/fd/{}", fd.as_raw_fd());
    match own {
        None => call(&[b"/proc/", link.as_bytes(), below].concat()),
        Some(own) => within(own, || call(&[link.as_bytes(), below].concat())),
    }
}

fn is_mounted() -> bool {
    statfs("/proc").is_ok_and(|fs| fs.f_type == PROC_SUPER_MAGIC)
}

fn mount() -> Result<OwnedFd> {
    let proc = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&proc)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&proc, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Calls `call` with `folder` as the working folder.
fn within<T: Send>(folder: &OwnedFd, call: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, || {
            #[expect(
                unsafe_code,
                reason = "only unsharing descriptors could break what others hold"
            )]
            // SAFETY: of the things that can be unshared, this is the working folder, not the descriptors.
            unsafe {
                unshare_unsafe(UnshareFlags::FS)?;
            }
            fchdir(folder)?;
            call()
        });
        match thread.map(|thread| thread.join()) {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(_) => Err(Errno::AGAIN),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::testing::{fresh, is_root};
    use std::os::fd::AsFd;

    #[test]
    fn a_proc_of_our_own_leads_to_the_same() {
        if !is_root("a /proc of our own") {
            return;
        }
        assert!(is_mounted());
        let (_temp, dir) = fresh();
        let file = dir.create_file(b"f").unwrap();
        let own = mount().unwrap();
        let before = std::env::current_dir().unwrap();
        let path = format!("self/fd/{}", file.as_raw_fd());
        let found = within(&own, || rustix::fs::stat(path.as_str())).unwrap();
        let expected = by_path(file.as_fd(), b"", |path| rustix::fs::stat(path)).unwrap();
        assert_eq!((found.st_dev, found.st_ino), (expected.st_dev, expected.st_ino));
        let below = by_path(dir.as_fd(), b"/f", |path| rustix::fs::stat(path)).unwrap();
        assert_eq!(below.st_ino, expected.st_ino);
        assert_eq!(std::env::current_dir().unwrap(), before, "only the thread was there");
    }
}
