//! Which namespaces.

use std::collections::BTreeSet;

use super::Invalid;
use super::pattern::Pattern;

/// Names of the fields, which differ between a spec and its hooks only in what is before them.
const INCLUDED: &str = "includedNamespaces";
const EXCLUDED: &str = "excludedNamespaces";

/// A filter by namespace.
#[derive(Debug, Clone)]
pub struct Namespaces {
    /// Empty for all.
    included: Vec<Pattern>,
    excluded: Vec<Pattern>,
    /// Those that carry the label that leaves them out.
    left_out: BTreeSet<String>,
}

impl Namespaces {
    /// `left_out` are the namespaces that carry the label that leaves them out. They count neither as excluded by
    /// the spec nor against [`Self::is_everything`].
    ///
    /// # Errors
    /// With all that is wrong with the lists.
    pub fn new(
        included: &[String],
        excluded: &[String],
        left_out: BTreeSet<String>,
    ) -> Result<Self, Vec<Invalid>> {
        let mut invalid = Vec::new();
        let mut parse = |field: &str, names: &[String]| -> Vec<Pattern> {
            let parsed = names.iter().map(|name| (name, Pattern::new(name)));
            let mut patterns = Vec::new();
            for (name, parsed) in parsed {
                match parsed {
                    Ok(pattern) => patterns.push(pattern),
                    Err(why) => invalid.push(Invalid::new(field, format!("'{name}': {why}"))),
                }
            }
            patterns
        };
        // The velero command always sends ["*"].
        let is_all = included.is_empty() || matches!(included, [all] if all == "*");
        let included = if is_all { Vec::new() } else { parse(INCLUDED, included) };
        let excluded = parse(EXCLUDED, excluded);
        if included.iter().any(|pattern| pattern.text() == "*") {
            let message = "'*' stands for all: give it alone, or only the others";
            invalid.push(Invalid::new(INCLUDED, message));
        }
        if excluded.iter().any(|pattern| pattern.text() == "*") {
            let message = "'*' would leave nothing: name those that are to be left out";
            invalid.push(Invalid::new(EXCLUDED, message));
        }
        if !included.is_empty() && !excluded.is_empty() {
            let message = "give either this or includedNamespaces, not both";
            invalid.push(Invalid::new(EXCLUDED, message));
        }
        for pattern in included.iter().filter(|pattern| left_out.contains(pattern.text())) {
            let name = pattern.text();
            let message = format!(
                "namespace '{name}' carries the label {}=true: remove the label, or do not name it",
                super::LEFT_OUT
            );
            invalid.push(Invalid::new(INCLUDED, message));
        }
        if invalid.is_empty() { Ok(Self { included, excluded, left_out }) } else { Err(invalid) }
    }

    /// Whether a namespace is taken.
    pub fn selects(&self, name: &str) -> bool {
        let is_included =
            self.included.is_empty() || self.included.iter().any(|pattern| pattern.matches(name));
        is_included
            && !self.excluded.iter().any(|pattern| pattern.matches(name))
            && !self.left_out.contains(name)
    }

    /// Whether the spec asks for all namespaces; then cluster-scoped kinds come along by themselves.
    pub fn is_everything(&self) -> bool {
        self.included.is_empty() && self.excluded.is_empty()
    }

    /// The names, where the spec lists names only: then each is asked for by itself.
    pub fn literal(&self) -> Option<Vec<&str>> {
        let is_list = !self.included.is_empty() && self.included.iter().all(Pattern::is_literal);
        is_list.then(|| self.included.iter().map(Pattern::text).collect())
    }

    /// Namespaces that are asked for by name, and are not there.
    pub fn missing<'a>(&'a self, existing: &'a BTreeSet<String>) -> impl Iterator<Item = &'a str> {
        let literal = self.included.iter().filter(|pattern| pattern.is_literal());
        literal.map(Pattern::text).filter(|name| !existing.contains(*name))
    }

    /// What else of the lists matches nothing, with its field.
    pub fn unmatched<'a>(
        &'a self,
        existing: &'a BTreeSet<String>,
    ) -> impl Iterator<Item = (&'static str, &'a str)> {
        let included = self.included.iter().filter(|pattern| !pattern.is_literal());
        let included = included.map(|pattern| (INCLUDED, pattern));
        let excluded = self.excluded.iter().map(|pattern| (EXCLUDED, pattern));
        included
            .chain(excluded)
            .filter(|(_, pattern)| !existing.iter().any(|name| pattern.matches(name)))
            .map(|(field, pattern)| (field, pattern.text()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn set(all: &[&str]) -> BTreeSet<String> {
        names(all).into_iter().collect()
    }

    fn filter(included: &[&str], excluded: &[&str], left_out: &[&str]) -> Namespaces {
        Namespaces::new(&names(included), &names(excluded), set(left_out)).unwrap()
    }

    #[test]
    fn namespaces_are_chosen_by_both_lists() {
        const ALL: [&str; 5] = ["app-a", "app-b", "off", "sys-1", "sys-2"];
        for (included, excluded, left_out, expected) in [
            (&[][..], &[][..], &[][..], &ALL[..]),
            (&["*"], &[], &[], &ALL),
            (&[], &["sys-*"], &[], &ALL[..3]),
            (&["*"], &["sys-*"], &[], &ALL[..3]),
            (&["app-a", "sys-1"], &[], &[], &["app-a", "sys-1"]),
            (&["app-?"], &[], &[], &["app-a", "app-b"]),
            (&["zzz*"], &[], &[], &[]),
            (&[], &[], &["off"], &["app-a", "app-b", "sys-1", "sys-2"]),
            (&["*"], &["sys-?"], &["off"], &["app-a", "app-b"]),
            (&["{app-a,off}"], &[], &["off"], &["app-a"]),
        ] {
            let filter = filter(included, excluded, left_out);
            let found: Vec<_> = ALL.into_iter().filter(|name| filter.selects(name)).collect();
            assert_eq!(found, expected, "{included:?} {excluded:?} {left_out:?}");
        }
    }

    #[test]
    fn everything_is_what_no_list_narrows() {
        assert!(filter(&[], &[], &[]).is_everything());
        assert!(filter(&["*"], &[], &["off"]).is_everything());
        assert!(!filter(&["a"], &[], &[]).is_everything());
        assert!(!filter(&["a*"], &[], &[]).is_everything());
        assert!(!filter(&[], &["a"], &[]).is_everything());
        assert_eq!(filter(&["a", "b"], &[], &[]).literal(), Some(vec!["a", "b"]));
        assert_eq!(filter(&["a", "b*"], &[], &[]).literal(), None);
        assert_eq!(filter(&["*"], &["c"], &[]).literal(), None);
    }

    #[test]
    fn what_matches_nothing_is_told() {
        let existing = set(&["a", "nginx-a"]);
        let included = filter(&["a", "gone", "nginx*", "zzz*"], &[], &[]);
        assert_eq!(included.missing(&existing).collect::<Vec<_>>(), ["gone"]);
        let unmatched: Vec<_> = included.unmatched(&existing).collect();
        assert_eq!(unmatched, [("includedNamespaces", "zzz*")]);
        let excluded = filter(&[], &["a", "gone", "y*"], &[]);
        assert_eq!(excluded.missing(&existing).count(), 0);
        let unmatched: Vec<_> = excluded.unmatched(&existing).collect();
        assert_eq!(unmatched, [("excludedNamespaces", "gone"), ("excludedNamespaces", "y*")]);
    }

    #[test]
    fn contradictions_are_named_by_field() {
        for (included, excluded, left_out, expected) in [
            (&["a"][..], &["b"][..], &[][..], &["spec.excludedNamespaces: give either"][..]),
            (&["a*"], &["ab"], &[], &["spec.excludedNamespaces: give either"]),
            (&["*", "a"], &[], &[], &["spec.includedNamespaces: '*' stands for all"]),
            (&[], &["*"], &[], &["spec.excludedNamespaces: '*' would leave nothing"]),
            (&["off"], &[], &["off"], &["spec.includedNamespaces: namespace 'off' carries"]),
            (
                &["B", "c."],
                &[],
                &[],
                &["spec.includedNamespaces: 'B'", "spec.includedNamespaces: 'c.'"],
            ),
            (&[], &["[x"], &[], &["spec.excludedNamespaces: '[x'"]),
        ] {
            let invalid = Namespaces::new(&names(included), &names(excluded), set(left_out));
            let told: Vec<String> = invalid.unwrap_err().iter().map(ToString::to_string).collect();
            assert_eq!(told.len(), expected.len(), "{told:?}");
            for (told, expected) in told.iter().zip(expected) {
                assert!(told.starts_with(expected), "{told}");
            }
        }
    }
}
