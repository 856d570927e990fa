//! Why a job failed, as the controller is told: which kind of failure, and a sentence.

use std::io;

use chunkstore::error::chain;
use chunkstore::{Error, ErrorKind};
use proto::v1::{Failure, FailureKind};

/// Bytes of a message, at most: it goes into a custom resource.
const MESSAGE_BYTES_MAX: usize = 4096;

/// A job failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failed {
    pub(super) kind: FailureKind,
    pub(super) message: String,
}

pub(super) type Result<T> = std::result::Result<T, Failed>;

impl Failed {
    pub(super) fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: shorten(message.into(), MESSAGE_BYTES_MAX) }
    }

    pub(super) fn into_proto(self) -> Failure {
        Failure { kind: self.kind.into(), message: self.message }
    }
}

/// Cuts a text that is too long, between characters.
pub(super) fn shorten(mut text: String, bytes_max: usize) -> String {
    if text.len() > bytes_max {
        text.truncate(text.floor_char_boundary(bytes_max - '…'.len_utf8()));
        text.push('…');
    }
    text
}

/// What failed while a store was reached or a repository opened.
pub(super) fn opening(error: &Error) -> Failed {
    let kind = match (error.kind(), store_kind(error)) {
        // Only the repository's own objects can be missing here.
        (ErrorKind::NotFound, _) => FailureKind::NoRepository,
        // No such bucket, no secure connection, another region: it cannot be reached like this.
        (ErrorKind::Invalid, Some(_)) => FailureKind::StoreUnreachable,
        _ => general(error),
    };
    Failed::new(kind, chain(error))
}

/// What failed while a repository was used and nothing else.
pub(super) fn in_repository(error: &Error) -> Failed {
    Failed::new(general(error), chain(error))
}

/// What failed while data went between a volume and a repository.
pub(super) fn with_volume(error: &Error) -> Failed {
    let kind = match (error.kind(), store_kind(error)) {
        (ErrorKind::Invalid, None) => FailureKind::VolumeError,
        _ => general(error),
    };
    Failed::new(kind, chain(error))
}

/// What failed on a volume.
pub(super) fn volume(what: &str, path: &str, error: &io::Error) -> Failed {
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FailureKind::Full,
        _ => FailureKind::VolumeError,
    };
    Failed::new(kind, format!("cannot {what} '{path}': {error}"))
}

fn general(error: &Error) -> FailureKind {
    match error.kind() {
        // Something that something else refers to.
        ErrorKind::NotFound | ErrorKind::Corrupt => FailureKind::Damaged,
        ErrorKind::WrongKey => FailureKind::WrongPassphrase,
        ErrorKind::Unsupported => FailureKind::Unsupported,
        ErrorKind::PermissionDenied => FailureKind::StoreDenied,
        ErrorKind::Full => FailureKind::Full,
        ErrorKind::Cancelled => FailureKind::Cancelled,
        ErrorKind::Store => FailureKind::StoreUnreachable,
        ErrorKind::Invalid if store_kind(error).is_some() => FailureKind::StoreUnreachable,
        ErrorKind::Invalid | ErrorKind::Fenced => FailureKind::Other,
    }
}

/// What the store said, if it was the store that failed.
fn store_kind(error: &Error) -> Option<objects::ErrorKind> {
    let mut next: Option<&dyn std::error::Error> = Some(error);
    while let Some(cause) = next {
        if let Some(store) = cause.downcast_ref::<objects::Error>() {
            return Some(store.kind());
        }
        next = cause.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_sorted_by_where_they_happened_and_what_helps() {
        let store = |kind| Error::from(objects::Error::new(kind, "read", "x").because("why"));
        let own = |kind| Error::new(kind, "why");
        type Sort = fn(&Error) -> Failed;
        let table: [(Sort, Error, FailureKind); 14] = [
            (opening, own(ErrorKind::NotFound), FailureKind::NoRepository),
            (opening, own(ErrorKind::WrongKey), FailureKind::WrongPassphrase),
            (opening, store(objects::ErrorKind::Invalid), FailureKind::StoreUnreachable),
            (opening, store(objects::ErrorKind::PermissionDenied), FailureKind::StoreDenied),
            (opening, store(objects::ErrorKind::Unavailable), FailureKind::StoreUnreachable),
            (opening, own(ErrorKind::Unsupported), FailureKind::Unsupported),
            (with_volume, own(ErrorKind::Invalid), FailureKind::VolumeError),
            (with_volume, store(objects::ErrorKind::Full), FailureKind::Full),
            (with_volume, own(ErrorKind::Full), FailureKind::Full),
            (with_volume, store(objects::ErrorKind::NotFound), FailureKind::Damaged),
            (with_volume, own(ErrorKind::Cancelled), FailureKind::Cancelled),
            (in_repository, own(ErrorKind::Corrupt), FailureKind::Damaged),
            (in_repository, own(ErrorKind::Fenced), FailureKind::Other),
            (in_repository, own(ErrorKind::Store), FailureKind::StoreUnreachable),
        ];
        for (sort, error, kind) in table {
            let failed = sort(&error);
            assert_eq!(failed.kind, kind, "{error:?}");
            assert!(failed.message.contains("why"), "{failed:?}");
        }
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        assert_eq!(shorten("abc".to_owned(), 3), "abc");
        assert_eq!(shorten("ääää".to_owned(), 6), "ä…");
        let failed = Failed::new(FailureKind::Other, "ä".repeat(MESSAGE_BYTES_MAX));
        assert!(failed.message.len() <= MESSAGE_BYTES_MAX && failed.message.ends_with('…'));
    }
}
