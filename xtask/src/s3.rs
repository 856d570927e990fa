//! The S3 server of the tests: starts it, tells how to reach it, and stops it.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Port of the plain endpoint; the next ones are taken too.
const PORT: u16 = 18_096;

/// How long the server may take until it answers.
const READY: Duration = Duration::from_secs(120);

/// Programs it consists of, and the packages they come from.
const PROGRAMS: [(&str, &str); 5] = [
    ("radosgw", "radosgw"),
    ("ceph-mon", "ceph-mon"),
    ("ceph-osd", "ceph-osd"),
    ("ceph", "ceph-common"),
    ("openssl", "openssl"),
];

fn root() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    Ok(root.context("xtask lies in the workspace")?.to_owned())
}

fn folder() -> Result<PathBuf> {
    Ok(root()?.join("target/s3"))
}

/// Starts the server, unless it runs, and returns the variables that tests find it by.
pub(crate) fn up() -> Result<Vec<(String, String)>> {
    let missing: Vec<_> =
        PROGRAMS.iter().filter(|(program, _)| !is_installed(program)).map(|(_, p)| *p).collect();
    if !missing.is_empty() {
        bail!(
            "the tests need an S3 server: install it with 'apt-get install --no-install-recommends \
             {}', as ./test.sh does for root",
            missing.join(" ")
        );
    }
    let folder = folder()?;
    let (env, pid) = (folder.join("env"), folder.join("pid"));
    if let Ok(variables) = read(&env)
        && is_running(&pid)
    {
        return Ok(variables);
    }
    // What an interrupted run left.
    down()?;
    fs::create_dir_all(&folder)?;
    crate::say("== S3 server: starting Ceph's object gateway");
    let log = fs::File::create(folder.join("log"))?;
    let server = Command::new(root()?.join("chunkstore/objects/tests/radosgw.sh"))
        .arg(&folder)
        .arg(PORT.to_string())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // A group of its own, so that all of it can be stopped.
        .process_group(0)
        .spawn()
        .context("cannot run radosgw.sh")?;
    fs::write(&pid, server.id().to_string())?;
    let begun = Instant::now();
    loop {
        if let Ok(variables) = read(&env) {
            return Ok(variables);
        }
        if begun.elapsed() > READY || !is_running(&pid) {
            let log = fs::read_to_string(folder.join("log")).unwrap_or_default();
            down()?;
            bail!("the S3 server does not start; see {}/run: {log}", folder.display());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Stops the server and forgets what it stored.
pub(crate) fn down() -> Result<()> {
    let folder = folder()?;
    if let Ok(pid) = fs::read_to_string(folder.join("pid")) {
        let group = format!("-{}", pid.trim());
        let kill = |signal| Command::new("kill").args([signal, "--", &group]).output();
        kill("-KILL").context("cannot run 'kill'")?;
        // Its ports are free only when all of it is gone.
        for _ in 0..100 {
            if !kill("-0")?.status.success() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

fn read(env: &Path) -> Result<Vec<(String, String)>> {
    let text = fs::read_to_string(env)?;
    let lines = text.lines().filter_map(|line| line.split_once('='));
    Ok(lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
}

fn is_running(pid: &Path) -> bool {
    let pid = fs::read_to_string(pid).unwrap_or_default();
    !pid.is_empty() && Path::new("/proc").join(pid.trim()).exists()
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).exists())
}
