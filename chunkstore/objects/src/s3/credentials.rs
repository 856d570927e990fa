//! Where the access key comes from, again and again: files may change while the program runs.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::future::ProvideCredentials as Provided;
use aws_credential_types::provider::{ProvideCredentials, Result};

/// How often a file is looked at for changes.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How long a request waits for another key when the store suddenly refuses one that somebody can
/// exchange: he may learn of it only now.
const EXCHANGE_WAIT: Duration = Duration::from_secs(60);

/// Where the access key comes from.
#[derive(Clone)]
pub enum CredentialSource {
    /// `AWS_ACCESS_KEY_ID` and its companions, or `HUAWEI_CLOUD_ACCESS_KEY_ID` and
    /// `HUAWEI_CLOUD_SECRET_ACCESS_KEY`; without them, `~/.aws/credentials`.
    Environment,
    /// A file: an AWS credentials file, of which the profile is taken, or lines of
    /// `HUAWEI_CLOUD_ACCESS_KEY_ID=…` and `HUAWEI_CLOUD_SECRET_ACCESS_KEY=…`.
    File {
        /// Its path.
        path: PathBuf,
        /// The profile of an AWS credentials file.
        profile: String,
    },
    /// The key itself.
    Fixed {
        /// Access key.
        key: String,
        /// Secret key.
        secret: String,
    },
    /// A key that somebody exchanges while stores use it.
    Shared(SharedKey),
}

/// An access key to a store.
#[derive(Clone, PartialEq, Eq)]
pub struct AccessKey {
    /// Access key.
    pub key: String,
    /// Secret key.
    pub secret: String,
    /// Of temporary keys.
    pub session_token: Option<String>,
}

impl AccessKey {
    /// Reads the text of a credentials file: an AWS one, of which the profile is taken, or lines of
    /// `HUAWEI_CLOUD_ACCESS_KEY_ID=…` and `HUAWEI_CLOUD_SECRET_ACCESS_KEY=…`.
    ///
    /// # Errors
    /// What it lacks, without secrets, as the rest of a sentence that begins with its name.
    pub fn parse(text: &str, profile: &str) -> std::result::Result<Self, String> {
        let (key, secret, session_token) = parse(text, profile)?;
        Ok(Self { key, secret, session_token })
    }
}

impl fmt::Debug for AccessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AccessKey(…)")
    }
}

/// An access key that can be exchanged; copies are the same one.
#[derive(Debug, Clone)]
pub struct SharedKey(Arc<Mutex<AccessKey>>);

impl SharedKey {
    /// Begins with `key`.
    pub fn new(key: AccessKey) -> Self {
        Self(Arc::new(Mutex::new(key)))
    }

    /// From the next request on, all stores that were given a copy use `key`.
    pub fn exchange(&self, key: AccessKey) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = key;
    }

    fn get(&self) -> AccessKey {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl fmt::Debug for CredentialSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Environment => f.write_str("Environment"),
            Self::File { path, profile } => {
                f.debug_struct("File").field("path", path).field("profile", profile).finish()
            }
            Self::Fixed { .. } => f.write_str("Fixed(…)"),
            Self::Shared(_) => f.write_str("Shared(…)"),
        }
    }
}

/// Gives out the key, and looks whether its file has changed.
pub(super) struct Provider {
    source: CredentialSource,
    cached: Mutex<Option<Cached>>,
    /// Counts the keys that were given out one after the other.
    generation: AtomicU64,
}

struct Cached {
    credentials: Credentials,
    /// What told the file from another one.
    state: Option<FileState>,
    looked: Instant,
}

type FileState = (PathBuf, SystemTime, u64);

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Provider").field("source", &self.source).finish_non_exhaustive()
    }
}

impl Provider {
    pub(super) fn new(source: CredentialSource) -> Self {
        Self { source, cached: Mutex::default(), generation: AtomicU64::new(0) }
    }

    /// Tells the key that is given out now from earlier and later ones.
    pub(super) fn generation(&self) -> u64 {
        // Whether there is one is told to whoever needs it.
        let _given_out = self.get();
        self.generation.load(Ordering::SeqCst)
    }

    /// How long it is worth to wait for another key, if the one given out has worked before.
    pub(super) fn patience(&self) -> Duration {
        match self.source {
            CredentialSource::Shared(_) => EXCHANGE_WAIT,
            _ => Duration::ZERO,
        }
    }

    /// The key as it is now.
    ///
    /// # Errors
    /// What is missing, without secrets.
    pub(super) fn get(&self) -> std::result::Result<Credentials, String> {
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        let exchangeable = matches!(self.source, CredentialSource::Shared(_));
        if let Some(known) = cached.as_mut().filter(|_| !exchangeable) {
            let Some(state) = &known.state else {
                return Ok(known.credentials.clone());
            };
            if known.looked.elapsed() < LOOK_EVERY {
                return Ok(known.credentials.clone());
            }
            known.looked = Instant::now();
            if file_state(&state.0).as_ref() == Some(state) {
                return Ok(known.credentials.clone());
            }
        }
        let read = self.read();
        match (read, cached.as_mut()) {
            (Ok((credentials, state)), _) => {
                self.give_out(&mut cached, credentials.clone(), state);
                Ok(credentials)
            }
            // The file is just being exchanged: the old key may still do.
            (Err(_), Some(known)) => Ok(known.credentials.clone()),
            (Err(error), None) => Err(error),
        }
    }

    /// After the store refused the key of `generation`: looks at the file now. Answers whether there is
    /// another key.
    pub(super) fn refresh(&self, generation: u64) -> bool {
        if let Ok((credentials, state)) = self.read() {
            let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
            self.give_out(&mut cached, credentials, state);
        }
        // Another request may have noticed before.
        self.generation.load(Ordering::SeqCst) != generation
    }

    fn give_out(
        &self,
        cached: &mut Option<Cached>,
        credentials: Credentials,
        state: Option<FileState>,
    ) {
        let changed = cached.as_ref().is_some_and(|known| {
            let known = &known.credentials;
            known.access_key_id() != credentials.access_key_id()
                || known.secret_access_key() != credentials.secret_access_key()
                || known.session_token() != credentials.session_token()
        });
        if changed {
            self.generation.fetch_add(1, Ordering::SeqCst);
        }
        *cached = Some(Cached { credentials, state, looked: Instant::now() });
    }

    fn read(&self) -> std::result::Result<(Credentials, Option<FileState>), String> {
        match &self.source {
            CredentialSource::Fixed { key, secret } => Ok((credentials(key, secret, None), None)),
            CredentialSource::Shared(shared) => {
                let AccessKey { key, secret, session_token } = shared.get();
                Ok((credentials(&key, &secret, session_token), None))
            }
            CredentialSource::File { path, profile } => read_file(path, profile),
            CredentialSource::Environment => {
                let var = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
                let pair = |key, secret| Some((var(key)?, var(secret)?));
                if let Some((key, secret)) = pair("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") {
                    return Ok((credentials(&key, &secret, var("AWS_SESSION_TOKEN")), None));
                }
                let huawei = pair("HUAWEI_CLOUD_ACCESS_KEY_ID", "HUAWEI_CLOUD_SECRET_ACCESS_KEY");
                if let Some((key, secret)) = huawei {
                    return Ok((credentials(&key, &secret, None), None));
                }
                let file = var("AWS_SHARED_CREDENTIALS_FILE")
                    .map(PathBuf::from)
                    .or_else(|| var("HOME").map(|home| Path::new(&home).join(".aws/credentials")));
                let profile = var("AWS_PROFILE").unwrap_or_else(|| "default".to_owned());
                match file.filter(|file| file.exists()) {
                    Some(file) => read_file(&file, &profile),
                    None => Err("no access key was given: set AWS_ACCESS_KEY_ID and \
                                 AWS_SECRET_ACCESS_KEY, or name a credentials file"
                        .to_owned()),
                }
            }
        }
    }
}

impl ProvideCredentials for Provider {
    fn provide_credentials<'a>(&'a self) -> Provided<'a>
    where
        Self: 'a,
    {
        let result: Result = self.get().map_err(CredentialsError::not_loaded);
        Provided::ready(result)
    }
}

fn credentials(key: &str, secret: &str, token: Option<String>) -> Credentials {
    Credentials::new(key, secret, token, None, "ebackup")
}

fn file_state(path: &Path) -> Option<FileState> {
    let meta = std::fs::metadata(path).ok()?;
    Some((path.to_owned(), meta.modified().ok()?, meta.len()))
}

fn read_file(
    path: &Path,
    profile: &str,
) -> std::result::Result<(Credentials, Option<FileState>), String> {
    // Its state first: a change in between is then noticed at the next look.
    let state = file_state(path);
    let text = std::fs::read_to_string(path).map_err(|error| {
        format!("cannot read the credentials file '{}': {error}", path.display())
    })?;
    let found = parse(&text, profile);
    let (key, secret, token) =
        found.map_err(|why| format!("the credentials file '{}' {why}", path.display()))?;
    Ok((credentials(&key, &secret, token), state))
}

type Found = (String, String, Option<String>);

/// Reads either kind of file: assignments in sections (AWS) or without any (e-backup).
fn parse(text: &str, profile: &str) -> std::result::Result<Found, String> {
    let mut section: Option<String> = None;
    let (mut key, mut secret, mut token) = (None, None, None);
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = Some(name.trim().trim_start_matches("profile ").to_owned());
            continue;
        }
        if section.as_ref().is_some_and(|section| section != profile) {
            continue;
        }
        let Some((name, value)) = line.split_once('=') else {
            continue;
        };
        let value = value.trim().trim_matches(['"', '\'']).to_owned();
        let name = name.trim().trim_start_matches("export ").to_ascii_lowercase();
        match name.as_str() {
            "aws_access_key_id" | "huawei_cloud_access_key_id" | "obs_access_key" => {
                key = Some(value);
            }
            "aws_secret_access_key" | "huawei_cloud_secret_access_key" | "obs_secret_key" => {
                secret = Some(value);
            }
            "aws_session_token" => token = Some(value),
            _ => {}
        }
    }
    let given = |value: &Option<String>| value.as_ref().is_some_and(|value| !value.is_empty());
    match (key.clone().filter(|_| given(&key)), secret.clone().filter(|_| given(&secret))) {
        (Some(key), Some(secret)) => Ok((key, secret, token)),
        (None, _) => Err(format!(
            "has no access key (HUAWEI_CLOUD_ACCESS_KEY_ID=…, or aws_access_key_id in the profile \
             '{profile}')"
        )),
        (_, None) => Err("has an access key, but no secret key".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_every_kind_are_understood() {
        let table = [
            ("HUAWEI_CLOUD_ACCESS_KEY_ID=a\nHUAWEI_CLOUD_SECRET_ACCESS_KEY=b\n", "default"),
            ("export OBS_ACCESS_KEY='a'\r\nOBS_SECRET_KEY=\"b\"", "x"),
            ("[default]\naws_access_key_id = a\naws_secret_access_key=b", "default"),
            (
                "[other]\naws_access_key_id=x\naws_secret_access_key=y\n# c\n[ p ]\n\
                 aws_access_key_id=a\naws_secret_access_key=b",
                "p",
            ),
        ];
        for (text, profile) in table {
            let (key, secret, token) = parse(text, profile).unwrap();
            assert_eq!((&*key, &*secret, token), ("a", "b", None), "{text}");
        }
        let token = "[p]\naws_access_key_id=a\naws_secret_access_key=b\naws_session_token=t=";
        assert_eq!(parse(token, "p").unwrap().2.as_deref(), Some("t="));
        for (text, part) in [("", "no access key"), ("OBS_ACCESS_KEY=a", "no secret key")] {
            assert!(parse(text, "default").unwrap_err().contains(part), "{text}");
        }
        assert!(parse("[q]\naws_access_key_id=a", "p").unwrap_err().contains("'p'"));
    }

    #[test]
    fn a_file_that_changes_is_read_again_and_one_that_vanishes_is_not_missed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cloud");
        std::fs::write(&path, "OBS_ACCESS_KEY=a\nOBS_SECRET_KEY=b").unwrap();
        let source = CredentialSource::File { path: path.clone(), profile: "default".into() };
        let provider = Provider::new(source);
        assert_eq!(provider.get().unwrap().access_key_id(), "a");
        let first = provider.generation();
        assert!(!provider.refresh(first));
        std::fs::write(&path, "OBS_ACCESS_KEY=second\nOBS_SECRET_KEY=b").unwrap();
        assert!(provider.refresh(first));
        assert!(provider.refresh(first), "another request that used the first one is told, too");
        assert_eq!(provider.get().unwrap().access_key_id(), "second");
        std::fs::remove_file(&path).unwrap();
        assert!(!provider.refresh(provider.generation()));
        assert_eq!(provider.get().unwrap().access_key_id(), "second");
        let text = format!("{provider:?}");
        assert!(text.contains("cloud") && !text.contains("second"), "{text}");
    }

    #[test]
    fn an_exchanged_key_is_used_from_then_on() {
        let key = |key: &str| AccessKey {
            key: key.to_owned(),
            secret: "hidden".to_owned(),
            session_token: Some("hidden".to_owned()),
        };
        let shared = SharedKey::new(key("first"));
        let provider = Provider::new(CredentialSource::Shared(shared.clone()));
        assert_eq!(provider.get().unwrap().access_key_id(), "first");
        let first = provider.generation();
        assert!(!provider.refresh(first) && !provider.patience().is_zero());
        shared.exchange(key("second"));
        assert_eq!(provider.get().unwrap().access_key_id(), "second");
        assert!(provider.refresh(first), "a request that was sent with the first one is repeated");
        shared.exchange(key("third"));
        let third = provider.generation();
        assert!(!provider.refresh(third), "a request that is sent from now on has the third");
        let text = format!("{provider:?} {shared:?}");
        assert!(!text.contains("hidden"), "{text}");
    }
}
