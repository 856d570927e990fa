//! One stream of an agent, from its Hello to its end.

use std::sync::Arc;
use std::time::Duration;

use proto::v1::from_agent::Message as Said;
use proto::v1::from_controller::Message;
use proto::v1::{FromAgent, FromController, Heartbeat, Hello, Welcome};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Status, Streaming};

use super::Times;
use super::bounds::bound;
use super::lobby::Pass;
use crate::cluster::Clock;
use crate::edge::agents::{Agents, Membership};
use crate::edge::identity::Identity;
use crate::metrics::{Metrics, Reason};

/// Messages a second that an agent may send: what it has to say is one a second and job. One that sends more waits,
/// so that it does not fill the dispatcher's queue for all.
const MESSAGES_PER_SECOND: u32 = 200;

type Outgoing = mpsc::Sender<Result<FromController, Status>>;

/// A stream of somebody whose token was found good.
pub(super) struct Stream {
    pub(super) agents: Arc<Agents>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) clock: Clock,
    pub(super) times: Times,
    pub(super) ending: watch::Receiver<bool>,
    pub(super) identity: Identity,
    pub(super) pass: Option<Pass>,
}

/// What a message says, of bounded size; nothing if it is of a kind that this version does not know.
fn said(message: FromAgent) -> Option<Said> {
    let mut said = message.message?;
    bound(&mut said);
    Some(said)
}

impl Stream {
    /// Serves it to its end, and tells the agent why it ended.
    pub(super) async fn serve(self, mut incoming: Streaming<FromAgent>, outgoing: Outgoing) {
        let node = self.identity.node.clone();
        let end = match self.greet(&mut incoming).await {
            Ok(hello) => self.converse(hello, &mut incoming, &outgoing).await,
            Err((reason, status)) => {
                tracing::warn!(
                    node,
                    pod = self.identity.pod,
                    "refused an agent: {}",
                    status.message()
                );
                self.metrics.refuse(reason);
                status
            }
        };
        tracing::info!(node, code = ?end.code(), "an agent's stream ended: {}", end.message());
        // Not for ever: it may read nothing any more.
        let _told = timeout(self.times.silence(), outgoing.send(Err(end))).await;
    }

    /// Waits for the Hello.
    async fn greet(&self, incoming: &mut Streaming<FromAgent>) -> Result<Hello, (Reason, Status)> {
        let no_hello = |why: &str| (Reason::NoHello, Status::invalid_argument(why));
        let first = timeout(self.times.entry, incoming.message()).await;
        let first = first.map_err(|_| no_hello("no Hello came in time"))?;
        let first = first.map_err(|status| no_hello(status.message()))?;
        match first.and_then(said) {
            Some(Said::Hello(hello)) if hello.node == self.identity.node => Ok(hello),
            Some(Said::Hello(hello)) => Err((Reason::NotAnAgent, self.other_node(&hello))),
            _ => Err(no_hello("the first message must be a Hello")),
        }
    }

    fn other_node(&self, hello: &Hello) -> Status {
        let (own, said) = (&self.identity.node, &hello.node);
        Status::permission_denied(format!("the token is that of node '{own}', not of '{said}'"))
    }

    async fn converse(
        &self,
        hello: Hello,
        incoming: &mut Streaming<FromAgent>,
        outgoing: &Outgoing,
    ) -> Status {
        // First, for after it the agent may be sent work.
        let welcome = Message::Welcome(Welcome {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            capabilities: Vec::new(),
            heartbeat_seconds: u32::try_from(self.times.heartbeat.as_secs()).unwrap_or(u32::MAX),
        });
        let welcome = FromController { message: Some(welcome) };
        if outgoing.send(Ok(welcome)).await.is_err() {
            return Status::cancelled("the agent is gone");
        }
        let _inside = self.pass.as_ref().map(Pass::enter);
        tracing::info!(
            node = hello.node,
            pod = self.identity.pod,
            version = hello.version,
            "an agent is connected"
        );
        self.metrics.streams.inc();
        let (membership, messages) = self.agents.join(hello).await;
        self.metrics.agents_connected.inc();
        let mut ending = self.ending.clone();
        let end = tokio::select! {
            end = self.listen(incoming, &membership) => end,
            end = self.tell(messages, outgoing) => end,
            () = self.token_expires() => {
                Status::unauthenticated("the token expired: dial again with a new one")
            }
            _ended = ending.wait_for(|ending| *ending) => {
                Status::unavailable("this controller ends: dial again")
            }
        };
        membership.leave().await;
        self.metrics.agents_connected.dec();
        end
    }

    /// Hands on what the agent says.
    async fn listen(&self, incoming: &mut Streaming<FromAgent>, membership: &Membership) -> Status {
        let mut window = (Instant::now(), 0);
        loop {
            let message = match timeout(self.times.silence(), incoming.message()).await {
                Ok(Ok(Some(message))) => message,
                Ok(Ok(None)) => return Status::ok("the agent ended the stream"),
                Ok(Err(status)) => return status,
                Err(_) => return Status::deadline_exceeded("the agent was silent for too long"),
            };
            match said(message) {
                Some(Said::Progress(progress)) => membership.progress(progress).await,
                Some(Said::Finished(finished)) => membership.finished(finished).await,
                Some(Said::ProbeResult(result)) => membership.probed(result).await,
                // Said again: what is new in it is what ended since.
                Some(Said::Hello(hello)) if hello.node == self.identity.node => {
                    for finished in hello.finished {
                        membership.finished(finished).await;
                    }
                }
                Some(Said::Hello(hello)) => return self.other_node(&hello),
                // A newer agent may say what this version does not know.
                Some(Said::Heartbeat(Heartbeat {})) | None => {}
            }
            slow_down(&mut window).await;
        }
    }

    /// Sends what the agent is told, and a sign of life when that is nothing.
    async fn tell(
        &self,
        mut messages: mpsc::Receiver<FromController>,
        outgoing: &Outgoing,
    ) -> Status {
        loop {
            let room = match timeout(self.times.silence(), outgoing.reserve()).await {
                Ok(Ok(room)) => room,
                Ok(Err(_)) => return Status::cancelled("the agent is gone"),
                Err(_) => return Status::deadline_exceeded("the agent takes no messages"),
            };
            match timeout(self.times.heartbeat, messages.recv()).await {
                Ok(Some(message)) => room.send(Ok(message)),
                Ok(None) => return Status::aborted("a newer stream of this node took over"),
                Err(_) => {
                    let beat = Message::Heartbeat(Heartbeat {});
                    room.send(Ok(FromController { message: Some(beat) }));
                }
            }
        }
    }

    async fn token_expires(&self) {
        let Some(expires) = self.identity.expires else {
            return std::future::pending().await;
        };
        loop {
            let left = expires.duration_since((self.clock)());
            // Looked at again and again, for clocks are set.
            match Duration::try_from(left) {
                Ok(left) if !left.is_zero() => sleep(left.min(Duration::from_secs(60))).await,
                _ => return,
            }
        }
    }
}

/// Waits for the end of a second in which enough was said.
async fn slow_down((began, messages): &mut (Instant, u32)) {
    const WINDOW: Duration = Duration::from_secs(1);
    if began.elapsed() >= WINDOW {
        (*began, *messages) = (Instant::now(), 0);
    }
    *messages += 1;
    if *messages >= MESSAGES_PER_SECOND {
        tokio::time::sleep_until(*began + WINDOW).await;
    }
}
