//! The behaviours every implementation of [`ObjectStore`] shows, each a function on an empty store
//! that panics when the store behaves otherwise.

use std::collections::BTreeSet;
use std::io::IoSlice;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use super::keys;
use crate::{Created, Error, ErrorKind, ObjectStore, Result};

/// One behaviour, checked on an empty store.
pub type Behaviour = fn(&dyn ObjectStore);

/// A behaviour with its name.
pub type Named = (&'static str, Behaviour);

macro_rules! behaviours {
    ($($name:ident),* $(,)?) => {
        /// All behaviours with their names.
        pub const ALL: &[Named] = &[$((stringify!($name), $name)),*];
    };
}

behaviours! {
    created_object_is_read_back,
    second_create_keeps_the_first_object,
    one_of_racing_creators_wins,
    parts_are_joined_in_order,
    empty_object_is_an_object,
    large_object_is_read_back,
    object_larger_than_the_limit_is_refused,
    range_past_the_end_is_truncated,
    missing_object_is_not_found,
    folders_are_listed_without_their_neighbours,
    many_objects_are_listed_once_each,
    error_of_the_callback_ends_the_listing,
    store_can_be_used_while_listing,
    delete_is_idempotent,
    deleted_object_can_be_created_anew,
    replace_creates_and_replaces,
    malformed_keys_are_rejected_by_every_operation,
    objects_are_visible_only_whole,
    bodies_of_unknown_length_are_created_whole,
    a_body_that_fails_creates_nothing,
    the_tail_is_read_with_the_size,
    many_objects_are_deleted_at_once,
    dated_requests_take_effect_in_time,
}

/// What a store cannot show that ignores the condition of create-if-absent.
const NEED_CONDITIONS: [&str; 5] = [
    "second_create_keeps_the_first_object",
    "one_of_racing_creators_wins",
    "empty_object_is_an_object",
    "replace_creates_and_replaces",
    "bodies_of_unknown_length_are_created_whole",
];

/// The behaviours that need create-if-absent, and the others.
///
/// # Panics
/// When a behaviour was renamed.
pub fn by_need_of_conditions() -> (Vec<Named>, Vec<Named>) {
    let (need, others): (Vec<_>, Vec<_>) =
        ALL.iter().copied().partition(|(name, _)| NEED_CONDITIONS.contains(name));
    assert_eq!(need.len(), NEED_CONDITIONS.len());
    (need, others)
}

/// What stores of files show besides: elsewhere a key can be the folder of others, which nobody uses.
pub const FOLDERS: &[Named] = &[("key_is_never_also_a_folder", key_is_never_also_a_folder)];

/// Checks all behaviours, also those of folders, each on a new empty store from `make`.
///
/// # Panics
/// With the names of the behaviours the store does not show.
pub fn run_all(make: &dyn Fn() -> Box<dyn ObjectStore>) {
    run(&[ALL, FOLDERS].concat(), make);
}

/// Checks `behaviours`, each on a new empty store from `make`.
///
/// # Panics
/// With the names of the behaviours the store does not show.
pub fn run(behaviours: &[Named], make: &dyn Fn() -> Box<dyn ObjectStore>) {
    let failed: Vec<&str> = behaviours
        .iter()
        .filter(|(_, behaviour)| {
            let store = make();
            catch_unwind(AssertUnwindSafe(|| behaviour(&*store))).is_err()
        })
        .map(|(name, _)| *name)
        .collect();
    assert!(failed.is_empty(), "the store does not show: {failed:?}");
}

/// What was created is read back whole, in ranges, and in its size.
pub fn created_object_is_read_back(store: &dyn ObjectStore) {
    assert_eq!(create(store, "packs/3f/3f9c", b"0123456789"), Created::New);
    assert_eq!(body(store, "packs/3f/3f9c"), b"0123456789");
    assert_eq!(range(store, "packs/3f/3f9c", 0, 10).expect("whole"), b"0123456789");
    assert_eq!(range(store, "packs/3f/3f9c", 3, 4).expect("middle"), b"3456");
    assert_eq!(range(store, "packs/3f/3f9c", 9, 1).expect("last"), b"9");
    let stat = store.stat("packs/3f/3f9c").expect("stat");
    assert_eq!((stat.key.as_str(), stat.size), ("packs/3f/3f9c", 10));
    let mut listed = Vec::new();
    let listing = store.list("", &mut |meta| {
        listed.push(meta);
        Ok(())
    });
    listing.expect("list");
    assert_eq!(listed, [stat], "a listing tells the same as stat");
}

/// The first of two creates wins, and the second is told.
pub fn second_create_keeps_the_first_object(store: &dyn ObjectStore) {
    assert_eq!(create(store, "a", b"first"), Created::New);
    let modified = store.stat("a").expect("stat").modified;
    assert_eq!(create(store, "a", b"the second"), Created::AlreadyExists);
    assert_eq!(body(store, "a"), b"first");
    assert_eq!(store.stat("a").expect("stat").modified, modified);
}

/// Of eight threads creating one key one wins, and its body stays.
pub fn one_of_racing_creators_wins(store: &dyn ObjectStore) {
    for round in 0..20 {
        let key = format!("race/{round}");
        let barrier = std::sync::Barrier::new(8);
        let race = |n: u8| {
            barrier.wait();
            create(store, &key, &[n; 5000])
        };
        let outcomes: Vec<Created> = thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|n| scope.spawn(move || race(n))).collect();
            threads.into_iter().map(|thread| thread.join().expect("racer")).collect()
        });
        let winners: Vec<usize> =
            (0..8).filter(|n| outcomes.get(*n) == Some(&Created::New)).collect();
        assert_eq!(winners.len(), 1, "{outcomes:?}");
        let winner = u8::try_from(winners[0]).expect("one of eight");
        assert_eq!(body(store, &key), [winner; 5000]);
    }
    assert_eq!(keys(store, "race/").len(), 20);
}

/// A body in thousands of parts, empty ones among them, is the concatenation.
pub fn parts_are_joined_in_order(store: &dyn ObjectStore) {
    let bytes = noise(10_000);
    for (key, size) in [("two", 6000), ("thousands", 3)] {
        let mut parts: Vec<_> = bytes.chunks(size).map(IoSlice::new).collect();
        parts.insert(0, IoSlice::new(&[]));
        parts.insert(2, IoSlice::new(&[]));
        parts.push(IoSlice::new(&[]));
        assert_eq!(store.create(key, &parts).expect("create"), Created::New);
        assert!(body(store, key) == bytes, "{key}");
    }
}

/// An object without bytes exists and can be read.
pub fn empty_object_is_an_object(store: &dyn ObjectStore) {
    for (key, parts) in [("none", &[][..]), ("empty", &[IoSlice::new(&[])][..])] {
        assert_eq!(store.create(key, parts).expect("create"), Created::New);
        assert_eq!(store.create(key, parts).expect("create"), Created::AlreadyExists);
        assert_eq!(store.read(key, 0).expect("read"), b"");
        assert_eq!(store.stat(key).expect("stat").size, 0);
        store.read_at(key, 0, &mut []).expect("nothing is asked of it");
        assert_eq!(kind(range(store, key, 0, 1)), ErrorKind::Truncated);
    }
    assert_eq!(keys(store, ""), ["empty", "none"]);
}

/// Five mebibytes survive whole and in ranges read by several threads.
pub fn large_object_is_read_back(store: &dyn ObjectStore) {
    let bytes = noise(5 << 20);
    assert_eq!(create(store, "packs/large", &bytes), Created::New);
    assert!(body(store, "packs/large") == bytes);
    let bytes = &bytes;
    thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                for at in (thread * 1009..bytes.len() - 4096).step_by(100_003) {
                    let read = range(store, "packs/large", at as u64, 4096).expect("range");
                    assert!(read == bytes[at..at + 4096], "at {at}");
                }
            });
        }
    });
}

/// The limit of a read is inclusive, and keeps larger objects out.
pub fn object_larger_than_the_limit_is_refused(store: &dyn ObjectStore) {
    let _ = create(store, "a", b"12345");
    assert_eq!(kind(store.read("a", 4)), ErrorKind::TooLarge);
    assert_eq!(kind(store.read("a", 0)), ErrorKind::TooLarge);
    assert_eq!(store.read("a", 5).expect("at the limit"), b"12345");
    assert_eq!(store.read("a", u64::MAX).expect("no limit"), b"12345");
}

/// A range that the object does not have in full is an error, wherever it begins.
pub fn range_past_the_end_is_truncated(store: &dyn ObjectStore) {
    let _ = create(store, "a", b"12345");
    for (offset, len) in [(0, 6), (4, 2), (5, 1), (100, 1), (i64::MAX as u64, 1), (u64::MAX, 2)] {
        assert_eq!(kind(range(store, "a", offset, len)), ErrorKind::Truncated, "{offset}+{len}");
    }
    assert_eq!(range(store, "a", 4, 1).expect("the last byte"), b"5");
}

/// What does not exist is not found, also below an object and where a folder is.
pub fn missing_object_is_not_found(store: &dyn ObjectStore) {
    let _ = create(store, "folder/object", b"1");
    for key in ["a", "folder", "folder/other", "other/object", "folder/object/inner"] {
        assert_eq!(kind(store.read(key, 10)), ErrorKind::NotFound, "{key}");
        assert_eq!(kind(range(store, key, 0, 1)), ErrorKind::NotFound, "{key}");
        assert_eq!(kind(store.stat(key)), ErrorKind::NotFound, "{key}");
    }
}

/// A prefix is a folder: its own objects and those below, no key that merely begins alike.
pub fn folders_are_listed_without_their_neighbours(store: &dyn ObjectStore) {
    assert_eq!(keys(store, ""), [""; 0]);
    let all = ["config", "packs-old/a", "packs/aa/1", "packs/aa/2", "packs/aab", "packs/b/c/d"];
    for key in all {
        let _ = create(store, key, key.as_bytes());
    }
    assert_eq!(keys(store, ""), all);
    assert_eq!(keys(store, "packs/"), all[2..]);
    assert_eq!(keys(store, "packs/aa/"), all[2..4]);
    assert_eq!(keys(store, "packs/b/"), all[5..]);
    for prefix in ["missing/", "packs/a/", "packs/aab/", "config/", "packs/aa/1/"] {
        assert_eq!(keys(store, prefix), [""; 0], "{prefix}");
    }
    for key in all {
        assert_eq!(body(store, key), key.as_bytes());
    }
}

/// 2,000 objects in nested folders are listed completely, with their sizes.
pub fn many_objects_are_listed_once_each(store: &dyn ObjectStore) {
    const COUNT: usize = 2000;
    let key = |n: usize| format!("many/{:02x}/{:x}/{n}", n % 7, n % 3);
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::SeqCst);
                    if n >= COUNT {
                        return;
                    }
                    assert_eq!(create(store, &key(n), &vec![0; n % 50]), Created::New);
                }
            });
        }
    });
    let mut listed = Vec::new();
    let listing = store.list("many/", &mut |meta| {
        listed.push((meta.key, meta.size));
        Ok(())
    });
    listing.expect("list");
    let mut expected: Vec<_> = (0..COUNT).map(|n| (key(n), n as u64 % 50)).collect();
    expected.sort();
    listed.sort();
    assert!(listed == expected, "{} objects listed", listed.len());
}

/// The first error of the callback comes back, and nothing more is listed.
pub fn error_of_the_callback_ends_the_listing(store: &dyn ObjectStore) {
    for n in 0..10 {
        let _ = create(store, &format!("a/{n}"), b"");
    }
    let mut calls = 0;
    let listing = store.list("a/", &mut |meta| {
        calls += 1;
        if calls < 3 { Ok(()) } else { Err(Error::new(ErrorKind::Full, "test", meta.key)) }
    });
    assert_eq!(kind(listing), ErrorKind::Full);
    assert_eq!(calls, 3);
}

/// The callback of a listing can read and delete what it is given.
pub fn store_can_be_used_while_listing(store: &dyn ObjectStore) {
    for n in 0..100 {
        let _ = create(store, &format!("a/{}/{n}", n % 4), b"body");
    }
    let mut seen = BTreeSet::new();
    let listing = store.list("", &mut |meta| {
        assert_eq!(store.read(&meta.key, 100)?, b"body");
        store.delete(&meta.key)?;
        assert!(seen.insert(meta.key), "listed twice");
        Ok(())
    });
    listing.expect("list");
    assert_eq!(seen.len(), 100);
    assert_eq!(keys(store, ""), [""; 0]);
}

/// Deleting twice, or what never was, or below what is no folder, is no error.
pub fn delete_is_idempotent(store: &dyn ObjectStore) {
    let _ = create(store, "folder/a", b"1");
    let _ = create(store, "folder/b", b"2");
    for key in ["folder/a", "folder/a", "never", "never/was", "folder/b/below", "folder"] {
        store.delete(key).expect("delete");
    }
    assert_eq!(kind(store.stat("folder/a")), ErrorKind::NotFound);
    assert_eq!(keys(store, ""), ["folder/b"]);
    assert_eq!(body(store, "folder/b"), b"2");
}

/// After a delete reads find nothing, and the key is free for other content.
pub fn deleted_object_can_be_created_anew(store: &dyn ObjectStore) {
    for content in [&b"first"[..], b"other", b"third"] {
        assert_eq!(create(store, "folder/a", content), Created::New);
        assert_eq!(range(store, "folder/a", 0, 5).expect("range"), content);
        store.delete("folder/a").expect("delete");
        assert_eq!(kind(range(store, "folder/a", 0, 5)), ErrorKind::NotFound);
        assert_eq!(kind(store.read("folder/a", 100)), ErrorKind::NotFound);
    }
}

/// Replace makes a new object, and gives an existing one new content for every kind of read.
pub fn replace_creates_and_replaces(store: &dyn ObjectStore) {
    for content in [&b"first"[..], b"longer than before", b"short", b""] {
        store.replace("sessions/a", content).expect("replace");
        assert_eq!(body(store, "sessions/a"), content);
        let len = content.len();
        assert_eq!(range(store, "sessions/a", 0, len).expect("range"), content);
        assert_eq!(store.stat("sessions/a").expect("stat").size, len as u64);
        assert_eq!(keys(store, "sessions/"), ["sessions/a"]);
    }
    assert_eq!(create(store, "sessions/a", b"1"), Created::AlreadyExists);
}

/// Keys outside the rule are `Invalid` everywhere, and nothing is made of them.
pub fn malformed_keys_are_rejected_by_every_operation(store: &dyn ObjectStore) {
    let long_key = "abcdefg/".repeat(64) + "a"; // 513 bytes
    let long_segment = "a".repeat(256);
    let malformed = [
        "",
        "/",
        "..",
        ".",
        "../a",
        "a/..",
        "a/../b",
        "a/./b",
        "/a",
        "/etc/passwd",
        "a//b",
        "a/",
        "A",
        "packs/Aa",
        ".hidden",
        "a/.tmp-0123456789abcdef",
        "nul\0byte",
        "a b",
        "a\\b",
        "ä",
        "a\n",
        &long_key,
        &long_segment,
    ];
    for key in malformed {
        let kinds = [
            kind(store.create(key, &[IoSlice::new(b"1")])),
            kind(store.replace(key, b"1")),
            kind(store.read(key, 10)),
            kind(range(store, key, 0, 1)),
            kind(store.stat(key)),
            kind(store.delete(key)),
        ];
        assert_eq!(kinds, [ErrorKind::Invalid; 6], "{key:?}");
    }
    for prefix in ["a", "/", "../", "/a/", "a//", "A/", ".a/", "nul\0/"] {
        assert_eq!(kind(store.list(prefix, &mut |_| Ok(()))), ErrorKind::Invalid, "{prefix:?}");
    }
    assert_eq!(keys(store, ""), [""; 0]);
    let longest = "abcdefg/".repeat(63) + "abcdefgh"; // 512 bytes
    assert_eq!(create(store, &longest, b"1"), Created::New);
    assert_eq!(keys(store, ""), [longest]);
}

/// No object has the name of a folder with objects, nor the other way round.
pub fn key_is_never_also_a_folder(store: &dyn ObjectStore) {
    let _ = create(store, "a/b", b"1");
    for key in ["a", "a/b/c", "a/b/c/d"] {
        assert_eq!(kind(store.create(key, &[])), ErrorKind::Invalid, "{key}");
        assert_eq!(kind(store.replace(key, b"")), ErrorKind::Invalid, "{key}");
    }
    assert_eq!(keys(store, ""), ["a/b"]);
    assert_eq!(body(store, "a/b"), b"1");
}

/// A reader that polls while objects are written sees each whole or not at all.
pub fn objects_are_visible_only_whole(store: &dyn ObjectStore) {
    const SIZE: usize = 300_000;
    let done = AtomicBool::new(false);
    let whole = |body: &[u8]| body.len() == SIZE && body.iter().all(|b| Some(b) == body.first());
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                let listing = store.list("whole/", &mut |meta| {
                    assert_eq!(meta.size, SIZE as u64, "{}", meta.key);
                    assert!(whole(&store.read(&meta.key, u64::MAX)?), "{}", meta.key);
                    Ok(())
                });
                listing.expect("list");
                match store.read("whole/replaced", u64::MAX) {
                    Ok(body) => assert!(whole(&body)),
                    Err(err) => assert_eq!(err.kind(), ErrorKind::NotFound),
                }
            }
        });
        let writers: Vec<_> = (0..2u8)
            .map(|writer| {
                scope.spawn(move || {
                    for n in 0..20 {
                        let half = vec![n; SIZE / 2];
                        let parts = [IoSlice::new(&half), IoSlice::new(&half)];
                        let key = format!("whole/{writer}-{n}");
                        assert_eq!(store.create(&key, &parts).expect("create"), Created::New);
                        store.replace("whole/replaced", &half.repeat(2)).expect("replace");
                    }
                })
            })
            .collect();
        let outcomes: Vec<_> = writers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        done.store(true, Ordering::SeqCst);
        assert!(outcomes.iter().all(thread::Result::is_ok), "a writer failed");
    });
    assert_eq!(keys(store, "whole/").len(), 41);
}

/// Bodies that are read, of every length around those at which stores change their way.
pub fn bodies_of_unknown_length_are_created_whole(store: &dyn ObjectStore) {
    for len in [0, 1, 300 << 10, (8 << 20) - 1, 8 << 20, (8 << 20) + 1, (17 << 20) + 3] {
        let content = noise(len);
        let key = format!("stream/{len}");
        let from = |mut content: &[u8]| store.create_from(&key, &mut content);
        assert_eq!(from(&content).expect("create"), Created::New, "{len}");
        assert_eq!(store.stat(&key).expect("stat").size, len as u64);
        assert!(body(store, &key) == content, "{len} bytes differ");
        assert_eq!(from(&noise(len / 2)).expect("create"), Created::AlreadyExists, "{len}");
        assert!(body(store, &key) == content, "{len} bytes were replaced");
    }
}

/// A body that ends by an error, in the first and in a later part.
pub fn a_body_that_fails_creates_nothing(store: &dyn ObjectStore) {
    struct Failing(u64);
    impl std::io::Read for Failing {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            let len = buf.len().min(usize::try_from(self.0).unwrap_or(usize::MAX));
            self.0 -= len as u64;
            if len == 0 { Err(std::io::Error::other("the source broke")) } else { Ok(len) }
        }
    }
    for len in [0, 1000, 20 << 20] {
        store.create_from("stream/failing", &mut Failing(len)).expect_err("it has to fail");
        assert_eq!(kind(store.stat("stream/failing")), ErrorKind::NotFound, "{len}");
    }
    assert_eq!(keys(store, ""), [""; 0]);
}

/// Tails shorter, as long and longer than the object.
pub fn the_tail_is_read_with_the_size(store: &dyn ObjectStore) {
    let content = noise(1000);
    let _ = create(store, "tail/object", &content);
    let _ = create(store, "tail/empty", b"");
    for limit in [0, 1, 999, 1000, 1001, 100_000] {
        let (size, tail) = store.read_tail("tail/object", limit).expect("tail");
        assert_eq!((size, &tail[..]), (1000, &content[1000 - limit.min(1000)..]), "{limit}");
        assert_eq!(store.read_tail("tail/empty", limit).expect("tail"), (0, Vec::new()));
    }
    assert_eq!(kind(store.read_tail("tail/missing", 10)), ErrorKind::NotFound);
}

/// None, one, and more than fit one request; those that do not exist are no error.
pub fn many_objects_are_deleted_at_once(store: &dyn ObjectStore) {
    store.delete_all(&[]).expect("nothing");
    store.delete_all(&["many/missing".to_owned()]).expect("one that is missing");
    let names: Vec<String> = (0..1100).map(|n| format!("many/{n}")).collect();
    for name in names.iter().filter(|name| !name.ends_with('7')) {
        let _ = create(store, name, b"x");
    }
    let _ = create(store, "many-others", b"x");
    store.delete_all(&names).expect("delete");
    assert_eq!(keys(store, ""), ["many-others"]);
    store.delete_dated(&["many-others".to_owned()], store.clock()).expect("delete");
    assert_eq!(keys(store, ""), [""; 0]);
    let malformed = ["fine".to_owned(), "../x".to_owned()];
    assert_eq!(kind(store.delete_all(&malformed)), ErrorKind::Invalid);
}

/// A request dated now is as any other.
pub fn dated_requests_take_effect_in_time(store: &dyn ObjectStore) {
    store.replace_dated("dated/a", b"1", store.clock()).expect("replace");
    store.replace_dated("dated/a", b"2", store.clock()).expect("replace");
    assert_eq!(body(store, "dated/a"), b"2");
}

fn create(store: &dyn ObjectStore, key: &str, body: &[u8]) -> Created {
    store.create(key, &[IoSlice::new(body)]).expect("create")
}

fn body(store: &dyn ObjectStore, key: &str) -> Vec<u8> {
    store.read(key, u64::MAX).expect("read")
}

fn range(store: &dyn ObjectStore, key: &str, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut buf = vec![0; len];
    store.read_at(key, offset, &mut buf).map(|()| buf)
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.expect_err("this has to fail").kind()
}

/// Bytes that do not repeat (a linear congruential generator).
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let step = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..len).map(step).collect()
}
