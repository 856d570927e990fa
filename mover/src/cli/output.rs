//! Writing results, whatever becomes of the place they go to.
//!
//! A reader that closes the pipe (`head`) has seen what it wanted: what only tells ends there, quietly, and
//! with 0 if all was well so far. What does something goes on to its end, and ends in another code than 0,
//! since whoever was to learn the outcome did not. So does everything where writing fails in another way.

use std::fmt::Display;
use std::io::{self, Write};
use std::sync::{Arc, OnceLock};

use objects::Kind;
use serde::Serialize;

use super::args::Global;

/// Where results go.
#[derive(Clone)]
pub(super) struct Output {
    /// Whether they are JSON.
    pub(super) json: bool,
    /// Why nothing can be written any more.
    broken: Arc<OnceLock<io::Error>>,
}

/// The reader of standard output went away before it had all of what it was to get.
#[derive(Debug, thiserror::Error)]
#[error("standard output was closed before everything was written to it")]
pub(super) struct ReaderGone;

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { json, broken: Arc::default() }
    }

    /// Prints a line for people; nothing in JSON mode.
    pub(super) fn line(&self, text: impl Display) {
        if !self.json {
            self.write(&text);
        }
    }

    /// Prints text as it is, whatever the mode.
    pub(super) fn text(&self, text: &str) {
        self.print(text);
    }

    /// Prints an object on a line of its own; nothing unless in JSON mode.
    pub(super) fn object(&self, value: &impl Serialize) {
        if self.json {
            match serde_json::to_string(value) {
                Ok(line) => self.write(&line),
                Err(error) => self.broke(error.into()),
            }
        }
    }

    /// Whether somebody can still read what is printed: what only tells may stop when not.
    pub(super) fn is_heard(&self) -> bool {
        self.broken.get().is_none()
    }

    /// The exit code of a command that ends with `code`, after trying to write what is left. `tells` says
    /// that it only told something: then a reader that went away had seen enough.
    pub(super) fn end(&self, code: u8, tells: bool) -> u8 {
        if let Err(error) = io::stdout().lock().flush() {
            self.broke(error);
        }
        let Some(error) = self.broken.get() else {
            return code;
        };
        if tells && error.kind() == io::ErrorKind::BrokenPipe {
            return code;
        }
        let done = if tells || code != super::DONE { "" } else { "; all else was carried out" };
        self.note(format_args!("ebackup: cannot write to standard output: {error}{done}"));
        if code == super::DONE { super::FAILED } else { code }
    }

    fn write(&self, line: &dyn Display) {
        self.print(&format!("{line}\n"));
    }

    fn print(&self, text: &str) {
        if self.is_heard()
            && let Err(error) = io::stdout().lock().write_all(text.as_bytes())
        {
            self.broke(error);
        }
    }

    fn broke(&self, error: io::Error) {
        // The first counts.
        let _later = self.broken.set(error);
    }

    /// Ends the results: in JSON, an object that says so, with the stores' traffic; for people, who have
    /// read the rest already, the traffic alone.
    pub(super) fn summary(&self, global: &Global, value: &impl Serialize) {
        let traffic = global.opened.traffic();
        if !self.json {
            if let Some(traffic) = traffic {
                self.line(format!(
                    "{traffic}, {} sent, {} received",
                    bytes(traffic.bytes_sent),
                    bytes(traffic.bytes_received)
                ));
            }
            return;
        }
        let mut value = match serde_json::to_value(value) {
            Ok(value) => value,
            Err(error) => return self.broke(error.into()),
        };
        if let Some(fields) = value.as_object_mut() {
            fields.insert("type".to_owned(), "summary".into());
            if let Some(traffic) = traffic {
                let of = |kind| traffic.of(kind);
                let traffic = serde_json::json!({
                    "write": of(Kind::Write),
                    "read": of(Kind::Read),
                    "stat": of(Kind::Stat),
                    "list": of(Kind::List),
                    "delete": of(Kind::Delete),
                    "repeated": traffic.retries,
                    "bytes_sent": traffic.bytes_sent,
                    "bytes_received": traffic.bytes_received,
                });
                fields.insert("requests".to_owned(), traffic);
            }
        }
        self.object(&value);
    }

    /// Tells of a failure, with what to do about it.
    pub(super) fn error(&self, error: &anyhow::Error) {
        let text = format!("{error:#}");
        let advice = super::advice(error);
        // With standard error gone there is nobody to tell.
        let _unheard = match advice {
            Some(advice) => writeln!(io::stderr(), "ebackup: {text}\n         {advice}"),
            None => writeln!(io::stderr(), "ebackup: {text}"),
        };
        #[derive(Serialize)]
        struct Failure<'a> {
            r#type: &'static str,
            message: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            advice: Option<&'a str>,
        }
        self.object(&Failure { r#type: "error", message: &text, advice });
    }

    /// Tells people something beside the results.
    pub(super) fn note(&self, text: impl Display) {
        note(text);
    }
}

/// Tells people something beside the results.
pub(super) fn note(text: impl Display) {
    // With standard error gone there is nobody to tell.
    let _unheard = writeln!(io::stderr(), "{text}");
}

/// What others have named, on one line and without a command to the terminal.
pub(super) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for char in text.chars() {
        if char.is_control() {
            shown.extend(char.escape_default());
        } else {
            shown.push(char);
        }
    }
    shown
}

/// A size for people.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    format!("{value:.1} {unit}")
}

/// A duration for people.
pub(super) fn seconds(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{}:{:02} min", seconds / 60, seconds % 60),
        _ => format!("{}:{:02} h", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_are_short() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(u64::MAX), "16384.0 PiB");
        assert_eq!(seconds(59), "59 s");
        assert_eq!(seconds(61), "1:01 min");
        assert_eq!(seconds(7260), "2:01 h");
    }
}
