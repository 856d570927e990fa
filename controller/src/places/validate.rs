//! Proves that a store works, by using it: an object is written, read and deleted.

use std::io::IoSlice;
use std::time::Duration;

use objects::ObjectStore;

use super::config::{Description, advice};
use super::store::Store;

/// How long a validation may take. Connecting has limits of its own, so the thread behind ends, too.
const LIMIT: Duration = Duration::from_secs(25);

/// What a store that works was found to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// Whether there is a repository.
    pub repository_exists: bool,
}

/// Tries the store, the open one if it is the same: by listing alone when it is only read. Returns it.
///
/// # Errors
/// What went wrong, and what to do.
pub async fn validate(
    described: Description,
    open: Option<Store>,
    read_only: bool,
) -> Result<(Store, Proof), String> {
    let location = format!("bucket '{}'", described.s3.bucket);
    let trial = tokio::task::spawn_blocking(move || {
        let Description { s3, access_key, key, repository, .. } = described;
        let store = match open.filter(|open| open.is_of(&repository)) {
            Some(open) => {
                open.key().exchange(access_key);
                open
            }
            None => Store::open(s3, key, &repository)?,
        };
        attempt(&store, read_only).map(|proof| (store, proof))
    });
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

fn attempt(store: &Store, read_only: bool) -> objects::Result<Proof> {
    let store = store.objects();
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
