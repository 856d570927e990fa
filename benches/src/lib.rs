//! What the benchmarks share: data, repositories, stores, and what the system says about a process.
//!
//! ```text
//! cargo bench -p benches                        every part alone, whole backups, then the tuning table
//! cargo run --release -p benches --bin memory   proofs that memory stays bounded: see its first lines
//! benches/compare.sh                            whole runs against restic, rustic and tar
//! ```
//! All data is made here from seeds, the same on every machine.

pub mod data;
pub mod machine;
pub mod repo;
pub mod store;
pub mod trees;

use std::time::Duration;

use criterion::Criterion;

/// Few samples and short ones: the whole of `cargo bench` is to take minutes. Differences below a few
/// per cent need `--sample-size` and `--measurement-time` on the command line.
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .without_plots()
}

/// Whether cargo runs this as a benchmark, not to see that it runs at all.
pub fn is_bench() -> bool {
    std::env::args().any(|arg| arg == "--bench")
}
