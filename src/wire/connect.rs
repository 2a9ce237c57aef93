//! From options to a session: which host, which address, which encryption, in which order.
//!
//! # Shape
//! Hosts are tried in order, and the addresses of each. A host that cannot be reached, does not
//! accept connections yet, does not answer what it is, or is not what `target_session_attrs` asks for gives way to the next; one
//! that refuses us (password, rights) ends the search, as with libpq. With `sslmode` prefer or allow
//! the weaker or stronger method is tried when the first fails; unlike libpq a wrong password is not
//! sent again without encryption.
//!
//! # Source
//! `PQconnectPoll` in `src/interfaces/libpq/fe-connect.c`.

use std::net::SocketAddr;
use std::time::Duration;

use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::{debug, warn};

use super::auth::{Credentials, Exchange, Outcome};
use super::channel::Channel;
use super::connection::{Connection, Parameters, Session};
use super::message::Message;
use super::options::{ConnectOptions, Host, HostOrder, Place, Target};
use super::server_error::Asked;
use super::tls::{self, SslMode, SslNegotiation};
use super::transport::{self, Address, Socket, Transport};
use crate::clock::Clock;
use crate::error::{Context, Error, Kind, Result};

/// The database name that replication connections go by in `pg_hba.conf` and password files.
const REPLICATION_DATABASE: &str = "replication";

/// What is asked of a database is about the whole cluster, so any will do; libpq would take one named
/// like the role, which backup roles seldom have.
const DEFAULT_DATABASE: &str = "postgres";

/// Where to go on after a failure.
enum Failure {
    /// The next address, then the next host.
    Address(Error),
    /// The next host: all addresses of this one would say the same.
    Host(Error),
    /// Nowhere.
    Final(Error),
}

/// A way to talk to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encryption {
    Plain,
    Tls,
}

/// One search for a server.
struct Search<'a> {
    options: &'a ConnectOptions,
    session: Session,
    clock: &'a Clock,
}

/// Connects to the first acceptable host.
pub(super) async fn connect(
    options: &ConnectOptions,
    session: Session,
    clock: &Clock,
) -> Result<Connection> {
    let search = Search { options, session, clock };
    let targets: &[Target] = match options.target {
        Target::PreferStandby => &[Target::Standby, Target::Any],
        ref target => std::slice::from_ref(target),
    };
    let mut failures: Vec<Error> = Vec::new();
    for target in targets {
        failures.clear();
        for host in search.shuffled(options.hosts.clone())? {
            match search.try_host(&host, *target, &mut failures).await {
                Ok(Some(connection)) => return Ok(connection),
                Ok(None) => {}
                Err(error) => return Err(error.context(unable(&host))),
            }
        }
    }
    Err(summary(failures))
}

fn unable(host: &Host) -> String {
    format!("unable to connect to PostgreSQL at {host}")
}

/// The host by the one of its addresses that was connected to.
fn pinned(host: &Host, address: &Address) -> Host {
    let place = match (&host.place, address) {
        // One with a scope would not be reached without it.
        (Place::Name(_), Address::Tcp(SocketAddr::V6(found))) if found.scope_id() != 0 => None,
        (Place::Name(name), Address::Tcp(found)) => {
            Some(Place::Address(found.ip(), Some(name.clone())))
        }
        _ => None,
    };
    Host { place: place.unwrap_or_else(|| host.place.clone()), port: host.port }
}

/// All that failed as one error: the last one's kind and hint, everybody's message.
fn summary(mut failures: Vec<Error>) -> Error {
    let Some(last) = failures.pop() else {
        return Error::new(Kind::Config, "unable to connect to PostgreSQL: no host has an address");
    };
    let before: Vec<&str> = failures.iter().map(Error::message).collect();
    if before.is_empty() { last } else { last.context(before.join("; ")) }
}

impl Search<'_> {
    /// Tries every address of a host; `None` when the next host should be tried.
    async fn try_host(
        &self,
        host: &Host,
        target: Target,
        failures: &mut Vec<Error>,
    ) -> Result<Option<Connection>> {
        let resolved = self.within_time(transport::resolve(host)).await;
        let addresses = match resolved.unwrap_or_else(Err) {
            Ok(addresses) => self.shuffled(addresses)?,
            Err(error) => {
                failures.push(error.context(unable(host)));
                return Ok(None);
            }
        };
        for address in addresses {
            let attempt = self.within_time(self.try_address(host, &address, target)).await;
            let done = attempt.unwrap_or_else(|error| Err(Failure::Address(error)));
            match done {
                Ok(connection) => return Ok(Some(connection)),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Address(error)) => failures.push(error.context(unable(host))),
                Err(Failure::Host(error)) => {
                    failures.push(error.context(unable(host)));
                    return Ok(None);
                }
            }
        }
        Ok(None)
    }

    /// The outcome of `work`, unless it takes longer than `connect_timeout`.
    async fn within_time<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        match self.options.connect_timeout {
            None => Ok(work.await),
            Some(limit) => {
                let done = tokio::time::timeout(limit, work).await;
                done.map_err(|_elapsed| timed_out(limit))
            }
        }
    }

    /// Tries the encryption methods that `sslmode` allows, in its order of preference.
    async fn try_address(
        &self,
        host: &Host,
        address: &Address,
        target: Target,
    ) -> Result<Connection, Failure> {
        let methods: &[Encryption] = match (address, self.options.tls.mode) {
            (Address::Unix(_), _) | (_, SslMode::Disable) => &[Encryption::Plain],
            (_, SslMode::Allow) => &[Encryption::Plain, Encryption::Tls],
            (_, SslMode::Prefer) => &[Encryption::Tls, Encryption::Plain],
            _ => &[Encryption::Tls],
        };
        let mut refused: Option<Error> = None;
        for method in methods {
            let connection = match self.open(host, address, *method).await {
                Ok(connection) => connection.at(pinned(host, address)),
                Err(Attempt::Unreachable(error)) => return Err(Failure::Address(error)),
                Err(Attempt::NotNow(error)) => return Err(Failure::Host(error)),
                Err(Attempt::Hopeless(error)) => return Err(Failure::Final(error)),
                Err(Attempt::Unsecured(error)) if self.options.tls.mode == SslMode::Prefer => {
                    warn!("going on without encryption, as sslmode=prefer has it: {error}");
                    refused = Some(error);
                    continue;
                }
                Err(Attempt::Refused(error) | Attempt::Unsecured(error)) => {
                    debug!(?method, %error, "connection attempt refused");
                    refused = Some(match refused {
                        None => error,
                        Some(first) => both_refused(first, &error),
                    });
                    continue;
                }
            };
            return self.check_target(connection, target).await;
        }
        Err(Failure::Final(refused.unwrap_or_else(|| timed_out(Duration::ZERO))))
    }

    /// Opens one connection by one method and gets us let in.
    async fn open(
        &self,
        host: &Host,
        address: &Address,
        method: Encryption,
    ) -> Result<Connection, Attempt> {
        let socket =
            Socket::connect(address, self.options.tcp).await.map_err(Attempt::Unreachable)?;
        if let Some(required) = &self.options.required_peer {
            socket.check_peer(required).map_err(Attempt::Hopeless)?;
        }
        let socket = socket.into_transport();
        let secured = match method {
            Encryption::Plain => Secured::plain(socket),
            Encryption::Tls => self.begin_tls(host, socket).await?,
        };
        let encrypted = secured.encrypted;
        self.start_up(host, secured).await.map_err(|attempt| match attempt {
            // The server declined TLS and we went on without: both ways have been tried.
            Attempt::Refused(error) if method == Encryption::Tls && !encrypted => {
                Attempt::Hopeless(error)
            }
            attempt => attempt,
        })
    }

    async fn begin_tls(
        &self,
        host: &Host,
        mut socket: Box<dyn Transport>,
    ) -> Result<Secured, Attempt> {
        let options = &self.options.tls;
        if options.negotiation == SslNegotiation::Postgres {
            match ask_for_tls(&mut socket).await.map_err(Attempt::broken)? {
                Encryption::Tls => {}
                Encryption::Plain if options.mode < SslMode::Require => {
                    return Ok(Secured::plain(socket));
                }
                Encryption::Plain => {
                    return Err(Attempt::Hopeless(
                        Error::new(
                            Kind::Config,
                            "the server does not offer TLS, but sslmode demands it",
                        )
                        .hint("Set ssl = on on the server, or connect with sslmode=prefer."),
                    ));
                }
            }
        }
        let name = match &host.place {
            Place::Name(name) | Place::Address(_, Some(name)) => name.clone(),
            _ => host.name(),
        };
        let secured = tls::secure(socket, options, &name).await.map_err(Attempt::Unsecured)?;
        Ok(Secured { transport: secured.transport, encrypted: true, end_point: secured.end_point })
    }

    /// Sends the startup message, authenticates, and waits until the server is ready.
    async fn start_up(&self, host: &Host, secured: Secured) -> Result<Connection, Attempt> {
        let options = self.options;
        let databases: Vec<&str> = match (self.session, options.dbname.as_deref()) {
            (Session::Physical, Some(dbname)) => vec![REPLICATION_DATABASE, dbname],
            (Session::Physical, None) => vec![REPLICATION_DATABASE],
            (Session::Database, dbname) => vec![dbname.unwrap_or(DEFAULT_DATABASE)],
        };
        let password = options.password(host, &databases);
        let mut exchange = Exchange::new(Credentials {
            user: &options.user,
            password: password.as_ref(),
            channel_binding: options.channel_binding,
            required: &options.required_auth,
            encrypted: secured.encrypted,
            end_point: secured.end_point.as_deref(),
        });
        let mut channel = Channel::new(secured.transport);
        self.send_startup(&mut channel).await?;
        loop {
            match channel.receive().await.map_err(Attempt::broken)? {
                Message::Authentication(request) => {
                    let outcome =
                        exchange.answer(request, channel.outgoing()).map_err(Attempt::Hopeless)?;
                    if outcome == Outcome::Done {
                        break;
                    }
                    channel.flush().await;
                }
                Message::ErrorResponse(error) => {
                    let wrong_password = error.is("28P01");
                    let not_now = error.is("57P03");
                    let mut error = error.into_error(self.asked());
                    if let Some(password) = password.as_ref().filter(|_| wrong_password) {
                        error = error.context(format!("with the password of {}", password.source));
                    }
                    return Err(match (wrong_password, not_now) {
                        (true, _) => Attempt::Hopeless(error),
                        (_, true) => Attempt::NotNow(error),
                        _ => Attempt::Refused(error),
                    });
                }
                Message::NegotiateProtocolVersion { unknown_options } => {
                    debug!(?unknown_options, "the server negotiates the protocol version");
                }
                Message::NoticeResponse(notice) => debug!(%notice, "notice while connecting"),
                other => return Err(Attempt::Hopeless(unexpected(&other))),
            }
        }
        channel.begin_session();
        self.await_ready(host, channel).await
    }

    async fn send_startup(&self, channel: &mut Channel) -> Result<(), Attempt> {
        let options = self.options;
        let mut parameters = vec![("user", options.user.as_str()), ("client_encoding", "UTF8")];
        match self.session {
            Session::Physical => {
                parameters.push(("database", REPLICATION_DATABASE));
                parameters.push(("replication", "true"));
            }
            Session::Database => {
                parameters
                    .push(("database", options.dbname.as_deref().unwrap_or(DEFAULT_DATABASE)));
            }
        }
        parameters.extend(
            options.application_name.iter().map(|name| ("application_name", name.as_str())),
        );
        parameters.extend(options.backend_options.iter().map(|text| ("options", text.as_str())));
        frontend::startup_message(parameters, channel.outgoing())
            .context(|| "unable to write the startup message")
            .map_err(|error| Attempt::Hopeless(error.with_kind(Kind::Config)))?;
        channel.flush().await;
        Ok(())
    }

    async fn await_ready(&self, host: &Host, mut channel: Channel) -> Result<Connection, Attempt> {
        let mut parameters = Parameters::default();
        let mut process_id = 0;
        loop {
            match channel.receive().await.map_err(Attempt::broken)? {
                Message::ParameterStatus { name, value } => parameters.report(name, value),
                Message::BackendKeyData { process_id: id } => process_id = id,
                Message::NoticeResponse(notice) => warn!(%notice, "the server says"),
                Message::ReadyForQuery => break,
                Message::ErrorResponse(error) => {
                    let not_now = error.is("57P03");
                    let error = error.into_error(self.asked());
                    return Err(if not_now {
                        Attempt::NotNow(error)
                    } else {
                        Attempt::Hopeless(error)
                    });
                }
                other => return Err(Attempt::Hopeless(unexpected(&other))),
            }
        }
        debug!(%host, process_id, session = ?self.session, "connected");
        Connection::new(channel, parameters, self.options, self.session, self.clock)
            .map_err(Attempt::Hopeless)
    }

    fn asked(&self) -> Asked<'_> {
        Asked { session: self.session, user: &self.options.user }
    }

    /// Keeps the connection when the server is what `target` asks for.
    async fn check_target(
        &self,
        mut connection: Connection,
        target: Target,
    ) -> Result<Connection, Failure> {
        if self.session == Session::Database {
            // A schema somebody else may write to must not come between us and the catalog.
            connection
                .query("SELECT pg_catalog.set_config('search_path', '', false)")
                .await
                .map_err(Failure::Host)?;
        }
        if target == Target::Any {
            return Ok(connection);
        }
        let state = connection.server_state().await.map_err(Failure::Host)?;
        let (accepted, wanted) = match target {
            Target::Any | Target::PreferStandby => (true, ""),
            Target::ReadWrite => (!state.read_only && !state.standby, "read-write"),
            Target::ReadOnly => (state.read_only || state.standby, "read-only"),
            Target::Primary => (!state.standby, "the primary"),
            Target::Standby => (state.standby, "a standby"),
        };
        if accepted {
            return Ok(connection);
        }
        connection.close().await;
        Err(Failure::Host(
            Error::new(
                Kind::Unavailable,
                format!("the server is not {wanted}, which target_session_attrs asks for"),
            )
            .hint("List all servers of the cluster in host=, or change target_session_attrs."),
        ))
    }

    /// In random order if `load_balance_hosts` says so (Fisher-Yates).
    fn shuffled<T>(&self, mut list: Vec<T>) -> Result<Vec<T>> {
        if self.options.host_order == HostOrder::Random {
            for index in (1..list.len()).rev() {
                let draw = u64::from_le_bytes(self.clock.random()?);
                let count = u64::try_from(index + 1).unwrap_or(u64::MAX);
                list.swap(index, usize::try_from(draw % count).unwrap_or(0));
            }
        }
        Ok(list)
    }
}

/// Why one attempt at one address failed.
enum Attempt {
    /// Nobody there, or the connection broke.
    Unreachable(Error),
    /// The server does not accept connections now.
    NotNow(Error),
    /// The server's answer, which the other way of `sslmode` may change.
    Refused(Error),
    /// The TLS handshake, which the other way of `sslmode` goes without.
    Unsecured(Error),
    /// Nothing would change it: a wrong or missing password, a refusal of our own.
    Hopeless(Error),
}

impl Attempt {
    /// Of an exchange that failed: a broken connection, or bytes that make no sense.
    fn broken(error: Error) -> Self {
        if error.is_transient() { Self::Unreachable(error) } else { Self::Hopeless(error) }
    }
}

/// A connected socket, encrypted or not.
struct Secured {
    transport: Box<dyn Transport>,
    encrypted: bool,
    end_point: Option<Vec<u8>>,
}

impl Secured {
    fn plain(transport: Box<dyn Transport>) -> Self {
        Self { transport, encrypted: false, end_point: None }
    }
}

/// Sends an `SSLRequest`. Exactly one byte is read, so that nothing sent in clear after it can be
/// taken for something that came encrypted.
async fn ask_for_tls(socket: &mut Box<dyn Transport>) -> Result<Encryption> {
    let mut request = bytes::BytesMut::new();
    frontend::ssl_request(&mut request);
    let broken = || "unable to ask the server for TLS";
    socket.write_all(&request).await.context(broken)?;
    socket.flush().await.context(broken)?;
    let answer = socket
        .read_u8()
        .await
        .context(broken)
        .map_err(|error| error.with_kind(Kind::Unavailable))?;
    match answer {
        b'S' => Ok(Encryption::Tls),
        b'N' => Ok(Encryption::Plain),
        b'E' => Err(Error::new(
            Kind::Unavailable,
            "the server answered the request for TLS with an error (its text cannot be trusted)",
        )
        .hint("The server's log says why.")),
        _ => Err(Error::new(
            Kind::Corrupt,
            "the server's answer to the request for TLS makes no sense",
        )
        .hint("Check that the port is PostgreSQL's.")),
    }
}

fn both_refused(first: Error, second: &Error) -> Error {
    if first.message() == second.message() {
        return first;
    }
    let kind = first.kind();
    let message =
        format!("{}; then, the other way of sslmode: {}", first.message(), second.message());
    let joined = Error::new(kind, message);
    match first.hint_text() {
        Some(hint) => joined.hint(hint),
        None => joined,
    }
}

fn timed_out(limit: Duration) -> Error {
    Error::new(Kind::Unavailable, format!("no answer within {} s", limit.as_secs()))
        .hint("Check host, port and firewalls; connect_timeout sets how long to wait.")
}

fn unexpected(message: &Message) -> Error {
    Error::new(Kind::Corrupt, format!("the server sent {} while connecting", message.name()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// Its length and `NEGOTIATE_SSL_CODE`.
    const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
        [&[kind][..], &length, body].concat()
    }

    /// A server of PostgreSQL 15 that lets everybody in and gives one answer to all queries, and breaks off
    /// every TLS handshake; its port.
    async fn serve(parameters: &[&str], answer: Vec<u8>) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let ready = message(b'Z', b"I");
        let mut greeting = message(b'R', &[0; 4]);
        for parameter in [&["server_version\x0015.1\0"], parameters].concat() {
            greeting.extend(message(b'S', parameter.as_bytes()));
        }
        greeting.extend(&ready);
        let answer = [answer, ready].concat();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let mut asked = vec![0; 1024];
                let mut says = &greeting;
                while let Ok(count @ 1..) = socket.read(&mut asked).await {
                    if asked[..count] == SSL_REQUEST {
                        socket.write_all(b"S").await.unwrap();
                        break;
                    }
                    socket.write_all(says).await.unwrap();
                    says = &answer;
                }
            }
        });
        port
    }

    #[tokio::test]
    async fn a_host_that_does_not_say_what_it_is_gives_way_to_the_next() {
        let refusal = message(b'E', b"SERROR\0VERROR\0C42501\0Mno\0\0");
        let mute = serve(&[], refusal).await;
        let known = ["in_hot_standby\0off\0", "default_transaction_read_only\0off\0"];
        let primary = serve(&known, message(b'C', b"SELECT 0\0")).await;
        for session in [Session::Physical, Session::Database] {
            let text = format!(
                "user=u sslmode=disable host=127.0.0.1,127.0.0.1 port={mute},{primary} \
                 target_session_attrs=read-write"
            );
            let options = ConnectOptions::parse(&text, &|_| None).unwrap();
            let found = connect(&options, session, &Clock::system()).await.unwrap();
            assert_eq!(found.parameter("in_hot_standby"), Some("off"), "{session:?}");
            assert_eq!(found.options().hosts, options.hosts[1..], "{session:?}");
        }
    }

    #[test]
    fn another_connection_goes_to_the_address_of_the_first_under_the_same_name() {
        let address = Address::Tcp("10.0.0.7:5433".parse().unwrap());
        let host = Host { place: Place::Name("db".into()), port: 5433 };
        let found = pinned(&host, &address);
        assert_eq!((found.name().as_str(), found.port), ("db", 5433));
        assert_eq!(found.place, Place::Address("10.0.0.7".parse().unwrap(), Some("db".into())));
        let socket = Host { place: Place::DefaultSocket, port: 5432 };
        assert_eq!(pinned(&socket, &Address::Unix("/tmp/.s.PGSQL.5432".into())), socket);
        let local = SocketAddr::V6(std::net::SocketAddrV6::new(
            [0xfe80, 0, 0, 0, 0, 0, 0, 1].into(),
            5433,
            0,
            2,
        ));
        assert_eq!(pinned(&host, &Address::Tcp(local)), host);
    }

    #[tokio::test]
    async fn going_on_in_plain_text_after_a_broken_handshake_is_a_warning() {
        use std::io::{Read as _, Seek as _};
        let port = serve(&[], message(b'C', b"SELECT 0\0")).await;
        let log = std::sync::Arc::new(tempfile::tempfile().unwrap());
        let writer = std::sync::Arc::clone(&log);
        let subscriber = tracing_subscriber::fmt().with_writer(writer).with_ansi(false).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let text = |mode: &str| format!("user=u host=127.0.0.1 port={port} sslmode={mode}");
        let connect = async |mode: &str| {
            let env = |name: &str| (name == "HOME").then(|| "/nowhere".to_owned());
            let options = ConnectOptions::parse(&text(mode), &env).unwrap();
            connect(&options, Session::Physical, &Clock::system()).await
        };
        assert!(connect("require").await.is_err());
        assert!(connect("disable").await.is_ok());
        let mut said = String::new();
        (&*log).rewind().unwrap();
        (&*log).read_to_string(&mut said).unwrap();
        assert_eq!(said, "");
        assert!(connect("prefer").await.is_ok());
        (&*log).rewind().unwrap();
        (&*log).read_to_string(&mut said).unwrap();
        assert!(said.contains(" WARN ") && said.contains("going on without encryption"), "{said}");
    }
}
