//! Everything comes back as it was.

use super::model::*;

#[test]
fn every_kind_comes_back_with_its_metadata() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let model = full_model();
    let root = repo.write(&model);
    let target = temp.path().join("made/with/parents");
    for verify in [false, true] {
        let mut run = Run::new(&repo, root, &target);
        (run.options.verify, run.options.sync) = (verify, verify);
        let summary = run.clean();
        assert_same(&found(&target), &expected(&model));
        let dirs = model.0.values().filter(|object| object.node.kind == Kind::Dir).count();
        assert_eq!(summary.dirs, dirs as u64);
        assert_eq!(summary.files, (model.0.len() - dirs) as u64);
        let is_file = |object: &&Object| object.node.kind == Kind::File;
        let files = model.0.values().filter(is_file);
        assert_eq!(summary.bytes, files.map(|object| object.node.size).sum::<u64>());
        let allocated = target.join("a/huge").metadata().unwrap().blocks() * 512;
        assert!(allocated < 1 << 20, "holes stay holes, not {allocated} bytes");
    }
}

#[test]
fn subpaths_land_directly_in_the_target() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let model = full_model();
    let root = repo.write(&model);
    let mut run = Run::new(&repo, root, &temp.path().join("dir"));
    run.subpath = key_of(b"a/b");
    run.clean();
    let below = |prefix: &str| {
        let all = expected(&model).into_iter();
        let below = all.filter_map(|(path, line)| {
            let rest = path.strip_prefix(prefix)?;
            (rest.is_empty() || rest.starts_with('/'))
                .then(|| (rest.trim_start_matches('/').to_owned(), line))
        });
        below.collect::<Lines>()
    };
    assert_same(&found(&temp.path().join("dir")), &below("a/b"));

    for name in ["huge", "bundled", "hole"] {
        let target = temp.path().join(name);
        std::fs::create_dir(&target).unwrap();
        let mut run = Run::new(&repo, root, &target);
        run.subpath = key_of(format!("a/{name}").as_bytes());
        assert_eq!(run.clean().files, 1);
        let mut lines = found(&target);
        lines.remove("");
        assert_same(&lines, &Lines::from([(name.into(), below(&format!("a/{name}"))[""].clone())]));
    }

    let mut run = Run::new(&repo, root, &temp.path().join("none"));
    run.subpath = key_of(b"a/missing");
    assert_eq!(run.try_go().unwrap_err().kind(), chunkstore::ErrorKind::NotFound);
}

#[test]
fn filters_choose_and_folders_above_the_chosen_are_made() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    for path in ["keep", "keep/deep", "skip", "skip/deep", "prune", "empty"] {
        model.dir(path).node.mode = 0o711;
    }
    for path in ["keep/deep/a.log", "skip/deep/b.log", "skip/c.txt", "prune/d.log", "keep/e.txt"] {
        model.file(path, &noise(1, 600), Layout::Bundle);
    }
    for number in 0..3000 {
        model.file(&format!("prune/{number}"), b"x", Layout::Inline);
    }
    model.file("z.log", b"last", Layout::Inline);
    let root = repo.write(&model);
    let filter = |path: &[u8], is_dir: bool| match path {
        b"prune" => FilterResult::Prune,
        b"" | b"keep" => FilterResult::Take,
        _ if !is_dir && path.ends_with(b".log") => FilterResult::Take,
        _ => FilterResult::Skip,
    };
    let mut run = Run::new(&repo, root, temp.path());
    run.filter = Some(&filter);
    run.clean();
    let chosen = [
        "",
        "keep",
        "keep/deep",
        "keep/deep/a.log",
        "skip",
        "skip/deep",
        "skip/deep/b.log",
        "z.log",
    ];
    let mut wanted = expected(&model);
    wanted.retain(|path, _| chosen.contains(&path.as_str()));
    assert_same(&found(temp.path()), &wanted);

    // What is there and not chosen stays, also with `delete`.
    for path in ["keep/x.log", "keep/x.txt", "skip/x.log", "prune"] {
        std::fs::write(temp.path().join(path), "mine").unwrap();
    }
    std::fs::create_dir_all(temp.path().join("keep/gone/deeper")).unwrap();
    std::fs::write(temp.path().join("keep/gone/deeper/y.log"), "mine").unwrap();
    std::fs::write(temp.path().join("keep/gone/deeper/y.txt"), "mine").unwrap();
    run.options.delete = true;
    assert_eq!(run.clean().deleted, 2);
    for (path, stays) in [
        ("keep/x.log", false),
        ("keep/x.txt", true),
        ("skip/x.log", true),
        ("prune", true),
        ("keep/gone/deeper/y.log", false),
        ("keep/gone/deeper/y.txt", true),
    ] {
        assert_eq!(temp.path().join(path).exists(), stays, "{path}");
    }
}

#[test]
fn windows_of_any_size_give_the_same_result() {
    let temp = tempfile::tempdir().unwrap();
    for seed in 1..=12 {
        let (repo, model) = (Repo::new(), random_model(seed));
        let root = repo.write(&model);
        for (number, window_bytes) in [1, 200, 3000, 40_000, 32 << 20].into_iter().enumerate() {
            let target = temp.path().join(format!("{seed}-{number}"));
            let mut run = Run::new(&repo, root, &target);
            run.options.window_bytes = window_bytes;
            run.options.threads = 1 + number % 4;
            run.options.verify = number % 2 == 0;
            run.clean();
            assert_same(&found(&target), &expected(&model));
            // And over what another seed has left there.
            if let Some(before) = seed.checked_sub(1).filter(|before| *before > 0) {
                let target = temp.path().join(format!("{before}-{number}"));
                run.target = target.clone();
                run.options.delete = true;
                run.options.overwrite = [Overwrite::Always, Overwrite::IfChanged][number % 2];
                let summary = run.go();
                if summary.files_failed == 0 && run.options.overwrite == Overwrite::Always {
                    assert_same(&found(&target), &expected(&model));
                }
                std::fs::remove_dir_all(&target).unwrap();
            }
        }
    }
}

#[test]
fn paths_beyond_the_limit_of_the_system_work() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    let mut path = String::new();
    for depth in 0..700 {
        path.push_str(&format!("{depth:0>40}"));
        model.dir(&path).node.mtime.seconds = depth;
        for (name, layout) in [("a", Layout::Bundle), ("z", Layout::Chunks(100))] {
            model.file(&format!("{path}/{name}"), &noise(1, 500), layout);
        }
        path.push('/');
    }
    let root = repo.write(&model);
    for window_bytes in [32 << 20, 10_000] {
        let target = temp.path().join(window_bytes.to_string());
        let mut run = Run::new(&repo, root, &target);
        run.options.window_bytes = window_bytes;
        run.clean();
        // Handles of a path this long would be too many to look at all at once.
        let mut dir = Dir::open_root(&target).unwrap();
        for depth in 0..700 {
            dir = dir.open_dir(format!("{depth:0>40}").as_bytes()).unwrap();
            assert_eq!(dir.stat().unwrap().mtime.seconds, depth);
            for name in [&b"a"[..], b"z"] {
                let mut bytes = vec![0; 500];
                dir.open_file(name).unwrap().0.read_exact_at(&mut bytes, 0).unwrap();
                assert_eq!(bytes, noise(1, 500));
            }
        }
        drop(dir);
        Dir::open_root(temp.path())
            .unwrap()
            .remove_tree(window_bytes.to_string().as_bytes())
            .unwrap();
    }
}

#[test]
fn names_of_any_bytes_come_back() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut objects = BTreeMap::new();
    let plain = |kind| Object {
        node: node(kind, 0o755),
        data: vec![],
        layout: Layout::Inline,
        special: None,
    };
    objects.insert(Vec::new(), plain(Kind::Dir));
    objects.insert(b"\xff\xfe\x01".to_vec(), plain(Kind::Dir));
    objects.insert(b"\xff\xfe\x01\0\x80".to_vec(), plain(Kind::File));
    let root = write(&repo.repository, objects.into_iter());
    Run::new(&repo, root, temp.path()).clean();
    let path = Path::new(std::ffi::OsStr::from_bytes(b"\xff\xfe\x01/\x80"));
    assert!(temp.path().join(path).is_file());
}
