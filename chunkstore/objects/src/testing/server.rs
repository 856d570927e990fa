//! The S3 server that tests use, as `cargo xtask s3 up` started it.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::SystemTime;

use aws_sdk_s3::Client;

use crate::s3::{Addressing, CredentialSource, S3Config, S3Store};

/// How to reach the server.
#[derive(Debug, Clone)]
pub struct TestServer {
    /// Port of its plain endpoint on this machine.
    pub port: u16,
    /// Port of its TLS endpoint.
    pub tls_port: u16,
    /// Certificate of the authority that signed its own.
    pub ca: PathBuf,
    /// Access key of a user who may do everything.
    pub key: String,
    /// His secret.
    pub secret: String,
}

/// Access key of a user who may store 4 MiB; the secret is the same.
pub const SMALL_KEY: &str = "smallaccesskey";

/// A name that no other test and no earlier run used.
pub fn fresh(name: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let now = crate::system_clock().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{name}-{}-{}", now.as_nanos(), COUNT.fetch_add(1, Ordering::SeqCst))
}

impl TestServer {
    /// The server named by the environment.
    ///
    /// # Panics
    /// When there is none: such a test cannot pass, and must not seem to.
    pub fn from_env() -> Self {
        let var = |name: &str| {
            std::env::var(name).unwrap_or_else(|_| {
                panic!(
                    "{name} is not set: this test needs an S3 server. Start one with 'cargo xtask \
                     s3 up', and tell this shell with 'set -a; . target/s3/env'"
                )
            })
        };
        let port = |name| var(name).parse().expect("a port is a number");
        Self {
            port: port("EBACKUP_TEST_S3_PORT"),
            tls_port: port("EBACKUP_TEST_S3_TLS_PORT"),
            ca: var("EBACKUP_TEST_S3_CA").into(),
            key: var("EBACKUP_TEST_S3_KEY"),
            secret: var("EBACKUP_TEST_S3_SECRET"),
        }
    }

    /// The configuration for a bucket, by virtual host and without TLS.
    ///
    /// # Panics
    /// When the name cannot be one of a bucket.
    pub fn config(&self, bucket: &str, prefix: &str) -> S3Config {
        self.config_at(&format!("http://s3.test:{}", self.port), bucket, prefix)
    }

    /// The same by TLS.
    ///
    /// # Panics
    /// When the name cannot be one of a bucket.
    pub fn tls_config(&self, bucket: &str, prefix: &str) -> S3Config {
        let config = self.config_at(&format!("https://s3.test:{}", self.tls_port), bucket, prefix);
        S3Config { ca_file: Some(self.ca.clone()), ..config }
    }

    /// The same with the bucket in the path.
    ///
    /// # Panics
    /// When the name cannot be one of a bucket.
    pub fn path_config(&self, bucket: &str, prefix: &str) -> S3Config {
        let config = self.config_at(&format!("http://127.0.0.1:{}", self.port), bucket, prefix);
        S3Config { addressing: Addressing::Path, ..config }
    }

    fn config_at(&self, endpoint: &str, bucket: &str, prefix: &str) -> S3Config {
        let credentials =
            CredentialSource::Fixed { key: self.key.clone(), secret: self.secret.clone() };
        let url = format!("s3://{bucket}/{prefix}");
        let config = S3Config::new(&url, Some(endpoint), None, credentials);
        let mut config = config.expect("the test's configuration is right");
        config.resolve = vec![("s3.test".to_owned(), IpAddr::V4(Ipv4Addr::LOCALHOST))];
        config
    }

    /// Makes a bucket, unless it exists.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn make_bucket(&self, config: &S3Config) {
        let client: Client = crate::s3::test_client(config);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be made");
        let made = runtime.block_on(client.create_bucket().bucket(&config.bucket).send());
        if let Err(error) = made {
            let code = aws_sdk_s3::error::ProvideErrorMetadata::code(&error).unwrap_or_default();
            assert!(code.starts_with("BucketAlready"), "cannot make the bucket: {error:?}");
        }
    }

    /// A store below a prefix of its own in the bucket `ebackup-tests`.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn store(&self, prefix: &str) -> S3Store {
        let config = self.config("ebackup-tests", prefix);
        self.make_bucket(&config);
        S3Store::open(config).expect("the test's bucket can be opened")
    }
}
