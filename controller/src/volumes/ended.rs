//! Objects in a final phase: of each as little as is needed, since there are many more of them than of others, and
//! nothing is done about them unless an agent says once more what came of one.

use std::collections::{BTreeMap, BTreeSet};

use super::object::Object;
use crate::api::{PVC_UID, PodVolumePhase, Timestamp};
use crate::desk::queue::Kind;

/// All of them, by UID.
#[derive(Debug, Default)]
pub(super) struct Ended {
    objects: BTreeMap<String, Slim>,
    /// Snapshots by the claim and the location that they are of, the newest last.
    snapshots: BTreeMap<(String, String), BTreeSet<Snapshot>>,
}

/// When it was made, its id, and the object it was made for.
type Snapshot = (Option<Timestamp>, String, String);

#[derive(Debug)]
struct Slim {
    kind: Kind,
    version: Option<u64>,
    node: Option<String>,
    snapshot: Option<((String, String), Snapshot)>,
    /// The object itself, where its agent may have made a snapshot that it does not name.
    whole: Option<Object>,
}

/// What is to be done about an outcome that is said once more.
#[derive(Debug)]
pub(super) enum Again {
    /// There is no such object here.
    Unknown,
    /// It was given to another node.
    Elsewhere,
    /// It is written already.
    Written,
    /// It may tell something new about this one.
    May(Box<Object>),
}

impl Ended {
    /// Takes in an object that has ended. One that is older than what is known stays out.
    pub(super) fn insert(&mut self, object: Object) {
        let uid = object.uid();
        let version = object.version();
        let known = self.objects.get(&uid).and_then(|slim| slim.version);
        if known.zip(version).is_some_and(|(known, new)| known > new) {
            return;
        }
        self.remove(&uid);
        let snapshot = snapshot(&object);
        if let Some((of, made)) = &snapshot {
            self.snapshots.entry(of.clone()).or_default().insert(made.clone());
        }
        let slim = Slim {
            kind: object.kind(),
            version,
            node: object.node().map(str::to_owned),
            snapshot,
            whole: object.may_be_late().then_some(object),
        };
        self.objects.insert(uid, slim);
    }

    /// Whether it is here, in a version that is not older.
    pub(super) fn has_newer(&self, object: &Object) -> bool {
        let known = self.objects.get(&object.uid()).and_then(|slim| slim.version);
        known.zip(object.version()).is_some_and(|(known, other)| known > other)
    }

    /// Forgets one. Whether it was here.
    pub(super) fn remove(&mut self, uid: &str) -> bool {
        let Some(slim) = self.objects.remove(uid) else {
            return false;
        };
        if let Some((of, made)) = slim.snapshot
            && let Some(all) = self.snapshots.get_mut(&of)
        {
            all.remove(&made);
            if all.is_empty() {
                self.snapshots.remove(&of);
            }
        }
        true
    }

    /// Forgets all of a kind but these.
    pub(super) fn retain(&mut self, kind: Kind, uids: &BTreeSet<String>) {
        let gone = |(uid, slim): (&String, &Slim)| {
            (slim.kind == kind && !uids.contains(uid)).then(|| uid.clone())
        };
        let gone: Vec<String> = self.objects.iter().filter_map(gone).collect();
        for uid in gone {
            self.remove(&uid);
        }
    }

    /// An agent says what came of it.
    pub(super) fn again(&self, uid: &str, node: &str) -> Again {
        match self.objects.get(uid) {
            None => Again::Unknown,
            Some(slim) if slim.node.as_deref() != Some(node) => Again::Elsewhere,
            Some(Slim { whole: None, .. }) => Again::Written,
            Some(Slim { whole: Some(object), .. }) => Again::May(Box::new(object.clone())),
        }
    }

    /// The newest snapshot of a claim in a location. One that lacks files is as good as another: a backup takes over
    /// from it only what is whole.
    pub(super) fn newest_snapshot(&self, claim: &str, location: &str) -> Option<&str> {
        let all = self.snapshots.get(&(claim.to_owned(), location.to_owned()))?;
        all.last().map(|(_, snapshot, _)| snapshot.as_str())
    }
}

fn snapshot(object: &Object) -> Option<((String, String), Snapshot)> {
    let Object::Backup(backup) = object else {
        return None;
    };
    let claim = object.label(PVC_UID);
    let status = backup.status.as_ref()?;
    let id = status.snapshot_id.clone().filter(|id| !id.is_empty())?;
    let of_ours = matches!(status.phase, PodVolumePhase::Completed | PodVolumePhase::Failed);
    if claim.is_empty() || !of_ours {
        return None;
    }
    let made = status.completion_timestamp.as_ref().map(|time| time.0);
    Some(((claim, object.location().to_owned()), (made, id, object.uid())))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::PodVolumeBackup;

    fn backup(uid: &str, version: &str, phase: &str, snapshot: &str, day: u8) -> Object {
        let object: PodVolumeBackup = serde_json::from_value(json!({
            "apiVersion": "velero.io/v1", "kind": "PodVolumeBackup",
            "metadata": {"name": uid, "uid": uid, "resourceVersion": version,
                         "labels": {"velero.io/pvc-uid": "claim"}},
            "spec": {"node": "n", "pod": {}, "volume": "v", "backupStorageLocation": "l"},
            "status": {"phase": phase, "snapshotID": snapshot,
                       "completionTimestamp": format!("2026-01-0{day}T00:00:00Z")},
        }))
        .unwrap();
        object.into()
    }

    #[test]
    fn the_newest_snapshot_of_a_claim_is_found_and_forgotten_with_its_object() {
        let mut ended = Ended::default();
        ended.insert(backup("b", "5", "Failed", "incomplete", 3));
        ended.insert(backup("a", "4", "Completed", "older", 2));
        ended.insert(backup("c", "6", "Canceled", "cancelled", 4));
        assert_eq!(ended.newest_snapshot("claim", "l"), Some("incomplete"));
        assert_eq!(ended.newest_snapshot("claim", "elsewhere"), None);
        ended.insert(backup("b", "3", "Completed", "stale", 9));
        assert_eq!(
            ended.newest_snapshot("claim", "l"),
            Some("incomplete"),
            "what is known is newer"
        );
        assert!(ended.remove("b") && !ended.remove("b"));
        assert_eq!(ended.newest_snapshot("claim", "l"), Some("older"));
        ended.retain(Kind::Backup, &BTreeSet::new());
        assert_eq!(ended.newest_snapshot("claim", "l"), None);
        assert!(ended.objects.is_empty() && ended.snapshots.is_empty());
    }

    #[test]
    fn only_of_what_may_have_a_snapshot_that_it_does_not_name_the_object_is_kept() {
        let mut ended = Ended::default();
        ended.insert(backup("done", "1", "Completed", "s", 1));
        ended.insert(backup("failed", "1", "Failed", "", 1));
        ended.insert(backup("incomplete", "1", "Failed", "s", 1));
        assert!(matches!(ended.again("done", "n"), Again::Written));
        assert!(matches!(ended.again("failed", "n"), Again::May(_)));
        assert!(matches!(ended.again("incomplete", "n"), Again::Written));
        assert!(matches!(ended.again("failed", "other"), Again::Elsewhere));
        assert!(matches!(ended.again("nobody", "n"), Again::Unknown));
    }
}
