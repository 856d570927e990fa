//! What is done about one object, case by case.

use serde_json::json;

use super::*;
use crate::api::PodVolumeBackup;

const PATIENCE: Patience = Patience {
    uncounted: Duration::from_secs(60),
    lost: Duration::from_secs(600),
    start: Duration::from_secs(1800),
};

/// Seconds on a clock that began long ago.
struct Clock(Instant);

impl Clock {
    fn new() -> Self {
        Self(Instant::now())
    }

    fn at(&self, seconds: u64) -> Instant {
        self.0 + Duration::from_secs(seconds)
    }

    fn away(&self) -> Option<Has> {
        Some(Has::Unknown { since: self.0 })
    }

    fn job(&self, phase: &str, cancel: bool) -> Job {
        self.tried(phase, cancel, 1)
    }

    fn tried(&self, phase: &str, cancel: bool, attempts: i64) -> Job {
        let object: PodVolumeBackup = serde_json::from_value(json!({
            "apiVersion": "velero.io/v1", "kind": "PodVolumeBackup",
            "metadata": {"name": "b", "namespace": "velero", "uid": "u"},
            "spec": {"node": "n", "pod": {}, "volume": "v", "backupStorageLocation": "l",
                     "repoIdentifier": "", "cancel": cancel},
            "status": {"phase": phase, "attempts": attempts},
        }))
        .unwrap();
        Job::new(object.into(), self.0)
    }
}

fn ready() -> Place {
    let found =
        Found { volume: proto::v1::Volume::default(), lineage: "l".to_owned(), claim: None };
    Place::Ready(Box::new(Ready { node: "n".to_owned(), found }))
}

fn unusable(why: &str) -> Facts {
    Facts { location: Some(why.to_owned()), ..Facts::default() }
}

fn usable() -> Facts {
    Facts::default()
}

fn progress() -> Option<Progress> {
    Some(Progress { bytes_done: 1, bytes_total: 2, ..Default::default() })
}

fn fail(why: &str) -> Option<Action> {
    Some(Action::Write(Update::Fail(why.to_owned())))
}

fn note(why: &str) -> Option<Action> {
    Some(Action::Write(Update::Note(why.to_owned())))
}

#[test]
fn a_new_object_is_inspected_waits_for_a_slot_and_is_accepted() {
    let clock = Clock::new();
    let mut job = clock.job("", false);
    let at = |job: &Job, second| next(job, &usable(), &PATIENCE, clock.at(second));
    assert_eq!(at(&job, 0), Some(Action::Inspect));
    assert_eq!(wish(&job, &usable()), Wish::Nothing);
    job.place = Place::NotYet("the pod is not scheduled".to_owned(), clock.at(9));
    assert_eq!(at(&job, 5), note("the pod is not scheduled"));
    assert_eq!(due(&job, &PATIENCE, clock.at(5)), Some(clock.at(9)));
    assert_eq!(at(&job, 9), Some(Action::Inspect));
    job.place = ready();
    assert_eq!(wish(&job, &usable()), Wish::Queued("n".to_owned()));
    assert_eq!(wish(&job, &unusable("down")), Wish::Nothing, "it takes nobody's turn");
    assert_eq!(at(&job, 9), None);
    job.waits = Some(Why::Cluster);
    assert_eq!(at(&job, 9), note("waiting for a worker: all are busy"));
    job.granted = true;
    let accept = Some(Action::Write(Update::Accept("n".to_owned())));
    assert_eq!(at(&job, 9), accept);
    let closed = next(&job, &unusable("down"), &PATIENCE, clock.at(9));
    assert_eq!(closed, note("down"), "a place is no use without a location");
    job.wish = Wish::Queued("n".to_owned());
    job.writing = true;
    assert_eq!(at(&job, 9), None, "one change at a time");
    assert_eq!(wish(&job, &unusable("down")), job.wish, "its place stays meanwhile");
}

#[test]
fn what_waits_for_anything_but_its_turn_does_not_wait_for_ever() {
    let clock = Clock::new();
    let not_yet = Place::NotYet("waiting for a node".to_owned(), clock.at(1_000_000));
    for (place, waits, facts, part) in [
        (not_yet, None, usable(), "waiting for a node"),
        (ready(), None, unusable("there is no location"), "there is no location"),
        (ready(), Some(Why::NoAgent), usable(), "node-agent pod"),
    ] {
        let mut job = clock.job("New", false);
        (job.place, job.waits) = (place, waits);
        for second in [10, 1000] {
            job.note_waiting(&facts, clock.at(second));
        }
        let at = |second| next(&job, &facts, &PATIENCE, clock.at(second));
        assert!(matches!(at(1809), Some(Action::Write(Update::Note(_)))), "{part}");
        let Some(Action::Write(Update::Fail(why))) = at(1810) else { panic!("{part}") };
        assert!(why.contains(part) && why.contains("30 minutes"), "{why}");
        assert_eq!(due(&job, &PATIENCE, clock.at(1000)), Some(clock.at(1810)), "{part}");
    }
    for waits in [Why::Cluster, Why::Node, Why::Agent] {
        let mut job = clock.job("New", false);
        (job.place, job.waits) = (ready(), Some(waits));
        job.note_waiting(&usable(), clock.at(0));
        let much_later = next(&job, &usable(), &PATIENCE, clock.at(1_000_000));
        assert!(matches!(much_later, Some(Action::Write(Update::Note(_)))), "its turn comes");
    }
}

#[test]
fn what_cannot_be_done_fails_with_the_reason() {
    let clock = Clock::new();
    let mut job = clock.job("New", false);
    let hopeless = Facts { hopeless: Some("read-only".to_owned()), ..usable() };
    assert_eq!(next(&job, &hopeless, &PATIENCE, clock.at(0)), fail("read-only"));
    job.place = Place::Refused("hostPath".to_owned());
    assert_eq!(next(&job, &usable(), &PATIENCE, clock.at(0)), fail("hostPath"));
}

#[test]
fn an_accepted_job_is_given_until_the_agent_has_it() {
    let clock = Clock::new();
    let mut job = clock.job("Accepted", false);
    let at = |job: &Job, facts: &Facts, second| next(job, facts, &PATIENCE, clock.at(second));
    assert_eq!(wish(&job, &unusable("down")), Wish::Placed("n".to_owned()));
    assert_eq!(at(&job, &usable(), 0), None, "nobody knows whether the agent has it");
    job.learn_has(Has::No, clock.at(0));
    assert_eq!(at(&job, &usable(), 0), Some(Action::Inspect), "after a takeover");
    job.place = ready();
    job.counted = true;
    assert_eq!(at(&job, &usable(), 0), Some(Action::Give { repeated: true }));
    job.fresh = true;
    assert_eq!(at(&job, &usable(), 0), Some(Action::Give { repeated: false }));
    let down = unusable("down");
    assert_eq!(at(&job, &down, 0), None);
    job.note_waiting(&down, clock.at(0));
    assert_eq!(at(&job, &down, 599), None);
    assert_eq!(at(&job, &down, 600), fail("down"), "others wait for its slot");
    job.place = Place::Refused("gone".to_owned());
    assert_eq!(at(&job, &usable(), 0), fail("gone"));
    job.place = Place::Done;
    assert_eq!(at(&job, &usable(), 0), fail(NOT_WAITED), "it was never sent");
    job.fresh = false;
    assert_eq!(at(&job, &usable(), 0), Some(Action::Write(Update::FoundDone)));
}

#[test]
fn a_volume_that_brings_its_agent_down_is_given_up() {
    let clock = Clock::new();
    let after = |attempts| {
        let mut job = clock.tried("InProgress", false, attempts);
        job.learn_has(Has::No, clock.at(0));
        job.place = ready();
        next(&job, &usable(), &PATIENCE, clock.at(0))
    };
    assert_eq!(after(1), Some(Action::Write(Update::Again(2))), "counted before it is given");
    assert_eq!(after(2), Some(Action::Write(Update::Again(3))));
    let Some(Action::Write(Update::Fail(why))) = after(3) else { panic!("it goes on") };
    assert!(why.contains("3 times") && why.contains("node 'n'"), "{why}");
    let mut job = clock.tried("InProgress", false, 2);
    job.counted = true;
    job.learn_has(Has::No, clock.at(0));
    assert!(!job.counted, "the next time it is lost, it is counted again");
}

#[test]
fn progress_is_written_every_five_seconds_and_the_outcome_at_once() {
    let clock = Clock::new();
    let mut job = clock.job("Accepted", false);
    job.has = Some(Has::Yes);
    let at = |job: &Job, second| next(job, &usable(), &PATIENCE, clock.at(second));
    assert_eq!(at(&job, 0), None);
    job.progress = progress();
    let write = Some(Action::Write(Update::Progress { done: 1, total: 2 }));
    assert_eq!(at(&job, 0), write);
    job.progress_at = Some(clock.at(10));
    assert_eq!(at(&job, 14), None);
    assert_eq!(due(&job, &PATIENCE, clock.at(14)), Some(clock.at(15)));
    assert_eq!(at(&job, 15), write);
    job.outcome = Some(Finished::default());
    let finish = Some(Action::Write(Update::Finish(Box::default())));
    assert_eq!(at(&job, 11), finish);
    job.writing = true;
    assert_eq!(at(&job, 11), None, "not recorded before it is written");
}

#[test]
fn what_is_recorded_is_said_to_be_so_however_often_it_is_said() {
    let clock = Clock::new();
    for phase in ["Completed", "Failed", "Canceled"] {
        let mut job = clock.job(phase, false);
        assert_eq!(wish(&job, &usable()), Wish::Nothing);
        assert!(job.is_over());
        assert_eq!(next(&job, &usable(), &PATIENCE, clock.at(0)), None);
        job.outcome = Some(Finished::default());
        let action = next(&job, &usable(), &PATIENCE, clock.at(0));
        assert_eq!(action, Some(Action::Record));
    }
}

#[test]
fn what_was_saved_after_all_is_named_before_it_is_recorded() {
    let clock = Clock::new();
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
        let mut job = clock.job(phase, false);
        job.outcome = Some(finished.clone());
        assert_eq!(&next(&job, &usable(), &PATIENCE, clock.at(0)), first, "{phase}");
        job.writing = true;
        assert_eq!(next(&job, &usable(), &PATIENCE, clock.at(0)), None, "{phase}");
    }
}

#[test]
fn cancelling_works_in_every_phase() {
    let clock = Clock::new();
    let cancelled = |phase: &str, has: Option<Has>, sent: bool, second: u64| {
        let mut job = clock.job(phase, true);
        (job.has, job.cancel_sent, job.place) = (has, sent, ready());
        next(&job, &usable(), &PATIENCE, clock.at(second))
    };
    let is_canceled =
        |action: &Option<Action>| matches!(action, Some(Action::Write(Update::Canceled(_))));
    assert!(is_canceled(&cancelled("", None, false, 0)));
    for phase in ["Accepted", "Prepared", "InProgress"] {
        let action = cancelled(phase, Some(Has::Yes), false, 0);
        assert_eq!(action, Some(Action::Write(Update::Canceling)), "{phase}");
    }
    let phase = "Canceling";
    assert_eq!(cancelled(phase, Some(Has::Yes), false, 0), Some(Action::Cancel));
    assert_eq!(cancelled(phase, Some(Has::Yes), true, 0), None);
    assert!(is_canceled(&cancelled(phase, Some(Has::No), false, 0)));
    assert_eq!(cancelled(phase, clock.away(), true, 59), None, "it may come back in a moment");
    assert!(is_canceled(&cancelled(phase, clock.away(), true, 60)), "and not for minutes");
    for phase in ["Completed", "Failed", "Canceled", "Future"] {
        assert_eq!(cancelled(phase, Some(Has::Yes), false, 0), None, "{phase}");
    }
}

#[test]
fn a_job_whose_agent_is_lost_for_good_fails() {
    let clock = Clock::new();
    for phase in ["Accepted", "InProgress"] {
        let mut job = clock.job(phase, false);
        job.has = clock.away();
        assert_eq!(next(&job, &usable(), &PATIENCE, clock.at(599)), None);
        let action = next(&job, &usable(), &PATIENCE, clock.at(600));
        let Some(Action::Write(Update::Fail(why))) = action else {
            panic!("{action:?}");
        };
        assert!(why.contains("node 'n'"), "{why}");
    }
}
