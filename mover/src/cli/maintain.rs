//! Taking care of a repository: `check`, `forget`, `prune` and `stats`.

use anyhow::Result;
use chunkstore::check::{self, CheckOptions, Finding, ReadData};
use chunkstore::gc::{self, PruneSettings, RepackSettings};
use chunkstore::retention;
use serde::Serialize;

use super::args::{Check, Forget, Global, Prune};
use super::output::Output;
use super::{DONE, FAILED, INCOMPLETE, now, secret, snapshot};
use crate::repository::SESSION_GRACE;

pub(super) fn check(global: &Global, args: &Check, output: &Output) -> Result<u8> {
    let resources = secret::resources(global)?;
    let repository = secret::open(global)?;
    let progress = |what: &str| tell(global, output, what);
    let mut report = |finding: Finding| {
        output.line(&finding);
        output.object(&finding);
    };
    if args.repair_index {
        let summary = check::repair_index(&repository, &mut report, &progress)?;
        output.line(&summary);
        output.summary(global, &summary);
        return Ok(if summary.packs_damaged > 0 { INCOMPLETE } else { DONE });
    }
    let read_data = match (args.read_data, args.read_data_subset) {
        (true, _) => ReadData::All,
        (false, Some(percent)) => ReadData::Percent(percent),
        (false, None) => ReadData::None,
    };
    let unlock = secret::unlock(global, repository.keys().repository)?;
    let options =
        CheckOptions { read_data, threads: resources.check_threads(), unlock: Some(unlock) };
    let summary = check::check(&repository, &options, &mut report, &progress)?;
    output.line(&summary);
    output.summary(global, &summary);
    Ok(if summary.errors > 0 { FAILED } else { DONE })
}

/// Tells people how a long job goes on.
fn tell(global: &Global, output: &Output, what: &str) {
    if !global.quiet && !output.json {
        output.note(what);
    }
}

pub(super) fn forget(global: &Global, args: &Forget, output: &Output) -> Result<u8> {
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
            output.line(decision);
        }
        output.object(&decisions);
        forgotten.extend(decisions.iter().filter(|one| !one.keep).map(|one| one.id));
    } else {
        for name in &args.snapshots {
            let (id, what) =
                snapshot::find_to_forget(&repository, name, args.lineage.as_deref(), output)?;
            output.line(format!("forget {} {what}", id.short()));
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
        forgotten: &'a [chunkstore::id::SnapshotId],
        dry_run: bool,
    }
    let dry_run = args.dry_run;
    let would = if dry_run { "would be " } else { "" };
    output.line(format!("{} snapshots {would}forgotten", forgotten.len()));
    output.summary(global, &Forgot { forgotten: &forgotten, dry_run });
    if args.prune && !dry_run {
        drop(repository);
        return prune(global, &Prune::default(), output);
    }
    Ok(DONE)
}

pub(super) fn prune(global: &Global, args: &Prune, output: &Output) -> Result<u8> {
    let repository =
        if args.dry_run { secret::open(global)? } else { secret::open_to_write(global)? };
    let writer = format!(
        "{} process {}",
        rustix::system::uname().nodename().to_string_lossy(),
        std::process::id()
    );
    let repack = RepackSettings {
        max_unused_percent: args.max_unused,
        max_bytes: args.max_repack.unwrap_or(u64::MAX),
        pack_target_bytes: secret::resources(global)?.pack_target_bytes,
    };
    let settings = PruneSettings {
        grace: args.grace.unwrap_or(SESSION_GRACE),
        dry_run: args.dry_run,
        writer,
        repack: (args.max_unused < 100.0).then_some(repack),
    };
    let progress = |what: &str| tell(global, output, what);
    let report = gc::prune(&repository, &settings, now(), &progress)?;
    output.line(&report);
    output.summary(global, &report);
    Ok(DONE)
}

pub(super) fn stats(global: &Global, output: &Output) -> Result<u8> {
    let repository = secret::open(global)?;
    let stats = gc::stats(&repository, &|what| tell(global, output, what))?;
    let register = repository.register();
    output.line(stats);
    output.line(format!("commits    decided by {register}"));
    #[derive(Serialize)]
    struct Line {
        #[serde(flatten)]
        stats: gc::Stats,
        register: chunkstore::repository::Register,
    }
    output.summary(global, &Line { stats, register });
    Ok(DONE)
}
