//! Checks the small objects, and sorts all objects by what they are.

use std::collections::{BTreeMap, HashSet};

use super::CheckOptions;
use super::finding::{Finding, FindingKind, Severity};
use crate::codec::seal::ObjectKind;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::id::{GenerationId, PackId, SegmentId, SlotId, SnapshotId};
use crate::key_slot;
use crate::limits::RECORD_BYTES_MAX;
use crate::pack::PackClass;
use crate::record::{self, Config, Forgotten, Session, Verdict, Waits};
use crate::relocation;
use crate::repository::{Repository, SnapshotList};

/// All objects of a repository.
#[derive(Default)]
pub(super) struct Objects {
    pub(super) packs: Vec<(PackClass, PackId, u64)>,
    /// Small objects by folder.
    records: BTreeMap<&'static str, Vec<String>>,
    unknown: Vec<String>,
    has_config: bool,
}

const RECORDS: [&str; 10] = [
    key_slot::FOLDER,
    record::SNAPSHOTS,
    record::FORGOTTEN,
    record::SESSIONS,
    record::TOMBSTONES,
    record::WAITS,
    record::DOOMED,
    record::RELOCATIONS,
    record::FENCES,
    record::PROBES,
];

/// Lists everything.
pub(super) fn list(repository: &Repository) -> Result<Objects> {
    let mut objects = Objects::default();
    repository.store().list("", &mut |meta| {
        objects.sort(meta.key, meta.size);
        Ok(())
    })?;
    Ok(objects)
}

impl Objects {
    fn sort(&mut self, key: String, size: u64) {
        for class in [PackClass::Data, PackClass::Meta] {
            let id = key.rsplit('/').next().and_then(|name| name.parse::<PackId>().ok());
            if let Some(id) = id.filter(|id| class.object_name(*id) == key) {
                return self.packs.push((class, id, size));
            }
        }
        if key == record::CONFIG {
            self.has_config = true;
            return;
        }
        let folder = RECORDS.iter().find(|folder| key.starts_with(**folder)).copied();
        let Some(folder) = folder else {
            let id = key.strip_prefix(crate::index::FOLDER);
            if id.is_none_or(|id| id.parse::<SegmentId>().is_err()) {
                self.unknown.push(key);
            }
            return;
        };
        let name = &key[folder.len()..];
        if folder == record::PROBES {
            return; // gone in a moment; what is left goes with the next prune
        }
        let is_known = if folder == key_slot::FOLDER {
            name.parse::<SlotId>().is_ok()
        } else {
            name.parse::<SnapshotId>().is_ok()
        };
        if is_known {
            self.records.entry(folder).or_default().push(key);
        } else {
            self.unknown.push(key);
        }
    }

    fn of(&self, folder: &str) -> &[String] {
        self.records.get(folder).map_or(&[], |keys| keys)
    }

    /// Data packs that are about to be deleted, as far as that can be read.
    pub(super) fn buried(&self, repository: &Repository) -> HashSet<PackId> {
        let (store, keys) = (repository.store(), repository.keys());
        let ids = self.of(record::TOMBSTONES).iter();
        ids.filter_map(|name| name[record::TOMBSTONES.len()..].parse::<GenerationId>().ok())
            .filter_map(|id| record::read_tombstones(store, keys, id).ok())
            .flat_map(|tombstones| tombstones.data)
            .collect()
    }
}

/// Checks every small object.
pub(super) fn check(
    repository: &Repository,
    options: &CheckOptions,
    objects: &Objects,
    snapshots: &SnapshotList,
    report: &mut dyn FnMut(Finding),
) {
    use FindingKind as Kind;
    let (store, keys) = (repository.store(), repository.keys());
    let mut find = |severity, kind, object: &str, message: String| {
        report(Finding::new(severity, kind, object, message));
    };
    if objects.has_config {
        let read = record::read_json::<Config>(store, keys, ObjectKind::Config, record::CONFIG);
        let why = match read {
            Ok(config) if config != *repository.config() => Some("it has changed".to_owned()),
            Ok(_) => None,
            Err(error) => Some(chain(&error)),
        };
        if let Some(why) = why {
            find(Severity::Error, Kind::Config, record::CONFIG, why);
        }
    } else {
        find(Severity::Error, Kind::Config, record::CONFIG, "it is missing".into());
    }
    for name in objects.of(key_slot::FOLDER) {
        let fault = match store.read(name, RECORD_BYTES_MAX) {
            Ok(bytes) => key_slot::fault(keys, name, &bytes).map(str::to_owned),
            Err(error) => Some(chain(&error)),
        };
        if let Some(fault) = fault {
            find(Severity::Error, Kind::KeySlot, name, fault);
        }
    }
    let opens =
        options.unlock.as_ref().map(|unlock| key_slot::open(store, keys.repository, unlock));
    if let Some(Err(error)) = opens {
        find(Severity::Error, Kind::KeySlot, key_slot::FOLDER, chain(&error));
    } else if objects.of(key_slot::FOLDER).is_empty() {
        let why = "there is no key slot: nobody can open the repository again";
        find(Severity::Error, Kind::KeySlot, key_slot::FOLDER, why.into());
    }
    for (name, error) in &snapshots.damaged {
        let why = format!(
            "{}; this snapshot is lost, and prune waits until it is forgotten",
            chain(error)
        );
        find(Severity::Error, Kind::Snapshot, name, why);
    }
    for name in &objects.unknown {
        let why = "it is no part of a repository";
        find(Severity::Warning, Kind::Unknown, name, why.into());
    }
    let lists = |name: &str, folder: &str| -> Result<()> {
        let id = name[folder.len()..].parse::<GenerationId>()?;
        match folder {
            record::TOMBSTONES => record::read_tombstones(store, keys, id).map(drop),
            record::DOOMED => record::read_doomed(store, keys, id).map(drop),
            _ => record::read_json::<Waits>(store, keys, ObjectKind::Tombstones, name).map(drop),
        }
    };
    let mut each = |folder, severity, kind, read: &dyn Fn(&str) -> Result<()>| {
        for name in objects.of(folder) {
            match read(name) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    find(severity, kind, name, chain(&error));
                }
                // Done, or gone since it was listed.
                _ => {}
            }
        }
    };
    each(record::FORGOTTEN, Severity::Warning, Kind::Snapshot, &|name| {
        record::read_json::<Forgotten>(store, keys, ObjectKind::Forgotten, name).map(drop)
    });
    each(record::SESSIONS, Severity::Warning, Kind::Session, &|name| {
        record::read_json::<Session>(store, keys, ObjectKind::Session, name).map(drop)
    });
    each(record::FENCES, Severity::Warning, Kind::Session, &|name| {
        record::read_json::<Verdict>(store, keys, ObjectKind::Snapshot, name).map(drop)
    });
    each(record::RELOCATIONS, Severity::Error, Kind::GarbageCollection, &|name| {
        let id = name[record::RELOCATIONS.len()..].parse::<SnapshotId>()?;
        relocation::Record::read(store, keys, id).map(drop)
    });
    for folder in [record::TOMBSTONES, record::WAITS, record::DOOMED] {
        each(folder, Severity::Error, Kind::GarbageCollection, &|name| {
            let advice = "a prune left this; if no backup and no prune is running, delete it";
            lists(name, folder).map_err(|error: Error| error.context(advice))
        });
    }
}
