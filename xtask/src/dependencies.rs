//! What may enter the tree of dependencies: licenses that allow what the project's own does, crates from crates.io
//! alone, and no version left open. What `cargo deny` would check, without ten minutes of compiling it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::outputs::cargo;
use crate::runner::Log;

/// What the product is built for.
const TARGETS: [&str; 2] = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"];

const LICENSES: [&str; 11] = [
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// Checks the whole workspace with all features, what only builds and tests use too.
pub(crate) fn check(log: &Log) -> Result<()> {
    let mut cargo = cargo()?;
    cargo.args(["metadata", "--format-version=1", "--locked", "--all-features"]);
    cargo.args(TARGETS.iter().flat_map(|target| ["--filter-platform", target]));
    let metadata = serde_json::from_str(&log.output(&mut cargo)?)?;
    let refused = refused(&metadata)?;
    if !refused.is_empty() {
        bail!("{}", refused.join("; "));
    }
    log.say(&format!("in more than one version: {}", repeated(&metadata)?.join(", ")))
}

/// What is wrong with the crates that are used.
fn refused(metadata: &Value) -> Result<Vec<String>> {
    let mut refused = Vec::new();
    for package in used(metadata)? {
        let name = format!("{} {}", package["name"], package["version"]).replace('"', "");
        match package["source"].as_str() {
            Some(CRATES_IO) => {}
            Some(other) => refused.push(format!("{name} comes from {other}, not from crates.io")),
            None => refused.extend(open_versions(&name, package)),
        }
        match package["license"].as_str() {
            Some(license) if is_allowed(license)? => {}
            Some(license) => refused.push(format!("{name} has the license '{license}'")),
            None => refused.push(format!("{name} names no license")),
        }
    }
    Ok(refused)
}

/// Dependencies of one of our crates of which any version would do; those by path are our own.
fn open_versions(name: &str, package: &Value) -> Vec<String> {
    let all = package["dependencies"].as_array().into_iter().flatten();
    let open = all.filter(|one| one["req"] == "*" && one["path"].is_null());
    open.map(|one| format!("{name} takes any version of {}", one["name"])).collect()
}

/// Crates of which several versions are used.
fn repeated(metadata: &Value) -> Result<Vec<String>> {
    let mut versions = BTreeMap::<_, Vec<_>>::new();
    for package in used(metadata)? {
        let (name, version) = (package["name"].as_str(), package["version"].as_str());
        versions.entry(name.unwrap_or_default()).or_default().push(version.unwrap_or_default());
    }
    let repeated = versions.iter().filter(|(_, versions)| versions.len() > 1);
    Ok(repeated.map(|(name, versions)| format!("{name} {}", versions.join(" and "))).collect())
}

/// The packages that are part of the tree.
fn used(metadata: &Value) -> Result<Vec<&Value>> {
    let nodes = metadata["resolve"]["nodes"].as_array().context("cargo resolves nothing")?;
    let used: BTreeSet<_> = nodes.iter().filter_map(|node| node["id"].as_str()).collect();
    let packages = metadata["packages"].as_array().context("cargo names no packages")?;
    let is_used = |package: &&Value| package["id"].as_str().is_some_and(|id| used.contains(id));
    Ok(packages.iter().filter(is_used).collect())
}

/// Whether an SPDX expression can be met with the licenses that are allowed.
fn is_allowed(expression: &str) -> Result<bool> {
    // `/` is how old crates write OR.
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let mut words = spaced.split_whitespace().peekable();
    let allowed = either(&mut words).with_context(|| format!("the license '{expression}'"))?;
    match words.next() {
        None => Ok(allowed),
        Some(word) => bail!("the license '{expression}' does not go on with '{word}'"),
    }
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

/// AND binds closer than OR.
fn either(words: &mut Words<'_>) -> Result<bool> {
    let mut allowed = both(words)?;
    while words.next_if_eq(&"OR").is_some() {
        allowed |= both(words)?;
    }
    Ok(allowed)
}

fn both(words: &mut Words<'_>) -> Result<bool> {
    let mut allowed = one(words)?;
    while words.next_if_eq(&"AND").is_some() {
        allowed &= one(words)?;
    }
    Ok(allowed)
}

fn one(words: &mut Words<'_>) -> Result<bool> {
    let first = words.next().context("it ends too early")?;
    if first == "(" {
        let allowed = either(words)?;
        return match words.next() {
            Some(")") => Ok(allowed),
            _ => bail!("a parenthesis is not closed"),
        };
    }
    if words.next_if_eq(&"WITH").is_some() {
        let exception = words.next().context("it ends too early")?;
        return Ok(LICENSES.contains(&format!("{first} WITH {exception}").as_str()));
    }
    Ok(LICENSES.contains(&first))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_license_is_allowed_if_it_can_be_met_with_those_that_are() {
        let allowed = |text: &str| is_allowed(text).expect("it is an expression");
        assert!(allowed("MIT"));
        assert!(allowed("MIT/Apache-2.0"));
        assert!(allowed("GPL-3.0-only OR MIT"));
        assert!(!allowed("GPL-3.0-only AND MIT"));
        assert!(allowed("GPL-3.0-only AND MIT OR ISC"));
        assert!(!allowed("GPL-3.0-only AND (MIT OR ISC)"));
        assert!(allowed("(MIT OR Apache-2.0) AND Unicode-3.0"));
        assert!(allowed("Apache-2.0 WITH LLVM-exception"));
        assert!(!allowed("MIT WITH LLVM-exception"));
        assert!(!allowed("mit"));
        for broken in ["", "MIT OR", "(MIT", "MIT Apache-2.0", "MIT)", "Apache-2.0 WITH"] {
            assert!(is_allowed(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn what_does_not_belong_into_the_tree_is_named_with_the_reason() -> Result<()> {
        let package = |name: &str, source: Value, license: Value, dependencies: Value| {
            json!({
                "id": name, "name": name, "version": "1.0.0", "source": source, "license": license,
                "dependencies": dependencies,
            })
        };
        let open = json!([
            { "name": "any", "req": "*", "path": null },
            { "name": "own", "req": "*", "path": "/own" },
            { "name": "one", "req": "^1", "path": null },
        ]);
        let packages = [
            package("good", json!(CRATES_IO), json!("MIT"), json!([])),
            package("ours", json!(null), json!("MIT"), open),
            package("forked", json!("git+https://host/forked"), json!("MIT"), json!([])),
            package("closed", json!(CRATES_IO), json!("BUSL-1.1"), json!([])),
            package("silent", json!(CRATES_IO), json!(null), json!([])),
            package("unused", json!(CRATES_IO), json!(null), json!([])),
        ];
        let used = ["good", "ours", "forked", "closed", "silent"].map(|id| json!({ "id": id }));
        let refused = refused(&json!({ "packages": packages, "resolve": { "nodes": used } }))?;
        assert_eq!(
            refused,
            [
                "ours 1.0.0 takes any version of \"any\"",
                "forked 1.0.0 comes from git+https://host/forked, not from crates.io",
                "closed 1.0.0 has the license 'BUSL-1.1'",
                "silent 1.0.0 names no license",
            ]
        );
        Ok(())
    }
}
