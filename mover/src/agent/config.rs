//! What the agent was told, validated before anything is done.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::priority::IoPriority;
use crate::backup::{MEMORY_BYTES_MIN, Resources};
use crate::repository::IndexCache;

/// Memory of a job where neither the command line nor the control group says anything.
const JOB_MEMORY_DEFAULT: u64 = 256 << 20;

/// What was typed.
#[derive(Debug, Clone)]
pub struct Given {
    /// Where the controller is: `host:port`.
    pub controller: String,
    /// Name in the controller's certificate; `None`: the host it is dialled by.
    pub server_name: Option<String>,
    /// Name of this node.
    pub node: String,
    /// UID of the agent's own pod.
    pub pod_uid: String,
    /// The kubelet's folder, as seen by this process.
    pub kubelet_root: PathBuf,
    /// File with the token that proves who we are.
    pub token_file: PathBuf,
    /// File with the certificates (PEM) of those who may sign the controller's.
    pub ca_file: PathBuf,
    /// Memory for all jobs together, in bytes; `None`: what the control group gives.
    pub memory_bytes: Option<u64>,
    /// Jobs at once, at most.
    pub jobs: usize,
    /// Bytes a second that a job sends to its store, at most.
    pub limit_upload: Option<u64>,
    /// Bytes a second that a job receives from its store, at most.
    pub limit_download: Option<u64>,
    /// How far jobs stand back for other processes: from 0 to 19.
    pub nice: i32,
    /// The same for disks; `None`: by `nice`.
    pub io_priority: Option<IoPriority>,
    /// Where metrics and health are served.
    pub http: SocketAddr,
    /// Where copies of index segments are kept.
    pub cache: IndexCache,
    /// Folder for temporary files without a name.
    pub scratch: PathBuf,
    /// Host names of stores with an address of their own.
    pub resolve: Vec<(String, IpAddr)>,
}

/// What the agent keeps to.
#[derive(Debug, Clone)]
pub struct Config {
    pub(super) given: Given,
    /// Name in the controller's certificate.
    pub(super) server_name: String,
    /// Memory for everything.
    pub(super) memory_bytes: u64,
    /// Jobs at once.
    pub(super) capacity: usize,
    /// What each of them gets.
    pub(super) each: Resources,
}

impl Config {
    /// Validates what was typed, on a machine that gives the process `limit_bytes` of memory (`None`: no
    /// limit) and `cpus` processors.
    ///
    /// # Errors
    /// With what to change.
    pub fn new(given: Given, limit_bytes: Option<u64>, cpus: usize) -> Result<Self> {
        for (name, flag) in [(&given.node, "--node"), (&given.pod_uid, "--pod-uid")] {
            let is_char = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
            if !name.bytes().all(is_char) || matches!(&**name, "" | "." | "..") {
                bail!("'{name}' is no name of Kubernetes: give the right one with {flag}");
            }
        }
        let host = given.controller.rsplit_once(':');
        let host = host.filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        let Some((host, _)) = host else {
            bail!("'{}' is not HOST:PORT: give the controller so", given.controller);
        };
        let host = host.trim_matches(['[', ']']).to_owned();
        let server_name = given.server_name.clone().unwrap_or(host);
        if !(0..=19).contains(&given.nice) {
            bail!("{} is no priority: --nice goes from 0 to 19", given.nice);
        }
        let jobs = given.jobs.max(1);
        let limit = limit_bytes.map(|limit| limit / 4 * 3);
        let default = || limit.unwrap_or(jobs as u64 * JOB_MEMORY_DEFAULT);
        let memory_bytes = given.memory_bytes.unwrap_or_else(default);
        if memory_bytes < MEMORY_BYTES_MIN {
            bail!(
                "{} MiB of memory are too few, 96 MiB are the least: raise the memory limit of the \
                 container to 128 MiB or more, or force it with --memory",
                memory_bytes >> 20
            );
        }
        let capacity = jobs.min(Resources::jobs_in(memory_bytes));
        let each = Resources::of_each(memory_bytes, cpus, capacity);
        Ok(Self { given, server_name, memory_bytes, capacity, each })
    }

    /// The folder of the volumes of all pods on the node.
    pub(super) fn pods(&self) -> PathBuf {
        self.given.kubelet_root.join("pods")
    }

    /// Makes sure that the kubelet's folder is the one of this node: this process's own pod is in it.
    ///
    /// # Errors
    /// When it is not, with what to change.
    pub(super) fn check_kubelet_root(&self) -> Result<()> {
        let (root, pods) = (self.given.kubelet_root.display(), self.pods());
        if !pods.is_dir() {
            bail!(
                "'{root}' is not the kubelet's folder, or is not mounted: it has no folder 'pods'. \
                 Mount the node's (/var/lib/kubelet, unless the kubelet's --root-dir says otherwise) \
                 into this container with mountPropagation HostToContainer, and say where with \
                 --kubelet-root"
            );
        }
        if !pods.join(&self.given.pod_uid).is_dir() {
            bail!(
                "'{}' has no folder '{}' for the pod of this agent, so it is not the one that the \
                 kubelet of this node uses: mount the right one (see the kubelet's --root-dir), and \
                 check --kubelet-root and --pod-uid",
                pods.display(),
                self.given.pod_uid
            );
        }
        Ok(())
    }

    /// Makes the folders it needs.
    ///
    /// # Errors
    /// When the one for temporary files cannot be used. The cache may be missing.
    pub(super) fn make_folders(&self) -> Result<()> {
        let Given { scratch, cache, .. } = &self.given;
        let writable = std::fs::create_dir_all(scratch).and_then(|()| tempfile_in(scratch));
        writable.with_context(|| {
            let scratch = scratch.display();
            format!("cannot make temporary files in '{scratch}': give another --scratch")
        })?;
        if let Err(error) = std::fs::create_dir_all(&cache.dir) {
            let dir = cache.dir.display();
            tracing::warn!("the index is not kept on this node, '{dir}' cannot be made: {error}");
        }
        Ok(())
    }
}

/// Tries out whether unnamed files can be made.
fn tempfile_in(folder: &Path) -> std::io::Result<()> {
    let folder = crate::fs::Dir::open_root(folder)?;
    let name = format!(".ebackup-{}", std::process::id());
    drop(folder.create_file(name.as_bytes())?);
    folder.unlink(name.as_bytes())
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { given, each, .. } = self;
        let rate = |limit: Option<u64>| match limit {
            Some(limit) => format!("{} KiB/s", limit >> 10),
            None => "no limit".to_owned(),
        };
        write!(f, "node {}, controller {} ", given.node, given.controller)?;
        write!(f, "(certificate for {}), ", self.server_name)?;
        write!(f, "volumes in {}, ", self.pods().display())?;
        write!(f, "{} jobs at once in {} MiB, ", self.capacity, self.memory_bytes >> 20)?;
        write!(f, "each with {} threads, ", each.workers)?;
        write!(f, "packs of {} MiB, ", each.pack_target_bytes >> 20)?;
        write!(f, "upload {}, ", rate(given.limit_upload))?;
        write!(f, "download {}, ", rate(given.limit_download))?;
        write!(f, "nice {}, ", given.nice)?;
        if let Some(priority) = given.io_priority {
            write!(f, "disk priority {priority}, ")?;
        }
        let cache = &given.cache;
        write!(f, "cache {} ({} MiB), ", cache.dir.display(), cache.max_bytes >> 20)?;
        write!(f, "scratch {}, http {}", given.scratch.display(), given.http)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given() -> Given {
        Given {
            controller: "ebackup-controller.velero.svc:7443".to_owned(),
            server_name: None,
            node: "node-1".to_owned(),
            pod_uid: "3f6e".to_owned(),
            kubelet_root: "/var/lib/kubelet".into(),
            token_file: "/token".into(),
            ca_file: "/ca".into(),
            memory_bytes: None,
            jobs: 4,
            limit_upload: None,
            limit_download: None,
            nice: 10,
            io_priority: None,
            http: ([0, 0, 0, 0], 8085).into(),
            cache: IndexCache { dir: "/cache".into(), max_bytes: 1 << 30 },
            scratch: "/tmp".into(),
            resolve: Vec::new(),
        }
    }

    #[test]
    fn jobs_follow_from_the_memory_that_the_container_is_given() {
        let table =
            [(Some(128), 1, 96), (Some(256), 2, 192), (Some(1024), 4, 768), (None, 4, 1024)];
        for (limit, capacity, memory) in table {
            let config = Config::new(given(), limit.map(|mib: u64| mib << 20), 2).unwrap();
            assert_eq!(config.capacity, capacity, "{limit:?}");
            assert_eq!(config.memory_bytes >> 20, memory, "{limit:?}");
        }
        let forced = Given { memory_bytes: Some(96 << 20), ..given() };
        assert_eq!(Config::new(forced, None, 2).unwrap().capacity, 1);
        let few = Config::new(given(), Some(100 << 20), 2).unwrap_err().to_string();
        assert!(few.contains("75 MiB") && few.contains("128 MiB"), "{few}");
    }

    #[test]
    fn what_cannot_work_is_refused_with_what_to_change() {
        let table = [
            (Given { node: String::new(), ..given() }, "--node"),
            (Given { pod_uid: "..".to_owned(), ..given() }, "--pod-uid"),
            (Given { pod_uid: "a/b".to_owned(), ..given() }, "--pod-uid"),
            (Given { controller: "host".to_owned(), ..given() }, "HOST:PORT"),
            (Given { controller: ":1".to_owned(), ..given() }, "HOST:PORT"),
            (Given { nice: -1, ..given() }, "--nice"),
        ];
        for (given, part) in table {
            let error = Config::new(given, None, 1).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let config = Config::new(given(), None, 1).unwrap();
        assert_eq!(config.server_name, "ebackup-controller.velero.svc");
        assert!(config.to_string().contains("node node-1, controller ebackup-controller"));
    }

    #[test]
    fn a_kubelet_folder_without_the_own_pod_is_refused_with_what_to_mount() {
        let root = tempfile::tempdir().unwrap();
        let given = Given { kubelet_root: root.path().to_owned(), ..given() };
        let config = Config::new(given, None, 1).unwrap();
        let error = || config.check_kubelet_root().unwrap_err().to_string();
        assert!(error().contains("no folder 'pods'") && error().contains("--kubelet-root"));
        std::fs::create_dir(root.path().join("pods")).unwrap();
        assert!(error().contains("'3f6e'") && error().contains("--pod-uid"), "{}", error());
        std::fs::create_dir(root.path().join("pods/3f6e")).unwrap();
        config.check_kubelet_root().unwrap();
    }
}
