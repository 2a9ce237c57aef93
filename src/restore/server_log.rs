//! What PostgreSQL's log says about a recovery (messages in English, `lc_messages = C`).
//!
//! # Source
//! `src/backend/access/transam/xlogrecovery.c`, `xlog.c`, `xlogarchive.c`, `src/backend/postmaster/postmaster.c`
//! (13 to 18).

use serde::Serialize;

use crate::pg::Lsn;

/// Lines kept for an error message.
const TAIL_LINES: usize = 20;

/// What was said so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ServerLog {
    pub(crate) redo_start_lsn: Option<Lsn>,
    pub(crate) consistent_lsn: Option<Lsn>,
    pub(crate) stopping: Option<String>,
    pub(crate) stopping_lsn: Option<Lsn>,
    pub(crate) redo_done_lsn: Option<Lsn>,
    pub(crate) last_transaction: Option<String>,
    pub(crate) new_timeline: Option<u32>,
    pub(crate) segment: Option<String>,
    pub(crate) paused: bool,
    pub(crate) shut_down_at_target: bool,
    /// Which setting is too low to go on with hot standby, as PostgreSQL says it.
    pub(crate) too_low: Option<String>,
    tail: Vec<String>,
    rest: String,
}

/// How a server's recovery ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is a primary on a new timeline and accepts writes.
    Promoted,
    /// It waits at the target, read-only.
    Paused,
    /// It has stopped at the target.
    Stopped,
    /// It follows as a standby.
    Following,
}

impl ServerLog {
    /// Takes in what was appended to the log.
    pub(crate) fn feed(&mut self, text: &str) {
        self.rest.push_str(text);
        while let Some((line, rest)) = self.rest.split_once('\n') {
            let line = line.trim_end().to_owned();
            self.rest = rest.to_owned();
            self.line(&line);
        }
    }

    fn line(&mut self, line: &str) {
        let after = |words: &str| line.split_once(words).map(|(_, rest)| rest);
        let lsn = |rest: &str| {
            let end = rest.find(|c: char| !(c.is_ascii_hexdigit() || c == '/'));
            rest.get(..end.unwrap_or(rest.len()))?.parse::<Lsn>().ok()
        };
        if let Some(rest) = after("LOG:  redo starts at ") {
            self.redo_start_lsn = lsn(rest);
        } else if let Some(rest) = after("LOG:  consistent recovery state reached at ") {
            self.consistent_lsn = lsn(rest);
        } else if let Some(rest) = after("LOG:  recovery stopping ") {
            self.stopping = Some(rest.to_owned());
            self.stopping_lsn = rest.split_once("(LSN) \"").and_then(|(_, rest)| lsn(rest));
        } else if let Some(rest) = after("LOG:  redo done at ") {
            self.redo_done_lsn = lsn(rest);
        } else if let Some(rest) = after("LOG:  last completed transaction was at log time ") {
            self.last_transaction = Some(rest.to_owned());
        } else if let Some(rest) = after("LOG:  selected new timeline ID: ") {
            self.new_timeline = rest.trim().parse().ok();
        } else if let Some(rest) = after("LOG:  restored log file \"") {
            self.segment = rest.split('"').next().map(str::to_owned);
        } else if line.contains("LOG:  pausing at the end of recovery") {
            self.paused = true;
        } else if line.contains("LOG:  shutdown at recovery target") {
            self.shut_down_at_target = true;
        } else if let Some(rest) = after("WARNING:  hot standby is not possible because of ") {
            self.too_low = Some(rest.to_owned());
        } else if let (Some(why), Some(detail)) = (&mut self.too_low, after("DETAIL:  "))
            && detail.contains(" is a lower setting than ")
        {
            detail.clone_into(why);
        }
        if self.tail.len() == TAIL_LINES {
            self.tail.remove(0);
        }
        self.tail.push(line.to_owned());
    }

    /// The last message of a failure, else the last lines.
    pub(crate) fn why(&self) -> String {
        let failure = self.tail.iter().rev().find_map(|line| {
            ["FATAL:  ", "PANIC:  "]
                .iter()
                .find_map(|word| line.split_once(word))
                .map(|(_, why)| why)
        });
        // The startup process says why before the postmaster says that it has gone; clients that knock
        // meanwhile are told that "the database system is starting up".
        let mut fatal =
            self.tail.iter().filter_map(|line| line.split_once("FATAL:  ").map(|(_, why)| why));
        let first = fatal.find(|why| !why.starts_with("the database system is "));
        first.or(failure).map_or_else(|| self.tail.join("; "), str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "2026-11-22 10:00:00.000 UTC [7] LOG:  starting point-in-time recovery to WAL location (LSN) \"0/130BDB8\"\n\
        2026-11-22 10:00:00.000 UTC [7] LOG:  restored log file \"000000010000000000000011\" from archive\n\
        2026-11-22 10:00:00.000 UTC [7] LOG:  redo starts at 0/1100028\n\
        2026-11-22 10:00:00.000 UTC [7] LOG:  consistent recovery state reached at 0/1100100\n\
        2026-11-22 10:00:00.000 UTC [7] LOG:  recovery stopping before WAL location (LSN) \"0/130BDB8\"\n\
        2026-11-22 10:00:00.000 UTC [7] LOG:  redo done at 0/130BD50 system usage: CPU: user: 0.00 s\n\
        2026-11-22 10:00:00.000 UTC [7] LOG:  last completed transaction was at log time 2026-11-22 09:59:59+00\n\
        2026-11-22 10:00:00.000 UTC [7] LOG:  selected new timeline ID: 3\n";

    #[test]
    fn a_recovery_is_followed_in_any_pieces() {
        let mut whole = ServerLog::default();
        whole.feed(LOG);
        assert_eq!(whole.redo_start_lsn, Some(Lsn(0x110_0028)));
        assert_eq!(whole.stopping_lsn, Some(Lsn(0x130_BDB8)));
        assert_eq!(whole.redo_done_lsn, Some(Lsn(0x130_BD50)));
        assert_eq!((whole.new_timeline, whole.paused), (Some(3), false));
        assert_eq!(whole.segment.as_deref(), Some("000000010000000000000011"));
        let mut pieces = ServerLog::default();
        for piece in LOG.split_inclusive(' ') {
            pieces.feed(piece);
        }
        assert_eq!(pieces, whole);
    }

    #[test]
    fn a_failure_is_the_first_fatal_message() {
        let mut log = ServerLog::default();
        log.feed("x [1] LOG:  starting\nx [2] FATAL:  could not restore file \"a\" from archive\nx [1] LOG:  startup process (PID 2) exited with exit code 1\n");
        assert_eq!(log.why(), "could not restore file \"a\" from archive");
        log = ServerLog::default();
        log.feed("x [3] FATAL:  the database system is starting up\nx [2] FATAL:  requested timeline 3 does not exist\n");
        assert_eq!(log.why(), "requested timeline 3 does not exist");
        log = ServerLog::default();
        log.feed("postgres: could not find the database system\n");
        assert_eq!(log.why(), "postgres: could not find the database system");
    }

    #[test]
    fn a_setting_that_is_too_low_is_named() {
        let mut log = ServerLog::default();
        log.feed("x [2] WARNING:  hot standby is not possible because of insufficient parameter settings\nx [2] DETAIL:  max_connections = 100 is a lower setting than on the primary server, where its value was 500.\n");
        let why = "max_connections = 100 is a lower setting than on the primary server, where its value was 500.";
        assert_eq!(log.too_low.as_deref(), Some(why));
    }
}
