//! The `ebackup-controller` program.

use std::process::ExitCode;

use clap::Parser;
use controller::config::{CommandLine, Instead};
use controller::{crds, run, telemetry};

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            // Also when there is no log yet.
            let _written = std::io::Write::write_all(
                &mut std::io::stderr(),
                format!("ebackup-controller: {error:#}\n").as_bytes(),
            );
            ExitCode::FAILURE
        }
    }
}

fn start() -> anyhow::Result<()> {
    let line = CommandLine::parse();
    if let Some(Instead::Crds) = line.instead {
        std::io::Write::write_all(&mut std::io::stdout(), crds::crds()?.as_bytes())?;
        return Ok(());
    }
    let config = line.config()?;
    telemetry::start(config.log_format, &config.log_level)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(run::run(config));
    // Who is not the leader any more must not wait for what still runs.
    runtime.shutdown_background();
    ended
}
