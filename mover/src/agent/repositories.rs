//! Opening the repositories of jobs: with credentials from memory, which may be exchanged while a job
//! runs, and with copies of their index on the node, which all jobs share.
//!
//! Each job has a store of its own, so that limits of bandwidth, credentials and cancelling are its own too.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chunkstore::chunker::ChunkerConfig;
use chunkstore::error::chain;
use chunkstore::key_slot::{self, KdfCost, Unlock};
use chunkstore::repository::{Register, Repository};
use chunkstore::{Error, ErrorKind};
use objects::ObjectStore;
use objects::s3::{AccessKey, Addressing, CredentialSource, S3Config, S3Store, SharedKey, Stop};
use proto::v1::{self, FailureKind, OpenRepository, Opened};

use super::config::Config;
use super::failure::{Failed, Result, in_repository, opening};
use crate::repository::{IndexCache, open_bucket, other_object};

/// Tries of a request by which only is found out whether a store can be reached.
const PROBE_ATTEMPTS: u32 = 2;

/// How long a job goes on trying while its store is away: as long as a location may be.
const PATIENCE: Duration = Duration::from_secs(600);

/// The folders of the cache that jobs use, and by how many.
#[derive(Debug, Default)]
pub(super) struct CacheUse(Mutex<BTreeMap<PathBuf, usize>>);

/// One job's use of its folder.
pub(super) struct CacheLease<'a> {
    all: &'a CacheUse,
    folder: PathBuf,
}

impl CacheUse {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the folder of the store at `location` into use, and makes room for it.
    fn lease(&self, cache: &IndexCache, location: &str) -> CacheLease<'_> {
        let folder = cache.folder(location);
        let mut used = self.lock();
        *used.entry(folder.clone()).or_default() += 1;
        let in_use: BTreeSet<PathBuf> = used.keys().cloned().collect();
        if let Err(error) = cache.trim(&in_use) {
            tracing::debug!("the index cache cannot be trimmed: {error}");
        }
        CacheLease { all: self, folder }
    }
}

impl Drop for CacheLease<'_> {
    fn drop(&mut self) {
        let mut used = self.all.lock();
        if let Some(count) = used.get_mut(&self.folder) {
            *count -= 1;
            if *count == 0 {
                used.remove(&self.folder);
            }
        }
    }
}

/// An access key as it comes in a message.
pub(super) fn access_key(credentials: Option<&v1::Credentials>) -> AccessKey {
    let v1::Credentials { access_key, secret_key, session_token } =
        credentials.cloned().unwrap_or_default();
    let session_token = (!session_token.is_empty()).then_some(session_token);
    AccessKey { key: access_key, secret: secret_key, session_token }
}

/// How the store of `repository` is reached.
///
/// # Errors
/// `Invalid` when that makes no sense.
fn s3_config(
    config: &Config,
    repository: &v1::Repository,
    key: SharedKey,
    stop: Stop,
) -> Result<S3Config> {
    let invalid = |why: String| Failed::new(FailureKind::Invalid, why);
    if !repository.url.starts_with("s3://") {
        return Err(invalid(format!("'{}' is no repository s3://bucket/prefix", repository.url)));
    }
    let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let (endpoint, region) = (given(&repository.endpoint), given(&repository.region));
    let plain = S3Config::new(
        &repository.url,
        endpoint.as_deref(),
        region.as_deref(),
        CredentialSource::Shared(key),
    );
    let plain = plain.map_err(|error| invalid(chain(&error)))?;
    let addressing = match repository.addressing() {
        v1::Addressing::Auto => Addressing::Auto,
        v1::Addressing::VirtualHost => Addressing::VirtualHost,
        v1::Addressing::Path => Addressing::Path,
    };
    let limit = |of_job: u64, of_agent: Option<u64>| {
        (of_job > 0).then_some(of_job).into_iter().chain(of_agent).min()
    };
    Ok(S3Config {
        addressing,
        ca_certificates: repository.ca_certificates.clone(),
        limit_upload: limit(repository.limit_upload, config.given.limit_upload),
        limit_download: limit(repository.limit_download, config.given.limit_download),
        resolve: config.given.resolve.clone(),
        stop,
        ..plain
    })
}

/// The store of a repository, and the use of its part of the cache.
pub(super) struct Store<'a> {
    pub(super) objects: Arc<dyn ObjectStore>,
    _lease: CacheLease<'a>,
}

/// Opens the store of `repository`.
///
/// # Errors
/// When it cannot be reached, or refuses the key.
pub(super) fn open_store<'a>(
    config: &Config,
    repository: &v1::Repository,
    key: SharedKey,
    stop: Stop,
    used: &'a CacheUse,
) -> Result<Store<'a>> {
    let s3 = S3Config { patience: PATIENCE, ..s3_config(config, repository, key, stop)? };
    let cache = &config.given.cache;
    let lease = used.lease(cache, &s3.location());
    let objects = open_bucket(s3, Some(cache)).map_err(|error| opening(&error.into()))?;
    Ok(Store { objects, _lease: lease })
}

/// Tries whether the store of `repository` can be reached. Empty: it can; else why not. Without a key, a store that
/// refuses it was reached.
pub(super) fn probe(config: &Config, repository: &v1::Repository) -> String {
    let nobody = || v1::Credentials {
        access_key: "NOBODY".to_owned(),
        secret_key: "none".to_owned(),
        ..Default::default()
    };
    let given = repository.credentials.clone();
    let anonymous = given.is_none();
    let key = SharedKey::new(access_key(Some(&given.unwrap_or_else(nobody))));
    let tried = s3_config(config, repository, key, Stop::default()).and_then(|s3| {
        let s3 = S3Config { attempts: PROBE_ATTEMPTS, ..s3 };
        S3Store::open(s3).map_err(|error| opening(&error.into()))
    });
    let failed = tried.err().filter(|it| !(anonymous && it.kind == FailureKind::StoreDenied));
    failed.map(|failed| failed.message).unwrap_or_default()
}

fn unlock(repository: &v1::Repository) -> Result<Unlock> {
    if repository.passphrase.is_empty() {
        let message = format!("the passphrase of location '{}' is empty", repository.location);
        return Err(Failed::new(FailureKind::WrongPassphrase, message));
    }
    Ok(Unlock::Passphrase(repository.passphrase.clone()))
}

/// Opens a repository; before something is written to it, also tries out whether its store still does
/// what writers rely on.
///
/// # Errors
/// As [`opening`] sorts them.
pub(super) fn open(
    store: &Store<'_>,
    repository: &v1::Repository,
    to_write: bool,
) -> Result<(Arc<Repository>, Unlock)> {
    let unlock = unlock(repository)?;
    let opened = Repository::open(store.objects.clone(), &unlock);
    let opened = opened.map_err(|error| opening(&error))?;
    if to_write {
        opened.verify_register().map_err(|error| in_repository(&error))?;
    }
    Ok((Arc::new(opened), unlock))
}

/// Makes sure that a repository can be opened, with its passphrase alone.
///
/// # Errors
/// As [`open`]; `Invalid` when it is to be made where something else is.
pub(super) fn open_or_create(
    store: &Store<'_>,
    repository: &v1::Repository,
    work: &OpenRepository,
    now: jiff::Timestamp,
) -> Result<Opened> {
    let objects = &store.objects;
    let current = unlock(repository)?;
    let previous = &work.previous_passphrase;
    let previous = (!previous.is_empty() && *previous != repository.passphrase)
        .then(|| Unlock::Passphrase(previous.clone()));
    let (opened, created) = match (Repository::open(objects.clone(), &current), &previous) {
        (Err(error), _) if error.kind() == ErrorKind::NotFound && work.create => {
            create(objects, &current, now)?
        }
        (Err(error), Some(previous)) if error.kind() == ErrorKind::WrongKey => {
            // Whether the old one fits is what counts now.
            let opened =
                Repository::open(objects.clone(), previous).map_err(|_| opening(&error))?;
            let label = format!("location {}", repository.location);
            key_slot::add(&**objects, opened.keys(), &current, KdfCost::DEFAULT, &label, now)
                .map_err(|error| in_repository(&error))?;
            (opened, false)
        }
        (opened, _) => (opened.map_err(|error| opening(&error))?, false),
    };
    opened.verify_register().map_err(|error| in_repository(&error))?;
    let id = opened.keys().repository;
    let mut keys_removed = 0;
    if let Some(previous) = previous {
        let mut remove = || -> chunkstore::Result<()> {
            for slot in key_slot::opened_by(&**objects, id, &previous)? {
                match key_slot::remove(&**objects, slot) {
                    // Another agent does the same.
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    removed => removed?,
                }
                keys_removed += 1;
            }
            Ok(())
        };
        remove().map_err(|error| in_repository(&error))?;
    }
    let register = match opened.register() {
        Register::CreateIfAbsent => "create-if-absent",
        Register::TimeFenced => "time-fenced",
    };
    let repository_id = id.to_string();
    Ok(Opened { repository_id, created, register: register.to_owned(), keys_removed })
}

fn create(
    objects: &Arc<dyn ObjectStore>,
    unlock: &Unlock,
    now: jiff::Timestamp,
) -> Result<(Repository, bool)> {
    let other = other_object(&**objects).map_err(|error| in_repository(&error.into()))?;
    if let Some(other) = other {
        let message = format!(
            "there is no repository at '{}', and none is made there, because something else is \
             ('{other}'): remove it, or give the location another prefix",
            objects.location()
        );
        return Err(Failed::new(FailureKind::Invalid, message));
    }
    let chunker = ChunkerConfig::default();
    match Repository::create(objects.clone(), unlock, KdfCost::DEFAULT, chunker, now) {
        Ok(created) => Ok((created, true)),
        Err(error) => {
            // Another agent may have been first.
            let opened = Repository::open(objects.clone(), unlock);
            opened.map(|opened| (opened, false)).map_err(|_: Error| in_repository(&error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_the_cache_is_kept_while_any_job_uses_it() {
        let dir = tempfile::tempdir().unwrap();
        let cache = IndexCache { dir: dir.path().to_owned(), max_bytes: 0 };
        let used = CacheUse::default();
        let first = used.lease(&cache, "a");
        let folder = cache.folder("a");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("segment"), "x").unwrap();
        let second = used.lease(&cache, "a");
        drop(first);
        drop(used.lease(&cache, "b"));
        assert!(folder.exists());
        drop(second);
        drop(used.lease(&cache, "b"));
        assert!(!folder.exists());
    }
}
