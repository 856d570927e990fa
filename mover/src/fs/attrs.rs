//! Metadata put back on what was restored: exactly what the snapshot has, and nothing else.
//!
//! ```text
//! owner ─> extended attributes: unwanted ones removed, wanted ones set ─> mode ─> mtime
//!   └ clears setuid bits and security.capability, so it comes first
//! ```
//! The mode comes after the attributes, since only who may write to a file may set its `user.*` ones, and since
//! an ACL moves the mode.
//!
//! Symlinks, devices, FIFOs and sockets are pinned with an `O_PATH` handle and checked to be of the
//! expected kind before anything is applied: there is no call that changes the mode of a name
//! without following symlinks (before Linux 6.6), and what was swapped in must not get the owner.
//!
//! Rights (setuid, setgid, file capabilities) are given only together with the owner they were saved with.
//!
//! Not done: the access time is not restored, it becomes the modification time. Labels that the system itself
//! gives (SELinux …) stay where the snapshot has none.

use super::dir::{Dir, checked, statx_fd};
use super::meta::{Kind, Meta, Timestamp};
use super::proc::by_path;
use super::xattr::list;
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

/// What metadata is applied to.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// An open file.
    File(&'a File),
    /// An open directory.
    Dir(&'a Dir),
    /// A name that must not be opened: a symlink, device, FIFO or socket.
    Name(&'a Dir, &'a [u8]),
}

/// How [`apply`] goes about it.
#[derive(Clone, Copy, Debug, Default)]
pub struct ApplyOptions {
    /// Whether to set user and group. Without it nothing gets setuid or setgid bits, or capabilities.
    pub owner: bool,
    /// What the target has now, where known: saves the calls that would change nothing.
    pub current: Option<Current>,
    /// Whether the target is known to have no extended attributes, which saves the call that looks for
    /// unwanted ones.
    pub bare: bool,
    /// Device and inode that a [`Target::Name`] must have.
    pub inode: Option<(u64, u64)>,
}

/// Owner and mode a target has before [`apply`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Current {
    /// The owning user.
    pub uid: u32,
    /// The owning group.
    pub gid: u32,
    /// The 12 permission bits.
    pub mode: u32,
}

impl From<&Meta> for Current {
    fn from(meta: &Meta) -> Self {
        Self { uid: meta.uid, gid: meta.gid, mode: meta.mode }
    }
}

/// A piece of metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attr {
    /// All of it: the entry is not there (any more) or is something else by now.
    Entry,
    /// User and group.
    Owner,
    /// The permission bits.
    Mode,
    /// The extended attribute of this name.
    Xattr(Vec<u8>),
    /// The extended attribute of this name, which the snapshot lacks.
    Unwanted(Vec<u8>),
    /// The names of all extended attributes.
    Listing,
    /// Setuid and setgid bits, and capabilities.
    Rights,
    /// The modification time.
    Times,
}

impl std::fmt::Display for Attr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Entry => f.write_str("metadata"),
            Self::Owner => f.write_str("owner"),
            Self::Mode => f.write_str("mode"),
            Self::Xattr(name) => write!(f, "extended attribute {}", name.escape_ascii()),
            Self::Unwanted(name) => {
                write!(f, "extended attribute {}, which the snapshot lacks", name.escape_ascii())
            }
            Self::Listing => f.write_str("extended attributes that the snapshot lacks"),
            Self::Rights => f.write_str("special rights"),
            Self::Times => f.write_str("modification time"),
        }
    }
}

/// A piece of metadata that could not be applied.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {error}")]
pub struct AttrFailure {
    /// What could not be applied.
    pub what: Attr,
    /// Why.
    #[source]
    pub error: io::Error,
}

impl AttrFailure {
    /// What to say of it to people.
    pub fn told(&self) -> String {
        let verb = match self.what {
            Attr::Unwanted(_) | Attr::Listing => "removed",
            _ => "set",
        };
        format!("cannot be {verb}: {self}")
    }
}

/// The attribute that holds a file's capabilities.
pub const CAPABILITY: &[u8] = b"security.capability";
/// Labels that security modules give to everything, and that nobody may take away.
const LABELS: [&[u8]; 5] = [
    b"security.selinux",
    b"security.ima",
    b"security.evm",
    b"security.apparmor",
    b"security.SMACK64",
];
const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

/// Whether an attribute belongs to the entry rather than to the system or the file system: only such ones are
/// removed where the snapshot lacks them.
pub fn is_own_attribute(name: &[u8]) -> bool {
    !(LABELS.contains(&name) || (name.starts_with(b"system.") && !ACLS.contains(&name)))
}

/// Whether an attribute is an access control list, which new entries inherit from their folder.
pub(super) fn is_acl(name: &[u8]) -> bool {
    ACLS.contains(&name)
}

/// Whether the mode or an attribute gives whoever runs the file the rights of somebody else.
pub fn gives_rights(mode: u32, xattrs: &[(Vec<u8>, Vec<u8>)]) -> bool {
    mode & 0o6000 != 0 || xattrs.iter().any(|(name, _)| name == CAPABILITY)
}

/// Applies owner, extended attributes, mode and modification time to `target`, going on after failures, and
/// removes the extended attributes that it has beyond `xattrs`. Without the right owner nothing gets rights.
pub fn apply(
    target: Target<'_>,
    meta: &Meta,
    xattrs: &[(Vec<u8>, Vec<u8>)],
    options: &ApplyOptions,
) -> Vec<AttrFailure> {
    let pinned;
    let handle = match target {
        Target::File(file) => Handle { fd: file.as_fd(), path_only: false },
        Target::Dir(dir) => Handle { fd: dir.as_fd(), path_only: false },
        Target::Name(dir, name) => match pin(dir, name, meta.kind, options.inode) {
            Ok(fd) => {
                pinned = fd;
                Handle { fd: pinned.as_fd(), path_only: true }
            }
            Err(error) => {
                return vec![AttrFailure { what: Attr::Entry, error }];
            }
        },
    };
    let mut failures = Vec::new();
    let mut note = |what: Attr, result: io::Result<()>| {
        let done = result.is_ok();
        failures.extend(result.err().map(|error| AttrFailure { what, error }));
        done
    };

    let mut owned = options.current.is_some_and(|now| (now.uid, now.gid) == (meta.uid, meta.gid));
    let chown = options.owner && !owned;
    if chown {
        owned = note(Attr::Owner, handle.chown(meta.uid, meta.gid));
    }
    let rights = options.owner && owned;
    if options.owner && !owned && gives_rights(meta.mode, xattrs) {
        note(Attr::Rights, Err(io::Error::other("they are given only together with the owner")));
    }

    let mut attributes =
        Attributes { handle: &handle, kind: meta.kind, widened: false, acl: false };
    if !options.bare {
        match handle.list_xattrs() {
            Ok(names) => {
                for name in names.iter().filter(|name| is_own_attribute(name)) {
                    if !xattrs.iter().any(|(wanted, _)| wanted == name)
                        || (name == CAPABILITY && !rights)
                    {
                        note(Attr::Unwanted(name.clone()), attributes.change(name, None));
                    }
                }
            }
            Err(error) => {
                note(Attr::Listing, Err(error));
            }
        }
    }
    for (name, value) in xattrs {
        if name != CAPABILITY || rights {
            note(Attr::Xattr(name.clone()), attributes.change(name, Some(value)));
        }
    }
    let Attributes { widened, acl, .. } = attributes;

    let mode = meta.mode & if rights { 0o7777 } else { 0o1777 };
    if meta.kind != Kind::Symlink {
        // chown may have cleared the setuid and setgid bits, but no others.
        let stays = !widened && (!chown || mode & 0o6000 == 0);
        if !(stays && options.current.is_some_and(|now| now.mode == mode)) {
            note(Attr::Mode, handle.chmod(mode));
        } else if acl {
            note(Attr::Mode, handle.chmod_unless(mode));
        }
        // The system leaves out setgid, without an error, for who is not in the group.
        if mode & 0o6000 != 0 && !rustix::process::geteuid().is_root() {
            note(Attr::Rights, handle.has_mode(mode));
        }
    }

    note(Attr::Times, handle.set_mtime(meta.mtime));
    failures
}

fn pin(dir: &Dir, name: &[u8], kind: Kind, inode: Option<(u64, u64)>) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(dir, checked(name)?, flags, Mode::empty())?;
    let found = Meta::of(&statx_fd(&fd)?)?;
    if found.kind != kind {
        let found = found.kind;
        return Err(io::Error::other(format!("a {found:?} took the place of the {kind:?}")));
    }
    if inode.is_some_and(|inode| inode != (found.dev, found.ino)) {
        return Err(io::Error::other("another file took its place"));
    }
    Ok(fd.into())
}

impl Dir {
    /// Sets the modification time of the directory itself, and leaves the access time.
    pub fn set_mtime(&self, mtime: Timestamp) -> io::Result<()> {
        let omit = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
        let time = Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanos.into() };
        let times = Timestamps { last_access: omit, last_modification: time };
        Ok(rustix::fs::futimens(self, &times)?)
    }
}

/// Lets the owner read, write and enter the directory `name`, if it is his own.
///
/// # Errors
/// Those of the system; `Other` when it is no directory.
pub(super) fn widen_dir(dir: &Dir, name: &[u8]) -> io::Result<()> {
    let fd = pin(dir, name, Kind::Dir, None)?;
    let handle = Handle { fd: fd.as_fd(), path_only: true };
    let mode = Meta::of(&statx_fd(&fd)?)?.mode;
    handle.chmod(mode | 0o700)
}

/// The extended attributes of a target while they are changed.
struct Attributes<'a> {
    handle: &'a Handle<'a>,
    kind: Kind,
    /// Whether the owner was let write for it.
    widened: bool,
    /// Whether an attribute was changed that may move the mode.
    acl: bool,
}

impl Attributes<'_> {
    /// Sets an attribute, or removes it.
    fn change(&mut self, name: &[u8], value: Option<&[u8]>) -> io::Result<()> {
        let attempt = || match value {
            Some(value) => self.handle.set_xattr(name, value),
            None => self.handle.remove_xattr(name),
        };
        let mut done = attempt();
        let denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        if done.as_ref().is_err_and(denied) && !self.widened && self.kind != Kind::Symlink {
            // Even the owner sets `user.*` attributes only of what he may write to.
            let mode = if self.kind == Kind::Dir { 0o700 } else { 0o600 };
            if self.handle.chmod(mode).is_ok() {
                done = attempt();
                self.widened = true;
            }
        }
        self.acl |= done.is_ok() && name.starts_with(b"system.");
        match done {
            Err(error)
                if value.is_none() && Errno::from_io_error(&error) == Some(Errno::NODATA) =>
            {
                Ok(())
            }
            done => done,
        }
    }
}

/// An open entry; one that is `path_only` takes only some calls, the others go through `/proc`.
struct Handle<'a> {
    fd: BorrowedFd<'a>,
    path_only: bool,
}

impl Handle<'_> {
    fn chown(&self, uid: u32, gid: u32) -> io::Result<()> {
        // All ones means "leave it" to the kernel and is no valid id.
        if uid == u32::MAX || gid == u32::MAX {
            return Err(Errno::INVAL.into());
        }
        let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        Ok(rustix::fs::chownat(self.fd, c"", uid, gid, AtFlags::EMPTY_PATH)?)
    }

    fn chmod(&self, mode: u32) -> io::Result<()> {
        let mode = Mode::from_raw_mode(mode);
        if self.path_only {
            by_path(self.fd, b"", |path| rustix::fs::chmodat(CWD, path, mode, AtFlags::empty()))?;
        } else {
            rustix::fs::fchmod(self.fd, mode)?;
        }
        Ok(())
    }

    fn chmod_unless(&self, mode: u32) -> io::Result<()> {
        let now = Meta::of(&statx_fd(self.fd)?)?.mode;
        if now == mode { Ok(()) } else { self.chmod(mode) }
    }

    fn set_xattr(&self, name: &[u8], value: &[u8]) -> io::Result<()> {
        let flags = XattrFlags::empty();
        if self.path_only {
            by_path(self.fd, b"", |path| rustix::fs::setxattr(path, name, value, flags))?;
        } else {
            rustix::fs::fsetxattr(self.fd, name, value, flags)?;
        }
        Ok(())
    }

    fn has_mode(&self, mode: u32) -> io::Result<()> {
        let now = Meta::of(&statx_fd(self.fd)?)?.mode;
        if now == mode {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "the system left them out: the mode is {now:o}, not {mode:o}"
        )))
    }

    fn list_xattrs(&self) -> io::Result<Vec<Vec<u8>>> {
        if self.path_only {
            list(|buffer| by_path(self.fd, b"", |path| rustix::fs::listxattr(path, buffer)))
        } else {
            list(|buffer| rustix::fs::flistxattr(self.fd, buffer))
        }
    }

    fn remove_xattr(&self, name: &[u8]) -> io::Result<()> {
        if self.path_only {
            by_path(self.fd, b"", |path| rustix::fs::removexattr(path, name))?;
        } else {
            rustix::fs::fremovexattr(self.fd, name)?;
        }
        Ok(())
    }

    fn set_mtime(&self, mtime: Timestamp) -> io::Result<()> {
        // The access time is set as well: FUSE file systems are known that set neither when one of
        // them is to be left (bindfs 1.14).
        let time = Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanos.into() };
        let times = Timestamps { last_access: time, last_modification: time };
        // Nanoseconds out of range are magic values to the kernel.
        if mtime.nanos >= 1_000_000_000 {
            return Err(Errno::INVAL.into());
        }
        if !self.path_only {
            return Ok(rustix::fs::futimens(self.fd, &times)?);
        }
        match rustix::fs::utimensat(self.fd, c"", &times, AtFlags::EMPTY_PATH) {
            // Before Linux 5.8.
            Err(Errno::INVAL) => {
                let set = |path: &[u8]| rustix::fs::utimensat(CWD, path, &times, AtFlags::empty());
                Ok(by_path(self.fd, b"", set)?)
            }
            done => Ok(done?),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::testing::{fresh, is_root, say_loudly};

    const MTIMES: [Timestamp; 3] = [
        Timestamp { seconds: 1_700_000_000, nanos: 123_456_789 },
        Timestamp { seconds: -1, nanos: 999_999_999 },
        Timestamp { seconds: -86_400 * 365, nanos: 1 },
    ];

    fn owner() -> ApplyOptions {
        ApplyOptions { owner: true, ..ApplyOptions::default() }
    }

    /// An ACL: owner rw-, user 1234 r--, group r--, mask r--, other ---.
    fn acl() -> Vec<u8> {
        let none = u32::MAX;
        let entries = [
            (0x01_u16, 6_u16, none),
            (0x02, 4, 1234),
            (0x04, 4, none),
            (0x10, 4, none),
            (0x20, 0, none),
        ];
        let mut blob = 2_u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in entries {
            blob.extend(tag.to_le_bytes());
            blob.extend(permissions.to_le_bytes());
            blob.extend(id.to_le_bytes());
        }
        blob
    }

    #[test]
    fn nanosecond_times_are_kept_also_before_1970() {
        let (_temp, dir) = fresh();
        let file = dir.create_file(b"file").unwrap();
        let sub = dir.make_dir(b"dir").unwrap();
        dir.make_symlink(b"link", b"nowhere").unwrap();
        dir.make_node(b"fifo", Kind::Fifo, 0, 0).unwrap();
        for mtime in MTIMES {
            for (name, target) in [
                (&b"file"[..], Target::File(&file)),
                (b"dir", Target::Dir(&sub)),
                (b"link", Target::Name(&dir, b"link")),
                (b"fifo", Target::Name(&dir, b"fifo")),
            ] {
                let meta = Meta { mtime, ..dir.lstat(name).unwrap() };
                assert!(apply(target, &meta, &[], &owner()).is_empty());
                assert_eq!(dir.lstat(name).unwrap().mtime, mtime);
            }
        }
        let meta = Meta {
            mtime: Timestamp { seconds: 0, nanos: 1_000_000_000 },
            ..dir.lstat(b"file").unwrap()
        };
        assert_eq!(apply(Target::File(&file), &meta, &[], &owner())[0].what, Attr::Times);
    }

    #[test]
    fn owner_and_setuid_bits_are_kept_for_every_kind() {
        if !is_root("the change of owners") {
            return;
        }
        let (_temp, dir) = fresh();
        let file = dir.create_file(b"file").unwrap();
        let sub = dir.make_dir(b"dir").unwrap();
        dir.make_symlink(b"link", b"file").unwrap();
        dir.make_node(b"fifo", Kind::Fifo, 0, 0).unwrap();
        dir.make_node(b"socket", Kind::Socket, 0, 0).unwrap();
        dir.make_node(b"device", Kind::CharDevice, 1, 3).unwrap();
        for (name, target, mode) in [
            (&b"file"[..], Target::File(&file), 0o6755),
            (b"dir", Target::Dir(&sub), 0o3775),
            (b"link", Target::Name(&dir, b"link"), 0o777),
            (b"fifo", Target::Name(&dir, b"fifo"), 0o640),
            (b"socket", Target::Name(&dir, b"socket"), 0o755),
            (b"device", Target::Name(&dir, b"device"), 0o4666),
        ] {
            for current in [None, Some(Current::from(&dir.lstat(name).unwrap()))] {
                let now = dir.lstat(name).unwrap();
                let meta = Meta { uid: 1234, gid: 4321, mode, mtime: MTIMES[1], ..now };
                let options = ApplyOptions { owner: true, current, ..ApplyOptions::default() };
                assert!(apply(target, &meta, &[], &options).is_empty());
                let now = dir.lstat(name).unwrap();
                assert_eq!((now.uid, now.gid, now.mode), (1234, 4321, mode), "{name:?}");
            }
        }
        let file = dir.lstat(b"file").unwrap();
        assert_eq!(file.uid, 1234, "the link's target kept its own");
    }

    #[test]
    fn rights_are_left_out_without_the_owner() {
        let (_temp, dir) = fresh();
        let file = dir.create_file(b"file").unwrap();
        let now = dir.lstat(b"file").unwrap();
        let meta = Meta { mode: 0o6755, ..now };
        let capability = [(CAPABILITY.to_vec(), vec![0; 20])];
        // Whether or not the owner is the right one by chance.
        for current in [None, Some(Current::from(&now))] {
            let options = ApplyOptions { current, ..ApplyOptions::default() };
            assert!(apply(Target::File(&file), &meta, &capability, &options).is_empty());
            assert_eq!(dir.lstat(b"file").unwrap().mode, 0o755);
            assert!(super::super::file_xattrs(&file).unwrap().entries.is_empty());
        }
        // A chown that fails, for root too: no such id.
        let meta = Meta { uid: u32::MAX, ..meta };
        let failures = apply(Target::File(&file), &meta, &capability, &owner());
        let what: Vec<_> = failures.into_iter().map(|failure| failure.what).collect();
        assert_eq!(what, [Attr::Owner, Attr::Rights]);
        assert_eq!(dir.lstat(b"file").unwrap().mode, 0o755);
    }

    #[test]
    fn what_the_snapshot_lacks_goes() {
        let (_temp, dir) = fresh();
        let file = dir.create_file(b"file").unwrap();
        let sub = dir.make_dir(b"dir").unwrap();
        let wanted = [(b"user.wanted".to_vec(), b"1".to_vec())];
        let set = |name: &[u8], value: &[u8]| {
            super::super::set_file_xattr(&file, name, value)
                .and_then(|()| sub.set_own_xattr(name, value))
        };
        for (name, value) in [
            (&b"user.evil"[..], b"x".to_vec()),
            (b"user.wanted", b"other".to_vec()),
            (b"system.posix_acl_access", acl()),
        ] {
            if let Err(error) = set(name, &value) {
                say_loudly(&format!("NO {} HERE ({error})", name.escape_ascii()));
            }
        }
        // Folders only.
        let _none = sub.set_own_xattr(b"system.posix_acl_default", &acl());
        for (name, target) in [(&b"file"[..], Target::File(&file)), (b"dir", Target::Dir(&sub))] {
            let meta = Meta { mode: 0o750, ..dir.lstat(name).unwrap() };
            let current = Some(Current::from(&dir.lstat(name).unwrap()));
            let options = ApplyOptions { current, ..owner() };
            let failures = apply(target, &meta, &wanted, &options);
            assert!(failures.is_empty(), "{failures:?}");
            assert_eq!(dir.xattrs(name).unwrap().entries, wanted);
            assert_eq!(dir.lstat(name).unwrap().mode, 0o750);
        }
    }

    #[test]
    fn labels_of_the_system_are_not_unwanted() {
        for (name, own) in [
            (&b"user.x"[..], true),
            (b"trusted.x", true),
            (b"security.capability", true),
            (b"system.posix_acl_default", true),
            (b"security.selinux", false),
            (b"system.nfs4_acl", false),
        ] {
            assert_eq!(is_own_attribute(name), own, "{}", name.escape_ascii());
        }
    }

    #[test]
    fn acls_and_capabilities_survive_the_owner() {
        let (_temp, dir) = fresh();
        let file = dir.create_file(b"file").unwrap();
        let access = b"system.posix_acl_access".to_vec();
        if let Err(error) = super::super::set_file_xattr(&file, &access, &acl()) {
            say_loudly(&format!("NO ACLS HERE ({error}): THEY ARE NOT TESTED"));
            return;
        }
        if !is_root("capabilities") {
            return;
        }
        let file = dir.create_file(b"new").unwrap();
        // Version 2, CAP_NET_BIND_SERVICE permitted.
        let capability = [0, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0].to_vec();
        let xattrs = [(b"security.capability".to_vec(), capability), (access, acl())];
        let meta = Meta { uid: 1234, mode: 0o4640, ..dir.lstat(b"new").unwrap() };
        assert!(apply(Target::File(&file), &meta, &xattrs, &owner()).is_empty());
        assert_eq!(super::super::file_xattrs(&file).unwrap().entries, xattrs);
        let now = dir.lstat(b"new").unwrap();
        assert_eq!((now.uid, now.mode), (1234, 0o4640));
        let sub = dir.make_dir(b"dir").unwrap();
        let xattrs = [(b"system.posix_acl_default".to_vec(), acl())];
        let meta = Meta { mode: 0o2750, ..sub.stat().unwrap() };
        assert!(apply(Target::Dir(&sub), &meta, &xattrs, &owner()).is_empty());
        assert_eq!(sub.own_xattrs().unwrap().entries, xattrs);
        assert_eq!(sub.stat().unwrap().mode, 0o2750);
    }

    #[test]
    fn mode_moved_by_an_acl_is_set_again() {
        let (_temp, dir) = fresh();
        let file = dir.create_file(b"file").unwrap();
        let xattrs = [(b"system.posix_acl_access".to_vec(), acl())];
        let meta = Meta { mode: 0o755, ..dir.lstat(b"file").unwrap() };
        apply(Target::File(&file), &meta, &xattrs, &owner());
        assert_eq!(dir.lstat(b"file").unwrap().mode, 0o755);
    }

    #[test]
    fn attributes_of_links_are_set_on_the_link() {
        if !is_root("attributes of symlinks") {
            return;
        }
        let (_temp, dir) = fresh();
        dir.create_file(b"file").unwrap();
        dir.make_symlink(b"link", b"file").unwrap();
        let xattrs = [(b"trusted.t".to_vec(), b"v".to_vec())];
        let meta = dir.lstat(b"link").unwrap();
        assert!(apply(Target::Name(&dir, b"link"), &meta, &xattrs, &owner()).is_empty());
        assert_eq!(dir.xattrs(b"link").unwrap().entries, xattrs);
        assert!(dir.xattrs(b"file").unwrap().entries.is_empty());
    }

    #[test]
    fn entry_swapped_for_a_link_is_left_alone() {
        let (temp, dir) = fresh();
        dir.make_node(b"fifo", Kind::Fifo, 0, 0).unwrap();
        let meta = Meta { mode: 0o777, mtime: MTIMES[0], ..dir.lstat(b"fifo").unwrap() };
        dir.create_file(b"victim").unwrap();
        dir.unlink(b"fifo").unwrap();
        std::os::unix::fs::symlink("victim", temp.path().join("fifo")).unwrap();
        let before = dir.lstat(b"victim").unwrap();
        let failures = apply(Target::Name(&dir, b"fifo"), &meta, &[], &owner());
        assert_eq!(failures[0].to_string(), "metadata: a Symlink took the place of the Fifo");
        assert_eq!(dir.lstat(b"victim").unwrap(), before);
    }
}
