//! Neither trees nor targets are trusted.

use super::model::*;

#[test]
fn evil_names_are_refused() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let target = temp.path().join("inner/target");
    let long = vec![b'x'; 256];
    let evil: [&[u8]; 9] = [
        b"..",
        b".",
        b"a/b",
        b"/etc",
        b"a/../..",
        &long,
        b"d\0..",
        b"d\0x/y",
        b".ebackup-links-0123456789abcdef",
    ];
    let file = Object {
        node: Node {
            size: 4,
            content: Content::Inline(b"evil".to_vec()),
            ..node(Kind::File, 0o644)
        },
        data: vec![(0, b"evil".to_vec())],
        layout: Layout::Inline,
        special: None,
    };
    let dir = Object {
        node: node(Kind::Dir, 0o755),
        data: vec![],
        layout: Layout::Inline,
        special: None,
    };
    let mut objects = BTreeMap::new();
    objects.insert(Vec::new(), dir.clone());
    objects.insert(b"d".to_vec(), dir.clone());
    objects.insert(b"good".to_vec(), file.clone());
    for name in evil {
        objects.insert(name.to_vec(), dir.clone());
        objects.insert([name, &b"\0in"[..]].concat(), file.clone());
    }
    // No folder of its own; a file as a folder; empty components.
    objects.insert(b"missing\0in".to_vec(), file.clone());
    objects.insert(b"good\0in".to_vec(), file.clone());
    objects.insert(b"\0in".to_vec(), file.clone());
    objects.insert(b"d\0\0in".to_vec(), file.clone());
    let root = write(&repo.repository, objects.into_iter());
    let run = Run::new(&repo, root, &target);
    let summary = run.go();
    // The last is no attack, but what a killed restore has left in the source.
    let failed = evil.len() as u64 - 1 + 4;
    assert_eq!((summary.files_failed, summary.warnings), (failed, 1), "{:?}", run.log.paths());
    assert_eq!(found(&target).into_keys().collect::<Vec<_>>(), ["", "d", "good"]);
    assert_eq!(found(temp.path()).len(), 5);
}

#[test]
fn planted_symlinks_are_not_followed() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    model.dir("dir");
    model.dir("dir/sub");
    model.file("dir/sub/file", &noise(1, 5000), Layout::Bundle);
    let root = repo.write(&model);
    for overwrite in [Overwrite::Always, Overwrite::IfChanged, Overwrite::Never] {
        let target = temp.path().join(format!("{overwrite:?}"));
        let outside = temp.path().join(format!("{overwrite:?}-outside"));
        std::fs::create_dir_all(target.join("dir")).unwrap();
        std::fs::create_dir_all(outside.join("sub")).unwrap();
        symlink(&outside, target.join("dir/sub")).unwrap();
        let mut run = Run::new(&repo, root, &target);
        (run.options.overwrite, run.options.delete) = (overwrite, true);
        let summary = run.go();
        assert_eq!(found(&outside).len(), 2, "nothing came in, nothing went");
        if overwrite == Overwrite::Never {
            assert_eq!(summary.files_failed, 1);
            assert!(target.join("dir/sub").is_symlink());
        } else {
            assert_same(&found(&target), &expected(&model));
        }
    }
}

#[test]
fn newborn_owners_of_setgid_folders_are_corrected() {
    if !is_root() {
        return;
    }
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    model.dir("d");
    model.file("d/a", &noise(1, 1000), Layout::Bundle);
    model.file("d/b", &noise(2, 1000), Layout::Bundle);
    let root = repo.write(&model);
    std::os::unix::fs::chown(temp.path(), Some(0), Some(777)).unwrap();
    std::fs::set_permissions(temp.path(), PermissionsExt::from_mode(0o2775)).unwrap();
    Run::new(&repo, root, temp.path()).clean();
    assert_same(&found(temp.path()), &expected(&model));
}
