//! Where and how to connect, from a connection string, the environment and libpq's files.
//!
//! What a string leaves open comes from the service file, then from `PG*` variables, then from
//! libpq's defaults. Differences from libpq, all on purpose: an empty value counts as not given;
//! connecting gives up after 30 s unless `connect_timeout` says otherwise; TCP keepalives start after
//! a minute of silence unless `keepalives_idle` says otherwise; `client_encoding` is always UTF8;
//! `replication` is what the caller asks for, whatever the string says; the database is `postgres`;
//! GSSAPI encryption, encrypted client keys and key logging are refused rather than ignored where they
//! were asked for.
//!
//! # Source
//! `conninfo_add_defaults` and `pqConnectOptions2` in `src/interfaces/libpq/fe-connect.c`.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use secrecy::SecretSlice;

use super::auth::{ChannelBindingMode, RequiredAuth};
use super::conninfo::{self, KEYS, Pairs};
use super::os_user::{self, OsUser};
use super::passfile::{self, Wanted};
use super::service::{self, ServiceFiles};
use super::tls::{CertificateMode, RootSource, SslMode, SslNegotiation, TlsOptions, TlsVersions};
use super::transport::{Keepalive, TcpOptions};
use crate::error::{Error, Kind, Result};

/// PostgreSQL's port (`DEF_PGPORT`).
const DEFAULT_PORT: u16 = 5432;

/// Where servers put their Unix socket when nobody says so: Debian's and upstream's
/// `DEFAULT_PGSOCKET_DIR`.
pub(super) const SOCKET_FOLDERS: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// Long enough for a server under load, short enough that a dead host does not stop a backup.
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);

/// libpq waits at least this long, because a second may be over at once.
const CONNECT_TIMEOUT_MIN: Duration = Duration::from_secs(2);

/// Silence of the server that counts as a lost connection; `wal_receiver_timeout`'s default.
const READ_TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);
/// What a server keeps of `application_name` (`NAMEDATALEN - 1`).
const APPLICATION_NAME_BYTES_MAX: usize = 63;

/// Keys whose values are never shown.
const SECRET_KEYS: [&str; 5] =
    ["password", "sslpassword", "scram_client_key", "scram_server_key", "oauth_client_secret"];

/// Where one server may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A name to resolve.
    Name(String),
    /// An address, and the name its certificate and password are looked up by, if one was given: an
    /// address can be written in more than one way.
    Address(IpAddr, Option<String>),
    /// Folder of a Unix socket; a leading `@` means the abstract name space.
    Socket(String),
    /// The Unix socket in the default folder.
    DefaultSocket,
}

/// One server to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Host {
    pub(super) place: Place,
    pub(super) port: u16,
}

impl Host {
    /// The name that password files and certificates know the server by.
    pub(super) fn name(&self) -> String {
        match &self.place {
            Place::Name(name) | Place::Address(_, Some(name)) => name.clone(),
            Place::Address(address, None) => address.to_string(),
            Place::Socket(folder) if !SOCKET_FOLDERS.contains(&folder.as_str()) => folder.clone(),
            Place::Socket(_) | Place::DefaultSocket => "localhost".to_owned(),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = self.port;
        match &self.place {
            Place::Name(name) => write!(f, "{name}:{port}"),
            Place::Address(address, Some(name)) if name.parse() != Ok(*address) => {
                write!(f, "{name}:{port} ({address})")
            }
            Place::Address(IpAddr::V6(address), _) => write!(f, "[{address}]:{port}"),
            Place::Address(address, _) => write!(f, "{address}:{port}"),
            Place::Socket(folder) => write!(f, "{folder}/.s.PGSQL.{port}"),
            Place::DefaultSocket => write!(f, "local socket .s.PGSQL.{port}"),
        }
    }
}

/// What a server must be for us to stay connected (`target_session_attrs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    PreferStandby,
}

/// In which order hosts and addresses are tried (`load_balance_hosts`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostOrder {
    AsGiven,
    Random,
}

/// Everything needed to connect; `Display` and `Debug` show no secret.
#[derive(Clone)]
pub struct ConnectOptions {
    pub(super) hosts: Vec<Host>,
    pub(super) user: String,
    pub(super) dbname: Option<String>,
    password: Option<SecretSlice<u8>>,
    passfile: Option<PathBuf>,
    /// `options`: command-line options for the backend.
    pub(super) backend_options: Option<String>,
    pub(super) application_name: Option<String>,
    pub(super) connect_timeout: Option<Duration>,
    pub(super) read_timeout: Duration,
    pub(super) tcp: TcpOptions,
    pub(super) tls: TlsOptions,
    pub(super) required_peer: Option<String>,
    pub(super) channel_binding: ChannelBindingMode,
    pub(super) required_auth: RequiredAuth,
    pub(super) target: Target,
    pub(super) host_order: HostOrder,
}

/// A password and where it came from, for the hint that goes with a refusal.
pub(super) struct Password {
    pub(super) secret: SecretSlice<u8>,
    pub(super) source: String,
}

impl ConnectOptions {
    /// Reads a connection string (URI or `key=value`), fills what it leaves open from `PG*`
    /// variables, the service file and the password file, as libpq does.
    ///
    /// # Errors
    /// `config` for a string libpq would refuse, an unknown key (with the nearest known one), or a
    /// service that does not exist; `unsupported` for what this client cannot do.
    pub fn parse(conninfo: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let mut pairs = conninfo::parse(conninfo)?;
        let os_user = os_user::current();
        let home = home(env, os_user.as_ref());
        fill(&mut pairs, env, home.as_ref())?;
        pairs.retain(|_, value| !value.is_empty());
        refuse_unsupported(&pairs)?;
        let user =
            pairs.get("user").cloned().or(os_user.map(|user| user.name)).ok_or_else(|| {
                refuse("no user is given, and the operating system knows no name for our user id")
                    .hint("Add user=NAME to the connection string, or set PGUSER.")
            })?;
        let postgresql = home.as_ref().map(|home| home.join(".postgresql"));
        Ok(Self {
            hosts: hosts(&pairs)?,
            user,
            dbname: pairs.get("dbname").cloned(),
            password: pairs.get("password").cloned().map(|text| text.into_bytes().into()),
            passfile: path(&pairs, "passfile").or(home.map(|home| home.join(".pgpass"))),
            backend_options: pairs.get("options").cloned(),
            application_name: pairs
                .get("application_name")
                .or(pairs.get("fallback_application_name"))
                .cloned(),
            connect_timeout: connect_timeout(&pairs)?,
            read_timeout: READ_TIMEOUT_DEFAULT,
            tcp: tcp_options(&pairs)?,
            tls: tls_options(&pairs, postgresql)?,
            required_peer: pairs.get("requirepeer").cloned(),
            channel_binding: choice(
                &pairs,
                "channel_binding",
                &[
                    ("prefer", ChannelBindingMode::Prefer),
                    ("disable", ChannelBindingMode::Disable),
                    ("require", ChannelBindingMode::Require),
                ],
            )?,
            required_auth: RequiredAuth::parse(pairs.get("require_auth").map(String::as_str))?,
            target: choice(
                &pairs,
                "target_session_attrs",
                &[
                    ("any", Target::Any),
                    ("read-write", Target::ReadWrite),
                    ("read-only", Target::ReadOnly),
                    ("primary", Target::Primary),
                    ("standby", Target::Standby),
                    ("prefer-standby", Target::PreferStandby),
                ],
            )?,
            host_order: choice(
                &pairs,
                "load_balance_hosts",
                &[("disable", HostOrder::AsGiven), ("random", HostOrder::Random)],
            )?,
        })
    }

    /// The secrets that a connection string holds, for who must not show them.
    ///
    /// # Errors
    /// `config` for a string libpq would refuse.
    pub fn secrets_in(conninfo: &str) -> Result<Vec<String>> {
        let pairs = conninfo::parse(conninfo)?.into_iter();
        Ok(pairs.filter(|(name, _)| SECRET_KEYS.contains(name)).map(|(_, value)| value).collect())
    }

    /// Sets `application_name` unless the connection string or the environment names one.
    #[must_use]
    pub fn with_application_name(mut self, name: &str) -> Self {
        self.application_name.get_or_insert_with(|| name.to_owned());
        self
    }

    /// Adds to `application_name`, which the server cuts off after 63 bytes; no name stays none.
    #[must_use]
    pub fn with_application_name_suffix(mut self, suffix: &str) -> Self {
        if let Some(name) = &mut self.application_name {
            let room = APPLICATION_NAME_BYTES_MAX.saturating_sub(suffix.len());
            name.truncate(name.floor_char_boundary(room));
            name.push_str(suffix);
        }
        self
    }

    /// Sets for how long a server may be silent before the connection counts as lost.
    #[must_use]
    pub fn with_read_timeout(mut self, silence_max: Duration) -> Self {
        self.read_timeout = silence_max;
        self
    }

    /// The role we connect as.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The password to use at `host` for any of `databases`, read afresh so that a changed file is
    /// seen by the next connection.
    pub(super) fn password(&self, host: &Host, databases: &[&str]) -> Option<Password> {
        if let Some(secret) = &self.password {
            let source = "the connection string, its service or PGPASSWORD".to_owned();
            return Some(Password { secret: secret.clone(), source });
        }
        let file = self.passfile.as_ref()?;
        let name = host.name();
        databases.iter().find_map(|database| {
            let wanted = Wanted { host: &name, port: host.port, database, user: &self.user };
            let secret = passfile::lookup(file, wanted)?;
            Some(Password { secret, source: format!("password file '{}'", file.display()) })
        })
    }
}

impl fmt::Display for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@", self.user)?;
        for (index, host) in self.hosts.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{host}")?;
        }
        self.dbname.as_ref().map_or(Ok(()), |dbname| write!(f, "/{dbname}"))
    }
}

impl fmt::Debug for ConnectOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnectOptions({self})")
    }
}

fn refuse(why: impl fmt::Display) -> Error {
    Error::new(Kind::Config, format!("unable to use the connection string: {why}"))
}

/// Where our user's own files are.
pub(super) fn home(
    env: &dyn Fn(&str) -> Option<String>,
    os_user: Option<&OsUser>,
) -> Option<PathBuf> {
    let named = env("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    named.or_else(|| os_user.map(|user| user.home.clone()))
}

/// Adds what the string leaves open: the service, then the environment.
pub(super) fn fill(
    pairs: &mut Pairs,
    env: &dyn Fn(&str) -> Option<String>,
    home: Option<&PathBuf>,
) -> Result<()> {
    let given = |name: &str, variable: &str| {
        pairs.get(name).cloned().or_else(|| env(variable)).filter(|value| !value.is_empty())
    };
    let files = ServiceFiles {
        named: given("servicefile", "PGSERVICEFILE").map(PathBuf::from),
        home: home.cloned(),
        system: env("PGSYSCONFDIR").filter(|path| !path.is_empty()).map(PathBuf::from),
    };
    if let Some(name) = given("service", "PGSERVICE") {
        service::apply(pairs, &name, &files)?;
    }
    for key in &KEYS {
        let value = key.variable.and_then(env).filter(|value| !value.is_empty());
        if let Some(value) = value {
            pairs.entry(key.name).or_insert(value);
        }
    }
    if env("PGREQUIRESSL").is_some_and(|value| value.starts_with('1')) {
        pairs.entry("sslmode").or_insert_with(|| "require".to_owned());
    }
    Ok(())
}

/// What libpq can do and we cannot must not be dropped without a word.
fn refuse_unsupported(pairs: &Pairs) -> Result<()> {
    let is = |name: &str, value: &str| pairs.get(name).is_some_and(|given| given == value);
    let refused = [
        (is("gssencmode", "require"), "gssencmode=require"),
        (pairs.contains_key("sslkeylogfile"), "sslkeylogfile"),
        (pairs.contains_key("sslpassword"), "sslpassword (an encrypted client key)"),
        (pairs.contains_key("scram_client_key"), "scram_client_key"),
        (pairs.contains_key("scram_server_key"), "scram_server_key"),
        (is("min_protocol_version", "3.2"), "min_protocol_version=3.2"),
        (is("min_protocol_version", "latest"), "min_protocol_version=latest"),
    ];
    match refused.iter().find(|(asked, _)| *asked) {
        None => Ok(()),
        Some((_, what)) => Err(refuse(format_args!("{what} is not supported"))
            .with_kind(Kind::Unsupported)
            .hint("Remove it, or use TLS with a password or an unencrypted client key.")),
    }
}

fn path(pairs: &Pairs, name: &str) -> Option<PathBuf> {
    pairs.get(name).map(PathBuf::from)
}

/// The value of one of a few words; the first is the default.
fn choice<T: Copy>(pairs: &Pairs, name: &str, words: &[(&str, T)]) -> Result<T> {
    let Some(given) = pairs.get(name) else {
        return words.first().map(|(_, value)| *value).ok_or_else(|| refuse("no choice for a key"));
    };
    words.iter().find(|(word, _)| word == given).map(|(_, value)| *value).ok_or_else(|| {
        let list: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        refuse(format_args!("{name} is '{given}', which is none of {}", list.join(", ")))
    })
}

/// A whole number with optional blanks around it (`pqParseIntParam`); negative counts as 0.
fn number(pairs: &Pairs, name: &str) -> Result<Option<u32>> {
    pairs.get(name).map(|given| parse_number(given, name)).transpose()
}

fn parse_number(given: &str, name: &str) -> Result<u32> {
    let parsed = given.trim().parse::<i32>().map_err(|_not_a_number| {
        refuse(format_args!("{name} is not a whole number"))
            .hint("Percent-encode special characters such as '/' or '@' in the password of a URI.")
    })?;
    Ok(u32::try_from(parsed).unwrap_or(0))
}

fn connect_timeout(pairs: &Pairs) -> Result<Option<Duration>> {
    Ok(match number(pairs, "connect_timeout")? {
        None => Some(CONNECT_TIMEOUT_DEFAULT),
        Some(0) => None,
        Some(seconds) => Some(Duration::from_secs(seconds.into()).max(CONNECT_TIMEOUT_MIN)),
    })
}

fn tcp_options(pairs: &Pairs) -> Result<TcpOptions> {
    let keepalive = match number(pairs, "keepalives")? {
        Some(0) => None,
        _ => Some(Keepalive {
            idle_s: number(pairs, "keepalives_idle")?.unwrap_or(60),
            interval_s: number(pairs, "keepalives_interval")?.unwrap_or(10),
            count: number(pairs, "keepalives_count")?.unwrap_or(6),
        }),
    };
    Ok(TcpOptions { keepalive, user_timeout_ms: number(pairs, "tcp_user_timeout")?.unwrap_or(0) })
}

fn hosts(pairs: &Pairs) -> Result<Vec<Host>> {
    let list = |name: &str| -> Vec<&str> {
        pairs.get(name).map(|given| given.split(',').collect()).unwrap_or_default()
    };
    let (names, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
    if !names.is_empty() && !addresses.is_empty() && names.len() != addresses.len() {
        let (names, addresses) = (names.len(), addresses.len());
        return Err(refuse(format_args!("it has {names} in host but {addresses} in hostaddr")));
    }
    let count = names.len().max(addresses.len()).max(1);
    if ports.len() > 1 && ports.len() != count {
        let ports = ports.len();
        return Err(refuse(format_args!("it has {ports} in port for {count} in host")));
    }
    (0..count)
        .map(|index| {
            let port = ports.get(index).or(ports.first()).copied().unwrap_or("").trim();
            let name = names.get(index).copied().unwrap_or("");
            let address = addresses.get(index).copied().unwrap_or("");
            Ok(Host { place: place(name, address)?, port: parse_port(port)? })
        })
        .collect()
}

fn place(name: &str, address: &str) -> Result<Place> {
    if !address.is_empty() {
        let address =
            address.parse().map_err(|_not_an_address| refuse("hostaddr is not an IP address"))?;
        return Ok(Place::Address(address, (!name.is_empty()).then(|| name.to_owned())));
    }
    Ok(match name.chars().next() {
        None => Place::DefaultSocket,
        Some('/' | '@') => Place::Socket(name.to_owned()),
        Some(_) => match name.parse() {
            Ok(address) => Place::Address(address, Some(name.to_owned())),
            Err(_) => Place::Name(name.to_owned()),
        },
    })
}

fn parse_port(given: &str) -> Result<u16> {
    if given.is_empty() {
        return Ok(DEFAULT_PORT);
    }
    u16::try_from(parse_number(given, "port")?)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| refuse("port is not a number from 1 to 65535"))
}

fn tls_options(pairs: &Pairs, folder: Option<PathBuf>) -> Result<TlsOptions> {
    let system = pairs.get("sslrootcert").is_some_and(|root| root == "system");
    let mut mode = choice(
        pairs,
        "sslmode",
        &[
            ("prefer", SslMode::Prefer),
            ("disable", SslMode::Disable),
            ("allow", SslMode::Allow),
            ("require", SslMode::Require),
            ("verify-ca", SslMode::VerifyCa),
            ("verify-full", SslMode::VerifyFull),
        ],
    )?;
    if system && !pairs.contains_key("sslmode") {
        mode = SslMode::VerifyFull;
    }
    if system && mode != SslMode::VerifyFull {
        return Err(refuse("sslrootcert=system needs sslmode=verify-full"));
    }
    let negotiation = choice(
        pairs,
        "sslnegotiation",
        &[("postgres", SslNegotiation::Postgres), ("direct", SslNegotiation::Direct)],
    )?;
    if negotiation == SslNegotiation::Direct && mode < SslMode::Require {
        return Err(refuse("sslnegotiation=direct needs sslmode=require or stronger"));
    }
    let default = |name: &str| folder.as_ref().map(|folder| folder.join(name));
    let root = match path(pairs, "sslrootcert") {
        Some(_) if system => RootSource::System,
        Some(path) => RootSource::Named(path),
        None => RootSource::Default(default("root.crt")),
    };
    Ok(TlsOptions {
        mode,
        negotiation,
        root,
        certificate: path(pairs, "sslcert").or(default("postgresql.crt")),
        certificate_given: pairs.contains_key("sslcert"),
        key: path(pairs, "sslkey").or(default("postgresql.key")),
        certificate_mode: choice(
            pairs,
            "sslcertmode",
            &[
                ("allow", CertificateMode::Allow),
                ("disable", CertificateMode::Disable),
                ("require", CertificateMode::Require),
            ],
        )?,
        crl: path(pairs, "sslcrl"),
        crl_default: default("root.crl"),
        crl_folder: path(pairs, "sslcrldir"),
        server_name_indication: pairs.get("sslsni").is_none_or(|value| value != "0"),
        versions: tls_versions(pairs)?,
    })
}

fn tls_versions(pairs: &Pairs) -> Result<TlsVersions> {
    let parse = |name: &str| -> Result<Option<u8>> {
        let Some(given) = pairs.get(name) else { return Ok(None) };
        let known = [("tlsv1", 0), ("tlsv1.1", 1), ("tlsv1.2", 2), ("tlsv1.3", 3)];
        let lower = given.to_ascii_lowercase();
        let minor = known.iter().find(|(word, _)| *word == lower).map(|(_, minor)| *minor);
        minor.map(Some).ok_or_else(|| {
            refuse(format_args!("{name} is none of TLSv1, TLSv1.1, TLSv1.2, TLSv1.3"))
        })
    };
    let min = parse("ssl_min_protocol_version")?.unwrap_or(2).max(2);
    let max = parse("ssl_max_protocol_version")?.unwrap_or(3);
    match (min, max) {
        (2, 2) => Ok(TlsVersions::Only12),
        (3, 3) => Ok(TlsVersions::Only13),
        (2, 3) => Ok(TlsVersions::From12),
        _ => Err(refuse("its range of TLS versions is empty; only 1.2 and 1.3 are spoken")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use secrecy::ExposeSecret;

    fn parse_with(conninfo: &str, variables: &[(&str, &str)]) -> Result<ConnectOptions> {
        ConnectOptions::parse(conninfo, &|name| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    fn parse(conninfo: &str) -> Result<ConnectOptions> {
        parse_with(conninfo, &[("HOME", "/nowhere")])
    }

    #[test]
    fn the_string_wins_over_the_environment() {
        let variables =
            [("PGHOST", "env"), ("PGUSER", "envuser"), ("PGPORT", "6000"), ("PGAPPNAME", "")];
        let options = parse_with("host=mine", &variables).unwrap().with_application_name("app");
        assert_eq!(options.to_string(), "envuser@mine:6000");
        assert_eq!(options.application_name.as_deref(), Some("app"));
        let named = parse_with("application_name=x", &variables).unwrap();
        assert_eq!(named.with_application_name("app").application_name.as_deref(), Some("x"));
    }

    #[test]
    fn a_suffix_of_the_application_name_is_never_what_the_server_cuts_off() {
        for (name, expected) in [
            ("x".to_owned(), "x_y".to_owned()),
            ("x".repeat(70), "x".repeat(61) + "_y"),
            ("x".repeat(60) + "ü", "x".repeat(60) + "_y"),
        ] {
            let options = parse("user=u").unwrap().with_application_name(&name);
            let options = options.with_application_name_suffix("_y");
            assert_eq!(options.application_name, Some(expected));
        }
        let none = parse("user=u").unwrap().with_application_name_suffix("_y");
        assert_eq!(none.application_name, None);
    }

    #[test]
    fn hosts_addresses_and_ports_go_together() {
        let options =
            parse("postgresql://u@a,b:7,[::1],%2Ftmp/d?target_session_attrs=primary").unwrap();
        assert_eq!(options.to_string(), "u@a:5432,b:7,[::1]:5432,/tmp/.s.PGSQL.5432/d");
        assert_eq!(options.target, Target::Primary);
        let options = parse("host=a,b hostaddr=10.0.0.1, user=u port=1").unwrap();
        assert_eq!(options.to_string(), "u@a:1 (10.0.0.1),b:1");
        let options = parse("user=u host=@abstract,").unwrap();
        assert_eq!(options.hosts[0].place, Place::Socket("@abstract".to_owned()));
        assert_eq!(options.hosts[1].place, Place::DefaultSocket);
        for bad in [
            "host=a,b hostaddr=10.0.0.1",
            "host=a,b port=1,2,3",
            "port=0",
            "port=65536",
            "port=x",
            "hostaddr=a",
            "port=-1",
        ] {
            assert_eq!(parse(bad).unwrap_err().kind(), Kind::Config, "{bad}");
        }
    }

    #[test]
    fn sslmode_and_root_certificate_go_together() {
        let mode = |text: &str| parse(text).map(|options| options.tls.mode);
        assert_eq!(mode("user=u").unwrap(), SslMode::Prefer);
        assert_eq!(mode("user=u sslrootcert=system").unwrap(), SslMode::VerifyFull);
        assert!(mode("user=u sslrootcert=system sslmode=require").is_err());
        assert!(mode("user=u sslnegotiation=direct").is_err());
        assert!(mode("user=u sslnegotiation=direct sslmode=require").is_ok());
        assert!(mode("user=u sslmode=on").is_err());
        assert!(mode("user=u ssl_max_protocol_version=TLSv1.1").is_err());
        let old = parse_with("user=u", &[("PGREQUIRESSL", "1")]).unwrap();
        assert_eq!(old.tls.mode, SslMode::Require);
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        for text in ["gssencmode=require", "sslpassword=x", "min_protocol_version=3.2"] {
            let error = parse(&format!("user=u {text}")).unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported, "{text}");
        }
        assert!(parse("user=u gssencmode=prefer krbsrvname=x max_protocol_version=3.2").is_ok());
    }

    #[test]
    fn time_outs_are_libpqs() {
        let timeout = |text: &str| parse(text).unwrap().connect_timeout;
        assert_eq!(timeout("user=u connect_timeout=1"), Some(CONNECT_TIMEOUT_MIN));
        assert_eq!(timeout("user=u connect_timeout=' 9 '"), Some(Duration::from_secs(9)));
        assert_eq!(timeout("user=u connect_timeout=-5"), None);
        assert_eq!(timeout("user=u"), Some(CONNECT_TIMEOUT_DEFAULT));
        let tcp = parse("user=u keepalives=0 tcp_user_timeout=5").unwrap().tcp;
        assert_eq!(tcp, TcpOptions { keepalive: None, user_timeout_ms: 5 });
    }

    #[test]
    fn passwords_come_from_the_string_then_the_file_and_are_never_shown() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(".pgpass");
        std::fs::write(
            &file,
            "h:5432:replication:u:from-file\nlocalhost:*:*:u:local\n2001\\:DB8\\:\\:1:*:*:u:v6\n",
        )
        .unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let home = folder.path().to_str().unwrap();
        let password = |text: &str, variables: &[(&str, &str)]| {
            let variables = [&[("HOME", home)], variables].concat();
            let options = parse_with(text, &variables).unwrap();
            assert!(!format!("{options} {options:?}").contains("secret"));
            options
                .password(&options.hosts[0], &["replication"])
                .map(|found| String::from_utf8(found.secret.expose_secret().to_vec()).unwrap())
        };
        assert_eq!(password("host=h user=u", &[]).as_deref(), Some("from-file"));
        assert_eq!(password("host=/tmp user=u", &[]).as_deref(), Some("local"));
        assert_eq!(password("host=/other user=u", &[]), None);
        assert_eq!(password("host=2001:DB8::1 user=u", &[]).as_deref(), Some("v6"));
        assert_eq!(parse("host=2001:DB8::1 user=u").unwrap().to_string(), "u@[2001:db8::1]:5432");
        let variables = [("PGPASSWORD", "secret1")];
        assert_eq!(password("host=h user=u", &variables).as_deref(), Some("secret1"));
        let text = "postgres://u:secret2@h";
        assert_eq!(password(text, &variables).as_deref(), Some("secret2"));
    }
}
