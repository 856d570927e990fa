//! Closing with an answer.
//!
//! Network and FUSE file systems may find out that a write failed (no room, no quota, a broken disk) only when
//! the file is closed. Dropping a [`File`] would lose that.

use std::fs::File;
use std::io;
use std::os::fd::IntoRawFd;

/// Closes a file.
///
/// # Errors
/// When something that was written to it could not be stored.
#[expect(unsafe_code, reason = "there is no safe call that closes and tells of errors")]
pub fn close(file: File) -> io::Result<()> {
    // SAFETY: the descriptor was owned by `file`, which has just given it up.
    if unsafe { libc::close(file.into_raw_fd()) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        // Linux has closed it all the same.
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_closed_once() {
        let temp = tempfile::tempdir().unwrap();
        let file = File::create(temp.path().join("f")).unwrap();
        close(file).unwrap();
    }
}
