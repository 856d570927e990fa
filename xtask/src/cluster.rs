//! Kubernetes for the tests, version 1.20, from Debian's packages alone: an API server with its etcd
//! (`apiserver`), or a cluster of one real node (`cluster`). Scripts in `xtask/cluster` run them; this
//! file finds or builds their programs, chooses ports, starts and stops them.
//!
//! Who has a cluster for tests names its kubeconfig in `EBACKUP_TEST_KUBECONFIG`, with the other
//! variables that `target/cluster/env` would hold, and none is started;
//! `EBACKUP_TEST_APISERVER_KUBECONFIG` is the same for the API server. An API server and etcd of
//! another version are taken from the folder `KUBEBUILDER_ASSETS`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::runner::Log;
use crate::service::{READY, Service, Variables, cache, free_ports, path_with, require, root};

/// What `build-kubernetes.sh` builds.
const KUBERNETES: [&str; 5] =
    ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl"];

const FOR_APISERVER: &[(&str, &str)] = &[("openssl", "openssl"), ("etcd", "etcd-server")];

const FOR_NODE: &[(&str, &str)] = &[
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("/bin/busybox", "busybox-static"),
    ("ip", "iproute2"),
    ("unshare", "util-linux"),
];

const FOR_BUILD: &[(&str, &str)] = &[
    ("go", "golang-go"),
    ("/usr/share/gocode/src/github.com/modern-go/reflect2", "golang-github-modern-go-reflect2-dev"),
    ("make", "make"),
    ("jq", "jq"),
    ("rsync", "rsync"),
];

/// Starts the API server, unless it runs, and returns the variables that tests find it by.
pub(crate) fn apiserver_up() -> Result<Variables> {
    if let Some(given) = given("EBACKUP_TEST_APISERVER_KUBECONFIG") {
        return Ok(given);
    }
    let service = apiserver()?;
    if let Some(variables) = service.running() {
        return Ok(variables);
    }
    let path = match std::env::var_os("KUBEBUILDER_ASSETS") {
        Some(assets) => path_with(PathBuf::from(assets))?,
        None => {
            require("the API server of the tests", FOR_APISERVER)?;
            path_with(kubernetes()?)?
        }
    };
    // What an interrupted run left.
    apiserver_down()?;
    let script = root()?.join("xtask/cluster/apiserver.sh");
    let mut command = Command::new(script);
    command.arg(&service.folder).arg(free_ports()?.to_string()).env("PATH", path);
    service.start(&mut command)
}

/// Stops the API server and forgets what it stored.
pub(crate) fn apiserver_down() -> Result<()> {
    let service = apiserver()?;
    service.stop()?;
    service.forget()
}

fn apiserver() -> Result<Service> {
    Service::new("apiserver", "an API server of Kubernetes", READY)
}

/// Starts the cluster, unless it runs, and returns the variables that tests find it by.
pub(crate) fn up() -> Result<Variables> {
    if let Some(given) = given("EBACKUP_TEST_KUBECONFIG") {
        return Ok(given);
    }
    let service = cluster()?;
    if let Some(variables) = service.running() {
        return Ok(variables);
    }
    require("the cluster of the tests", FOR_APISERVER)?;
    require("the cluster of the tests", FOR_NODE)?;
    let path = path_with(kubernetes()?)?;
    // What an interrupted run left.
    down()?;
    let port = free_ports()?.to_string();
    fs::create_dir_all(&service.folder)?;
    fs::write(service.folder.join("port"), &port)?;
    let script = root()?.join("xtask/cluster/cluster.sh");
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--pid", "--fork", "--mount-proc", "--kill-child"])
        .arg(script)
        .arg(&service.folder)
        .arg(&port)
        .env("PATH", path);
    service.start(&mut command).inspect_err(|_| {
        // The logs stay for whoever looks; the machine is cleaned.
        if let Err(error) = clean(&service, &port) {
            crate::say(&format!("xtask: {error:#}"));
        }
    })
}

/// Tries out all of a cluster that tests rely on; it stays up.
pub(crate) fn smoke(log: &Log) -> Result<()> {
    let mut smoke = Command::new(root()?.join("xtask/cluster/smoke.sh"));
    log.run(smoke.envs(up()?)).context("the cluster does not do what tests rely on")
}

/// Stops the cluster, forgets what it stored, and removes all that it did to the machine.
pub(crate) fn down() -> Result<()> {
    let service = cluster()?;
    service.stop()?;
    if let Ok(port) = fs::read_to_string(service.folder.join("port")) {
        clean(&service, &port)?;
    }
    service.forget()
}

fn clean(service: &Service, port: &str) -> Result<()> {
    let status = Command::new(root()?.join("xtask/cluster/cluster-clean.sh"))
        .arg(&service.folder)
        .arg(port)
        .status()
        .context("cannot run cluster-clean.sh")?;
    if !status.success() {
        bail!("cannot clean the machine after the cluster of port {port}: {status}");
    }
    Ok(())
}

fn cluster() -> Result<Service> {
    Service::new("cluster", "a Kubernetes cluster of one node", READY)
}

/// A server somebody else provides.
fn given(variable: &str) -> Option<Variables> {
    let kubeconfig = std::env::var(variable).ok()?;
    Some(vec![("KUBECONFIG".to_owned(), kubeconfig.clone()), (variable.to_owned(), kubeconfig)])
}

/// The folder of Kubernetes' programs, built if this is the first time.
pub(crate) fn kubernetes() -> Result<PathBuf> {
    let folder = cache()?.join("kubernetes-1.20.2");
    if KUBERNETES.iter().all(|program| folder.join(program).exists()) {
        return Ok(folder);
    }
    require("building Kubernetes for the tests", FOR_BUILD)?;
    crate::say("== building Kubernetes, once, in about five minutes");
    let log = folder.join("log");
    fs::create_dir_all(&folder)?;
    let file = fs::File::create(&log)?;
    let status = Command::new(root()?.join("xtask/cluster/build-kubernetes.sh"))
        .arg(&folder)
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .context("cannot run build-kubernetes.sh")?;
    if !status.success() {
        bail!("building Kubernetes: {status}; see {}", log.display());
    }
    Ok(folder)
}
