//! `BackupRepository`: the repository of a location, and how it is looked after.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whether a repository can be used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RepositoryPhase {
    /// Nobody opened it yet.
    #[default]
    #[serde(alias = "")]
    New,
    /// It was opened with the passphrase in force.
    Ready,
    /// It could not be opened; the message says why.
    NotReady,
    /// A phase that this version does not know.
    #[serde(other)]
    Unknown,
}

/// The repository of a location.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "velero.io",
    version = "v1",
    kind = "BackupRepository",
    plural = "backuprepositories",
    shortname = "repo",
    namespaced,
    status = "BackupRepositoryStatus",
    derive = "PartialEq",
    derive = "Default",
    doc = "The repository of a location.",
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Repository Type","type":"string","jsonPath":".spec.repositoryType"}"#,
    printcolumn = r#"{"name":"Phase","type":"string","jsonPath":".status.phase"}"#,
    printcolumn = r#"{"name":"Last Maintenance","type":"date","jsonPath":".status.lastMaintenanceTime"}"#,
    printcolumn = r#"{"name":"Message","type":"string","priority":1,"jsonPath":".status.message"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct BackupRepositorySpec {
    /// Velero's namespace of a repository; empty, because a location has one repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_namespace: Option<String>,
    /// Location that it belongs to.
    pub backup_storage_location: String,
    /// `ebackup`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository_type: Option<String>,
    /// How often it is pruned. 0: never.
    pub maintenance_frequency: String,
    /// Velero's settings of a repository. Not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository_config: Option<BTreeMap<String, String>>,
    /// Of old versions of Velero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restic_identifier: Option<String>,
}

/// Whether it can be used, and how it was looked after.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackupRepositoryStatus {
    /// Whether it can be used.
    #[schemars(with = "String")]
    #[serde(default)]
    pub phase: RepositoryPhase,
    /// Why it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When it was last pruned with success.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_maintenance_time: Option<Time>,
    /// What the last 25 runs did, the newest last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recent_maintenance: Option<Vec<Maintenance>>,
    /// Id in the repository itself.
    #[serde(default, rename = "repositoryID", skip_serializing_if = "Option::is_none")]
    pub repository_id: Option<String>,
}

/// One run of maintenance.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Maintenance {
    /// `Succeeded` or `Failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    /// When it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_timestamp: Option<Time>,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub complete_timestamp: Option<Time>,
    /// What it did, or why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}
