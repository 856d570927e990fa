//! PodVolumeBackups and PodVolumeRestores: where each volume is, when its job may run, and what came of it.
//!
//! ```text
//!  watches ─┐                       ┌─ Inspect ─> inspect ─────────┐
//!  desk ────┼─> dirty ─> job::next ─┼─ Write ───> status patch ────┤ a task each, which reports a Note
//!  notes ───┘   (UIDs)    (pure)    └─ Give, Cancel, Record, wish ─┴─> desk
//! ```
//! * `object`: both kinds as one, and their status; `job`: what to do about one, pure; `acts` does it; `inspect` and
//!   `find`: where its volume is; `outcome`: what came of it; `ended`: those in a final phase.
//! * An object is looked at when something about it changed (it is *dirty*) or its time came, never because of another
//!   one. What has ended costs nothing.
//! * At most one change of an object's status is on its way, and an outcome is said to be recorded only after its status
//!   was written. So nothing is lost when any part fails.
//! * What the desk is asked for follows from what is known ([`job::wish`]); it is told when that changes.
//! * Locations and their repositories are seen as `repositories` publishes them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use futures::StreamExt;
use kube::ResourceExt;
use kube::runtime::watcher;
use proto::v1::Finished;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::api::{PodVolumeBackup, PodVolumePhase, PodVolumeRestore};
use crate::cluster::watch::{Change, Listing, watch};
use crate::cluster::write::{Refused, RequestTurns};
use crate::desk::queue::Kind;
use crate::desk::{Desk, Need, Notice, Owner, Request, Ticket};
use crate::events::Tone;
use crate::metrics::{self, JobKind, Stage};
use crate::repositories::Shelves;
use crate::rooms::Context;

mod acts;
mod ended;
pub mod find;
pub mod inspect;
pub mod job;
pub mod object;
pub mod outcome;

use ended::{Again, Ended};
use inspect::Inspection;
use job::{Action, Facts, Job, Patience, Place, Wish, due, next, wish};
use object::{Object, Update};
use outcome::Ending;

/// When to look again for a volume that is not there yet.
const LOOK_AGAIN: Duration = Duration::from_secs(3);

/// How often the numbers of jobs are counted.
const COUNT_EVERY: Duration = Duration::from_secs(1);

/// Notes that may wait before their tasks do.
const NOTES: usize = 1024;

/// So many are taken in before it is looked at what to do, if they are there.
const AT_ONCE: usize = 256;

/// Requests under way at once.
const REQUESTS: usize = 32;

/// What a task reports.
#[derive(Debug)]
enum Note {
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
}

/// What the room hears.
enum Heard {
    Backup(watcher::Event<PodVolumeBackup>),
    Restore(watcher::Event<PodVolumeRestore>),
    Note(Note),
    Notice(Notice),
}

/// Runs until a watch ends.
///
/// # Errors
/// When a watch ended for good.
pub async fn run(
    context: Context,
    desk: Desk,
    mut notices: mpsc::Receiver<Notice>,
    mut shelves: watch::Receiver<Option<Arc<Shelves>>>,
) -> Result<()> {
    let (notes, mut received) = mpsc::channel(NOTES);
    let (client, namespace) = (context.client.clone(), context.namespace.clone());
    let mut backups = watch(&client, &namespace).map(Heard::Backup).boxed();
    let mut restores = watch(&client, &namespace).map(Heard::Restore).boxed();
    let mut room = Room::new(context, desk, notes);
    let mut count = tokio::time::interval(COUNT_EVERY);
    count.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let time = room.timers.first().map(|(at, _)| *at);
        let time = async {
            match time {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        let heard = tokio::select! {
            heard = backups.next() => match heard {
                Some(heard) => Some(heard),
                None => bail!("the watch of PodVolumeBackups ended"),
            },
            heard = restores.next() => match heard {
                Some(heard) => Some(heard),
                None => bail!("the watch of PodVolumeRestores ended"),
            },
            note = received.recv() => note.map(Heard::Note),
            notice = notices.recv() => match notice {
                Some(notice) => Some(Heard::Notice(notice)),
                None => return Ok(()),
            },
            Ok(()) = shelves.changed() => None,
            _ = count.tick() => {
                room.count();
                None
            }
            () = time => None,
        };
        heard.into_iter().for_each(|heard| room.hear(heard));
        // What has arrived together is taken in together.
        for _ in 0..AT_ONCE {
            let note = received.try_recv().ok().map(Heard::Note);
            let notice = notices.try_recv().ok().map(Heard::Notice);
            if note.is_none() && notice.is_none() {
                break;
            }
            note.into_iter().chain(notice).for_each(|heard| room.hear(heard));
        }
        let published = shelves.borrow_and_update().clone();
        room.learn_shelves(published);
        room.settle();
    }
}

/// All that is known.
struct Room {
    context: Context,
    desk: Desk,
    notes: mpsc::Sender<Note>,
    turns: RequestTurns,
    patience: Patience,
    listings: [Listing; 2],
    /// Whether the desk knows of all that has a place.
    open: bool,
    /// Those that something may be to be done about, by UID.
    live: BTreeMap<String, Job>,
    ended: Ended,
    dirty: BTreeSet<String>,
    timers: BTreeSet<(Instant, String)>,
    /// When each is looked at again.
    alarms: BTreeMap<String, Instant>,
    shelves: Option<Arc<Shelves>>,
}

impl Room {
    fn new(context: Context, desk: Desk, notes: mpsc::Sender<Note>) -> Self {
        let settings = &context.settings;
        let patience = Patience {
            uncounted: settings.agent_uncounted,
            lost: settings.agent_lost,
            start: settings.start_within,
        };
        Self {
            context,
            desk,
            notes,
            turns: RequestTurns::new(REQUESTS),
            patience,
            listings: Default::default(),
            open: false,
            live: BTreeMap::new(),
            ended: Ended::default(),
            dirty: BTreeSet::new(),
            timers: BTreeSet::new(),
            alarms: BTreeMap::new(),
            shelves: None,
        }
    }

    fn hear(&mut self, heard: Heard) {
        let [backups, restores] = &mut self.listings;
        match heard {
            Heard::Backup(event) => {
                let change = backups.take(event, |object| object.uid().unwrap_or_default());
                self.follow(change, Kind::Backup);
            }
            Heard::Restore(event) => {
                let change = restores.take(event, |object| object.uid().unwrap_or_default());
                self.follow(change, Kind::Restore);
            }
            Heard::Note(Note::Inspected { uid, found }) => self.inspected(uid, found),
            Heard::Note(Note::Written { uid, update, done, latest }) => {
                // First, so that its place is not given back: the change may have been made, and the answer lost.
                latest.into_iter().for_each(|object| self.seen(object));
                self.written(&uid, &update, done);
            }
            Heard::Notice(notice) => self.notice(notice),
        }
        if !self.open && self.listings.iter().all(Listing::is_complete) {
            self.open = true;
            let uids: Vec<String> = self.live.keys().cloned().collect();
            uids.iter().for_each(|uid| self.ask(uid));
            self.desk.ask(Request::Open(Owner::Volumes));
            self.context.readiness.listed("PodVolumeBackups and PodVolumeRestores");
        }
    }

    fn follow<K: Into<Object>>(&mut self, change: Change<K>, kind: Kind) {
        match change {
            Change::Seen(object) => self.seen(object.into()),
            Change::Gone(uid) => self.gone(&uid),
            Change::Only(uids) => {
                let missing = |(uid, job): (&String, &Job)| {
                    (job.object.kind() == kind && !uids.contains(uid)).then(|| uid.clone())
                };
                let missing: Vec<String> = self.live.iter().filter_map(missing).collect();
                missing.iter().for_each(|uid| self.gone(uid));
                self.ended.retain(kind, &uids);
            }
            Change::Nothing => {}
        }
    }

    fn seen(&mut self, object: Object) {
        let uid = object.uid();
        match self.live.get_mut(&uid) {
            // What was written here comes back through the watch, perhaps after older versions.
            Some(job) if job.object.is_newer_than(&object) => return,
            Some(job) => job.object = object,
            None if self.ended.has_newer(&object) => return,
            None if object.phase().is_final() => return self.ended.insert(object),
            None => {
                self.ended.remove(&uid);
                self.live.insert(uid.clone(), Job::new(object, Instant::now()));
            }
        }
        self.dirty.insert(uid);
    }

    /// Somebody deleted the object: nobody wants its job any more.
    fn gone(&mut self, uid: &str) {
        self.ended.remove(uid);
        if self.live.remove(uid).is_some_and(|job| job.wish != Wish::Nothing) {
            self.desk.ask(Request::Withdraw(uid.to_owned()));
        }
        self.dirty.remove(uid);
        self.set_alarm(uid, None);
    }

    fn notice(&mut self, notice: Notice) {
        let now = Instant::now();
        let uid = match notice {
            Notice::Granted { job, .. } => {
                self.change(&job, |it| (it.granted, it.waits) = (true, None));
                job
            }
            Notice::Waits { job, why } => {
                self.change(&job, |it| it.waits = Some(why));
                job
            }
            Notice::Agent { job, has } => {
                self.change(&job, |it| it.learn_has(has, now));
                job
            }
            Notice::Progress(progress) => {
                let job = progress.job_id.clone();
                self.change(&job, |it| it.progress = Some(progress));
                job
            }
            Notice::Finished { node, finished } => return self.finished(node, *finished),
            // The desk ends them by itself.
            Notice::Stray { .. } => return,
        };
        self.dirty.insert(uid);
    }

    fn finished(&mut self, node: String, finished: Finished) {
        let uid = finished.job_id.clone();
        if let Some(job) = self.live.get_mut(&uid).filter(|job| job.object.is_on(&node)) {
            job.outcome = Some(finished);
            self.dirty.insert(uid);
            return;
        }
        if let Again::May(object) = self.ended.again(&uid, &node) {
            let mut job = Job::new(*object, Instant::now());
            job.outcome = Some(finished);
            self.live.insert(uid.clone(), job);
            self.dirty.insert(uid);
            return;
        }
        // Of an object that is gone, or was given to another node, or is written already.
        self.desk.ask(Request::Record { node, job: uid });
    }

    fn inspected(&mut self, uid: String, found: Result<Inspection, kube::Error>) {
        let later = Instant::now() + LOOK_AGAIN;
        let Some(job) = self.live.get_mut(&uid) else {
            return;
        };
        job.place = match found {
            Ok(Inspection::Ready(ready)) => Place::Ready(ready),
            Ok(Inspection::NotYet(why)) => Place::NotYet(why, later),
            Ok(Inspection::Refused(why)) => Place::Refused(why),
            Ok(Inspection::Done) => Place::Done,
            Err(error) => {
                tracing::warn!(subject = job.object.subject(), %error, "cannot look for a volume");
                Place::NotYet(format!("cannot look for its volume: {error}"), later)
            }
        };
        self.dirty.insert(uid);
    }

    fn written(&mut self, uid: &str, update: &Update, done: Result<Object, Refused>) {
        let Some(job) = self.live.get_mut(uid) else {
            return;
        };
        job.writing = false;
        self.dirty.insert(uid.to_owned());
        let object = match done {
            Ok(object) => object,
            // The watch tells what became of it.
            Err(refused) => {
                let subject = job.object.subject();
                tracing::debug!(subject, ?refused, "a status was not written");
                if let Update::SavedAfterAll(snapshot) = update {
                    tracing::warn!(subject, snapshot, "saved after all, which cannot be noted");
                    job.outcome = None;
                    if let Some(node) = job.object.node() {
                        let (node, job) = (node.to_owned(), uid.to_owned());
                        self.desk.ask(Request::Record { node, job });
                    }
                }
                return;
            }
        };
        if !job.object.is_newer_than(&object) {
            job.object = object.clone();
        }
        match update {
            Update::Accept(_) => job.fresh = true,
            Update::Again(_) => job.counted = true,
            Update::Progress { .. } => job.progress_at = Some(Instant::now()),
            _ => {}
        }
        let (metrics, kind) = (&self.context.metrics, job_kind(object.kind()));
        match update {
            Update::Finish(finished) => metrics.finished(kind, finished),
            Update::Fail(_) => metrics.end(kind, metrics::Outcome::Failed),
            Update::Canceled(_) => metrics.end(kind, metrics::Outcome::Canceled),
            _ => {}
        }
        self.tell(&object, update);
    }

    /// Tells people of a change that they care about.
    fn tell(&self, object: &Object, update: &Update) {
        let quiet = matches!(
            update,
            Update::Note(_) | Update::Progress { .. } | Update::Canceling | Update::Again(_)
        );
        if quiet {
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
        let (events, now) = (&self.context.events, (self.context.clock)());
        match object {
            Object::Backup(object) => events.tell(&**object, tone, &reason, &message, now),
            Object::Restore(object) => events.tell(&**object, tone, &reason, &message, now),
        }
    }

    /// Looks at those whose location is another one than before.
    fn learn_shelves(&mut self, published: Option<Arc<Shelves>>) {
        let Some(new) = published else {
            return;
        };
        let old = self.shelves.replace(new.clone());
        if old.as_ref().is_some_and(|old| Arc::ptr_eq(old, &new)) {
            return;
        }
        let shelf = |all: &Option<Arc<Shelves>>, name: &str| {
            all.as_ref().and_then(|all| all.get(name).cloned())
        };
        let new = Some(new);
        let changed = self.live.iter().filter(|(_, job)| {
            let name = job.object.location();
            old.is_none() || shelf(&old, name) != shelf(&new, name)
        });
        let changed: Vec<String> = changed.map(|(uid, _)| uid.clone()).collect();
        self.dirty.extend(changed);
    }

    fn count(&self) {
        for kind in [Kind::Backup, Kind::Restore] {
            let all = self.live.values().filter(|job| job.object.kind() == kind);
            let waiting = all.clone().filter(|job| job.object.phase() == PodVolumePhase::New);
            let assigned = all.filter(|job| job.object.phase().is_assigned());
            let metrics = &self.context.metrics;
            metrics.pending(job_kind(kind), Stage::Waiting, waiting.count());
            metrics.pending(job_kind(kind), Stage::Running, assigned.count());
        }
    }

    /// Does what is to be done now.
    fn settle(&mut self) {
        if !self.open || self.shelves.is_none() {
            return;
        }
        let now = Instant::now();
        while let Some((at, uid)) = self.timers.first().cloned()
            && at <= now
        {
            self.set_alarm(&uid, None);
            self.dirty.insert(uid);
        }
        for uid in std::mem::take(&mut self.dirty) {
            self.look_at(&uid, now);
        }
    }

    fn look_at(&mut self, uid: &str, now: Instant) {
        self.ask(uid);
        let facts = match self.live.get(uid) {
            Some(job) => self.facts(job),
            None => return,
        };
        let patience = self.patience;
        let Some(job) = self.live.get_mut(uid) else {
            return;
        };
        job.note_waiting(&facts, now);
        let (action, alarm) = (next(job, &facts, &patience, now), due(job, &patience, now));
        self.set_alarm(uid, alarm);
        let on_agent = action_on_agent(action.as_ref());
        match action {
            Some(Action::Inspect) => self.look_for(uid),
            Some(Action::Write(update)) => self.write(uid, update),
            Some(Action::Give { repeated }) => self.give(uid, repeated),
            Some(Action::Cancel) => self.change(uid, |job| job.cancel_sent = true),
            Some(Action::Record) => self.change(uid, |job| job.outcome = None),
            None => {}
        }
        let node = self.live.get(uid).and_then(|job| job.object.node());
        if let (Some(request), Some(node)) = (on_agent, node.map(str::to_owned)) {
            self.desk.ask(request(node, uid.to_owned()));
        }
        if let Some(job) = self.live.remove(uid) {
            if job.is_over() {
                self.ended.insert(job.object);
                self.set_alarm(uid, None);
            } else {
                self.live.insert(uid.to_owned(), job);
            }
        }
    }

    /// Asks the desk for what the object needs now, if that is something else than before.
    fn ask(&mut self, uid: &str) {
        let Some(job) = self.live.get(uid) else {
            return;
        };
        let (old, new) = (job.wish.clone(), wish(job, &self.facts(job)));
        if old == new {
            return;
        }
        let ticket = |node: &str| Ticket {
            job: uid.to_owned(),
            location: job.object.location().to_owned(),
            need: Need::Slot {
                node: node.to_owned(),
                kind: job.object.kind(),
                group: job.object.group(),
                created: job.object.created(),
            },
        };
        // Who is recorded leaves thereby. A place on another node is another place.
        let is_recorded = job.object.phase().is_final() && job.outcome.is_some();
        let stays = matches!(new, Wish::Placed(_));
        if old != Wish::Nothing && !stays && !is_recorded {
            self.desk.ask(Request::Withdraw(uid.to_owned()));
        }
        match &new {
            Wish::Nothing => {}
            Wish::Queued(node) => self.desk.ask(Request::Enter(ticket(node))),
            Wish::Placed(node) => self.desk.ask(Request::Place(ticket(node), node.clone())),
        }
        self.change(uid, |job| {
            job.wish = new;
            (job.granted, job.waits) = (false, None);
            if !stays {
                job.has = None;
            }
        });
    }

    fn facts(&self, job: &Job) -> Facts {
        let name = job.object.location();
        let shelf = self.shelves.as_ref().and_then(|all| all.get(name));
        let location = match shelf {
            None => Some(format!("there is no BackupStorageLocation '{name}'")),
            Some(shelf) => shelf.open.as_ref().err().cloned(),
        };
        let read_only = shelf.is_some_and(|shelf| shelf.read_only);
        let hopeless = (read_only && job.object.kind() == Kind::Backup)
            .then(|| format!("BackupStorageLocation '{name}' is ReadOnly"));
        Facts { location, hopeless }
    }

    fn change(&mut self, uid: &str, how: impl FnOnce(&mut Job)) {
        if let Some(job) = self.live.get_mut(uid) {
            how(job);
        }
    }

    fn set_alarm(&mut self, uid: &str, at: Option<Instant>) {
        if let Some(old) = self.alarms.remove(uid) {
            self.timers.remove(&(old, uid.to_owned()));
        }
        if let Some(at) = at {
            self.alarms.insert(uid.to_owned(), at);
            self.timers.insert((at, uid.to_owned()));
        }
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
}

/// What an action asks of the agent by way of the desk.
fn action_on_agent(action: Option<&Action>) -> Option<fn(String, String) -> Request> {
    match action {
        Some(Action::Cancel) => Some(|node, job| Request::Cancel { node, job }),
        Some(Action::Record) => Some(|node, job| Request::Record { node, job }),
        _ => None,
    }
}

fn job_kind(kind: Kind) -> JobKind {
    match kind {
        Kind::Backup => JobKind::Backup,
        Kind::Restore => JobKind::Restore,
    }
}
