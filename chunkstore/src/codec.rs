//! Plaintext to stored bytes and back: compress, then seal.
//!
//! [`seal`] knows keys and ciphers, [`compress`] knows zstd; neither knows what the bytes mean.

pub mod compress;
pub mod seal;
