//! What `backup` leaves out: patterns in the syntax of .gitignore, relative to the folder that is saved.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use ignore::gitignore::{Gitignore, GitignoreBuilder};

/// Patterns, and which of them excluded something.
pub(super) struct Patterns {
    rules: Gitignore,
    /// By the pattern as it is matched.
    used: HashMap<String, Use>,
}

struct Use {
    /// As it was written.
    written: String,
    /// Whether the user is told if nothing matches: of patterns in a file that serves many folders, only
    /// of paths.
    told: bool,
    matched: AtomicBool,
}

impl Patterns {
    /// The patterns given for saving `source`, an absolute path; `None` if there are none.
    ///
    /// # Errors
    /// When a file cannot be read, or a pattern cannot be used.
    pub(super) fn new(source: &Path, globs: &[String], files: &[PathBuf]) -> Result<Option<Self>> {
        if globs.is_empty() && files.is_empty() {
            return Ok(None);
        }
        let mut rules = GitignoreBuilder::new("");
        let mut used = HashMap::new();
        for file in files {
            let cannot = || format!("cannot read the exclude file '{}'", file.display());
            let text = std::fs::read(file).with_context(cannot)?;
            let text = String::from_utf8(text)
                .with_context(|| format!("{}: it is not UTF-8", cannot()))?;
            for line in text.strip_prefix('\u{feff}').unwrap_or(&text).lines() {
                let in_file =
                    || format!("'{line}' in '{}' is not a usable pattern", file.display());
                let is_comment = line.starts_with('#') || line.trim().is_empty();
                let told = line.starts_with('/') && !is_comment;
                add(&mut rules, &mut used, source, line, told).with_context(in_file)?;
            }
        }
        for glob in globs {
            if glob.trim().is_empty() {
                bail!("an empty pattern matches nothing");
            }
            add(&mut rules, &mut used, source, glob, true)
                .with_context(|| format!("'{glob}' is not a usable pattern"))?;
        }
        let rules = rules.build().context("the patterns to exclude cannot be used")?;
        Ok(Some(Self { rules, used }))
    }

    /// Whether to leave out the entry at this path from the root of the backup.
    pub(super) fn exclude(&self, path: &[u8], is_dir: bool) -> bool {
        let matched = self.rules.matched(Path::new(OsStr::from_bytes(path)), is_dir);
        if let Some(pattern) = matched.inner().and_then(|glob| self.used.get(glob.original()))
            && !pattern.matched.load(Ordering::Relaxed)
        {
            pattern.matched.store(true, Ordering::Relaxed);
        }
        matched.is_ignore()
    }

    /// Patterns by which nothing was excluded, as they were written.
    pub(super) fn unused(&self) -> Vec<&str> {
        let unused = self
            .used
            .values()
            .filter(|pattern| pattern.told && !pattern.matched.load(Ordering::Relaxed));
        let mut written: Vec<_> = unused.map(|pattern| pattern.written.as_str()).collect();
        written.sort_unstable();
        written
    }
}

fn add(
    rules: &mut GitignoreBuilder,
    used: &mut HashMap<String, Use>,
    source: &Path,
    written: &str,
    told: bool,
) -> Result<(), ignore::Error> {
    let pattern = below_source(source, written);
    rules.add_line(None, &pattern)?;
    // The builder cuts spaces at the end.
    let key = pattern.trim_end().to_owned();
    let unused = || Use { written: written.to_owned(), told, matched: AtomicBool::new(false) };
    used.entry(key).or_insert_with(unused).told |= told;
    Ok(())
}

/// The pattern, relative to `source` if it is the absolute path of something below it. A leading slash
/// otherwise means `source`: where both can be meant, because the folder has a folder of such a name, it
/// does.
fn below_source(source: &Path, pattern: &str) -> String {
    let (negated, path) = match pattern.strip_prefix('!') {
        Some(path) => ("!", path),
        None => ("", pattern),
    };
    let Some(first) = path.strip_prefix('/').and_then(|path| path.split('/').next()) else {
        return pattern.to_owned();
    };
    if source.join(first).symlink_metadata().is_ok() {
        return pattern.to_owned();
    }
    // A slash at the end says that only folders are meant.
    let dir = if path.ends_with('/') { "/" } else { "" };
    match Path::new(path).strip_prefix(source).ok().and_then(Path::to_str) {
        Some(below) if !below.is_empty() => format!("{negated}/{below}{dir}"),
        _ => pattern.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(source: &Path, globs: &[&str]) -> Patterns {
        let globs: Vec<_> = globs.iter().map(|glob| (*glob).to_owned()).collect();
        Patterns::new(source, &globs, &[]).unwrap().unwrap()
    }

    #[test]
    fn an_absolute_path_below_the_source_is_what_it_names() {
        let source = Path::new("/nowhere/home/me");
        let rules =
            patterns(source, &["/nowhere/home/me/cache", "/tmp/", "!/nowhere/home/me/tmp/a/"]);
        for (path, is_dir, excluded) in [
            (&b"cache"[..], true, true),
            (b"docs/cache", true, false),
            (b"tmp", true, true),
            (b"tmp", false, false),
            (b"nowhere", true, false),
        ] {
            assert_eq!(rules.exclude(path, is_dir), excluded, "{}", path.escape_ascii());
        }
    }

    #[test]
    fn a_slash_means_the_source_where_both_can_be_meant() {
        let root = tempfile::tempdir().unwrap();
        let source = root.path();
        let first = source.components().nth(1).unwrap().as_os_str().to_str().unwrap().to_owned();
        std::fs::create_dir(source.join(&first)).unwrap();
        let written = source.join("x").to_str().unwrap().to_owned();
        assert_eq!(below_source(source, &written), written);
    }

    #[test]
    fn patterns_by_which_nothing_was_excluded_are_known() {
        let rules = patterns(Path::new("/nowhere"), &["*.tmp", "/elsewhere/x", "typo ", "kept"]);
        assert!(rules.exclude(b"a.tmp", false) && rules.exclude(b"b/kept", true));
        assert!(!rules.exclude(b"other", false));
        assert_eq!(rules.unused(), ["/elsewhere/x", "typo "]);
    }

    #[test]
    fn a_file_may_come_from_another_system() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("excludes");
        std::fs::write(&file, b"\xef\xbb\xbf/cache\r\n# comment\r\n\r\n*.vmdk\r\n/not there\r\n")
            .unwrap();
        let rules = Patterns::new(dir.path(), &[], std::slice::from_ref(&file)).unwrap().unwrap();
        assert!(rules.exclude(b"cache", true) && rules.exclude(b"x/y.vmdk", false));
        assert_eq!(rules.unused(), ["/not there"]);
        std::fs::write(&file, b"/cache\n\xff\n").unwrap();
        let refused = Patterns::new(dir.path(), &[], &[file]).err().unwrap();
        assert!(format!("{refused:#}").contains("not UTF-8"), "{refused:#}");
    }
}
