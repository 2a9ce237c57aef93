//! The S3 server of a peer's round: a process of its own, so that its CPU is told apart, with TLS, its
//! objects in memory.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use minis3::{Config, Server, Tls};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::Value;

use crate::harness::Account;

/// A certificate authority and what it issued, for the server's folder.
#[derive(Debug)]
pub struct Certificates {
    folder: PathBuf,
}

impl Certificates {
    /// Makes them in `folder`.
    pub fn make(folder: &Path) -> Self {
        let authority_key = KeyPair::generate().unwrap();
        let mut authority = CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "benchmark authority");
        let authority_pem = authority.self_signed(&authority_key).unwrap().pem();
        let issuer = Issuer::new(authority, authority_key);
        let key = KeyPair::generate().unwrap();
        let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
        let mut leaf = CertificateParams::new(names).unwrap();
        leaf.distinguished_name.push(DnType::CommonName, "localhost");
        let leaf_pem = leaf.signed_by(&key, &issuer).unwrap().pem();
        let this = Self { folder: folder.into() };
        for (name, text) in [
            ("ca.pem", authority_pem),
            ("server.pem", leaf_pem),
            ("server.key", key.serialize_pem()),
        ] {
            std::fs::write(folder.join(name), text).unwrap();
            Account::current().give(&folder.join(name));
        }
        this
    }

    /// The authority's certificate.
    pub fn authority(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }
}

/// A running server; stops when dropped.
#[derive(Debug)]
pub struct S3 {
    process: Child,
    words: Value,
}

impl S3 {
    /// Starts one that has an empty bucket.
    pub fn start(certificates: &Certificates) -> Self {
        let mut process = std::process::Command::new(std::env::current_exe().unwrap())
            .arg("--serve-s3")
            .arg(&certificates.folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = std::io::BufReader::new(process.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut output, &mut line).unwrap();
        Self { process, words: serde_json::from_str(&line).unwrap() }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What it has seen and keeps.
    pub fn counters(&self) -> Counters {
        let port = self.words["counters"].as_u64().unwrap() as u16;
        let mut connection = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    /// What a peer's script needs to know about it.
    pub fn environment(&self, certificates: &Certificates) -> Vec<(String, String)> {
        let endpoint = self.words["endpoint"].as_str().unwrap();
        let port = endpoint.rsplit(':').next().unwrap();
        [
            ("BENCH_S3_ENDPOINT", format!("https://localhost:{port}")),
            ("BENCH_S3_HOST", "localhost".into()),
            ("BENCH_S3_PORT", port.into()),
            ("BENCH_S3_BUCKET", "tidemark".into()),
            ("AWS_ACCESS_KEY_ID", "minis3".into()),
            ("AWS_SECRET_ACCESS_KEY", "minis3-secret".into()),
            ("AWS_REGION", "us-east-1".into()),
            ("BENCH_CA_FILE", certificates.authority().display().to_string()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What the server has seen.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Counters {
    /// Requests of any kind.
    pub requests: u64,
    /// Bytes of all objects now.
    pub stored_bytes: u64,
}

/// Serves until the standard input ends, which is when the benchmark does. A line on standard output
/// says where; who connects to the second port is told the counters.
pub fn serve(folder: &Path) {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let tls = Some(Tls { certificate_pem: read("server.pem"), key_pem: read("server.key") });
    let server = Server::start(Config { tls, ..Config::default() }).unwrap();
    let counting = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = counting.local_addr().unwrap().port();
    println!("{}", serde_json::json!({ "endpoint": server.endpoint, "counters": port }));
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    for connection in counting.incoming() {
        let mut connection = connection.unwrap();
        let counters = Counters {
            requests: server.counters().counts().total(),
            stored_bytes: server.stored_bytes("tidemark"),
        };
        connection.write_all(&serde_json::to_vec(&counters).unwrap()).unwrap();
    }
}
