//! An open session: simple queries and what the server reports about itself.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use postgres_protocol::message::frontend;
use tracing::{debug, warn};

use super::channel::Channel;
use super::connect;
use super::message::Message;
use super::options::{ConnectOptions, Host};
use super::server_error::{Asked, ServerError};
use crate::clock::Clock;
use crate::error::{Error, Kind, Result};
use crate::pg::Version;

/// A result larger than this is not one of ours.
const RESULT_BYTES_MAX: usize = 64 << 20;

/// Parameters beyond this are not kept; a server reports about twenty, of some hundred bytes together.
const PARAMETER_BYTES_MAX: usize = 64 << 10;

/// How long closing may take; the server notices a closed socket anyway.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// What kind of server process answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    /// A walsender for physical replication (`replication=true`): replication commands and `SHOW`.
    Physical,
    /// An ordinary backend in the database that the options name, `postgres` if they name none, with
    /// an empty `search_path`.
    Database,
}

/// An open session that waits for the next command.
pub struct Connection {
    channel: Channel,
    parameters: Parameters,
    version: Version,
    session: Session,
    options: ConnectOptions,
    clock: Clock,
    /// A command's answer was not read to its end, because its future was dropped.
    unfinished: bool,
}

/// A row of a query's result: columns as text, `None` for SQL NULL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    columns: Vec<Option<Bytes>>,
}

/// What the server reports about itself, bounded: names and values together by
/// [`PARAMETER_BYTES_MAX`].
#[derive(Debug, Default)]
pub(super) struct Parameters {
    values: BTreeMap<String, String>,
    size_bytes: usize,
}

impl Parameters {
    /// Takes a report in. What does not fit is not known from then on.
    pub(super) fn report(&mut self, name: String, value: String) {
        if let Some(old) = self.values.remove(&name) {
            self.size_bytes -= Self::size_of(&name, &old);
        }
        let size_bytes = self.size_bytes + Self::size_of(&name, &value);
        if size_bytes <= PARAMETER_BYTES_MAX {
            self.size_bytes = size_bytes;
            self.values.insert(name, value);
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    fn size_of(name: &str, value: &str) -> usize {
        2 * size_of::<String>() + name.len() + value.len()
    }
}

/// What `target_session_attrs` looks at.
pub(super) struct ServerState {
    pub(super) standby: bool,
    pub(super) read_only: bool,
}

impl Row {
    pub(super) fn new(columns: Vec<Option<Bytes>>) -> Self {
        Self { columns }
    }

    /// The column at `index` as text, `None` for SQL NULL.
    ///
    /// # Errors
    /// `corrupt` when the row has fewer columns, or the column is not UTF-8.
    pub fn get(&self, index: usize) -> Result<Option<&str>> {
        let Some(bytes) = self.bytes(index)? else { return Ok(None) };
        std::str::from_utf8(bytes).map(Some).map_err(|_not_text| {
            Error::new(Kind::Corrupt, format!("column {index} of the server's answer is not UTF-8"))
        })
    }

    /// The column at `index` as text that is not NULL.
    ///
    /// # Errors
    /// As [`Row::get`], and `corrupt` for NULL.
    pub fn text(&self, index: usize) -> Result<&str> {
        self.get(index)?.ok_or_else(|| {
            Error::new(Kind::Corrupt, format!("column {index} of the server's answer is null"))
        })
    }

    /// The column at `index`, read by its type's `FromStr`.
    ///
    /// # Errors
    /// As [`Row::text`], and `corrupt` for a text that is no such value.
    pub fn parse<T: std::str::FromStr>(&self, index: usize) -> Result<T> {
        let text = self.text(index)?;
        text.parse().map_err(|_unreadable| {
            Error::new(
                Kind::Corrupt,
                format!("column {index} of the server's answer makes no sense: '{text}'"),
            )
        })
    }

    /// The bytes of the column at `index`, `None` for SQL NULL.
    pub(super) fn bytes(&self, index: usize) -> Result<Option<&Bytes>> {
        let column = self.columns.get(index).ok_or_else(|| {
            let count = self.columns.len();
            Error::new(Kind::Corrupt, format!("the server's answer has only {count} columns"))
        })?;
        Ok(column.as_ref())
    }

    /// Memory the row takes: a column without a value and a row without columns take some as well.
    fn size_bytes(&self) -> usize {
        let values = self.columns.iter().flatten().map(Bytes::len).sum::<usize>();
        size_of::<Self>() + self.columns.len() * size_of::<Option<Bytes>>() + values
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
        Box::pin(connect::connect(options, session, clock)).await
    }

    pub(super) fn new(
        channel: Channel,
        parameters: Parameters,
        options: &ConnectOptions,
        session: Session,
        clock: &Clock,
    ) -> Result<Self> {
        let text = parameters.get("server_version").unwrap_or_default();
        let number = version_number(text).ok_or_else(|| {
            Error::new(Kind::Unsupported, format!("unable to read the server's version '{text}'"))
                .hint("Is the server PostgreSQL, and not something that speaks its protocol?")
        })?;
        let version = Version::from_server_version_num(number)?;
        let (options, clock) = (options.clone(), clock.clone());
        Ok(Self { channel, parameters, version, session, options, clock, unfinished: false })
    }

    /// This connection, of which another one to the same server is made: only `host` is tried for it, the
    /// other hosts and addresses of the connection string are other servers.
    pub(super) fn at(mut self, host: Host) -> Self {
        self.options.hosts = vec![host];
        self
    }

    /// The value of a parameter the server reported (`server_version`, `in_hot_standby`, ...), as of
    /// its last report.
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name)
    }

    /// The server's version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// What kind of session this is.
    #[must_use]
    pub fn session(&self) -> Session {
        self.session
    }

    /// How it was connected, with the one host that answered.
    #[must_use]
    pub fn options(&self) -> &ConnectOptions {
        &self.options
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    pub(super) fn channel(&mut self) -> &mut Channel {
        &mut self.channel
    }

    /// Runs one command by the simple query protocol and returns its rows.
    ///
    /// # Errors
    /// What the server says, as our error with a hint; `unavailable` when it is silent for longer
    /// than the read time-out.
    ///
    /// # Cancel safety
    /// When the future is dropped the command goes on at the server; its answer is thrown away by
    /// the next call.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Row>> {
        self.begin_command(sql).await?;
        let mut rows = Vec::new();
        let mut result_bytes = 0;
        loop {
            match self.receive(Some(self.options.read_timeout)).await? {
                Message::DataRow(columns) => {
                    let row = Row::new(columns);
                    result_bytes += row.size_bytes();
                    if result_bytes > RESULT_BYTES_MAX {
                        return Err(Error::new(
                            Kind::Corrupt,
                            format!("the server's answer is longer than {RESULT_BYTES_MAX} bytes"),
                        ));
                    }
                    rows.push(row);
                }
                Message::RowDescription
                | Message::CommandComplete
                | Message::EmptyQueryResponse => {}
                Message::ReadyForQuery => {
                    self.end_command();
                    return Ok(rows);
                }
                Message::ErrorResponse(error) => return Err(self.fail_command(error).await),
                other => return Err(unexpected(&other)),
            }
        }
    }

    /// The one row of a command that answers with one.
    ///
    /// # Errors
    /// As [`Connection::query`], and `corrupt` for another number of rows.
    pub async fn query_one(&mut self, sql: &str) -> Result<Row> {
        let mut rows = self.query(sql).await?;
        match (rows.pop(), rows.is_empty()) {
            (Some(row), true) => Ok(row),
            (last, _) => {
                let count = rows.len() + usize::from(last.is_some());
                Err(Error::new(Kind::Corrupt, format!("the server answered {count} rows for one")))
            }
        }
    }

    /// Sends a command, once the answer of an abandoned one is out of the way.
    pub(super) async fn begin_command(&mut self, sql: &str) -> Result<()> {
        while self.unfinished {
            let message = self.receive(Some(self.options.read_timeout)).await?;
            self.unfinished = !matches!(message, Message::ReadyForQuery);
        }
        frontend::query(sql, self.channel.outgoing()).map_err(|error| {
            Error::new(Kind::Usage, format!("unable to send a command to the server: {error}"))
        })?;
        self.unfinished = true;
        self.channel.flush().await;
        Ok(())
    }

    /// The server is ready for the next command.
    pub(super) fn end_command(&mut self) {
        self.unfinished = false;
    }

    /// Waits until the server is ready again after an error, unless it hangs up.
    pub(super) async fn fail_command(&mut self, error: ServerError) -> Error {
        let fatal = matches!(error.severity.as_str(), "FATAL" | "PANIC");
        let error = self.server_error(error);
        while !fatal && self.unfinished {
            match self.receive(Some(self.options.read_timeout)).await {
                Ok(Message::ReadyForQuery) => self.unfinished = false,
                Ok(_) => {}
                Err(_broken) => break,
            }
        }
        error
    }

    /// A server error as ours.
    pub(super) fn server_error(&self, error: ServerError) -> Error {
        error.into_error(Asked { session: self.session, user: &self.options.user })
    }

    /// The next message that is not for the log or the list of parameters.
    ///
    /// # Cancel safety
    /// As [`Channel::receive`].
    pub(super) async fn receive(&mut self, silence_max: Option<Duration>) -> Result<Message> {
        loop {
            let message = match silence_max {
                None => self.channel.receive().await?,
                Some(limit) => match tokio::time::timeout(limit, self.channel.receive()).await {
                    Ok(message) => message?,
                    Err(_elapsed) => return Err(silent(limit)),
                },
            };
            match message {
                Message::NoticeResponse(notice) if notice.severity == "WARNING" => {
                    warn!("the server warns: {notice}");
                }
                Message::NoticeResponse(notice) => debug!("the server says: {notice}"),
                Message::ParameterStatus { name, value } => self.parameters.report(name, value),
                Message::Notification => {}
                message => return Ok(message),
            }
        }
    }

    /// Whether the server is a standby, and whether it accepts writes.
    pub(super) async fn server_state(&mut self) -> Result<ServerState> {
        let is_on = |value: &str| value == "on";
        if let (Some(standby), Some(read_only)) =
            (self.parameter("in_hot_standby"), self.parameter("default_transaction_read_only"))
        {
            return Ok(ServerState { standby: is_on(standby), read_only: is_on(read_only) });
        }
        // Before PostgreSQL 14 servers do not report it.
        let read_only = is_on(self.query_one("SHOW transaction_read_only").await?.text(0)?);
        let standby = match self.session {
            Session::Database => {
                let sql = "SELECT pg_catalog.pg_is_in_recovery()";
                self.query_one(sql).await?.text(0)? == "t"
            }
            // A walsender answers no function; a standby is what is read-only without being told.
            Session::Physical => {
                let told = self.query_one("SHOW default_transaction_read_only").await?;
                read_only && !is_on(told.text(0)?)
            }
        };
        Ok(ServerState { standby, read_only })
    }

    /// Says goodbye and closes the connection.
    pub async fn close(mut self) {
        frontend::terminate(self.channel.outgoing());
        // What cannot be said in time is left unsaid.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.channel.flush()).await;
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("options", &self.options)
            .field("session", &self.session)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// The server said something that its state does not allow.
pub(super) fn unexpected(message: &Message) -> Error {
    Error::new(Kind::Corrupt, format!("the server sent {} where it cannot come", message.name()))
}

/// The server said nothing for too long.
pub(super) fn silent(limit: Duration) -> Error {
    Error::new(Kind::Unavailable, format!("the server was silent for {} s", limit.as_secs()))
        .hint("The server is overloaded or the network between is broken.")
}

/// `server_version_num` from `server_version`: `15.19 (Debian ...)`, `18beta1`, `17.2`.
fn version_number(text: &str) -> Option<u32> {
    let digits = |text: &str| -> Option<u32> {
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        text.get(..end)?.parse().ok()
    };
    let major = digits(text)?;
    let minor = text.split_once('.').and_then(|(_, rest)| digits(rest)).unwrap_or(0);
    major.checked_mul(10_000)?.checked_add(minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_servers_write_them() {
        for (text, number) in [
            ("15.19 (Debian 15.19-0+deb12u1)", Some(150_019)),
            ("18.6", Some(180_006)),
            ("18beta1", Some(180_000)),
            ("19devel", Some(190_000)),
            ("", None),
            ("x", None),
        ] {
            assert_eq!(version_number(text), number, "{text}");
        }
    }

    #[test]
    fn a_row_counts_even_without_a_value() {
        let nothing = Row::new(Vec::new()).size_bytes();
        assert!(nothing > 0);
        assert!(Row::new(vec![None; 1000]).size_bytes() >= nothing + 1000 * 8);
    }

    #[test]
    fn parameters_are_bounded_and_a_stale_value_is_not_kept() {
        let mut parameters = Parameters::default();
        for number in 0..100_000 {
            parameters.report(format!("p{number}"), "v".to_owned());
        }
        let held = parameters.values.iter().map(|(name, value)| name.len() + value.len());
        assert!(held.sum::<usize>() <= PARAMETER_BYTES_MAX);
        assert_eq!((parameters.get("p0"), parameters.get("p99999")), (Some("v"), None));
        parameters.report("p0".to_owned(), "x".repeat(1 << 20));
        assert_eq!((parameters.get("p0"), parameters.get("p1")), (None, Some("v")));
        parameters.report("p0".to_owned(), "w".to_owned());
        assert_eq!(parameters.get("p0"), Some("w"));
        // Reported over and over it takes no more room.
        for _ in 0..100_000 {
            parameters.report("p0".to_owned(), "w".to_owned());
        }
        assert_eq!(parameters.get("p0"), Some("w"));
    }

    #[test]
    fn columns_are_text_values_or_null() {
        let row = Row::new(vec![Some(Bytes::from("12")), None, Some(Bytes::from_static(b"\xff"))]);
        assert_eq!(row.get(0).unwrap(), Some("12"));
        assert_eq!(row.parse::<u32>(0).unwrap(), 12);
        assert_eq!(row.get(1).unwrap(), None);
        assert!(row.text(1).is_err() && row.get(2).is_err() && row.get(3).is_err());
        assert!(row.parse::<crate::pg::Lsn>(0).is_err());
    }
}
