//! The recovery settings of a restored data directory, and the edit of `postgresql.auto.conf` that
//! puts them there.
//!
//! In: a file as the backup has it, in whatever encoding. Out: the same file without any earlier recovery
//! setting, followed by one block of ours. Editing an edited file gives the same file again.
//!
//! # Invariants
//! The target comes last. PostgreSQL keeps one variable for the kind of target, and assigning an empty
//! value to any of the five settings clears it (`assign_recovery_target_*`), in the order of the file.
//! The four others are set to empty first, so that one left in `postgresql.conf` cannot end in "multiple
//! recovery targets specified" or replace ours.
//!
//! # Source
//! `src/backend/access/transam/xlogrecovery.c` (15 to 18), `src/backend/utils/misc/guc.c` (13, 14);
//! file syntax: `src/backend/utils/misc/guc-file.l`.

use std::borrow::Cow;
use std::io::Write as _;

use serde::{Deserialize, Serialize};

use crate::pg::{Lsn, TimelineId};

/// Settings that belong to a recovery and are never taken over from an earlier one.
const RECOVERY_SETTINGS: [&str; 11] = [
    "restore_command",
    "recovery_end_command",
    "archive_cleanup_command",
    "recovery_target",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_xid",
    "recovery_target_lsn",
    "recovery_target_inclusive",
    "recovery_target_timeline",
    "recovery_target_action",
];

/// The five settings of which at most one may have a value.
const TARGET_SETTINGS: [&str; 5] = [
    "recovery_target",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_xid",
    "recovery_target_lsn",
];

const BLOCK_HEAD: &str =
    "# tidemark restore: begin (recovery settings, of no effect after recovery)";
const BLOCK_END: &str = "# tidemark restore: end";
/// Shell command that takes our block out of `postgresql.auto.conf` again, for the end of recovery: a
/// standby made by `pg_basebackup` from the restored server would take the timeline and the target for its
/// own, and refuse to start.
///
/// # Durability
/// The new file is on disk before it takes the old one's place. The signal file is gone before PostgreSQL
/// runs the command, so that no later start needs the block. If it dies half-way, the block stays.
pub(crate) const REMOVE_BLOCK: &str = "sed '/^# tidemark restore: begin/,/^# tidemark restore: end/d' \
     postgresql.auto.conf > postgresql.auto.conf.new && sync postgresql.auto.conf.new && \
     mv postgresql.auto.conf.new postgresql.auto.conf";

/// What Postgres does when the target is reached (`recovery_target_action`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Become a primary on a new timeline.
    #[default]
    Promote,
    /// Stay read-only at the target, for somebody to look around and then decide.
    Pause,
    /// Stop at the target; the next start goes on from there.
    Shutdown,
}

impl Action {
    /// PostgreSQL's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Promote => "promote",
            Self::Pause => "pause",
            Self::Shutdown => "shutdown",
        }
    }
}

/// Where Postgres is told to stop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Stop {
    /// Nowhere: it replays all WAL it is given.
    EndOfWal,
    /// As soon as it is consistent.
    Immediate,
    /// Before the first record that starts at `lsn` or after.
    Before {
        /// Start of that record.
        lsn: Lsn,
    },
    /// After the first record that starts at `lsn` or after.
    After {
        /// Start of that record.
        lsn: Lsn,
    },
}

impl Stop {
    /// The setting and its value, and `recovery_target_inclusive` where it matters.
    fn setting(&self) -> Option<(&'static str, String, Option<&'static str>)> {
        match self {
            Self::EndOfWal => None,
            Self::Immediate => Some(("recovery_target", "immediate".into(), None)),
            Self::Before { lsn } => Some(("recovery_target_lsn", lsn.to_string(), Some("off"))),
            Self::After { lsn } => Some(("recovery_target_lsn", lsn.to_string(), Some("on"))),
        }
    }
}

/// What a standby follows besides the repository.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Upstream {
    /// How it connects to the server it streams from, without secrets; empty when it streams from none,
    /// `None` when that is up to what the backup's own files say.
    pub conninfo: Option<String>,
    /// The replication slot it streams through. Without one a connection that is given uses none: the
    /// one in the backup's files is another standby's.
    pub slot: Option<String>,
}

impl Upstream {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let conninfo = self.conninfo.clone().map(|text| ("primary_conninfo", text));
        let slot = match (&self.slot, &self.conninfo) {
            (None, None) => None,
            (slot, _) => Some(("primary_slot_name", slot.clone().unwrap_or_default())),
        };
        conninfo.into_iter().chain(slot).collect()
    }
}

/// Everything our block says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoverySettings {
    /// Shell command that hands a WAL file to Postgres; never empty, recovery requires one.
    pub restore_command: String,
    /// Shell command run once when recovery has ended.
    pub recovery_end_command: Option<String>,
    /// Where to stop.
    pub stop: Stop,
    /// The timeline to follow; `None` is the newest, for a standby.
    pub timeline: Option<TimelineId>,
    /// What to do at the stop.
    pub action: Action,
    /// What a standby follows; `None` for a server of its own.
    pub upstream: Option<Upstream>,
}

impl RecoverySettings {
    /// `existing` without earlier recovery settings and with these at its end.
    #[must_use]
    pub fn apply(&self, existing: &[u8]) -> Vec<u8> {
        let mut text = self.strip(existing);
        self.push_block(&mut text);
        text
    }

    /// `existing` without what our block replaces.
    pub(crate) fn strip(&self, existing: &[u8]) -> Vec<u8> {
        let upstream = self.upstream.iter().flat_map(Upstream::lines);
        let replaced: Vec<&str> = upstream.map(|(name, _)| name).collect();
        without_recovery_settings(existing, &replaced)
    }

    /// Appends our block.
    pub(crate) fn push_block(&self, text: &mut Vec<u8>) {
        text.extend_from_slice(BLOCK_HEAD.as_bytes());
        text.push(b'\n');
        for (name, value) in self.lines() {
            push_setting(text, name, &value);
        }
        text.extend_from_slice(BLOCK_END.as_bytes());
        text.push(b'\n');
    }

    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![("restore_command", self.restore_command.clone())];
        lines.extend(self.recovery_end_command.clone().map(|text| ("recovery_end_command", text)));
        lines.push(("archive_cleanup_command", String::new()));
        let timeline = self.timeline.map_or_else(|| "latest".to_owned(), |id| id.to_string());
        lines.push(("recovery_target_timeline", timeline));
        lines.push(("recovery_target_action", self.action.as_str().to_owned()));
        match &self.upstream {
            Some(upstream) => lines.extend(upstream.lines()),
            // A delay meant for a standby would stall a restore for as long.
            None => lines.push(("recovery_min_apply_delay", "0".to_owned())),
        }
        let stop = self.stop.setting();
        let chosen = stop.as_ref().map(|(name, ..)| *name);
        let others = TARGET_SETTINGS.iter().filter(|name| Some(**name) != chosen);
        lines.extend(others.map(|name| (*name, String::new())));
        if let Some((name, value, inclusive)) = stop {
            lines.extend(inclusive.map(|value| ("recovery_target_inclusive", value.to_owned())));
            lines.push((name, value));
        }
        lines
    }
}

/// Appends a line that sets `name`.
pub(crate) fn push_setting(text: &mut Vec<u8>, name: &str, value: &str) {
    // Writing to a Vec cannot fail.
    let _ = writeln!(text, "{name} = {}", quote(value));
}

/// The lines of a configuration file as they are, and each as text to look for names in, which are ASCII.
pub(crate) fn lines_of(file: &[u8]) -> impl DoubleEndedIterator<Item = (&[u8], Cow<'_, str>)> {
    let file = file.strip_suffix(b"\n").unwrap_or(file);
    // An empty file has no line.
    let lines = (!file.is_empty()).then(|| file.split(|byte| *byte == b'\n'));
    lines.into_iter().flatten().map(|line| (line, String::from_utf8_lossy(line)))
}

/// The file without recovery settings, without those that are `replaced` and without a block of ours; ends
/// with a newline unless empty.
pub(crate) fn without_recovery_settings(existing: &[u8], replaced: &[&str]) -> Vec<u8> {
    let mut kept = Vec::with_capacity(existing.len());
    let mut inside_block = false;
    for (index, (line, text)) in lines_of(existing).enumerate() {
        let trimmed = text.trim();
        match trimmed {
            // A block without its end is taken for ordinary lines: nothing else is lost then.
            BLOCK_HEAD => {
                let mut later = lines_of(existing).skip(index + 1);
                let next = later.find_map(|(_, text)| {
                    let mark = text.trim();
                    matches!(mark, BLOCK_HEAD | BLOCK_END).then(|| mark == BLOCK_END)
                });
                inside_block = next == Some(true);
            }
            BLOCK_END => inside_block = false,
            _ => {
                let name = setting_name(trimmed);
                let dropped = name.is_some_and(|name| {
                    let mut gone = RECOVERY_SETTINGS.iter().chain(replaced);
                    inside_block || gone.any(|known| name.eq_ignore_ascii_case(known))
                });
                if !dropped {
                    kept.extend_from_slice(line);
                    kept.push(b'\n');
                }
            }
        }
    }
    kept
}

/// A `postgresql.conf` without its `data_directory`, and where that leads, if it leads elsewhere than
/// `wanted` says. PostgreSQL started with `-D` takes such a line for the place of the data
/// (`SelectConfigFiles` in `guc.c`), and would run on the cluster that the backup was made of.
pub(crate) fn without_data_directory(
    conf: &[u8],
    wanted: impl Fn(&str) -> bool,
) -> Option<(Vec<u8>, String)> {
    let mut edited = Vec::with_capacity(conf.len());
    let mut elsewhere = None;
    for (line, text) in lines_of(conf) {
        let value = setting_of(&text)
            .filter(|(name, _)| name.eq_ignore_ascii_case("data_directory"))
            .map(|(_, value)| value.to_owned());
        if let Some(value) = value.filter(|value| !wanted(value)) {
            edited.extend_from_slice(b"# taken out by tidemark restore: ");
            elsewhere = Some(value);
        }
        edited.extend_from_slice(line);
        edited.push(b'\n');
    }
    elsewhere.map(|elsewhere| (edited, elsewhere))
}

/// The setting that a line of a configuration file sets.
fn setting_name(line: &str) -> Option<&str> {
    let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '.'))?;
    line.get(..end).filter(|name| !name.is_empty())
}

/// Name and value of the setting in a line, the value without quotes; escapes are left as they are.
pub(crate) fn setting_of(line: &str) -> Option<(&str, &str)> {
    let line = line.trim();
    let name = setting_name(line)?;
    let value = line.get(name.len()..)?.trim_start().trim_start_matches('=').trim_start();
    let value = match value.strip_prefix('\'') {
        Some(quoted) => quoted.split_once('\'')?.0,
        None => value.split(|c: char| c.is_whitespace() || c == '#').next()?,
    };
    Some((name, value))
}

/// A value as the configuration file takes it: quotes doubled, backslashes doubled.
fn quote(value: &str) -> String {
    let mut quoted = String::with_capacity(value.len() + 2);
    quoted.push('\'');
    for c in value.chars() {
        match c {
            '\'' => quoted.push_str("''"),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            c => quoted.push(c),
        }
    }
    quoted.push('\'');
    quoted
}

/// One word of a shell command, and of a `restore_command`: single quotes around it when needed, `%`
/// doubled, since PostgreSQL replaces `%f` and `%p` before the shell sees the line.
#[must_use]
pub fn shell_word(word: &str) -> String {
    let plain = |c: char| {
        c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-' | ':' | '=' | '+' | ',')
    };
    let quoted = if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    };
    quoted.replace('%', "%%")
}

#[cfg(test)]
mod tests {
    use super::*;

    impl RecoverySettings {
        fn edited(&self, existing: &str) -> String {
            String::from_utf8(self.apply(existing.as_bytes())).unwrap()
        }
    }

    fn settings(stop: Stop) -> RecoverySettings {
        RecoverySettings {
            restore_command: "tidemark wal-get %f %p".into(),
            recovery_end_command: None,
            stop,
            timeline: TimelineId::new(3),
            action: Action::Pause,
            upstream: None,
        }
    }

    #[test]
    fn earlier_recovery_settings_go_and_all_else_stays() {
        let before = "# Do not edit this file manually!\n\
                      work_mem = '64MB'\n\
                      recovery_target_time = '2020-01-01'\n  Restore_Command='cp it''s %p'\n\
                      primary_conninfo = 'host=a'\nrecovery_min_apply_delay = '5min'";
        let after = settings(Stop::Before { lsn: Lsn(0x1_0000_0028) }).edited(before);
        insta::assert_snapshot!(after, @r"
        # Do not edit this file manually!
        work_mem = '64MB'
        primary_conninfo = 'host=a'
        recovery_min_apply_delay = '5min'
        # tidemark restore: begin (recovery settings, of no effect after recovery)
        restore_command = 'tidemark wal-get %f %p'
        archive_cleanup_command = ''
        recovery_target_timeline = '3'
        recovery_target_action = 'pause'
        recovery_min_apply_delay = '0'
        recovery_target = ''
        recovery_target_name = ''
        recovery_target_time = ''
        recovery_target_xid = ''
        recovery_target_inclusive = 'off'
        recovery_target_lsn = '1/28'
        # tidemark restore: end
        ");
    }

    #[test]
    fn a_block_without_its_end_takes_nothing_else_with_it() {
        let existing = format!(
            "{BLOCK_HEAD}\nwork_mem = 1\n{BLOCK_END}\na = 1\n{BLOCK_HEAD}\nb = 1\n\
             {BLOCK_HEAD}\nc = 1\n{BLOCK_END}\nd = 1\n{BLOCK_HEAD}\ne = 1\n"
        );
        let kept = without_recovery_settings(existing.as_bytes(), &[]);
        assert_eq!(kept, b"a = 1\nb = 1\nd = 1\ne = 1\n");
        assert_eq!(without_recovery_settings(b"a = 1\r\r\n\nb", &[]), b"a = 1\r\r\n\nb\n");
        // In whatever encoding.
        let latin = b"archive_command = 'cp %p /donn\xe9es/%f'\nrestore_command = '\xe9'\n";
        assert_eq!(without_recovery_settings(latin, &[]), latin[..38]);
    }

    #[test]
    fn editing_twice_is_editing_once_and_the_target_is_the_last_setting() {
        for stop in [Stop::EndOfWal, Stop::Immediate, Stop::After { lsn: Lsn(9) }] {
            let once =
                settings(Stop::Before { lsn: Lsn(7) }).edited("a = 1\n# recovery_target = x\n");
            let twice = settings(stop.clone()).edited(&once);
            assert_eq!(settings(stop.clone()).edited(&twice), twice);
            assert_eq!(twice, settings(stop.clone()).edited("a = 1\n# recovery_target = x\n"));
            let last = twice.lines().rev().nth(1).unwrap();
            match stop.setting() {
                Some((name, value, _)) => assert_eq!(last, format!("{name} = '{value}'")),
                None => assert!(last.ends_with("= ''"), "{last}"),
            }
        }
    }

    #[test]
    fn a_standby_follows_whom_it_is_told_and_through_no_slot_of_another() {
        let standby = |conninfo: Option<&str>, slot: Option<&str>| {
            let (conninfo, slot) = (conninfo.map(str::to_owned), slot.map(str::to_owned));
            RecoverySettings {
                timeline: None,
                upstream: Some(Upstream { conninfo, slot }),
                ..settings(Stop::EndOfWal)
            }
        };
        let before = "primary_conninfo = 'host=old password=x'\nPrimary_Slot_Name = 'old'\n\
                      recovery_min_apply_delay = '5min'\n";
        let after = standby(Some(r"host='a b' user=it\'s"), Some("mine")).edited(before);
        insta::assert_snapshot!(after, @r"
        recovery_min_apply_delay = '5min'
        # tidemark restore: begin (recovery settings, of no effect after recovery)
        restore_command = 'tidemark wal-get %f %p'
        archive_cleanup_command = ''
        recovery_target_timeline = 'latest'
        recovery_target_action = 'pause'
        primary_conninfo = 'host=''a b'' user=it\\''s'
        primary_slot_name = 'mine'
        recovery_target = ''
        recovery_target_name = ''
        recovery_target_time = ''
        recovery_target_xid = ''
        recovery_target_lsn = ''
        # tidemark restore: end
        ");
        let none = standby(Some(""), None).edited(before);
        assert!(none.contains("primary_conninfo = ''\nprimary_slot_name = ''\n"), "{none}");
        assert!(!none.contains("old"), "{none}");
        // Unless told, it follows whom the backup's own files name.
        let own = standby(None, None).edited(before);
        assert!(own.starts_with(before), "{own}");
        assert!(!own.contains("'0'"), "{own}");
    }

    #[test]
    fn a_data_directory_elsewhere_becomes_a_comment() {
        let conf = b"port = 1\nData_Directory = '/old' # here\n#data_directory = '/a'\n";
        let (edited, place) = without_data_directory(conf, |place| place == "/new").unwrap();
        assert_eq!(place, "/old");
        let text = String::from_utf8(edited).unwrap();
        let taken_out = "# taken out by tidemark restore: Data_Directory = '/old' # here";
        assert_eq!(text, format!("port = 1\n{taken_out}\n#data_directory = '/a'\n"));
        assert_eq!(without_data_directory(conf, |place| place == "/old"), None);
    }

    #[test]
    fn words_survive_postgres_the_shell_and_the_configuration_file() {
        assert_eq!(shell_word("/usr/bin/tidemark"), "/usr/bin/tidemark");
        assert_eq!(shell_word("it's 100%"), r"'it'\''s 100%%'");
        assert_eq!(shell_word(""), "''");
        assert_eq!(quote(r"a'b\c"), r"'a''b\\c'");
    }
}
