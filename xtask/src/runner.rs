//! Runs the steps of a plan, beside each other where their needs allow it. What a step prints goes to a file of its
//! own, of which the run shows what matters: all of it where the step failed, else what tests say in the end.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::say;
use crate::schedule::{Needs, Schedule, State};

/// As many processors as there are.
pub(crate) const ALL: usize = usize::MAX;

type Work = Box<dyn FnOnce(&Log) -> Result<()> + Send>;

/// One thing to do.
pub(crate) struct Step {
    pub(crate) needs: Needs,
    work: Work,
}

impl Step {
    pub(crate) fn new(name: &str, work: impl FnOnce(&Log) -> Result<()> + Send + 'static) -> Self {
        Self { needs: Needs { name: name.to_owned(), ..Needs::default() }, work: Box::new(work) }
    }

    /// It begins when these have succeeded.
    pub(crate) fn after(mut self, steps: &[&str]) -> Self {
        self.needs.after.extend(steps.iter().map(|&step| step.to_owned()));
        self
    }

    /// It runs beside none that holds the same.
    pub(crate) fn holds(mut self, what: &str) -> Self {
        self.needs.holds.push(what.to_owned());
        self
    }

    /// It keeps so many processors busy, instead of none.
    pub(crate) fn processors(mut self, count: usize) -> Self {
        self.needs.processors = count;
        self
    }
}

/// Where the output goes.
pub(crate) struct Log(Option<PathBuf>);

impl Log {
    /// To where that of this program goes.
    pub(crate) const TERMINAL: Self = Self(None);

    /// Runs a command to its end, which has to be a good one.
    pub(crate) fn run(&self, command: &mut Command) -> Result<()> {
        if let Some(file) = self.open()? {
            command.stdout(file.try_clone()?).stderr(file);
        }
        let said = line_of(command);
        let status = command.stdin(Stdio::null()).status();
        let status = status.with_context(|| format!("cannot run '{said}'"))?;
        if !status.success() {
            bail!("'{said}': {status}");
        }
        Ok(())
    }

    /// The same, and gives what the command printed to its standard output.
    pub(crate) fn output(&self, command: &mut Command) -> Result<String> {
        if let Some(file) = self.open()? {
            command.stderr(file);
        }
        let said = line_of(command);
        let output = command.stdin(Stdio::null()).stdout(Stdio::piped()).output();
        let output = output.with_context(|| format!("cannot run '{said}'"))?;
        if !output.status.success() {
            bail!("'{said}': {}", output.status);
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// A line of the step's own.
    pub(crate) fn say(&self, line: &str) -> Result<()> {
        match self.open()? {
            Some(mut file) => writeln!(file, "{line}")?,
            None => say(line),
        }
        Ok(())
    }

    fn open(&self) -> Result<Option<File>> {
        let Some(path) = &self.0 else { return Ok(None) };
        let file = File::options().append(true).create(true).open(path);
        file.map(Some).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// A command as people write it.
fn line_of(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// What became of a step that ran.
struct Ended {
    step: usize,
    result: Result<()>,
    took: Duration,
}

/// Runs all steps, and fails if any did. `logs` is a folder that is made anew.
pub(crate) fn run(steps: Vec<Step>, logs: &Path) -> Result<()> {
    let processors = thread::available_parallelism()?.get();
    let mut schedule =
        Schedule::new(steps.iter().map(|step| step.needs.clone()).collect(), processors)?;
    let mut steps: Vec<_> =
        steps.into_iter().map(|step| (step.needs.name, Some(step.work))).collect();
    if logs.exists() {
        fs::remove_dir_all(logs).with_context(|| format!("cannot remove {}", logs.display()))?;
    }
    fs::create_dir_all(logs).with_context(|| format!("cannot make {}", logs.display()))?;

    let begun = Instant::now();
    let mut times = Vec::new();
    let (ends, ended) = mpsc::channel();
    while !schedule.is_done() {
        while let Some(step) = schedule.begin() {
            let (name, work) = &mut steps[step];
            let work = work.take().context("a step begins once")?;
            let log = Log(Some(log_of(logs, name)));
            say(&format!("== {name}: begins after {} s", begun.elapsed().as_secs()));
            let ends = ends.clone();
            thread::Builder::new().name(name.clone()).spawn(move || {
                let began = Instant::now();
                // A panic is a failure of the step, not an end that never comes.
                let work = std::panic::AssertUnwindSafe(|| work(&log));
                let result = std::panic::catch_unwind(work)
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("it panicked")));
                // The receiver lives until all steps have ended.
                let _sent = ends.send(Ended { step, result, took: began.elapsed() });
            })?;
        }
        let one = ended.recv().context("a step that runs ends")?;
        schedule.end(one.step, one.result.is_ok());
        let (name, _) = &steps[one.step];
        show(name, &log_of(logs, name), &one);
        times.push((one.took, name.clone()));
    }
    sum_up(&schedule, times, begun.elapsed(), logs)
}

/// A name as one of a file: letters, digits and hyphens.
fn log_of(logs: &Path, name: &str) -> PathBuf {
    let plain =
        |letter: char| if letter.is_ascii_alphanumeric() || letter == '_' { letter } else { '-' };
    logs.join(name.chars().map(plain).collect::<String>()).with_extension("log")
}

/// Tells how a step ended.
fn show(name: &str, log: &Path, ended: &Ended) {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let seconds = ended.took.as_secs_f64();
    match &ended.result {
        Ok(()) => {
            let shown: Vec<_> = text.lines().filter(|line| matters(line)).collect();
            let line = format!("== {name}: done in {seconds:.1} s");
            say(&std::iter::once(line.as_str()).chain(shown).collect::<Vec<_>>().join("\n"));
        }
        Err(error) => say(&format!(
            "{text}\n== {name}: FAILED after {seconds:.1} s: {error:#}; the lines above are in {}",
            log.display()
        )),
    }
}

/// A line that is shown of a step that succeeded: how its tests ended, and what it did not test.
fn matters(line: &str) -> bool {
    line.starts_with("test result:") || line.contains("NOT TESTED")
}

fn sum_up(
    schedule: &Schedule,
    mut times: Vec<(Duration, String)>,
    took: Duration,
    logs: &Path,
) -> Result<()> {
    times.sort_unstable();
    say(&format!("== the steps by time; what they printed is in {}", logs.display()));
    for (time, name) in &times {
        say(&format!("{:>7.1} s  {name}", time.as_secs_f64()));
    }
    say(&format!("{:>7.1} s  all, beside each other", took.as_secs_f64()));
    let of = |wanted: State| {
        let names =
            schedule.states().filter(move |(_, state)| *state == wanted).map(|(name, _)| name);
        names.collect::<Vec<_>>().join(", ")
    };
    let (failed, not_run) = (of(State::Failed), of(State::NotRun));
    if failed.is_empty() {
        return Ok(());
    }
    match not_run.is_empty() {
        true => bail!("failed: {failed}"),
        false => bail!("failed: {failed}; therefore NOT TESTED: {not_run}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> impl FnOnce(&Log) -> Result<()> + Send + use<> {
        let script = script.to_owned();
        move |log: &Log| log.run(Command::new("sh").args(["-c", &script]))
    }

    #[test]
    fn each_step_has_a_log_of_all_that_it_printed() -> Result<()> {
        let logs = tempfile::tempdir()?;
        let steps = vec![
            Step::new("the first", shell("echo one; echo two >&2")),
            Step::new("the second", shell("echo three")).after(&["the first"]).processors(1),
        ];
        run(steps, logs.path())?;
        assert_eq!(fs::read_to_string(logs.path().join("the-first.log"))?, "one\ntwo\n");
        assert_eq!(fs::read_to_string(logs.path().join("the-second.log"))?, "three\n");
        Ok(())
    }

    #[test]
    fn steps_run_beside_each_other() -> Result<()> {
        let logs = tempfile::tempdir()?;
        let pipe = logs.path().with_extension("pipe");
        let made = Command::new("mkfifo").arg(&pipe).status()?;
        assert!(made.success());
        let path = pipe.display();
        // Opening one end waits for who opens the other.
        let steps = vec![
            Step::new("reads", shell(&format!("cat {path}"))),
            Step::new("writes", shell(&format!("echo heard >{path}"))),
        ];
        let ran = run(steps, logs.path());
        fs::remove_file(&pipe)?;
        ran?;
        assert_eq!(fs::read_to_string(logs.path().join("reads.log"))?, "heard\n");
        Ok(())
    }

    #[test]
    fn a_run_fails_with_the_names_of_what_failed_and_of_what_was_not_run() -> Result<()> {
        let logs = tempfile::tempdir()?;
        let steps = vec![
            Step::new("good", |_| Ok(())),
            Step::new("bad", shell("exit 3")),
            Step::new("panics", |_| panic!("as a test of the run wants it")),
            Step::new("lost", |_| Ok(())).after(&["good", "bad"]),
        ];
        let error = run(steps, logs.path()).expect_err("it fails").to_string();
        assert_eq!(error, "failed: bad, panics; therefore NOT TESTED: lost");
        Ok(())
    }

    #[test]
    fn of_a_step_that_succeeded_the_end_of_its_tests_is_shown_and_what_it_left_out() {
        assert!(matters("test result: ok. 3 passed; 0 failed"));
        assert!(matters("== NOT TESTED: Garage"));
        assert!(!matters("test a_claim ... ok"));
    }
}
