//! What a check reports.

use std::fmt;

use serde::Serialize;

use crate::gc::Bytes;
use crate::id::SnapshotId;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Nothing that was saved is at risk.
    Warning,
    /// Data is lost, or a part of the repository does not work.
    Error,
}

/// What it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FindingKind {
    /// The configuration.
    Config,
    /// A key slot.
    KeySlot,
    /// A snapshot, or a mark about one.
    Snapshot,
    /// The announcement of a session.
    Session,
    /// What a garbage collection keeps.
    GarbageCollection,
    /// The index.
    Index,
    /// A pack.
    Pack,
    /// A blob of a pack.
    Blob,
    /// A node of a tree.
    Node,
    /// An object that is no part of the repository.
    Unknown,
}

/// A snapshot that a finding concerns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Affected {
    /// The snapshot.
    pub id: SnapshotId,
    /// Its lineage.
    pub lineage: String,
    /// The folder it was made from.
    pub path: String,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about.
    pub kind: FindingKind,
    /// Name of the object.
    pub object: String,
    /// What is wrong, and what can be done.
    pub message: String,
    /// Snapshots that are incomplete because of it.
    pub snapshots: Vec<Affected>,
    /// Some of the files that are.
    pub files: Vec<String>,
    /// How many there are; a file that several snapshots share counts once.
    pub files_count: u64,
}

impl Finding {
    pub(super) fn new(
        severity: Severity,
        kind: FindingKind,
        object: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            severity,
            kind,
            object: object.into(),
            message: message.into(),
            snapshots: Vec::new(),
            files: Vec::new(),
            files_count: 0,
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = if self.severity == Severity::Error { "error" } else { "warning" };
        write!(f, "{severity}: {}: {}", self.object, self.message)?;
        for Affected { id, lineage, path } in &self.snapshots {
            write!(f, "\n  snapshot {} of {lineage} ({path})", id.short())?;
        }
        self.files.iter().try_for_each(|file| write!(f, "\n  file {file}"))?;
        let more = self.files_count.saturating_sub(self.files.len() as u64);
        if more > 0 { write!(f, "\n  and {more} more files") } else { Ok(()) }
    }
}

/// What was checked and found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CheckSummary {
    /// Findings that are errors.
    pub errors: u64,
    /// Findings that are warnings.
    pub warnings: u64,
    /// Snapshots whose tree was read.
    pub snapshots: u64,
    /// Tree nodes read.
    pub nodes: u64,
    /// Index segments read.
    pub segments: u64,
    /// Packs whose table was read.
    pub packs: u64,
    /// Packs of which every blob was read.
    pub packs_read: u64,
    /// Bytes of those.
    pub bytes_read: u64,
    /// Packs that no snapshot uses: left by interrupted backups, or for the next prune.
    pub unused_packs: u64,
    /// Their size.
    pub unused_bytes: u64,
    /// What the trees say of files that are not in them as the sources had them. No damage: nothing of it
    /// was ever in the repository.
    pub incomplete: Incomplete,
}

/// Counts of entries that are not as the sources had them. One that snapshots share counts once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Incomplete {
    /// Files that could not be read to their end, and are there in part or as they were earlier.
    pub files: u64,
    /// Folders whose names could not all be read.
    pub folders: u64,
    /// Names that could not be read at all.
    pub names: u64,
    /// Files that changed while they were read.
    pub files_changed: u64,
}

impl fmt::Display for CheckSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { snapshots, nodes, segments, packs, packs_read, .. } = self;
        writeln!(f, "read {snapshots} snapshots, {nodes} nodes, {segments} index segments")?;
        write!(f, "read the tables of {packs} packs")?;
        writeln!(f, ", and all of {packs_read} ({})", Bytes(self.bytes_read))?;
        if self.unused_packs > 0 {
            writeln!(f, "{} packs ({}) are unused", self.unused_packs, Bytes(self.unused_bytes))?;
        }
        let Incomplete { files, folders, names, files_changed } = self.incomplete;
        if files + folders + names > 0 {
            writeln!(
                f,
                "saved incompletely, which is no damage: {files} files, {folders} folders, and {names} names \
                 that could not be read ('ls -R' shows them)"
            )?;
        }
        if files_changed > 0 {
            writeln!(f, "{files_changed} files changed while they were saved")?;
        }
        writeln!(f, "{} errors, {} warnings", self.errors, self.warnings)
    }
}
