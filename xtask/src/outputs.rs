//! Where the test run keeps what it compiles: in the cache of the tests, for all checkouts, so that a fresh one finds
//! all crates but our own compiled. Only finished programs go to the checkout's `target`.
//!
//! Cargo takes our own crates of two checkouts for the same, and looks at times alone: it would run what was built of
//! another's files. So each checkout compiles them by a program of its own, by whose path Cargo tells them apart.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::say;
use crate::service::{cache, root};

/// Each checkout leaves its crates and tests, some 3 GiB; all other crates together are 2 GiB.
const BYTES_MAX: u64 = 24 << 30;

/// Variables of who has chosen where outputs go.
const CHOSEN: [&str; 2] = ["CARGO_TARGET_DIR", "CARGO_BUILD_BUILD_DIR"];

/// Compiles, and says what Clippy says.
const COMPILER: &str = "clippy-driver";

/// Cargo in the workspace, for a subcommand that compiles nothing.
pub(crate) fn cargo() -> Result<Command> {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(root()?);
    Ok(cargo)
}

/// Cargo on all crates of the workspace with all features. It fails with what Clippy has to say of our own: they are
/// compiled once for the lints and for the tests.
pub(crate) fn cargo_with_lints(subcommand: &str) -> Result<Command> {
    let mut cargo = cargo_on_all(subcommand)?;
    // As 'cargo clippy -- -D warnings' passes them on.
    cargo
        .arg("--all-features")
        .env("CLIPPY_ARGS", "-D__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__");
    Ok(cargo)
}

/// Cargo on all crates of the workspace.
pub(crate) fn cargo_on_all(subcommand: &str) -> Result<Command> {
    let mut cargo = cargo()?;
    cargo.args([subcommand, "--workspace", "--locked"]);
    // What it saves when a file is edited, it costs in a fresh checkout, and it fills the disk.
    cargo.env("CARGO_INCREMENTAL", "0");
    cargo.env("RUSTC_WORKSPACE_WRAPPER", compiler(&root()?.join("target"))?);
    if is_ours() {
        cargo.env("CARGO_BUILD_BUILD_DIR", folder()?);
    }
    Ok(cargo)
}

/// Keeps the outputs from being removed as long as the file is there. Removes too many first, unless somebody uses
/// them.
pub(crate) fn hold() -> Result<File> {
    let folder = folder()?;
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let path = folder.with_extension("lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    if is_ours() && bytes(&folder)? > BYTES_MAX && file.try_lock().is_ok() {
        say(&format!("== removing what checkouts left in {}", folder.display()));
        trim(&folder, BYTES_MAX)?;
        file.unlock()?;
    }
    file.lock_shared().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

/// Removes what was built of our own crates, by all checkouts; then all, if what is left is more than half of `most`:
/// old versions of other crates.
fn trim(folder: &Path, most: u64) -> Result<()> {
    let mut clean = cargo()?;
    clean.args(["clean", "--quiet", "--workspace"]);
    // Both, for the programs in this checkout's `target` stay.
    let status = clean.envs(CHOSEN.map(|name| (name, folder))).status();
    let status = status.context("cannot run 'cargo clean'")?;
    if !status.success() {
        bail!("cargo clean: {status}");
    }
    if bytes(folder)? > most / 2 {
        fs::remove_dir_all(folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}

/// The checkout's own compiler, made if this is its first run. Its name is fresh, because a new checkout may lie where
/// an old one lay; it goes with the checkout's `target`.
fn compiler(target: &Path) -> Result<PathBuf> {
    const BEGINNING: &str = "compiler-";
    fs::create_dir_all(target).with_context(|| format!("cannot make {}", target.display()))?;
    let entries =
        fs::read_dir(target).with_context(|| format!("cannot read {}", target.display()))?;
    for entry in entries {
        let path = entry?.path();
        let is_one =
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(BEGINNING));
        if is_one && path.join(COMPILER).exists() {
            return Ok(path.join(COMPILER));
        }
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(COMPILER));
    let found = found.into_iter().find(|program| program.is_file());
    let found = found.with_context(|| {
        format!("there is no {COMPILER} in PATH: install it by 'rustup component add clippy'")
    })?;
    let random = fs::read_to_string("/proc/sys/kernel/random/uuid").context("no random number")?;
    let path = target.join(format!("{BEGINNING}{}", random.trim()));
    let part = target.join(format!("new-{BEGINNING}{}", random.trim()));
    // No script: a shell loses variables that it could not name, as those by which tests find programs.
    let made = fs::create_dir(&part)
        .and_then(|()| symlink(&found, part.join(COMPILER)))
        .and_then(|()| fs::rename(&part, &path));
    made.with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path.join(COMPILER))
}

fn is_ours() -> bool {
    CHOSEN.iter().all(|name| std::env::var_os(name).is_none())
}

fn folder() -> Result<PathBuf> {
    Ok(cache()?.join("build"))
}

/// What a folder takes. What vanishes meanwhile counts nothing.
fn bytes(folder: &Path) -> Result<u64> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        other => other.with_context(|| format!("cannot read {}", folder.display()))?,
    };
    let mut sum = 0;
    for entry in entries {
        let entry = entry?;
        sum += match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => bytes(&entry.path())?,
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        };
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    /// A workspace of one crate, whose test says `content`.
    fn checkout(folder: &Path, content: &str) -> Result<()> {
        fs::create_dir_all(folder.join("src"))?;
        fs::create_dir_all(folder.join("tests"))?;
        let manifest =
            "[package]\nname = \"one\"\nversion = \"0.1.0\"\nedition = \"2024\"\n[workspace]\n";
        fs::write(folder.join("Cargo.toml"), manifest)?;
        fs::write(folder.join("src/main.rs"), "fn main() {}\n")?;
        let test = "#[test]\nfn says() { assert!(false, \"{} of {}\", CONTENT, env!(\"CARGO_BIN_EXE_one\")) }\n";
        fs::write(
            folder.join("tests/says.rs"),
            format!("const CONTENT: &str = \"{content}\";\n{test}"),
        )?;
        // As when an archive is unpacked: all files are older than what was built of others.
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        for file in ["Cargo.toml", "src/main.rs", "tests/says.rs"] {
            File::options().append(true).open(folder.join(file))?.set_modified(old)?;
        }
        Ok(())
    }

    /// What its test says, built into a folder for all.
    fn says(folder: &Path, build: &Path) -> Result<String> {
        let output = Command::new("cargo")
            .args(["test", "--offline", "--test", "says"])
            .current_dir(folder)
            .env("RUSTC_WORKSPACE_WRAPPER", compiler(&folder.join("target"))?)
            .env("CLIPPY_ARGS", "-A__CLIPPY_HACKERY__warnings__CLIPPY_HACKERY__")
            .env("CARGO_BUILD_BUILD_DIR", build)
            .env_remove("CARGO_TARGET_DIR")
            .output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    #[test]
    fn checkouts_with_one_folder_of_outputs_each_test_their_own_files() -> Result<()> {
        let all = tempfile::tempdir()?;
        let build = all.path().join("build");
        for (folder, content) in
            [("a", "the first"), ("b", "the second"), ("a", "a third where one was")]
        {
            let folder = all.path().join(folder);
            if folder.exists() {
                fs::remove_dir_all(&folder)?;
            }
            checkout(&folder, content)?;
            let said = says(&folder, &build)?;
            let program = folder.join("target/debug/one");
            assert!(said.contains(&format!("{content} of {}", program.display())), "{said}");
        }
        Ok(())
    }

    #[test]
    fn what_grew_too_large_loses_our_crates_first() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let deps = folder.path().join("debug/deps");
        fs::create_dir_all(&deps)?;
        // As Cargo marks its folders.
        fs::write(
            folder.path().join("CACHEDIR.TAG"),
            "Signature: 8a477f597d28d172789f06886806bc55",
        )?;
        // Of two checkouts.
        let ours =
            ["e2e-0123456789abcdef", "e2e-fedcba9876543210", "libmover-0123456789abcdef.rlib"];
        let others = deps.join("libserde-0123456789abcdef.rlib");
        for path in ours.iter().map(|name| deps.join(name)).chain([others.clone()]) {
            fs::write(path, [0; 1000])?;
        }
        trim(folder.path(), 100_000)?;
        assert!(ours.iter().all(|name| !deps.join(name).exists()), "{:?}", fs::read_dir(&deps)?);
        assert!(others.exists());
        trim(folder.path(), 1500)?;
        assert!(!others.exists());
        Ok(())
    }

    #[test]
    fn a_checkout_keeps_its_compiler() -> Result<()> {
        let target = tempfile::tempdir()?;
        assert_eq!(compiler(target.path())?, compiler(target.path())?);
        Ok(())
    }
}
