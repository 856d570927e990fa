//! A repository of deduplicated, compressed, encrypted snapshots of file trees.
pub mod check;
pub mod chunker;
pub mod codec;
pub mod error;
pub mod fetch;
pub mod gc;
pub mod id;
pub mod index;
pub mod key_slot;
pub mod limits;
pub mod pack;
pub mod record;
pub mod repository;
pub mod retention;
pub mod tree;
pub mod wire;
pub mod writer;

pub use error::{Error, ErrorKind, Result};
