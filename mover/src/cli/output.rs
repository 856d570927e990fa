//! Writing results, and the end of a reader that has seen enough.

use std::fmt::Display;
use std::io::{self, Write};

use objects::Kind;
use serde::Serialize;

use super::args::Global;

/// Where results go.
pub(super) struct Output {
    /// Whether they are JSON.
    pub(super) json: bool,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Prints a line for people; nothing in JSON mode.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub(super) fn line(&self, text: impl Display) -> io::Result<()> {
        if self.json { Ok(()) } else { write_line(&text) }
    }

    /// Prints an object on a line of its own; nothing unless in JSON mode.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub(super) fn object(&self, value: &impl Serialize) -> io::Result<()> {
        if self.json { write_line(&serde_json::to_string(value)?) } else { Ok(()) }
    }

    /// Ends the results: in JSON, an object that says so, with the stores' traffic; for people, who have
    /// read the rest already, the traffic alone.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub(super) fn summary(&self, global: &Global, value: &impl Serialize) -> io::Result<()> {
        let traffic = global.opened.traffic();
        if !self.json {
            return match traffic {
                Some(traffic) => self.line(format!(
                    "{traffic}, {} sent, {} received",
                    bytes(traffic.bytes_sent),
                    bytes(traffic.bytes_received)
                )),
                None => Ok(()),
            };
        }
        let mut value = serde_json::to_value(value)?;
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
        self.object(&value)
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
        let _unheard = self.object(&Failure { r#type: "error", message: &text, advice });
    }

    /// Tells people something beside the results.
    pub(super) fn note(&self, text: impl Display) {
        let _unheard = writeln!(io::stderr(), "{text}");
    }
}

/// A reader that closes the pipe (`head`) has seen what it wanted: that ends the program quietly.
pub(super) fn end_on_closed_pipe(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::BrokenPipe {
        std::process::exit(0);
    }
    error
}

fn write_line(text: &dyn Display) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{text}").map_err(end_on_closed_pipe)
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
