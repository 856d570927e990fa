//! How far the threads of jobs stand back for other processes of the node: for its processors, and for its disks.

use std::fmt;
use std::io;
use std::str::FromStr;

/// How soon the disk's scheduler serves a thread, as far as it looks at that (BFQ does).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoPriority {
    /// Like all processes at their best: from 0, the first, to 7.
    BestEffort(u8),
    /// Only when nobody else wants the disk.
    Idle,
}

impl IoPriority {
    /// As `ioprio_set(2)` takes it: a class, and a level within it.
    fn code(self) -> libc::c_long {
        const CLASS_SHIFT: u32 = 13;
        let (class, level) = match self {
            Self::BestEffort(level) => (2, level.into()),
            Self::Idle => (3, 0),
        };
        class << CLASS_SHIFT | level
    }
}

impl FromStr for IoPriority {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(level @ 0..=7) => Ok(Self::BestEffort(level)),
            _ if text == "idle" => Ok(Self::Idle),
            _ => Err("give a number from 0, the first, to 7, or 'idle'".to_owned()),
        }
    }
}

impl fmt::Display for IoPriority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BestEffort(level) => write!(f, "{level}"),
            Self::Idle => f.write_str("idle"),
        }
    }
}

/// Has the calling thread, and those that it starts from now on, stand back. Without `disk` the disk's scheduler goes
/// by `nice`.
///
/// # Errors
/// Those of the system, which does not let everybody.
pub(super) fn lower(nice: i32, disk: Option<IoPriority>) -> io::Result<()> {
    rustix::process::setpriority_process(None, nice)?;
    let Some(disk) = disk else { return Ok(()) };
    set_io_priority(disk)
}

#[expect(unsafe_code, reason = "no library that is kept up wraps the call")]
fn set_io_priority(priority: IoPriority) -> io::Result<()> {
    const WHO_PROCESS: libc::c_long = 1;
    const THIS_THREAD: libc::c_long = 0;
    // SAFETY: the call takes three integers and touches no memory of ours.
    let done =
        unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, THIS_THREAD, priority.code()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_are_what_was_typed_or_refused() {
        for text in ["0", "7", "idle"] {
            assert_eq!(text.parse::<IoPriority>().unwrap().to_string(), text);
        }
        for text in ["8", "-1", "", "Idle", "best"] {
            assert!(text.parse::<IoPriority>().unwrap_err().contains("idle"), "{text}");
        }
    }

    #[test]
    fn threads_started_by_a_thread_that_stands_back_do_too() {
        let table = [
            (IoPriority::Idle, "idle"),
            (IoPriority::BestEffort(7), "best-effort: prio 7"),
            (IoPriority::BestEffort(0), "best-effort: prio 0"),
        ];
        for (priority, expected) in table {
            let seen = std::thread::spawn(move || {
                lower(19, Some(priority)).unwrap();
                std::thread::spawn(|| {
                    let thread = std::fs::read_link("/proc/thread-self").unwrap();
                    let id = thread.file_name().unwrap();
                    let seen = std::process::Command::new("ionice").arg("-p").arg(id).output();
                    String::from_utf8(seen.unwrap().stdout).unwrap()
                })
            });
            assert_eq!(seen.join().unwrap().join().unwrap().trim(), expected);
        }
    }
}
