//! The plan of the test run: what there is to do, what each step needs, and what it is given.
//!
//! The suite on the cluster takes longest and mostly waits, so everything else runs beside it. It has an S3 server and
//! an API server of its own, because it kills them.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};

use crate::outputs::{cargo, cargo_on_all, cargo_with_lints};
use crate::programs::{self, Built, Program};
use crate::runner::{ALL, Log, Step};
use crate::service::{Variables, root};
use crate::{cluster, garage, image, layers, outputs, s3, say};

/// Steps that others come after.
const PACKAGES: &str = "packages";
const KUBERNETES: &str = "Kubernetes";
/// What the suite on the cluster needs, which begins while the rest is compiled.
const BUILD_FIRST: &str = "build of the programs, with lints";
const BUILD: &str = "build of all, with lints";
const IMAGE: &str = "image";
const CARGO_DENY: &str = "cargo deny";
const TRIED: &str = "what tests rely on in the cluster";

/// Those that start servers.
const S3: &str = "S3 server";
const S3_OF_CLUSTER: &str = "S3 server of the cluster";
const GARAGE: &str = "Garage";
const API_SERVER: &str = "API server";
const CLUSTER: &str = "cluster";

/// The servers of the suite on the cluster, and of all other tests.
const OF_CLUSTER: [&str; 2] = [S3_OF_CLUSTER, CLUSTER];
const OF_ALL: [&str; 3] = [S3, GARAGE, API_SERVER];

/// The suite on the cluster; names of tests are those of [`Program::title`].
const ON_CLUSTER: &str = "controller e2e";

/// Programs that mostly wait, in rows of which one runs at a time: beside each other, and beside one that computes.
const ROWS: [&[&str]; 2] =
    [&["mover agent"], &["mover s3_outages", "controller dispatch", "controller apiserver"]];

/// Programs that fill the buckets of the S3 server's user who has a quota.
const OF_SMALL_USER: [&str; 4] =
    ["mover s3", "objects s3_contract", "objects s3_faults", "controller dispatch"];

/// Programs that run once more on stores that are as OBS may be: they ignore that objects be created only if absent.
const WITHOUT_CONDITIONS: [&str; 10] = [
    "mover agent",
    "mover s3_outages",
    "chunkstore gc",
    "chunkstore check",
    "chunkstore fetch",
    "chunkstore snapshots",
    "mover copy",
    "mover damage",
    "mover restore",
    "mover s3",
];

/// But not these tests of them, which only wait, or are the same in both ways.
const SAME_WITHOUT_CONDITIONS: [&str; 4] = [
    "away_for_longer",
    "loses_the_store_for_longer",
    "outlives_the_death_of_the_server",
    "where_it_is_ignored",
];

/// What steps leave for later ones.
#[derive(Default)]
struct Found {
    /// Variables of each server, by the name of the step that started it.
    servers: Mutex<BTreeMap<&'static str, Variables>>,
    built: Mutex<Built>,
}

impl Found {
    fn serves(&self, server: &'static str, variables: Variables) {
        self.servers.lock().unwrap_or_else(PoisonError::into_inner).insert(server, variables);
    }

    fn variables(&self, servers: &[&str]) -> Variables {
        let all = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        servers.iter().filter_map(|server| all.get(server)).flatten().cloned().collect()
    }

    fn built(&self) -> MutexGuard<'_, Built> {
        self.built.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs everything, and installs first what the tests need, if this is wanted.
pub(crate) fn run(install: bool) -> Result<()> {
    let target = root()?.join("target");
    let _here = alone(&target)?;
    let _outputs = outputs::hold()?;
    let found = Arc::new(Found::default());
    let steps = steps(&programs::all()?, install, &found)?;
    // Stopped whatever becomes of the run.
    let _servers = Servers;
    crate::runner::run(steps, &target.join("test"))
}

/// Keeps another run out of this checkout as long as the file is there.
fn alone(target: &Path) -> Result<File> {
    fs::create_dir_all(target).with_context(|| format!("cannot make {}", target.display()))?;
    let path = target.join("test.lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "the tests run in this checkout already: wait for them, or test in another checkout"
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// All steps, in the order in which they begin where there is a choice.
fn steps(tests: &[Program], install: bool, found: &Arc<Found>) -> Result<Vec<Step>> {
    let mut steps = vec![
        Step::new("layers", layers::check),
        Step::new("format", |log| log.run(cargo()?.args(["fmt", "--all", "--check"]))),
        Step::new(PACKAGES, move |log| match install {
            true => log.run(&mut Command::new(root()?.join("xtask/packages.sh"))),
            false => Ok(()),
        }),
        Step::new(
            BUILD_FIRST,
            with(found, |found, log| build(found, log, &["--bins", "--test=e2e"])),
        )
        .processors(1),
        Step::new(BUILD, with(found, |found, log| build(found, log, &["--all-targets"])))
            .after(&[BUILD_FIRST])
            .processors(1),
        Step::new(KUBERNETES, |_| cluster::kubernetes().map(drop)).after(&[PACKAGES]).processors(1),
        server(found, S3, || s3::up(&s3::FOR_ALL)).after(&[PACKAGES]),
        server(found, S3_OF_CLUSTER, || s3::up(&s3::FOR_CLUSTER)).after(&[PACKAGES]),
        Step::new(GARAGE, with(found, garage_up)),
        server(found, API_SERVER, cluster::apiserver_up).after(&[KUBERNETES]),
        server(found, CLUSTER, cluster::up).after(&[KUBERNETES]),
        Step::new(TRIED, cluster::smoke).after(&[CLUSTER]),
        Step::new(IMAGE, with(found, image_of_built)).after(&[BUILD_FIRST, PACKAGES]),
    ];
    steps.extend(test_steps(tests, found)?);
    let last = [
        Step::new("examples in documentation", |log| {
            log.run(cargo_with_lints("test")?.arg("--doc"))
        }),
        Step::new("documentation", |log| {
            log.run(cargo_on_all("doc")?.arg("--no-deps").env("RUSTDOCFLAGS", "-D warnings"))
        }),
        // A workspace of its own, whose outputs stay with the checkout.
        Step::new("fuzz targets", |log| {
            log.run(cargo()?.args(["check", "--locked", "--manifest-path", "fuzz/Cargo.toml"]))
        }),
    ];
    steps.extend(last.map(|step| step.after(&[BUILD]).processors(ALL)));
    steps.extend([
        Step::new(CARGO_DENY, cargo_deny).processors(1),
        Step::new("dependencies", |log| {
            log.run(
                cargo()?
                    .args(["deny", "--all-features", "check", "--hide-inclusion-graph"])
                    .args(["bans", "licenses", "sources"]),
            )
        })
        .after(&[CARGO_DENY]),
    ]);
    Ok(steps)
}

/// Each program of tests as a step, and the second runs of those that have one.
fn test_steps(tests: &[Program], found: &Arc<Found>) -> Result<Vec<Step>> {
    let titles: Vec<_> = tests.iter().map(Program::title).collect();
    let named = ROWS
        .iter()
        .copied()
        .flatten()
        .chain(&WITHOUT_CONDITIONS)
        .chain(&OF_SMALL_USER)
        .chain([&ON_CLUSTER]);
    for name in named {
        if !titles.iter().any(|title| title == name) {
            bail!("there are no tests '{name}', which the plan of the test run names");
        }
    }
    let mut steps: Vec<_> = tests.iter().map(|one| test_step(one, found, false)).collect();
    let again = tests.iter().filter(|one| WITHOUT_CONDITIONS.contains(&one.title().as_str()));
    steps.extend(again.map(|one| test_step(one, found, true)));
    // What takes longest begins first.
    steps.sort_by_key(|(rank, _)| *rank);
    Ok(steps.into_iter().map(|(_, step)| step).collect())
}

/// The step, and its place among the tests.
fn test_step(program: &Program, found: &Arc<Found>, without_conditions: bool) -> (usize, Step) {
    let title = program.title();
    let servers: &[&str] = if title == ON_CLUSTER { &OF_CLUSTER } else { &OF_ALL };
    let name = match without_conditions {
        true => format!("{title}, conditions ignored"),
        false => title.clone(),
    };
    let work = {
        let program = program.clone();
        move |found: &Found, log: &Log| {
            let mut command = found.built().command(&program)?;
            command.envs(found.variables(servers));
            if without_conditions {
                command.env("EBACKUP_TEST_CONDITIONS", "ignored");
                command.args(SAME_WITHOUT_CONDITIONS.iter().flat_map(|test| ["--skip", test]));
            }
            log.run(&mut command)
        }
    };
    let mut step =
        Step::new(&name, with(found, work)).after(&[BUILD, PACKAGES]).after(servers).holds(&title);
    if OF_SMALL_USER.contains(&title.as_str()) {
        step = step.holds("the user with a quota");
    }
    if title == ON_CLUSTER {
        return (0, step.after(&[IMAGE, TRIED]));
    }
    match ROWS.iter().find(|row| row.contains(&title.as_str())) {
        Some(row) => (1, step.holds(row[0])),
        // It has as many threads as there are processors.
        None => (2, step.processors(ALL)),
    }
}

/// Compiles it, once for each machine, unless it is there.
fn cargo_deny(log: &Log) -> Result<()> {
    if log.run(cargo()?.args(["deny", "--version"])).is_ok() {
        return Ok(());
    }
    log.run(cargo()?.args(["install", "--quiet", "--locked", "cargo-deny"]))
}

/// What runs in the cluster is what was just built.
fn image_of_built(found: &Found, _: &Log) -> Result<()> {
    let built = found.built().folder()?.to_owned();
    image::build(Some(&built), None)
}

fn garage_up(found: &Found, log: &Log) -> Result<()> {
    match garage::up()? {
        Some(variables) => found.serves(GARAGE, variables),
        None => log.say("NOT TESTED: Garage, which was not built ('cargo xtask garage build')")?,
    }
    Ok(())
}

/// Compiles with lints.
fn build(found: &Found, log: &Log, what: &[&str]) -> Result<()> {
    let mut cargo = cargo_with_lints("build")?;
    let messages = log.output(cargo.args(what).arg("--message-format=json-render-diagnostics"))?;
    found.built().read(&messages)
}

/// Stops the servers of the run.
struct Servers;

impl Drop for Servers {
    fn drop(&mut self) {
        let all: [fn() -> Result<()>; 5] = [
            cluster::down,
            cluster::apiserver_down,
            garage::down,
            || s3::down(&s3::FOR_CLUSTER),
            || s3::down(&s3::FOR_ALL),
        ];
        for down in all {
            if let Err(error) = down() {
                say(&format!("xtask: {error:#}"));
            }
        }
    }
}

/// Work that takes or leaves something that is found.
fn with(
    found: &Arc<Found>,
    work: impl FnOnce(&Found, &Log) -> Result<()> + Send + 'static,
) -> impl FnOnce(&Log) -> Result<()> + Send + 'static {
    let found = Arc::clone(found);
    move |log| work(&found, log)
}

/// A step that starts a server.
fn server(
    found: &Arc<Found>,
    name: &'static str,
    up: impl FnOnce() -> Result<Variables> + Send + 'static,
) -> Step {
    Step::new(
        name,
        with(found, move |found, _| {
            found.serves(name, up()?);
            Ok(())
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::Schedule;

    fn planned() -> Result<(Vec<Program>, Vec<Step>)> {
        let tests = programs::all()?;
        let steps = steps(&tests, true, &Arc::default())?;
        Ok((tests, steps))
    }

    #[test]
    fn every_program_of_tests_in_the_workspace_is_a_step() -> Result<()> {
        let (tests, steps) = planned()?;
        assert!(tests.len() > 30, "{tests:?}");
        for test in tests {
            let of_it: Vec<_> =
                steps.iter().filter(|step| step.needs.name == test.title()).collect();
            assert_eq!(of_it.len(), 1, "{}", test.title());
            let after = &of_it[0].needs.after;
            assert!(
                after.iter().any(|name| name == BUILD || name == BUILD_FIRST),
                "{}",
                test.title()
            );
        }
        for again in WITHOUT_CONDITIONS {
            let name = format!("{again}, conditions ignored");
            assert!(steps.iter().any(|step| step.needs.name == name), "{name}");
        }
        Ok(())
    }

    #[test]
    fn a_checkout_runs_its_tests_once_at_a_time() -> Result<()> {
        let target = tempfile::tempdir()?;
        let first = alone(target.path())?;
        assert!(alone(target.path()).is_err());
        drop(first);
        alone(target.path())?;
        Ok(())
    }

    #[test]
    fn every_step_of_the_plan_can_begin() -> Result<()> {
        let (_, steps) = planned()?;
        let mut schedule = Schedule::new(steps.into_iter().map(|step| step.needs).collect(), 2)?;
        while let Some(step) = schedule.begin() {
            schedule.end(step, true);
        }
        assert!(schedule.is_done());
        Ok(())
    }

    #[test]
    fn a_test_that_the_plan_names_and_nobody_has_is_an_error() -> Result<()> {
        let (mut tests, _) = planned()?;
        tests.retain(|test| test.title() != "chunkstore gc");
        let error = steps(&tests, true, &Arc::default()).err().context("it is refused")?;
        assert!(error.to_string().contains("chunkstore gc"), "{error}");
        Ok(())
    }
}
