//! Texts for people: of bounded length, on one line, and with the right ending.

use std::fmt;

/// Cuts a text that is too long, between characters.
pub fn shorten(mut text: String, bytes_max: usize) -> String {
    if text.len() > bytes_max {
        text.truncate(text.floor_char_boundary(bytes_max.saturating_sub('…'.len_utf8())));
        text.push('…');
    }
    text
}

/// A text of strangers: cut where it is too long, and on one line, so that it cannot pass for several in a log.
pub fn foreign(text: &mut String, bytes_max: usize) {
    if text.len() > bytes_max {
        *text = shorten(std::mem::take(text), bytes_max);
    }
    if text.contains(char::is_control) {
        *text = text.replace(char::is_control, " ");
    }
}

/// A number with its noun in singular and plural.
#[derive(Debug, Clone, Copy)]
pub struct Plural(pub u64, pub &'static str, pub &'static str);

impl fmt::Display for Plural {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(count, one, many) = *self;
        write!(f, "{count} {}", if count == 1 { one } else { many })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(shorten("abc".to_owned(), 3), "abc");
        assert_eq!(shorten("ääää".to_owned(), 6), "ä…");
        assert_eq!(shorten("ä".repeat(1000), 999).len(), 999);
    }

    #[test]
    fn foreign_texts_are_on_one_line() {
        let mut text = "a\nERROR b\u{1b}[0m".to_owned();
        foreign(&mut text, 100);
        assert_eq!(text, "a ERROR b [0m");
        foreign(&mut text, 4);
        assert_eq!(text, "a…");
    }
}
