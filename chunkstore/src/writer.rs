//! A writer's session: from announcement to commit.
//!
//! ```text
//!  announce ─> read tombstones ─> open index ─> list packs
//!                                                   │
//!  plaintext ─hash─> known? ──yes──────────────> reference
//!                      │ no                          ▲
//!                  compress ─> seal into the open pack┘ ──full──> upload ─receipt─> segment
//!
//!  all packs durable ─> all segments durable ─> snapshot created if absent (the commit point)
//! ```
//!
//! # Memory
//! Packs are built in a fixed number of buffers; whoever needs one waits until an upload returns it.
//! Ids of blobs that no segment names yet are kept in a map that flushing bounds.
//!
//! # Crashes
//! Nothing refers to a pack before it is durable: index segments are made from `DurablePack`s, which
//! only an acknowledged upload yields, and the snapshot is written last. A session that dies leaves
//! packs that the next one finds through the flushed segments, or that a garbage collection removes.

use std::collections::{HashMap, HashSet};
use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use objects::Created;

use crate::codec::compress::{Compression, Compressor, Level};
use crate::codec::seal::ObjectKind;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{BlobId, GenerationId, PackId, SegmentId, SnapshotId};
use crate::index::{self, Index, Record, Segment, SegmentWriter};
use crate::limits::{BLOB_BYTES_MAX, CHUNK_BYTES_MAX};
use crate::pack::{BlobKind, Location, PackBuilder, PackClass, SealedPack};
use crate::record::{self, Session, Snapshot, Verdict};
use crate::relocation::Relocations;
use crate::repository::Repository;
use crate::session::{self, Announced};
use crate::tree::{BlobRef, NodeRef, NodeSink};

/// How a session writes.
#[derive(Debug, Clone)]
pub struct WriterSettings {
    /// Compression of data. Tree nodes always use zstd level 3.
    pub compression: Level,
    /// Size at which a data pack is closed.
    pub pack_target_bytes: usize,
    /// Data packs being filled or uploaded at once.
    pub pack_buffers: usize,
    /// Uploads at once, each in a thread of its own; with 0, whoever fills a pack uploads it.
    pub uploads: usize,
    /// Memory for index filters.
    pub filter_bytes: usize,
    /// How often the session's announcement is renewed; with zero, the caller does it, by
    /// [`Writer::renew`].
    pub heartbeat: Duration,
}

impl Default for WriterSettings {
    fn default() -> Self {
        Self {
            compression: Level::default(),
            pack_target_bytes: 32 << 20,
            pack_buffers: 3,
            uploads: 2,
            filter_bytes: 16 << 20,
            heartbeat: Duration::from_secs(60),
        }
    }
}

/// Meta packs hold at most 128 nodes of some 20 KiB compressed, so they rarely reach this.
const META_PACK_TARGET_BYTES: usize = 4 << 20;
const META_PACK_BUFFERS: usize = 2;

/// What a session has done so far.
#[derive(Debug, Default)]
pub struct WriterCounters {
    /// Bytes of uploaded objects.
    pub bytes_stored: AtomicU64,
    /// Data blobs stored.
    pub blobs_new: AtomicU64,
    /// Data blobs found stored.
    pub blobs_known: AtomicU64,
    /// Packs uploaded.
    pub packs: AtomicU64,
}

/// A pack that the store has acknowledged: the only thing a segment can be made from.
struct DurablePack {
    records: Vec<Record>,
    ids: Vec<BlobId>,
}

/// A writer's session.
pub struct Writer {
    shared: Arc<Shared>,
    uploaders: Vec<JoinHandle<()>>,
    heartbeat: Option<JoinHandle<()>>,
    stop_heartbeat: Sender<()>,
}

struct Shared {
    repository: Arc<Repository>,
    settings: WriterSettings,
    session: Announced,
    /// Segments that were there, whose packs are checked against `usable`.
    base: Index,
    /// Segments of this session.
    own: RwLock<Index>,
    usable: UsablePacks,
    data: Mutex<Packer>,
    meta: Mutex<Packer>,
    /// Data blobs of this session that no segment names yet. Whoever packs holds `data` before this;
    /// whoever flushes holds this alone, because packing may wait for an upload to end.
    fresh: Mutex<HashMap<BlobId, Location>>,
    node_compressor: Mutex<Compressor>,
    known_nodes: Mutex<HashMap<BlobId, NodeRef>>,
    unflushed: Mutex<Vec<DurablePack>>,
    own_segments: Mutex<Vec<SegmentId>>,
    failed: AtomicBool,
    failure: Mutex<Option<Error>>,
    counters: WriterCounters,
}

/// Fills packs of one class.
struct Packer {
    class: PackClass,
    target: usize,
    open: Option<PackBuilder>,
    free: Receiver<Vec<u8>>,
    uploads: Option<Sender<SealedPack>>,
    /// Where a buffer goes that was uploaded here, when there are no threads for it.
    back: Option<Sender<Vec<u8>>>,
}

/// Packs that may be referred to: those on the store that no garbage collection is about to delete.
struct UsablePacks {
    present: Vec<PackId>,
    tombstoned: HashSet<PackId>,
    /// As of after the tombstones were read.
    relocations: Relocations,
}

impl UsablePacks {
    fn contains(&self, pack: PackId) -> bool {
        self.present.binary_search(&pack).is_ok() && !self.tombstoned.contains(&pack)
    }

    /// Whether a reference to `place` may be taken over: the blob is there, or a copy of it. A
    /// tombstone on the old pack also announces that its relocations go.
    fn backs(&self, place: Location) -> bool {
        self.contains(place.pack)
            || (!self.tombstoned.contains(&place.pack)
                && self.relocations.is_backed(place, &|pack| self.contains(pack)))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked holding a lock has also ended the session; the data is still consistent
    // enough to report that.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Writer {
    /// Announces a session and opens the index.
    ///
    /// # Errors
    /// Those of the store. A damaged index segment is no error: duplicates named only there are
    /// stored again.
    pub fn begin(
        repository: Arc<Repository>,
        settings: WriterSettings,
        session: &Session,
    ) -> Result<Self> {
        let (store, keys) = (repository.store(), repository.keys());
        // The order matters: whoever collects garbage publishes tombstones and then lists sessions.
        let session = Announced::begin(&repository, session.clone())?;
        let learn = || -> Result<_> {
            let tombstoned = read_all_tombstones(&repository)?;
            let relocations = Relocations::load(store, keys)?;
            let (base, _) = Index::open(store, keys, settings.filter_bytes / 2)?;
            let present = list_packs(&repository)?;
            Ok((base, UsablePacks { present, tombstoned, relocations }))
        };
        // On failure nothing was written yet: nobody needs to wait for this session.
        let (base, usable) = learn().inspect_err(|_| session.end(&repository))?;
        Ok(Self::start(repository, settings, session, base, usable))
    }

    fn start(
        repository: Arc<Repository>,
        settings: WriterSettings,
        session: Announced,
        base: Index,
        usable: UsablePacks,
    ) -> Self {
        let (uploads, sealed) = crossbeam_channel::bounded(1);
        let (mut data, data_buffers) = Packer::new(
            PackClass::Data,
            settings.pack_target_bytes,
            settings.pack_buffers,
            &uploads,
        );
        let (mut meta, meta_buffers) =
            Packer::new(PackClass::Meta, META_PACK_TARGET_BYTES, META_PACK_BUFFERS, &uploads);
        if settings.uploads == 0 {
            data.back = Some(data_buffers.clone());
            meta.back = Some(meta_buffers.clone());
        }
        let own = RwLock::new(Index::empty(settings.filter_bytes / 2));
        let shared = Arc::new(Shared {
            repository,
            base,
            own,
            usable,
            data: Mutex::new(data),
            meta: Mutex::new(meta),
            fresh: Mutex::default(),
            node_compressor: Mutex::new(Compressor::new(Level::Zstd(3))),
            known_nodes: Mutex::default(),
            unflushed: Mutex::default(),
            own_segments: Mutex::default(),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            counters: WriterCounters::default(),
            session,
            settings,
        });
        let uploaders = (0..shared.settings.uploads)
            .map(|_| {
                let (shared, sealed) = (shared.clone(), sealed.clone());
                let (data, meta) = (data_buffers.clone(), meta_buffers.clone());
                std::thread::spawn(move || {
                    for pack in sealed {
                        let back = if pack.class == PackClass::Data { &data } else { &meta };
                        let buffer = shared.upload(pack);
                        // Nobody waits for buffers once the packers are gone.
                        let _unneeded = back.send(buffer);
                    }
                })
            })
            .collect();
        let (stop_heartbeat, stop) = crossbeam_channel::bounded(0);
        let heartbeat = (!shared.settings.heartbeat.is_zero()).then(|| {
            let shared = shared.clone();
            std::thread::spawn(move || shared.keep_alive(&stop))
        });
        Self { shared, uploaders, heartbeat, stop_heartbeat }
    }

    /// Gives a sign of life now.
    ///
    /// # Errors
    /// `Fenced` when it comes too late; those of the store.
    pub fn renew(&self) -> Result<()> {
        self.shared.renew()
    }

    /// Name of the session, and of the snapshot it will be.
    pub fn id(&self) -> SnapshotId {
        self.shared.session.id
    }

    /// What it has done so far.
    pub fn counters(&self) -> &WriterCounters {
        &self.shared.counters
    }

    /// Stores a chunk or bundle unless the repository has it. Any number of threads may call this,
    /// each with its own compressor.
    ///
    /// # Errors
    /// When the blob is too large, or any upload of the session has failed.
    pub fn store_data(&self, compressor: &mut Compressor, plain: &[u8]) -> Result<BlobRef> {
        self.shared.store_data(compressor, plain)
    }

    /// Whether any reference to `pack` in an older tree may be taken over.
    pub fn is_usable(&self, pack: PackId) -> bool {
        self.shared.usable.contains(pack)
    }

    /// Whether the reference to `place` in an older tree may be taken over: its pack is usable, or the
    /// blob was relocated to one that is.
    pub fn is_usable_at(&self, place: Location) -> bool {
        self.shared.usable.backs(place)
    }

    /// Remembers a node of an older tree, so that it is not stored again if it recurs.
    pub fn remember_node(&self, node: NodeRef) {
        if self.is_usable_at(node.location()) {
            let mut known = lock(&self.shared.known_nodes);
            // Nodes recur close to where they were; forgetting all now and then loses little.
            if known.len() >= 4096 {
                known.clear();
            }
            known.insert(node.id, node);
        }
    }

    /// Makes everything durable and commits the snapshot that `snapshot` makes, which is told how
    /// many bytes were stored.
    ///
    /// # Errors
    /// `Fenced` when a garbage collection has declared the session dead; those of the store. Nothing
    /// is committed then.
    pub fn commit(mut self, snapshot: impl FnOnce(u64) -> Snapshot) -> Result<SnapshotId> {
        self.drain()?;
        self.shared.consolidate_segments()?;
        let stored = self.shared.counters.bytes_stored.load(Ordering::Relaxed);
        let committed = self.shared.commit(snapshot(stored));
        self.stop_heartbeat();
        self.shared.session.end_after(&self.shared.repository, &committed);
        committed.map(|()| self.id())
    }

    /// Ends the session without a snapshot. What was uploaded stays, named by index segments, so
    /// that a later session can refer to it.
    ///
    /// # Errors
    /// When the index segment cannot be written.
    pub fn abandon(mut self) -> Result<()> {
        let drained = self.drain();
        self.stop_heartbeat();
        self.shared.session.end(&self.shared.repository);
        drained
    }

    /// Uploads the open packs, waits for all uploads, and flushes the last segment.
    fn drain(&mut self) -> Result<()> {
        let closed = self.shared.close_packs();
        for uploader in self.uploaders.drain(..) {
            if uploader.join().is_err() {
                self.shared.fail(Error::new(ErrorKind::Store, "an upload panicked"));
            }
        }
        closed?;
        self.shared.check()?;
        // Writing segments takes memory of its own: let the pack buffers go.
        for packer in [&self.shared.data, &self.shared.meta] {
            lock(packer).free.try_iter().for_each(drop);
        }
        let packs = std::mem::take(&mut *lock(&self.shared.unflushed));
        self.shared.flush(packs)
    }

    fn stop_heartbeat(&mut self) {
        if let Some(heartbeat) = self.heartbeat.take() {
            // Either it is waiting for this, or it has ended.
            let _sent = self.stop_heartbeat.send_timeout((), Duration::from_secs(1));
            drop(std::mem::replace(&mut self.stop_heartbeat, crossbeam_channel::bounded(0).0));
            let _ended = heartbeat.join();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // A session that ends by an error: let the threads go, leave the announcement to be fenced.
        self.shared.failed.store(true, Ordering::SeqCst);
        lock(&self.shared.data).uploads = None;
        lock(&self.shared.meta).uploads = None;
        for uploader in self.uploaders.drain(..) {
            let _ended = uploader.join();
        }
        self.stop_heartbeat();
    }
}

impl NodeSink for Writer {
    fn store_node(&self, kind: BlobKind, plain: &[u8]) -> Result<NodeRef> {
        let shared = &self.shared;
        shared.check()?;
        let id = kind.id(shared.repository.keys(), plain);
        if let Some(node) = lock(&shared.known_nodes).get(&id) {
            return Ok(*node);
        }
        let mut compressor = lock(&shared.node_compressor);
        let compressed = compressor.compress(plain);
        let mut meta = lock(&shared.meta);
        let Location { pack, ordinal } = meta.push(shared, id, kind, plain, compressed)?;
        Ok(NodeRef { id, pack, ordinal })
    }
}

impl Packer {
    fn new(
        class: PackClass,
        target: usize,
        buffers: usize,
        uploads: &Sender<SealedPack>,
    ) -> (Self, Sender<Vec<u8>>) {
        let (back, free) = crossbeam_channel::bounded(buffers);
        for _ in 0..buffers {
            back.send(Vec::new()).expect("the receiver is held");
        }
        let uploads = Some(uploads.clone());
        (Self { class, target, open: None, free, uploads, back: None }, back)
    }

    /// Adds a blob to the open pack, and closes the pack when it is full.
    fn push(
        &mut self,
        shared: &Shared,
        id: BlobId,
        kind: BlobKind,
        plain: &[u8],
        compressed: Option<&[u8]>,
    ) -> Result<Location> {
        if plain.len() > BLOB_BYTES_MAX {
            return Err(Error::invalid("a blob is larger than the format allows"));
        }
        let (compression, stored) = match compressed {
            Some(stored) => (Compression::Zstd, stored),
            None => (Compression::None, plain),
        };
        // A nearly full pack is closed rather than outgrown, so buffers keep their size.
        if self
            .open
            .as_ref()
            .is_some_and(|pack| !pack.is_empty() && pack.len() + stored.len() > self.buffer_bytes())
        {
            self.close(shared)?;
        }
        let buffer_bytes = self.buffer_bytes();
        let pack = match &mut self.open {
            Some(pack) => pack,
            none => {
                let mut buffer = self.free.recv().map_err(|_| shared.failure())?;
                buffer.clear();
                buffer.reserve_exact(buffer_bytes);
                none.insert(PackBuilder::new(shared.repository.keys(), self.class, buffer))
            }
        };
        let location = pack.push(id, kind, compression, stored, plain.len());
        let full = pack.is_full() || pack.len() >= self.target;
        if self.class == PackClass::Data {
            // Before the pack can be uploaded, and so flushed.
            lock(&shared.fresh).insert(id, location);
        }
        if full {
            self.close(shared)?;
        }
        Ok(location)
    }

    fn buffer_bytes(&self) -> usize {
        self.target + CHUNK_BYTES_MAX + PackBuilder::OVERHEAD_BYTES
    }

    fn close(&mut self, shared: &Shared) -> Result<()> {
        let Some(pack) = self.open.take() else {
            return Ok(());
        };
        if let Some(back) = &self.back {
            // There is room: the buffer came from there.
            let _kept = back.send(shared.upload(pack.finish()));
            return shared.check();
        }
        let sent = self.uploads.as_ref().map(|uploads| uploads.send(pack.finish()));
        if let Some(Ok(())) = sent { Ok(()) } else { Err(shared.failure()) }
    }
}

impl Shared {
    fn store_data(&self, compressor: &mut Compressor, plain: &[u8]) -> Result<BlobRef> {
        self.check()?;
        let id = BlobKind::Data.id(self.repository.keys(), plain);
        let len = plain.len() as u32;
        let known = |location| {
            self.counters.blobs_known.fetch_add(1, Ordering::Relaxed);
            BlobRef { id, location, len }
        };
        // Fresh before own: a flush adds to the index before it takes from the fresh ones.
        if let Some(location) = lock(&self.fresh).get(&id) {
            return Ok(known(*location));
        }
        if let Some(location) = self.find(&id) {
            return Ok(known(location));
        }
        let compressed = compressor.compress(plain);
        let mut data = lock(&self.data);
        // Another thread may have stored it meanwhile, and even flushed it: then it is stored twice.
        if let Some(location) = lock(&self.fresh).get(&id) {
            return Ok(known(*location));
        }
        let location = data.push(self, id, BlobKind::Data, plain, compressed)?;
        self.counters.blobs_new.fetch_add(1, Ordering::Relaxed);
        Ok(BlobRef { id, location, len })
    }

    fn find(&self, id: &BlobId) -> Option<Location> {
        let store = self.repository.store();
        let own = self.own.read().unwrap_or_else(PoisonError::into_inner);
        own.get(store, id).or_else(|| {
            self.base.get(store, id).filter(|location| self.usable.contains(location.pack))
        })
    }

    /// Stores a pack; gives its buffer back in any case.
    fn upload(&self, pack: SealedPack) -> Vec<u8> {
        if self.failed.load(Ordering::SeqCst) {
            return pack.buffer;
        }
        let name = pack.class.object_name(pack.id);
        match self.repository.store().create(&name, &[IoSlice::new(&pack.buffer)]) {
            Ok(Created::New) => {
                let bytes = pack.buffer.len() as u64;
                self.counters.bytes_stored.fetch_add(bytes, Ordering::Relaxed);
                let packs = self.counters.packs.fetch_add(1, Ordering::Relaxed) + 1;
                if let Err(error) = self.note_durable(&pack, packs) {
                    self.fail(error);
                }
            }
            Ok(Created::AlreadyExists) => {
                self.fail(Error::corrupt(name, "a random name was taken"));
            }
            Err(error) => self.fail(error.into()),
        }
        pack.buffer
    }

    /// Takes a receipt for a pack, and flushes a segment when enough have come together: a crash
    /// loses knowledge of four packs, or of 5 % of a long session.
    fn note_durable(&self, pack: &SealedPack, packs: u64) -> Result<()> {
        if pack.class == PackClass::Meta {
            return Ok(());
        }
        let place = |ordinal: usize| Location { pack: pack.id, ordinal: ordinal as u8 };
        let numbered = || pack.entries.iter().enumerate();
        let receipt = DurablePack {
            records: numbered().map(|(at, entry)| Record::new(&entry.id, place(at))).collect(),
            ids: numbered().map(|(_, entry)| entry.id).collect(),
        };
        let due = {
            let mut unflushed = lock(&self.unflushed);
            unflushed.push(receipt);
            let enough = (packs / 20).clamp(4, 512);
            (unflushed.len() as u64 >= enough).then(|| std::mem::take(&mut *unflushed))
        };
        due.map_or(Ok(()), |packs| self.flush(packs))
    }

    fn flush(&self, packs: Vec<DurablePack>) -> Result<()> {
        if packs.is_empty() {
            return Ok(());
        }
        let (store, keys) = (self.repository.store(), self.repository.keys());
        let mut records: Vec<_> = packs.iter().flat_map(|pack| &pack.records).collect();
        records.sort_unstable();
        let mut segment = SegmentWriter::new(keys, records.len(), Vec::new());
        records.into_iter().for_each(|record| segment.push(record));
        if let Some(id) = segment.finish(store)? {
            let segment = Segment::open(store, keys, id)?;
            let mut own = self.own.write().unwrap_or_else(PoisonError::into_inner);
            own.add(store, segment);
            drop(own);
            lock(&self.own_segments).push(id);
        }
        let mut fresh = lock(&self.fresh);
        for id in packs.iter().flat_map(|pack| &pack.ids) {
            fresh.remove(id);
        }
        Ok(())
    }

    /// Replaces the segments of this session by few: readers open every segment there is.
    fn consolidate_segments(&self) -> Result<()> {
        let old = std::mem::take(&mut *lock(&self.own_segments));
        if old.len() < 2 {
            return Ok(());
        }
        let (store, keys) = (self.repository.store(), self.repository.keys());
        let own = self.own.read().unwrap_or_else(PoisonError::into_inner);
        let segments: Vec<_> = own.segments().iter().collect();
        match index::merge(store, keys, &segments, &|_| true) {
            // Somebody else has merged and deleted them already.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            merged => merged?,
        };
        let names: Vec<String> = segments.iter().map(|one| one.name().to_owned()).collect();
        // What is left says the same once more, and goes with the next prune. A key may have no right
        // to delete, and a snapshot is not to fail for that.
        let _left = store.delete_all(&names);
        Ok(())
    }

    fn close_packs(&self) -> Result<()> {
        let close = |packer: &Mutex<Packer>| {
            let mut packer = lock(packer);
            let closed = packer.close(self);
            packer.uploads = None;
            closed
        };
        let data = close(&self.data);
        close(&self.meta).and(data)
    }

    fn commit(&self, snapshot: Snapshot) -> Result<()> {
        let name = record::snapshot_name(self.session.id);
        let verdict = Verdict::Snapshot(Box::new(snapshot));
        // Sealed once: whatever is sent again has the same bytes.
        let keys = self.repository.keys();
        let object = record::seal_json(keys, ObjectKind::Snapshot, &name, &verdict);
        self.session.commit(&self.repository, &name, &object)
    }

    fn keep_alive(&self, stop: &Receiver<()>) {
        while stop.recv_timeout(self.settings.heartbeat)
            == Err(crossbeam_channel::RecvTimeoutError::Timeout)
        {
            // A missed renewal is made up for by the next; whether it was one too many is decided
            // by the verdict alone.
            if let Err(error) = self.renew()
                && error.kind() == ErrorKind::Fenced
            {
                return self.fail(error);
            }
        }
    }

    fn renew(&self) -> Result<()> {
        let renewed = self.session.renew(&self.repository, self.repository.store().clock());
        if session::is_dead(&self.repository, self.session.id)? {
            return Err(session::fenced());
        }
        renewed
    }

    fn check(&self) -> Result<()> {
        if self.failed.load(Ordering::SeqCst) { Err(self.failure()) } else { Ok(()) }
    }

    fn fail(&self, error: Error) {
        lock(&self.failure).get_or_insert(error);
        self.failed.store(true, Ordering::SeqCst);
    }

    fn failure(&self) -> Error {
        let failure = lock(&self.failure);
        failure.as_ref().map_or_else(Error::cancelled, Error::duplicate)
    }
}

/// All packs that any garbage collection is about to delete.
fn read_all_tombstones(repository: &Repository) -> Result<HashSet<PackId>> {
    let mut packs = HashSet::new();
    for id in repository.list_ids(record::TOMBSTONES)? {
        let id = GenerationId(id.0);
        match record::read_tombstones(repository.store(), repository.keys(), id) {
            Ok(tombstones) => packs.extend(tombstones.all().copied()),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error.context("cannot tell which packs are about to be deleted"));
            }
        }
    }
    Ok(packs)
}

/// Names of all packs of both classes, ascending.
fn list_packs(repository: &Repository) -> Result<Vec<PackId>> {
    let mut packs = Vec::new();
    for class in [PackClass::Data, PackClass::Meta] {
        repository.store().list(class.folder(), &mut |meta| {
            let name = meta.key.rsplit('/').next();
            packs.extend(name.and_then(|name| name.parse::<PackId>().ok()));
            Ok(())
        })?;
    }
    packs.sort_unstable();
    Ok(packs)
}
