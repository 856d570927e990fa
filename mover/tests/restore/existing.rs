//! What becomes of what is in the target already.

use super::model::*;

#[test]
fn dry_run_counts_the_same_and_touches_nothing() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let root = repo.write(&full_model());
    let target = temp.path().join("t");
    let mut dry = Run::new(&repo, root, &target);
    dry.options.dry_run = true;
    let counted = dry.clean();
    assert!(!target.exists());
    let done = Run::new(&repo, root, &target).clean();
    assert_eq!(counted, RestoreSummary { bytes_written: 0, ..done });

    let before = found(&target);
    std::fs::write(target.join("extra"), "x").unwrap();
    let with_extra = found(&target);
    dry.options.delete = true;
    assert_eq!(dry.clean().deleted, 1);
    assert_eq!(found(&target), with_extra);
    let mut run = Run::new(&repo, root, &target);
    run.options.delete = true;
    assert_eq!(run.clean().deleted, 1);
    assert_same(&found(&target), &before);
}

#[test]
fn overwrite_modes_decide_about_what_is_there() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    for name in ["same", "newer", "folder", "link", "linked"] {
        model.file(name, &noise(1, 5000), Layout::Bundle);
    }
    model.dir("dir");
    model.file("dir/in", b"x", Layout::Inline);
    model.symlink("sym", "to");
    let root = repo.write(&model);
    for overwrite in [Overwrite::Always, Overwrite::IfChanged, Overwrite::Never] {
        let target = temp.path().join(format!("{overwrite:?}"));
        let outside = temp.path().join(format!("{overwrite:?}-outside"));
        std::fs::create_dir_all(target.join("folder/with/content")).unwrap();
        std::fs::write(&outside, "outside").unwrap();
        symlink(&outside, target.join("link")).unwrap();
        std::fs::hard_link(&outside, target.join("linked")).unwrap();
        std::fs::write(target.join("newer"), noise(1, 5000)).unwrap();
        let changed = [&b"!"[..], &noise(1, 4999)].concat();
        std::fs::write(target.join("same"), &changed).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_600_000_000, 123_456_789);
        let file = std::fs::File::options().write(true).open(target.join("same")).unwrap();
        file.set_modified(time).unwrap();
        let inode = target.join("same").metadata().unwrap().ino();
        std::fs::write(target.join("dir"), "file in the place of a folder").unwrap();
        std::fs::write(target.join("sym"), "file").unwrap();
        let mut run = Run::new(&repo, root, &target);
        run.options.overwrite = overwrite;
        let summary = run.go();
        assert_eq!(std::fs::read(&outside).unwrap(), b"outside");
        let now = |name: &str| std::fs::read(target.join(name)).unwrap();
        let is_new = |name: &str| now(name) == noise(1, 5000);
        match overwrite {
            Overwrite::Always => {
                assert_same(&found(&target), &expected(&model));
                assert_eq!((summary.files, summary.files_failed), (7, 0));
            }
            Overwrite::IfChanged => {
                assert!(now("same") == changed && is_new("newer") && is_new("link"));
                assert_eq!(target.join("same").metadata().unwrap().ino(), inode);
                assert_eq!(target.join("same").metadata().unwrap().mode() & 0o777, 0o644);
                assert!(target.join("folder/with/content").exists() && is_new("linked"));
                assert_eq!((summary.skipped_unchanged, summary.files_failed), (1, 1));
            }
            Overwrite::Never => {
                assert!(now("same") == changed && now("linked") == b"outside");
                assert!(target.join("link").is_symlink() && target.join("folder/with").exists());
                assert_eq!(now("sym"), b"file");
                assert_eq!(now("dir"), b"file in the place of a folder");
                assert_eq!((summary.files, summary.files_failed), (0, 1));
                assert_eq!(summary.skipped_unchanged, 6);
            }
        }
    }
}

#[test]
fn restoring_twice_over_itself_writes_nothing_if_unchanged() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let model = full_model();
    let root = repo.write(&model);
    let mut run = Run::new(&repo, root, temp.path());
    run.clean();
    run.options.overwrite = Overwrite::IfChanged;
    let summary = run.clean();
    assert_eq!((summary.files, summary.bytes_written), (0, 0));
    assert_same(&found(temp.path()), &expected(&model));
    run.options.overwrite = Overwrite::Never;
    assert_eq!(run.clean().files, 0);
    run.options.overwrite = Overwrite::Always;
    assert_eq!(run.clean().skipped_unchanged, 0);
    assert_same(&found(temp.path()), &expected(&model));
}

#[test]
fn delete_leaves_exactly_the_snapshot() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let model = full_model();
    let root = repo.write(&model);
    let mut run = Run::new(&repo, root, temp.path());
    run.clean();
    for (path, is_dir) in [
        ("!first", false),
        ("a/b/empty/x", true),
        ("a/b/empty/y", false),
        ("a/many!", false),
        ("a/mane", true),
        ("zz", true),
        ("xdir/z", false),
    ] {
        let path = temp.path().join(path);
        if is_dir {
            std::fs::create_dir_all(path.join("deep/er")).unwrap();
            std::fs::write(path.join("deep/file"), "x").unwrap();
        } else {
            std::fs::write(path, "x").unwrap();
        }
    }
    symlink("/", temp.path().join("a/root")).unwrap();
    run.options.delete = true;
    run.options.overwrite = Overwrite::IfChanged;
    assert_eq!(run.clean().deleted, 8);
    assert_same(&found(temp.path()), &expected(&model));

    // Only within the subpath.
    std::fs::write(temp.path().join("stays"), "x").unwrap();
    std::fs::write(temp.path().join("a/goes"), "x").unwrap();
    run.target = temp.path().join("a");
    run.subpath = b"a".to_vec();
    assert_eq!(run.clean().deleted, 1);
    assert!(temp.path().join("stays").exists());
}
