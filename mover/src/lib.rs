//! The data mover: reads source trees into a repository and restores them.

pub mod fs;
