//! The repository of a location: opened by an agent before anything uses it, pruned regularly, and reported in
//! its `BackupRepository`. Pure decisions; `dispatch` carries them out.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::Resource;
use proto::v1::{Finished, Prune, Repository, finished::Outcome};
use serde_json::{Value, json};

use crate::api::common::duration;
use crate::api::repository::Maintenance;
use crate::api::{
    BackupRepository, BackupRepositorySpec, BackupStorageLocation, STORAGE_LOCATION, Timestamp,
};
use crate::location::check::Usable;

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
    pub open_at: Option<Timestamp>,
    /// Not before this time is pruning tried again.
    pub prune_at: Option<Timestamp>,
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
    /// The node that it runs on.
    pub node: String,
    /// When it was assigned.
    pub began: Timestamp,
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

    /// What to do now.
    pub fn next(
        &self,
        usable: Option<&Usable>,
        read_only: bool,
        every: Duration,
        now: Timestamp,
    ) -> Option<Step> {
        let usable = usable?;
        if self.writing {
            return None;
        }
        let Some(object) = &self.object else {
            return Some(Step::Create);
        };
        if !self.is_open(usable) {
            let due = self.open_at.is_none_or(|at| at <= now);
            return match &self.opened {
                Opened::Opening { .. } => None,
                _ if read_only => Some(Step::Trust),
                _ => due.then_some(Step::Open),
            };
        }
        let may = !read_only && self.prune.is_none() && self.prune_at.is_none_or(|at| at <= now);
        (may && is_due(object, every, now)).then_some(Step::Prune)
    }

    /// Notes what came of a job. Returns the new status as a merge patch, or nothing when it is not one of its own.
    pub fn finished(&mut self, finished: &Finished, now: Timestamp) -> Option<Value> {
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
                    self.open_at = now.checked_add(OPEN_AGAIN).ok();
                    self.failed = Some(failure(outcome.as_ref()));
                    json!({"phase": "NotReady", "message": failure(outcome.as_ref())})
                }
            });
        }
        if self.prune.as_ref().is_none_or(|run| run.job != finished.job_id) {
            return None;
        }
        let run = self.prune.take()?;
        let (result, message) = match &finished.outcome {
            Some(Outcome::Pruned(done)) => (
                "Succeeded",
                format!(
                    "deleted {} packs ({} bytes), rewrote {} bytes, {} packs wait",
                    done.packs_deleted, done.bytes_deleted, done.bytes_repacked, done.packs_waiting
                ),
            ),
            outcome => {
                self.prune_at = now.checked_add(PRUNE_AGAIN).ok();
                ("Failed", failure(outcome.as_ref()))
            }
        };
        let status = self.object.as_ref().and_then(|object| object.status.clone());
        let mut recent = status.and_then(|status| status.recent_maintenance).unwrap_or_default();
        recent.push(Maintenance {
            result: Some(result.to_owned()),
            start_timestamp: Some(Time(run.began)),
            complete_timestamp: Some(Time(now)),
            message: Some(message),
        });
        let excess = recent.len().saturating_sub(REMEMBERED);
        recent.drain(..excess);
        let mut patch = json!({"recentMaintenance": recent});
        if result == "Succeeded" {
            patch["lastMaintenanceTime"] = json!(Time(now));
        }
        Some(patch)
    }

    /// There is no repository any more: where it was open, it is to be made again.
    pub fn vanished(&mut self) {
        if matches!(self.opened, Opened::Yes(_)) {
            self.opened = Opened::No;
        }
    }

    /// The agent of a node is away: what it was opening is opened by another one.
    pub fn lost(&mut self, node: &str) {
        if matches!(&self.opened, Opened::Opening { run, .. } if run.node == node) {
            self.opened = Opened::No;
        }
    }

    /// The agent of a node will not come back: what it was pruning is pruned again later.
    pub fn gone(&mut self, node: &str) {
        if let Some(run) = self.prune.take_if(|run| run.node == node) {
            self.prune_at = run.began.checked_add(PRUNE_AGAIN).ok();
        }
    }

    /// The agent of a node is back, and has only the jobs for which `has` holds.
    pub fn connected(&mut self, node: &str, has: impl Fn(&str) -> bool) {
        let gone = |run: &Run| run.node == node && !has(&run.job);
        if matches!(&self.opened, Opened::Opening { run, .. } if gone(run)) {
            self.opened = Opened::No;
        }
        if self.prune.as_ref().is_some_and(gone) {
            self.prune = None;
        }
    }
}

fn failure(outcome: Option<&Outcome>) -> String {
    match outcome {
        Some(Outcome::Failure(failure)) => failure.message.clone(),
        _ => "the agent said something else than what was asked: upgrade both".to_owned(),
    }
}

/// Whether it is time to prune: so long after the last time, or after the object was made.
fn is_due(object: &BackupRepository, every: Duration, now: Timestamp) -> bool {
    let every =
        duration("spec.maintenanceFrequency", &object.spec.maintenance_frequency).unwrap_or(every);
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

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
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
        made.metadata.creation_timestamp = Some(Time(at(0)));
        Keeper { object: Some(made), ..Keeper::default() }
    }

    fn run(job: &str) -> Run {
        Run { job: job.to_owned(), node: "n".to_owned(), began: at(1) }
    }

    fn finished(job: &str, outcome: Outcome) -> Finished {
        Finished { job_id: job.to_owned(), outcome: Some(outcome), ..Default::default() }
    }

    fn failure() -> Outcome {
        Outcome::Failure(Failure { kind: 0, message: "why".to_owned() })
    }

    #[test]
    fn a_repository_is_opened_first_and_again_when_it_is_another_one() {
        let mut usable = usable();
        let step =
            |keeper: &Keeper, usable: &Usable, now| keeper.next(Some(usable), false, DAY, at(now));
        assert_eq!(Keeper::default().next(None, false, DAY, at(0)), None);
        assert_eq!(step(&Keeper::default(), &usable, 0), Some(Step::Create));
        let mut keeper = keeper();
        assert_eq!(step(&keeper, &usable, 0), Some(Step::Open));
        assert_eq!(keeper.next(Some(&usable), true, DAY, at(0)), Some(Step::Trust));
        let what = Box::new(identity(&usable.repository));
        keeper.opened = Opened::Opening { run: run("o"), what: what.clone() };
        assert_eq!(step(&keeper, &usable, 0), None);
        assert_eq!(keeper.finished(&finished("x", failure()), at(0)), None, "of somebody else");
        let patch = keeper.finished(&finished("o", failure()), at(0)).unwrap();
        assert_eq!((&patch["phase"], &patch["message"]), (&json!("NotReady"), &json!("why")));
        assert_eq!(step(&keeper, &usable, 29), None, "not at once");
        assert_eq!(step(&keeper, &usable, 30), Some(Step::Open));
        keeper.opened = Opened::Opening { run: run("o"), what };
        let patch = keeper.finished(&finished("o", Outcome::Opened(Answer::default())), at(0));
        assert_eq!(patch.unwrap()["phase"], "Ready");
        assert!(keeper.is_open(&usable) && step(&keeper, &usable, 0).is_none());
        usable.repository.credentials = Some(Credentials::default());
        assert!(keeper.is_open(&usable), "another access key makes no other repository");
        usable.repository.passphrase = b"two".to_vec();
        assert_eq!(step(&keeper, &usable, 0), Some(Step::Open));
    }

    #[test]
    fn prune_runs_daily_one_at_a_time_and_never_on_what_is_only_read() {
        let usable = usable();
        let mut keeper = keeper();
        keeper.opened = Opened::Yes(Box::new(identity(&usable.repository)));
        let day = 86400;
        let step =
            |keeper: &Keeper, now, read_only| keeper.next(Some(&usable), read_only, DAY, at(now));
        assert_eq!(step(&keeper, day - 1, false), None);
        assert_eq!(step(&keeper, day, false), Some(Step::Prune));
        assert_eq!(step(&keeper, day, true), None);
        keeper.prune = Some(run("p"));
        assert_eq!(step(&keeper, day, false), None);
        let patch = keeper.finished(&finished("p", failure()), at(day)).unwrap();
        assert_eq!(patch["recentMaintenance"][0]["result"], "Failed");
        assert_eq!(patch.get("lastMaintenanceTime"), None);
        assert_eq!(step(&keeper, day + 3599, false), None);
        assert_eq!(step(&keeper, day + 3600, false), Some(Step::Prune));
        for _ in 0..30 {
            keeper.prune = Some(run("p"));
            let done = finished("p", Outcome::Pruned(Pruned::default()));
            let patch = keeper.finished(&done, at(day)).unwrap();
            let status = serde_json::from_value(patch).unwrap();
            keeper.object.as_mut().unwrap().status = Some(status);
        }
        let status = keeper.object.as_ref().unwrap().status.as_ref().unwrap();
        assert_eq!(status.recent_maintenance.as_ref().unwrap().len(), 25);
        keeper.prune_at = None;
        assert_eq!(step(&keeper, 2 * day - 1, false), None);
        assert_eq!(step(&keeper, 2 * day, false), Some(Step::Prune));
        keeper.object.as_mut().unwrap().spec.maintenance_frequency = "0s".to_owned();
        assert_eq!(step(&keeper, 9 * day, false), None, "never");
    }

    #[test]
    fn what_a_lost_agent_was_at_is_done_by_another_one() {
        let mut keeper = keeper();
        let what = Box::new(Repository::default());
        let opening = Opened::Opening { run: run("o"), what };
        keeper.opened = opening.clone();
        keeper.lost("other");
        assert_eq!(keeper.opened, opening);
        keeper.prune = Some(run("p"));
        keeper.lost("n");
        assert_eq!(keeper.opened, Opened::No);
        keeper.connected("n", |job| job == "p");
        assert!(keeper.prune.is_some(), "it goes on");
        keeper.connected("n", |_| false);
        assert!(keeper.prune.is_none());
        keeper.prune = Some(run("p"));
        keeper.gone("other");
        assert!(keeper.prune.is_some());
        keeper.gone("n");
        assert!(keeper.prune.is_none(), "another one may");
    }
}
