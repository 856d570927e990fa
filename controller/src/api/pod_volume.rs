//! `PodVolumeBackup` and `PodVolumeRestore`: one volume of one pod, saved or restored.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::common::Progress;

/// Where an object is on its way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodVolumePhase {
    /// Nobody took it up yet.
    #[default]
    #[serde(alias = "")]
    New,
    /// It has a worker's slot and was, or is about to be, assigned to an agent.
    Accepted,
    /// As `Accepted`: a phase that Velero has in between.
    Prepared,
    /// The agent works on it.
    InProgress,
    /// It was told to end.
    Canceling,
    /// It ended because it was told to.
    Canceled,
    /// It is done.
    Completed,
    /// It cannot be done.
    Failed,
    /// A phase that this version does not know: left alone.
    #[serde(other)]
    Unknown,
}

impl PodVolumePhase {
    /// Whether nothing will happen any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Canceled | Self::Completed | Self::Failed | Self::Unknown)
    }

    /// Whether an agent may be working on it.
    pub fn is_assigned(self) -> bool {
        matches!(self, Self::Accepted | Self::Prepared | Self::InProgress | Self::Canceling)
    }
}

/// Which volume to save, and where.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "velero.io",
    version = "v1",
    kind = "PodVolumeBackup",
    plural = "podvolumebackups",
    shortname = "pvb",
    namespaced,
    status = "PodVolumeBackupStatus",
    derive = "PartialEq",
    derive = "Default",
    doc = "One volume of one pod, saved.",
    printcolumn = r#"{"name":"Status","type":"string","jsonPath":".status.phase"}"#,
    printcolumn = r#"{"name":"Started","type":"date","jsonPath":".status.startTimestamp"}"#,
    printcolumn = r#"{"name":"Bytes Done","type":"integer","format":"int64","jsonPath":".status.progress.bytesDone"}"#,
    printcolumn = r#"{"name":"Total Bytes","type":"integer","format":"int64","jsonPath":".status.progress.totalBytes"}"#,
    printcolumn = r#"{"name":"Incremental Bytes","type":"integer","format":"int64","priority":10,"jsonPath":".status.incrementalBytes"}"#,
    printcolumn = r#"{"name":"Storage Location","type":"string","jsonPath":".spec.backupStorageLocation"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".status.node"}"#,
    printcolumn = r#"{"name":"Uploader","type":"string","jsonPath":".spec.uploaderType"}"#,
    printcolumn = r#"{"name":"Missing","type":"integer","format":"int64","jsonPath":".status.filesMissing"}"#,
    printcolumn = r#"{"name":"Warnings","type":"integer","format":"int64","priority":1,"jsonPath":".status.warnings"}"#,
    printcolumn = r#"{"name":"Message","type":"string","priority":1,"jsonPath":".status.message"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct PodVolumeBackupSpec {
    /// Node of the pod.
    pub node: String,
    /// The pod.
    pub pod: ObjectReference,
    /// Name of the volume in the pod.
    pub volume: String,
    /// BackupStorageLocation that it is saved to.
    pub backup_storage_location: String,
    /// Velero's identifier of a repository. Not used: a location has one repository. Mostly
    /// empty, which API servers of 1.20 take for null.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repo_identifier: Option<String>,
    /// Velero's choice of a program. Not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uploader_type: Option<String>,
    /// Tags of the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<BTreeMap<String, String>>,
    /// Velero's settings of its uploader. Not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uploader_settings: Option<BTreeMap<String, String>>,
    /// Whether to end it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancel: Option<bool>,
    /// Snapshot to compare with. Empty: the newest of the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent_snapshot: Option<String>,
}

/// What became of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodVolumeBackupStatus {
    /// Where it is on its way.
    #[schemars(with = "String")]
    #[serde(default)]
    pub phase: PodVolumePhase,
    /// Folder on the node, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Node whose agent works, or worked, on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Id of the snapshot.
    #[serde(default, rename = "snapshotID", skip_serializing_if = "Option::is_none")]
    pub snapshot_id: Option<String>,
    /// Why it waits or failed, or what is to be known of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When it was assigned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted_timestamp: Option<Time>,
    /// When the agent began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_timestamp: Option<Time>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_timestamp: Option<Time>,
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Bytes added to the repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incremental_bytes: Option<i64>,
    /// How often it was given to an agent. One that ends its third without an end fails it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempts: Option<i64>,
    /// Things that are not saved as they should be, files that are missing among them; the message tells the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warnings: Option<i64>,
    /// Files and folders that could not be read to their end: the snapshot has nothing, a part or an older version of
    /// them. With any, the phase is Failed, and the snapshot can be restored with a warning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files_missing: Option<i64>,
    /// Files that changed while they were read: what is saved of each may be of different moments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files_changed: Option<i64>,
    /// Files and folders that vanished before they could be read, and are not saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files_vanished: Option<i64>,
}

/// Which snapshot to put into which volume.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "velero.io",
    version = "v1",
    kind = "PodVolumeRestore",
    plural = "podvolumerestores",
    shortname = "pvr",
    namespaced,
    status = "PodVolumeRestoreStatus",
    derive = "PartialEq",
    derive = "Default",
    doc = "A snapshot, put into one volume of one pod.",
    printcolumn = r#"{"name":"Status","type":"string","jsonPath":".status.phase"}"#,
    printcolumn = r#"{"name":"Started","type":"date","jsonPath":".status.startTimestamp"}"#,
    printcolumn = r#"{"name":"Bytes Done","type":"integer","format":"int64","jsonPath":".status.progress.bytesDone"}"#,
    printcolumn = r#"{"name":"Total Bytes","type":"integer","format":"int64","jsonPath":".status.progress.totalBytes"}"#,
    printcolumn = r#"{"name":"Storage Location","type":"string","jsonPath":".spec.backupStorageLocation"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".status.node"}"#,
    printcolumn = r#"{"name":"Uploader Type","type":"string","jsonPath":".spec.uploaderType"}"#,
    printcolumn = r#"{"name":"Missing","type":"integer","format":"int64","jsonPath":".status.filesMissing"}"#,
    printcolumn = r#"{"name":"Warnings","type":"integer","format":"int64","priority":1,"jsonPath":".status.warnings"}"#,
    printcolumn = r#"{"name":"Message","type":"string","priority":1,"jsonPath":".status.message"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct PodVolumeRestoreSpec {
    /// The pod.
    pub pod: ObjectReference,
    /// Name of the volume in the pod.
    pub volume: String,
    /// BackupStorageLocation that it comes from.
    pub backup_storage_location: String,
    /// Velero's identifier of a repository. Not used: a location has one repository. Mostly
    /// empty, which API servers of 1.20 take for null.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repo_identifier: Option<String>,
    /// Velero's choice of a program. Not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uploader_type: Option<String>,
    /// Id of the snapshot.
    #[serde(rename = "snapshotID")]
    pub snapshot_id: String,
    /// Bytes of the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_size: Option<i64>,
    /// Namespace that was saved.
    pub source_namespace: String,
    /// Velero's settings of its uploader. Not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uploader_settings: Option<BTreeMap<String, String>>,
    /// Whether to end it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cancel: Option<bool>,
}

/// What became of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodVolumeRestoreStatus {
    /// Where it is on its way.
    #[schemars(with = "String")]
    #[serde(default)]
    pub phase: PodVolumePhase,
    /// Why it waits or failed, or what is to be known of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When it was assigned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted_timestamp: Option<Time>,
    /// When the agent began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_timestamp: Option<Time>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_timestamp: Option<Time>,
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Node whose agent works, or worked, on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// How often it was given to an agent. One that ends its third without an end fails it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempts: Option<i64>,
    /// Things that are not restored as they should be, files that are missing among them; the message tells the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warnings: Option<i64>,
    /// Files and folders that are not restored, or not wholly: the snapshot lacks what could not be read when it was
    /// made, or, when the phase is Failed, they are damaged or the volume refused them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files_missing: Option<i64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_of_other_versions_are_read() {
        let table = [
            ("", PodVolumePhase::New),
            ("InProgress", PodVolumePhase::InProgress),
            ("Paused", PodVolumePhase::Unknown),
        ];
        for (text, phase) in table {
            let status = format!(r#"{{"phase":"{text}","future":1}}"#);
            let status: PodVolumeBackupStatus = serde_json::from_str(&status).unwrap();
            assert_eq!(status.phase, phase, "{text}");
        }
        assert!(PodVolumePhase::Unknown.is_final(), "nobody may touch what he does not know");
    }
}
