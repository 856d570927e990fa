//! Trees of 200,000 entries on one core, their nodes in memory: what a backup does besides reading
//! files.
use std::hint::black_box;

use benches::store::Nodes;
use benches::trees;
use chunkstore::tree::{
    Entry, EntryCursor, NodeRef, NodeSource, TreeBuilder, TreeCursor, decode_leaf, diff,
};
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};

const ENTRIES: u64 = 200_000;
const CUT: [u8; 32] = [5; 32];

fn build<'a>(nodes: &Nodes, entries: impl IntoIterator<Item = &'a Entry>) -> (NodeRef, u8) {
    let mut tree = TreeBuilder::new(nodes, &CUT);
    for entry in entries {
        tree.push(entry).expect("entries ascend");
    }
    tree.finish().expect("nodes are kept").expect("there are entries")
}

/// The same tree with one entry in a hundred changed: in one place, as people change things.
fn changed(number: u64) -> bool {
    number % 20_000 < 200
}

fn leaves(c: &mut Criterion) {
    let entries: Vec<_> = (0..256).map(|number| trees::entry(number, 0)).collect();
    let mut group = c.benchmark_group("tree");
    group.throughput(Throughput::Elements(entries.len() as u64));
    group.bench_function("encode leaves", |b| {
        b.iter(|| build(&Nodes::default(), &entries));
    });
    let nodes = Nodes::default();
    let (root, level) = build(&nodes, &entries);
    let mut cursor = TreeCursor::new(&nodes, root, level);
    let mut encoded = Vec::new();
    while let Some(leaf) = cursor.next_leaf().expect("the nodes are whole") {
        encoded.push(nodes.load_node(&leaf.child.node).expect("it is there"));
    }
    group.bench_function("decode leaves", |b| {
        b.iter(|| {
            for leaf in &encoded {
                decode_leaf(black_box(leaf)).map(drop).expect("it was just encoded");
            }
        });
    });
    group.finish();
}

fn whole(c: &mut Criterion) {
    let entries: Vec<_> = (0..ENTRIES).map(|number| trees::entry(number, 0)).collect();
    let edited: Vec<_> =
        (0..ENTRIES).map(|number| trees::entry(number, u64::from(changed(number)))).collect();
    let nodes = Nodes::default();
    let (old, new) = (build(&nodes, &entries), build(&nodes, &edited));
    let mut group = c.benchmark_group("tree");
    group.sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Elements(ENTRIES));
    group.bench_function("build 200k", |b| b.iter(|| build(&Nodes::default(), &entries)));
    group.bench_function("walk 200k", |b| {
        b.iter(|| {
            let mut cursor = EntryCursor::new(TreeCursor::new(&nodes, old.0, old.1));
            let mut count = 0;
            while cursor.peek().expect("the nodes are whole").is_some() {
                count += 1;
                cursor.advance();
            }
            assert_eq!(count, ENTRIES);
        });
    });
    group.bench_function("diff 200k, 1 % changed", |b| {
        b.iter(|| {
            let mut changes = 0;
            let mut each = |_| {
                changes += 1;
                Ok(())
            };
            diff(&nodes, old, new, &mut each).expect("the nodes are whole");
            assert_eq!(changes, ENTRIES / 100);
        });
    });
    group.bench_function("merge 200k with their parent, 1 % changed", |b| {
        b.iter(|| assert_eq!(merge(&nodes, old, &edited), new));
    });
    group.finish();
}

/// What an unchanged backup does: entries are compared with the parent's, and a leaf whose entries all
/// recur is taken over.
fn merge(nodes: &Nodes, parent: (NodeRef, u8), entries: &[Entry]) -> (NodeRef, u8) {
    let mut tree = TreeBuilder::new(nodes, &CUT);
    let mut leaves = TreeCursor::new(nodes, parent.0, parent.1);
    let mut rest = entries;
    while let Some(at) = leaves.next_leaf().expect("the nodes are whole") {
        let (these, more) = rest.split_at(at.leaf.entries.len());
        rest = more;
        if these == at.leaf.entries {
            tree.push_leaf(&at).expect("leaves ascend");
        } else {
            these.iter().for_each(|entry| tree.push(entry).expect("entries ascend"));
        }
    }
    tree.finish().expect("nodes are kept").expect("there are entries")
}

criterion_group!(name = group; config = benches::criterion(); targets = leaves, whole);
criterion_main!(group);
