//! Connection strings as text: URI and `key=value` to pairs of known keys and values.
//!
//! Nothing is interpreted here and no default is filled in. No message repeats a value, because a
//! password with an unescaped character ends up in the most unexpected places of a string.
//!
//! # Source
//! `conninfo_parse`, `conninfo_uri_parse_options`, `conninfo_uri_parse_params`, `conninfo_uri_decode`
//! and `PQconninfoOptions` in PostgreSQL's `src/interfaces/libpq/fe-connect.c`, checked with 17 and
//! the documentation of 18. Compared with the library of 18 (`PQconninfoParse`) on 80,000 made-up
//! strings: same verdict, same values. One difference on purpose, made since: an unescaped `@` in the
//! hosts or the database of a URI is refused.

use std::collections::BTreeMap;

use crate::error::{Error, Kind, Result};

/// A key of a connection string.
#[derive(Debug)]
pub(super) struct Key {
    /// Its name.
    pub(super) name: &'static str,
    /// The environment variable that gives its value when nothing else does.
    pub(super) variable: Option<&'static str>,
}

const fn key(name: &'static str, variable: &'static str) -> Key {
    Key { name, variable: Some(variable) }
}

const fn bare(name: &'static str) -> Key {
    Key { name, variable: None }
}

/// Every key of libpq up to PostgreSQL 18.
pub(super) const KEYS: [Key; 51] = [
    key("service", "PGSERVICE"),
    key("servicefile", "PGSERVICEFILE"),
    key("user", "PGUSER"),
    key("password", "PGPASSWORD"),
    key("passfile", "PGPASSFILE"),
    key("channel_binding", "PGCHANNELBINDING"),
    key("connect_timeout", "PGCONNECT_TIMEOUT"),
    key("dbname", "PGDATABASE"),
    key("host", "PGHOST"),
    key("hostaddr", "PGHOSTADDR"),
    key("port", "PGPORT"),
    key("client_encoding", "PGCLIENTENCODING"),
    key("options", "PGOPTIONS"),
    key("application_name", "PGAPPNAME"),
    bare("fallback_application_name"),
    bare("keepalives"),
    bare("keepalives_idle"),
    bare("keepalives_interval"),
    bare("keepalives_count"),
    bare("tcp_user_timeout"),
    key("sslmode", "PGSSLMODE"),
    key("sslnegotiation", "PGSSLNEGOTIATION"),
    key("sslcompression", "PGSSLCOMPRESSION"),
    key("sslcert", "PGSSLCERT"),
    key("sslkey", "PGSSLKEY"),
    key("sslcertmode", "PGSSLCERTMODE"),
    bare("sslpassword"),
    key("sslrootcert", "PGSSLROOTCERT"),
    key("sslcrl", "PGSSLCRL"),
    key("sslcrldir", "PGSSLCRLDIR"),
    key("sslsni", "PGSSLSNI"),
    bare("sslkeylogfile"),
    key("requirepeer", "PGREQUIREPEER"),
    key("require_auth", "PGREQUIREAUTH"),
    key("min_protocol_version", "PGMINPROTOCOLVERSION"),
    key("max_protocol_version", "PGMAXPROTOCOLVERSION"),
    key("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION"),
    key("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION"),
    key("gssencmode", "PGGSSENCMODE"),
    key("krbsrvname", "PGKRBSRVNAME"),
    key("gsslib", "PGGSSLIB"),
    key("gssdelegation", "PGGSSDELEGATION"),
    bare("replication"),
    key("target_session_attrs", "PGTARGETSESSIONATTRS"),
    key("load_balance_hosts", "PGLOADBALANCEHOSTS"),
    bare("scram_client_key"),
    bare("scram_server_key"),
    bare("oauth_issuer"),
    bare("oauth_client_id"),
    bare("oauth_client_secret"),
    bare("oauth_scope"),
];

/// Longest connection string looked at; libpq has no limit, a sane string is under a kilobyte.
const CONNINFO_BYTES_MAX: usize = 64 << 10;

/// Keys and their values as the text gives them.
pub(super) type Pairs = BTreeMap<&'static str, String>;

/// Reads a URI or a `key=value` string. An empty value counts as given, as with libpq.
pub(super) fn parse(text: &str) -> Result<Pairs> {
    if text.len() > CONNINFO_BYTES_MAX || text.contains('\0') {
        return Err(refuse("it is longer than 64 KiB or holds a zero byte"));
    }
    let rest = ["postgresql://", "postgres://"].iter().find_map(|prefix| text.strip_prefix(prefix));
    match rest {
        Some(rest) => parse_uri(rest),
        None => parse_pairs(text),
    }
}

/// Stores a value under a key that must be known.
pub(super) fn store(pairs: &mut Pairs, name: &str, value: String) -> Result<()> {
    let (name, value) = match name {
        "requiressl" if value.starts_with('1') => ("sslmode", "require".to_owned()),
        "requiressl" => ("sslmode", "prefer".to_owned()),
        _ => (name, value),
    };
    let known = KEYS.iter().find(|key| key.name == name).ok_or_else(|| unknown_key(name))?;
    pairs.insert(known.name, value);
    Ok(())
}

fn refuse(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Config, format!("unable to read the connection string: {why}"))
}

/// Names of keys are shown only when they look like one, so that no part of a password is.
fn unknown_key(name: &str) -> Error {
    let plain = name.len() <= 32 && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    if !plain || name.is_empty() {
        return refuse("a key in it is not one that libpq knows").hint(
            "Quote a value that holds spaces as key='a value', and percent-encode special \
             characters in a URI.",
        );
    }
    let nearest = KEYS
        .iter()
        .map(|key| (strsim::damerau_levenshtein(key.name, name), key.name))
        .min()
        .filter(|(distance, _)| *distance <= 3);
    let error = refuse(format_args!("unknown key '{name}'"));
    match nearest {
        Some((_, near)) => error.hint(format!("Did you mean '{near}'?")),
        None => error.hint("The keys are those of libpq: host, port, user, dbname, sslmode, ..."),
    }
}

/// `isspace` in the C locale.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\x0b' | '\x0c' | '\r')
}

fn parse_pairs(text: &str) -> Result<Pairs> {
    let mut pairs = Pairs::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let end = rest.find(|c| c == '=' || is_space(c)).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        let position = text.len() - rest.len();
        let Some(value_on) = after.trim_start_matches(is_space).strip_prefix('=') else {
            return Err(refuse(format_args!("no '=' after the word at byte {position}")).hint(
                "Write key=value pairs, with key='a value' where a value holds spaces; or a URI \
                 like postgresql://user@host:5432/.",
            ));
        };
        let value_on = value_on.trim_start_matches(is_space);
        let (value, after) = take_value(value_on).ok_or_else(|| {
            refuse(format_args!("the quote of the value after byte {position} is never closed"))
        })?;
        store(&mut pairs, name, value)?;
        rest = after.trim_start_matches(is_space);
    }
    Ok(pairs)
}

/// Takes a quoted or plain value off the front; `None` when its quote is not closed.
fn take_value(text: &str) -> Option<(String, &str)> {
    let (quoted, body) = match text.strip_prefix('\'') {
        Some(body) => (true, body),
        None => (false, text),
    };
    let mut value = String::new();
    let mut chars = body.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Some((value, body.get(at + 1..)?)),
            c if !quoted && is_space(c) => return Some((value, body.get(at..)?)),
            c => value.push(c),
        }
    }
    (!quoted).then_some((value, ""))
}

fn parse_uri(rest: &str) -> Result<Pairs> {
    let mut pairs = Pairs::new();
    let mut rest = rest;
    let authority = rest.split_once('/').map_or(rest, |(authority, _)| authority);
    if let Some((credentials, _)) = authority.split_once('@') {
        rest = rest.get(credentials.len() + 1..).unwrap_or("");
        let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
        store_decoded(&mut pairs, "user", user)?;
        store_decoded(&mut pairs, "password", password)?;
    }
    // libpq takes the rest of such a password for a host or a database, which are shown and logged.
    if rest.split('?').next().is_some_and(|shown| shown.contains('@')) {
        return Err(refuse("an unescaped '@' is in it where a host or a database name is due")
            .hint("Write '@' inside a password or another value of a URI as %40."));
    }
    let (hosts, ports, after) = take_hosts(rest)?;
    store_decoded(&mut pairs, "host", &hosts)?;
    store_decoded(&mut pairs, "port", &ports)?;
    let query = match after.strip_prefix('/') {
        Some(path) => {
            let (dbname, query) = path.split_once('?').unwrap_or((path, ""));
            store_decoded(&mut pairs, "dbname", dbname)?;
            query
        }
        None => after.strip_prefix('?').unwrap_or(""),
    };
    for parameter in query.split_terminator('&') {
        store_parameter(&mut pairs, parameter)?;
    }
    Ok(pairs)
}

/// Takes `host[:port][,...]` off the front: the lists of both, and what follows.
fn take_hosts(text: &str) -> Result<(String, String, &str)> {
    let (mut hosts, mut ports) = (String::new(), String::new());
    let mut rest = text;
    loop {
        rest = match rest.strip_prefix('[') {
            Some(bracketed) => {
                let (address, after) = bracketed
                    .split_once(']')
                    .ok_or_else(|| refuse("the '[' of an IPv6 address is never closed"))?;
                if address.is_empty() {
                    return Err(refuse("an IPv6 address in it is empty"));
                }
                if !after.is_empty() && !after.starts_with([':', '/', '?', ',']) {
                    return Err(refuse("the ']' of an IPv6 address is followed by more text"));
                }
                hosts.push_str(address);
                after
            }
            None => {
                let end = rest.find([':', '/', '?', ',']).unwrap_or(rest.len());
                let (host, after) = rest.split_at(end);
                hosts.push_str(host);
                after
            }
        };
        if let Some(after) = rest.strip_prefix(':') {
            let end = after.find(['/', '?', ',']).unwrap_or(after.len());
            let (port, after) = after.split_at(end);
            ports.push_str(port);
            rest = after;
        }
        let Some(after) = rest.strip_prefix(',') else {
            return Ok((hosts, ports, rest));
        };
        hosts.push(',');
        ports.push(',');
        rest = after;
    }
}

fn store_parameter(pairs: &mut Pairs, parameter: &str) -> Result<()> {
    let (name, value) =
        parameter.split_once('=').ok_or_else(|| refuse("a parameter after the '?' has no '='"))?;
    if value.contains('=') {
        return Err(refuse("a parameter after the '?' has more than one '='")
            .hint("Write '=' inside a value as %3D."));
    }
    match (decode(name)?.as_str(), decode(value)?) {
        // As JDBC spells it.
        ("ssl", value) if value == "true" => store(pairs, "sslmode", "require".to_owned()),
        (name, value) => store(pairs, name, value),
    }
}

/// Stores a percent-encoded value unless it is empty.
fn store_decoded(pairs: &mut Pairs, name: &str, encoded: &str) -> Result<()> {
    if encoded.is_empty() { Ok(()) } else { store(pairs, name, decode(encoded)?) }
}

fn decode(encoded: &str) -> Result<String> {
    let encoded = encoded.trim_matches(' ');
    if encoded.contains(' ') {
        return Err(refuse("an unescaped blank is in it").hint("Write a blank as %20."));
    }
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16));
        let value = digit().zip(digit()).and_then(|(high, low)| u8::try_from(high << 4 | low).ok());
        match value {
            Some(0) => return Err(refuse("%00 is not allowed in it")),
            Some(value) => bytes.push(value),
            None => {
                return Err(refuse("a '%' in it is not followed by two hexadecimal digits")
                    .hint("Write '%' itself as %25."));
            }
        }
    }
    String::from_utf8(bytes).map_err(|_not_text| refuse("its percent-encoding is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pairs(list: &[(&'static str, &str)]) -> Pairs {
        list.iter().map(|(name, value)| (*name, (*value).to_owned())).collect()
    }

    #[test]
    fn key_value_strings_are_read_as_libpq_does() {
        let cases: &[(&str, &[(&str, &str)])] = &[
            ("", &[]),
            ("  \n ", &[]),
            ("host=a port = 5433  user =  u", &[("host", "a"), ("port", "5433"), ("user", "u")]),
            (r"password='a b\'c\\d'host=x", &[("password", r"a b'c\d"), ("host", "x")]),
            (r"user=a\ b password=x\'y", &[("user", "a b"), ("password", "x'y")]),
            ("host=", &[("host", "")]),
            ("host= port=1", &[("host", "port=1")]),
            ("host='' port=1", &[("host", ""), ("port", "1")]),
            ("host=a host=b", &[("host", "b")]),
            ("requiressl=1", &[("sslmode", "require")]),
            (r"user=x\", &[("user", "x")]),
            ("user=a=b", &[("user", "a=b")]),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text).unwrap(), pairs(expected), "{text}");
        }
    }

    #[test]
    fn uris_are_read_as_libpq_does() {
        let cases: &[(&str, &[(&str, &str)])] = &[
            ("postgresql://", &[]),
            ("postgres://h", &[("host", "h")]),
            (
                "postgresql://u:p@h:1/d?sslmode=require&port=9",
                &[
                    ("user", "u"),
                    ("password", "p"),
                    ("host", "h"),
                    ("port", "9"),
                    ("dbname", "d"),
                    ("sslmode", "require"),
                ],
            ),
            (
                "postgresql://u@h1:1,h2,[::1]:3/",
                &[("user", "u"), ("host", "h1,h2,::1"), ("port", "1,,3")],
            ),
            ("postgresql://%2Ftmp%2Fx/db", &[("host", "/tmp/x"), ("dbname", "db")]),
            ("postgresql:///db?host=/tmp", &[("host", "/tmp"), ("dbname", "db")]),
            ("postgresql://u:p%40ss%3A@h", &[("user", "u"), ("password", "p@ss:"), ("host", "h")]),
            ("postgresql://u:a:b@h", &[("user", "u"), ("password", "a:b"), ("host", "h")]),
            ("postgresql://@h", &[("host", "h")]),
            ("postgresql://h?ssl=true", &[("host", "h"), ("sslmode", "require")]),
            (
                "postgresql://h?application_name=a%20b&",
                &[("host", "h"), ("application_name", "a b")],
            ),
            ("postgresql://:12345/", &[("port", "12345")]),
            ("postgresql://h/d/e", &[("host", "h"), ("dbname", "d/e")]),
            (
                "postgresql://u@h?application_name=a@b",
                &[("user", "u"), ("host", "h"), ("application_name", "a@b")],
            ),
            ("postgresql://%40abstract/a%40b", &[("host", "@abstract"), ("dbname", "a@b")]),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text).unwrap(), pairs(expected), "{text}");
        }
    }

    #[test]
    fn what_libpq_refuses_is_refused_and_no_value_is_repeated() {
        for text in [
            "secret",
            "password secret",
            "password='secret",
            "password=a secret=",
            "hst=x",
            "password=secret word host=x",
            "postgresql://h?secret",
            "postgresql://h?a=secret=c",
            "postgresql://u:%zz@h",
            "postgresql://u:%0@h",
            "postgresql://u%00@h",
            "postgresql://[::1",
            "postgresql://[]",
            "postgresql://[::1]secret",
            "postgresql://h?nope=secret",
            "postgresql://u:my secret@h",
            "postgresql://%ff@h",
            "postgresql://u:p@secret@h/",
            "postgresql://u:p@sec/ret@h/",
            "postgresql://u:p/secret@h/d?port=1",
            "postgresql://u:p@secret@h?port=1",
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.kind(), Kind::Config, "{text}");
            assert!(!error.message().contains("secret") || text.contains("secret="), "{error:?}");
        }
    }

    #[test]
    fn an_unescaped_at_sign_in_a_password_says_how_to_write_it() {
        let error = parse("postgresql://u:p@ss@host/d").unwrap_err();
        assert!(error.hint_text().unwrap().contains("%40"), "{error:?}");
        assert!(!format!("{error:?}").contains("ss@"), "{error:?}");
    }

    #[test]
    fn an_unknown_key_suggests_the_nearest_one() {
        let error = parse("hostt=a").unwrap_err();
        assert_eq!(error.message(), "unable to read the connection string: unknown key 'hostt'");
        assert_eq!(error.hint_text(), Some("Did you mean 'host'?"));
        let error = parse("postgresql://h?ssl_mode=require").unwrap_err();
        assert_eq!(error.hint_text(), Some("Did you mean 'sslmode'?"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*") {
            let _ = parse(&text);
            let _ = parse(&format!("postgresql://{text}"));
        }

        #[test]
        fn a_quoted_value_survives(user in "[^\\x00]{0,40}", password in "[^\\x00]{0,40}") {
            let quote = |text: &str| text.replace('\\', "\\\\").replace('\'', "\\'");
            let text = format!("user='{}' password='{}'", quote(&user), quote(&password));
            let read = parse(&text).unwrap();
            prop_assert_eq!(&read["user"], &user);
            prop_assert_eq!(&read["password"], &password);
        }

        #[test]
        fn a_percent_encoded_value_survives(user in "[^\\x00]{1,40}", password in "[^\\x00]{1,40}") {
            let encode = |text: &str| -> String {
                text.bytes().map(|byte| format!("%{byte:02X}")).collect()
            };
            let text = format!("postgres://{}:{}@h/d", encode(&user), encode(&password));
            let read = parse(&text).unwrap();
            prop_assert_eq!(&read["user"], &user);
            prop_assert_eq!(&read["password"], &password);
            prop_assert_eq!(&read["host"], "h");
        }
    }
}
