//! An open session: simple queries and server parameters.

use crate::clock::Clock;
use crate::error::Result;

use super::ConnectOptions;

/// What kind of server process answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    /// A walsender for physical replication (`replication=true`): replication commands and `SHOW`.
    Physical,
    /// An ordinary backend in the database that the options name.
    Database,
}

/// An open session that waits for the next command.
#[derive(Debug)]
pub struct Connection {
    _private: (),
}

/// A row of a query's result: columns as text, `None` for SQL NULL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    columns: Vec<Option<String>>,
}

impl Row {
    /// The column at `index`, `None` for SQL NULL.
    ///
    /// # Errors
    /// `corrupt` when the row has fewer columns.
    pub fn get(&self, index: usize) -> Result<Option<&str>> {
        let _ = (index, &self.columns);
        todo!()
    }

    /// Columns in the row.
    #[must_use]
    pub fn column_count(&self) -> usize {
        self.columns.len()
    }
}

impl Connection {
    /// Connects to the first of the hosts that answers, lets us in and is what
    /// `target_session_attrs` asks for.
    ///
    /// # Errors
    /// `unavailable` when no host answers in time or the server is starting up or shutting down,
    /// `denied` for credentials and rights, `config` for settings that must change first.
    pub async fn connect(
        options: &ConnectOptions,
        session: Session,
        clock: &Clock,
    ) -> Result<Self> {
        let _ = (options, session, clock);
        todo!()
    }

    /// The value of a parameter the server reported (`server_version`, `in_hot_standby`, ...).
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let _ = name;
        todo!()
    }

    /// `server_version_num` of the server, like 150019.
    #[must_use]
    pub fn version_number(&self) -> u32 {
        todo!()
    }

    /// Runs one command by the simple query protocol and returns its rows.
    ///
    /// # Errors
    /// What the server says, as our error with a hint.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Row>> {
        let _ = sql;
        todo!()
    }

    /// Says goodbye and closes the connection.
    pub async fn close(self) {
        todo!()
    }
}
