//! A repository: an object store, its keys, and what is fixed about it.

use std::io::IoSlice;
use std::sync::Arc;

use objects::{Created, ObjectStore};

use crate::chunker::{Chunker, ChunkerConfig};
use crate::codec::seal::{Header, Keyring, ObjectKind, Secret, open_record};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{RepositoryId, SnapshotId};
use crate::key_slot::{self, KdfCost, Unlock};
use crate::limits::RECORD_BYTES_MAX;
use crate::pack::{PackCache, PackClass, ReadScratch};
use crate::record::{self, Config, Snapshot, Verdict};
use crate::tree::{NodeRef, NodeSource};

/// Features this program understands; a repository that needs others is refused.
const FEATURES: [&str; 0] = [];

/// An opened repository.
pub struct Repository {
    store: Arc<dyn ObjectStore>,
    keys: Keyring,
    config: Config,
    chunker: Chunker,
    data_packs: PackCache,
    meta_packs: PackCache,
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
    /// can be tried again.
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
        let keys = Keyring::new(id, vec![Secret::random()])?;
        let config = Config { created: now, chunker, features: Vec::new() };
        let chunker = Chunker::new(config.chunker, keys.cut())?;
        key_slot::add(&*store, &keys, unlock, cost, "", now)?;
        let object = record::seal_json(&keys, ObjectKind::Config, record::CONFIG, &config);
        match store.create(record::CONFIG, &[IoSlice::new(&object)])? {
            Created::New => Ok(Self::assemble(store, keys, config, chunker)),
            Created::AlreadyExists => Err(taken()),
        }
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

    /// Reads all snapshots.
    ///
    /// # Errors
    /// When the folders cannot be listed. Damaged ones are part of the result.
    pub fn list_snapshots(&self) -> Result<SnapshotList> {
        // Snapshots first: one that is forgotten in between is then seen as forgotten.
        let ids = self.list_ids(record::SNAPSHOTS)?;
        let forgotten: std::collections::HashSet<_> =
            self.list_ids(record::FORGOTTEN)?.into_iter().collect();
        let mut list = SnapshotList::default();
        for id in ids {
            if forgotten.contains(&id) {
                list.forgotten.push(id);
                continue;
            }
            match self.verdict(id) {
                Ok(Some(Verdict::Snapshot(snapshot))) => list.snapshots.push((id, *snapshot)),
                Ok(Some(Verdict::Fenced { .. })) => list.fenced.push(id),
                Ok(None) => {}
                // A flipped bit can also look like a newer format: one object must not hide the rest.
                Err(error)
                    if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) =>
                {
                    list.damaged.push((record::snapshot_name(id), error));
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

impl NodeSource for Repository {
    fn load_node(&self, node: &NodeRef) -> Result<Vec<u8>> {
        let pack = self.meta_packs.get(&*self.store, &self.keys, node.pack)?;
        let mut scratch = ReadScratch::default();
        pack.read(&*self.store, &self.keys, node.ordinal, &node.id, &mut scratch)?;
        Ok(scratch.plain)
    }
}
