//! What came of the job of a volume, as its object says it: phase, counts and a message. Pure.
//!
//! A volume of which files could not be read is Failed, though its snapshot is kept and named: whoever looks for what
//! is Completed must not take it for whole. A volume that was restored from such a snapshot is Completed, with a
//! warning: nothing more can be had. Files that changed or vanished while they were saved are warnings.

use proto::v1::{FailureKind, Finished, finished::Outcome};
use serde_json::{Value, json};

use crate::text::{Plural, shorten};

/// Bytes of a message, at most: thousands of objects are listed at once.
const MESSAGE_BYTES_MAX: usize = 4096;

/// Names that a message tells of what is not missing.
const NAMES: usize = 3;

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// As it should.
    Completed,
    /// Saved, but for files that could not be read.
    Incomplete,
    /// It did not do what it should.
    Failed,
    /// Somebody ended it.
    Canceled,
}

impl Ending {
    /// That of `finished`, which is the job of a volume.
    pub fn of(finished: &Finished) -> Self {
        match &finished.outcome {
            Some(Outcome::Saved(_)) if finished.missing > 0 => Self::Incomplete,
            Some(Outcome::Saved(_) | Outcome::Restored(_)) => Self::Completed,
            Some(Outcome::Failure(failure)) if failure.kind() == FailureKind::Cancelled => {
                Self::Canceled
            }
            _ => Self::Failed,
        }
    }

    /// The phase of the object.
    pub fn phase(self) -> &'static str {
        match self {
            Self::Completed => "Completed",
            Self::Incomplete | Self::Failed => "Failed",
            Self::Canceled => "Canceled",
        }
    }
}

/// The status as a merge patch.
pub fn status(finished: &Finished, now: &str) -> Value {
    let count = |count: u64| if count > 0 { json!(signed(count)) } else { Value::Null };
    let mut status = json!({
        "phase": Ending::of(finished).phase(),
        "completionTimestamp": now,
        "message": message(finished),
        "warnings": count(finished.warnings),
        "filesMissing": count(finished.missing),
    });
    let progress = |bytes: u64| json!({"totalBytes": signed(bytes), "bytesDone": signed(bytes)});
    match &finished.outcome {
        Some(Outcome::Saved(saved)) => {
            status["snapshotID"] = json!(saved.snapshot);
            status["path"] = json!(saved.path);
            status["progress"] = progress(saved.bytes);
            status["incrementalBytes"] = json!(signed(saved.bytes_stored));
            status["filesChanged"] = count(finished.changed);
            status["filesVanished"] = count(finished.vanished);
        }
        Some(Outcome::Restored(restored)) => status["progress"] = progress(restored.bytes),
        _ => {}
    }
    status
}

/// What people are told; nothing when all is as it should be.
pub fn message(finished: &Finished) -> Option<String> {
    let failure = match &finished.outcome {
        Some(Outcome::Saved(_) | Outcome::Restored(_)) => None,
        Some(Outcome::Failure(failure)) => Some(failure.message.clone()),
        _ => Some("the agent said something else than what was asked: upgrade both".to_owned()),
    };
    let parts: Vec<String> = failure.into_iter().chain(remarks(finished)).collect();
    (!parts.is_empty()).then(|| shorten(parts.join("; "), MESSAGE_BYTES_MAX))
}

fn remarks(finished: &Finished) -> Vec<String> {
    let files = |count: u64| Plural(count, "file or folder", "files or folders");
    let Finished { missing, changed, vanished, .. } = *finished;
    let mut all = Vec::new();
    if missing > 0 {
        let names = names(missing, &finished.first_missing, usize::MAX);
        all.push(match &finished.outcome {
            Some(Outcome::Saved(_)) => format!(
                "{} could not be read, so that the snapshot has nothing, a part or an older version{names}; \
                 all else is saved and can be restored: mend what keeps them from being read, then back up \
                 again",
                files(missing)
            ),
            Some(Outcome::Restored(_)) => format!(
                "{} could not be read when the snapshot was made, so that nothing, a part or an older version \
                 was restored{names}",
                files(missing)
            ),
            _ => format!("{} could not be read or restored{names}", files(missing)),
        });
    }
    if changed > 0 {
        let names = names(changed, &finished.first_changed, NAMES);
        all.push(format!("{} changed while being read{names}", Plural(changed, "file", "files")));
    }
    if vanished > 0 {
        let names = names(vanished, &finished.first_vanished, NAMES);
        all.push(format!("{} vanished before being read{names}", files(vanished)));
    }
    let others = finished.warnings.saturating_sub(missing + changed + vanished);
    if others > 0 {
        // What is told already begins with a name that was told.
        let known = |text: &&String| {
            let names = finished.first_changed.iter().chain(&finished.first_vanished);
            finished.first_missing.contains(text)
                || names.clone().any(|name| text.strip_prefix(&**name).is_some_and(is_rest))
        };
        let first: Vec<String> =
            finished.first_warnings.iter().filter(|text| !known(text)).cloned().collect();
        let what = if all.is_empty() {
            Plural(others, "warning", "warnings")
        } else {
            Plural(others, "other warning", "other warnings")
        };
        all.push(format!("{what}{}", names(others, &first, NAMES)));
    }
    all
}

/// Whether this follows the name of a file in a warning.
fn is_rest(text: &str) -> bool {
    text.starts_with(": ")
}

/// The first `most` of so many names, behind a colon.
fn names(count: u64, first: &[String], most: usize) -> String {
    if first.is_empty() {
        return String::new();
    }
    let told = first.len().min(most);
    let names = first.iter().take(told).map(String::as_str).collect::<Vec<_>>().join(", ");
    match count.saturating_sub(told as u64) {
        0 => format!(": {names}"),
        others => format!(": {names}, and {others} more"),
    }
}

/// A number as Kubernetes writes it.
pub fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proto::v1::{Failure, Restored, Saved};

    use super::*;

    fn saved() -> Outcome {
        let snapshot = "s".to_owned();
        Outcome::Saved(Saved { snapshot, bytes: 9, bytes_stored: 4, ..Default::default() })
    }

    fn finished(outcome: Outcome) -> Finished {
        Finished { outcome: Some(outcome), ..Default::default() }
    }

    fn failure(kind: FailureKind) -> Finished {
        finished(Outcome::Failure(Failure { kind: kind.into(), message: "why".to_owned() }))
    }

    #[test]
    fn what_was_done_is_completed_and_says_nothing() {
        let status = status(&finished(saved()), "now");
        assert_eq!((&status["phase"], &status["snapshotID"]), (&json!("Completed"), &json!("s")));
        assert_eq!(status["progress"]["bytesDone"], 9);
        assert_eq!(status["incrementalBytes"], 4);
        assert_eq!(status["completionTimestamp"], "now");
        for nothing in ["message", "warnings", "filesMissing", "filesChanged", "filesVanished"] {
            assert_eq!(status[nothing], Value::Null, "{nothing}: of an earlier run it would stay");
        }
    }

    #[test]
    fn what_failed_or_was_cancelled_says_why() {
        let status = |finished| status(&finished, "now");
        assert_eq!(status(failure(FailureKind::Cancelled))["phase"], "Canceled");
        let failed = status(failure(FailureKind::Full));
        assert_eq!((&failed["phase"], &failed["message"]), (&json!("Failed"), &json!("why")));
        assert_eq!(status(Finished::default())["phase"], "Failed");
        assert_eq!(
            status(Finished { missing: 1, ..failure(FailureKind::Full) })["message"],
            "why; 1 file or folder could not be read or restored"
        );
    }

    #[test]
    fn a_volume_with_files_that_could_not_be_read_is_failed_and_keeps_its_snapshot() {
        let first: Vec<String> = (0..10).map(|n| format!("f{n}: Input/output error")).collect();
        let incomplete = Finished {
            warnings: 12,
            missing: 12,
            first_missing: first.clone(),
            first_warnings: first,
            ..finished(saved())
        };
        assert_eq!(Ending::of(&incomplete), Ending::Incomplete);
        let status = status(&incomplete, "now");
        assert_eq!((&status["phase"], &status["snapshotID"]), (&json!("Failed"), &json!("s")));
        assert_eq!((&status["filesMissing"], &status["warnings"]), (&json!(12), &json!(12)));
        let message = status["message"].as_str().unwrap();
        let parts = ["12 files or folders", "f0: Input", "f9: Input", "2 more", "can be restored"];
        for part in parts {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert!(!message.contains("warning"), "none is counted twice: {message}");
    }

    #[test]
    fn files_that_changed_or_vanished_are_warnings() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let warned = Finished {
            warnings: 8,
            changed: 5,
            vanished: 2,
            first_changed: names(&["a", "b", "c", "d", "e"]),
            first_vanished: names(&["x", "y"]),
            first_warnings: names(&["a: changed", "x: vanished", "a.link: no xattr"]),
            ..finished(saved())
        };
        let status = status(&warned, "now");
        assert_eq!((&status["phase"], &status["warnings"]), (&json!("Completed"), &json!(8)));
        assert_eq!((&status["filesChanged"], &status["filesVanished"]), (&json!(5), &json!(2)));
        assert_eq!(
            status["message"],
            "5 files changed while being read: a, b, c, and 2 more; 2 files or folders vanished before \
             being read: x, y; 1 other warning: a.link: no xattr"
        );
    }

    #[test]
    fn a_volume_restored_from_an_incomplete_snapshot_is_completed_and_says_what_is_missing() {
        let restored = Finished {
            warnings: 1,
            missing: 1,
            first_missing: vec!["f: not in the snapshot".to_owned()],
            ..finished(Outcome::Restored(Restored { bytes: 7, ..Default::default() }))
        };
        let status = status(&restored, "now");
        assert_eq!((&status["phase"], &status["filesMissing"]), (&json!("Completed"), &json!(1)));
        let message = status["message"].as_str().unwrap();
        assert!(message.contains("f: not in the snapshot"), "{message}");
    }

    #[test]
    fn a_status_stays_small_whatever_an_agent_warns_of() {
        let names = |count| vec!["n".repeat(500); count];
        let warned = Finished {
            warnings: u64::MAX,
            missing: 1 << 40,
            changed: 1 << 40,
            vanished: 1 << 40,
            first_missing: names(10),
            first_changed: names(10),
            first_vanished: names(10),
            first_warnings: names(20),
            ..failure(FailureKind::Damaged)
        };
        let message = message(&warned).unwrap();
        assert!(message.len() <= MESSAGE_BYTES_MAX && message.ends_with('…'));
    }
}
