//! What to do about one `PodVolumeBackup` or `PodVolumeRestore` now: a pure function of what is known.
//!
//! ```text
//!  New ──inspected, has a slot──> Accepted ──first progress──> InProgress ──said finished──> Completed | Failed
//!   │                                └────────── spec.cancel ──────┴──> Canceling ──> Canceled
//!   └── refused: Failed · spec.cancel: Canceled
//! ```
//! The phase in the cluster decides; what is remembered besides can be lost at any time and is found out again.

use std::time::Duration;

use proto::v1::{Finished, Progress};

use super::object::{Object, Update};
use crate::api::{PodVolumePhase, Timestamp};
use crate::volume::Found;

/// How often progress is written at most.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Where the volume is, as far as it was looked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Place {
    /// To be looked for at this time.
    Unknown(Timestamp),
    /// Being looked for.
    Asked,
    /// There.
    Ready(Box<Ready>),
    /// Not yet: why, and when to look again.
    NotYet(String, Timestamp),
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

/// Whether the agent of its node has the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agent {
    /// It is not connected, or did not say yet.
    Unknown,
    /// It does not have it.
    Lacks,
    /// It has it, or was sent it.
    Has,
}

/// What is known of one object.
#[derive(Debug, Clone)]
pub struct Job {
    /// The object as last seen or written.
    pub object: Object,
    /// Where its volume is.
    pub place: Place,
    /// Whether the agent has it.
    pub agent: Agent,
    /// Whether it was accepted here and never sent: the agent cannot have done it before.
    pub fresh: bool,
    /// What came of it.
    pub outcome: Option<Finished>,
    /// How far it is, unless that was written.
    pub progress: Option<Progress>,
    /// When progress was last written.
    pub progress_at: Option<Timestamp>,
    /// Since when its location cannot be used, though it has a slot.
    pub blocked_since: Option<Timestamp>,
    /// Whether the agent was told to end it.
    pub cancel_sent: bool,
    /// Whether a change of its status is on its way.
    pub writing: bool,
    /// The node whose slot it takes, while the change is that it is accepted.
    pub accepting: Option<String>,
}

impl Job {
    /// An object just seen.
    pub fn new(object: Object, now: Timestamp) -> Self {
        Self {
            object,
            place: Place::Unknown(now),
            agent: Agent::Unknown,
            fresh: false,
            outcome: None,
            progress: None,
            progress_at: None,
            blocked_since: None,
            cancel_sent: false,
            writing: false,
            accepting: None,
        }
    }

    /// Whether it waits for a slot, as far as it is concerned.
    pub fn can_be_queued(&self) -> Option<&Ready> {
        match &self.place {
            Place::Ready(ready)
                if self.object.phase() == PodVolumePhase::New
                    && !self.writing
                    && !self.object.is_cancelled() =>
            {
                Some(ready)
            }
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
    /// Whether it has had a slot, and could not, for longer than others should wait for that slot.
    pub blocked: bool,
    /// Whether it was given a slot.
    pub granted: bool,
    /// Why it has none.
    pub waits: Option<String>,
    /// Whether its node's agent is connected.
    pub connected: bool,
    /// Whether its node's agent has been away for longer than anybody should wait.
    pub lost: bool,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Look for its volume.
    Inspect,
    /// Change its status.
    Write(Update),
    /// Send the job.
    Assign {
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

/// Decides.
pub fn next(job: &Job, facts: &Facts, now: Timestamp) -> Option<Action> {
    let phase = job.object.phase();
    if job.writing {
        return None;
    }
    if phase.is_final() {
        let outcome = job.outcome.as_ref()?;
        // Of what another version means by its phase, nothing is known.
        let ended = matches!(phase, PodVolumePhase::Failed | PodVolumePhase::Canceled);
        let unnamed = job.object.unnamed_snapshot(outcome).filter(|_| ended);
        let late = |snapshot: &str| Action::Write(Update::SavedAfterAll(snapshot.to_owned()));
        return Some(unnamed.map_or(Action::Record, late));
    }
    if phase == PodVolumePhase::New {
        return before(job, facts, now);
    }
    if let Some(outcome) = &job.outcome {
        return Some(Action::Write(Update::Finish(Box::new(outcome.clone()))));
    }
    if let Some(action) = ending(job, facts, phase) {
        return Some(action);
    }
    match job.agent {
        Agent::Has => {
            let progress = job.progress.as_ref()?;
            let due = job.progress_at.is_none_or(|at| elapsed(at, now) >= PROGRESS_EVERY);
            let update =
                Update::Progress { done: progress.bytes_done, total: progress.bytes_total };
            due.then_some(Action::Write(update))
        }
        Agent::Lacks => assign(job, facts, now),
        Agent::Unknown => None,
    }
}

/// Before it was accepted.
fn before(job: &Job, facts: &Facts, now: Timestamp) -> Option<Action> {
    if job.object.is_cancelled() {
        return Some(Action::Write(Update::Canceled("cancelled before it began".to_owned())));
    }
    if let Some(why) = &facts.hopeless {
        return Some(Action::Write(Update::Fail(why.clone())));
    }
    let note = match &job.place {
        Place::Refused(why) => return Some(Action::Write(Update::Fail(why.clone()))),
        // It was not this one that restored the volume.
        Place::Done => {
            return Some(Action::Write(Update::Fail(NOT_WAITED.to_owned())));
        }
        Place::Unknown(at) | Place::NotYet(_, at) if *at <= now => return Some(Action::Inspect),
        Place::Unknown(_) | Place::Asked => return None,
        Place::NotYet(why, _) => Some(why),
        Place::Ready(ready) if facts.granted => {
            return Some(Action::Write(Update::Accept(ready.node.clone())));
        }
        Place::Ready(_) => facts.location.as_ref().or(facts.waits.as_ref()),
    };
    let note = note.filter(|note| job.object.message() != Some(note.as_str()))?;
    Some(Action::Write(Update::Note(note.clone())))
}

/// What was cancelled, or whose agent is away.
fn ending(job: &Job, facts: &Facts, phase: PodVolumePhase) -> Option<Action> {
    let node = job.object.node().unwrap_or("unknown");
    if job.object.is_cancelled() {
        if phase != PodVolumePhase::Canceling {
            return Some(Action::Write(Update::Canceling));
        }
        return match job.agent {
            Agent::Lacks => Some(Action::Write(Update::Canceled("cancelled".to_owned()))),
            Agent::Has if !job.cancel_sent => Some(Action::Cancel),
            Agent::Unknown if facts.lost => {
                let message = format!("cancelled while the agent of node '{node}' was away");
                Some(Action::Write(Update::Canceled(message)))
            }
            _ => None,
        };
    }
    facts.lost.then(|| {
        Action::Write(Update::Fail(format!(
            "the agent of node '{node}' went away and did not come back: see to the node, then run the \
             backup or restore again"
        )))
    })
}

/// Accepted, and the agent does not have it.
fn assign(job: &Job, facts: &Facts, now: Timestamp) -> Option<Action> {
    match &job.place {
        Place::Refused(why) => Some(Action::Write(Update::Fail(why.clone()))),
        // Nobody can have done it yet: the pod did not wait for this volume.
        Place::Done if job.fresh => Some(Action::Write(Update::Fail(NOT_WAITED.to_owned()))),
        Place::Done => Some(Action::Write(Update::FoundDone)),
        Place::Unknown(at) | Place::NotYet(_, at) if *at <= now => Some(Action::Inspect),
        Place::Ready(_) if facts.connected && facts.location.is_none() => {
            Some(Action::Assign { repeated: !job.fresh })
        }
        _ if facts.blocked => facts.location.clone().map(|why| Action::Write(Update::Fail(why))),
        _ => None,
    }
}

/// Time from one moment to a later one.
pub fn elapsed(from: Timestamp, to: Timestamp) -> Duration {
    Duration::try_from(to.duration_since(from)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::PodVolumeBackup;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn job(phase: &str, cancel: bool) -> Job {
        let object: PodVolumeBackup = serde_json::from_value(json!({
            "apiVersion": "velero.io/v1", "kind": "PodVolumeBackup",
            "metadata": {"name": "b", "namespace": "velero", "uid": "u"},
            "spec": {"node": "n", "pod": {}, "volume": "v", "backupStorageLocation": "l",
                     "repoIdentifier": "", "cancel": cancel},
            "status": {"phase": phase},
        }))
        .unwrap();
        Job::new(object.into(), at(0))
    }

    fn ready() -> Place {
        let found =
            Found { volume: proto::v1::Volume::default(), lineage: "l".to_owned(), claim: None };
        Place::Ready(Box::new(Ready { node: "n".to_owned(), found }))
    }

    fn connected() -> Facts {
        Facts { connected: true, ..Facts::default() }
    }

    fn progress() -> Option<Progress> {
        Some(Progress { bytes_done: 1, bytes_total: 2, ..Default::default() })
    }

    fn fail(why: &str) -> Option<Action> {
        Some(Action::Write(Update::Fail(why.to_owned())))
    }

    #[test]
    fn a_new_object_is_inspected_waits_for_a_slot_and_is_accepted() {
        let mut job = job("", false);
        assert_eq!(next(&job, &connected(), at(0)), Some(Action::Inspect));
        job.place = Place::NotYet("the pod is not scheduled".to_owned(), at(9));
        let note = Update::Note("the pod is not scheduled".to_owned());
        assert_eq!(next(&job, &connected(), at(5)), Some(Action::Write(note)));
        assert_eq!(next(&job, &connected(), at(9)), Some(Action::Inspect));
        job.place = ready();
        assert!(job.can_be_queued().is_some());
        assert_eq!(next(&job, &connected(), at(9)), None);
        let waits = Facts { waits: Some("full".to_owned()), ..connected() };
        let note = Some(Action::Write(Update::Note("full".to_owned())));
        assert_eq!(next(&job, &waits, at(9)), note);
        let granted = Facts { granted: true, ..connected() };
        let accept = Some(Action::Write(Update::Accept("n".to_owned())));
        assert_eq!(next(&job, &granted, at(9)), accept);
        job.writing = true;
        assert_eq!(next(&job, &granted, at(9)), None, "one change at a time");
        assert!(job.can_be_queued().is_none());
    }

    #[test]
    fn what_cannot_be_done_fails_with_the_reason() {
        let mut job = job("New", false);
        let hopeless = Facts { hopeless: Some("read-only".to_owned()), ..connected() };
        assert_eq!(next(&job, &hopeless, at(0)), fail("read-only"));
        job.place = Place::Refused("hostPath".to_owned());
        assert_eq!(next(&job, &connected(), at(0)), fail("hostPath"));
    }

    #[test]
    fn an_accepted_job_is_sent_until_the_agent_has_it() {
        let mut job = job("Accepted", false);
        assert_eq!(next(&job, &connected(), at(0)), None, "nobody knows whether the agent has it");
        job.agent = Agent::Lacks;
        assert_eq!(next(&job, &connected(), at(0)), Some(Action::Inspect), "after a takeover");
        job.place = ready();
        assert_eq!(next(&job, &connected(), at(0)), Some(Action::Assign { repeated: true }));
        job.fresh = true;
        assert_eq!(next(&job, &connected(), at(0)), Some(Action::Assign { repeated: false }));
        let closed = Facts { location: Some("down".to_owned()), ..connected() };
        assert_eq!(next(&job, &closed, at(0)), None);
        let given_up = Facts { blocked: true, ..closed };
        assert_eq!(next(&job, &given_up, at(0)), fail("down"), "others wait for its slot");
        assert_eq!(next(&job, &Facts::default(), at(0)), None, "not connected");
        job.place = Place::Refused("gone".to_owned());
        assert_eq!(next(&job, &connected(), at(0)), fail("gone"));
        job.place = Place::Done;
        assert_eq!(next(&job, &connected(), at(0)), fail(NOT_WAITED), "it was never sent");
        job.fresh = false;
        assert_eq!(next(&job, &connected(), at(0)), Some(Action::Write(Update::FoundDone)));
    }

    #[test]
    fn progress_is_written_every_five_seconds_and_the_outcome_at_once() {
        let mut job = job("Accepted", false);
        job.agent = Agent::Has;
        assert_eq!(next(&job, &connected(), at(0)), None);
        job.progress = progress();
        let write = Some(Action::Write(Update::Progress { done: 1, total: 2 }));
        assert_eq!(next(&job, &connected(), at(0)), write);
        job.progress_at = Some(at(10));
        assert_eq!(next(&job, &connected(), at(14)), None);
        assert_eq!(next(&job, &connected(), at(15)), write);
        job.outcome = Some(Finished::default());
        let finish = Some(Action::Write(Update::Finish(Box::default())));
        assert_eq!(next(&job, &connected(), at(11)), finish);
        job.writing = true;
        assert_eq!(next(&job, &connected(), at(11)), None, "not recorded before it is written");
    }

    #[test]
    fn what_is_recorded_is_said_to_be_so_however_often_it_is_said() {
        for phase in ["Completed", "Failed", "Canceled"] {
            let mut job = job(phase, false);
            assert_eq!(next(&job, &connected(), at(0)), None);
            job.outcome = Some(Finished::default());
            assert_eq!(next(&job, &connected(), at(0)), Some(Action::Record));
        }
    }

    #[test]
    fn what_was_saved_after_all_is_named_before_it_is_recorded() {
        let saved = proto::v1::Saved { snapshot: "s".to_owned(), ..Default::default() };
        let outcome = Some(proto::v1::finished::Outcome::Saved(saved));
        let finished = Finished { outcome, ..Default::default() };
        let named = Some(Action::Write(Update::SavedAfterAll("s".to_owned())));
        for (phase, first) in [
            ("Failed", &named),
            ("Canceled", &named),
            ("Completed", &Some(Action::Record)),
            ("Future", &Some(Action::Record)),
        ] {
            let mut job = job(phase, false);
            job.outcome = Some(finished.clone());
            assert_eq!(&next(&job, &connected(), at(0)), first, "{phase}");
            job.writing = true;
            assert_eq!(next(&job, &connected(), at(0)), None, "{phase}");
        }
    }

    #[test]
    fn cancelling_works_in_every_phase() {
        let cancelled = |phase: &str, agent: Agent, sent: bool, facts: &Facts| {
            let mut job = job(phase, true);
            job.agent = agent;
            job.cancel_sent = sent;
            job.place = ready();
            next(&job, facts, at(0))
        };
        let lost = Facts { lost: true, ..Facts::default() };
        let is_canceled =
            |action: &Option<Action>| matches!(action, Some(Action::Write(Update::Canceled(_))));
        assert!(is_canceled(&cancelled("", Agent::Unknown, false, &connected())));
        for phase in ["Accepted", "Prepared", "InProgress"] {
            let action = cancelled(phase, Agent::Has, false, &connected());
            assert_eq!(action, Some(Action::Write(Update::Canceling)), "{phase}");
        }
        let phase = "Canceling";
        assert_eq!(cancelled(phase, Agent::Has, false, &connected()), Some(Action::Cancel));
        assert_eq!(cancelled(phase, Agent::Has, true, &connected()), None);
        assert!(is_canceled(&cancelled(phase, Agent::Lacks, false, &connected())));
        assert_eq!(cancelled(phase, Agent::Unknown, true, &Facts::default()), None);
        assert!(is_canceled(&cancelled(phase, Agent::Unknown, true, &lost)));
        for phase in ["Completed", "Failed", "Canceled", "Future"] {
            assert_eq!(cancelled(phase, Agent::Has, false, &connected()), None, "{phase}");
        }
    }

    #[test]
    fn a_job_whose_agent_is_lost_for_good_fails() {
        for phase in ["Accepted", "InProgress"] {
            let lost = Facts { lost: true, ..Facts::default() };
            let action = next(&job(phase, false), &lost, at(0));
            let Some(Action::Write(Update::Fail(why))) = action else {
                panic!("{action:?}");
            };
            assert!(why.contains("node 'n'"), "{why}");
        }
    }
}
