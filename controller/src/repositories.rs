//! BackupRepositories: the repository of each location is opened by an agent before anything uses it, and pruned
//! regularly.
//!
//! ```text
//!  watch ──┐
//!  places ─┼─> Keeper::next (pure) ─> status patch · desk (open, prune) ─> Shelves (published): what can be used
//!  desk ───┘
//! ```
//! * `keeper`: what is known of one, and what to do about it.
//! * What it publishes is all that others need to use a repository: see [`Shelf`].
//! * An outcome is recorded when the object tells it. Where the object is gone, it is found out again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use futures::StreamExt;
use kube::ResourceExt;
use kube::api::{Api, PostParams};
use kube::runtime::watcher;
use proto::v1::finished::Outcome;
use proto::v1::job::Work;
use proto::v1::{Finished, Job as Order, OpenRepository, Repository};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::api::{BackupRepository, Timestamp};
use crate::cluster::watch::{Change, Listing, watch};
use crate::cluster::write::{Precondition, RequestTurns, write_status};
use crate::desk::{Desk, Has, Need, Notice, Owner, Request, Ticket};
use crate::events::Tone;
use crate::places::{Place, Places};
use crate::rooms::{Context, Settings};

pub mod keeper;

use keeper::{Keeper, Opened, PRUNE, Run, Step, identity, object};

/// How often it is looked at what only time changes.
const TICK: Duration = Duration::from_secs(1);

/// After the object could not be made.
const CREATE_AGAIN: Duration = Duration::from_secs(5);

/// Notes that may wait before their tasks do.
const NOTES: usize = 256;

/// Requests under way at once.
const REQUESTS: usize = 8;

/// What others see of a location and its repository.
#[derive(Debug, Clone, PartialEq)]
pub struct Shelf {
    /// Whether the location is only read.
    pub read_only: bool,
    /// What jobs need, or why they must wait.
    pub open: Result<Arc<Repository>, String>,
    /// Why it could not be opened the last time, if so.
    pub failed: Option<String>,
}

/// By name of the location.
pub type Shelves = BTreeMap<String, Shelf>;

/// A job on a repository, before what is to be done: the store, limits, and when it stalls.
pub fn order(settings: &Settings, repository: &Repository) -> Order {
    Order {
        repository: Some(Repository {
            limit_upload: settings.limit_upload,
            limit_download: settings.limit_download,
            ..repository.clone()
        }),
        stall_seconds: u32::try_from(settings.stall.as_secs()).unwrap_or(u32::MAX),
        ..Order::default()
    }
}

/// What a task reports.
#[derive(Debug)]
struct Written {
    name: String,
    object: Option<BackupRepository>,
    /// The agent and the job whose outcome was written.
    outcome: Option<(String, String)>,
}

/// Runs until the watch ends.
///
/// # Errors
/// When the watch ended for good.
pub async fn run(
    context: Context,
    desk: Desk,
    mut notices: mpsc::Receiver<Notice>,
    mut places: watch::Receiver<Option<Arc<Places>>>,
    shelves: watch::Sender<Option<Arc<Shelves>>>,
) -> Result<()> {
    let (notes, mut received) = mpsc::channel(NOTES);
    let mut watched = watch::<BackupRepository>(&context.client, &context.namespace).boxed();
    let turns = RequestTurns::new(REQUESTS);
    let mut room = Room {
        context,
        desk,
        notes,
        turns,
        shelves,
        listing: Listing::default(),
        open: false,
        known: BTreeMap::new(),
        places: None,
    };
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            event = watched.next() => match event {
                Some(event) => room.follow(event),
                None => bail!("the watch of BackupRepositories ended"),
            },
            note = received.recv() => note.into_iter().for_each(|note| room.written(note)),
            notice = notices.recv() => match notice {
                Some(notice) => room.notice(notice),
                None => return Ok(()),
            },
            Ok(()) = places.changed() => {}
            _ = tick.tick() => {}
        }
        let published = places.borrow_and_update().clone();
        room.learn_places(published);
        room.settle();
    }
}

/// All that is known.
struct Room {
    context: Context,
    desk: Desk,
    notes: mpsc::Sender<Written>,
    turns: RequestTurns,
    shelves: watch::Sender<Option<Arc<Shelves>>>,
    listing: Listing,
    /// Whether the desk was told that agents can be heard.
    open: bool,
    /// By name of the location, which is that of the object.
    known: BTreeMap<String, Keeper>,
    places: Option<Arc<Places>>,
}

impl Room {
    fn follow(&mut self, event: watcher::Event<BackupRepository>) {
        match self.listing.take(event, ResourceExt::name_any) {
            Change::Seen(object) => self.seen(object),
            Change::Gone(name) => {
                self.known.get_mut(&name).into_iter().for_each(|keeper| keeper.object = None);
            }
            // Those that exist are seen, too.
            Change::Only(names) => {
                let gone = self.known.iter_mut().filter(|(name, _)| !names.contains(*name));
                gone.for_each(|(_, keeper)| keeper.object = None);
            }
            Change::Nothing => {}
        }
    }

    fn seen(&mut self, object: BackupRepository) {
        let name = object.name_any();
        if object.spec.backup_storage_location != name {
            return;
        }
        let version = |object: &BackupRepository| {
            object.resource_version().and_then(|text| text.parse::<u64>().ok())
        };
        let keeper = self.known.entry(name).or_default();
        let known = keeper.object.as_ref();
        let known = known.filter(|known| known.uid() == object.uid()).and_then(version);
        if version(&object).zip(known).is_none_or(|(new, old)| new >= old) {
            keeper.object = Some(object);
        }
    }

    fn learn_places(&mut self, published: Option<Arc<Places>>) {
        let Some(new) = published else {
            return;
        };
        let old = self.places.replace(new.clone());
        if old.as_ref().is_some_and(|old| Arc::ptr_eq(old, &new)) {
            return;
        }
        let exists = |place: Option<&Place>| {
            place.and_then(|place| place.usable.as_ref().ok()).map(|it| it.repository_exists)
        };
        for (name, place) in &*new {
            let before = exists(old.as_ref().and_then(|old| old.get(name)));
            if (before, exists(Some(place))) == (Some(true), Some(false))
                && let Some(keeper) = self.known.get_mut(name)
            {
                tracing::warn!(location = name, "its repository has vanished from the bucket");
                keeper.vanished();
            }
        }
        // A location of the same name later has another one.
        let gone = |name: &String| !new.contains_key(name);
        for keeper in self.known.iter_mut().filter(|(name, _)| gone(name)).map(|(_, it)| it) {
            let jobs: Vec<String> = keeper.runs().map(|run| run.job.clone()).collect();
            jobs.into_iter().for_each(|job| self.desk.ask(Request::Withdraw(job)));
            let object = keeper.object.take();
            *keeper = Keeper { object, ..Keeper::default() };
        }
    }

    fn notice(&mut self, notice: Notice) {
        let now = Instant::now();
        match notice {
            Notice::Granted { job, node } => self.granted(&job, node),
            Notice::Agent { job, has } => {
                let Some((name, run)) = self.run_mut(&job) else {
                    return;
                };
                match has {
                    Has::Yes => run.away_since = None,
                    Has::Unknown { since } => run.away_since = Some(since),
                    // It was started anew, and has forgotten it.
                    Has::No => self.give_up(&name, &job, now),
                }
            }
            Notice::Finished { node, finished } => self.finished(node, &finished),
            Notice::Stray { job, node } => self.stray(job, node),
            Notice::Waits { .. } | Notice::Progress(_) => {}
        }
    }

    fn run_mut(&mut self, job: &str) -> Option<(String, &mut Run)> {
        self.known.iter_mut().find_map(|(name, it)| Some((name.clone(), it.run_mut(job)?)))
    }

    fn give_up(&mut self, name: &str, job: &str, now: Instant) {
        if self.known.get_mut(name).is_some_and(|keeper| keeper.lost(job, now)) {
            self.desk.ask(Request::Withdraw(job.to_owned()));
        }
    }

    /// An agent runs what this controller did not give it: what the one before it gave goes on, if it takes long.
    fn stray(&mut self, job: String, node: String) {
        let now = (self.context.clock)();
        let adopted = self
            .known
            .iter_mut()
            .find_map(|(name, keeper)| keeper.adopt(&job, &node, now).then(|| name.clone()));
        match adopted {
            Some(location) => {
                let need = Need::Room { avoid: BTreeSet::new(), first: false };
                let ticket = Ticket { job, location, need };
                self.desk.ask(Request::Place(ticket, node));
            }
            None => self.desk.ask(Request::Cancel { node, job }),
        }
    }

    /// It has a place: what it needs is looked up only now.
    fn granted(&mut self, job: &str, node: String) {
        let Some((name, run)) = self.run_mut(job) else {
            return self.desk.ask(Request::Withdraw(job.to_owned()));
        };
        run.node = Some(node);
        let place = self.places.as_ref().and_then(|places| places.get(&name));
        let usable = place.and_then(|place| place.usable.as_ref().ok()).cloned();
        let opens = self.known.get(&name).is_some_and(
            |keeper| matches!(&keeper.opened, Opened::Opening { run, .. } if run.job == job),
        );
        let Some(usable) = usable else {
            return self.give_up(&name, job, Instant::now());
        };
        if opens && let Some(keeper) = self.known.get_mut(&name) {
            keeper.opening(identity(&usable.repository));
        }
        let work = if opens {
            let previous_passphrase = usable.previous_passphrase.clone();
            Work::Open(OpenRepository { create: true, previous_passphrase })
        } else {
            Work::Prune(PRUNE)
        };
        let order = Order {
            id: job.to_owned(),
            subject: format!("backuprepository/{}/{name}", self.context.namespace),
            work: Some(work),
            ..order(&self.context.settings, &usable.repository)
        };
        self.desk.ask(Request::Give(Box::new(order)));
    }

    /// Notes what came of a job, and writes it.
    fn finished(&mut self, node: String, finished: &Finished) {
        let now = ((self.context.clock)(), Instant::now());
        let (every, job) = (self.context.settings.prune_every, finished.job_id.clone());
        let found = self.known.iter_mut().find_map(|(name, keeper)| {
            let run = keeper.run_mut(&job)?;
            if run.node.as_ref() != Some(&node) {
                return None;
            }
            Some((name.clone(), keeper.finished(finished, every, now)?))
        });
        let Some((name, status)) = found else {
            // Nobody's any more: whatever it did is found out again.
            return self.desk.ask(Request::Record { node, job });
        };
        match &finished.outcome {
            Some(Outcome::Failure(failure)) => {
                let why = &failure.message;
                tracing::warn!(location = name, job, why, "a job for the repository failed");
            }
            _ => tracing::info!(location = name, job, "a job for the repository is done"),
        }
        if let Some(Outcome::Opened(opened)) = &finished.outcome
            && opened.keys_removed > 0
            && let Some(place) = self.places.as_ref().and_then(|places| places.get(&name))
        {
            let done = "the repository opens with the new passphrase, and no longer with the former one: \
                        'previous-passphrase' can be removed from the Secret";
            let events = &self.context.events;
            events.tell(&*place.object, Tone::Normal, "PassphraseChanged", done, now.0);
        }
        self.write(&name, &status, Some((node, job)));
    }

    /// Does what is to be done now.
    fn settle(&mut self) {
        let Some(places) = self.places.clone().filter(|_| self.listing.is_complete()) else {
            return;
        };
        if !self.open {
            self.open = true;
            self.desk.ask(Request::Open(Owner::Repositories));
            self.context.readiness.listed("BackupRepositories");
        }
        let now = ((self.context.clock)(), Instant::now());
        for (name, place) in &*places {
            self.keep(name, place, now);
        }
        self.publish(&places);
    }

    fn keep(&mut self, name: &str, place: &Place, now: (Timestamp, Instant)) {
        let patience = self.context.settings.agent_lost;
        let overdue = self.known.entry(name.to_owned()).or_default().overdue(patience, now.1);
        overdue.iter().for_each(|job| self.give_up(name, job, now.1));
        let every = self.context.settings.prune_every;
        let read_only = place.object.spec.is_read_only();
        let Ok(usable) = &place.usable else {
            return;
        };
        let Some(keeper) = self.known.get_mut(name) else {
            return;
        };
        match keeper.next(Some(usable), read_only, every, now) {
            Some(Step::Create) => self.create(name, place),
            Some(Step::Trust) => {
                keeper.opened = Opened::Yes(Box::new(identity(&usable.repository)));
                let message = "not opened for writing, because the location is ReadOnly";
                self.write(name, &json!({"phase": "Ready", "message": message}), None);
            }
            Some(Step::Open) => {
                if let Some(run) = self.enter(name, "open", place, now.0)
                    && let Some(keeper) = self.known.get_mut(name)
                {
                    let what = Box::new(identity(&usable.repository));
                    keeper.opened = Opened::Opening { run, what };
                }
            }
            Some(Step::Prune) => {
                if let Some(run) = self.enter(name, "prune", place, now.0)
                    && let Some(keeper) = self.known.get_mut(name)
                {
                    keeper.prune = Some(run);
                }
            }
            None => {}
        }
    }

    /// Asks the desk for a place. Volumes wait for what opens: it goes before all others.
    fn enter(&self, name: &str, what: &str, place: &Place, now: Timestamp) -> Option<Run> {
        let uid = self.known.get(name)?.object.as_ref()?.uid()?;
        let job = format!("{uid}-{what}-{}", now.as_millisecond());
        let need = Need::Room { avoid: (*place.cut_off).clone(), first: what == "open" };
        let ticket = Ticket { job: job.clone(), location: name.to_owned(), need };
        self.desk.ask(Request::Enter(ticket));
        Some(Run { job, node: None, began: now, away_since: None })
    }

    fn publish(&self, places: &Places) {
        let shelf = |(name, place): (&String, &Place)| {
            let keeper = self.known.get(name);
            let shelf = Shelf {
                read_only: place.object.spec.is_read_only(),
                open: open(name, place, keeper),
                failed: keeper.and_then(|keeper| keeper.failed.clone()),
            };
            (name.clone(), shelf)
        };
        let new: Shelves = places.iter().map(shelf).collect();
        self.shelves.send_if_modified(|old| {
            let changed = old.as_deref() != Some(&new);
            if changed {
                *old = Some(Arc::new(new));
            }
            changed
        });
    }

    fn create(&mut self, name: &str, place: &Place) {
        if let Some(keeper) = self.known.get_mut(name) {
            keeper.writing = true;
        }
        let made = object(&place.object, self.context.settings.prune_every);
        let name = name.to_owned();
        let (client, namespace) = (self.context.client.clone(), self.context.namespace.clone());
        self.spawn(async move {
            let api = Api::<BackupRepository>::namespaced(client, &namespace);
            let done = match api.create(&PostParams::default(), &made).await {
                Err(kube::Error::Api(status)) if status.is_already_exists() => api.get(&name).await,
                other => other,
            };
            if let Err(error) = &done {
                tracing::warn!(location = name, %error, "cannot make a BackupRepository");
                tokio::time::sleep(CREATE_AGAIN).await;
            }
            Written { name, object: done.ok(), outcome: None }
        });
    }

    fn write(&mut self, name: &str, status: &Value, outcome: Option<(String, String)>) {
        let object = self.known.get_mut(name).and_then(|keeper| {
            keeper.writing = keeper.object.is_some();
            keeper.object.as_ref()
        });
        let Some(uid) = object.map(|object| object.uid().unwrap_or_default()) else {
            return self.record(outcome);
        };
        let (name, status, turns) = (name.to_owned(), status.clone(), self.turns.clone());
        let (client, namespace) = (self.context.client.clone(), self.context.namespace.clone());
        self.spawn(async move {
            let precondition = Precondition { uid, version: None };
            let api = Api::<BackupRepository>::namespaced(client, &namespace);
            let object = write_status(&api, &turns, &name, &precondition, &status).await.ok();
            Written { name, object, outcome }
        });
    }

    fn written(&mut self, written: Written) {
        if let Some(keeper) = self.known.get_mut(&written.name) {
            keeper.writing = false;
        }
        written.object.into_iter().for_each(|object| self.seen(object));
        self.record(written.outcome);
    }

    fn record(&self, outcome: Option<(String, String)>) {
        if let Some((node, job)) = outcome {
            self.desk.ask(Request::Record { node, job });
        }
    }

    fn spawn(&self, task: impl Future<Output = Written> + Send + 'static) {
        let notes = self.notes.clone();
        tokio::spawn(async move {
            let note = task.await;
            // Without a receiver the program is ending.
            let _ended = notes.send(note).await;
        });
    }
}

/// What jobs need, or why they must wait.
fn open(name: &str, place: &Place, keeper: Option<&Keeper>) -> Result<Arc<Repository>, String> {
    let usable = place.usable.as_ref().map_err(String::clone)?;
    if keeper.is_some_and(|keeper| keeper.is_open(usable)) {
        return Ok(Arc::new(usable.repository.clone()));
    }
    let known = keeper.and_then(|keeper| keeper.object.as_ref());
    let why = known.and_then(|object| object.status.as_ref()?.message.clone());
    let why = why.map(|why| format!(": {why}")).unwrap_or_default();
    Err(format!("the repository of BackupStorageLocation '{name}' is not open yet{why}"))
}
