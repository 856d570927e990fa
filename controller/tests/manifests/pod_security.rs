//! The Pod Security Standards (kubernetes.io/docs/concepts/security/pod-security-standards), for pods of Linux: what a
//! pod template has that the levels `baseline` and `restricted` forbid. The API server of the test cluster is older
//! than these levels and enforces none.

use serde_json::Value;

/// Capabilities that `baseline` lets a container add.
const BASELINE_CAPABILITIES: &[&str] = &[
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// Kinds of volumes that `restricted` allows.
const RESTRICTED_VOLUMES: &[&str] = &[
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
];

const SAFE_SYSCTLS: &[&str] = &[
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_syncookies",
];

const SELINUX_TYPES: &[&str] =
    &["", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"];

/// What `baseline` forbids, and what `restricted` forbids beyond it. Each entry names a field and its value.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Violations {
    pub(crate) baseline: Vec<String>,
    pub(crate) restricted: Vec<String>,
}

/// Every container of a pod, of whatever kind.
pub(crate) fn containers(spec: &Value) -> impl Iterator<Item = &Value> {
    ["initContainers", "containers", "ephemeralContainers"]
        .into_iter()
        .flat_map(|kind| spec[kind].as_array().into_iter().flatten())
}

/// Examines the spec of a pod or of a pod template.
pub(crate) fn examine(spec: &Value) -> Violations {
    let mut found = Violations::default();
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        if spec[field] == true {
            found.baseline.push(field.to_owned());
        }
    }
    for volume in spec["volumes"].as_array().into_iter().flatten() {
        for kind in volume.as_object().into_iter().flat_map(|volume| volume.keys()) {
            if kind == "hostPath" {
                found.baseline.push(format!("hostPath {}", text(&volume["hostPath"]["path"])));
            } else if kind != "name" && !RESTRICTED_VOLUMES.contains(&kind.as_str()) {
                found.restricted.push(format!("volume of kind {kind}"));
            }
        }
    }
    let pod = &spec["securityContext"];
    for sysctl in pod["sysctls"].as_array().into_iter().flatten() {
        if !SAFE_SYSCTLS.contains(&text(&sysctl["name"])) {
            found.baseline.push(format!("sysctl {}", text(&sysctl["name"])));
        }
    }
    context(pod, &mut found);
    for container in containers(spec) {
        let own = &container["securityContext"];
        context(own, &mut found);
        inherited(pod, own, &mut found);
        capabilities(&own["capabilities"], &mut found);
        if own["privileged"] == true {
            found.baseline.push("privileged".to_owned());
        }
        if !matches!(text(&own["procMount"]), "" | "Default") {
            found.baseline.push("procMount".to_owned());
        }
        for port in container["ports"].as_array().into_iter().flatten() {
            if port["hostPort"].as_u64().is_some_and(|port| port != 0) {
                found.baseline.push(format!("hostPort {}", port["hostPort"]));
            }
        }
        if own["allowPrivilegeEscalation"] != false {
            found.restricted.push("allowPrivilegeEscalation".to_owned());
        }
    }
    found
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// What a security context may not say, whether of the pod or of a container.
fn context(context: &Value, found: &mut Violations) {
    if context["windowsOptions"]["hostProcess"] == true {
        found.baseline.push("hostProcess".to_owned());
    }
    if text(&context["seccompProfile"]["type"]) == "Unconfined" {
        found.baseline.push("seccomp Unconfined".to_owned());
    }
    if text(&context["appArmorProfile"]["type"]) == "Unconfined" {
        found.baseline.push("AppArmor Unconfined".to_owned());
    }
    let selinux = &context["seLinuxOptions"];
    if !SELINUX_TYPES.contains(&text(&selinux["type"]))
        || !text(&selinux["user"]).is_empty()
        || !text(&selinux["role"]).is_empty()
    {
        found.baseline.push("seLinuxOptions".to_owned());
    }
    if context["runAsUser"] == 0 {
        found.restricted.push("runAsUser 0".to_owned());
    }
}

/// What a container must say, or its pod for it.
fn inherited(pod: &Value, own: &Value, found: &mut Violations) {
    let says = |field: &str| if own[field].is_null() { &pod[field] } else { &own[field] };
    if says("runAsNonRoot") != true {
        found.restricted.push("no runAsNonRoot".to_owned());
    }
    if !matches!(text(&says("seccompProfile")["type"]), "RuntimeDefault" | "Localhost") {
        found.restricted.push("no seccompProfile".to_owned());
    }
}

fn capabilities(capabilities: &Value, found: &mut Violations) {
    let list = |what: &str| capabilities[what].as_array().into_iter().flatten().map(text);
    for added in list("add") {
        if !BASELINE_CAPABILITIES.contains(&added) {
            found.baseline.push(format!("capability {added}"));
        } else if added != "NET_BIND_SERVICE" {
            found.restricted.push(format!("capability {added}"));
        }
    }
    if !list("drop").any(|dropped| dropped == "ALL") {
        found.restricted.push("capabilities not dropped".to_owned());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn restricted() -> Value {
        json!({
            "securityContext": { "runAsNonRoot": true, "seccompProfile": { "type": "RuntimeDefault" } },
            "initContainers": [],
            "containers": [{ "name": "main", "securityContext": {
                "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] },
            }}],
            "volumes": [{ "name": "tmp", "emptyDir": {} }],
        })
    }

    /// The pod with one more field, given as a JSON pointer.
    fn with(pointer: &str, value: Value) -> Value {
        let mut pod = restricted();
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        let parent = pod.pointer_mut(parent).unwrap();
        match parent {
            Value::Array(list) => list.push(value),
            _ => parent[field] = value,
        }
        pod
    }

    #[test]
    fn a_restricted_pod_violates_nothing() {
        assert_eq!(examine(&restricted()), Violations::default());
    }

    #[test]
    fn each_rule_is_noticed() {
        let own = "/containers/0/securityContext";
        let baseline = [
            ("/hostNetwork".to_owned(), json!(true)),
            ("/hostPID".to_owned(), json!(true)),
            ("/hostIPC".to_owned(), json!(true)),
            ("/volumes/-".to_owned(), json!({ "name": "a", "hostPath": { "path": "/" } })),
            ("/securityContext/sysctls".to_owned(), json!([{ "name": "kernel.msgmax" }])),
            ("/securityContext/seLinuxOptions".to_owned(), json!({ "type": "spc_t" })),
            ("/securityContext/windowsOptions".to_owned(), json!({ "hostProcess": true })),
            (format!("{own}/privileged"), json!(true)),
            (format!("{own}/procMount"), json!("Unmasked")),
            (format!("{own}/appArmorProfile"), json!({ "type": "Unconfined" })),
            (format!("{own}/seLinuxOptions"), json!({ "role": "r" })),
            (format!("{own}/capabilities/add"), json!(["SYS_ADMIN"])),
            ("/containers/0/ports".to_owned(), json!([{ "hostPort": 80 }])),
        ];
        for (pointer, value) in baseline {
            let found = examine(&with(&pointer, value));
            assert_eq!((found.baseline.len(), found.restricted.len()), (1, 0), "{pointer}");
        }
        let restricted = [
            ("/volumes/-".to_owned(), json!({ "name": "a", "nfs": {} })),
            ("/securityContext/runAsUser".to_owned(), json!(0)),
            ("/securityContext/runAsNonRoot".to_owned(), json!(false)),
            ("/securityContext/seccompProfile".to_owned(), Value::Null),
            (format!("{own}/runAsUser"), json!(0)),
            (format!("{own}/runAsNonRoot"), json!(false)),
            (format!("{own}/allowPrivilegeEscalation"), json!(true)),
            (format!("{own}/allowPrivilegeEscalation"), Value::Null),
            (format!("{own}/capabilities/drop"), json!(["KILL"])),
            (format!("{own}/capabilities/add"), json!(["CHOWN"])),
        ];
        for (pointer, value) in restricted {
            let found = examine(&with(&pointer, value));
            assert_eq!((found.baseline.len(), found.restricted.len()), (0, 1), "{pointer}");
        }
    }

    #[test]
    fn an_init_container_counts_as_any() {
        let found = examine(&with("/initContainers/-", json!({ "name": "a" })));
        assert_eq!(found.baseline, Vec::<String>::new());
        assert_eq!(found.restricted, ["capabilities not dropped", "allowPrivilegeEscalation"]);
    }
}
