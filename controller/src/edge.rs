//! The edge: who may speak to this controller, and which of several controllers works.
//!
//! ```text
//!  leader: who works ── authority: CA and certificate ── transport: TLS, lobby ── identity: whose token ── agents
//! ```
//! It knows agents and the cluster's own objects (Lease, Secret, ConfigMap, TokenReview), but no custom resource. What
//! agents say comes out of it bounded ([`transport`]), as events of [`agents`].

pub mod agents;
pub mod authority;
pub mod identity;
pub mod leader;
pub mod transport;
