//! Targets that refuse: every call fails once, and names fall together.

use super::memfs::{Call, MemFs};
use super::model::*;

/// Something of every layout; `old` is there before.
fn model() -> Model {
    let mut model = Model::new();
    model.dir("folder");
    model.dir("folder/inner");
    model.file("folder/inner/inline", b"new", Layout::Inline);
    model.file("folder/small", &noise(1, 5000), Layout::Bundle);
    model.file("folder/pieces", &noise(2, 90_000), Layout::Chunks(20_000));
    model.file("large", &noise(3, 90_000), Layout::Extents(20_000));
    model.sparse("hole", 50_000, vec![(40_000, noise(4, 100))], Layout::Chunks(100));
    model.symlink("link", "to");
    model
}

/// As it is before, where names differ: some in the way, some beside.
fn lay_out(target: &Path) {
    std::fs::create_dir_all(target.join("folder")).unwrap();
    for name in ["folder/small", "folder/beside", "large", "link"] {
        std::fs::write(target.join(name), "old").unwrap();
    }
}

/// What a restore made of a target in which one call failed: each name is as the snapshot has it, or was
/// named and is as before or absent. Names of what was not as it should be.
fn check(target: &Path, expected: &Lines, warned: &[String], context: &str) -> Vec<String> {
    let found = found(target);
    let mut wrong = Vec::new();
    for (path, line) in expected.iter().filter(|(path, line)| found.get(*path) != Some(line)) {
        let below = |above: &String| above.is_empty() || path.starts_with(&format!("{above}/"));
        let named = warned.iter().any(|above| above == path || below(above));
        assert!(named, "{context}: '{path}' is not as saved: {:?}, not {line}", found.get(path));
        wrong.push(path.clone());
    }
    assert!(found.contains_key("folder/beside"), "{context}: what was beside is gone");
    for name in ["folder/small", "large", "link"] {
        assert!(
            found.contains_key(name),
            "{context}: the old '{name}' is gone, and no new one came"
        );
    }
    wrong
}

#[test]
fn a_call_that_fails_costs_what_is_named_and_no_more() {
    let Some(fs) = MemFs::mount(false) else { return };
    let (repo, model) = (Repo::new(), model());
    let (root, expected) = (repo.write(&model), expected(&model));
    let mut injected = 0;
    for call in Call::ALL {
        for after in 0.. {
            let context = format!("{call:?} {after}");
            let target = fs.path().join(&context);
            lay_out(&target);
            let mut run = Run::new(&repo, root, &target);
            run.options.threads = 1;
            fs.fail(call, after, libc::EIO);
            let done = run.try_go();
            if !fs.mend() {
                assert!(after > 0, "{call:?} never happens");
                assert_eq!(check(&target, &expected, &[], &context), [""; 0]);
                break;
            }
            injected += 1;
            // What is left behind is named, and goes with the next restore.
            let left = found(&target).keys().any(|path| path.contains(".ebackup"));
            let said = run.log.warnings.lock().unwrap();
            let named = said.iter().any(|said| said.message.contains("the hidden folder in it"));
            assert!(!left || named || done.is_err(), "{context}: {said:?}");
            drop(said);
            let wrong = match &done {
                Ok(_) => check(&target, &expected, &run.log.paths(), &context),
                // It ended with the reason.
                Err(_) => check(&target, &expected, &[String::new()], &context),
            };
            if let Ok(summary) = done {
                let told = summary.files_failed + summary.warnings;
                assert!(wrong.is_empty() || told > 0, "{context}: {wrong:?}");
            }
            // Once more, and all is well.
            Run::new(&repo, root, &target).clean();
            assert_eq!(check(&target, &expected, &[], &context), [""; 0]);
            assert!(found(&target).keys().all(|path| !path.contains(".ebackup")), "{context}");
        }
    }
    assert!(injected > 50, "only {injected} calls");
}

#[test]
fn names_that_fall_together_are_named_and_counted() {
    let Some(fs) = MemFs::mount(true) else { return };
    let repo = Repo::new();
    let mut model = Model::new();
    for (name, seed) in [("Makefile", 1), ("makefile", 2), ("MAKEFILE", 3), ("other", 4)] {
        model.file(name, &noise(seed, 5000), Layout::Bundle);
    }
    for name in ["Dir", "dir"] {
        model.dir(name);
        model.file(&format!("{name}/of {name}"), name.as_bytes(), Layout::Inline);
    }
    let root = repo.write(&model);
    for (name, exists) in [("made", false), ("there", true)] {
        let target = fs.path().join(name);
        if exists {
            std::fs::create_dir(&target).unwrap();
        }
        let run = Run::new(&repo, root, &target);
        let summary = run.go();
        let expected = expected(&model);
        let found = found(&target);
        let lost: Vec<_> = expected.keys().filter(|path| !found.contains_key(*path)).collect();
        // One of three files, and one of two folders with what it holds.
        assert_eq!(lost.len(), 4, "{lost:?}");
        let warned = run.log.paths();
        let named = lost.iter().filter(|path| warned.contains(path)).count();
        assert!(named >= 3, "{lost:?}: {warned:?}");
        assert!(summary.files_failed >= 3, "{summary:?}");
        let said = run.log.warnings.lock().unwrap();
        let why = said.iter().filter(|said| said.message.contains("takes its name for the same"));
        assert_eq!(why.count(), 3, "{said:?}");
        for (path, line) in expected.iter().filter(|(path, _)| found.contains_key(*path)) {
            assert!(found[path] == *line || path.is_empty(), "'{path}': {}", found[path]);
        }
    }
}
