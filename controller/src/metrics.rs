//! All that the controller counts, as `/metrics` shows it.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use proto::v1::{FailureKind, Finished};

/// Why a connection or a stream was refused or ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Reason {
    /// Too many connections that prove nothing.
    Crowded,
    /// No TLS, or not in time.
    Handshake,
    /// No token, or none that is valid.
    Unauthenticated,
    /// A valid token, but not an agent's or of another node.
    NotAnAgent,
    /// Too many agents were being identified.
    Busy,
    /// The API server could not be asked.
    Unavailable,
    /// The first message was no Hello, or late.
    NoHello,
}

/// A kind of job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum JobKind {
    /// Saves a volume.
    Backup,
    /// Puts a snapshot into a volume.
    Restore,
    /// Opens or makes a repository.
    Open,
    /// Forgets snapshots.
    Forget,
    /// Deletes what is not needed.
    Prune,
    /// Verifies a repository.
    Check,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Outcome {
    /// As it should.
    Completed,
    /// It did not do what it should.
    Failed,
    /// Somebody ended it.
    Canceled,
}

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Stage {
    /// It waits for its turn.
    Waiting,
    /// An agent has it.
    Running,
}

/// Label of what is counted by reason.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByReason {
    /// Why.
    pub reason: Reason,
}

/// Labels of jobs that ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Ended {
    /// What they did.
    pub kind: JobKind,
    /// What came of it.
    pub outcome: Outcome,
}

/// Labels of jobs that did not end.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Pending {
    /// What they do.
    pub kind: JobKind,
    /// Where they are.
    pub stage: Stage,
}

/// Label of failures: the protocol's `FailureKind`, as `StoreDenied`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByFailure {
    /// Why.
    pub kind: String,
}

/// Label of what belongs to a location.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ByLocation {
    /// Name of the BackupStorageLocation.
    pub location: String,
}

/// The counters. Names begin with `ebackup_`; sizes are in bytes.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// 1 when this controller is the leader.
    pub leader: Gauge,
    /// Streams of agents now.
    pub agents_connected: Gauge,
    /// Streams that an agent was let in by.
    pub streams: Counter,
    /// Connections and streams refused.
    pub refused: Family<ByReason, Counter>,
    /// Jobs that wait or run now.
    pub jobs: Family<Pending, Gauge>,
    /// Jobs that ended.
    pub jobs_ended: Family<Ended, Counter>,
    /// Failures of jobs by what failed.
    pub failures: Family<ByFailure, Counter>,
    /// Bytes of the volumes that were saved.
    pub saved: Counter,
    /// Bytes of them that had to be read.
    pub read: Counter,
    /// Bytes that backups added to repositories.
    pub stored: Counter,
    /// How many bytes were saved for each that was stored, since the start; none at first.
    pub dedup_ratio: Gauge<f64, AtomicU64>,
    /// Bytes that restores wrote.
    pub restored: Counter,
    /// Files that backups could not read to their end.
    pub files_missing: Counter,
    /// Files that changed while they were saved.
    pub files_changed: Counter,
    /// Files that vanished before they were saved.
    pub files_vanished: Counter,
    /// Locations: 1 when available, else 0.
    pub location_available: Family<ByLocation, Gauge>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("ebackup"),
            leader: Gauge::default(),
            agents_connected: Gauge::default(),
            streams: Counter::default(),
            refused: Family::default(),
            jobs: Family::default(),
            jobs_ended: Family::default(),
            failures: Family::default(),
            saved: Counter::default(),
            read: Counter::default(),
            stored: Counter::default(),
            dedup_ratio: Gauge::default(),
            restored: Counter::default(),
            files_missing: Counter::default(),
            files_changed: Counter::default(),
            files_vanished: Counter::default(),
            location_available: Family::default(),
        };
        metrics.dedup_ratio.set(f64::NAN);
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let all = &mut self.registry;
        all.register("leader", "Whether this controller is the leader", self.leader.clone());
        let agents = self.agents_connected.clone();
        all.register("agents_connected", "Streams of agents now", agents);
        all.register("streams", "Streams that agents were let in by", self.streams.clone());
        all.register("refused", "Connections and streams refused, by reason", self.refused.clone());
        all.register("jobs", "Jobs that wait or run now", self.jobs.clone());
        all.register("jobs_ended", "Jobs that ended, by outcome", self.jobs_ended.clone());
        all.register("failures", "Failed jobs, by what failed", self.failures.clone());
        let mut bytes = |name: &str, help: &str, counter: &Counter| {
            all.register_with_unit(name, help, Unit::Bytes, counter.clone());
        };
        bytes("saved", "Bytes of saved volumes", &self.saved);
        bytes("read", "Bytes of them that had to be read", &self.read);
        bytes("stored", "Bytes that backups added to repositories", &self.stored);
        bytes("restored", "Bytes written to volumes", &self.restored);
        let mut files = |name: &str, help: &str, counter: &Counter| {
            all.register(name, help, counter.clone());
        };
        files("files_missing", "Files that backups could not read to the end", &self.files_missing);
        files("files_changed", "Files that changed while they were saved", &self.files_changed);
        files("files_vanished", "Files that vanished before they were saved", &self.files_vanished);
        let ratio = self.dedup_ratio.clone();
        all.register("dedup_ratio", "Bytes saved for each byte stored, since the start", ratio);
        let available = self.location_available.clone();
        all.register("location_available", "Whether a location is available", available);
    }

    /// Counts a refusal.
    pub fn refuse(&self, reason: Reason) {
        self.refused.get_or_create(&ByReason { reason }).inc();
    }

    /// Counts a job that ended.
    pub fn end(&self, kind: JobKind, outcome: Outcome) {
        self.jobs_ended.get_or_create(&Ended { kind, outcome }).inc();
    }

    /// Counts what came of a job.
    pub fn finished(&self, kind: JobKind, finished: &Finished) {
        use proto::v1::finished::Outcome as Said;
        let outcome = match &finished.outcome {
            Some(Said::Failure(failure)) if failure.kind() == FailureKind::Cancelled => {
                Outcome::Canceled
            }
            Some(Said::Failure(failure)) => {
                self.fail(failure.kind());
                Outcome::Failed
            }
            None => Outcome::Failed,
            Some(Said::Saved(saved)) => {
                self.saved.inc_by(saved.bytes);
                self.read.inc_by(saved.bytes_read);
                self.stored.inc_by(saved.bytes_stored);
                if self.stored.get() > 0 {
                    self.dedup_ratio.set(self.saved.get() as f64 / self.stored.get() as f64);
                }
                self.files_missing.inc_by(finished.missing);
                self.files_changed.inc_by(finished.changed);
                self.files_vanished.inc_by(finished.vanished);
                // What lacks files is not done.
                if finished.missing > 0 { Outcome::Failed } else { Outcome::Completed }
            }
            Some(Said::Restored(restored)) => {
                self.restored.inc_by(restored.bytes_written);
                Outcome::Completed
            }
            Some(_) => Outcome::Completed,
        };
        self.end(kind, outcome);
    }

    /// Counts why a job failed.
    pub fn fail(&self, kind: FailureKind) {
        // Written as the other labels are.
        let kind = format!("{kind:?}");
        self.failures.get_or_create(&ByFailure { kind }).inc();
    }

    /// Sets how many jobs of a kind wait or run.
    pub fn pending(&self, kind: JobKind, stage: Stage, jobs: usize) {
        let jobs = i64::try_from(jobs).unwrap_or(i64::MAX);
        self.jobs.get_or_create(&Pending { kind, stage }).set(jobs);
    }

    /// Sets whether a location is available.
    pub fn location(&self, name: &str, is_available: bool) {
        let label = ByLocation { location: name.to_owned() };
        self.location_available.get_or_create(&label).set(i64::from(is_available));
    }

    /// Forgets a location that was deleted.
    pub fn forget_location(&self, name: &str) {
        self.location_available.remove(&ByLocation { location: name.to_owned() });
    }

    /// The text that `/metrics` answers with.
    ///
    /// # Errors
    /// When a metric cannot be written as text.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_shown() {
        let metrics = Metrics::default();
        metrics.streams.inc();
        metrics.agents_connected.set(2);
        metrics.refuse(Reason::NotAnAgent);
        metrics.fail(FailureKind::StoreDenied);
        metrics.pending(JobKind::Restore, Stage::Waiting, 3);
        for (bytes, bytes_stored, ratio) in [(60, 0, "NaN"), (100, 40, "4.0")] {
            let saved = proto::v1::Saved { bytes, bytes_stored, ..Default::default() };
            let outcome = proto::v1::finished::Outcome::Saved(saved);
            let finished = Finished { outcome: Some(outcome), ..Default::default() };
            metrics.finished(JobKind::Backup, &finished);
            let line = format!("ebackup_dedup_ratio {ratio}\n");
            assert!(metrics.text().unwrap().contains(&line), "{line}");
        }
        let saved = proto::v1::finished::Outcome::Saved(proto::v1::Saved::default());
        let incomplete = Finished {
            outcome: Some(saved),
            missing: 1,
            changed: 2,
            vanished: 3,
            ..Default::default()
        };
        metrics.finished(JobKind::Backup, &incomplete);
        metrics.location("default", true);
        metrics.location("gone", false);
        metrics.forget_location("gone");
        let text = metrics.text().unwrap();
        let lines = [
            "ebackup_streams_total 1",
            "ebackup_agents_connected 2",
            "ebackup_refused_total{reason=\"NotAnAgent\"} 1",
            "ebackup_jobs_ended_total{kind=\"Backup\",outcome=\"Completed\"} 2",
            "ebackup_jobs_ended_total{kind=\"Backup\",outcome=\"Failed\"} 1",
            "ebackup_files_missing_total 1",
            "ebackup_files_changed_total 2",
            "ebackup_files_vanished_total 3",
            "ebackup_failures_total{kind=\"StoreDenied\"} 1",
            "ebackup_jobs{kind=\"Restore\",stage=\"Waiting\"} 3",
            "ebackup_saved_bytes_total 160",
            "ebackup_stored_bytes_total 40",
            "ebackup_location_available{location=\"default\"} 1",
            "ebackup_leader 0",
        ];
        for line in lines {
            assert!(text.lines().any(|found| found == line), "'{line}' is missing in:\n{text}");
        }
        assert!(!text.contains("gone"), "{text}");
    }
}
