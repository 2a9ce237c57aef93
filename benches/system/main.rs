//! The whole system beside its peers, on one PostgreSQL and one S3 server: full backup, restore until
//! PostgreSQL answers, WAL throughput, and how old the newest durable commit is under a trickle.
//!
//! `tools/bench` installs the peers, builds everything optimised and runs this. A peer is a script
//! (`tools/peers`); ours is one of them and is called like the others. Rounds are interleaved: every
//! peer plays a phase before any plays it again, and figures are medians with the least and the greatest.
//!
//! # What is counted
//! - *tool*: CPU of all processes that the peer started, wherever they hang: below its script, below
//!   PostgreSQL's archiver, or as daemons that left their parents.
//! - *postgres*: CPU of the server's own processes. *s3*: CPU of the S3 server.
//! - *memory*: greatest sum of resident memory of the tool's processes at one moment, looked at every
//!   20 ms. Shared pages count once for each process, as `top` shows them.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::disallowed_methods)]
#![allow(clippy::print_stdout, unreachable_pub, clippy::too_many_lines)]

#[path = "../../tests/harness/mod.rs"]
#[allow(unused_imports, reason = "the tests' own S3 server is not used here")]
mod harness;

mod base;
mod commits;
mod live;
mod peer;
mod processes;
mod report;
mod s3;
mod stage;
mod wal;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use peer::Peer;
use report::Report;
use stage::Stage;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Phase {
    /// Full backup to S3, and restore from it until PostgreSQL answers.
    Base,
    /// WAL as fast as this PostgreSQL writes it.
    Wal,
    /// Age of the oldest commit that is not durable, at five commits a second.
    Trickle,
    /// Time from commit to durable, of uploads and of fsyncs, by load; ours alone.
    Latency,
}

/// Tidemark beside its peers.
#[derive(Debug, Parser)]
struct Options {
    /// Run it: without this only these words are printed, so that `cargo bench` stays short.
    #[arg(long)]
    run: bool,
    /// What `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
    /// Serve S3 from this process until its standard input ends; what the benchmark calls itself with.
    #[arg(long, hide = true)]
    serve_s3: Option<PathBuf>,
    /// Rounds of each phase.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Phases, in this order.
    #[arg(long, value_delimiter = ',', default_values = ["base", "wal", "trickle", "latency"])]
    phases: Vec<Phase>,
    /// Peers by name; all that are installed if not given.
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// Size of the pgbench tables; 100 are about 1.5 GB.
    #[arg(long, default_value_t = 145)]
    scale: u32,
    /// MiB of rows that hardly compress; JSON comes on top, a third of it.
    #[arg(long, default_value_t = 1024)]
    noise_mib: u32,
    /// MiB of WAL that the throughput phase writes.
    #[arg(long, default_value_t = 2048)]
    wal_mib: u32,
    /// Seconds of the trickle, and of each load of the latency phase.
    #[arg(long, default_value_t = 90)]
    seconds: u64,
    /// What each tool may run in parallel.
    #[arg(long, default_value_t = 2)]
    jobs: u32,
    /// File for all figures as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() {
    let options = Options::parse();
    if let Some(folder) = &options.serve_s3 {
        return s3::serve(folder);
    }
    if !options.run {
        println!("the system benchmark is run by tools/bench");
        return;
    }
    let mut report = Report::default();
    let peers = Peer::installed(&options.peers);
    for peer in &peers {
        report.version(peer.name(), peer.version());
    }
    assert!(!peers.is_empty(), "no peer of these names is installed: {:?}", options.peers);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let stage = Stage::build(&options, &mut report);
    for phase in &options.phases {
        println!("\n{phase:?}");
        match phase {
            Phase::Base => base::play(&stage, &peers, &options, &mut report),
            Phase::Wal => runtime.block_on(wal::throughput(&stage, &peers, &options, &mut report)),
            Phase::Trickle => runtime.block_on(wal::trickle(&stage, &peers, &options, &mut report)),
            Phase::Latency => runtime.block_on(wal::latency(&stage, &peers, &options, &mut report)),
        }
    }
    println!("\n{}", report.markdown());
    if let Some(file) = &options.json {
        std::fs::write(file, format!("{:#}\n", report.json())).unwrap();
    }
    assert!(report.failures().is_empty(), "failed: {:?}", report.failures());
}
