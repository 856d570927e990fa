//! Places: BackupStorageLocations, each checked regularly by using its store, and how the nodes reach it.
//!
//! ```text
//!  watch ──┐            ┌─ check (Secrets, store, passphrase) ─┐
//!  crew ───┼─> Location ├─ status patch ───────────────────────┤ a task each, which reports a Note
//!  probed ─┘            ├─ Probe ─> desk                       │
//!                       └─> Places, Keys (published) <─────────┘
//! ```
//! * `config` and `passphrase` decide, without touching anything; `validate` tries the store; `check` reads the Secrets,
//!   does both, and answers what `status` says.
//! * A location that was edited is usable again only when it was checked as it is now: nobody gets work for the old
//!   bucket meanwhile. Its status keeps what others wrote.
//! * Each has one open store, which is used again as long as it is the same one, whatever its access key.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use futures::StreamExt;
use kube::ResourceExt;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::watcher;
use proto::v1::{Probe, ProbeResult, Repository};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::api::location::LocationPhase;
use crate::api::{BackupStorageLocation, BackupStorageLocationStatus, Timestamp};
use crate::cluster::watch::{Change, Listing, watch};
use crate::cluster::write::{Precondition, Refused, RequestTurns, write_status};
use crate::desk::{Crew, Desk, Keys, Request};
use crate::events::Tone;
use crate::repositories::Shelves;
use crate::rooms::Context;

pub mod check;
pub mod config;
pub mod passphrase;
pub mod status;
pub mod store;
pub mod validate;

use check::{Checked, Usable, check};
use status::{Reach, export_advice, frequency, not_default_any_more, status};
use store::Store;

/// How often it is looked at what only time changes.
const TICK: Duration = Duration::from_secs(1);

/// A location that was not available is looked at this often.
const CHECK_FAILED_EVERY: Duration = Duration::from_secs(10);

/// After the cluster did not answer.
const CHECK_AGAIN: Duration = Duration::from_secs(5);

/// Notes that may wait before their tasks do.
const NOTES: usize = 256;

/// Requests under way at once.
const REQUESTS: usize = 8;

/// What others see of a location.
#[derive(Debug, Clone)]
pub struct Place {
    /// The object as last seen.
    pub object: Arc<BackupStorageLocation>,
    /// What jobs need, or why they must wait.
    pub usable: Result<Arc<Usable>, String>,
    /// Its store, open, when it is usable.
    pub store: Option<Store>,
    /// Nodes that do not reach it.
    pub cut_off: Arc<BTreeSet<String>>,
}

impl PartialEq for Place {
    /// Whether others need not hear of it: what was made of the same facts is the same store.
    fn eq(&self, other: &Self) -> bool {
        let same_object = Arc::ptr_eq(&self.object, &other.object)
            || (self.object.metadata.uid == other.object.metadata.uid
                && self.object.spec == other.object.spec);
        same_object && self.usable == other.usable && self.cut_off == other.cut_off
    }
}

/// By name.
pub type Places = BTreeMap<String, Place>;

/// Where it publishes.
#[derive(Debug)]
pub struct Published {
    /// What is usable; nothing before all are known.
    pub places: watch::Sender<Option<Arc<Places>>>,
    /// Credentials in force.
    pub keys: watch::Sender<Keys>,
}

/// What it hears besides its own objects.
#[derive(Debug)]
pub struct Heard {
    /// Who is connected.
    pub crew: watch::Receiver<Crew>,
    /// Whether nodes reach stores.
    pub probed: mpsc::Receiver<(String, ProbeResult)>,
    /// Which repositories do not open.
    pub shelves: watch::Receiver<Option<Arc<Shelves>>>,
}

/// What a check found, and the store that it left open; or why the cluster does not answer.
type CheckedStore = Result<(Checked, Option<Store>), kube::Error>;

#[derive(Debug)]
enum Note {
    Checked { name: String, spec_of: Arc<BackupStorageLocation>, found: Box<CheckedStore> },
    Written { name: String, done: Result<Box<BackupStorageLocation>, Refused> },
}

/// Runs until the watch ends.
///
/// # Errors
/// When the watch ended for good.
pub async fn run(
    context: Context,
    desk: Desk,
    mut heard: Heard,
    published: Published,
) -> Result<()> {
    let (notes, mut received) = mpsc::channel(NOTES);
    let mut watched = watch::<BackupStorageLocation>(&context.client, &context.namespace).boxed();
    let mut room = Room {
        context,
        desk,
        notes,
        published,
        turns: RequestTurns::new(REQUESTS),
        listing: Listing::default(),
        open: false,
        locations: BTreeMap::new(),
        crew: Crew::new(),
    };
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            event = watched.next() => match event {
                Some(event) => room.follow(event),
                None => bail!("the watch of BackupStorageLocations ended"),
            },
            note = received.recv() => note.into_iter().for_each(|note| room.note(note)),
            probed = heard.probed.recv() => match probed {
                Some((node, result)) => room.probed(&node, result),
                None => return Ok(()),
            },
            Ok(()) = heard.crew.changed() => {}
            Ok(()) = heard.shelves.changed() => {}
            _ = tick.tick() => {}
        }
        let crew = heard.crew.borrow_and_update().clone();
        room.learn_crew(crew);
        let shelves = heard.shelves.borrow_and_update().clone();
        room.learn_shelves(shelves.as_deref());
        room.settle();
    }
}

/// What is known of a location.
#[derive(Debug)]
struct Location {
    /// The object as last seen.
    object: Arc<BackupStorageLocation>,
    /// What the last check found, of which object, and when, by both clocks.
    checked: Option<Found>,
    /// The store that the last check left open.
    store: Option<Store>,
    /// Whether one runs.
    checking: bool,
    /// Whether the object changed since the last one began.
    changed: bool,
    /// Not before this time is it checked again.
    check_at: Option<Instant>,
    /// What the agents said.
    reach: Reach,
    /// When each was asked.
    probed: BTreeMap<String, Instant>,
    /// Why its repository does not open.
    failed: Option<String>,
    /// Whether the status says something else than what is known.
    unsaid: bool,
    writing: bool,
}

#[derive(Debug)]
struct Found {
    checked: Result<Arc<Usable>, String>,
    of: Arc<BackupStorageLocation>,
    at: Timestamp,
    when: Instant,
}

impl Location {
    fn new(object: BackupStorageLocation) -> Self {
        Self {
            object: Arc::new(object),
            checked: None,
            store: None,
            checking: false,
            changed: true,
            check_at: None,
            reach: Reach::new(),
            probed: BTreeMap::new(),
            failed: None,
            unsaid: false,
            writing: false,
        }
    }

    /// Takes in the object as it is now.
    fn see(&mut self, object: BackupStorageLocation) {
        self.changed |= self.object.spec != object.spec;
        self.object = Arc::new(object);
    }

    fn place(&self) -> Place {
        let name = self.object.name_any();
        let usable = match &self.checked {
            None => Err(format!("BackupStorageLocation '{name}' is being validated")),
            Some(found) if found.of.spec != self.object.spec => {
                Err(format!("BackupStorageLocation '{name}' was changed, and is being validated"))
            }
            Some(Found { checked: Err(why), .. }) => {
                Err(format!("BackupStorageLocation '{name}' is unavailable: {why}"))
            }
            Some(Found { checked: Ok(usable), .. }) => Ok(usable.clone()),
        };
        let cut_off = self.reach.iter().filter(|(_, error)| error.is_some());
        Place {
            object: self.object.clone(),
            store: usable.is_ok().then(|| self.store.clone()).flatten(),
            usable,
            cut_off: Arc::new(cut_off.map(|(node, _)| node.clone()).collect()),
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        if self.checking || self.writing || self.check_at.is_some_and(|at| now < at) {
            return false;
        }
        let Some(found) = &self.checked else {
            return true;
        };
        // Secrets are not watched; who has just mended one should not have to wait.
        let every = match (frequency(&self.object), &found.checked) {
            (every, Err(_)) => {
                Some(every.map_or(CHECK_FAILED_EVERY, |it| it.min(CHECK_FAILED_EVERY)))
            }
            (every, Ok(_)) => every,
        };
        self.changed || every.is_some_and(|every| now >= found.when + every)
    }
}

/// All that is known.
struct Room {
    context: Context,
    desk: Desk,
    notes: mpsc::Sender<Note>,
    published: Published,
    turns: RequestTurns,
    listing: Listing,
    open: bool,
    locations: BTreeMap<String, Location>,
    crew: Crew,
}

impl Room {
    fn follow(&mut self, event: watcher::Event<BackupStorageLocation>) {
        match self.listing.take(event, ResourceExt::name_any) {
            Change::Seen(object) => {
                let name = object.name_any();
                match self.locations.get_mut(&name) {
                    Some(known) if known.object.uid() == object.uid() => known.see(object),
                    _ => drop(self.locations.insert(name, Location::new(object))),
                }
                self.keep_one_default();
            }
            Change::Gone(name) => self.gone(&name),
            Change::Only(names) => {
                let gone = self.locations.keys().filter(|name| !names.contains(*name));
                let gone: Vec<String> = gone.cloned().collect();
                gone.iter().for_each(|name| self.gone(name));
            }
            Change::Nothing => {}
        }
    }

    fn gone(&mut self, name: &str) {
        self.context.metrics.forget_location(name);
        drop(self.locations.remove(name));
    }

    fn keep_one_default(&self) {
        let all = self.locations.values().map(|location| &*location.object);
        for name in not_default_any_more(all) {
            let (client, namespace) = (self.context.client.clone(), &self.context.namespace);
            let api = Api::<BackupStorageLocation>::namespaced(client, namespace);
            tokio::spawn(async move {
                let patch = Patch::Merge(json!({"spec": {"default": false}}));
                if let Err(error) = api.patch(&name, &PatchParams::default(), &patch).await {
                    tracing::warn!(location = name, %error, "cannot make it no default");
                }
            });
        }
    }

    /// What an agent said before it went away is worth nothing; one that is back is asked again.
    fn learn_crew(&mut self, crew: Crew) {
        if self.crew == crew {
            return;
        }
        let old = std::mem::replace(&mut self.crew, crew);
        for (node, stream) in old {
            if self.crew.get(&node) == Some(&stream) {
                continue;
            }
            for location in self.locations.values_mut() {
                location.probed.remove(&node);
                if !self.crew.contains_key(&node) {
                    location.unsaid |= location.reach.remove(&node).is_some();
                }
            }
        }
    }

    fn learn_shelves(&mut self, shelves: Option<&Shelves>) {
        for (name, location) in &mut self.locations {
            let shelf = shelves.and_then(|shelves| shelves.get(name));
            let failed = shelf.and_then(|shelf| shelf.failed.as_ref());
            if location.failed.as_ref() != failed {
                location.failed = failed.cloned();
                location.unsaid = true;
            }
        }
    }

    fn note(&mut self, note: Note) {
        match note {
            Note::Checked { name, spec_of, found } => self.checked(&name, spec_of, *found),
            Note::Written { name, done } => self.written(&name, done),
        }
    }

    fn probed(&mut self, node: &str, result: ProbeResult) {
        if let Some(location) = self.locations.get_mut(&result.id) {
            let error = (!result.error.is_empty()).then_some(result.error);
            let old = location.reach.insert(node.to_owned(), error.clone());
            location.unsaid |= old != Some(error);
        }
    }

    /// Does what is to be done now.
    fn settle(&mut self) {
        if !self.listing.is_complete() {
            return;
        }
        if !self.open {
            self.open = true;
            self.context.readiness.listed("BackupStorageLocations");
        }
        let now = Instant::now();
        let names: Vec<String> = self.locations.keys().cloned().collect();
        for name in names {
            self.check(&name, now);
            self.say_status(&name);
            self.probe(&name, now);
        }
        self.publish();
    }

    fn publish(&self) {
        let places: Places =
            self.locations.iter().map(|(name, it)| (name.clone(), it.place())).collect();
        let key = |(name, place): (&String, &Place)| {
            let usable = place.usable.as_ref().ok()?;
            Some((name.clone(), usable.repository.credentials.clone()?))
        };
        let keys: Keys = places.iter().filter_map(key).collect();
        self.published.keys.send_if_modified(|old| {
            let changed = *old != keys;
            *old = keys;
            changed
        });
        self.published.places.send_if_modified(|old| {
            let changed = old.as_deref() != Some(&places);
            if changed {
                *old = Some(Arc::new(places));
            }
            changed
        });
    }

    fn check(&mut self, name: &str, now: Instant) {
        let Some(location) = self.locations.get_mut(name).filter(|it| it.is_due(now)) else {
            return;
        };
        location.checking = true;
        location.changed = false;
        let (name, object) = (name.to_owned(), location.object.clone());
        let (client, store) = (self.context.client.clone(), location.store.clone());
        self.spawn(async move {
            let found = Box::new(check(&client, &object, store).await);
            Note::Checked { name, spec_of: object, found }
        });
    }

    fn checked(&mut self, name: &str, of: Arc<BackupStorageLocation>, found: CheckedStore) {
        let (at, when) = ((self.context.clock)(), Instant::now());
        let Some(location) = self.locations.get_mut(name) else {
            return;
        };
        // Another one of the same name.
        if location.object.uid() != of.uid() {
            return;
        }
        location.checking = false;
        match found {
            Ok((checked, store)) => {
                let checked = checked.map(Arc::new);
                location.store = store;
                location.checked = Some(Found { checked, of, at, when });
                location.unsaid = true;
            }
            Err(error) => {
                tracing::warn!(location = name, %error, "cannot look at a location's Secrets");
                location.check_at = Some(when + CHECK_AGAIN);
            }
        }
    }

    fn say_status(&mut self, name: &str) {
        let now = (self.context.clock)();
        let Some(location) = self.locations.get_mut(name) else {
            return;
        };
        let Some(found) = location.checked.as_ref().filter(|_| location.unsaid) else {
            return;
        };
        if location.writing {
            return;
        }
        // A store that works is of no use with a repository that does not open.
        let usable = found.checked.as_ref();
        let secret = usable.map(|usable| usable.secret.clone()).unwrap_or_default();
        let checked = match (usable, &location.failed) {
            (Ok(_), Some(why)) => Err(format!(
                "its repository cannot be opened: {why}; the passphrase is in Secret '{secret}', key \
                 'passphrase', and where it was changed, the former one in 'previous-passphrase'"
            )),
            (Ok(usable), None) => Ok(usable.clone()),
            (Err(why), _) => Err(why.clone()),
        };
        let new = status(&location.object, checked.as_deref(), found.at, &location.reach, now);
        let old = location.object.status.as_ref();
        let key_state = |status: Option<&BackupStorageLocationStatus>| {
            let all = status.and_then(|status| status.conditions.as_ref());
            let mut found = all.into_iter().flatten().filter(|it| it.type_ == "KeyNotExported");
            found.next().map(|condition| condition.status.clone())
        };
        let events = &self.context.events;
        let warn_of_key = key_state(Some(&new)).as_deref() == Some("True")
            && key_state(old).as_deref() != Some("True");
        if warn_of_key {
            let advice = export_advice(&secret);
            events.tell(&*location.object, Tone::Warning, "KeyNotExported", &advice, now);
        }
        self.context.metrics.location(name, new.phase == Some(LocationPhase::Available));
        let changed = old.and_then(|old| old.phase) != new.phase;
        if let (true, Some(phase)) = (changed, new.phase) {
            let failed = new.message.clone().filter(|_| checked.is_err());
            let tone = if failed.is_some() { Tone::Warning } else { Tone::Normal };
            let message = failed.unwrap_or_else(|| "validated".to_owned());
            match tone {
                Tone::Warning => tracing::warn!(location = name, ?phase, message, "changed"),
                Tone::Normal => tracing::info!(location = name, ?phase, message, "changed"),
            }
            events.tell(&*location.object, tone, &format!("{phase:?}"), &message, now);
        }
        // What a merge patch does not mention stays: the rest of a status is another's.
        let body = json!({
            "phase": new.phase,
            "lastValidationTime": new.last_validation_time,
            "message": new.message.map_or(Value::Null, Value::String),
            "conditions": new.conditions,
        });
        location.writing = true;
        location.unsaid = false;
        let uid = location.object.uid().unwrap_or_default();
        let (name, turns) = (name.to_owned(), self.turns.clone());
        let (client, namespace) = (self.context.client.clone(), self.context.namespace.clone());
        self.spawn(async move {
            let precondition = Precondition { uid, version: None };
            let api = Api::<BackupStorageLocation>::namespaced(client, &namespace);
            let done = write_status(&api, &turns, &name, &precondition, &body).await;
            Note::Written { name, done: done.map(Box::new) }
        });
    }

    fn written(&mut self, name: &str, done: Result<Box<BackupStorageLocation>, Refused>) {
        let Some(location) = self.locations.get_mut(name) else {
            return;
        };
        location.writing = false;
        match done {
            Ok(object) if location.object.uid() == object.uid() => location.see(*object),
            Ok(_) | Err(Refused::Gone) => {}
            Err(Refused::Conflict) => location.unsaid = true,
        }
    }

    /// Lets the agents try whether they reach the store.
    fn probe(&mut self, name: &str, now: Instant) {
        let every = self.context.settings.probe_every;
        let Some(location) = self.locations.get_mut(name) else {
            return;
        };
        let Some(usable) = location.checked.as_ref().and_then(|found| found.checked.as_ref().ok())
        else {
            return;
        };
        for node in self.crew.keys() {
            if location.probed.get(node).is_some_and(|at| now < *at + every) {
                continue;
            }
            // To reach a store takes neither passphrase nor key: who is refused has reached it.
            let repository = Repository {
                passphrase: Vec::new(),
                credentials: None,
                ..usable.repository.clone()
            };
            let probe = Box::new(Probe { id: name.to_owned(), repository: Some(repository) });
            self.desk.ask(Request::Probe { node: node.clone(), probe });
            location.probed.insert(node.clone(), now);
        }
    }

    fn spawn(&self, task: impl Future<Output = Note> + Send + 'static) {
        let notes = self.notes.clone();
        tokio::spawn(async move {
            let note = task.await;
            // Without a receiver the program is ending.
            let _ended = notes.send(note).await;
        });
    }
}
