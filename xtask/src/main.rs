//! `cargo xtask test`: everything that decides whether a change is good. `cargo xtask s3|garage|apiserver|cluster up` and `down`: the servers that some tests need,
//! for running them one by one. `cargo xtask image`: the container image.

use std::path::Path;
use std::process::ExitCode;

use runner::Log;

mod cluster;
mod garage;
mod image;
mod layers;
mod outputs;
mod plan;
mod programs;
mod runner;
mod s3;
mod schedule;
mod service;

fn main() -> ExitCode {
    let task = std::env::args().nth(1);
    let what = std::env::args().nth(2);
    let out = std::env::args().nth(3);
    let result = match (task.as_deref(), what.as_deref()) {
        (Some("test"), None) => plan::run(false),
        (Some("test"), Some("--install")) => plan::run(true),
        (Some("s3"), Some("up")) => s3::up(&s3::FOR_ALL).map(|_| ()),
        (Some("s3"), Some("down")) => s3::down(&s3::FOR_ALL),
        (Some("garage"), Some("build")) => garage::build(),
        (Some("garage"), Some("up")) => garage::up().map(|_| ()),
        (Some("garage"), Some("down")) => garage::down(),
        (Some("apiserver"), Some("up")) => cluster::apiserver_up().map(|_| ()),
        (Some("apiserver"), Some("down")) => cluster::apiserver_down(),
        (Some("cluster"), Some("up")) => cluster::up().map(|_| ()),
        (Some("cluster"), Some("down")) => cluster::down(),
        (Some("cluster"), Some("smoke")) => cluster::smoke(&Log::TERMINAL),
        (Some("image"), built) => image::build(built.map(Path::new), out.as_deref().map(Path::new)),
        _ => Err(anyhow::anyhow!(
            "usage: cargo xtask test [--install] | s3|garage|apiserver|cluster up|down | garage build | cluster smoke | \
             image [BUILT [FOLDER]]"
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("xtask: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stderr, reason = "this is what the program is for")]
fn say(text: &str) {
    eprintln!("{text}");
}
