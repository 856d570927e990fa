//! Restores of trees written directly, compared with what the trees say.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod contents;
mod damage;
mod existing;
mod hostile;
mod links;
mod memfs;
mod model;
mod oracle;
mod refusals;
mod states;
mod targets;
