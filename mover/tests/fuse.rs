//! Saving from and restoring to a real FUSE file system, whose inode numbers and change times are not
//! trusted.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::scan::{assert_same, scan};
use common::{Repo, memory_dir, not_tested, request, restore_into, save, save_as};
use mover::backup::ChangedBy;

/// A folder seen through bindfs, until dropped.
struct Mount(PathBuf);

impl Mount {
    fn of(folder: &Path) -> Option<Self> {
        let at = tempfile::tempdir().unwrap().keep();
        let mounted = Command::new("bindfs").arg(folder).arg(&at).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(at)),
            other => {
                fs::remove_dir(at).unwrap();
                not_tested(&format!("FUSE: bindfs cannot mount ({other:?})"));
                None
            }
        }
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // A child that another test is just starting may hold a file of it for a moment. Only an empty
        // folder may be removed: through a mount, everything below would go with it.
        let gone = (0..500).any(|_| {
            let unmounted = Command::new("umount").arg(&self.0).output();
            std::thread::sleep(std::time::Duration::from_millis(10));
            unmounted.is_ok_and(|output| output.status.success())
        });
        assert!(gone && fs::remove_dir(&self.0).is_ok(), "{} stays mounted", self.0.display());
    }
}

fn tree(root: &Path) {
    fs::create_dir_all(root.join("a/b")).unwrap();
    fs::write(root.join("a/small"), "small").unwrap();
    fs::write(root.join("a/b/bundle"), common::noise(1, 5000)).unwrap();
    fs::write(root.join("large"), common::noise(2, 3 << 20)).unwrap();
    fs::hard_link(root.join("large"), root.join("a/linked")).unwrap();
    std::os::unix::fs::symlink("nowhere", root.join("link")).unwrap();
    fs::set_permissions(root.join("a/small"), fs::Permissions::from_mode(0o640)).unwrap();
}

#[test]
fn a_tree_on_fuse_comes_back_and_is_not_read_again() {
    let folder = memory_dir();
    tree(folder.path());
    let Some(mount) = Mount::of(folder.path()) else { return };
    let repo = Repo::new();
    // Changes within two seconds before a backup are read again: let all be older.
    age(folder.path());
    let first = save(&repo.repository, mount.path());
    let target = memory_dir();
    restore_into(&repo.repository, first.id.unwrap(), target.path());
    assert_same(&scan(mount.path()), &scan(target.path()), "restored from FUSE");
    // A remount gives new inode numbers; that must not matter.
    drop(mount);
    let mount = Mount::of(folder.path()).expect("it could be mounted before");
    let again = save_as(&repo.repository, &lineage_of(&request(mount.path()), &first_path(&repo)));
    assert_eq!(again.summary.files_changed, 0, "{:?}", again.summary);
    assert_eq!(again.summary.bytes_read, 0);
    // A change of content that keeps the size, and moves the modification time.
    fs::write(mount.path().join("a/small"), "SMALL").unwrap();
    let changed =
        save_as(&repo.repository, &lineage_of(&request(mount.path()), &first_path(&repo)));
    assert_eq!(changed.summary.files_changed, 1, "{:?}", changed.summary);
    let target = memory_dir();
    restore_into(&repo.repository, changed.id.unwrap(), target.path());
    assert_eq!(fs::read(target.path().join("a/small")).unwrap(), b"SMALL");
}

#[test]
fn a_tree_is_restored_onto_fuse() {
    let folder = memory_dir();
    tree(folder.path());
    let repo = Repo::new();
    let saved = save(&repo.repository, folder.path());
    let below = memory_dir();
    let Some(mount) = Mount::of(below.path()) else { return };
    restore_into(&repo.repository, saved.id.unwrap(), mount.path());
    assert_same(&scan(folder.path()), &scan(below.path()), "restored onto FUSE");
    let (one, other) = (below.path().join("large"), below.path().join("a/linked"));
    assert_eq!(fs::metadata(one).unwrap().ino(), fs::metadata(other).unwrap().ino());
}

#[test]
fn an_explicit_rule_overrides_the_choice_by_file_system() {
    let folder = memory_dir();
    tree(folder.path());
    let Some(mount) = Mount::of(folder.path()) else { return };
    age(folder.path());
    let repo = Repo::new();
    let mut by_content = request(mount.path());
    by_content.changed_by = Some(ChangedBy::Content);
    save_as(&repo.repository, &by_content);
    let again = save_as(&repo.repository, &by_content);
    assert_eq!(again.summary.files_unmodified, 0, "{:?}", again.summary);
    assert_eq!(again.summary.blobs_new, 0, "{:?}", again.summary);
}

fn age(folder: &Path) {
    for name in ["a/small", "a/b/bundle", "large"] {
        common::sources::set_mtime(&folder.join(name), 1_700_000_000, 5);
    }
}

fn first_path(repo: &Repo) -> String {
    repo.repository.list_snapshots().unwrap().snapshots[0].1.lineage.clone()
}

/// The same job under the lineage of an earlier one.
fn lineage_of<'a>(
    request: &mover::backup::Request<'a>,
    lineage: &str,
) -> mover::backup::Request<'a> {
    let mut request = request.clone();
    request.lineage = lineage.to_owned();
    request
}
