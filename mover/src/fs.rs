//! File trees that somebody else may own, read and written as root without being led out of them.
//!
//! Everything goes through open directory handles ([`Dir`]), one name at a time: a name is bytes,
//! never holds `/`, is never empty, `.` or `..`, and is never followed when it is a symlink. So
//! whoever owns the tree can swap entries while we work and still only ever harms that tree.
//!
//! ```text
//! scan     Dir::open_root ─> Listing::read ─> lstat | open_dir | open_file ─> xattrs, data_ranges
//! restore  Dir::make_dir | create_file | make_symlink | make_node ─> apply (owner … times)
//! ```
//!
//! Not here: paths, patterns, what is worth saving. Callers put the path into their messages; the
//! errors of this module are bare [`std::io::Error`]s.

mod attrs;
mod close;
mod dir;
mod holes;
mod limits;
mod listing;
mod meta;
mod proc;
mod remove;
mod traits;
mod xattr;

pub use attrs::{
    ApplyOptions, Attr, AttrFailure, CAPABILITY, Current, Target, apply, gives_rights,
    is_own_attribute,
};
pub use close::close;
pub use dir::{Dir, is_plain_name};
pub use holes::{DataRanges, data_ranges};
pub use limits::{files_for_jobs, open_files, out_of_files, raise_open_files, too_few_files};
pub use listing::is_scratch_failure;
pub use listing::{Entry, Listing};
pub use meta::{Kind, Meta, Timestamp};
pub use traits::FsTraits;
pub use xattr::{Xattrs, file_xattrs, set_file_xattr};

#[cfg(test)]
mod testing {
    //! What the tests of this module share.

    use super::Dir;
    use std::io::Write;
    use tempfile::TempDir;

    /// Opens a fresh temporary directory.
    pub(super) fn fresh() -> (TempDir, Dir) {
        let temp = tempfile::tempdir().unwrap();
        let dir = Dir::open_root(temp.path()).unwrap();
        (temp, dir)
    }

    /// Whether the tests run as root; says loudly what is not tested otherwise.
    pub(super) fn is_root(what: &str) -> bool {
        let root = rustix::process::geteuid().is_root();
        if !root {
            say_loudly(&format!("NOT ROOT: {what} NOT TESTED"));
        }
        root
    }

    /// Prints past the test harness, which hides what passing tests print.
    pub(super) fn say_loudly(what: &str) {
        let line = format!("\n******** {what} ********\n");
        std::io::stderr().write_all(line.as_bytes()).unwrap();
    }
}
