//! What a repository holds: packs and bytes, and how much of it snapshots use.

use std::fmt;
use std::time::UNIX_EPOCH;

use serde::Serialize;

use super::Bytes;
use super::facts;
use super::mark::Mark;
use crate::error::{ErrorKind, Result};
use crate::pack::{Pack, PackClass};
use crate::repository::Repository;

/// Packs of one class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ClassStats {
    /// All.
    pub packs: u64,
    /// Their size.
    pub bytes: u64,
    /// Their blobs.
    pub blobs: u64,
    /// Blobs that a snapshot uses.
    pub used_blobs: u64,
    /// Their stored size.
    pub used_bytes: u64,
    /// Their size before compression.
    pub used_plain_bytes: u64,
    /// Packs of which every blob is used.
    pub whole_packs: u64,
    /// Packs of which some are.
    pub partial_packs: u64,
    /// Bytes of unused blobs in those.
    pub partial_unused_bytes: u64,
    /// Packs of which none is: the next prune deletes them.
    pub dead_packs: u64,
    /// Their size.
    pub dead_bytes: u64,
    /// Packs whose table cannot be read; they count in no other line but the first two.
    pub damaged_packs: u64,
}

/// What a repository holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Snapshots.
    pub snapshots: usize,
    /// How many of them lack something that could not be read when they were made.
    pub snapshots_incomplete: usize,
    /// Packs of chunks and bundles.
    pub data: ClassStats,
    /// Packs of tree nodes.
    pub meta: ClassStats,
}

/// Counts what there is, by the tables of all packs.
///
/// # Errors
/// As [`prune`](super::prune). A damaged pack is counted, no error.
pub fn stats(repository: &Repository, progress: &dyn Fn(&str)) -> Result<Stats> {
    let packs = facts::packs(repository, UNIX_EPOCH)?;
    progress("marking what snapshots use");
    let mut mark = Mark::default();
    mark.refresh(repository)?;
    let mut stats = Stats {
        snapshots: mark.snapshots.len(),
        snapshots_incomplete: mark.incomplete,
        ..Stats::default()
    };
    progress("reading the tables of all packs");
    let (store, keys) = (repository.store(), repository.keys());
    for fact in &packs {
        let class = match fact.class {
            PackClass::Data => &mut stats.data,
            PackClass::Meta => &mut stats.meta,
        };
        let pack = match Pack::open(store, keys, fact.class, fact.id) {
            Ok(pack) => Some(pack),
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) if error.kind() == ErrorKind::Corrupt => None,
            Err(error) => return Err(error),
        };
        class.add(fact.size, pack.as_ref(), mark.used(fact.class, fact.id));
    }
    Ok(stats)
}

impl ClassStats {
    fn add(&mut self, size: u64, pack: Option<&Pack>, used: u128) {
        self.packs += 1;
        self.bytes += size;
        let Some(pack) = pack else {
            self.damaged_packs += 1;
            return;
        };
        let (mut blobs, mut bytes, mut unused) = (0, 0, 0);
        for (ordinal, entry) in pack.table().iter().enumerate() {
            if used >> ordinal & 1 == 1 {
                blobs += 1;
                bytes += u64::from(entry.stored_len);
                self.used_plain_bytes += u64::from(entry.plain_len);
            } else {
                unused += u64::from(entry.stored_len);
            }
        }
        self.blobs += pack.table().len() as u64;
        self.used_blobs += blobs;
        self.used_bytes += bytes;
        if blobs == 0 {
            self.dead_packs += 1;
            self.dead_bytes += size;
        } else if blobs == pack.table().len() as u64 {
            self.whole_packs += 1;
        } else {
            self.partial_packs += 1;
            self.partial_unused_bytes += unused;
        }
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "snapshots  {}", self.snapshots)?;
        match self.snapshots_incomplete {
            0 => writeln!(f)?,
            some => writeln!(f, ", {some} of them incomplete")?,
        }
        for (name, class) in [("data packs", &self.data), ("meta packs", &self.meta)] {
            let ClassStats { packs, blobs, used_blobs, .. } = class;
            write!(f, "{name} {packs} ({}), ", Bytes(class.bytes))?;
            write!(f, "{used_blobs} of {blobs} blobs in use ({}", Bytes(class.used_bytes))?;
            writeln!(f, ", {} uncompressed)", Bytes(class.used_plain_bytes))?;
            write!(f, "           {} wholly in use, ", class.whole_packs)?;
            let unused = Bytes(class.partial_unused_bytes);
            write!(f, "{} partly ({unused} unused), ", class.partial_packs)?;
            writeln!(f, "{} not at all ({})", class.dead_packs, Bytes(class.dead_bytes))?;
            if class.damaged_packs > 0 {
                writeln!(f, "           {} damaged: run 'check'", class.damaged_packs)?;
            }
        }
        Ok(())
    }
}
