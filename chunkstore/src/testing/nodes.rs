//! Tree nodes in memory.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::id::{BlobId, PackId};
use crate::limits::PACK_BLOBS_MAX;
use crate::pack::BlobKind;
use crate::tree::{NodeRef, NodeSink, NodeSource};

/// Stores nodes, each different one once, and gives them back.
#[derive(Debug, Default)]
pub struct MemoryNodes(Mutex<Nodes>);

#[derive(Debug, Default)]
struct Nodes {
    by_id: HashMap<BlobId, usize>,
    all: Vec<(BlobKind, Vec<u8>)>,
    loads: usize,
}

impl MemoryNodes {
    /// All nodes, in the order in which they were first stored.
    pub fn all(&self) -> Vec<(BlobKind, Vec<u8>)> {
        self.nodes().all.clone()
    }

    /// Number of different nodes stored.
    pub fn len(&self) -> usize {
        self.nodes().all.len()
    }

    /// Whether no node was stored.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How often nodes were read so far, one or several.
    pub fn loads(&self) -> usize {
        self.nodes().loads
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NodeSink for MemoryNodes {
    fn store_node(&self, kind: BlobKind, plain: &[u8]) -> Result<NodeRef> {
        let id = BlobId(*blake3::hash(plain).as_bytes());
        let mut nodes = self.nodes();
        let next = nodes.all.len();
        let at = *nodes.by_id.entry(id).or_insert(next);
        if at == next {
            nodes.all.push((kind, plain.to_vec()));
        }
        let mut pack = PackId([0xee; 16]);
        pack.0[..8].copy_from_slice(&((at / PACK_BLOBS_MAX) as u64).to_le_bytes());
        let ordinal = (at % PACK_BLOBS_MAX) as u8;
        Ok(NodeRef { id, pack, ordinal })
    }

    fn may_refer(&self, _: PackId, _: u128) -> bool {
        true
    }
}

impl Nodes {
    fn find(&self, node: &NodeRef) -> Result<Vec<u8>> {
        let at = self.by_id.get(&node.id).copied();
        let missing = || Error::new(ErrorKind::NotFound, "no such node");
        let (_, plain) = &self.all[at.ok_or_else(missing)?];
        Ok(plain.clone())
    }
}

impl NodeSource for MemoryNodes {
    fn load_node(&self, node: &NodeRef) -> Result<Vec<u8>> {
        let mut nodes = self.nodes();
        nodes.loads += 1;
        nodes.find(node)
    }

    /// Gives most of what is asked for, as a source does that has a limit.
    fn load_nodes(&self, wanted: &[NodeRef]) -> Vec<Result<Vec<u8>>> {
        let mut nodes = self.nodes();
        nodes.loads += 1;
        let given = wanted.len() - wanted.len() / 4;
        wanted.iter().take(given).map(|node| nodes.find(node)).collect()
    }
}
