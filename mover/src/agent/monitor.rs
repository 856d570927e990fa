//! Following a job: how far it is, what it warns of, whether it should end, and whether it gets on.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chunkstore::record::Summary;
use objects::{Kind, Traffic};

use super::failure::shorten;
use crate::monitor::{Concern, Monitor, Warning};

/// Warnings that are told in full, and bytes of each.
const FIRST_WARNINGS: usize = 20;
const WARNING_BYTES_MAX: usize = 500;

/// Why a job is to end before it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Ending {
    /// The controller says so.
    Cancelled = 1,
    /// It does not get on.
    Stalled = 2,
    /// The agent itself ends.
    Shutdown = 3,
}

/// What a job tells about itself, from any thread.
#[derive(Debug)]
pub(super) struct JobMonitor {
    entries: AtomicU64,
    bytes: AtomicU64,
    total: AtomicU64,
    warnings: AtomicU64,
    missing: AtomicU64,
    first: Mutex<Vec<String>>,
    first_missing: Mutex<Option<String>>,
    ending: AtomicU8,
    /// Where warnings are logged.
    span: tracing::Span,
}

/// How far a job is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Far {
    pub(super) entries: u64,
    pub(super) bytes: u64,
    pub(super) total: u64,
}

impl JobMonitor {
    pub(super) fn new(span: tracing::Span) -> Self {
        Self {
            entries: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            total: AtomicU64::new(0),
            warnings: AtomicU64::new(0),
            missing: AtomicU64::new(0),
            first: Mutex::default(),
            first_missing: Mutex::default(),
            ending: AtomicU8::new(0),
            span,
        }
    }

    pub(super) fn span(&self) -> &tracing::Span {
        &self.span
    }

    /// Sets the bytes expected in all.
    pub(super) fn expect(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn far(&self) -> Far {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Far { entries: load(&self.entries), bytes: load(&self.bytes), total: load(&self.total) }
    }

    /// Has the job end as soon as possible. The first reason counts.
    pub(super) fn end(&self, ending: Ending) {
        let order = Ordering::SeqCst;
        // If there is a reason already, it stays.
        let _first = self.ending.compare_exchange(0, ending as u8, order, order);
    }

    /// Why it is to end, if it is.
    pub(super) fn ending(&self) -> Option<Ending> {
        match self.ending.load(Ordering::SeqCst) {
            1 => Some(Ending::Cancelled),
            2 => Some(Ending::Stalled),
            3 => Some(Ending::Shutdown),
            _ => None,
        }
    }

    /// Counts what a backup that was done before had counted.
    pub(super) fn recall(&self, summary: &Summary) {
        self.warnings.store(summary.warnings, Ordering::Relaxed);
        self.missing.store(summary.files_missing, Ordering::Relaxed);
    }

    /// The first warning of a file that is missing altogether.
    pub(super) fn first_missing(&self) -> String {
        lock(&self.first_missing).clone().unwrap_or_default()
    }

    /// Warnings so far, how many of them are files missing altogether, and the first of them.
    pub(super) fn warnings(&self) -> (u64, u64, Vec<String>) {
        let first = lock(&self.first).clone();
        (self.warnings.load(Ordering::Relaxed), self.missing.load(Ordering::Relaxed), first)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Monitor for JobMonitor {
    fn begin(&self, _: &[u8]) {}

    fn advance(&self, entries: u64, bytes: u64) {
        self.entries.fetch_add(entries, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn warning(&self, warning: Warning) {
        self.warnings.fetch_add(1, Ordering::Relaxed);
        if warning.concern == Concern::Missing {
            self.missing.fetch_add(1, Ordering::Relaxed);
            let mut first = lock(&self.first_missing);
            first.get_or_insert_with(|| shorten(warning.to_string(), WARNING_BYTES_MAX));
        }
        let mut first = lock(&self.first);
        if first.len() < FIRST_WARNINGS {
            let text = shorten(warning.to_string(), WARNING_BYTES_MAX);
            self.span.in_scope(|| tracing::warn!("{text}"));
            first.push(text);
        }
    }

    fn is_cancelled(&self) -> bool {
        self.ending.load(Ordering::Relaxed) != 0
    }
}

/// What changes while a job gets on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Signs {
    far: Far,
    requests: u64,
    sent: u64,
    received: u64,
}

impl Signs {
    /// Of what a job and its store say. A session gives signs of life, once a minute and of some hundred
    /// bytes, whether its work gets on or not: writes count by their bytes, in pieces. Nor is trying again
    /// what fails getting on.
    pub(super) fn of(far: Far, traffic: Option<Traffic>) -> Self {
        let traffic = traffic.unwrap_or_default();
        let done = |kind| traffic.done[kind as usize];
        Self {
            far,
            requests: [Kind::Read, Kind::List, Kind::Delete].map(done).iter().sum(),
            sent: traffic.bytes_sent >> 16,
            received: traffic.bytes_received,
        }
    }
}

/// What to do about a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    Fine,
    /// It does not get on.
    Stalled,
    /// It was told to end and does not: have its requests fail.
    Stop,
    /// That did not help either: its thread hangs in the kernel. Go on without it.
    Leave,
}

/// Watches one job.
#[derive(Debug)]
pub(super) struct Watch {
    stall: Option<Duration>,
    /// Whether its work looks now and then whether to end.
    asks: bool,
    signs: Signs,
    since: Instant,
    told: Option<Instant>,
}

/// How long a job may take to end by itself when it is cancelled, or because the agent ends: it makes
/// known what it has uploaded. One that stalls is unlikely to.
const PATIENCE: Duration = Duration::from_secs(10);
const PATIENCE_SHUTDOWN: Duration = Duration::from_secs(20);
const PATIENCE_STALLED: Duration = Duration::from_secs(5);

/// How long it may take to end when its requests fail.
const LEAVE_AFTER: Duration = Duration::from_secs(20);

impl Watch {
    /// Watches a job that began at `now`. `asks`: whether its work looks now and then whether to end.
    pub(super) fn new(stall: Option<Duration>, asks: bool, now: Instant) -> Self {
        Self { stall, asks, signs: Signs::default(), since: now, told: None }
    }

    /// Looks at the job.
    pub(super) fn look(&mut self, signs: Signs, ending: Option<Ending>, now: Instant) -> Verdict {
        let Some(ending) = ending else {
            if signs != self.signs {
                (self.signs, self.since) = (signs, now);
            }
            let silent = now.saturating_duration_since(self.since);
            let stalled = self.stall.is_some_and(|limit| silent >= limit);
            return if stalled { Verdict::Stalled } else { Verdict::Fine };
        };
        let told = *self.told.get_or_insert(now);
        let passed = now.saturating_duration_since(told);
        let patience = match ending {
            _ if !self.asks => Duration::ZERO,
            Ending::Cancelled => PATIENCE,
            Ending::Stalled => PATIENCE_STALLED,
            Ending::Shutdown => PATIENCE_SHUTDOWN,
        };
        match () {
            () if passed >= patience + LEAVE_AFTER => Verdict::Leave,
            () if passed >= patience => Verdict::Stop,
            () => Verdict::Fine,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_to_end_counts() {
        let monitor = JobMonitor::new(tracing::Span::none());
        assert!(!monitor.is_cancelled());
        monitor.end(Ending::Stalled);
        monitor.end(Ending::Cancelled);
        assert!(monitor.is_cancelled());
        assert_eq!(monitor.ending(), Some(Ending::Stalled));
    }

    #[test]
    fn all_warnings_are_counted_and_the_first_are_kept() {
        let monitor = JobMonitor::new(tracing::Span::none());
        for n in 0..100 {
            let path = format!("{n}").into_bytes();
            let message = "x".repeat(2000);
            monitor.warning(Warning {
                path,
                message,
                concern: if n % 2 == 0 { Concern::Missing } else { Concern::Detail },
            });
        }
        let (all, missing, first) = monitor.warnings();
        assert_eq!((all, missing, first.len()), (100, 50, FIRST_WARNINGS));
        assert!(first.iter().all(|text| text.len() <= WARNING_BYTES_MAX));
        assert!(first[1].starts_with("1: x"));
    }

    #[test]
    fn a_job_stalls_when_nothing_but_signs_of_life_changes() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut watch = Watch::new(Some(Duration::from_secs(10)), true, begun);
        let mut traffic = Traffic::default();
        let far = |bytes| Far { bytes, ..Far::default() };
        let mut look = |bytes, traffic: Traffic, seconds| {
            watch.look(Signs::of(far(bytes), Some(traffic)), None, at(seconds))
        };
        assert_eq!(look(0, traffic, 9), Verdict::Fine);
        assert_eq!(look(1, traffic, 9), Verdict::Fine);
        for requests in [&mut traffic.requests, &mut traffic.done] {
            requests[Kind::Write as usize] += 1;
            requests[Kind::Stat as usize] += 1;
        }
        traffic.bytes_sent += 300;
        assert_eq!(look(1, traffic, 18), Verdict::Fine);
        assert_eq!(look(1, traffic, 19), Verdict::Stalled, "a heartbeat is no progress");
        traffic.bytes_sent += 1 << 20;
        assert_eq!(look(1, traffic, 19), Verdict::Fine, "an upload is");
        assert_eq!(look(1, traffic, 29), Verdict::Stalled);
        traffic.requests[Kind::Read as usize] += 1;
        assert_eq!(look(1, traffic, 29), Verdict::Stalled, "a read that failed is none");
        traffic.done[Kind::Read as usize] += 1;
        assert_eq!(look(1, traffic, 29), Verdict::Fine, "a read is");
        let mut never = Watch::new(None, true, begun);
        assert_eq!(never.look(Signs::default(), None, at(1_000_000)), Verdict::Fine);
    }

    #[test]
    fn whoever_does_not_end_is_stopped_and_then_left() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let table = [
            (Ending::Cancelled, true, 10),
            (Ending::Stalled, true, 5),
            (Ending::Shutdown, true, 20),
            (Ending::Cancelled, false, 0),
        ];
        for (ending, asks, stop) in table {
            let mut watch = Watch::new(None, asks, begun);
            let mut look = |seconds| watch.look(Signs::default(), Some(ending), at(seconds));
            let first = if asks { Verdict::Fine } else { Verdict::Stop };
            assert_eq!(look(100), first, "{ending:?}: it counts from when it was told");
            assert_eq!(look(100 + stop), Verdict::Stop, "{ending:?}");
            assert_eq!(look(100 + stop + 19), Verdict::Stop, "{ending:?}");
            assert_eq!(look(100 + stop + 20), Verdict::Leave, "{ending:?}");
        }
    }
}
