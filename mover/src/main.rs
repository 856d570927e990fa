//! The `ebackup` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    mover::allocator::give_back();
    mover::cli::run()
}
