//! Identifiers: the names of blobs, packs, index segments, sessions and key slots.
//!
//! A [`BlobId`] is a keyed hash of content. All others are random, chosen by whoever makes the
//! object, so that nothing about the content can be read from a name.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $len:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// Length in bytes.
            pub const LEN: usize = $len;

            /// The first eight hexadecimal digits, for people.
            pub fn short(&self) -> String {
                let mut text = self.to_string();
                text.truncate(8);
                text
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                let mut id = [0; $len];
                if hex_decode(text, &mut id) { Ok(Self(id)) } else {
                    Err(Error::invalid(format!(
                        "'{text}' is not an identifier of {} hexadecimal digits", 2 * $len
                    )))
                }
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, out: S) -> std::result::Result<S::Ok, S::Error> {
                out.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(from)?;
                text.parse().map_err(|_| serde::de::Error::custom("malformed identifier"))
            }
        }
    };
}

id_type!(
    /// Name of a blob: BLAKE3 of its plaintext, keyed by a secret of the repository.
    BlobId, 32
);
id_type!(
    /// Name of a pack.
    PackId, 16
);
id_type!(
    /// Name of an index segment.
    SegmentId, 16
);
id_type!(
    /// Name of a writer's session, and of the snapshot it may end in.
    SnapshotId, 16
);
id_type!(
    /// Name of one run of garbage collection.
    GenerationId, 16
);
id_type!(
    /// Identity of a repository; part of everything that is sealed in it.
    RepositoryId, 16
);
id_type!(
    /// Name of a key slot.
    SlotId, 8
);

macro_rules! random_id {
    ($($name:ident),*) => { $(
        impl $name {
            /// A fresh random identifier.
            pub fn random() -> Self {
                Self(random_bytes())
            }
        }
    )* };
}
random_id!(PackId, SegmentId, SnapshotId, GenerationId, RepositoryId, SlotId);

/// Bytes from the operating system's random number generator.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // The system's generator cannot fail on a kernel this program runs on; without random names
    // and salts nothing may be written, so there is no way to go on either.
    getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
    bytes
}

fn hex_decode(text: &str, into: &mut [u8]) -> bool {
    let digits = text.as_bytes();
    if digits.len() != 2 * into.len() {
        return false;
    }
    for (byte, pair) in into.iter_mut().zip(digits.chunks_exact(2)) {
        let (Some(high), Some(low)) = (hex_digit(pair[0]), hex_digit(pair[1])) else {
            return false;
        };
        *byte = high << 4 | low;
    }
    true
}

fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips_and_rejects_other_text() {
        let id = PackId([0xab; 16]);
        assert_eq!(id.to_string().parse::<PackId>().unwrap(), id);
        assert_eq!(id.short(), "abababab");
        for wrong in ["", "ab", &"g".repeat(32), &"AB".repeat(16), &"a".repeat(33)] {
            assert!(wrong.parse::<PackId>().is_err(), "{wrong}");
        }
    }
}
