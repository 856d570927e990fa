//! Locations: from a `BackupStorageLocation` and its Secrets to a store that was proven to work, and to what
//! agents need to use it.
//!
//! `config` and `passphrase` decide, without touching anything; `validate` tries the store; `check` reads
//! the Secrets, does both, and answers what the status says.

pub mod check;
pub mod config;
pub mod passphrase;
pub mod status;
pub mod validate;

pub use check::{Checked, check};
pub use config::Store;
