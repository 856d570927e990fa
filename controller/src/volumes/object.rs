//! A `PodVolumeBackup` or `PodVolumeRestore`, as one thing: what both have, and how their status is written.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::ResourceExt;
use proto::v1::{Finished, finished::Outcome};
use serde_json::{Value, json};

use super::outcome::{self, signed};
use crate::api::{
    BACKUP_NAME, PodVolumeBackup, PodVolumePhase, PodVolumeRestore, RESTORE_NAME, RESTORE_UID,
    Timestamp,
};
use crate::desk::queue::Kind;

/// One of both.
#[derive(Debug, Clone)]
pub enum Object {
    /// A volume to save.
    Backup(Box<PodVolumeBackup>),
    /// A volume to restore into.
    Restore(Box<PodVolumeRestore>),
}

impl From<PodVolumeBackup> for Object {
    fn from(object: PodVolumeBackup) -> Self {
        Self::Backup(Box::new(object))
    }
}

impl From<PodVolumeRestore> for Object {
    fn from(object: PodVolumeRestore) -> Self {
        Self::Restore(Box::new(object))
    }
}

macro_rules! either {
    ($object:expr, $inner:ident => $what:expr) => {
        match $object {
            Object::Backup($inner) => $what,
            Object::Restore($inner) => $what,
        }
    };
}

impl Object {
    /// UID, which is the id of its job.
    pub fn uid(&self) -> String {
        either!(self, object => object.uid().unwrap_or_default())
    }

    /// Name.
    pub fn name(&self) -> String {
        either!(self, object => object.name_any())
    }

    /// Where the queue sorts it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Backup(_) => Kind::Backup,
            Self::Restore(_) => Kind::Restore,
        }
    }

    /// `kind/namespace/name`.
    pub fn subject(&self) -> String {
        let kind = match self {
            Self::Backup(_) => "podvolumebackup",
            Self::Restore(_) => "podvolumerestore",
        };
        let namespace = either!(self, object => object.namespace().unwrap_or_default());
        format!("{kind}/{namespace}/{}", self.name())
    }

    /// Whether an agent of `node` has, or had, its job.
    pub fn is_on(&self, node: &str) -> bool {
        let phase = self.phase();
        (phase.is_assigned() || phase.is_final()) && self.node() == Some(node)
    }

    /// Whether `other` is an older copy of it.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        self.version().zip(other.version()).is_some_and(|(own, other)| own > other)
    }

    /// Name of the mark that a restored pod waits for: the UID of its Restore. Empty without one.
    pub fn mark(&self) -> String {
        let label = self.label(RESTORE_UID);
        let owners = either!(self, object => object.owner_references());
        let owner = owners.iter().find(|owner| owner.kind == "Restore");
        if label.is_empty() { owner.map(|it| it.uid.clone()).unwrap_or_default() } else { label }
    }

    /// Version by which older copies are told from newer ones, as far as it is a number.
    pub fn version(&self) -> Option<u64> {
        either!(self, object => object.resource_version()).and_then(|text| text.parse().ok())
    }

    /// The same, as it is written.
    pub fn version_text(&self) -> Option<String> {
        either!(self, object => object.resource_version())
    }

    /// When it was created.
    pub fn created(&self) -> i64 {
        let time = either!(self, object => object.creation_timestamp());
        time.map_or(0, |time| time.0.as_second())
    }

    /// A label, or nothing.
    pub fn label(&self, name: &str) -> String {
        either!(self, object => object.labels().get(name)).cloned().unwrap_or_default()
    }

    /// Name of the backup or restore that it is part of.
    pub fn group(&self) -> String {
        match self {
            Self::Backup(_) => self.label(BACKUP_NAME),
            Self::Restore(_) => self.label(RESTORE_NAME),
        }
    }

    /// Where it is on its way.
    pub fn phase(&self) -> PodVolumePhase {
        either!(self, object => object.status.as_ref().map(|status| status.phase))
            .unwrap_or_default()
    }

    /// What its status says to people.
    pub fn message(&self) -> Option<&str> {
        either!(self, object => object.status.as_ref().and_then(|status| status.message.as_deref()))
    }

    /// The node that works on it, or must.
    pub fn node(&self) -> Option<&str> {
        match self {
            Self::Backup(object) => Some(&object.spec.node),
            Self::Restore(object) => object.status.as_ref()?.node.as_deref(),
        }
    }

    /// The pod.
    pub fn pod(&self) -> &ObjectReference {
        either!(self, object => &object.spec.pod)
    }

    /// Name of the volume in the pod.
    pub fn volume(&self) -> &str {
        either!(self, object => &object.spec.volume)
    }

    /// Name of its location.
    pub fn location(&self) -> &str {
        either!(self, object => &object.spec.backup_storage_location)
    }

    /// The snapshot that was made for it and that its status does not name.
    pub fn unnamed_snapshot<'a>(&self, finished: &'a Finished) -> Option<&'a str> {
        match (self, &finished.outcome) {
            (Self::Backup(object), Some(Outcome::Saved(saved))) => {
                let named = object.status.as_ref().and_then(|status| status.snapshot_id.as_ref());
                named.is_none().then_some(&saved.snapshot)
            }
            _ => None,
        }
    }

    /// The same, where it ended otherwise. Of what another version means by its phase, nothing is known.
    pub fn late_snapshot<'a>(&self, finished: &'a Finished) -> Option<&'a str> {
        self.unnamed_snapshot(finished).filter(|_| self.may_be_late())
    }

    /// Whether an agent may have made a snapshot for it that its status does not name.
    pub fn may_be_late(&self) -> bool {
        let ended = matches!(self.phase(), PodVolumePhase::Failed | PodVolumePhase::Canceled);
        let named = |object: &PodVolumeBackup| {
            let status = object.status.as_ref();
            status.is_some_and(|it| it.snapshot_id.as_ref().is_some_and(|id| !id.is_empty()))
        };
        ended && matches!(self, Self::Backup(object) if !named(object))
    }

    /// How often it was given to an agent; at least once when it has a place.
    pub fn attempts(&self) -> i64 {
        let known = either!(self, object => object.status.as_ref().and_then(|it| it.attempts));
        known.unwrap_or(1).max(1)
    }

    /// Whether it is to end: somebody says so, or deletes it, which another's finalizer may hold up.
    pub fn is_cancelled(&self) -> bool {
        either!(self, object => object.spec.cancel == Some(true)
            || object.metadata.deletion_timestamp.is_some())
    }

    /// Whether it has begun.
    pub fn has_started(&self) -> bool {
        either!(self, object => object.status.as_ref().is_some_and(|s| s.start_timestamp.is_some()))
    }
}

/// A change of status.
#[derive(Debug, Clone, PartialEq)]
pub enum Update {
    /// Why it waits.
    Note(String),
    /// It gets a slot and goes to this node.
    Accept(String),
    /// How far it is; begins it, when it has not.
    Progress {
        /// Bytes done.
        done: u64,
        /// Bytes in all; 0: unknown.
        total: u64,
    },
    /// Its agent did not bring it to its end; it is given to it for the so many-th time.
    Again(i64),
    /// It was told to end.
    Canceling,
    /// It ended because it was told to.
    Canceled(String),
    /// It cannot be done.
    Fail(String),
    /// The agent says what came of it.
    Finish(Box<Finished>),
    /// It was done by an agent that could not say so any more.
    FoundDone,
    /// It had ended otherwise when its agent said that it has made this snapshot.
    SavedAfterAll(String),
}

impl Update {
    /// Whether it may be made only to the object as it was last seen. When it was changed meanwhile, it is decided
    /// again. The end is written in any case.
    pub fn needs_version(&self) -> bool {
        match self {
            Self::Note(_)
            | Self::Accept(_)
            | Self::Progress { .. }
            | Self::Again(_)
            | Self::Canceling => true,
            Self::Canceled(_)
            | Self::Fail(_)
            | Self::Finish(_)
            | Self::FoundDone
            | Self::SavedAfterAll(_) => false,
        }
    }
}

fn text(now: Timestamp) -> String {
    now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// The status as a merge patch.
pub fn patch(object: &Object, update: &Update, now: Timestamp) -> Value {
    let now = text(now);
    let ended = |phase: &str, message: &str| json!({"phase": phase, "message": message, "completionTimestamp": now});
    match update {
        Update::Note(message) => json!({"phase": "New", "message": message}),
        Update::Accept(node) => {
            json!({"phase": "Accepted", "acceptedTimestamp": now, "node": node, "message": null,
                   "attempts": 1})
        }
        Update::Progress { done, total } => {
            let mut progress = json!({"bytesDone": signed(*done)});
            if *total > 0 {
                progress["totalBytes"] = json!(signed(*total));
            }
            let mut status = json!({"progress": progress});
            if !object.has_started() {
                status["startTimestamp"] = json!(now);
            }
            if matches!(object.phase(), PodVolumePhase::Accepted | PodVolumePhase::Prepared) {
                status["phase"] = json!("InProgress");
            }
            status
        }
        Update::Again(attempts) => json!({"attempts": attempts}),
        Update::Canceling => json!({"phase": "Canceling"}),
        Update::Canceled(message) => ended("Canceled", message),
        Update::Fail(message) => ended("Failed", message),
        Update::FoundDone => ended("Completed", "done before the controller could note it"),
        // Whoever deletes the object learns what to forget.
        Update::SavedAfterAll(snapshot) => {
            let after_all = format!("it was saved after all, as snapshot {snapshot}");
            let parts = [object.message(), Some(&after_all)];
            json!({
                "snapshotID": snapshot,
                "message": parts.into_iter().flatten().collect::<Vec<_>>().join("; "),
            })
        }
        Update::Finish(finished) => {
            let mut status = outcome::status(finished, &now);
            if !object.has_started() {
                status["startTimestamp"] = json!(now);
            }
            status
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::v1::Saved;

    use super::*;

    #[test]
    fn a_snapshot_that_was_made_after_all_is_named() {
        let status = crate::api::PodVolumeBackupStatus {
            phase: PodVolumePhase::Failed,
            message: Some("the agent went away".to_owned()),
            ..Default::default()
        };
        let mut backup = PodVolumeBackup { status: Some(status), ..Default::default() };
        let saved = Saved { snapshot: "s".into(), ..Default::default() };
        let finished = Finished { outcome: Some(Outcome::Saved(saved)), ..Default::default() };
        let object = Object::from(backup.clone());
        let snapshot = object.unnamed_snapshot(&finished).unwrap();
        let status =
            patch(&object, &Update::SavedAfterAll(snapshot.to_owned()), Timestamp::UNIX_EPOCH);
        assert_eq!(status["snapshotID"], "s");
        assert_eq!(status["message"], "the agent went away; it was saved after all, as snapshot s");
        assert_eq!(status.get("phase"), None, "what was told to be failed stays so");
        backup.status.as_mut().unwrap().snapshot_id = Some("s".to_owned());
        assert_eq!(Object::from(backup).unnamed_snapshot(&finished), None);
        assert_eq!(object.unnamed_snapshot(&Finished::default()), None);
    }

    #[test]
    fn the_first_progress_begins_a_job() {
        let mut backup = PodVolumeBackup::default();
        let status =
            |phase| Some(crate::api::PodVolumeBackupStatus { phase, ..Default::default() });
        backup.status = status(PodVolumePhase::Accepted);
        let update = Update::Progress { done: 1, total: 0 };
        let first = patch(&backup.clone().into(), &update, Timestamp::UNIX_EPOCH);
        assert_eq!(
            (&first["phase"], &first["progress"]),
            (&json!("InProgress"), &json!({"bytesDone": 1}))
        );
        backup.status = status(PodVolumePhase::Canceling);
        let later = patch(&backup.into(), &update, Timestamp::UNIX_EPOCH);
        assert_eq!(later.get("phase"), None, "a job that is to end does not begin again");
    }
}
