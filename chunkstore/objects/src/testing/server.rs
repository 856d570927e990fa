//! The S3 server that tests use, as `cargo xtask s3 up` started it.

use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use aws_sdk_s3::Client;
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};

use super::conditions_ignored;
use super::proxy::Proxy;
use crate::s3::{Addressing, CredentialSource, S3Config, S3Store};

/// How to reach the server.
#[derive(Debug, Clone)]
pub struct TestServer {
    /// Port of its plain endpoint on this machine.
    pub port: u16,
    /// Port of its TLS endpoint, if it has one.
    pub tls_port: Option<u16>,
    /// Certificate of the authority that signed its own.
    pub ca: PathBuf,
    /// Access key of a user who may do everything.
    pub key: String,
    /// His secret.
    pub secret: String,
}

/// Access key of a user who may store 4 MiB in buckets of his own; the secret is the same.
pub const SMALL_KEY: &str = "smallaccesskey";

/// His name.
pub const SMALL_USER: &str = "small";

/// A name that no other test and no earlier run used.
pub fn fresh(name: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let now = crate::system_clock().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{name}-{}-{}", now.as_nanos(), COUNT.fetch_add(1, Ordering::SeqCst))
}

impl TestServer {
    /// The server named by the environment; where [`conditions_ignored`], through a proxy that
    /// strips them, without TLS.
    ///
    /// # Panics
    /// When there is none: such a test cannot pass, and must not seem to.
    pub fn from_env() -> Self {
        static IGNORING: OnceLock<Proxy> = OnceLock::new();
        let server = Self::direct_from_env();
        if conditions_ignored() {
            return IGNORING.get_or_init(|| Proxy::without_conditions(&server)).server();
        }
        server
    }

    /// The server named by the environment, with TLS and without a proxy in any case.
    ///
    /// # Panics
    /// When there is none.
    pub fn direct_from_env() -> Self {
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
            tls_port: Some(port("EBACKUP_TEST_S3_TLS_PORT")),
            ca: var("EBACKUP_TEST_S3_CA").into(),
            key: var("EBACKUP_TEST_S3_KEY"),
            secret: var("EBACKUP_TEST_S3_SECRET"),
        }
    }

    /// Garage, another make of server, where `cargo xtask garage build` made it. It has no TLS endpoint.
    ///
    /// # Panics
    /// When the environment names half of it.
    pub fn garage_from_env() -> Option<Self> {
        let port = std::env::var("EBACKUP_TEST_GARAGE_PORT").ok()?;
        let var = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
        Some(Self {
            port: port.parse().expect("a port is a number"),
            tls_port: None,
            ca: PathBuf::new(),
            key: var("EBACKUP_TEST_GARAGE_KEY"),
            secret: var("EBACKUP_TEST_GARAGE_SECRET"),
        })
    }

    /// Its endpoint under a name, by TLS if it has that.
    pub fn endpoint(&self, name: &str) -> String {
        match self.tls_port {
            Some(port) => format!("https://{name}:{port}"),
            None => format!("http://{name}:{}", self.port),
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
    /// When it has none, or the name cannot be one of a bucket.
    pub fn tls_config(&self, bucket: &str, prefix: &str) -> S3Config {
        assert!(self.tls_port.is_some(), "it has no TLS endpoint");
        let config = self.config_at(&self.endpoint("s3.test"), bucket, prefix);
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
        let made = wait(client.create_bucket().bucket(&config.bucket).send());
        if let Err(error) = made {
            let code = aws_sdk_s3::error::ProvideErrorMetadata::code(&error).unwrap_or_default();
            assert!(code.starts_with("BucketAlready"), "cannot make the bucket: {error:?}");
        }
    }

    /// Keys of the uploads below the prefix that were neither completed nor aborted.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn unfinished_uploads(&self, config: &S3Config) -> Vec<String> {
        let client: Client = crate::s3::test_client(config);
        let request = client.list_multipart_uploads().bucket(&config.bucket);
        let found = wait(request.prefix(&config.prefix).send()).expect("uploads can be listed");
        found.uploads().iter().filter_map(|upload| upload.key().map(str::to_owned)).collect()
    }

    /// Begins so many uploads in parts, and ends none of them.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn begin_uploads(&self, config: &S3Config, count: usize) {
        let client: Client = crate::s3::test_client(config);
        wait(async {
            for n in 0..count {
                let request = client.create_multipart_upload().bucket(&config.bucket);
                let begun = request.key(format!("{}unfinished-{n}", config.prefix)).send().await;
                begun.expect("an upload can be begun");
            }
        });
    }

    /// Lets another user do in the bucket what `actions` name, and nothing else.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn allow(&self, config: &S3Config, user: &str, actions: &[&str]) {
        let client: Client = crate::s3::test_client(config);
        let bucket = &config.bucket;
        let policy = format!(
            r#"{{"Version": "2012-10-17", "Statement": [{{"Effect": "Allow",
                "Principal": {{"AWS": ["arn:aws:iam:::user/{user}"]}}, "Action": {actions:?},
                "Resource": ["arn:aws:s3:::{bucket}", "arn:aws:s3:::{bucket}/*"]}}]}}"#
        );
        wait(client.put_bucket_policy().bucket(bucket).policy(policy).send())
            .expect("the policy is understood");
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

/// A server of a test's own, which may kill it. What it stored goes when this is dropped.
#[derive(Debug)]
pub struct OwnServer {
    dir: tempfile::TempDir,
    port: u16,
    group: Option<Child>,
}

impl OwnServer {
    /// Starts one, which takes some 20 seconds.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        let mut server = Self { dir, port: three_ports(), group: None };
        server.start_again();
        server
    }

    /// Starts it on what it stored before it was killed.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_again(&mut self) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/radosgw.sh");
        let mut command = Command::new(script);
        command.arg(self.dir.path()).arg(self.port.to_string()).stdin(Stdio::null());
        // A group of its own, so that all of it can be killed.
        let group = command.process_group(0).spawn().expect("radosgw.sh can be run");
        let group = self.group.insert(group);
        let env = self.dir.path().join("env");
        while !env.exists() {
            let ended = group.try_wait().expect("it is ours");
            assert!(ended.is_none(), "the server did not start: {ended:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Kills all of its processes at once, as when the power fails.
    ///
    /// # Panics
    /// When it cannot be killed.
    pub fn kill(&mut self) {
        let Some(mut group) = self.group.take() else { return };
        let id = Pid::from_child(&group);
        kill_process_group(id, Signal::KILL).expect("it is ours");
        group.wait().expect("it is ours");
        // Its ports are free only when all of it is gone.
        while test_kill_process_group(id).is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
        // Without it, it was not even started.
        let _gone = std::fs::remove_file(self.dir.path().join("env"));
    }

    /// How to reach it.
    pub fn server(&self) -> TestServer {
        TestServer {
            port: self.port,
            tls_port: Some(self.port + 1),
            ca: self.dir.path().join("tls/ca.pem"),
            key: "testaccesskey".to_owned(),
            secret: "testsecretkey12345".to_owned(),
        }
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The first of three ports that are free now.
fn three_ports() -> u16 {
    let is_free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    let first = (18_300..18_900).step_by(3);
    let mut free = first.filter(|port| (*port..port + 3).all(is_free));
    free.next().expect("three ports are free")
}

/// Waits for a request of a test's own.
fn wait<T>(request: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime can be made").block_on(request)
}
