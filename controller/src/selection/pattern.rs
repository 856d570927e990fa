//! Names with wildcards: `*`, `?`, `[abc]`, `{a,b}`, as in Velero from 1.18 on.

use globset::{GlobBuilder, GlobMatcher};

/// One name, or all that a pattern matches.
#[derive(Debug, Clone)]
pub(super) struct Pattern {
    text: String,
    /// Of a name without wildcards, nothing.
    matcher: Option<GlobMatcher>,
}

impl Pattern {
    /// # Errors
    /// With what is wrong about it: that it cannot be a name, or is no pattern.
    pub(super) fn new(text: &str) -> Result<Self, String> {
        let is_pattern = text.contains(['*', '?', '[', ']', '{', '}']);
        let matcher = if is_pattern {
            let glob = GlobBuilder::new(text).build().map_err(|error| error.kind().to_string())?;
            Some(glob.compile_matcher())
        } else {
            check_name(text)?;
            None
        };
        Ok(Self { text: text.to_owned(), matcher })
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn is_literal(&self) -> bool {
        self.matcher.is_none()
    }

    pub(super) fn matches(&self, name: &str) -> bool {
        self.matcher.as_ref().map_or(self.text == name, |matcher| matcher.is_match(name))
    }
}

/// A DNS label (RFC 1123), as the names of namespaces are.
fn check_name(text: &str) -> Result<(), String> {
    let is_inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let fits = (1..=63).contains(&text.len()) && text.chars().all(is_inner);
    if fits && !text.starts_with('-') && !text.ends_with('-') {
        return Ok(());
    }
    Err("a name has 1 to 63 of a-z, 0-9 and '-', and begins and ends with one of a-z and 0-9"
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names() {
        for (pattern, yes, no) in [
            ("nginx*", &["nginx", "nginx-a"][..], &["my-nginx", "ngin"][..]),
            ("nginx-?", &["nginx-a"], &["nginx-", "nginx-ab"]),
            ("[ab]-x", &["a-x", "b-x"], &["c-x", "ab-x"]),
            ("{dev,test}-*", &["dev-1", "test-"], &["prod-1"]),
            ("a", &["a"], &["aa", "b", ""]),
            ("*", &["a", "b"], &[]),
        ] {
            let pattern = Pattern::new(pattern).unwrap();
            yes.iter().for_each(|name| assert!(pattern.matches(name), "{pattern:?} {name}"));
            no.iter().for_each(|name| assert!(!pattern.matches(name), "{pattern:?} {name}"));
        }
    }

    #[test]
    fn what_can_be_no_name_is_refused() {
        let long = "a".repeat(64);
        for text in ["", " a", "A", "a.b", "a_b", "-a", "a-", "[a", "{a,b", "a]x[", &long] {
            assert!(Pattern::new(text).is_err(), "{text}");
        }
        for text in ["a", "0", "a-b", &long[1..]] {
            assert!(Pattern::new(text).unwrap().is_literal(), "{text}");
        }
    }
}
