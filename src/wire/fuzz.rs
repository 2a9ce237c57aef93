//! What must hold of the decoders of this module whatever bytes they are given; see `crate::fuzz`.
//! Whatever does not hold is a panic.
#![allow(
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a property that does not hold is a panic, and nothing but tests calls this"
)]

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use rustls::pki_types::{ServerName, UnixTime};
use secrecy::ExposeSecret;

use super::auth::{ChannelBindingMode, Credentials, Exchange, Outcome, RequiredAuth};
use super::base_backup::{BaseBackupEvent, Reader, Step};
use super::conninfo::{self, Pairs};
use super::message::{self, AuthRequest, Decoded, Message, Phase};
use super::options::{ConnectOptions, Password};
use super::passfile::{self, Wanted};
use super::server_error::Asked;
use super::wal_stream::{self, WalEvent};
use super::{Session, certificate, service};

/// No message makes us wait for more than this (`DATA_ROW_BYTES_MAX` and its type).
const MISSING_BYTES_MAX: usize = (16 << 20) + 1;
/// A SCRAM challenge with a greater cost is left out, or most of the time would go there.
const ITERATIONS_MAX: u32 = 64;
const PASSWORD: &str = "correct horse";

/// Whether the other side has let us in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trust {
    Stranger,
    Server,
}

impl Trust {
    fn phase(self) -> Phase {
        match self {
            Self::Stranger => Phase::Startup,
            Self::Server => Phase::Session,
        }
    }
}

/// The messages in `pieces` and why they end.
fn decode_all<'a>(
    phase: Phase,
    pieces: impl Iterator<Item = &'a [u8]>,
) -> (Vec<Message>, Option<String>) {
    let (mut buffer, mut found) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        buffer.extend_from_slice(piece);
        loop {
            match message::decode(&mut buffer, phase) {
                Ok(Decoded::Message(message)) => {
                    // Whoever is told no before being let in reads no further.
                    let over =
                        phase == Phase::Startup && matches!(message, Message::ErrorResponse(_));
                    found.push(message);
                    if over {
                        return (found, None);
                    }
                }
                Ok(Decoded::Missing(count)) => {
                    assert!((1..=MISSING_BYTES_MAX).contains(&count), "{count} bytes missing");
                    break;
                }
                Err(error) => return (found, Some(error.to_string())),
            }
        }
    }
    (found, None)
}

/// Messages are the same however they come in, and an error of the server's can be told.
pub(crate) fn messages(trust: Trust, sizes: &[usize], bytes: &[u8]) {
    let (whole, whole_error) = decode_all(trust.phase(), std::iter::once(bytes));
    let mut rest = bytes;
    let cut = sizes.iter().cycle().map_while(|size| {
        let (piece, later) = rest.split_at((*size).min(rest.len()));
        rest = later;
        (!piece.is_empty()).then_some(piece)
    });
    let (pieced, pieced_error) = decode_all(trust.phase(), cut);
    assert_eq!(format!("{whole:?}"), format!("{pieced:?}"));
    assert_eq!(whole_error, pieced_error);
    for message in whole {
        assert!(!message.name().is_empty());
        if let Message::ErrorResponse(error) | Message::NoticeResponse(error) = message {
            let asked = Asked { session: Session::Physical, user: "u" };
            assert!(!error.into_error(asked).to_string().is_empty());
        }
    }
}

/// A server that cannot know the password is let in only where it need not know it, and sees the
/// password only where it may.
pub(crate) fn authentication(setup: u8, bytes: &[u8]) {
    let flag = |bit: u8| setup & 1 << bit != 0;
    let channel_binding = match setup & 3 {
        0 => ChannelBindingMode::Disable,
        1 => ChannelBindingMode::Require,
        _ => ChannelBindingMode::Prefer,
    };
    let scram_only = flag(2);
    let required = RequiredAuth::parse(scram_only.then_some("scram-sha-256"));
    let required = required.expect("a list of methods");
    let password =
        Password { secret: PASSWORD.as_bytes().to_vec().into(), source: "the fuzzer".to_owned() };
    let encrypted = flag(4);
    let credentials = Credentials {
        user: "u",
        password: (!flag(3)).then_some(&password),
        channel_binding,
        required: &required,
        encrypted,
        end_point: (encrypted && flag(5)).then_some(&[7; 32][..]),
    };
    let mut exchange = Exchange::new(credentials);
    let (mut in_clear, mut challenged, mut nonce) = (false, false, Vec::new());
    for message in decode_all(Phase::Startup, std::iter::once(bytes)).0 {
        let Message::Authentication(request) = message else { return };
        let mut out = BytesMut::new();
        let request = match request {
            AuthRequest::SaslContinue(data) => {
                let data = with_nonce(&data, &nonce);
                if iterations(&data).is_some_and(|count| count > ITERATIONS_MAX) {
                    return;
                }
                AuthRequest::SaslContinue(data)
            }
            other => other,
        };
        in_clear |= request == AuthRequest::CleartextPassword;
        challenged |= matches!(request, AuthRequest::Sasl { .. });
        let proof = matches!(request, AuthRequest::SaslFinal(_));
        match exchange.answer(request, &mut out) {
            Ok(Outcome::Done) => {
                assert!(!challenged, "let in without proof of the password");
                assert!(channel_binding != ChannelBindingMode::Require, "let in unbound");
                assert!(!scram_only, "let in by a method that is not allowed");
                return;
            }
            Ok(Outcome::More) => assert!(!proof, "a proof without the password was believed"),
            Err(_) => return assert!(out.is_empty(), "refused and answered all the same"),
        }
        let allowed = in_clear && !scram_only && channel_binding != ChannelBindingMode::Require;
        let shown = out.windows(PASSWORD.len()).any(|part| part == PASSWORD.as_bytes());
        assert!(allowed || !shown, "the password was shown");
        if let Some(place) = out.windows(2).position(|part| part == b"r=") {
            nonce = out.split_off(place + 2).to_vec();
        }
    }
}

/// `data` with our nonce in place of each `@`, so that a made-up server can answer to it.
fn with_nonce(data: &[u8], nonce: &[u8]) -> Bytes {
    let parts: Vec<&[u8]> = data.split(|byte| *byte == b'@').collect();
    Bytes::from(parts.join(nonce))
}

fn iterations(challenge: &[u8]) -> Option<u32> {
    let place = challenge.windows(2).position(|part| part == b"i=")?;
    let digits = challenge.get(place + 2..)?.iter().take_while(|byte| byte.is_ascii_digit());
    Some(digits.fold(0, |value: u32, digit| {
        value.saturating_mul(10).saturating_add(u32::from(digit - b'0'))
    }))
}

/// What is read of a message of the WAL stream is what it says, and WAL is a slice of it.
pub(crate) fn wal_stream(bytes: &[u8]) {
    let Ok(event) = wal_stream::decode(Bytes::copy_from_slice(bytes)) else { return };
    let mut again = BytesMut::new();
    match &event {
        WalEvent::Wal { start_lsn, server_end_lsn, server_time, data } => {
            again.put_u8(b'w');
            again.put_u64(start_lsn.0);
            again.put_u64(server_end_lsn.0);
            again.put_i64(server_time.0);
            again.extend_from_slice(data);
            assert_eq!(again, bytes);
        }
        WalEvent::Keepalive { server_end_lsn, server_time, reply_requested } => {
            again.put_u8(b'k');
            again.put_u64(server_end_lsn.0);
            again.put_i64(server_time.0);
            assert!(bytes.starts_with(&again));
            assert_eq!(*reply_requested, bytes[again.len()] != 0);
        }
        WalEvent::TimelineEnded { .. } => panic!("no message says that"),
    }
}

/// How the archives of a base backup come: before PostgreSQL 15 a COPY each, since then one for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    ManyCopies,
    OneCopy,
}

/// Events come in their order, archives in the announced one, and nothing comes behind the end.
pub(crate) fn base_backup(form: Form, bytes: &[u8]) {
    let mut reader = Reader::new(form == Form::OneCopy);
    let (mut archives, mut begun, mut ended) = (None, 0, false);
    let mut data_bytes = 0;
    for message in decode_all(Phase::Session, std::iter::once(bytes)).0 {
        let Ok(step) = reader.read(message) else { return };
        assert!(!ended, "a message behind the end was taken");
        let Step::Emit(event) = step else { continue };
        match event {
            BaseBackupEvent::Start { tablespaces, .. } => {
                assert_eq!(archives, None);
                assert_eq!(tablespaces.iter().filter(|one| one.oid.is_none()).count(), 1);
                archives = Some(tablespaces.len());
            }
            BaseBackupEvent::Archive { index } => {
                assert_eq!(index, begun);
                begun += 1;
                assert!(archives.is_some_and(|count| begun <= count));
            }
            BaseBackupEvent::Data(data) => {
                assert!(begun > 0, "data of no archive");
                data_bytes += data.len();
            }
            BaseBackupEvent::Progress { .. } => assert!(archives.is_some()),
            BaseBackupEvent::End { .. } => {
                assert_eq!(archives, Some(begun));
                ended = true;
            }
        }
    }
    assert!(data_bytes <= bytes.len());
}

/// A certificate has a hash of a known length or none, one span of validity, and no letter case; an
/// authority's can be read.
pub(crate) fn certificate(der: &[u8]) {
    assert!(certificate::is_readable(der) || !certificate::may_issue(der));
    let hash = certificate::end_point_hash(der);
    assert!(hash.as_ref().is_none_or(|hash| matches!(hash.len(), 32 | 48 | 64)));
    let valid = |unix_s| {
        let now = UnixTime::since_unix_epoch(Duration::from_secs(unix_s));
        certificate::check_validity(der, now).is_ok()
    };
    let (early, between, late) = (1_500_000_000, 1_700_000_000, 1_900_000_000);
    assert!(valid(between) || !valid(early) || !valid(late), "a validity with a hole");
    let matches = |name| {
        let name = ServerName::try_from(name).expect("a name");
        certificate::common_name_matches(der, &name)
    };
    assert_eq!(matches("db.example.org"), matches("DB.EXAMPLE.ORG"));
    let _ = matches("10.0.0.1");
}

/// What was read of a connection string can be written in both forms and read again; a password is
/// never shown.
pub(crate) fn connection_string(text: &str) {
    let Ok(pairs) = conninfo::parse(text) else { return };
    check_again(&pairs, &as_words(&pairs));
    check_again(&pairs, &as_uri(&pairs));
    // These make it read files of this machine.
    if ["service", "servicefile"].iter().any(|name| pairs.contains_key(name)) {
        return;
    }
    let shown = |text: &str| match ConnectOptions::parse(text, &|_| None) {
        Ok(options) => format!("{options} {options:?}"),
        Err(error) => format!("{error} {error:?} {:?}", error.hint_text()),
    };
    // Nothing that is shown depends on it. To look for it in what is shown would not do: a password may
    // be like a piece of the hosts and ports.
    let mut other = pairs.clone();
    let Some(password) = other.get_mut("password").filter(|password| !password.is_empty()) else {
        return;
    };
    *password = if password == "x" { "another".to_owned() } else { "x".to_owned() };
    assert_eq!(shown(text), shown(&as_words(&other)));
}

fn check_again(pairs: &Pairs, text: &str) {
    // Writing a string out makes it longer; there is a limit to how long one may be.
    if text.len() <= 32 << 10 {
        let again = conninfo::parse(text).expect("what was read can be read again");
        assert_eq!(&again, pairs, "{text}");
    }
}

fn as_words(pairs: &Pairs) -> String {
    let quoted = |value: &str| value.replace('\\', r"\\").replace('\'', r"\'");
    pairs.iter().map(|(name, value)| format!("{name} = '{}' ", quoted(value))).collect()
}

fn as_uri(pairs: &Pairs) -> String {
    let coded = |value: &str| value.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>();
    let parameters: Vec<String> =
        pairs.iter().map(|(name, value)| format!("{name}={}", coded(value))).collect();
    format!("postgresql://?{}", parameters.join("&"))
}

/// A line made for somebody is found by them, whatever stands behind it, and by nobody else.
pub(crate) fn password_file(text: &str) {
    let wanted = Wanted { host: "db", port: 5432, database: "replication", user: "u" };
    let _ = passfile::find(text.as_bytes(), wanted);
    let mut parts = text.splitn(5, '\n');
    let mut part = || parts.next().unwrap_or_default().trim_end_matches('\r');
    let (host, database, user, password) = (part(), part(), part(), part());
    let field = |text: &str| text.replace('\\', r"\\").replace(':', r"\:");
    if host.starts_with('#') || password.ends_with('\r') {
        return;
    }
    let line = [host, "5432", database, user, password].map(field).join(":");
    let file = format!("{line}\n{text}");
    let wanted = Wanted { host, port: 5432, database, user };
    let found = passfile::find(file.as_bytes(), wanted).expect("the first line is for it");
    assert_eq!(found.expose_secret(), password.as_bytes());
    let other = Wanted { port: 5433, ..wanted };
    assert!(passfile::find(line.as_bytes(), other).is_none());
}

/// What was read of a service can be written and read again.
pub(crate) fn service_file(text: &str) {
    let Ok(Some(pairs)) = service::parse(text, "s") else { return };
    let lines: String = pairs.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
    let again = service::parse(&format!("[s]\n{lines}[other]\nhost=x\n"), "s");
    assert_eq!(again.expect("what was read can be read again"), Some(pairs));
}
