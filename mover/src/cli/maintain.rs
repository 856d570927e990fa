//! Taking care of a repository: `check`, `forget`, `prune` and `stats`.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, bail};
use chunkstore::gc::{self, PruneSettings, Stats};
use chunkstore::retention;
use serde::Serialize;

use super::args::{Check, Forget, Global, Prune};
use super::output::{Output, bytes};
use super::{DONE, INCOMPLETE, now, secret, snapshot};

pub(super) fn check(
    global: &Global,
    args: &Check,
    output: &Output,
    cancelled: &Arc<AtomicBool>,
) -> Result<u8> {
    let _ = (global, args, output, cancelled, INCOMPLETE);
    bail!("pending")
}

pub(super) fn forget(
    global: &Global,
    args: &Forget,
    output: &Output,
    cancelled: &Arc<AtomicBool>,
) -> Result<u8> {
    let repository = secret::open(global)?;
    let mut forgotten = Vec::new();
    if args.snapshots.is_empty() {
        let list = repository.list_snapshots()?;
        let wanted = |lineage: &str| args.lineage.as_ref().is_none_or(|name| name == lineage);
        let snapshots: Vec<_> = list
            .snapshots
            .iter()
            .filter(|(_, snapshot)| wanted(&snapshot.lineage))
            .map(|(id, snapshot)| (*id, snapshot))
            .collect();
        let policy = &args.policy;
        let policy = retention::Policy {
            keep_last: policy.keep_last,
            keep_hourly: policy.keep_hourly,
            keep_daily: policy.keep_daily,
            keep_weekly: policy.keep_weekly,
            keep_monthly: policy.keep_monthly,
            keep_yearly: policy.keep_yearly,
            keep_within: policy.keep_within,
        };
        let zone = jiff::tz::TimeZone::system();
        let decisions = retention::plan(&snapshots, &policy, now(), &zone)?;
        for decision in &decisions {
            output.line(decision)?;
        }
        output.object(&decisions)?;
        forgotten.extend(decisions.iter().filter(|one| !one.keep).map(|one| one.id));
    } else {
        for name in &args.snapshots {
            let (id, found) = snapshot::find(&repository, name, args.lineage.as_deref())?;
            output.line(format!(
                "forget {} {} {}",
                id.short(),
                found.started,
                found.lineage
            ))?;
            forgotten.push(id);
        }
    }
    if !args.dry_run {
        for id in &forgotten {
            repository.forget(*id, now())?;
        }
    }
    #[derive(Serialize)]
    struct Forgot<'a> {
        r#type: &'static str,
        forgotten: &'a [chunkstore::id::SnapshotId],
        dry_run: bool,
    }
    let dry_run = args.dry_run;
    let would = if dry_run { "would be " } else { "" };
    output.line(format!("{} snapshots {would}forgotten", forgotten.len()))?;
    output.object(&Forgot {
        r#type: "summary",
        forgotten: &forgotten,
        dry_run,
    })?;
    if args.prune && !dry_run {
        drop(repository);
        let grace = PruneSettings::default().grace;
        return prune(global, &Prune { grace, dry_run }, output, cancelled);
    }
    Ok(DONE)
}

pub(super) fn prune(
    global: &Global,
    args: &Prune,
    output: &Output,
    _cancelled: &Arc<AtomicBool>,
) -> Result<u8> {
    let repository = secret::open(global)?;
    let writer = format!(
        "{} process {}",
        rustix::system::uname().nodename().to_string_lossy(),
        std::process::id()
    );
    let settings = PruneSettings {
        grace: args.grace,
        dry_run: args.dry_run,
        writer,
    };
    let progress = |what: &str| {
        if !global.quiet {
            output.note(what);
        }
    };
    let report = gc::prune(&repository, &settings, now(), &progress)?;
    output.line(&report)?;
    output.object(&report)?;
    Ok(DONE)
}

pub(super) fn stats(global: &Global, output: &Output, _cancelled: &Arc<AtomicBool>) -> Result<u8> {
    let repository = secret::open(global)?;
    let stats: Stats = gc::stats(&repository, &|_| {})?;
    output.line(format!("{stats:?} {}", bytes(stats.data.bytes)))?;
    output.object(&stats)?;
    Ok(DONE)
}
