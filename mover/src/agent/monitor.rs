//! Following a job: how far it is, what it warns of, whether it should end, and whether it gets on.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chunkstore::record::Summary;
use objects::{Kind, Traffic};

use proto::v1::Finished;

use super::failure::shorten;
use crate::monitor::{Concern, Monitor, Warning, display_path};

/// Warnings that are told in full, and bytes of each.
const FIRST_WARNINGS: usize = 20;
const WARNING_BYTES_MAX: usize = 500;

/// Files that are named of each concern, and bytes of each name: thirty of them fit into a status.
const FIRST_NAMES: usize = 10;
const NAME_BYTES_MAX: usize = 300;

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
    warnings: Mutex<Warnings>,
    ending: AtomicU8,
    /// Where warnings are logged.
    span: tracing::Span,
}

/// What a job warns of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Warnings {
    /// All of them, and the first in full.
    all: Named,
    missing: Named,
    changed: Named,
    vanished: Named,
}

/// How many there are, and the first of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Named {
    count: u64,
    first: Vec<String>,
}

impl Named {
    /// Counts one more. Whether it is among the first, of which `most` are named.
    fn add(&mut self, most: usize, text: impl FnOnce() -> String) -> bool {
        self.count += 1;
        let is_first = self.first.len() < most;
        if is_first {
            self.first.push(text());
        }
        is_first
    }
}

impl Warnings {
    /// Takes one in. Whether it is among the first of all, or of those of its concern.
    fn add(&mut self, warning: &Warning) -> bool {
        let full = || shorten(warning.to_string(), WARNING_BYTES_MAX);
        let path = || shorten(display_path(&warning.path), NAME_BYTES_MAX);
        let of_all = self.all.add(FIRST_WARNINGS, full);
        let of_its = match warning.concern {
            // Only here does it matter why.
            Concern::Missing => {
                self.missing.add(FIRST_NAMES, || shorten(warning.to_string(), NAME_BYTES_MAX))
            }
            Concern::Changed => self.changed.add(FIRST_NAMES, path),
            Concern::Vanished => self.vanished.add(FIRST_NAMES, path),
            Concern::Detail => false,
        };
        of_all || of_its
    }

    /// What a backup that was done before had counted. The names are in its snapshot.
    fn of(summary: &Summary) -> Self {
        let counted = |count| Named { count, first: Vec::new() };
        Self {
            all: counted(summary.warnings),
            missing: counted(summary.files_missing),
            changed: counted(summary.files_changed_while_read),
            vanished: counted(summary.files_vanished),
        }
    }

    /// Has the controller told of them.
    pub(super) fn tell(self, finished: &mut Finished) {
        let Self { all, missing, changed, vanished } = self;
        (finished.warnings, finished.first_warnings) = (all.count, all.first);
        (finished.missing, finished.first_missing) = (missing.count, missing.first);
        (finished.changed, finished.first_changed) = (changed.count, changed.first);
        (finished.vanished, finished.first_vanished) = (vanished.count, vanished.first);
    }
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
            warnings: Mutex::default(),
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

    /// Warns of what a backup that was done before had counted.
    pub(super) fn recall(&self, summary: &Summary) {
        *lock(&self.warnings) = Warnings::of(summary);
    }

    /// The first warning of a file that is missing.
    pub(super) fn first_missing(&self) -> String {
        lock(&self.warnings).missing.first.first().cloned().unwrap_or_default()
    }

    /// Warnings so far.
    pub(super) fn warnings(&self) -> Warnings {
        lock(&self.warnings).clone()
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
        if lock(&self.warnings).add(&warning) {
            let text = shorten(warning.to_string(), WARNING_BYTES_MAX);
            self.span.in_scope(|| tracing::warn!("{text}"));
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
    fn warnings_are_counted_by_concern_and_the_first_of_each_are_named() {
        let monitor = JobMonitor::new(tracing::Span::none());
        let concerns = [Concern::Detail, Concern::Changed, Concern::Vanished, Concern::Missing];
        // The other concerns first, so that they take all places among the first.
        for concern in concerns {
            for n in 0..100 {
                let path = format!("{concern:?}-{n}-{}", "p".repeat(1000)).into_bytes();
                monitor.warning(Warning { path, message: "x".repeat(2000), concern });
            }
        }
        let mut told = Finished::default();
        monitor.warnings().tell(&mut told);
        let counts = [told.warnings, told.missing, told.changed, told.vanished];
        assert_eq!(counts, [400, 100, 100, 100]);
        assert_eq!(told.first_warnings.len(), FIRST_WARNINGS);
        assert!(told.first_warnings.iter().all(|text| text.len() <= WARNING_BYTES_MAX));
        for (first, concern) in [
            (&told.first_missing, Concern::Missing),
            (&told.first_changed, Concern::Changed),
            (&told.first_vanished, Concern::Vanished),
        ] {
            assert_eq!(first.len(), FIRST_NAMES);
            assert!(first.iter().all(|text| text.len() <= NAME_BYTES_MAX));
            assert!(first[1].starts_with(&format!("{concern:?}-1-")), "{}", first[1]);
        }
    }

    #[test]
    fn a_missing_file_is_named_with_its_reason() {
        let monitor = JobMonitor::new(tracing::Span::none());
        let warn = |path: &str, concern| {
            let message = "cannot be read: Input/output error".to_owned();
            monitor.warning(Warning { path: path.into(), message, concern });
        };
        warn("a", Concern::Missing);
        warn("b", Concern::Changed);
        assert_eq!(monitor.first_missing(), "a: cannot be read: Input/output error");
        let mut told = Finished::default();
        monitor.warnings().tell(&mut told);
        assert_eq!(told.first_changed, ["b"]);
    }

    #[test]
    fn a_backup_that_was_done_before_is_counted_as_it_was_then() {
        let monitor = JobMonitor::new(tracing::Span::none());
        let summary = Summary {
            warnings: 9,
            files_missing: 2,
            files_changed_while_read: 3,
            files_vanished: 4,
            ..Summary::default()
        };
        monitor.recall(&summary);
        let mut told = Finished::default();
        monitor.warnings().tell(&mut told);
        assert_eq!([told.warnings, told.missing, told.changed, told.vanished], [9, 2, 3, 4]);
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
