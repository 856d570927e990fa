//! The rooms of the leader, and how they hang together.
//!
//! ```text
//!                         keys
//!        ┌──────────────────────────────────────────┐
//!        │            Places             Shelves    v
//!  places ──────────────> repositories ──────────> volumes
//!    │  ^───────────────────┘ (Shelves: why one does not open)
//!    │                         │  Request, Notice   │
//!    └── Probe ──────────────> desk <───────────────┘     desk <──> edge (agents)
//! ```
//! | room | keeps | publishes |
//! |---|---|---|
//! | `desk` | what agents have and who is next; nothing that lasts | `Crew`: who is connected |
//! | `places` | BackupStorageLocations: checked, and how nodes reach them | `Places`: what is usable, with an open store each; `Keys` for the desk |
//! | `repositories` | BackupRepositories: opened, pruned | `Shelves`: what jobs need, or why they must wait |
//! | `volumes` | PodVolumeBackups, PodVolumeRestores | |
//!
//! What holds for all of them:
//! * Each is one task with its own mailbox; nobody reads another's fields. A room learns of another by the cluster's
//!   objects, by what it publishes, or, of the desk, by notices.
//! * What to do is decided by pure functions of facts and time (`ledger`, `queue`, `job`, `keeper`, `status`); the code
//!   around them asks the cluster, the stores and the clocks.
//! * Whatever must be remembered is in a custom resource: each can be killed at any time, and begins again from lists.
//! * Nobody waits for who may wait for him: rooms never wait for the desk; the desk waits for rooms to take its notices;
//!   what is published replaces what was not seen.
//! * Two clocks: what people read is told by theirs; intervals are measured by one that nobody sets.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use kube::Client;
use tokio::sync::{mpsc, watch};

use crate::api::Timestamp;
use crate::desk::queue::Limits;
use crate::desk::{self, Keys};
use crate::edge::agents::{Agents, Event};
use crate::events::Events;
use crate::health::Readiness;
use crate::metrics::Metrics;
use crate::{places, repositories, volumes};

/// What people set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Volumes at once.
    pub limits: Limits,
    /// No progress for so long ends a job. Zero: never.
    pub stall: Duration,
    /// Jobs of an agent that is away for so long take no slots any more.
    pub agent_uncounted: Duration,
    /// Jobs of an agent that is away for so long fail.
    pub agent_lost: Duration,
    /// Volumes that wait for so long for anything but their turn fail.
    pub start_within: Duration,
    /// Bytes a second, uploads of one job. 0: no limit.
    pub limit_upload: u64,
    /// Bytes a second, downloads of one job. 0: no limit.
    pub limit_download: u64,
    /// How often new repositories are pruned. Zero: never.
    pub prune_every: Duration,
    /// How often each agent tries whether it reaches each location.
    pub probe_every: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            limits: Limits { cluster: 3, node: 0 },
            stall: Duration::from_secs(30 * 60),
            agent_uncounted: Duration::from_secs(60),
            agent_lost: Duration::from_secs(10 * 60),
            start_within: Duration::from_secs(30 * 60),
            limit_upload: 0,
            limit_download: 0,
            prune_every: Duration::from_secs(24 * 3600),
            probe_every: Duration::from_secs(600),
        }
    }
}

/// All that comes from outside.
#[derive(Clone)]
pub struct Context {
    /// The cluster.
    pub client: Client,
    /// The namespace of the custom resources.
    pub namespace: String,
    /// Who is connected.
    pub agents: Arc<Agents>,
    /// The time, for people.
    pub clock: Arc<dyn Fn() -> Timestamp + Send + Sync>,
    /// What people set.
    pub settings: Settings,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// What people are told.
    pub events: Events,
    /// Whether it works.
    pub readiness: Readiness,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("namespace", &self.namespace)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// Runs all rooms until the events of agents end.
///
/// # Errors
/// When one of them cannot go on.
pub async fn run(context: Context, events: mpsc::Receiver<Event>) -> Result<()> {
    let settings = &context.settings;
    let (room, ends) = desk::new(desk::Settings {
        limits: settings.limits,
        agent_uncounted: settings.agent_uncounted,
    });
    let desk::Ends { desk, crew, volumes, repositories, probed } = ends;
    let (keys, keys_seen) = watch::channel(Keys::new());
    let (places, places_seen) = watch::channel(None);
    let (shelves, shelves_seen) = watch::channel(None);
    let desk_room = room.run(context.agents.clone(), events, keys_seen);
    let published = places::Published { places, keys };
    let places_room = places::run(
        context.clone(),
        desk.clone(),
        places::Heard { crew, probed, shelves: shelves_seen.clone() },
        published,
    );
    let repositories_room =
        repositories::run(context.clone(), desk.clone(), repositories, places_seen, shelves);
    let volumes_room = volumes::run(context, desk, volumes, shelves_seen);
    tokio::select! {
        () = desk_room => Ok(()),
        ended = places_room => ended,
        ended = repositories_room => ended,
        ended = volumes_room => ended,
    }
}
