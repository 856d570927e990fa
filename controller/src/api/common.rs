//! What several custom resources share.

use std::str::FromStr;
use std::time::Duration;

pub use k8s_openapi::jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How far a volume is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// Bytes in all, as far as known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<i64>,
    /// Bytes done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_done: Option<i64>,
}

/// Reads a duration as Go writes it: `1m0s`, `720h`.
///
/// # Errors
/// What is wrong with it, with the field's name.
pub fn duration(field: &str, text: &str) -> Result<Duration, String> {
    if text.is_empty() {
        return Err(format!("{field} is empty: write a duration as 1m30s or 24h"));
    }
    let parsed = kube::core::Duration::from_str(text);
    let parsed = parsed.map_err(|error| {
        format!("{field} '{text}' is no duration ({error}): write it as 1m30s or 24h")
    })?;
    if parsed.is_negative() {
        return Err(format!("{field} '{text}' is negative"));
    }
    Ok(parsed.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_go() {
        assert_eq!(duration("f", "1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("f", "0s"), Ok(Duration::ZERO));
        for text in ["", "1", "-1m", "1 day"] {
            assert!(duration("spec.f", text).unwrap_err().contains("spec.f"), "{text}");
        }
    }
}
