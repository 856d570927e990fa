//! What is in the place of a file already: whether it stays, and whether it is what the snapshot has.
//!
//! Size and modification time tell that a file is unchanged only where nobody gains by a lie: not where the file belongs
//! to another user than it is to, nor where it is about to get special rights. A file with several names is
//! left only if nothing about it has to be changed, since not all of these names need be in the target.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use chunkstore::pack::BlobKind;
use chunkstore::tree::{Body, Chunk, Content, EntryCursor, Node, State, TreeCursor};

use crate::fs::{
    ApplyOptions, CAPABILITY, Current, Dir, Kind, Meta, Target, Xattrs, apply, gives_rights,
    is_own_attribute,
};

use super::links::{Known, LinkKey, known, set_known};
use super::place::IS_PROTECTED;
use super::plan::{At, Planner, is_within, path_of};
use super::window::{meta_of, name_of};
use super::{Overwrite, Shared, count};

/// Bytes that are compared with zeros at a time.
const ZEROS: usize = 64 << 10;

impl Planner<'_> {
    /// Whether what is there already stays, or cannot be replaced.
    pub(super) fn leave_existing(&self, folder: u32, (leaf, at): At<'_>, node: &Node) -> bool {
        let key = &leaf.leaf.entries[at].key;
        let (shared, name) = (self.shared, name_of(key));
        let found = shared.folders.dir(folder).and_then(|dir| {
            let now = dir.lstat(name)?;
            Ok((dir, now))
        });
        let (dir, now) = match found {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return false,
            Err(error) => {
                shared.fail_io(&path_of(key), "what is in its place cannot be looked at", &error);
                return true;
            }
        };
        if shared.options.protected.contains(now.dev, now.ino) {
            shared.fail(&path_of(key), IS_PROTECTED);
            return true;
        }
        match shared.options.overwrite {
            Overwrite::Always => return false,
            Overwrite::Never => {}
            Overwrite::IfChanged if now.kind == Kind::Dir => {
                shared.fail(&path_of(key), "a folder is in its place");
                return true;
            }
            Overwrite::IfChanged => match self.keep(folder, &dir, &now, (leaf, at), node) {
                Ok(true) => {}
                Ok(false) => return false,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return false,
                Err(error) => {
                    let what = "what is in its place cannot be compared";
                    shared.fail_io(&path_of(key), what, &error);
                    return true;
                }
            },
        }
        count(&shared.counters.skipped_unchanged, 1);
        shared.monitor.advance(1, node.size);
        true
    }

    /// Keeps what is there, with the snapshot's metadata. `false` where it has to be replaced.
    fn keep(
        &self,
        folder: u32,
        dir: &Dir,
        now: &Meta,
        (leaf, at): At<'_>,
        node: &Node,
    ) -> io::Result<bool> {
        let (shared, key) = (self.shared, &leaf.leaf.entries[at].key);
        let name = name_of(key);
        if is_longer_than_saved(now, node) {
            return Ok(true);
        }
        if !is_unchanged(dir, name, now, node)? || !self.is_of_its_owner(now, node) {
            return Ok(false);
        }
        let has = dir.xattrs(name)?;
        let exact = self.has_metadata(now, &has, node);
        if (now.nlink > 1 && (!node.linked || !exact)) || gains_rights(now, &has, node) {
            return Ok(false);
        }
        if shared.options.verify
            && now.kind == Kind::File
            && !self.has_content(dir, now, (leaf, at), node)?
        {
            return Ok(false);
        }
        if shared.options.dry_run {
            return Ok(true);
        }
        if let Some(link) = LinkKey::of(node).filter(|_| shared.links.are_supported())
            && !self.keep_link(folder, link, dir, now, name)?
        {
            return Ok(false);
        }
        if !exact {
            let options = ApplyOptions {
                owner: shared.options.owner,
                current: Some(Current::from(now)),
                bare: false,
                inode: Some((now.dev, now.ino)),
            };
            let failures = apply(Target::Name(dir, name), &meta_of(node), &node.xattrs, &options);
            if !failures.is_empty() {
                shared.warn_attributes(&path_of(key), &failures);
            }
        }
        Ok(true)
    }

    /// Whether it belongs to whom it is to belong to. Who owns a file can give it any content, size and time.
    fn is_of_its_owner(&self, now: &Meta, node: &Node) -> bool {
        let owner =
            if self.shared.options.owner { node.uid } else { rustix::process::geteuid().as_raw() };
        now.kind != Kind::File || now.uid == owner
    }

    /// Whether nothing but the content remains to be compared.
    fn has_metadata(&self, now: &Meta, has: &Xattrs, node: &Node) -> bool {
        let owner = self.shared.options.owner;
        let owned = !owner || (now.uid, now.gid) == (node.uid, node.gid);
        let mode = node.mode & if owner { 0o7777 } else { 0o1777 };
        let wanted = node.xattrs.iter().filter(|(name, _)| owner || name != CAPABILITY);
        let names = |name: &[u8]| node.xattrs.iter().any(|(wanted, _)| wanted == name);
        let own = has.entries.iter().filter(|(name, _)| is_own_attribute(name) || names(name));
        owned
            && (now.mode == mode || now.kind == Kind::Symlink)
            && has.failures.is_empty()
            && wanted.eq(own)
    }

    /// Takes an existing file for the one with this key, if it is not another one's, so that its other names are
    /// linked to it.
    fn keep_link(
        &self,
        folder: u32,
        key: LinkKey,
        dir: &Dir,
        now: &Meta,
        name: &[u8],
    ) -> io::Result<bool> {
        let (hidden, base) = self.shared.hidden_and_base(folder)?;
        if self.window.first_names.contains(&(base, key)) {
            // It is being written anew under another name.
            return Ok(false);
        }
        if let Known::As(same) = known(&hidden, key, now) {
            return Ok(same);
        }
        match hidden.dir().lstat(&key.name()) {
            Ok(other) => return Ok((other.dev, other.ino) == (now.dev, now.ino)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        // Where it can have no more names, they may all be there already.
        if dir.link(name, hidden.dir(), &key.name()).is_ok() {
            let linked = hidden.dir().lstat(&key.name())?;
            if (linked.dev, linked.ino) != (now.dev, now.ino) {
                hidden.dir().unlink(&key.name())?;
                return Ok(false);
            }
        }
        if now.nlink > 1 {
            set_known(&hidden, key, now)?;
        }
        Ok(true)
    }

    /// Whether a file has the content of the snapshot, by reading all of it.
    fn has_content(
        &self,
        dir: &Dir,
        now: &Meta,
        (leaf, at): At<'_>,
        node: &Node,
    ) -> io::Result<bool> {
        let key = &leaf.leaf.entries[at].key;
        let (file, meta) = dir.open_file(name_of(key))?;
        if (meta.dev, meta.ino, meta.size) != (now.dev, now.ino, node.size) {
            return Ok(false);
        }
        let shared = self.shared;
        let mut content = Compared { shared, file: &file, at: 0, buffer: Vec::new() };
        let keys = self.shared.repository.keys();
        let id = |bytes: &[u8]| BlobKind::Data.id(keys, bytes);
        let same = match &node.content {
            Content::None => true,
            Content::Inline(bytes) => content.read(0, bytes.len())? == bytes,
            Content::Part { hash, .. } => {
                id(content.read(0, node.size as usize)?).0.starts_with(hash)
            }
            Content::Chunks(chunks) => content.has_chunks(chunks, &id)?,
            Content::Extents => {
                let (root, level) = self.root;
                let source = self.shared.repository;
                let mut cursor = EntryCursor::new(TreeCursor::new(source, root, level));
                cursor.seek(key).map_err(io::Error::other)?;
                let mut same = true;
                while same {
                    let next = cursor.peek_at().map_err(io::Error::other)?;
                    let Some((leaf, at)) = next else { break };
                    let entry = &leaf.leaf.entries[at];
                    match &entry.body {
                        Body::Node(_) if entry.key == *key => {}
                        Body::Extent(chunks) if is_within(&entry.key, key) => {
                            same = content.has_chunks(chunks, &id)?;
                        }
                        // It did not end well, so it is no measure.
                        Body::End(_) if is_within(&entry.key, key) => same = false,
                        _ => break,
                    }
                    cursor.advance();
                }
                same
            }
        };
        Ok(same && content.is_hole_to(node.size)?)
    }
}

/// A file being compared, in order.
struct Compared<'a> {
    shared: &'a Shared<'a>,
    file: &'a File,
    /// Up to where it was.
    at: u64,
    buffer: Vec<u8>,
}

impl Compared<'_> {
    fn read(&mut self, offset: u64, len: usize) -> io::Result<&[u8]> {
        if self.shared.is_stopped() {
            return Err(io::Error::other("the restore ended"));
        }
        self.buffer.resize(len, 0);
        self.file.read_exact_at(&mut self.buffer, offset)?;
        self.at = offset + len as u64;
        Ok(&self.buffer)
    }

    fn has_chunks(
        &mut self,
        chunks: &[Chunk],
        id: &dyn Fn(&[u8]) -> chunkstore::id::BlobId,
    ) -> io::Result<bool> {
        for chunk in chunks {
            if chunk.offset < self.at || !self.is_hole_to(chunk.offset)? {
                return Ok(false);
            }
            if id(self.read(chunk.offset, chunk.blob.len as usize)?) != chunk.blob.id {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether there are zeros only from where it is to `end`.
    fn is_hole_to(&mut self, end: u64) -> io::Result<bool> {
        while self.at < end {
            let data = rustix::fs::seek(self.file, rustix::fs::SeekFrom::Data(self.at));
            match data {
                Err(rustix::io::Errno::NXIO) => break,
                Ok(data) if data >= end => break,
                Ok(data) => self.at = self.at.max(data),
                // File systems that do not tell.
                Err(_) => {}
            }
            let len = (end - self.at).min(ZEROS as u64) as usize;
            if self.read(self.at, len)?.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
        }
        self.at = self.at.max(end);
        Ok(true)
    }
}

/// Whether what is there is what the snapshot has, by all that can be told without reading it.
fn is_unchanged(dir: &Dir, name: &[u8], now: &Meta, node: &Node) -> io::Result<bool> {
    if (now.kind, now.mtime) != (node.kind, node.mtime) || node.state != State::Whole {
        return Ok(false);
    }
    Ok(match (&node.kind, &node.content) {
        (Kind::File, _) => now.size == node.size,
        (Kind::Symlink, Content::Inline(to)) => dir.read_link(name)? == *to,
        (Kind::CharDevice | Kind::BlockDevice, _) => (now.rdev_major, now.rdev_minor) == node.rdev,
        _ => true,
    })
}

/// Whether it is a file of which the snapshot has only the beginning.
fn is_longer_than_saved(now: &Meta, node: &Node) -> bool {
    node.state == State::Cut
        && node.kind == Kind::File
        && (now.kind, now.mtime) == (node.kind, node.mtime)
        && now.size >= node.size
}

/// Whether the file would get rights that it does not have.
fn gains_rights(now: &Meta, has: &Xattrs, node: &Node) -> bool {
    let capability = |xattrs: &[(Vec<u8>, Vec<u8>)]| {
        xattrs.iter().find(|(name, _)| name == CAPABILITY).map(|(_, value)| value.clone())
    };
    now.kind == Kind::File
        && gives_rights(node.mode, &node.xattrs)
        && (node.mode & 0o6000 & !now.mode != 0
            || capability(&node.xattrs) != capability(&has.entries))
}
