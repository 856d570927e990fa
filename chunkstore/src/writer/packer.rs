//! Packs being filled, and their upload.

use std::io::IoSlice;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, Sender};
use objects::Created;

use super::{Shared, lock};
use crate::codec::compress::Compression;
use crate::error::{Error, Result};
use crate::id::BlobId;
use crate::limits::{BLOB_BYTES_MAX, CHUNK_BYTES_MAX};
use crate::pack::{BlobKind, Location, PackBuilder, PackClass, SealedPack};

/// Fills packs of one class.
pub(super) struct Packer {
    class: PackClass,
    target: usize,
    open: Option<PackBuilder>,
    pub(super) free: Receiver<Vec<u8>>,
    pub(super) uploads: Option<Sender<SealedPack>>,
    /// Where a buffer goes that was uploaded here, when there are no threads for it.
    pub(super) back: Option<Sender<Vec<u8>>>,
}

impl Packer {
    pub(super) fn new(
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
    pub(super) fn push(
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
                let pack = PackBuilder::new(shared.repository.keys(), self.class, buffer);
                shared.usable.add_own(pack.id());
                none.insert(pack)
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
    /// Stores a pack; gives its buffer back in any case.
    pub(super) fn upload(&self, pack: SealedPack) -> Vec<u8> {
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

    pub(super) fn close_packs(&self) -> Result<()> {
        let close = |packer: &Mutex<Packer>| {
            let mut packer = lock(packer);
            let closed = packer.close(self);
            packer.uploads = None;
            closed
        };
        let data = close(&self.data);
        close(&self.meta).and(data)
    }
}
