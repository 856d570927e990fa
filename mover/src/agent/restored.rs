//! How whoever waits for a restored volume learns that it is whole: a file `.velero/<name>` in it.
//!
//! The agent makes it when everything is restored; the init container `restore-wait` of the pod waits for
//! it in all its volumes, and removes it where it may.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, fchmod, fsync};
use rustix::io::Errno;

use crate::fs::{Dir, Kind, is_plain_name};

/// Folder of the mark. It is not part of the volume's content, and never saved.
pub(super) const FOLDER: &[u8] = b".velero";

/// How often is looked for a mark.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Removes the marks of all restores from `volume`, so that nobody takes it for whole.
///
/// # Errors
/// Those of the file system.
pub(super) fn unmark(volume: &Dir) -> io::Result<()> {
    match volume.remove_tree(FOLDER) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes the mark `name` in `volume`, and removes those of earlier restores.
///
/// # Errors
/// Those of the file system; `InvalidInput` for a name that is none.
pub(super) fn mark(volume: &Dir, name: &str) -> io::Result<()> {
    if !is_plain_name(name.as_bytes()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file name"));
    }
    unmark(volume)?;
    let folder = volume.make_dir(FOLDER)?;
    let file = folder.create_file(name.as_bytes())?;
    // Whoever waits need not be root, and shall be able to remove it.
    fchmod(&file, Mode::from_raw_mode(0o644))?;
    file.sync_all()?;
    fchmod(&folder, Mode::from_raw_mode(0o777))?;
    for folder in [&folder, volume] {
        match fsync(folder) {
            // Some file systems have no such call for folders.
            Err(Errno::INVAL | Errno::NOTSUP | Errno::ROFS) => {}
            synced => synced?,
        }
    }
    Ok(())
}

/// Waits until every folder below `root` has the mark `name`, then removes the marks where it may.
///
/// # Errors
/// When `root` cannot be read, nothing is mounted below it, `name` cannot be one, or `cancelled` is set.
pub fn wait(root: &Path, name: &str, cancelled: &AtomicBool) -> Result<()> {
    if !is_plain_name(name.as_bytes()) {
        bail!("'{name}' is no UID of a restore");
    }
    let mut told = None;
    loop {
        let Volumes { all, waiting, closed } = volumes_without(root, name)
            .with_context(|| format!("cannot look at the volumes in '{}'", root.display()))?;
        if all.is_empty() {
            bail!(
                "no volume is mounted below '{}': mount there those that are restored",
                root.display()
            );
        }
        if waiting.is_empty() {
            tracing::info!("all {} volumes in '{}' are restored", all.len(), root.display());
            for volume in all {
                let removed = Dir::open_root(&root.join(&volume))
                    .and_then(|volume| volume.remove_tree(FOLDER));
                if let Err(error) = removed {
                    tracing::info!("the mark in '{volume}' stays: {error}");
                }
            }
            return Ok(());
        }
        if told.as_ref() != Some(&(waiting.clone(), closed.clone())) {
            tracing::info!("waiting for the volumes {}", waiting.join(", "));
            if !closed.is_empty() {
                tracing::warn!(
                    "not allowed to look into the volumes {}, which may be restored: what was restored \
                     belongs to another user; have this container run as the one that the pod's program \
                     runs as (securityContext.runAsUser)",
                    closed.join(", ")
                );
            }
            told = Some((waiting, closed));
        }
        if cancelled.load(Ordering::Relaxed) {
            bail!("told to end before all volumes were restored");
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Names of the folders below a root.
#[derive(Default)]
struct Volumes {
    all: Vec<String>,
    /// Those without the mark, as far as can be seen.
    waiting: Vec<String>,
    /// Those of them that may not be looked into.
    closed: Vec<String>,
}

/// The folders below `root`, with regard to the mark `name`.
fn volumes_without(root: &Path, name: &str) -> io::Result<Volumes> {
    let mut volumes = Volumes::default();
    for entry in std::fs::read_dir(root)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        let volume = entry.file_name().to_string_lossy().into_owned();
        match Dir::open_root(&entry.path()).and_then(|volume| look_for_mark(&volume, name)) {
            Ok(true) => {}
            seen => {
                if seen.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
                    volumes.closed.push(volume.clone());
                }
                volumes.waiting.push(volume.clone());
            }
        }
        volumes.all.push(volume);
    }
    volumes.waiting.sort();
    volumes.closed.sort();
    Ok(volumes)
}

/// Whether `volume` has the mark `name`.
pub(super) fn is_marked(volume: &Dir, name: &str) -> bool {
    look_for_mark(volume, name).is_ok_and(|is_there| is_there)
}

fn look_for_mark(volume: &Dir, name: &str) -> io::Result<bool> {
    let folder = volume.open_dir(FOLDER)?;
    Ok(folder.lstat(name.as_bytes())?.kind == Kind::File)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_mark_replaces_those_of_earlier_restores() {
        let temp = tempfile::tempdir().unwrap();
        let volume = Dir::open_root(temp.path()).unwrap();
        let folder = temp.path().join(".velero");
        fs::create_dir_all(folder.join("deep")).unwrap();
        fs::write(folder.join("old"), "x").unwrap();
        mark(&volume, "uid-1").unwrap();
        assert!(is_marked(&volume, "uid-1") && !is_marked(&volume, "old"));
        let names: Vec<_> =
            fs::read_dir(&folder).unwrap().map(|one| one.unwrap().file_name()).collect();
        assert_eq!(names, ["uid-1"]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(&folder), mode(&folder.join("uid-1"))), (0o777, 0o644));
        assert_eq!(fs::metadata(folder.join("uid-1")).unwrap().len(), 0);
        for name in ["", "..", "a/b"] {
            assert_eq!(mark(&volume, name).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        unmark(&volume).unwrap();
        unmark(&volume).unwrap();
        assert!(!folder.exists());
    }

    #[test]
    fn a_mark_is_not_made_through_a_symlink() {
        let temp = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("kept"), "x").unwrap();
        symlink(elsewhere.path(), temp.path().join(".velero")).unwrap();
        mark(&Dir::open_root(temp.path()).unwrap(), "uid").unwrap();
        assert!(temp.path().join(".velero").symlink_metadata().unwrap().is_dir());
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 1);
    }

    #[test]
    fn without_volumes_there_is_nothing_to_wait_for() {
        let temp = tempfile::tempdir().unwrap();
        fs::write(temp.path().join("no volume"), "").unwrap();
        let error = wait(temp.path(), "uid", &AtomicBool::new(false)).unwrap_err();
        assert!(error.to_string().contains("no volume is mounted"), "{error}");
    }

    #[test]
    fn waiting_ends_when_all_volumes_have_the_mark() {
        let temp = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            fs::create_dir(temp.path().join(name)).unwrap();
        }
        fs::write(temp.path().join("no volume"), "").unwrap();
        let open = |name: &str| Dir::open_root(&temp.path().join(name)).unwrap();
        mark(&open("a"), "uid").unwrap();
        mark(&open("b"), "another").unwrap();
        let cancelled = AtomicBool::new(true);
        let error = wait(temp.path(), "uid", &cancelled).unwrap_err();
        assert!(error.to_string().contains("before all volumes"), "{error}");
        cancelled.store(false, Ordering::Relaxed);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(temp.path(), "uid", &cancelled));
            mark(&open("b"), "uid").unwrap();
            waiting.join().unwrap().unwrap();
        });
        assert!(["a", "b"].iter().all(|name| !temp.path().join(name).join(".velero").exists()));
        assert!(wait(temp.path(), "../x", &cancelled).is_err());
    }
}
