//! The small sealed objects: configuration, snapshots, sessions, tombstones, marks.
//!
//! Their plaintext is JSON, except the list of tombstones, which is 16 bytes a pack. Unknown fields are
//! ignored, so that later versions may add some; what must be understood goes into `features`.

use std::collections::BTreeMap;
use std::io::IoSlice;

use objects::{Created, ObjectStore};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::chunker::ChunkerConfig;
use crate::codec::seal::{Keyring, ObjectKind, open_record, seal_record};
use crate::error::{Error, Result};
use crate::id::{GenerationId, PackId, RepositoryId, SnapshotId};
use crate::limits::{RECORD_BYTES_MAX, TOMBSTONES_BYTES_MAX};
use crate::tree::{Liveness, NodeRef};

/// Name of the configuration object.
pub const CONFIG: &str = "config";
/// Folder of the verdicts on sessions: snapshots, and marks of fenced sessions.
pub const SNAPSHOTS: &str = "snapshots/";
/// Folder of the marks that a snapshot is forgotten.
pub const FORGOTTEN: &str = "forgotten/";
/// Folder of the announcements of sessions.
pub const SESSIONS: &str = "sessions/";
/// Folder of the lists of packs about to be deleted.
pub const TOMBSTONES: &str = "tombstones/";
/// Folder of the lists of sessions that a garbage collection waits for.
pub const WAITS: &str = "waits/";
/// Folder of the final decisions which packs of a garbage collection are deleted.
pub const DOOMED: &str = "doomed/";

/// Folder of the relocations: where repacked blobs lie now.
pub const RELOCATIONS: &str = "relocations/";
/// Folder of the marks that a session is being declared dead, where the store has no
/// create-if-absent.
pub const FENCES: &str = "fences/";

/// Folder of the objects with which a store is tried out; they are deleted at once.
pub const PROBES: &str = "probes/";

/// Purpose of a session that saves files.
pub const BACKUP: &str = "backup";
/// Purpose of a session that copies blobs out of mostly dead packs. Its verdict is the relocation
/// object of its name.
pub const REPACK: &str = "repack";
/// Purpose of the session that a garbage collection announces: it refers to no pack, so nobody waits
/// for it.
pub const PRUNE: &str = "prune";

/// What is fixed when a repository is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// When the repository was made.
    pub created: jiff::Timestamp,
    /// How files are cut.
    pub chunker: ChunkerConfig,
    /// Names of features a program must know to use the repository.
    pub features: Vec<String>,
}

/// Counts kept in a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Summary {
    /// Regular files, links and special files.
    pub files: u64,
    /// Folders.
    pub dirs: u64,
    /// Bytes of all files, holes included.
    pub bytes: u64,
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Bytes this backup added to the repository.
    pub bytes_stored: u64,
    /// Data blobs this backup added.
    pub blobs_new: u64,
    /// Files read because they were new, looked changed, or lay in a bundle that is given up.
    pub files_changed: u64,
    /// Files taken over from the parent unread.
    pub files_unmodified: u64,
    /// Files and attributes that could not be saved, or changed meanwhile.
    pub warnings: u64,
    /// How many of the warnings are files and folders that could not be read, or not to their end.
    pub files_missing: u64,
    /// How many are files that changed while they were read.
    pub files_changed_while_read: u64,
    /// How many are files and folders that vanished before they could be read.
    pub files_vanished: u64,
}

/// Where a copied snapshot comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The repository it was copied from.
    pub repository: RepositoryId,
    /// Its name there.
    pub snapshot: SnapshotId,
}

/// A committed snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Root of the tree.
    pub root: NodeRef,
    /// Height of the tree: 0 if the root is a leaf.
    pub level: u8,
    /// Identity of what was saved, across backups.
    pub lineage: String,
    /// Machine it was saved on.
    pub host: String,
    /// Folder it was saved from, as text.
    pub path: String,
    /// Tags.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    /// When the backup began, by the clock of the machine.
    pub started: jiff::Timestamp,
    /// When it ended.
    pub finished: jiff::Timestamp,
    /// The snapshot it was compared with.
    pub parent: Option<SnapshotId>,
    /// Counts.
    #[serde(default)]
    pub summary: Summary,
    /// Bundles of which less than half is used, for the next backup to store anew what is.
    #[serde(default, with = "bitmaps", skip_serializing_if = "bitmaps::is_empty")]
    pub sparse: Liveness,
    /// Program and version that wrote it.
    pub program: String,
    /// What it is a copy of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy_of: Option<Origin>,
}

/// Blobs by pack, as JSON holds them: bit n of a hexadecimal number for ordinal n.
mod bitmaps {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::id::PackId;
    use crate::limits::SPARSE_PACKS_MAX;
    use crate::tree::Liveness;

    pub(super) fn is_empty(blobs: &Liveness) -> bool {
        blobs.0.is_empty()
    }

    pub(super) fn serialize<S: Serializer>(blobs: &Liveness, out: S) -> Result<S::Ok, S::Error> {
        let text: BTreeMap<_, _> =
            blobs.0.iter().map(|(pack, blobs)| (pack, format!("{blobs:x}"))).collect();
        text.serialize(out)
    }

    /// What is not understood is left out: it is advice, and no reason not to read the rest.
    pub(super) fn deserialize<'d, D: Deserializer<'d>>(input: D) -> Result<Liveness, D::Error> {
        let packs = match serde_json::Value::deserialize(input)? {
            serde_json::Value::Object(packs) => packs,
            _ => serde_json::Map::new(),
        };
        let read = packs.into_iter().filter_map(|(pack, blobs)| {
            let blobs = u128::from_str_radix(blobs.as_str()?, 16).ok()?;
            Some((pack.parse::<PackId>().ok()?, blobs))
        });
        Ok(Liveness(read.take(SPARSE_PACKS_MAX).collect()))
    }
}

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// It committed this snapshot.
    Snapshot(Box<Snapshot>),
    /// A garbage collection declared it dead; it can never commit.
    Fenced {
        /// When.
        at: jiff::Timestamp,
    },
}

/// The announcement of a writer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    /// What it does: [`BACKUP`], [`REPACK`] or [`PRUNE`].
    pub purpose: String,
    /// Machine and process, for people.
    pub writer: String,
    /// When it began, by the writer's clock; for people only.
    pub started: jiff::Timestamp,
    /// Counts renewals.
    pub heartbeat: u64,
}

/// The mark that a snapshot is forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forgotten {
    /// When.
    pub at: jiff::Timestamp,
}

/// The sessions that were announced after the tombstones of a garbage collection were published.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waits {
    /// Their names; garbage collections themselves are left out.
    pub sessions: Vec<SnapshotId>,
}

/// Packs that a garbage collection is about to delete.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tombstones {
    /// Data packs, ascending.
    pub data: Vec<PackId>,
    /// Meta packs, ascending.
    pub meta: Vec<PackId>,
    /// Packs that were repacked and are gone, and whose relocations nothing refers to any more:
    /// ascending.
    pub retired: Vec<PackId>,
}

impl Tombstones {
    fn encode(&self) -> Vec<u8> {
        let mut out = (self.data.len() as u64).to_le_bytes().to_vec();
        out.extend_from_slice(&(self.meta.len() as u64).to_le_bytes());
        self.all().for_each(|pack| out.extend_from_slice(&pack.0));
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (data, rest) = bytes.split_first_chunk()?;
        let (meta, rest) = rest.split_first_chunk()?;
        let (packs, []) = rest.as_chunks::<16>() else {
            return None;
        };
        let count = |bytes: &[u8; 8]| usize::try_from(u64::from_le_bytes(*bytes)).ok();
        let (data, rest) = packs.split_at_checked(count(data)?)?;
        let (meta, retired) = rest.split_at_checked(count(meta)?)?;
        let ids = |packs: &[[u8; 16]]| packs.iter().copied().map(PackId).collect();
        Some(Self { data: ids(data), meta: ids(meta), retired: ids(retired) })
    }

    /// All packs named.
    pub fn all(&self) -> impl Iterator<Item = &PackId> {
        self.data.iter().chain(&self.meta).chain(&self.retired)
    }

    /// How many packs are named.
    pub fn len(&self) -> usize {
        self.data.len() + self.meta.len() + self.retired.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Name of the verdict on session `id`, which is the snapshot if it committed.
pub fn snapshot_name(id: SnapshotId) -> String {
    format!("{SNAPSHOTS}{id}")
}

/// Name of the mark that snapshot `id` is forgotten.
pub fn forgotten_name(id: SnapshotId) -> String {
    format!("{FORGOTTEN}{id}")
}

/// Name of the relocations that repacking session `id` published, or of the mark that it was fenced.
pub fn relocation_name(id: SnapshotId) -> String {
    format!("{RELOCATIONS}{id}")
}

/// Name of the mark that session `id` is being declared dead.
pub fn fence_name(id: SnapshotId) -> String {
    format!("{FENCES}{id}")
}

/// Name of the announcement of session `id`.
pub fn session_name(id: SnapshotId) -> String {
    format!("{SESSIONS}{id}")
}

/// Name of the tombstones of garbage collection `id`.
pub fn tombstones_name(id: GenerationId) -> String {
    format!("{TOMBSTONES}{id}")
}

/// Name of the list of sessions that garbage collection `id` waits for.
pub fn waits_name(id: GenerationId) -> String {
    format!("{WAITS}{id}")
}

/// Name of the decision which packs of garbage collection `id` are deleted.
pub fn doomed_name(id: GenerationId) -> String {
    format!("{DOOMED}{id}")
}

/// The sealed object of a JSON record.
pub fn seal_json<T: Serialize>(keys: &Keyring, kind: ObjectKind, name: &str, value: &T) -> Vec<u8> {
    let plain = serde_json::to_vec(value).expect("records are plain data");
    seal_record(keys, kind, name, &plain)
}

/// Seals `value` and creates its object.
///
/// # Errors
/// Those of the store.
pub fn create_json<T: Serialize>(
    store: &dyn ObjectStore,
    keys: &Keyring,
    kind: ObjectKind,
    name: &str,
    value: &T,
) -> Result<Created> {
    let object = seal_json(keys, kind, name, value);
    Ok(store.create(name, &[IoSlice::new(&object)])?)
}

/// Reads and opens a JSON record.
///
/// # Errors
/// `NotFound`, `Corrupt`, and those of the store.
pub fn read_json<T: DeserializeOwned>(
    store: &dyn ObjectStore,
    keys: &Keyring,
    kind: ObjectKind,
    name: &str,
) -> Result<T> {
    let object = store.read(name, RECORD_BYTES_MAX)?;
    let plain = open_record(keys, kind, name, object)?;
    serde_json::from_slice(&plain).map_err(|error| Error::corrupt(name, error))
}

/// Publishes the tombstones of garbage collection `id`.
///
/// # Errors
/// Those of the store.
pub fn create_tombstones(
    store: &dyn ObjectStore,
    keys: &Keyring,
    id: GenerationId,
    tombstones: &Tombstones,
) -> Result<Created> {
    create_packs(store, keys, &tombstones_name(id), tombstones)
}

/// Reads the tombstones of garbage collection `id`.
///
/// # Errors
/// `NotFound`, `Corrupt`, and those of the store.
pub fn read_tombstones(
    store: &dyn ObjectStore,
    keys: &Keyring,
    id: GenerationId,
) -> Result<Tombstones> {
    read_packs(store, keys, &tombstones_name(id))
}

/// Decides which packs of garbage collection `id` are deleted, unless that is decided.
///
/// # Errors
/// Those of the store.
pub fn create_doomed(
    store: &dyn ObjectStore,
    keys: &Keyring,
    id: GenerationId,
    doomed: &Tombstones,
) -> Result<Created> {
    create_packs(store, keys, &doomed_name(id), doomed)
}

/// Reads the decision which packs of garbage collection `id` are deleted.
///
/// # Errors
/// `NotFound`, `Corrupt`, and those of the store.
pub fn read_doomed(
    store: &dyn ObjectStore,
    keys: &Keyring,
    id: GenerationId,
) -> Result<Tombstones> {
    read_packs(store, keys, &doomed_name(id))
}

fn create_packs(
    store: &dyn ObjectStore,
    keys: &Keyring,
    name: &str,
    packs: &Tombstones,
) -> Result<Created> {
    let object = seal_record(keys, ObjectKind::Tombstones, name, &packs.encode());
    Ok(store.create(name, &[IoSlice::new(&object)])?)
}

fn read_packs(store: &dyn ObjectStore, keys: &Keyring, name: &str) -> Result<Tombstones> {
    let object = store.read(name, TOMBSTONES_BYTES_MAX)?;
    let plain = open_record(keys, ObjectKind::Tombstones, name, object)?;
    Tombstones::decode(&plain).ok_or_else(|| Error::corrupt(name, "its length is impossible"))
}
