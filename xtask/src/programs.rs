//! The programs of the tests: which there are, where the build put them, and how they are run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::outputs::cargo;
use crate::runner::Log;

/// One program of tests, as `cargo test` would run it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Program {
    pub(crate) package: String,
    /// `lib`, `bin` or `test`.
    pub(crate) kind: String,
    /// Of its target: for an integration test, of its file.
    pub(crate) target: String,
    /// The folder of its package, in which it runs.
    pub(crate) folder: PathBuf,
}

impl Program {
    /// For people, and as the name of its step.
    pub(crate) fn title(&self) -> String {
        match self.kind.as_str() {
            "test" => format!("{} {}", self.package, self.target),
            kind => format!("{} {} ({kind})", self.package, self.target),
        }
    }
}

/// All programs of tests in the workspace.
pub(crate) fn all() -> Result<Vec<Program>> {
    let mut cargo = cargo()?;
    cargo.args(["metadata", "--no-deps", "--format-version=1", "--locked"]);
    from_metadata(&serde_json::from_str(&Log::TERMINAL.output(&mut cargo)?)?)
}

fn from_metadata(metadata: &Value) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    for package in list(&metadata["packages"])? {
        let manifest = Path::new(text(&package["manifest_path"])?);
        let folder = manifest.parent().context("a manifest lies in a folder")?;
        for target in list(&package["targets"])? {
            let kind = text(&target["kind"][0])?;
            if target["test"] == true && matches!(kind, "lib" | "bin" | "test") {
                programs.push(Program {
                    package: text(&package["name"])?.to_owned(),
                    kind: kind.to_owned(),
                    target: text(&target["name"])?.to_owned(),
                    folder: folder.to_owned(),
                });
            }
        }
    }
    programs.sort_unstable();
    Ok(programs)
}

/// Where the build put each program of tests.
#[derive(Debug, Default)]
pub(crate) struct Built {
    tests: BTreeMap<(PathBuf, String, String), PathBuf>,
    /// That of the programs that are not tests.
    folder: Option<PathBuf>,
}

impl Built {
    /// Adds what `cargo build --message-format=json` printed.
    pub(crate) fn read(&mut self, messages: &str) -> Result<()> {
        for line in messages.lines().filter(|line| line.starts_with('{')) {
            let message: Value = serde_json::from_str(line)?;
            let Some(executable) = message["executable"].as_str() else { continue };
            let manifest = Path::new(text(&message["manifest_path"])?);
            let folder = manifest.parent().context("a manifest lies in a folder")?.to_owned();
            let target = &message["target"];
            let (kind, name) = (text(&target["kind"][0])?, text(&target["name"])?);
            if message["profile"]["test"] == true {
                let key = (folder, kind.to_owned(), name.to_owned());
                self.tests.insert(key, executable.into());
            } else if kind == "bin" {
                self.folder = Path::new(executable).parent().map(Path::to_owned);
            }
        }
        Ok(())
    }

    /// The folder of the programs that are not tests.
    pub(crate) fn folder(&self) -> Result<&Path> {
        self.folder.as_deref().context("no programs were built")
    }

    /// The command that runs a program of tests as `cargo test` does.
    pub(crate) fn command(&self, program: &Program) -> Result<Command> {
        let key = (program.folder.clone(), program.kind.clone(), program.target.clone());
        let executable = self.tests.get(&key);
        let executable =
            executable.with_context(|| format!("{} was not built", program.title()))?;
        let mut command = Command::new(executable);
        command.current_dir(&program.folder).env("CARGO_MANIFEST_DIR", &program.folder);
        Ok(command)
    }
}

fn list(value: &Value) -> Result<&Vec<Value>> {
    value.as_array().with_context(|| format!("cargo gives '{value}' where a list should be"))
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().with_context(|| format!("cargo gives '{value}' where a text should be"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn program(kind: &str, target: &str) -> Program {
        Program {
            package: "mover".to_owned(),
            kind: kind.to_owned(),
            target: target.to_owned(),
            folder: "/ws/mover".into(),
        }
    }

    #[test]
    fn programs_are_those_that_cargo_test_runs_but_for_documentation() -> Result<()> {
        let target = |kind: &str, name: &str, test: bool| json!({ "kind": [kind], "name": name, "test": test });
        let targets = [
            target("lib", "mover", true),
            target("bin", "ebackup", true),
            target("bin", "quiet", false),
            target("test", "restore", true),
            target("example", "shown", true),
            target("bench", "fast", true),
            target("custom-build", "build-script-build", false),
        ];
        let package =
            json!({ "name": "mover", "manifest_path": "/ws/mover/Cargo.toml", "targets": targets });
        let programs = from_metadata(&json!({ "packages": [package] }))?;
        assert_eq!(
            programs,
            [program("bin", "ebackup"), program("lib", "mover"), program("test", "restore")]
        );
        let titles: Vec<_> = programs.iter().map(Program::title).collect();
        assert_eq!(titles, ["mover ebackup (bin)", "mover mover (lib)", "mover restore"]);
        Ok(())
    }

    #[test]
    fn tests_are_found_where_the_build_says_and_not_taken_for_the_programs_they_test() -> Result<()>
    {
        let message = |kind: &str, name: &str, test: bool, executable: Option<&str>| {
            json!({
                "reason": "compiler-artifact", "manifest_path": "/ws/mover/Cargo.toml",
                "target": { "kind": [kind], "name": name }, "profile": { "test": test }, "executable": executable,
            })
        };
        let messages = [
            message("lib", "mover", false, None),
            message("test", "restore", true, Some("/cache/deps/restore-1")),
            message("bin", "ebackup", true, Some("/cache/deps/ebackup-2")),
            message("bin", "ebackup", false, Some("/ws/target/debug/ebackup")),
            json!({ "reason": "build-finished", "success": true }),
        ];
        let text = messages.map(|one| one.to_string()).join("\n");
        let mut built = Built::default();
        built.read(&text)?;
        let command = built.command(&program("test", "restore"))?;
        assert_eq!(command.get_program(), "/cache/deps/restore-1");
        assert_eq!(command.get_current_dir(), Some(Path::new("/ws/mover")));
        assert_eq!(
            built.command(&program("bin", "ebackup"))?.get_program(),
            "/cache/deps/ebackup-2"
        );
        assert_eq!(built.folder()?, Path::new("/ws/target/debug"));
        assert!(built.command(&program("test", "other")).is_err());
        Ok(())
    }
}
