//! A server that tests need, run by a script in the foreground of a process group of its own: starts
//! it, tells how to reach it, and stops it. Its folder `target/NAME` keeps everything: what the server
//! stores, `log`, `pid`, and `env`, which the script writes when the server answers.

use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Names and values by which tests find a server.
pub(crate) type Variables = Vec<(String, String)>;

/// Servers make sockets some folders below theirs, and the path of one holds 107 bytes. A checkout whose path is longer
/// has the folder elsewhere.
const FOLDER_BYTES_MAX: usize = 70;

/// Where servers get their ports: above those that tests choose, below those that the system gives to clients.
const PORTS: std::ops::Range<u16> = 19_000..23_000;
const BLOCK: u16 = 20;

/// How long a server may take until it answers: its programs start beside compilers and each other.
pub(crate) const READY: Duration = Duration::from_secs(300);

/// How long all processes of a killed server may take to go.
const GONE: Duration = Duration::from_secs(30);

pub(crate) struct Service {
    /// For people.
    pub(crate) title: &'static str,
    pub(crate) folder: PathBuf,
    /// How long it may take until it answers.
    pub(crate) ready: Duration,
}

/// What the process is whose number the folder has.
enum Leader {
    Runs,
    Gone,
    /// One that came to the number after a reboot: it does not name the folder in its arguments.
    Another,
}

impl Service {
    pub(crate) fn new(name: &str, title: &'static str, ready: Duration) -> Result<Self> {
        let mut folder = root()?.join("target").join(name);
        if folder.as_os_str().len() > FOLDER_BYTES_MAX {
            let mut hasher = DefaultHasher::new();
            folder.hash(&mut hasher);
            let short = format!("ebackup-test-{:016x}", hasher.finish());
            folder = std::env::temp_dir().join(short);
        }
        Ok(Self { title, folder, ready })
    }

    /// How to reach the server, if it runs and is ready.
    pub(crate) fn running(&self) -> Option<Variables> {
        match self.leader()? {
            (_, Leader::Runs) => self.read_env().ok(),
            _ => None,
        }
    }

    /// Runs the script and waits until the server answers. What an earlier one left must be gone.
    pub(crate) fn start(&self, command: &mut Command) -> Result<Variables> {
        fs::create_dir_all(&self.folder)?;
        crate::say(&format!("== starting {}", self.title));
        let log = fs::File::create(self.folder.join("log"))?;
        let mut server = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // A group of its own, so that all of it can be stopped.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {}", command.get_program().display()))?;
        fs::write(self.folder.join("pid"), server.id().to_string())?;
        let begun = Instant::now();
        loop {
            if let Ok(variables) = self.read_env() {
                return Ok(variables);
            }
            if begun.elapsed() > self.ready || server.try_wait()?.is_some() {
                let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
                // The leader first, and reaped, for a zombie would count as alive.
                server.kill()?;
                server.wait()?;
                kill_group(server.id())?;
                bail!("{} does not start; see {}: {log}", self.title, self.folder.display());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Stops all of the server, and returns when it is gone.
    pub(crate) fn stop(&self) -> Result<()> {
        match self.leader() {
            // Also when the leader is gone: others of its group may live.
            Some((pid, Leader::Runs | Leader::Gone)) => kill_group(pid),
            Some((_, Leader::Another)) | None => Ok(()),
        }
    }

    /// Forgets what a stopped server stored.
    pub(crate) fn forget(&self) -> Result<()> {
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", self.folder.display()))
            }
            _ => Ok(()),
        }
    }

    /// The process that leads, or led, the server's group.
    fn leader(&self) -> Option<(u32, Leader)> {
        let pid = fs::read_to_string(self.folder.join("pid")).ok()?.trim().parse().ok()?;
        // A zombie has no arguments.
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let folder = self.folder.as_os_str().as_encoded_bytes();
        let is_named = arguments.split(|byte| *byte == 0).any(|argument| argument == folder);
        let leader = match (arguments.is_empty(), is_named) {
            (true, _) => Leader::Gone,
            (false, true) => Leader::Runs,
            (false, false) => Leader::Another,
        };
        Some((pid, leader))
    }

    fn read_env(&self) -> Result<Variables> {
        let text = fs::read_to_string(self.folder.join("env"))?;
        let lines = text.lines().filter_map(|line| line.split_once('='));
        Ok(lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }
}

fn kill_group(leader: u32) -> Result<()> {
    let group = format!("-{leader}");
    let kill = |signal| Command::new("kill").args([signal, "--", &group]).output();
    kill("-KILL").context("cannot run 'kill'")?;
    // Its ports are free only when all of it is gone.
    let begun = Instant::now();
    while begun.elapsed() < GONE && kill("-0")?.status.success() {
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Fails with the packages to install when one of the programs, or files, is missing. `programs` are
/// pairs of a program and the package it comes from.
pub(crate) fn require(purpose: &str, programs: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> =
        programs.iter().filter(|(program, _)| !is_installed(program)).map(|(_, p)| *p).collect();
    if !missing.is_empty() {
        bail!(
            "{purpose} needs packages: install them with 'apt-get install \
             --no-install-recommends {}', as ./test.sh does for root",
            missing.join(" ")
        );
    }
    Ok(())
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // An absolute path replaces the folder it is joined to.
    std::env::split_paths(&path).any(|folder| folder.join(program).exists())
}

/// The folder of the workspace.
pub(crate) fn root() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    Ok(root.context("xtask lies in the workspace")?.to_owned())
}

/// Where what takes long to build is kept, for all checkouts.
pub(crate) fn cache() -> Result<PathBuf> {
    let cache = match std::env::var_os("XDG_CACHE_HOME") {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(cache.join("ebackup-test"))
}

/// The search path with a folder before all others.
pub(crate) fn path_with(folder: PathBuf) -> Result<OsString> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(folder).chain(std::env::split_paths(&path));
    std::env::join_paths(folders).context("a folder's name has a colon")
}

/// The first port of a free block that this program has not given yet.
pub(crate) fn free_ports() -> Result<u16> {
    static GIVEN: Mutex<Vec<u16>> = Mutex::new(Vec::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let is_free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
    let block = blocks()?
        .find(|first| !given.contains(first) && (*first..first + BLOCK).all(is_free))
        .with_context(|| format!("no {BLOCK} free ports side by side in {PORTS:?}"))?;
    given.push(block);
    Ok(block)
}

/// All blocks. Checkouts begin at different ones, for another may be about to use what is still free.
fn blocks() -> Result<impl Iterator<Item = u16>> {
    let mut hasher = DefaultHasher::new();
    root()?.hash(&mut hasher);
    let count = (PORTS.end - PORTS.start) / BLOCK;
    let first = (hasher.finish() % u64::from(count)) as u16;
    Ok((0..count).map(move |n| PORTS.start + (first + n) % count * BLOCK))
}
