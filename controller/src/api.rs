//! The custom resources of the group `velero.io`, as current Velero has them, and what this program adds.
//!
//! Names of fields, printer columns and short names are Velero's, so that its command and whatever else people
//! made for it work on. There is no status subresource, as there: objects are synced and restored with their
//! status. Whatever is read must not fail on what a newer program wrote: phases have a variant for unknown
//! ones, durations and modes stay text until they are used.

pub mod common;
pub mod location;
pub mod pod_volume;
pub mod repository;

pub use common::Timestamp;
pub use location::{BackupStorageLocation, BackupStorageLocationSpec, BackupStorageLocationStatus};
pub use pod_volume::{
    PodVolumeBackup, PodVolumeBackupSpec, PodVolumeBackupStatus, PodVolumePhase, PodVolumeRestore,
    PodVolumeRestoreSpec, PodVolumeRestoreStatus,
};
pub use repository::{BackupRepository, BackupRepositorySpec, BackupRepositoryStatus};

/// Label: the backup that an object belongs to.
pub const BACKUP_NAME: &str = "velero.io/backup-name";
/// Label: the restore that an object belongs to.
pub const RESTORE_NAME: &str = "velero.io/restore-name";
/// Label: UID of the restore, and name of the file that tells `restore-wait` that a volume is done.
pub const RESTORE_UID: &str = "velero.io/restore-uid";
/// Label: UID of the claim whose volume is saved.
pub const PVC_UID: &str = "velero.io/pvc-uid";
/// Label: location that a repository belongs to.
pub const STORAGE_LOCATION: &str = "velero.io/storage-location";
