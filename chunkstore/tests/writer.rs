//! A writer whose store fails in ways that no store should.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "each test uses its part")]
mod common;

use std::sync::Arc;
use std::time::Duration;

use chunkstore::record::Session;
use chunkstore::writer::{Writer, WriterSettings};
use common::*;
use objects::testing::{Fault, FaultyStore, MemoryStore, Op};

#[test]
fn an_upload_that_panics_ends_the_session_and_nobody_waits_for_its_buffer() {
    let store = Arc::new(MemoryStore::new());
    create(&store);
    let faulty = FaultyStore::new(store, |op, key: &str, _| {
        assert!(op != Op::Create || !key.starts_with("packs/"), "this is the panic of the test");
        Fault::None
    });
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let repository = open(Arc::new(faulty));
        let started = now(repository.store());
        let session =
            Session { purpose: "backup".into(), writer: "x".into(), started, heartbeat: 0 };
        // One upload dies with the only buffer, the other one goes on.
        let settings = WriterSettings { uploads: 2, ..settings() };
        let writer = Writer::begin(repository.clone(), settings, &session).unwrap();
        let filled = fill(&writer, &repository, &files(1, 100, 5000));
        tell.send(filled.map(drop).unwrap_err().to_string()).unwrap();
    });
    let error = told.recv_timeout(Duration::from_secs(60)).expect("it does not wait for ever");
    assert!(error.contains("an upload panicked"), "{error}");
}
