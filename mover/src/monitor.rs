//! How long work tells what it is doing, and learns that it should stop.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Something that was not saved or restored as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// Path from the root of the backup, in bytes, with `/` between components.
    pub path: Vec<u8>,
    /// What happened.
    pub message: String,
    /// What it means for the object.
    pub concern: Concern,
}

/// What a warning means for the object it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Concern {
    /// Content that should be in the snapshot or the target is not there, or not all of it.
    Missing,
    /// It changed while it was read: what is saved may be of different moments.
    Changed,
    /// It vanished before it could be read, and is not saved.
    Vanished,
    /// Something less: an attribute, a link, a hint.
    Detail,
}

/// How many warnings there were, in all and of each concern.
#[derive(Debug, Default)]
pub struct WarningCounts {
    all: AtomicU64,
    missing: AtomicU64,
    changed: AtomicU64,
    vanished: AtomicU64,
}

impl WarningCounts {
    /// Counts one.
    pub fn add(&self, concern: Concern) {
        self.all.fetch_add(1, Ordering::Relaxed);
        let counter = match concern {
            Concern::Missing => &self.missing,
            Concern::Changed => &self.changed,
            Concern::Vanished => &self.vanished,
            Concern::Detail => return,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// All warnings.
    pub fn all(&self) -> u64 {
        self.all.load(Ordering::Relaxed)
    }

    /// Those of [`Concern::Missing`].
    pub fn missing(&self) -> u64 {
        self.missing.load(Ordering::Relaxed)
    }

    /// Those of [`Concern::Changed`].
    pub fn changed(&self) -> u64 {
        self.changed.load(Ordering::Relaxed)
    }

    /// Those of [`Concern::Vanished`].
    pub fn vanished(&self) -> u64 {
        self.vanished.load(Ordering::Relaxed)
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", display_path(&self.path), self.message)
    }
}

/// A path for people: bytes that are not UTF-8, control characters and backslashes are escaped.
pub fn display_path(path: &[u8]) -> String {
    if path.is_empty() {
        return ".".to_owned();
    }
    let mut text = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        for char in chunk.valid().chars() {
            match char {
                '\\' => text.push_str("\\\\"),
                _ if char.is_control() => text.extend(char.escape_default()),
                _ => text.push(char),
            }
        }
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
    }
    text
}

/// Told about progress, from any thread.
pub trait Monitor: Sync {
    /// Work on this path begins.
    fn begin(&self, path: &[u8]);
    /// So many more entries and bytes are done.
    fn advance(&self, entries: u64, bytes: u64);
    /// Something went wrong with one entry.
    fn warning(&self, warning: Warning);
    /// Whether to stop as soon as possible.
    fn is_cancelled(&self) -> bool;
}

/// Listens to nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Monitor for Silent {
    fn begin(&self, _: &[u8]) {}
    fn advance(&self, _: u64, _: u64) {}
    fn warning(&self, _: Warning) {}
    fn is_cancelled(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_shown_on_one_line_without_loss() {
        assert_eq!(display_path(b""), ".");
        assert_eq!(display_path("a/\u{e4}b c".as_bytes()), "a/\u{e4}b c");
        assert_eq!(display_path(b"a\nb\\\xff"), "a\\nb\\\\\\xff");
    }
}
