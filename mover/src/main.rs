//! The `ebackup` command.

use std::process::ExitCode;

/// The allocator gives memory back to the system soon after it is freed, and its threads do not
/// fragment one another: both keep the resident size within the budget.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    mover::cli::run()
}
