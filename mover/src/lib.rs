//! The data mover: reads source trees into a repository and restores them.

pub mod backup;
pub mod cgroup;
pub mod cli;
pub mod fs;
pub mod monitor;
pub mod restore;
