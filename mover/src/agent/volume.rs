//! Finding the folder of a volume below the kubelet's.
//!
//! Everything goes by open handles from the folder of all pods on, one plain name at a time, so that no
//! name that the controller says and no symlink that a pod makes leads out of it.

use std::io;
use std::path::Path;

use proto::v1::{FailureKind, Volume};
use rustix::fs::{AtFlags, StatxAttributes, StatxFlags};

use super::failure::{self, Failed, Result};
use crate::fs::{Dir, Kind, Listing, is_plain_name};
use crate::monitor::display_path;

/// Folder of a pod's volumes.
const VOLUMES: &[u8] = b"volumes";

/// Folder in that of a volume of a CSI driver.
const MOUNT: &[u8] = b"mount";

/// Plugins whose volumes are plain folders of the node's own disk, so that nothing need be mounted there.
const PLAIN: [&str; 2] = ["kubernetes.io~empty-dir", "kubernetes.io~git-repo"];

/// Plugins whose volumes hold what the cluster made for the pod, tokens and keys among it, and no data of its own. No
/// controller asks for them, unless it was taken over, or its view of the pod is wrong.
const NOT_DATA: [&str; 5] = [
    "kubernetes.io~secret",
    "kubernetes.io~configmap",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
    "kubernetes.io~host-path",
];

/// Memory for the names of plugins: they are a handful.
const LISTING_BYTES: usize = 64 << 10;

/// An opened volume.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) folder: Dir,
    /// Where it is, for people.
    pub(super) path: String,
    /// Something is to be mounted there, and is known not to be.
    pub(super) unmounted: bool,
}

/// Opens the folder of `volume` below `pods`, the folder of all pods.
///
/// # Errors
/// `VolumeNotFound` when it is not there (any more), `VolumeError` when it cannot be used, `Invalid` when
/// it cannot be meant.
pub(super) fn open(pods: &Path, volume: &Volume, scratch: &Path) -> Result<Opened> {
    let Volume { pod_uid, plugin, directory, in_mount } = volume;
    let plugin = (!plugin.is_empty()).then_some(plugin);
    for (what, name) in
        [("the pod", Some(pod_uid)), ("the plugin", plugin), ("the volume", Some(directory))]
    {
        let Some(name) = name else { continue };
        if !is_plain_name(name.as_bytes()) {
            let name = display_path(name.as_bytes());
            let message = format!("'{name}' cannot be the name of {what}");
            return Err(Failed::new(FailureKind::Invalid, message));
        }
    }
    if let Some(plugin) = plugin.filter(|plugin| is_one_of(&NOT_DATA, plugin.as_bytes())) {
        let message = format!("volumes of '{plugin}' hold no data of a pod: they are left alone");
        return Err(Failed::new(FailureKind::Invalid, message));
    }
    let place = pods.display().to_string();
    let root = Dir::open_root(pods).map_err(|error| failure::volume("open", &place, &error))?;
    let (pod, place) = step(&root, &place, pod_uid.as_bytes())?;
    let (volumes, place) = step(&pod, &place, VOLUMES)?;
    let (folder, place, plain) = match plugin {
        Some(plugin) => {
            let plain = is_one_of(&PLAIN, plugin.as_bytes());
            let (plugin, place) = step(&volumes, &place, plugin.as_bytes())?;
            let (folder, place) = step(&plugin, &place, directory.as_bytes())?;
            (folder, place, plain)
        }
        None => only_match(&volumes, &place, directory, scratch)?,
    };
    let (folder, path) = if *in_mount { step(&folder, &place, MOUNT)? } else { (folder, place) };
    let mounted = is_mounted(&folder).map_err(|error| failure::volume("look at", &path, &error))?;
    Ok(Opened { folder, path, unmounted: mounted == Some(false) && !plain })
}

fn is_one_of(plugins: &[&str], name: &[u8]) -> bool {
    plugins.iter().any(|plugin| plugin.as_bytes() == name)
}

/// That nothing is mounted at `path`, where the volume is to be.
pub(super) fn not_mounted(path: &str) -> Failed {
    let message = format!(
        "nothing is mounted at '{path}': the volume is gone, or the agent's mount of the kubelet's \
         folder lacks mountPropagation HostToContainer"
    );
    Failed::new(FailureKind::VolumeNotFound, message)
}

/// Opens `name` in `dir`, which is at `place`.
fn step(dir: &Dir, place: &str, name: &[u8]) -> Result<(Dir, String)> {
    let path = format!("{place}/{}", display_path(name));
    match dir.open_dir(name) {
        Ok(opened) => Ok((opened, path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(not_found(&path)),
        Err(error) => Err(failure::volume("open the folder", &path, &error)),
    }
}

fn not_found(path: &str) -> Failed {
    let message = format!(
        "there is no folder '{path}' on this node: the pod or its volume is not here (any more)"
    );
    Failed::new(FailureKind::VolumeNotFound, message)
}

/// The folder `directory` of whichever plugin has it, where it is, and whether it is a plain folder.
fn only_match(
    volumes: &Dir,
    place: &str,
    directory: &str,
    scratch: &Path,
) -> Result<(Dir, String, bool)> {
    let unreadable = |error: &io::Error| failure::volume("read the folder", place, error);
    let mut plugins =
        Listing::read(volumes, LISTING_BYTES, scratch).map_err(|error| unreadable(&error))?;
    let mut found: Option<(Dir, String, bool)> = None;
    while let Some(plugin) = plugins.next_entry().map_err(|error| unreadable(&error))? {
        let is_no_dir = plugin.kind.is_some_and(|kind| kind != Kind::Dir);
        if is_no_dir || is_one_of(&NOT_DATA, plugin.name) {
            continue;
        }
        let opened = step(volumes, place, plugin.name)
            .and_then(|(plugin, place)| step(&plugin, &place, directory.as_bytes()));
        match (opened, &found) {
            (Err(failed), _) if failed.kind == FailureKind::VolumeNotFound => {}
            (Err(failed), _) => return Err(failed),
            (Ok((_, path)), Some((_, other, _))) => {
                let message = format!("both '{other}' and '{path}' may be the volume");
                return Err(Failed::new(FailureKind::VolumeError, message));
            }
            (Ok((folder, path)), None) => {
                found = Some((folder, path, is_one_of(&PLAIN, plugin.name)))
            }
        }
    }
    found.ok_or_else(|| not_found(&format!("{place}/*/{directory}")))
}

fn is_mounted(folder: &Dir) -> io::Result<Option<bool>> {
    let stat = rustix::fs::statx(folder, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
    let known = stat.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT);
    Ok(known.then(|| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn volume(plugin: &str, directory: &str, in_mount: bool) -> Volume {
        Volume {
            pod_uid: "pod".to_owned(),
            plugin: plugin.to_owned(),
            directory: directory.to_owned(),
            in_mount,
        }
    }

    struct Kubelet(tempfile::TempDir);

    impl Kubelet {
        fn new() -> Self {
            let kubelet = Self(tempfile::tempdir().unwrap());
            for folder in ["csi/pv-1/mount", "empty-dir/data", "other/both", "csi/both"] {
                fs::create_dir_all(kubelet.volumes().join(folder)).unwrap();
            }
            kubelet
        }

        fn volumes(&self) -> std::path::PathBuf {
            self.0.path().join("pod/volumes")
        }

        fn open(&self, volume: &Volume) -> std::result::Result<String, FailureKind> {
            let opened = open(self.0.path(), volume, &std::env::temp_dir());
            opened.map(|opened| opened.path).map_err(|failed| failed.kind)
        }
    }

    #[test]
    fn volumes_are_found_with_and_without_their_plugin() {
        let kubelet = Kubelet::new();
        let at = |path: &str| Ok(kubelet.volumes().join(path).display().to_string());
        assert_eq!(kubelet.open(&volume("csi", "pv-1", true)), at("csi/pv-1/mount"));
        assert_eq!(kubelet.open(&volume("", "pv-1", true)), at("csi/pv-1/mount"));
        assert_eq!(kubelet.open(&volume("", "data", false)), at("empty-dir/data"));
        assert_eq!(kubelet.open(&volume("other", "both", false)), at("other/both"));
        let open = |volume: &Volume| kubelet.open(volume).unwrap_err();
        assert_eq!(open(&volume("", "both", false)), FailureKind::VolumeError);
        assert_eq!(open(&volume("csi", "data", false)), FailureKind::VolumeNotFound);
        assert_eq!(open(&volume("", "none", false)), FailureKind::VolumeNotFound);
        assert_eq!(open(&volume("", "data", true)), FailureKind::VolumeNotFound);
        let gone = Volume { pod_uid: "gone".to_owned(), ..volume("", "data", false) };
        assert_eq!(open(&gone), FailureKind::VolumeNotFound);
    }

    #[test]
    fn only_plain_folders_need_no_mount() {
        let kubelet = Kubelet::new();
        for plain in PLAIN {
            fs::create_dir_all(kubelet.volumes().join(plain).join(plain)).unwrap();
        }
        let unmounted = |volume: &Volume| {
            open(kubelet.0.path(), volume, &std::env::temp_dir()).unwrap().unmounted
        };
        for plain in PLAIN {
            assert!(!unmounted(&volume(plain, plain, false)), "{plain}");
            assert!(!unmounted(&volume("", plain, false)), "{plain}");
        }
        assert!(unmounted(&volume("csi", "pv-1", true)) && unmounted(&volume("", "pv-1", true)));
        assert!(unmounted(&volume("other", "both", false)));
    }

    #[test]
    fn what_the_cluster_made_for_a_pod_is_not_a_volume() {
        let kubelet = Kubelet::new();
        for plugin in NOT_DATA {
            fs::create_dir_all(kubelet.volumes().join(plugin).join("token")).unwrap();
            let opened = kubelet.open(&volume(plugin, "token", false));
            assert_eq!(opened, Err(FailureKind::Invalid), "{plugin}");
        }
        let any = kubelet.open(&volume("", "token", false));
        assert_eq!(any, Err(FailureKind::VolumeNotFound), "nor when no plugin is named");
    }

    #[test]
    fn nothing_leads_out_of_the_folder() {
        let kubelet = Kubelet::new();
        for name in ["..", ".", "a/b", "/", "../../x", "a\0b"] {
            for volume in [volume(name, "data", false), volume("", name, false)] {
                assert_eq!(kubelet.open(&volume), Err(FailureKind::Invalid), "{name:?}");
            }
            let pod = Volume { pod_uid: name.to_owned(), ..volume("", "data", false) };
            assert_eq!(kubelet.open(&pod), Err(FailureKind::Invalid));
        }
        assert_eq!(kubelet.open(&volume("csi", "", false)), Err(FailureKind::Invalid));
        let volumes = kubelet.volumes();
        symlink("/etc", volumes.join("csi/link")).unwrap();
        symlink("csi", volumes.join("linked")).unwrap();
        fs::create_dir(volumes.join("csi/pv-2")).unwrap();
        symlink("/etc", volumes.join("csi/pv-2/mount")).unwrap();
        for volume in [
            volume("csi", "link", false),
            volume("", "link", false),
            volume("linked", "pv-1", true),
            volume("csi", "pv-2", true),
        ] {
            assert_eq!(kubelet.open(&volume), Err(FailureKind::VolumeError), "{volume:?}");
        }
    }

    #[test]
    fn a_mounted_folder_is_told_from_a_plain_one() {
        let proc = Dir::open_root("/proc".as_ref()).unwrap();
        assert_eq!(is_mounted(&proc).unwrap(), Some(true));
        let plain = tempfile::tempdir().unwrap();
        assert_eq!(is_mounted(&Dir::open_root(plain.path()).unwrap()).unwrap(), Some(false));
    }
}
