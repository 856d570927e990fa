//! Which step of a run may begin: pure, it starts nothing and knows no clock.

use anyhow::{Result, bail};

/// What has to be known of a step before it runs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Needs {
    pub(crate) name: String,
    /// Names of the steps that must have succeeded before.
    pub(crate) after: Vec<String>,
    /// Names of what it must have alone: no two steps that hold the same run at once.
    pub(crate) holds: Vec<String>,
    /// How many processors it keeps busy; none if it mostly waits.
    pub(crate) processors: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Waits,
    Runs,
    Succeeded,
    Failed,
    /// Something that it comes after failed, or was not run itself.
    NotRun,
}

/// The steps of a run, in the order in which they begin where there is a choice, and how far each is.
#[derive(Debug)]
pub(crate) struct Schedule {
    steps: Vec<(Needs, State)>,
    processors: usize,
}

impl Schedule {
    /// Fails where a step could never begin.
    pub(crate) fn new(steps: Vec<Needs>, processors: usize) -> Result<Self> {
        let mut known: Vec<&str> = Vec::new();
        for step in &steps {
            if known.contains(&step.name.as_str()) {
                bail!("two steps are called '{}'", step.name);
            }
            // Of what stands earlier, so that there is no circle.
            if let Some(unknown) = step.after.iter().find(|name| !known.contains(&name.as_str())) {
                bail!(
                    "'{}' comes after '{unknown}', and no step before it has that name",
                    step.name
                );
            }
            known.push(&step.name);
        }
        let steps = steps.into_iter().map(|step| (step, State::Waits)).collect();
        Ok(Self { steps, processors })
    }

    /// The next step to begin, which counts as running from now on. `None` while there is none: until another
    /// ends, or for good, if [`Self::is_done`].
    pub(crate) fn begin(&mut self) -> Option<usize> {
        let running =
            || self.steps.iter().filter(|(_, state)| *state == State::Runs).map(|(step, _)| step);
        let busy: usize = running().map(|step| step.processors).sum();
        let may_begin = |(step, state): &(Needs, State)| {
            // One that wants more than there are gets all of them.
            let has_room = step.processors == 0
                || busy == 0
                || busy.saturating_add(step.processors) <= self.processors;
            let is_free = |what: &String| !running().any(|other| other.holds.contains(what));
            let is_next = step.after.iter().all(|name| self.state(name) == State::Succeeded);
            *state == State::Waits && has_room && step.holds.iter().all(is_free) && is_next
        };
        let next = self.steps.iter().position(may_begin)?;
        self.steps[next].1 = State::Runs;
        Some(next)
    }

    /// A step that ran has ended. What comes after one that failed is not run; the rest goes on.
    pub(crate) fn end(&mut self, step: usize, succeeded: bool) {
        self.steps[step].1 = if succeeded { State::Succeeded } else { State::Failed };
        // Each stands behind those that it comes after, so that one pass is enough.
        for at in step + 1..self.steps.len() {
            let (next, state) = &self.steps[at];
            let is_lost = |name: &String| matches!(self.state(name), State::Failed | State::NotRun);
            if *state == State::Waits && next.after.iter().any(is_lost) {
                self.steps[at].1 = State::NotRun;
            }
        }
    }

    pub(crate) fn is_done(&self) -> bool {
        !self.steps.iter().any(|(_, state)| matches!(state, State::Waits | State::Runs))
    }

    /// Names and states, in the order of the plan.
    pub(crate) fn states(&self) -> impl Iterator<Item = (&str, State)> {
        self.steps.iter().map(|(step, state)| (step.name.as_str(), *state))
    }

    fn state(&self, name: &str) -> State {
        // `new` has seen to it that it is there.
        self.states().find(|(one, _)| *one == name).map_or(State::NotRun, |(_, state)| state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(name: &str, after: &[&str], processors: usize) -> Needs {
        let after = after.iter().map(|&name| name.to_owned()).collect();
        Needs { name: name.to_owned(), after, holds: Vec::new(), processors }
    }

    fn schedule(steps: &[(&str, &[&str], usize)]) -> Schedule {
        let steps = steps.iter().map(|(name, after, processors)| step(name, after, *processors));
        Schedule::new(steps.collect(), 2).expect("the plan is sound")
    }

    /// All that may begin now.
    fn begun(schedule: &mut Schedule) -> Vec<usize> {
        std::iter::from_fn(|| schedule.begin()).collect()
    }

    fn states(schedule: &Schedule) -> Vec<State> {
        schedule.states().map(|(_, state)| state).collect()
    }

    #[test]
    fn a_step_begins_when_all_that_it_comes_after_have_succeeded() {
        let mut schedule = schedule(&[("a", &[], 0), ("b", &[], 0), ("c", &["a", "b"], 0)]);
        assert_eq!(begun(&mut schedule), [0, 1]);
        schedule.end(1, true);
        assert_eq!(begun(&mut schedule), [] as [usize; 0]);
        schedule.end(0, true);
        assert_eq!(begun(&mut schedule), [2]);
        assert!(!schedule.is_done());
        schedule.end(2, true);
        assert!(schedule.is_done());
    }

    #[test]
    fn no_more_processors_are_given_than_there_are_and_waiting_needs_none() {
        let steps: [(&str, &[&str], usize); 5] =
            [("a", &[], 1), ("both", &[], 2), ("b", &[], 1), ("c", &[], 1), ("waits", &[], 0)];
        let mut schedule = schedule(&steps);
        // What finds room goes before what does not.
        assert_eq!(begun(&mut schedule), [0, 2, 4]);
        schedule.end(0, true);
        assert_eq!(begun(&mut schedule), [3]);
        schedule.end(2, true);
        schedule.end(3, true);
        assert_eq!(begun(&mut schedule), [1]);
    }

    #[test]
    fn no_two_steps_hold_the_same_at_once() {
        let holds = |name: &str, what: &[&str]| {
            let holds = what.iter().map(|&what| what.to_owned()).collect();
            Needs { holds, ..step(name, &[], 0) }
        };
        let steps =
            vec![holds("a", &["user", "disk"]), holds("b", &["disk"]), holds("c", &["net"])];
        let mut schedule = Schedule::new(steps, 2).expect("the plan is sound");
        assert_eq!(begun(&mut schedule), [0, 2]);
        schedule.end(0, false);
        assert_eq!(begun(&mut schedule), [1]);
    }

    #[test]
    fn a_step_that_wants_all_processors_runs_beside_none_that_wants_one() {
        let mut schedule = schedule(&[("all", &[], usize::MAX), ("one", &[], 1)]);
        assert_eq!(begun(&mut schedule), [0]);
        schedule.end(0, true);
        assert_eq!(begun(&mut schedule), [1]);
    }

    #[test]
    fn a_failure_keeps_back_what_comes_after_it_and_nothing_else() {
        let steps: [(&str, &[&str], usize); 4] =
            [("a", &[], 0), ("after", &["a"], 0), ("after that", &["after"], 0), ("other", &[], 1)];
        let mut schedule = schedule(&steps);
        assert_eq!(begun(&mut schedule), [0, 3]);
        schedule.end(0, false);
        assert_eq!(begun(&mut schedule), [] as [usize; 0]);
        assert_eq!(states(&schedule), [State::Failed, State::NotRun, State::NotRun, State::Runs]);
        schedule.end(3, true);
        assert!(schedule.is_done());
    }

    #[test]
    fn a_plan_in_which_a_step_could_never_begin_is_refused() {
        let refused = |steps: Vec<Needs>| Schedule::new(steps, 2).expect_err("refused").to_string();
        assert!(refused(vec![step("a", &["b"], 0), step("b", &["a"], 0)]).contains("'b'"));
        assert!(refused(vec![step("a", &["misspelt"], 0)]).contains("'misspelt'"));
        assert!(refused(vec![step("a", &[], 0), step("a", &[], 0)]).contains("two steps"));
    }
}
