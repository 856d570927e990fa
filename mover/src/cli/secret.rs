//! Finding the repository and the secret that opens it.
//!
//! A key file is text: a line that says what it is, then 64 hexadecimal digits. Without any other
//! secret, the one that `init` made for the repository is used: `ebackup/keys/<repository>.key` below
//! the user's configuration folder.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use chunkstore::codec::seal::Secret;
use chunkstore::id::RepositoryId;
use chunkstore::key_slot::{Unlock, hex, unhex};
use chunkstore::repository::Repository;
use objects::ObjectStore;
use objects::local::LocalStore;
use objects::s3::{Addressing, CredentialSource, S3Config};
use rustix::fs::{Access, access};

use super::args::{self, Global};
use super::{UsageError, output};
use crate::backup::{MEMORY_BYTES_MIN, Resources};
use crate::repository::{self, IndexCache, other_object};

/// First words of a key file.
const KEY_FILE_TITLE: &str = "ebackup key file";

/// Memory the program may use unless told otherwise.
const MEMORY_BYTES_DEFAULT: u64 = 256 << 20;
/// What the user gave to open the repository with.
pub(super) enum Given {
    /// A password or key file.
    Unlock(Unlock),
    /// Nothing: use the key file made by `init`.
    Default,
}

/// Reads the secret named on the command line or in the environment.
///
/// # Errors
/// When a file cannot be read, or holds no secret.
pub(super) fn given(global: &Global) -> Result<Given> {
    if let Some(path) = &global.password_file {
        return Ok(Given::Unlock(Unlock::Passphrase(read_password(global, path)?)));
    }
    if let Some(path) = &global.key_file {
        return Ok(Given::Unlock(Unlock::KeyFile(read_key_file(global, path)?)));
    }
    match std::env::var_os(global.password_variable) {
        Some(password) if password.is_empty() => {
            bail!("{} is set, but empty", global.password_variable)
        }
        Some(password) => Ok(Given::Unlock(Unlock::Passphrase(password.into_encoded_bytes()))),
        None => Ok(Given::Default),
    }
}

/// Opens the repository named on the command line.
///
/// # Errors
/// When there is none, or the secret does not fit.
pub(super) fn open(global: &Global) -> Result<Arc<Repository>> {
    let store = store(global)?;
    global.opened.add(store.clone());
    let unlock = unlock(global, Repository::identify(&*store)?)?;
    Ok(Arc::new(Repository::open(store, &unlock)?))
}

/// Opens the repository named on the command line, after trying out whether its store still does what
/// writers rely on.
///
/// # Errors
/// As [`open`], and when it does not.
pub(super) fn open_to_write(global: &Global) -> Result<Arc<Repository>> {
    let repository = open(global)?;
    // A folder cannot turn into another kind of store unnoticed.
    if repository.store().traffic().is_some() {
        repository.verify_register()?;
    }
    Ok(repository)
}

/// What opens repository `id`, given or found.
///
/// # Errors
/// When nothing was given and there is no key file for the repository.
pub(super) fn unlock(global: &Global, id: RepositoryId) -> Result<Unlock> {
    match given(global)? {
        Given::Unlock(unlock) => Ok(unlock),
        Given::Default => {
            let path = default_key_file(id)?;
            if !path.exists() {
                bail!(
                    "no secret was given, and there is no key file '{}' for this repository; give \
                     --password-file, EBACKUP_PASSWORD or --key-file",
                    path.display()
                );
            }
            Ok(Unlock::KeyFile(read_key_file(global, &path)?))
        }
    }
}

/// Where a repository is.
pub(super) enum Place {
    Folder(PathBuf),
    /// A URL.
    Bucket(String),
}

/// The store of the repository named on the command line.
///
/// # Errors
/// When none is named, or it does not exist.
pub(super) fn store(global: &Global) -> Result<Arc<dyn ObjectStore>> {
    match place(global.repo.as_deref())? {
        Place::Bucket(url) => open_bucket(&url, &global.s3),
        Place::Folder(path) if !path.exists() => {
            bail!("there is no repository at '{}': make one with 'ebackup init'", path.display())
        }
        Place::Folder(path) => {
            let store = LocalStore::open(&path);
            Ok(Arc::new(store.with_context(|| cannot_open(&path))?))
        }
    }
}

/// The store for a new repository: its folder is made if need be, and must be empty.
///
/// # Errors
/// When the folder cannot be made, or holds something else.
pub(super) fn new_store(global: &Global) -> Result<Arc<dyn ObjectStore>> {
    let (store, place): (Arc<dyn ObjectStore>, String) = match place(global.repo.as_deref())? {
        Place::Bucket(url) => (open_bucket(&url, &global.s3)?, url),
        Place::Folder(path) => {
            LocalStore::create_root(&path).with_context(|| cannot_open(&path))?;
            let store = LocalStore::open(&path).with_context(|| cannot_open(&path))?;
            if store.stat(chunkstore::record::CONFIG).is_err() {
                refuse_other_files(&path)?;
            }
            return Ok(Arc::new(store));
        }
    };
    match other_object(&*store)? {
        Some(other) => bail!(
            "'{place}' is no repository and not empty (it holds '{other}'): give another prefix"
        ),
        None => Ok(store),
    }
}

fn refuse_other_files(path: &Path) -> Result<()> {
    for name in fs::read_dir(path).with_context(|| cannot_open(path))? {
        let name = name.with_context(|| cannot_open(path))?.file_name();
        // What an interrupted 'init' leaves, and what every new file system has.
        if name != "keys" && name != "probes" && name != "lost+found" {
            bail!(
                "'{}' is no repository and not empty (it holds '{}'): give an empty folder",
                path.display(),
                name.display()
            );
        }
    }
    Ok(())
}

/// Tells folders from URLs.
///
/// # Errors
/// When there is nothing, or another kind of URL.
pub(super) fn place(repo: Option<&str>) -> Result<Place> {
    match repo {
        None | Some("") => {
            let message = "which repository? Give --repo DIR or --repo s3://bucket/prefix, or set \
                           EBACKUP_REPO"
                .to_owned();
            Err(UsageError(message).into())
        }
        Some(url) if url.starts_with("s3://") || url.starts_with("obs://") => {
            Ok(Place::Bucket(url.to_owned()))
        }
        Some(url) if url.contains("://") => {
            let message = format!("'{url}' is neither a folder nor s3://bucket/prefix");
            Err(UsageError(message).into())
        }
        Some(path) => Ok(Place::Folder(PathBuf::from(path))),
    }
}

fn open_bucket(url: &str, options: &args::S3) -> Result<Arc<dyn ObjectStore>> {
    let credentials = match &options.credentials_file {
        Some(path) => {
            CredentialSource::File { path: path.clone(), profile: options.profile.clone() }
        }
        None => CredentialSource::Environment,
    };
    let config =
        S3Config::new(url, options.endpoint.as_deref(), options.region.as_deref(), credentials)?;
    let addressing = if options.path_style { Addressing::Path } else { Addressing::Auto };
    let config = S3Config {
        addressing,
        ca_file: options.ca_file.clone(),
        content_md5: options.content_md5,
        limit_upload: options.limit_upload,
        limit_download: options.limit_download,
        resolve: options.resolve.clone(),
        ..config
    };
    let cache = cache_dir(options).filter(|_| !options.no_cache);
    if cache.is_none() && !options.no_cache {
        output::note(
            "note: the index is read from the bucket piece by piece, which takes many requests: there is no \
             folder for copies of it, as neither XDG_CACHE_HOME nor HOME is set; give --cache-dir, or \
             --no-cache to be content with that",
        );
    }
    let cache = cache.map(|dir| IndexCache { dir, max_bytes: options.cache_size });
    repository::open_bucket(config, cache.as_ref())
        .with_context(|| format!("cannot use '{url}' as a repository"))
}

/// Where index segments are kept: given, or in the user's folder for caches.
pub(super) fn cache_dir(options: &args::S3) -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    options.cache_dir.clone().or_else(|| {
        let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        cache.map(|cache| cache.join("ebackup"))
    })
}

fn cannot_open(path: &Path) -> String {
    format!("cannot use '{}' as a repository", path.display())
}

/// Where the key file made by `init` is kept.
///
/// # Errors
/// When the user has no configuration folder.
pub(super) fn default_key_file(id: RepositoryId) -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let config = set("XDG_CONFIG_HOME").or_else(|| set("HOME").map(|home| home.join(".config")));
    let config = config.context("neither XDG_CONFIG_HOME nor HOME is set: give a secret")?;
    Ok(config.join("ebackup/keys").join(format!("{id}.key")))
}

/// The password in the first line of a file.
///
/// # Errors
/// When the file cannot be read, or the line is empty.
pub(super) fn read_password(global: &Global, path: &Path) -> Result<Vec<u8>> {
    let text = global
        .secrets
        .read(path)
        .with_context(|| format!("cannot read the password file '{}'", path.display()))?;
    let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.is_empty() {
        bail!("the first line of the password file '{}' is empty", path.display());
    }
    Ok(line.to_vec())
}

/// The secret in a key file.
///
/// # Errors
/// When the file cannot be read, or is no key file.
fn read_key_file(global: &Global, path: &Path) -> Result<Secret> {
    let text = global
        .secrets
        .read(path)
        .with_context(|| format!("cannot read the key file '{}'", path.display()))?;
    let text = String::from_utf8_lossy(&text);
    let mut lines = text.lines();
    let titled = lines.next().is_some_and(|line| line.starts_with(KEY_FILE_TITLE));
    let key = lines.next().filter(|_| titled).and_then(|line| unhex(line.trim()));
    let key = key.and_then(|key| key.try_into().ok());
    key.map(Secret).with_context(|| format!("'{}' is not a key file of ebackup", path.display()))
}

/// Writes a new key file, readable by its owner alone, durably.
///
/// # Errors
/// When it exists or cannot be written.
pub(super) fn write_key_file(path: &Path, secret: &Secret, comment: &str) -> Result<()> {
    let cannot = || format!("cannot write the key file '{}'", path.display());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(cannot)?;
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(cannot)?;
    writeln!(file, "{KEY_FILE_TITLE} {comment}\n{}", hex(&secret.0)).with_context(cannot)?;
    file.sync_all().with_context(cannot)?;
    fs::File::open(folder).and_then(|folder| folder.sync_all()).with_context(cannot)
}

/// Memory and threads, from the command line, the control group and the machine.
///
/// # Errors
/// When less memory is asked for than the program can work in.
pub(super) fn resources(global: &Global) -> Result<Resources> {
    let given = crate::cgroup::memory_bytes().map(|limit| limit / 4 * 3);
    let memory = global.memory.unwrap_or_else(|| {
        given.map_or(MEMORY_BYTES_DEFAULT, |limit| limit.min(MEMORY_BYTES_DEFAULT))
    });
    if memory < MEMORY_BYTES_MIN {
        bail!(
            "{} MiB of memory are too few, 96 MiB are the least: raise the memory limit of the \
             control group to 128 MiB, or force it with --memory",
            memory >> 20
        );
    }
    Ok(Resources::new(memory, crate::cgroup::cpus()))
}

/// A folder for temporary files without a name: the one that the environment names, or another of the
/// system where that cannot be used.
pub(super) fn scratch() -> PathBuf {
    let named = std::env::temp_dir();
    let is_usable = |folder: &Path| access(folder, Access::WRITE_OK | Access::EXEC_OK).is_ok();
    if is_usable(&named) {
        return named;
    }
    match ["/tmp", "/var/tmp"].map(PathBuf::from).into_iter().find(|folder| is_usable(folder)) {
        Some(usable) => {
            let (named, usable_text) = (named.display(), usable.display());
            output::note(format_args!(
                "note: '{named}' (TMPDIR) cannot be used for temporary files; '{usable_text}' is used"
            ));
            usable
        }
        // Most work needs none; what does says that it has none.
        None => named,
    }
}
