//! Random trees restored onto random trees: every entry is what the snapshot has, or there is a warning for it; what was
//! not asked for is what it was; and nothing outside the target has changed.
//!
//! `EBACKUP_ORACLE_SEEDS` says how many seeds are tried (24), `EBACKUP_ORACLE_FIRST` with which it begins (1).

use std::os::unix::process::CommandExt;

use super::model::*;

const CHILD: &str = "EBACKUP_ORACLE_CHILD";
const NOBODY: u32 = 65_534;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn all_seeds() {
    let first = number("EBACKUP_ORACLE_FIRST", 1);
    let (mut all, mut named) = (0, 0);
    for seed in first..first + number("EBACKUP_ORACLE_SEEDS", 24) {
        let (entries, told) = try_seed(seed);
        (all, named) = (all + entries, named + told);
    }
    // Warnings must not be what makes it succeed.
    assert!(named * 5 < all, "{named} of {all} entries are not as the snapshot has them");
}

#[test]
fn what_is_there_after_a_restore_is_the_snapshot_or_named() {
    all_seeds();
}

#[test]
fn what_a_normal_user_restores_is_the_snapshot_or_named() {
    if std::env::var_os(CHILD).is_some() {
        return all_seeds();
    }
    if !is_root() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(temp.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    // Where it was built, other users may not look.
    let program = temp.path().join("program");
    std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let test = "oracle::what_a_normal_user_restores_is_the_snapshot_or_named";
    let done = std::process::Command::new(&program)
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        .env("TMPDIR", temp.path())
        .uid(NOBODY)
        .gid(NOBODY)
        .output();
    match done {
        Ok(done) => {
            let said = String::from_utf8_lossy(&done.stdout).into_owned();
            let why = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(done.status.success() && said.contains("1 passed"), "{said}\n{why}");
        }
        Err(error) => say_loudly(&format!("NORMAL USERS ARE NOT TESTED: {error}")),
    }
}

/// A tree with more attributes than the plain random one.
fn snapshot_of(seed: u64, random: &mut Random) -> Model {
    let mut model = random_model(seed);
    // Names of one file have one inode, so they have the same attributes.
    for object in model.0.values_mut().filter(|object| !object.node.linked) {
        let node = &mut object.node;
        if matches!(node.kind, Kind::File | Kind::Dir) {
            if random.below(4) == 0 {
                node.xattrs.push((b"user.of-snapshot".to_vec(), b"1".to_vec()));
            }
            if random.below(6) == 0 {
                node.xattrs.insert(0, (b"system.posix_acl_access".to_vec(), acl(node.mode)));
            }
            if node.kind == Kind::Dir && random.below(6) == 0 {
                let at = node
                    .xattrs
                    .partition_point(|(name, _)| name < &b"system.posix_acl_default".to_vec());
                node.xattrs.insert(at, (b"system.posix_acl_default".to_vec(), acl(0o750)));
            }
        }
        if is_root() {
            if random.below(4) == 0 {
                (node.uid, node.gid) = (random.below(3) as u32, random.below(3) as u32);
            }
            if node.kind == Kind::File && random.below(5) == 0 {
                node.mode |= 0o4000;
            }
        }
    }
    model
}

/// What was in the target before.
struct Scene {
    target: PathBuf,
    victims: PathBuf,
    /// Unmounted at the end.
    mounted: Vec<Mounted>,
    log: String,
}

impl Scene {
    fn set(random: &mut Random, model: &Model, place: &Path, honest: bool) -> Self {
        let (target, victims) = (place.join("target"), place.join("victims"));
        for folder in [&target, &victims, &victims.join("folder")] {
            std::fs::create_dir(folder).unwrap();
        }
        for number in 0..4 {
            std::fs::write(victims.join(number.to_string()), "victim").unwrap();
        }
        std::fs::write(victims.join("folder/in"), "victim").unwrap();
        let mut scene = Self { target, victims, mounted: Vec::new(), log: String::new() };
        let mut late = Vec::new();
        for (key, object) in &model.0 {
            let path: Vec<u8> = key.iter().map(|b| if *b == 0 { b'/' } else { *b }).collect();
            let path = scene.target.join(std::str::from_utf8(&path).unwrap());
            let above = path.parent().and_then(|above| above.symlink_metadata().ok());
            let there = above.is_some_and(|above| above.is_dir());
            if key.is_empty() || !there {
                continue;
            }
            // Folders most often are folders, so that there is something below.
            let keep_dir = object.node.kind == Kind::Dir && random.below(3) != 0;
            if keep_dir || random.below(2) == 0 {
                scene.put(random, &path, object, keep_dir, honest, &mut late);
            }
            if random.below(6) == 0 {
                let extra = path.with_file_name(format!("extra{}", random.below(1000)));
                scene.put(random, &extra, object, false, honest, &mut late);
            }
        }
        late.reverse();
        for (path, mode) in late {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        }
        scene
    }

    fn put(
        &mut self,
        random: &mut Random,
        path: &Path,
        object: &Object,
        dir: bool,
        honest: bool,
        late: &mut Vec<(PathBuf, u32)>,
    ) {
        if path.symlink_metadata().is_ok() {
            return;
        }
        let choice = if dir { 0 } else { random.below(9) };
        self.log.push_str(&format!("{}: {choice}\n", path.display()));
        let victim = self.victims.join(random.below(4).to_string());
        match choice {
            0 | 1 => {
                std::fs::create_dir(path).unwrap();
                if random.below(3) == 0 {
                    std::fs::create_dir(path.join("inner")).unwrap();
                    std::fs::write(path.join("inner/file"), "x").unwrap();
                }
                if is_root() && random.below(12) == 0 {
                    self.mounted.extend(Mounted::tmpfs(path, "4m"));
                    std::fs::write(path.join("on the mount"), "x").unwrap();
                }
            }
            2 => symlink(&victim, path).unwrap(),
            3 => symlink(self.victims.join("folder"), path).unwrap(),
            4 if std::fs::hard_link(&victim, path).is_ok() => {}
            5 => {
                let folder = Dir::open_root(path.parent().unwrap()).unwrap();
                folder.make_node(path.file_name().unwrap().as_bytes(), Kind::Fifo, 0, 0).unwrap();
            }
            6 if object.node.kind == Kind::File => {
                // As long and as old as that of the snapshot; with its content, or not.
                let size = object.node.size as usize;
                let mut bytes = vec![0; size];
                for (at, data) in &object.data {
                    bytes[*at as usize..*at as usize + data.len()].copy_from_slice(data);
                }
                if !honest && size > 0 && random.below(2) == 0 {
                    bytes[size / 2] ^= 1;
                }
                std::fs::write(path, bytes).unwrap();
                let seconds = object.node.mtime.seconds as u64;
                let age = std::time::Duration::new(seconds, object.node.mtime.nanos);
                let file = std::fs::File::options().write(true).open(path).unwrap();
                file.set_modified(std::time::UNIX_EPOCH + age).unwrap();
            }
            _ => std::fs::write(path, noise(random.next(), 300)).unwrap(),
        }
        let meta = path.symlink_metadata().unwrap();
        if meta.is_symlink() || meta.nlink() > 1 && !meta.is_dir() {
            return;
        }
        let folder = Dir::open_root(path.parent().unwrap()).unwrap();
        let name = path.file_name().unwrap().as_bytes();
        let mtime = meta.modified().unwrap();
        if meta.is_dir() || meta.is_file() {
            for (attribute, value) in [
                (&b"user.of-target"[..], b"2".to_vec()),
                (b"system.posix_acl_access", acl(0o770)),
                (b"system.posix_acl_default", acl(0o777)),
            ] {
                if random.below(3) == 0 {
                    // Files have no default ACL.
                    let _set = folder.set_xattr(name, attribute, &value);
                }
            }
        }
        if is_root() && random.below(3) == 0 {
            std::os::unix::fs::chown(path, Some(1234), Some(1234)).unwrap();
        }
        let readable = if meta.is_dir() { 0o500 } else { 0o400 };
        late.push((path.to_owned(), readable | random.below(0o1000) as u32));
        if meta.is_file() {
            let file = std::fs::File::options().write(true).open(path).unwrap();
            file.set_modified(mtime).unwrap();
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // The inner ones first.
        while self.mounted.pop().is_some() {}
    }
}

fn is_told(told: &[String], path: &str) -> bool {
    let mut at = Some(path);
    while let Some(here) = at {
        if told.iter().any(|told| told == here) {
            return true;
        }
        at = here.rsplit_once('/').map(|(above, _)| above);
    }
    false
}

/// Returns the number of entries, and how many of them are not as the snapshot has them, with a warning.
fn try_seed(seed: u64) -> (usize, usize) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let model = snapshot_of(seed, &mut random);
    let repo = Repo::new();
    let root = repo.write(&model);
    let place = tempfile::tempdir().unwrap();
    let overwrite = [Overwrite::Always, Overwrite::IfChanged][random.below(2) as usize];
    let verify = random.below(3) == 0;
    let honest = overwrite == Overwrite::IfChanged && !verify;
    let scene = Scene::set(&mut random, &model, place.path(), honest);
    let (victims, before) = (found(&scene.victims), found(&scene.target));
    let mut run = Run::new(&repo, root, &scene.target);
    (run.options.overwrite, run.options.verify) = (overwrite, verify);
    run.options.delete = random.below(2) == 0;
    run.options.window_bytes = [1, 5000, 32 << 20][random.below(3) as usize];
    run.options.threads = 1 + random.below(3) as usize;
    let summary = run.go();
    let context = format!("seed {seed}, {:?}", run.options);
    let told = run.log.paths();
    assert_eq!(told.len() as u64, summary.files_failed + summary.warnings, "{context}");
    let (expected, after) = (expected(&model), found(&scene.target));
    for (path, line) in &expected {
        let now = after.get(path);
        let all = || {
            run.log.warnings.lock().unwrap().iter().map(|w| format!("{w}\n")).collect::<String>()
        };
        assert!(
            now == Some(line) || is_told(&told, path),
            "{context}: '{path}' should be\n{line}\nis\n{now:?}\nwas\n{:?}\n{}",
            before.get(path),
            all()
        );
    }
    for (path, line) in after.iter().filter(|(path, _)| !expected.contains_key(*path)) {
        if run.options.delete {
            assert!(is_told(&told, path), "{context}: '{path}' should be gone");
        } else if !is_told(&told, path) {
            assert_eq!(before.get(path), Some(line), "{context}: '{path}' has changed");
        }
    }
    assert_same(&found(&scene.victims), &victims);
    let told = expected.iter().filter(|(path, line)| after.get(*path) != Some(line));
    (expected.len(), told.count())
}
