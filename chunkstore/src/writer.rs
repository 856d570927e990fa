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
//! Ids of blobs that no segment names yet are kept in a map that flushing bounds. What may be referred
//! to takes 8 bytes a pack of the repository, and some 20 a relocated blob.
//!
//! # Crashes
//! Nothing refers to a pack before it is durable: index segments are made from `DurablePack`s, which
//! only an acknowledged upload yields, and the snapshot is written last. A session that dies leaves
//! packs that the next one finds through the flushed segments, or that a garbage collection removes.

mod packer;
mod segments;
mod usable;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};

use crate::codec::compress::{Compressor, Level};
use crate::codec::seal::ObjectKind;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{BlobId, PackId, SegmentId, SnapshotId};
use crate::index::Index;
use crate::pack::{BlobKind, Location, PackClass};
use crate::record::{self, Session, Snapshot, Verdict};
use crate::repository::Repository;
use crate::session::{self, Announced};
use crate::tree::{BlobRef, NodeRef, NodeSink};
use packer::Packer;
use segments::DurablePack;
use usable::Usable;

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
    /// Whatever is referred to passes here.
    usable: Usable,
    data: Mutex<Packer>,
    meta: Mutex<Packer>,
    /// Data blobs of this session that no segment names yet. Whoever packs holds `data` before this;
    /// whoever flushes holds this alone, because packing may wait for an upload to end.
    fresh: Mutex<HashMap<BlobId, Location>>,
    node_compressor: Mutex<Compressor>,
    unflushed: Mutex<Vec<DurablePack>>,
    own_segments: Mutex<Vec<SegmentId>>,
    failed: AtomicBool,
    failure: Mutex<Option<Error>>,
    counters: WriterCounters,
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
            let (base, _) = Index::open(store, keys, settings.filter_bytes / 2)?;
            Ok((base, Usable::learn(&repository)?))
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
        usable: Usable,
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
                        // Whoever waits for its buffer must get one, whatever becomes of the upload.
                        let upload = AssertUnwindSafe(|| shared.upload(pack));
                        let buffer = catch_unwind(upload).unwrap_or_else(|_| {
                            shared.fail(Error::new(ErrorKind::Store, "an upload panicked"));
                            Vec::new()
                        });
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
        self.shared.usable.remember_node(node);
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
        self.shared.flush_rest()
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
        if let Some(node) = shared.usable.node(&id) {
            return Ok(node);
        }
        let mut compressor = lock(&shared.node_compressor);
        let compressed = compressor.compress(plain);
        let mut meta = lock(&shared.meta);
        let Location { pack, ordinal } = meta.push(shared, id, kind, plain, compressed)?;
        Ok(NodeRef { id, pack, ordinal })
    }

    fn may_refer(&self, pack: PackId, blobs: u128) -> bool {
        self.shared.usable.backs_all(pack, blobs)
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
