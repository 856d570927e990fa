//! Encoding of tree nodes: leaves of entries, interior nodes of references to children.
//!
//! Keys are front-coded. Blobs stand once in a table at the front of a leaf, packs once in a table
//! before that, so that many small files in one bundle, or a long run of chunks in one pack, cost a
//! byte or two each. Both tables are local to the node, so that a node can be shared by any number of
//! snapshots.

use std::collections::{BTreeMap, HashMap};

use super::entry::{
    Absence, BlobRef, Body, Chunk, Content, End, Entry, Kind, Node, State, Timestamp, Xattrs,
};
use crate::id::{BlobId, PackId};
use crate::limits::{KEY_BYTES_MAX, PACK_BLOBS_MAX, TREE_LEVELS_MAX, XATTR_BYTES_MAX};
use crate::pack::Location;
use crate::wire::{DecodeError, DecodeResult, Decoder, put_bytes, put_signed, put_varint};

/// A reference to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct NodeRef {
    /// Name of the node's blob.
    pub id: BlobId,
    /// The meta pack it lies in.
    pub pack: PackId,
    /// Its place there.
    pub ordinal: u8,
}

impl NodeRef {
    /// Where the node lies.
    pub fn location(&self) -> Location {
        Location { pack: self.pack, ordinal: self.ordinal }
    }
}

/// Which blobs of a pack are used: bit n stands for ordinal n.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackUse {
    /// The pack.
    pub pack: PackId,
    /// Its used blobs.
    pub blobs: u128,
}

/// Used blobs by pack.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Liveness(pub BTreeMap<PackId, u128>);

impl Liveness {
    /// Marks the blob at `location` used.
    pub fn mark(&mut self, location: Location) {
        *self.0.entry(location.pack).or_default() |= 1 << location.ordinal;
    }

    /// Whether the blob at `location` is marked.
    pub fn contains(&self, location: Location) -> bool {
        self.0.get(&location.pack).is_some_and(|blobs| blobs >> location.ordinal & 1 == 1)
    }

    /// Marks everything used that `other` does.
    pub fn union(&mut self, other: &Self) {
        other.0.iter().for_each(|(pack, blobs)| *self.0.entry(*pack).or_default() |= blobs);
    }
}

/// A decoded leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// Entries in ascending order of keys.
    pub entries: Vec<Entry>,
    /// Packs its entries refer to.
    pub packs: Vec<PackId>,
}

/// A child of an interior node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildRef {
    /// Key of the first entry below it.
    pub first_key: Vec<u8>,
    /// The child.
    pub node: NodeRef,
    /// Entries below it.
    pub entries: u64,
    /// Bytes of the files below it.
    pub bytes: u64,
}

/// A decoded interior node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interior {
    /// 1 if its children are leaves, and one more for each level above.
    pub level: u8,
    /// Children in ascending order of keys.
    pub children: Vec<ChildRef>,
    /// On level 1, the data blobs used by the leaves; empty above.
    pub liveness: Liveness,
}

const TAG_EXTENT: u8 = 7;
const TAG_END: u8 = 7 | 1 << 3;
const TAG_ABSENT: u8 = 7 | 2 << 3;
const TAG_SAME_OWNER: u8 = 1 << 3;
const TAG_XATTRS: u8 = 1 << 4;
const TAG_LINKED: u8 = 1 << 5;
const TAG_STATE: u8 = 1 << 6;

const CONTENT_NONE: u8 = 0;
const CONTENT_INLINE: u8 = 1;
const CONTENT_PART: u8 = 2;
const CONTENT_CHUNKS: u8 = 3;
const CONTENT_EXTENTS: u8 = 4;

/// Collects the entries of one leaf and encodes it.
#[derive(Default)]
pub(super) struct LeafEncoder {
    entries: Vec<u8>,
    count: usize,
    blobs: Vec<u8>,
    blob_numbers: HashMap<BlobId, u32>,
    last_blob: Option<(BlobId, u32)>,
    packs: Vec<PackId>,
    pack_numbers: HashMap<PackId, u32>,
    state: Previous,
    pub(super) liveness: Liveness,
    pub(super) bytes: u64,
    pub(super) first_key: Vec<u8>,
}

/// What the fields of an entry are encoded relative to.
#[derive(Default)]
struct Previous {
    key: Vec<u8>,
    owner: (u32, u32, u32),
    mtime: i64,
    ino: u64,
    blob: u32,
    part_end: u64,
}

impl LeafEncoder {
    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn encoded_len(&self) -> usize {
        self.entries.len() + self.blobs.len() + self.packs.len() * PackId::LEN
    }

    pub(super) fn push(&mut self, entry: &Entry) {
        if self.count == 0 {
            self.first_key.clone_from(&entry.key);
        }
        self.count += 1;
        let shared = self.state.key.iter().zip(&entry.key).take_while(|(a, b)| a == b).count();
        put_varint(&mut self.entries, shared as u64);
        put_bytes(&mut self.entries, &entry.key[shared..]);
        self.state.key.clone_from(&entry.key);
        match &entry.body {
            Body::Node(node) => self.push_node(node),
            Body::Extent(chunks) => {
                self.entries.push(TAG_EXTENT);
                self.push_chunks(chunks);
            }
            Body::End(end) => {
                self.entries.extend_from_slice(&[TAG_END, end.state as u8]);
                put_varint(&mut self.entries, end.size);
            }
            Body::Absent(why) => self.entries.extend_from_slice(&[TAG_ABSENT, *why as u8]),
        }
    }

    fn push_node(&mut self, node: &Node) {
        let owner = (node.mode, node.uid, node.gid);
        let mut tag = node.kind as u8;
        let flag = |on: bool, bit: u8| if on { bit } else { 0 };
        tag |= flag(owner == self.state.owner, TAG_SAME_OWNER);
        tag |= flag(!node.xattrs.is_empty(), TAG_XATTRS);
        tag |= flag(node.linked, TAG_LINKED);
        tag |= flag(node.state != State::Whole, TAG_STATE);
        self.entries.push(tag);
        if node.state != State::Whole {
            self.entries.push(node.state as u8);
        }
        if owner != self.state.owner {
            put_varint(&mut self.entries, u64::from(node.mode));
            put_varint(&mut self.entries, u64::from(node.uid));
            put_varint(&mut self.entries, u64::from(node.gid));
            self.state.owner = owner;
        }
        put_signed(&mut self.entries, node.mtime.seconds.wrapping_sub(self.state.mtime));
        put_varint(&mut self.entries, u64::from(node.mtime.nanos));
        self.state.mtime = node.mtime.seconds;
        put_signed(&mut self.entries, node.ctime.seconds.wrapping_sub(node.mtime.seconds));
        put_varint(&mut self.entries, u64::from(node.ctime.nanos));
        put_signed(&mut self.entries, node.ino.wrapping_sub(self.state.ino) as i64);
        self.state.ino = node.ino;
        put_varint(&mut self.entries, u64::from(node.fs));
        if matches!(node.kind, Kind::CharDevice | Kind::BlockDevice) {
            put_varint(&mut self.entries, u64::from(node.rdev.0));
            put_varint(&mut self.entries, u64::from(node.rdev.1));
        }
        if !node.xattrs.is_empty() {
            put_varint(&mut self.entries, node.xattrs.len() as u64);
            for (name, value) in &node.xattrs {
                put_bytes(&mut self.entries, name);
                put_bytes(&mut self.entries, value);
            }
        }
        if matches!(node.kind, Kind::File | Kind::Symlink) {
            put_varint(&mut self.entries, node.size);
            self.push_content(node);
        }
        if node.kind == Kind::File {
            self.bytes = self.bytes.saturating_add(node.size);
        }
    }

    fn push_content(&mut self, node: &Node) {
        match &node.content {
            Content::None => self.entries.push(CONTENT_NONE),
            Content::Inline(bytes) => {
                self.entries.push(CONTENT_INLINE);
                put_bytes(&mut self.entries, bytes);
            }
            Content::Part { bundle, offset, hash } => {
                self.entries.push(CONTENT_PART);
                self.entries.extend_from_slice(hash);
                self.push_blob(bundle);
                let offset = u64::from(*offset);
                put_signed(&mut self.entries, offset.wrapping_sub(self.state.part_end) as i64);
                self.state.part_end = offset + node.size;
            }
            Content::Chunks(chunks) => {
                self.entries.push(CONTENT_CHUNKS);
                self.push_chunks(chunks);
            }
            Content::Extents => self.entries.push(CONTENT_EXTENTS),
        }
    }

    fn push_chunks(&mut self, chunks: &[Chunk]) {
        put_varint(&mut self.entries, chunks.len() as u64);
        let mut end = 0;
        for chunk in chunks {
            put_varint(&mut self.entries, chunk.offset - end);
            self.push_blob(&chunk.blob);
            end = chunk.end();
        }
    }

    fn push_blob(&mut self, blob: &BlobRef) {
        let number = self.blob_number(blob);
        put_signed(&mut self.entries, i64::from(number) - i64::from(self.state.blob));
        self.state.blob = number;
    }

    fn blob_number(&mut self, blob: &BlobRef) -> u32 {
        if let Some((last, number)) = self.last_blob
            && last == blob.id
        {
            return number;
        }
        let next = self.blob_numbers.len() as u32;
        let number = *self.blob_numbers.entry(blob.id).or_insert(next);
        if number == next {
            let packs = self.packs.len() as u32;
            let pack = *self.pack_numbers.entry(blob.location.pack).or_insert(packs);
            if pack == packs {
                self.packs.push(blob.location.pack);
            }
            self.blobs.extend_from_slice(&blob.id.0);
            put_varint(&mut self.blobs, u64::from(pack));
            self.blobs.push(blob.location.ordinal);
            put_varint(&mut self.blobs, u64::from(blob.len));
            self.liveness.mark(blob.location);
        }
        self.last_blob = Some((blob.id, number));
        number
    }

    /// The encoded leaf.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.encoded_len() + 16);
        put_varint(&mut out, self.packs.len() as u64);
        self.packs.iter().for_each(|pack| out.extend_from_slice(&pack.0));
        put_varint(&mut out, self.blob_numbers.len() as u64);
        out.extend_from_slice(&self.blobs);
        put_varint(&mut out, self.count as u64);
        out.extend_from_slice(&self.entries);
        out
    }
}

/// Decodes a leaf.
///
/// # Errors
/// When the bytes are not a leaf whose every field is within its bounds.
pub fn decode_leaf(bytes: &[u8]) -> DecodeResult<Leaf> {
    let mut decoder = Decoder::new(bytes);
    let packs = decode_packs(&mut decoder)?;
    let count = decoder.count(BlobId::LEN + 3)?;
    let mut blobs = Vec::with_capacity(count);
    for _ in 0..count {
        let id = BlobId(decoder.array()?);
        let location = decode_location(&mut decoder, &packs)?;
        blobs.push(BlobRef { id, location, len: decoder.varint_u32()? });
    }
    let count = decoder.count(3)?;
    let mut entries = Vec::with_capacity(count);
    let mut reader = LeafReader { decoder, blobs, state: Previous::default() };
    for at in 0..count {
        let entry = reader.entry()?;
        if at > 0 && entry.key <= entries.last().map_or(vec![], |last: &Entry| last.key.clone()) {
            return Err(DecodeError("its entries are not in order"));
        }
        entries.push(entry);
    }
    reader.decoder.finish()?;
    Ok(Leaf { entries, packs })
}

fn decode_packs(decoder: &mut Decoder<'_>) -> DecodeResult<Vec<PackId>> {
    let count = decoder.count(PackId::LEN)?;
    (0..count).map(|_| decoder.array().map(PackId)).collect()
}

fn decode_location(decoder: &mut Decoder<'_>, packs: &[PackId]) -> DecodeResult<Location> {
    let pack = decoder.varint_u32()? as usize;
    let pack = *packs.get(pack).ok_or(DecodeError("a reference names no pack"))?;
    let ordinal = decoder.u8()?;
    if usize::from(ordinal) >= PACK_BLOBS_MAX {
        return Err(DecodeError("a reference names an impossible place"));
    }
    Ok(Location { pack, ordinal })
}

struct LeafReader<'a> {
    decoder: Decoder<'a>,
    blobs: Vec<BlobRef>,
    state: Previous,
}

impl LeafReader<'_> {
    fn entry(&mut self) -> DecodeResult<Entry> {
        let shared = self.decoder.varint()? as usize;
        let suffix = self.decoder.bytes()?;
        if shared > self.state.key.len() || shared + suffix.len() > KEY_BYTES_MAX {
            return Err(DecodeError("a key is impossible"));
        }
        self.state.key.truncate(shared);
        self.state.key.extend_from_slice(suffix);
        let tag = self.decoder.u8()?;
        let body = match tag {
            TAG_EXTENT => Body::Extent(self.chunks()?),
            TAG_END => Body::End(self.end()?),
            TAG_ABSENT => Body::Absent(
                Absence::from_byte(self.decoder.u8()?)
                    .ok_or(DecodeError("a name is absent for an unknown reason"))?,
            ),
            _ => Body::Node(self.node(tag)?),
        };
        Ok(Entry { key: self.state.key.clone(), body })
    }

    fn end(&mut self) -> DecodeResult<End> {
        let state = self.state(Kind::File)?;
        Ok(End { state, size: self.decoder.varint()? })
    }

    /// A state that is worth telling, of an entry of this kind.
    fn state(&mut self, kind: Kind) -> DecodeResult<State> {
        let state = State::from_byte(self.decoder.u8()?);
        let state = state.filter(|state| *state != State::Whole && state.suits(kind));
        state.ok_or(DecodeError("the state of an entry is impossible"))
    }

    fn node(&mut self, tag: u8) -> DecodeResult<Node> {
        let kind = Kind::from_byte(tag & 7).filter(|_| tag & 0x80 == 0);
        let kind = kind.ok_or(DecodeError("an entry is of an unknown kind"))?;
        let state = if tag & TAG_STATE == 0 { State::Whole } else { self.state(kind)? };
        let decoder = &mut self.decoder;
        if tag & TAG_SAME_OWNER == 0 {
            let owner = (decoder.varint_u32()?, decoder.varint_u32()?, decoder.varint_u32()?);
            if owner.0 > 0o7777 {
                return Err(DecodeError("permission bits are impossible"));
            }
            self.state.owner = owner;
        }
        let (mode, uid, gid) = self.state.owner;
        let mtime_seconds = self.state.mtime.wrapping_add(decoder.signed()?);
        self.state.mtime = mtime_seconds;
        let mtime = timestamp(mtime_seconds, decoder)?;
        let ctime_seconds = mtime_seconds.wrapping_add(decoder.signed()?);
        let ctime = timestamp(ctime_seconds, decoder)?;
        let ino = self.state.ino.wrapping_add(decoder.signed()? as u64);
        self.state.ino = ino;
        let fs = decoder.varint_u32()?;
        let rdev = match kind {
            Kind::CharDevice | Kind::BlockDevice => (decoder.varint_u32()?, decoder.varint_u32()?),
            _ => (0, 0),
        };
        let xattrs = if tag & TAG_XATTRS == 0 { Vec::new() } else { xattrs(decoder)? };
        let (size, content) = match kind {
            Kind::File | Kind::Symlink => {
                let size = self.decoder.varint()?;
                (size, self.content(kind, size)?)
            }
            _ => (0, Content::None),
        };
        let linked = tag & TAG_LINKED != 0;
        Ok(Node {
            kind,
            mode,
            uid,
            gid,
            size,
            mtime,
            ctime,
            ino,
            fs,
            linked,
            rdev,
            xattrs,
            state,
            content,
        })
    }

    fn content(&mut self, kind: Kind, size: u64) -> DecodeResult<Content> {
        let content = match self.decoder.u8()? {
            CONTENT_NONE => Content::None,
            CONTENT_INLINE => {
                let bytes = self.decoder.bytes()?;
                if bytes.len() as u64 != size {
                    return Err(DecodeError("inline content has another length than the file"));
                }
                Content::Inline(bytes.to_vec())
            }
            CONTENT_PART => {
                let hash = self.decoder.array()?;
                let bundle = self.blob()?;
                let offset = self.state.part_end.wrapping_add(self.decoder.signed()? as u64);
                let end = offset.checked_add(size).filter(|end| *end <= u64::from(bundle.len));
                self.state.part_end = end.ok_or(DecodeError("a file exceeds its bundle"))?;
                Content::Part { bundle, offset: offset as u32, hash }
            }
            CONTENT_CHUNKS => {
                let chunks = self.chunks()?;
                if chunks.last().is_none_or(|chunk| chunk.end() > size) {
                    return Err(DecodeError("chunks exceed their file"));
                }
                Content::Chunks(chunks)
            }
            CONTENT_EXTENTS => Content::Extents,
            _ => return Err(DecodeError("content is of an unknown form")),
        };
        if kind == Kind::Symlink && !matches!(content, Content::Inline(_)) {
            return Err(DecodeError("a link has no target"));
        }
        Ok(content)
    }

    fn chunks(&mut self) -> DecodeResult<Vec<Chunk>> {
        let count = self.decoder.count(2)?;
        let mut chunks = Vec::with_capacity(count);
        let mut end = 0_u64;
        for _ in 0..count {
            let gap = self.decoder.varint()?;
            let blob = self.blob()?;
            let offset = end.checked_add(gap).ok_or(DecodeError("an offset is impossible"))?;
            end = offset
                .checked_add(u64::from(blob.len))
                .ok_or(DecodeError("an offset is impossible"))?;
            chunks.push(Chunk { offset, blob });
        }
        Ok(chunks)
    }

    fn blob(&mut self) -> DecodeResult<BlobRef> {
        let number = i64::from(self.state.blob).checked_add(self.decoder.signed()?);
        let number = number.and_then(|number| u32::try_from(number).ok());
        let blob = number.and_then(|number| self.blobs.get(number as usize));
        self.state.blob = number.unwrap_or_default();
        blob.copied().ok_or(DecodeError("a reference names no blob"))
    }
}

fn timestamp(seconds: i64, decoder: &mut Decoder<'_>) -> DecodeResult<Timestamp> {
    let nanos = decoder.varint_u32()?;
    if nanos >= 1_000_000_000 {
        return Err(DecodeError("a time is impossible"));
    }
    Ok(Timestamp { seconds, nanos })
}

fn xattrs(decoder: &mut Decoder<'_>) -> DecodeResult<Xattrs> {
    let count = decoder.count(2)?;
    let mut xattrs = Vec::with_capacity(count);
    let mut bytes = 0;
    for _ in 0..count {
        let (name, value) = (decoder.bytes()?.to_vec(), decoder.bytes()?.to_vec());
        bytes += name.len() + value.len();
        xattrs.push((name, value));
    }
    if count == 0 || bytes > XATTR_BYTES_MAX {
        return Err(DecodeError("extended attributes are impossible"));
    }
    Ok(xattrs)
}

impl Interior {
    /// The encoded node.
    pub fn encode(&self) -> Vec<u8> {
        let mut packs = Vec::new();
        let mut numbers = HashMap::new();
        for child in &self.children {
            numbers.entry(child.node.pack).or_insert_with(|| {
                packs.push(child.node.pack);
                packs.len() as u64 - 1
            });
        }
        let mut out = vec![self.level];
        put_varint(&mut out, packs.len() as u64);
        packs.iter().for_each(|pack| out.extend_from_slice(&pack.0));
        put_varint(&mut out, self.children.len() as u64);
        let mut previous: &[u8] = &[];
        for child in &self.children {
            let shared = previous.iter().zip(&child.first_key).take_while(|(a, b)| a == b).count();
            put_varint(&mut out, shared as u64);
            put_bytes(&mut out, &child.first_key[shared..]);
            out.extend_from_slice(&child.node.id.0);
            put_varint(&mut out, numbers[&child.node.pack]);
            out.push(child.node.ordinal);
            put_varint(&mut out, child.entries);
            put_varint(&mut out, child.bytes);
            previous = &child.first_key;
        }
        put_varint(&mut out, self.liveness.0.len() as u64);
        for (pack, blobs) in &self.liveness.0 {
            out.extend_from_slice(&pack.0);
            out.extend_from_slice(&blobs.to_le_bytes());
        }
        out
    }
}

/// Decodes an interior node.
///
/// # Errors
/// When the bytes are not an interior node whose every field is within its bounds.
pub fn decode_interior(bytes: &[u8]) -> DecodeResult<Interior> {
    let mut decoder = Decoder::new(bytes);
    let level = decoder.u8()?;
    if level == 0 || level > TREE_LEVELS_MAX {
        return Err(DecodeError("its level is impossible"));
    }
    let packs = decode_packs(&mut decoder)?;
    let count = decoder.count(BlobId::LEN + 6)?;
    let mut children: Vec<ChildRef> = Vec::with_capacity(count);
    for _ in 0..count {
        let previous: &[u8] = children.last().map_or(&[], |child| &child.first_key);
        let shared = decoder.varint()? as usize;
        let suffix = decoder.bytes()?;
        if shared > previous.len() || shared + suffix.len() > KEY_BYTES_MAX {
            return Err(DecodeError("a key is impossible"));
        }
        let first_key = [&previous[..shared], suffix].concat();
        if !children.is_empty() && first_key[..] <= *previous {
            return Err(DecodeError("its children are not in order"));
        }
        let id = BlobId(decoder.array()?);
        let Location { pack, ordinal } = decode_location(&mut decoder, &packs)?;
        let (entries, bytes) = (decoder.varint()?, decoder.varint()?);
        children.push(ChildRef { first_key, node: NodeRef { id, pack, ordinal }, entries, bytes });
    }
    if children.is_empty() {
        return Err(DecodeError("it has no children"));
    }
    let mut liveness = Liveness::default();
    for _ in 0..decoder.count(32)? {
        let pack = PackId(decoder.array()?);
        let blobs = u128::from_le_bytes(decoder.array()?);
        if blobs == 0 || liveness.0.last_key_value().is_some_and(|(last, _)| *last >= pack) {
            return Err(DecodeError("its list of packs is not in order"));
        }
        liveness.0.insert(pack, blobs);
    }
    decoder.finish()?;
    Ok(Interior { level, children, liveness })
}
