//! The data mover: reads source trees into a repository and restores them, for whoever types a command
//! ([`cli`]) and for the controller of a cluster ([`agent`]).

pub mod agent;
pub mod allocator;
pub mod backup;
pub mod cgroup;
pub mod cli;
pub mod fs;
pub mod monitor;
pub mod repository;
pub mod restore;

/// The wall clock, for what is recorded for people; nothing depends on it being right.
fn now() -> jiff::Timestamp {
    jiff::Timestamp::now()
}
