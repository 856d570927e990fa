//! The store on S3 with everything that goes wrong on the way to the store, against a real server
//! behind a proxy that does it: each request comes to the right end.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Debug;
use std::io::IoSlice;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use objects::s3::{CredentialSource, S3Config, S3Store};
use objects::testing::proxy::{Fault, Proxy};
use objects::testing::server::{SMALL_KEY, SMALL_USER, TestServer, fresh};
use objects::testing::{contract, keys};
use objects::{Created, ErrorKind, ObjectStore};

/// A store behind a proxy.
struct Site {
    server: TestServer,
    proxy: Proxy,
    config: S3Config,
    store: S3Store,
}

impl Site {
    fn new() -> Self {
        Self::with(|config| config)
    }

    fn with(change: impl Fn(S3Config) -> S3Config) -> Self {
        let server = TestServer::from_env();
        server.make_bucket(&server.config("ebackup-tests", ""));
        let proxy = Proxy::start(&server);
        let config = change(proxy.server().config("ebackup-tests", &fresh("faults")));
        let store = S3Store::open(config.clone()).unwrap();
        Self { server, proxy, config, store }
    }

    /// The first request of this name that comes from now on fails so; gives how often it came.
    fn once(&self, operation: &'static str, fault: Fault) -> Arc<AtomicUsize> {
        let count = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&count);
        self.proxy.rule(move |request| {
            let is_first =
                request.operation() == operation && seen.fetch_add(1, Ordering::SeqCst) == 0;
            if is_first { fault } else { Fault::Pass }
        });
        count
    }

    /// All of this name fail so.
    fn always(&self, operation: &'static str, fault: Fault) {
        self.proxy.rule(
            move |request| {
                if request.operation() == operation { fault } else { Fault::Pass }
            },
        );
    }

    fn retries(&self) -> u64 {
        self.store.traffic().unwrap().retries
    }

    fn create(&self, key: &str, body: &[u8]) -> objects::Result<Created> {
        self.store.create(key, &[IoSlice::new(body)])
    }

    fn create_from(&self, key: &str, mut body: &[u8]) -> objects::Result<Created> {
        self.store.create_from(key, &mut body)
    }

    fn body(&self, key: &str) -> Vec<u8> {
        self.store.read(key, u64::MAX).unwrap()
    }
}

/// What passes when it is tried again. With all but the last, the client has to.
const PASSING: [Fault; 7] = [
    Fault::DropRequest,
    Fault::DropAnswer,
    Fault::Truncate,
    Fault::Answer(500, "InternalError"),
    Fault::Answer(503, "SlowDown"),
    Fault::Answer(429, "TooManyRequests"),
    Fault::Duplicate,
];

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// One more than a part holds.
fn two_parts() -> Vec<u8> {
    noise((8 << 20) + 1)
}

/// What uses one kind of request: on a prepared store, and a name of its own.
type Use = fn(&Site, &str);

/// Uses a site in one way with each fault in turn.
#[track_caller]
fn survives(operation: &'static str, usage: Use) {
    let site = Site::new();
    assert_eq!(site.create("there", b"0123456789").unwrap(), Created::New);
    for (n, fault) in PASSING.into_iter().enumerate() {
        let before = site.retries();
        let count = site.once(operation, fault);
        usage(&site, &format!("{operation}-{n}").to_lowercase());
        let repeated = u64::from(fault != Fault::Duplicate);
        assert_eq!(site.retries() - before, repeated, "{operation} with {fault:?}");
        assert!(count.load(Ordering::SeqCst) > 0, "{operation} was not sent");
    }
}

#[test]
fn what_is_read_is_right_whatever_fails() {
    let table: [(&str, Use); 5] = [
        ("GetObject", |site, _| assert_eq!(site.body("there"), b"0123456789")),
        ("GetObject", |site, _| {
            let mut range = [0; 4];
            site.store.read_at("there", 3, &mut range).unwrap();
            assert_eq!(&range, b"3456");
        }),
        ("GetObject", |site, _| {
            assert_eq!(site.store.read_tail("there", 3).unwrap(), (10, b"789".to_vec()));
        }),
        ("HeadObject", |site, _| assert_eq!(site.store.stat("there").unwrap().size, 10)),
        ("ListObjects", |site, _| assert_eq!(keys(&site.store, ""), ["there"])),
    ];
    thread::scope(|scope| {
        for (operation, usage) in table {
            scope.spawn(move || survives(operation, usage));
        }
    });
}

#[test]
fn what_is_written_and_deleted_is_right_whatever_fails() {
    let table: [(&str, Use); 6] = [
        // Whose answer was lost finds its own object, and has created it.
        ("PutObject", |site, key| {
            assert_eq!(site.create(key, b"small").unwrap(), Created::New);
            assert_eq!(site.body(key), b"small");
            assert_eq!(site.create("there", b"x").unwrap(), Created::AlreadyExists);
        }),
        ("PutObject", |site, key| {
            let large = noise(1 << 20);
            assert_eq!(site.create(key, &large).unwrap(), Created::New);
            assert!(site.body(key) == large);
        }),
        ("PutObject", |site, key| {
            site.store.replace(key, b"1").unwrap();
            site.store.replace_dated(key, b"2", site.store.clock()).unwrap();
            assert_eq!(site.body(key), b"2");
        }),
        ("DeleteObject", |site, key| {
            let _ = site.create(key, b"1").unwrap();
            site.store.delete(key).unwrap();
            assert_eq!(keys(&site.store, ""), ["there"]);
        }),
        ("DeleteObjects", |site, key| {
            let _ = site.create(key, b"1").unwrap();
            site.store.delete_all(&[key.to_owned(), "never".to_owned()]).unwrap();
            assert_eq!(keys(&site.store, ""), ["there"]);
        }),
        ("ListMultipartUploads", |site, _| {
            let removed = site.store.remove_unfinished(Duration::ZERO, site.store.clock());
            assert_eq!(removed.unwrap(), 0);
        }),
    ];
    thread::scope(|scope| {
        for (operation, usage) in table {
            scope.spawn(move || survives(operation, usage));
        }
    });
}

#[test]
fn uploads_in_parts_end_right_whatever_fails() {
    for operation in ["CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"] {
        survives(operation, |site, key| {
            let body = two_parts();
            assert_eq!(site.create_from(key, &body).unwrap(), Created::New);
            assert!(site.body(key) == body, "{key} differs");
        });
    }
    survives("AbortMultipartUpload", |site, key| {
        let begun = two_parts();
        let mut breaking = std::io::Read::chain(&begun[..], Breaking);
        site.store.create_from(key, &mut breaking).unwrap_err();
        assert_eq!(site.server.unfinished_uploads(&site.config), [""; 0]);
    });
}

/// A body that cannot be read.
struct Breaking;

impl std::io::Read for Breaking {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        Err(std::io::Error::other("the source broke"))
    }
}

#[test]
fn an_upload_that_was_completed_without_our_knowing_is_ours_and_no_other_is() {
    // What stores answer to a second completion: that there is no such upload, or that there is an
    // object of that name already.
    for second in [Fault::Answer(404, "NoSuchUpload"), Fault::Answer(412, "PreconditionFailed")] {
        let site = Site::new();
        let count = AtomicUsize::new(0);
        site.proxy.rule(move |request| match request.operation() {
            "CompleteMultipartUpload" if count.fetch_add(1, Ordering::SeqCst) == 0 => {
                Fault::DropAnswer
            }
            "CompleteMultipartUpload" => second,
            _ => Fault::Pass,
        });
        assert_eq!(site.create_from("a", &two_parts()).unwrap(), Created::New, "{second:?}");
        // Here nothing was completed, and the object is another's.
        let count = AtomicUsize::new(0);
        let other =
            S3Store::open(site.server.config("ebackup-tests", &site.config.prefix)).unwrap();
        site.proxy.rule(move |request| match request.operation() {
            "CompleteMultipartUpload" if count.fetch_add(1, Ordering::SeqCst) == 0 => {
                let _ = other.create("b", &[IoSlice::new(b"another's")]).unwrap();
                Fault::DropRequest
            }
            "CompleteMultipartUpload" => second,
            _ => Fault::Pass,
        });
        assert_eq!(site.create_from("b", &two_parts()).unwrap(), Created::AlreadyExists);
        assert_eq!(site.body("b"), b"another's");
        assert_eq!(site.server.unfinished_uploads(&site.config), [""; 0]);
    }
}

#[test]
fn a_failed_upload_leaves_nothing() {
    let site = Site::with(|config| S3Config { attempts: 2, ..config });
    let table = [
        ("UploadPart", Fault::Answer(403, "AccessDenied"), ErrorKind::PermissionDenied),
        ("UploadPart", Fault::Answer(500, "InternalError"), ErrorKind::Unavailable),
        ("CompleteMultipartUpload", Fault::Answer(403, "QuotaExceeded"), ErrorKind::Full),
        ("CompleteMultipartUpload", Fault::DropRequest, ErrorKind::Unavailable),
    ];
    for (operation, fault, kind) in table {
        site.always(operation, fault);
        assert_eq!(site.create_from("a", &two_parts()).unwrap_err().kind(), kind, "{operation}");
        assert_eq!(site.server.unfinished_uploads(&site.config), [""; 0], "{operation}");
        assert_eq!(keys(&site.store, ""), [""; 0]);
    }
}

/// The error with its cause, which the caller has to see.
#[track_caller]
fn refused<T: Debug>(result: objects::Result<T>, kind: ErrorKind, part: &str) {
    let error = result.unwrap_err();
    let why = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    assert_eq!(error.kind(), kind, "{error}: {why}");
    assert!(why.contains(part), "{error}: {why}");
}

#[test]
fn what_does_not_pass_is_told_at_once() {
    let site = Site::new();
    let forbidden = Fault::Answer(403, "AccessDenied");
    let told = |operation, attempt: &dyn Fn() -> objects::Result<()>| {
        site.always(operation, forbidden);
        refused(attempt(), ErrorKind::PermissionDenied, "403");
    };
    told("PutObject", &|| site.create("a", b"1").map(drop));
    told("GetObject", &|| site.store.read("a", 10).map(drop));
    told("HeadObject", &|| site.store.stat("a").map(drop));
    told("ListObjects", &|| site.store.list("", &mut |_| Ok(())));
    told("DeleteObject", &|| site.store.delete("a"));
    told("DeleteObjects", &|| site.store.delete_all(&["a".to_owned(), "b".to_owned()]));
    told("CreateMultipartUpload", &|| site.create_from("a", &two_parts()).map(drop));
    assert_eq!(site.retries(), 0);
}

#[test]
fn what_never_passes_is_given_up_and_the_tries_are_told() {
    let site = Site::with(|config| S3Config { attempts: 3, ..config });
    for fault in [Fault::DropRequest, Fault::Answer(503, "SlowDown"), Fault::Truncate] {
        let before = site.retries();
        site.always("GetObject", fault);
        let _ = site.create("a", b"1").unwrap();
        refused(site.store.read("a", 10), ErrorKind::Unavailable, "tried 3 times");
        assert_eq!(site.retries() - before, 2, "{fault:?}");
    }
}

#[test]
fn a_download_goes_on_where_it_broke_off() {
    let site = Site::new();
    let body = noise(4 << 20);
    let _ = site.create("a", &body).unwrap();
    let count = site.once("GetObject", Fault::Truncate);
    let before = site.store.traffic().unwrap().bytes_received;
    assert!(site.body("a") == body);
    assert_eq!(count.load(Ordering::SeqCst), 2);
    let received = site.store.traffic().unwrap().bytes_received - before;
    assert_eq!(received, body.len() as u64, "no byte twice");
}

#[test]
fn the_end_of_an_object_is_read_on_where_it_broke_off() {
    let site = Site::new();
    let limit = 64 << 10;
    for (key, len) in [("a", 5000), ("b", limit), ("c", 300_000)] {
        let body = noise(len);
        let _ = site.create(key, &body).unwrap();
        let count = site.once("GetObject", Fault::Truncate);
        let (size, tail) = site.store.read_tail(key, limit).unwrap();
        assert_eq!(size, len as u64);
        assert!(tail == body[len - limit.min(len)..], "{key}: {} bytes", tail.len());
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }
}

#[test]
fn a_store_that_does_not_answer_or_take_what_is_sent_is_asked_again() {
    let hurried = |config| S3Config { answer_within: Duration::from_secs(2), ..config };
    let table: [(&str, Use); 3] = [
        ("PutObject", |site, key| {
            assert_eq!(site.create(key, b"small").unwrap(), Created::New);
            assert_eq!(site.body(key), b"small");
        }),
        // More than the system takes for a receiver who does not read.
        ("PutObject", |site, key| {
            let large = noise(24 << 20);
            assert_eq!(site.create(key, &large).unwrap(), Created::New);
            assert!(site.body(key) == large);
        }),
        ("GetObject", |site, key| {
            let _ = site.create(key, b"small").unwrap();
            assert_eq!(site.body(key), b"small");
        }),
    ];
    thread::scope(|scope| {
        for (operation, usage) in table {
            scope.spawn(move || {
                let site = Site::with(hurried);
                site.once(operation, Fault::Delay(Duration::from_secs(6)));
                usage(&site, "a");
                assert!(site.retries() >= 1, "{operation}");
            });
        }
    });
}

#[test]
fn a_slow_upload_is_not_taken_for_a_dead_one() {
    let site = Site::with(|config| S3Config {
        answer_within: Duration::from_secs(3),
        limit_upload: Some(1 << 20),
        ..config
    });
    // Takes twice as long as an answer may.
    let body = noise(6 << 20);
    assert_eq!(site.create("a", &body).unwrap(), Created::New);
    assert_eq!(site.retries(), 0);
    assert!(site.body("a") == body);
}

#[test]
fn a_key_that_is_exchanged_while_running_is_used_when_the_old_one_is_refused() {
    let server = TestServer::from_env();
    let bucket = fresh("rotated");
    let own = server.config(&bucket, "");
    server.make_bucket(&own);
    server.allow(&own, SMALL_USER, &["s3:ListBucket", "s3:PutObject", "s3:GetObject"]);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cloud");
    let write = |key: &str| {
        let text = format!(
            "HUAWEI_CLOUD_ACCESS_KEY_ID={key}\nHUAWEI_CLOUD_SECRET_ACCESS_KEY={}\n",
            server.secret
        );
        std::fs::write(&path, text).unwrap();
    };
    write(&server.key);
    let proxy = Proxy::start(&server);
    let credentials = CredentialSource::File { path: path.clone(), profile: "default".to_owned() };
    let config = S3Config { credentials, ..proxy.server().config(&bucket, "") };
    let store = S3Store::open(config).unwrap();
    assert_eq!(store.create("a", &[]).unwrap(), Created::New);
    // The old key is deleted, and the new one is not there yet.
    let old = format!("Credential={}/", server.key);
    proxy.rule(move |request| {
        let is_old = request.header("authorization").is_some_and(|text| text.contains(&old));
        if is_old { Fault::Answer(403, "InvalidAccessKeyId") } else { Fault::Pass }
    });
    refused(store.stat("a"), ErrorKind::PermissionDenied, "");
    write(SMALL_KEY);
    assert_eq!(store.stat("a").unwrap().size, 0);
    assert_eq!(store.create("b", &[]).unwrap(), Created::New);
    assert_eq!(store.traffic().unwrap().retries, 1, "only the first had to be repeated");
}

#[test]
fn a_store_that_ignores_the_condition_is_found_out_and_shows_all_else() {
    let server = TestServer::from_env();
    server.make_bucket(&server.config("ebackup-tests", ""));
    let proxy = Proxy::without_conditions(&server);
    let open = || S3Store::open(proxy.server().config("ebackup-tests", &fresh("ignored"))).unwrap();
    assert!(!objects::probe::create_if_absent(&open(), "probes/").unwrap());
    let (need, others) = contract::by_need_of_conditions();
    contract::run(&others, &|| Box::new(open()));
    for one in need {
        let shows = AssertUnwindSafe(|| contract::run(&[one], &|| Box::new(open())));
        assert!(catch_unwind(shows).is_err(), "{} needs no condition", one.0);
    }
}

#[test]
fn who_has_patience_outlasts_what_passes() {
    let patience = Duration::from_secs(20);
    let site = Site::with(|config| S3Config { attempts: 2, patience, ..config });
    let _ = site.create("a", b"1").unwrap();
    let tries = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&tries);
    site.proxy.rule(move |_| {
        let early = seen.fetch_add(1, Ordering::SeqCst) < 5;
        if early { Fault::Answer(503, "SlowDown") } else { Fault::Pass }
    });
    let before = site.store.traffic().unwrap();
    assert_eq!(site.store.read("a", 10).unwrap(), b"1");
    let after = site.store.traffic().unwrap();
    assert_eq!(after.retries - before.retries, 5, "more than its attempts");
    assert_eq!(after.done.iter().sum::<u64>() - before.done.iter().sum::<u64>(), 1);
    // What does not pass is told at once all the same.
    site.always("GetObject", Fault::Answer(403, "AccessDenied"));
    refused(site.store.read("a", 10), ErrorKind::PermissionDenied, "403");
    assert_eq!(site.store.traffic().unwrap().retries, after.retries);
}

#[test]
fn a_parallel_file_system_is_refused() {
    let site = Site::new();
    // As OBS marks one, whichever headers it was asked with.
    for mark in ["x-obs-fs-file-interface: Enabled", "x-amz-fs-file-interface: Enabled"] {
        site.always("HeadBucket", Fault::Add(mark));
        let error = S3Store::open(site.config.clone()).unwrap_err();
        refused::<()>(Err(error), ErrorKind::Invalid, "parallel file system");
    }
    // Who may not ask can use the bucket all the same.
    site.always("HeadBucket", Fault::Answer(403, "AccessDenied"));
    S3Store::open(site.config.clone()).unwrap();
}
