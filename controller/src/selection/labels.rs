//! Which labels.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::{Selector, SelectorExt};

use super::Invalid;

/// A filter by labels: one selector, or any of several.
#[derive(Debug, Clone)]
pub struct Labels(Vec<Selector>);

impl Labels {
    /// An absent selector and an empty one select everything.
    ///
    /// # Errors
    /// When both fields are given, or a selector is none.
    pub fn new(
        selector: Option<&LabelSelector>,
        any_of: &[LabelSelector],
    ) -> Result<Self, Vec<Invalid>> {
        let mut invalid = Vec::new();
        if selector.is_some() && !any_of.is_empty() {
            let message = "give either this or labelSelector, not both";
            invalid.push(Invalid::new("orLabelSelectors", message));
        }
        let one = selector.map(|selector| ("labelSelector".to_owned(), selector));
        let several =
            any_of.iter().enumerate().map(|(at, one)| (format!("orLabelSelectors[{at}]"), one));
        let mut selectors = Vec::new();
        for (field, selector) in one.into_iter().chain(several) {
            match parse(selector) {
                Ok(selector) => selectors.push(selector),
                Err(why) => invalid.push(Invalid::new(field, why)),
            }
        }
        if selectors.iter().any(Selector::selects_all) {
            selectors.clear();
        }
        if invalid.is_empty() { Ok(Self(selectors)) } else { Err(invalid) }
    }

    /// Whether no label narrows anything.
    pub fn is_everything(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an object of these labels is taken.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.is_empty() || self.0.iter().any(|selector| selector.matches(labels))
    }

    /// What to ask the API server for: one list each, of which objects may be in several.
    pub fn queries(&self) -> Vec<Option<String>> {
        if self.0.is_empty() {
            return vec![None];
        }
        self.0.iter().map(|selector| Some(selector.to_string())).collect()
    }
}

/// As the API server would take it.
fn parse(selector: &LabelSelector) -> Result<Selector, String> {
    let pairs = selector.match_labels.iter().flatten();
    for (key, value) in pairs {
        check_key(key)?;
        check_value(value)?;
    }
    for requirement in selector.match_expressions.iter().flatten() {
        let (key, operator) = (&requirement.key, &*requirement.operator);
        check_key(key)?;
        let values = requirement.values.as_deref().unwrap_or_default();
        values.iter().try_for_each(|value| check_value(value))?;
        match operator {
            "In" | "NotIn" if values.is_empty() => {
                return Err(format!("operator {operator} of '{key}' needs values"));
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                return Err(format!("operator {operator} of '{key}' takes no values"));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            _ => {
                return Err(format!(
                    "operator '{operator}' of '{key}' is none of In, NotIn, Exists, DoesNotExist"
                ));
            }
        }
    }
    Selector::try_from(selector.clone()).map_err(|error| error.to_string())
}

/// A qualified name: an optional DNS subdomain and a slash before the name.
fn check_key(key: &str) -> Result<(), String> {
    let (prefix, name) =
        key.rsplit_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    let is_subdomain = |prefix: &str| {
        prefix.len() <= 253
            && prefix.split('.').all(|part| {
                let is_inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
                !part.is_empty()
                    && part.chars().all(is_inner)
                    && !part.starts_with('-')
                    && !part.ends_with('-')
            })
    };
    if prefix.is_none_or(is_subdomain) && !name.is_empty() && is_name(name) {
        return Ok(());
    }
    Err(format!("'{key}' is no key of a label: it is like 'app' or 'example.com/app'"))
}

fn check_value(value: &str) -> Result<(), String> {
    if value.is_empty() || is_name(value) {
        return Ok(());
    }
    Err(format!(
        "'{value}' is no value of a label: up to 63 of a-z, A-Z, 0-9, '-', '_' and '.', with a letter or digit \
         at both ends"
    ))
}

fn is_name(text: &str) -> bool {
    let is_inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let is_end = |c: char| c.is_ascii_alphanumeric();
    text.len() <= 63
        && text.chars().all(is_inner)
        && text.starts_with(is_end)
        && text.ends_with(is_end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(json: serde_json::Value) -> LabelSelector {
        serde_json::from_value(json).unwrap()
    }

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn app(name: &str) -> LabelSelector {
        selector(serde_json::json!({ "matchLabels": { "app": name } }))
    }

    fn expression(key: &str, operator: &str, values: &[&str]) -> LabelSelector {
        let requirement = serde_json::json!({ "key": key, "operator": operator, "values": values });
        selector(serde_json::json!({ "matchExpressions": [requirement] }))
    }

    #[test]
    fn labels_match_as_in_kubernetes() {
        let (none, a, b) =
            (labels(&[]), labels(&[("app", "a")]), labels(&[("app", "b"), ("x", "")]));
        for (one, expected) in [
            (app("a"), [false, true, false]),
            (expression("app", "In", &["a", "c"]), [false, true, false]),
            (expression("app", "NotIn", &["a"]), [true, false, true]),
            (expression("app", "Exists", &[]), [false, true, true]),
            (expression("app", "DoesNotExist", &[]), [true, false, false]),
            (expression("x", "In", &[""]), [false, false, true]),
            (LabelSelector::default(), [true, true, true]),
        ] {
            let filter = Labels::new(Some(&one), &[]).unwrap();
            let found = [&none, &a, &b].map(|labels| filter.matches(labels));
            assert_eq!(found, expected, "{one:?}");
            assert_eq!(filter.queries().len(), 1);
            assert_eq!(filter.is_everything(), filter.queries() == [None]);
        }
        let either = Labels::new(None, &[app("a"), app("b")]).unwrap();
        assert_eq!([&none, &a, &b].map(|labels| either.matches(labels)), [false, true, true]);
        assert_eq!(either.queries(), [Some("app=a".to_owned()), Some("app=b".to_owned())]);
        for all in
            [Labels::new(None, &[]), Labels::new(None, &[app("a"), LabelSelector::default()])]
        {
            assert!(all.unwrap().is_everything());
        }
    }

    #[test]
    fn what_is_no_selector_is_named_by_field() {
        let (fine, long) = (app("a"), "a".repeat(64));
        for (one, any_of, expected) in [
            (Some(&fine), vec![app("b")], "spec.orLabelSelectors: give either"),
            (
                Some(&expression("app", "In", &[])),
                vec![],
                "spec.labelSelector: operator In of 'app' needs",
            ),
            (Some(&expression("app", "NotIn", &[])), vec![], "spec.labelSelector: operator NotIn"),
            (
                Some(&expression("app", "Exists", &["a"])),
                vec![],
                "spec.labelSelector: operator Exists",
            ),
            (
                Some(&expression("app", "Like", &["a"])),
                vec![],
                "spec.labelSelector: operator 'Like'",
            ),
            (
                Some(&expression("a/b/c", "Exists", &[])),
                vec![],
                "spec.labelSelector: 'a/b/c' is no key",
            ),
            (Some(&expression("", "Exists", &[])), vec![], "spec.labelSelector: '' is no key"),
            (Some(&app("a b")), vec![], "spec.labelSelector: 'a b' is no value"),
            (Some(&app(&long)), vec![], "spec.labelSelector: 'aaaa"),
            (None, vec![fine.clone(), app("-")], "spec.orLabelSelectors[1]: '-' is no value"),
        ] {
            let invalid = Labels::new(one, &any_of).unwrap_err();
            assert_eq!(invalid.len(), 1, "{invalid:?}");
            assert!(invalid[0].to_string().starts_with(expected), "{}", invalid[0]);
        }
    }
}
