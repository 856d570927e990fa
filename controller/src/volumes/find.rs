//! Where the kubelet has a volume of a pod, and whose data it is. Pure: from the pod, its claim and the
//! PersistentVolume to the folder, or to the reason why the volume has none that can be saved.
//!
//! The kubelet names a plugin's folder `kubernetes.io~<plugin>`, and in it a folder by the volume's name in the
//! pod, or by that of the PersistentVolume behind a claim. CSI volumes lie one folder deeper, in `mount`; so do
//! those of plugins that were once part of Kubernetes and whose work a CSI driver does now.

use k8s_openapi::api::core::v1::{
    PersistentVolume, PersistentVolumeClaim, PersistentVolumeSpec, Pod, Volume as PodVolume,
};
use proto::v1::Volume;

/// On a PersistentVolume: the CSI driver that does the work of its plugin.
const MIGRATED_TO: &str = "pv.kubernetes.io/migrated-to";
/// On a PersistentVolume: who made it.
const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";

/// A volume that can be saved and restored into.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Where it is.
    pub volume: Volume,
    /// Whose data it is, across pods.
    pub lineage: String,
    /// The claim behind it.
    pub claim: Option<Claim>,
}

/// A PersistentVolumeClaim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Its name, in the pod's namespace.
    pub name: String,
    /// Its UID.
    pub uid: String,
}

/// Why a volume cannot be saved or restored into.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

fn refuse<T>(why: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(why.into()))
}

fn volume_named<'a>(pod: &'a Pod, name: &str) -> Option<&'a PodVolume> {
    let volumes = pod.spec.as_ref()?.volumes.as_ref()?;
    volumes.iter().find(|volume| volume.name == name)
}

/// Name of the claim behind a volume of a pod; a generic ephemeral volume has one that is named after both.
pub fn claim_of(pod: &Pod, name: &str) -> Option<String> {
    let volume = volume_named(pod, name)?;
    if let Some(claim) = &volume.persistent_volume_claim {
        return Some(claim.claim_name.clone());
    }
    volume.ephemeral.as_ref()?;
    Some(format!("{}-{name}", pod.metadata.name.as_deref()?))
}

/// Where the volume is.
///
/// `claim` and `persistent` are the objects behind it, as far as [`claim_of`] names a claim and they exist.
///
/// # Errors
/// Why it has no folder that can be saved or restored into.
pub fn find(
    pod: &Pod,
    claim: Option<&PersistentVolumeClaim>,
    persistent: Option<&PersistentVolume>,
    name: &str,
) -> Result<Found, Refusal> {
    let Some(volume) = volume_named(pod, name) else {
        return refuse(format!("the pod has no volume '{name}'"));
    };
    match use_of(pod, name) {
        Use::Mounted => {}
        Use::Block => {
            return refuse(format!(
                "volume '{name}' is used as a block device, which cannot be saved yet"
            ));
        }
        Use::None => {
            return refuse(format!(
                "no container mounts volume '{name}', so the node does not have it"
            ));
        }
    }
    let (place, lineage, claim) = match claim_of(pod, name) {
        Some(claim_name) => {
            let (place, claim) = behind_claim(&claim_name, claim, persistent)?;
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            let lineage = format!("pvc/{namespace}/{}/{}", claim.name, claim.uid);
            (place, lineage, Some(claim))
        }
        None => (inline(volume)?, lineage_of_pod(pod, name), None),
    };
    let Some(pod_uid) = pod.metadata.uid.clone() else {
        return refuse("the pod has no UID");
    };
    let Place { plugin, directory, in_mount } = place;
    Ok(Found { volume: Volume { pod_uid, plugin, directory, in_mount }, lineage, claim })
}

enum Use {
    Mounted,
    Block,
    None,
}

fn use_of(pod: &Pod, name: &str) -> Use {
    let Some(spec) = &pod.spec else {
        return Use::None;
    };
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut block = false;
    for container in containers {
        if container.volume_mounts.iter().flatten().any(|mount| mount.name == name) {
            return Use::Mounted;
        }
        block |= container.volume_devices.iter().flatten().any(|device| device.name == name);
    }
    if block { Use::Block } else { Use::None }
}

/// Below the pod's folder.
#[derive(Debug)]
struct Place {
    plugin: String,
    directory: String,
    in_mount: bool,
}

impl Place {
    fn new(plugin: &str, directory: &str) -> Self {
        Self { plugin: plugin.to_owned(), directory: directory.to_owned(), in_mount: false }
    }

    fn csi(directory: &str) -> Self {
        Self { in_mount: true, ..Self::new("kubernetes.io~csi", directory) }
    }
}

/// A volume that the pod describes itself.
fn inline(volume: &PodVolume) -> Result<Place, Refusal> {
    let name = &*volume.name;
    let no_data = [
        (volume.secret.is_some(), "a Secret"),
        (volume.config_map.is_some(), "a ConfigMap"),
        (volume.projected.is_some(), "projected from other objects"),
        (volume.downward_api.is_some(), "made from the pod's own description"),
        (volume.image.is_some(), "a container image"),
    ];
    if let Some((_, what)) = no_data.iter().find(|(is, _)| *is) {
        return refuse(format!(
            "volume '{name}' is {what}: it holds no data of its own and is not saved"
        ));
    }
    if volume.host_path.is_some() {
        return refuse(format!(
            "volume '{name}' is a hostPath: a folder of the node, which is not the pod's own"
        ));
    }
    if volume.csi.is_some() {
        return Ok(Place::csi(name));
    }
    if let Some(flex) = &volume.flex_volume {
        return Ok(Place::new(&flex.driver.replace('/', "~"), name));
    }
    let plugins = [
        (volume.empty_dir.is_some(), "kubernetes.io~empty-dir"),
        (volume.nfs.is_some(), "kubernetes.io~nfs"),
        (volume.cephfs.is_some(), "kubernetes.io~cephfs"),
        (volume.glusterfs.is_some(), "kubernetes.io~glusterfs"),
        (volume.iscsi.is_some(), "kubernetes.io~iscsi"),
        (volume.fc.is_some(), "kubernetes.io~fc"),
        (volume.rbd.is_some(), "kubernetes.io~rbd"),
        (volume.git_repo.is_some(), "kubernetes.io~git-repo"),
        (volume.aws_elastic_block_store.is_some(), "kubernetes.io~aws-ebs"),
        (volume.azure_disk.is_some(), "kubernetes.io~azure-disk"),
        (volume.azure_file.is_some(), "kubernetes.io~azure-file"),
        (volume.cinder.is_some(), "kubernetes.io~cinder"),
        (volume.gce_persistent_disk.is_some(), "kubernetes.io~gce-pd"),
        (volume.vsphere_volume.is_some(), "kubernetes.io~vsphere-volume"),
        (volume.portworx_volume.is_some(), "kubernetes.io~portworx-volume"),
    ];
    // Of a plugin that is not known, the agent looks for the one folder of that name.
    let plugin = plugins.iter().find(|(is, _)| *is).map_or("", |(_, plugin)| plugin);
    Ok(Place::new(plugin, name))
}

fn behind_claim(
    name: &str,
    claim: Option<&PersistentVolumeClaim>,
    persistent: Option<&PersistentVolume>,
) -> Result<(Place, Claim), Refusal> {
    let Some(claim) = claim else {
        return refuse(format!("there is no PersistentVolumeClaim '{name}'"));
    };
    let bound = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref());
    let Some(bound) = bound.filter(|bound| !bound.is_empty()) else {
        return refuse(format!("PersistentVolumeClaim '{name}' is not bound to a volume"));
    };
    let found = persistent.filter(|volume| volume.metadata.name.as_deref() == Some(bound));
    let Some((volume, spec)) = found.and_then(|volume| Some((volume, volume.spec.as_ref()?)))
    else {
        return refuse(format!(
            "there is no PersistentVolume '{bound}', to which claim '{name}' is bound"
        ));
    };
    if spec.volume_mode.as_deref() == Some("Block") {
        return refuse(format!(
            "PersistentVolume '{bound}' is a block device, which cannot be saved yet"
        ));
    }
    if spec.host_path.is_some() {
        return refuse(format!(
            "PersistentVolume '{bound}' is a hostPath: a folder of the node, which is not the pod's own"
        ));
    }
    let annotation = |key: &str| {
        let annotations = volume.metadata.annotations.as_ref();
        annotations.and_then(|all| all.get(key)).map(String::as_str).unwrap_or_default()
    };
    let place = place_of(bound, spec, annotation(MIGRATED_TO), annotation(PROVISIONED_BY));
    let uid = claim.metadata.uid.clone().unwrap_or_default();
    Ok((place, Claim { name: name.to_owned(), uid }))
}

fn place_of(name: &str, spec: &PersistentVolumeSpec, migrated: &str, provisioner: &str) -> Place {
    if spec.csi.is_some() {
        return Place::csi(name);
    }
    // Plugins whose work a CSI driver may have taken over. Others, such as NFS, are also made by programs
    // that are no CSI drivers, and mounted by the plugin all the same.
    let migratable = [
        (spec.aws_elastic_block_store.is_some(), "kubernetes.io~aws-ebs"),
        (spec.azure_disk.is_some(), "kubernetes.io~azure-disk"),
        (spec.azure_file.is_some(), "kubernetes.io~azure-file"),
        (spec.cinder.is_some(), "kubernetes.io~cinder"),
        (spec.gce_persistent_disk.is_some(), "kubernetes.io~gce-pd"),
        (spec.vsphere_volume.is_some(), "kubernetes.io~vsphere-volume"),
        (spec.portworx_volume.is_some(), "kubernetes.io~portworx-volume"),
        (spec.rbd.is_some(), "kubernetes.io~rbd"),
    ];
    if let Some((_, plugin)) = migratable.iter().find(|(is, _)| *is) {
        let by_driver = !provisioner.is_empty() && !provisioner.starts_with("kubernetes.io/");
        let migrated = !migrated.is_empty() || by_driver;
        return if migrated { Place::csi(name) } else { Place::new(plugin, name) };
    }
    if let Some(flex) = &spec.flex_volume {
        return Place::new(&flex.driver.replace('/', "~"), name);
    }
    let plugins = [
        (spec.local.is_some(), "kubernetes.io~local-volume"),
        (spec.nfs.is_some(), "kubernetes.io~nfs"),
        (spec.cephfs.is_some(), "kubernetes.io~cephfs"),
        (spec.glusterfs.is_some(), "kubernetes.io~glusterfs"),
        (spec.iscsi.is_some(), "kubernetes.io~iscsi"),
        (spec.fc.is_some(), "kubernetes.io~fc"),
    ];
    let plugin = plugins.iter().find(|(is, _)| *is).map_or("", |(_, plugin)| plugin);
    Place::new(plugin, name)
}

/// A volume without a claim belongs to what keeps the pod running, as far as there is such an object.
fn lineage_of_pod(pod: &Pod, volume: &str) -> String {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let mut owners = pod.metadata.owner_references.iter().flatten();
    let owner = owners.find(|owner| owner.controller == Some(true));
    match owner {
        Some(owner) => format!("pod/{namespace}/{}/{}/{volume}", owner.kind, owner.name),
        None => {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            format!("pod/{namespace}/{name}/{volume}")
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(volume: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "web-0", "namespace": "shop", "uid": "pod-uid"},
            "spec": {
                "containers": [{"name": "c", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
                "volumes": [volume],
            },
        }))
        .unwrap()
    }

    fn claim() -> PersistentVolumeClaim {
        serde_json::from_value(json!({
            "metadata": {"name": "data", "uid": "claim-uid"}, "spec": {"volumeName": "pv-1"},
        }))
        .unwrap()
    }

    fn persistent(spec: Value, annotations: Value) -> PersistentVolume {
        serde_json::from_value(json!({
            "metadata": {"name": "pv-1", "annotations": annotations}, "spec": spec,
        }))
        .unwrap()
    }

    fn with_claim() -> Pod {
        pod(json!({"name": "v", "persistentVolumeClaim": {"claimName": "data"}}))
    }

    #[test]
    fn volumes_that_a_pod_describes_itself_are_found() {
        let table = [
            (json!({"emptyDir": {}}), "kubernetes.io~empty-dir", false),
            (json!({"nfs": {"server": "s", "path": "/"}}), "kubernetes.io~nfs", false),
            (json!({"csi": {"driver": "d"}}), "kubernetes.io~csi", true),
            (json!({"flexVolume": {"driver": "huawei.com/fuxivol"}}), "huawei.com~fuxivol", false),
            (json!({"scaleIO": {"gateway": "g", "secretRef": {}, "system": "s"}}), "", false),
        ];
        for (source, plugin, in_mount) in table {
            let mut volume = source.clone();
            volume["name"] = json!("v");
            let found = find(&pod(volume), None, None, "v").unwrap();
            let expected = Volume {
                pod_uid: "pod-uid".to_owned(),
                plugin: plugin.to_owned(),
                directory: "v".to_owned(),
                in_mount,
            };
            assert_eq!(found.volume, expected, "{source}");
            assert_eq!((&*found.lineage, found.claim), ("pod/shop/web-0/v", None));
        }
    }

    #[test]
    fn volumes_behind_claims_are_found_by_the_name_of_the_persistent_volume() {
        let none = json!({});
        let disk = json!({"awsElasticBlockStore": {"volumeID": "x"}});
        let nfs = json!({"nfs": {"server": "s", "path": "/"}});
        let table = [
            (json!({"csi": {"driver": "d", "volumeHandle": "h"}}), none.clone(), "csi", true),
            (json!({"local": {"path": "/x"}}), none.clone(), "local-volume", false),
            (nfs.clone(), none.clone(), "nfs", false),
            (nfs, json!({PROVISIONED_BY: "cluster.local/nfs"}), "nfs", false),
            (disk.clone(), none, "aws-ebs", false),
            (disk.clone(), json!({PROVISIONED_BY: "kubernetes.io/aws-ebs"}), "aws-ebs", false),
            (disk.clone(), json!({MIGRATED_TO: "ebs.csi.aws.com"}), "csi", true),
            (disk, json!({PROVISIONED_BY: "ebs.csi.aws.com"}), "csi", true),
        ];
        for (spec, annotations, plugin, in_mount) in table {
            let volume = persistent(spec.clone(), annotations);
            let found = find(&with_claim(), Some(&claim()), Some(&volume), "v").unwrap();
            assert_eq!(found.volume.plugin, format!("kubernetes.io~{plugin}"), "{spec}");
            assert_eq!((&*found.volume.directory, found.volume.in_mount), ("pv-1", in_mount));
            assert_eq!(found.lineage, "pvc/shop/data/claim-uid");
            assert_eq!(found.claim.unwrap().uid, "claim-uid");
        }
    }

    #[test]
    fn an_ephemeral_volume_has_a_claim_named_after_pod_and_volume() {
        let pod = pod(json!({"name": "v", "ephemeral": {}}));
        assert_eq!(claim_of(&pod, "v").as_deref(), Some("web-0-v"));
        assert_eq!(claim_of(&pod, "w"), None);
    }

    #[test]
    fn the_data_of_a_pod_without_claim_belong_to_what_keeps_it_running() {
        let mut pod = pod(json!({"name": "v", "emptyDir": {}}));
        let owner = json!([{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "web",
                            "uid": "u", "controller": true}]);
        pod.metadata.owner_references = serde_json::from_value(owner).unwrap();
        let found = find(&pod, None, None, "v").unwrap();
        assert_eq!(found.lineage, "pod/shop/StatefulSet/web/v");
    }

    #[test]
    fn volumes_without_data_of_their_own_are_refused_with_the_reason() {
        let table = [
            (json!({"hostPath": {"path": "/"}}), "hostPath"),
            (json!({"secret": {"secretName": "s"}}), "a Secret"),
            (json!({"configMap": {"name": "s"}}), "a ConfigMap"),
            (json!({"projected": {}}), "projected"),
            (json!({"downwardAPI": {}}), "description"),
        ];
        for (source, why) in table {
            let mut volume = source;
            volume["name"] = json!("v");
            let refusal = find(&pod(volume), None, None, "v").unwrap_err();
            assert!(refusal.0.contains(why) && refusal.0.contains("'v'"), "{refusal}");
        }
        let refusal = find(&pod(json!({"name": "x", "emptyDir": {}})), None, None, "v");
        assert!(refusal.unwrap_err().0.contains("no volume 'v'"));
        let refusal = find(&pod(json!({"name": "x", "emptyDir": {}})), None, None, "x");
        assert!(refusal.unwrap_err().0.contains("no container mounts"));
    }

    #[test]
    fn claims_that_lead_nowhere_and_block_devices_are_refused() {
        let pod = with_claim();
        let none = || json!({});
        let csi = json!({"csi": {"driver": "d", "volumeHandle": "h"}});
        let good = persistent(csi.clone(), none());
        let mut unbound = claim();
        unbound.spec = None;
        let mut block = csi;
        block["volumeMode"] = json!("Block");
        let block = persistent(block, none());
        let host = persistent(json!({"hostPath": {"path": "/"}}), none());
        let mut other = good.clone();
        other.metadata.name = Some("pv-2".to_owned());
        let table = [
            (None, Some(&good), "no PersistentVolumeClaim 'data'"),
            (Some(&unbound), Some(&good), "not bound"),
            (Some(&claim()), None, "no PersistentVolume 'pv-1'"),
            (Some(&claim()), Some(&other), "no PersistentVolume 'pv-1'"),
            (Some(&claim()), Some(&block), "block device"),
            (Some(&claim()), Some(&host), "hostPath"),
        ];
        for (claim, volume, why) in table {
            let refusal = find(&pod, claim, volume, "v").unwrap_err();
            assert!(refusal.0.contains(why), "{refusal}");
        }
        let mut devices = with_claim();
        let container = &mut devices.spec.as_mut().unwrap().containers[0];
        container.volume_mounts = None;
        let device = json!([{"name": "v", "devicePath": "/dev/x"}]);
        container.volume_devices = serde_json::from_value(device).unwrap();
        let refusal = find(&devices, Some(&claim()), Some(&good), "v").unwrap_err();
        assert!(refusal.0.contains("block device"), "{refusal}");
    }
}
