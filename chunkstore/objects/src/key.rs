//! Which keys and listing prefixes are well-formed: one rule for every implementation, narrow
//! enough that a key is a safe relative path and a valid object name anywhere.

use crate::{Error, ErrorKind, Result};

/// Longest key in bytes. The longest in a repository has about 100; the bound keeps a stray folder
/// tree from costing a listing more than it should.
pub(crate) const KEY_BYTES_MAX: usize = 512;

/// Longest segment in bytes: what file systems take as a name.
pub(crate) const SEGMENT_BYTES_MAX: usize = 255;

/// Whether `name` can be one segment of a key.
pub(crate) fn is_segment(name: &[u8]) -> bool {
    let valid = |b: &u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
    let dotted = name.first().is_none_or(|first| *first == b'.');
    !dotted && name.len() <= SEGMENT_BYTES_MAX && name.iter().all(valid)
}

/// Refuses a malformed key.
pub(crate) fn validate(operation: &'static str, key: &str) -> Result<()> {
    if key.len() > KEY_BYTES_MAX || !key.split('/').all(|name| is_segment(name.as_bytes())) {
        return Err(Error::new(ErrorKind::Invalid, operation, key).because("malformed key"));
    }
    Ok(())
}

/// Refuses a prefix that is neither empty nor a folder of keys with a final `/`.
pub(crate) fn validate_prefix(operation: &'static str, prefix: &str) -> Result<()> {
    if prefix.is_empty() {
        return Ok(());
    }
    let Some(folder) = prefix.strip_suffix('/') else {
        return Err(Error::new(ErrorKind::Invalid, operation, prefix)
            .because("a prefix is empty or ends in '/'"));
    };
    validate(operation, folder)
        .map_err(|_| Error::new(ErrorKind::Invalid, operation, prefix).because("malformed prefix"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_repositories_are_valid() {
        for key in ["config", "packs/3f/3f9c0a", "a/b/c/d", "index/00-0_1.v1", "a..b"] {
            validate("read", key).unwrap();
        }
    }

    #[test]
    fn paths_that_lead_elsewhere_are_not() {
        for key in
            ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", ".a", "a/.b", "A", "a b", "ä", "a\0"]
        {
            assert_eq!(validate("read", key).unwrap_err().kind(), ErrorKind::Invalid, "{key:?}");
        }
    }

    #[test]
    fn lengths_are_bounded() {
        validate("read", &"a".repeat(255)).unwrap();
        validate("read", &"a".repeat(256)).unwrap_err();
        validate("read", &["a".repeat(255), "b".repeat(255)].join("/")).unwrap();
        validate("read", &"a/".repeat(300)).unwrap_err();
    }

    #[test]
    fn prefixes_are_folders() {
        for prefix in ["", "a/", "a/b/"] {
            validate_prefix("list", prefix).unwrap();
        }
        for prefix in ["a", "/", "a//", "../", "a/../", ".tmp/"] {
            validate_prefix("list", prefix).unwrap_err();
        }
    }
}
