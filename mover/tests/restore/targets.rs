//! Targets that belong to others, are full, are mounted, or hold what must not be touched.

use super::model::*;

fn set_mtime(path: &Path) {
    let mtime = std::time::UNIX_EPOCH + std::time::Duration::new(1_600_000_000, 123_456_789);
    std::fs::File::options().write(true).open(path).unwrap().set_modified(mtime).unwrap();
}

fn names(path: &Path) -> Vec<String> {
    let names = std::fs::read_dir(path).unwrap();
    let mut names: Vec<_> =
        names.map(|name| name.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn an_existing_file_goes_only_when_the_new_one_is_whole() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    model.file("big", &noise(1, 3 << 20), Layout::Extents(1 << 20));
    model.file("small", &noise(2, 5000), Layout::Bundle);
    model.file("inline", b"new", Layout::Inline);
    model.symlink("link", "to");
    let root = repo.write(&model);
    std::fs::write(temp.path().join("big"), "old").unwrap();
    for key in packs_of(&repo, &noise(1, 3 << 20)[1 << 20..2 << 20]) {
        repo.store.delete(&key).unwrap();
    }
    for overwrite in [Overwrite::Always, Overwrite::IfChanged] {
        let mut run = Run::new(&repo, root, temp.path());
        run.options.overwrite = overwrite;
        assert!(run.go().files_failed >= 1);
        assert_eq!(std::fs::read(temp.path().join("big")).unwrap(), b"old");
        let names = names(temp.path());
        assert!(names.iter().all(|name| !name.starts_with('.')), "{names:?}");
    }
}

#[test]
fn a_full_target_keeps_its_old_files() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let Some(mounted) = Mounted::tmpfs(&temp.path().join("m"), "2m") else { return };
    let mut model = Model::new();
    model.file("big", &noise(1, 4 << 20), Layout::Extents(1 << 20));
    model.file("whole", &noise(2, 4 << 20), Layout::Chunks(4 << 20));
    let root = repo.write(&model);
    for in_place in [false, true] {
        for name in ["big", "whole"] {
            std::fs::write(mounted.0.join(name), "old").unwrap();
        }
        let mut run = Run::new(&repo, root, &mounted.0);
        run.options.in_place = in_place;
        let error = run.try_go().unwrap_err();
        assert_eq!(error.kind(), chunkstore::ErrorKind::Full, "{error}");
        assert_eq!(std::fs::read(mounted.0.join("whole")).unwrap(), b"old");
        // What is written in its place is lost, as was said.
        let big = std::fs::read(mounted.0.join("big"));
        assert!(big.is_ok_and(|big| big == b"old") || in_place);
        let names = names(&mounted.0);
        assert!(names.iter().all(|name| !name.starts_with('.')), "{names:?}");
    }
}

#[test]
fn a_write_that_fails_costs_its_file_only() {
    if std::env::var_os("EBACKUP_LIMITED").is_none() {
        // Units of 512 bytes; without the signal, writing beyond is an error.
        let script = "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$@\"";
        let done = std::process::Command::new("sh")
            .args(["-c", script])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "targets::a_write_that_fails_costs_its_file_only", "--nocapture"])
            .env("EBACKUP_LIMITED", "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        let why = String::from_utf8_lossy(&done.stderr).into_owned();
        return assert!(done.status.success() && said.contains("1 passed"), "{said}\n{why}");
    }
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    model.file("bundled", &noise(1, 90_000), Layout::Bundle);
    model.file("chunked", &noise(2, 90_000), Layout::Chunks(20_000));
    model.file("vast", &noise(3, 90_000), Layout::Extents(20_000));
    model.sparse("hole", 90_000, vec![], Layout::Inline);
    model.file("small", &noise(4, 9000), Layout::Bundle);
    let root = repo.write(&model);
    let large = ["bundled", "chunked", "hole", "vast"];
    let old = temp.path().join("old");
    std::fs::create_dir(&old).unwrap();
    large.iter().for_each(|name| std::fs::write(old.join(name), "old").unwrap());
    for (target, verify) in [(&old, false), (&old, true), (&temp.path().join("new"), false)] {
        let mut run = Run::new(&repo, root, target);
        run.options.verify = verify;
        let summary = run.go();
        assert_eq!((summary.files_failed, summary.files_refused, summary.files), (4, 4, 1));
        assert_eq!(run.log.paths(), large);
        assert_eq!(std::fs::read(target.join("small")).unwrap(), noise(4, 9000));
        for name in large {
            let now = std::fs::read(target.join(name)).ok();
            assert_eq!(now.is_some(), target == &old, "{name}");
            assert!(now.is_none_or(|now| now == b"old"), "{name}");
        }
    }
}

#[test]
fn in_place_needs_no_room_for_two() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let Some(mounted) = Mounted::tmpfs(&temp.path().join("m"), "6m") else { return };
    let mut model = Model::new();
    model.file("big", &noise(1, 4 << 20), Layout::Extents(1 << 20));
    let root = repo.write(&model);
    let path = mounted.0.join("big");
    std::fs::write(&path, noise(9, 4 << 20)).unwrap();
    let inode = path.metadata().unwrap().ino();
    let mut run = Run::new(&repo, root, &mounted.0);
    run.options.in_place = true;
    run.clean();
    assert_eq!(path.metadata().unwrap().ino(), inode);
    assert_same(&found(&mounted.0), &expected(&model));
    // A file of several names is never written to.
    std::fs::write(&path, noise(8, 1 << 20)).unwrap();
    let other = temp.path().join("m/other");
    std::fs::hard_link(&path, &other).unwrap();
    run.clean();
    assert_eq!(std::fs::read(&other).unwrap(), noise(8, 1 << 20));
}

#[test]
fn nothing_is_deleted_in_another_file_system() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let target = temp.path().join("t");
    let mut model = Model::new();
    model.dir("m");
    model.file("m/file", b"new", Layout::Inline);
    let root = repo.write(&model);
    let Some(_mounted) = Mounted::tmpfs(&target.join("m"), "1m") else { return };
    std::fs::write(target.join("m/precious"), "x").unwrap();
    std::fs::create_dir_all(target.join("extra/deep")).unwrap();
    let Some(_deep) = Mounted::tmpfs(&target.join("extra/deep/mounted"), "1m") else { return };
    std::fs::write(target.join("extra/deep/mounted/precious"), "x").unwrap();
    let mut run = Run::new(&repo, root, &target);
    run.options.delete = true;
    let summary = run.go();
    assert_eq!((summary.files, summary.files_failed), (1, 0));
    assert!(target.join("m/precious").exists() && target.join("m/file").exists());
    assert!(target.join("extra/deep/mounted/precious").exists());
    assert_eq!(run.log.paths(), ["extra", "m"]);
    assert_eq!(names(&target.join("m")), ["file", "precious"]);
}

#[test]
fn the_repository_its_key_and_cache_are_not_touched() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    model.dir("seen");
    model.file("seen/pack", b"an old state of it", Layout::Inline);
    model.file("key", b"an old key", Layout::Inline);
    model.file("folder", b"a file in its place", Layout::Inline);
    let root = repo.write(&model);
    let kept = ["seen/pack", "key", "folder/repo/pack", "extra/repo/pack"];
    for path in kept.iter().chain(&["extra/other", "gone"]) {
        std::fs::create_dir_all(temp.path().join(path).parent().unwrap()).unwrap();
        std::fs::write(temp.path().join(path), "mine").unwrap();
    }
    let mut run = Run::new(&repo, root, temp.path());
    run.options.delete = true;
    for path in ["seen", "key", "folder/repo", "extra/repo"] {
        run.options.protected.add(&temp.path().join(path));
    }
    let summary = run.go();
    for path in kept {
        assert_eq!(std::fs::read(temp.path().join(path)).unwrap(), b"mine", "{path}");
    }
    assert!(!temp.path().join("gone").exists());
    assert_eq!(run.log.paths(), ["extra", "folder", "key", "seen"]);
    assert_eq!((summary.files_failed, summary.warnings), (3, 1));
    // Nor is anything restored into it.
    run.target = temp.path().join("extra/repo");
    assert!(run.try_go().unwrap_err().to_string().contains("lies in the repository"));
}

#[test]
fn rights_and_owners_are_given_to_verified_content_only() {
    if !is_root() {
        return say_loudly("NOT ROOT: FILES OF OTHERS IN THE TARGET ARE NOT TESTED");
    }
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    for (name, mode) in [("setuid", 0o4755), ("plain", 0o644), ("mine", 0o644)] {
        model.file(name, b"good", Layout::Inline).node.mode = mode;
    }
    let root = repo.write(&model);
    for name in ["setuid", "plain", "mine"] {
        std::fs::write(temp.path().join(name), "evil").unwrap();
        set_mtime(&temp.path().join(name));
    }
    for name in ["setuid", "plain"] {
        std::os::unix::fs::chown(temp.path().join(name), Some(1234), Some(1234)).unwrap();
        set_mtime(&temp.path().join(name));
    }
    let mut run = Run::new(&repo, root, temp.path());
    run.options.overwrite = Overwrite::IfChanged;
    let summary = run.clean();
    assert_eq!((summary.files, summary.skipped_unchanged), (2, 1));
    for name in ["setuid", "plain"] {
        assert_eq!(std::fs::read(temp.path().join(name)).unwrap(), b"good", "{name}");
    }
    // Who wants to be sure of those that look unchanged has them read.
    run.options.verify = true;
    assert_eq!(run.clean().files, 1);
    assert_same(&found(temp.path()), &expected(&model));
}

#[test]
fn verify_compares_what_was_left_as_unchanged() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let model = full_model();
    let root = repo.write(&model);
    let mut run = Run::new(&repo, root, temp.path());
    run.clean();
    for (name, at) in
        [("a/b/inline", 1), ("a/bundled2", 60_000), ("a/many", 900_000), ("a/sparse", 2_000_000)]
    {
        let path = temp.path().join(name);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"!", at).unwrap();
        drop(file);
        set_mtime(&path);
    }
    let huge = temp.path().join("a/huge");
    let file = std::fs::File::options().write(true).open(&huge).unwrap();
    file.write_all_at(b"!", EXTENT_SPAN_BYTES + 30_000).unwrap();
    drop(file);
    set_mtime(&huge);
    (run.options.overwrite, run.options.verify) = (Overwrite::IfChanged, true);
    assert_eq!(run.clean().files, 5);
    assert_same(&found(temp.path()), &expected(&model));
}

#[test]
fn a_part_leaves_the_target_and_everything_else_as_it_is() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    model.0.get_mut(&b""[..]).unwrap().node.mode = 0o700;
    model.dir("d").node.mode = 0o700;
    model.file("d/wanted", b"x", Layout::Inline);
    model.file("d/not", b"x", Layout::Inline);
    let root = repo.write(&model);
    std::fs::create_dir(temp.path().join("d")).unwrap();
    for path in ["", "d"] {
        std::fs::set_permissions(temp.path().join(path), PermissionsExt::from_mode(0o1777))
            .unwrap();
    }
    let filter = |path: &[u8], _: bool| match path {
        b"d/wanted" => FilterResult::Take,
        _ => FilterResult::Skip,
    };
    let mut run = Run::new(&repo, root, temp.path());
    run.filter = Some(&filter);
    let mtime = || temp.path().metadata().unwrap().modified().unwrap();
    let before = mtime();
    assert_eq!(run.clean().files, 1);
    assert_eq!(mtime(), before, "only the folder in it has changed");
    for path in ["", "d"] {
        assert_eq!(temp.path().join(path).metadata().unwrap().mode() & 0o7777, 0o1777, "{path}");
    }
    assert_eq!(names(&temp.path().join("d")), ["wanted"]);
    // What matches nothing is a mistake, and makes nothing.
    let none = |_: &[u8], _: bool| FilterResult::Skip;
    run.filter = Some(&none);
    run.target = temp.path().join("new");
    assert_eq!(run.try_go().unwrap_err().kind(), chunkstore::ErrorKind::NotFound);
    assert!(!run.target.exists());
}

#[test]
fn never_changes_nothing_that_exists() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let model = full_model();
    let root = repo.write(&model);
    std::fs::create_dir_all(temp.path().join("a/b")).unwrap();
    std::fs::set_permissions(temp.path().join("a"), PermissionsExt::from_mode(0o711)).unwrap();
    std::fs::write(temp.path().join("a/many"), "mine").unwrap();
    std::fs::write(temp.path().join("extra"), "mine").unwrap();
    let mut run = Run::new(&repo, root, temp.path());
    (run.options.overwrite, run.options.delete) = (Overwrite::Never, true);
    let summary = run.clean();
    assert_eq!((summary.deleted, summary.skipped_unchanged), (0, 1));
    assert_eq!(temp.path().join("a").metadata().unwrap().mode() & 0o777, 0o711);
    assert_eq!(std::fs::read(temp.path().join("a/many")).unwrap(), b"mine");
    assert!(temp.path().join("extra").exists() && temp.path().join("a/one").exists());
}

#[test]
fn nothing_is_inherited_from_the_folder() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let target = Dir::open_root(temp.path()).unwrap();
    if target.set_own_xattr(b"system.posix_acl_default", &acl(0o777)).is_err() {
        return say_loudly("NO ACLS HERE: THEIR INHERITANCE IS NOT TESTED");
    }
    let model = full_model();
    let root = repo.write(&model);
    let filter = |path: &[u8], _: bool| match path {
        b"" => FilterResult::Skip,
        _ => FilterResult::Take,
    };
    // The folder keeps its default ACL, or loses it.
    for asked_for in [false, true] {
        let mut run = Run::new(&repo, root, temp.path());
        run.filter = if asked_for { None } else { Some(&filter) };
        run.clean();
        let (mut found, mut expected) = (found(temp.path()), expected(&model));
        if !asked_for {
            found.remove("");
            expected.remove("");
        }
        assert_same(&found, &expected);
    }
    // Nor by a target that is made in such a folder.
    target.set_own_xattr(b"system.posix_acl_default", &acl(0o777)).unwrap();
    let run = Run::new(&repo, root, &temp.path().join("new"));
    run.clean();
    assert_same(&found(&run.target), &expected(&model));
}

#[test]
fn leftovers_go_and_running_restores_do_not_harm_each_other() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    for folder in ["a", "b"] {
        model.dir(folder);
        for number in 0..300 {
            let bytes = noise(number, 3000);
            for copy in ["", "-too"] {
                let path = format!("{folder}/{number}{copy}");
                let object = model.file(&path, &bytes, Layout::Bundle);
                (object.node.linked, object.node.ino) = (true, number + 1000);
            }
        }
        let big = noise(7, 3 << 20);
        model.file(&format!("{folder}/big"), &big, Layout::Extents(100_000));
    }
    let root = repo.write(&model);
    for path in ["", "a"] {
        let left = temp.path().join(path).join(".ebackup-links-0123456789abcdef");
        std::fs::create_dir_all(&left).unwrap();
        std::fs::write(left.join("t1"), "half").unwrap();
    }
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..3)
            .map(|number| {
                let (repo, path) = (&repo, temp.path());
                scope.spawn(move || {
                    let mut run = Run::new(repo, root, path);
                    run.options.window_bytes = 10_000 << number;
                    run.options.verify = number == 1;
                    let summary = run.go();
                    (summary.files_failed, run.log.paths())
                })
            })
            .collect();
        for run in runs {
            assert_eq!(run.join().unwrap(), (0, vec![]));
        }
    });
    assert_same(&found(temp.path()), &expected(&model));
    assert_eq!(names(temp.path()), ["a", "b"]);
}
