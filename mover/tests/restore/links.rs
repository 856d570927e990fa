//! Files of several names.

use super::model::*;

#[test]
fn hard_links_stay_links() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    model.dir("d");
    let mut inode = 100;
    for (layout, len) in [
        (Layout::Inline, 20),
        (Layout::Bundle, 3000),
        (Layout::Chunks(10_000), 100_000),
        (Layout::Extents(10_000), 100_000),
    ] {
        inode += 1;
        for name in ["d/first", "d/second", "zlast"] {
            let object = model.file(&format!("{name}{inode}"), &noise(inode, len), layout);
            (object.node.linked, object.node.ino) = (true, inode);
        }
    }
    for name in ["l1", "l2"] {
        let object = model.symlink(name, "somewhere");
        (object.node.linked, object.node.ino) = (true, 7);
    }
    // The same number on another file system is another file.
    let object = model.file("other", &noise(3, 10), Layout::Inline);
    (object.node.linked, object.node.ino, object.node.fs) = (true, 101, 1);
    let root = repo.write(&model);
    for window_bytes in [1, 1000, 10 << 20] {
        let target = temp.path().join(window_bytes.to_string());
        std::fs::create_dir_all(target.join(".ebackup-links-0123456789abcdef/x")).unwrap();
        let mut run = Run::new(&repo, root, &target);
        for _ in 0..2 {
            run.options.window_bytes = window_bytes;
            run.options.verify = true;
            let summary = run.clean();
            assert_eq!(summary.files, model.0.len() as u64 - 2);
            assert_same(&found(&target), &expected(&model));
            let inode = |name: &str| target.join(name).symlink_metadata().unwrap().ino();
            for number in 101..105 {
                let first = inode(&format!("d/first{number}"));
                assert_eq!(inode(&format!("d/second{number}")), first);
                assert_eq!(inode(&format!("zlast{number}")), first);
            }
            assert_eq!(inode("l1"), inode("l2"));
            assert_eq!(target.join("other").metadata().unwrap().nlink(), 1);
        }
    }
}

#[test]
fn first_name_that_fails_does_not_cost_the_others() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    // Stored separately, so one can be lost: the second, also in two windows.
    for (name, seed) in [("a", 1), ("b", 2), ("c", 2)] {
        let object = model.file(name, &noise(seed, 300_000), Layout::Extents(50_000));
        (object.node.linked, object.node.ino) = (true, 5);
    }
    let root = repo.write(&model);
    for key in packs_of(&repo, &noise(1, 300_000)[..50_000]) {
        repo.store.delete(&key).unwrap();
    }
    for window_bytes in [1, 1 << 20] {
        let target = temp.path().join(window_bytes.to_string());
        let mut run = Run::new(&repo, root, &target);
        run.options.window_bytes = window_bytes;
        let summary = run.go();
        assert_eq!(summary.files_failed, 1, "{:?}", run.log.warnings);
        assert!(!target.join("a").exists());
        for name in ["b", "c"] {
            assert_eq!(std::fs::read(target.join(name)).unwrap(), noise(2, 300_000));
        }
        assert_eq!(target.join("b").metadata().unwrap().nlink(), 2);
    }
}
