//! What `kubectl kustomize` makes of `deploy/`, for what the test cluster cannot show: levels of pod security and
//! network policies, which its Kubernetes does not enforce. That the rendered output is accepted, and works, is shown
//! by the end-to-end tests.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod network;
mod pod_security;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use network::{Peer, lets_in};
use pod_security::{Violations, containers, examine};
use serde_json::{Value, json};

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// What is installed by `kubectl apply -k deploy/default`.
fn rendered() -> Vec<Value> {
    let kubectl = std::env::var("EBACKUP_TEST_KUBECTL").unwrap_or_else(|_| {
        panic!(
            "EBACKUP_TEST_KUBECTL is not set: this test needs kubectl. 'cargo xtask cluster up' builds it; tell this \
             shell with 'set -a; . target/cluster/env'"
        )
    });
    let output = Command::new(kubectl).arg("kustomize").arg(deploy().join("default")).output();
    let output = output.expect("kubectl can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let objects: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap();
    assert!(objects.len() > 10, "{} objects", objects.len());
    objects
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

/// The only object of a kind that has this name.
fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let mut found =
        of_kind(objects, kind).into_iter().filter(|object| object["metadata"]["name"] == name);
    found.next().unwrap_or_else(|| panic!("there is no {kind} {name}"))
}

fn pod_of<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    &find(objects, kind, name)["spec"]["template"]["spec"]
}

/// The pod that the example of restoring makes, with a kubectl that keeps it and says yes to all else.
fn restored_pod(run_as: Option<&str>) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let kubectl = folder.path().join("kubectl");
    let script = r#"#!/bin/sh
case "$*" in
  "create -f -") cat >"${0%/*}/pod" ;;
  *phase*) echo Completed ;;
  *) echo something ;;
esac
"#;
    std::fs::write(&kubectl, script).unwrap();
    std::fs::set_permissions(&kubectl, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    let mut example = Command::new(deploy().join("examples/restore-volume.sh"));
    example.args(["namespace", "pod", "snapshot"]).env("PATH", path);
    example.envs(run_as.map(|user| ("RUN_AS", user)));
    let output = example.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let pod = std::fs::read_to_string(folder.path().join("pod")).unwrap();
    let pod: Value = serde_saphyr::from_str(&pod).unwrap();
    assert_eq!(pod["kind"], "Pod");
    pod["spec"].clone()
}

#[test]
fn the_controller_is_restricted() {
    let pod = pod_of(&rendered(), "Deployment", "velero").clone();
    assert_eq!(examine(&pod), Violations::default());
}

#[test]
fn what_waits_in_restored_pods_is_restricted() {
    for (run_as, user) in [(None, 65532), (Some("999"), 999)] {
        let pod = restored_pod(run_as);
        let waiting = pod["initContainers"][0].clone();
        assert_eq!(waiting["name"], "restore-wait");
        assert_eq!(waiting["securityContext"]["runAsUser"], user);
        let main = &pod["containers"][0]["securityContext"]["runAsUser"];
        assert_eq!(main.as_u64(), run_as.map(|user| user.parse().unwrap()));
        // The rest of such a pod is its owner's.
        let alone = json!({ "containers": [waiting], "volumes": pod["volumes"] });
        assert_eq!(examine(&alone), Violations::default());
    }
}

#[test]
fn the_agent_has_what_it_needs_beyond_the_levels_and_nothing_else() {
    let objects = rendered();
    let pod = pod_of(&objects, "DaemonSet", "node-agent");
    let found = examine(pod);
    // It reads the kubelet's folder of pods, and files whatever their mode.
    assert_eq!(found.baseline, ["hostPath /var/lib/kubelet/pods", "capability DAC_READ_SEARCH"]);
    // It gives files their owner, mode and attributes back.
    let restore = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "MKNOD", "SETFCAP"]
        .map(|capability| format!("capability {capability}"));
    let mut expected = vec!["runAsUser 0".to_owned(), "no runAsNonRoot".to_owned()];
    expected.extend(restore);
    assert_eq!(found.restricted, expected);
    // Hence the level of the namespace.
    let labels = &find(&objects, "Namespace", "velero")["metadata"]["labels"];
    assert_eq!(labels["pod-security.kubernetes.io/enforce"], "privileged");
}

#[test]
fn no_program_writes_its_root_or_takes_memory_without_limit() {
    let objects = rendered();
    for (kind, name) in [("Deployment", "velero"), ("DaemonSet", "node-agent")] {
        for container in containers(pod_of(&objects, kind, name)) {
            assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true, "{name}");
            assert!(container["resources"]["limits"]["memory"].is_string(), "{name}");
            assert!(container["resources"]["requests"]["cpu"].is_string(), "{name}");
        }
    }
}

#[test]
fn agents_hold_no_token_but_that_for_the_controller_and_no_permission() {
    let objects = rendered();
    let pod = pod_of(&objects, "DaemonSet", "node-agent");
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(
        find(&objects, "ServiceAccount", "node-agent")["automountServiceAccountToken"],
        false
    );
    let tokens: Vec<&Value> = pod["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|volume| volume["projected"]["sources"].as_array().into_iter().flatten())
        .map(|source| &source["serviceAccountToken"]["audience"])
        .collect();
    assert_eq!(tokens, ["ebackup-controller"]);
    for kind in ["RoleBinding", "ClusterRoleBinding"] {
        for binding in of_kind(&objects, kind) {
            let subjects = binding["subjects"].as_array().unwrap();
            let names: Vec<_> = subjects.iter().map(|subject| &subject["name"]).collect();
            assert_eq!(names, ["velero"], "{binding}");
        }
    }
}

#[test]
fn outside_its_namespace_the_controller_reads_what_it_names() {
    let objects = rendered();
    let rules: Vec<&Value> = of_kind(&objects, "ClusterRole")
        .into_iter()
        .flat_map(|role| role["rules"].as_array().unwrap())
        .collect();
    assert!(!rules.is_empty());
    for rule in rules {
        // A review changes nothing, and is asked for by creating it.
        let review =
            rule["resources"] == json!(["tokenreviews"]) && rule["verbs"] == json!(["create"]);
        assert!(review || rule["verbs"] == json!(["get"]), "{rule}");
        assert!(!rule["resources"].to_string().contains("secrets"), "{rule}");
    }
    for role in objects.iter().filter(|object| object["rules"].is_array()) {
        assert!(!role.to_string().contains("\"*\""), "a rule for everything: {role}");
    }
}

#[test]
fn pods_let_in_who_needs_them_and_nobody_else() {
    let objects = rendered();
    let policies: Vec<Value> = of_kind(&objects, "NetworkPolicy").into_iter().cloned().collect();
    // As the templates label them.
    let template = |kind: &str, name: &str| {
        let labels = &find(&objects, kind, name)["spec"]["template"]["metadata"]["labels"];
        let labels = labels.as_object().unwrap().iter();
        labels
            .map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned()))
            .collect::<Vec<_>>()
    };
    let (controller, agent) =
        (template("Deployment", "velero"), template("DaemonSet", "node-agent"));
    fn borrow(labels: &[(String, String)]) -> Vec<(&str, &str)> {
        labels.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }
    let (controller, agent) = (borrow(&controller), borrow(&agent));
    let own = |labels| Peer { namespace: "velero", labels };
    let (controller, agent) = (own(&controller), own(&agent));
    let neighbour = own(&[("name", "other")]);
    let prometheus = Peer { namespace: "monitoring", labels: &[("app", "prometheus")] };
    let disguised = Peer { namespace: "default", labels: agent.labels };
    let (mover, controllers, agents) = (7443, 8085, 8086);
    for (who, from, to, port, expected) in [
        ("an agent to the controller", &agent, &controller, mover, true),
        ("another pod of the namespace to the controller", &neighbour, &controller, mover, false),
        ("a pod labelled like an agent elsewhere", &disguised, &controller, mover, false),
        ("Prometheus to the controller's work", &prometheus, &controller, mover, false),
        ("Prometheus to the controller's metrics", &prometheus, &controller, controllers, true),
        ("Prometheus to an agent's metrics", &prometheus, &agent, agents, true),
        ("the controller to an agent", &controller, &agent, mover, false),
        ("anybody to another port of the controller", &agent, &controller, 22, false),
        ("anybody to another port of an agent", &prometheus, &agent, 22, false),
    ] {
        assert_eq!(lets_in(&policies, from, to, port), expected, "{who}");
    }
    // Ports that a program serves and no policy knows would be closed.
    for (kind, name, to) in
        [("Deployment", "velero", &controller), ("DaemonSet", "node-agent", &agent)]
    {
        for container in containers(pod_of(&objects, kind, name)) {
            for port in container["ports"].as_array().unwrap() {
                let port = port["containerPort"].as_u64().unwrap();
                assert!(lets_in(&policies, &agent, to, port), "{name} serves {port} to nobody");
            }
        }
    }
}
