//! What the system says: memory of a process, the machine, places for data.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// A field of `/proc/self/status` in bytes: `VmHWM` is the peak of the resident size, `RssAnon` the
/// part of it that is not backed by a file.
pub fn status_bytes(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|rest| rest.trim_start_matches(':').split_whitespace().next());
    kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// Seconds of processor time this process has used, in steps of 10 ms.
pub fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name, which may hold anything in parentheses, the 12th and 13th fields.
    let fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    let ticks = fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0
}

/// Notes the peak of `RssAnon`, which the system does not, by looking every 5 ms.
#[derive(Debug)]
pub struct AnonymousPeak {
    peak: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl AnonymousPeak {
    /// Begins to look.
    pub fn watch() -> Self {
        let (peak, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (noted, stopped) = (peak.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                noted.fetch_max(status_bytes("RssAnon"), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self { peak, stop, thread: Some(thread) }
    }

    /// Ends, and says what the peak was.
    pub fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It cannot panic; and if it did, what it noted by then is still the best there is.
            let _ended = thread.join();
        }
        self.peak.load(Ordering::Relaxed)
    }
}

/// Processor, its count, and memory, in one line.
pub fn describe() -> String {
    let field = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split_once(':'));
        value.map_or_else(|| "unknown".to_owned(), |(_, value)| value.trim().to_owned())
    };
    let memory = field("/proc/meminfo", "MemTotal");
    let kib = memory.split(' ').next().and_then(|kib| kib.parse::<u64>().ok());
    format!(
        "{} x {}, {} GiB",
        cpus(),
        field("/proc/cpuinfo", "model name"),
        kib.unwrap_or(0).div_ceil(1 << 20)
    )
}

/// Processors this process may use.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Where large data goes: `EBACKUP_BENCH_DIR`, else `/var/tmp`.
pub fn data_folder() -> PathBuf {
    std::env::var_os("EBACKUP_BENCH_DIR").map_or_else(|| "/var/tmp".into(), PathBuf::from)
}

/// Where data goes that is to cost no disk time: memory, if there is a file system for that.
pub fn memory_folder() -> PathBuf {
    match std::env::var_os("EBACKUP_BENCH_DIR") {
        Some(folder) => folder.into(),
        None if std::path::Path::new("/dev/shm").is_dir() => "/dev/shm".into(),
        None => "/var/tmp".into(),
    }
}

/// A temporary folder below `parent`.
///
/// # Panics
/// When it cannot be made.
pub fn temporary(parent: PathBuf) -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("ebackup-bench-")
        .tempdir_in(parent)
        .expect("a benchmark needs a folder for its data")
}
