//! What stands before the content of a member of a tar archive, in the form that GNU tar and libarchive
//! (bsdtar) both unpack to what was saved.
//!
//! - The header is POSIX's (ustar); what does not fit into it stands in pax records before it: sizes, ids
//!   and times out of range, fractions of seconds.
//! - Long paths and link targets are GNU's `L` and `K` members: raw bytes, where a pax record would have to
//!   be UTF-8 and is converted to the locale by some programs.
//! - Sparse files are GNU's format 1.0 in pax records: a map before the content, which then holds the pieces
//!   alone.
//! - Extended attributes are `SCHILY.xattr.` records. GNU tar takes `%3D` in a name for `=`, with which a
//!   record's key ends, and so `%25` for `%`. libarchive does not: it finds such names in `LIBARCHIVE.xattr.`
//!   records (and sets the encoded name as well, which nothing can prevent).
//! - ACLs are `SCHILY.acl.` records with numbers, as neither program sets them from attributes.
//! - libarchive (3.6) refuses more than [`LIBARCHIVE_RECORDS_BYTES_MAX`] of records before a member.

use std::fmt::Write;

use chunkstore::tree::{Kind, Node};

/// Everything is padded to a multiple of this.
const BLOCK: usize = 512;

/// What ends an archive.
pub(super) const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// Bytes of records before one member that libarchive reads.
pub(super) const LIBARCHIVE_RECORDS_BYTES_MAX: usize = 1 << 20;

/// Pieces in the map of a sparse file, at most: some 1 MiB.
const PIECES_MAX: usize = 1 << 16;

/// Longest path or link target in a header.
const NAME_BYTES: usize = 100;

/// What is said about a member.
pub(super) struct Member<'a> {
    /// Its path in the archive.
    pub(super) path: &'a [u8],
    /// What the snapshot says about it.
    pub(super) node: &'a Node,
    /// Bytes of its content, if it is a file.
    pub(super) size: u64,
    /// Path of the member that is the same file under another name.
    pub(super) linked_to: Option<&'a [u8]>,
    /// Target, if it is a symbolic link.
    pub(super) target: &'a [u8],
    /// Where content is, if it is a file with holes.
    pub(super) map: Option<&'a Map>,
    /// A remark for whoever looks into the archive.
    pub(super) comment: Option<&'a str>,
}

/// What precedes the content of a member.
pub(super) struct Head {
    /// The bytes.
    pub(super) bytes: Vec<u8>,
    /// How many of them are the records of one header.
    pub(super) records_bytes: usize,
}

impl Member<'_> {
    /// The bytes to write before the content; `None` for what has no place in an archive: a socket is
    /// nothing without the program that listens.
    pub(super) fn head(&self) -> Option<Head> {
        let node = self.node;
        let (kind, link) = match (self.linked_to, node.kind) {
            (_, Kind::Socket) => return None,
            (Some(path), _) => (b'1', path),
            (None, Kind::File) => (b'0', &b""[..]),
            (None, Kind::Dir) => (b'5', &b""[..]),
            (None, Kind::Symlink) => (b'2', self.target),
            (None, Kind::CharDevice) => (b'3', &b""[..]),
            (None, Kind::BlockDevice) => (b'4', &b""[..]),
            (None, Kind::Fifo) => (b'6', &b""[..]),
        };
        let stored = match (kind, self.map) {
            (b'0', Some(map)) => map.text().len() as u64 + map.bytes(),
            (b'0', None) => self.size,
            _ => 0,
        };
        let mut out = Vec::new();
        for (letter, name) in [(b'L', self.path), (b'K', link)] {
            if name.len() > NAME_BYTES {
                let fields = Fields { size: name.len() as u64 + 1, ..Fields::default() };
                out.extend_from_slice(&fields.header(letter, b"././@LongLink", b""));
                out.extend_from_slice(name);
                out.push(0);
                pad(&mut out);
            }
        }
        let records = self.records(stored);
        let records_bytes = records.len();
        if !records.is_empty() {
            let fields = Fields { size: records.len() as u64, ..Fields::default() };
            out.extend_from_slice(&fields.header(b'x', b"././@PaxHeader", b""));
            out.extend_from_slice(&records);
            pad(&mut out);
        }
        let fields = Fields {
            mode: node.mode,
            uid: node.uid,
            gid: node.gid,
            size: stored,
            mtime: u64::try_from(node.mtime.seconds).unwrap_or(0),
            device: if matches!(node.kind, Kind::CharDevice | Kind::BlockDevice) {
                node.rdev
            } else {
                (0, 0)
            },
        };
        out.extend_from_slice(&fields.header(kind, self.path, link));
        if let (b'0', Some(map)) = (kind, self.map) {
            out.extend_from_slice(map.text().as_bytes());
        }
        Some(Head { bytes: out, records_bytes })
    }

    fn records(&self, stored: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let node = self.node;
        if node.mtime.nanos != 0 || !(0..=OCTAL_11_MAX as i64).contains(&node.mtime.seconds) {
            record(&mut out, b"mtime", time(node).as_bytes());
        }
        for (name, id) in [("uid", node.uid), ("gid", node.gid)] {
            if u64::from(id) > OCTAL_7_MAX {
                record(&mut out, name.as_bytes(), id.to_string().as_bytes());
            }
        }
        if stored > OCTAL_11_MAX {
            record(&mut out, b"size", stored.to_string().as_bytes());
        }
        if let Some(comment) = self.comment {
            record(&mut out, b"comment", comment.as_bytes());
        }
        if self.linked_to.is_some() {
            return out;
        }
        if self.map.is_some() {
            record(&mut out, b"GNU.sparse.major", b"1");
            record(&mut out, b"GNU.sparse.minor", b"0");
            record(&mut out, b"GNU.sparse.realsize", self.size.to_string().as_bytes());
        }
        for (name, value) in &node.xattrs {
            attribute(&mut out, name, value);
        }
        out
    }
}

/// Largest numbers in the fields of a header.
const OCTAL_7_MAX: u64 = (1 << 21) - 1;
const OCTAL_11_MAX: u64 = (1 << 33) - 1;

/// The numbers of a header.
#[derive(Default)]
struct Fields {
    mode: u32,
    uid: u32,
    gid: u32,
    size: u64,
    mtime: u64,
    device: (u32, u32),
}

impl Fields {
    fn header(&self, kind: u8, name: &[u8], link: &[u8]) -> [u8; BLOCK] {
        let mut header = [0; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| {
            header[at..at + bytes.len()].copy_from_slice(bytes);
        };
        // What does not fit stands in a record.
        let octal = |value: u64, digits: usize| {
            let most = (1 << (3 * digits)) - 1;
            format!("{:0digits$o}", value.min(most))
        };
        put(0, &name[..name.len().min(NAME_BYTES)]);
        put(100, octal(self.mode.into(), 7).as_bytes());
        put(108, octal(self.uid.into(), 7).as_bytes());
        put(116, octal(self.gid.into(), 7).as_bytes());
        put(124, octal(self.size, 11).as_bytes());
        put(136, octal(self.mtime, 11).as_bytes());
        put(148, b"        ");
        put(156, &[kind]);
        put(157, &link[..link.len().min(NAME_BYTES)]);
        put(257, b"ustar\x0000");
        put(329, octal(self.device.0.into(), 7).as_bytes());
        put(337, octal(self.device.1.into(), 7).as_bytes());
        let sum: u64 = header.iter().copied().map(u64::from).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        header
    }
}

/// Fills up with zeros to the next multiple of [`BLOCK`].
fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(BLOCK), 0);
}

/// The zeros behind content of this length.
pub(super) fn padding(bytes: u64) -> &'static [u8] {
    let missing = bytes.next_multiple_of(BLOCK as u64) - bytes;
    &[0; BLOCK][..missing as usize]
}

/// Adds a pax record: its whole length in decimal, key and value.
fn record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    // A space, '=' and a line end.
    let rest = key.len() + value.len() + 3;
    let digits = |number: usize| number.to_string().len();
    let mut len = rest + digits(rest);
    len = rest + digits(len);
    out.extend_from_slice(format!("{len} ").as_bytes());
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn attribute(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    let acl = match name {
        b"system.posix_acl_access" => Some(("SCHILY.acl.access", acl_text(value))),
        b"system.posix_acl_default" => Some(("SCHILY.acl.default", acl_text(value))),
        _ => None,
    };
    if let Some((key, Some(text))) = acl {
        return record(out, key.as_bytes(), text.as_bytes());
    }
    let is_odd =
        name.contains(&b'=') || name.windows(3).any(|three| matches!(three, b"%3D" | b"%25"));
    if !is_odd {
        return record(out, &[b"SCHILY.xattr.", name].concat(), value);
    }
    let mut gnu = b"SCHILY.xattr.".to_vec();
    let mut libarchive = b"LIBARCHIVE.xattr.".to_vec();
    for byte in name {
        match byte {
            b'=' => gnu.extend_from_slice(b"%3D"),
            b'%' => gnu.extend_from_slice(b"%25"),
            byte => gnu.push(*byte),
        }
        match byte {
            b'=' | b'%' | 0x7f.. => libarchive.extend_from_slice(format!("%{byte:02X}").as_bytes()),
            byte => libarchive.push(*byte),
        }
    }
    record(out, &gnu, value);
    record(out, &libarchive, base64(value).as_bytes());
}

/// Base 64 without padding, as libarchive writes it.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let bits = three.iter().fold(0, |bits, byte| bits << 8 | u32::from(*byte));
        let bits = bits << (8 * (3 - three.len()));
        for digit in 0..=three.len() {
            let index = bits >> (18 - 6 * digit) & 63;
            text.push(char::from(DIGITS[index as usize]));
        }
    }
    text
}

/// An ACL as text, from the form that the kernel keeps it in; `None` if it is none.
fn acl_text(bytes: &[u8]) -> Option<String> {
    let (version, rest) = bytes.split_first_chunk()?;
    let (entries, []) = rest.as_chunks::<8>() else {
        return None;
    };
    if u32::from_le_bytes(*version) != 2 {
        return None;
    }
    let mut text = String::new();
    for [tag_low, tag_high, low, high, id @ ..] in entries {
        let tag = match u16::from_le_bytes([*tag_low, *tag_high]) {
            0x01 => "user:",
            0x02 => "user",
            0x04 => "group:",
            0x08 => "group",
            0x10 => "mask:",
            0x20 => "other:",
            _ => return None,
        };
        let bits = u16::from_le_bytes([*low, *high]);
        let letter = |bit, letter| if bits & bit != 0 { letter } else { '-' };
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(tag);
        if !tag.ends_with(':') {
            write!(text, ":{}", u32::from_le_bytes(*id)).ok()?;
        }
        write!(text, ":{}{}{}", letter(4, 'r'), letter(2, 'w'), letter(1, 'x')).ok()?;
    }
    Some(text)
}

/// The modification time as pax has it: seconds with a fraction, negative before 1970.
fn time(node: &Node) -> String {
    let nanos = i128::from(node.mtime.seconds) * 1_000_000_000 + i128::from(node.mtime.nanos);
    let sign = if nanos < 0 { "-" } else { "" };
    let nanos = nanos.unsigned_abs();
    let (whole, fraction) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
    if fraction == 0 { format!("{sign}{whole}") } else { format!("{sign}{whole}.{fraction:09}") }
}

/// Which parts of a file are content; the others are holes.
///
/// Memory: at most [`PIECES_MAX`] pieces. A file with more has its smallest holes written as zeros.
#[derive(Debug, Default)]
pub(super) struct Map {
    pieces: Vec<(u64, u64)>,
    /// Holes below this count as content.
    least_hole: u64,
}

impl Map {
    /// Adds content behind all that was added before.
    pub(super) fn add(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        self.join(offset, len);
        if self.pieces.len() >= PIECES_MAX {
            while self.pieces.len() > PIECES_MAX / 2 {
                self.least_hole = (2 * self.least_hole).max(4096);
                for (offset, len) in std::mem::take(&mut self.pieces) {
                    self.join(offset, len);
                }
            }
        }
    }

    fn join(&mut self, offset: u64, len: u64) {
        match self.pieces.last_mut() {
            Some((start, have))
                if offset.saturating_sub(start.saturating_add(*have)) <= self.least_hole =>
            {
                let end = offset.saturating_add(len);
                *have = (*have).max(end.saturating_sub(*start));
            }
            _ => self.pieces.push((offset, len)),
        }
    }

    /// The map of a file of `size` bytes; `None` if it has no holes. Content beyond is cut off.
    pub(super) fn of_size(mut self, size: u64) -> Option<Self> {
        self.pieces.retain_mut(|(offset, len)| {
            *len = (*len).min(size.saturating_sub(*offset));
            *len > 0
        });
        if self.bytes() == size {
            return None;
        }
        // Without it, a hole at the end would be lost.
        self.pieces.push((size, 0));
        Some(self)
    }

    /// The pieces of content: offsets and lengths.
    pub(super) fn pieces(&self) -> &[(u64, u64)] {
        &self.pieces
    }

    /// Bytes of all pieces.
    pub(super) fn bytes(&self) -> u64 {
        self.pieces.iter().map(|(_, len)| len).sum()
    }

    /// The map as it stands before the content.
    fn text(&self) -> String {
        let mut text = format!("{}\n", self.pieces.len());
        for (offset, len) in &self.pieces {
            text.push_str(&format!("{offset}\n{len}\n"));
        }
        let padded = text.len().next_multiple_of(BLOCK);
        text.extend(std::iter::repeat_n('\0', padded - text.len()));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_its_own_length() {
        for (value, expected) in
            [("v", "6 k=v\n"), ("1234", "9 k=1234\n"), ("12345", "11 k=12345\n")]
        {
            let mut out = Vec::new();
            record(&mut out, b"k", value.as_bytes());
            assert_eq!(String::from_utf8(out).unwrap(), expected);
        }
        for len in 0..2000 {
            let mut out = Vec::new();
            record(&mut out, b"key", &vec![b'x'; len]);
            let text = String::from_utf8(out).unwrap();
            let said = text.split(' ').next().unwrap();
            assert_eq!(said, text.len().to_string());
        }
    }

    #[test]
    fn bytes_become_base_64_without_padding() {
        for (bytes, text) in
            [("", ""), ("f", "Zg"), ("fo", "Zm8"), ("foo", "Zm9v"), ("foob", "Zm9vYg")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn a_map_knows_holes_and_stays_small() {
        let mut map = Map::default();
        map.add(0, 100);
        map.add(100, 100);
        map.add(8192, 10);
        let map = map.of_size(10_000).unwrap();
        assert_eq!(map.pieces(), [(0, 200), (8192, 10), (10_000, 0)]);
        let mut dense = Map::default();
        dense.add(0, 7);
        assert!(dense.of_size(7).is_none());
        assert_eq!(Map::default().of_size(5).unwrap().pieces(), [(5, 0)]);
        assert!(Map::default().of_size(0).is_none());
        let mut many = Map::default();
        for piece in 0..1_000_000 {
            many.add(piece * 8192, 1);
        }
        assert!(many.pieces().len() <= PIECES_MAX);
        assert_eq!(many.pieces().first(), Some(&(0, 999_999 * 8192 + 1)));
    }

    #[test]
    fn an_acl_is_told_by_numbers() {
        let mut bytes = 2_u32.to_le_bytes().to_vec();
        for (tag, bits, id) in [
            (1_u16, 6_u16, u32::MAX),
            (2, 7, 12),
            (4, 5, u32::MAX),
            (8, 4, 7),
            (16, 7, 0),
            (32, 0, 0),
        ] {
            bytes.extend_from_slice(&tag.to_le_bytes());
            bytes.extend_from_slice(&bits.to_le_bytes());
            bytes.extend_from_slice(&id.to_le_bytes());
        }
        let text = "user::rw-,user:12:rwx,group::r-x,group:7:r--,mask::rwx,other::---";
        assert_eq!(acl_text(&bytes).as_deref(), Some(text));
        for cut in 0..bytes.len() {
            if cut % 8 != 4 {
                assert_eq!(acl_text(&bytes[..cut]), None, "{cut}");
            }
        }
    }
}
