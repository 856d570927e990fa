//! The whole command on a bucket while requests fail, the server dies, or the program itself is
//! killed: backups go on or are continued, and what is listed restores.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bucket;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use bucket::*;
use objects::testing::proxy::{Fault, Proxy, Request};
use objects::testing::server::{OwnServer, TestServer};

/// What passes when it is tried again.
const PASSING: [Fault; 7] = [
    Fault::DropRequest,
    Fault::Answer(500, "InternalError"),
    Fault::DropAnswer,
    Fault::Answer(503, "SlowDown"),
    Fault::Truncate,
    Fault::Answer(429, "TooManyRequests"),
    Fault::Duplicate,
];

#[test]
fn all_ends_right_while_every_third_request_fails() {
    let proxy = Proxy::start(&TestServer::from_env());
    // Each time in another way.
    proxy.rule(|request| match request.n % 3 {
        2 => PASSING[request.n / 3 % PASSING.len()],
        _ => Fault::Pass,
    });
    let session = Session::new().through(&proxy);
    let source = session.source();
    let text = source.to_str().unwrap();
    session.run(&["init"]);
    session.run(&["backup", text]);
    fs::write(source.join("large"), noise(100, 20 << 20)).unwrap();
    fs::remove_file(source.join("small/8")).unwrap();
    let second = session.summary(&["backup", text]);
    assert!(second["requests"]["repeated"].as_u64().unwrap() > 0, "{second}");
    session.run(&["forget", "--keep-last", "1"]);
    let pruned = session.summary(&["prune", "--max-unused", "0%"]);
    assert!(pruned["bytes_deleted"].as_u64().unwrap() > 15 << 20, "{pruned}");
    assert_eq!(session.run(&["snapshots"]).lines().count(), 2);
    session.restores(&source);
}

/// Files that fill many packs of the smallest size.
fn many_packs(dir: &Path, mebibytes: u64) -> PathBuf {
    let source = dir.join("many");
    fs::create_dir(&source).unwrap();
    for n in 0..mebibytes / 4 {
        fs::write(source.join(n.to_string()), noise(200 + n, 4 << 20)).unwrap();
    }
    source
}

fn is_pack(request: &Request) -> bool {
    request.operation() == "PutObject" && request.path.contains("/packs/")
}

fn size(request: &Request) -> u64 {
    request.header("content-length").unwrap().parse().unwrap()
}

/// A backup of many packs through a proxy.
struct Interrupted {
    session: Session,
    proxy: Proxy,
    source: PathBuf,
}

impl Interrupted {
    const BYTES: u64 = 96 << 20;

    /// Packs that come through.
    const UPLOADED: usize = 11;

    fn new() -> Self {
        let session = Session::new();
        let proxy = Proxy::start(&session.server);
        let session = session.through(&proxy);
        let source = many_packs(session.dir.path(), Self::BYTES >> 20);
        session.run(&["init"]);
        Self { session, proxy, source }
    }

    /// With the least memory, and so the smallest packs.
    fn backup(&self) -> [&str; 4] {
        ["--memory", "96M", "backup", self.source.to_str().unwrap()]
    }

    /// The next run stores what did not come through, and what the last did not get to note.
    fn is_continued(&self) {
        let requests = self.proxy.requests();
        let packs: Vec<u64> = requests.iter().filter(|one| is_pack(one)).map(size).collect();
        let uploaded: u64 = packs.iter().take(Self::UPLOADED).sum();
        self.proxy.rule(|_| Fault::Pass);
        let next = self.session.summary(&self.backup());
        let stored = next["bytes_stored"].as_u64().unwrap();
        // The places of four packs, and of two whose upload has just ended.
        let lost = 6 * packs.iter().max().unwrap();
        assert!(3 * uploaded > 4 * lost, "{uploaded} bytes in packs of {packs:?}");
        let most = Self::BYTES + (1 << 20) - uploaded + lost;
        assert!(stored <= most, "{stored} bytes stored, {uploaded} were there");
        self.session.restores(&self.source);
    }
}

#[test]
fn a_backup_that_is_killed_is_continued_with_what_was_not_uploaded() {
    let killed = Interrupted::new();
    let (reached, wait) = mpsc::channel();
    let (count, reached) = (AtomicUsize::new(0), Mutex::new(reached));
    killed.proxy.rule(move |request| {
        if !is_pack(request) || count.fetch_add(1, Ordering::SeqCst) < Interrupted::UPLOADED {
            return Fault::Pass;
        }
        let _told = reached.lock().unwrap().send(());
        Fault::DropRequest
    });
    let mut command = killed.session.command(&killed.backup());
    let mut child = command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    wait.recv().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    killed.is_continued();
}

#[test]
fn a_backup_that_loses_the_store_for_longer_than_it_tries_says_so_and_is_continued() {
    let lost = Interrupted::new();
    let (count, is_lost) = (AtomicUsize::new(0), AtomicBool::new(false));
    lost.proxy.rule(move |request| {
        let is_last =
            is_pack(request) && count.fetch_add(1, Ordering::SeqCst) >= Interrupted::UPLOADED;
        if is_last {
            is_lost.store(true, Ordering::SeqCst);
        }
        if is_lost.load(Ordering::SeqCst) { Fault::DropRequest } else { Fault::Pass }
    });
    lost.session.fails(&lost.backup(), &["tried 10 times"]);
    lost.is_continued();
}

#[test]
fn a_backup_outlives_the_death_of_the_server_or_is_continued() {
    let server = Arc::new(Mutex::new(OwnServer::start()));
    let own = server.lock().unwrap().server();
    let session = Session::on(own.clone());
    let proxy = Proxy::start(&own);
    let session = session.through(&proxy);
    let source = many_packs(session.dir.path(), 48);
    let backup = ["--memory", "96M", "backup", source.to_str().unwrap()];
    session.run(&["init"]);
    let (dead, wait) = mpsc::channel();
    let (count, dead) = (AtomicUsize::new(0), Mutex::new(dead));
    let victim = Arc::clone(&server);
    proxy.rule(move |request| {
        // In the midst of it: others are under way.
        if is_pack(request) && count.fetch_add(1, Ordering::SeqCst) == 3 {
            victim.lock().unwrap().kill();
            let _told = dead.lock().unwrap().send(());
        }
        Fault::Pass
    });
    let child =
        session.command(&backup).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait.recv().unwrap();
    server.lock().unwrap().start_again();
    let output = child.wait_with_output().unwrap();
    if !output.status.success() {
        // The server took longer than the tries.
        refused(&output, &["tried 10 times"]);
        session.run(&backup);
    }
    session.restores(&source);
    // Here, because a connection of the proxy may keep it for a little longer.
    server.lock().unwrap().kill();
}
