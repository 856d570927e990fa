//! The desk: the one giver of work to agents. Owners ask it for places, it knows what each agent has, and what agents
//! say of a job goes to the owner of that job.
//!
//! ```text
//!  volumes ──────┐ Request                        ┌── Assign, Cancel, Recorded, Renew, Probe ──> agents
//!  repositories ─┼────────> ledger (pure) ────────┤
//!  places ───────┘            ^      │            └── Notice ──> the owner
//!                             │      └ queue (pure): who is next
//!                       what agents say
//! ```
//! A job's way: **Enter** it → it is queued → **Granted** a place on a node → its owner makes that last where it must
//! (`Accepted` in the cluster), and **Gives** the job → Progress → Finished → the owner writes what came of it →
//! **Record**. What the cluster says to be a node's already is **Placed** there at once.
//!
//! * Nothing here lasts: owners tell after a start what has a place, agents what they have. Until the owners have told
//!   all, agents are not heard.
//! * A job has at most one place, and takes its slot from Granted on, so that limits hold while the cluster is written
//!   to. Those of an agent that is away for long take none.
//! * The outcome of a job is recorded only when its owner says so. Nobody else's word ends a job.
//! * An agent is told the credentials of a location when it works with others than those in force, however it came by
//!   them; and only agents that have a job for that location.
//! * Owners never wait for the desk: their requests are at most a few for each job. The desk waits for owners.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proto::v1::from_controller::Message;
use proto::v1::{Credentials, ProbeResult};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::edge::agents::{Agents, Event};

mod ledger;
pub mod queue;

pub use ledger::{Has, Need, Notice, Owner, Request, Ticket};
use ledger::{Ledger, Post};
use queue::Limits;

/// Notices that may wait for their owner before the desk does.
const NOTICES: usize = 1024;

/// So many requests and events are taken in before it is looked at what to do, if they are there.
const AT_ONCE: usize = 256;

/// The connected agents by node, with a number that is another one for each stream.
pub type Crew = BTreeMap<String, u64>;

/// Credentials in force, by location.
pub type Keys = BTreeMap<String, Credentials>;

/// What people set.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Volumes at once.
    pub limits: Limits,
    /// Jobs of an agent that is away for so long take no slots any more.
    pub agent_uncounted: Duration,
}

/// By which a room asks the desk for something.
#[derive(Debug, Clone)]
pub struct Desk {
    requests: mpsc::UnboundedSender<Request>,
}

impl Desk {
    /// Asks. Without a desk the program is ending.
    pub fn ask(&self, request: Request) {
        let _ended = self.requests.send(request);
    }
}

/// The ends of the desk that other rooms hold.
#[derive(Debug)]
pub struct Ends {
    /// To ask it.
    pub desk: Desk,
    /// Who is connected.
    pub crew: watch::Receiver<Crew>,
    /// Notices for volumes.
    pub volumes: mpsc::Receiver<Notice>,
    /// Notices for repositories.
    pub repositories: mpsc::Receiver<Notice>,
    /// Whether nodes reach stores: the node and what it found.
    pub probed: mpsc::Receiver<(String, ProbeResult)>,
}

/// The desk before it runs.
#[derive(Debug)]
pub struct Room {
    ledger: Ledger,
    requests: mpsc::UnboundedReceiver<Request>,
    crew: watch::Sender<Crew>,
    volumes: mpsc::Sender<Notice>,
    repositories: mpsc::Sender<Notice>,
    probed: mpsc::Sender<(String, ProbeResult)>,
}

/// Makes a desk.
pub fn new(settings: Settings) -> (Room, Ends) {
    let (asking, requests) = mpsc::unbounded_channel();
    let (crew, crew_seen) = watch::channel(Crew::new());
    let (volumes, to_volumes) = mpsc::channel(NOTICES);
    let (repositories, to_repositories) = mpsc::channel(NOTICES);
    let (probed, probes) = mpsc::channel(NOTICES);
    let ledger = Ledger::new(settings.limits, settings.agent_uncounted, Instant::now());
    let room = Room { ledger, requests, crew, volumes, repositories, probed };
    let ends = Ends {
        desk: Desk { requests: asking },
        crew: crew_seen,
        volumes: to_volumes,
        repositories: to_repositories,
        probed: probes,
    };
    (room, ends)
}

impl Room {
    /// Runs until the events end.
    pub async fn run(
        mut self,
        agents: Arc<Agents>,
        mut events: mpsc::Receiver<Event>,
        mut keys: watch::Receiver<Keys>,
    ) {
        let mut wake = None;
        let mut posted = Posted { agents: &agents, notices: Vec::new(), probes: Vec::new() };
        loop {
            let time = async {
                match wake {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(request) => self.ledger.ask(request, &mut posted, Instant::now()),
                    None => return,
                },
                event = events.recv(), if self.ledger.is_open() => match event {
                    Some(event) => self.hear(event, &mut posted),
                    None => return,
                },
                Ok(()) = keys.changed() => {}
                () = time => {}
            }
            for _ in 0..AT_ONCE {
                let request = self.requests.try_recv().ok();
                let event = if self.ledger.is_open() { events.try_recv().ok() } else { None };
                if request.is_none() && event.is_none() {
                    break;
                }
                if let Some(request) = request {
                    self.ledger.ask(request, &mut posted, Instant::now());
                }
                if let Some(event) = event {
                    self.hear(event, &mut posted);
                }
            }
            let in_force = keys.borrow_and_update().clone();
            self.ledger.exchange(in_force, &mut posted);
            wake = self.ledger.settle(&mut posted, Instant::now());
            self.deliver(&mut posted).await;
        }
    }

    fn hear(&mut self, event: Event, posted: &mut Posted<'_>) {
        match &event {
            Event::Connected { agent, .. } => {
                let (node, number) = (agent.node.clone(), agent.stream);
                self.crew.send_modify(|crew| {
                    crew.insert(node, number);
                });
            }
            // An end that was overtaken by the next beginning.
            Event::Lost { node } if posted.agents.is_connected(node) => return,
            Event::Lost { node } => self.crew.send_modify(|crew| {
                crew.remove(node);
            }),
            _ => {}
        }
        self.ledger.hear(event, posted, Instant::now());
    }

    /// Hands notices out. An owner that is gone has ended the program.
    async fn deliver(&self, posted: &mut Posted<'_>) {
        for (owner, notice) in posted.notices.drain(..) {
            let to = match owner {
                Owner::Volumes => &self.volumes,
                Owner::Repositories => &self.repositories,
            };
            let _ended = to.send(notice).await;
        }
        for probe in posted.probes.drain(..) {
            let _ended = self.probed.send(probe).await;
        }
    }
}

struct Posted<'a> {
    agents: &'a Agents,
    notices: Vec<(Owner, Notice)>,
    probes: Vec<(String, ProbeResult)>,
}

impl Post for Posted<'_> {
    fn send(&mut self, node: &str, message: Message) -> bool {
        self.agents.send(node, message).is_ok()
    }

    fn tell(&mut self, owner: Owner, notice: Notice) {
        self.notices.push((owner, notice));
    }

    fn probed(&mut self, node: String, result: ProbeResult) {
        self.probes.push((node, result));
    }
}
