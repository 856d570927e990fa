//! What to do about one `PodVolumeBackup` or `PodVolumeRestore` now: a pure function of what is known.
//!
//! ```text
//!  New ──inspected, has a place──> Accepted ──first progress──> InProgress ──said finished──> Completed | Failed
//!   │                                 └────────── spec.cancel ──────┴──> Canceling ──> Canceled
//!   └── refused, or waited too long: Failed · spec.cancel: Canceled
//! ```
//! The phase in the cluster decides; what is remembered besides can be lost at any time and is found out again.
//! Intervals are measured by a clock that nobody sets.

use std::time::Duration;

use proto::v1::{Finished, Progress};
use tokio::time::Instant;

use super::find::Found;
use super::object::{Object, Update};
use crate::api::PodVolumePhase;
use crate::desk::Has;
use crate::desk::queue::Why;

/// How often progress is written at most.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// How often a job is given to an agent that did not bring it to its end.
const ATTEMPTS: i64 = 3;

/// Where the volume is, as far as it was looked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Place {
    /// To be looked for at this time.
    Unknown(Instant),
    /// Being looked for.
    Asked,
    /// There.
    Ready(Box<Ready>),
    /// Not yet: why, and when to look again.
    NotYet(String, Instant),
    /// It cannot be saved or restored into: why.
    Refused(String),
    /// What was to be restored is there already.
    Done,
}

/// A volume that work can begin on.
#[derive(Debug, Clone, PartialEq)]
pub struct Ready {
    /// Node of the pod.
    pub node: String,
    /// The volume.
    pub found: Found,
}

/// What the desk was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wish {
    /// Nothing.
    Nothing,
    /// A place on this node, in its turn.
    Queued(String),
    /// It has its place on this node, as the cluster knows.
    Placed(String),
}

/// What is known of one object.
#[derive(Debug, Clone)]
pub struct Job {
    /// The object as last seen or written.
    pub object: Object,
    /// Where its volume is.
    pub place: Place,
    /// What the desk was asked for.
    pub wish: Wish,
    /// Whether the agent has it; nothing before the desk said so.
    pub has: Option<Has>,
    /// Whether the desk gave it a place that the cluster does not know yet.
    pub granted: bool,
    /// Why it has none.
    pub waits: Option<Why>,
    /// Whether it was accepted here and never sent: the agent cannot have done it before.
    pub fresh: bool,
    /// Whether it is written that it will be sent to its agent once more.
    pub counted: bool,
    /// What came of it.
    pub outcome: Option<Finished>,
    /// How far it is, unless that was written.
    pub progress: Option<Progress>,
    /// When progress was last written.
    pub progress_at: Option<Instant>,
    /// Since when its location cannot be used, though it has a slot.
    pub blocked_since: Option<Instant>,
    /// Since when it waits for something else than its turn.
    pub stuck_since: Option<Instant>,
    /// Whether the agent was told to end it.
    pub cancel_sent: bool,
    /// Whether a change of its status is on its way.
    pub writing: bool,
}

impl Job {
    /// An object just seen.
    pub fn new(object: Object, now: Instant) -> Self {
        Self {
            object,
            place: Place::Unknown(now),
            wish: Wish::Nothing,
            has: None,
            granted: false,
            waits: None,
            fresh: false,
            counted: false,
            outcome: None,
            progress: None,
            progress_at: None,
            blocked_since: None,
            stuck_since: None,
            cancel_sent: false,
            writing: false,
        }
    }

    /// Whether nothing is to be done about it, until it is heard of again.
    pub fn is_over(&self) -> bool {
        self.object.phase().is_final() && self.outcome.is_none() && !self.writing
    }

    /// Its agent has it, or not, or is away.
    pub fn learn_has(&mut self, has: Has, now: Instant) {
        self.has = Some(has);
        self.cancel_sent = false;
        self.counted = false;
        if has == Has::No && !self.fresh {
            // It may have done it, and the pod have gone on with the volume since.
            self.place = Place::Unknown(now);
        }
    }

    /// Notes since when it waits for what.
    pub fn note_waiting(&mut self, facts: &Facts, now: Instant) {
        let since = |old: Option<Instant>, is: bool| is.then(|| old.unwrap_or(now));
        let lacks = self.has == Some(Has::No) && self.object.phase().is_assigned();
        self.blocked_since = since(self.blocked_since, lacks && facts.location.is_some());
        let is_stuck = self.object.phase() == PodVolumePhase::New
            && match &self.place {
                Place::NotYet(..) => true,
                Place::Ready(_) => facts.location.is_some() || self.waits == Some(Why::NoAgent),
                // While it is looked for once more, it goes on waiting.
                Place::Unknown(_) | Place::Asked => self.stuck_since.is_some(),
                Place::Refused(_) | Place::Done => false,
            };
        self.stuck_since = since(self.stuck_since, is_stuck);
    }

    /// Since when its agent is away.
    fn away_since(&self) -> Option<Instant> {
        match self.has {
            Some(Has::Unknown { since }) if self.object.phase().is_assigned() => Some(since),
            _ => None,
        }
    }
}

/// What is known around it.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Why its location cannot be used now, if so.
    pub location: Option<String>,
    /// Why it never can, for this object.
    pub hopeless: Option<String>,
}

/// How long is waited.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For an agent that is away, before what was cancelled counts as ended.
    pub uncounted: Duration,
    /// For an agent that is away, or for a location that cannot be used though the object has a slot.
    pub lost: Duration,
    /// For all that must be so before it gets in line.
    pub start: Duration,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Look for its volume.
    Inspect,
    /// Change its status.
    Write(Update),
    /// Send the job.
    Give {
        /// Whether it may have been done before.
        repeated: bool,
    },
    /// Tell the agent to end it.
    Cancel,
    /// Tell the agent that the outcome is recorded.
    Record,
}

const NOT_WAITED: &str =
    "init container restore-wait has ended already, and the pod's containers run";

/// What the desk is to be asked for.
pub fn wish(job: &Job, facts: &Facts) -> Wish {
    let phase = job.object.phase();
    if phase.is_assigned() {
        return job.object.node().map_or(Wish::Nothing, |node| Wish::Placed(node.to_owned()));
    }
    match &job.place {
        // While its status is written, what it has stays.
        _ if job.writing => job.wish.clone(),
        Place::Ready(ready)
            if phase == PodVolumePhase::New
                && !job.object.is_cancelled()
                && facts.location.is_none()
                && facts.hopeless.is_none() =>
        {
            Wish::Queued(ready.node.clone())
        }
        _ => Wish::Nothing,
    }
}

/// Decides.
pub fn next(job: &Job, facts: &Facts, patience: &Patience, now: Instant) -> Option<Action> {
    let phase = job.object.phase();
    if job.writing {
        return None;
    }
    if phase.is_final() {
        let outcome = job.outcome.as_ref()?;
        let late = |snapshot: &str| Action::Write(Update::SavedAfterAll(snapshot.to_owned()));
        return Some(job.object.late_snapshot(outcome).map_or(Action::Record, late));
    }
    if phase == PodVolumePhase::New {
        return before(job, facts, patience, now);
    }
    if let Some(outcome) = &job.outcome {
        return Some(Action::Write(Update::Finish(Box::new(outcome.clone()))));
    }
    if let Some(action) = ending(job, patience, phase, now) {
        return Some(action);
    }
    match job.has {
        Some(Has::Yes) => {
            let progress = job.progress.as_ref()?;
            let due = job.progress_at.is_none_or(|at| now >= at + PROGRESS_EVERY);
            let update =
                Update::Progress { done: progress.bytes_done, total: progress.bytes_total };
            due.then_some(Action::Write(update))
        }
        Some(Has::No) => give(job, facts, patience, now),
        Some(Has::Unknown { .. }) | None => None,
    }
}

/// Before it was accepted.
fn before(job: &Job, facts: &Facts, patience: &Patience, now: Instant) -> Option<Action> {
    if job.object.is_cancelled() {
        return Some(Action::Write(Update::Canceled("cancelled before it began".to_owned())));
    }
    if let Some(why) = &facts.hopeless {
        return Some(Action::Write(Update::Fail(why.clone())));
    }
    let waits;
    let note = match &job.place {
        Place::Refused(why) => return Some(Action::Write(Update::Fail(why.clone()))),
        // It was not this one that restored the volume.
        Place::Done => {
            return Some(Action::Write(Update::Fail(NOT_WAITED.to_owned())));
        }
        Place::Unknown(at) | Place::NotYet(_, at) if *at <= now => return Some(Action::Inspect),
        Place::Unknown(_) | Place::Asked => return None,
        Place::NotYet(why, _) => Some(why),
        Place::Ready(ready) if job.granted && facts.location.is_none() => {
            return Some(Action::Write(Update::Accept(ready.node.clone())));
        }
        Place::Ready(ready) => {
            waits = job.waits.map(|why| explain(why, &ready.node));
            facts.location.as_ref().or(waits.as_ref())
        }
    };
    if job.stuck_since.is_some_and(|since| now >= since + patience.start) {
        let why = note.map_or("it cannot begin", String::as_str);
        let minutes = patience.start.as_secs() / 60;
        let message = format!("given up after {minutes} minutes: {why}");
        return Some(Action::Write(Update::Fail(message)));
    }
    let note = note.filter(|note| job.object.message() != Some(note.as_str()))?;
    Some(Action::Write(Update::Note(note.clone())))
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

/// What was cancelled, or whose agent is away.
fn ending(job: &Job, patience: &Patience, phase: PodVolumePhase, now: Instant) -> Option<Action> {
    let node = job.object.node().unwrap_or("unknown");
    let away = |limit: Duration| job.away_since().is_some_and(|since| now >= since + limit);
    if job.object.is_cancelled() {
        if phase != PodVolumePhase::Canceling {
            return Some(Action::Write(Update::Canceling));
        }
        return match job.has {
            Some(Has::No) => Some(Action::Write(Update::Canceled("cancelled".to_owned()))),
            Some(Has::Yes) if !job.cancel_sent => Some(Action::Cancel),
            // When it is back, it is told; what it saves until then is named.
            Some(Has::Unknown { .. }) if away(patience.uncounted) => {
                let message = format!("cancelled while the agent of node '{node}' was away");
                Some(Action::Write(Update::Canceled(message)))
            }
            _ => None,
        };
    }
    away(patience.lost).then(|| {
        Action::Write(Update::Fail(format!(
            "the agent of node '{node}' went away and did not come back: see to the node, then run the \
             backup or restore again"
        )))
    })
}

/// Accepted, and the agent does not have it.
fn give(job: &Job, facts: &Facts, patience: &Patience, now: Instant) -> Option<Action> {
    let given_up = job.blocked_since.is_some_and(|since| now >= since + patience.lost);
    match &job.place {
        Place::Refused(why) => Some(Action::Write(Update::Fail(why.clone()))),
        // Nobody can have done it yet: the pod did not wait for this volume.
        Place::Done if job.fresh => Some(Action::Write(Update::Fail(NOT_WAITED.to_owned()))),
        Place::Done => Some(Action::Write(Update::FoundDone)),
        Place::Unknown(at) | Place::NotYet(_, at) if *at <= now => Some(Action::Inspect),
        Place::Ready(_) if facts.location.is_none() => Some(attempt(job)),
        _ if given_up => facts.location.clone().map(|why| Action::Write(Update::Fail(why))),
        _ => None,
    }
}

/// Gives it, but not for ever: a volume that brings its agent down must not do so again and again.
fn attempt(job: &Job) -> Action {
    let attempts = job.object.attempts();
    if job.fresh {
        return Action::Give { repeated: false };
    }
    if job.counted {
        return Action::Give { repeated: true };
    }
    if attempts < ATTEMPTS {
        return Action::Write(Update::Again(attempts + 1));
    }
    let node = job.object.node().unwrap_or("unknown");
    Action::Write(Update::Fail(format!(
        "the agent of node '{node}' ended {ATTEMPTS} times while it worked on this volume: look at why its \
         pod was restarted (its memory limit, perhaps), then run the backup or restore again"
    )))
}

/// When time alone changes what is to be done.
pub fn due(job: &Job, patience: &Patience, now: Instant) -> Option<Instant> {
    let look = match &job.place {
        Place::Unknown(at) | Place::NotYet(_, at) => Some(*at),
        _ => None,
    };
    let progress = job.progress.as_ref().and(job.progress_at).map(|at| at + PROGRESS_EVERY);
    let away = job.away_since();
    let times = [
        look,
        progress,
        away.map(|since| since + patience.uncounted),
        away.map(|since| since + patience.lost),
        job.blocked_since.map(|since| since + patience.lost),
        job.stuck_since.map(|since| since + patience.start),
    ];
    times.into_iter().flatten().filter(|at| *at > now).min()
}

#[cfg(test)]
mod tests;
