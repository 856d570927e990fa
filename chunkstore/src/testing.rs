//! For the tests of this and other crates: tree nodes in memory, and the bodies of the fuzz targets.
//!
//! Misuse of these panics: they are no part of the product.

pub mod fuzz;
pub mod golden;
mod nodes;

pub use nodes::MemoryNodes;
