//! Wires the parts together, from start to end.
//!
//! ```text
//! probes and metrics ── leader ── authority ── transport and rooms ── SIGTERM ── streams end ── lease released
//! ```
//! A controller that is not the leader only waits. One that is no longer ends its process at once: whatever it had
//! begun is in the custom resources, and its successor goes on from there.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::api::Timestamp;
use crate::config::Config;
use crate::desk::queue::Limits;
use crate::edge::agents::Agents;
use crate::edge::authority::Authority;
use crate::edge::identity::Reviewer;
use crate::edge::leader::{Candidate, Times};
use crate::edge::transport::{self, Transport};
use crate::events::Events;
use crate::health::{Health, Readiness};
use crate::metrics::Metrics;
use crate::rooms;

/// How long streams may take to end when the program does.
const GRACE: Duration = Duration::from_secs(5);

/// Runs the controller until it is told to end.
///
/// # Errors
/// When it cannot begin or go on; also when another controller became the leader.
pub async fn run(config: Config) -> Result<()> {
    tracing::info!(version = env!("CARGO_PKG_VERSION"), ?config, "starting");
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
    let metrics = Arc::new(Metrics::default());
    let readiness = Readiness::default();
    let health = Health::bind(config.http, metrics.clone(), readiness.clone()).await?;
    let client = client().await?;
    let (end, ending) = watch::channel(false);
    let told_to_end = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("told to end");
        end.send_replace(true);
    };
    let working = work(Arc::new(config), client, metrics, readiness, ending);
    tokio::pin!(working);
    tokio::select! {
        served = health.serve() => served,
        worked = &mut working => worked,
        () = told_to_end => working.await,
    }
}

/// The API server's client. What does not answer is asked again, on another connection; a watch ends earlier than
/// that by itself.
async fn client() -> Result<kube::Client> {
    let mut config = kube::Config::infer().await.context("cannot find the API server")?;
    config.connect_timeout = Some(Duration::from_secs(10));
    config.read_timeout = Some(Duration::from_secs(60));
    config.write_timeout = Some(Duration::from_secs(60));
    kube::Client::try_from(config).context("cannot speak to the API server")
}

/// Becomes the leader and works as such.
async fn work(
    config: Arc<Config>,
    client: kube::Client,
    metrics: Arc<Metrics>,
    readiness: Readiness,
    mut ending: watch::Receiver<bool>,
) -> Result<()> {
    let namespace = &config.namespace;
    let me = unique(&config.identity)?;
    let candidate =
        Candidate::new(client.clone(), namespace, me, Times::default(), jiff::Timestamp::now);
    let mut leadership = tokio::select! {
        leadership = candidate.elect() => leadership,
        _ended = ending.wait_for(|ending| *ending) => return Ok(()),
    };
    readiness.lead();
    let leading = lead(config.clone(), client, metrics, readiness, ending);
    let led = tokio::select! {
        led = leading => led,
        error = leadership.lost() => return Err(error),
    };
    if let Err(error) = leadership.release().await {
        tracing::warn!(
            "cannot release the lease, the next controller waits for its end: {error:#}"
        );
    }
    led
}

/// What only the leader does, until the program ends.
async fn lead(
    config: Arc<Config>,
    client: kube::Client,
    metrics: Arc<Metrics>,
    readiness: Readiness,
    mut ending: watch::Receiver<bool>,
) -> Result<()> {
    let names = config.service_names.clone();
    let authority =
        Authority::start(client.clone(), &config.namespace, names, jiff::Timestamp::now).await?;
    let tls = authority.server_config()?;
    let listener = Transport::bind(config.listen).await?;
    let (agents, events) = Agents::new();
    let account = &config.agent_service_account;
    let transport = Transport {
        agents: agents.clone(),
        identify: Arc::new(Reviewer::new(client.clone(), &config.namespace, account)),
        metrics: metrics.clone(),
        clock: jiff::Timestamp::now,
        times: transport::Times::default(),
        ending: ending.clone(),
    };
    let context = rooms::Context {
        namespace: config.namespace.clone(),
        settings: settings(&config),
        events: Events::new(client.clone()),
        readiness,
        client,
        agents,
        clock: Arc::new(Timestamp::now),
        metrics: metrics.clone(),
    };
    metrics.leader.set(1);
    let mut ending_too = ending.clone();
    let working = async {
        tokio::select! {
            // It holds nothing that the custom resources do not say.
            done = rooms::run(context, events) => done,
            _ended = ending_too.wait_for(|ending| *ending) => Ok(()),
        }
    };
    let graceful = async { tokio::try_join!(transport.serve(listener, tls), working).map(|_| ()) };
    let out_of_grace = async {
        // What is awaited is a lock, not to be held.
        drop(ending.wait_for(|ending| *ending).await);
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        ended = graceful => ended,
        () = authority.run() => Ok(()),
        () = out_of_grace => {
            tracing::warn!("not all ended in time");
            Ok(())
        }
    }
}

/// What people set, for the rooms.
fn settings(config: &Config) -> rooms::Settings {
    rooms::Settings {
        limits: Limits {
            cluster: config.volume_workers,
            node: config.node_volume_workers.unwrap_or(0),
        },
        stall: config.stall.unwrap_or_default(),
        agent_uncounted: config.agent_lost,
        agent_lost: config.agent_gone,
        limit_upload: config.limit_upload,
        limit_download: config.limit_download,
        prune_every: config.prune_every.unwrap_or_default(),
        ..rooms::Settings::default()
    }
}

/// A name that no other controller has, nor this one had in an earlier life.
fn unique(identity: &str) -> Result<String> {
    let mut number = [0; 8];
    getrandom::fill(&mut number).context("cannot get random bytes")?;
    Ok(format!("{identity}_{:016x}", u64::from_be_bytes(number)))
}
