//! A namespace of its own on a real API server, a location in a bucket of a real S3 server, a dispatcher, and
//! agents that join it without a wire and do what the test says.

mod definitions;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use controller::api::{
    BackupStorageLocation, PodVolumeBackup, PodVolumePhase, PodVolumeRestore, Timestamp,
};
use controller::edge::agents::{Agents, Membership};
use controller::events::Events;
use controller::health::Readiness;
use controller::rooms::{Context, Settings, run};
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret, ServiceAccount};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Client, ResourceExt};
use objects::testing::server::{TestServer, fresh};
use proto::v1::from_controller::Message;
use proto::v1::job::Work;
use proto::v1::{
    Failure, FailureKind, Finished, Hello, Job, Opened, ProbeResult, Progress, Pruned, Restored,
    Saved, finished::Outcome,
};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Longest wait for anything. Only a test that fails waits so long.
const PATIENCE: Duration = Duration::from_secs(90);

/// The name of the location that tests use.
pub(crate) const LOCATION: &str = "backup-location-001";

/// A client of the API server that the environment names.
pub(crate) async fn client() -> Client {
    let variable = "EBACKUP_TEST_APISERVER_KUBECONFIG";
    let path = std::env::var(variable).unwrap_or_else(|_| {
        panic!(
            "{variable} is not set: this test needs an API server. Start one with 'cargo xtask \
             apiserver up', and tell this shell with 'set -a; . target/apiserver/env'"
        )
    });
    let config = kube::config::Kubeconfig::read_from(PathBuf::from(path)).unwrap();
    let options = kube::config::KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(config, &options).await.unwrap();
    Client::try_from(config).unwrap()
}

/// A namespace of its own.
pub(crate) struct World {
    pub(crate) client: Client,
    pub(crate) namespace: String,
    pub(crate) server: TestServer,
}

impl World {
    pub(crate) async fn new(name: &str) -> Self {
        let client = client().await;
        definitions::install(&client).await;
        let namespace = fresh(name);
        let made = Namespace {
            metadata: kube::api::ObjectMeta { name: Some(namespace.clone()), ..Default::default() },
            ..Default::default()
        };
        let api: Api<Namespace> = Api::all(client.clone());
        api.create(&PostParams::default(), &made).await.unwrap();
        // Without it no pod can be made. Where controllers run, one of them may have been first.
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), &namespace);
        let account = serde_json::from_value(json!({"metadata": {"name": "default"}})).unwrap();
        match accounts.create(&PostParams::default(), &account).await {
            Err(kube::Error::Api(status)) if status.is_already_exists() => {}
            made => drop(made.unwrap()),
        }
        Self { client, namespace, server: TestServer::from_env() }
    }

    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub(crate) async fn create<K>(&self, value: Value) -> K
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + serde::de::DeserializeOwned
            + serde::Serialize
            + Clone
            + std::fmt::Debug,
    {
        let object: K = serde_json::from_value(value).unwrap();
        self.api().create(&PostParams::default(), &object).await.unwrap()
    }

    /// Waits until an object is as it should be.
    pub(crate) async fn until<K>(&self, name: &str, what: &str, is: impl Fn(&K) -> bool) -> K
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + serde::de::DeserializeOwned
            + Clone
            + std::fmt::Debug
            + Send
            + 'static,
    {
        let condition = |object: Option<&K>| object.is_some_and(&is);
        let wait = await_condition(self.api::<K>(), name, condition);
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(found) => found.unwrap().unwrap(),
            Err(_) => panic!("{name} {what} did not happen: {:?}", self.api::<K>().get(name).await),
        }
    }

    /// e-backup's Secret and location, for a bucket of the test's S3 server.
    pub(crate) async fn location(&self, bucket: &str, secret_key: &str) -> BackupStorageLocation {
        let credential = format!(
            "HUAWEI_CLOUD_ACCESS_KEY_ID={}\nHUAWEI_CLOUD_SECRET_ACCESS_KEY={secret_key}\n",
            self.server.key
        );
        let _secret: Secret = self
            .create(json!({
                "metadata": {"name": "secret-secure-opaque",
                             "labels": {"secret.everest.io/backup": "true"}},
                "type": "cfe/secure-opaque", "stringData": {"cloud": credential},
            }))
            .await;
        self.create(json!({
            "apiVersion": "velero.io/v1", "kind": "BackupStorageLocation",
            "metadata": {"name": LOCATION},
            "spec": {
                "config": {"endpoint": format!("http://127.0.0.1:{}", self.server.port)},
                "credential": {"name": "secret-secure-opaque", "key": "cloud"},
                "objectStorage": {"bucket": bucket, "prefix": self.namespace},
                "provider": "huawei", "validationFrequency": "1s",
            },
        }))
        .await
    }

    /// Changes an object, as somebody does.
    pub(crate) async fn change<K>(&self, name: &str, patch: Value)
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + serde::de::DeserializeOwned
            + Clone
            + std::fmt::Debug,
    {
        let (api, params) = (self.api::<K>(), PatchParams::default());
        api.patch(name, &params, &Patch::Merge(patch)).await.unwrap();
    }

    /// The same with a bucket that exists and the right key.
    pub(crate) async fn good_location(&self) {
        self.server.make_bucket_apart().await;
        self.location("ebackup-tests", &self.server.secret).await;
    }

    /// A pod on a node, with a volume.
    pub(crate) async fn pod(&self, name: &str, node: &str) -> Pod {
        self.create(json!({
            "metadata": {"name": name},
            "spec": {
                "nodeName": node, "automountServiceAccountToken": false,
                "tolerations": [{"operator": "Exists"}],
                "containers": [{"name": "c", "image": "none",
                                "volumeMounts": [{"name": "data", "mountPath": "/data"}]}],
                "volumes": [{"name": "data", "emptyDir": {}}],
            },
        }))
        .await
    }

    /// The order to save its volume.
    pub(crate) async fn backup(&self, name: &str, backup: &str, pod: &Pod) -> PodVolumeBackup {
        self.create(json!({
            "apiVersion": "velero.io/v1", "kind": "PodVolumeBackup",
            "metadata": {"name": name, "labels": {"velero.io/backup-name": backup}},
            "spec": {
                "node": pod.spec.as_ref().unwrap().node_name, "volume": "data",
                "pod": {"kind": "Pod", "namespace": self.namespace, "name": pod.name_any(),
                        "uid": pod.uid()},
                "backupStorageLocation": LOCATION, "repoIdentifier": "", "uploaderType": "kopia",
            },
        }))
        .await
    }

    /// A pod whose init container waits for its volume to be restored.
    pub(crate) async fn waiting_pod(&self, name: &str, node: &str) -> Pod {
        let mount = json!([{"name": "data", "mountPath": "/restores/data"}]);
        let pod: Pod = self
            .create(json!({
                "metadata": {"name": name},
                "spec": {
                    "nodeName": node, "automountServiceAccountToken": false,
                    "tolerations": [{"operator": "Exists"}],
                    "initContainers": [{"name": "restore-wait", "image": "none", "volumeMounts": mount}],
                    "containers": [{"name": "c", "image": "none"}],
                    "volumes": [{"name": "data", "emptyDir": {}}],
                },
            }))
            .await;
        let running = json!({"status": {"phase": "Pending", "initContainerStatuses": [{
            "name": "restore-wait", "image": "none", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"running": {"startedAt": "2026-01-02T03:04:05Z"}},
        }]}});
        let (api, params) = (self.api::<Pod>(), PatchParams::default());
        api.patch_status(name, &params, &Patch::Merge(running)).await.unwrap();
        pod
    }

    /// The order to restore a snapshot into its volume.
    pub(crate) async fn restore(&self, name: &str, snapshot: &str, pod: &Pod) -> PodVolumeRestore {
        self.create(json!({
            "apiVersion": "velero.io/v1", "kind": "PodVolumeRestore",
            "metadata": {"name": name, "labels": {
                "velero.io/restore-name": "restore", "velero.io/restore-uid": "uid-of-the-restore"}},
            "spec": {
                "volume": "data", "snapshotID": snapshot, "sourceNamespace": self.namespace,
                "pod": {"kind": "Pod", "namespace": self.namespace, "name": pod.name_any(),
                        "uid": pod.uid()},
                "backupStorageLocation": LOCATION, "repoIdentifier": "", "uploaderType": "kopia",
            },
        }))
        .await
    }

    pub(crate) async fn until_phase(&self, name: &str, phase: PodVolumePhase) -> PodVolumeBackup {
        let is = |object: &PodVolumeBackup| {
            object.status.as_ref().is_some_and(|status| status.phase == phase)
        };
        self.until(name, &format!("{phase:?}"), is).await
    }

    /// Begins a dispatcher, as a leader does.
    pub(crate) fn dispatch(&self, settings: Settings) -> Dispatcher {
        let (agents, events) = Agents::new();
        let context = Context {
            client: self.client.clone(),
            namespace: self.namespace.clone(),
            agents: agents.clone(),
            clock: Arc::new(Timestamp::now),
            settings,
            metrics: Arc::default(),
            events: Events::new(self.client.clone()),
            readiness: Readiness::default(),
        };
        let task = tokio::spawn(async move { run(context, events).await });
        Dispatcher { agents, task }
    }
}

trait MakeBucket {
    async fn make_bucket_apart(&self);
}

impl MakeBucket for TestServer {
    /// The server's own way blocks.
    async fn make_bucket_apart(&self) {
        let server = self.clone();
        let made = tokio::task::spawn_blocking(move || {
            server.make_bucket(&server.config("ebackup-tests", ""));
        });
        made.await.unwrap();
    }
}

/// A leader.
pub(crate) struct Dispatcher {
    pub(crate) agents: Arc<Agents>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Dispatcher {
    /// Ends it where it stands.
    pub(crate) async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled(), "it ended by itself");
    }
}

/// What all agents of a test did and do.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    /// Whether jobs run until they are released.
    pub(crate) hold: bool,
    /// Volume jobs that run, with their nodes.
    pub(crate) running: BTreeMap<String, String>,
    /// The most that ran at once.
    pub(crate) most: usize,
    /// How often each volume job was assigned, and whether as repeated.
    pub(crate) assigned: BTreeMap<String, Vec<bool>>,
    /// Jobs whose outcome was recorded, as often as it was said.
    pub(crate) recorded: Vec<String>,
    /// Volume jobs that were cancelled.
    pub(crate) cancelled: BTreeSet<String>,
    /// Restores among the volume jobs: snapshot and mark.
    pub(crate) restores: BTreeMap<String, (String, String)>,
    /// How often a repository was opened, and pruned.
    pub(crate) opened: usize,
    pub(crate) pruned: usize,
    /// Whether prunes do not end, and the one that does not.
    pub(crate) hold_prunes: bool,
    pub(crate) pruning: Option<String>,
    /// Nodes that were told other access keys, and these.
    pub(crate) renewed: BTreeSet<(String, String)>,
}

/// The agents of a test.
#[derive(Clone)]
pub(crate) struct Fleet {
    seen: Arc<watch::Sender<Seen>>,
    workers: Arc<Mutex<Vec<JoinHandle<()>>>>,
}

impl Fleet {
    pub(crate) fn new(hold: bool) -> Self {
        Self {
            seen: Arc::new(watch::Sender::new(Seen { hold, ..Seen::default() })),
            workers: Arc::default(),
        }
    }

    /// Lets what is held end.
    pub(crate) fn release(&self) {
        self.seen.send_modify(|seen| seen.hold = false);
    }

    /// Prunes do not end by themselves.
    pub(crate) fn hold_prunes(&self) {
        self.seen.send_modify(|seen| seen.hold_prunes = true);
    }

    pub(crate) fn seen(&self) -> Seen {
        self.seen.borrow().clone()
    }

    /// All agents forget their jobs, as when they are started anew.
    pub(crate) fn forget(&self) {
        self.seen.send_modify(|seen| seen.running.clear());
    }

    /// Waits until what they did is as it should be.
    pub(crate) async fn until(&self, what: &str, is: impl Fn(&Seen) -> bool) {
        let mut receiver = self.seen.subscribe();
        if tokio::time::timeout(PATIENCE, receiver.wait_for(|seen| is(seen))).await.is_err() {
            panic!("{what} did not happen: {:?}", self.seen());
        }
    }

    /// The agent of a node connects, with the jobs that it has.
    pub(crate) async fn join(&self, dispatcher: &Dispatcher, node: &str) -> AgentTask {
        self.join_with_room(dispatcher, node, 8).await
    }

    /// The same for one that takes so many jobs at once.
    pub(crate) async fn join_with_room(
        &self,
        dispatcher: &Dispatcher,
        node: &str,
        capacity: u32,
    ) -> AgentTask {
        let running: Vec<String> = {
            let seen = self.seen.borrow();
            let on_node = seen.running.iter().filter(|(_, on)| *on == node);
            on_node.map(|(job, _)| job.clone()).collect()
        };
        let pruning = self.seen.borrow().pruning.clone();
        let hello = Hello {
            node: node.to_owned(),
            capacity,
            running: running.iter().cloned().chain(pruning).collect(),
            ..Default::default()
        };
        let (membership, mut messages) = dispatcher.agents.join(hello).await;
        let membership = Arc::new(Mutex::new(Some(Arc::new(membership))));
        let handle = membership.clone();
        let fleet = self.clone();
        let node = node.to_owned();
        let task = tokio::spawn(async move {
            let Some(membership) = membership.lock().unwrap().clone() else {
                return;
            };
            for job in running {
                fleet.begin(&membership, job);
            }
            while let Some(message) = messages.recv().await {
                fleet.take(&node, &membership, message.message.unwrap()).await;
            }
        });
        AgentTask { membership: handle, task }
    }

    async fn take(&self, node: &str, membership: &Arc<Membership>, message: Message) {
        match message {
            Message::Assign(assign) => {
                let job = assign.job.unwrap();
                self.assigned(node, membership, job).await;
            }
            Message::Probe(probe) => {
                let result = ProbeResult { id: probe.id, error: String::new() };
                membership.probed(result).await;
            }
            Message::Cancel(cancel) => {
                let mut ran = false;
                self.seen.send_modify(|seen| {
                    ran = seen.running.remove(&cancel.job_id).is_some();
                    seen.cancelled.insert(cancel.job_id.clone());
                });
                if ran {
                    let kind = FailureKind::Cancelled.into();
                    let outcome = Outcome::Failure(Failure { kind, message: "cancelled".into() });
                    membership.finished(finished(&cancel.job_id, outcome)).await;
                }
            }
            Message::Recorded(recorded) => {
                self.seen.send_modify(|seen| seen.recorded.push(recorded.job_id));
            }
            Message::Renew(renew) => {
                let key = renew.credentials.unwrap_or_default().access_key;
                self.seen.send_modify(|seen| {
                    seen.renewed.insert((node.to_owned(), key));
                });
            }
            _ => {}
        }
    }

    async fn assigned(&self, node: &str, membership: &Arc<Membership>, job: Job) {
        if let Some(Work::Open(open)) = &job.work {
            assert!(open.create && !job.repository.unwrap().passphrase.is_empty());
            let opened = Opened { repository_id: "r".into(), created: true, ..Default::default() };
            self.seen.send_modify(|seen| seen.opened += 1);
            membership.finished(finished(&job.id, Outcome::Opened(opened))).await;
            return;
        }
        if let Some(Work::Prune(_)) = &job.work {
            if self.seen().hold_prunes {
                self.seen.send_modify(|seen| seen.pruning = Some(job.id));
                return;
            }
            self.seen.send_modify(|seen| seen.pruned += 1);
            membership.finished(pruned(&job.id)).await;
            return;
        }
        if let Some(Work::Restore(work)) = &job.work {
            let what = (work.snapshot.clone(), work.done_marker.clone());
            self.seen.send_modify(|seen| drop(seen.restores.insert(job.id.clone(), what)));
        } else {
            assert!(matches!(job.work, Some(Work::Backup(_))), "{job:?}");
        }
        let mut is_new = false;
        self.seen.send_modify(|seen| {
            seen.assigned.entry(job.id.clone()).or_default().push(job.repeated);
            is_new = seen.running.insert(job.id.clone(), node.to_owned()).is_none();
            seen.most = seen.most.max(seen.running.len());
        });
        if is_new {
            self.begin(membership, job.id);
        }
    }

    fn begin(&self, membership: &Arc<Membership>, job: String) {
        let worker = tokio::spawn(self.clone().work(membership.clone(), job));
        self.workers.lock().unwrap().push(worker);
    }

    /// Progress, then the end: at once, or when the job is released.
    async fn work(self, membership: Arc<Membership>, job: String) {
        let bytes_total = 100;
        let progress =
            Progress { job_id: job.clone(), bytes_done: 50, bytes_total, entries_done: 1 };
        membership.progress(progress).await;
        let mut receiver = self.seen.subscribe();
        drop(receiver.wait_for(|seen| !seen.hold).await);
        let mut ran = false;
        self.seen.send_modify(|seen| ran = seen.running.remove(&job).is_some());
        let is_restore = self.seen().restores.contains_key(&job);
        if ran {
            membership.finished(if is_restore { restored(&job) } else { saved(&job) }).await;
        }
    }
}

/// An agent's stream.
pub(crate) struct AgentTask {
    membership: Arc<Mutex<Option<Arc<Membership>>>>,
    task: JoinHandle<()>,
}

impl AgentTask {
    /// Says something again.
    pub(crate) async fn say_finished(&self, finished: Finished) {
        let membership = self.membership.lock().unwrap().clone().unwrap();
        membership.finished(finished).await;
    }

    /// Nobody listens to what the agent says any more; its jobs go on, for the next stream.
    pub(crate) async fn cut(&mut self, fleet: &Fleet) {
        self.task.abort();
        // Only then does it begin no more jobs.
        let _aborted = (&mut self.task).await;
        let workers: Vec<_> = fleet.workers.lock().unwrap().drain(..).collect();
        for worker in workers {
            worker.abort();
            let _aborted = worker.await;
        }
    }

    /// The stream ends, and the node with it: its jobs never say anything again.
    pub(crate) async fn leave_with_jobs(mut self, fleet: &Fleet) {
        self.cut(fleet).await;
        let mut membership = self.membership.lock().unwrap().take().unwrap();
        loop {
            // Workers let go of it when their end was noticed.
            match Arc::try_unwrap(membership) {
                Ok(alone) => return alone.leave().await,
                Err(shared) => {
                    membership = shared;
                    tokio::task::yield_now().await;
                }
            }
        }
    }
}

fn finished(job: &str, outcome: Outcome) -> Finished {
    Finished { job_id: job.to_owned(), outcome: Some(outcome), ..Default::default() }
}

fn restored(job: &str) -> Finished {
    finished(job, Outcome::Restored(Restored { bytes: 100, ..Default::default() }))
}

pub(crate) fn pruned(job: &str) -> Finished {
    finished(job, Outcome::Pruned(Pruned { packs_deleted: 7, ..Default::default() }))
}

pub(crate) fn saved(job: &str) -> Finished {
    let snapshot = format!("snapshot-of-{job}");
    finished(job, Outcome::Saved(Saved { snapshot, bytes: 100, ..Default::default() }))
}
