//! What a Backup or a Restore is about: filters by namespace, kind and label, as pure functions.
//!
//! ```text
//! an object is taken if   namespaces select its namespace        (cluster-scoped kinds have none)
//!                    and  kinds select its kind: by itself, or only where a taken object refers to it
//!                    and  labels match, unless a taken object refers to it
//!                    and  it does not carry the label that leaves it out
//! ```
//! All restrictions hold together. Each filter is made from the fields of a spec, and tells what is wrong with
//! them by field; what names nothing that exists is told when what exists is known.

pub mod kinds;
pub mod labels;
pub mod namespaces;
mod pattern;

use std::collections::BTreeMap;
use std::fmt;

/// Label with the value `true`: the object is never saved, nor the data of such a claim, nor anything in such a
/// namespace.
pub const LEFT_OUT: &str = "velero.io/exclude-from-backup";

/// Whether an object's labels say that it is never saved.
pub fn is_left_out(labels: &BTreeMap<String, String>) -> bool {
    labels.get(LEFT_OUT).is_some_and(|value| value == "true")
}

/// A field that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    /// Its name below `spec`.
    pub field: String,
    /// What is wrong with it, and what to write instead.
    pub message: String,
}

impl Invalid {
    pub(crate) fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spec.{}: {}", self.field, self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_true_leaves_out() {
        let labels = |value: &str| BTreeMap::from([(LEFT_OUT.to_owned(), value.to_owned())]);
        assert!(is_left_out(&labels("true")));
        for labels in [labels("false"), labels(""), labels("yes"), BTreeMap::new()] {
            assert!(!is_left_out(&labels));
        }
    }
}
