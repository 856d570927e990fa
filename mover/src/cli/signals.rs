//! SIGINT and SIGTERM: every command ends soon after the first, whatever it is waiting for.
//!
//! Commands with something to tidy up see a flag, and have [`PATIENCE`] for it: naming what was uploaded,
//! removing what is half restored. Then the process ends, as it does at once at a second signal. Nothing
//! that is lost by that harms: what a killed one leaves, the next run finds.
//! The other commands are ended by the system, like any program.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use super::FAILED;

/// Time for tidying up: with it, a process ends within two seconds.
const PATIENCE: Duration = Duration::from_millis(1500);

/// A flag that the first signal sets, to end cleanly. The process ends a little later in any case: threads
/// may wait for a store that does not answer, or for a reader that does not read.
///
/// # Errors
/// When the system refuses to watch.
pub(super) fn watch() -> Result<Arc<AtomicBool>> {
    let cancelled = Arc::new(AtomicBool::new(false));
    let cannot = "cannot watch for signals";
    for signal in [SIGINT, SIGTERM] {
        // The order matters: the first signal must not find the flag set.
        flag::register_conditional_shutdown(signal, i32::from(FAILED), cancelled.clone())
            .and_then(|_| flag::register(signal, cancelled.clone()))
            .context(cannot)?;
    }
    let mut signals = Signals::new([SIGINT, SIGTERM]).context(cannot)?;
    let seen = cancelled.clone();
    let wait = move || {
        if signals.forever().next().is_some() {
            seen.store(true, Ordering::Relaxed);
            std::thread::sleep(PATIENCE);
            say_if_heard(
                "ebackup: interrupted; what was still being done is left to the next run\n",
            );
            // No destructors, no buffers: either may be what is waited for.
            signal_hook::low_level::exit(i32::from(FAILED));
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(wait).context(cannot)?;
    Ok(cancelled)
}

/// Has the signals end the process even where the system would not: it spares the first process of a
/// container what it has not asked for.
///
/// # Errors
/// When the system refuses.
pub(super) fn end_first_process() -> Result<()> {
    if std::process::id() == 1 {
        let always = Arc::new(AtomicBool::new(true));
        for signal in [SIGINT, SIGTERM] {
            flag::register_conditional_shutdown(signal, 128 + signal, always.clone())
                .context("cannot watch for signals")?;
        }
    }
    Ok(())
}

/// Writes to standard error unless that would have to wait.
fn say_if_heard(text: &str) {
    let stderr = io::stderr();
    let mut ready = [PollFd::new(&stderr, PollFlags::OUT)];
    let no_wait = Timespec { tv_sec: 0, tv_nsec: 0 };
    if poll(&mut ready, Some(&no_wait)) == Ok(1) {
        let _unheard = io::stderr().write_all(text.as_bytes());
    }
}
