//! Trees: what goes in comes out, wherever one begins to read; equal content makes equal nodes,
//! whatever its history.

#![expect(clippy::unwrap_used, reason = "also in the functions that the tests share")]

mod strategies;

use std::collections::{BTreeMap, BTreeSet};

use chunkstore::pack::BlobKind;
use chunkstore::testing::MemoryNodes;
use chunkstore::tree::{
    Absence, Body, Change, Content, End, Entry, EntryCursor, Kind, Liveness, Node, NodeRef, State,
    Timestamp, TreeBuilder, TreeCursor, decode_interior, decode_leaf, diff, end_key, extent_key,
    for_each_node,
};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use strategies::{blob, body, entries, interior, key};

const CUT: [u8; 32] = [3; 32];

type Root = (NodeRef, u8);

fn build(nodes: &MemoryNodes, entries: &[Entry]) -> Option<Root> {
    let mut builder = TreeBuilder::new(nodes, &CUT);
    entries.iter().for_each(|entry| builder.push(entry).unwrap());
    builder.finish().unwrap()
}

fn cursor(nodes: &MemoryNodes, root: Root) -> EntryCursor<'_> {
    EntryCursor::new(TreeCursor::new(nodes, root.0, root.1))
}

fn rest(mut cursor: EntryCursor<'_>) -> Vec<Entry> {
    let mut entries = Vec::new();
    while let Some(entry) = cursor.peek().unwrap().cloned() {
        entries.push(entry);
        cursor.advance();
    }
    entries
}

/// A file like most are.
fn file(key: Vec<u8>, number: u32) -> Entry {
    let bundle = blob(number / 50);
    let content = Content::Part { bundle, offset: 0, hash: [number as u8; 16] };
    let time = Timestamp { seconds: 1_700_000_000 + i64::from(number), nanos: number * 1000 };
    let node = Node {
        kind: Kind::File,
        mode: 0o644,
        uid: 1000,
        gid: 1000,
        size: 1,
        mtime: time,
        ctime: time,
        ino: u64::from(number),
        fs: 0,
        linked: false,
        rdev: (0, 0),
        xattrs: Vec::new(),
        state: State::Whole,
        content,
    };
    let body = Body::Node(node);
    Entry { key, body }
}

/// So many files in folders of a hundred.
fn many(count: u32) -> Vec<Entry> {
    let key = |n: u32| format!("folder {:05}\0file {n:07}.txt", n / 100).into_bytes();
    (0..count).map(|n| file(key(n), n)).collect()
}

/// Builds like a backup does: leaves of the older tree are taken over where all their entries recur.
fn rebuild(nodes: &MemoryNodes, old: Root, new: &[Entry]) -> Option<Root> {
    let mut builder = TreeBuilder::new(nodes, &CUT);
    let mut leaves = TreeCursor::new(nodes, old.0, old.1);
    let mut reusable = BTreeMap::new();
    while let Some(at) = leaves.next_leaf().unwrap() {
        if !at.is_last {
            reusable.insert(at.leaf.entries[0].key.clone(), at);
        }
    }
    let mut rest = new;
    while let Some(next) = rest.first() {
        let leaf = reusable.get(&next.key).filter(|at| rest.starts_with(&at.leaf.entries));
        match leaf {
            Some(at) => {
                builder.push_leaf(at).unwrap();
                rest = &rest[at.leaf.entries.len()..];
            }
            _ => {
                builder.push(next).unwrap();
                rest = &rest[1..];
            }
        }
    }
    builder.finish().unwrap()
}

/// What differs, found by comparing everything.
fn naive_diff(old: &[Entry], new: &[Entry]) -> Vec<(Vec<u8>, char)> {
    // A large file counts as one, with its extents.
    let group = |entries: &[Entry]| {
        let mut groups: BTreeMap<Vec<u8>, (Node, Vec<Body>)> = BTreeMap::new();
        let mut last = None;
        for entry in entries {
            match &entry.body {
                Body::Node(node) => {
                    groups.insert(entry.key.clone(), (node.clone(), Vec::new()));
                    last = Some(entry.key.clone());
                }
                body => groups.get_mut(last.as_ref().unwrap()).unwrap().1.push(body.clone()),
            }
        }
        groups
    };
    let (old, new) = (group(old), group(new));
    let keys: BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let mut changes = Vec::new();
    for key in keys {
        let change = match (old.get(key), new.get(key)) {
            (Some(_), None) => '-',
            (None, _) => '+',
            (Some((a, a_extents)), Some((b, b_extents))) => {
                let content = |node: &Node| match &node.content {
                    Content::Part { hash, .. } => format!("{hash:?}"),
                    Content::None | Content::Extents => String::new(),
                    other => format!("{other:?}"),
                };
                let what = |n: &Node| (n.kind, n.size, n.rdev, content(n));
                let facts = |n: &Node| (n.mode, n.uid, n.gid, n.mtime, n.xattrs.clone());
                if what(a) != what(b) || a_extents != b_extents {
                    'M'
                } else if facts(a) != facts(b) {
                    'U'
                } else {
                    continue;
                }
            }
        };
        changes.push((key.clone(), change));
    }
    changes
}

fn found_diff(nodes: &MemoryNodes, old: Root, new: Root) -> Vec<(Vec<u8>, char)> {
    let mut changes = Vec::new();
    diff(nodes, old, new, &mut |change| {
        changes.push(match change {
            Change::Added(entry) => (entry.key, '+'),
            Change::Removed(entry) => (entry.key, '-'),
            Change::Content(entry, _) => (entry.key, 'M'),
            Change::Metadata(entry, _) => (entry.key, 'U'),
            Change::Lost(_, entry, _) => (entry.key, '!'),
        });
        Ok(())
    })
    .unwrap();
    changes
}

#[test]
fn how_a_large_file_ended_is_seen_though_its_node_ends_an_equal_leaf() {
    let mut entries: Vec<_> = (0..100).map(|n| file(format!("a{n:03}").into_bytes(), n)).collect();
    let mut large = file(b"b".to_vec(), 1);
    if let Body::Node(node) = &mut large.body {
        node.content = Content::Extents;
        // Fills the leaf.
        node.xattrs = vec![(b"user.large".to_vec(), vec![7; 64 << 10])];
    }
    entries.push(large);
    entries.push(Entry { key: extent_key(b"b", 0), body: Body::Extent(Vec::new()) });
    let nodes = MemoryNodes::default();
    let whole = build(&nodes, &entries).unwrap();
    let end = End { size: 1, state: State::Cut };
    entries.push(Entry { key: end_key(b"b"), body: Body::End(end) });
    let cut = build(&nodes, &entries).unwrap();
    assert_eq!(found_diff(&nodes, whole, cut), [(b"b".to_vec(), 'U')]);
    assert_eq!(found_diff(&nodes, cut, whole), [(b"b".to_vec(), 'U')]);
    assert_eq!(found_diff(&nodes, cut, cut), []);
}

/// Absence of a name is a difference only if the first tree had it, or did not say so already.
#[test]
fn names_that_became_absent_are_told() {
    use Absence::{Excluded, Unreadable};
    let there = || file(b"x".to_vec(), 1).body;
    let absent = |reason| Some(Body::Absent(reason));
    let tree = |nodes: &MemoryNodes, body: Option<Body>| {
        let mut entries = vec![file(b"a".to_vec(), 0)];
        entries.extend(body.map(|body| Entry { key: b"x".to_vec(), body }));
        build(nodes, &entries).unwrap()
    };
    for (before, after, mark) in [
        (Some(there()), absent(Unreadable), Some('!')),
        (Some(there()), absent(Excluded), Some('!')),
        (None, absent(Unreadable), Some('!')),
        (None, absent(Excluded), None),
        (absent(Excluded), absent(Excluded), None),
        (absent(Unreadable), absent(Unreadable), None),
        (absent(Excluded), absent(Unreadable), Some('!')),
        (absent(Unreadable), absent(Excluded), None),
        (absent(Unreadable), Some(there()), Some('+')),
        (absent(Unreadable), None, None),
    ] {
        let what = format!("{before:?} {after:?}");
        let nodes = MemoryNodes::default();
        let (old, new) = (tree(&nodes, before), tree(&nodes, after));
        let found: Vec<_> =
            found_diff(&nodes, old, new).into_iter().map(|(_, mark)| mark).collect();
        assert_eq!(found, mark.into_iter().collect::<Vec<_>>(), "{what}");
    }
}

/// Edits of a list of entries: where, and what to put there, nothing to remove it.
fn edits() -> impl Strategy<Value = Vec<(Vec<u8>, Option<Body>)>> {
    let node = strategies::node().prop_map(Body::Node);
    proptest::collection::vec((key(), proptest::option::of(node)), 0..10)
}

fn edited(entries: &[Entry], edits: Vec<(Vec<u8>, Option<Body>)>) -> Vec<Entry> {
    let pair = |entry: &Entry| (entry.key.clone(), entry.body.clone());
    let mut map: BTreeMap<_, _> = entries.iter().map(pair).collect();
    for (key, body) in edits {
        match body {
            Some(body) => drop(map.insert(key, body)),
            None => drop(map.remove(&key)),
        }
    }
    map.into_iter().map(|(key, body)| Entry { key, body }).collect()
}

/// Entries without extents that stand alone, which no backup makes.
fn files(count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Entry>> {
    let files = entries(count).prop_map(|mut entries| {
        entries.retain(|entry| entry.node().is_some());
        entries
    });
    files.prop_filter("without an entry there is no tree", |entries| !entries.is_empty())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn any_entries_come_out_as_they_went_in(entries in entries(1..400)) {
        let nodes = MemoryNodes::default();
        let root = build(&nodes, &entries).unwrap();
        prop_assert!(rest(cursor(&nodes, root)) == entries);
    }

    #[test]
    fn leaves_name_their_packs(entries in entries(1..300)) {
        let nodes = MemoryNodes::default();
        build(&nodes, &entries).unwrap();
        for (kind, plain) in nodes.all() {
            if kind == BlobKind::Leaf {
                let leaf = decode_leaf(&plain).unwrap();
                let blobs = leaf.entries.iter().flat_map(Entry::blobs);
                let used: BTreeSet<_> = blobs.map(|blob| blob.location.pack).collect();
                prop_assert_eq!(used.len(), leaf.packs.len());
                prop_assert_eq!(used, leaf.packs.into_iter().collect());
            }
        }
    }

    #[test]
    fn any_interior_node_comes_out_as_it_went_in(interior in interior()) {
        let plain = interior.encode();
        prop_assert_eq!(decode_interior(&plain).unwrap(), interior);
    }

    #[test]
    fn cut_or_extended_nodes_are_refused(entries in entries(1..20), interior in interior(), at: prop::sample::Index) {
        let nodes = MemoryNodes::default();
        build(&nodes, &entries).unwrap();
        let (_, leaf) = &nodes.all()[0];
        prop_assert!(decode_leaf(&leaf[..at.index(leaf.len())]).is_err());
        prop_assert!(decode_leaf(&[&leaf[..], &[0]].concat()).is_err());
        let plain = interior.encode();
        prop_assert!(decode_interior(&plain[..at.index(plain.len())]).is_err());
        prop_assert!(decode_interior(&[&plain[..], &[0]].concat()).is_err());
    }

    #[test]
    fn a_cursor_can_begin_anywhere(entries in entries(1..300), keys in proptest::collection::vec(key(), 20)) {
        let nodes = MemoryNodes::default();
        let root = build(&nodes, &entries).unwrap();
        let mut cursor = cursor(&nodes, root);
        for key in keys {
            cursor.seek(&key).unwrap();
            let expected = entries.iter().find(|entry| entry.key >= key);
            prop_assert_eq!(cursor.peek().unwrap(), expected);
        }
    }

    #[test]
    fn a_tree_does_not_tell_how_it_came_to_be(entries in files(1..500), edits in edits()) {
        let nodes = MemoryNodes::default();
        let old = build(&nodes, &entries).unwrap();
        let entries = edited(&entries, edits);
        let stored = nodes.len();
        let reused = rebuild(&nodes, old, &entries);
        let new_nodes = nodes.len() - stored;
        prop_assert_eq!(reused, build(&nodes, &entries));
        prop_assert_eq!(nodes.len() - stored, new_nodes);
    }

    #[test]
    fn differences_are_those_found_by_comparing_everything(entries in files(1..300), edits in edits()) {
        let nodes = MemoryNodes::default();
        let (old, new) = (entries.clone(), edited(&entries, edits));
        prop_assume!(!new.is_empty());
        let roots = [&old, &new].map(|entries| build(&nodes, entries).unwrap());
        prop_assert_eq!(found_diff(&nodes, roots[0], roots[1]), naive_diff(&old, &new));
    }

    #[test]
    fn any_two_trees_can_be_compared(old in files(1..60), new in files(1..60)) {
        let nodes = MemoryNodes::default();
        let roots = [&old, &new].map(|entries| build(&nodes, entries).unwrap());
        prop_assert_eq!(found_diff(&nodes, roots[0], roots[1]), naive_diff(&old, &new));
    }
}

#[test]
fn one_insertion_makes_few_new_nodes_wherever_it_is() {
    let nodes = MemoryNodes::default();
    let entries = many(40_000);
    let root = build(&nodes, &entries).unwrap();
    assert!(root.1 >= 1);
    let all = nodes.len();
    assert!(all > 100, "{all} nodes");
    for at in [0, 1, 20_000, 39_999] {
        let mut edited = entries.clone();
        let key = [&entries[at].key[..], b" (copy)"].concat();
        edited.insert(at + 1, file(key, 77));
        let before = nodes.len();
        let new = build(&nodes, &edited).unwrap();
        let added = nodes.len() - before;
        // One leaf, or two if it is cut there, and the path to the root.
        assert!(added <= 2 * (usize::from(new.1) + 1), "{added} of {all} nodes are new");
        let loads = nodes.loads();
        assert_eq!(found_diff(&nodes, root, new).len(), 1);
        assert!(rest(cursor(&nodes, new)) == edited);
        let loads = nodes.loads() - loads;
        assert!(loads <= 4 * all, "{loads} loads");
    }
}

#[test]
fn seeking_reads_one_path() {
    let nodes = MemoryNodes::default();
    let entries = many(40_000);
    let root = build(&nodes, &entries).unwrap();
    for entry in entries.iter().step_by(1371) {
        let before = nodes.loads();
        let mut cursor = cursor(&nodes, root);
        cursor.seek(&entry.key).unwrap();
        assert_eq!(cursor.peek().unwrap(), Some(entry));
        assert_eq!(nodes.loads() - before, usize::from(root.1) + 1);
    }
}

#[test]
fn reading_on_takes_many_nodes_at_a_time() {
    let nodes = MemoryNodes::default();
    let entries = many(100_000);
    let root = build(&nodes, &entries).unwrap();
    let all = nodes.len();
    assert!(all > 300, "{all} nodes");
    let before = nodes.loads();
    assert!(rest(cursor(&nodes, root)) == entries);
    let loads = nodes.loads() - before;
    assert!(loads < all / 15, "{loads} loads of {all} nodes");
}

#[test]
fn what_was_read_ahead_is_not_mistaken_for_what_is_wanted() {
    let nodes = MemoryNodes::default();
    let entries = many(40_000);
    let root = build(&nodes, &entries).unwrap();
    let mut cursor = cursor(&nodes, root);
    // Reads on for a while from each place, backwards and forwards.
    for from in [30_000, 100, 39_000, 0, 20_000, 20_001] {
        cursor.seek(&entries[from].key).unwrap();
        for entry in entries.iter().skip(from).take(5000) {
            assert_eq!(cursor.peek().unwrap(), Some(entry));
            cursor.advance();
        }
    }
}

#[test]
fn interior_nodes_say_exactly_which_blobs_their_leaves_use() {
    let nodes = MemoryNodes::default();
    let mut entries = many(30_000);
    for (n, entry) in entries.iter_mut().enumerate().step_by(10) {
        let Body::Node(node) = &mut entry.body else {
            continue;
        };
        node.content = Content::Extents;
        let chunk = chunkstore::tree::Chunk { offset: 0, blob: blob(700 + n as u32) };
        let extent = Body::Extent(vec![chunk]);
        *entry = Entry { key: extent_key(&entry.key, 0), body: extent };
    }
    let root = build(&nodes, &entries).unwrap();
    let mut listed = Liveness::default();
    let mut level_1 = 0;
    for_each_node(&nodes, root.0, root.1, &mut |_| true, &mut |_, interior| {
        if interior.level > 1 {
            assert_eq!(interior.liveness, Liveness::default());
            return Ok(());
        }
        level_1 += 1;
        let mut used = Liveness::default();
        for child in &interior.children {
            use chunkstore::tree::NodeSource;
            let leaf = decode_leaf(&nodes.load_node(&child.node)?).unwrap();
            assert_eq!(leaf.entries[0].key, child.first_key);
            assert_eq!(leaf.entries.len() as u64, child.entries);
            let blobs = leaf.entries.iter().flat_map(Entry::blobs);
            blobs.for_each(|blob| used.mark(blob.location));
        }
        assert_eq!(interior.liveness, used);
        listed.union(&used);
        Ok(())
    })
    .unwrap();
    assert!(level_1 >= 1);
    let mut all = Liveness::default();
    let blobs = entries.iter().flat_map(Entry::blobs);
    blobs.for_each(|blob| all.mark(blob.location));
    assert_eq!(listed, all);
}

#[test]
fn large_entries_do_not_make_large_nodes() {
    let nodes = MemoryNodes::default();
    let key = |n: u32| [format!("{n:04}").into_bytes(), vec![b'k'; 4000]].concat();
    let mut entries: Vec<_> = (0..500).map(|n| file(key(n), n)).collect();
    if let Body::Node(node) = &mut entries[100].body {
        node.xattrs = vec![(b"user.large".to_vec(), vec![1; 3 << 20])];
    }
    let root = build(&nodes, &entries).unwrap();
    assert!(rest(cursor(&nodes, root)) == entries);
    let mut sizes: Vec<_> = nodes.all().iter().map(|(_, plain)| plain.len()).collect();
    sizes.sort_unstable();
    assert!(sizes.pop().unwrap() < (3 << 20) + (300 << 10));
    assert!(sizes.pop().unwrap() < 300 << 10, "{sizes:?}");
}

#[test]
fn entries_out_of_order_or_too_long_are_refused() {
    let nodes = MemoryNodes::default();
    for (first, second) in [("b", "a"), ("a", "a"), ("a", "")] {
        let mut builder = TreeBuilder::new(&nodes, &CUT);
        builder.push(&file(first.into(), 1)).unwrap();
        let error = builder.push(&file(second.into(), 2)).unwrap_err();
        assert!(error.to_string().contains("out of order"), "{error}");
    }
    let mut builder = TreeBuilder::new(&nodes, &CUT);
    builder.push(&file(vec![b'x'; 256 << 10], 1)).unwrap();
    builder.push(&file(vec![b'y'; (256 << 10) + 1], 1)).unwrap_err();
    assert!(TreeBuilder::new(&nodes, &CUT).finish().unwrap().is_none());
}

#[test]
fn a_body_of_every_kind_occurs() {
    // What the properties above are worth depends on what they are tried with.
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut kinds = BTreeSet::new();
    for _ in 0..300 {
        let value = body().new_tree(&mut runner).unwrap().current();
        kinds.insert(match value {
            Body::Extent(_) => "extent",
            Body::End(_) => "end",
            Body::Absent(_) => "absent",
            Body::Node(node) if node.state != State::Whole => "not whole",
            Body::Node(node) => match (node.kind, node.content) {
                (Kind::File, Content::None) => "none",
                (Kind::File, Content::Inline(_)) => "inline",
                (Kind::File, Content::Part { .. }) => "part",
                (Kind::File, Content::Chunks(_)) => "chunks",
                (Kind::File, Content::Extents) => "extents",
                (Kind::Symlink, _) => "link",
                (Kind::CharDevice | Kind::BlockDevice, _) => "device",
                _ => "other",
            },
        });
    }
    assert_eq!(kinds.len(), 12, "{kinds:?}");
}
