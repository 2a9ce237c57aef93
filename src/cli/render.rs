//! How errors look: `error: what happened`, then `hint: what to do`; with `--json` an object on
//! standard output too.

use std::io::Write;

use serde_json::json;

use super::terminal::{Terminal, plain};
use crate::error::{Error, Kind};

/// What each kind means to whoever reads the exit status.
fn meaning(kind: Kind) -> &'static str {
    match kind {
        Kind::Usage => "the command line makes no sense",
        Kind::Config => "a setting (file, environment, flag, server) must be changed first",
        Kind::Unavailable => "something needed does not answer; trying again may help",
        Kind::Denied => "credentials or rights are missing or wrong",
        Kind::NotFound => "the thing named does not exist",
        Kind::Conflict => "somebody else holds it, or it exists already",
        Kind::Corrupt => "bytes are not what their checksum or format says",
        Kind::Unsupported => "a version or feature this build does not handle",
        Kind::Cancelled => "stopped on request before the work was done",
        Kind::Bug => "a defect of tidemark; please report it",
    }
}

/// The documented table of exit statuses.
pub(super) fn exit_code_table() -> String {
    let rows = Kind::all().map(|kind| (kind.exit_code(), kind.name(), meaning(kind)));
    let lines = [(0, "success", "all that was asked for is done")].into_iter().chain(rows);
    lines.fold("Exit status:".to_owned(), |text, (code, name, meaning)| {
        format!("{text}\n  {code:>2}  {name:<12} {meaning}")
    })
}

/// Reports an error to the person, and to the program that asked for JSON and has no answer yet: standard
/// output is one document, and a result that tells of failures is one.
pub(super) fn error(error: &Error, terminal: &Terminal) {
    if terminal.json() && !terminal.has_answered() {
        // The text below tells the person; nothing more can be done when standard output is gone.
        drop(terminal.data(&as_json(error.kind(), error.message(), error.hint_text())));
    }
    terminal.finish_progress();
    terminal.error_text(&text(error, terminal.colour()));
}

fn as_json(kind: Kind, message: &str, hint: Option<&str>) -> String {
    let object = json!({ "error": {
        "kind": kind.name(),
        "message": message,
        "hint": hint,
        "exit_code": kind.exit_code(),
    }});
    format!("{object}\n")
}

fn text(error: &Error, colour: bool) -> String {
    let (red, cyan, off) =
        if colour { ("\x1b[1;31m", "\x1b[1;36m", "\x1b[0m") } else { ("", "", "") };
    let mut text = format!("{red}error:{off} {}\n", plain(error.message()));
    if let Some(hint) = error.hint_text() {
        text.push_str(&format!("{cyan}hint:{off} {}\n", plain(hint)));
    }
    if error.kind() == Kind::Bug {
        text.push_str(&format!(
            "{cyan}hint:{off} This is a defect of tidemark. Please report it with the log \
             (--log-level debug).\n"
        ));
    }
    text
}

/// Prints the help that the parser of the command line was asked for.
pub(super) fn help(help: &clap::Error) {
    // Nobody is left to tell when it cannot be written.
    drop(help.print());
    drop(std::io::stdout().flush());
}

/// Prints what the parser of the command line finds wrong.
pub(super) fn misused(error: &clap::Error, json: bool) {
    if json {
        let text = error.to_string();
        let message = text.lines().next().unwrap_or_default();
        let message = message.strip_prefix("error: ").unwrap_or(message);
        let object = as_json(Kind::Usage, message, None);
        // As below.
        drop(std::io::stdout().write_all(object.as_bytes()));
        drop(std::io::stdout().flush());
    }
    // Nobody is left to tell when standard error itself cannot be written.
    drop(error.print());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_and_its_hint_another() {
        let error = Error::new(Kind::Denied, "unable to log in").hint("Check the password.");
        assert_eq!(text(&error, false), "error: unable to log in\nhint: Check the password.\n");
        assert!(text(&error, true).starts_with("\x1b[1;31merror:\x1b[0m unable"));
    }

    #[test]
    fn what_a_server_says_gives_no_command_to_the_terminal() {
        let error =
            Error::new(Kind::Denied, "it says \u{1b}[2Jno\u{9b}1m\nat all").hint("\u{7}Ask it.");
        assert_eq!(text(&error, false), "error: it says  [2Jno 1m\nat all\nhint:  Ask it.\n");
    }
}
