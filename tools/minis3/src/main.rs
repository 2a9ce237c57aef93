//! `minis3`: the test server as a process, for scripts.
#![allow(clippy::print_stdout, reason = "its endpoints are its output")]

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use minis3::{BucketConfig, Config, Server, Tls};

/// An S3 server for tests. Prints one JSON line with its endpoints and serves until it is stopped.
#[derive(Parser)]
struct Arguments {
    /// Where S3 listens; port 0 picks one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Where the control endpoint listens; port 0 picks one.
    #[arg(long, default_value = "127.0.0.1:0")]
    control: SocketAddr,
    /// Keep objects in this folder.
    #[arg(long, conflicts_with = "memory")]
    root: Option<PathBuf>,
    /// Keep objects in memory (the default without --root).
    #[arg(long)]
    memory: bool,
    /// Access key id.
    #[arg(long, default_value = "minis3", env = "MINIS3_ACCESS_KEY")]
    access_key: String,
    /// Secret access key.
    #[arg(
        long,
        default_value = "minis3-secret",
        env = "MINIS3_SECRET_KEY",
        hide_env_values = true
    )]
    secret_key: String,
    /// Refuse requests signed for another region than this.
    #[arg(long)]
    region: Option<String>,
    /// Bucket to make; may be given several times.
    #[arg(long = "bucket", default_value = "tidemark")]
    buckets: Vec<String>,
    /// Keep versions in those buckets.
    #[arg(long)]
    versioning: bool,
    /// Switch Object Lock on in those buckets.
    #[arg(long)]
    object_lock: bool,
    /// Also take virtual-host style requests to subdomains of this domain.
    #[arg(long)]
    domain: Option<String>,
    /// PEM file with the certificate chain to speak TLS with.
    #[arg(long, requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// PEM file with its private key.
    #[arg(long, requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
    /// Worker threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

fn main() -> std::io::Result<()> {
    let arguments = Arguments::parse();
    let tls = match (arguments.tls_certificate, arguments.tls_key) {
        (Some(certificate), Some(key)) => Some(Tls {
            certificate_pem: std::fs::read_to_string(certificate)?,
            key_pem: std::fs::read_to_string(key)?,
        }),
        _ => None,
    };
    let (versioning, object_lock) = (arguments.versioning, arguments.object_lock);
    let bucket = |name| BucketConfig { name, versioning, object_lock };
    let server = Server::start(Config {
        listen: arguments.listen,
        control: Some(arguments.control),
        root: arguments.root,
        access_key: arguments.access_key,
        secret_key: arguments.secret_key,
        region: arguments.region,
        buckets: arguments.buckets.into_iter().map(bucket).collect(),
        tls,
        domain: arguments.domain,
        threads: arguments.threads,
        ..Config::default()
    })?;
    let endpoints = serde_json::json!({
        "endpoint": server.endpoint,
        "control_endpoint": server.control_endpoint,
        "access_key": server.config.access_key,
        "pid": std::process::id(),
    });
    println!("{endpoints}");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => interrupted,
            _ = terminate.recv() => Ok(()),
        }
    })
}
