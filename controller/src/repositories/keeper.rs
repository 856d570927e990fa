//! What is known of one repository, and what to do about it: pure. It is opened by an agent before anything uses it,
//! pruned regularly, and reported in its `BackupRepository`.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use proto::v1::{Finished, Prune, Repository, finished::Outcome};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::api::common::duration;
use crate::api::repository::Maintenance;
use crate::api::{
    BackupRepository, BackupRepositorySpec, BackupStorageLocation, STORAGE_LOCATION, Timestamp,
};
use crate::places::check::Usable;

/// `spec.repositoryType` of what this program makes.
pub const TYPE: &str = "ebackup";
/// Runs of maintenance that are remembered.
const REMEMBERED: usize = 25;
/// After a failure to open, when to try again.
const OPEN_AGAIN: Duration = Duration::from_secs(30);
/// After a failure to prune.
const PRUNE_AGAIN: Duration = Duration::from_secs(3600);

/// What a run of prune does at most: a fifth may stay unused, and 20 GiB are rewritten.
pub const PRUNE: Prune = Prune { max_unused_permille: 200, max_repack_bytes: 20 << 30 };

/// What is known of one repository.
#[derive(Debug, Clone, Default)]
pub struct Keeper {
    /// The object, once it is there.
    pub object: Option<BackupRepository>,
    /// Whether the object is being made or changed.
    pub writing: bool,
    /// Whether it was opened as it is now.
    pub opened: Opened,
    /// The prune that runs.
    pub prune: Option<Run>,
    /// Why it could not be opened the last time, if so.
    pub failed: Option<String>,
    /// Not before this time is opening tried again.
    pub open_at: Option<Instant>,
    /// Not before this time is pruning tried again.
    pub prune_at: Option<Instant>,
}

/// Whether a repository was opened.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Opened {
    /// Not yet, or not as it is now.
    #[default]
    No,
    /// An agent is at it.
    Opening {
        /// The job.
        run: Run,
        /// What is opened.
        what: Box<Repository>,
    },
    /// Yes: what was opened.
    Yes(Box<Repository>),
}

/// A job for a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Its id.
    pub job: String,
    /// The node that it runs on, once it has a place.
    pub node: Option<String>,
    /// When it was asked for.
    pub began: Timestamp,
    /// Since when its agent is away.
    pub away_since: Option<Instant>,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Make the object.
    Create,
    /// Let an agent open it.
    Open,
    /// It is only read: restores find out whether it can be.
    Trust,
    /// Let an agent prune it.
    Prune,
}

/// What has to be the same for a repository to count as opened. Another access key makes no other repository.
pub fn identity(repository: &Repository) -> Repository {
    Repository { credentials: None, limit_upload: 0, limit_download: 0, ..repository.clone() }
}

impl Keeper {
    /// Whether jobs can use it.
    pub fn is_open(&self, usable: &Usable) -> bool {
        matches!(&self.opened, Opened::Yes(what) if **what == identity(&usable.repository))
    }

    /// The jobs that run for it.
    pub fn runs(&self) -> impl Iterator<Item = &Run> {
        let opening = match &self.opened {
            Opened::Opening { run, .. } => Some(run),
            _ => None,
        };
        opening.into_iter().chain(&self.prune)
    }

    /// What to do now: by the clock of people where days are counted, by the other one where it only waits.
    pub fn next(
        &self,
        usable: Option<&Usable>,
        read_only: bool,
        every: Duration,
        now: (Timestamp, Instant),
    ) -> Option<Step> {
        let usable = usable?;
        if self.writing {
            return None;
        }
        let Some(object) = &self.object else {
            return Some(Step::Create);
        };
        let due = |at: Option<Instant>| at.is_none_or(|at| at <= now.1);
        if !self.is_open(usable) {
            return match &self.opened {
                Opened::Opening { .. } => None,
                _ if read_only => Some(Step::Trust),
                _ => due(self.open_at).then_some(Step::Open),
            };
        }
        let may = !read_only && self.prune.is_none() && due(self.prune_at);
        (may && is_due(object, every, now.0)).then_some(Step::Prune)
    }

    /// The job with this id, if it is one of its own.
    pub fn run_mut(&mut self, job: &str) -> Option<&mut Run> {
        let opening = match &mut self.opened {
            Opened::Opening { run, .. } => Some(run),
            _ => None,
        };
        opening.into_iter().chain(&mut self.prune).find(|run| run.job == job)
    }

    /// Notes what came of a job. Returns the new status as a merge patch, or nothing when it is not one of its own.
    pub fn finished(
        &mut self,
        finished: &Finished,
        every: Duration,
        now: (Timestamp, Instant),
    ) -> Option<Value> {
        if let Opened::Opening { run, what } = &self.opened
            && run.job == finished.job_id
        {
            let what = what.clone();
            return Some(match &finished.outcome {
                Some(Outcome::Opened(opened)) => {
                    self.opened = Opened::Yes(what);
                    self.open_at = None;
                    self.failed = None;
                    let id = &opened.repository_id;
                    json!({"phase": "Ready", "message": null, "repositoryID": id})
                }
                outcome => {
                    self.opened = Opened::No;
                    self.open_at = Some(now.1 + OPEN_AGAIN);
                    self.failed = Some(failure(outcome.as_ref()));
                    json!({"phase": "NotReady", "message": failure(outcome.as_ref())})
                }
            });
        }
        if self.prune.as_ref().is_none_or(|run| run.job != finished.job_id) {
            return None;
        }
        let run = self.prune.take()?;
        let (result, message, again) = match &finished.outcome {
            Some(Outcome::Pruned(done)) => {
                let message = format!(
                    "deleted {} packs ({} bytes), rewrote {} bytes, {} packs wait",
                    done.packs_deleted, done.bytes_deleted, done.bytes_repacked, done.packs_waiting
                );
                ("Succeeded", message, self.every(every))
            }
            outcome => ("Failed", failure(outcome.as_ref()), PRUNE_AGAIN),
        };
        // Also where its status cannot be written: then only this tells that it was done.
        self.prune_at = Some(now.1 + again);
        let status = self.object.as_ref().and_then(|object| object.status.clone());
        let mut recent = status.and_then(|status| status.recent_maintenance).unwrap_or_default();
        recent.push(Maintenance {
            result: Some(result.to_owned()),
            start_timestamp: Some(Time(run.began)),
            complete_timestamp: Some(Time(now.0)),
            message: Some(message),
        });
        let excess = recent.len().saturating_sub(REMEMBERED);
        recent.drain(..excess);
        let mut patch = json!({"recentMaintenance": recent});
        if result == "Succeeded" {
            patch["lastMaintenanceTime"] = json!(Time(now.0));
        }
        Some(patch)
    }

    /// This is what is opened.
    pub fn opening(&mut self, repository: Repository) {
        if let Opened::Opening { what, .. } = &mut self.opened {
            **what = repository;
        }
    }

    /// There is no repository any more: where it was open, it is to be made again.
    pub fn vanished(&mut self) {
        if matches!(self.opened, Opened::Yes(_)) {
            self.opened = Opened::No;
        }
    }

    /// A job's agent lacks it, or is away for so long that another one does it: it is done again. Whether there was
    /// such a job.
    pub fn lost(&mut self, job: &str, now: Instant) -> bool {
        if matches!(&self.opened, Opened::Opening { run, .. } if run.job == job) {
            self.opened = Opened::No;
            return true;
        }
        let prune = self.prune.take_if(|run| run.job == job);
        if prune.as_ref().is_some_and(|run| run.away_since.is_some()) {
            self.prune_at = Some(now + PRUNE_AGAIN);
        }
        prune.is_some()
    }

    /// Jobs whose agents have been away for too long: another one opens at once, for volumes wait; a prune is given
    /// time to come back.
    pub fn overdue(&self, patience: Duration, now: Instant) -> Vec<String> {
        let opening = match &self.opened {
            Opened::Opening { run, .. } if run.away_since.is_some() => Some(run),
            _ => None,
        };
        let is_over = |run: &&Run| run.away_since.is_some_and(|since| now >= since + patience);
        let prune = self.prune.iter().filter(is_over);
        opening.into_iter().chain(prune).map(|run| run.job.clone()).collect()
    }

    /// An agent runs a prune that a controller before this one gave it.
    pub fn adopt(&mut self, job: &str, node: &str, now: Timestamp) -> bool {
        let uid = self
            .object
            .as_ref()
            .and_then(|object| object.metadata.uid.as_deref())
            .unwrap_or_default();
        let is_prune = job.strip_prefix(uid).is_some_and(|rest| rest.starts_with("-prune-"));
        if uid.is_empty() || !is_prune || self.prune.is_some() {
            return false;
        }
        let (job, node) = (job.to_owned(), Some(node.to_owned()));
        self.prune = Some(Run { job, node, began: now, away_since: None });
        true
    }

    /// How often it is pruned, where nobody says otherwise.
    fn every(&self, usual: Duration) -> Duration {
        self.object.as_ref().map_or(usual, |object| every(object, usual))
    }
}

fn failure(outcome: Option<&Outcome>) -> String {
    match outcome {
        Some(Outcome::Failure(failure)) => failure.message.clone(),
        _ => "the agent said something else than what was asked: upgrade both".to_owned(),
    }
}

/// How often a repository is pruned. Zero: never.
fn every(object: &BackupRepository, usual: Duration) -> Duration {
    duration("spec.maintenanceFrequency", &object.spec.maintenance_frequency).unwrap_or(usual)
}

/// Whether it is time to prune: so long after the last time, or after the object was made.
fn is_due(object: &BackupRepository, usual: Duration, now: Timestamp) -> bool {
    let every = every(object, usual);
    let status = object.status.as_ref();
    let last = status.and_then(|status| status.last_maintenance_time.as_ref());
    let last = last.or(object.metadata.creation_timestamp.as_ref());
    !every.is_zero() && last.is_none_or(|last| last.0.checked_add(every).is_ok_and(|at| at <= now))
}

/// The object of a location's repository.
pub fn object(location: &BackupStorageLocation, every: Duration) -> BackupRepository {
    let name = location.metadata.name.clone().unwrap_or_default();
    let label = (STORAGE_LOCATION.to_owned(), name.clone());
    BackupRepository {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: location.metadata.namespace.clone(),
            labels: (name.len() <= 63).then(|| [label].into()),
            // It goes with its location.
            owner_references: location.owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: BackupRepositorySpec {
            volume_namespace: Some(String::new()),
            backup_storage_location: name,
            repository_type: Some(TYPE.to_owned()),
            maintenance_frequency: format!("{}s", every.as_secs()),
            ..BackupRepositorySpec::default()
        },
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use proto::v1::{Credentials, Failure, Opened as Answer, Pruned};

    use super::*;

    const DAY: Duration = Duration::from_secs(86400);

    /// The same second on both clocks.
    struct Clocks(Instant);

    impl Clocks {
        fn at(&self, second: u64) -> (Timestamp, Instant) {
            (Timestamp::from_second(second as i64).unwrap(), self.0 + Duration::from_secs(second))
        }
    }

    fn usable() -> Usable {
        Usable {
            repository_exists: true,
            repository: Repository {
                url: "s3://bucket".to_owned(),
                passphrase: b"one".to_vec(),
                ..Default::default()
            },
            previous_passphrase: Vec::new(),
            secret: String::new(),
            exported: false,
            remarks: Vec::new(),
        }
    }

    fn keeper() -> Keeper {
        let mut made = object(&BackupStorageLocation::default(), DAY);
        made.metadata.creation_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        made.metadata.uid = Some("uid".to_owned());
        Keeper { object: Some(made), ..Keeper::default() }
    }

    fn run(job: &str) -> Run {
        let began = Timestamp::UNIX_EPOCH;
        Run { job: job.to_owned(), node: Some("n".to_owned()), began, away_since: None }
    }

    fn finished(job: &str, outcome: Outcome) -> Finished {
        Finished { job_id: job.to_owned(), outcome: Some(outcome), ..Default::default() }
    }

    fn failure() -> Outcome {
        Outcome::Failure(Failure { kind: 0, message: "why".to_owned() })
    }

    fn pruned() -> Outcome {
        Outcome::Pruned(Pruned::default())
    }

    #[test]
    fn a_repository_is_opened_first_and_again_when_it_is_another_one() {
        let clocks = Clocks(Instant::now());
        let mut usable = usable();
        let step = |keeper: &Keeper, usable: &Usable, now| {
            keeper.next(Some(usable), false, DAY, clocks.at(now))
        };
        assert_eq!(Keeper::default().next(None, false, DAY, clocks.at(0)), None);
        assert_eq!(step(&Keeper::default(), &usable, 0), Some(Step::Create));
        let mut keeper = keeper();
        assert_eq!(step(&keeper, &usable, 0), Some(Step::Open));
        assert_eq!(keeper.next(Some(&usable), true, DAY, clocks.at(0)), Some(Step::Trust));
        let what = Box::new(identity(&usable.repository));
        keeper.opened = Opened::Opening { run: run("o"), what: what.clone() };
        assert_eq!(step(&keeper, &usable, 0), None);
        let of_another = keeper.finished(&finished("x", failure()), DAY, clocks.at(0));
        assert_eq!(of_another, None);
        let patch = keeper.finished(&finished("o", failure()), DAY, clocks.at(0)).unwrap();
        assert_eq!((&patch["phase"], &patch["message"]), (&json!("NotReady"), &json!("why")));
        assert_eq!(step(&keeper, &usable, 29), None, "not at once");
        assert_eq!(step(&keeper, &usable, 30), Some(Step::Open));
        keeper.opened = Opened::Opening { run: run("o"), what };
        let opened = Outcome::Opened(Answer::default());
        let patch = keeper.finished(&finished("o", opened), DAY, clocks.at(0));
        assert_eq!(patch.unwrap()["phase"], "Ready");
        assert!(keeper.is_open(&usable) && step(&keeper, &usable, 0).is_none());
        usable.repository.credentials = Some(Credentials::default());
        assert!(keeper.is_open(&usable), "another access key makes no other repository");
        usable.repository.passphrase = b"two".to_vec();
        assert_eq!(step(&keeper, &usable, 0), Some(Step::Open));
    }

    #[test]
    fn prune_runs_daily_one_at_a_time_and_never_on_what_is_only_read() {
        let clocks = Clocks(Instant::now());
        let usable = usable();
        let mut keeper = keeper();
        keeper.opened = Opened::Yes(Box::new(identity(&usable.repository)));
        let day = 86400;
        let step = |keeper: &Keeper, now, read_only| {
            keeper.next(Some(&usable), read_only, DAY, clocks.at(now))
        };
        assert_eq!(step(&keeper, day - 1, false), None);
        assert_eq!(step(&keeper, day, false), Some(Step::Prune));
        assert_eq!(step(&keeper, day, true), None);
        keeper.prune = Some(run("p"));
        assert_eq!(step(&keeper, day, false), None);
        let patch = keeper.finished(&finished("p", failure()), DAY, clocks.at(day)).unwrap();
        assert_eq!(patch["recentMaintenance"][0]["result"], "Failed");
        assert_eq!(patch.get("lastMaintenanceTime"), None);
        assert_eq!(step(&keeper, day + 3599, false), None);
        assert_eq!(step(&keeper, day + 3600, false), Some(Step::Prune));
        for _ in 0..30 {
            keeper.prune = Some(run("p"));
            let patch = keeper.finished(&finished("p", pruned()), DAY, clocks.at(day)).unwrap();
            let status = serde_json::from_value(patch).unwrap();
            keeper.object.as_mut().unwrap().status = Some(status);
        }
        let status = keeper.object.as_ref().unwrap().status.as_ref().unwrap();
        assert_eq!(status.recent_maintenance.as_ref().unwrap().len(), 25);
        assert_eq!(step(&keeper, 2 * day - 1, false), None);
        assert_eq!(step(&keeper, 2 * day, false), Some(Step::Prune));
        keeper.object.as_mut().unwrap().spec.maintenance_frequency = "0s".to_owned();
        assert_eq!(step(&keeper, 9 * day, false), None, "never");
    }

    #[test]
    fn what_was_pruned_is_not_pruned_again_at_once_though_its_object_does_not_tell() {
        let clocks = Clocks(Instant::now());
        let usable = usable();
        let mut keeper = keeper();
        keeper.opened = Opened::Yes(Box::new(identity(&usable.repository)));
        keeper.prune = Some(run("p"));
        let _refused = keeper.finished(&finished("p", pruned()), DAY, clocks.at(86400)).unwrap();
        let step = |now| keeper.next(Some(&usable), false, DAY, clocks.at(now));
        assert_eq!(step(86401), None);
        assert_eq!(step(2 * 86400), Some(Step::Prune));
    }

    #[test]
    fn what_a_lost_agent_was_at_is_done_by_another_one() {
        let clocks = Clocks(Instant::now());
        let (mut keeper, patience) = (keeper(), Duration::from_secs(600));
        let what = Box::new(Repository::default());
        keeper.opened = Opened::Opening { run: run("o"), what };
        keeper.prune = Some(run("p"));
        let begun = clocks.at(0).1;
        assert!(keeper.overdue(patience, begun).is_empty());
        for job in ["o", "p"] {
            keeper.run_mut(job).unwrap().away_since = Some(begun);
        }
        assert_eq!(keeper.overdue(patience, begun), ["o"], "volumes wait for it");
        assert!(keeper.lost("o", begun) && keeper.opened == Opened::No);
        assert!(keeper.overdue(patience, clocks.at(599).1).is_empty(), "it may come back");
        assert_eq!(keeper.overdue(patience, clocks.at(600).1), ["p"]);
        assert!(keeper.lost("p", clocks.at(600).1) && !keeper.lost("p", begun));
        assert!(keeper.prune_at.is_some(), "not at once");
    }

    #[test]
    fn a_prune_of_an_earlier_controller_goes_on() {
        let mut keeper = keeper();
        let now = Timestamp::UNIX_EPOCH;
        for other in ["uid-open-1", "other-prune-1", "uid"] {
            assert!(!keeper.adopt(other, "n", now), "{other}");
        }
        assert!(keeper.adopt("uid-prune-1", "n", now));
        assert!(!keeper.adopt("uid-prune-2", "n", now), "one at a time");
    }
}
