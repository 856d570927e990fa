//! The controller: watches the custom resources of a cluster and gives work to the agents on its nodes.
//!
//! ```text
//!  custom resources ── watch ──> rooms: places, repositories, volumes ── pure plans ──> status, events
//!        ^                          │  ^
//!        └──────── status ──────────┘  │ notices
//!                                      v
//!              agents <── edge (one gRPC stream each, TLS, token) <── desk: the one giver of work
//! ```
//! * The custom resources are the only durable state: whoever becomes leader carries on from them and from what the
//!   agents say when they connect.
//! * What to do is decided by pure functions over facts and the time; only the code around them touches the cluster, the
//!   stores and clocks. [`rooms`] tells how the rooms hang together, and what holds for all of them.
//! * [`selection`] says which objects of a cluster a Backup or a Restore is about, [`layout`] where they lie in a bucket.
//!   Nothing serves these kinds yet.
//! * It knows no chunks: whatever needs a repository is a job that an agent runs.

pub mod api;
pub mod cluster;
pub mod config;
pub mod crds;
pub mod desk;
pub mod edge;
pub mod events;
pub mod health;
pub mod layout;
pub mod metrics;
pub mod places;
pub mod repositories;
pub mod rooms;
pub mod run;
pub mod selection;
pub mod telemetry;
pub mod text;
pub mod volumes;
