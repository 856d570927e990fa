//! Copies of repositories, as a crash would leave them.
