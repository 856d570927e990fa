//! What could not be saved, or not wholly, is restored as far as it goes and never passed off as whole.

use super::model::*;

fn states_model() -> Model {
    let mut model = Model::new();
    for (name, state) in [("changed", State::Changed), ("cut", State::Cut), ("kept", State::Kept)] {
        for (layout, kind) in [
            (Layout::Inline, "inline"),
            (Layout::Bundle, "bundle"),
            (Layout::Chunks(9000), "chunks"),
        ] {
            model.file(&format!("{name}-{kind}"), &noise(1, 30_000), layout).node.state = state;
        }
    }
    for (name, state, size) in [
        ("vast-changed", State::Changed, 100_000),
        ("vast-cut", State::Cut, 60_000),
        // It grew while it was read.
        ("vast-grown", State::Cut, 150_000),
    ] {
        let object = model.file(name, &noise(2, size.min(100_000)), Layout::Extents(20_000));
        object.node.size = 100_000;
        object.special = Some(Body::End(End { size: size as u64, state }));
    }
    model.dir("half").node.state = State::Cut;
    model.file("half/seen", b"x", Layout::Inline);
    model.dir("other").node.state = State::OtherFileSystem;
    model.dir("cache").node.state = State::Cache;
    model.dir("repository").node.state = State::Repository;
    model.absent("secret", Absence::Unreadable);
    model.absent("half/secret", Absence::Unreadable);
    model.absent("excluded", Absence::Excluded);
    model
}

const CHANGED: [&str; 4] = ["changed-bundle", "changed-chunks", "changed-inline", "vast-changed"];
const INCOMPLETE: [&str; 11] = [
    "cut-bundle",
    "cut-chunks",
    "cut-inline",
    "half",
    "half/secret",
    "kept-bundle",
    "kept-chunks",
    "kept-inline",
    "secret",
    "vast-cut",
    "vast-grown",
];

fn told(run: &Run<'_>, concern: Concern) -> Vec<String> {
    let warnings = run.log.warnings.lock().unwrap();
    let of = warnings.iter().filter(|warning| warning.concern == concern);
    let mut paths: Vec<_> =
        of.map(|warning| String::from_utf8_lossy(&warning.path).into_owned()).collect();
    paths.sort();
    paths
}

#[test]
fn what_is_not_whole_is_restored_named_and_counted() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let model = states_model();
    let root = repo.write(&model);
    for (number, window_bytes) in [1, 2000, 32 << 20].into_iter().enumerate() {
        let mut run = Run::new(&repo, root, &temp.path().join(number.to_string()));
        (run.options.window_bytes, run.options.verify) = (window_bytes, number == 1);
        let summary = run.go();
        assert_same(&found(&run.target), &expected(&model));
        assert_eq!(told(&run, Concern::Changed), CHANGED);
        assert_eq!(told(&run, Concern::Missing), INCOMPLETE);
        let counts = (summary.files_failed, summary.files_incomplete, summary.warnings);
        assert_eq!(counts, (0, INCOMPLETE.len() as u64, CHANGED.len() as u64));
    }
}

#[test]
fn delete_spares_what_the_backup_did_not_look_into() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let root = repo.write(&states_model());
    let stays = [
        "half/unseen",
        "other/mounted/deep",
        "cache/object",
        "repository/pack",
        "secret/db",
        "half/secret",
        "excluded/big",
    ];
    let goes = ["extra", "secrets", "excluded-not", "cut"];
    for path in stays.iter().chain(&goes) {
        let path = temp.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "mine").unwrap();
    }
    let mut run = Run::new(&repo, root, temp.path());
    run.options.delete = true;
    assert_eq!(run.go().deleted, goes.len() as u64);
    for path in stays {
        assert_eq!(std::fs::read(temp.path().join(path)).unwrap(), b"mine", "{path}");
    }
    for path in goes {
        assert!(!temp.path().join(path).exists(), "{path}");
    }
}

#[test]
fn a_file_is_not_replaced_by_its_own_beginning() {
    let (repo, temp) = (Repo::new(), tempfile::tempdir().unwrap());
    let mut model = Model::new();
    model.file("f", b"begin", Layout::Inline).node.state = State::Cut;
    let root = repo.write(&model);
    let path = temp.path().join("f");
    std::fs::write(&path, "beginning and end").unwrap();
    let mtime = std::time::UNIX_EPOCH + std::time::Duration::new(1_600_000_000, 123_456_789);
    std::fs::File::options().write(true).open(&path).unwrap().set_modified(mtime).unwrap();
    let mut run = Run::new(&repo, root, temp.path());
    run.options.overwrite = Overwrite::IfChanged;
    let summary = run.go();
    assert_eq!((summary.skipped_unchanged, summary.files_incomplete), (1, 1));
    assert_eq!(std::fs::read(&path).unwrap(), b"beginning and end");
}
