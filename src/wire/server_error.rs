//! What a server says when it refuses, and what we make of it.
//!
//! # Source
//! `src/backend/utils/errcodes.txt`; the functions named below in `src/backend/libpq/auth.c`,
//! `src/backend/utils/init/postinit.c`, `src/backend/replication/{walsender,slot}.c`. The field
//! `routine` is looked at rather than the message, because messages are translated.

use std::fmt;
use std::io;

use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::ErrorFields;

use super::connection::Session;
use crate::error::{Error, Kind};

/// Longest text kept of one field; a server's own are far shorter.
const FIELD_CHARS_MAX: usize = 4096;

/// An `ErrorResponse` or `NoticeResponse`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerError {
    /// ERROR, FATAL, WARNING, ...; never translated.
    pub severity: String,
    /// Five characters, see PostgreSQL's appendix "Error Codes".
    pub sqlstate: String,
    /// The primary message, perhaps translated.
    pub message: String,
    /// The server's detail, if any.
    pub detail: Option<String>,
    /// The server's hint, if any.
    pub hint: Option<String>,
    /// The C function that reported it.
    pub(super) routine: String,
}

impl ServerError {
    pub(super) fn from_fields(mut fields: ErrorFields<'_>) -> io::Result<Self> {
        let mut error = Self::default();
        while let Some(field) = fields.next()? {
            let value: String = String::from_utf8_lossy(field.value_bytes())
                .chars()
                .take(FIELD_CHARS_MAX)
                .collect();
            match field.type_() {
                b'S' if error.severity.is_empty() => error.severity = value,
                b'V' => error.severity = value,
                b'C' => error.sqlstate = value,
                b'M' => error.message = value,
                b'D' => error.detail = Some(value),
                b'H' => error.hint = Some(value),
                b'R' => error.routine = value,
                _ => {}
            }
        }
        Ok(error)
    }

    /// An error that is only a text.
    pub(super) fn from_text(text: &str) -> Self {
        let message = text.chars().take(FIELD_CHARS_MAX).collect();
        Self { severity: "FATAL".to_owned(), message, ..Self::default() }
    }

    /// Whether it is this error of the appendix "Error Codes".
    pub(super) fn is(&self, sqlstate: &str) -> bool {
        self.sqlstate == sqlstate
    }

    /// Whether the message or the hint names a setting: names are in every translation.
    fn names(&self, setting: &str) -> bool {
        let hint = self.hint.as_deref().unwrap_or_default();
        self.message.contains(setting) || hint.contains(setting)
    }

    /// As our error, with what a DBA can do about it.
    pub(super) fn into_error(self, asked: Asked<'_>) -> Error {
        let (kind, hint) = judge(&self, asked);
        let made = Error::new(kind, self.to_string());
        match (hint, self.hint) {
            (Some(ours), _) => made.hint(ours),
            (None, Some(theirs)) => made.hint(theirs),
            (None, None) => made,
        }
    }
}

impl fmt::Display for ServerError {
    /// `FATAL: no pg_hba.conf entry ... (28000)`, with the detail where there is one.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.severity, self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, ": {detail}")?;
        }
        if self.sqlstate.is_empty() { Ok(()) } else { write!(f, " ({})", self.sqlstate) }
    }
}

/// In what situation the server refused.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked<'a> {
    pub(super) session: Session,
    /// The role we are or wanted to be.
    pub(super) user: &'a str,
}

/// Sqlstates whose meaning depends on nothing else, with our hint.
const BY_CODE: [(&str, Kind, Option<&str>); 23] = [
    ("08P01", Kind::Unsupported, None),
    ("0A000", Kind::Unsupported, None),
    ("22023", Kind::Config, None),
    (
        "28P01",
        Kind::Denied,
        Some(
            "Check the password: in the connection string, PGPASSWORD, or ~/.pgpass (for replication the database name there is 'replication' or *).",
        ),
    ),
    ("3D000", Kind::NotFound, Some("Name an existing database with dbname=.")),
    (
        "42601",
        Kind::Unsupported,
        Some(
            "The server did not understand a command: is it PostgreSQL 13 to 18, and not a connection pooler?",
        ),
    ),
    (
        "42602",
        Kind::Config,
        Some("Names of slots are up to 63 lower-case letters, digits and underscores."),
    ),
    ("42704", Kind::NotFound, None),
    ("42710", Kind::Conflict, None),
    ("53100", Kind::Unavailable, Some("Free space on the server's disk.")),
    (
        "53200",
        Kind::Unavailable,
        Some("The server is out of memory; try again when it has recovered."),
    ),
    (
        "53400",
        Kind::Config,
        Some(
            "Raise max_replication_slots and restart the server, or drop a slot nobody uses (pg_replication_slots).",
        ),
    ),
    (
        "55006",
        Kind::Conflict,
        Some(
            "Another process streams from the slot: stop it, or choose another slot name (pg_replication_slots.active_pid names its backend).",
        ),
    ),
    (
        "57014",
        Kind::Unavailable,
        Some("The command was cancelled on the server, by an operator or a time-out."),
    ),
    (
        "57P01",
        Kind::Unavailable,
        Some("The server is shutting down, or an operator ended our backend."),
    ),
    (
        "57P02",
        Kind::Unavailable,
        Some("The server crashed and is restarting; try again when it is up."),
    ),
    (
        "57P03",
        Kind::Unavailable,
        Some(
            "The server is starting up, shutting down, or a standby without hot_standby; try again when it accepts connections.",
        ),
    ),
    ("57P04", Kind::NotFound, None),
    ("58P01", Kind::NotFound, None),
    ("58P02", Kind::Conflict, None),
    ("XX001", Kind::Corrupt, None),
    ("XX002", Kind::Corrupt, None),
    ("42P01", Kind::Unsupported, None),
];

/// Classes of sqlstates (their first two characters), for what is not in the other table.
const BY_CLASS: [(&str, Kind); 4] = [
    ("28", Kind::Denied),
    ("42", Kind::Unsupported),
    ("22", Kind::Unsupported),
    ("3D", Kind::NotFound),
];

/// Kind and hint. What nobody thought of counts as `unavailable`: worth another try.
fn judge(error: &ServerError, asked: Asked<'_>) -> (Kind, Option<String>) {
    let judged = judge_identity(error, asked).or_else(|| judge_replication(error, asked));
    if let Some((kind, hint)) = judged {
        return (kind, Some(hint));
    }
    if let Some((_, kind, hint)) = BY_CODE.iter().find(|(code, _, _)| error.is(code)) {
        return (*kind, hint.map(str::to_owned));
    }
    let class = BY_CLASS.iter().find(|(class, _)| error.sqlstate.starts_with(class));
    (class.map_or(Kind::Unavailable, |(_, kind)| *kind), None)
}

/// Refusals of who we are and what we may do.
fn judge_identity(error: &ServerError, asked: Asked<'_>) -> Option<(Kind, String)> {
    let user = asked.user;
    let physical = asked.session == Session::Physical;
    Some(match (error.sqlstate.as_str(), error.routine.as_str()) {
        // The file's name is in every translation of the message; without it, it is about a
        // certificate.
        ("28000", "ClientAuthentication") if error.message.contains("pg_hba.conf") => (
            Kind::Denied,
            format!(
                "Add a line like 'host {} {user} OUR-ADDRESS/32 scram-sha-256' to the server's \
                 pg_hba.conf ('local ...' for its Unix socket) and reload it.",
                if physical { "replication" } else { "DATABASE" },
            ),
        ),
        ("28000", "ClientAuthentication") => (
            Kind::Denied,
            "The server asks for a client certificate: name one with sslcert and sslkey."
                .to_owned(),
        ),
        ("28000", "InitializeSessionUserId") => {
            (Kind::Denied, format!("Check that role '{user}' exists on the server and has LOGIN."))
        }
        ("28000", "auth_failed") => (
            Kind::Denied,
            "The matching line of the server's pg_hba.conf asks for another proof of who we are \
             (peer: the operating system's user of the same name; cert: its name in the \
             certificate); the server's log names the line."
                .to_owned(),
        ),
        ("28000", "read_client_final_message") => (
            Kind::Denied,
            "Something between us and the server terminates TLS: connect to the server itself, or \
             use channel_binding=disable."
                .to_owned(),
        ),
        ("42501", "InitPostgres" | "CheckSlotPermissions" | "check_permissions") => (
            Kind::Denied,
            format!("Run on the server, as a superuser: ALTER ROLE \"{user}\" REPLICATION;"),
        ),
        // `errcode_for_file_access`: it was the operating system that denied something to the server.
        (
            "42501",
            "sendFile" | "sendDir" | "ReadDirExtended" | "AllocateDir" | "WalSndSegmentOpen",
        ) => (
            Kind::Denied,
            "The user that the server runs as may not read that file: give the file back to this \
             user (chown, chmod), or move it out of the data directory."
                .to_owned(),
        ),
        // A function's name is in every translation of the message.
        ("42501", _) if error.message.contains("pg_read_binary_file") => (
            Kind::Denied,
            format!(
                "Run on the server, as a superuser, in the database of the connection string: GRANT \
                 EXECUTE ON FUNCTION pg_read_binary_file(text, bigint, bigint, boolean) TO \"{user}\";"
            ),
        ),
        ("42501", _) => (
            Kind::Denied,
            format!("Grant role '{user}' what it lacks; REPLICATION and pg_monitor are enough."),
        ),
        _ => return None,
    })
}

/// Refusals by the state of the server, its settings and its WAL.
fn judge_replication(error: &ServerError, asked: Asked<'_>) -> Option<(Kind, String)> {
    let physical = asked.session == Session::Physical;
    Some(match (error.sqlstate.as_str(), error.routine.as_str()) {
        ("53300", "InitProcess") if physical => (
            Kind::Unavailable,
            "All of max_wal_senders are in use (or it is 0): raise it, with wal_level = replica, \
             and restart the server, or stop a standby or backup that holds one."
                .to_owned(),
        ),
        ("53300", "InitializeSessionUserId") => (
            Kind::Unavailable,
            format!(
                "Role '{user}' has all the connections it may have: close some, or run on the \
                 server, as a superuser: ALTER ROLE \"{user}\" CONNECTION LIMIT -1;",
                user = asked.user
            ),
        ),
        ("53300", _) => (
            Kind::Unavailable,
            "All connection slots are in use: raise max_connections or superuser-reserved slots, \
             or close connections nobody uses."
                .to_owned(),
        ),
        // A backup of a standby is refused as well when its primary ran without full_page_writes.
        ("55000", "do_pg_backup_start" | "do_pg_start_backup") if !error.names("wal_level") => (
            Kind::Config,
            error.hint.clone().unwrap_or_else(|| "Change what the server complains of.".to_owned()),
        ),
        ("55000", "CheckSlotRequirements" | "do_pg_backup_start" | "do_pg_start_backup") => (
            Kind::Config,
            "Set wal_level = replica (and max_wal_senders and max_replication_slots above 0) on \
             the server and restart it."
                .to_owned(),
        ),
        ("55000", "ReplicationSlotAcquire" | "RaiseSlotInvalidationError") => (
            Kind::NotFound,
            "The server dropped the WAL that the slot kept (max_slot_wal_keep_size, \
             idle_replication_slot_timeout): drop the slot, stream into a new one, and take a new \
             base backup."
                .to_owned(),
        ),
        ("58P01", routine)
            if routine.starts_with("WalSnd")
                || routine == "XLogSendPhysical"
                || routine == "CheckXLogRemoved" =>
        {
            (
                Kind::NotFound,
                "The server has removed WAL that we still need: use a replication slot so that it \
             waits for us, and take a new base backup."
                    .to_owned(),
            )
        }
        ("XX000", "StartReplication" | "tliSwitchPoint") => (
            Kind::Conflict,
            "The server's history and ours have parted: it was promoted elsewhere, rewound or \
             restored, or it is a standby that is behind; connect to the right server."
                .to_owned(),
        ),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(sqlstate: &str, routine: &str) -> Error {
        let error = ServerError {
            severity: "FATAL".to_owned(),
            sqlstate: sqlstate.to_owned(),
            message: "m pg_hba.conf".to_owned(),
            routine: routine.to_owned(),
            hint: Some("Theirs.".to_owned()),
            ..ServerError::default()
        };
        error.into_error(Asked { session: Session::Physical, user: "u" })
    }

    #[test]
    fn callers_can_branch_on_what_replication_refuses() {
        for (sqlstate, routine, kind) in [
            ("28P01", "auth_failed", Kind::Denied),
            ("28000", "ClientAuthentication", Kind::Denied),
            ("42501", "InitPostgres", Kind::Denied),
            ("53300", "InitProcess", Kind::Unavailable),
            ("55000", "CheckSlotRequirements", Kind::Config),
            ("55000", "ReplicationSlotAcquire", Kind::NotFound),
            ("57P03", "ProcessStartupPacket", Kind::Unavailable),
            ("58P01", "WalSndSegmentOpen", Kind::NotFound),
            ("58P01", "SendTimeLineHistory", Kind::NotFound),
            ("42704", "ReplicationSlotAcquire", Kind::NotFound),
            ("42710", "ReplicationSlotCreate", Kind::Conflict),
            ("55006", "ReplicationSlotAcquire", Kind::Conflict),
            ("XX000", "StartReplication", Kind::Conflict),
            ("XX000", "tliSwitchPoint", Kind::Conflict),
            ("42501", "sendFile", Kind::Denied),
            ("53300", "InitializeSessionUserId", Kind::Unavailable),
            ("55000", "do_pg_backup_start", Kind::Config),
            ("XX000", "elsewhere", Kind::Unavailable),
        ] {
            assert_eq!(judged(sqlstate, routine).kind(), kind, "{sqlstate} {routine}");
        }
    }

    #[test]
    fn hints_say_what_is_wrong_and_not_what_might_be() {
        let hint = |sqlstate: &str, routine: &str| {
            judged(sqlstate, routine).hint_text().unwrap_or_default().to_owned()
        };
        for routine in
            ["sendFile", "sendDir", "ReadDirExtended", "AllocateDir", "WalSndSegmentOpen"]
        {
            assert!(hint("42501", routine).contains("may not read that file"), "{routine}");
        }
        assert!(hint("42501", "aclcheck_error").contains("Grant"));
        let reading = ServerError {
            sqlstate: "42501".to_owned(),
            message: "keine Berechtigung für Funktion pg_read_binary_file".to_owned(),
            routine: "aclcheck_error".to_owned(),
            ..ServerError::default()
        };
        let reading = reading.into_error(Asked { session: Session::Database, user: "u" });
        let grant = "pg_read_binary_file(text, bigint, bigint, boolean) TO \"u\";";
        assert!(reading.hint_text().unwrap().ends_with(grant), "{reading:?}");
        assert!(hint("53300", "InitializeSessionUserId").contains("CONNECTION LIMIT"));
        assert_eq!(hint("55000", "do_pg_backup_start"), "Theirs.");
        let level = ServerError {
            sqlstate: "55000".to_owned(),
            routine: "do_pg_backup_start".to_owned(),
            hint: Some("\"wal_level\" must be set to \"replica\" or \"logical\"".to_owned()),
            ..ServerError::default()
        };
        let level = level.into_error(Asked { session: Session::Physical, user: "u" });
        assert!(level.hint_text().unwrap().contains("Set wal_level = replica"));
    }

    #[test]
    fn our_hint_goes_before_the_servers() {
        assert!(judged("28000", "ClientAuthentication").hint_text().unwrap().contains("pg_hba"));
        assert_eq!(judged("XX000", "elsewhere").hint_text(), Some("Theirs."));
        assert_eq!(judged("XX000", "elsewhere").message(), "FATAL: m pg_hba.conf (XX000)");
    }
}
