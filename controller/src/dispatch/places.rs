//! Carries out what `location` and `maintenance` decide: checks locations, writes their statuses, opens and prunes
//! repositories, and lets agents try whether they reach the stores.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kube::ResourceExt;
use kube::api::{Patch, PatchParams, PostParams};
use proto::v1::finished::Outcome;
use proto::v1::from_controller::Message;
use proto::v1::job::Work;
use proto::v1::{Assign, Finished, Job, OpenRepository, Probe, ProbeResult, Renew, Repository};
use serde_json::{Value, json};

use super::job::{self, Agent, elapsed};
use super::volumes::api;
use super::write::{Precondition, Refused, write_status};
use super::{Change, Note, World};
use crate::api::location::LocationPhase;
use crate::api::{BackupRepository, BackupStorageLocation, Timestamp};
use crate::events::Tone;
use crate::location::check::{Checked, check};
use crate::location::status::{Reach, export_advice, frequency, not_default_any_more, status};
use crate::maintenance::{Keeper, Opened, PRUNE, Run, Step, identity, object};

/// A location that was not available is looked at this often.
const CHECK_FAILED_EVERY: Duration = Duration::from_secs(10);

/// After the cluster did not answer.
const CHECK_AGAIN: Duration = Duration::from_secs(5);

/// What is known of a location.
#[derive(Debug)]
pub(super) struct Location {
    /// The object as last seen.
    pub(super) object: BackupStorageLocation,
    /// Its repository.
    pub(super) keeper: Keeper,
    /// What the last check found, and when.
    checked: Option<(Checked, Timestamp)>,
    /// Whether one runs.
    checking: bool,
    /// Whether the object changed since the last one began.
    changed: bool,
    /// Not before this time is it checked again.
    check_at: Option<Timestamp>,
    /// What the agents said.
    reach: Reach,
    /// When each was asked.
    probed: BTreeMap<String, Timestamp>,
    /// Whether the status says something else than what is known.
    unsaid: bool,
    writing: bool,
}

impl Location {
    fn new(object: BackupStorageLocation) -> Self {
        Self {
            object,
            keeper: Keeper::default(),
            checked: None,
            checking: false,
            changed: true,
            check_at: None,
            reach: Reach::new(),
            probed: BTreeMap::new(),
            unsaid: false,
            writing: false,
        }
    }

    /// The agent of a node is to try again whether it reaches the store.
    pub(super) fn probe_again(&mut self, node: &str) {
        self.probed.remove(node);
    }

    /// What jobs need, or why they must wait.
    pub(super) fn open_repository(&self) -> Result<&Repository, String> {
        let name = self.object.name_any();
        match &self.checked {
            None => Err(format!("BackupStorageLocation '{name}' is being validated")),
            Some((Err(why), _)) => {
                Err(format!("BackupStorageLocation '{name}' is unavailable: {why}"))
            }
            Some((Ok(usable), _)) if self.keeper.is_open(usable) => Ok(&usable.repository),
            Some((Ok(_), _)) => {
                let known = self.keeper.object.as_ref().and_then(|object| object.status.as_ref());
                let why = known.and_then(|status| status.message.as_deref());
                let why = why.map(|why| format!(": {why}")).unwrap_or_default();
                Err(format!(
                    "the repository of BackupStorageLocation '{name}' is not open yet{why}"
                ))
            }
        }
    }

    fn usable(&self) -> Option<&crate::location::check::Usable> {
        self.checked.as_ref().and_then(|(checked, _)| checked.as_ref().ok())
    }

    /// What tells an agent the credentials in force.
    fn renewal(&self) -> Option<Message> {
        let credentials = self.usable()?.repository.credentials.clone();
        let location = self.object.name_any();
        Some(Message::Renew(Renew { location, credentials }))
    }

    fn is_due(&self, now: Timestamp) -> bool {
        if self.checking || self.writing || self.check_at.is_some_and(|at| now < at) {
            return false;
        }
        let Some((checked, at)) = &self.checked else {
            return true;
        };
        // Secrets are not watched; who has just mended one should not have to wait.
        let every = match (frequency(&self.object), checked) {
            (every, Err(_)) => {
                Some(every.map_or(CHECK_FAILED_EVERY, |it| it.min(CHECK_FAILED_EVERY)))
            }
            (every, Ok(_)) => every,
        };
        self.changed || every.is_some_and(|every| elapsed(*at, now) >= every)
    }
}

impl World {
    pub(super) fn follow_locations(&mut self, change: Change<BackupStorageLocation>) {
        match change {
            Change::Seen(object) => {
                let name = object.name_any();
                match self.locations.get_mut(&name) {
                    Some(known) if known.object.uid() == object.uid() => {
                        known.changed |= known.object.spec != object.spec;
                        known.object = object;
                    }
                    _ => {
                        self.locations.insert(name, Location::new(object));
                    }
                }
                self.keep_one_default();
            }
            Change::Gone(name) => {
                self.context.metrics.forget_location(&name);
                drop(self.locations.remove(&name));
            }
            Change::Only(names) => self.locations.retain(|name, _| {
                let stays = names.contains(name);
                if !stays {
                    self.context.metrics.forget_location(name);
                }
                stays
            }),
            Change::Nothing => {}
        }
    }

    fn keep_one_default(&self) {
        let all = self.locations.values().map(|location| &location.object);
        for name in not_default_any_more(all) {
            let api = api::<BackupStorageLocation>(&self.context);
            tokio::spawn(async move {
                let patch = Patch::Merge(json!({"spec": {"default": false}}));
                if let Err(error) = api.patch(&name, &PatchParams::default(), &patch).await {
                    tracing::warn!(location = name, %error, "cannot make it no default");
                }
            });
        }
    }

    pub(super) fn follow_repositories(&mut self, change: Change<BackupRepository>) {
        match change {
            Change::Seen(object) => self.repository_seen(object),
            Change::Gone(name) => {
                self.locations.get_mut(&name).into_iter().for_each(|it| it.keeper.object = None);
            }
            // Those that exist are seen, too; others are made when their locations work.
            Change::Only(_) | Change::Nothing => {}
        }
    }

    fn repository_seen(&mut self, object: BackupRepository) {
        let location = self.locations.get_mut(&object.spec.backup_storage_location);
        let Some(location) = location.filter(|it| it.object.name_any() == object.name_any()) else {
            return;
        };
        let version = |object: &BackupRepository| {
            object.resource_version().and_then(|text| text.parse::<u64>().ok())
        };
        let known = location.keeper.object.as_ref();
        let known = known.filter(|known| known.uid() == object.uid()).and_then(version);
        if version(&object).zip(known).is_none_or(|(new, old)| new >= old) {
            location.keeper.object = Some(object);
        }
    }

    pub(super) fn settle_places(&mut self, now: Timestamp) {
        let names: Vec<String> = self.locations.keys().cloned().collect();
        for name in names {
            self.check_location(&name, now);
            self.say_status(&name, now);
            self.probe(&name, now);
            self.keep_repository(&name, now);
        }
    }

    fn check_location(&mut self, name: &str, now: Timestamp) {
        let Some(location) = self.locations.get_mut(name).filter(|it| it.is_due(now)) else {
            return;
        };
        location.checking = true;
        location.changed = false;
        let (name, object) = (name.to_owned(), location.object.clone());
        let client = self.context.client.clone();
        self.spawn(async move {
            let found = check(&client, &object).await;
            Note::Checked { name, found }
        });
    }

    pub(super) fn checked(&mut self, name: &str, found: Result<Checked, kube::Error>) {
        let now = self.now();
        let Some(location) = self.locations.get_mut(name) else {
            return;
        };
        location.checking = false;
        let checked = match found {
            Ok(checked) => checked,
            Err(error) => {
                tracing::warn!(location = name, %error, "cannot look at a location's Secrets");
                location.check_at = now.checked_add(CHECK_AGAIN).ok();
                return;
            }
        };
        let credentials = |checked: &Checked| {
            checked.as_ref().ok().and_then(|usable| usable.repository.credentials.clone())
        };
        let old = location.checked.as_ref().and_then(|(checked, _)| credentials(checked));
        let new = credentials(&checked);
        let renewed = new.filter(|new| old.is_some_and(|old| old != *new));
        let exists =
            |checked: &Checked| checked.as_ref().ok().map(|usable| usable.repository_exists);
        let before = location.checked.as_ref().and_then(|(checked, _)| exists(checked));
        if (before, exists(&checked)) == (Some(true), Some(false)) {
            tracing::warn!(location = name, "its repository has vanished from the bucket");
            location.keeper.vanished();
        }
        location.checked = Some((checked, now));
        location.unsaid = true;
        if let Some(credentials) = renewed {
            for node in self.nodes_that_use(name) {
                let (location, credentials) = (name.to_owned(), Some(credentials.clone()));
                self.send(&node, Message::Renew(Renew { location, credentials }));
            }
        }
    }

    /// Nodes with work for a location: nobody else is told its keys.
    fn nodes_that_use(&self, name: &str) -> BTreeSet<String> {
        let volumes = self
            .jobs
            .values()
            .filter(|job| job.object.phase().is_assigned() && job.object.location() == name);
        let volumes = volumes.filter_map(|job| job.object.node().map(str::to_owned));
        let location = self.locations.get(name).into_iter();
        let runs = location.flat_map(|location| location.keeper.runs()).map(|run| run.node.clone());
        volumes.chain(runs).collect()
    }

    /// Tells an agent that is back what has changed while it was away.
    pub(super) fn renew(&self, node: &str) {
        for (name, location) in &self.locations {
            if let Some(renewal) =
                location.renewal().filter(|_| self.nodes_that_use(name).contains(node))
            {
                self.send(node, renewal);
            }
        }
    }

    fn say_status(&mut self, name: &str, now: Timestamp) {
        let Some(location) = self.locations.get_mut(name) else {
            return;
        };
        let Some((checked, at)) = location.checked.as_ref().filter(|_| location.unsaid) else {
            return;
        };
        if location.writing {
            return;
        }
        // A store that works is of no use with a repository that does not open.
        let secret = checked.as_ref().map(|usable| usable.secret.clone()).unwrap_or_default();
        let checked = &match (checked, &location.keeper.failed) {
            (Ok(_), Some(why)) => Err(format!(
                "its repository cannot be opened: {why}; the passphrase is in Secret '{secret}', key \
                 'passphrase', and where it was changed, the former one in 'previous-passphrase'"
            )),
            (checked, _) => checked.clone(),
        };
        let new = status(&location.object, checked, *at, &location.reach, now);
        let uid = location.object.uid().unwrap_or_default();
        let old = location.object.status.as_ref();
        let key_state = |status: Option<&crate::api::BackupStorageLocationStatus>| {
            let all = status.and_then(|status| status.conditions.as_ref());
            let mut found = all.into_iter().flatten().filter(|it| it.type_ == "KeyNotExported");
            found.next().map(|condition| condition.status.clone())
        };
        let warn_of_key = key_state(Some(&new)).as_deref() == Some("True")
            && key_state(old).as_deref() != Some("True");
        let changed = old.and_then(|old| old.phase) != new.phase;
        if warn_of_key {
            let advice = export_advice(&secret);
            self.events.tell(&location.object, Tone::Warning, "KeyNotExported", &advice, now);
        }
        self.context.metrics.location(name, new.phase == Some(LocationPhase::Available));
        if let (true, Some(phase)) = (changed, new.phase) {
            let failed = new.message.clone().filter(|_| checked.is_err());
            let tone = if failed.is_some() { Tone::Warning } else { Tone::Normal };
            let message = failed.unwrap_or_else(|| "validated".to_owned());
            match tone {
                Tone::Warning => tracing::warn!(location = name, ?phase, message, "changed"),
                Tone::Normal => tracing::info!(location = name, ?phase, message, "changed"),
            }
            self.events.tell(&location.object, tone, &format!("{phase:?}"), &message, now);
        }
        let body = json!(new);
        // What a merge patch does not mention stays.
        let mut body = body;
        if new.message.is_none() {
            body["message"] = Value::Null;
        }
        location.writing = true;
        location.unsaid = false;
        let (name, context) = (name.to_owned(), self.context.clone());
        self.spawn(async move {
            let precondition = Precondition { uid, version: None };
            let api = api::<BackupStorageLocation>(&context);
            let done = write_status(&api, &name, &precondition, &body).await;
            Note::LocationWritten { name, done }
        });
    }

    pub(super) fn location_written(
        &mut self,
        name: &str,
        done: Result<BackupStorageLocation, Refused>,
    ) {
        let Some(location) = self.locations.get_mut(name) else {
            return;
        };
        location.writing = false;
        match done {
            Ok(object) if location.object.uid() == object.uid() => {
                location.changed |= location.object.spec != object.spec;
                location.object = object;
            }
            Ok(_) | Err(Refused::Gone) => {}
            Err(Refused::Conflict) => location.unsaid = true,
        }
    }

    /// Lets the agents try whether they reach the store.
    fn probe(&mut self, name: &str, now: Timestamp) {
        let agents = self.context.agents.clone();
        let every = self.context.settings.probe_every;
        let Some(location) = self.locations.get_mut(name) else {
            return;
        };
        let Some(repository) = location.usable().map(|usable| usable.repository.clone()) else {
            return;
        };
        for agent in agents.list() {
            let asked = location.probed.get(&agent.node);
            if asked.is_some_and(|at| elapsed(*at, now) < every) {
                continue;
            }
            // To reach a store takes neither passphrase nor key: who is refused has reached it.
            let repository =
                Repository { passphrase: Vec::new(), credentials: None, ..repository.clone() };
            let probe = Probe { id: name.to_owned(), repository: Some(repository) };
            if agents.send(&agent.node, Message::Probe(probe)).is_ok() {
                location.probed.insert(agent.node, now);
            }
        }
    }

    pub(super) fn probed(&mut self, node: &str, result: ProbeResult) {
        if let Some(location) = self.locations.get_mut(&result.id) {
            let error = (!result.error.is_empty()).then_some(result.error);
            let old = location.reach.insert(node.to_owned(), error.clone());
            location.unsaid |= old != Some(error);
        }
    }

    pub(super) fn forget_reach(&mut self, node: &str) {
        for location in self.locations.values_mut() {
            location.unsaid |= location.reach.remove(node).is_some();
            location.keeper.lost(node);
        }
    }

    fn keep_repository(&mut self, name: &str, now: Timestamp) {
        let every = self.context.settings.prune_every;
        let prune = self.locations.get(name).and_then(|it| it.keeper.prune.as_ref());
        if let Some(node) = prune.map(|run| run.node.clone())
            && !self.is_connected(&node)
            && self.away_for(&node, now) >= self.context.settings.agent_lost
        {
            self.change_keeper(name, |keeper| keeper.gone(&node));
        }
        let Some(location) = self.locations.get(name) else {
            return;
        };
        let read_only = location.object.spec.is_read_only();
        let Some(step) = location.keeper.next(location.usable(), read_only, every, now) else {
            return;
        };
        let Some(usable) = location.usable().cloned() else {
            return;
        };
        match step {
            Step::Create => self.create_repository(name, every),
            Step::Trust => {
                let what = Box::new(identity(&usable.repository));
                self.change_keeper(name, |keeper| keeper.opened = Opened::Yes(what));
                let message = "not opened for writing, because the location is ReadOnly";
                self.write_repository(name, &json!({"phase": "Ready", "message": message}));
            }
            Step::Open => {
                let what = Box::new(identity(&usable.repository));
                let work = Work::Open(OpenRepository {
                    create: true,
                    previous_passphrase: usable.previous_passphrase,
                });
                if let Some(run) = self.start(name, "open", usable.repository, work, now) {
                    self.change_keeper(name, |it| it.opened = Opened::Opening { run, what });
                }
            }
            Step::Prune => {
                let work = Work::Prune(PRUNE);
                if let Some(run) = self.start(name, "prune", usable.repository, work, now) {
                    self.change_keeper(name, |keeper| keeper.prune = Some(run));
                }
            }
        }
    }

    fn change_keeper(&mut self, name: &str, how: impl FnOnce(&mut Keeper)) {
        if let Some(location) = self.locations.get_mut(name) {
            how(&mut location.keeper);
        }
    }

    /// Sends a job for a repository to the agent with the fewest jobs that has room for it. Behind a volume it
    /// might wait for hours, though another agent comes back in a moment.
    fn start(
        &self,
        name: &str,
        what: &str,
        repository: Repository,
        work: Work,
        now: Timestamp,
    ) -> Option<Run> {
        let settings = &self.context.settings;
        let keeper = &self.locations.get(name)?.keeper;
        let uid = keeper.object.as_ref()?.uid()?;
        let mut load: BTreeMap<&str, usize> = BTreeMap::new();
        // What an agent was assigned and lacks waits for the opening, not the other way round.
        let counts = |job: &&job::Job| {
            job.object.phase().is_assigned() && (what != "open" || job.agent == Agent::Has)
        };
        let volumes = self.jobs.values().filter(counts).filter_map(|job| job.object.node());
        let runs = self.locations.values().flat_map(|location| location.keeper.runs());
        volumes.chain(runs.map(|run| &*run.node)).for_each(|node| {
            *load.entry(node).or_default() += 1;
        });
        let on = |node: &str| load.get(node).copied().unwrap_or(0);
        let cut_off: BTreeSet<&String> = self
            .locations
            .get(name)
            .into_iter()
            .flat_map(|it| it.reach.iter().filter(|(_, error)| error.is_some()))
            .map(|(node, _)| node)
            .collect();
        let mut agents = self.context.agents.list();
        agents.retain(|agent| on(&agent.node) < agent.capacity as usize);
        agents.sort_by_key(|agent| {
            (cut_off.contains(&agent.node), on(&agent.node), agent.node.clone())
        });
        let node = agents.into_iter().next()?.node;
        let id = format!("{uid}-{what}-{}", now.as_millisecond());
        let job = Job {
            id: id.clone(),
            subject: format!("backuprepository/{}/{name}", self.context.namespace),
            repository: Some(Repository {
                limit_upload: settings.limit_upload,
                limit_download: settings.limit_download,
                ..repository
            }),
            stall_seconds: u32::try_from(settings.stall.as_secs()).unwrap_or(u32::MAX),
            repeated: false,
            work: Some(work),
        };
        let sent = self.send(&node, Message::Assign(Assign { job: Some(job) }));
        sent.then_some(Run { job: id, node, began: now })
    }

    /// Notes what came of a job, if it is one for a repository.
    pub(super) fn repository_finished(&mut self, node: &str, finished: &Finished) {
        let now = self.now();
        let found = self.locations.iter_mut().find_map(|(name, location)| {
            let own = |run: &&Run| run.job == finished.job_id && run.node == node;
            location.keeper.runs().find(own)?;
            let status = location.keeper.finished(finished, now)?;
            location.unsaid = true;
            Some((name.clone(), status))
        });
        if let Some((name, status)) = found {
            let job = &finished.job_id;
            match &finished.outcome {
                Some(Outcome::Failure(failure)) => {
                    let why = &failure.message;
                    tracing::warn!(location = name, job, why, "a job for the repository failed");
                }
                _ => tracing::info!(location = name, job, "a job for the repository is done"),
            }
            if let Some(Outcome::Opened(opened)) = &finished.outcome
                && opened.keys_removed > 0
                && let Some(location) = self.locations.get(&name)
            {
                let done = "the repository opens with the new passphrase, and no longer with the former one: \
                            'previous-passphrase' can be removed from the Secret";
                self.events.tell(&location.object, Tone::Normal, "PassphraseChanged", done, now);
            }
            self.write_repository(&name, &status);
        }
    }

    fn create_repository(&mut self, name: &str, every: Duration) {
        let Some(location) = self.locations.get_mut(name) else {
            return;
        };
        location.keeper.writing = true;
        let made = object(&location.object, every);
        let (name, context) = (name.to_owned(), self.context.clone());
        self.spawn(async move {
            let api = api::<BackupRepository>(&context);
            let done = match api.create(&PostParams::default(), &made).await {
                Err(kube::Error::Api(status)) if status.is_already_exists() => api.get(&name).await,
                other => other,
            };
            if let Err(error) = &done {
                tracing::warn!(location = name, %error, "cannot make a BackupRepository");
                tokio::time::sleep(CHECK_AGAIN).await;
            }
            Note::RepositoryWritten { name, done: done.ok() }
        });
    }

    fn write_repository(&mut self, name: &str, status: &Value) {
        let Some(location) = self.locations.get_mut(name) else {
            return;
        };
        let Some(object) = &location.keeper.object else {
            return;
        };
        location.keeper.writing = true;
        let uid = object.uid().unwrap_or_default();
        let (name, context, status) = (name.to_owned(), self.context.clone(), status.clone());
        self.spawn(async move {
            let precondition = Precondition { uid, version: None };
            let api = api::<BackupRepository>(&context);
            let done = write_status(&api, &name, &precondition, &status).await.ok();
            Note::RepositoryWritten { name, done }
        });
    }

    pub(super) fn repository_written(&mut self, name: &str, done: Option<BackupRepository>) {
        self.change_keeper(name, |keeper| keeper.writing = false);
        done.into_iter().for_each(|object| self.repository_seen(object));
    }
}
