//! Progress on standard error: a live line on a terminal, a line now and then elsewhere, JSON on
//! request; and the warnings in between.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::output::{Output, bytes, seconds};
use crate::monitor::{Concern, Monitor, Warning, WarningCounts, display_path};

/// How often the live line is drawn.
const LIVE: Duration = Duration::from_millis(200);
/// How often a line is printed where there is no terminal.
const LOG: Duration = Duration::from_secs(30);
/// How often a JSON status is printed.
const JSON: Duration = Duration::from_secs(1);

/// Follows a job and tells about it.
pub(super) struct Progress {
    state: Arc<State>,
    printer: Option<JoinHandle<()>>,
}

struct State {
    mode: Mode,
    output: Output,
    verb: &'static str,
    start: Instant,
    cancelled: Arc<AtomicBool>,
    entries: AtomicU64,
    bytes: AtomicU64,
    total_bytes: AtomicU64,
    warnings: WarningCounts,
    current: Mutex<Vec<u8>>,
    ended: AtomicBool,
    /// Held while something is printed, so that lines do not mix.
    printing: Mutex<()>,
}

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Silent,
    Live,
    Log,
    Json,
}

#[derive(Serialize)]
struct Status<'a> {
    r#type: &'static str,
    files: u64,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_bytes: Option<u64>,
    seconds: f64,
    current: &'a str,
}

#[derive(Serialize)]
struct WarningLine<'a> {
    r#type: &'static str,
    path: &'a str,
    message: &'a str,
    concern: Concern,
}

impl Progress {
    /// Begins to tell about a job that does `verb` ("saved") to files.
    pub(super) fn start(
        verb: &'static str,
        quiet: bool,
        output: &Output,
        cancelled: &Arc<AtomicBool>,
    ) -> Self {
        let mode = match () {
            () if quiet => Mode::Silent,
            () if output.json => Mode::Json,
            () if io::stderr().is_terminal() => Mode::Live,
            () => Mode::Log,
        };
        let state = Arc::new(State {
            mode,
            output: output.clone(),
            verb,
            start: Instant::now(),
            cancelled: cancelled.clone(),
            entries: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
            warnings: WarningCounts::default(),
            current: Mutex::default(),
            ended: AtomicBool::new(false),
            printing: Mutex::default(),
        });
        let printer = (mode != Mode::Silent).then(|| {
            let state = state.clone();
            std::thread::spawn(move || state.print_regularly())
        });
        Self { state, printer }
    }

    /// Sets the bytes expected in all, for percentage and remaining time.
    pub(super) fn expect(&self, bytes: u64) {
        self.state.total_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Whether somebody watches a live line.
    pub(super) fn is_live(&self) -> bool {
        self.state.mode == Mode::Live
    }

    /// Seconds since the start.
    pub(super) fn seconds(&self) -> f64 {
        self.state.start.elapsed().as_secs_f64()
    }

    /// Warnings so far.
    pub(super) fn warnings(&self) -> &WarningCounts {
        &self.state.warnings
    }

    /// Stops printing and clears the live line.
    pub(super) fn end(&mut self) {
        self.state.ended.store(true, Ordering::Relaxed);
        if let Some(printer) = self.printer.take() {
            printer.thread().unpark();
            let _ended = printer.join();
            self.state.clear();
        }
    }
}

/// Columns of the terminal; a usual number where it does not say.
fn columns() -> usize {
    let size = rustix::termios::tcgetwinsize(io::stderr());
    size.ok().map(|size| usize::from(size.ws_col)).filter(|columns| *columns > 0).unwrap_or(80)
}

/// A line and the end of a path behind it, no wider than a terminal: a wider one would scroll it.
fn fit(line: &str, path: &str, columns: usize) -> String {
    // The last column is left free: some terminals wrap when it is written.
    let room = columns.min(120).saturating_sub(1);
    let mut shown: String = line.chars().take(room).collect();
    let left = room.saturating_sub(shown.chars().count() + 2);
    if left > 0 {
        let skip = path.chars().count().saturating_sub(left);
        shown.push_str("  ");
        shown.extend(path.chars().skip(skip));
    }
    shown
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

impl Monitor for Progress {
    fn begin(&self, path: &[u8]) {
        if self.state.mode == Mode::Silent {
            return;
        }
        // Whoever holds it is printing or setting another path: this one may be passed over.
        if let Ok(mut current) = self.state.current.try_lock() {
            current.clear();
            current.extend_from_slice(path);
        }
    }

    fn advance(&self, entries: u64, bytes: u64) {
        self.state.entries.fetch_add(entries, Ordering::Relaxed);
        self.state.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn warning(&self, warning: Warning) {
        let state = &self.state;
        state.warnings.add(warning.concern);
        state.clear();
        let _printing = state.printing.lock().unwrap_or_else(PoisonError::into_inner);
        let _unheard = writeln!(io::stderr(), "warning: {warning}");
        if state.mode == Mode::Json {
            let (path, message) = (display_path(&warning.path), &warning.message);
            let concern = warning.concern;
            let line = WarningLine { r#type: "warning", path: &path, message, concern };
            state.output.object(&line);
        }
    }

    fn is_cancelled(&self) -> bool {
        self.state.cancelled.load(Ordering::Relaxed)
    }
}

impl State {
    fn print_regularly(&self) {
        let interval = match self.mode {
            Mode::Live => LIVE,
            Mode::Json => JSON,
            Mode::Log | Mode::Silent => LOG,
        };
        loop {
            std::thread::park_timeout(interval);
            if self.ended.load(Ordering::Relaxed) {
                return;
            }
            self.print();
        }
    }

    fn print(&self) {
        let current = {
            let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            display_path(&current)
        };
        let files = self.entries.load(Ordering::Relaxed);
        let done = self.bytes.load(Ordering::Relaxed);
        let total = self.total_bytes.load(Ordering::Relaxed);
        let elapsed = self.start.elapsed().as_secs_f64();
        let _printing = self.printing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.mode == Mode::Json {
            let total_bytes = (total > 0).then_some(total);
            let (bytes, seconds) = (done, elapsed);
            let current = &current;
            let r#type = "status";
            return self.output.object(&Status {
                r#type,
                files,
                bytes,
                total_bytes,
                seconds,
                current,
            });
        }
        let rate = done as f64 / elapsed.max(0.001);
        let mut line = format!("{files} entries {}, {}", self.verb, bytes(done));
        if total > 0 {
            let percent = 100.0 * done as f64 / total as f64;
            line.push_str(&format!(" of {} ({:.0} %)", bytes(total), percent.min(100.0)));
        }
        line.push_str(&format!(", {}/s", bytes(rate as u64)));
        if total > done && rate > 0.0 {
            line.push_str(&format!(", {} left", seconds(((total - done) as f64 / rate) as u64)));
        }
        if self.mode == Mode::Live {
            let line = fit(&line, &current, columns());
            let _unheard = write!(io::stderr(), "\r\x1b[K{line}");
            let _unheard = io::stderr().flush();
        } else {
            let _unheard = writeln!(io::stderr(), "{line}");
        }
    }

    fn clear(&self) {
        if self.mode == Mode::Live {
            let _printing = self.printing.lock().unwrap_or_else(PoisonError::into_inner);
            let _unheard = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for columns in 0..200 {
            for path in ["", "a", &"long/path/".repeat(30)] {
                let shown = fit("12 entries saved, 3.0 MiB, 1.0 MiB/s", path, columns);
                assert!(shown.chars().count() <= columns.saturating_sub(1), "{columns}: {shown}");
            }
        }
        assert_eq!(fit("line", "some/path", 12), "line  /path");
    }
}
