//! What a location's status says: pure.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::ResourceExt;

use super::check::Usable;
use super::passphrase::EXPORTED;
use crate::api::common::duration;
use crate::api::location::{BackupStorageLocationStatus, LocationPhase};
use crate::api::{BackupStorageLocation, Timestamp};

/// How often a location is validated, unless it says otherwise.
const VALIDATE_EVERY: Duration = Duration::from_secs(60);

/// So many nodes that cannot reach a location are named: there may be thousands, and an object has a size.
const NODES_NAMED: usize = 10;

/// What the agents said of reaching the store, by node: why they cannot, or nothing.
pub type Reach = BTreeMap<String, Option<String>>;

/// How long after a validation the next one is due. `None`: never.
pub fn frequency(location: &BackupStorageLocation) -> Option<Duration> {
    let text = location.spec.validation_frequency.as_deref().unwrap_or_default();
    if text.is_empty() {
        return Some(VALIDATE_EVERY);
    }
    match duration("spec.validationFrequency", text) {
        Ok(every) => (!every.is_zero()).then_some(every),
        Err(_) => Some(VALIDATE_EVERY),
    }
}

/// The status after a check.
pub fn status(
    location: &BackupStorageLocation,
    checked: Result<&Usable, &String>,
    checked_at: Timestamp,
    reach: &Reach,
    now: Timestamp,
) -> BackupStorageLocationStatus {
    let old = location.status.clone().unwrap_or_default();
    let name = location.name_any();
    let mut remarks = Vec::new();
    if let Err(why) = checked {
        remarks.push(format!("BackupStorageLocation \"{name}\" is unavailable: {why}"));
    }
    let mut cut_off: Vec<String> = reach
        .iter()
        .filter_map(|(node, error)| Some(format!("{node} ({})", error.as_ref()?)))
        .collect();
    let others = cut_off.len().saturating_sub(NODES_NAMED);
    if others > 0 {
        cut_off.truncate(NODES_NAMED);
        cut_off.push(format!("{others} more"));
    }
    if !cut_off.is_empty() {
        remarks.push(format!("not reachable from nodes: {}", cut_off.join(", ")));
    }
    if let Ok(usable) = checked {
        remarks.extend(usable.remarks.iter().cloned());
    }
    let text = location.spec.validation_frequency.as_deref().filter(|text| !text.is_empty());
    remarks.extend(text.and_then(|text| duration("spec.validationFrequency", text).err()));
    let mut conditions = old.conditions.unwrap_or_default();
    for condition in conditions_of(checked, reach, &cut_off) {
        set(&mut conditions, condition, now);
    }
    BackupStorageLocationStatus {
        phase: Some(match checked {
            Ok(_) => LocationPhase::Available,
            Err(_) => LocationPhase::Unavailable,
        }),
        last_validation_time: Some(Time(checked_at)),
        message: (!remarks.is_empty()).then(|| remarks.join("; ")),
        conditions: Some(conditions),
        ..old
    }
}

struct Said {
    kind: &'static str,
    status: &'static str,
    reason: &'static str,
    message: String,
}

// No message is empty: API servers of 1.20 take an empty string for null.
fn conditions_of(
    checked: Result<&Usable, &String>,
    reach: &Reach,
    cut_off: &[String],
) -> Vec<Said> {
    let said = |kind, status, reason, message: &str| Said {
        kind,
        status,
        reason,
        message: message.to_owned(),
    };
    let mut all = vec![match checked {
        Ok(_) => said(
            "Available",
            "True",
            "Validated",
            "an object was written, read and deleted, or only listed",
        ),
        Err(why) => said("Available", "False", "ValidationFailed", why),
    }];
    if let Ok(usable) = checked {
        all.push(if usable.exported {
            said("KeyNotExported", "False", "Acknowledged", "the operator keeps a copy")
        } else {
            said("KeyNotExported", "True", "NotAcknowledged", &export_advice(&usable.secret))
        });
    }
    all.push(if reach.is_empty() {
        said("ReachableFromNodes", "Unknown", "NotProbed", "no agent has tried yet")
    } else if cut_off.is_empty() {
        let message = format!("{} nodes reach it", reach.len());
        said("ReachableFromNodes", "True", "Probed", &message)
    } else {
        said("ReachableFromNodes", "False", "Unreachable", &cut_off.join(", "))
    });
    all
}

/// What the operator has to do about a passphrase that is only in the cluster.
pub fn export_advice(secret: &str) -> String {
    format!(
        "without the passphrase in Secret '{secret}' no backup can be restored: keep a copy outside of \
         the cluster, then annotate the Secret with {EXPORTED}=true"
    )
}

fn set(conditions: &mut Vec<Condition>, said: Said, now: Timestamp) {
    let known = conditions.iter_mut().find(|condition| condition.type_ == said.kind);
    let made = Condition {
        type_: said.kind.to_owned(),
        status: said.status.to_owned(),
        reason: said.reason.to_owned(),
        message: said.message,
        last_transition_time: Time(now),
        observed_generation: None,
    };
    match known {
        Some(known) => {
            let since = if known.status == made.status {
                known.last_transition_time.clone()
            } else {
                made.last_transition_time.clone()
            };
            *known = Condition { last_transition_time: since, ..made };
        }
        None => conditions.push(made),
    }
}

/// Locations that lose `spec.default`, because a newer one has it, too.
pub fn not_default_any_more<'a>(
    locations: impl Iterator<Item = &'a BackupStorageLocation>,
) -> Vec<String> {
    let mut all: Vec<_> =
        locations.filter(|location| location.spec.default == Some(true)).collect();
    all.sort_by_key(|location| {
        let created = location.metadata.creation_timestamp.as_ref().map(|time| time.0);
        (created, location.name_any())
    });
    let _newest = all.pop();
    all.into_iter().map(ResourceExt::name_any).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn usable(exported: bool) -> Usable {
        Usable {
            repository_exists: true,
            repository: proto::v1::Repository::default(),
            previous_passphrase: Vec::new(),
            secret: "the-secret".to_owned(),
            exported,
            remarks: vec!["spec.config.x is ignored".to_owned()],
        }
    }

    fn condition<'a>(status: &'a BackupStorageLocationStatus, kind: &str) -> &'a Condition {
        let all = status.conditions.as_ref().unwrap();
        all.iter().find(|condition| condition.type_ == kind).unwrap()
    }

    #[test]
    fn the_status_tells_what_the_operator_has_to_know() {
        let mut location = BackupStorageLocation::default();
        location.metadata.name = Some("here".to_owned());
        let reach =
            Reach::from([("a".to_owned(), None), ("b".to_owned(), Some("no route".into()))]);
        let first = status(&location, Ok(&usable(false)), at(10), &reach, at(11));
        assert_eq!(first.phase, Some(LocationPhase::Available));
        let message = first.message.clone().unwrap();
        assert!(message.contains("b (no route)") && message.contains("x is ignored"), "{message}");
        let key = condition(&first, "KeyNotExported");
        assert_eq!(key.status, "True");
        assert!(key.message.contains("'the-secret'") && key.message.contains(EXPORTED));
        assert_eq!(condition(&first, "ReachableFromNodes").status, "False");
        location.status = Some(first);
        let second = status(&location, Ok(&usable(true)), at(20), &Reach::new(), at(21));
        assert_eq!(condition(&second, "KeyNotExported").status, "False");
        assert_eq!(condition(&second, "KeyNotExported").last_transition_time.0, at(21));
        assert_eq!(condition(&second, "Available").last_transition_time.0, at(11));
        assert_eq!(condition(&second, "ReachableFromNodes").status, "Unknown");
        let third = status(&location, Err(&"no".to_owned()), at(30), &Reach::new(), at(31));
        assert_eq!(third.phase, Some(LocationPhase::Unavailable));
        assert!(third.message.as_ref().unwrap().ends_with("is unavailable: no"));
        assert_eq!(
            condition(&third, "KeyNotExported").status,
            "True",
            "nothing new is known of it"
        );
    }

    #[test]
    fn a_few_of_many_nodes_that_are_cut_off_are_named() {
        let reach = (0..5000).map(|n| (format!("node-{n:04}"), Some("no route".repeat(100))));
        let all = status(
            &BackupStorageLocation::default(),
            Ok(&usable(true)),
            at(0),
            &reach.collect(),
            at(0),
        );
        let message = all.message.clone().unwrap();
        assert!(message.contains("node-0009") && message.contains("4990 more"), "{message}");
        assert!(serde_json::to_string(&all).unwrap().len() < 20_000);
    }

    #[test]
    fn the_newest_default_stays_the_only_one() {
        let location = |name: &str, default: bool, created: &str| -> BackupStorageLocation {
            serde_json::from_value(json!({
                "apiVersion": "velero.io/v1", "kind": "BackupStorageLocation",
                "metadata": {"name": name, "creationTimestamp": created},
                "spec": {"provider": "aws", "default": default, "objectStorage": {"bucket": "b"}},
            }))
            .unwrap()
        };
        let all = [
            location("newest", true, "2026-01-03T00:00:00Z"),
            location("old", true, "2026-01-01T00:00:00Z"),
            location("other", false, "2026-01-04T00:00:00Z"),
            location("middle", true, "2026-01-02T00:00:00Z"),
        ];
        assert_eq!(not_default_any_more(all.iter()), ["old", "middle"]);
        assert!(not_default_any_more(all[..1].iter()).is_empty());
    }

    #[test]
    fn validations_are_as_frequent_as_told() {
        let mut location = BackupStorageLocation::default();
        for (text, seconds) in [("", Some(60)), ("5m", Some(300)), ("0s", None), ("x", Some(60))] {
            location.spec.validation_frequency = Some(text.to_owned());
            assert_eq!(frequency(&location), seconds.map(Duration::from_secs), "{text}");
        }
    }
}
