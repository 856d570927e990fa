//! `dump` of a folder: GNU tar and bsdtar both unpack the archive to the tree that was saved.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use chunkstore::tree::{Body, Content, Kind, State};
use common::scan::{Tree, differences, scan};
use common::site::{ByHand, Site, dir, inline, node, texts};
use common::sources::{Source, everything};
use common::{is_root, memory_dir, noise, not_tested};
use mover::fs::Dir;
use proptest::prelude::*;

/// The programs that unpack, with the options by which they restore everything.
const PROGRAMS: [(&str, &[&str]); 2] = [
    ("tar", &["--xattrs", "--xattrs-include=*", "--acls", "-xpf", "-"]),
    ("bsdtar", &["-xpf", "-"]),
];

/// Unpacks the dump of the latest snapshot with `program` into a new folder.
fn unpacked(site: &Site, program: &str, options: &[&str]) -> tempfile::TempDir {
    let target = memory_dir();
    let mut dump = site.command(&["dump", "latest", "."]).stdout(Stdio::piped()).spawn().unwrap();
    let archive = dump.stdout.take().unwrap();
    let mut unpack = Command::new(program);
    // What names are not in the locale's characters must not matter.
    unpack.args(options).current_dir(&target).stdin(archive).env("LC_ALL", "C");
    let done = unpack.output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(done.status.success(), "{program}: {:?}", texts(&done));
    assert!(dump.wait().unwrap().success());
    target
}

/// What `program` cannot unpack, whatever the archive says.
fn forgive(program: &str, expected: &mut Tree, found: &mut Tree) {
    expected.retain(|_, seen| seen.mode >> 12 != 0o14); // sockets
    if program != "bsdtar" {
        return;
    }
    for (path, seen) in found {
        let Some(source) = expected.get(path) else { continue };
        // libarchive 3.6 takes '-1.5' for half a second after -1 instead of before.
        if source.mtime.0 < 0 && source.mtime.1 > 0 {
            seen.mtime = source.mtime;
        }
        // It sets such an attribute twice, the second time under the name that GNU tar has to have.
        let is_encoded =
            |name: &[u8]| name.windows(3).any(|three| matches!(three, b"%3D" | b"%25"));
        seen.xattrs.retain(|name, _| source.xattrs.contains_key(name) || !is_encoded(name));
    }
}

#[track_caller]
fn assert_unpacked(site: &Site) {
    site.ends(0, &["restore", "latest", "--target", "restored"]);
    let restored = scan(&site.path("restored"));
    for (program, options) in PROGRAMS {
        let target = unpacked(site, program, options);
        let mut expected = scan(&site.path("source"));
        let mut found = scan(target.path());
        forgive(program, &mut expected, &mut found);
        let lines = differences(&expected, &found, false);
        assert!(lines.is_empty(), "{program}: {}", lines[..lines.len().min(20)].join("\n"));
        // Holes are where a restore has them.
        for (path, seen) in &found {
            let held = |data: &[(u64, u64)]| data.iter().map(|(from, to)| to - from).sum::<u64>();
            assert!(held(&seen.data) <= held(&restored[path].data), "{program}: {path:?} grew");
        }
    }
}

#[test]
fn an_archive_of_everything_becomes_the_same_tree() {
    let site = Site::new();
    everything(&site.path("source"));
    // Longer than what these programs can unpack.
    let root = Dir::open_root(&site.path("source")).unwrap();
    root.remove_tree(&[b'd'; 250]).unwrap();
    let source = site.path("source");
    let source = Source(&source);
    source.file("odd/file", "x");
    for (name, value) in [("user.a=b", "with ="), ("user.nl", "x\ny\0z"), ("user.%25", "percent")] {
        source.xattr("odd/file", name, value.as_bytes());
    }
    source.file("odd/many-pieces", "");
    let pieces: Vec<_> = (0..300).map(|n| (n * 16_384, 4096)).collect();
    source.sparse("odd/many-pieces", 300 * 16_384, &pieces);
    source.file("x".repeat(100), "a name that just fits");
    source.file("x".repeat(101), "one that does not");
    site.ends(0, &["backup", "source", "--init"]);
    if is_root() {
        assert_unpacked(&site);
    } else {
        not_tested("unpacking what belongs to others, for this user is not root");
    }
}

/// A file of a random tree.
#[derive(Debug, Clone)]
struct Random {
    path: Vec<u8>,
    size: u64,
    holes: Vec<(u64, u16)>,
    mode: u32,
    mtime: (i64, i64),
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    linked: bool,
}

fn random() -> impl Strategy<Value = Random> {
    let component = prop::collection::vec(any::<u8>(), 1..120).prop_map(|mut name| {
        name.iter_mut().filter(|byte| matches!(**byte, 0 | b'/')).for_each(|byte| *byte = b'~');
        // Neither '.' nor '..'.
        [b"n", &name[..]].concat()
    });
    let attribute = prop::collection::vec(1..255_u8, 1..200)
        .prop_filter("sets twice in bsdtar", |name| !name.contains(&b'='));
    (
        prop::collection::vec(component, 1..4),
        prop_oneof![0..2000_u64, 0..3_000_000_u64, Just(20 << 20)],
        prop::collection::vec((0..20_u64 << 20, any::<u16>()), 0..4),
        0..0o10000_u32,
        (0..4_000_000_000_i64, 0..1_000_000_000_i64),
        prop::collection::vec((attribute, prop::collection::vec(any::<u8>(), 0..300)), 0..4),
        any::<bool>(),
    )
        .prop_map(|(path, size, holes, mode, mtime, xattrs, linked)| Random {
            path: path.join(&b'/'),
            size,
            holes,
            mode,
            mtime,
            xattrs: xattrs
                .into_iter()
                .map(|(name, value)| ([b"user.", &name[..]].concat(), value))
                .collect(),
            linked,
        })
}

fn make(source: &Path, n: usize, file: &Random) {
    let source = Source(source);
    let path = source.path([format!("{n}-").as_bytes(), &file.path].concat());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let content = fs::File::create(&path).unwrap();
    content.set_len(file.size).unwrap();
    for (offset, len) in &file.holes {
        use std::os::unix::fs::FileExt;
        let len = u64::from(*len).min(file.size.saturating_sub(*offset));
        content.write_all_at(&noise(*offset, len as usize), *offset.min(&file.size)).unwrap();
    }
    for (name, value) in &file.xattrs {
        // A name may have been drawn that the file system does not take.
        let _refused =
            rustix::fs::lsetxattr(&path, name.as_slice(), value, rustix::fs::XattrFlags::empty());
    }
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(&path, fs::Permissions::from_mode(file.mode)).unwrap();
    common::sources::set_mtime(&path, file.mtime.0, file.mtime.1);
    if file.linked {
        fs::hard_link(&path, source.path(format!("linked-{n}"))).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 50, ..ProptestConfig::default() })]

    #[test]
    fn archives_of_random_trees_become_the_same_trees(
        files in prop::collection::vec(random(), 1..12),
    ) {
        let site = Site::new();
        for (n, file) in files.iter().enumerate() {
            make(&site.path("source"), n, file);
        }
        site.ends(0, &["backup", "source", "--init"]);
        assert_unpacked(&site);
    }
}

#[test]
fn attributes_larger_than_libarchive_takes_lose_nothing_with_gnu_tar() {
    let (site, repository) = Site::with_repository();
    let hand = ByHand::new(&repository);
    let mut large = node(Kind::File, 1, Content::Inline(b"b".to_vec()), State::Whole);
    large.xattrs =
        (10..40).map(|n| (format!("user.large{n}").into_bytes(), noise(n, 45_000))).collect();
    let entries = vec![
        (b"".to_vec(), dir(State::Whole)),
        (b"a".to_vec(), inline("a", State::Whole)),
        (b"b".to_vec(), Body::Node(large)),
        (b"c".to_vec(), inline("c", State::Whole)),
    ];
    hand.commit(entries, 0);
    let dumped = site.command(&["dump", "latest", "."]).output().unwrap();
    let (_, told, code) = texts(&dumped);
    assert_eq!(code, Some(0));
    assert!(told.contains("warning: b: its attributes take 13"), "{told}");
    fs::write(site.path("archive"), &dumped.stdout).unwrap();
    let listed = Command::new("tar").arg("-tf").arg(site.path("archive")).output().unwrap();
    assert_eq!(texts(&listed).0, "a\nb\nc\n.\n");
}

#[test]
fn files_beyond_eight_gibibytes_keep_their_size() {
    let (site, repository) = Site::with_repository();
    let hand = ByHand::new(&repository);
    let size = 10 << 30;
    let content = Content::Chunks(vec![hand.chunk(9 << 30, b"far out")]);
    let entries = vec![
        (b"".to_vec(), dir(State::Whole)),
        (b"huge".to_vec(), Body::Node(node(Kind::File, size, content, State::Whole))),
    ];
    hand.commit(entries, 0);
    for (program, options) in PROGRAMS {
        let target = unpacked(&site, program, options);
        let meta = fs::metadata(target.path().join("huge")).unwrap();
        use std::os::unix::fs::MetadataExt;
        assert_eq!((meta.len(), meta.blocks() < 100), (size, true), "{program}");
    }
}

#[test]
fn one_inode_number_of_two_files_makes_no_link() {
    let (site, repository) = Site::with_repository();
    let hand = ByHand::new(&repository);
    let file = |text: &str, seconds| {
        let mut file = node(
            Kind::File,
            text.len() as u64,
            Content::Inline(text.as_bytes().to_vec()),
            State::Whole,
        );
        file.linked = true;
        file.mtime.seconds = seconds;
        Body::Node(file)
    };
    let entries = vec![
        (b"".to_vec(), dir(State::Whole)),
        (b"a".to_vec(), file("one", 1)),
        (b"b".to_vec(), file("one", 1)),
        (b"c".to_vec(), file("two", 1)),
        (b"d".to_vec(), file("one", 2)),
    ];
    hand.commit(entries, 0);
    let target = unpacked(&site, PROGRAMS[0].0, PROGRAMS[0].1);
    let tree = scan(target.path());
    let same_as = |name: &[u8]| tree[name].same_as.as_deref();
    assert_eq!((same_as(b"a"), same_as(b"b")), (Some(&b"a"[..]), Some(&b"a"[..])));
    assert_eq!((same_as(b"c"), same_as(b"d")), (None, None));
    assert_eq!(fs::read(target.path().join("c")).unwrap(), b"two");
}
