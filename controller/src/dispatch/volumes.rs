//! Carries out what `job` and `queue` decide about volumes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::NamespaceResourceScope;
use kube::api::Api;
use proto::v1::from_controller::Message;
use proto::v1::job::Work;
use proto::v1::{Assign, Backup, Cancel, Job as Work_, Recorded, Repository, Restore};

use super::inspect::{Inspection, inspect};
use super::job::{Action, Agent, Facts, Job, Place, Ready, elapsed, next};
use super::object::{Object, Update, patch};
use super::outcome::{self, Ending};
use super::write::{Precondition, Refused, write_status};
use super::{Change, Note, World};
use crate::api::{
    BACKUP_NAME, PVC_UID, PodVolumeBackup, PodVolumePhase, PodVolumeRestore, Timestamp,
};
use crate::events::Tone;
use crate::metrics::{JobKind, Outcome, Stage};
use crate::queue::{self, Kind, Running, Waiting, Why};

/// When to look again for a volume that is not there yet.
const LOOK_AGAIN: Duration = Duration::from_secs(3);

fn later(now: Timestamp) -> Timestamp {
    now.checked_add(LOOK_AGAIN).unwrap_or(now)
}

impl World {
    pub(super) fn follow<K: Into<Object>>(&mut self, change: Change<K>, kind: Kind) {
        match change {
            Change::Seen(object) => self.seen(object.into()),
            Change::Gone(uid) => self.gone(&uid),
            Change::Only(uids) => {
                let missing: Vec<String> = self
                    .jobs
                    .iter()
                    .filter(|(uid, job)| job.object.kind() == kind && !uids.contains(*uid))
                    .map(|(uid, _)| uid.clone())
                    .collect();
                missing.iter().for_each(|uid| self.gone(uid));
            }
            Change::Nothing => {}
        }
    }

    pub(super) fn seen(&mut self, object: Object) {
        let now = self.now();
        let connected = object.node().is_some_and(|node| self.is_connected(node));
        let complete = self.is_complete();
        let Some(job) = self.jobs.get_mut(&object.uid()) else {
            let mut job = Job::new(object, now);
            // Of those that were there when this dispatcher began, agents say what they have.
            if complete && connected && job.object.phase().is_assigned() {
                job.agent = Agent::Lacks;
            }
            self.jobs.insert(job.object.uid(), job);
            return;
        };
        // What was written here comes back through the watch, perhaps after older versions.
        if job.object.is_newer_than(&object) {
            return;
        }
        let accepted = !job.object.phase().is_assigned() && object.phase().is_assigned();
        if accepted && connected {
            // Also by a write whose answer was lost, or by the leader before this one.
            job.agent = Agent::Lacks;
        }
        job.object = object;
    }

    /// Somebody deleted the object: nobody wants its job any more.
    fn gone(&mut self, uid: &str) {
        let Some(job) = self.jobs.remove(uid) else {
            return;
        };
        let concerned = job.object.phase().is_assigned() || job.outcome.is_some();
        if let (true, Some(node)) = (concerned, job.object.node()) {
            let id = uid.to_owned();
            self.send(
                node,
                match job.outcome {
                    Some(_) => Message::Recorded(Recorded { job_id: id }),
                    None => Message::Cancel(Cancel { job_id: id }),
                },
            );
        }
    }

    pub(super) fn inspected(&mut self, uid: &str, found: Result<Inspection, kube::Error>) {
        let now = self.now();
        let Some(job) = self.jobs.get_mut(uid) else {
            return;
        };
        job.place = match found {
            Ok(Inspection::Ready(ready)) => Place::Ready(ready),
            Ok(Inspection::NotYet(why)) => Place::NotYet(why, later(now)),
            Ok(Inspection::Refused(why)) => Place::Refused(why),
            Ok(Inspection::Done) => Place::Done,
            Err(error) => {
                tracing::warn!(subject = job.object.subject(), %error, "cannot look for a volume");
                Place::NotYet(format!("cannot look for its volume: {error}"), later(now))
            }
        };
    }

    pub(super) fn written(&mut self, uid: &str, update: &Update, done: Result<Object, Refused>) {
        let now = self.now();
        let Some(job) = self.jobs.get_mut(uid) else {
            return;
        };
        job.writing = false;
        job.accepting = None;
        let object = match done {
            Ok(object) => object,
            // The watch tells what became of it.
            Err(refused) => {
                tracing::debug!(
                    subject = job.object.subject(),
                    ?refused,
                    "a status was not written"
                );
                if let (Update::SavedAfterAll(snapshot), Some(node)) = (update, job.object.node()) {
                    let (subject, node) = (job.object.subject(), node.to_owned());
                    tracing::warn!(subject, snapshot, "saved after all, which cannot be noted");
                    job.outcome = None;
                    let job_id = uid.to_owned();
                    self.send(&node, Message::Recorded(Recorded { job_id }));
                }
                return;
            }
        };
        if !job.object.is_newer_than(&object) {
            job.object = object.clone();
        }
        let mut recorded = None;
        match update {
            Update::Accept(node) => {
                // Unless it went away meanwhile; it says what it has when it is back.
                let connected = self.context.agents.list().iter().any(|agent| agent.node == *node);
                job.agent = if connected { Agent::Lacks } else { Agent::Unknown };
                job.fresh = true;
            }
            Update::Progress { .. } => job.progress_at = Some(now),
            Update::Finish(finished) => recorded = Some(finished.clone()),
            _ => {}
        }
        let (metrics, kind) = (&self.context.metrics, job_kind(object.kind()));
        match (&recorded, update) {
            (Some(finished), _) => metrics.finished(kind, finished),
            (None, Update::Fail(_)) => metrics.end(kind, Outcome::Failed),
            (None, Update::Canceled(_)) => metrics.end(kind, Outcome::Canceled),
            _ => {}
        }
        self.tell(&object, update, now);
    }

    /// Tells people of a change that they care about.
    fn tell(&self, object: &Object, update: &Update, now: Timestamp) {
        if matches!(update, Update::Note(_) | Update::Progress { .. } | Update::Canceling) {
            return;
        }
        let phase = object.phase();
        let ending = match update {
            Update::Finish(finished) => Some((Ending::of(finished), outcome::message(finished))),
            _ => None,
        };
        let (tone, reason) = match ending {
            Some((Ending::Completed, Some(_))) => {
                (Tone::Warning, "CompletedWithWarnings".to_owned())
            }
            Some((Ending::Incomplete, _)) => (Tone::Warning, "FilesMissing".to_owned()),
            _ if phase == PodVolumePhase::Failed => (Tone::Warning, format!("{phase:?}")),
            _ => (Tone::Normal, format!("{phase:?}")),
        };
        let message = match (update, object.message()) {
            (Update::Accept(node), _) => format!("assigned to node {node}"),
            (_, Some(message)) => message.to_owned(),
            (Update::Finish(_), None) => "done".to_owned(),
            _ => reason.clone(),
        };
        let subject = object.subject();
        match tone {
            Tone::Warning => tracing::warn!(subject, ?phase, reason, message, "changed"),
            Tone::Normal => tracing::info!(subject, ?phase, message, "changed"),
        }
        match object {
            Object::Backup(object) => {
                self.events.tell(&**object, tone, &reason, &message, now);
            }
            Object::Restore(object) => {
                self.events.tell(&**object, tone, &reason, &message, now);
            }
        }
    }

    /// Jobs that take slots or room on nodes now.
    fn running(&self, now: Timestamp, connected: &BTreeMap<String, u32>) -> Vec<Running> {
        let volumes = self.jobs.values().filter_map(|job| {
            let node = match &job.accepting {
                Some(node) => node,
                None if job.object.phase().is_assigned() => job.object.node()?,
                None => return None,
            };
            let counts = connected.contains_key(node)
                || self.away_for(node, now) < self.context.settings.agent_uncounted;
            counts.then(|| Running { node: node.to_owned(), volume: true })
        });
        let runs = self.locations.values().flat_map(|location| location.keeper.runs());
        let others = runs.map(|run| Running { node: run.node.clone(), volume: false });
        volumes.chain(others).collect()
    }

    pub(super) fn settle_volumes(&mut self, now: Timestamp) {
        let agents = self.context.agents.list();
        let connected: BTreeMap<String, u32> =
            agents.into_iter().map(|agent| (agent.node, agent.capacity)).collect();
        let running = self.running(now, &connected);
        let mut waiting = Vec::new();
        let mut groups = BTreeSet::new();
        for (uid, job) in &self.jobs {
            if !job.object.phase().is_final() {
                groups.insert((job.object.kind(), job.object.group()));
            }
            if let Some(ready) = job.can_be_queued()
                && self.obstacle(job).is_none()
                && self.hopeless(job).is_none()
            {
                waiting.push(Waiting {
                    id: uid.clone(),
                    kind: job.object.kind(),
                    group: job.object.group(),
                    created: job.object.created(),
                    node: ready.node.clone(),
                });
            }
        }
        self.turns.retain(&groups);
        let limits = self.context.settings.limits;
        let plan = queue::plan(&waiting, &running, &connected, limits, &mut self.turns);
        self.count(running.iter().filter(|run| run.volume).count());
        let granted: BTreeSet<&String> = plan.assign.iter().collect();
        let uids: Vec<String> = self.jobs.keys().cloned().collect();
        for uid in uids {
            let waits = plan.wait.get(&uid).copied();
            self.act(&uid, granted.contains(&uid), waits, &connected, now);
        }
    }

    fn count(&self, running: usize) {
        for kind in [Kind::Backup, Kind::Restore] {
            let all = self.jobs.values().filter(|job| job.object.kind() == kind);
            let waiting = all.clone().filter(|job| job.object.phase() == PodVolumePhase::New);
            let assigned = all.filter(|job| job.object.phase().is_assigned());
            let metrics = &self.context.metrics;
            metrics.pending(job_kind(kind), Stage::Waiting, waiting.count());
            metrics.pending(job_kind(kind), Stage::Running, assigned.count().min(running));
        }
    }

    /// Why the location of an object cannot be used now.
    fn obstacle(&self, job: &Job) -> Option<String> {
        let name = job.object.location();
        match self.locations.get(name) {
            None => Some(format!("there is no BackupStorageLocation '{name}'")),
            Some(location) => location.open_repository().err(),
        }
    }

    /// Why the location of an object never can be used for it.
    fn hopeless(&self, job: &Job) -> Option<String> {
        let name = job.object.location();
        let location = self.locations.get(name)?;
        let only_read = location.object.spec.is_read_only();
        (only_read && job.object.kind() == Kind::Backup)
            .then(|| format!("BackupStorageLocation '{name}' is ReadOnly"))
    }

    fn act(
        &mut self,
        uid: &str,
        granted: bool,
        waits: Option<Why>,
        connected: &BTreeMap<String, u32>,
        now: Timestamp,
    ) {
        let Some(job) = self.jobs.get(uid) else {
            return;
        };
        let node = match &job.place {
            Place::Ready(ready) if job.object.phase() == PodVolumePhase::New => Some(&*ready.node),
            _ => job.object.node(),
        };
        let node = node.unwrap_or_default().to_owned();
        let is_connected = connected.contains_key(&node);
        let away = if is_connected { Duration::ZERO } else { self.away_for(&node, now) };
        let location = self.obstacle(job);
        let holds_slot = job.object.phase().is_assigned() && job.agent == Agent::Lacks;
        let blocked_since =
            location.as_ref().filter(|_| holds_slot).map(|_| job.blocked_since.unwrap_or(now));
        let patience = self.context.settings.agent_lost;
        let facts = Facts {
            location,
            hopeless: self.hopeless(job),
            blocked: blocked_since.is_some_and(|since| elapsed(since, now) >= patience),
            granted,
            waits: waits.map(|why| explain(why, &node)),
            connected: is_connected,
            lost: job.object.phase().is_assigned() && away >= self.context.settings.agent_lost,
        };
        let action = next(job, &facts, now);
        self.change(uid, |job| job.blocked_since = blocked_since);
        let Some(action) = action else {
            return;
        };
        match action {
            Action::Inspect => self.look_for(uid),
            Action::Write(update) => self.write(uid, update, now),
            Action::Assign { repeated } => self.assign(uid, &node, repeated),
            Action::Cancel => {
                let sent = self.send(&node, Message::Cancel(Cancel { job_id: uid.to_owned() }));
                self.change(uid, |job| job.cancel_sent = sent);
            }
            Action::Record => {
                self.send(&node, Message::Recorded(Recorded { job_id: uid.to_owned() }));
                self.change(uid, |job| job.outcome = None);
            }
        }
    }

    fn change(&mut self, uid: &str, how: impl FnOnce(&mut Job)) {
        if let Some(job) = self.jobs.get_mut(uid) {
            how(job);
        }
    }

    fn look_for(&mut self, uid: &str) {
        let Some(job) = self.jobs.get_mut(uid) else {
            return;
        };
        job.place = Place::Asked;
        let (uid, object) = (uid.to_owned(), job.object.clone());
        let client = self.context.client.clone();
        self.spawn_in_turn(async move {
            let found = inspect(client, &object).await;
            Note::Inspected { uid, found }
        });
    }

    fn write(&mut self, uid: &str, update: Update, now: Timestamp) {
        let Some(job) = self.jobs.get_mut(uid) else {
            return;
        };
        job.writing = true;
        if let Update::Progress { .. } = update {
            job.progress = None;
        }
        let status = patch(&job.object, &update, now);
        if let Update::Accept(node) = &update {
            job.accepting = Some(node.clone());
        }
        // What is not the end must not undo what somebody else wrote meanwhile: another leader, for instance.
        let version = update.needs_version().then(|| job.object.version_text()).flatten();
        let precondition = Precondition { uid: uid.to_owned(), version };
        let (name, is_backup) = (job.object.name(), job.object.kind() == Kind::Backup);
        let (uid, context) = (uid.to_owned(), self.context.clone());
        self.spawn_in_turn(async move {
            let (done, latest) = if is_backup {
                write_or_look::<PodVolumeBackup>(&context, &name, &precondition, &status).await
            } else {
                write_or_look::<PodVolumeRestore>(&context, &name, &precondition, &status).await
            };
            Note::Written { uid, update, done, latest }
        });
    }

    fn assign(&mut self, uid: &str, node: &str, repeated: bool) {
        let Some(job) = self.jobs.get(uid) else {
            return;
        };
        let location = self.locations.get(job.object.location());
        let repository = location.and_then(|location| location.open_repository().ok());
        let (Place::Ready(ready), Some(repository)) = (&job.place, repository) else {
            return;
        };
        let settings = &self.context.settings;
        let work = match &job.object {
            Object::Backup(object) => Work::Backup(self.backup(object, ready)),
            Object::Restore(object) => Work::Restore(Restore {
                volume: Some(ready.found.volume.clone()),
                snapshot: object.spec.snapshot_id.clone(),
                done_marker: job.object.mark(),
            }),
        };
        let work = Work_ {
            id: uid.to_owned(),
            subject: job.object.subject(),
            repository: Some(Repository {
                limit_upload: settings.limit_upload,
                limit_download: settings.limit_download,
                ..repository.clone()
            }),
            stall_seconds: u32::try_from(settings.stall.as_secs()).unwrap_or(u32::MAX),
            repeated,
            work: Some(work),
        };
        if self.send(node, Message::Assign(Assign { job: Some(work) })) {
            self.change(uid, |job| {
                job.agent = Agent::Has;
                job.fresh = false;
            });
        }
    }

    fn backup(&self, object: &PodVolumeBackup, ready: &Ready) -> Backup {
        let pod = &object.spec.pod;
        let named = |name: &Option<String>| name.clone().unwrap_or_default();
        let mut tags: BTreeMap<String, String> = object.spec.tags.clone().unwrap_or_default();
        let backup = object.metadata.labels.as_ref().and_then(|labels| labels.get(BACKUP_NAME));
        if let Some(backup) = backup {
            tags.entry("backup".to_owned()).or_insert_with(|| backup.clone());
        }
        let given = object.spec.parent_snapshot.clone().filter(|parent| !parent.is_empty());
        Backup {
            volume: Some(ready.found.volume.clone()),
            lineage: ready.found.lineage.clone(),
            host: format!("{}/{}", named(&pod.namespace), named(&pod.name)),
            tags: tags.into_iter().collect(),
            parent: given.or_else(|| self.parent(object, ready)).unwrap_or_default(),
        }
    }

    /// The newest snapshot of the same claim in the same location. One that lacks files is as good as another: a backup
    /// takes over from it only what is whole.
    fn parent(&self, object: &PodVolumeBackup, ready: &Ready) -> Option<String> {
        let claim = ready.found.claim.as_ref()?;
        let others = self.jobs.values().filter_map(|job| match &job.object {
            Object::Backup(other)
                if matches!(
                    job.object.phase(),
                    PodVolumePhase::Completed | PodVolumePhase::Failed
                ) && job.object.label(PVC_UID) == claim.uid
                    && other.spec.backup_storage_location
                        == object.spec.backup_storage_location =>
            {
                let status = other.status.as_ref()?;
                let snapshot = status.snapshot_id.as_ref().filter(|id| !id.is_empty())?;
                Some((status.completion_timestamp.as_ref().map(|time| time.0), snapshot))
            }
            _ => None,
        });
        others.max().map(|(_, snapshot)| snapshot.clone())
    }
}

/// Changes a status; where that was refused because the object has changed, also tells what it is now.
async fn write_or_look<K>(
    context: &super::Context,
    name: &str,
    precondition: &Precondition,
    status: &serde_json::Value,
) -> (Result<Object, Refused>, Option<Object>)
where
    K: kube::Resource<Scope = NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned
        + Into<Object>,
{
    let api = api::<K>(context);
    let done = write_status(&api, name, precondition, status).await.map(Into::into);
    let latest = match done {
        // Without an answer the watch tells, a little later.
        Err(Refused::Conflict) => api.get(name).await.ok().map(Into::into),
        _ => None,
    };
    (done, latest.filter(|object: &Object| object.uid() == precondition.uid))
}

pub(super) fn api<K>(context: &super::Context) -> Api<K>
where
    K: kube::Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
{
    Api::namespaced(context.client.clone(), &context.namespace)
}

fn explain(why: Why, node: &str) -> String {
    match why {
        Why::NoAgent => format!(
            "waiting for the agent of node '{node}', which is not connected: look at its node-agent pod"
        ),
        Why::Cluster => "waiting for a worker: all are busy".to_owned(),
        Why::Node => format!("waiting for a worker on node '{node}': all are busy"),
        Why::Agent => format!("waiting for memory of the agent of node '{node}'"),
    }
}

fn job_kind(kind: Kind) -> JobKind {
    match kind {
        Kind::Backup => JobKind::Backup,
        Kind::Restore => JobKind::Restore,
    }
}
