//! Carrying out one job, on the thread that calls.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use chunkstore::check::{self, CheckOptions, ReadData};
use chunkstore::codec::compress::Level;
use chunkstore::gc::{self, PruneSettings, RepackSettings};
use chunkstore::id::SnapshotId;
use chunkstore::record::{Snapshot, Summary};
use chunkstore::repository::Repository;
use chunkstore::{Error, ErrorKind};
use objects::ObjectStore;
use objects::s3::{SharedKey, Stop};
use proto::v1::finished::Outcome;
use proto::v1::job::Work;
use proto::v1::{
    Backup, Check, Checked, FailureKind, Finished, Forget, Forgotten, Job, Prune, Pruned, Restore,
    Restored, Saved,
};

use super::config::Config;
use super::failure::{Failed, Result, in_repository, opening, shorten, with_volume};
use super::monitor::{Ending, Far, JobMonitor, Signs, Verdict, Watch};
use super::repositories::{self, CacheUse, access_key};
use super::restored;
use super::volume::{self, Opened};
use crate::backup::{Request, backup};
use crate::fs::{Dir, Listing};
use crate::monitor::Monitor;
use crate::repository::SESSION_GRACE;
use crate::restore::{Overwrite, Request as RestoreRequest, RestoreOptions, restore};

/// Findings of a check that are told, and bytes of each.
const FIRST_FINDINGS: usize = 20;
const FINDING_BYTES_MAX: usize = 500;

/// The handle of a running job, for whoever watches it.
pub(super) struct Control {
    pub(super) monitor: JobMonitor,
    key: SharedKey,
    location: String,
    stall_seconds: u32,
    stop: Stop,
    store: OnceLock<Arc<dyn ObjectStore>>,
    watch: Mutex<Watch>,
}

impl Control {
    pub(super) fn new(job: &Job, now: Instant) -> Self {
        let span = tracing::info_span!("job", id = %job.id, subject = %job.subject);
        let stall = (job.stall_seconds > 0).then(|| Duration::from_secs(job.stall_seconds.into()));
        let asks = !matches!(job.work, Some(Work::Prune(_) | Work::Check(_)));
        let repository = job.repository.clone().unwrap_or_default();
        Self {
            monitor: JobMonitor::new(span),
            key: SharedKey::new(access_key(repository.credentials.as_ref())),
            location: repository.location,
            stall_seconds: job.stall_seconds,
            stop: Stop::default(),
            store: OnceLock::new(),
            watch: Mutex::new(Watch::new(stall, asks, now)),
        }
    }

    /// Uses other credentials, if it is a job on `location`.
    pub(super) fn renew(&self, location: &str, credentials: Option<&proto::v1::Credentials>) {
        if self.location == location {
            self.key.exchange(access_key(credentials));
        }
    }

    /// Looks whether the job gets on, and has it end if not. Whether it is to be given up.
    pub(super) fn watch(&self, now: Instant) -> bool {
        let traffic = self.store.get().and_then(|store| store.traffic());
        let signs = Signs::of(self.monitor.far(), traffic);
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        match watch.look(signs, self.monitor.ending(), now) {
            Verdict::Fine => {}
            Verdict::Stalled => self.monitor.end(Ending::Stalled),
            Verdict::Stop => self.stop.stop(),
            Verdict::Leave => return true,
        }
        false
    }

    /// How far it is.
    pub(super) fn far(&self) -> Far {
        self.monitor.far()
    }

    /// What its store has sent and received.
    pub(super) fn traffic(&self) -> Option<objects::Traffic> {
        self.store.get().and_then(|store| store.traffic())
    }

    /// What came of it, when it is to end before it is done.
    pub(super) fn interrupted(&self, ending: Ending) -> Failed {
        match ending {
            Ending::Cancelled => Failed::new(FailureKind::Cancelled, "cancelled by the controller"),
            Ending::Shutdown => Failed::new(FailureKind::Cancelled, "the agent ends"),
            Ending::Stalled => {
                let message = format!(
                    "no progress for {} seconds: what it reads from or writes to does not answer",
                    self.stall_seconds
                );
                Failed::new(FailureKind::Stalled, message)
            }
        }
    }

    fn check(&self) -> Result<()> {
        if self.monitor.is_cancelled() {
            return Err(Failed::new(FailureKind::Cancelled, "cancelled"));
        }
        Ok(())
    }
}

/// Carries out `job`.
pub(super) fn carry_out(
    config: &Config,
    used: &CacheUse,
    job: &Job,
    control: &Control,
) -> Finished {
    let monitor = &control.monitor;
    let done = Task { config, used, job, control }.run();
    let outcome = match (done, monitor.ending()) {
        // When its requests were made to fail, a check takes everything for damaged.
        (Err(_) | Ok(Outcome::Checked(_)), Some(ending)) => Err(control.interrupted(ending)),
        (done, _) => done,
    };
    let outcome = outcome.unwrap_or_else(|failed| Outcome::Failure(failed.into_proto()));
    let mut finished =
        Finished { job_id: job.id.clone(), outcome: Some(outcome), ..Default::default() };
    monitor.warnings().tell(&mut finished);
    finished
}

struct Task<'a> {
    config: &'a Config,
    used: &'a CacheUse,
    job: &'a Job,
    control: &'a Control,
}

impl Task<'_> {
    fn run(&self) -> Result<Outcome> {
        let Some(work) = &self.job.work else {
            let message = "this agent does not know such work: upgrade it";
            return Err(Failed::new(FailureKind::Unsupported, message));
        };
        let Some(repository) = &self.job.repository else {
            return Err(Failed::new(FailureKind::Invalid, "the job names no repository"));
        };
        self.control.check()?;
        let (key, stop) = (self.control.key.clone(), self.control.stop.clone());
        let store = repositories::open_store(self.config, repository, key, stop, self.used)?;
        // Nobody else sets it.
        let _first = self.control.store.set(store.objects.clone());
        self.control.check()?;
        let open = |to_write| repositories::open(&store, repository, to_write);
        match work {
            Work::Open(work) => {
                let now = crate::now();
                repositories::open_or_create(&store, repository, work, now).map(Outcome::Opened)
            }
            Work::Backup(work) => self.backup(&open(true)?.0, work).map(Outcome::Saved),
            Work::Restore(work) => self.restore(&open(false)?.0, work).map(Outcome::Restored),
            Work::Forget(work) => self.forget(&open(false)?.0, work).map(Outcome::Forgotten),
            Work::Prune(work) => self.prune(&open(true)?.0, work).map(Outcome::Pruned),
            Work::Check(work) => {
                let (repository, unlock) = open(false)?;
                let options = CheckOptions {
                    read_data: read_data(work),
                    threads: self.config.each.check_threads(),
                    unlock: Some(unlock),
                };
                check(&repository, &options).map(Outcome::Checked)
            }
        }
    }

    fn volume(&self, volume: Option<&proto::v1::Volume>) -> Result<Opened> {
        let Some(volume) = volume else {
            return Err(Failed::new(FailureKind::Invalid, "the job names no volume"));
        };
        volume::open(&self.config.pods(), volume, &self.config.given.scratch)
    }

    fn backup(&self, repository: &Arc<Repository>, work: &Backup) -> Result<Saved> {
        if self.job.repeated
            && let Some((id, snapshot)) = self.saved_before(repository, &work.lineage)?
        {
            tracing::info!("saved before as snapshot {id}");
            self.control.monitor.recall(&snapshot.summary);
            return Ok(saved(id, snapshot.parent, &snapshot.summary, snapshot.path));
        }
        let Opened { folder, path, unmounted } = self.volume(work.volume.as_ref())?;
        if unmounted && self.is_empty(&folder, &path)? {
            return Err(volume::not_mounted(&path));
        }
        let parent = work.parent.parse::<SnapshotId>().ok();
        if let Some(last) = parent.and_then(|id| repository.snapshot(id).ok()) {
            self.control.monitor.expect(last.summary.bytes);
        }
        let mut tags: std::collections::BTreeMap<_, _> = work.tags.clone().into_iter().collect();
        tags.insert(proto::JOB_TAG.to_owned(), self.job.id.clone());
        let no_marks = |path: &[u8], _: bool| path == restored::FOLDER;
        let request = Request {
            source: path.clone().into(),
            opened: Some(folder.clone()),
            lineage: work.lineage.clone(),
            parent,
            host: work.host.clone(),
            tags,
            excludes: Some(&no_marks),
            exclude_caches: false,
            skip: None,
            one_file_system: false,
            changed_by: None,
            compression: Level::default(),
            dry_run: false,
            resources: self.config.each,
            scratch: self.config.given.scratch.clone(),
            now: crate::now(),
        };
        let outcome = backup(repository, &request, &crate::now, &self.control.monitor)
            .map_err(|error| with_volume(&error))?;
        let id = outcome.id.ok_or_else(|| {
            Failed::new(FailureKind::Other, "the backup ended without a snapshot")
        })?;
        if let Err(why) = self.still_there(work, &folder) {
            // What was read may be the empty folder that was left behind.
            let forgotten = repository.forget(id, crate::now());
            let stays = forgotten.err().map_or_else(String::new, |error| {
                format!("; snapshot {id} is not whole, and cannot be forgotten: {error}")
            });
            let message = format!("the volume vanished while it was saved: {why}{stays}");
            return Err(Failed::new(FailureKind::VolumeNotFound, message));
        }
        Ok(saved(id, outcome.parent, &outcome.summary, path))
    }

    /// Whether the volume is still the opened `folder`; if not, why.
    fn still_there(&self, work: &Backup, folder: &Dir) -> std::result::Result<(), String> {
        let now = self.volume(work.volume.as_ref()).map_err(|failed| failed.message)?;
        let path = now.path;
        let identity = |folder: &Dir| {
            let meta =
                folder.stat().map_err(|error| format!("cannot look at '{path}': {error}"))?;
            Ok::<_, String>((meta.dev, meta.ino))
        };
        if identity(folder)? == identity(&now.folder)? {
            Ok(())
        } else {
            Err(format!("there is another folder at '{path}' now"))
        }
    }

    /// The snapshot that this job made when it was assigned before.
    fn saved_before(
        &self,
        repository: &Repository,
        lineage: &str,
    ) -> Result<Option<(SnapshotId, Snapshot)>> {
        let is_its = |snapshot: &Snapshot| {
            snapshot.lineage == lineage && snapshot.tags.get(proto::JOB_TAG) == Some(&self.job.id)
        };
        repository.newest_snapshot(&is_its).map_err(|error| in_repository(&error))
    }

    fn is_empty(&self, folder: &Dir, path: &str) -> Result<bool> {
        let scratch = &self.config.given.scratch;
        let first = Listing::read(folder, self.config.each.listing_bytes(), scratch)
            .and_then(|mut names| names.next_entry().map(|first| first.is_none()));
        first.map_err(|error| super::failure::volume("read the folder", path, &error))
    }

    fn restore(&self, repository: &Repository, work: &Restore) -> Result<Restored> {
        let no_snapshot = |why: &dyn std::fmt::Display| {
            let message = format!("snapshot '{}' cannot be restored: {why}", work.snapshot);
            Failed::new(FailureKind::NoSnapshot, message)
        };
        let id: SnapshotId = work.snapshot.parse().map_err(|error: Error| no_snapshot(&error))?;
        let snapshot = repository.snapshot(id).map_err(|error| match error.kind() {
            ErrorKind::NotFound => no_snapshot(&error),
            _ => in_repository(&error),
        })?;
        let monitor = &self.control.monitor;
        monitor.expect(snapshot.summary.bytes);
        let Opened { folder, path, unmounted } = self.volume(work.volume.as_ref())?;
        if unmounted {
            return Err(volume::not_mounted(&path));
        }
        if !work.done_marker.is_empty() {
            // The pod may run by now: what it has written since must stay.
            if self.job.repeated && restored::is_marked(&folder, &work.done_marker) {
                tracing::info!("restored before");
                return Ok(Restored {
                    bytes: snapshot.summary.bytes,
                    bytes_written: 0,
                    files: snapshot.summary.files,
                    folders: snapshot.summary.dirs,
                });
            }
            // Nobody shall start on the volume while it is written.
            restored::unmark(&folder).map_err(|error| {
                super::failure::volume("remove the marks of earlier restores from", &path, &error)
            })?;
        }
        let summary = restore(&RestoreRequest {
            repository,
            root: (snapshot.root, snapshot.level),
            subpath: b"",
            target: path.as_ref(),
            opened: Some(folder.clone()),
            filter: None,
            options: RestoreOptions {
                overwrite: Overwrite::Always,
                threads: self.config.each.fetch_threads(repository.store().read_cost()),
                window_bytes: self.config.each.window_bytes(),
                scratch: self.config.given.scratch.clone(),
                ..RestoreOptions::default()
            },
            monitor,
        })
        .map_err(|error| with_volume(&error))?;
        if summary.files_failed > 0 {
            let refused = summary.files_refused > 0;
            let kind = if refused { FailureKind::VolumeError } else { FailureKind::Damaged };
            let message = format!(
                "{} files or folders could not be restored, all others were; the first: {}",
                summary.files_failed,
                monitor.first_missing()
            );
            return Err(Failed::new(kind, message));
        }
        // Who is told that all is there must not be told when the job was cancelled.
        self.control.check()?;
        if !work.done_marker.is_empty() {
            restored::mark(&folder, &work.done_marker).map_err(|error| {
                super::failure::volume("mark as restored the volume", &path, &error)
            })?;
        }
        Ok(Restored {
            bytes: snapshot.summary.bytes,
            bytes_written: summary.bytes_written,
            files: summary.files,
            folders: summary.dirs,
        })
    }

    fn forget(&self, repository: &Repository, work: &Forget) -> Result<Forgotten> {
        for name in &work.snapshots {
            self.control.check()?;
            let id: SnapshotId = name.parse().map_err(|error: Error| {
                Failed::new(FailureKind::Invalid, format!("'{name}' is no snapshot: {error}"))
            })?;
            match repository.snapshot(id) {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    tracing::info!("snapshot {id} is not there (any more)");
                }
                Err(error) if error.kind() != ErrorKind::Corrupt => {
                    return Err(in_repository(&error));
                }
                // A damaged one can be forgotten, too.
                Ok(_) | Err(_) => {
                    repository.forget(id, crate::now()).map_err(|error| in_repository(&error))?;
                }
            }
            self.control.monitor.advance(1, 0);
        }
        Ok(Forgotten { snapshots: work.snapshots.len() as u64 })
    }

    fn prune(&self, repository: &Repository, work: &Prune) -> Result<Pruned> {
        let most = if work.max_repack_bytes == 0 { u64::MAX } else { work.max_repack_bytes };
        let repack = RepackSettings {
            max_unused_percent: f64::from(work.max_unused_permille) / 10.0,
            max_bytes: most,
            pack_target_bytes: self.config.each.pack_target_bytes,
        };
        let settings = PruneSettings {
            grace: SESSION_GRACE,
            dry_run: false,
            writer: format!("node {}: {}", self.config.given.node, self.job.subject),
            repack: (work.max_unused_permille < 1000).then_some(repack),
        };
        let progress = |what: &str| tracing::info!("{what}");
        let report = gc::prune(repository, &settings, crate::now(), &progress)
            .map_err(|error| in_repository(&error))?;
        Ok(Pruned {
            packs_deleted: report.packs_deleted,
            bytes_deleted: report.bytes_deleted,
            bytes_repacked: report.repacked.map_or(0, |repacked| repacked.bytes_copied),
            packs_waiting: report.waiting.iter().map(|waiting| waiting.packs).sum(),
        })
    }
}

fn read_data(work: &Check) -> ReadData {
    match work.read_data_permille {
        0 => ReadData::None,
        1000.. => ReadData::All,
        permille => ReadData::Percent(f64::from(permille) / 10.0),
    }
}

fn check(repository: &Repository, options: &CheckOptions) -> Result<Checked> {
    let mut findings = Vec::new();
    let mut report = |finding: check::Finding| {
        if findings.len() < FIRST_FINDINGS {
            findings.push(shorten(finding.to_string(), FINDING_BYTES_MAX));
        }
    };
    let progress = |what: &str| tracing::info!("{what}");
    let summary = check::check(repository, options, &mut report, &progress)
        .map_err(|error| opening(&error))?;
    Ok(Checked { errors: summary.errors, check_warnings: summary.warnings, findings })
}

fn saved(id: SnapshotId, parent: Option<SnapshotId>, summary: &Summary, path: String) -> Saved {
    Saved {
        snapshot: id.to_string(),
        bytes: summary.bytes,
        bytes_read: summary.bytes_read,
        bytes_stored: summary.bytes_stored,
        files: summary.files,
        folders: summary.dirs,
        path,
        parent: parent.map(|parent| parent.to_string()).unwrap_or_default(),
    }
}
