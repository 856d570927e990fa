//! What agents say is cut to a bounded size before anything else sees it: whoever owns a node may say what he likes,
//! and much of it goes into logs, events and statuses, which have a largest size. An honest agent bounds them itself,
//! and says less.
//!
//! Each message is taken apart field by field, so that a new field that has no bound does not compile.

use proto::v1::finished::Outcome;
use proto::v1::from_agent::Message;
use proto::v1::{
    Checked, Failure, Finished, Forgotten, Hello, Opened, ProbeResult, Progress, Pruned, Restored,
    Saved,
};

use crate::text::foreign;

/// Bytes of ids, names and versions: what Kubernetes allows at most, and more than a UID with a suffix.
const NAME: usize = 253;
/// Bytes of a message that is told alone.
const MESSAGE: usize = 4096;
/// Bytes of one of many messages.
const LINE: usize = 500;
/// Bytes of a path: the system's own limit.
const PATH: usize = 4096;

/// Jobs that one agent may name; far more than its memory is enough for.
const JOBS: usize = 1000;
/// Outcomes that it may keep: a controller that is away for long records none of them.
const OUTCOMES: usize = 10_000;
/// What it can do.
const CAPABILITIES: usize = 64;
/// Warnings and findings that are told.
const LINES: usize = 20;

/// Cuts what is too long, of whatever an agent says.
pub(super) fn bound(message: &mut Message) {
    match message {
        Message::Hello(said) => hello(said),
        Message::Progress(Progress { job_id, bytes_done: _, bytes_total: _, entries_done: _ }) => {
            foreign(job_id, NAME);
        }
        Message::Finished(said) => finished(said),
        Message::ProbeResult(ProbeResult { id, error }) => {
            foreign(id, NAME);
            foreign(error, LINE);
        }
        Message::Heartbeat(_) => {}
    }
}

fn hello(said: &mut Hello) {
    let Hello {
        node,
        version,
        capabilities,
        capacity: _,
        memory_bytes: _,
        running,
        finished: ended,
    } = said;
    foreign(node, NAME);
    foreign(version, NAME);
    list(capabilities, CAPABILITIES, NAME);
    list(running, JOBS, NAME);
    ended.truncate(OUTCOMES);
    ended.iter_mut().for_each(finished);
}

fn finished(said: &mut Finished) {
    let Finished {
        job_id,
        warnings: _,
        missing: _,
        changed: _,
        vanished: _,
        first_warnings,
        first_missing,
        first_changed,
        first_vanished,
        outcome,
    } = said;
    foreign(job_id, NAME);
    for lines in [first_warnings, first_missing, first_changed, first_vanished] {
        list(lines, LINES, LINE);
    }
    match outcome {
        Some(Outcome::Failure(Failure { kind: _, message })) => foreign(message, MESSAGE),
        Some(Outcome::Saved(Saved {
            snapshot,
            path,
            parent,
            bytes: _,
            bytes_read: _,
            bytes_stored: _,
            files: _,
            folders: _,
        })) => {
            foreign(snapshot, NAME);
            foreign(path, PATH);
            foreign(parent, NAME);
        }
        Some(Outcome::Opened(Opened { repository_id, register, created: _, keys_removed: _ })) => {
            foreign(repository_id, NAME);
            foreign(register, NAME);
        }
        Some(Outcome::Checked(Checked { findings, errors: _, check_warnings: _ })) => {
            list(findings, LINES, LINE);
        }
        Some(
            Outcome::Restored(Restored { bytes: _, bytes_written: _, files: _, folders: _ })
            | Outcome::Forgotten(Forgotten { snapshots: _ })
            | Outcome::Pruned(Pruned {
                packs_deleted: _,
                bytes_deleted: _,
                bytes_repacked: _,
                packs_waiting: _,
            }),
        )
        | None => {}
    }
}

fn list(texts: &mut Vec<String>, most: usize, bytes_max: usize) {
    texts.truncate(most);
    texts.iter_mut().for_each(|text| foreign(text, bytes_max));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long() -> String {
        "ä\n".repeat(1 << 19)
    }

    fn many() -> Vec<String> {
        vec![long(); 30]
    }

    #[test]
    fn whatever_an_agent_says_is_small_afterwards() {
        let finished = |outcome| Finished {
            job_id: long(),
            first_warnings: many(),
            first_missing: many(),
            first_changed: many(),
            first_vanished: many(),
            outcome: Some(outcome),
            ..Default::default()
        };
        let saved = Saved { snapshot: long(), path: long(), parent: long(), ..Default::default() };
        let opened = Opened { repository_id: long(), register: long(), ..Default::default() };
        let messages = [
            Message::ProbeResult(ProbeResult { id: long(), error: long() }),
            Message::Progress(Progress { job_id: long(), ..Default::default() }),
            Message::Finished(finished(Outcome::Failure(Failure { kind: 0, message: long() }))),
            Message::Finished(finished(Outcome::Saved(saved))),
            Message::Finished(finished(Outcome::Opened(opened))),
            Message::Finished(finished(Outcome::Checked(Checked {
                findings: many(),
                ..Default::default()
            }))),
            Message::Hello(Hello {
                node: long(),
                version: long(),
                capabilities: many(),
                running: many(),
                finished: vec![finished(Outcome::Failure(Failure { kind: 0, message: long() }))],
                ..Default::default()
            }),
        ];
        for mut message in messages {
            bound(&mut message);
            let text = format!("{message:?}");
            assert!(text.len() < 64 << 10, "{} bytes", text.len());
            // As a line's end is shown.
            assert!(!text.contains("\\n"), "several lines in {text}");
        }
    }

    #[test]
    fn what_an_honest_agent_says_stays_as_it_is() {
        let said = Finished {
            job_id: "0b2f6c1e-7d6c-4a9b-8f0e-1f1d8c1c9a11-open-1764195261123".to_owned(),
            first_missing: vec!["x".repeat(300); 10],
            first_warnings: vec!["x".repeat(500); 20],
            outcome: Some(Outcome::Failure(Failure { kind: 0, message: "x".repeat(4096) })),
            ..Default::default()
        };
        let mut message = Message::Finished(said.clone());
        bound(&mut message);
        assert_eq!(message, Message::Finished(said));
    }
}
