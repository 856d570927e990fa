//! Key slots: the repository's secrets, wrapped by a passphrase or a key file.
//!
//! A slot is a small JSON object `keys/<slot>`. Any number of slots wrap the same secrets, so a
//! passphrase can be added, removed or replaced without touching data. A passphrase is stretched by
//! Argon2id (RFC 9106); a key file holds 256 random bits and needs no stretching.

use std::io::IoSlice;

use objects::{Created, ObjectStore};
use serde::{Deserialize, Serialize};

use crate::codec::seal::{FORMAT_VERSION, Keyring, Secret, slot_cipher};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{RepositoryId, SlotId, random_bytes};
use crate::limits::RECORD_BYTES_MAX;

/// Folder of the key slots.
pub const FOLDER: &str = "keys/";

/// What opens a slot.
#[derive(Clone)]
pub enum Unlock {
    /// A passphrase.
    Passphrase(Vec<u8>),
    /// The secret in a key file.
    KeyFile(Secret),
}

impl Unlock {
    fn kind(&self) -> SlotKind {
        match self {
            Self::Passphrase(_) => SlotKind::Passphrase,
            Self::KeyFile(_) => SlotKind::KeyFile,
        }
    }
}

/// Whether a slot opens by passphrase or key file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SlotKind {
    /// By a passphrase.
    Passphrase,
    /// By a key file.
    KeyFile,
}

/// Cost of stretching a passphrase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KdfCost {
    /// Memory in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
}

impl KdfCost {
    /// 46 MiB and two passes: above OWASP's minimum of 19 MiB with two, and small enough for the
    /// least memory the program accepts.
    pub const DEFAULT: Self = Self { memory_kib: 46 << 10, passes: 2 };
    /// For tests.
    pub const WEAK: Self = Self { memory_kib: 64, passes: 1 };

    /// A hostile store must not make the program take more memory or time than this.
    fn is_acceptable(self) -> bool {
        (8..=46 << 10).contains(&self.memory_kib) && (1..=16).contains(&self.passes)
    }
}

/// What a slot says about itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SlotInfo {
    /// Its name.
    pub slot: SlotId,
    /// What opens it.
    pub kind: SlotKind,
    /// When it was added (RFC 3339).
    pub created: String,
    /// What its owner calls it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub label: String,
}

#[derive(Serialize, Deserialize)]
struct SlotObject {
    version: u16,
    repository: RepositoryId,
    #[serde(flatten)]
    info: SlotInfo,
    #[serde(skip_serializing_if = "Option::is_none")]
    kdf: Option<KdfCost>,
    salt: String,
    commitment: String,
    sealed: String,
}

fn object_name(slot: SlotId) -> String {
    format!("{FOLDER}{slot}")
}

/// Wraps the secrets of `keys` in a new slot.
///
/// # Errors
/// Those of the store.
pub fn add(
    store: &dyn ObjectStore,
    keys: &Keyring,
    unlock: &Unlock,
    cost: KdfCost,
    label: &str,
    now: jiff::Timestamp,
) -> Result<SlotInfo> {
    let info = SlotInfo {
        slot: SlotId::random(),
        kind: unlock.kind(),
        created: now.to_string(),
        label: label.to_owned(),
    };
    let salt: [u8; 32] = random_bytes();
    let secret = stretch(unlock, cost, &salt)?;
    let (cipher, commitment) = slot_cipher(&secret, &binding(keys.repository, &info, &salt));
    let mut sealed: Vec<u8> = keys.epochs().iter().flat_map(|epoch| epoch.0).collect();
    cipher.seal(0, b"slot", &mut sealed, 0);
    let object = SlotObject {
        version: FORMAT_VERSION,
        repository: keys.repository,
        kdf: (info.kind == SlotKind::Passphrase).then_some(cost),
        info: info.clone(),
        salt: hex(&salt),
        commitment: hex(&commitment),
        sealed: hex(&sealed),
    };
    let text = serde_json::to_vec_pretty(&object).expect("a slot is plain data");
    match store.create(&object_name(info.slot), &[IoSlice::new(&text)])? {
        Created::New => Ok(info),
        Created::AlreadyExists => Err(Error::corrupt("key slot", "a random name was taken")),
    }
}

/// All slots that can be read.
///
/// # Errors
/// When the folder cannot be listed.
pub fn list(store: &dyn ObjectStore) -> Result<Vec<SlotInfo>> {
    Ok(read_all(store)?.into_iter().map(|slot| slot.info).collect())
}

/// Removes a slot. Several at once may each find another one left and delete that one's last companion:
/// so it is looked at again afterwards, and whoever finds no slot puts its own back.
///
/// # Errors
/// `NotFound` when there is none of this name, `Invalid` when it is the last one: then it stays.
pub fn remove(store: &dyn ObjectStore, slot: SlotId) -> Result<()> {
    let last = || Error::invalid("this is the last key: add another one before removing it");
    let slots = read_all(store)?;
    if !slots.iter().any(|other| other.info.slot == slot) {
        return Err(Error::new(ErrorKind::NotFound, format!("there is no key slot {slot}")));
    }
    if slots.len() == 1 {
        return Err(last());
    }
    let name = object_name(slot);
    let object = store.read(&name, RECORD_BYTES_MAX)?;
    store.delete(&name)?;
    if !read_all(store)?.is_empty() {
        return Ok(());
    }
    match store.create(&name, &[IoSlice::new(&object)])? {
        Created::New | Created::AlreadyExists => Err(last()),
    }
}

/// Opens the first slot that `unlock` fits. A slot that cannot be read does not block the others.
///
/// # Errors
/// `WrongKey` when no slot opens.
pub fn open(store: &dyn ObjectStore, repository: RepositoryId, unlock: &Unlock) -> Result<Keyring> {
    let slots = read_all(store)?;
    for slot in &slots {
        if slot.repository == repository
            && slot.info.kind == unlock.kind()
            && let Some(epochs) = try_open(slot, unlock)
        {
            return Keyring::new(repository, epochs);
        }
    }
    let given = match unlock {
        Unlock::Passphrase(_) => "password",
        Unlock::KeyFile(_) => "key file",
    };
    let fitting = slots.iter().filter(|slot| slot.info.kind == unlock.kind()).count();
    let why = match (slots.len(), fitting) {
        (0, _) => "it has no readable key slot; restore the folder 'keys' from a copy".to_owned(),
        (all, 0) => format!("none of its {all} keys is of that kind"),
        (_, fitting) => format!("tried {fitting} key slots"),
    };
    let message = format!("the {given} does not open this repository ({why})");
    Err(Error::new(ErrorKind::WrongKey, message))
}

/// The slots that `unlock` opens.
///
/// # Errors
/// When the folder cannot be listed.
pub fn opened_by(
    store: &dyn ObjectStore,
    repository: RepositoryId,
    unlock: &Unlock,
) -> Result<Vec<SlotId>> {
    let slots = read_all(store)?;
    let opened = slots.iter().filter(|slot| {
        slot.repository == repository
            && slot.info.kind == unlock.kind()
            && try_open(slot, unlock).is_some()
    });
    Ok(opened.map(|slot| slot.info.slot).collect())
}

fn try_open(slot: &SlotObject, unlock: &Unlock) -> Option<Vec<Secret>> {
    let salt = unhex(&slot.salt)?;
    let cost = match slot.info.kind {
        SlotKind::Passphrase => slot.kdf.filter(|cost| cost.is_acceptable())?,
        SlotKind::KeyFile => KdfCost::DEFAULT,
    };
    let secret = stretch(unlock, cost, &salt).ok()?;
    let (cipher, commitment) = slot_cipher(&secret, &binding(slot.repository, &slot.info, &salt));
    if unhex(&slot.commitment)? != commitment {
        return None;
    }
    let mut sealed = unhex(&slot.sealed)?;
    let plain = cipher.open_part(0, b"slot", &mut sealed)?;
    let epochs = plain.chunks_exact(32).map(|epoch| epoch.try_into().ok().map(Secret)).collect();
    zeroize::Zeroize::zeroize(plain);
    epochs
}

fn stretch(unlock: &Unlock, cost: KdfCost, salt: &[u8]) -> Result<Secret> {
    match unlock {
        Unlock::KeyFile(secret) => Ok(secret.clone()),
        Unlock::Passphrase(passphrase) => {
            let invalid = |error| Error::invalid(format!("the password cannot be used: {error}"));
            let params = argon2::Params::new(cost.memory_kib, cost.passes, 1, Some(32));
            let params = params.map_err(invalid)?;
            let argon =
                argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
            let mut secret = Secret([0; 32]);
            argon.hash_password_into(passphrase, salt, &mut secret.0).map_err(invalid)?;
            Ok(secret)
        }
    }
}

/// What a slot's seal is bound to.
fn binding(repository: RepositoryId, info: &SlotInfo, salt: &[u8]) -> Vec<u8> {
    let kind = match info.kind {
        SlotKind::Passphrase => 0,
        SlotKind::KeyFile => 1,
    };
    [&repository.0[..], &info.slot.0, &[kind], salt].concat()
}

fn read_all(store: &dyn ObjectStore) -> Result<Vec<SlotObject>> {
    let mut names = Vec::new();
    store.list(FOLDER, &mut |meta| {
        names.push(meta.key);
        Ok(())
    })?;
    names.sort();
    let read = |name: &String| decode(&store.read(name, RECORD_BYTES_MAX).ok()?);
    Ok(names.iter().filter_map(read).collect())
}

fn decode(bytes: &[u8]) -> Option<SlotObject> {
    serde_json::from_slice(bytes).ok().filter(|slot: &SlotObject| slot.version == FORMAT_VERSION)
}

/// What is wrong with the slot stored as `name`, as far as that shows without what opens it.
pub(crate) fn fault(keys: &Keyring, name: &str, bytes: &[u8]) -> Option<&'static str> {
    let Some(slot) = decode(bytes) else {
        return Some("it is no key slot of this version");
    };
    let len = |text: &str| unhex(text).map(|bytes| bytes.len());
    let sealed = keys.epochs().len() * 32 + crate::codec::seal::TAG_BYTES;
    if object_name(slot.info.slot) != name {
        Some("it is the slot of another name")
    } else if slot.repository != keys.repository {
        Some("it is of another repository, perhaps left by an interrupted init: 'key remove' it")
    } else if [len(&slot.salt), len(&slot.commitment)] != [Some(32); 2] {
        Some("its salt or commitment was changed")
    } else if len(&slot.sealed) != Some(sealed) {
        Some("what it wraps was changed, or lacks a key")
    } else if slot.info.kind == SlotKind::Passphrase
        && !slot.kdf.is_some_and(KdfCost::is_acceptable)
    {
        Some("its cost is impossible")
    } else {
        None
    }
}

/// Fuzzing entry: decodes a slot and tries to open it.
#[cfg(feature = "testing")]
pub fn fuzz_decode(bytes: &[u8]) {
    if let Some(slot) = decode(bytes) {
        try_open(&slot, &Unlock::KeyFile(Secret([0; 32])));
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
        text
    })
}

/// The bytes that lower- or upper-case hexadecimal digits stand for.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let digit = |digit: u8| (digit as char).to_digit(16).map(|value| value as u8);
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}
