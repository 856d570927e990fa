//! Packs: objects of up to 128 sealed blobs with a sealed table at the end.
//!
//! ```text
//! header 64 │ blob 0 │ blob 1 │ … │ table (sealed) │ header again 64 │ table length 4 │ "EBPKTAIL"
//! ```
//! A pack is built in one buffer, which is recycled: the number of buffers bounds the memory of all
//! packs in flight. Reading one blob of a pack takes the tail (one read of at most 8 KiB, cached) and
//! one ranged read. The header stands at both ends so that the tail suffices to open the pack.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use objects::ObjectStore;

use crate::codec::compress::{Compression, Decompressor};
use crate::codec::seal::{HEADER_BYTES, Header, Keyring, ObjectCipher, ObjectKind, TAG_BYTES};
use crate::error::{Error, Result};
use crate::id::{BlobId, PackId};
use crate::limits::{BLOB_BYTES_MAX, PACK_BLOBS_MAX, PACK_BYTES_MAX};
use crate::wire::{DecodeError, DecodeResult, Decoder};

const TAIL_MAGIC: [u8; 8] = *b"EBPKTAIL";
const TABLE_ORDINAL: u32 = u32::MAX;
const TABLE_ENTRY_BYTES: usize = 32 + 1 + 1 + 4 + 4;
const TABLE_BYTES_MAX: usize = PACK_BLOBS_MAX * TABLE_ENTRY_BYTES + TAG_BYTES;
const FOOTER_BYTES: usize = HEADER_BYTES + 4 + 8;
/// The tail that certainly holds table and footer.
const TAIL_BYTES_MAX: usize = TABLE_BYTES_MAX + FOOTER_BYTES;

/// What a pack holds: data, or the nodes of trees. They lie in folders of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PackClass {
    /// Chunks and bundles.
    Data,
    /// Tree nodes.
    Meta,
}

impl PackClass {
    /// Folder of the packs of this class.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Data => "packs/",
            Self::Meta => "meta/",
        }
    }

    fn object_kind(self) -> ObjectKind {
        match self {
            Self::Data => ObjectKind::DataPack,
            Self::Meta => ObjectKind::MetaPack,
        }
    }

    /// Name of the object of pack `id`; 256 subfolders keep folders small and spread listings.
    pub fn object_name(self, id: PackId) -> String {
        format!("{}{:02x}/{id}", self.folder(), id.0[0])
    }
}

/// What a blob holds. The number is part of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BlobKind {
    /// A chunk of a file, or a bundle of small files.
    Data = 0,
    /// A leaf of a tree.
    Leaf = 1,
    /// An interior node of a tree.
    Interior = 2,
}

impl BlobKind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Data, Self::Leaf, Self::Interior].into_iter().find(|kind| *kind as u8 == byte)
    }

    /// The class of packs that hold blobs of this kind.
    pub fn class(self) -> PackClass {
        match self {
            Self::Data => PackClass::Data,
            Self::Leaf | Self::Interior => PackClass::Meta,
        }
    }

    /// The id of `plain` as a blob of this kind.
    pub fn id(self, keys: &Keyring, plain: &[u8]) -> BlobId {
        let key = match self {
            Self::Data => keys.data_id(),
            Self::Leaf | Self::Interior => keys.node_id(),
        };
        BlobId(*blake3::keyed_hash(key, plain).as_bytes())
    }
}

/// Where a blob lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Location {
    /// The pack.
    pub pack: PackId,
    /// Which of its blobs, from 0.
    pub ordinal: u8,
}

/// One line of a pack's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableEntry {
    /// Name of the blob.
    pub id: BlobId,
    /// What it holds.
    pub kind: BlobKind,
    /// How it is stored.
    pub compression: Compression,
    /// Bytes in the pack, seal included.
    pub stored_len: u32,
    /// Bytes of plaintext.
    pub plain_len: u32,
    /// Where it begins in the pack; follows from the entries before.
    pub offset: u32,
}

impl TableEntry {
    fn aad(&self) -> [u8; 6] {
        blob_aad(self.kind, self.compression, self.plain_len)
    }
}

fn blob_aad(kind: BlobKind, compression: Compression, plain_len: u32) -> [u8; 6] {
    let len = plain_len.to_le_bytes();
    [kind as u8, compression as u8, len[0], len[1], len[2], len[3]]
}

fn encode_table(entries: &[TableEntry], out: &mut Vec<u8>) {
    for entry in entries {
        out.extend_from_slice(&entry.id.0);
        out.push(entry.kind as u8);
        out.push(entry.compression as u8);
        out.extend_from_slice(&entry.stored_len.to_le_bytes());
        out.extend_from_slice(&entry.plain_len.to_le_bytes());
    }
}

/// Decodes a table and checks it against the limits and the class of its pack.
pub(crate) fn decode_table(class: PackClass, bytes: &[u8]) -> DecodeResult<Vec<TableEntry>> {
    let count = bytes.len() / TABLE_ENTRY_BYTES;
    if count == 0 || count > PACK_BLOBS_MAX {
        return Err(DecodeError("its table has an impossible number of blobs"));
    }
    let mut decoder = Decoder::new(bytes);
    let mut entries = Vec::with_capacity(count);
    let mut offset = HEADER_BYTES as u32;
    for _ in 0..count {
        let entry = TableEntry {
            id: BlobId(decoder.array()?),
            kind: BlobKind::from_byte(decoder.u8()?)
                .filter(|kind| kind.class() == class)
                .ok_or(DecodeError("its table names an unknown kind of blob"))?,
            compression: Compression::from_byte(decoder.u8()?)
                .ok_or(DecodeError("its table names an unknown compression"))?,
            stored_len: decoder.u32()?,
            plain_len: decoder.u32()?,
            offset,
        };
        let stored = entry.stored_len as usize;
        let fits = (TAG_BYTES..=BLOB_BYTES_MAX + TAG_BYTES).contains(&stored)
            && entry.plain_len as usize <= BLOB_BYTES_MAX;
        let raw = entry.compression == Compression::None;
        if !fits || (raw && entry.plain_len as usize + TAG_BYTES != stored) {
            return Err(DecodeError("its table has an impossible length"));
        }
        offset = offset
            .checked_add(entry.stored_len)
            .filter(|end| u64::from(*end) <= PACK_BYTES_MAX)
            .ok_or(DecodeError("its table exceeds the size of a pack"))?;
        entries.push(entry);
    }
    decoder.finish()?;
    Ok(entries)
}

/// Fills one pack.
pub struct PackBuilder {
    id: PackId,
    class: PackClass,
    cipher: ObjectCipher,
    header: Header,
    buffer: Vec<u8>,
    entries: Vec<TableEntry>,
}

/// A finished pack, to be stored under [`object_name`](PackClass::object_name).
///
/// The bytes may be sent any number of times under that name; other bytes never.
pub struct SealedPack {
    /// Name of the pack.
    pub id: PackId,
    /// What it holds.
    pub class: PackClass,
    /// The object.
    pub buffer: Vec<u8>,
    /// Its table.
    pub entries: Vec<TableEntry>,
}

impl PackBuilder {
    /// Begins a pack in `buffer`, whose content is discarded.
    pub fn new(keys: &Keyring, class: PackClass, mut buffer: Vec<u8>) -> Self {
        let id = PackId::random();
        let (header, cipher) =
            ObjectCipher::create(keys, class.object_kind(), &class.object_name(id));
        buffer.clear();
        buffer.extend_from_slice(&header.encode());
        Self { id, class, cipher, header, buffer, entries: Vec::with_capacity(PACK_BLOBS_MAX) }
    }

    /// The name it will have.
    pub fn id(&self) -> PackId {
        self.id
    }

    /// Bytes an object needs beyond its blobs' stored bytes.
    pub const OVERHEAD_BYTES: usize = HEADER_BYTES + TAIL_BYTES_MAX;

    /// Bytes of the object if it were finished now, at the most.
    pub fn len(&self) -> usize {
        self.buffer.len() + TAIL_BYTES_MAX
    }

    /// Whether it holds no blob.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether it has as many blobs as a pack can hold.
    pub fn is_full(&self) -> bool {
        self.entries.len() == PACK_BLOBS_MAX
    }

    /// Adds a blob whose plaintext of `plain_len` bytes is stored as `stored`.
    ///
    /// # Panics
    /// When the pack [is full](Self::is_full), or the blob exceeds the format's limit.
    pub fn push(
        &mut self,
        id: BlobId,
        kind: BlobKind,
        compression: Compression,
        stored: &[u8],
        plain_len: usize,
    ) -> Location {
        assert!(!self.is_full() && plain_len <= BLOB_BYTES_MAX && stored.len() <= BLOB_BYTES_MAX);
        let offset = self.buffer.len();
        let plain_len = plain_len as u32;
        self.buffer.extend_from_slice(stored);
        let ordinal = self.entries.len() as u8;
        let aad = blob_aad(kind, compression, plain_len);
        self.cipher.seal(u32::from(ordinal), &aad, &mut self.buffer, offset);
        let stored_len = (self.buffer.len() - offset) as u32;
        let offset = offset as u32;
        self.entries.push(TableEntry { id, kind, compression, stored_len, plain_len, offset });
        Location { pack: self.id, ordinal }
    }

    /// Appends table and footer.
    pub fn finish(mut self) -> SealedPack {
        let table_at = self.buffer.len();
        encode_table(&self.entries, &mut self.buffer);
        self.cipher.seal(TABLE_ORDINAL, b"table", &mut self.buffer, table_at);
        let table_len = (self.buffer.len() - table_at) as u32;
        self.buffer.extend_from_slice(&self.header.encode());
        self.buffer.extend_from_slice(&table_len.to_le_bytes());
        self.buffer.extend_from_slice(&TAIL_MAGIC);
        SealedPack { id: self.id, class: self.class, buffer: self.buffer, entries: self.entries }
    }
}

/// A stored pack whose table has been read and authenticated.
pub struct Pack {
    /// Name of the pack.
    pub id: PackId,
    name: String,
    cipher: ObjectCipher,
    table: Vec<TableEntry>,
}

impl Pack {
    /// Reads the table of pack `id`.
    ///
    /// # Errors
    /// `NotFound` when there is no such object, `Corrupt` when it is not whole and authentic.
    pub fn open(
        store: &dyn ObjectStore,
        keys: &Keyring,
        class: PackClass,
        id: PackId,
    ) -> Result<Self> {
        let name = class.object_name(id);
        let (size, tail) = store.read_tail(&name, TAIL_BYTES_MAX)?;
        if size > PACK_BYTES_MAX + TAIL_BYTES_MAX as u64 {
            return Err(Error::corrupt(&name, "it is larger than a pack can be"));
        }
        Self::from_tail(keys, class, id, name, tail, size)
    }

    fn from_tail(
        keys: &Keyring,
        class: PackClass,
        id: PackId,
        name: String,
        mut tail: Vec<u8>,
        size: u64,
    ) -> Result<Self> {
        let damaged = |why: &'static str| Error::corrupt(&name, why);
        let body =
            tail.len().checked_sub(FOOTER_BYTES).ok_or_else(|| damaged("it is too short"))?;
        let (sealed, footer) = tail.split_at_mut(body);
        let mut decoder = Decoder::new(footer);
        let mut next = || -> DecodeResult<(&[u8], u32, [u8; 8])> {
            Ok((decoder.take(HEADER_BYTES)?, decoder.u32()?, decoder.array()?))
        };
        let (header, table_len, magic) = next().map_err(|error| damaged(error.0))?;
        if magic != TAIL_MAGIC {
            return Err(damaged("it does not end like a pack: it was cut off or extended"));
        }
        let header = Header::decode(&name, header)?;
        let cipher = ObjectCipher::open(keys, class.object_kind(), &name, &header)?;
        let table_at = body.checked_sub(table_len as usize);
        let table_at = table_at.ok_or_else(|| damaged("its table has an impossible length"))?;
        let table = cipher
            .open_part(TABLE_ORDINAL, b"table", &mut sealed[table_at..])
            .ok_or_else(|| damaged("its table was changed"))?;
        let table = decode_table(class, table).map_err(|error| damaged(error.0))?;
        let blobs: u64 = table.iter().map(|entry| u64::from(entry.stored_len)).sum();
        let expected = (HEADER_BYTES + FOOTER_BYTES) as u64 + u64::from(table_len) + blobs;
        if size != expected {
            let why = format!("it has {size} bytes, but its table asks for {expected}");
            return Err(Error::corrupt(&name, why));
        }
        Ok(Self { id, name, cipher, table })
    }

    /// Name of the object.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All blobs, in order.
    pub fn table(&self) -> &[TableEntry] {
        &self.table
    }

    /// The table's line for a blob that a reference says lies at `ordinal`.
    ///
    /// # Errors
    /// `Corrupt` when another blob lies there.
    pub fn entry(&self, ordinal: u8, id: &BlobId) -> Result<&TableEntry> {
        self.table.get(usize::from(ordinal)).filter(|entry| entry.id == *id).ok_or_else(|| {
            Error::corrupt(&self.name, format!("blob {} is not at place {ordinal}", id.short()))
        })
    }

    /// Opens the seal of blob `ordinal`, whose stored bytes are `sealed`: what it yields is authentic,
    /// and still compressed.
    ///
    /// # Errors
    /// `Corrupt` when the bytes are not what was stored, or there is no such blob.
    pub fn open_stored<'a>(&self, ordinal: u8, sealed: &'a mut [u8]) -> Result<&'a [u8]> {
        let opened = self.table.get(usize::from(ordinal)).and_then(|entry| {
            self.cipher.open_part(u32::from(ordinal), &entry.aad(), sealed).map(|opened| &*opened)
        });
        opened.ok_or_else(|| {
            Error::corrupt(&self.name, format!("the blob at place {ordinal} was changed"))
        })
    }

    /// Opens blob `ordinal`, whose stored bytes are `sealed`, into `plain`, and verifies its id.
    ///
    /// # Errors
    /// `Corrupt` when the bytes are not what was stored.
    pub fn decode(
        &self,
        keys: &Keyring,
        ordinal: u8,
        sealed: &mut [u8],
        decompressor: &mut Decompressor,
        plain: &mut Vec<u8>,
    ) -> Result<()> {
        let entry = &self.table[usize::from(ordinal)];
        let damaged = |why: &str| {
            Error::corrupt(
                &self.name,
                format!("blob {} at place {ordinal} {why}", entry.id.short()),
            )
        };
        let opened = self
            .cipher
            .open_part(u32::from(ordinal), &entry.aad(), sealed)
            .ok_or_else(|| damaged("was changed"))?;
        match entry.compression {
            Compression::None => {
                plain.clear();
                plain.extend_from_slice(opened);
            }
            Compression::Zstd => decompressor
                .decompress(opened, entry.plain_len as usize, plain)
                .ok_or_else(|| damaged("does not decompress to its length"))?,
        }
        if entry.kind.id(keys, plain) != entry.id {
            return Err(damaged("does not match its name"));
        }
        Ok(())
    }

    /// Reads, opens and verifies one blob.
    ///
    /// # Errors
    /// As [`decode`](Self::decode), and those of the store.
    pub fn read(
        &self,
        store: &dyn ObjectStore,
        keys: &Keyring,
        ordinal: u8,
        id: &BlobId,
        scratch: &mut ReadScratch,
    ) -> Result<()> {
        let entry = *self.entry(ordinal, id)?;
        scratch.sealed.resize(entry.stored_len as usize, 0);
        store.read_at(&self.name, u64::from(entry.offset), &mut scratch.sealed)?;
        self.decode(
            keys,
            ordinal,
            &mut scratch.sealed,
            &mut scratch.decompressor,
            &mut scratch.plain,
        )
    }

    /// Verifies that the object begins with the same header it ends with.
    ///
    /// # Errors
    /// `Corrupt` when it does not.
    pub fn check_header(&self, keys: &Keyring, class: PackClass, head: &[u8]) -> Result<()> {
        let header = Header::decode(&self.name, head)?;
        ObjectCipher::open(keys, class.object_kind(), &self.name, &header).map(drop)
    }
}

/// Working memory to read blobs with; [`plain`](Self::plain) holds the last one read.
#[derive(Default)]
pub struct ReadScratch {
    sealed: Vec<u8>,
    decompressor: Decompressor,
    /// The plaintext last read.
    pub plain: Vec<u8>,
}

/// The tables of the packs last used, so that reading blobs in turn opens each pack once, however many
/// threads read.
pub struct PackCache {
    class: PackClass,
    packs: Mutex<Vec<(PackId, Opened)>>,
}

/// A pack that is open, or is being opened: whoever needs it meanwhile waits for the one that does it.
type Opened = Arc<OnceLock<Result<Arc<Pack>>>>;

impl PackCache {
    /// Tables kept; each takes at most 7 KiB.
    const PACKS: usize = 256;

    /// An empty cache.
    pub fn new(class: PackClass) -> Self {
        Self { class, packs: Mutex::default() }
    }

    /// The table of pack `id`, read if need be.
    ///
    /// # Errors
    /// As [`Pack::open`]. All who waited get the same; who asks later tries again.
    pub fn get(&self, store: &dyn ObjectStore, keys: &Keyring, id: PackId) -> Result<Arc<Pack>> {
        let opened = self.find(id);
        let pack = opened.get_or_init(|| Pack::open(store, keys, self.class, id).map(Arc::new));
        pack.as_ref().map(Arc::clone).map_err(|error| {
            self.lock().retain(|(_, other)| !Arc::ptr_eq(other, &opened));
            error.duplicate()
        })
    }

    fn find(&self, id: PackId) -> Opened {
        // The most recently used pack is last.
        let mut packs = self.lock();
        let known = packs.iter().rposition(|(other, _)| *other == id).map(|at| packs.remove(at));
        if known.is_none() && packs.len() == Self::PACKS {
            packs.remove(0);
        }
        let opened = known.map(|(_, opened)| opened).unwrap_or_default();
        packs.push((id, opened.clone()));
        opened
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(PackId, Opened)>> {
        // A poisoned cache is only a cache.
        self.packs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
