//! Serves the agents' streams: service `Mover` of the protocol.
//!
//! ```text
//! connection ── lobby: few, and not for long ── TLS ── token ── Hello ── agents::join ── pump both ways
//!                                                             bounds: nothing that is said is long
//! ```
//! Whoever connects has a bounded time to prove that it is an agent, and few may try at once (`lobby`). After that
//! the stream is one of its node's; it ends when either side is silent, the token expires, a newer one takes over, or
//! the program ends.

mod bounds;
mod lobby;
mod stream;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use proto::v1::mover_server::{Mover, MoverServer};
use proto::v1::{FromAgent, FromController};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::transport::server::TlsConnectInfo;
use tonic::{Request, Response, Status, Streaming};

use self::lobby::{Connection, Lobby, Pass};
use crate::cluster::Clock;
use crate::edge::agents::Agents;
use crate::edge::identity::{Identify, Refusal};
use crate::metrics::{Metrics, Reason};

/// Largest message of an agent: a Hello with some thousands of outcomes.
const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Streams of one connection: an agent has one, and another while it changes over.
const STREAMS_PER_CONNECTION: u32 = 4;

/// Connections whose handshake is done, until the server takes them.
const ACCEPTED: usize = 16;

/// Responses that wait in a stream; more wait in `agents`.
const OUTGOING: usize = 16;

/// The times of streams.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// From the connection to an accepted Hello; also for the parts, and to a new stream on an old connection.
    pub entry: Duration,
    /// `Welcome.heartbeat_seconds`. Whole seconds.
    pub heartbeat: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self { entry: Duration::from_secs(10), heartbeat: Duration::from_secs(10) }
    }
}

impl Times {
    /// Silence that ends a stream.
    fn silence(self) -> Duration {
        self.heartbeat * 3
    }
}

/// What serving needs.
pub struct Transport {
    /// Where agents are entered.
    pub agents: Arc<Agents>,
    /// Tells who they are.
    pub identify: Arc<dyn Identify>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Tells when tokens expire.
    pub clock: Clock,
    /// How long things may take.
    pub times: Times,
    /// Turns true when the program ends.
    pub ending: watch::Receiver<bool>,
}

impl Transport {
    /// Listens.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn bind(address: SocketAddr) -> Result<TcpListener> {
        let listener = TcpListener::bind(address).await;
        listener.with_context(|| format!("cannot listen on {address} for agents"))
    }

    /// Serves until the program ends.
    ///
    /// # Errors
    /// When it cannot go on.
    pub async fn serve(self, listener: TcpListener, tls: Arc<rustls::ServerConfig>) -> Result<()> {
        let (accepted, connections) = mpsc::channel(ACCEPTED);
        let lobby = Lobby::new(self.times.entry);
        let entering =
            enter(listener, TlsAcceptor::from(tls), lobby, accepted, self.metrics.clone());
        let mut ending = self.ending.clone();
        let service = MoverServer::new(self)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let serving = Server::builder()
            .max_concurrent_streams(STREAMS_PER_CONNECTION)
            .http2_keepalive_interval(Some(Duration::from_secs(20)))
            .http2_keepalive_timeout(Some(Duration::from_secs(20)))
            .http2_max_header_list_size(32 << 10)
            .add_service(service)
            .serve_with_incoming_shutdown(ReceiverStream::new(connections), async move {
                // An error is the end of whoever would say it.
                let _ended = ending.wait_for(|ending| *ending).await;
            });
        tokio::select! {
            served = serving => served.context("cannot serve agents"),
            () = entering => Ok(()),
        }
    }
}

/// Takes connections, each through its handshake, for ever.
async fn enter(
    listener: TcpListener,
    tls: TlsAcceptor,
    lobby: Lobby,
    accepted: mpsc::Sender<std::io::Result<tokio_rustls::server::TlsStream<Connection>>>,
    metrics: Arc<Metrics>,
) {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(pair) => pair,
            Err(error) => {
                // Out of descriptors, most likely: some are given back soon.
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(connection) = lobby.admit(stream, peer.ip()) else {
            metrics.refuse(Reason::Crowded);
            continue;
        };
        let (tls, accepted, metrics) = (tls.clone(), accepted.clone(), metrics.clone());
        // Ends by the connection's own deadline, if not before.
        tokio::spawn(async move {
            match tls.accept(connection).await {
                // Without a receiver the program is ending.
                Ok(stream) => drop(accepted.send(Ok(stream)).await),
                Err(error) => {
                    metrics.refuse(Reason::Handshake);
                    tracing::debug!(%peer, "a connection failed in its handshake: {error}");
                }
            }
        });
    }
}

#[tonic::async_trait]
impl Mover for Transport {
    type ConnectStream = ReceiverStream<Result<FromController, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<FromAgent>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let pass =
            request.extensions().get::<TlsConnectInfo<Pass>>().map(|it| it.get_ref().clone());
        let identity = match token(&request) {
            Some(token) => self.identify.identify(token).await.map_err(|why| self.refuse(&why))?,
            None => {
                let why = Refusal::Invalid("there is none in 'authorization'".to_owned());
                return Err(self.refuse(&why));
            }
        };
        let (outgoing, responses) = mpsc::channel(OUTGOING);
        let stream = stream::Stream {
            agents: self.agents.clone(),
            metrics: self.metrics.clone(),
            clock: self.clock,
            times: self.times,
            ending: self.ending.clone(),
            identity,
            pass,
        };
        tokio::spawn(stream.serve(request.into_inner(), outgoing));
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

impl Transport {
    fn refuse(&self, why: &Refusal) -> Status {
        tracing::warn!("refused an agent: {why}");
        let (reason, status) = match why {
            Refusal::Invalid(_) => {
                (Reason::Unauthenticated, Status::unauthenticated(why.to_string()))
            }
            Refusal::NotAnAgent(_) => {
                (Reason::NotAnAgent, Status::permission_denied(why.to_string()))
            }
            Refusal::Busy => (Reason::Busy, Status::resource_exhausted(why.to_string())),
            // The cause is for the log alone.
            Refusal::Unavailable(_) => {
                let text = "the API server cannot be asked whose the token is: dial again";
                (Reason::Unavailable, Status::unavailable(text))
            }
        };
        self.metrics.refuse(reason);
        status
    }
}

/// The bearer token of a request.
fn token<T>(request: &Request<T>) -> Option<&str> {
    let value = request.metadata().get("authorization")?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

#[cfg(test)]
mod tests;
