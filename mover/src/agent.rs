//! The agent on a node: takes jobs from the controller, and reports what came of them.
//!
//! ```text
//!  controller <── stream (TLS, token) ──> connection      config: what it was told
//!                                            │ ^          health, metrics: by HTTP
//!                     Assign, Cancel, Recorded │ Finished, Progress
//!                                            v │
//!                                          jobs (pure state)
//!                                            │ ^
//!                        a thread for each   v │  monitor: progress, warnings, stalls
//!                                          work ── volume: the folder below the kubelet's
//!                                            └──── repositories: the stores, keys from memory
//! ```
//! * It keeps nothing on disk but copies of index segments: after a crash the controller assigns its jobs
//!   again, and a backup finds what was uploaded before.
//! * Jobs go on while there is no stream.
//! * It holds no rights in the cluster. It is root on the node, and whoever owns a volume is not trusted:
//!   see [`crate::fs`].
//! * The stream and HTTP are served by a small asynchronous runtime; jobs run on threads of their own.

mod config;
mod connection;
mod failure;
mod health;
mod jobs;
mod metrics;
mod monitor;
mod priority;
mod repositories;
mod restored;
mod volume;
mod work;

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use proto::v1::finished::Outcome;
use proto::v1::{FailureKind, Finished, Job, Renew};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};

pub use config::{Config, Given};
use failure::Failed;
use jobs::{Assigned, Cancelled, Jobs, failed_job};
use metrics::Metrics;
use monitor::Ending;
pub use priority::IoPriority;
use repositories::CacheUse;
pub use restored::wait as wait_for_restore;
use work::Control;

/// How often jobs are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How long jobs may take to end when the agent does: within the 30 seconds that Kubernetes gives a pod.
const END_WITHIN: Duration = Duration::from_secs(25);

/// How long the controller may take to hear of the last of them.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);

/// Runs the agent until a signal ends it.
///
/// # Errors
/// When something on this machine is not as it must be, or jobs hang for good.
pub fn run(config: Config) -> Result<()> {
    config.check_kubelet_root()?;
    config.make_folders()?;
    tracing::info!("ebackup agent {}: {config}", env!("CARGO_PKG_VERSION"));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("agent")
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(serve(config));
    // What is still being tried is not waited for.
    runtime.shutdown_background();
    result
}

async fn serve(config: Config) -> Result<()> {
    let address = config.given.http;
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot serve metrics at {address}: give another --http"))?;
    tracing::info!("metrics and health at http://{}", listener.local_addr()?);
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for signals")?;
    let agent = Arc::new(Agent::new(config));
    let health = tokio::spawn(health::serve(agent.clone(), listener));
    let connection = tokio::spawn(connection::keep(agent.clone()));
    let mut look = tokio::time::interval(LOOK_EVERY);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = look.tick() => agent.look(Instant::now())?,
        }
    }
    tracing::info!("ending: jobs that run are interrupted, and will be assigned again");
    agent.begin_ending();
    let begun = Instant::now();
    while agent.is_busy() && begun.elapsed() < END_WITHIN {
        look.tick().await;
        agent.look(Instant::now())?;
    }
    agent.close();
    // A controller that does not listen is not waited for.
    let _heard = tokio::time::timeout(CLOSE_WITHIN, connection).await;
    health.abort();
    tracing::info!("ended");
    Ok(())
}

/// What all parts of the agent share.
struct Agent {
    config: Config,
    jobs: Mutex<Jobs<Arc<Control>>>,
    cache_use: CacheUse,
    metrics: Metrics,
    /// Something has finished that the controller should hear of.
    changed: Notify,
    connected: AtomicBool,
    /// No more jobs are begun.
    ending: AtomicBool,
    /// The stream is to end, too.
    closing: watch::Sender<bool>,
}

impl Agent {
    fn new(config: Config) -> Self {
        Self {
            jobs: Mutex::new(Jobs::new(config.capacity)),
            metrics: Metrics::new(config.memory_bytes, config.capacity),
            config,
            cache_use: CacheUse::default(),
            changed: Notify::new(),
            connected: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            closing: watch::Sender::new(false),
        }
    }

    fn jobs(&self) -> MutexGuard<'_, Jobs<Arc<Control>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn assign(self: &Arc<Self>, job: Job) {
        if self.ending.load(Ordering::SeqCst) {
            return;
        }
        let (id, subject) = (job.id.clone(), job.subject.clone());
        match self.jobs().assign(job) {
            Assigned::New => tracing::info!("job {id} for {subject} was assigned"),
            Assigned::Known => tracing::debug!("job {id} was assigned again, and runs"),
            Assigned::Ended => tracing::debug!("job {id} was assigned again, and has ended"),
        }
        self.start_waiting();
    }

    fn cancel(&self, id: &str) {
        match self.jobs().cancel(id) {
            Cancelled::Running(control) => {
                tracing::info!("job {id} is cancelled");
                control.monitor.end(Ending::Cancelled);
            }
            Cancelled::Ended => tracing::info!("job {id} is cancelled, and does not run"),
        }
    }

    fn recorded(&self, id: &str) {
        self.jobs().recorded(id);
    }

    fn renew(&self, renew: &Renew) {
        let mut jobs = self.jobs();
        for control in jobs.running().values() {
            control.renew(&renew.location, renew.credentials.as_ref());
        }
        let waiting = jobs.waiting_mut().filter_map(|job| job.repository.as_mut());
        for repository in waiting.filter(|repository| repository.location == renew.location) {
            repository.credentials.clone_from(&renew.credentials);
        }
        tracing::info!("location '{}' has other credentials", renew.location);
    }

    /// Begins jobs that wait, as far as there is room.
    fn start_waiting(self: &Arc<Self>) {
        loop {
            let started = self.jobs().start(|job| Arc::new(Control::new(job, Instant::now())));
            let Some((job, control)) = started else {
                return;
            };
            let (agent, id) = (self.clone(), job.id.clone());
            let thread = std::thread::Builder::new().name("job".to_owned());
            if let Err(error) = thread.spawn(move || agent.carry_out(&job, &control)) {
                let message = format!("cannot start a thread for the job: {error}");
                self.jobs().finish(failed_job(&id, Failed::new(FailureKind::Other, message)));
                self.changed.notify_one();
            }
        }
    }

    /// Does a job, on a thread of its own.
    fn carry_out(self: Arc<Self>, job: &Job, control: &Control) {
        let span = control.monitor.span().clone().entered();
        let given = &self.config.given;
        if let Err(error) = priority::lower(given.nice, given.io_priority) {
            tracing::debug!("the priority cannot be set: {error}");
        }
        tracing::info!("begins");
        let begun = Instant::now();
        let done = std::panic::catch_unwind(AssertUnwindSafe(|| {
            work::carry_out(&self.config, &self.cache_use, job, control)
        }));
        let finished = done.unwrap_or_else(|_| {
            let message = "the job ended unexpectedly, by an error in the program";
            failed_job(&job.id, Failed::new(FailureKind::Other, message))
        });
        log_end(&finished, begun.elapsed());
        self.metrics.ended(job.work.as_ref(), &finished);
        control.traffic().into_iter().for_each(|traffic| self.metrics.traffic(traffic));
        let failed = matches!(finished.outcome, Some(Outcome::Failure(_)));
        if failed && control.monitor.ending() == Some(Ending::Shutdown) {
            self.jobs().drop_running(&job.id);
        } else {
            self.jobs().finish(finished);
        }
        self.changed.notify_one();
        // What begins now is not part of this job.
        drop(span);
        if !self.ending.load(Ordering::SeqCst) {
            self.start_waiting();
        }
    }

    /// Looks at all jobs that run.
    ///
    /// # Errors
    /// When so many of them hang that no other could run: only a new process helps.
    fn look(self: &Arc<Self>, now: Instant) -> Result<()> {
        let running: Vec<_> = {
            let jobs = self.jobs();
            jobs.running().iter().map(|(id, control)| (id.clone(), control.clone())).collect()
        };
        for (id, control) in running {
            let (true, Some(ending)) = (control.watch(now), control.monitor.ending()) else {
                continue;
            };
            tracing::error!("job {id} hangs and is given up; it keeps its memory");
            self.jobs().leave(failed_job(&id, control.interrupted(ending)));
            self.changed.notify_one();
        }
        if self.jobs().is_stuck() {
            bail!("all jobs hang, so no other can run: the agent ends to be started anew");
        }
        Ok(())
    }

    fn begin_ending(&self) {
        self.ending.store(true, Ordering::SeqCst);
        let mut jobs = self.jobs();
        jobs.drop_waiting();
        jobs.running().values().for_each(|control| control.monitor.end(Ending::Shutdown));
    }

    fn is_busy(&self) -> bool {
        !self.jobs().running().is_empty()
    }

    fn close(&self) {
        self.closing.send_replace(true);
    }

    fn is_closing(&self) -> bool {
        *self.closing.borrow()
    }

    /// Waits until the stream is to end.
    async fn closing(&self) {
        // It fails only without a sender, which is here.
        let mut changes = self.closing.subscribe();
        let _closing = changes.wait_for(|closing| *closing).await.is_ok();
    }

    /// Waits until there may be something to say.
    async fn changed(&self) {
        self.changed.notified().await;
    }

    fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::SeqCst);
        self.metrics.connected.set(i64::from(connected));
        if connected {
            self.metrics.connections.inc();
        }
    }

    fn is_connected(&self) -> bool {
        self.connected.load(Ordering::SeqCst)
    }
}

/// One line about how a job ended.
fn log_end(finished: &Finished, took: Duration) {
    let Finished { warnings, missing, changed, vanished, .. } = finished;
    let seconds = took.as_secs();
    match &finished.outcome {
        Some(Outcome::Failure(failure)) => {
            let kind = failure.kind();
            let message = &failure.message;
            tracing::error!(
                seconds,
                warnings,
                missing,
                changed,
                vanished,
                "failed, {kind:?}: {message}"
            );
        }
        // Done as far as it went: what is missing was named.
        Some(outcome) if *missing > 0 => {
            tracing::warn!(seconds, warnings, missing, changed, vanished, "done: {outcome:?}");
        }
        Some(outcome) => {
            tracing::info!(seconds, warnings, missing, changed, vanished, "done: {outcome:?}");
        }
        None => {}
    }
}
