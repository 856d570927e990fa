//! What a damaged repository, disk or an early end costs, and what it does not.

use super::model::*;

#[test]
fn missing_pack_fails_only_the_files_in_it() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    for number in 0..400 {
        model.file(&format!("{number:03}"), &noise(number, 5000), Layout::Bundle);
    }
    model.file("large", &noise(1000, 900_000), Layout::Chunks(90_000));
    model.file("vast", &noise(1001, 900_000), Layout::Extents(90_000));
    let root = repo.write(&model);
    let lost: Vec<String> =
        repo.store.keys().into_iter().filter(|key| key.starts_with("packs/")).step_by(3).collect();
    assert!(lost.len() > 2);
    for key in &lost {
        repo.store.delete(key).unwrap();
    }
    for (verify, window_bytes) in [(false, 32 << 20), (true, 5000)] {
        let target = temp.path().join(verify.to_string());
        std::fs::create_dir(&target).unwrap();
        for name in ["000", "large", "vast"] {
            std::fs::write(target.join(name), "older").unwrap();
        }
        let mut run = Run::new(&repo, root, &target);
        (run.options.verify, run.options.window_bytes) = (verify, window_bytes);
        let summary = run.go();
        let (mut wanted, mut lines) = (expected(&model), found(&target));
        let failed = run.log.paths();
        assert_eq!(summary.files_failed, failed.len() as u64);
        assert!(failed.len() > 50 && failed.len() < 390, "{}", failed.len());
        for path in &failed {
            wanted.remove(path);
            if let Ok(left) = std::fs::read(target.join(path)) {
                assert_eq!(left, b"older", "{path} is either what it was or not there");
                lines.remove(path);
            }
        }
        assert_same(&lines, &wanted);
        assert_eq!(summary.files + summary.files_failed, 402);
    }
}

#[test]
fn damaged_tree_restores_what_it_still_names_and_deletes_nothing() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    for number in 0..4000 {
        if number % 50 == 0 {
            model.dir(&format!("{number:04}"));
        }
        model.file(&format!("{:04}/{number}", number / 50 * 50), b"some content", Layout::Inline);
    }
    let root = repo.write(&model);
    // Damage some leaves, one byte each.
    let store = &repo.store;
    let keys = store.keys().into_iter().filter(|key| key.starts_with("meta/"));
    for key in keys.collect::<Vec<_>>() {
        store.damage(&key, |bytes| {
            let middle = bytes.len() / 3;
            bytes[middle] ^= 1;
        });
    }
    let mut run = Run::new(&repo, root, temp.path());
    run.options.delete = true;
    std::fs::write(temp.path().join("zzz"), "mine").unwrap();
    match run.try_go() {
        // The root itself may have been hit.
        Err(error) => assert_eq!(error.kind(), chunkstore::ErrorKind::Corrupt),
        Ok(summary) => {
            assert!(summary.files_failed > 0 && summary.files > 1000, "{summary:?}");
            assert!(temp.path().join("zzz").exists());
        }
    }
}

#[test]
fn cancelling_leaves_no_incomplete_file_and_no_hidden_folder() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    for number in 0..30 {
        let object =
            model.file(&format!("{number}"), &noise(number, 200_000), Layout::Extents(20_000));
        (object.node.linked, object.node.ino) = (true, number);
    }
    let root = repo.write(&model);
    struct After(Log, u64);
    impl Monitor for After {
        fn begin(&self, _: &[u8]) {}
        fn advance(&self, entries: u64, bytes: u64) {
            self.0.advance(entries, bytes);
        }
        fn warning(&self, warning: Warning) {
            self.0.warning(warning);
        }
        fn is_cancelled(&self) -> bool {
            self.0.advanced.lock().unwrap().1 >= self.1
        }
    }
    for (number, (bytes, window_bytes)) in
        [(50_000, 1), (1_000_000, 2000), (3_000_000, 1 << 20)].into_iter().enumerate()
    {
        let target = temp.path().join(number.to_string());
        let monitor = After(Log::default(), bytes);
        let options = RestoreOptions { window_bytes, ..options() };
        let (repository, subpath, filter) = (&*repo.repository, &b""[..], None);
        let target_path = &target;
        let request = Request {
            repository,
            root,
            subpath,
            target: target_path,
            opened: None,
            filter,
            options,
            monitor: &monitor,
        };
        let error = restore(&request).unwrap_err();
        assert_eq!(error.kind(), chunkstore::ErrorKind::Cancelled);
        let wanted = expected(&model);
        for (path, line) in found(&target) {
            assert!(path.is_empty() || wanted.get(&path) == Some(&line), "{path}");
        }
    }
}

#[test]
fn verify_finds_what_the_disk_has_changed() {
    // A monitor that spoils files when the window they are in has been written: they still wait for their names.
    struct Spoil(PathBuf, Log);
    impl Monitor for Spoil {
        fn begin(&self, _: &[u8]) {}
        fn advance(&self, _: u64, bytes: u64) {
            if bytes == 777_000 {
                for folder in std::fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path())
                {
                    let waiting = folder.read_dir().into_iter().flatten();
                    for path in waiting.map(|entry| entry.unwrap().path()) {
                        if matches!(path.metadata().unwrap().len(), 5000 | 50_000) {
                            let file = std::fs::File::options().write(true).open(path).unwrap();
                            file.write_all_at(b"spoilt", 400).unwrap();
                        }
                    }
                }
            }
        }
        fn warning(&self, warning: Warning) {
            self.1.warning(warning);
        }
        fn is_cancelled(&self) -> bool {
            false
        }
    }
    let temp = tempfile::tempdir().unwrap();
    let mut model = Model::new();
    model.file("a", &noise(1, 5000), Layout::Bundle);
    model.file("b", &noise(2, 50_000), Layout::Chunks(5000));
    model.file("c", &noise(3, 5001), Layout::Bundle);
    // Its blob comes last.
    model.file("z", &noise(4, 777_000), Layout::Chunks(800_000));
    // The order of packs is by random name: only a run in which the spoiling comes last counts.
    let mut seen = Vec::new();
    for _ in 0..50 {
        let repo = Repo::new();
        let monitor = Spoil(temp.path().to_owned(), Log::default());
        let options = RestoreOptions { verify: true, threads: 1, ..options() };
        let request = Request {
            repository: &repo.repository,
            root: repo.write(&model),
            subpath: b"",
            target: temp.path(),
            opened: None,
            filter: None,
            options,
            monitor: &monitor,
        };
        for name in ["a", "b"] {
            std::fs::write(temp.path().join(name), "old").unwrap();
        }
        let summary = restore(&request).unwrap();
        if monitor.1.paths() == ["a", "b"] {
            assert_eq!((summary.files_failed, summary.files), (2, 2));
            for name in ["a", "b"] {
                assert_eq!(std::fs::read(temp.path().join(name)).unwrap(), b"old");
            }
            return;
        }
        seen.push(monitor.1.paths());
    }
    panic!("the spoilt files were never the first: {seen:?}");
}
