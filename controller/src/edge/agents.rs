//! The agents that are connected: who they are, and a way to tell them something.
//!
//! Whoever serves their streams (`transport`) enters them here and hands on what they say as [`Event`]s; whoever
//! decides (`desk`) takes the events and sends messages. Nothing here is durable.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto::v1::from_controller::Message;
use proto::v1::{Finished, FromController, Hello, ProbeResult, Progress};
use tokio::sync::mpsc;

/// Messages that may wait for an agent, and events that may wait for the dispatcher, before the sender waits or
/// gives up. An agent that takes no messages for so long is as good as lost.
const QUEUE: usize = 1024;

/// What an agent said, or what became of it.
#[derive(Debug)]
pub enum Event {
    /// It is connected (again).
    Connected {
        /// What it said of itself.
        agent: Agent,
        /// Jobs that it ended and whose outcome it wants recorded.
        finished: Vec<Finished>,
    },
    /// Its stream ended. Its jobs may go on.
    Lost {
        /// Its node.
        node: String,
    },
    /// A job goes on.
    Progress {
        /// Its node.
        node: String,
        /// How far it is.
        progress: Progress,
    },
    /// A job has ended.
    Finished {
        /// Its node.
        node: String,
        /// What came of it.
        finished: Finished,
    },
    /// It tried to reach a store.
    Probed {
        /// Its node.
        node: String,
        /// What came of it.
        result: ProbeResult,
    },
}

/// A connected agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// Name of its node.
    pub node: String,
    /// Unlike that of all other streams.
    pub stream: u64,
    /// Version of its program.
    pub version: String,
    /// What it can do besides what version 1 of the protocol began with.
    pub capabilities: Vec<String>,
    /// Jobs it can run at once.
    pub capacity: u32,
    /// Memory it divides among them.
    pub memory_bytes: u64,
    /// Jobs that ran when it connected.
    pub running: Vec<String>,
}

/// There is no stream to the agent of a node, or it takes no messages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no agent is connected from node '{0}'")]
pub struct NotConnected(pub String);

/// All connected agents.
#[derive(Debug)]
pub struct Agents {
    connected: Mutex<Connected>,
    events: mpsc::Sender<Event>,
}

#[derive(Debug, Default)]
struct Connected {
    /// Tells the streams of one node apart.
    next: u64,
    streams: BTreeMap<String, Stream>,
}

#[derive(Debug)]
struct Stream {
    agent: Agent,
    outgoing: mpsc::Sender<FromController>,
}

impl Agents {
    /// Nobody is connected yet. The receiver gets all events.
    pub fn new() -> (Arc<Self>, mpsc::Receiver<Event>) {
        let (events, receiver) = mpsc::channel(QUEUE);
        (Arc::new(Self { connected: Mutex::default(), events }), receiver)
    }

    /// Those connected now, by node.
    pub fn list(&self) -> Vec<Agent> {
        self.lock().streams.values().map(|stream| stream.agent.clone()).collect()
    }

    /// Whether there is a stream to the agent of a node.
    pub fn is_connected(&self, node: &str) -> bool {
        self.lock().streams.contains_key(node)
    }

    /// Sends a message to the agent of a node.
    ///
    /// # Errors
    /// When it is not connected. That it was sent does not mean that it arrives: after a lost stream, say it again.
    pub fn send(&self, node: &str, message: Message) -> Result<(), NotConnected> {
        let connected = self.lock();
        let stream = connected.streams.get(node).ok_or_else(|| NotConnected(node.to_owned()))?;
        let message = FromController { message: Some(message) };
        stream.outgoing.try_send(message).map_err(|_| NotConnected(node.to_owned()))
    }

    /// Enters an agent whose identity was verified, and takes the place of an earlier stream of the same node, which
    /// thereby ends. What is sent to the agent comes out of the receiver.
    pub async fn join(
        self: &Arc<Self>,
        hello: Hello,
    ) -> (Membership, mpsc::Receiver<FromController>) {
        let (outgoing, receiver) = mpsc::channel(QUEUE);
        let mut agent = Agent {
            node: hello.node,
            stream: 0,
            version: hello.version,
            capabilities: hello.capabilities,
            capacity: hello.capacity.max(1),
            memory_bytes: hello.memory_bytes,
            running: hello.running,
        };
        let node = agent.node.clone();
        let number = {
            let mut connected = self.lock();
            connected.next += 1;
            agent.stream = connected.next;
            let stream = Stream { agent: agent.clone(), outgoing };
            connected.streams.insert(node.clone(), stream);
            agent.stream
        };
        let membership = Membership { agents: self.clone(), node, number };
        self.tell(Event::Connected { agent, finished: hello.finished }).await;
        (membership, receiver)
    }

    async fn tell(&self, event: Event) {
        // Without a receiver the program is ending.
        let _ended = self.events.send(event).await;
    }

    fn lock(&self) -> MutexGuard<'_, Connected> {
        self.connected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One stream of an agent, for whoever serves it.
#[derive(Debug)]
pub struct Membership {
    agents: Arc<Agents>,
    node: String,
    number: u64,
}

impl Membership {
    /// Hands on what the agent said.
    pub async fn progress(&self, progress: Progress) {
        self.agents.tell(Event::Progress { node: self.node.clone(), progress }).await;
    }

    /// Hands on what the agent said.
    pub async fn finished(&self, finished: Finished) {
        self.agents.tell(Event::Finished { node: self.node.clone(), finished }).await;
    }

    /// Hands on what the agent said.
    pub async fn probed(&self, result: ProbeResult) {
        self.agents.tell(Event::Probed { node: self.node.clone(), result }).await;
    }

    /// The stream has ended. To be called whatever ended it.
    pub async fn leave(self) {
        let was_current = {
            let mut connected = self.agents.lock();
            let current = connected.streams.get(&self.node).map(|stream| stream.agent.stream);
            if current == Some(self.number) {
                connected.streams.remove(&self.node);
            }
            current == Some(self.number)
        };
        if was_current {
            self.agents.tell(Event::Lost { node: self.node }).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(node: &str) -> Hello {
        Hello { node: node.to_owned(), ..Default::default() }
    }

    fn beat() -> Message {
        Message::Heartbeat(proto::v1::Heartbeat {})
    }

    #[tokio::test]
    async fn a_newer_stream_takes_the_place_of_an_older_one() {
        let (agents, mut events) = Agents::new();
        let (old, mut to_old) = agents.join(hello("a")).await;
        let (new, mut to_new) = agents.join(hello("a")).await;
        assert!(to_old.recv().await.is_none(), "the older one ends");
        old.leave().await;
        assert_eq!(agents.list().len(), 1, "its end is not that of the newer one");
        agents.send("a", beat()).unwrap();
        assert!(to_new.recv().await.is_some());
        new.leave().await;
        assert_eq!(agents.send("a", beat()), Err(NotConnected("a".to_owned())));
        drop(agents);
        let mut kinds = Vec::new();
        while let Some(event) = events.recv().await {
            kinds.push(matches!(event, Event::Connected { .. }));
        }
        assert_eq!(kinds, [true, true, false], "connected twice, lost once");
    }
}
