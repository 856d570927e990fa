//! A repository: an object store, its keys, and what is fixed about it.

use std::collections::HashSet;
use std::io::IoSlice;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use objects::{Created, ObjectStore};

use crate::chunker::{Chunker, ChunkerConfig};
use crate::codec::seal::{Header, Keyring, ObjectKind, Secret, open_record};
use crate::error::{Error, ErrorKind, Result};
use crate::fetch::{Want, fetch};
use crate::id::{BlobId, RepositoryId, SnapshotId};
use crate::key_slot::{self, KdfCost, Unlock};
use crate::limits::RECORD_BYTES_MAX;
use crate::pack::{Location, PackCache, PackClass, ReadScratch};
use crate::record::{self, Config, Snapshot, Verdict};
use crate::relocation::Relocations;
use crate::tree::{Liveness, NodeRef, NodeSource};

/// Feature of a repository on a store without create-if-absent.
const TIME_FENCED: &str = "time-fenced";

/// Features this program understands; a repository that needs others is refused.
const FEATURES: [&str; 1] = [TIME_FENCED];

/// How it is decided, once and for all, whether a session has committed or is dead. All who write to a
/// repository must do it the same way, so it is fixed when the repository is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Register {
    /// Whoever creates an object first wins. Relies on no clock.
    CreateIfAbsent,
    /// The store does not offer that. A commit is a request that the store refuses once it is too old,
    /// sent after looking for a mark of being fenced; and a fence holds once such requests are too
    /// old. Relies on the store's clock, and on its refusing old requests.
    TimeFenced,
}

impl std::fmt::Display for Register {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::CreateIfAbsent => "create-if-absent",
            Self::TimeFenced => "time-fenced (the store has no create-if-absent)",
        })
    }
}

/// An opened repository.
pub struct Repository {
    store: Arc<dyn ObjectStore>,
    keys: Keyring,
    config: Config,
    chunker: Chunker,
    data_packs: PackCache,
    meta_packs: PackCache,
    /// As read last; none are known at first, because most repositories have none.
    relocations: RwLock<Arc<Relocations>>,
}

/// Snapshots found on the store.
#[derive(Debug, Default)]
pub struct SnapshotList {
    /// Committed ones that are not forgotten, the oldest first.
    pub snapshots: Vec<(SnapshotId, Snapshot)>,
    /// Objects that could not be read, and why.
    pub damaged: Vec<(String, Error)>,
    /// Sessions that were declared dead.
    pub fenced: Vec<SnapshotId>,
    /// Snapshots marked forgotten whose object is still there.
    pub forgotten: Vec<SnapshotId>,
}

impl Repository {
    /// Makes a repository on an empty store, with one key.
    ///
    /// The configuration is written last: a store without it is no repository yet, and making one
    /// can be tried again. Whether the store has create-if-absent is tried out and kept.
    ///
    /// # Errors
    /// `Invalid` when there is a repository already, or unusable chunk sizes; those of the store.
    pub fn create(
        store: Arc<dyn ObjectStore>,
        unlock: &Unlock,
        cost: KdfCost,
        chunker: ChunkerConfig,
        now: jiff::Timestamp,
    ) -> Result<Self> {
        Self::create_as(store, RepositoryId::random(), unlock, cost, chunker, now)
    }

    /// As [`create`](Self::create), with an identity chosen by the caller, who has just drawn it at
    /// random: a key file named after it can thus be made durable before the repository exists.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_as(
        store: Arc<dyn ObjectStore>,
        id: RepositoryId,
        unlock: &Unlock,
        cost: KdfCost,
        chunker: ChunkerConfig,
        now: jiff::Timestamp,
    ) -> Result<Self> {
        let taken =
            || Error::invalid(format!("there is a repository at '{}' already", store.location()));
        match store.stat(record::CONFIG) {
            Ok(_) => return Err(taken()),
            Err(error) if error.kind() == objects::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        let features = match probe(&*store)? {
            Register::CreateIfAbsent => Vec::new(),
            Register::TimeFenced => vec![TIME_FENCED.to_owned()],
        };
        let keys = Keyring::new(id, vec![Secret::random()])?;
        let config = Config { created: now, chunker, features };
        let chunker = Chunker::new(config.chunker, keys.cut())?;
        key_slot::add(&*store, &keys, unlock, cost, "", now)?;
        let object = record::seal_json(&keys, ObjectKind::Config, record::CONFIG, &config);
        match store.create(record::CONFIG, &[IoSlice::new(&object)])? {
            Created::New => {}
            Created::AlreadyExists => return Err(taken()),
        }
        // Where creating may replace, another 'init' at the same time may have won.
        if store.read(record::CONFIG, RECORD_BYTES_MAX)? != object {
            return Err(taken());
        }
        Ok(Self::assemble(store, keys, config, chunker))
    }

    /// How commits are decided here.
    pub fn register(&self) -> Register {
        let fenced = self.config.features.iter().any(|name| name == TIME_FENCED);
        if fenced { Register::TimeFenced } else { Register::CreateIfAbsent }
    }

    /// Tries out whether the store still does what the repository was made to rely on. To be asked
    /// before writing where the store may be another one than it was: behind a network.
    ///
    /// # Errors
    /// `Invalid` when it does not; those of the store.
    pub fn verify_register(&self) -> Result<()> {
        let found = probe(&*self.store)?;
        if self.register() == Register::CreateIfAbsent && found == Register::TimeFenced {
            return Err(Error::invalid(format!(
                "the store at '{}' replaces objects that were to be created only if absent, on \
                 which this repository relies (was it moved here from another store?): make a new \
                 one here, and bring the snapshots over with 'ebackup copy'",
                self.store.location()
            )));
        }
        Ok(())
    }

    /// The identity of the repository on `store`, which needs no key.
    ///
    /// # Errors
    /// `NotFound` when there is no repository, `Corrupt` when its configuration is something else.
    pub fn identify(store: &dyn ObjectStore) -> Result<RepositoryId> {
        Ok(Self::read_config(store)?.0)
    }

    fn read_config(store: &dyn ObjectStore) -> Result<(RepositoryId, Vec<u8>)> {
        let object = match store.read(record::CONFIG, RECORD_BYTES_MAX) {
            Ok(object) => object,
            Err(error) if error.kind() == objects::ErrorKind::NotFound => {
                let message = format!(
                    "there is no repository at '{}': make one with 'ebackup init'",
                    store.location()
                );
                return Err(Error::new(ErrorKind::NotFound, message));
            }
            Err(error) => return Err(error.into()),
        };
        let header = Header::decode(record::CONFIG, &object).map_err(|error| {
            let kind = error.kind();
            let message = format!("'{}' is not a repository of ebackup", store.location());
            if kind == ErrorKind::Corrupt { error.context(message) } else { error }
        })?;
        Ok((RepositoryId(header.salt), object))
    }

    /// Opens the repository on `store`.
    ///
    /// # Errors
    /// `NotFound`, `WrongKey`, `Unsupported`, `Corrupt`, and those of the store.
    pub fn open(store: Arc<dyn ObjectStore>, unlock: &Unlock) -> Result<Self> {
        let (id, object) = Self::read_config(&*store)?;
        let keys = key_slot::open(&*store, id, unlock)?;
        let plain = open_record(&keys, ObjectKind::Config, record::CONFIG, object)?;
        let config: Config = serde_json::from_slice(&plain)
            .map_err(|error| Error::corrupt(record::CONFIG, error))?;
        let unknown = config.features.iter().find(|name| !FEATURES.contains(&name.as_str()));
        if let Some(feature) = unknown {
            let message = format!("the repository needs the feature '{feature}': update ebackup");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let chunker = Chunker::new(config.chunker, keys.cut())
            .map_err(|error| Error::corrupt(record::CONFIG, error))?;
        Ok(Self::assemble(store, keys, config, chunker))
    }

    fn assemble(
        store: Arc<dyn ObjectStore>,
        keys: Keyring,
        config: Config,
        chunker: Chunker,
    ) -> Self {
        Self {
            store,
            keys,
            config,
            chunker,
            data_packs: PackCache::new(PackClass::Data),
            meta_packs: PackCache::new(PackClass::Meta),
            relocations: RwLock::default(),
        }
    }

    /// The store it lies on.
    pub fn store(&self) -> &dyn ObjectStore {
        &*self.store
    }

    /// Its secrets.
    pub fn keys(&self) -> &Keyring {
        &self.keys
    }

    /// What is fixed about it.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its cut points.
    pub fn chunker(&self) -> &Chunker {
        &self.chunker
    }

    /// Tables of packs, for reading blobs.
    pub fn packs(&self, class: PackClass) -> &PackCache {
        match class {
            PackClass::Data => &self.data_packs,
            PackClass::Meta => &self.meta_packs,
        }
    }

    /// The relocations as read last; see [`reload_relocations`](Self::reload_relocations).
    pub fn relocations(&self) -> Arc<Relocations> {
        self.relocations.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the relocations that there are now. To be asked when a pack is missing: the same value
    /// as before means that no blob was relocated since.
    ///
    /// # Errors
    /// Those of the store.
    pub fn reload_relocations(&self) -> Result<Arc<Relocations>> {
        let new = Relocations::load(&*self.store, &self.keys)?;
        let mut known = self.relocations.write().unwrap_or_else(PoisonError::into_inner);
        if known.objects() != new.objects() {
            *known = Arc::new(new);
        }
        Ok(known.clone())
    }

    /// Reads one blob, at the place that a reference gives or where it was relocated to, into
    /// `scratch`.
    ///
    /// # Errors
    /// `NotFound` when it is nowhere, `Corrupt`, and those of the store.
    pub fn read_blob(
        &self,
        class: PackClass,
        place: Location,
        id: &BlobId,
        scratch: &mut ReadScratch,
    ) -> Result<()> {
        let mut known = self.relocations();
        loop {
            match self.read_copy(&known, class, place, id, scratch) {
                // It may have been copied, once more, since the relocations were read; if nothing
                // was, it is gone.
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    let new = self.reload_relocations()?;
                    if Arc::ptr_eq(&known, &new) {
                        return Err(error);
                    }
                    known = new;
                }
                result => return result,
            }
        }
    }

    /// Reads the first copy that is there.
    fn read_copy(
        &self,
        relocations: &Relocations,
        class: PackClass,
        place: Location,
        id: &BlobId,
        scratch: &mut ReadScratch,
    ) -> Result<()> {
        let mut missing = None;
        for Location { pack, ordinal } in relocations.places(place) {
            let read = self
                .packs(class)
                .get(&*self.store, &self.keys, pack)
                .and_then(|pack| pack.read(&*self.store, &self.keys, ordinal, id, scratch));
            match read {
                Err(error) if error.kind() == ErrorKind::NotFound => missing = Some(error),
                result => return result,
            }
        }
        let none = || Error::new(ErrorKind::NotFound, "the blob is nowhere");
        Err(missing.unwrap_or_else(none))
    }

    /// The verdict on session `id`, if there is one.
    ///
    /// # Errors
    /// `Corrupt`, and those of the store.
    pub fn verdict(&self, id: SnapshotId) -> Result<Option<Verdict>> {
        let name = record::snapshot_name(id);
        match record::read_json(&*self.store, &self.keys, ObjectKind::Snapshot, &name) {
            Ok(verdict) => Ok(Some(verdict)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The verdicts on `ids`, in their order; read several at once where the store is far away.
    pub fn verdicts(&self, ids: &[SnapshotId]) -> Vec<Result<Option<Verdict>>> {
        let threads = self.store.read_cost().parallel.min(ids.len());
        if threads <= 1 {
            return ids.iter().map(|id| self.verdict(*id)).collect();
        }
        let verdicts: Vec<OnceLock<_>> = ids.iter().map(|_| OnceLock::new()).collect();
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    while let Some((id, verdict)) = {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        ids.get(at).zip(verdicts.get(at))
                    } {
                        let _once = verdict.set(self.verdict(*id));
                    }
                });
            }
        });
        let unread = || Err(Error::new(ErrorKind::Store, "the snapshot was not read"));
        verdicts.into_iter().map(|verdict| verdict.into_inner().unwrap_or_else(unread)).collect()
    }

    /// Reads one snapshot.
    ///
    /// # Errors
    /// `NotFound` when there is none of this name, or it was forgotten; `Corrupt`, and those of the store.
    pub fn snapshot(&self, id: SnapshotId) -> Result<Snapshot> {
        let missing = |why| {
            let message = format!("there is no snapshot {id} at '{}'{why}", self.store.location());
            Error::new(ErrorKind::NotFound, message)
        };
        let snapshot = match self.verdict(id)? {
            Some(Verdict::Snapshot(snapshot)) => *snapshot,
            Some(Verdict::Fenced { .. }) => return Err(missing(": its backup never ended")),
            None => return Err(missing("")),
        };
        match self.store.stat(&record::forgotten_name(id)) {
            Ok(_) => Err(missing(": it was forgotten")),
            Err(error) if error.kind() == objects::ErrorKind::NotFound => Ok(snapshot),
            Err(error) => Err(error.into()),
        }
    }

    /// The newest snapshot that is `wanted`. Those stored last are read first, and older ones only while
    /// there is none among them.
    ///
    /// # Errors
    /// Those of the store. Damaged snapshots are passed over.
    pub fn newest_snapshot(
        &self,
        wanted: &dyn Fn(&Snapshot) -> bool,
    ) -> Result<Option<(SnapshotId, Snapshot)>> {
        let mut stored = Vec::new();
        self.store.list(record::SNAPSHOTS, &mut |meta| {
            let id = meta.key[record::SNAPSHOTS.len()..].parse::<SnapshotId>();
            stored.extend(id.ok().map(|id| (meta.modified, id)));
            Ok(())
        })?;
        let forgotten: HashSet<_> = self.list_ids(record::FORGOTTEN)?.into_iter().collect();
        stored.retain(|(_, id)| !forgotten.contains(id));
        stored.sort_unstable_by(|a, b| b.cmp(a));
        let ids: Vec<SnapshotId> = stored.into_iter().map(|(_, id)| id).collect();
        let (mut rest, mut batch) = (&ids[..], SNAPSHOTS_FIRST);
        while !rest.is_empty() {
            let (now, later) = rest.split_at(batch.min(rest.len()));
            let mut found = Vec::new();
            for (id, verdict) in now.iter().zip(self.verdicts(now)) {
                match verdict {
                    Ok(Some(Verdict::Snapshot(snapshot))) if wanted(&snapshot) => {
                        found.push((*id, *snapshot));
                    }
                    Ok(_) => {}
                    Err(error) if is_damage(&error) => {}
                    Err(error) => return Err(error),
                }
            }
            let newest = found.into_iter().max_by_key(|(id, snapshot)| (snapshot.started, *id));
            if newest.is_some() {
                return Ok(newest);
            }
            (rest, batch) = (later, (2 * batch).min(SNAPSHOTS_AT_ONCE));
        }
        Ok(None)
    }

    /// Reads all snapshots, leaving out which of their bundles are sparse: there can be many.
    ///
    /// # Errors
    /// When the folders cannot be listed. Damaged ones are part of the result.
    pub fn list_snapshots(&self) -> Result<SnapshotList> {
        // Snapshots first: one that is forgotten in between is then seen as forgotten.
        let mut ids = self.list_ids(record::SNAPSHOTS)?;
        let forgotten: HashSet<_> = self.list_ids(record::FORGOTTEN)?.into_iter().collect();
        let mut list = SnapshotList::default();
        list.forgotten.extend(ids.extract_if(.., |id| forgotten.contains(id)));
        let verdicts =
            ids.chunks(SNAPSHOTS_AT_ONCE).flat_map(|ids| ids.iter().zip(self.verdicts(ids)));
        for (id, verdict) in verdicts {
            match verdict {
                Ok(Some(Verdict::Snapshot(snapshot))) => {
                    let sparse = Liveness::default();
                    list.snapshots.push((*id, Snapshot { sparse, ..*snapshot }));
                }
                Ok(Some(Verdict::Fenced { .. })) => list.fenced.push(*id),
                Ok(None) => {}
                Err(error) if is_damage(&error) => {
                    list.damaged.push((record::snapshot_name(*id), error));
                }
                Err(error) => return Err(error),
            }
        }
        list.snapshots.sort_by_key(|(id, snapshot)| (snapshot.started, *id));
        Ok(list)
    }

    /// The identifiers that name the objects in `folder`.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub fn list_ids(&self, folder: &str) -> Result<Vec<SnapshotId>> {
        let mut ids = Vec::new();
        self.store.list(folder, &mut |meta| {
            ids.extend(meta.key[folder.len()..].parse::<SnapshotId>().ok());
            Ok(())
        })?;
        Ok(ids)
    }

    /// Marks a snapshot forgotten: it is listed no more, and the next `prune` frees its data.
    ///
    /// # Errors
    /// Those of the store.
    pub fn forget(&self, id: SnapshotId, now: jiff::Timestamp) -> Result<()> {
        let name = record::forgotten_name(id);
        let mark = record::Forgotten { at: now };
        // That it was forgotten already is as good.
        let (Created::New | Created::AlreadyExists) =
            record::create_json(&*self.store, &self.keys, ObjectKind::Forgotten, &name, &mark)?;
        Ok(())
    }
}

/// Snapshots that are read when the newest of a lineage is looked for: at first, and at once later.
const SNAPSHOTS_FIRST: usize = 16;
/// See [`SNAPSHOTS_FIRST`]. Also how many are held when all are gone through.
pub(crate) const SNAPSHOTS_AT_ONCE: usize = 256;

/// Bytes of tree nodes that are given at once beside the first, however many are asked for.
const NODES_BYTES: usize = 8 << 20;

impl NodeSource for Repository {
    fn load_node(&self, node: &NodeRef) -> Result<Vec<u8>> {
        let mut scratch = ReadScratch::default();
        self.read_blob(PackClass::Meta, node.location(), &node.id, &mut scratch)?;
        Ok(scratch.plain)
    }

    fn load_nodes(&self, nodes: &[NodeRef]) -> Vec<Result<Vec<u8>>> {
        if let [node] = nodes {
            return vec![self.load_node(node)];
        }
        let wants = (0..).zip(nodes).map(|(purpose, node)| Want {
            place: node.location(),
            id: node.id,
            purpose,
        });
        let loaded: Vec<OnceLock<Result<Vec<u8>>>> =
            nodes.iter().map(|_| OnceLock::new()).collect();
        let bytes = AtomicUsize::new(0);
        let threads = self.store.read_cost().parallel;
        fetch(self, PackClass::Meta, wants.collect(), threads, &|plain, wants| {
            for want in wants {
                let plain = match &plain {
                    Ok(plain) => Ok(plain.to_vec()),
                    Err(error) => Err(error.duplicate()),
                };
                let len = plain.as_ref().map_or(0, Vec::len);
                // The first is wanted, the others perhaps.
                if want.purpose == 0 || bytes.fetch_add(len, Ordering::Relaxed) < NODES_BYTES {
                    let _once = loaded[want.purpose as usize].set(plain);
                }
            }
            loaded[0].get().is_none() || bytes.load(Ordering::Relaxed) < NODES_BYTES
        });
        loaded.into_iter().map_while(OnceLock::into_inner).collect()
    }
}

/// Whether it concerns one object. A flipped bit can also look like a newer format.
fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported)
}

/// Which register a store is good for.
fn probe(store: &dyn ObjectStore) -> Result<Register> {
    if objects::probe::create_if_absent(store, record::PROBES)? {
        return Ok(Register::CreateIfAbsent);
    }
    if objects::probe::refuses_wrong_dates(store, record::PROBES)? {
        return Ok(Register::TimeFenced);
    }
    Err(Error::invalid(format!(
        "the store at '{}' can hold no repository: it neither honours 'If-None-Match' nor refuses requests \
         whose date is an hour off, so that backups and prunes at the same time could lose data; use a \
         store that does either, as OBS, S3 and Ceph do",
        store.location()
    )))
}
