//! The store on S3 on a server of another make: Garage, which is strict about the region, ignores conditions, and
//! takes requests of any date.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write;

use objects::probe::{create_if_absent, refuses_wrong_dates};
use objects::s3::{Addressing, S3Config, S3Store};
use objects::testing::contract;
use objects::testing::server::{TestServer, fresh};
use objects::{ErrorKind, ObjectStore};

const BUCKET: &str = "ebackup-tests";

/// How to reach it; nothing where it was not built, which takes ten minutes.
fn garage(prefix: &str) -> Option<S3Config> {
    let Some(server) = TestServer::garage_from_env() else {
        let text =
            "NOT TESTED: the store on Garage. Build it once with 'cargo xtask garage build'\n";
        // Past the test runner, which hides what passing tests print.
        std::io::stderr().write_all(text.as_bytes()).unwrap();
        return None;
    };
    let config = server.config(BUCKET, &fresh(prefix));
    Some(S3Config { region: "garage".to_owned(), ..config })
}

#[test]
fn contract_but_for_conditions() {
    let Some(config) = garage("contract") else { return };
    let (_, others) = contract::by_need_of_conditions();
    for addressing in [Addressing::VirtualHost, Addressing::Path] {
        contract::run(&others, &|| {
            let prefix = format!("{}/", fresh("contract"));
            Box::new(S3Store::open(S3Config { prefix, addressing, ..config.clone() }).unwrap())
        });
    }
}

#[test]
fn what_it_does_not_do_is_found_out() {
    let Some(config) = garage("probe") else { return };
    let store = S3Store::open(config).unwrap();
    assert!(!create_if_absent(&store, "probes/").unwrap());
    assert!(!refuses_wrong_dates(&store, "probes/").unwrap());
    store.list("", &mut |left| panic!("{left:?} is left")).unwrap();
}

#[test]
fn another_region_is_refused_with_what_to_change() {
    let Some(config) = garage("region") else { return };
    let error = S3Store::open(S3Config { region: "us-east-1".to_owned(), ..config }).unwrap_err();
    let why = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{why}");
    assert!(why.contains("--region"), "{why}");
}
