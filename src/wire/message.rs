//! Messages of the server: bytes in, values out, no I/O.
//!
//! # Shape
//! A message is a type byte, a length (big endian u32, counting itself and what follows), and the
//! body. The two that `postgres-protocol` does not know (`W` and `v`), the key of a backend, whose
//! length depends on the protocol, and CopyData, which must not be copied, are taken apart here.
//!
//! # Invariants
//! A length is checked against the maximum of its kind of message before memory is reserved for it.
//! The body of a CopyData message is a slice of the buffer it was read into.
//!
//! # Source
//! `doc/src/sgml/protocol.sgml`, "Message Formats", checked with PostgreSQL 13 to 18.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend;

use super::server_error::ServerError;
use crate::error::{Error, Kind, Result};

/// Bytes of the type and the length.
const HEADER_BYTES: usize = 5;

/// Before we are let in the other side may be anything; libpq's limit for an error is 30000.
const STARTUP_BYTES_MAX: usize = 30_000;

/// A walsender sends at most `MAX_SEND_SIZE` (16 WAL blocks of at most 64 KiB) and a base backup
/// 32 KiB or one block at a time; the rest is room for the headers inside.
const COPY_DATA_BYTES_MAX: usize = (1 << 20) + (64 << 10);

/// A row of the catalog or a timeline history file, which grows by a line a promotion.
const DATA_ROW_BYTES_MAX: usize = 16 << 20;

/// Errors, notices, parameters, descriptions.
const OTHER_BYTES_MAX: usize = 1 << 20;

/// How much the other side is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// It has not authenticated us (nor we it).
    Startup,
    /// It has let us in.
    Session,
}

/// What the server asks of us before it lets us in.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AuthRequest {
    Ok,
    CleartextPassword,
    Md5Password {
        salt: [u8; 4],
    },
    Sasl {
        mechanisms: Vec<String>,
    },
    SaslContinue(Bytes),
    SaslFinal(Bytes),
    /// GSSAPI, SSPI and what came before them, by name.
    Unsupported(&'static str),
}

/// A message of the server.
#[derive(Debug)]
pub(super) enum Message {
    Authentication(AuthRequest),
    BackendKeyData {
        process_id: u32,
    },
    CommandComplete,
    CopyBothResponse,
    CopyData(Bytes),
    CopyDone,
    CopyInResponse,
    CopyOutResponse,
    /// Columns as text, `None` for NULL.
    DataRow(Vec<Option<Bytes>>),
    EmptyQueryResponse,
    ErrorResponse(ServerError),
    /// The server speaks an older minor version, or ignores these options of ours.
    NegotiateProtocolVersion {
        unknown_options: Vec<String>,
    },
    NoticeResponse(ServerError),
    ParameterStatus {
        name: String,
        value: String,
    },
    ReadyForQuery,
    RowDescription,
    /// `NotificationResponse`, which nobody here asked for.
    Notification,
}

impl Message {
    /// What it is called in PostgreSQL's documentation.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Authentication(_) => "AuthenticationRequest",
            Self::BackendKeyData { .. } => "BackendKeyData",
            Self::CommandComplete => "CommandComplete",
            Self::CopyBothResponse => "CopyBothResponse",
            Self::CopyData(_) => "CopyData",
            Self::CopyDone => "CopyDone",
            Self::CopyInResponse => "CopyInResponse",
            Self::CopyOutResponse => "CopyOutResponse",
            Self::DataRow(_) => "DataRow",
            Self::EmptyQueryResponse => "EmptyQueryResponse",
            Self::ErrorResponse(_) => "ErrorResponse",
            Self::NegotiateProtocolVersion { .. } => "NegotiateProtocolVersion",
            Self::NoticeResponse(_) => "NoticeResponse",
            Self::ParameterStatus { .. } => "ParameterStatus",
            Self::ReadyForQuery => "ReadyForQuery",
            Self::RowDescription => "RowDescription",
            Self::Notification => "NotificationResponse",
        }
    }
}

/// What the front of the buffer holds.
#[derive(Debug)]
pub(super) enum Decoded {
    /// A whole message, taken off.
    Message(Message),
    /// Part of a message, of which this many bytes are missing at least.
    Missing(usize),
}

/// Takes a message off the front of `buffer`, which is left alone when it is not there whole.
///
/// # Errors
/// `corrupt` for bytes that are no message of this protocol, or a length past its maximum.
pub(super) fn decode(buffer: &mut BytesMut, phase: Phase) -> Result<Decoded> {
    let Some((&[tag, l1, l2, l3, l4], _)) = buffer.split_first_chunk::<HEADER_BYTES>() else {
        return Ok(Decoded::Missing(HEADER_BYTES - buffer.len()));
    };
    // u32 always fits: this crate is for 64-bit platforms.
    let length = usize::try_from(u32::from_be_bytes([l1, l2, l3, l4])).unwrap_or(usize::MAX);
    let length_max = length_max(tag, phase);
    if length < 4 || length > length_max {
        return decode_old_error(buffer, tag, phase).unwrap_or_else(|| {
            Err(corrupt(format_args!(
                "a message of type {:?} is {length} bytes long, at most {length_max} are accepted",
                char::from(tag)
            ))
            .hint("Check that the port is PostgreSQL's."))
        });
    }
    let total = length.saturating_add(1);
    if buffer.len() < total {
        return Ok(Decoded::Missing(total - buffer.len()));
    }
    let message = buffer.split_to(total);
    decode_whole(tag, message).map(Decoded::Message)
}

fn length_max(tag: u8, phase: Phase) -> usize {
    match (phase, tag) {
        (Phase::Startup, _) => STARTUP_BYTES_MAX,
        (Phase::Session, b'd') => COPY_DATA_BYTES_MAX,
        (Phase::Session, b'D') => DATA_ROW_BYTES_MAX,
        (Phase::Session, _) => OTHER_BYTES_MAX,
    }
}

/// Before PostgreSQL 14 a postmaster that cannot even fork reports that as the protocol of the last
/// century did: `E`, the text with a newline at its end, a zero byte. It may come in pieces.
fn decode_old_error(buffer: &mut BytesMut, tag: u8, phase: Phase) -> Option<Result<Decoded>> {
    if tag != b'E' || phase != Phase::Startup {
        return None;
    }
    let text = buffer.get(1..)?;
    let Some(end) = text.iter().position(|byte| matches!(byte, 0 | b'\n')) else {
        let more = buffer.len() < STARTUP_BYTES_MAX;
        return more.then_some(Ok(Decoded::Missing(1)));
    };
    let text = text.get(..end)?;
    let error = ServerError::from_text(String::from_utf8_lossy(text).trim());
    buffer.clear();
    Some(Ok(Decoded::Message(Message::ErrorResponse(error))))
}

fn decode_whole(tag: u8, message: BytesMut) -> Result<Message> {
    match tag {
        b'd' => {
            let mut body = message.freeze();
            body.advance(HEADER_BYTES);
            Ok(Message::CopyData(body))
        }
        b'W' => Ok(Message::CopyBothResponse),
        b'K' => decode_key(&message),
        b'v' => decode_negotiation(&message),
        _ => {
            let mut message = message;
            let parsed = backend::Message::parse(&mut message)
                .map_err(|error| corrupt(format_args!("message {:?}: {error}", char::from(tag))))?
                .ok_or_else(|| corrupt("a message is cut short"))?;
            convert(parsed).map_err(|error| corrupt(format_args!("{:?}: {error}", char::from(tag))))
        }
    }
}

fn decode_key(message: &[u8]) -> Result<Message> {
    let key = message.get(HEADER_BYTES..).and_then(|body| body.first_chunk::<4>());
    let process_id = key.ok_or_else(|| corrupt("BackendKeyData is cut short"))?;
    Ok(Message::BackendKeyData { process_id: u32::from_be_bytes(*process_id) })
}

fn decode_negotiation(message: &[u8]) -> Result<Message> {
    let cut_short = || corrupt("NegotiateProtocolVersion is cut short");
    let body = message.get(HEADER_BYTES..).ok_or_else(cut_short)?;
    let (_version, rest) = body.split_first_chunk::<4>().ok_or_else(cut_short)?;
    let (count, rest) = rest.split_first_chunk::<4>().ok_or_else(cut_short)?;
    let count = usize::try_from(u32::from_be_bytes(*count)).unwrap_or(usize::MAX);
    let unknown_options: Vec<String> = rest
        .split_inclusive(|byte| *byte == 0)
        .filter_map(|name| name.strip_suffix(b"\0"))
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect();
    if unknown_options.len() != count {
        return Err(cut_short());
    }
    Ok(Message::NegotiateProtocolVersion { unknown_options })
}

fn convert(message: backend::Message) -> io::Result<Message> {
    use backend::Message as M;
    Ok(match message {
        M::AuthenticationOk => Message::Authentication(AuthRequest::Ok),
        M::AuthenticationCleartextPassword => {
            Message::Authentication(AuthRequest::CleartextPassword)
        }
        M::AuthenticationMd5Password(body) => {
            Message::Authentication(AuthRequest::Md5Password { salt: body.salt() })
        }
        M::AuthenticationSasl(body) => {
            let mechanisms = body.mechanisms().map(|name| Ok(name.to_owned())).collect()?;
            Message::Authentication(AuthRequest::Sasl { mechanisms })
        }
        M::AuthenticationSaslContinue(body) => {
            Message::Authentication(AuthRequest::SaslContinue(Bytes::copy_from_slice(body.data())))
        }
        M::AuthenticationSaslFinal(body) => {
            Message::Authentication(AuthRequest::SaslFinal(Bytes::copy_from_slice(body.data())))
        }
        M::AuthenticationGss | M::AuthenticationGssContinue(_) => {
            Message::Authentication(AuthRequest::Unsupported("GSSAPI"))
        }
        M::AuthenticationSspi => Message::Authentication(AuthRequest::Unsupported("SSPI")),
        M::AuthenticationKerberosV5 => {
            Message::Authentication(AuthRequest::Unsupported("Kerberos V5"))
        }
        M::AuthenticationScmCredential => {
            Message::Authentication(AuthRequest::Unsupported("SCM credentials"))
        }
        M::CommandComplete(_) => Message::CommandComplete,
        M::CopyDone => Message::CopyDone,
        M::CopyInResponse(_) => Message::CopyInResponse,
        M::CopyOutResponse(_) => Message::CopyOutResponse,
        M::DataRow(body) => {
            let bytes = body.buffer_bytes();
            let columns = body.ranges().map(|range| Ok(range.map(|range| bytes.slice(range))));
            Message::DataRow(columns.collect()?)
        }
        M::EmptyQueryResponse => Message::EmptyQueryResponse,
        M::ErrorResponse(body) => Message::ErrorResponse(ServerError::from_fields(body.fields())?),
        M::NoticeResponse(body) => {
            Message::NoticeResponse(ServerError::from_fields(body.fields())?)
        }
        M::NotificationResponse(_) => Message::Notification,
        M::ParameterStatus(body) => Message::ParameterStatus {
            name: body.name()?.to_owned(),
            value: body.value()?.to_owned(),
        },
        M::ReadyForQuery(_) => Message::ReadyForQuery,
        M::RowDescription(_) => Message::RowDescription,
        _ => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not expected of a server here",
            ));
        }
    })
}

fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(Kind::Corrupt, format!("unable to understand the server: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn framed(tag: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap();
        [&[tag], length.to_be_bytes().as_slice(), body].concat()
    }

    fn one(tag: u8, body: &[u8]) -> Result<Message> {
        let mut buffer = BytesMut::from(framed(tag, body).as_slice());
        match decode(&mut buffer, Phase::Session)? {
            Decoded::Message(message) => {
                assert!(buffer.is_empty());
                Ok(message)
            }
            Decoded::Missing(count) => panic!("{count} bytes missing"),
        }
    }

    #[test]
    fn a_message_is_taken_off_only_when_it_is_whole() {
        let whole = framed(b'd', b"payload");
        for end in 0..whole.len() {
            let mut buffer = BytesMut::from(&whole[..end]);
            let Decoded::Missing(count) = decode(&mut buffer, Phase::Session).unwrap() else {
                panic!("decoded {end} bytes of {}", whole.len());
            };
            assert!(count > 0 && end + count <= whole.len());
            assert_eq!(buffer, &whole[..end]);
        }
    }

    #[test]
    fn copy_data_is_a_slice_of_the_buffer() {
        let mut buffer = BytesMut::from(framed(b'd', b"payload").as_slice());
        let place = buffer.as_ptr() as usize;
        let Decoded::Message(Message::CopyData(data)) =
            decode(&mut buffer, Phase::Session).unwrap()
        else {
            panic!("no CopyData");
        };
        assert_eq!(data, "payload");
        assert_eq!(data.as_ptr() as usize, place + HEADER_BYTES);
    }

    #[test]
    fn lengths_past_the_maximum_are_refused_from_the_header_alone() {
        for (tag, length_max) in [
            (b'd', COPY_DATA_BYTES_MAX),
            (b'D', DATA_ROW_BYTES_MAX),
            (b'E', OTHER_BYTES_MAX),
            (b'S', OTHER_BYTES_MAX),
        ] {
            for length in [0, 3, length_max + 1, u32::MAX as usize] {
                let length = u32::try_from(length).unwrap();
                let mut buffer =
                    BytesMut::from([&[tag], &length.to_be_bytes()[..]].concat().as_slice());
                let error = decode(&mut buffer, Phase::Session).unwrap_err();
                assert_eq!(error.kind(), Kind::Corrupt);
            }
        }
        let mut http = BytesMut::from("HTTP/1.1 400 Bad Request\r\n");
        assert_eq!(decode(&mut http, Phase::Startup).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn an_error_in_the_old_protocol_is_understood_before_we_are_let_in() {
        let mut buffer =
            BytesMut::from("Ecould not fork new process for connection: no memory\n\0");
        let Decoded::Message(Message::ErrorResponse(error)) =
            decode(&mut buffer, Phase::Startup).unwrap()
        else {
            panic!("no error");
        };
        assert_eq!(error.message, "could not fork new process for connection: no memory");
    }

    #[test]
    fn an_error_in_the_old_protocol_that_comes_in_pieces_is_not_cut_short() {
        let mut buffer = BytesMut::from("Ecould not");
        for piece in [" fork", ": no memory"] {
            let decoded = decode(&mut buffer, Phase::Startup).unwrap();
            assert!(matches!(decoded, Decoded::Missing(1)), "{decoded:?}");
            buffer.extend_from_slice(piece.as_bytes());
        }
        buffer.extend_from_slice(b"\n");
        let Decoded::Message(Message::ErrorResponse(error)) =
            decode(&mut buffer, Phase::Startup).unwrap()
        else {
            panic!("no error");
        };
        assert_eq!(error.message, "could not fork: no memory");
        let mut endless = BytesMut::from(vec![b'E'; STARTUP_BYTES_MAX].as_slice());
        assert_eq!(decode(&mut endless, Phase::Startup).unwrap_err().kind(), Kind::Corrupt);
    }

    #[test]
    fn messages_that_only_replication_and_new_servers_send_are_known() {
        assert!(matches!(one(b'W', &[0, 0, 0]).unwrap(), Message::CopyBothResponse));
        let body =
            [&3_u32.to_be_bytes()[..], &2_u32.to_be_bytes()[..], b"_pq_.a\0_pq_.b\0"].concat();
        let Message::NegotiateProtocolVersion { unknown_options } = one(b'v', &body).unwrap()
        else {
            panic!("no NegotiateProtocolVersion");
        };
        assert_eq!(unknown_options, ["_pq_.a", "_pq_.b"]);
        for process_and_key in [&[0, 0, 0, 9, 1, 2, 3, 4][..], &[0, 0, 0, 9, 1][..]] {
            let Message::BackendKeyData { process_id } = one(b'K', process_and_key).unwrap() else {
                panic!("no BackendKeyData");
            };
            assert_eq!(process_id, 9);
        }
    }

    #[test]
    fn rows_are_columns_with_nulls() {
        let body = [
            &2_u16.to_be_bytes()[..],
            &(-1_i32).to_be_bytes()[..],
            &3_i32.to_be_bytes()[..],
            b"0/1",
        ]
        .concat();
        let Message::DataRow(columns) = one(b'D', &body).unwrap() else { panic!("no DataRow") };
        assert_eq!(columns, [None, Some(Bytes::from("0/1"))]);
        assert!(one(b'D', &body[..body.len() - 1]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            for phase in [Phase::Startup, Phase::Session] {
                let mut buffer = BytesMut::from(bytes.as_slice());
                while let Ok(Decoded::Message(_)) = decode(&mut buffer, phase) {}
            }
        }

        #[test]
        fn any_body_is_decoded_or_refused(
            tag in prop::sample::select(b"1CDEGHIKNRSTWZcdstvAn".to_vec()),
            body in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut buffer = BytesMut::from(framed(tag, &body).as_slice());
            if let Ok(decoded) = decode(&mut buffer, Phase::Session) {
                prop_assert!(matches!(decoded, Decoded::Message(_)));
            }
        }
    }
}
