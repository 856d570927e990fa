//! Where a sparse file has data.

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::fs::File;

/// Lists the ranges of `file`'s first `size` bytes that may hold data, as `(offset, length)`.
///
/// What is not listed reads as zeros. Moves the file's position, so read with offsets. Worth
/// calling only when less than `size` is allocated. When the file system cannot tell, everything
/// from there on is one range.
pub fn data_ranges(file: &File, size: u64) -> DataRanges<'_> {
    DataRanges { file, size, at: 0 }
}

/// The iterator of [`data_ranges`].
#[derive(Debug)]
pub struct DataRanges<'a> {
    file: &'a File,
    size: u64,
    at: u64,
}

impl Iterator for DataRanges<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        if self.at >= self.size {
            return None;
        }
        let start = match seek(self.file, SeekFrom::Data(self.at)) {
            Ok(start) => start.max(self.at),
            Err(Errno::NXIO) => self.size, // a hole up to the end
            Err(_) => self.at,
        };
        if start >= self.size {
            self.at = self.size;
            return None;
        }
        let end = match seek(self.file, SeekFrom::Hole(start)) {
            Ok(end) if end > start => end.min(self.size),
            _ => self.size, // cannot tell, or the file changes under us
        };
        self.at = end;
        Some((start, end - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    fn ranges(file: &File, size: u64) -> Vec<(u64, u64)> {
        data_ranges(file, size).collect()
    }

    #[test]
    fn ranges_cover_all_data_and_leave_out_holes() {
        let file = tempfile::tempfile().unwrap();
        let size = 64 << 20;
        file.set_len(size).unwrap();
        file.write_all_at(b"first", 1 << 20).unwrap();
        file.write_all_at(&[1; 200_000], 40 << 20).unwrap();
        let found = ranges(&file, size);
        let covers = |at: u64| found.iter().any(|(start, len)| (*start..start + len).contains(&at));
        assert!(covers(1 << 20) && covers(40 << 20) && covers((40 << 20) + 199_999));
        if file.metadata().unwrap().blocks() * 512 < size {
            let total: u64 = found.iter().map(|(_, len)| len).sum();
            assert!(total < 4 << 20, "{found:?}");
        }
    }

    #[test]
    fn empty_full_and_hollow_files() {
        let file = tempfile::tempfile().unwrap();
        assert!(ranges(&file, 0).is_empty());
        file.write_all_at(&[1; 10_000], 0).unwrap();
        assert_eq!(ranges(&file, 10_000), [(0, 10_000)]);
        assert_eq!(ranges(&file, 5_000), [(0, 5_000)]);
        let hollow = tempfile::tempfile().unwrap();
        hollow.set_len(1 << 30).unwrap();
        assert!(ranges(&hollow, 1 << 30).is_empty());
    }

    #[test]
    fn file_shorter_than_expected_ends_with_its_data() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 4096], 0).unwrap();
        assert_eq!(ranges(&file, 1 << 20), [(0, 4096)]);
    }

    #[test]
    fn file_that_cannot_tell_is_one_range() {
        let (pipe, _writer) = std::io::pipe().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(pipe));
        assert_eq!(ranges(&file, 77), [(0, 77)]);
    }
}
