//! What the desk knows, and what it does about what it hears: pure but for the messages, which go through [`Post`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proto::v1::from_controller::Message;
use proto::v1::{Assign, Cancel, Credentials, Finished, Job, Probe, ProbeResult, Progress};
use proto::v1::{Recorded, Renew};
use tokio::time::Instant;

use super::queue::{self, Kind, Limits, Running, Turns, Waiting, Why};
use crate::edge::agents::{Agent, Event};

/// A UID's length. The id of a volume's job is a UID; what a repository needs has a suffix behind it.
const UID_BYTES: usize = 36;

/// Work on a repository that restores wait beside gets its turn after so long all the same.
const OVERDUE: Duration = Duration::from_secs(3600);

/// Whose jobs they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// Those of PodVolumeBackups and PodVolumeRestores.
    Volumes,
    /// Those of repositories.
    Repositories,
}

impl Owner {
    /// Owner of the job with this id.
    pub fn of(job: &str) -> Self {
        if job.as_bytes().get(UID_BYTES) == Some(&b'-') {
            Self::Repositories
        } else {
            Self::Volumes
        }
    }
}

/// A job that is to be given to an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// Its id.
    pub job: String,
    /// Name of the location that it works with.
    pub location: String,
    /// What it takes.
    pub need: Need,
}

/// What a job takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Need {
    /// A slot for a volume, on its node.
    Slot {
        /// The node.
        node: String,
        /// What is done with the volume.
        kind: Kind,
        /// Name of the backup or restore that it is part of.
        group: String,
        /// When it was created, in seconds.
        created: i64,
    },
    /// Room on any node.
    Room {
        /// Nodes that are to be taken last: they do not reach the store.
        avoid: BTreeSet<String>,
        /// Whether volumes wait for it: then what an agent lacks yet takes none of its room.
        first: bool,
    },
}

/// Whether the agent of its node has a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Has {
    /// Its agent is away since then, or did not connect since this program began.
    Unknown {
        /// Since when.
        since: Instant,
    },
    /// It is connected, and does not have it.
    No,
    /// It has it, was sent it, or has ended it.
    Yes,
}

/// What an owner asks for. Everything may be asked again.
#[derive(Debug)]
pub enum Request {
    /// To be queued.
    Enter(Ticket),
    /// The job is its node's, as the cluster knows; it takes its slot whatever others do.
    Place(Ticket, String),
    /// Nobody wants it any more: it leaves the queue, or is ended.
    Withdraw(String),
    /// Send it to the agent of the node where it has a place.
    Give(Box<Job>),
    /// Have an agent end it.
    Cancel {
        /// Of the agent.
        node: String,
        /// Its id.
        job: String,
    },
    /// The outcome is written where it lasts: the agent may forget it.
    Record {
        /// Of the agent.
        node: String,
        /// Its id.
        job: String,
    },
    /// Let the agent of a node try whether it reaches a store.
    Probe {
        /// Of the agent.
        node: String,
        /// What to try.
        probe: Box<Probe>,
    },
    /// All jobs that have a place are told: agents can be heard.
    Open(Owner),
}

/// What the desk tells an owner.
#[derive(Debug, Clone, PartialEq)]
pub enum Notice {
    /// A job has a place there, until it is withdrawn.
    Granted {
        /// The job.
        job: String,
        /// The node.
        node: String,
    },
    /// It waits for this.
    Waits {
        /// The job.
        job: String,
        /// Why.
        why: Why,
    },
    /// Whether its agent has it.
    Agent {
        /// The job.
        job: String,
        /// Whether.
        has: Has,
    },
    /// An agent runs a job that is nobody's: who wants it gives it a place.
    Stray {
        /// The job.
        job: String,
        /// Where it runs.
        node: String,
    },
    /// It gets on.
    Progress(Progress),
    /// It has ended. To be recorded, whosoever it was.
    Finished {
        /// Where it ran.
        node: String,
        /// What came of it.
        finished: Box<Finished>,
    },
}

/// Where messages go.
pub(super) trait Post {
    /// To the agent of a node. Whether there is one that takes it.
    fn send(&mut self, node: &str, message: Message) -> bool;
    /// To an owner.
    fn tell(&mut self, owner: Owner, notice: Notice);
    /// To whoever asked whether stores are reached.
    fn probed(&mut self, node: String, result: ProbeResult);
}

/// A job that was asked for.
#[derive(Debug)]
struct Held {
    ticket: Ticket,
    stage: Stage,
    entered: Instant,
}

#[derive(Debug, PartialEq)]
enum Stage {
    Waiting(Option<Why>),
    /// It has a place; its owner makes that last, then gives it.
    Granted(String),
    Placed {
        node: String,
        has: Has,
        ended: bool,
    },
}

impl Stage {
    fn node(&self) -> Option<&str> {
        match self {
            Self::Waiting(_) => None,
            Self::Granted(node) | Self::Placed { node, .. } => Some(node),
        }
    }

    fn is_on(&self, at: &str) -> bool {
        matches!(self, Self::Placed { node, .. } if node == at)
    }
}

/// What is known of a node.
#[derive(Debug)]
struct Node {
    /// How many jobs its agent takes at once, while it is connected.
    capacity: Option<u32>,
    /// Since when it is connected or not.
    since: Instant,
    /// Jobs that its agent runs or has ended, while it is connected.
    has: BTreeSet<String>,
    /// The credentials that it was last told, by location.
    told: BTreeMap<String, Credentials>,
}

/// All of it.
#[derive(Debug)]
pub(super) struct Ledger {
    limits: Limits,
    uncounted: Duration,
    began: Instant,
    held: BTreeMap<String, Held>,
    nodes: BTreeMap<String, Node>,
    turns: Turns,
    /// Credentials in force, by location.
    keys: BTreeMap<String, Credentials>,
    open: BTreeSet<Owner>,
    changed: bool,
    /// When time alone changes something.
    wake: Option<Instant>,
}

impl Ledger {
    /// Nobody has asked for anything. Jobs of an agent that is away for `uncounted` take no slots any more.
    pub(super) fn new(limits: Limits, uncounted: Duration, now: Instant) -> Self {
        Self {
            limits,
            uncounted,
            began: now,
            held: BTreeMap::new(),
            nodes: BTreeMap::new(),
            turns: Turns::default(),
            keys: BTreeMap::new(),
            open: BTreeSet::new(),
            changed: false,
            wake: None,
        }
    }

    /// Whether agents can be heard: before, what they run would be taken for nobody's.
    pub(super) fn is_open(&self) -> bool {
        self.open.len() == 2
    }

    /// An owner asks for something.
    pub(super) fn ask(&mut self, request: Request, post: &mut impl Post, now: Instant) {
        self.changed = true;
        match request {
            Request::Enter(ticket) => self.enter(ticket, now),
            Request::Place(ticket, node) => self.place(ticket, node, post, now),
            Request::Withdraw(job) => self.withdraw(&job, post),
            Request::Give(job) => self.give(*job, post, now),
            Request::Cancel { node, job } => {
                post.send(&node, Message::Cancel(Cancel { job_id: job }));
            }
            Request::Record { node, job } => self.record(&node, job, post),
            Request::Probe { node, probe } => {
                post.send(&node, Message::Probe(*probe));
            }
            Request::Open(owner) => {
                self.open.insert(owner);
            }
        }
    }

    fn enter(&mut self, ticket: Ticket, now: Instant) {
        match self.held.get_mut(&ticket.job) {
            Some(held) => held.ticket = ticket,
            None => {
                let stage = Stage::Waiting(None);
                self.held.insert(ticket.job.clone(), Held { ticket, stage, entered: now });
            }
        }
    }

    fn place(&mut self, ticket: Ticket, node: String, post: &mut impl Post, now: Instant) {
        let job = ticket.job.clone();
        let old = self.held.get(&job);
        if old.is_some_and(|held| held.stage.is_on(&node)) {
            return;
        }
        let has = self.has(&node, &job);
        let entered = old.map_or(now, |held| held.entered);
        let stage = Stage::Placed { node, has, ended: false };
        self.held.insert(job.clone(), Held { ticket, stage, entered });
        post.tell(Owner::of(&job), Notice::Agent { job, has });
    }

    fn has(&self, node: &str, job: &str) -> Has {
        match self.nodes.get(node) {
            None => Has::Unknown { since: self.began },
            Some(Node { capacity: None, since, .. }) => Has::Unknown { since: *since },
            Some(node) if node.has.contains(job) => Has::Yes,
            Some(_) => Has::No,
        }
    }

    fn withdraw(&mut self, job: &str, post: &mut impl Post) {
        let Some(held) = self.held.remove(job) else {
            return;
        };
        if let Stage::Placed { node, has: Has::Yes, ended } = held.stage {
            let job_id = job.to_owned();
            if ended {
                self.record(&node, job_id, post);
            } else {
                post.send(&node, Message::Cancel(Cancel { job_id }));
            }
        }
    }

    fn give(&mut self, job: Job, post: &mut impl Post, now: Instant) {
        let id = job.id.clone();
        let Some(held) = self.held.get_mut(&id) else {
            return;
        };
        let Some(node) = held.stage.node().map(str::to_owned) else {
            return;
        };
        let location = held.ticket.location.clone();
        let repository = job.repository.as_ref();
        let key = repository.and_then(|repository| repository.credentials.clone());
        let sent = post.send(&node, Message::Assign(Assign { job: Some(job) }));
        // Who takes no message is as good as lost, and soon is.
        let has = if sent { Has::Yes } else { Has::Unknown { since: now } };
        held.stage = Stage::Placed { node: node.clone(), has, ended: false };
        post.tell(Owner::of(&id), Notice::Agent { job: id.clone(), has });
        if let (true, Some(known)) = (sent, self.nodes.get_mut(&node)) {
            known.has.insert(id);
            key.into_iter().for_each(|key| drop(known.told.insert(location.clone(), key)));
            self.renew(&node, &location, post);
        }
    }

    fn record(&mut self, node: &str, job: String, post: &mut impl Post) {
        if self.held.get(&job).is_some_and(|held| held.stage.is_on(node)) {
            self.held.remove(&job);
        }
        if let Some(node) = self.nodes.get_mut(node) {
            node.has.remove(&job);
        }
        // Who is away says it again when it is back.
        post.send(node, Message::Recorded(Recorded { job_id: job }));
    }

    /// An agent says something.
    pub(super) fn hear(&mut self, event: Event, post: &mut impl Post, now: Instant) {
        match event {
            Event::Connected { agent, finished } => self.connected(agent, finished, post, now),
            Event::Lost { node } => self.lost(&node, post, now),
            Event::Progress { node, progress } => self.progress(&node, progress, post),
            Event::Finished { node, finished } => self.finished(node, finished, post),
            Event::Probed { node, result } => post.probed(node, result),
        }
    }

    /// An agent says what it has: the owners learn what it lacks, and what nobody wants is ended.
    fn connected(
        &mut self,
        agent: Agent,
        finished: Vec<Finished>,
        post: &mut impl Post,
        now: Instant,
    ) {
        self.changed = true;
        let Agent { node, capacity, running, .. } = agent;
        let ended = finished.iter().map(|finished| finished.job_id.clone());
        let has: BTreeSet<String> = running.iter().cloned().chain(ended).collect();
        let here =
            Node { capacity: Some(capacity), since: now, has: has.clone(), told: BTreeMap::new() };
        self.nodes.insert(node.clone(), here);
        let mut locations = BTreeSet::new();
        for (job, held) in self.held.iter_mut().filter(|(_, held)| held.stage.is_on(&node)) {
            let has = if has.contains(job) { Has::Yes } else { Has::No };
            if has == Has::Yes {
                locations.insert(held.ticket.location.clone());
            }
            held.stage = Stage::Placed { node: node.clone(), has, ended: false };
            post.tell(Owner::of(job), Notice::Agent { job: job.clone(), has });
        }
        for job in running {
            if self.held.get(&job).is_some_and(|held| held.stage.is_on(&node)) {
                continue;
            }
            match Owner::of(&job) {
                // All that the cluster wants are known here.
                Owner::Volumes => {
                    post.send(&node, Message::Cancel(Cancel { job_id: job }));
                }
                owner => post.tell(owner, Notice::Stray { job, node: node.clone() }),
            }
        }
        for finished in finished {
            self.finished(node.clone(), finished, post);
        }
        locations.iter().for_each(|location| self.renew(&node, location, post));
    }

    fn lost(&mut self, node: &str, post: &mut impl Post, now: Instant) {
        self.changed = true;
        let away = Node { capacity: None, since: now, has: BTreeSet::new(), told: BTreeMap::new() };
        self.nodes.insert(node.to_owned(), away);
        for (job, held) in &mut self.held {
            if let Stage::Placed { node: on, has, .. } = &mut held.stage
                && on == node
            {
                *has = Has::Unknown { since: now };
                post.tell(Owner::of(job), Notice::Agent { job: job.clone(), has: *has });
            }
        }
    }

    fn progress(&mut self, node: &str, progress: Progress, post: &mut impl Post) {
        let job = &progress.job_id;
        if self.held.get(job).is_some_and(|held| held.stage.is_on(node)) {
            post.tell(Owner::of(job), Notice::Progress(progress));
        }
    }

    fn finished(&mut self, node: String, finished: Finished, post: &mut impl Post) {
        let job = &finished.job_id;
        if let Some(known) = self.nodes.get_mut(&node) {
            known.has.insert(job.clone());
        }
        match self.held.get_mut(job).map(|held| &mut held.stage) {
            // Nobody's any more, perhaps: its owner knows.
            None => {}
            Some(Stage::Placed { node: on, has, ended }) if *on == node => {
                (*has, *ended) = (Has::Yes, true);
            }
            // It was given to another node: whoever says so is mistaken, or lies.
            Some(_) => {
                tracing::warn!(node, job, "an outcome from a wrong node");
                self.record(&node, finished.job_id, post);
                return;
            }
        }
        let owner = Owner::of(job);
        post.tell(owner, Notice::Finished { node, finished: Box::new(finished) });
    }

    /// These credentials are in force now, by location: agents that work with others are told.
    pub(super) fn exchange(&mut self, keys: BTreeMap<String, Credentials>, post: &mut impl Post) {
        if self.keys == keys {
            return;
        }
        self.keys = keys;
        let mut uses = BTreeSet::new();
        for held in self.held.values() {
            if let Stage::Placed { node, has: Has::Yes, .. } = &held.stage {
                uses.insert((node.clone(), held.ticket.location.clone()));
            }
        }
        uses.iter().for_each(|(node, location)| self.renew(node, location, post));
    }

    /// Tells an agent the credentials in force, unless it knows them.
    fn renew(&mut self, node: &str, location: &str, post: &mut impl Post) {
        let (Some(key), Some(known)) = (self.keys.get(location), self.nodes.get_mut(node)) else {
            return;
        };
        if known.told.get(location) == Some(key) {
            return;
        }
        let credentials = Some(key.clone());
        let renew = Renew { location: location.to_owned(), credentials };
        if post.send(node, Message::Renew(renew)) {
            known.told.insert(location.to_owned(), key.clone());
        }
    }

    /// Gives places to those that can have one, and tells the others why not. When to look again, if only time
    /// changes something.
    pub(super) fn settle(&mut self, post: &mut impl Post, now: Instant) -> Option<Instant> {
        self.changed |= self.wake.is_some_and(|at| at <= now);
        if !self.changed || !self.is_open() {
            return self.wake;
        }
        self.changed = false;
        self.give_room(true, &BTreeSet::new(), post, now);
        let plan = self.plan(now);
        let mut beside = BTreeSet::new();
        for job in &plan.assign {
            let node = match self.held.get(job).map(|held| &held.ticket.need) {
                Some(Need::Slot { node, .. }) => node.clone(),
                _ => continue,
            };
            self.grant(job, node, post);
        }
        for (job, why) in plan.wait {
            let Some(held) = self.held.get_mut(&job) else { continue };
            if let Need::Slot { node, kind: Kind::Restore, .. } = &held.ticket.need {
                beside.insert(node.clone());
            }
            let said = Stage::Waiting(Some(why));
            if held.stage != said {
                held.stage = said;
                post.tell(Owner::of(&job), Notice::Waits { job, why });
            }
        }
        self.give_room(false, &beside, post, now);
        self.wake = self.next_wake(now);
        self.wake
    }

    /// When jobs of agents that are away stop to count, or work on a repository is overdue.
    fn next_wake(&self, now: Instant) -> Option<Instant> {
        let times = self.held.values().filter_map(|held| match (&held.stage, &held.ticket.need) {
            (Stage::Waiting(_), Need::Room { first: false, .. }) => Some(held.entered + OVERDUE),
            (Stage::Placed { has: Has::Unknown { since }, .. }, _) => Some(*since + self.uncounted),
            _ => None,
        });
        times.filter(|at| *at > now).min()
    }

    fn grant(&mut self, job: &str, node: String, post: &mut impl Post) {
        if let Some(held) = self.held.get_mut(job) {
            held.stage = Stage::Granted(node.clone());
            post.tell(Owner::of(job), Notice::Granted { job: job.to_owned(), node });
        }
    }

    /// Jobs that take slots, or room on their nodes.
    fn running(&self, now: Instant) -> impl Iterator<Item = (&Held, &str)> {
        self.held.values().filter_map(move |held| {
            let node = held.stage.node()?;
            let known = self.nodes.get(node);
            let since = known.map_or(self.began, |known| known.since);
            let here = known.is_some_and(|known| known.capacity.is_some());
            (here || now.saturating_duration_since(since) < self.uncounted).then_some((held, node))
        })
    }

    fn plan(&mut self, now: Instant) -> queue::Plan {
        let running: Vec<Running> = self
            .running(now)
            .map(|(held, node)| Running {
                node: node.to_owned(),
                volume: matches!(held.ticket.need, Need::Slot { .. }),
            })
            .collect();
        let capacity: BTreeMap<String, u32> = self
            .nodes
            .iter()
            .filter_map(|(node, known)| Some((node.clone(), known.capacity?)))
            .collect();
        let mut groups = BTreeSet::new();
        let mut waiting = Vec::new();
        for held in self.held.values() {
            let Need::Slot { node, kind, group, created } = &held.ticket.need else { continue };
            groups.insert((*kind, group.clone()));
            if matches!(held.stage, Stage::Waiting(_)) {
                waiting.push(Waiting {
                    id: held.ticket.job.clone(),
                    kind: *kind,
                    group: group.clone(),
                    created: *created,
                    node: node.clone(),
                });
            }
        }
        self.turns.retain(&groups);
        queue::plan(&waiting, &running, &capacity, self.limits, &mut self.turns)
    }

    /// Gives jobs on repositories to the agents with the fewest jobs that have room; those that volumes wait for, or
    /// the others, which do not go where restores wait.
    fn give_room(
        &mut self,
        first: bool,
        beside: &BTreeSet<String>,
        post: &mut impl Post,
        now: Instant,
    ) {
        let waits = |held: &&Held| {
            let is_its =
                matches!(&held.ticket.need, Need::Room { first: its, .. } if *its == first);
            is_its && matches!(held.stage, Stage::Waiting(_))
        };
        let jobs: Vec<String> =
            self.held.values().filter(waits).map(|held| held.ticket.job.clone()).collect();
        for job in jobs {
            if let Some(node) = self.room_for(&job, beside, now) {
                self.grant(&job, node, post);
            }
        }
    }

    fn room_for(&self, job: &str, beside: &BTreeSet<String>, now: Instant) -> Option<String> {
        let held = self.held.get(job)?;
        let Need::Room { avoid, first } = &held.ticket.need else {
            return None;
        };
        let overdue = now.saturating_duration_since(held.entered) >= OVERDUE;
        let mut load: BTreeMap<&str, u32> = BTreeMap::new();
        for (other, node) in self.running(now) {
            let lacks = matches!(other.stage, Stage::Placed { has: Has::No, .. });
            if !(lacks && *first) {
                *load.entry(node).or_default() += 1;
            }
        }
        let on = |node: &str| load.get(node).copied().unwrap_or(0);
        self.nodes
            .iter()
            .filter(|(node, known)| known.capacity.is_some_and(|capacity| on(node) < capacity))
            .filter(|(node, _)| overdue || !beside.contains(*node))
            .map(|(node, _)| node)
            .min_by_key(|node| (avoid.contains(*node), on(node), (*node).clone()))
            .cloned()
    }
}

#[cfg(test)]
mod tests;
