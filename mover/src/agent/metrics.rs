//! What is counted for Prometheus.

use std::sync::atomic::{AtomicI64, AtomicU64};

use objects::{Kind, Traffic};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use proto::v1::finished::Outcome;
use proto::v1::job::Work;
use proto::v1::{Failure, Finished};

/// A job that has ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    work: &'static str,
    outcome: &'static str,
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
    warnings: Counter<u64, AtomicU64>,
    bytes_saved: Counter<u64, AtomicU64>,
    bytes_stored: Counter<u64, AtomicU64>,
    bytes_restored: Counter<u64, AtomicU64>,
    requests: Family<Request, Counter>,
    sent: Counter<u64, AtomicU64>,
    received: Counter<u64, AtomicU64>,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let mut new = Self {
            registry: Registry::with_prefix("ebackup_agent"),
            connected: Gauge::default(),
            connections: Counter::default(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            ended: Family::default(),
            warnings: Counter::default(),
            bytes_saved: Counter::default(),
            bytes_stored: Counter::default(),
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
        all.register("jobs", "Jobs that ended", new.ended.clone());
        all.register("warnings", "Warnings of jobs that ended", new.warnings.clone());
        all.register("saved_bytes", "Bytes of saved volumes", new.bytes_saved.clone());
        all.register("stored_bytes", "Bytes added to repositories", new.bytes_stored.clone());
        all.register("restored_bytes", "Bytes written to volumes", new.bytes_restored.clone());
        all.register("store_requests", "Requests to stores", new.requests.clone());
        all.register("store_sent_bytes", "Bytes sent to stores", new.sent.clone());
        all.register("store_received_bytes", "Bytes received from stores", new.received.clone());
        new
    }

    /// A job has ended.
    pub(super) fn ended(&self, work: Option<&Work>, finished: &Finished) {
        let outcome = match &finished.outcome {
            Some(Outcome::Failure(failure)) => name_of(failure),
            _ => "done",
        };
        let work = match work {
            Some(Work::Backup(_)) => "backup",
            Some(Work::Restore(_)) => "restore",
            Some(Work::Open(_)) => "open",
            Some(Work::Forget(_)) => "forget",
            Some(Work::Prune(_)) => "prune",
            Some(Work::Check(_)) => "check",
            None => "unknown",
        };
        self.ended.get_or_create(&Ended { work, outcome }).inc();
        self.warnings.inc_by(finished.warnings);
        match &finished.outcome {
            Some(Outcome::Saved(saved)) => {
                self.bytes_saved.inc_by(saved.bytes);
                self.bytes_stored.inc_by(saved.bytes_stored);
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

/// Name of the kind of a failure, as a label.
pub(super) fn name_of(failure: &Failure) -> &'static str {
    failure.kind().as_str_name().trim_start_matches("FAILURE_KIND_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::v1::{Backup, FailureKind, Saved};

    #[test]
    fn jobs_are_counted_by_what_became_of_them() {
        let metrics = Metrics::new();
        let saved = Saved { bytes: 100, bytes_stored: 10, ..Default::default() };
        let work = Work::Backup(Backup::default());
        let done =
            Finished { outcome: Some(Outcome::Saved(saved)), warnings: 3, ..Default::default() };
        let failure = Failure { kind: FailureKind::Stalled.into(), message: String::new() };
        let failed = Finished { outcome: Some(Outcome::Failure(failure)), ..Default::default() };
        metrics.ended(Some(&work), &done);
        metrics.ended(Some(&work), &done);
        metrics.ended(Some(&work), &failed);
        metrics.traffic(Traffic { requests: [5, 0, 0, 0, 0], bytes_sent: 7, ..Default::default() });
        let text = metrics.text().unwrap();
        for line in [
            r#"ebackup_agent_jobs_total{work="backup",outcome="done"} 2"#,
            r#"ebackup_agent_jobs_total{work="backup",outcome="STALLED"} 1"#,
            "ebackup_agent_saved_bytes_total 200",
            "ebackup_agent_warnings_total 6",
            r#"ebackup_agent_store_requests_total{kind="write"} 5"#,
            "ebackup_agent_store_sent_bytes_total 7",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
