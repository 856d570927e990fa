//! A location's store, kept open: to open one starts threads and asks the store what it is.

use std::sync::Arc;

use objects::s3::{S3Config, S3Store, SharedKey};
use proto::v1::Repository;

/// An open store. Copies are the same one.
#[derive(Debug, Clone)]
pub struct Store(Arc<Open>);

#[derive(Debug)]
struct Open {
    /// Taken out only by the drop.
    store: Option<S3Store>,
    key: SharedKey,
    /// What makes it this one: all but the access key.
    identity: Repository,
}

impl Store {
    /// Opens it. Blocks.
    ///
    /// # Errors
    /// Those of the store, as it does not answer or refuses the key.
    pub fn open(
        config: S3Config,
        key: SharedKey,
        repository: &Repository,
    ) -> objects::Result<Self> {
        let store = Some(S3Store::open(config)?);
        Ok(Self(Arc::new(Open { store, key, identity: identity(repository) })))
    }

    /// The store, for requests, which block.
    pub fn objects(&self) -> &S3Store {
        self.0.store.as_ref().expect("it is taken out only by the drop")
    }

    /// Whether it is the one of this repository, whatever its access key.
    pub fn is_of(&self, repository: &Repository) -> bool {
        self.0.identity == identity(repository)
    }

    /// Its access key, which can be exchanged while it is used.
    pub fn key(&self) -> &SharedKey {
        &self.0.key
    }
}

fn identity(repository: &Repository) -> Repository {
    Repository { credentials: None, passphrase: Vec::new(), ..repository.clone() }
}

impl Drop for Open {
    /// It has threads, which may not be waited for where others are served.
    fn drop(&mut self) {
        if let Some(store) = self.store.take() {
            let _detached = std::thread::spawn(move || drop(store));
        }
    }
}
