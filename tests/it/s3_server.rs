//! minis3 for tests: started in process, opened as a store.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use minis3::{Config, Server, Tls};
use tidemark::clock::Clock;
use tidemark::store::{self, StaticCredentials, Store, StoreOptions};

/// A server in memory with the bucket `tidemark`.
pub(crate) fn memory() -> Server {
    Server::in_memory().unwrap()
}

/// A server that speaks TLS and keeps its objects in `folder`, and the file with its authority.
pub(crate) fn tls(folder: &Path) -> (Server, PathBuf) {
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned(), "localhost".to_owned()]);
    let made = made.unwrap();
    let certificate_pem = made.cert.pem();
    let ca_file = folder.join("ca.pem");
    std::fs::write(&ca_file, &certificate_pem).unwrap();
    let tls = Some(Tls { certificate_pem, key_pem: made.signing_key.serialize_pem() });
    let root = Some(folder.join("s3"));
    (Server::start(Config { tls, root, ..Config::default() }).unwrap(), ca_file)
}

/// Options that lead to the server, with its keys.
pub(crate) fn options(server: &Server) -> StoreOptions {
    StoreOptions {
        endpoint: Some(server.endpoint.clone()),
        credentials: Some(StaticCredentials {
            access_key_id: server.config.access_key.clone(),
            secret_access_key: server.config.secret_key.clone().into(),
            session_token: None,
        }),
        attempt_timeout: Duration::from_secs(10),
        ..StoreOptions::default()
    }
}

/// The bucket `tidemark` below `prefix`.
pub(crate) fn open(server: &Server, prefix: &str) -> Arc<dyn Store> {
    store::open(&format!("s3://tidemark/{prefix}"), &options(server), &Clock::system()).unwrap()
}
