//! Verification: reads a repository and reports everything that is not as it should be.
//!
//! ```text
//! records decode ─> packs: table, size, both headers (, every blob) ─> index: every record
//!                                   │                                   agrees with the tables
//!                                   └─> trees: every node once; every reference agrees with the tables
//!                                           └─> if anything is damaged: which snapshots and files
//! ```
//! It never stops at a finding; only a listing that fails ends it. It may run while backups and
//! garbage collections do: what is listed first is what refers to what is listed later.
//!
//! Memory: four bytes a data blob and some 100 a pack (so ten million blobs take 50 MB), what `trees`
//! says about nodes, and one whole pack a thread if data is read.
//!
//! What it cannot see: an object that is gone and to which nothing refers (a snapshot, a mark, an
//! announcement), and a change to what a key slot wraps, unless it is the slot given in the options.

mod finding;
mod index;
mod packs;
mod records;
mod repair;
mod trees;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

pub use finding::{Affected, CheckSummary, Finding, FindingKind, Incomplete, Severity};
pub use repair::{RepairSummary, repair_index};

use crate::error::Result;
use crate::id::{PackId, SnapshotId, random_bytes};
use crate::index::list_segments;
use crate::key_slot::Unlock;
use crate::pack::{Location, PackClass};
use crate::record::Snapshot;
use crate::relocation::Relocations;
use crate::repository::Repository;
use crate::tree::{Liveness, NodeRef};
use packs::{Checked, Job, Trace, check_all};
use trees::{Attribution, Walk};

/// Files named by one finding.
const FILES_NAMED: usize = 20;

/// How many packs are read in full.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum ReadData {
    /// None: only their tables.
    #[default]
    None,
    /// This share of them, in percent, chosen at random.
    Percent(f64),
    /// All.
    All,
}

/// How a check is done.
#[derive(Clone, Default)]
pub struct CheckOptions {
    /// How many packs are read in full.
    pub read_data: ReadData,
    /// Threads that read packs; 0 counts as 1.
    pub threads: usize,
    /// What the repository was opened with: then at least one key slot must open with it.
    pub unlock: Option<Unlock>,
}

/// Checks a repository and reports what it finds.
///
/// # Errors
/// When the store cannot be listed. Everything else is a finding.
pub fn check(
    repository: &Repository,
    options: &CheckOptions,
    report: &mut dyn FnMut(Finding),
    progress: &dyn Fn(&str),
) -> Result<CheckSummary> {
    let mut summary = CheckSummary::default();
    let mut count = |finding: Finding, summary: &mut CheckSummary| {
        match finding.severity {
            Severity::Error => summary.errors += 1,
            Severity::Warning => summary.warnings += 1,
        }
        report(finding);
    };
    progress("reading snapshots and other records");
    // What refers comes before what is referred to.
    let snapshots = repository.list_snapshots()?;
    let relocations = repository.reload_relocations()?;
    let segments = list_segments(repository.store())?;
    let objects = records::list(repository)?;
    records::check(repository, options, &objects, &snapshots, &mut |finding| {
        count(finding, &mut summary);
    });
    progress("reading packs");
    let present = objects.packs.iter().map(|(_, id, _)| *id).collect();
    let mut damage = Damage { relocations, present, ..Damage::default() };
    let jobs = choose(&objects.packs, options.read_data);
    let mut data = HashMap::new();
    check_all(repository, &jobs, options.threads, &mut |checked| {
        note_pack(checked, &mut data, &mut damage, &mut summary);
    });
    progress("reading trees");
    let mut walk = Walk::new(repository, &data, &mut damage);
    snapshots.snapshots.iter().for_each(|(_, snapshot)| walk.snapshot(snapshot));
    summary.nodes = walk.nodes;
    summary.incomplete = walk.incomplete;
    summary.snapshots = snapshots.snapshots.len() as u64;
    let used = walk.used;
    for job in jobs.iter().filter(|job| !used.contains(&job.id)) {
        summary.unused_packs += 1;
        summary.unused_bytes += job.size;
    }
    progress("reading the index");
    let buried: HashSet<PackId> = objects.buried(repository);
    let facts = index::Facts { data: &data, damage: &damage, buried: &buried, used: &used };
    summary.segments = index::check(repository, &segments, &facts, &mut |finding| {
        count(finding, &mut summary);
    });
    if !damage.findings.is_empty() {
        progress("finding out which files are damaged");
        attribute(repository, &snapshots.snapshots, &mut damage);
    }
    for mut finding in damage.findings {
        if finding.snapshots.is_empty()
            && matches!(finding.kind, FindingKind::Pack | FindingKind::Blob)
        {
            finding.message += " (no snapshot uses it, but a later backup might; run prune)";
        }
        count(finding, &mut summary);
    }
    Ok(summary)
}

fn attribute(repository: &Repository, snapshots: &[(SnapshotId, Snapshot)], damage: &mut Damage) {
    let mut attribution = Attribution::new(repository, damage);
    snapshots.iter().for_each(|(id, snapshot)| attribution.snapshot(*id, snapshot));
}

/// Which packs are read in full.
fn choose(packs: &[(PackClass, PackId, u64)], read_data: ReadData) -> Vec<Job> {
    let count = match read_data {
        ReadData::None => 0,
        ReadData::All => packs.len(),
        ReadData::Percent(percent) => {
            (packs.len() as f64 * percent.clamp(0.0, 100.0) / 100.0).ceil() as usize
        }
    };
    let mut jobs: Vec<_> = packs
        .iter()
        .map(|(class, id, size)| Job { class: *class, id: *id, size: *size, read: false })
        .collect();
    let seed: [u8; 32] = random_bytes();
    jobs.sort_by_cached_key(|job| *blake3::keyed_hash(&seed, &job.id.0).as_bytes());
    jobs.iter_mut().take(count).for_each(|job| job.read = true);
    jobs
}

fn note_pack(
    checked: Checked,
    data: &mut HashMap<PackId, Box<[Trace]>>,
    damage: &mut Damage,
    summary: &mut CheckSummary,
) {
    let Checked { job, traces, is_gone, fault, flaw, blobs } = checked;
    let Job { class, id, size, read } = job;
    // A garbage collection deletes only what nobody refers to; if anybody does, the trees tell.
    if is_gone {
        return;
    }
    summary.packs += 1;
    if read {
        summary.packs_read += 1;
        summary.bytes_read += size;
    }
    let name = class.object_name(id);
    let error = |message| Finding::new(Severity::Error, FindingKind::Pack, name.clone(), message);
    if let Some(traces) = traces
        && class == PackClass::Data
    {
        data.insert(id, traces);
    }
    if let Some(flaw) = flaw {
        damage.add(error(flaw));
    }
    if let Some(fault) = fault {
        let at = damage.add(error(fault));
        damage.packs.insert(id, at);
    }
    for (ordinal, why) in blobs {
        damage.blob(class, id, ordinal, &why);
    }
}

/// What is damaged, and the findings about it, which are reported once it is known what they hit.
#[derive(Default)]
struct Damage {
    relocations: Arc<Relocations>,
    /// Packs that were listed.
    present: HashSet<PackId>,
    findings: Vec<Finding>,
    packs: HashMap<PackId, usize>,
    blobs: HashMap<PackId, HashMap<u8, usize>>,
    nodes: HashMap<[u8; 16], usize>,
}

impl Damage {
    fn add(&mut self, finding: Finding) -> usize {
        self.findings.push(finding);
        self.findings.len() - 1
    }

    fn missing_pack(&mut self, class: PackClass, id: PackId) {
        if !self.packs.contains_key(&id) {
            let (name, why) = (class.object_name(id), "it is missing");
            let at = self.add(Finding::new(Severity::Error, FindingKind::Pack, name, why));
            self.packs.insert(id, at);
        }
    }

    fn blob(&mut self, class: PackClass, id: PackId, ordinal: u8, why: &str) {
        if self.blobs.get(&id).is_none_or(|blobs| !blobs.contains_key(&ordinal)) {
            let message = format!("place {ordinal}: {why}");
            let name = class.object_name(id);
            let at = self.add(Finding::new(Severity::Error, FindingKind::Blob, name, message));
            self.blobs.entry(id).or_default().insert(ordinal, at);
        }
    }

    /// Where the blob is that a reference says lies at `place`.
    fn now(&self, place: Location) -> Location {
        if !self.relocations.contains(place.pack) {
            return place;
        }
        let places = self.relocations.places(place);
        places.into_iter().find(|place| self.present.contains(&place.pack)).unwrap_or(place)
    }

    /// The packs in which the blobs of a list are.
    fn packs_now(&self, uses: &Liveness) -> HashSet<PackId> {
        let mut packs = HashSet::new();
        for (pack, blobs) in &uses.0 {
            if self.relocations.contains(*pack) {
                let used = (0..128).filter(|ordinal| blobs >> ordinal & 1 == 1);
                packs.extend(used.map(|ordinal| self.now(Location { pack: *pack, ordinal }).pack));
            } else {
                packs.insert(*pack);
            }
        }
        packs
    }

    /// The finding about the blob at a place.
    fn of_blob(&self, place: Location) -> Option<usize> {
        let Location { pack, ordinal } = &self.now(place);
        let whole = self.packs.get(pack);
        whole.or_else(|| self.blobs.get(pack)?.get(ordinal)).copied()
    }

    fn of_node(&self, node: &NodeRef) -> Option<usize> {
        let own = node.id.0.first_chunk().and_then(|key| self.nodes.get(key)).copied();
        own.or_else(|| self.of_blob(node.location()))
    }

    /// Whether any pack of the list has damage.
    fn touches(&self, uses: &Liveness) -> bool {
        let mut packs = self.packs_now(uses).into_iter();
        packs.any(|pack| self.packs.contains_key(&pack) || self.blobs.contains_key(&pack))
    }
}
