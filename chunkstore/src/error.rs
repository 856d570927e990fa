//! The error of the library: what failed, on what, and of which kind it is.
//!
//! A kind tells the caller what to do. The text of an error does not repeat its source's; whoever
//! prints it at the edge prints the whole chain.

use std::fmt;

/// Result of an operation on a repository.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it was, by what helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// What was asked for is not there.
    NotFound,
    /// The repository or an argument is not what it should be: mend the input.
    Invalid,
    /// The password or key file does not open this repository.
    WrongKey,
    /// Written by a newer version of the program: update.
    Unsupported,
    /// An object is damaged or missing: run `check`.
    Corrupt,
    /// The store refuses access.
    PermissionDenied,
    /// The store is full.
    Full,
    /// The session was declared dead by a garbage collection and cannot commit: run again.
    Fenced,
    /// The user or the surrounding program asked to stop.
    Cancelled,
    /// The store failed otherwise.
    Store,
}

/// A failed operation.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// A mistake in what the caller gave.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// Damage found in object `what`.
    pub fn corrupt(what: impl fmt::Display, why: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Corrupt, format!("'{what}' is damaged: {why}"))
    }

    /// The operation was cancelled.
    pub fn cancelled() -> Self {
        Self::new(ErrorKind::Cancelled, "interrupted")
    }

    /// The same kind of error with `message` in front and this one as its source.
    #[must_use]
    pub fn context(self, message: impl Into<String>) -> Self {
        Self { kind: self.kind, message: message.into(), source: Some(Box::new(self)) }
    }

    /// What kind of failure it was.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// A copy for a second place that has to report the same failure.
    pub fn duplicate(&self) -> Self {
        Self::new(self.kind, chain(self))
    }
}

/// The error and all its sources in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<objects::Error> for Error {
    fn from(error: objects::Error) -> Self {
        use objects::ErrorKind as Store;
        let kind = match error.kind() {
            Store::NotFound => ErrorKind::NotFound,
            Store::Truncated | Store::TooLarge => ErrorKind::Corrupt,
            Store::PermissionDenied => ErrorKind::PermissionDenied,
            Store::Full => ErrorKind::Full,
            Store::Invalid => ErrorKind::Invalid,
            Store::Expired | Store::Unavailable | Store::Io => ErrorKind::Store,
        };
        Self { kind, message: "the store failed".into(), source: Some(Box::new(error)) }
    }
}
