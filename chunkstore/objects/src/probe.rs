//! Trying out what a store does.
use crate::{Created, ObjectStore, Result};
use std::io::IoSlice;

/// Whether the store honours create-if-absent.
///
/// # Errors
/// Those of the store.
pub fn create_if_absent(store: &dyn ObjectStore, folder: &str) -> Result<bool> {
    let key = format!("{folder}probe");
    let _ = store.create(&key, &[IoSlice::new(b"a")])?;
    let second = store.create(&key, &[IoSlice::new(b"b")])?;
    store.delete(&key)?;
    Ok(second == Created::AlreadyExists)
}
