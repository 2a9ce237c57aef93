//! What a restore is told, and the files it edits and reads.

use std::borrow::Cow;

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::input::{Input, pieces};
use crate::pg::control::StandbyLimits;
use crate::pg::{Lsn, TimelineId};
use crate::restore::directory::{Marker, TablespaceMapping};
use crate::restore::handover::Settings;
use crate::restore::limits;
use crate::restore::server_log::ServerLog;
use crate::restore::settings::{Action, RecoverySettings, Stop, Upstream, lines_of, shell_word};
use crate::restore::target::{Edge, Target};
use crate::restore::time::{self, Reading};

/// A text is an instant that is not in the future and can be shown and read again, or it is none.
pub(super) fn target_time(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let now: Timestamp = "2026-11-22T10:00:00.123456Z".parse().expect("a time");
    let names =
        [None, Some("Europe/Berlin"), Some("UTC"), Some("America/Sao_Paulo"), Some("+0545")];
    let zone = input.choose(&names).map(|name| time::parse_zone(name).expect("a zone"));
    let Ok(text) = std::str::from_utf8(input.rest()) else { return };
    let reading = Reading { now, zone };
    if let Ok(zone) = time::parse_zone(text) {
        assert!(!time::show(now, &zone).is_empty());
    }
    let Ok(instant) = time::parse(text, &reading) else { return };
    assert!(instant <= now);
    // Years before 0 have a sign that nobody writes.
    if instant < "0001-01-01T00:00:00Z".parse().expect("a time") {
        return;
    }
    let shown = time::show(instant, &TimeZone::UTC);
    assert_eq!(time::parse(&shown, &reading).ok(), Some(instant), "{shown}");
    let rfc_3339 = instant.to_string();
    assert_eq!(time::parse(&rfc_3339, &reading).ok(), Some(instant), "{rfc_3339}");
}

/// Notes of a restore that are believed say of each segment from the first to the last what it is called,
/// and of none outside; and they are written as they are read.
pub(super) fn notes(bytes: &[u8]) {
    if let Ok(marker) = serde_json::from_slice::<Marker>(bytes) {
        let again = serde_json::to_vec(&marker).expect("it came from JSON");
        assert_eq!(serde_json::from_slice(&again).ok(), Some(marker));
    }
    let Ok(settings) = Settings::decode(bytes) else { return };
    let size = settings.wal_segment_bytes;
    let first = size.number_of(settings.start_lsn);
    let last = size.number_of(Lsn(settings.end_lsn.0 - 1));
    for number in [first, first + (last - first) / 2, last] {
        let name = settings.segment_name(number).expect("a hole in notes that are believed");
        assert_eq!(size.parse_file_name(&name).map(|(_, number)| number), Some(number), "{name}");
    }
    for outside in [first.checked_sub(1), Some(last + 1)].into_iter().flatten() {
        assert_eq!(settings.segment_name(outside), None);
    }
    let again = serde_json::to_vec(&settings).expect("it came from JSON");
    assert_eq!(Settings::decode(&again).ok(), Some(settings));
}

/// Arguments other than times: what is understood means what it says.
pub(super) fn arguments(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(Target::Xid { xid, .. }) = Target::xid(text, Edge::Inclusive) {
        assert!(xid >= 3);
        let number: u64 = text.trim().parse().expect("digits");
        assert_eq!(u64::from(xid), number & 0xffff_ffff);
    }
    if let Ok(Target::Name { name }) = Target::name(text) {
        assert!(name == text && (1..=63).contains(&name.len()));
    }
    // A backslash before the sign that parts the two cannot be written, as with pg_basebackup.
    if let Ok(mapping) = text.parse::<TablespaceMapping>()
        && !text.contains('\\')
    {
        let escaped =
            |path: &std::path::Path| path.to_str().expect("it came from text").replace('=', r"\=");
        let again = format!("{}={}", escaped(&mapping.old), escaped(&mapping.new));
        assert_eq!(again.parse::<TablespaceMapping>().ok(), Some(mapping), "{again}");
    }
    if !text.contains('\0') {
        assert_eq!(shell_words(&shell_word(text)), text);
    }
}

/// What a shell makes of the one word in `quoted`, after PostgreSQL replaced `%%`.
fn shell_words(quoted: &str) -> String {
    let quoted = quoted.replace("%%", "%");
    let mut word = String::new();
    let (mut inside, mut chars) = (false, quoted.chars());
    while let Some(c) = chars.next() {
        match c {
            '\'' => inside = !inside,
            '\\' if !inside => word.extend(chars.next()),
            c => {
                assert!(inside || !" \t\n;&|<>()$`\"*?[]#~!{}".contains(c), "{quoted}");
                word.push(c);
            }
        }
    }
    assert!(!inside, "{quoted}");
    word
}

/// Editing a file twice is editing it once; no other setting is lost; ours come last.
pub(super) fn recovery_settings(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let stop = input.choose(&[0, 1, 2, 3]);
    let lsn = Lsn(input.u64());
    let stop = match stop {
        0 => Stop::EndOfWal,
        1 => Stop::Immediate,
        2 => Stop::Before { lsn },
        _ => Stop::After { lsn },
    };
    let conninfo = input.choose(&[None, Some("host=db passfile='it''s'")]).map(str::to_owned);
    let settings = RecoverySettings {
        restore_command: format!(
            "tidemark wal-get --config {} %f %p",
            shell_word("/etc/it's 100%")
        ),
        recovery_end_command: None,
        stop,
        timeline: TimelineId::new(u32::from(input.byte())),
        action: Action::Pause,
        upstream: conninfo.map(|text| Upstream { conninfo: Some(text), slot: None }),
    };
    let existing = input.rest();
    let edited = settings.apply(existing);
    assert!(settings.apply(&edited) == edited, "another edit changes it");
    let limits = StandbyLimits {
        max_connections: 200,
        max_worker_processes: 9,
        max_wal_senders: 11,
        max_prepared_transactions: 1,
        max_locks_per_transaction: 65,
    };
    let raised = limits::apply(&settings, &limits, (b"", existing));
    assert_eq!(limits::missing(&limits, &[&raised]), []);
    let command = |line: &str| line.trim().starts_with("restore_command =");
    assert_eq!(lines_of(&edited).filter(|(_, line)| command(line)).count(), 1);
    assert!(edited.ends_with(b"end\n"));
    let ours = |line: &str| {
        let name: String =
            line.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
        let name = name.to_ascii_lowercase();
        let others =
            ["restore_command", "archive_cleanup_command", "primary_conninfo", "primary_slot_name"];
        name.starts_with("recovery_") || others.contains(&name.as_str())
    };
    // Whatever stands outside a block of ours is kept to the byte, in its order.
    let mut kept = lines_of(&edited);
    for (line, text) in outside_blocks(existing).filter(|(_, text)| !ours(text.trim())) {
        assert!(kept.any(|(found, _)| found == line), "{text:?} was lost");
    }
}

/// The lines of a file that stand in no whole block of ours.
fn outside_blocks(file: &[u8]) -> impl Iterator<Item = (&[u8], Cow<'_, str>)> {
    let ends = |line: &str| line.trim() == "# tidemark restore: end";
    let marks = |line: &str| {
        let begin = "# tidemark restore: begin (recovery settings, of no effect after recovery)";
        ends(line) || line.trim() == begin
    };
    let lines: Vec<_> = lines_of(file).collect();
    let mut inside = false;
    let mut kept = Vec::new();
    for (index, (line, text)) in lines.iter().enumerate() {
        if marks(text) {
            let next = lines[index + 1..].iter().find(|(_, text)| marks(text));
            inside = !ends(text) && next.is_some_and(|(_, text)| ends(text));
        } else if !inside {
            kept.push((*line, text.clone()));
        }
    }
    kept.into_iter()
}

/// What a log says does not depend on how it is read.
pub(super) fn server_log(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let sizes = input.sizes();
    let text = String::from_utf8_lossy(input.rest()).into_owned();
    let mut whole = ServerLog::default();
    whole.feed(&text);
    let mut pieced = ServerLog::default();
    let mut held = Vec::new();
    for piece in pieces(text.as_bytes(), &sizes) {
        held.extend_from_slice(piece);
        let valid = match std::str::from_utf8(&held) {
            Ok(text) => text.len(),
            Err(error) => error.valid_up_to(),
        };
        let later = held.split_off(valid);
        pieced.feed(std::str::from_utf8(&held).expect("checked"));
        held = later;
    }
    assert_eq!(whole, pieced);
    assert!(whole.why().len() <= text.len() * 2);
}
