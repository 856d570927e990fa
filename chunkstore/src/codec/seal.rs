//! Sealing: authenticated encryption of everything in a repository.
//!
//! Every object begins with a 64-byte [`Header`] that holds a fresh random salt. Key and commitment
//! of the object are derived from the master key of its class and epoch, the header, the repository's
//! identity and the object's name (BLAKE3 in keyed mode, extended output):
//!
//! ```text
//! key ‖ commitment = BLAKE3-keyed(master[class, epoch], header[0..32] ‖ repository ‖ name)
//! ```
//!
//! So an object moved under another name, or into another repository, does not open; and since the
//! commitment is stored, no object opens under two keys (AES-GCM alone does not promise that; see
//! Albertini et al., "How to Abuse and Fix Authenticated Encryption Without Key Commitment", 2022).
//! Within an object the parts are sealed by AES-256-GCM with their ordinal as nonce: a key seals at
//! most one object, once, so no nonce repeats and the 2^32 limit of random nonces does not apply.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::error::{Error, ErrorKind, Result};
use crate::id::{RepositoryId, random_bytes};

/// Version of the format this program reads and writes.
pub const FORMAT_VERSION: u16 = 1;

/// First bytes of every object.
pub const MAGIC: [u8; 8] = *b"EBACKUP\n";

/// Bytes a sealed part is longer than its plaintext.
pub const TAG_BYTES: usize = 16;

/// Bytes of a [`Header`].
pub const HEADER_BYTES: usize = 64;

/// What an object is. The number is part of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ObjectKind {
    /// The repository's configuration.
    Config = 1,
    /// A pack of data blobs.
    DataPack = 2,
    /// A pack of tree nodes.
    MetaPack = 3,
    /// An index segment.
    Segment = 4,
    /// The verdict on a session: a snapshot, or the mark that the session was fenced.
    Snapshot = 5,
    /// The mark that a snapshot is forgotten.
    Forgotten = 6,
    /// The announcement of a writer's session.
    Session = 7,
    /// Packs a garbage collection is about to delete.
    Tombstones = 8,
    /// Where repacked blobs lie now.
    Relocations = 9,
}

impl ObjectKind {
    fn from_byte(byte: u8) -> Option<Self> {
        use ObjectKind::{
            Config, DataPack, Forgotten, MetaPack, Relocations, Segment, Session, Snapshot,
            Tombstones,
        };
        [Config, DataPack, MetaPack, Segment, Snapshot, Forgotten, Session, Tombstones, Relocations]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }

    fn class(self) -> usize {
        match self {
            Self::DataPack => 0,
            Self::MetaPack => 1,
            Self::Segment => 2,
            _ => 3,
        }
    }
}

/// Names of the key classes, as they enter the derivation.
const CLASSES: [&str; 4] = [
    "ebackup repository v1 data packs",
    "ebackup repository v1 meta packs",
    "ebackup repository v1 index segments",
    "ebackup repository v1 records",
];

/// A 32-byte secret that is wiped when dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Secret(pub [u8; 32]);

impl Secret {
    /// A fresh random secret.
    pub fn random() -> Self {
        Self(random_bytes())
    }

    fn derive(&self, context: &str) -> Self {
        Self(blake3::derive_key(context, &self.0))
    }
}

/// All secrets of an opened repository.
///
/// The first epoch's secret also yields the keys for blob ids and cut points, so that rotating to a
/// new epoch does not end deduplication.
pub struct Keyring {
    /// The repository the keys belong to.
    pub repository: RepositoryId,
    epochs: Vec<Secret>,
    classes: Vec<[Secret; 4]>,
    data_id: Secret,
    node_id: Secret,
    cut: Secret,
}

impl Keyring {
    /// Most epochs a repository can have.
    pub const EPOCHS_MAX: usize = 256;

    /// The keys that follow from the secrets of the epochs, the oldest first.
    ///
    /// # Errors
    /// When there are none or too many.
    pub fn new(repository: RepositoryId, epochs: Vec<Secret>) -> Result<Self> {
        let first = epochs.first().filter(|_| epochs.len() <= Self::EPOCHS_MAX);
        let first = first.ok_or_else(|| Error::corrupt("key slot", "it holds no usable key"))?;
        Ok(Self {
            repository,
            data_id: first.derive("ebackup repository v1 data blob ids"),
            node_id: first.derive("ebackup repository v1 node blob ids"),
            cut: first.derive("ebackup repository v1 cut points"),
            classes: epochs.iter().map(|epoch| CLASSES.map(|name| epoch.derive(name))).collect(),
            epochs,
        })
    }

    /// Secrets of the epochs, to be wrapped in key slots.
    pub fn epochs(&self) -> &[Secret] {
        &self.epochs
    }

    /// Key of the ids of data blobs.
    pub fn data_id(&self) -> &[u8; 32] {
        &self.data_id.0
    }

    /// Key of the ids of tree nodes.
    pub fn node_id(&self) -> &[u8; 32] {
        &self.node_id.0
    }

    /// Secret from which cut points follow.
    pub fn cut(&self) -> &[u8; 32] {
        &self.cut.0
    }
}

/// First bytes of an object: plain, but bound to its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// What the object is.
    pub kind: ObjectKind,
    /// Which epoch's keys seal it.
    pub epoch: u32,
    /// Makes the object's key unique. In the configuration it is the repository's identity.
    pub salt: [u8; 16],
    /// Binds the object to one key.
    pub commitment: [u8; 32],
}

impl Header {
    /// The stored form.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[10] = self.kind as u8;
        bytes[12..16].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.salt);
        bytes[32..64].copy_from_slice(&self.commitment);
        bytes
    }

    /// Reads the header of object `name`.
    ///
    /// # Errors
    /// `Corrupt` for bytes that are no header, `Unsupported` for one of another format version.
    pub fn decode(name: &str, bytes: &[u8]) -> Result<Self> {
        let head: &[u8; HEADER_BYTES] =
            bytes.first_chunk().ok_or_else(|| Error::corrupt(name, "it ends within its header"))?;
        if head[0..8] != MAGIC {
            return Err(Error::corrupt(name, "it does not begin like an object of ebackup"));
        }
        let version = u16::from_le_bytes([head[8], head[9]]);
        if version != FORMAT_VERSION {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "'{name}' has format version {version}; this program reads version \
                     {FORMAT_VERSION}: use a version of ebackup that fits the repository"
                ),
            ));
        }
        let kind = ObjectKind::from_byte(head[10]).filter(|_| head[11] == 0);
        let kind = kind.ok_or_else(|| Error::corrupt(name, "its kind is unknown"))?;
        let field = |from: usize| &head[from..];
        let array = "the header has 64 bytes";
        Ok(Self {
            kind,
            epoch: u32::from_le_bytes(*field(12).first_chunk().expect(array)),
            salt: *field(16).first_chunk().expect(array),
            commitment: *field(32).first_chunk().expect(array),
        })
    }
}

/// The cipher of one object.
pub struct ObjectCipher {
    key: LessSafeKey,
}

impl ObjectCipher {
    /// Header and cipher of a new object called `name`, with a fresh salt.
    pub fn create(keys: &Keyring, kind: ObjectKind, name: &str) -> (Header, Self) {
        let salt = match kind {
            ObjectKind::Config => keys.repository.0,
            _ => random_bytes(),
        };
        let epoch = keys.classes.len() as u32 - 1;
        let mut header = Header { kind, epoch, salt, commitment: [0; 32] };
        let (key, commitment) =
            derive(&keys.classes[epoch as usize][kind.class()], &header, keys.repository, name);
        header.commitment = commitment;
        (header, Self { key })
    }

    /// The cipher of a stored object.
    ///
    /// # Errors
    /// When the object is of another kind or epoch than can be, or is not the one of this name.
    pub fn open(keys: &Keyring, kind: ObjectKind, name: &str, header: &Header) -> Result<Self> {
        if header.kind != kind {
            return Err(Error::corrupt(name, format!("it is a {:?}, not a {kind:?}", header.kind)));
        }
        let class = keys
            .classes
            .get(header.epoch as usize)
            .ok_or_else(|| Error::corrupt(name, "it names a key this repository does not have"))?;
        let (key, commitment) = derive(&class[kind.class()], header, keys.repository, name);
        if commitment != header.commitment {
            return Err(Error::corrupt(
                name,
                "it was not written under this name with this repository's key",
            ));
        }
        Ok(Self { key })
    }

    /// Seals `buffer[from..]` in place as part `ordinal` and appends the tag.
    pub fn seal(&self, ordinal: u32, aad: &[u8], buffer: &mut Vec<u8>, from: usize) {
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce(ordinal), Aad::from(aad), &mut buffer[from..])
            .expect("AES-GCM seals anything shorter than 64 GiB");
        buffer.extend_from_slice(tag.as_ref());
    }

    /// Opens `sealed` in place; the plaintext is the returned front of it. `None` if it is not
    /// what was sealed as part `ordinal` with this `aad`.
    pub fn open_part<'a>(
        &self,
        ordinal: u32,
        aad: &[u8],
        sealed: &'a mut [u8],
    ) -> Option<&'a mut [u8]> {
        self.key.open_in_place(nonce(ordinal), Aad::from(aad), sealed).ok()
    }
}

/// Seals a small object that is read as a whole.
pub fn seal_record(keys: &Keyring, kind: ObjectKind, name: &str, plain: &[u8]) -> Vec<u8> {
    let (header, cipher) = ObjectCipher::create(keys, kind, name);
    let mut object = header.encode().to_vec();
    object.extend_from_slice(plain);
    cipher.seal(0, &[], &mut object, HEADER_BYTES);
    object
}

/// Opens an object made by [`seal_record`].
///
/// # Errors
/// When it is not the object of this kind and name, whole and unchanged.
pub fn open_record(
    keys: &Keyring,
    kind: ObjectKind,
    name: &str,
    mut object: Vec<u8>,
) -> Result<Vec<u8>> {
    let header = Header::decode(name, &object)?;
    let cipher = ObjectCipher::open(keys, kind, name, &header)?;
    let plain = cipher
        .open_part(0, &[], &mut object[HEADER_BYTES..])
        .ok_or_else(|| Error::corrupt(name, "its content was changed"))?
        .len();
    object.copy_within(HEADER_BYTES..HEADER_BYTES + plain, 0);
    object.truncate(plain);
    Ok(object)
}

/// A cipher for key slots, whose key comes from a passphrase or key file rather than a keyring.
pub(crate) fn slot_cipher(secret: &Secret, binding: &[u8]) -> (ObjectCipher, [u8; 32]) {
    let mut hasher = blake3::Hasher::new_derive_key("ebackup repository v1 key slot");
    hasher.update(&secret.0).update(binding);
    let (key, commitment) = split(hasher);
    (ObjectCipher { key }, commitment)
}

fn derive(
    master: &Secret,
    header: &Header,
    repository: RepositoryId,
    name: &str,
) -> (LessSafeKey, [u8; 32]) {
    let mut hasher = blake3::Hasher::new_keyed(&master.0);
    hasher.update(&header.encode()[..32]).update(&repository.0).update(name.as_bytes());
    split(hasher)
}

fn split(hasher: blake3::Hasher) -> (LessSafeKey, [u8; 32]) {
    let mut output = [0; 64];
    hasher.finalize_xof().fill(&mut output);
    let mut commitment = [0; 32];
    commitment.copy_from_slice(&output[32..]);
    let key = UnboundKey::new(&AES_256_GCM, &output[..32]).expect("32 bytes are an AES-256 key");
    output.zeroize();
    (LessSafeKey::new(key), commitment)
}

fn nonce(ordinal: u32) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..4].copy_from_slice(&ordinal.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;
    use aes_gcm::aead::{Aead, KeyInit, Payload};

    fn keys() -> Keyring {
        Keyring::new(RepositoryId([7; 16]), vec![Secret([1; 32])]).unwrap()
    }

    #[test]
    fn record_round_trips_and_is_bound_to_kind_name_and_repository() {
        let keys = keys();
        let object = seal_record(&keys, ObjectKind::Session, "sessions/a", b"hello");
        let open = |keys: &Keyring, kind, name: &str, object: &[u8]| {
            open_record(keys, kind, name, object.to_vec())
        };
        assert_eq!(open(&keys, ObjectKind::Session, "sessions/a", &object).unwrap(), b"hello");
        assert!(open(&keys, ObjectKind::Session, "sessions/b", &object).is_err());
        assert!(open(&keys, ObjectKind::Snapshot, "sessions/a", &object).is_err());
        let other = Keyring::new(RepositoryId([8; 16]), vec![Secret([1; 32])]).unwrap();
        assert!(open(&other, ObjectKind::Session, "sessions/a", &object).is_err());
    }

    #[test]
    fn every_changed_bit_and_every_cut_is_noticed() {
        let keys = keys();
        let object = seal_record(&keys, ObjectKind::Session, "sessions/a", b"hello");
        for bit in 0..object.len() * 8 {
            let mut changed = object.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(open_record(&keys, ObjectKind::Session, "sessions/a", changed).is_err());
        }
        for len in 0..object.len() {
            let cut = object[..len].to_vec();
            assert!(open_record(&keys, ObjectKind::Session, "sessions/a", cut).is_err());
        }
    }

    #[test]
    fn another_version_is_named() {
        let mut object = seal_record(&keys(), ObjectKind::Session, "sessions/a", b"hello");
        object[8] = 9;
        let error = open_record(&keys(), ObjectKind::Session, "sessions/a", object).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("format version 9"), "{error}");
    }

    /// The construction of the format, computed again with an independent implementation.
    #[test]
    fn sealing_agrees_with_a_second_implementation() {
        let keys = keys();
        let object = seal_record(&keys, ObjectKind::Tombstones, "tombstones/x", b"some bytes");
        let master = blake3::derive_key(CLASSES[3], &[1; 32]);
        let mut input = object[..32].to_vec();
        input.extend_from_slice(&[7; 16]);
        input.extend_from_slice(b"tombstones/x");
        let mut output = [0; 64];
        blake3::Hasher::new_keyed(&master).update(&input).finalize_xof().fill(&mut output);
        assert_eq!(object[32..64], output[32..]);
        let cipher = aes_gcm::Aes256Gcm::new_from_slice(&output[..32]).unwrap();
        let plain =
            cipher.decrypt(&[0; 12].into(), Payload { msg: &object[64..], aad: &[] }).unwrap();
        assert_eq!(plain, b"some bytes");
    }
}
