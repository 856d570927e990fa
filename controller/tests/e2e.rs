//! The product on a real cluster of one node, installed from `deploy/`: what its README promises, and what happens when
//! its parts are killed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cluster;

use std::process::Command;
use std::time::Duration;

use cluster::{BUCKET, Cluster, NAMESPACE, install, is_ready, root, wait, wait_for};
use objects::testing::server::fresh;
use serde_json::{Value, json};

/// Text of a file in a pod of a script below; the same for the same number.
fn fill(files: u32) -> String {
    format!(
        "i=0; while [ $i -lt {files} ]; do mkdir -p /data/d$((i % 10)); echo \"file $i\" > /data/d$((i % 10))/f$i; \
         i=$((i + 1)); done; ln -s d1/f1 /data/link; chmod 640 /data/d2/f2; chown 1234:5678 /data/d3/f3"
    )
}

/// What tells two volumes apart: names, kinds, modes, owners and content.
const FINGERPRINT: &str = "cd /data && find . -mindepth 1 | sort | xargs -n 100 stat -c '%n %F %a %u %g' ; \
                           find . -type f | sort | xargs -n 100 md5sum";

fn snapshot(backup: &Value) -> String {
    backup["status"]["snapshotID"].as_str().unwrap().to_owned()
}

/// The command, on the location `default`, with nothing but the bucket and the passphrase.
fn ebackup(cluster: &Cluster, args: &[&str]) -> String {
    let secret = cluster.find("secret", NAMESPACE, "ebackup-repository-default").unwrap();
    let encoded = secret["data"]["passphrase"].as_str().unwrap();
    let decoded = Command::new("base64").arg("-d").stdin(input(encoded)).output().unwrap().stdout;
    let output = Command::new(root().join("target/image/root/usr/bin/ebackup"))
        .args(args)
        .env("EBACKUP_REPO", format!("s3://{BUCKET}/{}/restic/_chunkstore", cluster.prefix))
        .env("EBACKUP_ENDPOINT", format!("http://127.0.0.1:{}", cluster.s3.port))
        .env("EBACKUP_PASSWORD", String::from_utf8(decoded).unwrap())
        .env("AWS_ACCESS_KEY_ID", &cluster.s3.key)
        .env("AWS_SECRET_ACCESS_KEY", &cluster.s3.secret)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Text as standard input.
fn input(text: &str) -> std::fs::File {
    use std::io::{Seek, Write};
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.rewind().unwrap();
    file
}

#[test]
fn a_volume_is_saved_and_comes_back_in_another_pod() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace("roundtrip");
    let pod = cluster.pod(&namespace, "source", &fill(300), &|_| {});
    let first = cluster.save(&format!("{namespace}-1"), &pod);
    assert!(first["status"]["progress"]["bytesDone"].as_u64().unwrap() > 1000, "{first}");
    for time in ["startTimestamp", "completionTimestamp"] {
        assert!(first["status"][time].is_string(), "{time}: {first}");
    }
    cluster.exec(&namespace, "source", "echo more > /data/new; rm /data/d1/f11");
    let second = cluster.save(&format!("{namespace}-2"), &pod);
    assert_ne!(snapshot(&first), snapshot(&second));
    let fingerprint = cluster.exec(&namespace, "source", FINGERPRINT);
    assert!(
        fingerprint.lines().count() > 600 && fingerprint.contains("1234 5678"),
        "{fingerprint}"
    );

    cluster.restore(&namespace, "target", &snapshot(&second));
    assert_eq!(cluster.exec(&namespace, "target", FINGERPRINT), fingerprint);
    assert_eq!(
        cluster.exec(&namespace, "target", "ls -A /data/.velero 2>/dev/null | wc -l").trim(),
        "0"
    );

    // With no cluster at all: the bucket and the passphrase are enough.
    let list = ebackup(&cluster, &["--json", "snapshots"]);
    assert!(list.contains(&snapshot(&first)) && list.contains(&snapshot(&second)), "{list}");
    assert_eq!(ebackup(&cluster, &["dump", &snapshot(&second), "new"]), "more\n");
    ebackup(&cluster, &["check", "--read-data"]);
}

/// A Deployment's pods come and go; their claim stays.
#[test]
fn the_next_pod_of_a_claim_goes_on_with_its_chain() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace("claim");
    let _folder = cluster.claim(&namespace, "claimed");
    let claimed = |pod: &mut Value| {
        let claim = json!({ "name": "data", "persistentVolumeClaim": { "claimName": "claimed" } });
        pod["spec"]["volumes"][0] = claim;
    };
    let noise = "head -c 3000000 /dev/urandom > /data/noise";
    let pod = cluster.pod(&namespace, "first", noise, &claimed);
    let first = cluster.save(&format!("{namespace}-1"), &pod);
    cluster.kubectl(&["-n", &namespace, "delete", "pod", "first"]);
    let pod = cluster.pod(&namespace, "second", "echo more > /data/more", &claimed);
    let second = cluster.save(&format!("{namespace}-2"), &pod);
    let stored = |backup: &Value| backup["status"]["incrementalBytes"].as_u64().unwrap();
    assert!(stored(&first) > 3_000_000, "{first}");
    assert!(stored(&second) < 100_000, "{second}");
    let all = ebackup(&cluster, &["--json", "snapshots"]);
    let all: Vec<Value> = serde_json::from_str(&all).unwrap();
    let last = all.iter().find(|one| one["id"] == snapshot(&second).as_str()).unwrap();
    assert_eq!(last["parent"], snapshot(&first).as_str());
}

/// As the README has it.
#[test]
fn the_examples_run_as_they_stand() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace("examples");
    let pod = cluster.pod(&namespace, "source", &fill(30), &|_| {});
    assert!(is_ready(&pod));
    let snapshot = cluster.example("save-volume.sh", &[&namespace, "source", "data"], &[]);
    cluster.example("restore-volume.sh", &[&namespace, "target", snapshot.trim()], &[]);
    assert_eq!(
        cluster.exec(&namespace, "target", FINGERPRINT),
        cluster.exec(&namespace, "source", FINGERPRINT)
    );
    // A volume that is open to its user alone, as a database's is.
    cluster.exec(&namespace, "source", "chown -R 999:999 /data && chmod 700 /data");
    let snapshot = cluster.example("save-volume.sh", &[&namespace, "source", "data"], &[]);
    let user = [("RUN_AS", "999")];
    cluster.example("restore-volume.sh", &[&namespace, "private", snapshot.trim()], &user);
    assert_eq!(
        cluster.exec(&namespace, "private", FINGERPRINT),
        cluster.exec(&namespace, "source", FINGERPRINT)
    );
}

#[test]
fn the_agents_account_has_no_permission_and_the_controllers_few() {
    let cluster = Cluster::get();
    let may = |account: &str, verb: &str, what: &str, namespace: &str| {
        let user = format!("--as=system:serviceaccount:{NAMESPACE}:{account}");
        let text = cluster.kubectl(&["auth", "can-i", "--list", "-n", namespace, &user]);
        text.lines().any(|line| line.starts_with(what) && line.contains(verb))
    };
    for what in ["secrets", "pods", "podvolumebackups", "nodes", "*.*"] {
        assert!(!may("node-agent", "get", what, NAMESPACE), "an agent may get {what}");
    }
    assert!(may("velero", "get", "secrets", NAMESPACE));
    assert!(!may("velero", "get", "secrets", "default"));
    assert!(!may("velero", "create", "pods", NAMESPACE));
}

#[test]
fn a_volume_that_cannot_be_saved_is_refused_with_the_reason() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace("refused");
    let pod = cluster.pod(&namespace, "source", "true", &|pod| {
        pod["spec"]["volumes"][0] = json!({ "name": "data", "hostPath": { "path": "/tmp" } });
    });
    cluster.apply(&cluster.backup(&namespace, &pod));
    let failed = cluster.wait_for_phase("podvolumebackup", NAMESPACE, &namespace, "Failed");
    let message = failed["status"]["message"].as_str().unwrap();
    assert!(message.contains("hostPath"), "{message}");
    // And it is told where people look.
    let events = wait("an event", || {
        let text = cluster.kubectl(&["-n", NAMESPACE, "get", "events", "-o", "json"]);
        text.contains(&namespace).then_some(text)
    });
    assert!(events.contains("hostPath"), "{events}");
}

#[test]
fn a_location_says_what_is_wrong_with_it() {
    let cluster = Cluster::get();
    cluster.apply(&cluster.credentials("wrong-credentials", "HUAWEI_CLOUD", "not-the-secret"));
    cluster.apply(&cluster.location("wrong", "wrong-credentials", &fresh("wrong")));
    let location =
        cluster.wait_for_phase("backupstoragelocation", NAMESPACE, "wrong", "Unavailable");
    let message = location["status"]["message"].as_str().unwrap();
    assert!(message.contains("secret key"), "{message}");
    assert!(!message.contains("not-the-secret"), "{message}");
    cluster.apply(&cluster.credentials("wrong-credentials", "HUAWEI_CLOUD", &cluster.s3.secret));
    cluster.wait_for_phase("backupstoragelocation", NAMESPACE, "wrong", "Available");
    cluster.kubectl(&["-n", NAMESPACE, "delete", "backupstoragelocation", "wrong"]);
}

/// The first cluster is gone: all that is left is the bucket, and what the operator kept.
#[test]
fn the_passphrase_that_was_kept_is_enough_for_another_cluster() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace("second");
    let pod = cluster.pod(&namespace, "source", &fill(30), &|_| {});
    let saved = cluster.save(&namespace, &pod);
    let location = cluster.find("backupstoragelocation", NAMESPACE, "default").unwrap();
    let condition = |location: &Value, name: &str| {
        let all = location["status"]["conditions"].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|one| one["type"] == name)
    };
    let exported =
        condition(&location, "KeyNotExported").expect("it is told that the key was not kept");
    assert_eq!(exported["status"], "True", "{exported}");
    let secret = cluster.find("secret", NAMESPACE, "ebackup-repository-default").unwrap();
    let passphrase = secret["data"]["passphrase"].clone();

    // Programs, authority, objects, Secrets and the copies of the index: all of it.
    cluster.kubectl(&["delete", "namespace", NAMESPACE]);
    install();
    cluster.apply(&cluster.credentials("obs-credentials", "HUAWEI_CLOUD", &cluster.s3.secret));
    cluster.apply(&cluster.location("default", "obs-credentials", &cluster.prefix));
    let location =
        cluster.wait_for_phase("backupstoragelocation", NAMESPACE, "default", "Unavailable");
    let message = location["status"]["message"].as_str().unwrap();
    assert!(message.contains("ebackup-repository-default"), "{message}");
    assert!(
        cluster.find("secret", NAMESPACE, "ebackup-repository-default").is_none(),
        "none is made up"
    );

    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {
            "name": "ebackup-repository-default", "namespace": NAMESPACE,
            "annotations": { "ebackup.io/key-exported": "true" },
        },
        "data": { "passphrase": passphrase },
    }));
    let location =
        cluster.wait_for_phase("backupstoragelocation", NAMESPACE, "default", "Available");
    assert!(
        condition(&location, "KeyNotExported").is_none_or(|one| one["status"] == "False"),
        "{location}"
    );
    cluster.restore(&namespace, "after", &snapshot(&saved));
    assert_eq!(
        cluster.exec(&namespace, "after", FINGERPRINT),
        cluster.exec(&namespace, "source", FINGERPRINT)
    );

    // And it can be changed.
    cluster.apply(&json!({
        "apiVersion": "v1", "kind": "Secret",
        "metadata": {
            "name": "ebackup-repository-default", "namespace": NAMESPACE,
            "annotations": { "ebackup.io/key-exported": "true" },
        },
        "stringData": { "passphrase": "the-new-one" },
        "data": { "previous-passphrase": passphrase },
    }));
    wait("the event that the passphrase is changed", || {
        let text = cluster.kubectl(&["-n", NAMESPACE, "get", "events", "-o", "json"]);
        text.contains("PassphraseChanged").then_some(())
    });
    cluster.wait_for_phase("backupstoragelocation", NAMESPACE, "default", "Available");
    let again = cluster.namespace("changed");
    let pod = cluster.pod(&again, "source", &fill(30), &|_| {});
    cluster.save(&again, &pod);
}

/// A pod with volumes `v0`, `v1` and so on, of 30 MB of noise each.
fn pod_of_many(cluster: &Cluster, namespace: &str, count: u32) -> Value {
    let volumes: Vec<Value> =
        (0..count).map(|n| json!({ "name": format!("v{n}"), "emptyDir": {} })).collect();
    let mounts: Vec<Value> = (0..count)
        .map(|n| json!({ "name": format!("v{n}"), "mountPath": format!("/data/v{n}") }))
        .collect();
    let script = format!(
        "for i in $(seq 0 {}); do head -c 30000000 /dev/urandom > /data/v$i/noise; echo $i > /data/v$i/number; done",
        count - 1
    );
    cluster.pod(namespace, "source", &script, &|pod| {
        pod["spec"]["volumes"] = volumes.clone().into();
        pod["spec"]["containers"][0]["volumeMounts"] = mounts.clone().into();
    })
}

/// The PodVolumeBackups or -Restores of all volumes of such a pod.
struct Many<'a> {
    cluster: &'a Cluster,
    kind: &'static str,
    /// A label that all of them have, and its value.
    label: &'static str,
    group: String,
    count: usize,
}

impl<'a> Many<'a> {
    fn save(cluster: &'a Cluster, group: &str, pod: &Value, count: u32) -> Self {
        let label = "velero.io/backup-name";
        for n in 0..count {
            let mut backup = cluster.backup(&format!("{group}-{n}"), pod);
            backup["metadata"]["labels"][label] = group.into();
            backup["spec"]["volume"] = format!("v{n}").into();
            cluster.apply(&backup);
        }
        let (group, count) = (group.to_owned(), count as usize);
        Self { cluster, kind: "podvolumebackups", label, group, count }
    }

    /// Into the volumes of another pod, which are called as they were.
    fn restore(cluster: &'a Cluster, namespace: &str, pod: &str, backups: &[Value]) -> Self {
        let volume = |backup: &Value| backup["spec"]["volume"].as_str().unwrap().to_owned();
        let volumes: Vec<_> =
            backups.iter().map(|backup| (volume(backup), snapshot(backup))).collect();
        cluster.begin_restore(namespace, pod, &volumes);
        Self {
            cluster,
            kind: "podvolumerestores",
            label: "velero.io/restore-name",
            group: format!("{namespace}-{pod}"),
            count: volumes.len(),
        }
    }

    fn all(&self) -> Vec<Value> {
        let all = self.cluster.list(self.kind, NAMESPACE);
        let own = |one: &Value| one["metadata"]["labels"][self.label] == *self.group;
        all.into_iter().filter(own).collect()
    }

    /// Waits until so many have ended, while no more than three are ever in flight.
    fn until_done(&self, at_least: usize) {
        wait_for(&format!("{at_least} volumes to be done"), Duration::from_secs(600), || {
            let all = self.all();
            let count = |phases: &[&str]| {
                let is = |one: &&Value| {
                    phases.contains(&one["status"]["phase"].as_str().unwrap_or("New"))
                };
                all.iter().filter(is).count()
            };
            let running = count(&["Accepted", "InProgress"]);
            assert!(running <= 3, "{running} volumes are in flight at once");
            let done = count(&["Completed", "Failed", "Canceled"]);
            let too_late = done == self.count && at_least < done;
            assert!(
                !too_late,
                "all are done: what should follow {at_least} of them comes to nothing"
            );
            (done >= at_least).then_some(())
        });
    }

    /// Waits until all have ended as they should, and gives them.
    fn completed(&self) -> Vec<Value> {
        self.until_done(self.count);
        let all = self.all();
        for one in &all {
            assert_eq!(one["status"]["phase"], "Completed", "{one}");
        }
        all
    }
}

/// Kills all pods of a part of the product at once.
fn kill(cluster: &Cluster, label: &str) {
    let now = ["--grace-period=0", "--force", "--wait=false"];
    let which = ["-n", NAMESPACE, "delete", "pod", "-l", label];
    cluster.kubectl(&[&which[..], &now].concat());
}

/// Kills each part once, and then two together, long before all volumes are done.
fn everything_dies(cluster: &Cluster, many: &Many<'_>) {
    many.until_done(1);
    kill(cluster, "component=velero");
    many.until_done(3);
    kill(cluster, "name=node-agent");
    many.until_done(5);
    cluster.kill_api_server();
    many.until_done(7);
    cluster.kill_s3_server();
    many.until_done(9);
    kill(cluster, "component=velero");
    kill(cluster, "name=node-agent");
}

/// Twenty volumes, of which no more than three are in flight, while everything is killed once, on the way there and
/// on the way back.
#[test]
fn twenty_volumes_survive_the_death_of_every_part() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace("twenty");
    let pod = pod_of_many(&cluster, &namespace, 20);
    let many = Many::save(&cluster, &namespace, &pod, 20);
    everything_dies(&cluster, &many);
    let backups = many.completed();
    cluster.wait_until_ready();
    // With nothing but the bucket.
    for backup in &backups {
        let number = backup["spec"]["volume"].as_str().unwrap().strip_prefix('v').unwrap();
        let dumped = ebackup(&cluster, &["dump", &snapshot(backup), "number"]);
        assert_eq!(dumped, format!("{number}\n"));
    }

    let many = Many::restore(&cluster, &namespace, "target", &backups);
    everything_dies(&cluster, &many);
    many.completed();
    cluster.wait_until_ready();
    cluster.wait_for_pod(&namespace, "target");
    let [source, target] =
        ["source", "target"].map(|pod| cluster.exec(&namespace, pod, FINGERPRINT));
    assert!(source.matches("noise").count() >= 20, "{source}");
    assert_eq!(target, source, "bit for bit");
}

/// As an upgrade does it: the old programs are told to end while new ones start.
#[test]
fn a_rolling_restart_of_everything_loses_no_volume() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace("rolling");
    let pod = pod_of_many(&cluster, &namespace, 8);
    let many = Many::save(&cluster, &namespace, &pod, 8);
    many.until_done(2);
    cluster.kubectl(&["-n", NAMESPACE, "rollout", "restart", "daemonset/node-agent"]);
    cluster.kubectl(&["-n", NAMESPACE, "rollout", "restart", "deployment/velero"]);
    many.completed();
    cluster.wait_until_ready();
}

#[test]
fn an_agent_of_128_mib_saves_what_is_far_larger() {
    let cluster = Cluster::get();
    let namespace = cluster.namespace("large");
    // 20 GiB of which 256 MiB are there, and 200,000 files.
    let script = "dd if=/dev/urandom of=/data/disk bs=1M count=128 2>/dev/null; \
                  dd if=/dev/urandom of=/data/disk bs=1M seek=20352 count=128 2>/dev/null; \
                  for d in $(seq 1 200); do mkdir /data/d$d; awk -v d=$d 'BEGIN { \
                  for (i = 0; i < 1000; i++) { f = \"/data/d\" d \"/f\" i; print i, d > f; close(f) } }'; done";
    let pod = cluster.pod(&namespace, "source", script, &|_| {});
    let patch = json!({ "spec": { "template": { "spec": { "containers": [{
        "name": "node-agent",
        "resources": { "requests": { "memory": "128Mi" }, "limits": { "memory": "128Mi" } },
    }] } } } });
    cluster.kubectl(&[
        "-n",
        NAMESPACE,
        "patch",
        "daemonset",
        "node-agent",
        "-p",
        &patch.to_string(),
    ]);
    cluster.wait_until_ready();
    cluster.apply(&cluster.backup(&namespace, &pod));
    let saved = wait_for("the large volume to be saved", Duration::from_secs(600), || {
        let backup = cluster.find("podvolumebackup", NAMESPACE, &namespace)?;
        let phase = backup["status"]["phase"].as_str().unwrap_or_default();
        assert_ne!(phase, "Failed", "{backup}");
        (phase == "Completed").then_some(backup)
    });
    assert!(saved["status"]["progress"]["bytesDone"].as_u64().unwrap() > 20 << 30, "{saved}");
    let files = ebackup(&cluster, &["--json", "snapshots"]);
    let files: Vec<Value> = serde_json::from_str(&files).unwrap();
    let files = files.iter().find(|one| one["id"] == snapshot(&saved).as_str()).unwrap();
    assert_eq!(files["files"], 200_001, "{files}");
    let agents = cluster.pods("name=node-agent");
    let agent = agents.iter().find(|pod| is_ready(pod)).expect("the agent runs");
    let container = &agent["status"]["containerStatuses"][0];
    assert_eq!(container["restartCount"], 0, "{container:#}\n{}", cluster.agent_before());
    assert_eq!(agent["spec"]["containers"][0]["resources"]["limits"]["memory"], "128Mi");
    cluster.kubectl(&["delete", "namespace", &namespace, "--wait=false"]);
}
