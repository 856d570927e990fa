//! The store on S3 passes the contract against a real server, however it is addressed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use objects::s3::{CredentialSource, S3Config, S3Store};
use objects::testing::contract;
use objects::testing::server::{SMALL_KEY, TestServer, fresh};
use objects::{Created, ErrorKind, Kind, ObjectStore};

fn run(config: impl Fn(&TestServer, &str) -> S3Config) {
    let server = TestServer::from_env();
    server.make_bucket(&server.config("ebackup-tests", ""));
    contract::run(contract::ALL, &|| {
        Box::new(S3Store::open(config(&server, &fresh("contract"))).unwrap())
    });
}

#[test]
fn contract_by_virtual_host() {
    run(|server, prefix| server.config("ebackup-tests", prefix));
}

#[test]
fn contract_by_tls_with_an_own_authority() {
    run(|server, prefix| server.tls_config("ebackup-tests", prefix));
}

#[test]
fn contract_by_tls_with_an_authority_that_is_in_no_file() {
    run(|server, prefix| {
        let config = server.tls_config("ebackup-tests", prefix);
        let ca_certificates = std::fs::read(&server.ca).unwrap();
        S3Config { ca_file: None, ca_certificates, ..config }
    });
}

#[test]
fn contract_by_path() {
    run(|server, prefix| server.path_config("ebackup-tests", prefix));
}

#[test]
fn contract_without_a_prefix() {
    let server = TestServer::from_env();
    contract::run(contract::ALL, &|| {
        let config = server.config(&fresh("root"), "");
        server.make_bucket(&config);
        Box::new(S3Store::open(config).unwrap())
    });
}

#[test]
fn the_server_honours_create_if_absent() {
    let store = TestServer::from_env().store(&fresh("probe"));
    assert!(objects::probe::create_if_absent(&store, "probes/").unwrap());
}

/// The error of opening a store, with its cause.
fn refusal(config: S3Config) -> (ErrorKind, String) {
    let error = S3Store::open(config).unwrap_err();
    let why = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    (error.kind(), why)
}

#[test]
fn what_is_wrong_is_told_at_once() {
    let server = TestServer::from_env();
    let good = server.config("ebackup-tests", "refused");
    server.make_bucket(&good);
    let fixed = |key: &str, secret: &str| CredentialSource::Fixed {
        key: key.to_owned(),
        secret: secret.to_owned(),
    };
    let table = [
        (
            S3Config { credentials: fixed(&server.key, "wrong"), ..good.clone() },
            ErrorKind::PermissionDenied,
            "secret key",
        ),
        (
            S3Config { credentials: fixed("nobody", "wrong"), ..good.clone() },
            ErrorKind::PermissionDenied,
            "does not know",
        ),
        (
            S3Config { credentials: fixed(SMALL_KEY, &server.secret), ..good.clone() },
            ErrorKind::PermissionDenied,
            "lacks the right",
        ),
        (server.config("ebackup-no-such-bucket", ""), ErrorKind::Invalid, "make the bucket"),
        (
            S3Config { endpoint: Some(format!("https://s3.test:{}", server.port)), ..good.clone() },
            ErrorKind::Invalid,
            "does not speak TLS",
        ),
        (
            S3Config { ca_file: None, ..server.tls_config("ebackup-tests", "") },
            ErrorKind::Invalid,
            "--ca-file",
        ),
        (
            S3Config {
                endpoint: Some("http://127.0.0.1:1".to_owned()),
                attempts: 2,
                ..good.clone()
            },
            ErrorKind::Unavailable,
            "tried 2 times",
        ),
    ];
    for (config, kind, part) in table {
        let (found, why) = refusal(config);
        assert_eq!(found, kind, "{why}");
        assert!(why.contains(part), "{why}");
        assert!(!why.contains(&server.secret), "{why}");
    }
}

#[test]
fn a_full_bucket_is_told_from_other_trouble() {
    let server = TestServer::from_env();
    let credentials =
        CredentialSource::Fixed { key: SMALL_KEY.to_owned(), secret: server.secret.clone() };
    let config = S3Config { credentials, ..server.config("ebackup-small", "") };
    server.make_bucket(&config);
    let store = S3Store::open(config).unwrap();
    let error = store.create_from("large", &mut &vec![1; 6 << 20][..]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    assert_eq!(store.stat("large").unwrap_err().kind(), ErrorKind::NotFound);
}

/// What the fallback for stores without create-if-absent relies on.
#[test]
fn requests_that_are_too_old_or_too_young_are_refused_by_the_store() {
    let store = TestServer::from_env().store(&fresh("dated"));
    let now = store.clock();
    let hour = Duration::from_secs(3600);
    for date in [now - hour, now + hour] {
        let error = store.replace_dated("a", b"late", date).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Expired, "{error}");
        assert_eq!(store.stat("a").unwrap_err().kind(), ErrorKind::NotFound);
    }
    store.replace_dated("a", b"in time", now - Duration::from_secs(600)).unwrap();
    for date in [now - hour, now + hour] {
        let keys = ["a".to_owned(), "b".to_owned()];
        assert_eq!(store.delete_dated(&keys, date).unwrap_err().kind(), ErrorKind::Expired);
        assert_eq!(store.delete_dated(&keys[..1], date).unwrap_err().kind(), ErrorKind::Expired);
    }
    assert_eq!(store.read("a", 100).unwrap(), b"in time");
}

#[test]
fn all_unfinished_uploads_are_removed_however_many_they_are() {
    // More than a listing tells at once.
    const UPLOADS: usize = 1003;
    let server = TestServer::from_env();
    let config = server.config("ebackup-tests", &fresh("unfinished"));
    server.make_bucket(&config);
    let store = S3Store::open(config.clone()).unwrap();
    server.begin_uploads(&config, UPLOADS);
    let now = store.clock();
    assert_eq!(store.remove_unfinished(Duration::from_secs(3600), now).unwrap(), 0);
    let removed = store.remove_unfinished(Duration::ZERO, now + Duration::from_secs(1)).unwrap();
    assert_eq!(removed, UPLOADS as u64);
    assert_eq!(server.unfinished_uploads(&config), [""; 0]);
}

#[test]
fn traffic_is_counted_by_kind() {
    let store = TestServer::from_env().store(&fresh("traffic"));
    let before = store.traffic().unwrap();
    assert_eq!(store.create_from("a", &mut &vec![1; 1000][..]).unwrap(), Created::New);
    store.read("a", 1000).unwrap();
    store.stat("a").unwrap();
    store.list("", &mut |_| Ok(())).unwrap();
    store.delete_all(&["a".to_owned(), "b".to_owned()]).unwrap();
    let after = store.traffic().unwrap();
    for kind in [Kind::Write, Kind::Read, Kind::Stat, Kind::List, Kind::Delete] {
        assert_eq!(after.of(kind) - before.of(kind), 1, "{kind:?}");
    }
    assert_eq!(after.bytes_sent - before.bytes_sent, 1000);
    assert_eq!(after.bytes_received - before.bytes_received, 1000);
    assert_eq!(after.retries, 0);
}
