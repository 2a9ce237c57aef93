//! Sockets: TCP with keepalives and Unix sockets, and the byte stream that both are.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

use super::options::{Host, Place, SOCKET_FOLDERS};
use super::os_user;
use crate::error::{Context, Error, Kind, Result};

/// A stream of bytes to a server, encrypted or not.
pub(super) trait Transport: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Transport for T {}

/// Probing a silent TCP connection; 0 leaves a value to the operating system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Keepalive {
    /// Silence before the first probe.
    pub(super) idle_s: u32,
    /// Time between probes.
    pub(super) interval_s: u32,
    /// Unanswered probes that end the connection.
    pub(super) count: u32,
}

/// What is set on a TCP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TcpOptions {
    /// `None` = no probes.
    pub(super) keepalive: Option<Keepalive>,
    /// How long sent data may stay unacknowledged; 0 leaves it to the operating system.
    pub(super) user_timeout_ms: u32,
}

/// Where one attempt to connect goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    Tcp(SocketAddr),
    /// Path of a Unix socket; a leading `@` means the abstract name space.
    Unix(String),
}

/// The addresses of a host, in the order the resolver gives.
///
/// # Errors
/// `unavailable` when the name cannot be resolved.
pub(super) async fn resolve(host: &Host) -> Result<Vec<Address>> {
    let port = host.port;
    Ok(match &host.place {
        Place::Address(address, _) => vec![Address::Tcp(SocketAddr::new(*address, port))],
        Place::Socket(folder) => vec![Address::Unix(format!("{folder}/.s.PGSQL.{port}"))],
        Place::DefaultSocket => vec![Address::Unix(default_socket(port))],
        Place::Name(name) => {
            let found = tokio::net::lookup_host((name.as_str(), port)).await.map_err(|error| {
                Error::new(Kind::Unavailable, format!("unable to resolve host '{name}': {error}"))
                    .hint("Check the host name and the resolver of this machine.")
            })?;
            found.map(Address::Tcp).collect()
        }
    })
}

/// The socket in the first default folder that has one, else in the first that exists.
fn default_socket(port: u16) -> String {
    let file = format!(".s.PGSQL.{port}");
    let folders = || SOCKET_FOLDERS.iter().map(Path::new);
    let path: PathBuf = folders()
        .map(|folder| folder.join(&file))
        .find(|path| path.exists())
        .or_else(|| folders().find(|folder| folder.exists()).map(|folder| folder.join(&file)))
        .unwrap_or_else(|| Path::new("/tmp").join(&file));
    path.to_string_lossy().into_owned()
}

/// A connected socket.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Connects to `address`.
    ///
    /// # Errors
    /// `unavailable` when nobody answers there; `denied` without the right to the socket's folder.
    pub(super) async fn connect(address: &Address, tcp: TcpOptions) -> Result<Self> {
        match address {
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address).await.map_err(|error| {
                    refused(&error, "Is PostgreSQL running there and listening on that address (listen_addresses, port, firewall)?")
                })?;
                set_options(&stream, tcp).context(|| "unable to set options of the socket")?;
                Ok(Self::Tcp(stream))
            }
            Address::Unix(path) => connect_unix(path).await.map(Self::Unix).map_err(|error| {
                refused(&error, "Is PostgreSQL running on this machine, with its socket in that folder (unix_socket_directories)?")
            }),
        }
    }

    /// Checks that the other end of a Unix socket is a process of the user `required`.
    ///
    /// # Errors
    /// `denied` when it is somebody else's.
    pub(super) fn check_peer(&self, required: &str) -> Result<()> {
        let Self::Unix(stream) = self else { return Ok(()) };
        let id = stream.peer_cred().context(|| "unable to learn who serves the socket")?.uid();
        let name = os_user::by_id(id).map(|user| user.name);
        if name.as_deref() == Some(required) {
            return Ok(());
        }
        let found = name.unwrap_or_else(|| format!("user id {id}"));
        Err(Error::new(
            Kind::Denied,
            format!("requirepeer is '{required}', but the socket is served by '{found}'"),
        ))
    }

    pub(super) fn into_transport(self) -> Box<dyn Transport> {
        match self {
            Self::Tcp(stream) => Box::new(stream),
            Self::Unix(stream) => Box::new(stream),
        }
    }
}

fn refused(error: &io::Error, hint: &str) -> Error {
    let kind = match error.kind() {
        io::ErrorKind::PermissionDenied => Kind::Denied,
        _ => Kind::Unavailable,
    };
    Error::new(kind, error.to_string()).hint(hint)
}

async fn connect_unix(path: &str) -> io::Result<UnixStream> {
    match path.strip_prefix('@') {
        None => UnixStream::connect(path).await,
        // The form in which the operating system takes a name of the abstract name space.
        Some(name) => UnixStream::connect(format!("\0{name}")).await,
    }
}

fn set_options(stream: &TcpStream, options: TcpOptions) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    if let Some(keepalive) = options.keepalive {
        let seconds = |count: u32| Duration::from_secs(count.into());
        let mut settings = TcpKeepalive::new();
        if keepalive.idle_s > 0 {
            settings = settings.with_time(seconds(keepalive.idle_s));
        }
        if keepalive.interval_s > 0 {
            settings = settings.with_interval(seconds(keepalive.interval_s));
        }
        if keepalive.count > 0 {
            settings = settings.with_retries(keepalive.count);
        }
        socket.set_tcp_keepalive(&settings)?;
    }
    if options.user_timeout_ms > 0 {
        let timeout = Duration::from_millis(options.user_timeout_ms.into());
        socket.set_tcp_user_timeout(Some(timeout))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, SockAddr, Type};

    #[test]
    fn an_abstract_socket_that_nobody_accepts_on_does_not_block() {
        let name = format!("tidemark-test-{}", std::process::id());
        let listening = socket2::Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listening.bind(&SockAddr::unix(format!("\0{name}")).unwrap()).unwrap();
        listening.listen(0).unwrap();
        let (done, outcome) = std::sync::mpsc::sync_channel(1);
        // A thread of its own: one that blocks is left behind.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let address = Address::Unix(format!("@{name}"));
                let tcp = TcpOptions { keepalive: None, user_timeout_ms: 0 };
                let first = Socket::connect(&address, tcp).await;
                assert!(first.is_ok(), "{first:?}");
                let second = Socket::connect(&address, tcp).await;
                done.send(second.map(|_| ()).map_err(|error| error.kind())).unwrap();
            });
        });
        let second = outcome.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(second, Err(Kind::Unavailable));
    }
}
