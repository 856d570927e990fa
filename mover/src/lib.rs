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

/// The wall clock, for what is recorded for people; nothing depends on it being right. A time that no record
/// can hold counts as the nearest that one can.
#[expect(clippy::disallowed_methods, reason = "this is where time is taken and passed on")]
fn now() -> jiff::Timestamp {
    let time = std::time::SystemTime::now();
    jiff::Timestamp::try_from(time).unwrap_or(if time < std::time::UNIX_EPOCH {
        jiff::Timestamp::MIN
    } else {
        jiff::Timestamp::MAX
    })
}
