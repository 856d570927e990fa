//! Proves that a store works, by using it: an object is written, read and deleted.

use std::io::IoSlice;
use std::time::Duration;

use objects::ObjectStore;
use objects::s3::{S3Config, S3Store};

use super::config::advice;

/// How long a validation may take. Connecting has limits of its own, so the thread behind ends, too.
const LIMIT: Duration = Duration::from_secs(25);

/// What a store that works was found to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// Whether there is a repository.
    pub repository_exists: bool,
}

/// Tries the store: by listing alone when it is only read.
///
/// # Errors
/// What went wrong, and what to do.
pub async fn validate(config: S3Config, read_only: bool) -> Result<Proof, String> {
    let location = format!("bucket '{}'", config.bucket);
    let trial = tokio::task::spawn_blocking(move || attempt(config, read_only));
    match tokio::time::timeout(LIMIT, trial).await {
        Ok(Ok(done)) => done.map_err(|error| advice(&error)),
        Ok(Err(_)) => Err(format!("the validation of {location} broke off")),
        Err(_) => Err(format!(
            "{location} does not answer within {} seconds: check the endpoint, and whether this cluster \
             may reach it",
            LIMIT.as_secs()
        )),
    }
}

fn attempt(config: S3Config, read_only: bool) -> objects::Result<Proof> {
    let store = S3Store::open(config)?;
    let name = format!("{}/config", proto::REPOSITORY_FOLDER);
    if !read_only {
        let mut random = [0; 8];
        // Without randomness two validations may meet, and the later one says so.
        let _unneeded = getrandom::fill(&mut random);
        let key = format!("metadata/ebackup-probe-{:016x}", u64::from_le_bytes(random));
        let body = b"written to find out whether this location works";
        let written = store.create(&key, &[IoSlice::new(body)]).map(drop);
        let read = written.and_then(|()| store.read(&key, 1 << 10).map(drop));
        // Also after an error: the object may be there.
        let deleted = store.delete(&key);
        read.and(deleted)?;
    }
    match store.stat(&name) {
        Ok(_) => Ok(Proof { repository_exists: true }),
        Err(error) if error.kind() == objects::ErrorKind::NotFound => {
            Ok(Proof { repository_exists: false })
        }
        Err(error) => Err(error),
    }
}
