//! `cargo xtask test`: everything that decides whether a change is good, in the order in which it
//! fails fastest. `cargo xtask s3|garage|apiserver|cluster up` and `down`: the servers that some tests need,
//! for running them one by one. `cargo xtask image`: the container image.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

mod cluster;
mod garage;
mod image;
mod s3;
mod service;

/// One step: what it is, and the command.
type Step = (&'static str, &'static [&'static str]);

/// Tests once more, on stores that are as OBS may be.
const WITHOUT_CONDITIONS: &str = "tests where stores ignore that objects be created only if absent";

const TEST: &[Step] = &[
    ("format", &["cargo", "fmt", "--all", "--check"]),
    (
        "lints",
        &[
            "cargo",
            "clippy",
            "--workspace",
            "--all-targets",
            "--all-features",
            "--locked",
            "--",
            "-D",
            "warnings",
        ],
    ),
    (
        "build",
        &[
            "cargo",
            "test",
            "--workspace",
            "--all-features",
            "--locked",
            "--lib",
            "--bins",
            "--tests",
            "--no-run",
        ],
    ),
    (
        "tests",
        &[
            "cargo",
            "test",
            "--workspace",
            "--all-features",
            "--locked",
            "--lib",
            "--bins",
            "--tests",
        ],
    ),
    // But for what only waits, or is the same in both ways.
    (
        WITHOUT_CONDITIONS,
        &[
            "cargo",
            "test",
            "--workspace",
            "--all-features",
            "--locked",
            "--test=gc",
            "--test=check",
            "--test=fetch",
            "--test=snapshots",
            "--test=copy",
            "--test=damage",
            "--test=restore",
            "--test=s3",
            "--test=s3_outages",
            "--test=agent",
            "--",
            "--skip=away_for_longer",
            "--skip=loses_the_store_for_longer",
            "--skip=outlives_the_death_of_the_server",
            "--skip=where_it_is_ignored",
        ],
    ),
    (
        "examples in documentation",
        &["cargo", "test", "--workspace", "--all-features", "--locked", "--doc"],
    ),
    ("documentation", &["cargo", "doc", "--workspace", "--no-deps", "--locked"]),
    ("fuzz targets", &["cargo", "check", "--locked", "--manifest-path", "fuzz/Cargo.toml"]),
    (
        "dependencies",
        &[
            "cargo",
            "deny",
            "--all-features",
            "check",
            "--hide-inclusion-graph",
            "bans",
            "licenses",
            "sources",
        ],
    ),
];

fn main() -> ExitCode {
    let task = std::env::args().nth(1);
    let what = std::env::args().nth(2);
    let result = match (task.as_deref(), what.as_deref()) {
        (Some("test"), None) => run(TEST),
        (Some("s3"), Some("up")) => s3::up().map(|_| ()),
        (Some("s3"), Some("down")) => s3::down(),
        (Some("garage"), Some("build")) => garage::build(),
        (Some("garage"), Some("up")) => garage::up().map(|_| ()),
        (Some("garage"), Some("down")) => garage::down(),
        (Some("apiserver"), Some("up")) => cluster::apiserver_up().map(|_| ()),
        (Some("apiserver"), Some("down")) => cluster::apiserver_down(),
        (Some("cluster"), Some("up")) => cluster::up().map(|_| ()),
        (Some("cluster"), Some("down")) => cluster::down(),
        (Some("cluster"), Some("smoke")) => cluster::smoke(),
        (Some("image"), built) => image::build(built.map(Path::new)),
        _ => Err(anyhow::anyhow!(
            "usage: cargo xtask test | s3|garage|apiserver|cluster up|down | garage build | cluster smoke | \
             image [FOLDER]"
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("xtask: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(steps: &[Step]) -> Result<()> {
    let root =
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in the workspace")?;
    check_layers(root)?;
    let mut servers = None;
    for (name, command) in steps {
        if *name == "tests" {
            // What runs in the cluster is what was just built.
            image::build(Some(&root.join("target/debug")))?;
            servers = Some(Servers::start()?);
        }
        say(&format!("== {name}: {}", command.join(" ")));
        let mut child = Command::new(command[0]);
        child.args(&command[1..]).current_dir(root);
        if let Some(Servers(variables)) = &servers {
            child.envs(variables.iter().cloned());
        }
        match *name {
            WITHOUT_CONDITIONS => drop(child.env("EBACKUP_TEST_CONDITIONS", "ignored")),
            "documentation" => drop(child.env("RUSTDOCFLAGS", "-D warnings")),
            _ => {}
        }
        let status = child.status().with_context(|| format!("cannot run '{}'", command[0]))?;
        if !status.success() {
            bail!("{name}: {status}");
        }
    }
    Ok(())
}

/// What tests find the servers by; they are stopped whatever becomes of the tests.
struct Servers(service::Variables);

impl Servers {
    fn start() -> Result<Self> {
        let mut servers = Self(Vec::new());
        servers.0.extend(s3::up()?);
        match garage::up()? {
            Some(variables) => servers.0.extend(variables),
            None => say("== NOT TESTED: Garage, which was not built ('cargo xtask garage build')"),
        }
        servers.0.extend(cluster::apiserver_up()?);
        servers.0.extend(cluster::up()?);
        say("== what tests rely on in the cluster");
        cluster::smoke()?;
        Ok(servers)
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for down in [cluster::down, cluster::apiserver_down, garage::down, s3::down] {
            if let Err(error) = down() {
                say(&format!("xtask: {error:#}"));
            }
        }
    }
}

/// The chunk store knows no command line, no Kubernetes and no wire protocol, and its pure parts know
/// neither store nor clock.
fn check_layers(root: &Path) -> Result<()> {
    say("== layers");
    let output = Command::new("cargo")
        .args(["tree", "-p", "chunkstore", "-e", "normal", "--prefix", "none", "--locked"])
        .current_dir(root)
        .output()
        .context("cannot run 'cargo tree'")?;
    let tree = String::from_utf8(output.stdout)?;
    for forbidden in ["clap", "kube", "tonic", "prost", "tokio"] {
        if tree.lines().any(|line| line.split(' ').next() == Some(forbidden)) {
            bail!("chunkstore must not depend on {forbidden}");
        }
    }
    for pure in [
        "chunker.rs",
        "wire.rs",
        "retention.rs",
        "codec/seal.rs",
        "codec/compress.rs",
        "gc/plan.rs",
    ] {
        let path = root.join("chunkstore/src").join(pure);
        let text = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        for forbidden in ["ObjectStore", "Timestamp::now", "SystemTime::now", "Instant::now"] {
            if text.contains(forbidden) {
                bail!("{} must not use {forbidden}", path.display());
            }
        }
    }
    Ok(())
}

#[expect(clippy::print_stderr, reason = "this is what the program is for")]
fn say(text: &str) {
    eprintln!("{text}");
}
