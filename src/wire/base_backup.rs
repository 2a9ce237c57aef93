//! `BASE_BACKUP`: a copy of the data directory as a stream of tar archives.
//!
//! # Shape
//! The answer is: a result set with the start position; a result set with the tablespaces; the
//! archives; a result set with the end position. PostgreSQL 13 and 14 send one COPY for each
//! archive, 15 and later one COPY for all, in which a type byte begins each message. Nobody who uses
//! [`BaseBackup`] sees the difference.
//!
//! # Source
//! `src/backend/replication/basebackup.c` (13, 14), `src/backend/backup/basebackup_copy.c` (15 to 18).

use bytes::{Buf, Bytes};
use postgres_protocol::message::frontend;

use super::connection::{Connection, Row, unexpected};
use super::message::Message;
use super::replication::{quote_text, timeline};
use crate::error::{Error, Kind, Result};
use crate::pg::{Lsn, TimelineId, Version};

/// The server's limit for the label (`MAXPGPATH`).
const LABEL_BYTES_MAX: usize = 1024;

/// A cluster with more tablespaces than this has other problems.
const TABLESPACE_COUNT_MAX: usize = 10_000;

/// The server's limit for a path (`MAXPGPATH`).
const LOCATION_BYTES_MAX: usize = 1024;

/// No cluster has 8 EiB; up to here sums of sizes fit, in KiB and in bytes.
const CLUSTER_KIB_MAX: u64 = 1 << 53;

/// The server's limits for `MAX_RATE`, in KiB a second (`MAX_RATE_LOWER`, `MAX_RATE_UPPER`).
const RATE_KIB: std::ops::RangeInclusive<u32> = 32..=1_048_576;

/// How the server reaches the checkpoint that a backup begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CheckpointMode {
    /// As fast as possible.
    Fast,
    /// Spread over `checkpoint_completion_target`.
    #[default]
    Spread,
}

/// What to ask of `BASE_BACKUP`. WAL and PostgreSQL's manifest are never asked for, the tablespace
/// map and progress always; page checksums are left to us, and the server does not wait for its own
/// archiving.
#[derive(Clone, Debug, Default)]
pub struct BaseBackupOptions {
    /// Label, up to 1024 bytes, shown in `backup_label`.
    pub label: String,
    /// How the checkpoint is reached.
    pub checkpoint: CheckpointMode,
    /// Most KiB a second the server may send, 32 to 1048576; `None` = unlimited.
    pub rate_max_kib: Option<u32>,
}

/// One archive of the backup to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tablespace {
    /// OID of the tablespace; `None` for the main data directory.
    pub oid: Option<u32>,
    /// Absolute path on the server; `None` for the main data directory.
    pub location: Option<String>,
    /// Estimated size.
    pub size_kib: Option<u64>,
}

/// What comes next in a base backup, in this order: one `Start`; for each archive `Archive` and its
/// `Data`; `Progress` anywhere between; one `End`.
#[derive(Clone, Debug)]
pub enum BaseBackupEvent {
    /// The checkpoint was made and the copy begins.
    Start {
        /// Redo position of that checkpoint: WAL is needed from here.
        start_lsn: Lsn,
        /// Timeline of `start_lsn`.
        timeline: TimelineId,
        /// What will be sent, in this order.
        tablespaces: Vec<Tablespace>,
    },
    /// A new tar archive begins (and the one before is complete).
    Archive {
        /// Index into the list of tablespaces.
        index: usize,
    },
    /// Bytes of the current archive: a slice of the read buffer.
    Data(Bytes),
    /// The server's own count of the bytes it has read so far (PostgreSQL 15 and later).
    Progress {
        /// Bytes of files read so far, over all archives.
        done_bytes: u64,
    },
    /// All archives are complete and the server left backup mode.
    End {
        /// WAL is needed up to here before the backup is consistent.
        end_lsn: Lsn,
        /// Timeline of `end_lsn`.
        timeline: TimelineId,
    },
}

/// Where in the answer we are.
#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// Before the end of the first result set: its row, once it came.
    StartPosition(Option<(Lsn, TimelineId)>),
    /// Before the end of the second.
    Tablespaces {
        start: (Lsn, TimelineId),
        tablespaces: Vec<Tablespace>,
    },
    /// Not in a COPY: before one, between two, or after the last.
    Between {
        begun: usize,
        tablespaces: Vec<Tablespace>,
        end: Option<(Lsn, TimelineId)>,
    },
    /// In a COPY.
    Copy {
        begun: usize,
        tablespaces: Vec<Tablespace>,
    },
    Over,
}

/// What to do after a message.
pub(super) enum Step {
    Emit(BaseBackupEvent),
    Continue,
}

/// The answer of either form, sans I/O.
#[derive(Debug)]
pub(super) struct Reader {
    state: State,
    /// One COPY for all archives (PostgreSQL 15 and later).
    typed: bool,
}

/// A running base backup.
#[derive(Debug)]
pub struct BaseBackup {
    connection: Connection,
    reader: Reader,
}

impl Connection {
    /// Starts a base backup; the connection serves it until the end and is then closed.
    ///
    /// # Errors
    /// `config` for options the server would refuse, `unavailable` when the connection broke. What
    /// the server says to the command comes with the first event.
    pub async fn base_backup(mut self, options: &BaseBackupOptions) -> Result<BaseBackup> {
        let command = command(options, self.version())?;
        let typed = self.version().major() >= 15;
        self.begin_command(&command).await?;
        Ok(BaseBackup { connection: self, reader: Reader::new(typed) })
    }
}

fn command(options: &BaseBackupOptions, version: Version) -> Result<String> {
    if options.label.len() > LABEL_BYTES_MAX {
        let found = options.label.len();
        return Err(Error::new(
            Kind::Config,
            format!("unable to label the backup: {found} bytes, at most {LABEL_BYTES_MAX}"),
        ));
    }
    if let Some(rate) = options.rate_max_kib.filter(|rate| !RATE_KIB.contains(rate)) {
        return Err(Error::new(
            Kind::Config,
            format!("unable to limit the rate to {rate} KiB/s: PostgreSQL takes 32 to 1048576"),
        ));
    }
    let label = quote_text(&options.label);
    let fast = options.checkpoint == CheckpointMode::Fast;
    let rate = options.rate_max_kib.map(|rate| format!("MAX_RATE {rate}"));
    let words: Vec<String> = if version.major() >= 15 {
        let checkpoint = if fast { "fast" } else { "spread" };
        let fixed = ["PROGRESS", "WAIT 0", "TABLESPACE_MAP", "VERIFY_CHECKSUMS 0"];
        [format!("LABEL {label}"), format!("CHECKPOINT '{checkpoint}'")]
            .into_iter()
            .chain(fixed.map(str::to_owned))
            .chain(rate)
            .collect()
    } else {
        let fixed = ["PROGRESS", "NOWAIT", "TABLESPACE_MAP", "NOVERIFY_CHECKSUMS"];
        [format!("LABEL {label}")]
            .into_iter()
            .chain(fixed.map(str::to_owned))
            .chain(fast.then(|| "FAST".to_owned()))
            .chain(rate)
            .collect()
    };
    Ok(if version.major() >= 15 {
        format!("BASE_BACKUP ({})", words.join(", "))
    } else {
        format!("BASE_BACKUP {}", words.join(" "))
    })
}

impl BaseBackup {
    /// The next event, or `None` after `End`.
    ///
    /// # Errors
    /// `unavailable` when the connection broke, the server gave up, or was silent for longer than
    /// the read time-out (before `Start`, where it waits for a checkpoint, it may be silent for as
    /// long as TCP keepalives are answered); what the server says else.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped: the next call goes on where this one was.
    pub async fn next(&mut self) -> Result<Option<BaseBackupEvent>> {
        loop {
            let silence_max = match self.reader.state {
                State::Over => return Ok(None),
                State::StartPosition(_) => None,
                _ => Some(self.connection.options().read_timeout),
            };
            let message = self.connection.receive(silence_max).await?;
            if let Message::ErrorResponse(error) = message {
                self.reader.state = State::Over;
                return Err(self.connection.server_error(error));
            }
            let over = matches!(message, Message::ReadyForQuery);
            let step = self.reader.read(message)?;
            if over {
                self.connection.end_command();
                // Leaves with the next write, or never: the server notices a closed socket as well.
                frontend::terminate(self.connection.channel().outgoing());
                let flushing = self.connection.channel().flush();
                let _ = futures::FutureExt::now_or_never(flushing);
            }
            if let Step::Emit(event) = step {
                return Ok(Some(event));
            }
        }
    }
}

impl Reader {
    /// `typed`: one COPY for all archives.
    pub(super) fn new(typed: bool) -> Self {
        Self { state: State::StartPosition(None), typed }
    }

    /// Takes a message in: no I/O and no waiting, so that a message is read wholly or not at all.
    pub(super) fn read(&mut self, message: Message) -> Result<Step> {
        // A broken answer leaves a reader that reads nothing more.
        let state = std::mem::replace(&mut self.state, State::Over);
        let (state, step) = match state {
            State::StartPosition(found) => read_start(found, message)?,
            State::Tablespaces { start, tablespaces } => {
                read_tablespaces(start, tablespaces, message)?
            }
            State::Between { begun, tablespaces, end } => {
                self.read_between(begun, tablespaces, end, message)?
            }
            State::Copy { begun, tablespaces } => self.read_copy(begun, tablespaces, message)?,
            State::Over => return Err(unexpected(&message)),
        };
        self.state = state;
        Ok(step)
    }

    fn read_between(
        &self,
        begun: usize,
        tablespaces: Vec<Tablespace>,
        end: Option<(Lsn, TimelineId)>,
        message: Message,
    ) -> Result<(State, Step)> {
        match message {
            Message::CopyOutResponse if self.typed => {
                Ok((State::Copy { begun, tablespaces }, Step::Continue))
            }
            Message::CopyOutResponse => {
                check_index(begun, &tablespaces)?;
                let event = BaseBackupEvent::Archive { index: begun };
                Ok((State::Copy { begun: begun + 1, tablespaces }, Step::Emit(event)))
            }
            Message::RowDescription | Message::CommandComplete => {
                Ok((State::Between { begun, tablespaces, end }, Step::Continue))
            }
            Message::DataRow(columns) => {
                let end = Some(position(&Row::new(columns))?);
                Ok((State::Between { begun, tablespaces, end }, Step::Continue))
            }
            Message::ReadyForQuery if begun == tablespaces.len() => {
                let (end_lsn, timeline) =
                    end.ok_or_else(|| broken("it ended without an end position"))?;
                Ok((State::Over, Step::Emit(BaseBackupEvent::End { end_lsn, timeline })))
            }
            Message::ReadyForQuery => {
                let count = tablespaces.len();
                Err(broken(format_args!("it ended after {begun} of {count} archives")))
            }
            other => Err(unexpected(&other)),
        }
    }

    fn read_copy(
        &self,
        begun: usize,
        tablespaces: Vec<Tablespace>,
        message: Message,
    ) -> Result<(State, Step)> {
        match message {
            Message::CopyData(data) if self.typed => {
                let (begun, step) = read_typed(begun, &tablespaces, data)?;
                Ok((State::Copy { begun, tablespaces }, step))
            }
            Message::CopyData(data) => {
                Ok((State::Copy { begun, tablespaces }, Step::Emit(BaseBackupEvent::Data(data))))
            }
            Message::CopyDone => {
                Ok((State::Between { begun, tablespaces, end: None }, Step::Continue))
            }
            other => Err(unexpected(&other)),
        }
    }
}

fn read_start(found: Option<(Lsn, TimelineId)>, message: Message) -> Result<(State, Step)> {
    let state = match (message, found) {
        (Message::RowDescription, None) => State::StartPosition(None),
        (Message::DataRow(columns), None) => {
            State::StartPosition(Some(position(&Row::new(columns))?))
        }
        (Message::CommandComplete, Some(start)) => {
            State::Tablespaces { start, tablespaces: Vec::new() }
        }
        (other, _) => return Err(unexpected(&other)),
    };
    Ok((state, Step::Continue))
}

fn read_tablespaces(
    start: (Lsn, TimelineId),
    mut tablespaces: Vec<Tablespace>,
    message: Message,
) -> Result<(State, Step)> {
    match message {
        Message::RowDescription => Ok((State::Tablespaces { start, tablespaces }, Step::Continue)),
        Message::DataRow(columns) => {
            if tablespaces.len() >= TABLESPACE_COUNT_MAX {
                return Err(broken(format_args!("more than {TABLESPACE_COUNT_MAX} tablespaces")));
            }
            tablespaces.push(tablespace(&Row::new(columns))?);
            Ok((State::Tablespaces { start, tablespaces }, Step::Continue))
        }
        Message::CommandComplete => {
            let sizes = tablespaces.iter().filter_map(|one| one.size_kib);
            if sizes.fold(0, u64::saturating_add) > CLUSTER_KIB_MAX {
                return Err(broken(format_args!("more than {CLUSTER_KIB_MAX} KiB of tablespaces")));
            }
            if tablespaces.iter().filter(|one| one.oid.is_none()).count() != 1 {
                return Err(broken("it does not hold the main data directory exactly once"));
            }
            let (start_lsn, timeline) = start;
            let list = tablespaces.clone();
            let event = BaseBackupEvent::Start { start_lsn, timeline, tablespaces: list };
            Ok((State::Between { begun: 0, tablespaces, end: None }, Step::Emit(event)))
        }
        other => Err(unexpected(&other)),
    }
}

/// A message of the one COPY of PostgreSQL 15 and later. What it means depends on its first byte.
fn read_typed(begun: usize, tablespaces: &[Tablespace], mut data: Bytes) -> Result<(usize, Step)> {
    let Some(kind) = data.first().copied() else {
        return Err(broken("an empty message in it"));
    };
    data.advance(1);
    match kind {
        b'd' if begun > 0 => Ok((begun, Step::Emit(BaseBackupEvent::Data(data)))),
        b'n' => {
            check_index(begun, tablespaces)?;
            let name = data.split(|byte| *byte == 0).next().unwrap_or_default();
            let expected = match tablespaces.get(begun).and_then(|one| one.oid) {
                Some(oid) => format!("{oid}.tar"),
                None => "base.tar".to_owned(),
            };
            if name != expected.as_bytes() {
                let found = String::from_utf8_lossy(name);
                return Err(broken(format_args!(
                    "archive '{found}' came where '{expected}' was due"
                )));
            }
            Ok((begun + 1, Step::Emit(BaseBackupEvent::Archive { index: begun })))
        }
        b'p' => {
            let done_bytes =
                data.try_get_u64().map_err(|_short| broken("a progress report is cut short"))?;
            Ok((begun, Step::Emit(BaseBackupEvent::Progress { done_bytes })))
        }
        // A manifest was not asked for, and no other type is known.
        kind => Err(broken(format_args!("a message of type {:?} in it", char::from(kind)))),
    }
}

fn check_index(index: usize, tablespaces: &[Tablespace]) -> Result<()> {
    if index < tablespaces.len() {
        return Ok(());
    }
    Err(broken(format_args!("more archives than the {} it announced", tablespaces.len())))
}

fn position(row: &Row) -> Result<(Lsn, TimelineId)> {
    Ok((row.parse(0)?, timeline(row.parse(1)?)?))
}

fn tablespace(row: &Row) -> Result<Tablespace> {
    let oid = row.get(0)?.map(|_| row.parse(0)).transpose()?;
    let location = row.get(1)?.filter(|path| !path.is_empty()).map(str::to_owned);
    if oid.is_some() != location.is_some() {
        return Err(broken("a tablespace in it has no location"));
    }
    if location.as_ref().is_some_and(|path| path.len() > LOCATION_BYTES_MAX) {
        return Err(broken(format_args!(
            "a tablespace's location in it is longer than {LOCATION_BYTES_MAX} bytes"
        )));
    }
    // -1 when the server did not count.
    let size_kib = row.get(2)?.and_then(|size| size.parse().ok());
    Ok(Tablespace { oid, location, size_kib })
}

fn broken(why: impl std::fmt::Display) -> Error {
    Error::new(Kind::Corrupt, format!("unable to understand the server's base backup: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(columns: &[Option<&str>]) -> Message {
        let columns =
            columns.iter().map(|text| text.map(|text| Bytes::copy_from_slice(text.as_bytes())));
        Message::DataRow(columns.collect())
    }

    fn begin() -> Vec<Message> {
        vec![
            Message::RowDescription,
            row(&[Some("0/2000028"), Some("1")]),
            Message::CommandComplete,
            Message::RowDescription,
            row(&[Some("16385"), Some("/ts"), Some("20")]),
            row(&[None, None, Some("30000")]),
            Message::CommandComplete,
        ]
    }

    fn end() -> Vec<Message> {
        vec![
            Message::RowDescription,
            row(&[Some("0/2000100"), Some("1")]),
            Message::CommandComplete,
            Message::CommandComplete,
            Message::ReadyForQuery,
        ]
    }

    fn data(bytes: &[u8]) -> Message {
        Message::CopyData(Bytes::copy_from_slice(bytes))
    }

    fn old_form() -> Vec<Message> {
        let mut messages = begin();
        for content in ["one", "two"] {
            messages.push(Message::CopyOutResponse);
            messages.push(data(content.as_bytes()));
            messages.push(Message::CopyDone);
        }
        messages.extend(end());
        messages
    }

    fn new_form() -> Vec<Message> {
        let mut messages = begin();
        messages.push(Message::CopyOutResponse);
        for (name, content) in [("n16385.tar\0/ts\0", "done"), ("nbase.tar\0\0", "dtwo")] {
            messages.push(data(name.as_bytes()));
            messages.push(data(content.as_bytes()));
            messages.push(data(&[&b"p"[..], &7_u64.to_be_bytes()].concat()));
        }
        messages.push(Message::CopyDone);
        messages.extend(end());
        messages
    }

    fn read(typed: bool, messages: Vec<Message>) -> Result<Vec<String>> {
        let mut reader = Reader { state: State::StartPosition(None), typed };
        let mut events = Vec::new();
        for message in messages {
            match reader.read(message)? {
                Step::Emit(BaseBackupEvent::Start { tablespaces, start_lsn, .. }) => {
                    events.push(format!("start {start_lsn} {}", tablespaces.len()));
                }
                Step::Emit(BaseBackupEvent::Archive { index }) => {
                    events.push(format!("archive {index}"))
                }
                Step::Emit(BaseBackupEvent::Data(bytes)) => {
                    events.push(String::from_utf8_lossy(&bytes).into_owned());
                }
                Step::Emit(BaseBackupEvent::End { end_lsn, .. }) => {
                    events.push(format!("end {end_lsn}"))
                }
                Step::Emit(BaseBackupEvent::Progress { .. }) | Step::Continue => {}
            }
        }
        assert_eq!(reader.state, State::Over);
        Ok(events)
    }

    #[test]
    fn both_forms_give_the_same_events() {
        let expected =
            ["start 0/2000028 2", "archive 0", "one", "archive 1", "two", "end 0/2000100"];
        assert_eq!(read(false, old_form()).unwrap(), expected);
        assert_eq!(read(true, new_form()).unwrap(), expected);
    }

    #[test]
    fn no_message_may_be_missing() {
        for (typed, form) in [(false, old_form as fn() -> Vec<Message>), (true, new_form)] {
            for missing in 0..form().len() - 1 {
                let mut messages = form();
                let removed = messages.remove(missing);
                let harmless = matches!(
                    removed,
                    Message::RowDescription | Message::CommandComplete | Message::CopyData(_)
                );
                let count = messages.len();
                messages.push(Message::ReadyForQuery);
                let result = read(typed, messages);
                assert!(harmless || result.is_err(), "{missing} of {count}: {result:?}");
            }
        }
    }

    #[test]
    fn a_manifest_or_an_unknown_message_is_refused() {
        for content in [&b"m"[..], b"x", b"", b"p\0", b"nother.tar\0\0", b"d early"] {
            let mut messages = begin();
            messages.extend([Message::CopyOutResponse, data(content)]);
            assert_eq!(read(true, messages).unwrap_err().kind(), Kind::Corrupt);
        }
    }

    #[test]
    fn locations_and_sizes_that_no_server_has_are_refused() {
        let longest = format!("/{}", "t".repeat(LOCATION_BYTES_MAX - 1));
        let too_long = format!("{longest}t");
        let (most, half) = (CLUSTER_KIB_MAX.to_string(), (CLUSTER_KIB_MAX / 2).to_string());
        let endless = u64::MAX.to_string();
        for (location, sizes, accepted) in [
            (&longest, [&half, &half], true),
            (&too_long, [&half, &half], false),
            (&longest, [&most, &half], false),
            (&longest, [&endless, &endless], false),
        ] {
            let mut messages = begin();
            messages[4] = row(&[Some("16385"), Some(location), Some(sizes[0])]);
            messages[5] = row(&[None, None, Some(sizes[1])]);
            let mut reader = Reader::new(true);
            let result = messages.into_iter().try_for_each(|one| reader.read(one).map(|_| ()));
            assert_eq!(result.is_ok(), accepted, "{} {sizes:?}: {result:?}", location.len());
        }
    }

    #[test]
    fn the_command_is_written_in_the_grammar_of_the_server() {
        let options = BaseBackupOptions {
            label: "it's".to_owned(),
            checkpoint: CheckpointMode::Fast,
            rate_max_kib: Some(1000),
        };
        assert_eq!(
            command(&options, Version::from_server_version_num(140_000).unwrap()).unwrap(),
            "BASE_BACKUP LABEL 'it''s' PROGRESS NOWAIT TABLESPACE_MAP NOVERIFY_CHECKSUMS FAST \
             MAX_RATE 1000"
        );
        assert_eq!(
            command(&options, Version::from_server_version_num(150_000).unwrap()).unwrap(),
            "BASE_BACKUP (LABEL 'it''s', CHECKPOINT 'fast', PROGRESS, WAIT 0, TABLESPACE_MAP, \
             VERIFY_CHECKSUMS 0, MAX_RATE 1000)"
        );
        let slow = BaseBackupOptions { rate_max_kib: Some(31), ..options };
        assert_eq!(
            command(&slow, Version::from_server_version_num(150_000).unwrap()).unwrap_err().kind(),
            Kind::Config
        );
    }
}
