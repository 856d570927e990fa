//! Where the volume of an object is now: asks the cluster, then judges purely.

use k8s_openapi::api::core::v1::{ContainerState, PersistentVolume, PersistentVolumeClaim, Pod};
use kube::Client;
use kube::api::Api;

use super::find::{claim_of, find};
use super::job::Ready;
use super::object::Object;
use crate::api::RESTORE_UID;

/// Names of the init container that waits for volumes to be restored: ours and Velero's, and that of old versions.
const WAITERS: [&str; 2] = ["restore-wait", "restic-wait"];

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub enum Inspection {
    /// Work can begin.
    Ready(Box<Ready>),
    /// Not yet: why.
    NotYet(String),
    /// It cannot: why.
    Refused(String),
    /// What was to be restored is there already.
    Done,
}

/// Asks and judges.
///
/// # Errors
/// When the cluster does not answer.
pub async fn inspect(client: Client, object: &Object) -> Result<Inspection, kube::Error> {
    let reference = object.pod();
    let namespace = reference.namespace.as_deref().unwrap_or_default();
    let name = reference.name.as_deref().unwrap_or_default();
    if namespace.is_empty() || name.is_empty() {
        return Ok(Inspection::Refused("spec.pod names no pod".to_owned()));
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pod = pods.get_opt(name).await?;
    let (mut claim, mut persistent) = (None, None);
    if let Some(claim_name) = pod.as_ref().and_then(|pod| claim_of(pod, object.volume())) {
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
        claim = claims.get_opt(&claim_name).await?;
        let spec = claim.as_ref().and_then(|claim| claim.spec.as_ref());
        if let Some(volume) = spec.and_then(|spec| spec.volume_name.as_deref()) {
            let volumes: Api<PersistentVolume> = Api::all(client);
            persistent = volumes.get_opt(volume).await?;
        }
    }
    Ok(judge(object, pod.as_ref(), claim.as_ref(), persistent.as_ref()))
}

/// Judges.
pub fn judge(
    object: &Object,
    pod: Option<&Pod>,
    claim: Option<&PersistentVolumeClaim>,
    persistent: Option<&PersistentVolume>,
) -> Inspection {
    let reference = object.pod();
    let name = format!(
        "pod '{}/{}'",
        reference.namespace.as_deref().unwrap_or_default(),
        reference.name.as_deref().unwrap_or_default()
    );
    let Some(pod) = pod else {
        return Inspection::Refused(format!("{name} does not exist any more"));
    };
    let uid = reference.uid.as_deref().filter(|uid| !uid.is_empty());
    if uid.is_some_and(|uid| pod.metadata.uid.as_deref() != Some(uid)) {
        return Inspection::Refused(format!("{name} was replaced by another one of the same name"));
    }
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let Some(node) = node.filter(|node| !node.is_empty()) else {
        let why = format!("waiting for {name} to be scheduled");
        return match object {
            Object::Backup(_) => Inspection::Refused(format!("{name} runs on no node")),
            Object::Restore(_) => Inspection::NotYet(why),
        };
    };
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    if let Some(ended @ ("Succeeded" | "Failed")) = phase {
        return Inspection::Refused(format!("{name} has ended ({ended}): its volumes are gone"));
    }
    match object {
        Object::Backup(backup) if backup.spec.node != node => {
            return Inspection::Refused(format!(
                "spec.node is '{}', but {name} runs on '{node}'",
                backup.spec.node
            ));
        }
        Object::Backup(_) => {}
        Object::Restore(_) if object.mark().is_empty() => {
            return Inspection::Refused(format!(
                "neither label {RESTORE_UID} nor an owner says which Restore {name} waits for"
            ));
        }
        Object::Restore(_) => match waiter(pod, object.volume()) {
            Waiter::Running => {}
            Waiter::Elsewhere => {
                return Inspection::Refused(format!(
                    "init container restore-wait of {name} does not mount volume '{}': its \
                     containers would run before it is restored",
                    object.volume()
                ));
            }
            Waiter::Done => return Inspection::Done,
            Waiter::NotYet => {
                let why = format!("waiting for init container restore-wait of {name} to run");
                return Inspection::NotYet(why);
            }
            Waiter::None => {
                return Inspection::Refused(format!(
                    "{name} has no init container restore-wait: its containers would run before \
                     the volume is restored"
                ));
            }
        },
    }
    match find(pod, claim, persistent, object.volume()) {
        Ok(found) => Inspection::Ready(Box::new(Ready { node, found })),
        Err(refusal) => Inspection::Refused(refusal.0),
    }
}

enum Waiter {
    None,
    /// It does not mount the volume.
    Elsewhere,
    NotYet,
    Running,
    Done,
}

fn waiter(pod: &Pod, volume: &str) -> Waiter {
    let is_waiter = |name: &str| WAITERS.contains(&name);
    let spec = pod.spec.as_ref().and_then(|spec| spec.init_containers.as_ref());
    let container = spec.and_then(|all| all.iter().find(|container| is_waiter(&container.name)));
    let Some(container) = container else {
        return Waiter::None;
    };
    if !container.volume_mounts.iter().flatten().any(|mount| mount.name == volume) {
        return Waiter::Elsewhere;
    }
    let statuses = pod.status.as_ref().and_then(|status| status.init_container_statuses.as_ref());
    let state = statuses
        .and_then(|all| all.iter().find(|status| is_waiter(&status.name)))
        .and_then(|status| status.state.as_ref());
    match state {
        Some(ContainerState { running: Some(_), .. }) => Waiter::Running,
        Some(ContainerState { terminated: Some(ended), .. }) if ended.exit_code == 0 => {
            Waiter::Done
        }
        _ => Waiter::NotYet,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::api::{PodVolumeBackup, PodVolumeRestore};

    fn backup() -> Object {
        let object: PodVolumeBackup = serde_json::from_value(json!({
            "apiVersion": "velero.io/v1", "kind": "PodVolumeBackup", "metadata": {},
            "spec": {"node": "n", "pod": {"namespace": "shop", "name": "web", "uid": "u"},
                     "volume": "v", "backupStorageLocation": "l", "repoIdentifier": ""},
        }))
        .unwrap();
        object.into()
    }

    fn restore() -> Object {
        let object: PodVolumeRestore = serde_json::from_value(json!({
            "apiVersion": "velero.io/v1", "kind": "PodVolumeRestore",
            "metadata": {"labels": {"velero.io/restore-uid": "r"}},
            "spec": {"pod": {"namespace": "shop", "name": "web", "uid": "u"}, "volume": "v",
                     "backupStorageLocation": "l", "repoIdentifier": "", "snapshotID": "s",
                     "sourceNamespace": "shop"},
        }))
        .unwrap();
        object.into()
    }

    fn pod(node: &str, uid: &str, phase: &str, waiter: Value) -> Pod {
        let mount = json!([{"name": "v", "mountPath": "/v"}]);
        let init = if waiter.is_null() {
            json!([])
        } else {
            json!([{"name": "restore-wait", "volumeMounts": mount}])
        };
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": uid},
            "spec": {"nodeName": node, "containers": [{"name": "c", "volumeMounts": mount}],
                     "initContainers": init, "volumes": [{"name": "v", "emptyDir": {}}]},
            "status": {"phase": phase, "initContainerStatuses": [{
                "name": "restore-wait", "image": "", "imageID": "", "ready": false,
                "restartCount": 0, "state": waiter,
            }]},
        }))
        .unwrap()
    }

    #[test]
    fn a_volume_is_saved_where_its_pod_runs() {
        let none = || Value::Null;
        let good = judge(&backup(), Some(&pod("n", "u", "Running", none())), None, None);
        let Inspection::Ready(ready) = good else { panic!("{good:?}") };
        assert_eq!((&*ready.node, &*ready.found.volume.pod_uid), ("n", "u"));
        let table = [
            (None, "does not exist"),
            (Some(pod("n", "other", "Running", none())), "replaced"),
            (Some(pod("", "u", "Pending", none())), "no node"),
            (Some(pod("m", "u", "Running", none())), "runs on 'm'"),
            (Some(pod("n", "u", "Succeeded", none())), "has ended"),
        ];
        for (pod, part) in table {
            let found = judge(&backup(), pod.as_ref(), None, None);
            assert!(matches!(&found, Inspection::Refused(why) if why.contains(part)), "{found:?}");
        }
    }

    #[test]
    fn a_volume_is_restored_while_restore_wait_runs() {
        let running = json!({"running": {}});
        let found = judge(&restore(), Some(&pod("n", "u", "Pending", running)), None, None);
        assert!(matches!(found, Inspection::Ready(_)), "{found:?}");
        let waiting = json!({"waiting": {}});
        for pod in [pod("", "u", "Pending", json!({})), pod("n", "u", "Pending", waiting)] {
            let found = judge(&restore(), Some(&pod), None, None);
            assert!(matches!(found, Inspection::NotYet(_)), "{found:?}");
        }
        let ended = json!({"terminated": {"exitCode": 0}});
        let found = judge(&restore(), Some(&pod("n", "u", "Running", ended)), None, None);
        assert_eq!(found, Inspection::Done);
        let found = judge(&restore(), Some(&pod("n", "u", "Running", Value::Null)), None, None);
        assert!(matches!(&found, Inspection::Refused(why) if why.contains("restore-wait")));
        let mut elsewhere = pod("n", "u", "Pending", json!({"running": {}}));
        let waiters = elsewhere.spec.as_mut().and_then(|spec| spec.init_containers.as_mut());
        waiters.unwrap()[0].volume_mounts = None;
        let found = judge(&restore(), Some(&elsewhere), None, None);
        assert!(matches!(&found, Inspection::Refused(why) if why.contains("does not mount")));
        let Object::Restore(mut unnamed) = restore() else { panic!("it is a restore") };
        unnamed.metadata.labels = None;
        let running = pod("n", "u", "Pending", json!({"running": {}}));
        let found = judge(&Object::Restore(unnamed), Some(&running), None, None);
        assert!(matches!(&found, Inspection::Refused(why) if why.contains("restore-uid")));
    }
}
