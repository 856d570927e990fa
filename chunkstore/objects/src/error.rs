//! Errors of object stores, sorted by what the caller can do about them.

use std::fmt;

/// Result of a store operation.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The object does not exist.
    NotFound,
    /// The object is shorter than what was asked of it.
    Truncated,
    /// The object is larger than the limit the caller set.
    TooLarge,
    /// The credentials or file permissions do not allow it, or the store is read-only.
    PermissionDenied,
    /// The store is full, or a quota is reached.
    Full,
    /// The key or an argument is malformed, or the location is no object store.
    Invalid,
    /// The request took longer to arrive than its date allows: see
    /// [`ObjectStore::replace_dated`](crate::ObjectStore::replace_dated).
    Expired,
    /// The store did not answer or was too busy, however often it was asked.
    Unavailable,
    /// Anything else, for instance an input/output error of the disk.
    Io,
}

/// A failed store operation: what was tried, on which key, and why it failed.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    operation: &'static str,
    key: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` while doing `operation` (an imperative verb: `read`, `list`) on `key`.
    pub fn new(kind: ErrorKind, operation: &'static str, key: impl Into<String>) -> Self {
        Self { kind, operation, key: key.into(), source: None }
    }

    /// The same error with its cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// An error with the kind that fits an operating system error.
    pub fn from_io(operation: &'static str, key: impl Into<String>, err: std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match err.kind() {
            Io::NotFound => ErrorKind::NotFound,
            Io::PermissionDenied | Io::ReadOnlyFilesystem => ErrorKind::PermissionDenied,
            Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge => ErrorKind::Full,
            Io::UnexpectedEof => ErrorKind::Truncated,
            _ => ErrorKind::Io,
        };
        Self::new(kind, operation, key).because(err)
    }

    /// What kind of failure it was.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The key the operation was about.
    pub fn key(&self) -> &str {
        &self.key
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            ErrorKind::NotFound => "it does not exist",
            ErrorKind::Truncated => "it is shorter than it should be",
            ErrorKind::TooLarge => "it is larger than such an object can be",
            ErrorKind::PermissionDenied => "permission denied, or the store is read-only",
            ErrorKind::Full => "no space left",
            ErrorKind::Invalid => "invalid",
            ErrorKind::Expired => "the request arrived too long after it was dated",
            ErrorKind::Unavailable => "the store does not answer",
            ErrorKind::Io => "input/output error",
        };
        write!(f, "cannot {} '{}': {what}", self.operation, self.key)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;
    use std::error::Error as _;

    #[test]
    fn operating_system_errors_map_to_what_the_caller_can_do() {
        let table = [
            (Errno::NOENT, ErrorKind::NotFound),
            (Errno::ACCESS, ErrorKind::PermissionDenied),
            (Errno::PERM, ErrorKind::PermissionDenied),
            (Errno::ROFS, ErrorKind::PermissionDenied),
            (Errno::NOSPC, ErrorKind::Full),
            (Errno::DQUOT, ErrorKind::Full),
            (Errno::FBIG, ErrorKind::Full),
            (Errno::IO, ErrorKind::Io),
            (Errno::MFILE, ErrorKind::Io),
        ];
        for (errno, kind) in table {
            assert_eq!(Error::from_io("read", "a", errno.into()).kind(), kind, "{errno:?}");
        }
    }

    #[test]
    fn the_message_names_the_operation_and_the_key_and_the_source_says_why() {
        let err = Error::from_io("create", "packs/3f", Errno::NOSPC.into());
        assert_eq!(err.to_string(), "cannot create 'packs/3f': no space left");
        assert_eq!(err.key(), "packs/3f");
        assert!(err.source().unwrap().to_string().contains("No space left on device"));
    }
}
