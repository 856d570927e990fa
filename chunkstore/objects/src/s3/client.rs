//! The SDK's client, set up so that OBS and other S3 stores understand it.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, ConfigBag, IdentityCache, Intercept, Region, RequestChecksumCalculation,
    ResponseChecksumValidation, RuntimeComponents, SharedHttpClient, StalledStreamProtectionConfig,
};
use aws_smithy_http_client::tls::{
    Provider as TlsProvider, TlsContext, TrustStore, rustls_provider,
};
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::dns::{DnsFuture, ResolveDns, ResolveDnsError};
use aws_smithy_runtime_api::client::interceptors::context::{
    BeforeDeserializationInterceptorContextRef, BeforeTransmitInterceptorContextMut,
};
use md5::{Digest, Md5};

use super::config::S3Config;
use super::credentials::Provider;
use crate::{Error, ErrorKind, Result};

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);

pub(super) fn client(config: &S3Config, credentials: Arc<Provider>) -> Result<Client> {
    let timeouts =
        TimeoutConfig::builder().connect_timeout(CONNECT).read_timeout(config.answer_within);
    let mut builder = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(config.region.clone()))
        .credentials_provider(aws_credential_types::provider::SharedCredentialsProvider::from(
            credentials as Arc<dyn aws_credential_types::provider::ProvideCredentials>,
        ))
        // The provider notices rotated keys; a cache would not.
        .identity_cache(IdentityCache::no_cache())
        .force_path_style(config.path_style())
        // OBS, Ceph and others refuse the SDK's default: checksums in chunked trailers.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        // Retries are ours: they know whether an attempt may have taken effect, and count.
        .retry_config(RetryConfig::disabled())
        .disable_clock_skew_correction(true)
        .disable_s3_express_session_auth(true)
        .timeout_config(timeouts.build())
        // A limit on bandwidth may stall an upload on purpose; whoever lends its body watches it.
        .stalled_stream_protection(
            StalledStreamProtectionConfig::enabled().upload_enabled(false).build(),
        )
        .http_client(http_client(config)?);
    if let Some(endpoint) = &config.endpoint {
        builder = builder.endpoint_url(endpoint);
    }
    Ok(Client::from_conf(builder.build()))
}

/// The configuration of an upload whose body is lent. The client's time for an answer runs from the
/// request's first byte, so that no upload could take longer: the lender takes the time instead.
pub(super) fn without_timeout() -> aws_sdk_s3::config::Builder {
    let timeouts = TimeoutConfig::builder().connect_timeout(CONNECT).disable_read_timeout();
    aws_sdk_s3::Config::builder().timeout_config(timeouts.build())
}

fn http_client(config: &S3Config) -> Result<SharedHttpClient> {
    let mut trust = TrustStore::default();
    if let Some(path) = &config.ca_file {
        let name = path.display().to_string();
        let pem = std::fs::read(path).map_err(|error| unusable(&name, error.to_string()))?;
        trust = trust.with_pem_certificate(certificates(&name, pem)?);
    }
    if !config.ca_certificates.is_empty() {
        let pem = certificates("the configuration", config.ca_certificates.clone())?;
        trust = trust.with_pem_certificate(pem);
    }
    let tls = TlsContext::builder().with_trust_store(trust).build().map_err(|error| {
        Error::new(ErrorKind::Invalid, "set up", "TLS").because(error.to_string())
    })?;
    let builder = aws_smithy_http_client::Builder::new()
        .tls_provider(TlsProvider::Rustls(rustls_provider::CryptoMode::AwsLc))
        .tls_context(tls);
    Ok(if config.resolve.is_empty() {
        builder.build_https()
    } else {
        builder.build_with_resolver(Overrides(config.resolve.clone()))
    })
}

fn certificates(name: &str, pem: Vec<u8>) -> Result<Vec<u8>> {
    if pem.windows(11).any(|window| window == b"-----BEGIN ") {
        Ok(pem)
    } else {
        Err(unusable(name, "it holds no certificate in PEM form".to_owned()))
    }
}

fn unusable(name: &str, why: String) -> Error {
    Error::new(ErrorKind::Invalid, "use the certificates in", name).because(why)
}

/// Resolves some names to given addresses, and the others as usual.
#[derive(Debug, Clone)]
struct Overrides(Vec<(String, IpAddr)>);

impl ResolveDns for Overrides {
    fn resolve_dns<'a>(&'a self, name: &'a str) -> DnsFuture<'a> {
        let below = |domain: &str| {
            name.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        if let Some((_, address)) = self.0.iter().find(|(domain, _)| below(domain)) {
            return DnsFuture::ready(Ok(vec![*address]));
        }
        DnsFuture::new(async move {
            let found = tokio::net::lookup_host((name, 0)).await.map_err(ResolveDnsError::new)?;
            Ok(found.map(|address| address.ip()).collect())
        })
    }
}

/// Gives a request whose body is in memory the MD5 that OBS and others ask of it, instead of the
/// checksums that they do not know.
#[derive(Debug)]
pub(super) struct WithMd5;

impl Intercept for WithMd5 {
    fn name(&self) -> &'static str {
        "WithMd5"
    }

    fn modify_before_signing(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> std::result::Result<(), BoxError> {
        let request = context.request_mut();
        let md5 = request.body().bytes().map(Md5::digest).ok_or("the body is not in memory")?;
        let unknown: Vec<String> = request
            .headers()
            .iter()
            .map(|(name, _)| name.to_owned())
            .filter(|name| {
                name.starts_with("x-amz-checksum-") || name == "x-amz-sdk-checksum-algorithm"
            })
            .collect();
        let headers = request.headers_mut();
        for name in unknown {
            headers.remove(&*name);
        }
        headers.insert("content-md5", base64(&md5));
        Ok(())
    }
}

/// Notes whether an answer says that the bucket is a parallel file system of OBS.
#[derive(Debug, Clone, Default)]
pub(super) struct FileSystemMark(Arc<AtomicBool>);

impl FileSystemMark {
    pub(super) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Intercept for FileSystemMark {
    fn name(&self) -> &'static str {
        "FileSystemMark"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> std::result::Result<(), BoxError> {
        // OBS says 'x-obs-' or 'x-amz-', as it was spoken to.
        let mut headers = context.response().headers().iter();
        if headers.any(|(name, _)| name.ends_with("-fs-file-interface")) {
            self.0.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Base64 with padding (RFC 4648).
pub(super) fn base64(bytes: &[u8]) -> String {
    aws_smithy_types::base64::encode(bytes)
}
