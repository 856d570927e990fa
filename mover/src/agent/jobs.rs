//! Which jobs there are: pure state, told what happens, and asked what to do. Everything may be said to it
//! again and again.
//!
//! ```text
//!  Assign ─> waiting ─(room)─> running ─(ended)─> finished ─(Recorded)─> forgotten
//!                                 └─(hangs)─> finished, and keeps its room until its thread ends
//! ```

use std::collections::{BTreeMap, VecDeque};

use proto::v1::finished::Outcome;
use proto::v1::{FailureKind, Finished, Job};

use super::failure::Failed;

/// All jobs of an agent; `R` is what belongs to a running one.
#[derive(Debug)]
pub(super) struct Jobs<R> {
    capacity: usize,
    waiting: VecDeque<Job>,
    running: BTreeMap<String, R>,
    /// Threads of jobs that were given up, but have not ended.
    hanging: usize,
    finished: BTreeMap<String, Finished>,
}

/// What an Assign was.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Assigned {
    /// Another job.
    New,
    /// It waits or runs already.
    Known,
    /// It has ended: say again how.
    Ended,
}

/// What a Cancel was for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Cancelled<R> {
    /// A job that runs.
    Running(R),
    /// One that has ended, now or before: say how.
    Ended,
}

impl<R: Clone> Jobs<R> {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity,
            waiting: VecDeque::new(),
            running: BTreeMap::new(),
            hanging: 0,
            finished: BTreeMap::new(),
        }
    }

    pub(super) fn assign(&mut self, job: Job) -> Assigned {
        if self.finished.contains_key(&job.id) {
            return Assigned::Ended;
        }
        if self.running.contains_key(&job.id) || self.waiting.iter().any(|one| one.id == job.id) {
            return Assigned::Known;
        }
        self.waiting.push_back(job);
        Assigned::New
    }

    /// The next job that may run now, if any, with what `make` makes for it.
    pub(super) fn start(&mut self, make: impl FnOnce(&Job) -> R) -> Option<(Job, R)> {
        if self.running.len() + self.hanging >= self.capacity {
            return None;
        }
        let job = self.waiting.pop_front()?;
        let running = make(&job);
        self.running.insert(job.id.clone(), running.clone());
        Some((job, running))
    }

    /// Ends a job that has not begun at once, and tells which one runs. One that is not there counts as
    /// cancelled: whoever says so has it on his list.
    pub(super) fn cancel(&mut self, id: &str) -> Cancelled<R> {
        if let Some(running) = self.running.get(id) {
            return Cancelled::Running(running.clone());
        }
        self.waiting.retain(|job| job.id != id);
        if !self.finished.contains_key(id) {
            let failed = Failed::new(FailureKind::Cancelled, "cancelled before it began");
            self.finished.insert(id.to_owned(), failed_job(id, failed));
        }
        Cancelled::Ended
    }

    /// A job has ended. One that was given up before only makes room.
    pub(super) fn finish(&mut self, finished: Finished) {
        if self.running.remove(&finished.job_id).is_some() {
            self.finished.insert(finished.job_id.clone(), finished);
        } else {
            self.hanging = self.hanging.saturating_sub(1);
        }
    }

    /// A job hangs: it counts as ended, but keeps its room.
    pub(super) fn leave(&mut self, finished: Finished) {
        if self.running.remove(&finished.job_id).is_some() {
            self.hanging += 1;
            self.finished.insert(finished.job_id.clone(), finished);
        }
    }

    /// A job has ended without an outcome: as if it had never been assigned.
    pub(super) fn drop_running(&mut self, id: &str) {
        self.running.remove(id);
    }

    /// None of those that wait will begin.
    pub(super) fn drop_waiting(&mut self) {
        self.waiting.clear();
    }

    pub(super) fn recorded(&mut self, id: &str) {
        self.finished.remove(id);
    }

    /// Ids of those that wait or run.
    pub(super) fn unfinished(&self) -> Vec<String> {
        let waiting = self.waiting.iter().map(|job| job.id.clone());
        self.running.keys().cloned().chain(waiting).collect()
    }

    pub(super) fn running(&self) -> &BTreeMap<String, R> {
        &self.running
    }

    pub(super) fn waiting_mut(&mut self) -> impl Iterator<Item = &mut Job> {
        self.waiting.iter_mut()
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Those whose outcome is not recorded.
    pub(super) fn finished(&self) -> impl Iterator<Item = &Finished> {
        self.finished.values()
    }

    /// Whether jobs that hang have taken all room, and nothing is left to be told or done.
    pub(super) fn is_stuck(&self) -> bool {
        self.hanging >= self.capacity && self.running.is_empty() && self.finished.is_empty()
    }
}

/// A job that failed, without warnings.
pub(super) fn failed_job(id: &str, failed: Failed) -> Finished {
    Finished {
        job_id: id.to_owned(),
        outcome: Some(Outcome::Failure(failed.into_proto())),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: &str) -> Job {
        Job { id: id.to_owned(), ..Default::default() }
    }

    fn done(id: &str) -> Finished {
        Finished { job_id: id.to_owned(), warnings: 7, ..Default::default() }
    }

    fn start(jobs: &mut Jobs<u32>) -> Option<String> {
        jobs.start(|_| 1).map(|(job, _)| job.id)
    }

    fn ended(jobs: &Jobs<u32>) -> Vec<String> {
        jobs.finished().map(|finished| finished.job_id.clone()).collect()
    }

    #[test]
    fn jobs_run_in_turn_as_far_as_there_is_room() {
        let mut jobs = Jobs::new(2);
        for id in ["a", "b", "c"] {
            assert_eq!(jobs.assign(job(id)), Assigned::New);
        }
        assert_eq!([start(&mut jobs), start(&mut jobs)], [Some("a".into()), Some("b".into())]);
        assert_eq!(start(&mut jobs), None);
        assert_eq!(
            (jobs.unfinished(), jobs.waiting()),
            (["a", "b", "c"].map(String::from).into(), 1)
        );
        jobs.finish(done("a"));
        assert_eq!(start(&mut jobs), Some("c".into()));
        assert_eq!(ended(&jobs), ["a"]);
    }

    #[test]
    fn what_is_said_again_has_the_same_effect_as_saying_it_once() {
        let mut jobs = Jobs::new(1);
        assert_eq!(jobs.assign(job("a")), Assigned::New);
        assert_eq!(jobs.assign(job("a")), Assigned::Known);
        assert_eq!(start(&mut jobs), Some("a".into()));
        assert_eq!(jobs.assign(job("a")), Assigned::Known);
        assert_eq!(jobs.cancel("a"), Cancelled::Running(1));
        assert_eq!(jobs.cancel("a"), Cancelled::Running(1));
        jobs.finish(done("a"));
        assert_eq!(jobs.assign(job("a")), Assigned::Ended);
        assert_eq!(jobs.cancel("a"), Cancelled::Ended);
        assert_eq!(jobs.finished().map(|one| one.warnings).sum::<u64>(), 7, "it was done before");
        jobs.recorded("a");
        jobs.recorded("a");
        assert_eq!((ended(&jobs), jobs.unfinished()), (vec![], vec![]));
    }

    #[test]
    fn a_job_that_has_not_begun_is_cancelled_at_once() {
        let mut jobs = Jobs::new(1);
        jobs.assign(job("a"));
        for id in ["a", "never heard of"] {
            assert_eq!(jobs.cancel(id), Cancelled::Ended);
        }
        assert_eq!(
            (start(&mut jobs), ended(&jobs)),
            (None, ["a", "never heard of"].map(String::from).into())
        );
        let kinds = jobs.finished().map(|finished| match &finished.outcome {
            Some(Outcome::Failure(failure)) => failure.kind(),
            other => panic!("{other:?}"),
        });
        assert!(kinds.eq([FailureKind::Cancelled; 2]));
        jobs.recorded("a");
        jobs.recorded("never heard of");
        assert_eq!(ended(&jobs), [""; 0]);
    }

    #[test]
    fn a_job_that_hangs_keeps_its_room() {
        let mut jobs = Jobs::new(1);
        jobs.assign(job("a"));
        jobs.assign(job("b"));
        start(&mut jobs);
        jobs.leave(done("a"));
        assert_eq!((ended(&jobs), start(&mut jobs)), (vec!["a".to_owned()], None));
        assert!(!jobs.is_stuck(), "its outcome is not recorded");
        jobs.recorded("a");
        assert!(jobs.is_stuck());
        jobs.finish(done("a"));
        assert!(!jobs.is_stuck());
        assert_eq!((ended(&jobs), start(&mut jobs)), (vec![], Some("b".into())));
    }

    #[test]
    fn a_job_that_the_end_of_the_agent_interrupts_leaves_no_outcome() {
        let mut jobs = Jobs::new(1);
        jobs.assign(job("a"));
        jobs.assign(job("b"));
        start(&mut jobs);
        jobs.drop_waiting();
        jobs.drop_running("a");
        assert_eq!((ended(&jobs), jobs.unfinished(), start(&mut jobs)), (vec![], vec![], None));
    }
}
