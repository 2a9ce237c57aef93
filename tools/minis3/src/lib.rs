//! An S3 server for tests and tools: whole enough for a backup engine, hostile on demand.
//!
//! Signatures, aws-chunked bodies and XML come from `s3s`. This crate adds what a test needs to
//! believe: checksums that are verified, conditions that hold under one mutex (of any number of
//! rivals one wins), versioning, Object Lock, multipart, and faults and quirks switched in process or
//! over HTTP. It is test equipment and never part of the product.
//!
//! # Shape
//! [`Server::start`] runs the server on threads of its own, so it is independent of the caller's
//! runtime and its (maybe paused) time; dropping it stops it. Objects live in memory or in a folder,
//! which a later server can open again. Nothing is fsynced: it survives its own death, not the
//! machine's.
//!
//! The control endpoint, on a port of its own, speaks JSON:
//! `GET /health`, `GET|DELETE /counters`, `GET|POST|DELETE /faults` (POST takes a [`Fault`]),
//! `GET|PUT /quirks` (PUT takes [`Quirks`]).
#![allow(clippy::disallowed_methods, reason = "test equipment runs in real time")]

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;

use tokio::sync::watch;

mod backend;
mod checksum;
mod connection;
mod control;
mod counters;
mod faults;
mod journal;
mod listing;
mod lock;
mod multipart;
mod objects;
mod quirks;
mod service;
mod state;

pub use counters::{Counters, Counts};
pub use faults::{Effect, Fault, FaultState, Faults, Op};
pub use quirks::{EmptyListToken, Quirks};

/// How a server is set up.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where S3 listens; port 0 picks one.
    pub listen: SocketAddr,
    /// Where the control endpoint listens, if anywhere.
    pub control: Option<SocketAddr>,
    /// Folder to keep objects in; `None` keeps them in memory.
    pub root: Option<PathBuf>,
    /// Access key id that requests must be signed with.
    pub access_key: String,
    /// Its secret.
    pub secret_key: String,
    /// Region that requests must be signed for; `None` takes any.
    pub region: Option<String>,
    /// Buckets that exist from the start.
    pub buckets: Vec<BucketConfig>,
    /// Speak TLS with this certificate.
    pub tls: Option<Tls>,
    /// Also take virtual-host style requests to subdomains of this domain.
    pub domain: Option<String>,
    /// Smallest part but the last of a multipart upload.
    pub part_bytes_min: u64,
    /// Worker threads.
    pub threads: usize,
}

/// A bucket made at the start.
#[derive(Clone, Debug, Default)]
pub struct BucketConfig {
    /// Its name.
    pub name: String,
    /// Whether old versions are kept.
    pub versioning: bool,
    /// Whether Object Lock is on (which needs versioning and switches it on).
    pub object_lock: bool,
}

/// Certificate chain and private key, PEM.
#[derive(Clone, Debug)]
pub struct Tls {
    /// The chain, leaf first.
    pub certificate_pem: String,
    /// The leaf's key.
    pub key_pem: String,
}

impl Default for Config {
    fn default() -> Self {
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            listen: anywhere,
            control: Some(anywhere),
            root: None,
            access_key: "minis3".to_owned(),
            secret_key: "minis3-secret".to_owned(),
            region: None,
            buckets: vec![BucketConfig { name: "tidemark".to_owned(), ..BucketConfig::default() }],
            tls: None,
            domain: None,
            part_bytes_min: 5 << 20,
            threads: 2,
        }
    }
}

/// A running server; dropping it stops it.
#[derive(Debug)]
pub struct Server {
    /// Base URL of S3.
    pub endpoint: String,
    /// Base URL of the control endpoint.
    pub control_endpoint: Option<String>,
    /// What it was started with.
    pub config: Config,
    shared: Arc<service::Shared>,
    stop: watch::Sender<bool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    /// Starts a server and returns when it listens.
    ///
    /// # Errors
    /// When an address cannot be bound, the folder not read, or the certificate not used.
    pub fn start(config: Config) -> io::Result<Self> {
        let shared = Arc::new(service::Shared::open(&config)?);
        let (stop, stopped) = watch::channel(false);
        let (ready, started) = mpsc::sync_channel(1);
        let (thread_config, thread_shared) = (config.clone(), Arc::clone(&shared));
        let thread = thread::Builder::new().name("minis3".to_owned()).spawn(move || {
            run(&thread_config, &thread_shared, stopped, &ready);
        })?;
        let (address, control) =
            started.recv().map_err(|_| io::Error::other("the server's thread died"))??;
        let scheme = if config.tls.is_some() { "https" } else { "http" };
        Ok(Self {
            endpoint: format!("{scheme}://{address}"),
            control_endpoint: control.map(|control| format!("http://{control}")),
            config,
            shared,
            stop,
            thread: Some(thread),
        })
    }

    /// Starts one in memory with one bucket, `tidemark`, and everything else default.
    ///
    /// # Errors
    /// When no port can be bound.
    pub fn in_memory() -> io::Result<Self> {
        Self::start(Config::default())
    }

    /// The faults in force.
    #[must_use]
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// Requests counted so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// The quirks in force.
    #[must_use]
    pub fn quirks(&self) -> Quirks {
        self.shared.quirks()
    }

    /// Sets the quirks.
    pub fn set_quirks(&self, quirks: Quirks) {
        self.shared.set_quirks(quirks);
    }

    /// From now on requests must be signed with these keys.
    pub fn set_keys(&self, access_key: &str, secret_key: &str) {
        self.shared.set_keys(access_key, secret_key);
    }

    /// Sets the server's clock so far ahead of the machine's, or behind it. It judges the dates of signed
    /// requests, and stamps answers, objects and uploads.
    pub fn set_clock_ahead_ms(&self, ahead_ms: i64) {
        self.shared.clock_ahead_ms.store(ahead_ms, Ordering::Relaxed);
    }

    /// Count of requests refused because their date was too far from the server's clock.
    #[must_use]
    pub fn skewed_count(&self) -> u64 {
        self.shared.skewed_count.load(Ordering::Relaxed)
    }

    /// The bytes of an object as they are stored; `None` when there is no such object.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn object(&self, bucket: &str, key: &str) -> io::Result<Option<Vec<u8>>> {
        self.shared.object(bucket, key)
    }

    /// Changes the bytes of an object behind everybody's back; false when there is no such object.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn damage(
        &self,
        bucket: &str,
        key: &str,
        change: impl FnOnce(&mut Vec<u8>),
    ) -> io::Result<bool> {
        self.shared.damage(bucket, key, change)
    }

    /// Removes an object with all its versions, whatever protects it; false when there was none.
    pub fn vanish(&self, bucket: &str, key: &str) -> bool {
        self.shared.vanish(bucket, key)
    }

    /// Keys of the current objects of a bucket.
    #[must_use]
    pub fn keys(&self, bucket: &str) -> Vec<String> {
        self.shared.keys(bucket)
    }

    /// Bytes of the current objects of a bucket.
    #[must_use]
    pub fn stored_bytes(&self, bucket: &str) -> u64 {
        self.shared.stored_bytes(bucket)
    }

    /// Count of multipart uploads begun and neither completed nor aborted.
    #[must_use]
    pub fn upload_count(&self, bucket: &str) -> usize {
        self.shared.upload_count(bucket)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

type Started = io::Result<(SocketAddr, Option<SocketAddr>)>;

fn run(
    config: &Config,
    shared: &Arc<service::Shared>,
    mut stopped: watch::Receiver<bool>,
    ready: &mpsc::SyncSender<Started>,
) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.threads.max(1))
        .thread_name("minis3")
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    runtime.block_on(async {
        let _ = ready.send(connection::listen(config, shared).await);
        let _ = stopped.wait_for(|stop| *stop).await;
    });
    // Connections end with their tasks; a blocked file operation gets a moment to finish.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
}
