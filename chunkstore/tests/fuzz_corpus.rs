//! The seeds of the fuzz targets, as they are and mutated, as part of the ordinary tests.

#![expect(clippy::unwrap_used, reason = "also in the functions that the tests share")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};

use chunkstore::testing::fuzz::{TARGETS, Target, seeds};
use chunkstore::tree::{Absence, Body, Kind, State, decode_leaf};

const MUTATIONS: u64 = 2000;

/// What any target may take for an input of some KiB: a blob of the largest size, stored and unpacked.
const MEMORY_MAX: usize = 32 << 20;

thread_local! {
    /// Bytes that this thread has taken and not given back, and the most there were.
    static TAKEN: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

/// The system's allocator, counting.
struct Counting;

fn count(more: usize, less: usize) {
    TAKEN.with(|taken| {
        let (now, most) = taken.get();
        let now = (now + more).saturating_sub(less);
        taken.set((now, most.max(now)));
    });
}

#[expect(unsafe_code, reason = "an allocator is nothing else; it hands everything on")]
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller keeps to what the trait asks of it.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs the target, and sees that it takes no more memory than it may.
fn within_memory(name: &str, target: Target, bytes: &[u8]) -> bool {
    let before = TAKEN.get().0;
    TAKEN.set((before, before));
    let accepted = target(bytes);
    let most = TAKEN.get().1 - before;
    assert!(most <= MEMORY_MAX, "{name} takes {most} bytes for an input of {}", bytes.len());
    accepted
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds")
}

/// Seeds of a target in the order of their names, and whatever a fuzzer has added to them.
fn stored(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(folder().join(target)).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let read = |path: PathBuf| (path.clone(), fs::read(path).unwrap());
    paths.into_iter().map(read).collect()
}

/// Numbers that follow from a seed (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end.max(1) as u64) as usize
    }
}

/// Changes some bytes, cuts, repeats, or splices in a part of another seed.
fn mutate(bytes: &mut Vec<u8>, other: &[u8], numbers: &mut Numbers) {
    for _ in 0..=numbers.below(4) {
        let at = numbers.below(bytes.len());
        match numbers.below(7) {
            _ if bytes.is_empty() => bytes.push(numbers.below(256) as u8),
            0 => bytes[at] ^= 1 << numbers.below(8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][numbers.below(5)],
            2 => bytes.truncate(at),
            3 => drop(bytes.remove(at)),
            4 => bytes.insert(at, numbers.below(256) as u8),
            5 => {
                let end = (at + numbers.below(32)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            _ => {
                let from = numbers.below(other.len());
                let to = (from + numbers.below(64)).min(other.len());
                let end = (at + (to - from)).min(bytes.len());
                bytes.splice(at..end, other[from..to].iter().copied());
            }
        }
    }
}

fn replay(name: &str, target: Target) {
    let seeds = stored(name);
    let accepted = seeds.iter().filter(|(_, bytes)| within_memory(name, target, bytes)).count();
    // A segment is bound to a random name: as a whole it never opens.
    let expected = usize::from(name != "segment_object");
    assert!(accepted >= expected, "no seed of {name} is accepted any more: make them again");
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for n in 0..MUTATIONS {
        let (_, bytes) = &seeds[n as usize % seeds.len()];
        let (_, other) = &seeds[numbers.below(seeds.len())];
        let mut bytes = bytes.clone();
        mutate(&mut bytes, other, &mut numbers);
        within_memory(name, target, &bytes);
    }
}

#[test]
fn no_target_panics_or_takes_much_memory_on_its_seeds_or_what_becomes_of_them() {
    for (name, target) in TARGETS {
        replay(name, target);
    }
}

/// Seeds are only as good as what they hold: made before a form was added, they do not reach it.
#[test]
fn the_seed_of_leaves_has_every_form_of_an_entry() {
    let bytes = fs::read(folder().join("leaf/every-kind")).unwrap();
    let bodies: Vec<Body> =
        decode_leaf(&bytes).unwrap().entries.into_iter().map(|entry| entry.body).collect();
    let has = |form: &dyn Fn(&Body) -> bool| bodies.iter().any(form);
    for state in (0..).map_while(State::from_byte) {
        assert!(has(&|body| matches!(body, Body::Node(node) if node.state == state)), "{state:?}");
    }
    for why in (0..).map_while(Absence::from_byte) {
        assert!(has(&|body| *body == Body::Absent(why)), "{why:?}");
    }
    for kind in [Kind::File, Kind::Dir, Kind::Symlink, Kind::CharDevice] {
        assert!(has(&|body| matches!(body, Body::Node(node) if node.kind == kind)), "{kind:?}");
    }
    assert!(has(&|body| matches!(body, Body::Extent(_))));
    assert!(has(&|body| matches!(body, Body::End(_))));
}

#[test]
fn nothing_is_accepted_that_is_empty() {
    for (name, target) in TARGETS {
        // Nothing is cut into no chunks.
        assert_eq!(target(&[]), name == "chunker", "{name}");
    }
}

#[test]
fn every_target_has_seeds_and_every_fuzz_program_a_target() {
    let mut made: Vec<_> = seeds().into_iter().map(|(target, ..)| target).collect();
    made.dedup();
    let mut names: Vec<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    for name in &names {
        assert!(made.contains(&&**name), "{name}");
    }
    let programs = fs::read_dir(folder().join("../fuzz_targets")).unwrap();
    let stem = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
    let mut programs: Vec<_> = programs.map(|entry| stem(entry.unwrap().path())).collect();
    programs.sort();
    names.sort();
    assert_eq!(programs, names);
}
