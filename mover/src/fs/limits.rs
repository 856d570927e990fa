//! The number of files this process may have open.

use std::io;

use chunkstore::error::{Error, ErrorKind};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors that are the program's own. A store in a folder takes a quarter of all besides.
const PROGRAM_FILES: u64 = 64;

/// Raises the limit of open files as far as allowed and returns it; `u64::MAX` means no limit.
pub fn raise_open_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let now = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    now.unwrap_or(u64::MAX)
}

/// How many files this process may have open; `u64::MAX` means no limit.
pub fn open_files() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// What `limit` leaves for the folders and files that jobs read or write.
pub fn files_for_jobs(limit: u64) -> usize {
    (limit - limit / 4).saturating_sub(PROGRAM_FILES) as usize
}

/// Of a job that needs more open files at once than `limit` leaves.
pub fn too_few_files(limit: u64, needed: usize) -> Error {
    // The least of which so much is left.
    let least = (PROGRAM_FILES + needed as u64 - 1) * 4 / 3 + 1;
    let message = format!(
        "this process may open {limit} files, and needs {least} at least: raise the limit, as with \
         'ulimit -n 4096'"
    );
    Error::new(ErrorKind::Invalid, message)
}

/// The error that ends a job whose call failed with `error` for want of descriptors, if it did: that says
/// nothing of the file that was to be opened, which must not be left out for it.
pub fn out_of_files(error: &io::Error) -> Option<Error> {
    let is_out = matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE));
    is_out.then(|| {
        let message = format!("{error}: raise the limit, as with 'ulimit -n 4096', and try again");
        Error::new(ErrorKind::Invalid, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_is_raised_to_the_hard_one() {
        let raised = raise_open_files();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
        assert_eq!(raised, limit.current.unwrap_or(u64::MAX));
        assert_eq!(raise_open_files(), raised);
    }
}
