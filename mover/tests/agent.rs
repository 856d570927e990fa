//! The agent as the controller sees it: the real program on a folder like the kubelet's, over TLS, with
//! repositories on a real S3 server.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cluster;
#[path = "common/leased.rs"]
#[expect(unreachable_pub, reason = "other tests share it")]
mod leased;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use chunkstore::record::Snapshot;
use chunkstore::repository::Repository;
use cluster::*;
use mover::monitor::Silent;
use mover::restore::{Request, RestoreOptions, restore};
use objects::testing::conditions_ignored;
use objects::testing::proxy::{Fault, Proxy};
use objects::testing::server::TestServer;
use proto::v1::finished::Outcome;
use proto::v1::from_controller::Message;
use proto::v1::job::Work;
use proto::v1::{
    Backup, Check, FailureKind, Forget, Job, OpenRepository, Probe, Prune, Renew, Restore, Volume,
};

const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
const CSI: &str = "kubernetes.io~csi";

fn backup(volume: &Volume) -> Backup {
    Backup {
        volume: Some(volume.clone()),
        lineage: "pvc/default/data/1".to_owned(),
        host: "default/web-0".to_owned(),
        tags: [("backup".to_owned(), "daily".to_owned())].into(),
        parent: String::new(),
    }
}

fn restored(volume: &Volume, snapshot: &str, marker: &str) -> Work {
    Work::Restore(Restore {
        volume: Some(volume.clone()),
        snapshot: snapshot.to_owned(),
        done_marker: marker.to_owned(),
    })
}

/// What the command makes of a volume's snapshot: the volume, and nothing beside.
fn restores_elsewhere(repository: &Repository, snapshot: &Snapshot, source: &Path) {
    let elsewhere = tempfile::tempdir().unwrap();
    restore(&Request {
        repository,
        root: (snapshot.root, snapshot.level),
        subpath: b"",
        target: elsewhere.path(),
        opened: None,
        filter: None,
        options: RestoreOptions::default(),
        monitor: &Silent,
    })
    .unwrap();
    assert_same(source, elsewhere.path());
    assert!(!elsewhere.path().join(".velero").exists());
}

#[test]
fn volumes_are_saved_and_restored_over_and_over() {
    let location = Location::new();
    let controller = Controller::start();
    let (node, hello) = Node::connected(&controller, &["--memory", "96M", "--log-format", "json"]);
    assert_eq!((&*hello.node, hello.capacity, hello.memory_bytes), ("node-1", 1, 96 << 20));
    assert!(!hello.version.is_empty() && hello.running.is_empty() && hello.finished.is_empty());
    let opened = |finished: proto::v1::Finished| match finished.outcome {
        Some(Outcome::Opened(opened)) => opened,
        other => panic!("{other:?}"),
    };
    let first = opened(controller.run(&location.create()));
    let register = if conditions_ignored() { "time-fenced" } else { "create-if-absent" };
    assert!(first.created && first.register == register, "{first:?}");
    let again = opened(controller.run(&location.create()));
    assert!(!again.created && again.repository_id == first.repository_id);

    let (source, volume) = node.volume("pod-1", EMPTY_DIR, "data");
    fs::create_dir_all(source.join("deep/down")).unwrap();
    fs::write(source.join("deep/down/large"), noise(1, 12 << 20)).unwrap();
    for n in 0..50 {
        fs::write(source.join(format!("{n}")), noise(n, 3000)).unwrap();
    }
    // What an earlier restore has left there is not part of the volume.
    fs::create_dir(source.join(".velero")).unwrap();
    fs::write(source.join(".velero/old"), "").unwrap();
    let saved = controller.save(&location.job("b-1", Work::Backup(backup(&volume))));
    assert_eq!((saved.files, &*saved.parent), (51, ""), "{saved:?}");
    assert_eq!(saved.path, source.display().to_string());
    assert!(saved.bytes_read > 12 << 20 && saved.bytes_stored > 12 << 20);

    let repository = location.open();
    let snapshot = repository.snapshot(saved.snapshot.parse().unwrap()).unwrap();
    let tag = |name: &str| snapshot.tags.get(name).map(String::as_str);
    assert_eq!((tag("job"), tag("backup")), (Some("b-1"), Some("daily")));
    assert_eq!((&*snapshot.lineage, &*snapshot.host), ("pvc/default/data/1", "default/web-0"));
    restores_elsewhere(&repository, &snapshot, &source);

    // The next one reads only what has changed, compared with the given parent.
    std::thread::sleep(Duration::from_secs(3)); // changes of the last two are not trusted to be seen
    let parent = Backup { parent: saved.snapshot.clone(), ..backup(&volume) };
    let settled = controller.save(&location.job("b-2", Work::Backup(parent.clone())));
    fs::write(source.join("7"), "changed").unwrap();
    let parent = Backup { parent: settled.snapshot.clone(), ..parent };
    let second = controller.save(&location.job("b-3", Work::Backup(parent)));
    assert_eq!(second.parent, settled.snapshot);
    assert!(second.bytes_read < 200_000 && second.bytes_stored < 200_000, "{second:?}");
    // Without one, with the newest of the lineage.
    let third = controller.save(&location.job("b-4", Work::Backup(backup(&volume))));
    assert_eq!(third.parent, second.snapshot);

    // Into the volume of another pod, which waits for it.
    let (target, empty) = node.volume("pod-2", EMPTY_DIR, "data");
    let nothing = controller.save(
        &location
            .job("b-5", Work::Backup(Backup { lineage: "empty".to_owned(), ..backup(&empty) })),
    );
    assert_eq!((nothing.files, nothing.bytes), (0, 0), "{nothing:?}");
    fs::create_dir_all(target.join(".velero/stale")).unwrap();
    fs::create_dir(target.join("7")).unwrap();
    let any_plugin = Volume { plugin: String::new(), ..empty };
    let work = restored(&any_plugin, &third.snapshot, "restore-uid");
    let finished = controller.run(&location.job("r-1", work));
    assert_eq!((finished.warnings, &finished.first_warnings), (0, &vec![]));
    match finished.outcome {
        Some(Outcome::Restored(done)) => {
            assert_eq!(done.files, 51);
            assert_eq!(done.bytes, done.bytes_written, "{done:?}");
        }
        other => panic!("{other:?}"),
    }
    assert_same(&source, &target);
    let mark = target.join(".velero/restore-uid");
    assert_eq!(fs::metadata(&mark).unwrap().permissions().mode() & 0o777, 0o644);
    assert!(!target.join(".velero/stale").exists());
    let mut wait = Command::new(env!("CARGO_BIN_EXE_ebackup"));
    wait.args(["restore-wait", "restore-uid", "--root"]).arg(target.parent().unwrap());
    let waited = wait.output().unwrap();
    assert!(waited.status.success(), "{}", String::from_utf8_lossy(&waited.stderr));
    assert!(!mark.exists());

    assert!(node.http("/readyz").starts_with("HTTP/1.1 200"));
    assert!(node.http("/healthz").starts_with("HTTP/1.1 200"));
    let metrics = node.http("/metrics");
    for line in [
        r#"ebackup_agent_jobs_ended_total{kind="Backup",outcome="Completed"} 5"#,
        r#"ebackup_agent_jobs_ended_total{kind="Restore",outcome="Completed"} 1"#,
        "ebackup_agent_connected 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    // The limit of a container for which 96 MiB are what is divided.
    let peak = node.peak_memory();
    assert!(peak < 128 << 20, "{} MiB in memory", peak >> 20);
    let log = node.log();
    let lines: Vec<serde_json::Value> =
        log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let begins = lines.iter().find(|line| line["message"] == "begins").unwrap();
    assert_eq!(begins["span"]["id"], "create", "{begins}");
    assert_eq!(begins["span"]["subject"], "PodVolumeBackup/velero/create", "{begins}");
}

#[test]
fn a_repeated_restore_leaves_alone_what_runs_on_the_volume_by_now() {
    let controller = Controller::start();
    let (node, _) = Node::connected(&controller, &["--memory", "96M"]);
    let location = Location::new();
    controller.run(&location.create());
    let (folder, volume) = node.volume("pod", EMPTY_DIR, "data");
    fs::write(folder.join("file"), "saved").unwrap();
    let saved = controller.save(&location.job("b", Work::Backup(backup(&volume))));
    let job = location.job("r", restored(&volume, &saved.snapshot, "uid"));
    for (repeated, content) in [(false, "saved"), (true, "of the application")] {
        fs::write(folder.join("file"), "of the application").unwrap();
        let finished = controller.run(&Job { repeated, ..job.clone() });
        assert!(matches!(finished.outcome, Some(Outcome::Restored(_))), "{finished:?}");
        assert_eq!(fs::read_to_string(folder.join("file")).unwrap(), content);
        assert!(folder.join(".velero/uid").exists());
    }
}

#[test]
fn jobs_go_on_without_a_stream_and_are_reported_until_recorded() {
    let controller = Controller::start();
    let (node, hello) = Node::connected(&controller, &["--memory", "192M"]);
    assert_eq!(hello.capacity, 2);
    let mut location = Location::new();
    controller.run(&location.create());
    let (source, volume) = node.volume("pod", CSI, "pv");
    fs::write(source.join("file"), noise(1, 16 << 20)).unwrap();
    // Slow enough to be cut off in the middle.
    location.repository.limit_upload = 4 << 20;
    let job = location.job("slow", Work::Backup(backup(&volume)));
    let (more, other) = node.volume("pod", CSI, "pv-2");
    fs::write(more.join("file"), noise(2, 16 << 20)).unwrap();
    let other = Backup { lineage: "other".to_owned(), ..backup(&other) };
    let other = location.job("other", Work::Backup(other));
    controller.assign(&job);
    controller.assign(&job);
    controller.assign(&other);
    controller.progress("slow");
    controller.progress("other");
    let hello = controller.cut();
    assert_eq!(hello.running, ["other", "slow"], "both at once: {hello:?}");
    let first = saved(&controller.finished_times("slow", 1));
    controller.finished_times("other", 1);
    controller.record("other");
    let peak = node.peak_memory();
    assert!(peak < 256 << 20, "{} MiB in memory", peak >> 20);
    // Whoever missed that hears it again.
    controller.assign(&job);
    assert_eq!(saved(&controller.finished_times("slow", 2)), first);
    let hello = controller.cut();
    assert_eq!(hello.running, [""; 0]);
    let again: Vec<_> = hello.finished.iter().map(|finished| &*finished.job_id).collect();
    assert_eq!(again, ["slow"]);
    assert_eq!(saved(&hello.finished[0]), first);
    controller.record("slow");
    // Heard in order, so recorded before the next stream is asked for.
    let check = location.job("check", Work::Check(Check { read_data_permille: 0 }));
    controller.run(&check);
    let hello = controller.cut();
    assert!(hello.finished.iter().all(|finished| finished.job_id != "slow"), "{hello:?}");
    let list = location.open().list_snapshots().unwrap();
    assert_eq!(list.snapshots.len(), 2, "each was done once");
}

#[test]
fn a_killed_agent_continues_where_it_was() {
    let mut location = Location::new();
    let controller = Controller::start();
    let (mut node, _) = Node::connected(&controller, &["--memory", "96M"]);
    controller.run(&location.create());
    let (source, volume) = node.volume("pod", CSI, "pv");
    for n in 0..24 {
        fs::write(source.join(format!("{n}")), noise(n, 4 << 20)).unwrap();
    }
    location.repository.limit_upload = 16 << 20;
    let mut job = location.job("killed", Work::Backup(backup(&volume)));
    controller.assign(&job);
    let store = location.store();
    eventually("index segments are uploaded", || !location.names(&store, "index/").is_empty());
    let before = controller.streams();
    node.kill();
    let packs = location.names(&store, "packs/").len();
    node.start();
    let (_, hello) = controller.hello_after(before);
    assert!(hello.running.is_empty() && hello.finished.is_empty(), "{packs} packs: {hello:?}");
    job.repeated = true;
    job.repository.as_mut().unwrap().limit_upload = 0;
    let done = controller.save(&job);
    assert_eq!(done.bytes, 96 << 20);
    assert!(done.bytes_stored < 90 << 20, "it uploads only what was not there: {done:?}");
    // The outcome may have got lost on its way.
    let again = controller.save(&job);
    assert_eq!(again, done);
    assert_eq!(location.open().list_snapshots().unwrap().snapshots.len(), 1);
}

#[test]
fn an_agent_that_is_killed_while_it_restores_restores_all() {
    let controller = Controller::start();
    let (mut node, _) = Node::connected(&controller, &["--memory", "96M"]);
    let mut location = Location::new();
    controller.run(&location.create());
    let (source, volume) = node.volume("pod-1", CSI, "pv");
    for n in 0..12 {
        fs::write(source.join(format!("{n}")), noise(n, 4 << 20)).unwrap();
    }
    let saved = controller.save(&location.job("saved", Work::Backup(backup(&volume))));
    let (target, volume) = node.volume("pod-2", EMPTY_DIR, "pv");
    location.repository.limit_download = 8 << 20;
    let mut job = location.job("killed", restored(&volume, &saved.snapshot, "uid"));
    controller.assign(&job);
    eventually("something is restored", || target.join("0").exists());
    let before = controller.streams();
    node.kill();
    let mark = target.join(".velero/uid");
    assert!(!mark.exists(), "nobody takes it for whole");
    node.start();
    controller.hello_after(before);
    job.repeated = true;
    job.repository.as_mut().unwrap().limit_download = 0;
    let finished = controller.run(&job);
    assert!(matches!(finished.outcome, Some(Outcome::Restored(_))), "{finished:?}");
    assert!(mark.exists());
    assert_same(&source, &target);
}

#[test]
fn a_store_that_is_away_for_longer_than_its_retries_fails_no_job() {
    let controller = Controller::start();
    let (node, _) = Node::connected(&controller, &["--memory", "96M"]);
    let proxy = Proxy::start(&TestServer::from_env());
    let location = Location::behind(&proxy);
    controller.run(&location.create());
    let (source, volume) = node.volume("pod", CSI, "pv");
    fs::write(source.join("file"), noise(1, 12 << 20)).unwrap();
    proxy.rule(|request| match request.operation() {
        "PutObject" => Fault::Answer(503, "ServiceUnavailable"),
        _ => Fault::Pass,
    });
    let from = proxy.requests().len();
    let job = location.job("outage", Work::Backup(backup(&volume)));
    controller.assign(&job);
    // The command would have given up after ten.
    for more_than in [5, 9, 10] {
        eventually(&format!("a request is tried more than {more_than} times"), || {
            let mut tries = BTreeMap::new();
            for request in proxy.requests().into_iter().skip(from) {
                *tries.entry((request.method, request.path)).or_insert(0) += 1;
            }
            tries.into_values().any(|tries| tries > more_than)
        });
    }
    assert_eq!(controller.times_finished("outage"), 0);
    proxy.rule(|_| Fault::Pass);
    assert_eq!(controller.save(&job).bytes, 12 << 20);
}

#[test]
fn a_full_bucket_fails_a_job_and_says_so() {
    let controller = Controller::start();
    let (node, _) = Node::connected(&controller, &["--memory", "96M"]);
    let proxy = Proxy::start(&TestServer::from_env());
    let location = Location::behind(&proxy);
    controller.run(&location.create());
    let (source, volume) = node.volume("pod", CSI, "pv");
    fs::write(source.join("file"), noise(1, 12 << 20)).unwrap();
    proxy.rule(|request| match request.operation() {
        "PutObject" if request.path.contains("/packs/") => Fault::Answer(403, "QuotaExceeded"),
        _ => Fault::Pass,
    });
    let job = location.job("full", Work::Backup(backup(&volume)));
    let (kind, message) = controller.fail(&job);
    assert_eq!(kind, FailureKind::Full, "{message}");
    assert!(message.contains("QuotaExceeded"), "{message}");
}

#[test]
fn an_agent_that_is_told_to_end_keeps_what_it_has_uploaded() {
    let controller = Controller::start();
    let (mut node, _) = Node::connected(&controller, &["--memory", "96M"]);
    let mut location = Location::new();
    controller.run(&location.create());
    let (source, volume) = node.volume("pod", CSI, "pv");
    for n in 0..24 {
        fs::write(source.join(format!("{n}")), noise(n, 4 << 20)).unwrap();
    }
    location.repository.limit_upload = 16 << 20;
    let mut job = location.job("interrupted", Work::Backup(backup(&volume)));
    controller.assign(&job);
    let waits = location.job("waits", Work::Check(Check::default()));
    controller.assign(&waits);
    controller.progress("interrupted");
    let before = controller.streams();
    let begun = Instant::now();
    assert!(node.terminate().success(), "{}", node.log());
    assert!(begun.elapsed() < Duration::from_secs(29), "{:?}", begun.elapsed());
    for id in ["interrupted", "waits"] {
        assert_eq!(controller.times_finished(id), 0, "it is to be assigned again");
    }
    let store = location.store();
    assert_eq!(location.names(&store, "sessions/"), [""; 0], "its session is ended");
    assert!(!location.names(&store, "index/").is_empty(), "what was uploaded is known");
    node.start();
    let (_, hello) = controller.hello_after(before);
    assert!(hello.running.is_empty() && hello.finished.is_empty(), "{hello:?}");
    job.repeated = true;
    job.repository.as_mut().unwrap().limit_upload = 0;
    let done = controller.save(&job);
    assert!(done.bytes == 96 << 20 && done.bytes_stored < 96 << 20, "{done:?}");
}

/// Whatever a job waits for: within the 30 seconds that Kubernetes gives a pod.
#[track_caller]
fn assert_ends_in_time(node: &mut Node) {
    let begun = Instant::now();
    assert!(node.terminate().success(), "{}", node.log());
    assert!(begun.elapsed() < Duration::from_secs(29), "{:?}", begun.elapsed());
}

#[test]
fn an_agent_that_is_told_to_end_does_not_wait_for_a_store_that_is_silent() {
    let controller = Controller::start();
    let (mut node, _) = Node::connected(&controller, &["--memory", "96M"]);
    let proxy = Proxy::start(&TestServer::from_env());
    let location = Location::behind(&proxy);
    controller.run(&location.create());
    let (source, volume) = node.volume("pod", CSI, "pv");
    fs::write(source.join("file"), noise(1, 40 << 20)).unwrap();
    let before = proxy.requests().len();
    proxy.rule(|request| match request.operation() {
        "PutObject" => Fault::Delay(Duration::from_secs(60)),
        _ => Fault::Pass,
    });
    controller.assign(&location.job("silent", Work::Backup(backup(&volume))));
    eventually("it uploads", || {
        proxy.requests()[before..].iter().any(|request| request.operation() == "PutObject")
    });
    assert_ends_in_time(&mut node);
    assert_eq!(controller.times_finished("silent"), 0, "it is to be assigned again");
}

#[test]
fn an_agent_that_is_told_to_end_does_not_wait_for_a_volume_that_hangs() {
    let controller = Controller::start();
    let (mut node, _) = Node::connected(&controller, &["--memory", "96M"]);
    let location = Location::new();
    controller.run(&location.create());
    let (source, volume) = node.volume("pod", EMPTY_DIR, "data");
    fs::write(source.join("file"), noise(1, 3000)).unwrap();
    let leased = leased::Leased::take(&source.join("file"));
    controller.assign(&location.job("hangs", Work::Backup(backup(&volume))));
    leased.is_wanted();
    assert_ends_in_time(&mut node);
    assert_eq!(controller.times_finished("hangs"), 0, "it is to be assigned again");
}

#[test]
fn jobs_that_stall_or_are_cancelled_end() {
    let controller = Controller::start();
    let (node, _) = Node::connected(&controller, &["--memory", "96M"]);
    let mut location = Location::new();
    controller.run(&location.create());
    let (source, volume) = node.volume("pod", CSI, "pv");
    fs::write(source.join("file"), noise(1, 40 << 20)).unwrap();
    // Enough to open the repository, but not to get anywhere with a pack.
    location.repository.limit_upload = 2000;
    let stalls = location.job("stalls", Work::Backup(backup(&volume)));
    let stalls = Job { stall_seconds: 3, ..stalls };
    let (kind, message) = controller.fail(&stalls);
    assert_eq!(kind, FailureKind::Stalled, "{message}");
    assert!(message.contains("3 seconds"), "{message}");
    let cancelled = location.job("cancelled", Work::Backup(backup(&volume)));
    let waiting = location.job("waiting", Work::Backup(backup(&volume)));
    controller.assign(&cancelled);
    controller.assign(&waiting);
    controller.cancel("waiting");
    assert_eq!(failure(&controller.finished_times("waiting", 1)).0, FailureKind::Cancelled);
    controller.progress("cancelled");
    controller.cancel("cancelled");
    controller.cancel("unheard of");
    for id in ["cancelled", "unheard of"] {
        assert_eq!(failure(&controller.finished_times(id, 1)).0, FailureKind::Cancelled, "{id}");
        controller.record(id);
    }
    // The next one has its turn.
    location.repository.limit_upload = 0;
    controller.save(&location.job("next", Work::Backup(backup(&volume))));
}

#[test]
fn what_goes_wrong_is_told_by_its_kind_and_without_secrets() {
    let controller = Controller::start();
    let (node, _) = Node::connected(&controller, &["--memory", "96M", "--log-level", "debug"]);
    let location = Location::new();
    let (source, volume) = node.volume("pod", EMPTY_DIR, "pv");
    fs::write(source.join("file"), "x").unwrap();
    let (mut all, mut messages) = (Vec::new(), String::new());
    let mut expect = |job: Job, kind: FailureKind, part: &str| {
        let id = format!("{}-{}", job.id, all.len());
        let (found, message) = controller.fail(&Job { id, ..job });
        assert_eq!(found, kind, "{message}");
        assert!(message.contains(part), "{message}");
        messages.push_str(&message);
        all.push(found);
    };
    let plain = || location.job("x", Work::Backup(backup(&volume)));
    let with = |change: &dyn Fn(&mut proto::v1::Repository)| {
        let mut job = plain();
        change(job.repository.as_mut().unwrap());
        job
    };
    let of = |volume: Volume| location.job("x", Work::Backup(backup(&volume)));
    // A newer controller may know more.
    controller.send_unknown();
    expect(plain(), FailureKind::NoRepository, "there is no repository");
    controller.run(&location.create());
    let gone = Volume { pod_uid: "gone".to_owned(), ..volume.clone() };
    expect(of(gone), FailureKind::VolumeNotFound, "pods/gone");
    symlink("/etc", source.with_file_name("link")).unwrap();
    let link = Volume { directory: "link".to_owned(), ..volume.clone() };
    expect(of(link.clone()), FailureKind::VolumeError, "link");
    let out = Volume { directory: "../pv".to_owned(), ..volume.clone() };
    expect(of(out), FailureKind::Invalid, "../pv");
    let (unmounted, empty) = node.volume("pod", CSI, "pv-2");
    fs::create_dir(unmounted.join("mount")).unwrap();
    let empty = Volume { in_mount: true, ..empty };
    expect(of(empty.clone()), FailureKind::VolumeNotFound, "mountPropagation");
    let (_, unmounted) = node.volume("pod", "kubernetes.io~nfs", "pv-3");
    expect(of(unmounted.clone()), FailureKind::VolumeNotFound, "mountPropagation");
    let any = Volume { plugin: String::new(), ..unmounted.clone() };
    expect(of(any), FailureKind::VolumeNotFound, "mountPropagation");
    let server = &location.server;
    let wrong = credentials(&server.key, "secret-that-is-wrong");
    let wrong = with(&|repository| repository.credentials = Some(wrong.clone()));
    expect(wrong, FailureKind::StoreDenied, "secret key is wrong");
    let other = with(&|repository| repository.passphrase = b"passphrase that is wrong".to_vec());
    expect(other, FailureKind::WrongPassphrase, "does not open");
    let folder = with(&|repository| repository.url = "/var/repository".to_owned());
    expect(folder, FailureKind::Invalid, "s3://");
    let bucket = with(&|repository| repository.url = "s3://ebackup-never-made/x".to_owned());
    expect(bucket, FailureKind::StoreUnreachable, "make the bucket");
    let distrusted = with(&|repository| {
        repository.endpoint = TestServer::direct_from_env().endpoint("127.0.0.1");
        repository.ca_certificates.clear();
    });
    expect(distrusted, FailureKind::StoreUnreachable, "certificate");
    expect(Job { work: None, ..plain() }, FailureKind::Unsupported, "upgrade");
    let none = "0".repeat(32);
    for snapshot in ["nonsense", &*none] {
        let job = location.job("x", restored(&volume, snapshot, "uid"));
        expect(job, FailureKind::NoSnapshot, snapshot);
    }
    let saved = controller.save(&location.job("saved", Work::Backup(backup(&volume))));
    for volume in [empty, unmounted] {
        let job = location.job("x", restored(&volume, &saved.snapshot, "uid"));
        expect(job, FailureKind::VolumeNotFound, "mountPropagation");
    }
    let job = location.job("x", restored(&link, &saved.snapshot, "uid"));
    expect(job, FailureKind::VolumeError, "link");
    let job = location.job("x", restored(&volume, &saved.snapshot, "../uid"));
    expect(job, FailureKind::VolumeError, "mark");

    let probe = |id: &str, repository: proto::v1::Repository| {
        let (id, repository) = (id.to_owned(), Some(repository));
        controller.send(Message::Probe(Probe { id: id.clone(), repository }));
        controller.probed(&id)
    };
    assert_eq!(probe("good", location.repository.clone()), "");
    let keyless = proto::v1::Repository { credentials: None, ..location.repository.clone() };
    assert_eq!(probe("keyless", keyless), "", "who is refused has reached the store");
    let nobody = proto::v1::Repository {
        endpoint: "https://127.0.0.1:1".to_owned(),
        ..location.repository.clone()
    };
    let error = probe("bad", nobody);
    assert!(error.contains("127.0.0.1:1") || error.contains("refused"), "{error}");
    let said = format!("{}{messages}{error}", node.log());
    for secret in [&*server.secret, "secret-that-is-wrong", TOKEN, PASSPHRASE, "that is wrong"] {
        assert!(!said.contains(secret), "'{secret}' is in\n{said}");
    }
}

#[test]
fn a_volume_that_vanishes_while_it_is_saved_leaves_no_snapshot() {
    let controller = Controller::start();
    let (node, _) = Node::connected(&controller, &["--memory", "96M"]);
    let mut location = Location::new();
    controller.run(&location.create());
    location.repository.limit_upload = 4 << 20;
    for (seed, id, replaced) in [(1, "gone", false), (2, "replaced", true)] {
        let (source, volume) = node.volume("pod", EMPTY_DIR, id);
        fs::write(source.join("file"), noise(seed, 24 << 20)).unwrap();
        let other = Backup { lineage: id.to_owned(), ..backup(&volume) };
        controller.assign(&location.job(id, Work::Backup(other)));
        controller.progress(id);
        fs::rename(&source, node.path("away")).unwrap();
        fs::remove_dir_all(node.path("away")).unwrap();
        if replaced {
            fs::create_dir(&source).unwrap();
        }
        let (kind, message) = failure(&controller.finished_times(id, 1));
        assert_eq!(kind, FailureKind::VolumeNotFound, "{message}");
        assert!(message.contains("vanished while it was saved"), "{message}");
        controller.record(id);
    }
    assert!(location.open().list_snapshots().unwrap().snapshots.is_empty());
}

/// A file that is there and cannot be read, not by root either, until dropped: an attribute of the loopback device,
/// which has no speed.
struct Unreadable(PathBuf);

impl Unreadable {
    fn at(path: PathBuf) -> Option<Self> {
        fs::write(&path, "").unwrap();
        let mut mount = Command::new("mount");
        mount.args(["--bind", "/sys/class/net/lo/speed"]).arg(&path);
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        (mounted && fs::read(&path).is_err()).then_some(Self(path))
    }
}

impl Drop for Unreadable {
    fn drop(&mut self) {
        // The agent may have it open for a moment.
        eventually("it is unmounted", || {
            Command::new("umount").arg(&self.0).output().is_ok_and(|output| output.status.success())
        });
    }
}

#[test]
fn a_file_that_cannot_be_read_is_counted_and_named() {
    let controller = Controller::start();
    let (node, _) = Node::connected(&controller, &["--memory", "96M"]);
    let location = Location::new();
    controller.run(&location.create());
    let (source, volume) = node.volume("pod", EMPTY_DIR, "data");
    fs::write(source.join("good"), noise(1, 3000)).unwrap();
    let Some(broken) = Unreadable::at(source.join("broken")) else {
        let why = "an agent's volume with an unreadable file: nothing can be mounted here";
        std::io::stderr()
            .write_all(format!("\n******** NOT TESTED: {why} ********\n").as_bytes())
            .unwrap();
        return;
    };
    let finished = controller.run(&location.job("b", Work::Backup(backup(&volume))));
    let snapshot = saved(&finished).snapshot;
    assert_eq!((finished.missing, finished.changed, finished.vanished), (1, 0, 0));
    assert!(finished.first_missing[0].starts_with("broken: "), "{finished:?}");
    assert!(node.log().contains("broken: "), "{}", node.log());
    assert!(node.http("/metrics").contains("ebackup_agent_files_missing_total 1"));
    // Whoever did not hear of it hears the same counts again.
    let again = Job { repeated: true, ..location.job("b", Work::Backup(backup(&volume))) };
    let told_again = controller.run(&again);
    assert_eq!((&saved(&told_again).snapshot, told_again.missing), (&snapshot, 1));
    drop(broken);
    let (target, into) = node.volume("pod-2", EMPTY_DIR, "data");
    controller.run(&location.job("r", restored(&into, &snapshot, "uid")));
    assert_eq!(fs::read(target.join("good")).unwrap(), noise(1, 3000));
    assert!(target.join(".velero/uid").exists(), "what there is is restored");
}

#[test]
fn credentials_are_exchanged_while_a_job_runs() {
    let controller = Controller::start();
    let (node, _) = Node::connected(&controller, &["--memory", "96M"]);
    let mut location = Location::new();
    controller.run(&location.create());
    let (source, volume) = node.volume("pod", CSI, "pv");
    fs::write(source.join("file"), noise(1, 40 << 20)).unwrap();
    location.repository.limit_upload = 4 << 20;
    let renew = |location: &str, key: &str, secret: &str| {
        let credentials = Some(credentials(key, secret));
        controller.send(Message::Renew(Renew { location: location.to_owned(), credentials }));
    };
    controller.assign(&location.job("renewed", Work::Backup(backup(&volume))));
    controller.progress("renewed");
    renew("default", &location.server.key, "revoked");
    renew("another", "nobody", "nothing");
    // It waits for a better one instead of failing.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(controller.times_finished("renewed"), 0);
    renew("default", &location.server.key, &location.server.secret);
    let done = saved(&controller.finished_times("renewed", 1));
    assert_eq!(done.bytes, 40 << 20);
}

#[test]
fn a_repository_is_opened_rekeyed_forgotten_from_pruned_and_checked() {
    let controller = Controller::start();
    let (node, _) = Node::connected(&controller, &["--memory", "96M"]);
    let mut location = Location::new();
    controller.run(&location.create());
    let (source, volume) = node.volume("pod", CSI, "pv");
    fs::write(source.join("file"), noise(1, 8 << 20)).unwrap();
    let first = controller.save(&location.job("b-1", Work::Backup(backup(&volume))));
    fs::write(source.join("file"), noise(2, 8 << 20)).unwrap();
    let second = controller.save(&location.job("b-2", Work::Backup(backup(&volume))));

    // The secret's passphrase was changed.
    let old = location.repository.clone();
    location.repository.passphrase = b"another".to_vec();
    let open = |previous: &[u8]| {
        let previous_passphrase = previous.to_vec();
        location.job("open", Work::Open(OpenRepository { create: true, previous_passphrase }))
    };
    assert_eq!(controller.fail(&open(b"")).0, FailureKind::WrongPassphrase);
    assert_eq!(controller.fail(&open(b"nor this")).0, FailureKind::WrongPassphrase);
    for expected in [1, 0] {
        match controller.run(&open(&old.passphrase)).outcome {
            Some(Outcome::Opened(opened)) => assert_eq!(opened.keys_removed, expected),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(location.names(&location.store(), "keys/").len(), 1, "the old one is removed");
    let with_old =
        Job { repository: Some(old), ..location.job("old", Work::Check(Check::default())) };
    assert_eq!(controller.fail(&with_old).0, FailureKind::WrongPassphrase);

    let forget = Forget { snapshots: vec![first.snapshot.clone(), "0".repeat(32)] };
    for _ in 0..2 {
        let finished = controller.run(&location.job("forget", Work::Forget(forget.clone())));
        match finished.outcome {
            Some(Outcome::Forgotten(forgotten)) => assert_eq!(forgotten.snapshots, 2),
            other => panic!("{other:?}"),
        }
    }
    let prune = Prune { max_unused_permille: 50, max_repack_bytes: 0 };
    match controller.run(&location.job("prune", Work::Prune(prune))).outcome {
        Some(Outcome::Pruned(pruned)) => {
            assert!(pruned.packs_deleted > 0 && pruned.bytes_deleted > 8 << 20, "{pruned:?}");
        }
        other => panic!("{other:?}"),
    }
    let check = Work::Check(Check { read_data_permille: 1000 });
    match controller.run(&location.job("check", check.clone())).outcome {
        Some(Outcome::Checked(checked)) => {
            assert_eq!((checked.errors, checked.findings), (0, vec![]))
        }
        other => panic!("{other:?}"),
    }
    let left = location.open().list_snapshots().unwrap().snapshots;
    let left: Vec<_> = left.iter().map(|(id, _)| id.to_string()).collect();
    assert_eq!(left, std::slice::from_ref(&second.snapshot));
    let job = location.job("gone", restored(&volume, &first.snapshot, ""));
    assert_eq!(controller.fail(&job).0, FailureKind::NoSnapshot);

    // Damage is found, and a restore that meets it says so and leaves no mark.
    let store = location.store();
    use objects::ObjectStore;
    for pack in location.names(&store, "packs/") {
        store.delete(&pack).unwrap();
    }
    match controller.run(&location.job("check-2", check)).outcome {
        Some(Outcome::Checked(checked)) => {
            assert!(checked.errors > 0 && !checked.findings.is_empty(), "{checked:?}");
        }
        other => panic!("{other:?}"),
    }
    let (target, into) = node.volume("pod-2", EMPTY_DIR, "pv");
    // With the mark of an earlier attempt, the pod would start on it.
    fs::create_dir(target.join(".velero")).unwrap();
    fs::write(target.join(".velero/uid"), "").unwrap();
    let finished =
        controller.run(&location.job("damaged", restored(&into, &second.snapshot, "uid")));
    let (kind, message) = failure(&finished);
    assert_eq!(kind, FailureKind::Damaged, "{message}");
    assert!(message.contains("1 files") && message.contains("file"), "{message}");
    assert_eq!(finished.missing, 1);
    assert!(!target.join(".velero").exists());
}

#[test]
fn only_the_real_controller_is_spoken_to_and_a_silent_one_is_dialled_again() {
    let controller = Controller::start();
    let mut node = Node::new(&controller, &["--memory", "96M"]);
    // Certificates and token are read anew for every dial.
    fs::write(node.path("ca.crt"), Authority::new().certificate).unwrap();
    fs::write(node.path("token"), "expired").unwrap();
    node.start();
    node.logs("certificate");
    assert_eq!(controller.streams(), 0);
    assert!(node.http("/readyz").starts_with("HTTP/1.1 503"));
    fs::write(node.path("ca.crt"), &controller.authority.certificate).unwrap();
    controller.refused();
    node.logs("does not accept the token");
    fs::write(node.path("token"), TOKEN).unwrap();
    let (number, _) = controller.hello_after(0);
    controller.mute(true);
    let (next, _) = controller.hello_after(number);
    node.logs("has said nothing for 3 heartbeats");
    controller.mute(false);
    controller.accept_token("renewed");
    fs::write(node.path("token"), "renewed\n").unwrap();
    assert!(next > number);
    controller.cut();
    assert!(node.terminate().success());
}

#[test]
fn an_agent_without_the_kubelets_folder_ends_with_what_to_mount() {
    let controller = Controller::start();
    let mut node = Node::new(&controller, &["--memory", "96M"]);
    fs::remove_dir(node.path("kubelet/pods/agent-uid")).unwrap();
    node.start();
    assert_eq!(node.ended().code(), Some(1));
    let log = node.log();
    assert!(log.contains("--kubelet-root") && log.contains("agent-uid"), "{log}");
}
