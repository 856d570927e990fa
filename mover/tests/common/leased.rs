//! A file that whoever opens it has to wait for, as for one that a file server has lent to a client.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// By which signal the holder is told (asm-generic/fcntl.h).
const F_SETSIG: i32 = 10;

/// A lease that is not given back when it is asked for, until dropped. The system takes it away after
/// `/proc/sys/fs/lease-break-time` seconds: 45, as a rule.
pub struct Leased(File);

impl Leased {
    pub fn take(path: &Path) -> Self {
        let leased = Self(File::options().read(true).write(true).open(path).unwrap());
        // Whoever holds a lease is told by a signal that somebody wants the file: one that is ignored.
        leased.fcntl(F_SETSIG, libc::SIGURG);
        leased.fcntl(libc::F_SETLEASE, libc::F_WRLCK);
        leased
    }

    /// Waits until somebody wants the file.
    pub fn is_wanted(&self) {
        let begun = Instant::now();
        while self.fcntl(libc::F_GETLEASE, 0) == libc::F_WRLCK {
            assert!(begun.elapsed() < Duration::from_secs(60), "nobody opens the file");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn fcntl(&self, command: i32, value: i32) -> i32 {
        #[expect(unsafe_code, reason = "no crate of ours wraps leases")]
        // SAFETY: these commands take a number, and touch no memory.
        let done = unsafe { libc::fcntl(self.0.as_raw_fd(), command, value) };
        assert!(done >= 0, "{}", std::io::Error::last_os_error());
        done
    }
}
