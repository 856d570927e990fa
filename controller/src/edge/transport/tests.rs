//! What agents and strangers get to see of the transport: over TLS, by the client that agents use.

use std::net::SocketAddr;

use jiff::{SignedDuration, Timestamp};
use proto::v1::finished::Outcome;
use proto::v1::from_agent::Message as Said;
use proto::v1::from_controller::Message;
use proto::v1::mover_client::MoverClient;
use proto::v1::{Cancel, Failure, Finished, Heartbeat, Hello, ProbeResult, Progress};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use super::*;
use crate::edge::agents::Event;
use crate::edge::authority::testing::{Offline, SERVER};
use crate::edge::identity::Identity;
use crate::metrics::ByReason;

/// Tokens are the names of nodes, but for some.
struct Double;

#[tonic::async_trait]
impl Identify for Double {
    async fn identify(&self, token: &str) -> Result<Identity, Refusal> {
        let (node, expires) = match token {
            "expired" => return Err(Refusal::Invalid("it expired".to_owned())),
            "stranger" => return Err(Refusal::NotAnAgent("it is a stranger's".to_owned())),
            "expiring" => ("a", Some(Timestamp::now() + SignedDuration::from_millis(300))),
            node => (node, None),
        };
        Ok(Identity { node: node.to_owned(), pod: format!("agent-{node}"), expires })
    }
}

struct Served {
    address: SocketAddr,
    authority: Offline,
    agents: Arc<Agents>,
    events: mpsc::Receiver<Event>,
    metrics: Arc<Metrics>,
    end: watch::Sender<bool>,
    server: JoinHandle<Result<()>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Served {
    async fn start(times: Times) -> Self {
        let authority = Offline::new();
        let (agents, events) = Agents::new();
        let metrics = Arc::new(Metrics::default());
        let (end, ending) = watch::channel(false);
        let transport = Transport {
            agents: agents.clone(),
            identify: Arc::new(Double),
            metrics: metrics.clone(),
            clock: Timestamp::now,
            times,
            ending,
        };
        let listener = Transport::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(transport.serve(listener, authority.server_config()));
        Self { address, authority, agents, events, metrics, end, server }
    }

    async fn channel(&self, bundle: String) -> Result<Channel, tonic::transport::Error> {
        let trust = Certificate::from_pem(bundle);
        let tls = ClientTlsConfig::new().ca_certificate(trust).domain_name(SERVER);
        let endpoint = Endpoint::from_shared(format!("https://{}", self.address)).unwrap();
        endpoint.tls_config(tls).unwrap().connect().await
    }

    /// Opens a stream; what is not sent in `first` is sent later.
    async fn dial(&self, token: Option<&str>, first: Option<Said>) -> Result<Dialed, Status> {
        let mut client = MoverClient::new(self.channel(self.authority.bundle()).await.unwrap());
        let (say, said) = mpsc::channel(16);
        let mut request = Request::new(ReceiverStream::new(said));
        if let Some(token) = token {
            let value = format!("Bearer {token}").parse().unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        let hear = client.connect(request).await?.into_inner();
        let dialed = Dialed { say, hear };
        if let Some(first) = first {
            dialed.say(first).await;
        }
        Ok(dialed)
    }

    /// An agent that was let in.
    async fn join(&mut self, node: &str) -> Dialed {
        let mut dialed = self.dial(Some(node), Some(hello(node))).await.unwrap();
        assert!(matches!(dialed.hear().await, Ok(Message::Welcome(_))));
        assert!(matches!(self.event().await, Event::Connected { .. }));
        dialed
    }

    async fn event(&mut self) -> Event {
        self.events.recv().await.unwrap()
    }

    fn refused(&self, reason: Reason) -> u64 {
        self.metrics.refused.get_or_create(&ByReason { reason }).get()
    }
}

struct Dialed {
    say: mpsc::Sender<FromAgent>,
    hear: Streaming<FromController>,
}

impl Dialed {
    async fn say(&self, message: Said) {
        // The stream may have ended: what it says then is what counts.
        let _ended = self.say.send(FromAgent { message: Some(message) }).await;
    }

    async fn hear(&mut self) -> Result<Message, Status> {
        match self.hear.message().await? {
            Some(message) => Ok(message.message.unwrap()),
            None => Err(Status::ok("the end")),
        }
    }

    /// How the stream ends.
    async fn end(mut self) -> Code {
        loop {
            if let Err(status) = self.hear().await {
                return status.code();
            }
        }
    }
}

fn hello(node: &str) -> Said {
    Said::Hello(Hello { node: node.to_owned(), capacity: 2, ..Default::default() })
}

fn finished(job: &str) -> Finished {
    Finished { job_id: job.to_owned(), ..Default::default() }
}

fn beat() -> Said {
    Said::Heartbeat(Heartbeat {})
}

#[test]
fn a_token_is_what_follows_bearer() {
    let table = [
        ("Bearer abc", Some("abc")),
        ("bearer  abc ", Some("abc")),
        ("Basic abc", None),
        ("abc", None),
        ("", None),
    ];
    for (value, found) in table {
        let mut request = Request::new(());
        request.metadata_mut().insert("authorization", value.parse().unwrap());
        assert_eq!(token(&request), found, "{value}");
    }
    assert_eq!(token(&Request::new(())), None);
}

#[tokio::test]
async fn strangers_and_expired_tokens_are_refused_and_counted() {
    let served = Served::start(Times::default()).await;
    let table = [
        (None, Code::Unauthenticated),
        (Some("expired"), Code::Unauthenticated),
        (Some("stranger"), Code::PermissionDenied),
    ];
    for (token, code) in table {
        let refused = served.dial(token, Some(hello("a"))).await.err().unwrap();
        assert_eq!(refused.code(), code, "{token:?}: {refused}");
    }
    assert_eq!(served.refused(Reason::Unauthenticated), 2);
    assert_eq!(served.refused(Reason::NotAnAgent), 1);
    assert!(served.agents.list().is_empty());
}

#[tokio::test]
async fn an_agent_cannot_speak_for_another_node() {
    let served = Served::start(Times::default()).await;
    let dialed = served.dial(Some("a"), Some(hello("b"))).await.unwrap();
    assert_eq!(dialed.end().await, Code::PermissionDenied);
    assert_eq!(served.refused(Reason::NotAnAgent), 1);
    assert!(served.agents.list().is_empty());
}

#[tokio::test]
async fn what_is_said_goes_both_ways() {
    let mut served = Served::start(Times::default()).await;
    let mut agent = served.join("a").await;
    assert_eq!(served.agents.list()[0].capacity, 2);
    let progress = Progress { job_id: "j".to_owned(), bytes_done: 7, ..Default::default() };
    agent.say(Said::Progress(progress.clone())).await;
    let event = served.event().await;
    assert!(
        matches!(&event, Event::Progress { node, progress: heard } if node == "a" && *heard == progress),
        "{event:?}"
    );
    let cancel = Message::Cancel(Cancel { job_id: "j".to_owned() });
    served.agents.send("a", cancel.clone()).unwrap();
    assert_eq!(agent.hear().await.unwrap(), cancel);
    assert_eq!(served.metrics.agents_connected.get(), 1);
    drop(agent);
    assert!(matches!(served.event().await, Event::Lost { .. }));
}

#[tokio::test]
async fn what_a_newer_agent_says_is_passed_over() {
    let mut served = Served::start(Times::default()).await;
    let newer = Hello {
        node: "a".to_owned(),
        version: "99.0.0".to_owned(),
        capabilities: vec!["what-comes-next".to_owned()],
        ..Default::default()
    };
    let agent = served.dial(Some("a"), Some(Said::Hello(newer))).await.unwrap();
    assert!(matches!(served.event().await, Event::Connected { .. }));
    // What a message that is not known here comes as.
    agent.say.send(FromAgent { message: None }).await.unwrap();
    agent.say(Said::Finished(finished("j"))).await;
    assert!(matches!(served.event().await, Event::Finished { .. }));
}

#[tokio::test]
async fn a_newer_stream_ends_the_older_one_and_nothing_is_lost() {
    let mut served = Served::start(Times::default()).await;
    let old = served.join("a").await;
    let mut new = served.join("a").await;
    assert_eq!(old.end().await, Code::Aborted);
    served.agents.send("a", Message::Heartbeat(Heartbeat {})).unwrap();
    assert!(matches!(new.hear().await, Ok(Message::Heartbeat(_))));
    drop(new);
    assert!(matches!(served.event().await, Event::Lost { .. }), "the first event since");
}

#[tokio::test]
async fn a_stream_ends_when_its_token_does() {
    let served = Served::start(Times::default()).await;
    let dialed = served.dial(Some("expiring"), Some(hello("a"))).await.unwrap();
    assert_eq!(dialed.end().await, Code::Unauthenticated);
}

#[tokio::test]
async fn a_silent_agent_is_lost_after_it_was_sent_signs_of_life() {
    let heartbeat = Duration::from_millis(200);
    let mut served = Served::start(Times { heartbeat, ..Times::default() }).await;
    let mut agent = served.join("a").await;
    assert!(matches!(agent.hear().await, Ok(Message::Heartbeat(_))));
    assert_eq!(agent.end().await, Code::DeadlineExceeded);
    assert!(matches!(served.event().await, Event::Lost { .. }));
}

#[tokio::test]
async fn a_hello_said_again_hands_on_what_ended_since() {
    let mut served = Served::start(Times::default()).await;
    let agent = served.join("a").await;
    let again = Hello { node: "a".to_owned(), finished: vec![finished("j")], ..Default::default() };
    agent.say(Said::Hello(again)).await;
    let event = served.event().await;
    assert!(
        matches!(&event, Event::Finished { finished, .. } if finished.job_id == "j"),
        "{event:?}"
    );
    agent.say(hello("b")).await;
    assert_eq!(agent.end().await, Code::PermissionDenied);
}

#[tokio::test]
async fn a_stream_that_does_not_begin_with_a_hello_is_ended() {
    let entry = Duration::from_secs(2);
    let served = Served::start(Times { entry, ..Times::default() }).await;
    let wrong = served.dial(Some("a"), Some(beat())).await.unwrap();
    assert_eq!(wrong.end().await, Code::InvalidArgument);
    let mute = served.dial(Some("a"), None).await.unwrap();
    // Its whole connection ends at about the same time.
    assert!(matches!(mute.end().await, Code::InvalidArgument | Code::Unknown | Code::Unavailable));
    assert!(served.agents.list().is_empty());
}

#[tokio::test]
async fn a_message_too_large_ends_the_stream_alone() {
    let mut served = Served::start(Times::default()).await;
    let agent = served.join("a").await;
    let other = served.join("b").await;
    agent.say(Said::Finished(finished(&"x".repeat(MESSAGE_BYTES_MAX)))).await;
    assert_eq!(agent.end().await, Code::OutOfRange);
    assert!(matches!(served.event().await, Event::Lost { node } if node == "a"));
    other.say(Said::Finished(finished("j"))).await;
    assert!(matches!(served.event().await, Event::Finished { node, .. } if node == "b"));
}

#[tokio::test]
async fn what_an_agent_says_is_cut_before_anybody_hears_it() {
    let mut served = Served::start(Times::default()).await;
    let long = "x".repeat(1 << 20);
    let greeting = Hello { node: "a".to_owned(), version: long.clone(), ..Default::default() };
    let agent = served.dial(Some("a"), Some(Said::Hello(greeting))).await.unwrap();
    assert!(matches!(served.event().await, Event::Connected { .. }));
    assert!(served.agents.list()[0].version.len() < 1000);
    agent.say(Said::ProbeResult(ProbeResult { id: "here".to_owned(), error: long.clone() })).await;
    let Event::Probed { result, .. } = served.event().await else { panic!("it probed") };
    assert!(result.id == "here" && result.error.len() < 1000, "{} bytes", result.error.len());
    let failure = Failure { kind: 0, message: long };
    let ended = Finished { outcome: Some(Outcome::Failure(failure)), ..finished("j") };
    agent.say(Said::Finished(ended)).await;
    let Event::Finished { finished, .. } = served.event().await else { panic!("it ended") };
    assert!(format!("{finished:?}").len() < 10_000);
}

#[tokio::test]
async fn connections_that_prove_nothing_are_closed() {
    let entry = Duration::from_millis(300);
    let served = Served::start(Times { entry, ..Times::default() }).await;
    let mut bytes = Vec::new();
    let mut garbage = TcpStream::connect(served.address).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    // Closed, or reset: no answer comes but an alert.
    let _closed = garbage.read_to_end(&mut bytes).await;
    assert!(bytes.len() < 16, "{bytes:?}");
    let mut mute = TcpStream::connect(served.address).await.unwrap();
    let _closed = mute.read_to_end(&mut bytes).await;
    // Counted after they were closed.
    while served.refused(Reason::Handshake) < 2 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn agents_stay_and_come_while_the_authority_rotates() {
    let mut served = Served::start(Times::default()).await;
    let first = served.authority.bundle();
    let mut old = served.join("a").await;
    served.authority.publish_next();
    let both = served.authority.bundle();
    assert!(served.channel(first.clone()).await.is_ok(), "the first signs still");
    assert!(served.channel(both.clone()).await.is_ok());
    served.authority.promote();
    assert!(served.channel(both).await.is_ok(), "whoever saw the bundle in time");
    assert!(served.channel(first).await.is_err(), "the second signs now");
    let _new = served.join("b").await;
    served.agents.send("a", Message::Heartbeat(Heartbeat {})).unwrap();
    assert!(matches!(old.hear().await, Ok(Message::Heartbeat(_))), "the stream goes on");
}

#[tokio::test]
async fn at_the_end_streams_are_told_to_dial_again_and_serving_ends() {
    let mut served = Served::start(Times::default()).await;
    let agent = served.join("a").await;
    served.end.send_replace(true);
    assert_eq!(agent.end().await, Code::Unavailable);
    (&mut served.server).await.unwrap().unwrap();
}
