//! What is counted for Prometheus, with the labels that the controller uses too.

use std::sync::atomic::{AtomicI64, AtomicU64};

use objects::{Kind, Traffic};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use proto::v1::finished::Outcome;
use proto::v1::job::Work;
use proto::v1::{FailureKind, Finished};

/// A job that has ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    kind: &'static str,
    outcome: &'static str,
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByFailure {
    kind: String,
}

/// A request to a store.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    kind: &'static str,
}

/// All counters of an agent.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    pub(super) connected: Gauge<i64, AtomicI64>,
    pub(super) connections: Counter<u64, AtomicU64>,
    pub(super) running: Gauge<i64, AtomicI64>,
    pub(super) waiting: Gauge<i64, AtomicI64>,
    ended: Family<Ended, Counter>,
    failures: Family<ByFailure, Counter>,
    warnings: Counter<u64, AtomicU64>,
    files_missing: Counter<u64, AtomicU64>,
    files_changed: Counter<u64, AtomicU64>,
    files_vanished: Counter<u64, AtomicU64>,
    bytes_saved: Counter<u64, AtomicU64>,
    bytes_read: Counter<u64, AtomicU64>,
    bytes_stored: Counter<u64, AtomicU64>,
    dedup_ratio: Gauge<f64, AtomicU64>,
    bytes_restored: Counter<u64, AtomicU64>,
    requests: Family<Request, Counter>,
    sent: Counter<u64, AtomicU64>,
    received: Counter<u64, AtomicU64>,
}

impl Metrics {
    /// Nothing has happened yet, within `memory_bytes` for `capacity` jobs.
    pub(super) fn new(memory_bytes: u64, capacity: usize) -> Self {
        let mut new = Self {
            registry: Registry::with_prefix("ebackup_agent"),
            connected: Gauge::default(),
            connections: Counter::default(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            ended: Family::default(),
            failures: Family::default(),
            warnings: Counter::default(),
            files_missing: Counter::default(),
            files_changed: Counter::default(),
            files_vanished: Counter::default(),
            bytes_saved: Counter::default(),
            bytes_read: Counter::default(),
            bytes_stored: Counter::default(),
            dedup_ratio: Gauge::default(),
            bytes_restored: Counter::default(),
            requests: Family::default(),
            sent: Counter::default(),
            received: Counter::default(),
        };
        let all = &mut new.registry;
        all.register(
            "connected",
            "Whether there is a stream to the controller",
            new.connected.clone(),
        );
        all.register("connections", "Streams to the controller so far", new.connections.clone());
        all.register("jobs_running", "Jobs that run", new.running.clone());
        all.register("jobs_waiting", "Jobs that wait for room", new.waiting.clone());
        all.register("jobs_ended", "Jobs that ended, by outcome", new.ended.clone());
        all.register("failures", "Failed jobs, by what failed", new.failures.clone());
        all.register("warnings", "Warnings of jobs that ended", new.warnings.clone());
        let mut files = |name: &str, help: &str, counter: &Counter| {
            all.register(name, help, counter.clone());
        };
        files("files_missing", "Files that backups could not read to the end", &new.files_missing);
        files("files_changed", "Files that changed while they were saved", &new.files_changed);
        files("files_vanished", "Files that vanished before they were saved", &new.files_vanished);
        all.register("store_requests", "Requests to stores", new.requests.clone());
        let mut bytes = |name: &str, help: &str, counter: &Counter| {
            all.register_with_unit(name, help, Unit::Bytes, counter.clone());
        };
        bytes("saved", "Bytes of saved volumes", &new.bytes_saved);
        bytes("read", "Bytes of them that had to be read", &new.bytes_read);
        bytes("stored", "Bytes added to repositories", &new.bytes_stored);
        bytes("restored", "Bytes written to volumes", &new.bytes_restored);
        bytes("store_sent", "Bytes sent to stores", &new.sent);
        bytes("store_received", "Bytes received from stores", &new.received);
        let ratio = new.dedup_ratio.clone();
        ratio.set(f64::NAN);
        all.register("dedup_ratio", "Bytes saved for each byte stored, since the start", ratio);
        let budget = Gauge::<i64, AtomicI64>::default();
        budget.set(i64::try_from(memory_bytes).unwrap_or(i64::MAX));
        let help = "Memory that all jobs share";
        all.register_with_unit("memory_budget", help, Unit::Bytes, budget);
        let most = Gauge::<i64, AtomicI64>::default();
        most.set(i64::try_from(capacity).unwrap_or(i64::MAX));
        all.register("jobs_at_once", "Jobs that this memory is enough for", most);
        new
    }

    /// A job has ended.
    pub(super) fn ended(&self, work: Option<&Work>, finished: &Finished) {
        let outcome = match &finished.outcome {
            Some(Outcome::Failure(failure)) if failure.kind() == FailureKind::Cancelled => {
                "Canceled"
            }
            Some(Outcome::Failure(failure)) => {
                let kind = format!("{:?}", failure.kind());
                self.failures.get_or_create(&ByFailure { kind }).inc();
                "Failed"
            }
            _ => "Completed",
        };
        let kind = match work {
            Some(Work::Backup(_)) => "Backup",
            Some(Work::Restore(_)) => "Restore",
            Some(Work::Open(_)) => "Open",
            Some(Work::Forget(_)) => "Forget",
            Some(Work::Prune(_)) => "Prune",
            Some(Work::Check(_)) => "Check",
            None => "Unknown",
        };
        self.ended.get_or_create(&Ended { kind, outcome }).inc();
        self.warnings.inc_by(finished.warnings);
        if let Some(Work::Backup(_)) = work {
            self.files_missing.inc_by(finished.missing);
            self.files_changed.inc_by(finished.changed);
            self.files_vanished.inc_by(finished.vanished);
        }
        match &finished.outcome {
            Some(Outcome::Saved(saved)) => {
                self.bytes_saved.inc_by(saved.bytes);
                self.bytes_read.inc_by(saved.bytes_read);
                self.bytes_stored.inc_by(saved.bytes_stored);
                let stored = self.bytes_stored.get();
                if stored > 0 {
                    self.dedup_ratio.set(self.bytes_saved.get() as f64 / stored as f64);
                }
            }
            Some(Outcome::Restored(restored)) => {
                self.bytes_restored.inc_by(restored.bytes_written);
            }
            _ => {}
        }
    }

    /// What the store of a job that ended has sent and received.
    pub(super) fn traffic(&self, traffic: Traffic) {
        for (kind, name) in [
            (Kind::Write, "write"),
            (Kind::Read, "read"),
            (Kind::Stat, "stat"),
            (Kind::List, "list"),
            (Kind::Delete, "delete"),
        ] {
            let counter = self.requests.get_or_create(&Request { kind: name });
            counter.inc_by(traffic.of(kind));
        }
        self.sent.inc_by(traffic.bytes_sent);
        self.received.inc_by(traffic.bytes_received);
    }

    /// All of it, as Prometheus reads it.
    ///
    /// # Errors
    /// Those of formatting.
    pub(super) fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::v1::{Backup, Failure, Saved};

    #[test]
    fn jobs_are_counted_by_what_became_of_them() {
        let metrics = Metrics::new(96 << 20, 1);
        assert!(metrics.text().unwrap().contains("ebackup_agent_dedup_ratio NaN"));
        let saved = Saved { bytes: 100, bytes_stored: 10, ..Default::default() };
        let work = Work::Backup(Backup::default());
        let done = Finished {
            outcome: Some(Outcome::Saved(saved)),
            warnings: 6,
            missing: 1,
            changed: 2,
            vanished: 3,
            ..Default::default()
        };
        let failure = Failure { kind: FailureKind::Stalled.into(), message: String::new() };
        let failed = Finished { outcome: Some(Outcome::Failure(failure)), ..Default::default() };
        metrics.ended(Some(&work), &done);
        metrics.ended(Some(&work), &done);
        metrics.ended(Some(&work), &failed);
        metrics.traffic(Traffic { requests: [5, 0, 0, 0, 0], bytes_sent: 7, ..Default::default() });
        let text = metrics.text().unwrap();
        for line in [
            r#"ebackup_agent_jobs_ended_total{kind="Backup",outcome="Completed"} 2"#,
            r#"ebackup_agent_jobs_ended_total{kind="Backup",outcome="Failed"} 1"#,
            r#"ebackup_agent_failures_total{kind="Stalled"} 1"#,
            "ebackup_agent_memory_budget_bytes 100663296",
            "ebackup_agent_saved_bytes_total 200",
            "ebackup_agent_dedup_ratio 10.0",
            "ebackup_agent_warnings_total 12",
            "ebackup_agent_files_missing_total 2",
            "ebackup_agent_files_changed_total 4",
            "ebackup_agent_files_vanished_total 6",
            r#"ebackup_agent_store_requests_total{kind="write"} 5"#,
            "ebackup_agent_store_sent_bytes_total 7",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
