//! `BackupStorageLocation`: a bucket, and how to get at it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::SecretKeySelector;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whether a location can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LocationPhase {
    /// It can.
    Available,
    /// It cannot; the message says why.
    Unavailable,
    /// A phase that this version does not know.
    #[serde(other)]
    Unknown,
}

/// A bucket, and how to get at it.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "velero.io",
    version = "v1",
    kind = "BackupStorageLocation",
    plural = "backupstoragelocations",
    shortname = "bsl",
    namespaced,
    status = "BackupStorageLocationStatus",
    derive = "PartialEq",
    derive = "Default",
    doc = "A bucket that backups are saved to.",
    printcolumn = r#"{"name":"Phase","type":"string","jsonPath":".status.phase"}"#,
    printcolumn = r#"{"name":"Last Validated","type":"date","jsonPath":".status.lastValidationTime"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#,
    printcolumn = r#"{"name":"Default","type":"boolean","jsonPath":".spec.default"}"#,
    printcolumn = r#"{"name":"Message","type":"string","priority":1,"jsonPath":".status.message"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct BackupStorageLocationSpec {
    /// `huawei` for OBS, `aws` for what speaks S3.
    pub provider: String,
    /// Settings of the provider: `endpoint` for `huawei`; `region`, `s3Url`, `s3ForcePathStyle`, `profile`
    /// for `aws`; `passphraseSecret`, the name of the Secret with the repository's passphrase, for both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<BTreeMap<String, String>>,
    /// Secret with the access key, in the location's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<SecretKeySelector>,
    /// The bucket.
    pub object_storage: ObjectStorage,
    /// Whether backups that name no location go here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<bool>,
    /// `ReadWrite`, or `ReadOnly`: only restored from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_mode: Option<String>,
    /// How often backups in the bucket are looked for. 0: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup_sync_period: Option<String>,
    /// How often the location is validated. 0: only once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_frequency: Option<String>,
}

/// A folder in a bucket.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ObjectStorage {
    /// Name of the bucket.
    pub bucket: String,
    /// Folder in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
    /// Certificates (PEM, in base64) to trust besides the system's.
    #[serde(default, rename = "caCert", skip_serializing_if = "Option::is_none")]
    pub ca_cert: Option<String>,
    /// Secret that holds such certificates (PEM), in the location's namespace.
    #[serde(default, rename = "caCertRef", skip_serializing_if = "Option::is_none")]
    pub ca_cert_ref: Option<SecretKeySelector>,
}

/// Whether the location can be used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackupStorageLocationStatus {
    /// Whether it can.
    #[schemars(with = "Option<String>")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<LocationPhase>,
    /// When that was last found out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_validation_time: Option<Time>,
    /// When backups in the bucket were last looked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_synced_time: Option<Time>,
    /// Why it cannot, or what is to be known of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Of old versions of Velero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_synced_revision: Option<String>,
    /// Of old versions of Velero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access_mode: Option<String>,
    /// `Available`, `KeyNotExported`, `ReachableFromNodes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conditions: Option<Vec<Condition>>,
}

impl BackupStorageLocationSpec {
    /// Whether it is only restored from.
    pub fn is_read_only(&self) -> bool {
        self.access_mode.as_deref() == Some("ReadOnly")
    }

    /// A setting of the provider, unless it is empty.
    pub fn setting(&self, name: &str) -> Option<&str> {
        let value = self.config.as_ref()?.get(name)?.trim();
        (!value.is_empty()).then_some(value)
    }
}
