//! What the store on S3 sends: what OBS, Ceph and others understand, and nothing that they refuse.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use objects::s3::{S3Config, S3Store};
use objects::testing::proxy::{Proxy, Request};
use objects::testing::server::{TestServer, fresh};
use objects::{Created, ObjectStore};

/// Sends a request of every kind, and gives them all.
fn every_request(change: impl Fn(S3Config) -> S3Config) -> (Vec<Request>, Proxy) {
    let server = TestServer::from_env();
    server.make_bucket(&server.config("ebackup-tests", ""));
    let proxy = Proxy::start(&server);
    let config = change(proxy.server().config("ebackup-tests", &fresh("requests")));
    let store = S3Store::open(config).unwrap();
    let large = vec![7; 9 << 20];
    let create = |key: &str, body: &[u8]| store.create_from(key, &mut &*body).unwrap();
    assert_eq!(create("small", b"1"), Created::New);
    assert_eq!(create("lent", large.get(..1 << 20).unwrap()), Created::New);
    assert_eq!(create("parts", &large), Created::New);
    store.replace("small", b"2").unwrap();
    store.replace_dated("small", b"3", store.clock()).unwrap();
    assert_eq!(store.read("small", 10).unwrap(), b"3");
    store.read_at("lent", 10, &mut [0; 10]).unwrap();
    store.read_tail("lent", 10).unwrap();
    store.stat("small").unwrap();
    store.list("", &mut |_| Ok(())).unwrap();
    store.remove_unfinished(std::time::Duration::MAX, store.clock()).unwrap();
    store.create_from("failing", &mut Failing(9 << 20)).unwrap_err();
    store.delete("small").unwrap();
    store.delete_all(&["lent".to_owned(), "parts".to_owned()]).unwrap();
    (proxy.requests(), proxy)
}

/// A body that breaks after so many bytes.
struct Failing(usize);

impl std::io::Read for Failing {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let len = buf.len().min(self.0);
        self.0 -= len;
        if len == 0 { Err(std::io::Error::other("the source broke")) } else { Ok(len) }
    }
}

fn names(requests: &[&Request]) -> BTreeSet<&'static str> {
    requests.iter().map(|request| request.operation()).collect()
}

fn with<'a>(requests: &'a [Request], header: &str) -> Vec<&'a Request> {
    requests.iter().filter(|request| request.header(header).is_some()).collect()
}

const ALL: [&str; 12] = [
    "AbortMultipartUpload",
    "CompleteMultipartUpload",
    "CreateMultipartUpload",
    "DeleteObject",
    "DeleteObjects",
    "GetObject",
    "HeadBucket",
    "HeadObject",
    "ListMultipartUploads",
    "ListObjects",
    "PutObject",
    "UploadPart",
];

/// Those with the content of an object.
const BODIES: [&str; 2] = ["PutObject", "UploadPart"];

#[test]
fn nothing_is_sent_that_obs_refuses() {
    let (requests, proxy) = every_request(|config| config);
    assert_eq!(names(&requests.iter().collect::<Vec<_>>()), BTreeSet::from(ALL));
    let host = format!("ebackup-tests.s3.test:{}", proxy.server().port);
    for request in &requests {
        let operation = request.operation();
        assert_eq!(request.header("host"), Some(&*host), "{operation}: bucket in the host name");
        assert!(!request.path.contains("ebackup-tests"), "{operation}: {}", request.path);
        let refused = |(name, value): &&(String, String)| {
            name == "x-amz-trailer"
                || name == "x-amz-sdk-checksum-algorithm"
                || name.starts_with("x-amz-checksum")
                || name == "transfer-encoding"
                || name == "expect"
                || value.contains("aws-chunked")
                || value.starts_with("STREAMING")
        };
        assert_eq!(request.headers.iter().find(refused), None, "{operation}");
        let hash = request.header("x-amz-content-sha256").unwrap();
        if BODIES.contains(&operation) {
            assert_eq!(hash, "UNSIGNED-PAYLOAD", "{operation}");
        } else {
            assert!(
                hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()),
                "{hash}"
            );
        }
        let signature = request.header("authorization").unwrap();
        assert!(signature.starts_with("AWS4-HMAC-SHA256 Credential="), "{signature}");
        assert!(signature.contains("/us-east-1/s3/aws4_request"), "{signature}");
    }
    let listing = requests.iter().filter(|request| request.operation() == "ListObjects");
    for request in listing {
        assert!(!request.query.contains("list-type"), "version 1: {}", request.query);
        assert!(!request.query.contains("encoding-type"), "{}", request.query);
    }
}

#[test]
fn only_creates_are_conditional() {
    let (requests, _proxy) = every_request(|config| config);
    let conditional = with(&requests, "if-none-match");
    let paths: Vec<_> = conditional
        .iter()
        .map(|request| (request.operation(), request.path.rsplit('/').next().unwrap()))
        .collect();
    let expected =
        [("PutObject", "small"), ("PutObject", "lent"), ("CompleteMultipartUpload", "parts")];
    assert_eq!(paths, expected, "one each, and no replace");
    assert!(conditional.iter().all(|request| request.header("if-none-match") == Some("*")));
    assert_eq!(with(&requests, "if-match").len(), 0);
}

#[test]
fn md5_is_sent_where_it_is_needed_and_where_it_is_asked_for() {
    let (requests, _proxy) = every_request(|config| config);
    let bodies = BTreeSet::from(["DeleteObjects", "PutObject", "UploadPart"]);
    assert_eq!(names(&with(&requests, "content-md5")), bodies, "without TLS");
    let sent = |request: &&Request| bodies.contains(request.operation());
    let count = requests.iter().filter(sent).count();
    assert_eq!(with(&requests, "content-md5").len(), count, "every one of them");
    let (requests, _proxy) =
        every_request(|config| S3Config { content_md5: Some(false), ..config });
    assert_eq!(names(&with(&requests, "content-md5")), BTreeSet::from(["DeleteObjects"]));
}
