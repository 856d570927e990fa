//! `agent` and `restore-wait`: the programs of a cluster.

use std::sync::atomic::AtomicBool;

use anyhow::Result;
use tracing_subscriber::EnvFilter;

use super::args::{Agent, Global, Log, LogFormat, RestoreWait};
use super::{DONE, secret};
use crate::agent::{self, Config, Given};
use crate::repository::IndexCache;

/// Where copies of index segments are kept in the agent's container.
const CACHE_DIR: &str = "/var/cache/ebackup";

pub(super) fn run(global: &Global, args: &Agent) -> Result<u8> {
    start_log(&args.log);
    let s3 = &global.s3;
    let given = Given {
        controller: args.controller.clone(),
        server_name: args.server_name.clone(),
        node: args.node.clone(),
        pod_uid: args.pod_uid.clone(),
        kubelet_root: args.kubelet_root.clone(),
        token_file: args.token_file.clone(),
        ca_file: args.ca_file.clone(),
        memory_bytes: global.memory,
        jobs: args.jobs,
        limit_upload: s3.limit_upload,
        limit_download: s3.limit_download,
        nice: args.nice,
        io_priority: args.io_priority,
        http: args.http,
        cache: IndexCache {
            dir: s3.cache_dir.clone().unwrap_or_else(|| CACHE_DIR.into()),
            max_bytes: s3.cache_size,
        },
        scratch: args.scratch.clone().unwrap_or_else(secret::scratch),
        resolve: s3.resolve.clone(),
    };
    let config = Config::new(given, crate::cgroup::limit_bytes(), crate::cgroup::cpus())?;
    agent::run(config)?;
    Ok(DONE)
}

pub(super) fn restore_wait(args: &RestoreWait, cancelled: &AtomicBool) -> Result<u8> {
    start_log(&args.log);
    agent::wait_for_restore(&args.root, &args.restore, cancelled)?;
    Ok(DONE)
}

/// Logs to standard error from now on: what this program says at the given level, and what libraries warn
/// of.
fn start_log(log: &Log) {
    let filter = EnvFilter::new(format!("warn,mover={}", log.log_level));
    // What cannot be written must not be complained about in the same place: that would be a panic.
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false);
    match log.log_format {
        LogFormat::Text => builder.with_target(false).with_ansi(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}
