//! Retention: which snapshots of each lineage a policy keeps.
//!
//! Pure: facts, a policy and the time in, one decision a snapshot out; whoever carries it out marks
//! the others forgotten. The rules are those restic's users know: snapshots are looked at from the
//! newest to the oldest, each rule keeps the newest of every period until it has kept its number, and
//! a snapshot stays if any rule keeps it. Lineages are judged apart, so that a volume that is backed
//! up often does not push out another.
//!
//! A snapshot that is dated after `now` comes from a machine whose clock was wrong. It is kept and
//! counts for no rule: otherwise one such snapshot would make all others look old.

use std::collections::BTreeMap;
use std::fmt;

use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, ZonedDateTime};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::id::SnapshotId;
use crate::record::Snapshot;

/// What is kept.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// The newest, whatever their age.
    pub keep_last: u32,
    /// The newest of each of the last hours that have one.
    pub keep_hourly: u32,
    /// The newest of each of the last days that have one.
    pub keep_daily: u32,
    /// The newest of each of the last ISO weeks that have one.
    pub keep_weekly: u32,
    /// The newest of each of the last months that have one.
    pub keep_monthly: u32,
    /// The newest of each of the last years that have one.
    pub keep_yearly: u32,
    /// All that are at most this much older than the newest of their lineage.
    pub keep_within: Option<Span>,
}

impl Policy {
    /// Whether it has no rule, and so would keep nothing.
    pub fn is_empty(&self) -> bool {
        let counts = self.rules().map(|(_, count, _)| count);
        self.keep_last == 0
            && counts == [0; 5]
            && self.keep_within.is_none_or(|span| !span.is_positive())
    }

    fn rules(&self) -> [Rule; 5] {
        [
            ("hourly", self.keep_hourly, |at| {
                // The offset tells the two hours apart that a clock set back goes through.
                let hour = i32::from(at.hour());
                [at.year().into(), at.month().into(), at.day().into(), hour, at.offset().seconds()]
            }),
            ("daily", self.keep_daily, |at| {
                [at.year().into(), at.month().into(), at.day().into(), 0, 0]
            }),
            ("weekly", self.keep_weekly, |at| {
                let week = at.iso_week_date();
                [week.year().into(), week.week().into(), 0, 0, 0]
            }),
            ("monthly", self.keep_monthly, |at| [at.year().into(), at.month().into(), 0, 0, 0]),
            ("yearly", self.keep_yearly, |at| [at.year().into(), 0, 0, 0, 0]),
        ]
    }
}

/// Name of a calendar rule, how many it keeps, and in which period a time lies.
type Rule = (&'static str, u32, fn(&ZonedDateTime) -> Period);

/// Equal for two times in the same hour, day, …
type Period = [i32; 5];

/// What is to become of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// The snapshot.
    pub id: SnapshotId,
    /// Its lineage.
    pub lineage: String,
    /// When it was begun.
    pub started: Timestamp,
    /// Whether it stays.
    pub keep: bool,
    /// The rules that keep it.
    pub reasons: Vec<String>,
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.keep { "keep" } else { "forget" };
        write!(f, "{verb:6} {} {} {}", self.id.short(), self.started, self.lineage)?;
        if self.keep { write!(f, " ({})", self.reasons.join(", ")) } else { Ok(()) }
    }
}

/// Decides about every snapshot: by lineage, within it from the newest to the oldest.
///
/// # Errors
/// `Invalid` when the policy has no rule, or its span cannot be subtracted from a date.
pub fn plan(
    snapshots: &[(SnapshotId, &Snapshot)],
    policy: &Policy,
    now: Timestamp,
    tz: &TimeZone,
) -> Result<Vec<Decision>> {
    if policy.is_empty() {
        return Err(Error::invalid(
            "the policy keeps nothing: say at least one of --keep-last, --keep-hourly, \
             --keep-daily, --keep-weekly, --keep-monthly, --keep-yearly, --keep-within",
        ));
    }
    let mut lineages: BTreeMap<&str, Vec<(Timestamp, SnapshotId)>> = BTreeMap::new();
    for (id, snapshot) in snapshots {
        lineages.entry(&snapshot.lineage).or_default().push((snapshot.started, *id));
    }
    let mut decisions = Vec::with_capacity(snapshots.len());
    for (lineage, mut members) in lineages {
        members.sort_unstable_by(|a, b| b.cmp(a));
        let future = members.partition_point(|(started, _)| *started > now);
        let decide = |(started, id): (Timestamp, SnapshotId), reasons: Vec<String>| Decision {
            id,
            lineage: lineage.to_owned(),
            started,
            keep: !reasons.is_empty(),
            reasons,
        };
        let (ahead, rest) = members.split_at(future);
        let odd = || vec!["dated in the future".to_owned()];
        decisions.extend(ahead.iter().map(|member| decide(*member, odd())));
        let reasons = apply(rest, policy, tz)?;
        decisions.extend(rest.iter().zip(reasons).map(|(member, why)| decide(*member, why)));
    }
    Ok(decisions)
}

/// The reasons to keep each of the snapshots of one lineage, the newest first.
fn apply(
    members: &[(Timestamp, SnapshotId)],
    policy: &Policy,
    tz: &TimeZone,
) -> Result<Vec<Vec<String>>> {
    let local = |at: &Timestamp| at.to_zoned_datetime(tz.clone());
    let mut reasons = vec![Vec::new(); members.len()];
    for (at, reasons) in reasons.iter_mut().take(policy.keep_last as usize).enumerate() {
        reasons.push(format!("last {}", at + 1));
    }
    for (rule, count, period) in policy.rules() {
        let (mut kept, mut last) = (0, None);
        for ((started, _), reasons) in members.iter().zip(&mut reasons) {
            if kept == count {
                break;
            }
            let period = Some(period(&local(started)));
            if period != last {
                kept += 1;
                reasons.push(format!("{rule} {kept}"));
            }
            last = period;
        }
    }
    if let (Some(span), Some((newest, _))) = (policy.keep_within, members.first()) {
        let from = local(newest).checked_sub(span).map_err(|error| {
            Error::invalid(format!("--keep-within {span} cannot be applied: {error}"))
        })?;
        for ((started, _), reasons) in members.iter().zip(&mut reasons) {
            if *started >= from.timestamp() {
                reasons.push(format!("within {span}"));
            }
        }
    }
    Ok(reasons)
}

#[cfg(test)]
mod tests {
    use jiff::ToSpan;

    use super::*;
    use crate::id::{BlobId, PackId};
    use crate::tree::NodeRef;

    fn snapshot(lineage: &str, started: &str) -> Snapshot {
        let started = started.parse().unwrap();
        Snapshot {
            root: NodeRef { id: BlobId([0; 32]), pack: PackId([0; 16]), ordinal: 0 },
            level: 0,
            lineage: lineage.into(),
            host: String::new(),
            path: String::new(),
            tags: BTreeMap::new(),
            started,
            finished: started,
            parent: None,
            summary: crate::record::Summary::default(),
            sparse: crate::tree::Liveness::default(),
            program: String::new(),
            copy_of: None,
        }
    }

    /// The kept ones of snapshots at `times`, by their number.
    fn kept(times: &[&str], policy: &Policy, tz: &TimeZone) -> Vec<u8> {
        let snapshots: Vec<_> = times.iter().map(|time| snapshot("a", time)).collect();
        let named: Vec<_> =
            snapshots.iter().enumerate().map(|(at, s)| (SnapshotId([at as u8; 16]), s)).collect();
        let now = "2026-06-01T00:00:00Z".parse().unwrap();
        let plan = plan(&named, policy, now, tz).unwrap();
        assert_eq!(plan.len(), times.len());
        let mut kept: Vec<_> = plan.iter().filter(|d| d.keep).map(|d| d.id.0[0]).collect();
        kept.sort_unstable();
        kept
    }

    #[test]
    fn each_rule_keeps_the_newest_of_each_period() {
        let times = [
            "2024-12-30T10:00:00Z", // 0: a Monday, ISO week 1 of 2025
            "2025-01-02T10:00:00Z", // 1: the same week, another year
            "2025-01-31T23:00:00Z", // 2
            "2025-02-01T00:00:00Z", // 3
            "2025-02-01T00:59:59Z", // 4: the same hour
            "2025-02-01T01:00:00Z", // 5
            "2025-02-03T12:00:00Z", // 6: Monday
        ];
        let none = Policy::default;
        let table: [(&str, Policy, &[u8]); 10] = [
            ("last", Policy { keep_last: 2, ..none() }, &[5, 6]),
            ("more than there are", Policy { keep_last: 99, ..none() }, &[0, 1, 2, 3, 4, 5, 6]),
            ("hourly", Policy { keep_hourly: 3, ..none() }, &[4, 5, 6]),
            ("hourly, gaps count not", Policy { keep_hourly: 4, ..none() }, &[2, 4, 5, 6]),
            ("daily", Policy { keep_daily: 3, ..none() }, &[2, 5, 6]),
            ("weekly", Policy { keep_weekly: 3, ..none() }, &[1, 5, 6]),
            ("monthly", Policy { keep_monthly: 3, ..none() }, &[0, 2, 6]),
            ("yearly", Policy { keep_yearly: 1, ..none() }, &[6]),
            ("within", Policy { keep_within: Some(60.hours()), ..none() }, &[3, 4, 5, 6]),
            ("any rule keeps", Policy { keep_last: 1, keep_yearly: 2, ..none() }, &[0, 6]),
        ];
        for (name, policy, expected) in table {
            assert_eq!(kept(&times, &policy, &TimeZone::UTC), expected, "{name}");
        }
    }

    #[test]
    fn periods_are_those_of_the_time_zone() {
        let times = ["2025-02-01T22:30:00Z", "2025-02-01T23:30:00Z"];
        let policy = Policy { keep_daily: 9, ..Policy::default() };
        assert_eq!(kept(&times, &policy, &TimeZone::UTC), [1]);
        assert_eq!(kept(&times, &policy, &TimeZone::fixed(jiff::tz::offset(1))), [0, 1]);
    }

    #[test]
    fn within_counts_calendar_units_from_the_newest() {
        let times = ["2025-02-28T11:59:59Z", "2025-02-28T12:00:00Z", "2025-03-31T12:00:00Z"];
        let policy = Policy { keep_within: Some(1.month()), ..Policy::default() };
        assert_eq!(kept(&times, &policy, &TimeZone::UTC), [1, 2]);
    }

    #[test]
    fn a_snapshot_from_the_future_is_kept_and_counts_for_no_rule() {
        let times = ["2025-01-01T00:00:00Z", "2025-01-02T00:00:00Z", "2099-01-01T00:00:00Z"];
        let policy = Policy { keep_last: 1, ..Policy::default() };
        assert_eq!(kept(&times, &policy, &TimeZone::UTC), [1, 2]);
    }

    #[test]
    fn lineages_are_judged_apart_and_reasons_are_told() {
        let (a, b) = (snapshot("a", "2025-01-01T00:00:00Z"), snapshot("b", "2024-01-01T00:00:00Z"));
        let old = snapshot("a", "2024-06-01T00:00:00Z");
        let id = |n| SnapshotId([n; 16]);
        let policy = Policy { keep_last: 1, keep_daily: 1, ..Policy::default() };
        let now = "2026-06-01T00:00:00Z".parse().unwrap();
        let all = [(id(1), &old), (id(2), &a), (id(3), &b)];
        let text: Vec<_> = plan(&all, &policy, now, &TimeZone::UTC)
            .unwrap()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            text,
            [
                "keep   02020202 2025-01-01T00:00:00Z a (last 1, daily 1)",
                "forget 01010101 2024-06-01T00:00:00Z a",
                "keep   03030303 2024-01-01T00:00:00Z b (last 1, daily 1)",
            ]
        );
    }

    #[test]
    fn a_policy_without_rules_is_refused() {
        let now = Timestamp::UNIX_EPOCH;
        for policy in
            [Policy::default(), Policy { keep_within: Some(Span::new()), ..Policy::default() }]
        {
            assert!(plan(&[], &policy, now, &TimeZone::UTC).is_err());
        }
    }
}
