//! `cargo xtask image`: the container image of the product, `ebackup:dev`, without Docker, at
//! `target/image/ebackup.tar`; its files lie beside it in `root`. It holds the programs, the libraries
//! they are linked to, what the C library needs to look up names, certificates, and nothing else: no
//! shell. `cargo xtask image target/debug` takes programs that were built already, and `cargo xtask image target/debug
//! FOLDER` puts it elsewhere.
//!
//! `deploy/Dockerfile` makes the same for those who have Docker.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::service::root;

/// The programs of the product, and the crates they are built from.
const PROGRAMS: &[(&str, &str)] = &[("ebackup", "mover"), ("ebackup-controller", "controller")];

/// Libraries that the C library loads by itself to look up names; they lie beside it.
const LOOKUP: [&str; 3] = ["libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2"];

const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Text files of the image. The user is the one that images without a shell commonly have; agents run
/// as root, which their DaemonSet says.
const FILES: &[(&str, &str)] = &[
    ("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
    (
        "etc/passwd",
        "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/tmp:/sbin/nologin\n",
    ),
    ("etc/group", "root:x:0:\nnonroot:x:65532:\n"),
];

const CONFIG: &str = r#"{"User":"65532:65532","WorkingDir":"/","Env":["PATH=/usr/bin"],"Entrypoint":["/usr/bin/ebackup"]}"#;

/// Makes the image of the programs in the folder `built`, or else of a release build; in the folder `out`, or else in
/// `target/image`.
pub(crate) fn build(built: Option<&Path>, out: Option<&Path>) -> Result<()> {
    let root = root()?;
    let built = match built {
        Some(built) => built.to_owned(),
        None => {
            let mut cargo = Command::new("cargo");
            cargo.args(["build", "--release", "--locked", "--bins"]).current_dir(&root);
            run(cargo.args(PROGRAMS.iter().flat_map(|(_, package)| ["-p", package])))?;
            root.join("target/release")
        }
    };

    let folder = out.map_or_else(|| root.join("target/image"), Path::to_owned);
    let stage = folder.join("root");
    if stage.exists() {
        fs::remove_dir_all(&stage).with_context(|| format!("cannot remove {}", stage.display()))?;
    }
    let mut libraries = BTreeSet::new();
    for (program, _) in PROGRAMS {
        copy(&built.join(program), &stage.join("usr/bin").join(program), 0o755)?;
        libraries.extend(linked(&built.join(program))?);
    }
    let libc = libraries
        .iter()
        .find(|path| path.file_name().is_some_and(|name| name == "libc.so.6"))
        .context("the programs are not linked to the GNU C library")?;
    let beside = libc.parent().context("libc.so.6 lies in a folder")?.to_owned();
    libraries.extend(LOOKUP.map(|name| beside.join(name)));
    for library in &libraries {
        copy(library, &stage.join(library.strip_prefix("/")?), 0o755)?;
    }
    copy(Path::new(CERTIFICATES), &stage.join(&CERTIFICATES[1..]), 0o644)
        .context("the package ca-certificates is missing")?;
    for (path, text) in FILES {
        fs::write(stage.join(path), text)?;
        fs::set_permissions(stage.join(path), fs::Permissions::from_mode(0o644))?;
    }
    fs::create_dir(stage.join("tmp"))?;
    fs::set_permissions(stage.join("tmp"), fs::Permissions::from_mode(0o1777))?;

    let image = folder.join("ebackup.tar");
    let script = root.join("xtask/image/pack.sh");
    run(Command::new(script).arg(&stage).arg("ebackup:dev").arg(CONFIG).arg(&image))?;
    let size = fs::metadata(&image)?.len() >> 20;
    crate::say(&format!("{}: image ebackup:dev, {size} MiB", image.display()));
    Ok(())
}

/// The libraries a program loads, by absolute paths.
fn linked(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run 'ldd'")?;
    if !output.status.success() {
        bail!("ldd {}: {}", program.display(), String::from_utf8_lossy(&output.stderr));
    }
    // Lines are "NAME => PATH (ADDRESS)", or "PATH (ADDRESS)" for the loader.
    let text = String::from_utf8(output.stdout)?;
    let paths = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(PathBuf::from).collect())
}

fn copy(from: &Path, to: &Path, mode: u32) -> Result<()> {
    fs::create_dir_all(to.parent().context("files lie in folders")?)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_owned();
    let status = command.status().with_context(|| format!("cannot run '{}'", program.display()))?;
    if !status.success() {
        bail!("{}: {status}", program.display());
    }
    Ok(())
}
