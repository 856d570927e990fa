//! Checks the index: every segment, and every record against the tables of the packs.

use std::collections::{HashMap, HashSet};

use super::Damage;
use super::finding::{Finding, FindingKind, Severity};
use super::packs::Trace;
use crate::error::{ErrorKind, Result, chain};
use crate::id::{PackId, SegmentId};
use crate::index::{FOLDER, Record, Segment};
use crate::pack::PackClass;
use crate::repository::Repository;

/// What records are compared with.
pub(super) struct Facts<'a> {
    pub(super) data: &'a HashMap<PackId, Box<[Trace]>>,
    pub(super) damage: &'a Damage,
    /// Packs about to be deleted.
    pub(super) buried: &'a HashSet<PackId>,
    /// Packs that snapshots use.
    pub(super) used: &'a HashSet<PackId>,
}

/// Checks all `segments` and returns how many there were.
pub(super) fn check(
    repository: &Repository,
    segments: &[SegmentId],
    facts: &Facts<'_>,
    report: &mut dyn FnMut(Finding),
) -> u64 {
    let mut tally = Tally::default();
    let mut read = 0;
    let mut find = |severity, name: &str, message: String| {
        report(Finding::new(severity, FindingKind::Index, name, message));
    };
    for id in segments {
        tally.start();
        let name = format!("{FOLDER}{id}");
        match check_segment(repository, *id, facts, &mut tally) {
            // Merged into another since it was listed.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => {
                let advice = "no data is lost; run 'repair-index'";
                find(Severity::Error, &name, format!("{}; {advice}", chain(&error)));
            }
            Ok(()) => {}
        }
        read += 1;
        if tally.wrong > 0 {
            let why = "records do not agree with the packs they name; run 'repair-index'";
            find(Severity::Error, &name, format!("{} {why}", tally.wrong));
        }
        if tally.dangling > 0 {
            let why =
                "records name packs that are gone; backups pass over them, prune removes them";
            find(Severity::Warning, &name, format!("{} {why}", tally.dangling));
        }
    }
    let is_unknown = |pack: &&PackId| facts.data.contains_key(pack) && !tally.packs.contains(pack);
    let unknown = facts.used.iter().filter(is_unknown).count();
    if unknown > 0 {
        let why = "packs in use are not in the index: their content is stored again by later \
                   backups; run 'repair-index'";
        find(Severity::Warning, FOLDER, format!("{unknown} {why}"));
    }
    read
}

#[derive(Default)]
struct Tally {
    /// Packs named by any segment.
    packs: HashSet<PackId>,
    /// Whether packs that were not listed are there now.
    late: HashMap<PackId, bool>,
    wrong: u64,
    dangling: u64,
    last: Option<Record>,
}

impl Tally {
    fn start(&mut self) {
        (self.wrong, self.dangling, self.last) = (0, 0, None);
    }
}

fn check_segment(
    repository: &Repository,
    id: SegmentId,
    facts: &Facts<'_>,
    tally: &mut Tally,
) -> Result<()> {
    let store = repository.store();
    let segment = Segment::open(store, repository.keys(), id)?;
    segment.for_each(store, &mut |record| {
        let is_ordered = tally.last.is_none_or(|last| last <= record);
        tally.last = Some(record);
        let (pack, ordinal) = (record.location.pack, usize::from(record.location.ordinal));
        tally.packs.insert(pack);
        match facts.data.get(&pack) {
            Some(traces) => {
                let fits = traces.get(ordinal).is_some_and(|trace| trace.begins(&record.prefix));
                tally.wrong += u64::from(!fits || !is_ordered);
            }
            None if facts.damage.packs.contains_key(&pack) || facts.buried.contains(&pack) => {}
            None => {
                // A backup may have stored it since packs were listed.
                let name = || PackClass::Data.object_name(pack);
                let is_there =
                    *tally.late.entry(pack).or_insert_with(|| store.stat(&name()).is_ok());
                tally.dangling += u64::from(!is_there);
            }
        }
        Ok(())
    })?;
    segment.verify_filter(store)
}
