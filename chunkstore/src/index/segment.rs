//! One index segment: its bytes, its writer, its reader, and the merge of several.
//!
//! ```text
//! header 64 │ block 0 (4096 sealed) │ … │ filter (sealed) │ footer (sealed) │ footer length 4 │ "EBIXTAIL"
//! ```

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::io::IoSlice;

use objects::{Created, ObjectStore};

use super::filter::Filter;
use crate::codec::seal::{HEADER_BYTES, Header, Keyring, ObjectCipher, ObjectKind, TAG_BYTES};
use crate::error::{Error, Result};
use crate::id::{BlobId, PackId, SegmentId};
use crate::limits::SEGMENT_RECORDS_MAX;
use crate::pack::Location;
use crate::wire::{DecodeError, DecodeResult, Decoder, put_varint};

const TAIL_MAGIC: [u8; 8] = *b"EBIXTAIL";
const RECORD_BYTES: usize = 16 + 16 + 1;
const BLOCK_BYTES: usize = 4096;
const BLOCK_PLAIN_BYTES: usize = BLOCK_BYTES - TAG_BYTES;
const BLOCK_RECORDS: usize = BLOCK_PLAIN_BYTES / RECORD_BYTES;
const FILTER_ORDINAL: u32 = u32::MAX - 1;
const FOOTER_ORDINAL: u32 = u32::MAX;
/// Fences of the largest segment (8 bytes a block) and a long list of superseded segments.
const FOOTER_BYTES_MAX: usize = SEGMENT_RECORDS_MAX / BLOCK_RECORDS * 8 + (1 << 20);

/// First half of a blob's id: enough to name it among all blobs there will ever be (the chance of two
/// equal ones among 10^12 is 10^-15), and half the size.
type Prefix = [u8; 16];

/// One record: a blob and where it lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    /// First 16 bytes of the blob's id.
    pub prefix: Prefix,
    /// Where it lies.
    pub location: Location,
}

impl Record {
    /// The record of blob `id`.
    pub fn new(id: &BlobId, location: Location) -> Self {
        Self { prefix: prefix(id), location }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.prefix);
        out.extend_from_slice(&self.location.pack.0);
        out.push(self.location.ordinal);
    }

    fn decode(bytes: &[u8]) -> DecodeResult<Self> {
        let mut decoder = Decoder::new(bytes);
        let prefix = decoder.array()?;
        let pack = PackId(decoder.array()?);
        let ordinal = decoder.u8()?;
        Ok(Self { prefix, location: Location { pack, ordinal } })
    }
}

fn prefix(id: &BlobId) -> Prefix {
    *id.0.first_chunk().expect("32 is more than 16")
}

/// The first eight bytes of an id, in the order of ids.
pub(super) fn fence(id: &BlobId) -> u64 {
    prefix_fence(&prefix(id))
}

fn prefix_fence(prefix: &Prefix) -> u64 {
    u64::from_be_bytes(*prefix.first_chunk().expect("16 is more than 8"))
}

/// Name of the object of segment `id`.
pub(super) fn object_name(id: SegmentId) -> String {
    format!("{}{id}", super::FOLDER)
}

/// What a segment keeps about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Footer {
    records: u64,
    filter_len: u32,
    supersedes: Vec<SegmentId>,
    fences: Vec<u64>,
    last: Prefix,
}

impl Footer {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + self.fences.len() * 8);
        put_varint(&mut out, self.records);
        put_varint(&mut out, u64::from(self.filter_len));
        put_varint(&mut out, self.supersedes.len() as u64);
        self.supersedes.iter().for_each(|id| out.extend_from_slice(&id.0));
        self.fences.iter().for_each(|fence| out.extend_from_slice(&fence.to_le_bytes()));
        out.extend_from_slice(&self.last);
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> DecodeResult<Self> {
        let mut decoder = Decoder::new(bytes);
        let records = decoder.varint()?;
        if records == 0 || records > SEGMENT_RECORDS_MAX as u64 {
            return Err(DecodeError("its number of records is impossible"));
        }
        let filter_len = decoder.varint_u32()?;
        if filter_len as usize != Filter::size(records as usize) {
            return Err(DecodeError("its filter has an impossible length"));
        }
        let superseded = decoder.count(SegmentId::LEN)?;
        let supersedes = (0..superseded)
            .map(|_| decoder.array().map(SegmentId))
            .collect::<DecodeResult<Vec<_>>>()?;
        let blocks = (records as usize).div_ceil(BLOCK_RECORDS);
        if decoder.remaining() != blocks * 8 + 16 {
            return Err(DecodeError("its footer has an impossible length"));
        }
        let fences = (0..blocks).map(|_| decoder.u64()).collect::<DecodeResult<Vec<_>>>()?;
        let last = decoder.array()?;
        decoder.finish()?;
        if !fences.is_sorted() {
            return Err(DecodeError("its blocks are not in order"));
        }
        Ok(Self { records, filter_len, supersedes, fences, last })
    }
}

/// Builds one segment from records in ascending order.
pub struct SegmentWriter {
    id: SegmentId,
    header: Header,
    cipher: ObjectCipher,
    object: Vec<u8>,
    block: Vec<u8>,
    filter: Filter,
    footer: Footer,
}

impl SegmentWriter {
    /// A writer for about `records` records, at most [`SEGMENT_RECORDS_MAX`].
    pub fn new(keys: &Keyring, records: usize, supersedes: Vec<SegmentId>) -> Self {
        let id = SegmentId::random();
        let (header, cipher) = ObjectCipher::create(keys, ObjectKind::Segment, &object_name(id));
        // All of it, since growing would hold it twice: blocks, filter, and a fence a block.
        let blocks = records.div_ceil(BLOCK_RECORDS);
        let footer_bytes = 8 * blocks + SegmentId::LEN * supersedes.len() + 256;
        let bytes = HEADER_BYTES + blocks * BLOCK_BYTES + Filter::size(records) + footer_bytes;
        let mut object = Vec::with_capacity(bytes);
        object.extend_from_slice(&header.encode());
        let footer =
            Footer { records: 0, filter_len: 0, supersedes, fences: Vec::new(), last: [0; 16] };
        Self {
            id,
            header,
            cipher,
            object,
            block: Vec::with_capacity(BLOCK_PLAIN_BYTES),
            filter: Filter::new(records),
            footer,
        }
    }

    /// Adds a record, which is not before the last one.
    pub fn push(&mut self, record: &Record) {
        debug_assert!(self.footer.records == 0 || self.footer.last <= record.prefix);
        if self.block.is_empty() {
            self.footer.fences.push(prefix_fence(&record.prefix));
        }
        record.encode(&mut self.block);
        self.filter.insert(&record.prefix);
        self.footer.last = record.prefix;
        self.footer.records += 1;
        if self.block.len() == BLOCK_RECORDS * RECORD_BYTES {
            self.seal_block();
        }
    }

    fn seal_block(&mut self) {
        self.block.resize(BLOCK_PLAIN_BYTES, 0);
        let from = self.object.len();
        self.object.extend_from_slice(&self.block);
        let ordinal = self.footer.fences.len() as u32 - 1;
        self.cipher.seal(ordinal, b"records", &mut self.object, from);
        self.block.clear();
    }

    /// Stores the segment and returns its name; `None` if it has no record.
    ///
    /// # Errors
    /// Those of the store.
    pub fn finish(mut self, store: &dyn ObjectStore) -> Result<Option<SegmentId>> {
        if self.footer.records == 0 {
            return Ok(None);
        }
        if !self.block.is_empty() {
            self.seal_block();
        }
        // The filter was sized for the expected number of records; the reader computes the size
        // from the actual one.
        if self.filter.as_bytes().len() != Filter::size(self.footer.records as usize) {
            self.rebuild_filter()?;
        }
        let from = self.object.len();
        self.object.extend_from_slice(self.filter.as_bytes());
        self.footer.filter_len = (self.object.len() - from) as u32;
        self.cipher.seal(FILTER_ORDINAL, b"filter", &mut self.object, from);
        let from = self.object.len();
        self.object.extend_from_slice(&self.footer.encode());
        self.cipher.seal(FOOTER_ORDINAL, b"footer", &mut self.object, from);
        let footer_len = (self.object.len() - from) as u32;
        self.object.extend_from_slice(&footer_len.to_le_bytes());
        self.object.extend_from_slice(&TAIL_MAGIC);
        let name = object_name(self.id);
        match store.create(&name, &[IoSlice::new(&self.object)])? {
            Created::New => Ok(Some(self.id)),
            Created::AlreadyExists => Err(Error::corrupt(name, "a random name was taken")),
        }
    }

    fn rebuild_filter(&mut self) -> Result<()> {
        let mut filter = Filter::new(self.footer.records as usize);
        let mut left = self.footer.records as usize;
        for block in 0..self.footer.fences.len() {
            let from = HEADER_BYTES + block * BLOCK_BYTES;
            let mut sealed = self.object[from..from + BLOCK_BYTES].to_vec();
            let plain = self
                .cipher
                .open_part(block as u32, b"records", &mut sealed)
                .ok_or_else(|| Error::corrupt(object_name(self.id), "memory is faulty"))?;
            for record in plain.chunks_exact(RECORD_BYTES).take(left.min(BLOCK_RECORDS)) {
                filter.insert(record.first_chunk().expect("a record has 33 bytes"));
            }
            left = left.saturating_sub(BLOCK_RECORDS);
        }
        self.filter = filter;
        // The header was not touched; say so, since the cipher came from it.
        debug_assert_eq!(self.object[..HEADER_BYTES], self.header.encode());
        Ok(())
    }
}

/// A stored segment.
pub struct Segment {
    id: SegmentId,
    name: String,
    cipher: ObjectCipher,
    footer: Footer,
    filter: Option<Filter>,
}

impl Segment {
    /// Reads footer and fences of segment `id`.
    ///
    /// # Errors
    /// `NotFound`, or `Corrupt` when it is not whole and authentic.
    pub fn open(store: &dyn ObjectStore, keys: &Keyring, id: SegmentId) -> Result<Self> {
        let name = object_name(id);
        let damaged = |why: &'static str| Error::corrupt(&name, why);
        let (size, tail) = store.read_tail(&name, 12)?;
        let mut head = [0; HEADER_BYTES];
        store.read_at(&name, 0, &mut head)?;
        let header = Header::decode(&name, &head)?;
        let cipher = ObjectCipher::open(keys, ObjectKind::Segment, &name, &header)?;
        let footer_end = size.checked_sub(12).ok_or_else(|| damaged("it is too short"))?;
        let tail: [u8; 12] = tail.try_into().map_err(|_| damaged("it is too short"))?;
        if tail[4..] != TAIL_MAGIC {
            return Err(damaged("it does not end like a segment: it was cut off or extended"));
        }
        let footer_len = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
        if footer_len > (FOOTER_BYTES_MAX + TAG_BYTES) as u64 || footer_len > footer_end {
            return Err(damaged("its footer has an impossible length"));
        }
        let mut sealed = vec![0; footer_len as usize];
        store.read_at(&name, footer_end - footer_len, &mut sealed)?;
        let plain = cipher
            .open_part(FOOTER_ORDINAL, b"footer", &mut sealed)
            .ok_or_else(|| damaged("its footer was changed"))?;
        let footer = Footer::decode(plain).map_err(|error| damaged(error.0))?;
        let segment = Self { id, name, cipher, footer, filter: None };
        if segment.filter_offset() + segment.filter_len() + footer_len + 12 != size {
            return Err(Error::corrupt(&segment.name, "its size does not match its footer"));
        }
        Ok(segment)
    }

    /// Its name.
    pub fn id(&self) -> SegmentId {
        self.id
    }

    /// Name of its object.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of records.
    pub fn len(&self) -> u64 {
        self.footer.records
    }

    /// Whether it has no record, which a stored segment never has.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Segments this one replaces.
    pub fn supersedes(&self) -> &[SegmentId] {
        &self.footer.supersedes
    }

    /// First and last record, cut to eight bytes.
    pub(super) fn range(&self) -> (u64, u64) {
        (self.footer.fences[0], prefix_fence(&self.footer.last))
    }

    fn filter_offset(&self) -> u64 {
        (HEADER_BYTES + self.footer.fences.len() * BLOCK_BYTES) as u64
    }

    fn filter_len(&self) -> u64 {
        u64::from(self.footer.filter_len) + TAG_BYTES as u64
    }

    /// Loads the filter if it fits `budget`, which it then reduces. Without filter, or if it cannot
    /// be read, lookups read a block instead.
    pub(super) fn load_filter(&mut self, store: &dyn ObjectStore, budget: &mut usize) {
        let len = self.filter_len() as usize;
        if len > *budget {
            return;
        }
        let mut sealed = vec![0; len];
        if store.read_at(&self.name, self.filter_offset(), &mut sealed).is_err() {
            return;
        }
        let Some(plain) = self.cipher.open_part(FILTER_ORDINAL, b"filter", &mut sealed) else {
            return;
        };
        let len = plain.len();
        sealed.truncate(len);
        self.filter = Filter::from_bytes(sealed);
        *budget -= len;
    }

    /// Verifies the filter, which lookups do without when it is damaged.
    ///
    /// # Errors
    /// `Corrupt` when it is not what was stored.
    pub(crate) fn verify_filter(&self, store: &dyn ObjectStore) -> Result<()> {
        let mut sealed = vec![0; self.filter_len() as usize];
        store.read_at(&self.name, self.filter_offset(), &mut sealed)?;
        match self.cipher.open_part(FILTER_ORDINAL, b"filter", &mut sealed) {
            Some(_) => Ok(()),
            None => Err(Error::corrupt(&self.name, "its filter was changed")),
        }
    }

    /// Where `id` lies, if this segment knows.
    pub(super) fn get(
        &self,
        store: &dyn ObjectStore,
        id: &BlobId,
        block: &mut Vec<u8>,
    ) -> Option<Location> {
        let key = prefix(id);
        let first = prefix_fence(&key);
        if self.filter.as_ref().is_some_and(|filter| !filter.may_contain(id)) {
            return None;
        }
        // The block before the first fence above the key; and should 64 bits be equal across a
        // block's end, the ones after it.
        let fences = &self.footer.fences;
        let mut at = fences.partition_point(|fence| *fence < first).saturating_sub(1);
        while at < fences.len() && fences[at] <= first {
            let records = self.read_block(store, at, block).ok()?;
            if let Some(location) = find(records, &key) {
                return Some(location);
            }
            at += 1;
        }
        None
    }

    /// The plain records of block `at`.
    fn read_block<'a>(
        &self,
        store: &dyn ObjectStore,
        at: usize,
        block: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        block.resize(BLOCK_BYTES, 0);
        store.read_at(&self.name, (HEADER_BYTES + at * BLOCK_BYTES) as u64, block)?;
        let plain = self
            .cipher
            .open_part(at as u32, b"records", block)
            .ok_or_else(|| Error::corrupt(&self.name, format!("its block {at} was changed")))?;
        let left = self.footer.records as usize - at * BLOCK_RECORDS;
        Ok(&plain[..left.min(BLOCK_RECORDS) * RECORD_BYTES])
    }

    /// Calls `each` for every record, in order.
    ///
    /// # Errors
    /// When a block cannot be read, and those of `each`.
    pub fn for_each(
        &self,
        store: &dyn ObjectStore,
        each: &mut dyn FnMut(Record) -> Result<()>,
    ) -> Result<()> {
        let mut block = Vec::new();
        for at in 0..self.footer.fences.len() {
            for record in self.read_block(store, at, &mut block)?.chunks_exact(RECORD_BYTES) {
                let record = Record::decode(record);
                each(record.map_err(|error| Error::corrupt(&self.name, error))?)?;
            }
        }
        Ok(())
    }
}

/// Binary search in the plain records of a block.
fn find(records: &[u8], key: &Prefix) -> Option<Location> {
    let record = |at: usize| &records[at * RECORD_BYTES..][..RECORD_BYTES];
    let (mut low, mut high) = (0, records.len() / RECORD_BYTES);
    while low < high {
        let middle = usize::midpoint(low, high);
        match record(middle)[..16].cmp(key) {
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
            Ordering::Equal => {
                return Record::decode(record(middle)).ok().map(|record| record.location);
            }
        }
    }
    None
}

/// Reads a segment's records in order, a block at a time.
struct Stream<'a> {
    segment: &'a Segment,
    next_block: usize,
    records: std::vec::IntoIter<Record>,
}

impl Stream<'_> {
    fn next(&mut self, store: &dyn ObjectStore, block: &mut Vec<u8>) -> Result<Option<Record>> {
        loop {
            if let Some(record) = self.records.next() {
                return Ok(Some(record));
            }
            if self.next_block == self.segment.footer.fences.len() {
                return Ok(None);
            }
            let plain = self.segment.read_block(store, self.next_block, block)?;
            self.records = plain
                .chunks_exact(RECORD_BYTES)
                .map(Record::decode)
                .collect::<DecodeResult<Vec<_>>>()
                .map_err(|error| Error::corrupt(&self.segment.name, error))?
                .into_iter();
            self.next_block += 1;
        }
    }
}

/// Writes new segments that hold every record of `segments` for which `keep` says so (each different
/// record once), and which supersede them. Memory: one block a segment and one new segment.
///
/// # Errors
/// When a segment cannot be read or a new one not be stored; the old ones are untouched.
pub fn merge(
    store: &dyn ObjectStore,
    keys: &Keyring,
    segments: &[&Segment],
    keep: &dyn Fn(&Record) -> bool,
) -> Result<Vec<SegmentId>> {
    let mut streams: Vec<_> = segments
        .iter()
        .map(|segment| Stream { segment, next_block: 0, records: Vec::new().into_iter() })
        .collect();
    let mut block = Vec::new();
    let mut heap = BinaryHeap::new();
    for (at, stream) in streams.iter_mut().enumerate() {
        heap.extend(stream.next(store, &mut block)?.map(|record| Reverse((record, at))));
    }
    let total: u64 = segments.iter().map(|segment| segment.len()).sum();
    let expected = (total as usize).min(SEGMENT_RECORDS_MAX);
    let supersedes: Vec<_> = segments.iter().map(|segment| segment.id).collect();
    let mut written = Vec::new();
    let mut last = None;
    let mut writer = SegmentWriter::new(keys, expected, supersedes.clone());
    // All new segments carry the whole list, and it takes effect when the caller deletes the old
    // ones after the last new one is stored; a reader in between sees every record at least once
    // only if a superseded segment stays valid until all are there. Hence the list goes into the
    // last one alone when there are several.
    while let Some(Reverse((record, at))) = heap.pop() {
        heap.extend(streams[at].next(store, &mut block)?.map(|record| Reverse((record, at))));
        if last == Some(record) || !keep(&record) {
            continue;
        }
        last = Some(record);
        if writer.footer.records as usize == SEGMENT_RECORDS_MAX {
            let next = SegmentWriter::new(keys, expected, supersedes.clone());
            let mut full = std::mem::replace(&mut writer, next);
            full.footer.supersedes.clear();
            written.extend(full.finish(store)?);
        }
        writer.push(&record);
    }
    written.extend(writer.finish(store)?);
    Ok(written)
}
