//! From settings to an open repository and a connected server.

use std::sync::Arc;

use crate::clock::Clock;
use crate::config::Config;
use crate::error::{Error, Kind, Result};
use crate::pg::SystemId;
use crate::repo::{ClusterName, Repository};
use crate::store::{self, Store};
use crate::wire::{Connection, Session, SystemIdentification};

/// The store that the settings name. Nothing is asked of it yet.
///
/// # Errors
/// `config` when none is named or a setting makes no sense.
pub fn store(config: &Config, clock: &Clock) -> Result<Arc<dyn Store>> {
    store::open(config.repository_url()?, &config.store_options()?, clock)
}

/// The repository, which must exist.
///
/// # Errors
/// `not found` when there is none yet; what the store reports.
pub async fn repository(config: &Config, clock: &Clock) -> Result<Repository> {
    let store = store(config, clock)?;
    let place = store.describe();
    let cluster = ClusterName::new(config.cluster())?;
    Repository::open(store, cluster, clock).await.map_err(|error| match error.kind() {
        Kind::NotFound => error.hint(format!(
            "Nothing was written for cluster '{}' to {place} yet: run 'tidemark stream' or \
             'tidemark init', or check --cluster and --repository.",
            config.cluster()
        )),
        _ => error,
    })
}

/// The repository, made when it is missing.
///
/// # Errors
/// `conflict` when it belongs to another PostgreSQL cluster; what the store reports.
pub async fn repository_for(
    config: &Config,
    clock: &Clock,
    system_id: SystemId,
) -> Result<Repository> {
    let cluster = ClusterName::new(config.cluster())?;
    Repository::create(store(config, clock)?, cluster, system_id, clock).await.map_err(|error| {
        match error.kind() {
            Kind::Conflict => error.hint(format!(
                "Choose another name with --cluster for this server, or another --repository; \
                 '{}' keeps what it has.",
                config.cluster()
            )),
            _ => error,
        }
    })
}

/// Which PostgreSQL cluster the settings name, asked of the server.
///
/// # Errors
/// Why it cannot be reached or does not let us in.
pub async fn identify_server(config: &Config, clock: &Clock) -> Result<SystemIdentification> {
    connect(config, clock).await?.identify_system().await
}

/// Whether our slot was ever used: it keeps WAL, or did until just now. One that was only made keeps none.
///
/// # Errors
/// As [`identify_server`]; before PostgreSQL 15 the server says so only to ordinary connections, which
/// every command that writes WAL needs there.
pub async fn slot_keeps_wal(config: &Config, clock: &Clock) -> Result<bool> {
    let slot = connect(config, clock).await?.read_slot(config.slot_name()).await?;
    Ok(slot.is_some_and(|slot| slot.restart_lsn.is_some()))
}

async fn connect(config: &Config, clock: &Clock) -> Result<Connection> {
    Connection::connect(&config.connect_options()?, Session::Physical, clock).await
}

/// Refuses to read settings of one cluster for another.
///
/// # Errors
/// `conflict` when the server is not the one whose data the repository keeps.
pub fn same_system(repository: &Repository, server: SystemId) -> Result<()> {
    if repository.system_id() == server {
        return Ok(());
    }
    Err(Error::new(
        Kind::Conflict,
        format!(
            "cluster '{}' of the repository has system identifier {}, the server has {server}",
            repository.cluster(),
            repository.system_id()
        ),
    )
    .hint(
        "Check the connection string, or give this server a cluster name of its own (--cluster).",
    ))
}
