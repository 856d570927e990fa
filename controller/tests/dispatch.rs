//! The dispatcher against a real API server and a real S3 server, with agents that the test plays.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use common::{Fleet, LOCATION, World, saved};
use controller::api::location::LocationPhase;
use controller::api::repository::RepositoryPhase;
use controller::api::{
    BackupRepository, BackupStorageLocation, PodVolumeBackup, PodVolumePhase, PodVolumeRestore,
};
use controller::desk::queue::Limits;
use controller::rooms::Settings;
use futures::future::join_all;
use k8s_openapi::api::core::v1::{Event, Secret};
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams};
use objects::testing::server::{SMALL_KEY, SMALL_USER, fresh};
use proto::v1::Finished;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn the_definitions_are_accepted_and_all_fields_survive() {
    let world = World::new("fields").await;
    let backup = json!({
        "node": "n", "pod": {"kind": "Pod", "namespace": "a", "name": "b", "uid": "c"},
        "volume": "v", "backupStorageLocation": "l", "repoIdentifier": "", "uploaderType": "restic",
        "tags": {"a": "b"}, "uploaderSettings": {"ParallelFilesUpload": "4"}, "cancel": true,
        "parentSnapshot": "p",
    });
    let status = json!({
        "phase": "InProgress", "path": "/x", "node": "n", "snapshotID": "s", "message": "m",
        "startTimestamp": "2026-01-02T03:04:05Z", "acceptedTimestamp": "2026-01-02T03:04:05Z",
        "completionTimestamp": "2026-01-02T03:04:05Z", "incrementalBytes": 9_000_000_000_u64,
        "progress": {"totalBytes": 9_000_000_000_u64, "bytesDone": 1}, "warnings": 3, "attempts": 2,
        "filesMissing": 1, "filesChanged": 1, "filesVanished": 1,
    });
    let made: PodVolumeBackup = world
        .create(json!({"apiVersion": "velero.io/v1", "kind": "PodVolumeBackup",
                       "metadata": {"name": "b"}, "spec": backup, "status": status}))
        .await;
    assert_eq!(json!(made.spec), backup);
    assert_eq!(json!(made.status), status, "a status is kept, as there is no subresource");
    let restore = json!({
        "pod": {"name": "b"}, "volume": "v", "backupStorageLocation": "l", "repoIdentifier": "",
        "uploaderType": "kopia", "snapshotID": "s", "snapshotSize": 5, "sourceNamespace": "a",
        "uploaderSettings": {"x": "y"}, "cancel": false,
    });
    let made: PodVolumeRestore = world
        .create(json!({"apiVersion": "velero.io/v1", "kind": "PodVolumeRestore",
                       "metadata": {"name": "r"}, "spec": restore}))
        .await;
    assert_eq!(json!(made.spec), restore);
    let location = json!({
        "provider": "aws", "config": {"region": "r"}, "credential": {"name": "n", "key": "k"},
        "objectStorage": {"bucket": "b", "prefix": "p", "caCert": "eA==",
                          "caCertRef": {"name": "n", "key": "k", "optional": true}},
        "default": true, "accessMode": "ReadOnly", "backupSyncPeriod": "1m0s",
        "validationFrequency": "0s",
    });
    let status = json!({
        "phase": "Available", "lastValidationTime": "2026-01-02T03:04:05Z",
        "lastSyncedTime": "2026-01-02T03:04:05Z", "message": "m", "lastSyncedRevision": "r",
        "accessMode": "ReadWrite", "conditions": [{
            "type": "Available", "status": "True", "reason": "R", "message": "m",
            "lastTransitionTime": "2026-01-02T03:04:05Z"}],
    });
    let made: BackupStorageLocation = world
        .create(json!({"apiVersion": "velero.io/v1", "kind": "BackupStorageLocation",
                       "metadata": {"name": "l"}, "spec": location, "status": status}))
        .await;
    assert_eq!((json!(made.spec), json!(made.status)), (location, status));
    let repository = json!({
        "volumeNamespace": "", "backupStorageLocation": "l", "repositoryType": "kopia",
        "maintenanceFrequency": "1h0m0s", "repositoryConfig": {"a": "b"}, "resticIdentifier": "x",
    });
    let status = json!({
        "phase": "Ready", "message": "m", "lastMaintenanceTime": "2026-01-02T03:04:05Z",
        "repositoryID": "i", "recentMaintenance": [{
            "result": "Succeeded", "startTimestamp": "2026-01-02T03:04:05Z",
            "completeTimestamp": "2026-01-02T03:04:05Z", "message": "m"}],
    });
    let made: BackupRepository = world
        .create(json!({"apiVersion": "velero.io/v1", "kind": "BackupRepository",
                       "metadata": {"name": "l"}, "spec": repository, "status": status}))
        .await;
    assert_eq!((json!(made.spec), json!(made.status)), (repository, status));
}

fn condition(location: &BackupStorageLocation, kind: &str) -> Option<String> {
    let conditions = location.status.as_ref()?.conditions.as_ref()?;
    let found = conditions.iter().find(|condition| condition.type_ == kind)?;
    Some(found.status.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_location_of_e_backup_works_and_asks_for_its_key_to_be_exported() {
    let world = World::new("sample").await;
    world.good_location().await;
    let dispatcher = world.dispatch(Settings::default());
    let fleet = Fleet::new(false);
    let _agent = fleet.join(&dispatcher, "n1").await;
    let is_good = |location: &BackupStorageLocation| {
        location.status.as_ref().is_some_and(|it| it.phase == Some(LocationPhase::Available))
            && condition(location, "KeyNotExported").as_deref() == Some("True")
            && condition(location, "ReachableFromNodes").as_deref() == Some("True")
    };
    let location = world.until(LOCATION, "is available", is_good).await;
    assert!(location.status.unwrap().last_validation_time.is_some());
    let is_ready = |repository: &BackupRepository| {
        repository.status.as_ref().is_some_and(|it| it.phase == RepositoryPhase::Ready)
    };
    let repository: BackupRepository = world.until(LOCATION, "is ready", is_ready).await;
    assert_eq!(repository.spec.repository_type.as_deref(), Some("ebackup"));
    let name = format!("ebackup-repository-{LOCATION}");
    let patch = json!({"metadata": {"annotations": {"ebackup.io/key-exported": "true"}}});
    world.change::<Secret>(&name, patch).await;
    let exported = |location: &BackupStorageLocation| {
        condition(location, "KeyNotExported").as_deref() == Some("False")
    };
    world.until(LOCATION, "knows that the key is exported", exported).await;
    let events = world.api::<Event>().list(&ListParams::default()).await.unwrap();
    let about_key = events.iter().any(|event| event.reason.as_deref() == Some("KeyNotExported"));
    assert!(about_key, "{events:?}");
    let (server, prefix) = (world.server.clone(), world.namespace.clone());
    let left = tokio::task::spawn_blocking(move || {
        let mut count = 0;
        let store = server.store(&prefix);
        let list = objects::ObjectStore::list(&store, "", &mut |_| {
            count += 1;
            Ok(())
        });
        list.map(|()| count)
    });
    // A validation may be under way.
    assert!(left.await.unwrap().unwrap() <= 1, "probe objects are left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_location_that_cannot_work_says_what_to_do() {
    let unavailable = |part: &'static str| {
        move |location: &BackupStorageLocation| {
            location.status.as_ref().is_some_and(|status| {
                status.phase == Some(LocationPhase::Unavailable)
                    && status.message.as_ref().is_some_and(|message| message.contains(part))
            })
        }
    };
    let world = World::new("wrong-key").await;
    world.location("ebackup-tests", "wrong").await;
    let _dispatcher = world.dispatch(Settings::default());
    let location =
        world.until(LOCATION, "is refused", unavailable("the secret key is wrong")).await;
    assert!(!location.status.unwrap().message.unwrap().contains(&world.server.secret));
    let other = World::new("no-bucket").await;
    other.location("ebackup-no-such-bucket", &world.server.secret).await;
    let _other = other.dispatch(Settings::default());
    other.until(LOCATION, "misses its bucket", unavailable("make the bucket")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_volumes_take_three_slots_and_all_complete() {
    let world = World::new("twenty").await;
    world.good_location().await;
    let dispatcher = world.dispatch(Settings::default());
    let fleet = Fleet::new(true);
    let _agents = (fleet.join(&dispatcher, "n1").await, fleet.join(&dispatcher, "n2").await);
    let pods = [world.pod("p1", "n1").await, world.pod("p2", "n2").await];
    for at in 0..20 {
        world.backup(&format!("b{at}"), &format!("backup-{}", at % 3), &pods[at % 2]).await;
    }
    fleet.until("that three run", |seen| seen.running.len() == 3).await;
    fleet.release();
    let names: Vec<String> = (0..20).map(|at| format!("b{at}")).collect();
    let all = names.iter().map(|name| world.until_phase(name, PodVolumePhase::Completed));
    for done in join_all(all).await {
        let status = done.status.clone().unwrap();
        assert_eq!(status.snapshot_id, Some(format!("snapshot-of-{}", done.uid().unwrap())));
        assert!(status.start_timestamp.is_some() && status.completion_timestamp.is_some());
        assert_eq!(status.progress.unwrap().bytes_done, Some(100));
    }
    fleet.until("that all are recorded", |seen| seen.recorded.len() >= 21).await;
    let seen = fleet.seen();
    assert_eq!(seen.most, 3);
    assert!(seen.assigned.values().all(|times| *times == [false]), "{:?}", seen.assigned);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_dispatcher_takes_over_in_the_middle() {
    let world = World::new("takeover").await;
    world.good_location().await;
    let first = world.dispatch(Settings::default());
    let fleet = Fleet::new(true);
    let mut agent = fleet.join(&first, "n1").await;
    let pod = world.pod("p", "n1").await;
    for at in 0..8 {
        world.backup(&format!("b{at}"), "backup", &pod).await;
    }
    fleet.until("that three run", |seen| seen.running.len() == 3).await;
    let held: Vec<String> = fleet.seen().running.keys().cloned().collect();
    agent.cut(&fleet).await;
    first.kill().await;
    let second = world.dispatch(Settings::default());
    let _agent = fleet.join(&second, "n1").await;
    fleet.release();
    let names: Vec<String> = (0..8).map(|at| format!("b{at}")).collect();
    let all = names.iter().map(|name| world.until_phase(name, PodVolumePhase::Completed));
    assert_eq!(join_all(all).await.len(), 8);
    let seen = fleet.seen();
    assert!(seen.most <= 3, "{seen:?}");
    for job in held {
        assert_eq!(seen.assigned[&job].len(), 1, "what ran went on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_restarted_agent_lost_is_sent_again_by_another_dispatcher() {
    let world = World::new("restarted").await;
    world.good_location().await;
    let first = world.dispatch(Settings::default());
    let fleet = Fleet::new(true);
    let mut agent = fleet.join_with_room(&first, "n1", 1).await;
    let pod = world.pod("p", "n1").await;
    let uid = world.backup("b", "backup", &pod).await.uid().unwrap();
    world.until_phase("b", PodVolumePhase::InProgress).await;
    agent.cut(&fleet).await;
    first.kill().await;
    fleet.forget();
    let second = world.dispatch(Settings::default());
    // All its room is taken by what it lacks.
    let _agent = fleet.join_with_room(&second, "n1", 1).await;
    fleet.release();
    world.until_phase("b", PodVolumePhase::Completed).await;
    assert_eq!(fleet.seen().assigned[&uid], [false, true]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_brings_its_agent_down_again_and_again_fails() {
    let world = World::new("deadly").await;
    world.good_location().await;
    let dispatcher = world.dispatch(Settings::default());
    let fleet = Fleet::new(true);
    let mut agent = fleet.join(&dispatcher, "n1").await;
    let pod = world.pod("p", "n1").await;
    let uid = world.backup("b", "backup", &pod).await.uid().unwrap();
    for attempt in 1..=3 {
        let given =
            |seen: &common::Seen| seen.assigned.get(&uid).is_some_and(|it| it.len() == attempt);
        fleet.until("that it is given", given).await;
        agent.leave_with_jobs(&fleet).await;
        fleet.forget();
        agent = fleet.join(&dispatcher, "n1").await;
    }
    let failed = world.until_phase("b", PodVolumePhase::Failed).await.status.unwrap();
    let message = failed.message.unwrap();
    assert!(message.contains("ended 3 times"), "{message}");
    assert_eq!(fleet.seen().assigned[&uid].len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_begin_does_not_wait_for_ever() {
    let world = World::new("stuck").await;
    world.good_location().await;
    let settings = Settings { start_within: Duration::from_secs(2), ..Settings::default() };
    let _dispatcher = world.dispatch(settings);
    // Nobody connects from there.
    let pod = world.pod("p", "dead").await;
    world.backup("b", "backup", &pod).await;
    let failed = world.until_phase("b", PodVolumePhase::Failed).await.status.unwrap();
    let message = failed.message.unwrap();
    assert!(message.contains("given up after"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prune_goes_on_under_another_dispatcher() {
    let world = World::new("adopted").await;
    world.good_location().await;
    let settings = Settings { prune_every: Duration::from_secs(1), ..Settings::default() };
    let first = world.dispatch(settings.clone());
    let fleet = Fleet::new(true);
    fleet.hold_prunes();
    let mut agent = fleet.join(&first, "n1").await;
    fleet.until("that it prunes", |seen| seen.pruning.is_some()).await;
    let job = fleet.seen().pruning.unwrap();
    agent.cut(&fleet).await;
    first.kill().await;
    let second = world.dispatch(settings);
    let agent = fleet.join(&second, "n1").await;
    agent.say_finished(common::pruned(&job)).await;
    fleet.until("that it is recorded", |seen| seen.recorded.contains(&job)).await;
    let is_told = |repository: &BackupRepository| {
        let status = repository.status.as_ref();
        status.is_some_and(|status| status.last_maintenance_time.is_some())
    };
    let _told: BackupRepository = world.until(LOCATION, "tells of it", is_told).await;
    assert!(!fleet.seen().cancelled.contains(&job), "it was let go on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_of_a_location_keeps_what_others_wrote() {
    let world = World::new("kept").await;
    world.good_location().await;
    let _dispatcher = world.dispatch(Settings::default());
    let validated = |location: &BackupStorageLocation| {
        location.status.as_ref().and_then(|status| status.last_validation_time.clone())
    };
    let mut last = world.until(LOCATION, "is validated", |it| validated(it).is_some()).await;
    for synced in ["2026-01-02T03:04:05Z", "2026-01-03T03:04:05Z"] {
        let patch = json!({"status": {"lastSyncedTime": synced}});
        world.change::<BackupStorageLocation>(LOCATION, patch).await;
        let old = validated(&last);
        last = world.until(LOCATION, "is validated again", |it| validated(it) != old).await;
        let kept = json!(last.status.as_ref().unwrap().last_synced_time);
        assert_eq!(kept, json!(synced));
    }
}

async fn cancel(world: &World, name: &str) {
    world.change::<PodVolumeBackup>(name, json!({"spec": {"cancel": true}})).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_and_what_runs_can_be_cancelled_and_deleted() {
    let world = World::new("cancel").await;
    world.good_location().await;
    let limits = Limits { cluster: 2, node: 0 };
    let dispatcher = world.dispatch(Settings { limits, ..Settings::default() });
    let fleet = Fleet::new(true);
    let _agent = fleet.join(&dispatcher, "n1").await;
    let pod = world.pod("p", "n1").await;
    let mut uids = Vec::new();
    for name in ["runs", "deleted"] {
        uids.push(world.backup(name, "backup", &pod).await.uid().unwrap());
        world.until_phase(name, PodVolumePhase::InProgress).await;
    }
    world.backup("waits", "backup", &pod).await;
    let says_why = |object: &PodVolumeBackup| {
        let message = object.status.as_ref().and_then(|status| status.message.as_ref());
        message.is_some_and(|message| message.contains("waiting for a worker"))
    };
    world.until("waits", "says why it waits", says_why).await;
    cancel(&world, "waits").await;
    world.until_phase("waits", PodVolumePhase::Canceled).await;
    cancel(&world, "runs").await;
    world.until_phase("runs", PodVolumePhase::Canceled).await;
    let api = world.api::<PodVolumeBackup>();
    api.delete("deleted", &DeleteParams::default()).await.unwrap();
    fleet.until("that both end", |seen| uids.iter().all(|uid| seen.cancelled.contains(uid))).await;
    fleet
        .until("that both are recorded", |seen| uids.iter().all(|it| seen.recorded.contains(it)))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_agent_holds_nobody_up_and_its_jobs_fail() {
    let world = World::new("lost").await;
    world.good_location().await;
    let settings = Settings {
        limits: Limits { cluster: 1, node: 0 },
        agent_uncounted: Duration::ZERO,
        agent_lost: Duration::from_secs(2),
        ..Settings::default()
    };
    let dispatcher = world.dispatch(settings);
    let fleet = Fleet::new(true);
    let lost = fleet.join(&dispatcher, "n1").await;
    let _other = fleet.join(&dispatcher, "n2").await;
    let (pod, other) = (world.pod("p1", "n1").await, world.pod("p2", "n2").await);
    let uid = world.backup("first", "backup", &pod).await.uid().unwrap();
    world.until_phase("first", PodVolumePhase::InProgress).await;
    world.backup("second", "backup", &other).await;
    lost.leave_with_jobs(&fleet).await;
    let failed = world.until_phase("first", PodVolumePhase::Failed).await;
    let message = failed.status.unwrap().message.unwrap();
    assert!(message.contains("agent of node 'n1'"), "{message}");
    world.until_phase("second", PodVolumePhase::InProgress).await;
    // What it has saved after all is named, so that it can be forgotten.
    fleet.forget();
    let back = fleet.join(&dispatcher, "n1").await;
    back.say_finished(saved(&uid)).await;
    fleet.until("that it is recorded", |seen| seen.recorded.contains(&uid)).await;
    let named = |backup: &PodVolumeBackup| {
        backup.status.as_ref().is_some_and(|status| status.snapshot_id.is_some())
    };
    let late = world.until("first", "named", named).await.status.unwrap();
    assert_eq!(late.phase, PodVolumePhase::Failed);
    assert!(late.message.unwrap().contains("after all"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outcome_that_is_said_again_is_recorded_again() {
    let world = World::new("twice").await;
    world.good_location().await;
    let dispatcher = world.dispatch(Settings::default());
    let fleet = Fleet::new(false);
    let agent = fleet.join(&dispatcher, "n1").await;
    let pod = world.pod("p", "n1").await;
    let uid = world.backup("b", "backup", &pod).await.uid().unwrap();
    let done = world.until_phase("b", PodVolumePhase::Completed).await;
    let times = |count: usize| {
        let uid = uid.clone();
        move |seen: &common::Seen| seen.recorded.iter().filter(|job| **job == uid).count() == count
    };
    fleet.until("that it is recorded", times(1)).await;
    agent.say_finished(saved(&uid)).await;
    fleet.until("that it is recorded again", times(2)).await;
    agent.say_finished(saved("a-job-of-nobody")).await;
    let unknown = |seen: &common::Seen| seen.recorded.iter().any(|job| job == "a-job-of-nobody");
    fleet.until("that what nobody knows is forgotten", unknown).await;
    let now = world.api::<PodVolumeBackup>().get("b").await.unwrap();
    assert_eq!(now.resource_version(), done.resource_version(), "nothing was written again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_of_which_files_could_not_be_read_is_not_completed_and_keeps_its_snapshot() {
    let world = World::new("incomplete").await;
    world.good_location().await;
    let dispatcher = world.dispatch(Settings::default());
    let fleet = Fleet::new(true);
    let agent = fleet.join(&dispatcher, "n1").await;
    let pod = world.pod("p", "n1").await;
    let said = |job: &str, missing| Finished {
        missing,
        changed: 2,
        vanished: 1,
        warnings: missing + 3,
        first_missing: vec!["db/data: cannot be read: Input/output error".to_owned()],
        first_changed: vec!["log".to_owned()],
        first_vanished: vec!["tmp".to_owned()],
        ..saved(job)
    };
    for (name, missing) in [("lacks", 3), ("warns", 0)] {
        let uid = world.backup(name, "backup", &pod).await.uid().unwrap();
        world.until_phase(name, PodVolumePhase::InProgress).await;
        agent.say_finished(said(&uid, missing)).await;
        fleet.until("that it is recorded", |seen| seen.recorded.contains(&uid)).await;
    }
    let lacks = world.until_phase("lacks", PodVolumePhase::Failed).await;
    let snapshot = format!("snapshot-of-{}", lacks.uid().unwrap());
    let status = lacks.status.unwrap();
    assert_eq!(status.snapshot_id, Some(snapshot));
    let counts = (status.files_missing, status.files_changed, status.files_vanished);
    assert_eq!((counts, status.warnings), ((Some(3), Some(2), Some(1)), Some(6)));
    let message = status.message.unwrap();
    for part in ["3 files or folders", "db/data: cannot be read", "2 files changed", "log", "tmp"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    let warns = world.until_phase("warns", PodVolumePhase::Completed).await.status.unwrap();
    assert_eq!((warns.files_missing, warns.files_changed), (None, Some(2)));
    let events = world.api::<Event>().list(&ListParams::default()).await.unwrap();
    for (name, reason) in [("lacks", "FilesMissing"), ("warns", "CompletedWithWarnings")] {
        let told = events.iter().any(|event| {
            event.involved_object.name.as_deref() == Some(name)
                && event.reason.as_deref() == Some(reason)
                && event.type_.as_deref() == Some("Warning")
        });
        assert!(told, "{reason} of {name}: {events:?}");
    }
}

fn restore_is(phase: PodVolumePhase) -> impl Fn(&PodVolumeRestore) -> bool {
    move |object| object.status.as_ref().is_some_and(|status| status.phase == phase)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_restored_when_its_pod_waits_for_it() {
    let world = World::new("restore").await;
    world.good_location().await;
    let dispatcher = world.dispatch(Settings::default());
    let fleet = Fleet::new(false);
    let _agent = fleet.join(&dispatcher, "n1").await;
    let unprepared = world.pod("runs", "n1").await;
    world.restore("refused", "s1", &unprepared).await;
    let refused = world.until("refused", "is refused", restore_is(PodVolumePhase::Failed)).await;
    let message = refused.status.unwrap().message.unwrap();
    assert!(message.contains("no init container restore-wait"), "{message}");
    let pod = world.waiting_pod("waits", "n1").await;
    let uid = world.restore("r", "s1", &pod).await.uid().unwrap();
    let done = world.until("r", "is done", restore_is(PodVolumePhase::Completed)).await;
    assert_eq!(done.status.unwrap().progress.unwrap().bytes_done, Some(100));
    let expected = ("s1".to_owned(), "uid-of-the-restore".to_owned());
    assert_eq!(fleet.seen().restores[&uid], expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_location_that_is_only_read_is_restored_from_and_not_saved_to() {
    let world = World::new("read-only").await;
    world.good_location().await;
    let patch = json!({"spec": {"accessMode": "ReadOnly"}});
    world.change::<BackupStorageLocation>(LOCATION, patch).await;
    // Without a repository there is nothing to restore; who only reads does not make up its passphrase.
    let _passphrase: Secret = world
        .create(json!({"metadata": {"name": format!("ebackup-repository-{LOCATION}")},
                       "stringData": {"passphrase": "of another cluster"}}))
        .await;
    let settings = Settings { prune_every: Duration::from_secs(1), ..Settings::default() };
    let dispatcher = world.dispatch(settings);
    let fleet = Fleet::new(false);
    let _agent = fleet.join(&dispatcher, "n1").await;
    let pod = world.pod("p", "n1").await;
    world.backup("b", "backup", &pod).await;
    let failed = world.until_phase("b", PodVolumePhase::Failed).await;
    let message = failed.status.unwrap().message.unwrap();
    assert!(message.contains("ReadOnly"), "{message}");
    let waiting = world.waiting_pod("waits", "n1").await;
    world.restore("r", "s1", &waiting).await;
    world.until("r", "is done", restore_is(PodVolumePhase::Completed)).await;
    let seen = fleet.seen();
    assert_eq!((seen.opened, seen.pruned), (0, 0), "nothing writes to it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_is_pruned_regularly_and_says_so() {
    let world = World::new("prune").await;
    world.good_location().await;
    let settings = Settings { prune_every: Duration::from_secs(1), ..Settings::default() };
    let dispatcher = world.dispatch(settings);
    let fleet = Fleet::new(false);
    let _agent = fleet.join(&dispatcher, "n1").await;
    let pruned_twice = |repository: &BackupRepository| {
        let recent =
            repository.status.as_ref().and_then(|status| status.recent_maintenance.as_ref());
        recent.is_some_and(|all| all.len() >= 2)
    };
    let repository: BackupRepository = world.until(LOCATION, "is pruned twice", pruned_twice).await;
    let status = repository.status.unwrap();
    assert!(status.last_maintenance_time.is_some());
    let run = status.recent_maintenance.unwrap().remove(0);
    assert_eq!(run.result.as_deref(), Some("Succeeded"));
    assert!(run.message.as_ref().unwrap().contains("deleted 7 packs"), "{run:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_key_reaches_the_agents() {
    let world = World::new("renew").await;
    let bucket = fresh("renew");
    let (server, name) = (world.server.clone(), bucket.clone());
    let made = tokio::task::spawn_blocking(move || {
        let config = server.config(&name, "");
        server.make_bucket(&config);
        server.allow(&config, SMALL_USER, &["s3:*"]);
    });
    made.await.unwrap();
    world.location(&bucket, &world.server.secret).await;
    let dispatcher = world.dispatch(Settings::default());
    let fleet = Fleet::new(true);
    let _agents = (fleet.join(&dispatcher, "n1").await, fleet.join(&dispatcher, "n2").await);
    let pod = world.pod("p", "n1").await;
    world.backup("b", "backup", &pod).await;
    world.until_phase("b", PodVolumePhase::InProgress).await;
    let credential = format!(
        "HUAWEI_CLOUD_ACCESS_KEY_ID={SMALL_KEY}\nHUAWEI_CLOUD_SECRET_ACCESS_KEY={}\n",
        world.server.secret
    );
    world
        .change::<Secret>("secret-secure-opaque", json!({"stringData": {"cloud": credential}}))
        .await;
    fleet.until("that the agent hears of it", |seen| !seen.renewed.is_empty()).await;
    let seen = fleet.seen();
    let expected = ("n1".to_owned(), SMALL_KEY.to_owned());
    assert_eq!(seen.renewed, [expected].into(), "only who works with it is told");
    assert_eq!(seen.opened, 1, "another key makes no other repository");
    fleet.release();
    world.until_phase("b", PodVolumePhase::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_finalizer_keeps_from_going_is_not_worked_on() {
    let world = World::new("finalizer").await;
    world.good_location().await;
    let dispatcher = world.dispatch(Settings::default());
    let fleet = Fleet::new(true);
    let _agent = fleet.join(&dispatcher, "n1").await;
    let pod = world.pod("p", "n1").await;
    let uid = world.backup("b", "backup", &pod).await.uid().unwrap();
    world.change::<PodVolumeBackup>("b", json!({"metadata": {"finalizers": ["a.test/b"]}})).await;
    world.until_phase("b", PodVolumePhase::InProgress).await;
    world.api::<PodVolumeBackup>().delete("b", &DeleteParams::default()).await.unwrap();
    world.until_phase("b", PodVolumePhase::Canceled).await;
    assert!(fleet.seen().cancelled.contains(&uid));
    world.change::<PodVolumeBackup>("b", json!({"metadata": {"finalizers": null}})).await;
}

/// By a leader that is gone, say, or by a write whose answer was lost.
#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_else_accepted_is_sent_to_its_agent() {
    let world = World::new("accepted").await;
    world.good_location().await;
    let dispatcher = world.dispatch(Settings::default());
    let fleet = Fleet::new(false);
    let _agent = fleet.join(&dispatcher, "n1").await;
    let is_open = |repository: &BackupRepository| {
        repository.status.as_ref().is_some_and(|it| it.phase == RepositoryPhase::Ready)
    };
    let _open: BackupRepository = world.until(LOCATION, "is ready", is_open).await;
    let pod = world.pod("p", "n1").await;
    let _made: PodVolumeBackup = world
        .create(json!({
            "apiVersion": "velero.io/v1", "kind": "PodVolumeBackup", "metadata": {"name": "b"},
            "spec": {
                "node": "n1", "volume": "data", "backupStorageLocation": LOCATION, "repoIdentifier": "",
                "pod": {"kind": "Pod", "namespace": world.namespace, "name": "p", "uid": pod.uid()},
            },
            "status": {"phase": "Accepted", "node": "n1"},
        }))
        .await;
    world.until_phase("b", PodVolumePhase::Completed).await;
}
