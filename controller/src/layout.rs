//! Velero's layout of a bucket: which key holds what of a Backup or a Restore, and which path in an archive holds
//! what object. It knows names only, no stores.
//!
//! ```text
//! backups/<backup>/velero-backup.json        the Backup with its status: its presence is what makes a backup
//!                  <backup>.tar.gz           the objects
//!                  <backup>-logs.gz, …       see [`BackupFile`]
//! restores/<restore>/restore-<restore>-…     see [`RestoreFile`]
//! ```

use std::fmt::Write;

use aws_lc_rs::digest::{SHA256, digest};

/// Longest value of a label, in bytes.
const LABEL_BYTES_MAX: usize = 63;

/// First entry of every archive, and what it says: the version of the layout inside.
pub const ARCHIVE_VERSION: (&str, &str) = ("metadata/version", "1.1.0\n");

/// Where all that is saved of one Backup lies; ends with a slash.
pub fn backup_folder(backup: &str) -> String {
    format!("backups/{backup}/")
}

/// Where all that is saved of one Restore lies; ends with a slash.
pub fn restore_folder(restore: &str) -> String {
    format!("restores/{restore}/")
}

/// A file of a Backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupFile {
    /// The Backup itself; JSON, uncompressed. All others are compressed by gzip.
    Backup,
    /// The objects: a tar file.
    Archive,
    /// The log: lines of text.
    Logs,
    /// Errors and warnings, by namespace.
    Results,
    /// Names of the saved objects, by version and kind.
    ResourceList,
    /// What became of each volume.
    VolumeInfo,
    /// The PodVolumeBackups.
    PodVolumeBackups,
    /// Snapshots by the cloud: none, in what we write.
    VolumeSnapshots,
    /// Operations of plugins: none, in what we write.
    ItemOperations,
    /// VolumeSnapshots of CSI.
    CsiSnapshots,
    /// VolumeSnapshotContents of CSI.
    CsiContents,
    /// VolumeSnapshotClasses of CSI.
    CsiClasses,
}

impl BackupFile {
    /// The key below the location's prefix.
    pub fn key(self, backup: &str) -> String {
        let ending = match self {
            Self::Backup => return backup_folder(backup) + "velero-backup.json",
            Self::Archive => ".tar.gz",
            Self::Logs => "-logs.gz",
            Self::Results => "-results.gz",
            Self::ResourceList => "-resource-list.json.gz",
            Self::VolumeInfo => "-volumeinfo.json.gz",
            Self::PodVolumeBackups => "-podvolumebackups.json.gz",
            Self::VolumeSnapshots => "-volumesnapshots.json.gz",
            Self::ItemOperations => "-itemoperations.json.gz",
            Self::CsiSnapshots => "-csi-volumesnapshots.json.gz",
            Self::CsiContents => "-csi-volumesnapshotcontents.json.gz",
            Self::CsiClasses => "-csi-volumesnapshotclasses.json.gz",
        };
        format!("{}{backup}{ending}", backup_folder(backup))
    }
}

/// A file of a Restore; compressed by gzip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestoreFile {
    /// The log: lines of text.
    Logs,
    /// Errors and warnings, by namespace.
    Results,
    /// Names of the restored objects, by version and kind.
    ResourceList,
    /// Operations of plugins: none, in what we write.
    ItemOperations,
    /// What became of each volume.
    VolumeInfo,
}

impl RestoreFile {
    /// The key below the location's prefix.
    pub fn key(self, restore: &str) -> String {
        let name = match self {
            Self::Logs => format!("restore-{restore}-logs.gz"),
            Self::Results => format!("restore-{restore}-results.gz"),
            Self::ResourceList => format!("restore-{restore}-resource-list.json.gz"),
            Self::ItemOperations => format!("restore-{restore}-itemoperations.json.gz"),
            // Velero has no prefix here.
            Self::VolumeInfo => format!("{restore}-volumeinfo.json.gz"),
        };
        restore_folder(restore) + &name
    }
}

/// An object's place in an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArchivePath<'a> {
    /// Full name of its kind, as `deployments.apps`.
    pub resource: &'a str,
    /// The version in which it is written; `None` for the path that readers of before versions look at.
    pub version: Option<Version<'a>>,
    /// `None` for an object that lies in no namespace.
    pub namespace: Option<&'a str>,
    /// Its name.
    pub name: &'a str,
}

/// A version of a kind, and whether it is the one that the API server prefers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version<'a> {
    /// As `v1beta1`.
    pub name: &'a str,
    /// Whether the server preferred it when the object was saved.
    pub preferred: bool,
}

const PREFERRED: &str = "-preferredversion";

impl<'a> ArchivePath<'a> {
    /// The path in the archive.
    pub fn path(&self) -> String {
        let mut path = format!("resources/{}/", self.resource);
        if let Some(Version { name, preferred }) = self.version {
            path += name;
            path += if preferred { PREFERRED } else { "" };
            path.push('/');
        }
        match self.namespace {
            Some(namespace) => path += &format!("namespaces/{namespace}/"),
            None => path += "cluster/",
        }
        path + self.name + ".json"
    }

    /// Reads a path as [`Self::path`] writes it; `None` for what is no object's place, whoever wrote it.
    pub fn parse(path: &'a str) -> Option<Self> {
        let mut parts = path.strip_suffix(".json")?.split('/');
        let is_plain = |part: &&str| !part.is_empty() && *part != "." && *part != "..";
        let mut next = || parts.next().filter(is_plain);
        if next()? != "resources" {
            return None;
        }
        let resource = next()?;
        let mut scope = next()?;
        let mut version = None;
        if scope != "namespaces" && scope != "cluster" {
            let preferred = scope.strip_suffix(PREFERRED);
            let name = preferred.unwrap_or(scope);
            version = Some(Version { name, preferred: preferred.is_some() });
            scope = next()?;
        }
        let namespace = match scope {
            "namespaces" => Some(next()?),
            "cluster" => None,
            _ => return None,
        };
        let name = next()?;
        let is_whole =
            parts.next().is_none() && version.is_none_or(|version| !version.name.is_empty());
        is_whole.then_some(Self { resource, version, namespace, name })
    }
}

/// A name as the value of a label, as Velero makes it: one that is too long is cut, and ends with the first six hex
/// digits of the SHA-256 of the whole.
pub fn label_value(name: &str) -> String {
    if name.len() <= LABEL_BYTES_MAX {
        return name.to_owned();
    }
    let hash = digest(&SHA256, name.as_bytes());
    let mut value = name[..name.floor_char_boundary(LABEL_BYTES_MAX - 6)].to_owned();
    for byte in &hash.as_ref()[..3] {
        let _never = write!(value, "{byte:02x}");
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_veleros() {
        use BackupFile as B;
        use RestoreFile as R;
        for (file, key) in [
            (B::Backup, "backups/b-1/velero-backup.json"),
            (B::Archive, "backups/b-1/b-1.tar.gz"),
            (B::Logs, "backups/b-1/b-1-logs.gz"),
            (B::Results, "backups/b-1/b-1-results.gz"),
            (B::ResourceList, "backups/b-1/b-1-resource-list.json.gz"),
            (B::VolumeInfo, "backups/b-1/b-1-volumeinfo.json.gz"),
            (B::PodVolumeBackups, "backups/b-1/b-1-podvolumebackups.json.gz"),
            (B::VolumeSnapshots, "backups/b-1/b-1-volumesnapshots.json.gz"),
            (B::ItemOperations, "backups/b-1/b-1-itemoperations.json.gz"),
            (B::CsiSnapshots, "backups/b-1/b-1-csi-volumesnapshots.json.gz"),
            (B::CsiContents, "backups/b-1/b-1-csi-volumesnapshotcontents.json.gz"),
            (B::CsiClasses, "backups/b-1/b-1-csi-volumesnapshotclasses.json.gz"),
        ] {
            assert_eq!(file.key("b-1"), key);
        }
        for (file, key) in [
            (R::Logs, "restores/r/restore-r-logs.gz"),
            (R::Results, "restores/r/restore-r-results.gz"),
            (R::ResourceList, "restores/r/restore-r-resource-list.json.gz"),
            (R::ItemOperations, "restores/r/restore-r-itemoperations.json.gz"),
            (R::VolumeInfo, "restores/r/r-volumeinfo.json.gz"),
        ] {
            assert_eq!(file.key("r"), key);
        }
    }

    #[test]
    fn paths_in_an_archive_are_veleros_and_are_read_back() {
        let preferred = Some(Version { name: "v1", preferred: true });
        let other = Some(Version { name: "v1beta1", preferred: false });
        for (resource, version, namespace, name, path) in [
            ("pods", None, Some("a"), "p", "resources/pods/namespaces/a/p.json"),
            (
                "pods",
                preferred,
                Some("a"),
                "p",
                "resources/pods/v1-preferredversion/namespaces/a/p.json",
            ),
            ("namespaces", None, None, "a", "resources/namespaces/cluster/a.json"),
            ("crds.x.io", other, None, "c.d", "resources/crds.x.io/v1beta1/cluster/c.d.json"),
            (
                "roles.rbac",
                None,
                Some("a"),
                "system:x",
                "resources/roles.rbac/namespaces/a/system:x.json",
            ),
        ] {
            let place = ArchivePath { resource, version, namespace, name };
            assert_eq!(place.path(), path);
            assert_eq!(ArchivePath::parse(path), Some(place));
        }
    }

    #[test]
    fn what_is_no_objects_place_is_refused() {
        for path in [
            "",
            "metadata/version",
            "resources/pods/namespaces/a/p",
            "resources/pods/namespaces/a/.json",
            "resources/pods/namespaces/../p.json",
            "resources/../namespaces/a/p.json",
            "resources/pods/namespaces/a/b/p.json",
            "resources/pods/namespaces/p.json",
            "resources/pods/v1/other/p.json",
            "resources/pods/-preferredversion/cluster/p.json",
            "resources//cluster/p.json",
            "/resources/pods/cluster/p.json",
            "other/pods/cluster/p.json",
        ] {
            assert_eq!(ArchivePath::parse(path), None, "{path}");
        }
    }

    #[test]
    fn long_names_end_with_their_hash() {
        let fits = "b".repeat(63);
        assert_eq!(label_value(&fits), fits);
        // The hash is what sha256sum says of 64 times 'b'.
        let long = "b".repeat(64);
        let value = label_value(&long);
        assert_eq!(value.len(), 63);
        assert_eq!(value, format!("{}a0fab1", "b".repeat(57)));
    }
}
