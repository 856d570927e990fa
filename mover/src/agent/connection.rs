//! The stream to the controller: dialled again whenever it ends, for as long as the agent runs.
//!
//! Jobs do not depend on it. What is said on a new stream begins with a Hello that has everything the
//! controller may have missed. The certificates and the token are read anew for every dial, because both
//! change.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use proto::v1::from_agent::Message as Said;
use proto::v1::from_controller::Message as Heard;
use proto::v1::mover_client::MoverClient;
use proto::v1::{FromAgent, FromController, Heartbeat, Hello, Probe, ProbeResult, Progress};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Streaming};

use super::Agent;
use super::monitor::Far;
use super::repositories;

/// How long dialling, and then the controller's Welcome, may take.
const CONNECT: Duration = Duration::from_secs(10);

/// The shortest and longest wait before dialling again.
const WAIT_MIN: Duration = Duration::from_millis(200);
const WAIT_MAX: Duration = Duration::from_secs(5);

/// How often is looked at what there is to say. Progress is said at most so often.
const TICK: Duration = Duration::from_secs(1);

/// Heartbeats that may fail to come before the stream is given up.
const MISSED_MAX: u32 = 3;

/// Messages that may wait to be sent.
const QUEUE: usize = 64;

/// Stores that are tried at once.
const PROBES: usize = 2;

/// How long is waited for the controller to take the last messages when the agent ends.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Keeps a stream to the controller until the agent ends.
pub(super) async fn keep(agent: Arc<Agent>) {
    let mut tries = 0;
    let probes = Arc::new(Semaphore::new(PROBES));
    loop {
        let ended = tokio::select! {
            dialled = dial(&agent) => match dialled {
                Ok(mut stream) => {
                    tries = 0;
                    let ended = stream.serve(&agent, &probes).await;
                    agent.set_connected(false);
                    ended
                }
                Err(error) => Err(error),
            },
            () = agent.closing() => return,
        };
        if agent.is_closing() {
            return;
        }
        match ended {
            Ok(()) => tracing::info!("the controller has ended the stream"),
            Err(error) => {
                tracing::warn!("no stream to '{}': {error:#}", agent.config.given.controller);
            }
        }
        tries += 1;
        tokio::select! {
            () = tokio::time::sleep(wait_before(tries, random())) => {}
            () = agent.closing() => return,
        }
    }
}

/// How long to wait before the next dial: longer each time, and at random, so that the agents of a large
/// cluster do not all come back at once.
fn wait_before(tries: u32, random: u64) -> Duration {
    let most = WAIT_MIN.saturating_mul(1 << tries.min(10)).min(WAIT_MAX);
    let half = most / 2;
    let spread = u64::try_from(half.as_millis()).unwrap_or(u64::MAX);
    half + Duration::from_millis(random % spread.saturating_add(1))
}

fn random() -> u64 {
    let mut random = [0; 8];
    // Without randomness the wait is merely less spread.
    let _unneeded = getrandom::fill(&mut random);
    u64::from_le_bytes(random)
}

/// One stream.
struct Stream {
    outgoing: mpsc::Sender<FromAgent>,
    incoming: Streaming<FromController>,
    heartbeat: Duration,
    heard: Instant,
    said: Instant,
    /// Jobs whose outcome was said on this stream.
    told: BTreeSet<String>,
    /// How far jobs were when that was said last.
    far: BTreeMap<String, Far>,
    probed: (mpsc::UnboundedSender<ProbeResult>, mpsc::UnboundedReceiver<ProbeResult>),
}

/// Connects, says Hello, and waits for the Welcome.
async fn dial(agent: &Agent) -> Result<Stream> {
    let channel = connect(agent).await?;
    let path = agent.config.given.token_file.display();
    let token = tokio::fs::read_to_string(&agent.config.given.token_file)
        .await
        .with_context(|| format!("cannot read the token '{path}'"))?;
    let bearer: MetadataValue<_> = format!("Bearer {}", token.trim())
        .parse()
        .map_err(|_| anyhow!("the file '{path}' holds no token"))?;
    let (outgoing, queue) = mpsc::channel(QUEUE);
    let hello = hello(agent);
    let told = hello.finished.iter().map(|finished| finished.job_id.clone()).collect();
    let message = FromAgent { message: Some(Said::Hello(hello)) };
    outgoing.send(message).await.context("the stream has ended")?;
    let mut request = Request::new(ReceiverStream::new(queue));
    request.metadata_mut().insert("authorization", bearer);
    let mut client = MoverClient::new(channel);
    let connected = timeout(CONNECT, client.connect(request)).await;
    let answer = connected.context("the controller does not answer")?;
    let mut incoming = answer.map_err(|status| refused(&status))?.into_inner();
    let welcome = loop {
        let next = timeout(CONNECT, incoming.message()).await;
        let next = next.context("the controller does not answer the Hello")?;
        match next.map_err(|status| refused(&status))? {
            Some(FromController { message: Some(Heard::Welcome(welcome)) }) => break welcome,
            Some(_) => {}
            None => bail!("the controller has ended the stream before its Welcome"),
        }
    };
    let heartbeat = Duration::from_secs(welcome.heartbeat_seconds.max(1).into());
    tracing::info!("connected to controller {}", welcome.version);
    let now = Instant::now();
    let (far, probed) = (BTreeMap::new(), mpsc::unbounded_channel());
    Ok(Stream { outgoing, incoming, heartbeat, heard: now, said: now, told, far, probed })
}

async fn connect(agent: &Agent) -> Result<Channel> {
    let given = &agent.config.given;
    let ca = tokio::fs::read(&given.ca_file).await.with_context(|| {
        format!("cannot read the controller's certificates '{}'", given.ca_file.display())
    })?;
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(ca))
        .domain_name(&agent.config.server_name);
    let endpoint = Endpoint::from_shared(format!("https://{}", given.controller))
        .and_then(|endpoint| endpoint.connect_timeout(CONNECT).tls_config(tls))
        .with_context(|| {
            let (ca, to) = (given.ca_file.display(), &given.controller);
            format!("cannot dial '{to}' with the certificates '{ca}'")
        })?;
    Ok(timeout(CONNECT, endpoint.connect()).await.context("it does not answer")??)
}

/// What a refusal means.
fn refused(status: &tonic::Status) -> anyhow::Error {
    use tonic::Code;
    let what = match status.code() {
        Code::Unauthenticated => "the controller does not accept the token",
        Code::PermissionDenied => "the controller does not take us for the agent of this node",
        Code::FailedPrecondition => "this controller is not the leader",
        _ => "the stream broke off",
    };
    anyhow!("{what}: {}", status.message())
}

fn hello(agent: &Agent) -> Hello {
    let jobs = agent.jobs();
    Hello {
        node: agent.config.given.node.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        capabilities: Vec::new(),
        capacity: u32::try_from(agent.config.capacity).unwrap_or(u32::MAX),
        memory_bytes: agent.config.memory_bytes,
        running: jobs.unfinished(),
        finished: jobs.finished().cloned().collect(),
    }
}

impl Stream {
    /// Listens and talks until the stream ends.
    ///
    /// # Errors
    /// Why it ended, unless the controller ended it.
    async fn serve(&mut self, agent: &Arc<Agent>, probes: &Arc<Semaphore>) -> Result<()> {
        agent.set_connected(true);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                heard = self.incoming.message() => match heard.map_err(|status| refused(&status))? {
                    Some(message) => {
                        self.heard = Instant::now();
                        self.hear(agent, message, probes);
                        self.tell_finished(agent).await?;
                    }
                    None => return Ok(()),
                },
                () = agent.changed() => self.tell_finished(agent).await?,
                Some(result) = self.probed.1.recv() => self.say(Said::ProbeResult(result)).await?,
                _ = tick.tick() => {
                    if self.heard.elapsed() >= self.heartbeat * MISSED_MAX {
                        bail!("the controller has said nothing for {MISSED_MAX} heartbeats");
                    }
                    self.tell_progress(agent).await?;
                    if self.said.elapsed() + TICK >= self.heartbeat {
                        self.say(Said::Heartbeat(Heartbeat {})).await?;
                    }
                }
                () = agent.closing() => return self.close(agent).await,
            }
        }
    }

    fn hear(&mut self, agent: &Arc<Agent>, message: FromController, probes: &Arc<Semaphore>) {
        match message.message {
            Some(Heard::Assign(assign)) => {
                if let Some(job) = assign.job {
                    // Should it have ended, that is said again.
                    self.told.remove(&job.id);
                    agent.assign(job);
                }
            }
            Some(Heard::Cancel(cancel)) => {
                self.told.remove(&cancel.job_id);
                agent.cancel(&cancel.job_id);
            }
            Some(Heard::Recorded(recorded)) => agent.recorded(&recorded.job_id),
            Some(Heard::Renew(renew)) => agent.renew(&renew),
            Some(Heard::Probe(probe)) => self.probe(agent, probe, probes.clone()),
            // Of a newer version, or a sign of life.
            Some(Heard::Welcome(_) | Heard::Heartbeat(_)) | None => {}
        }
    }

    fn probe(&self, agent: &Arc<Agent>, probe: Probe, probes: Arc<Semaphore>) {
        let (agent, result) = (agent.clone(), self.probed.0.clone());
        tokio::spawn(async move {
            let _permit = probes.acquire_owned().await;
            let repository = probe.repository.unwrap_or_default();
            let tried = tokio::task::spawn_blocking(move || {
                repositories::probe(&agent.config, &repository)
            });
            let error = tried.await.unwrap_or_else(|_| "trying it ended unexpectedly".to_owned());
            // The stream may have ended; the controller then asks again.
            let _unheard = result.send(ProbeResult { id: probe.id, error });
        });
    }

    async fn say(&mut self, message: Said) -> Result<()> {
        let message = FromAgent { message: Some(message) };
        let sent = timeout(self.heartbeat * MISSED_MAX, self.outgoing.send(message)).await;
        sent.context("the controller takes no messages")?.context("the stream has ended")?;
        self.said = Instant::now();
        Ok(())
    }

    /// Says what came of jobs, where it was not said on this stream.
    async fn tell_finished(&mut self, agent: &Agent) -> Result<()> {
        let untold: Vec<_> = {
            let jobs = agent.jobs();
            let ids: BTreeSet<_> = jobs.finished().map(|finished| &finished.job_id).collect();
            self.told.retain(|id| ids.contains(id));
            jobs.finished().filter(|one| !self.told.contains(&one.job_id)).cloned().collect()
        };
        for finished in untold {
            self.told.insert(finished.job_id.clone());
            self.say(Said::Finished(finished)).await?;
        }
        Ok(())
    }

    /// Says how far jobs are, where that has changed.
    async fn tell_progress(&mut self, agent: &Agent) -> Result<()> {
        let now: BTreeMap<_, _> = {
            let jobs = agent.jobs();
            jobs.running().iter().map(|(id, control)| (id.clone(), control.far())).collect()
        };
        self.far.retain(|id, _| now.contains_key(id));
        for (job_id, far) in now {
            if self.far.insert(job_id.clone(), far) == Some(far) || far == Far::default() {
                continue;
            }
            let Far { entries, bytes, total } = far;
            let progress =
                Progress { job_id, bytes_done: bytes, bytes_total: total, entries_done: entries };
            self.say(Said::Progress(progress)).await?;
        }
        Ok(())
    }

    /// Says what is left to say, and waits until the controller has taken it.
    async fn close(&mut self, agent: &Agent) -> Result<()> {
        self.tell_finished(agent).await?;
        let (unused, _) = mpsc::channel(1);
        drop(std::mem::replace(&mut self.outgoing, unused));
        let taken = async { while let Ok(Some(_)) = self.incoming.message().await {} };
        // A controller that does not end the stream is not waited for.
        let _taken = timeout(LAST_WORDS, taken).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_to_dial_again_grows_is_spread_and_takes_at_most_some_seconds() {
        for tries in 0..40 {
            for random in [0, 1, u64::MAX] {
                let wait = wait_before(tries, random);
                assert!(wait >= WAIT_MIN / 2 && wait <= WAIT_MAX, "{tries}: {wait:?}");
            }
        }
        assert!(wait_before(10, 0) > wait_before(1, u64::MAX));
        assert_ne!(wait_before(5, 0), wait_before(5, 1000));
    }
}
