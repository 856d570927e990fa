//! `copy`: snapshots from one repository to another.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Result, bail};
use chunkstore::ErrorKind;
use chunkstore::codec::compress::Level;
use chunkstore::copy::{CopySettings, Job, Known, copy_snapshot};
use chunkstore::error::chain;
use chunkstore::id::SnapshotId;
use chunkstore::record::Snapshot;
use chunkstore::repository::Repository;
use serde::Serialize;

use super::args::{Copy, Global, Init};
use super::output::{Output, bytes};
use super::{DONE, INCOMPLETE, keys, now, secret, snapshot};

/// One snapshot, as JSON shows it.
#[derive(Serialize)]
struct Line {
    r#type: &'static str,
    snapshot: SnapshotId,
    #[serde(skip_serializing_if = "Option::is_none")]
    copy: Option<SnapshotId>,
    bytes_stored: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Default, Serialize)]
struct Summary {
    copied: u64,
    there_already: u64,
    failed: u64,
    bytes_stored: u64,
    dry_run: bool,
}

pub(super) fn run(
    global: &Global,
    args: &Copy,
    output: &Output,
    cancelled: &Arc<AtomicBool>,
) -> Result<u8> {
    let resources = secret::resources(global)?;
    let from = secret::open(&source(global, args))?;
    let to = open_destination(&destination(global, args), args, output)?;
    if from.keys().repository == to.keys().repository {
        bail!("both are the same repository: a copy would only double its snapshots");
    }
    let wanted = wanted(&from, args, output)?;
    let mut copies = copies(&from, &to)?;
    let all: HashMap<SnapshotId, Snapshot> = from.list_snapshots()?.snapshots.into_iter().collect();
    let mut known = Known::default();
    let machine = format!(
        "{} process {}",
        rustix::system::uname().nodename().to_string_lossy(),
        std::process::id()
    );
    let settings = CopySettings {
        writer: resources.writer(Level::default()),
        threads: resources.copy_threads(from.store().read_cost()),
        machine,
        cancelled: cancelled.clone(),
    };
    let mut summary = Summary { dry_run: args.dry_run, ..Summary::default() };
    for (id, snapshot) in &wanted {
        if copies.contains_key(id) {
            summary.there_already += 1;
            continue;
        }
        let what = format!("{} of {}, {}", id.short(), snapshot.lineage, snapshot.started);
        if args.dry_run {
            output.line(format!("would copy {what}"));
            summary.copied += 1;
            continue;
        }
        if !global.quiet && !output.json {
            output.note(format_args!("copying {what}"));
        }
        // The one copied before that is most like it.
        let parent = copies
            .iter()
            .filter_map(|(old, copy)| Some((all.get(old)?, copy)))
            .filter(|(old, _)| old.lineage == snapshot.lineage && old.started <= snapshot.started)
            .max_by_key(|(old, _)| old.started)
            .map(|(old, (copy_id, copy))| (old, (*copy_id, copy)));
        let job = Job { id: *id, snapshot, parent };
        match copy_snapshot(&from, &to, job, &mut known, &settings, now()) {
            Ok(copied) => {
                summary.copied += 1;
                summary.bytes_stored += copied.bytes_stored;
                output.line(format!(
                    "copied {what} as {}, {} stored",
                    copied.id.short(),
                    bytes(copied.bytes_stored)
                ));
                let bytes_stored = copied.bytes_stored;
                let copy = Some(copied.id);
                output.object(&Line {
                    r#type: "snapshot",
                    snapshot: *id,
                    copy,
                    bytes_stored,
                    error: None,
                });
                if let Some(chunkstore::record::Verdict::Snapshot(copy)) = to.verdict(copied.id)? {
                    copies.insert(*id, (copied.id, *copy));
                }
            }
            // The source has lost something of it; the others may be whole.
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => {
                summary.failed += 1;
                let why = chain(&error);
                output.note(format_args!("NOT COPIED {what}: {why}"));
                output.object(&Line {
                    r#type: "snapshot",
                    snapshot: *id,
                    copy: None,
                    bytes_stored: 0,
                    error: Some(why),
                });
            }
            Err(error) => return Err(error.into()),
        }
    }
    let would = if args.dry_run { "would be " } else { "" };
    let Summary { copied, there_already, failed, .. } = summary;
    output.line(format!(
        "{copied} snapshots {would}copied, {there_already} were there already, {} stored",
        bytes(summary.bytes_stored)
    ));
    if failed > 0 {
        output.line(format!("{failed} SNAPSHOTS ARE DAMAGED and were not copied: run 'check'"));
    }
    output.summary(global, &summary);
    Ok(if failed > 0 { INCOMPLETE } else { DONE })
}

/// The options as they are for the source.
fn source(global: &Global, args: &Copy) -> Global {
    let mut source = global.clone();
    source.repo = Some(args.from.clone());
    source.password_file.clone_from(&args.from_password_file);
    source.key_file.clone_from(&args.from_key_file);
    source.password_variable = "EBACKUP_FROM_PASSWORD";
    let s3 = &mut source.s3;
    for (of_source, given) in
        [(&mut s3.endpoint, &args.from_endpoint), (&mut s3.region, &args.from_region)]
    {
        if given.is_some() {
            of_source.clone_from(given);
        }
    }
    if args.from_credentials_file.is_some() {
        s3.credentials_file.clone_from(&args.from_credentials_file);
    }
    source
}

/// The options as they are for the destination.
fn destination(global: &Global, args: &Copy) -> Global {
    let mut destination = global.clone();
    if args.to.is_some() {
        destination.repo.clone_from(&args.to);
    }
    destination
}

fn open_destination(global: &Global, args: &Copy, output: &Output) -> Result<Arc<Repository>> {
    if !args.init {
        return if args.dry_run { secret::open(global) } else { secret::open_to_write(global) };
    }
    let exists =
        secret::store(global).ok().is_some_and(|store| Repository::identify(&*store).is_ok());
    if exists {
        secret::open_to_write(global)
    } else {
        keys::create(global, &Init::default(), output)
    }
}

/// The snapshots to copy, the oldest first, so that each can follow the one before.
fn wanted(from: &Repository, args: &Copy, output: &Output) -> Result<Vec<(SnapshotId, Snapshot)>> {
    let lineage = args.lineage.as_deref();
    if args.snapshots.is_empty() {
        let mut list = from.list_snapshots()?;
        for (name, error) in &list.damaged {
            output.note(format_args!("warning: {name} cannot be read: {}", chain(error)));
        }
        list.snapshots.retain(|(_, snapshot)| lineage.is_none_or(|name| name == snapshot.lineage));
        return Ok(list.snapshots);
    }
    let mut wanted = Vec::new();
    for name in &args.snapshots {
        let found = snapshot::find(from, name, lineage, output)?;
        if !wanted.iter().any(|(id, _)| *id == found.0) {
            wanted.push(found);
        }
    }
    wanted.sort_by_key(|(id, snapshot)| (snapshot.started, *id));
    Ok(wanted)
}

/// Copies that the destination has, by the name in the source.
fn copies(
    from: &Repository,
    to: &Repository,
) -> Result<HashMap<SnapshotId, (SnapshotId, Snapshot)>> {
    let mut copies = HashMap::new();
    for (id, snapshot) in to.list_snapshots()?.snapshots {
        if let Some(origin) = snapshot.copy_of
            && origin.repository == from.keys().repository
        {
            copies.insert(origin.snapshot, (id, snapshot));
        }
    }
    Ok(copies)
}
