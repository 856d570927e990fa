//! The controller: watches the custom resources of a cluster and gives work to the agents on its nodes.
//!
//! ```text
//!  custom resources ── watch ──> dispatch ── plan (pure) ──> status, events
//!        ^                          │  ^
//!        └──────── status ──────────┘  │ agents: who is connected, what they say
//!                                      v
//!               agents <── one gRPC stream each, TLS, token ── transport
//! ```
//! * The custom resources are the only durable state: whoever becomes leader carries on from them and from what the
//!   agents say when they connect.
//! * What to do is decided by pure functions over facts and the time (`queue`); only the code around them touches
//!   the cluster, the stores and clocks.
//! * It knows no chunks: whatever needs a repository is a job that an agent runs.

pub mod api;
pub mod cluster;
pub mod config;
pub mod crds;
pub mod dispatch;
pub mod edge;
pub mod events;
pub mod health;
pub mod location;
pub mod maintenance;
pub mod metrics;
pub mod queue;
pub mod run;
pub mod telemetry;
pub mod text;
pub mod volume;
