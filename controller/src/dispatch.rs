//! Carries out what the planners decide: one task that watches the custom resources and hears the agents, and
//! after each thing it learns does whatever is to be done now.
//!
//! Whatever takes time (asking the cluster, trying a store, writing a status) is a task of its own, which reports
//! back as a `Note`. At most one change of an object's status is on its way, and an outcome is said to be
//! recorded only after its status was written; so nothing is lost when any part fails.
//!
//! * `object`, `job`: what to do about one volume; `inspect`: where it is; `outcome`: what came of it; `volumes`
//!   carries it out
//! * `places`: locations and their repositories, decided by `location` and `maintenance`
//! * `write`: changes of status, repeated until they are made

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt};
use kube::api::Api;
use kube::core::{DeserializeGuard, error_boundary::InvalidObject};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use proto::v1::from_controller::Message;
use proto::v1::{Cancel, Finished, Recorded};
use tokio::sync::{Semaphore, mpsc};

use crate::api::{
    BackupRepository, BackupStorageLocation, PodVolumeBackup, PodVolumeRestore, Timestamp,
};
use crate::edge::agents::{Agents, Event};
use crate::events::Events;
use crate::location::check::Checked;
use crate::metrics::Metrics;
use crate::queue::{self, Limits, Turns};

pub mod inspect;
pub mod job;
pub mod object;
pub mod outcome;
mod places;
mod volumes;
pub mod write;

use inspect::Inspection;
use job::{Agent, Job, Place, elapsed};
use object::{Object, Update};
use places::Location;
use write::Refused;

/// How often it looks at what only time changes.
const TICK: Duration = Duration::from_secs(1);

/// How long a watch goes on before it is asked for again: a connection that died unnoticed hides changes for no
/// longer. Less than what the client waits for an answer.
const WATCH_SECONDS: u32 = 30;

/// So many notes are taken in before it is looked at what to do, if they are there.
const NOTES_AT_ONCE: usize = 256;

/// Notes that may wait before their tasks do.
const NOTES: usize = 1024;

/// Requests about volumes that are under way at once: a backup of thousands must not keep the API server from
/// everything else.
const REQUESTS: usize = 32;

/// What people set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Volumes at once.
    pub limits: Limits,
    /// No progress for so long ends a job. Zero: never.
    pub stall: Duration,
    /// Jobs of an agent that is away for so long take no slots any more.
    pub agent_uncounted: Duration,
    /// Jobs of an agent that is away for so long fail.
    pub agent_lost: Duration,
    /// Bytes a second, uploads of one job. 0: no limit.
    pub limit_upload: u64,
    /// Bytes a second, downloads of one job. 0: no limit.
    pub limit_download: u64,
    /// How often new repositories are pruned. Zero: never.
    pub prune_every: Duration,
    /// How often each agent tries whether it reaches each location.
    pub probe_every: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            limits: Limits { cluster: 3, node: 0 },
            stall: Duration::from_secs(30 * 60),
            agent_uncounted: Duration::from_secs(60),
            agent_lost: Duration::from_secs(10 * 60),
            limit_upload: 0,
            limit_download: 0,
            prune_every: Duration::from_secs(24 * 3600),
            probe_every: Duration::from_secs(600),
        }
    }
}

/// All that comes from outside.
#[derive(Clone)]
pub struct Context {
    /// The cluster.
    pub client: Client,
    /// The namespace of the custom resources.
    pub namespace: String,
    /// Who is connected.
    pub agents: Arc<Agents>,
    /// The time.
    pub clock: Arc<dyn Fn() -> Timestamp + Send + Sync>,
    /// What people set.
    pub settings: Settings,
    /// What it counts.
    pub metrics: Arc<Metrics>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("namespace", &self.namespace)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// What a task reports.
#[derive(Debug)]
enum Note {
    Backup(watcher::Event<PodVolumeBackup>),
    Restore(watcher::Event<PodVolumeRestore>),
    Location(watcher::Event<BackupStorageLocation>),
    Repository(watcher::Event<BackupRepository>),
    Inspected {
        uid: String,
        found: Result<Inspection, kube::Error>,
    },
    /// `latest`: what the object is instead, when the change was refused.
    Written {
        uid: String,
        update: Update,
        done: Result<Object, Refused>,
        latest: Option<Object>,
    },
    Checked {
        name: String,
        found: Result<Checked, kube::Error>,
    },
    LocationWritten {
        name: String,
        done: Result<BackupStorageLocation, Refused>,
    },
    RepositoryWritten {
        name: String,
        done: Option<BackupRepository>,
    },
}

/// Runs until the receiver of events ends, or a watch cannot go on.
///
/// # Errors
/// When a watch ended for good.
pub async fn run(context: Context, mut events: mpsc::Receiver<Event>) -> Result<()> {
    let (notes, mut received) = mpsc::channel(NOTES);
    let mut watches = pin!(watches(&context));
    let mut world = World::new(context, notes);
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            note = watches.next() => match note {
                Some(note) => world.learn(note),
                None => anyhow::bail!("a watch of the custom resources ended"),
            },
            note = received.recv() => note.into_iter().for_each(|note| world.learn(note)),
            // Who does not know all objects would take their jobs for somebody else's.
            event = events.recv(), if world.is_complete() => match event {
                Some(event) => world.hear(event),
                None => return Ok(()),
            },
            _ = tick.tick() => {}
        }
        // What has arrived together is looked at once, for that takes the longer the more objects there are.
        for _ in 0..NOTES_AT_ONCE {
            match (watches.next().now_or_never(), received.try_recv()) {
                (None | Some(None), Err(_)) => break,
                (watched, note) => {
                    watched.flatten().into_iter().chain(note.ok()).for_each(|it| world.learn(it));
                }
            }
        }
        if world.is_complete() {
            world.settle();
        }
    }
}

/// The watches of all kinds; they begin again by themselves after errors.
fn watches(context: &Context) -> impl Stream<Item = Note> + use<> {
    fn one<K>(
        context: &Context,
        wrap: fn(watcher::Event<K>) -> Note,
    ) -> impl Stream<Item = Note> + use<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + fmt::Debug
            + serde::de::DeserializeOwned
            + Send
            + 'static,
    {
        let api: Api<DeserializeGuard<K>> =
            Api::namespaced(context.client.clone(), &context.namespace);
        watcher(api, watcher::Config::default().timeout(WATCH_SECONDS))
            .default_backoff()
            // Who changed what when is half of an object, and all of them are kept.
            .modify(|object| object.managed_fields_mut().clear())
            .inspect_err(|error| tracing::warn!(%error, "a watch broke off, beginning again"))
            .filter_map(async |event| valid(event.ok()?))
            .map(wrap)
    }
    let all = [
        one(context, Note::Backup).boxed(),
        one(context, Note::Restore).boxed(),
        one(context, Note::Location).boxed(),
        one(context, Note::Repository).boxed(),
    ];
    futures::stream::select_all(all)
}

/// The event without an object that is not of its kind: made by another version, before the definition refused it. It
/// must not hide all others.
fn valid<K: kube::Resource<DynamicType = ()>>(
    event: watcher::Event<DeserializeGuard<K>>,
) -> Option<watcher::Event<K>> {
    let object = |guarded: DeserializeGuard<K>| {
        let told = |invalid: &InvalidObject| {
            let (kind, name) = (K::kind(&()), invalid.metadata.name.as_deref().unwrap_or_default());
            tracing::warn!(%kind, name, error = invalid.error, "an object is not of its kind, and left alone");
        };
        guarded.0.inspect_err(told).ok()
    };
    Some(match event {
        watcher::Event::Init => watcher::Event::Init,
        watcher::Event::InitDone => watcher::Event::InitDone,
        watcher::Event::InitApply(guarded) => watcher::Event::InitApply(object(guarded)?),
        watcher::Event::Apply(guarded) => watcher::Event::Apply(object(guarded)?),
        watcher::Event::Delete(guarded) => watcher::Event::Delete(object(guarded)?),
    })
}

/// Which objects of a kind were listed, since the list began.
#[derive(Debug, Default)]
struct Listing {
    complete: bool,
    seen: BTreeSet<String>,
}

/// What came of an event of a watch, for the map that follows it.
enum Change<K> {
    Seen(K),
    Gone(String),
    /// The list is complete: others do not exist.
    Only(BTreeSet<String>),
    Nothing,
}

impl Listing {
    fn take<K>(&mut self, event: watcher::Event<K>, key: fn(&K) -> String) -> Change<K> {
        match event {
            watcher::Event::Init => {
                self.seen.clear();
                Change::Nothing
            }
            watcher::Event::InitApply(object) => {
                self.seen.insert(key(&object));
                Change::Seen(object)
            }
            watcher::Event::InitDone => {
                self.complete = true;
                Change::Only(std::mem::take(&mut self.seen))
            }
            watcher::Event::Apply(object) => Change::Seen(object),
            watcher::Event::Delete(object) => Change::Gone(key(&object)),
        }
    }
}

/// All that is known.
struct World {
    context: Context,
    notes: mpsc::Sender<Note>,
    events: Events,
    started: Timestamp,
    listings: [Listing; 4],
    /// By UID.
    jobs: BTreeMap<String, Job>,
    /// By name.
    locations: BTreeMap<String, Location>,
    /// Since when an agent is away, by node.
    away: BTreeMap<String, Timestamp>,
    turns: Turns,
    requests: Arc<Semaphore>,
}

impl World {
    fn new(context: Context, notes: mpsc::Sender<Note>) -> Self {
        Self {
            events: Events::new(context.client.clone()),
            started: (context.clock)(),
            context,
            notes,
            listings: Default::default(),
            jobs: BTreeMap::new(),
            locations: BTreeMap::new(),
            away: BTreeMap::new(),
            turns: Turns::default(),
            requests: Arc::new(Semaphore::new(REQUESTS)),
        }
    }

    fn now(&self) -> Timestamp {
        (self.context.clock)()
    }

    /// Whether all objects are known.
    fn is_complete(&self) -> bool {
        self.listings.iter().all(|listing| listing.complete)
    }

    /// Runs something that takes time and reports back.
    fn spawn(&self, task: impl Future<Output = Note> + Send + 'static) {
        let notes = self.notes.clone();
        tokio::spawn(async move {
            let note = task.await;
            // Without a receiver the program is ending.
            let _ended = notes.send(note).await;
        });
    }

    /// The same, for one of many: waits until not too many others run.
    fn spawn_in_turn(&self, task: impl Future<Output = Note> + Send + 'static) {
        let requests = self.requests.clone();
        self.spawn(async move {
            // Nobody closes it.
            let _turn = requests.acquire_owned().await;
            task.await
        });
    }

    fn learn(&mut self, note: Note) {
        let [backups, restores, locations, repositories] = &mut self.listings;
        match note {
            Note::Backup(event) => {
                let change = backups.take(event, |object| object.uid().unwrap_or_default());
                self.follow(change, queue::Kind::Backup);
            }
            Note::Restore(event) => {
                let change = restores.take(event, |object| object.uid().unwrap_or_default());
                self.follow(change, queue::Kind::Restore);
            }
            Note::Location(event) => {
                let change = locations.take(event, ResourceExt::name_any);
                self.follow_locations(change);
            }
            Note::Repository(event) => {
                let change = repositories.take(event, ResourceExt::name_any);
                self.follow_repositories(change);
            }
            Note::Inspected { uid, found } => self.inspected(&uid, found),
            Note::Written { uid, update, done, latest } => {
                // Before its slot counts as free: the change may have been made, and the answer lost.
                latest.into_iter().for_each(|object| self.seen(object));
                self.written(&uid, &update, done);
            }
            Note::Checked { name, found } => self.checked(&name, found),
            Note::LocationWritten { name, done } => self.location_written(&name, done),
            Note::RepositoryWritten { name, done } => self.repository_written(&name, done),
        }
    }

    fn hear(&mut self, event: Event) {
        match event {
            Event::Connected { node, finished } => self.connected(&node, finished),
            // An end that was overtaken by the next beginning.
            Event::Lost { node } if self.is_connected(&node) => {}
            Event::Lost { node } => {
                self.away.insert(node.clone(), self.now());
                for job in self.jobs.values_mut().filter(|job| job.object.node() == Some(&node)) {
                    job.agent = Agent::Unknown;
                }
                self.forget_reach(&node);
            }
            Event::Progress { node, progress } => {
                let job = self.jobs.get_mut(&progress.job_id);
                if let Some(job) = job.filter(|job| job.object.is_on(&node)) {
                    job.agent = Agent::Has;
                    job.progress = Some(progress);
                }
            }
            Event::Finished { node, finished } => self.finished(&node, finished),
            Event::Probed { node, result } => self.probed(&node, result),
        }
    }

    /// An agent says what it has: the rest of what it should have is sent again, and what nobody wants ended.
    fn connected(&mut self, node: &str, finished: Vec<Finished>) {
        let now = self.now();
        self.away.remove(node);
        let agents = self.context.agents.list();
        let running = agents.iter().find(|agent| agent.node == node);
        let running: BTreeSet<String> =
            running.into_iter().flat_map(|agent| agent.running.iter().cloned()).collect();
        let ended: BTreeSet<String> = finished.iter().map(|done| done.job_id.clone()).collect();
        for (uid, job) in &mut self.jobs {
            if job.object.node() == Some(node) && job.object.phase().is_assigned() {
                let has = running.contains(uid) || ended.contains(uid);
                job.agent = if has { Agent::Has } else { Agent::Lacks };
                job.cancel_sent = false;
                if !has {
                    // It may have done it, and the pod have gone on with the volume since.
                    job.place = Place::Unknown(now);
                }
            }
        }
        for location in self.locations.values_mut() {
            location.keeper.connected(node, |job| running.contains(job) || ended.contains(job));
            location.probe_again(node);
        }
        for job in running {
            let wanted = self.jobs.get(&job).is_some_and(|job| {
                job.object.phase().is_assigned() && job.object.node() == Some(node)
            });
            let runs = self.locations.values().flat_map(|location| location.keeper.runs());
            if !wanted && !runs.into_iter().any(|run| run.job == job) {
                self.send(node, Message::Cancel(Cancel { job_id: job }));
            }
        }
        for done in finished {
            self.finished(node, done);
        }
        self.renew(node);
    }

    fn is_connected(&self, node: &str) -> bool {
        self.context.agents.list().iter().any(|agent| agent.node == node)
    }

    fn finished(&mut self, node: &str, finished: Finished) {
        let id = finished.job_id.clone();
        match self.jobs.get_mut(&id) {
            Some(job) if job.object.is_on(node) => {
                job.agent = Agent::Has;
                job.outcome = Some(finished);
                return;
            }
            // It was given to another node: whoever says so is mistaken, or lies.
            Some(job) => {
                tracing::warn!(
                    node,
                    subject = job.object.subject(),
                    "an outcome from a wrong node"
                );
            }
            None => self.repository_finished(node, &finished),
        }
        // Of an object that is gone, or of a repository, whose state is found out again anyway.
        self.send(node, Message::Recorded(Recorded { job_id: id }));
    }

    /// Sends. When the agent is gone meanwhile, its next Hello tells what it has.
    fn send(&self, node: &str, message: Message) -> bool {
        self.context.agents.send(node, message).is_ok()
    }

    /// How long the agent of a node has been away.
    fn away_for(&self, node: &str, now: Timestamp) -> Duration {
        elapsed(self.away.get(node).copied().unwrap_or(self.started), now)
    }

    /// Does what is to be done now.
    fn settle(&mut self) {
        let now = self.now();
        self.settle_places(now);
        self.settle_volumes(now);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_object_of_another_version_hides_no_other() {
        let restore = |spec: serde_json::Value| -> DeserializeGuard<PodVolumeRestore> {
            serde_json::from_value(json!({
                "apiVersion": "velero.io/v1", "kind": "PodVolumeRestore",
                "metadata": {"name": "r"}, "spec": spec,
            }))
            .unwrap()
        };
        let whole = json!({"pod": {}, "volume": "v", "backupStorageLocation": "l",
                           "snapshotID": "s", "sourceNamespace": "n"});
        let old =
            json!({"pod": {}, "volume": "v", "backupStorageLocation": "l", "snapshotID": "s"});
        let listed = |spec| valid(watcher::Event::InitApply(restore(spec)));
        assert!(matches!(listed(whole), Some(watcher::Event::InitApply(_))));
        assert!(listed(old).is_none());
        let done: Option<watcher::Event<PodVolumeRestore>> = valid(watcher::Event::InitDone);
        assert!(matches!(done, Some(watcher::Event::InitDone)));
    }
}
