//! An S3 server of our own in this process, and a `tidemark` that uses it.

use std::collections::BTreeSet;

use minis3::Server;

use super::Tidemark;

const BUCKET: &str = "tidemark";

/// A running S3 server with one bucket; stops when dropped.
#[derive(Debug)]
pub struct S3(Server);

impl S3 {
    /// Starts one that keeps its objects in memory.
    pub fn start() -> Self {
        Self(Server::in_memory().unwrap())
    }

    /// The server: faults, counters, damage.
    pub fn server(&self) -> &Server {
        &self.0
    }

    /// A `tidemark` whose repository is `prefix` on this server.
    pub fn tidemark(&self, prefix: &str) -> Tidemark {
        Tidemark::with_url(&format!("s3://{BUCKET}/{prefix}"), &self.environment())
    }

    /// What the AWS SDK needs to find and use this server.
    pub fn environment(&self) -> [(&str, &str); 4] {
        [
            ("TIDEMARK_REPOSITORY_ENDPOINT", &self.0.endpoint),
            ("AWS_ACCESS_KEY_ID", &self.0.config.access_key),
            ("AWS_SECRET_ACCESS_KEY", &self.0.config.secret_key),
            ("AWS_REGION", "us-east-1"),
        ]
    }

    /// Names of all objects.
    pub fn names(&self) -> Vec<String> {
        self.0.keys(BUCKET)
    }

    /// Names of the WAL objects.
    pub fn wal_names(&self) -> BTreeSet<String> {
        self.names().into_iter().filter(|name| name.contains("/wal/")).collect()
    }
}
