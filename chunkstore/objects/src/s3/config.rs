//! What tells one S3 store from another, validated before anything is sent.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::credentials::CredentialSource;
use crate::{Error, ErrorKind, Result};

/// Where the bucket's name goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Addressing {
    /// Into the host name; into the path where the endpoint is an IP address or `localhost`.
    #[default]
    Auto,
    /// `https://bucket.endpoint/key`. OBS accepts nothing else.
    VirtualHost,
    /// `https://endpoint/bucket/key`.
    Path,
}

/// An S3 store and how to speak to it.
#[derive(Debug, Clone)]
pub struct S3Config {
    /// The bucket.
    pub bucket: String,
    /// Folder in the bucket, ending in `/`, or empty.
    pub prefix: String,
    /// Scheme and host, `https://obs.cn-north-4.myhuaweicloud.com`; `None` for AWS.
    pub endpoint: Option<String>,
    /// Name of the region, as it enters signatures.
    pub region: String,
    /// Where the bucket's name goes.
    pub addressing: Addressing,
    /// Where the access key comes from.
    pub credentials: CredentialSource,
    /// Certificates (PEM) to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Further such certificates, themselves rather than in a file; may be empty.
    pub ca_certificates: Vec<u8>,
    /// Whether the store verifies what it receives against its MD5. Costs 1.5 seconds of CPU a GiB.
    /// `None`: only where the connection itself does not, without TLS.
    pub content_md5: Option<bool>,
    /// Bytes a second, all uploads together.
    pub limit_upload: Option<u64>,
    /// Bytes a second, all downloads together.
    pub limit_download: Option<u64>,
    /// Tries of a request before it fails, at least.
    pub attempts: u32,
    /// How long a request is tried again, at least, while what hinders it may pass.
    pub patience: Duration,
    /// How long a request may get no answer, or an upload not get on, before it counts as failed.
    pub answer_within: Duration,
    /// Host names with an address of their own, as in `curl --resolve`; subdomains included.
    pub resolve: Vec<(String, IpAddr)>,
    /// Ends requests that are under way.
    pub stop: Stop,
}

/// Makes all requests of a store fail, those under way included: for a program that must not wait for
/// a store that does not answer. Copies are the same one.
#[derive(Debug, Clone)]
pub struct Stop(Arc<watch::Sender<bool>>);

impl Default for Stop {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }
}

impl Stop {
    /// Stops. Whether a write that was under way took effect is not known.
    pub fn stop(&self) {
        self.0.send_replace(true);
    }

    /// Waits for that.
    pub(super) async fn stopped(&self) {
        // It fails only without a sender, which is here.
        let mut changes = self.0.subscribe();
        let _stopped = changes.wait_for(|stopped| *stopped).await.is_ok();
    }
}

fn invalid(what: &str, why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, "use", what).because(why.into())
}

impl S3Config {
    /// Splits `s3://bucket/prefix` (or `obs://…`) into bucket and prefix.
    ///
    /// # Errors
    /// `Invalid` when it is none.
    pub fn split_url(url: &str) -> Result<(String, String)> {
        let rest = url.strip_prefix("s3://").or_else(|| url.strip_prefix("obs://"));
        let rest = rest.ok_or_else(|| invalid(url, "it does not begin with s3:// or obs://"))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
        if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(is_name) {
            let why = "a bucket's name has 3 to 63 letters, digits, dots and hyphens: \
                       s3://bucket/prefix, and the host goes into --endpoint";
            return Err(invalid(url, why));
        }
        let prefix = prefix.trim_matches('/');
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        if prefix.contains("//") || prefix.len() > 400 {
            return Err(invalid(url, "the prefix has an empty part, or more than 400 characters"));
        }
        Ok((bucket.to_owned(), prefix))
    }

    /// The configuration of a store, as far as it follows from URL, endpoint and region.
    ///
    /// # Errors
    /// `Invalid`, with what to change.
    pub fn new(
        url: &str,
        endpoint: Option<&str>,
        region: Option<&str>,
        credentials: CredentialSource,
    ) -> Result<Self> {
        let (bucket, prefix) = Self::split_url(url)?;
        let endpoint = endpoint.map(|endpoint| with_scheme(endpoint, &bucket)).transpose()?;
        let host = endpoint.as_deref().map(host_of);
        let region = match (region, host) {
            (Some(region), _) => region.to_owned(),
            (None, Some(host)) => region_of(host).unwrap_or("us-east-1").to_owned(),
            (None, None) => {
                let why = "give --endpoint, or --region for AWS";
                return Err(invalid(url, why));
            }
        };
        Ok(Self {
            bucket,
            prefix,
            endpoint,
            region,
            addressing: Addressing::Auto,
            credentials,
            ca_file: None,
            ca_certificates: Vec::new(),
            content_md5: None,
            limit_upload: None,
            limit_download: None,
            attempts: 10,
            patience: Duration::ZERO,
            answer_within: Duration::from_secs(60),
            resolve: Vec::new(),
            stop: Stop::default(),
        })
    }

    /// Whether the bucket's name goes into the path.
    pub(super) fn path_style(&self) -> bool {
        match self.addressing {
            Addressing::Path => true,
            Addressing::VirtualHost => false,
            Addressing::Auto => self.endpoint.as_deref().is_some_and(|endpoint| {
                let host = host_of(endpoint);
                let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
                name == "localhost"
                    || host.parse::<IpAddr>().is_ok()
                    || host.parse::<SocketAddr>().is_ok()
                    || name.parse::<IpAddr>().is_ok()
            }),
        }
    }

    /// Whether bodies are sent with their MD5.
    pub(super) fn sends_md5(&self) -> bool {
        let plain = self.endpoint.as_deref().is_some_and(|url| url.starts_with("http://"));
        self.content_md5.unwrap_or(plain)
    }

    /// URL for people.
    pub fn location(&self) -> String {
        let host = self.endpoint.as_deref().unwrap_or("AWS");
        format!("s3://{}/{} at {host}", self.bucket, self.prefix)
    }
}

fn with_scheme(endpoint: &str, bucket: &str) -> Result<String> {
    let endpoint = endpoint.trim_end_matches('/');
    let url = match endpoint.split_once("://") {
        None => format!("https://{endpoint}"),
        Some(("http" | "https", _)) => endpoint.to_owned(),
        Some(_) => return Err(invalid(endpoint, "an endpoint begins with https:// or http://")),
    };
    let host = host_of(&url);
    if host.is_empty() || host.contains(['/', '?', '#', '@', ' ']) {
        return Err(invalid(endpoint, "an endpoint is a scheme and a host, and perhaps a port"));
    }
    if host.starts_with(&format!("{bucket}.")) {
        let why = "the endpoint must not begin with the bucket's name: it is put there when needed";
        return Err(invalid(endpoint, why));
    }
    Ok(url)
}

fn host_of(url: &str) -> &str {
    url.split_once("://").map_or(url, |(_, host)| host)
}

/// The region in the host names of OBS and AWS: `obs.{region}.…`, `s3.{region}.amazonaws.com`.
fn region_of(host: &str) -> Option<&str> {
    let mut labels = host.split('.');
    let service = labels.next()?;
    let region = labels.next()?;
    let rest: Vec<_> = labels.collect();
    let known = matches!(service, "obs" | "s3" | "oss" | "obsv3") && rest.len() >= 2;
    known.then_some(region)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(url: &str, endpoint: Option<&str>, region: Option<&str>) -> Result<S3Config> {
        S3Config::new(url, endpoint, region, CredentialSource::Environment)
    }

    #[test]
    fn what_follows_from_an_obs_endpoint_is_found() {
        let table = [
            ("obs.cn-north-4.myhuaweicloud.com", "cn-north-4"),
            ("https://obs.eu-west-101.myhuaweicloud.eu/", "eu-west-101"),
            ("obs.eu-de.otc.t-systems.com", "eu-de"),
            ("obs.ru-moscow-1.hc.sbercloud.ru", "ru-moscow-1"),
            ("s3.eu-central-1.amazonaws.com", "eu-central-1"),
        ];
        for (endpoint, region) in table {
            let config = config("obs://bucket/a/b/", Some(endpoint), None).unwrap();
            assert_eq!(config.region, region, "{endpoint}");
            assert_eq!((&*config.bucket, &*config.prefix), ("bucket", "a/b/"));
            assert!(config.endpoint.as_ref().unwrap().starts_with("https://"));
            assert!(!config.path_style() && !config.sends_md5(), "{endpoint}");
        }
        let own = config("s3://bucket", Some("http://127.0.0.1:9000"), None).unwrap();
        assert!(own.path_style() && own.sends_md5());
        assert_eq!((&*own.prefix, &*own.region), ("", "us-east-1"));
        assert!(config("s3://bucket", Some("http://localhost:1"), None).unwrap().path_style());
        assert!(!config("s3://bucket", Some("http://s3.test:1"), None).unwrap().path_style());
        assert!(own.location().starts_with("s3://bucket/ at http://127"));
    }

    #[test]
    fn what_cannot_work_is_refused_with_what_to_change() {
        let table = [
            ("http://x/y", None, "s3://"),
            ("s3://", None, "3 to 63"),
            ("s3://Üml/x", None, "3 to 63"),
            ("s3://bucket/a//b", None, "empty part"),
            ("s3://bucket", None, "--endpoint"),
            ("s3://bucket", Some("ftp://x"), "https://"),
            ("s3://bucket", Some("https://host/path"), "scheme and a host"),
            ("s3://bucket", Some("bucket.obs.cn-north-4.myhuaweicloud.com"), "bucket's name"),
        ];
        for (url, endpoint, part) in table {
            let error = config(url, endpoint, None).unwrap_err();
            let why = std::error::Error::source(&error).unwrap().to_string();
            assert!(why.contains(part), "{url} {endpoint:?}: {why}");
        }
    }
}
