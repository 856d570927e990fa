//! A real cluster with the product in it, installed from `deploy/` as a user installs it, and spoken to by kubectl.
//!
//! The cluster and the S3 server are those of `cargo xtask cluster up` and `cargo xtask s3 up`, found by their
//! environment; the image is `target/image/ebackup.tar`. Whatever is missing fails the test, and says how to get it.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use objects::testing::server::{TestServer, fresh};
use serde_json::{Value, json};

/// Where everything of the product is.
pub(crate) const NAMESPACE: &str = "velero";

/// What anything may take that is not a matter of the amount of data. Slow machines are no failure.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);

/// The cluster, for one test at a time: they restart parts of it.
pub(crate) struct Cluster {
    pub(crate) s3: TestServer,
    /// Bucket and prefix of the location `default`, made for this run.
    pub(crate) prefix: String,
    _one_at_a_time: MutexGuard<'static, ()>,
}

pub(crate) const BUCKET: &str = "ebackup-cluster";

fn var(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!(
            "{name} is not set: this test needs a cluster. Start one with 'cargo xtask cluster up', and tell this \
             shell with 'set -a; . target/cluster/env; . target/s3/env'"
        )
    })
}

/// The checkout, whose `target/image` holds what runs in the cluster.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

impl Cluster {
    /// The cluster with the product installed and a location that is available.
    pub(crate) fn get() -> Self {
        static LOCK: Mutex<()> = Mutex::new(());
        static PREFIX: OnceLock<String> = OnceLock::new();
        let lock = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        let s3 = TestServer::from_env();
        let prefix = PREFIX.get_or_init(|| {
            install();
            fresh("cluster")
        });
        let cluster = Self { s3, prefix: prefix.clone(), _one_at_a_time: lock };
        cluster.s3.make_bucket(&cluster.s3.config(BUCKET, ""));
        cluster.apply(&cluster.credentials("obs-credentials", "HUAWEI_CLOUD", &cluster.s3.secret));
        cluster.apply(&cluster.location("default", "obs-credentials", prefix));
        cluster.wait_for_phase("backupstoragelocation", NAMESPACE, "default", "Available");
        cluster
    }

    /// A Secret with credentials, as e-backup has it.
    pub(crate) fn credentials(&self, name: &str, variables: &str, secret: &str) -> Value {
        let key = &self.s3.key;
        json!({
            "apiVersion": "v1", "kind": "Secret", "type": "cfe/secure-opaque",
            "metadata": {
                "name": name, "namespace": NAMESPACE, "labels": { "secret.everest.io/backup": "true" },
            },
            "stringData": {
                "cloud": format!("{variables}_ACCESS_KEY_ID={key}\n{variables}_SECRET_ACCESS_KEY={secret}\n"),
            },
        })
    }

    /// A location, as e-backup has it.
    pub(crate) fn location(&self, name: &str, credentials: &str, prefix: &str) -> Value {
        json!({
            "apiVersion": "velero.io/v1", "kind": "BackupStorageLocation",
            "metadata": { "name": name, "namespace": NAMESPACE },
            "spec": {
                "provider": "huawei",
                "config": { "endpoint": format!("http://127.0.0.1:{}", self.s3.port) },
                "credential": { "name": credentials, "key": "cloud" },
                "objectStorage": { "bucket": BUCKET, "prefix": prefix },
            },
        })
    }

    /// Runs kubectl, which has to succeed; its standard output.
    pub(crate) fn kubectl(&self, args: &[&str]) -> String {
        kubectl(args)
    }

    /// `kubectl apply` of one object.
    pub(crate) fn apply(&self, object: &Value) {
        apply(object);
    }

    /// An object, if it is there.
    pub(crate) fn find(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        let output = kubectl_output(&["-n", namespace, "get", kind, name, "-o", "json"]);
        output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    /// All objects of a kind in a namespace.
    pub(crate) fn list(&self, kind: &str, namespace: &str) -> Vec<Value> {
        wait("an answer of the API server", || {
            let output = kubectl_output(&["-n", namespace, "get", kind, "-o", "json"]);
            let list: Value = serde_json::from_slice(&output.stdout).ok()?;
            list["items"].as_array().cloned()
        })
    }

    /// Waits until an object has this phase and returns it. Another final phase fails at once.
    pub(crate) fn wait_for_phase(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        phase: &str,
    ) -> Value {
        wait(&format!("{kind} {name} to be {phase}"), || {
            let object = self.find(kind, namespace, name)?;
            let found = object["status"]["phase"].as_str().unwrap_or_default();
            let is_final = ["Completed", "Failed", "Canceled", "Succeeded"].contains(&found);
            assert!(found == phase || !is_final, "{kind} {name} is {found}: {}", object["status"]);
            (found == phase).then_some(object)
        })
    }

    /// Makes a namespace for one test.
    pub(crate) fn namespace(&self, name: &str) -> String {
        let name = fresh(name);
        kubectl(&["create", "namespace", &name]);
        wait("the namespace's account", || {
            kubectl_output(&["-n", &name, "get", "serviceaccount", "default"])
                .status
                .success()
                .then_some(())
        });
        name
    }

    /// Makes a pod that runs a shell script and is ready when `/data/ready` exists or, without `script`, at once, and
    /// waits for it; returns it.
    pub(crate) fn pod(
        &self,
        namespace: &str,
        name: &str,
        script: &str,
        extra: &dyn Fn(&mut Value),
    ) -> Value {
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": namespace },
            "spec": {
                "terminationGracePeriodSeconds": 0,
                "containers": [{
                    "name": "main", "image": "busybox:test", "imagePullPolicy": "Never",
                    "command": ["sh", "-c", format!("{script}\ntouch /tmp/ready; exec sleep 1000000")],
                    "readinessProbe": { "exec": { "command": ["test", "-e", "/tmp/ready"] }, "periodSeconds": 1 },
                    "volumeMounts": [{ "name": "data", "mountPath": "/data" }],
                }],
                "volumes": [{ "name": "data", "emptyDir": {} }],
            },
        });
        extra(&mut pod);
        apply(&pod);
        self.wait_for_pod(namespace, name)
    }

    /// Makes a claim with a local volume, as a provisioner would; the folder goes with what is returned.
    pub(crate) fn claim(&self, namespace: &str, name: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let volume = format!("{namespace}-{name}");
        let common = json!({
            "accessModes": ["ReadWriteOnce"], "storageClassName": "by-hand", "volumeMode": "Filesystem",
        });
        let with = |more: Value| {
            let mut spec = common.clone();
            spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            spec
        };
        apply(&json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": { "name": volume },
            "spec": with(json!({
                "capacity": { "storage": "1Gi" }, "local": { "path": folder.path() },
                "claimRef": { "namespace": namespace, "name": name },
                "nodeAffinity": { "required": { "nodeSelectorTerms": [{ "matchExpressions": [
                    { "key": "kubernetes.io/hostname", "operator": "Exists" },
                ] }] } },
            })),
        }));
        apply(&json!({
            "apiVersion": "v1", "kind": "PersistentVolumeClaim",
            "metadata": { "name": name, "namespace": namespace },
            "spec": with(json!({
                "volumeName": volume, "resources": { "requests": { "storage": "1Gi" } },
            })),
        }));
        folder
    }

    /// Waits until a pod is ready.
    pub(crate) fn wait_for_pod(&self, namespace: &str, name: &str) -> Value {
        wait(&format!("pod {name} to be ready"), || {
            let pod = self.find("pod", namespace, name)?;
            is_ready(&pod).then_some(pod)
        })
    }

    /// Runs a shell command in a pod.
    pub(crate) fn exec(&self, namespace: &str, pod: &str, script: &str) -> String {
        kubectl(&["-n", namespace, "exec", pod, "-c", "main", "--", "sh", "-c", script])
    }

    /// A PodVolumeBackup of the volume `data` of a pod.
    pub(crate) fn backup(&self, name: &str, pod: &Value) -> Value {
        let meta = &pod["metadata"];
        json!({
            "apiVersion": "velero.io/v1", "kind": "PodVolumeBackup",
            "metadata": {
                "name": name, "namespace": NAMESPACE,
                "labels": { "velero.io/backup-name": "by-hand", "velero.io/pod-uid": meta["uid"] },
            },
            "spec": {
                "node": pod["spec"]["nodeName"],
                "pod": { "kind": "Pod", "namespace": meta["namespace"], "name": meta["name"], "uid": meta["uid"] },
                "volume": "data", "backupStorageLocation": "default", "repoIdentifier": "",
            },
        })
    }

    /// Saves the volume `data` of a pod and returns the finished PodVolumeBackup.
    pub(crate) fn save(&self, name: &str, pod: &Value) -> Value {
        self.apply(&self.backup(name, pod));
        self.wait_for_phase("podvolumebackup", NAMESPACE, name, "Completed")
    }

    /// Restores a snapshot into the volume `data` of a new pod, and waits until that is ready.
    pub(crate) fn restore(&self, namespace: &str, name: &str, snapshot: &str) {
        self.begin_restore(namespace, name, &[("data".to_owned(), snapshot.to_owned())]);
        let restore = format!("{namespace}-{name}-data");
        self.wait_for_phase("podvolumerestore", NAMESPACE, &restore, "Completed");
        self.wait_for_pod(namespace, name);
    }

    /// Makes a pod whose volumes wait for what restores put into them, as Velero makes one, and a
    /// PodVolumeRestore of a snapshot for each. A volume other than `data` is at `/data/NAME`.
    pub(crate) fn begin_restore(&self, namespace: &str, name: &str, volumes: &[(String, String)]) {
        let group = format!("{namespace}-{name}");
        let uid = format!("{group}-uid");
        let empty = |(volume, _): &(String, String)| json!({ "name": volume, "emptyDir": {} });
        let restored = |(volume, _): &(String, String)| json!({ "name": volume, "mountPath": format!("/restores/{volume}") });
        let mount = |(volume, _): &(String, String)| {
            let path =
                if volume == "data" { "/data".to_owned() } else { format!("/data/{volume}") };
            json!({ "name": volume, "mountPath": path })
        };
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": namespace },
            "spec": {
                "terminationGracePeriodSeconds": 0,
                "initContainers": [{
                    "name": "restore-wait", "image": "ebackup:dev", "imagePullPolicy": "Never",
                    "command": ["ebackup", "restore-wait"], "args": [uid],
                    // The restricted level of pod security.
                    "securityContext": {
                        "runAsNonRoot": true, "runAsUser": 1000, "allowPrivilegeEscalation": false,
                        "capabilities": { "drop": ["ALL"] }, "seccompProfile": { "type": "RuntimeDefault" },
                    },
                    "volumeMounts": volumes.iter().map(restored).collect::<Vec<_>>(),
                }],
                "containers": [{
                    "name": "main", "image": "busybox:test", "imagePullPolicy": "Never",
                    "command": ["sleep", "1000000"],
                    "volumeMounts": volumes.iter().map(mount).collect::<Vec<_>>(),
                }],
                "volumes": volumes.iter().map(empty).collect::<Vec<_>>(),
            },
        });
        apply(&pod);
        let pod = wait("the pod to exist", || self.find("pod", namespace, name));
        for (volume, snapshot) in volumes {
            apply(&json!({
                "apiVersion": "velero.io/v1", "kind": "PodVolumeRestore",
                "metadata": {
                    "name": format!("{group}-{volume}"), "namespace": NAMESPACE,
                    "labels": {
                        "velero.io/restore-name": group, "velero.io/restore-uid": uid,
                        "velero.io/pod-uid": pod["metadata"]["uid"],
                    },
                },
                "spec": {
                    "pod": { "kind": "Pod", "namespace": namespace, "name": name, "uid": pod["metadata"]["uid"] },
                    "volume": volume, "backupStorageLocation": "default", "repoIdentifier": "",
                    "snapshotID": snapshot, "sourceNamespace": namespace,
                },
            }));
        }
    }

    /// Runs a script of `deploy/examples`, which has to succeed; its standard output.
    pub(crate) fn example(&self, name: &str, args: &[&str], env: &[(&str, &str)]) -> String {
        let kubectl = PathBuf::from(var("EBACKUP_TEST_KUBECTL"));
        let path = std::env::var("PATH").unwrap();
        let output = Command::new(root().join("deploy/examples").join(name))
            .args(args)
            .env("PATH", format!("{}:{path}", kubectl.parent().unwrap().display()))
            .env("KUBECONFIG", var("EBACKUP_TEST_KUBECONFIG"))
            .env("IMAGE", "busybox:test")
            .envs(env.iter().copied())
            .output()
            .unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Kills the API server, which comes back.
    pub(crate) fn kill_api_server(&self) {
        let folder = Path::new(&var("EBACKUP_TEST_KUBECONFIG")).parent().unwrap().to_owned();
        let pattern = format!("kube-apiserver .*{}", folder.display());
        let killed = Command::new("pkill").args(["-KILL", "-f", &pattern]).status().unwrap();
        assert!(killed.success(), "there is no API server of '{}'", folder.display());
    }

    /// Kills the S3 server, which comes back.
    pub(crate) fn kill_s3_server(&self) {
        let pid = self.s3.ca.parent().and_then(Path::parent).unwrap().join("run/gateway");
        let pid = fs::read_to_string(pid).unwrap();
        assert!(Command::new("kill").args(["-KILL", pid.trim()]).status().unwrap().success());
    }

    /// Waits until all of the product runs.
    pub(crate) fn wait_until_ready(&self) {
        wait_until_ready();
    }

    /// What the agent logged before it was last restarted.
    pub(crate) fn agent_before(&self) -> String {
        let args = ["-n", NAMESPACE, "logs", "-l", "name=node-agent", "--previous", "--tail=40"];
        let output = kubectl_output(&args);
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    /// Names of the pods of a part of the product.
    pub(crate) fn pods(&self, label: &str) -> Vec<Value> {
        let text = kubectl(&["-n", NAMESPACE, "get", "pods", "-l", label, "-o", "json"]);
        let list: Value = serde_json::from_str(&text).unwrap();
        list["items"].as_array().unwrap().clone()
    }
}

pub(crate) fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|one| one["type"] == "Ready" && one["status"] == "True")
}

/// Asks again and again until there is an answer.
pub(crate) fn wait<T>(what: &str, ask: impl FnMut() -> Option<T>) -> T {
    wait_for(what, PATIENCE, ask)
}

pub(crate) fn wait_for<T>(what: &str, patience: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        if begun.elapsed() > patience {
            panic!("waited {} s in vain for {what}\n{}", patience.as_secs(), diagnosis());
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}

/// What helps to understand a failure.
fn diagnosis() -> String {
    let run = |args: &[&str]| {
        let output = kubectl_output(args);
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    [
        run(&["get", "pods", "-A", "-o", "wide"]),
        run(&[
            "-n",
            NAMESPACE,
            "get",
            "backupstoragelocations,backuprepositories,podvolumebackups,podvolumerestores",
        ]),
        run(&["-n", NAMESPACE, "get", "events", "--sort-by=.lastTimestamp"]),
        run(&["-n", NAMESPACE, "logs", "-l", "component=velero", "--tail=60"]),
        run(&["-n", NAMESPACE, "logs", "-l", "name=node-agent", "--tail=60"]),
    ]
    .join("\n")
}

fn kubectl_output(args: &[&str]) -> Output {
    let mut command = Command::new(var("EBACKUP_TEST_KUBECTL"));
    command.env("KUBECONFIG", var("EBACKUP_TEST_KUBECONFIG")).args(args);
    command.output().expect("kubectl can be run")
}

fn kubectl(args: &[&str]) -> String {
    let output = kubectl_output(args);
    assert!(
        output.status.success(),
        "kubectl {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn apply(object: &Value) {
    let mut child = Command::new(var("EBACKUP_TEST_KUBECTL"))
        .env("KUBECONFIG", var("EBACKUP_TEST_KUBECONFIG"))
        .args(["apply", "-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("kubectl can be run");
    child.stdin.take().unwrap().write_all(object.to_string().as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "kubectl apply: {object}");
}

/// Brings the image to the node and applies `deploy/`, with an overlay for what is particular to this cluster.
pub(crate) fn install() {
    let image = root().join("target/image/ebackup.tar");
    assert!(image.exists(), "{} is missing: make it with 'cargo xtask image'", image.display());
    let imported = Command::new("ctr")
        .args(["-n", "k8s.io", "images", "import"])
        .arg(&image)
        .env("CONTAINERD_ADDRESS", var("CONTAINERD_ADDRESS"))
        .output()
        .expect("ctr can be run");
    assert!(imported.status.success(), "{}", String::from_utf8_lossy(&imported.stderr));
    let overlay = root().join("target/cluster-overlay");
    fs::create_dir_all(&overlay).unwrap();
    let pods = format!("{}/pods", var("EBACKUP_TEST_KUBELET_ROOT"));
    // What runs already is of an older image.
    let anew = json!({ "annotations": { "installed": fresh("run") } });
    let patch = |kind: &str, name: &str, spec: Value| {
        json!({
            "apiVersion": "apps/v1", "kind": kind, "metadata": { "name": name, "namespace": NAMESPACE },
            "spec": { "template": { "metadata": anew, "spec": spec } },
        })
    };
    let volumes = json!({ "volumes": [{ "name": "pods", "hostPath": { "path": pods } }] });
    let patches = [
        ("controller.yaml", patch("Deployment", "velero", json!({}))),
        ("agent.yaml", patch("DaemonSet", "node-agent", volumes)),
    ];
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "bases": ["../../deploy/test"],
        "patchesStrategicMerge": patches.each_ref().map(|(name, _)| name),
    });
    fs::write(overlay.join("kustomization.yaml"), kustomization.to_string()).unwrap();
    for (name, patch) in patches {
        fs::write(overlay.join(name), patch.to_string()).unwrap();
    }
    // CustomResourceDefinitions are made by the same command, and nothing in it is of their kinds.
    kubectl(&["apply", "-k", overlay.to_str().unwrap()]);
    // What an earlier run left.
    for what in ["backupstoragelocation/default", "secret/ebackup-repository-default"] {
        kubectl(&["-n", NAMESPACE, "delete", what, "--ignore-not-found"]);
    }
    wait_until_ready();
}

fn wait_until_ready() {
    for (kind, name, ready) in
        [("deployment", "velero", "readyReplicas"), ("daemonset", "node-agent", "numberReady")]
    {
        wait(&format!("{kind} {name} to be ready"), || {
            let output = kubectl_output(&["-n", NAMESPACE, "get", kind, name, "-o", "json"]);
            let object: Value = serde_json::from_slice(&output.stdout).ok()?;
            let status = &object["status"];
            let current = status["observedGeneration"] == object["metadata"]["generation"];
            let updated =
                status["updatedReplicas"].as_i64().or(status["updatedNumberScheduled"].as_i64());
            let all = [updated, status[ready].as_i64()]
                .iter()
                .all(|count| count.is_some_and(|count| count >= 1));
            (current && all).then_some(())
        });
    }
}
