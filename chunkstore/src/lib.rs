//! A repository of deduplicated, compressed, encrypted snapshots of file trees.
//!
//! ```text
//!  plaintext ─chunker─> chunk ─id─> index: known? ──yes──────────────> reference (blob, place)
//!                                    │ no                                      │
//!                       codec: compress, seal ─> pack ─> store ─receipt─> index segment
//!                                                                              │
//!  entries + references ─> tree ─> meta packs ─> store                         │
//!        all packs durable, all segments durable ─> snapshot   (the commit point) <┘
//!
//!  snapshot ─> tree ─> references ─sorted by place─> fetch ─> plaintext
//! ```
//!
//! The format is specified in `FORMAT.md`. From the bottom up:
//! - [`id`], [`wire`], [`limits`], [`error`]: names, primitive encodings, bounds, failures.
//! - [`chunker`], [`codec`]: cut points; compression and sealing. Pure.
//! - [`pack`], [`index`], [`tree`], [`record`], [`key_slot`]: what lies on the store.
//! - [`repository`]: opens one, lists and forgets snapshots.
//! - [`writer`]: a session that stores blobs and commits a snapshot; [`fetch`]: reads many blobs.
//! - [`retention`], [`gc`], [`check`]: which snapshots stay, deleting what is not needed, verifying all.
//!
//! This library knows no file systems, no command line and no network; the store is an
//! [`objects::ObjectStore`]. All calls block; concurrency is threads, each with its own compressor.

pub mod check;
pub mod chunker;
pub mod codec;
pub mod copy;
pub mod error;
pub mod fetch;
pub mod gc;
pub mod id;
pub mod index;
pub mod key_slot;
pub mod limits;
pub mod pack;
pub mod record;
pub mod relocation;
pub mod repository;
pub mod retention;
pub mod session;
#[cfg(feature = "testing")]
pub mod testing;
pub mod tree;
pub mod wire;
pub mod writer;

pub use error::{Error, ErrorKind, Result};
