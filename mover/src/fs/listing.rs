//! The names of one directory in byte order, however many there are.
//!
//! ```text
//! getdents ─> table (arena + 8 bytes per name) ─────────────── sort ─> next_entry
//!                 └ over the limit: sort, write as a run ─┐              ^
//!                     one unlinked file, ≤ 64 runs <──────┘── k-way merge┘
//! ```
//!
//! Memory: the limit, plus 64 KiB per run (4 MiB) while merging. A small directory costs one
//! allocation for its names and one for its index, both of exact size: they are gathered in
//! buffers each thread keeps. A name the file system delivers twice, because the directory changed
//! while it was read, is listed once.

use super::dir::Dir;
use super::meta::{Kind, kind_of};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RawDir, openat, unlinkat};
use rustix::io::Errno;
use std::cell::Cell;
use std::cmp::Ordering;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{self, AtomicU64};

const READ_BYTES: usize = 64 << 10;
const RUN_BUFFER_BYTES: usize = 64 << 10;
/// Runs merged at once; when there are as many, the shorter half is merged into one.
const RUNS_MAX: usize = 64;
/// Tables up to this size are copied out of the thread's buffers, larger ones take them along.
const KEPT_BYTES: usize = 256 << 10;
/// Offsets in a table have 40 bits.
const LIMIT_BYTES_MAX: usize = 1 << 39;

/// The names in a directory, in ascending byte order, without `.` and `..`.
#[derive(Debug)]
pub struct Listing(Names);

/// One name of a [`Listing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The name.
    pub name: &'a [u8],
    /// What it was when the directory was read; `None` when the file system does not tell.
    pub kind: Option<Kind>,
}

#[derive(Debug)]
enum Names {
    Table(TableReader),
    Merge(Merge),
}

#[derive(Default)]
struct Buffers {
    dirents: Vec<u8>,
    table: Table,
}

thread_local! {
    static BUFFERS: Cell<Option<Box<Buffers>>> = const { Cell::new(None) };
}

/// Not the folder failed, but what keeps its names meanwhile.
#[derive(Debug, thiserror::Error)]
#[error("its names cannot be kept in the folder for temporary files: {0}")]
struct ScratchFailed(#[source] io::Error);

fn scratch_failed(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), ScratchFailed(error))
}

/// Whether an error of [`Listing::read`] says nothing of the folder, but of the one for temporary files.
pub fn is_scratch_failure(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<ScratchFailed>())
}

impl Listing {
    /// Reads all names of `dir`; those over `limit_bytes` wait in an unnamed file in `scratch`.
    ///
    /// # Errors
    /// When the folder cannot be read, or, as [`is_scratch_failure`] tells, `scratch` takes nothing.
    pub fn read(dir: &Dir, limit_bytes: usize, scratch: &Path) -> io::Result<Self> {
        let limit_bytes = limit_bytes.min(LIMIT_BYTES_MAX);
        let mut buffers = BUFFERS.take().unwrap_or_default();
        let Buffers { dirents, table } = &mut *buffers;
        table.clear();
        dirents.reserve(READ_BYTES);
        let mut spill: Option<Spill> = None;
        let mut entries = RawDir::new(dir.reopen()?, dirents.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            if !table.make_room(name.len(), limit_bytes) {
                let spill = match &mut spill {
                    Some(spill) => spill,
                    None => spill.insert(Spill::new(scratch).map_err(scratch_failed)?),
                };
                table.sort();
                spill.write_table(table).map_err(scratch_failed)?;
                table.clear();
            }
            table.push(name, kind_of(entry.file_type()));
        }
        table.sort();
        let rest = TableReader { table: table.take_exact(), next: 0 };
        BUFFERS.set(Some(buffers));
        let Some(spill) = spill else {
            return Ok(Self(Names::Table(rest)));
        };
        let runs = spill.runs.iter().map(|run| Source::Run(run.reader(&spill.file)));
        let merge =
            Merge::new(runs.chain([Source::Table(rest)]).collect()).map_err(scratch_failed)?;
        Ok(Self(Names::Merge(merge)))
    }

    /// A listing of one name alone, which need not exist.
    pub fn only(name: &[u8]) -> Self {
        let mut table = Table::default();
        table.push(name, None);
        Self(Names::Table(TableReader { table, next: 0 }))
    }

    /// Steps to the next name; `None` after the last.
    ///
    /// # Errors
    /// Only when names had to be written to `scratch` and cannot be read back.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry<'_>>> {
        match &mut self.0 {
            Names::Table(reader) => Ok(if reader.advance() { Some(reader.head()) } else { None }),
            Names::Merge(merge) => merge.next_entry(),
        }
    }

    /// Whether there were too many names for the memory limit.
    pub fn is_spilled(&self) -> bool {
        matches!(self.0, Names::Merge(_))
    }
}

/// Names in memory; an index entry is `offset << 24 | kind << 16 | length`.
#[derive(Debug, Default)]
struct Table {
    arena: Vec<u8>,
    index: Vec<u64>,
}

impl Table {
    fn clear(&mut self) {
        self.arena.clear();
        self.index.clear();
    }

    /// Makes room for one more name; false when that would take more than `limit_bytes`, counting
    /// both the old and the new buffer while one grows. The first name always fits.
    fn make_room(&mut self, name_len: usize, limit_bytes: usize) -> bool {
        let used = self.arena.len() + name_len + (self.index.len() + 1) * 8;
        let arena = grown(self.arena.capacity(), self.arena.len() + name_len, 1024);
        let index = grown(self.index.capacity(), self.index.len() + 1, 32);
        let peak = if arena == 0 && index == 0 {
            used
        } else {
            self.arena.capacity() + arena + (self.index.capacity() + index) * 8
        };
        if peak > limit_bytes && !self.index.is_empty() {
            return false;
        }
        self.arena.reserve_exact(arena.saturating_sub(self.arena.len()));
        self.index.reserve_exact(index.saturating_sub(self.index.len()));
        true
    }

    fn push(&mut self, name: &[u8], kind: Option<Kind>) {
        let entry = (self.arena.len() as u64) << 24 | kind_code(kind) << 16 | name.len() as u64;
        self.index.push(entry);
        self.arena.extend_from_slice(name);
    }

    fn entry(&self, packed: u64) -> Entry<'_> {
        Entry { name: name_in(&self.arena, packed), kind: kind_of_code((packed >> 16) as u8) }
    }

    fn sort(&mut self) {
        let Self { arena, index } = self;
        index.sort_unstable_by(|a, b| name_in(arena, *a).cmp(name_in(arena, *b)));
        index.dedup_by(|a, b| name_in(arena, *a) == name_in(arena, *b));
    }

    /// Moves the content out, in buffers of its own size.
    fn take_exact(&mut self) -> Self {
        if self.arena.capacity() + self.index.capacity() * 8 > KEPT_BYTES {
            return std::mem::take(self);
        }
        Self { arena: self.arena.as_slice().to_vec(), index: self.index.as_slice().to_vec() }
    }
}

/// The capacity to grow to, or 0 when there is enough.
fn grown(capacity: usize, needed: usize, least: usize) -> usize {
    if needed <= capacity { 0 } else { needed.max(2 * capacity).max(least) }
}

fn name_in(arena: &[u8], packed: u64) -> &[u8] {
    let start = (packed >> 24) as usize;
    &arena[start..start + (packed & 0xffff) as usize]
}

const KINDS: [Kind; 7] = [
    Kind::File,
    Kind::Dir,
    Kind::Symlink,
    Kind::Fifo,
    Kind::Socket,
    Kind::CharDevice,
    Kind::BlockDevice,
];

fn kind_code(kind: Option<Kind>) -> u64 {
    match kind {
        None => 0,
        Some(Kind::File) => 1,
        Some(Kind::Dir) => 2,
        Some(Kind::Symlink) => 3,
        Some(Kind::Fifo) => 4,
        Some(Kind::Socket) => 5,
        Some(Kind::CharDevice) => 6,
        Some(Kind::BlockDevice) => 7,
    }
}

fn kind_of_code(code: u8) -> Option<Kind> {
    KINDS.get(usize::from(code).checked_sub(1)?).copied()
}

#[derive(Debug)]
struct TableReader {
    table: Table,
    /// One past the head.
    next: usize,
}

impl TableReader {
    fn advance(&mut self) -> bool {
        let more = self.next < self.table.index.len();
        self.next += usize::from(more);
        more
    }

    fn head(&self) -> Entry<'_> {
        self.table.entry(self.table.index[self.next - 1])
    }
}

/// The sorted runs written so far, one after the other in one file without a name.
struct Spill {
    file: Arc<File>,
    end: u64,
    runs: Vec<Run>,
}

#[derive(Clone, Copy)]
struct Run {
    start: u64,
    end: u64,
}

impl Spill {
    fn new(scratch: &Path) -> io::Result<Self> {
        Ok(Self { file: Arc::new(unnamed_file(scratch)?), end: 0, runs: Vec::new() })
    }

    fn write_table(&mut self, table: &Table) -> io::Result<()> {
        let mut index = table.index.iter();
        self.write_run(|out| {
            let Some(packed) = index.next() else {
                return Ok(0);
            };
            write_record(out, table.entry(*packed))
        })?;
        if self.runs.len() < RUNS_MAX {
            return Ok(());
        }
        // Always merging the shorter runs writes each name only log32(runs) times.
        self.runs.sort_unstable_by_key(|run| std::cmp::Reverse(run.end - run.start));
        let short = self.runs.split_off(RUNS_MAX / 2);
        let readers = short.iter().map(|run| Source::Run(run.reader(&self.file))).collect();
        let mut merge = Merge::new(readers)?;
        self.write_run(|out| match merge.next_entry()? {
            Some(entry) => write_record(out, entry),
            None => Ok(0),
        })
    }

    /// Appends what `write_next` writes until that is nothing.
    fn write_run(
        &mut self,
        mut write_next: impl FnMut(&mut BufWriter<&File>) -> io::Result<u64>,
    ) -> io::Result<()> {
        let mut out = BufWriter::with_capacity(RUN_BUFFER_BYTES, &*self.file);
        let start = self.end;
        loop {
            match write_next(&mut out)? {
                0 => break,
                written => self.end += written,
            }
        }
        out.flush()?;
        drop(out);
        self.runs.push(Run { start, end: self.end });
        Ok(())
    }
}

/// Length (2 bytes), kind (1), name.
fn write_record(out: &mut impl Write, entry: Entry<'_>) -> io::Result<u64> {
    let [low, high, ..] = entry.name.len().to_le_bytes();
    out.write_all(&[low, high, kind_code(entry.kind) as u8])?;
    out.write_all(entry.name)?;
    Ok(3 + entry.name.len() as u64)
}

impl Run {
    fn reader(&self, file: &Arc<File>) -> RunReader {
        RunReader {
            file: Arc::clone(file),
            next: self.start,
            end: self.end,
            buffer: Vec::new(),
            head: 0,
            head_end: 0,
        }
    }
}

#[derive(Debug)]
struct RunReader {
    file: Arc<File>,
    /// The part of the file not yet in `buffer`.
    next: u64,
    end: u64,
    buffer: Vec<u8>,
    /// The current record in `buffer`.
    head: usize,
    head_end: usize,
}

impl RunReader {
    fn advance(&mut self) -> io::Result<bool> {
        self.head = self.head_end;
        if self.head == self.buffer.len() && self.next == self.end {
            return Ok(false);
        }
        self.fill(3)?;
        let low_high = [self.buffer[self.head], self.buffer[self.head + 1]];
        let record = 3 + usize::from(u16::from_le_bytes(low_high));
        self.fill(record)?;
        self.head_end = self.head + record;
        Ok(true)
    }

    /// Sees to it that `wanted` bytes from the head on are in the buffer.
    fn fill(&mut self, wanted: usize) -> io::Result<()> {
        let left = self.buffer.len() - self.head;
        if left >= wanted {
            return Ok(());
        }
        self.buffer.copy_within(self.head.., 0);
        self.head = 0;
        let room = RUN_BUFFER_BYTES.max(wanted) - left;
        let read = usize::try_from(self.end - self.next).unwrap_or(room).min(room);
        if left + read < wanted {
            return Err(io::Error::other("a run of names ends within a name"));
        }
        self.buffer.resize(left + read, 0);
        self.file.read_exact_at(&mut self.buffer[left..], self.next)?;
        self.next += read as u64;
        Ok(())
    }

    fn head(&self) -> Entry<'_> {
        let record = &self.buffer[self.head..self.head_end];
        Entry { name: &record[3..], kind: kind_of_code(record[2]) }
    }
}

#[derive(Debug)]
enum Source {
    Table(TableReader),
    Run(RunReader),
}

impl Source {
    fn advance(&mut self) -> io::Result<bool> {
        match self {
            Self::Table(reader) => Ok(reader.advance()),
            Self::Run(reader) => reader.advance(),
        }
    }

    fn head(&self) -> Entry<'_> {
        match self {
            Self::Table(reader) => reader.head(),
            Self::Run(reader) => reader.head(),
        }
    }
}

/// Merges sorted sources; `heap[0]` is the one with the smallest head.
#[derive(Debug)]
struct Merge {
    sources: Vec<Source>,
    heap: Vec<usize>,
    /// The name delivered last; `heap[0]` still stands on it.
    last: Option<Vec<u8>>,
}

impl Merge {
    fn new(mut sources: Vec<Source>) -> io::Result<Self> {
        let mut heap = Vec::with_capacity(sources.len());
        for (at, source) in sources.iter_mut().enumerate() {
            if source.advance()? {
                heap.push(at);
            }
        }
        heap.sort_by(|a, b| sources[*a].head().name.cmp(sources[*b].head().name));
        Ok(Self { sources, heap, last: None })
    }

    fn next_entry(&mut self) -> io::Result<Option<Entry<'_>>> {
        while let Some(&top) = self.heap.first() {
            let name = self.sources[top].head().name;
            match &mut self.last {
                Some(last) if last == name => self.step(top)?,
                Some(last) => {
                    last.clear();
                    last.extend_from_slice(name);
                    return Ok(Some(self.sources[top].head()));
                }
                None => {
                    self.last = Some(name.to_vec());
                    return Ok(Some(self.sources[top].head()));
                }
            }
        }
        Ok(None)
    }

    /// Moves the source at the top of the heap on, and restores the heap's order.
    fn step(&mut self, top: usize) -> io::Result<()> {
        if !self.sources[top].advance()? {
            self.heap.swap_remove(0);
        }
        let mut at = 0;
        while let Some(least) = (2 * at + 1..(2 * at + 3).min(self.heap.len()))
            .min_by(|a, b| self.order(*a, *b))
            .filter(|least| self.order(*least, at).is_lt())
        {
            self.heap.swap(at, least);
            at = least;
        }
        Ok(())
    }

    fn order(&self, a: usize, b: usize) -> Ordering {
        let name = |at: usize| self.sources[self.heap[at]].head().name;
        name(a).cmp(name(b))
    }
}

/// Creates a file in `dir` that vanishes when it is closed.
fn unnamed_file(dir: &Path) -> io::Result<File> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match openat(CWD, dir, flags | OFlags::TMPFILE, mode) {
        Ok(file) => return Ok(file.into()),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    loop {
        let number = NEXT.fetch_add(1, atomic::Ordering::Relaxed);
        let path = dir.join(format!(".names-{}-{number}", std::process::id()));
        match openat(CWD, &path, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode) {
            Ok(file) => {
                unlinkat(CWD, &path, AtFlags::empty())?;
                return Ok(file.into());
            }
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::testing::fresh;
    use std::os::unix::ffi::OsStringExt;

    fn all(listing: &mut Listing) -> Vec<(Vec<u8>, Option<Kind>)> {
        let mut names = Vec::new();
        while let Some(entry) = listing.next_entry().unwrap() {
            names.push((entry.name.to_vec(), entry.kind));
        }
        assert!(listing.next_entry().unwrap().is_none());
        names
    }

    fn names(listing: &mut Listing) -> Vec<Vec<u8>> {
        all(listing).into_iter().map(|(name, _)| name).collect()
    }

    fn sorted_by_std(path: &Path) -> Vec<Vec<u8>> {
        let entries = std::fs::read_dir(path).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_vec()).collect();
        names.sort();
        names
    }

    #[test]
    fn names_come_sorted_with_their_kinds() {
        let (temp, dir) = fresh();
        let scratch = tempfile::tempdir().unwrap();
        assert!(names(&mut Listing::read(&dir, 1 << 20, scratch.path()).unwrap()).is_empty());
        dir.create_file(b"b\xff").unwrap();
        dir.make_dir(b"b").unwrap();
        dir.make_symlink(b"a\nb", b"x").unwrap();
        dir.make_node(b"\x01", Kind::Fifo, 0, 0).unwrap();
        dir.make_node(&[0xfe; 255], Kind::Socket, 0, 0).unwrap();
        let mut listing = Listing::read(&dir, 1 << 20, scratch.path()).unwrap();
        assert!(!listing.is_spilled());
        let expected = vec![
            (b"\x01".to_vec(), Some(Kind::Fifo)),
            (b"a\nb".to_vec(), Some(Kind::Symlink)),
            (b"b".to_vec(), Some(Kind::Dir)),
            (b"b\xff".to_vec(), Some(Kind::File)),
            (vec![0xfe; 255], Some(Kind::Socket)),
        ];
        assert_eq!(all(&mut listing), expected);
        assert_eq!(sorted_by_std(temp.path()).len(), 5);
    }

    #[test]
    fn spilled_listing_equals_the_sorted_one() {
        let (temp, dir) = fresh();
        let scratch = tempfile::tempdir().unwrap();
        for number in 0..20_000_u32 {
            let name = format!("{:08x}{}", number.wrapping_mul(2_654_435_761), number % 7);
            dir.create_file(name.as_bytes()).unwrap();
        }
        let expected = sorted_by_std(temp.path());
        // 1 byte: every name is a run; 64 KiB: a dozen; 1 MiB: none.
        for (limit, spilled) in [(1, true), (3000, true), (64 << 10, true), (1 << 20, false)] {
            let mut listing = Listing::read(&dir, limit, scratch.path()).unwrap();
            assert_eq!(listing.is_spilled(), spilled, "{limit}");
            assert_eq!(names(&mut listing), expected, "{limit}");
        }
        assert!(sorted_by_std(scratch.path()).is_empty());
    }

    #[test]
    fn reading_twice_gives_the_same_and_the_shared_offset_does_not_matter() {
        let (_temp, dir) = fresh();
        for name in [b"x", b"y"] {
            dir.create_file(name).unwrap();
        }
        let mut buffer = Vec::with_capacity(4096);
        let mut raw = RawDir::new(&dir, buffer.spare_capacity_mut());
        while raw.next().is_some() {}
        for _ in 0..2 {
            let mut listing = Listing::read(&dir, 1 << 20, Path::new("/nowhere")).unwrap();
            assert_eq!(names(&mut listing), [b"x", b"y"]);
        }
    }

    #[test]
    fn duplicate_names_are_listed_once() {
        let scratch = tempfile::tempdir().unwrap();
        let mut table = Table::default();
        for name in [b"b", b"a", b"b"] {
            assert!(table.make_room(1, 1 << 20));
            table.push(name, None);
        }
        table.sort();
        assert_eq!(table.index.len(), 2);
        let mut spill = Spill::new(scratch.path()).unwrap();
        spill.write_table(&table).unwrap();
        spill.write_table(&table).unwrap();
        let sources = spill.runs.iter().map(|run| Source::Run(run.reader(&spill.file)));
        let merge = Merge::new(sources.collect()).unwrap();
        assert_eq!(names(&mut Listing(Names::Merge(merge))), [b"a", b"b"]);
    }

    #[test]
    fn names_longer_than_the_usual_limit_survive_a_run() {
        let scratch = tempfile::tempdir().unwrap();
        let mut spill = Spill::new(scratch.path()).unwrap();
        let long: Vec<Vec<u8>> = (0..9).map(|at| vec![b'0' + at; 60_000]).collect();
        for name in &long {
            let mut table = Table::default();
            assert!(table.make_room(name.len(), 0), "the first name always fits");
            table.push(name, Some(Kind::BlockDevice));
            spill.write_table(&table).unwrap();
        }
        let sources = spill.runs.iter().map(|run| Source::Run(run.reader(&spill.file)));
        let merge = Merge::new(sources.collect()).unwrap();
        assert_eq!(names(&mut Listing(Names::Merge(merge))), long);
    }

    #[test]
    fn memory_stays_within_the_limit() {
        let limit = 100_000;
        let mut table = Table::default();
        let mut count = 0;
        while table.make_room(20, limit) {
            table.push(&[b'n'; 20], None);
            count += 1;
            assert!(table.arena.capacity() + table.index.capacity() * 8 <= limit);
        }
        assert!(count * 28 > limit / 3, "{count} names are too few for the limit");
    }
}
