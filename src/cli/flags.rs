//! Flags that set settings: made from the table of settings, so that a flag's help, default,
//! environment variable and place in the file are written once.

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint};

use crate::config::key::{self, Form, Group, KEYS, Key};
use crate::config::settings::{Given, Value};

/// Which groups of settings each command takes as flags.
const COMMANDS: &[(&str, &[Group])] = &[
    ("init", &[Group::Repository, Group::Postgres, Group::Sealing, Group::Opening]),
    ("check", &[Group::Postgres, Group::Repository, Group::Sealing, Group::Opening, Group::Stream]),
    (
        "backup",
        &[
            Group::Postgres,
            Group::Repository,
            Group::Sealing,
            Group::Backup,
            Group::Jobs,
            Group::Memory,
            Group::Stream,
            Group::Opening,
        ],
    ),
    (
        "stream",
        &[
            Group::Postgres,
            Group::Repository,
            Group::Sealing,
            Group::Stream,
            Group::Memory,
            Group::Opening,
        ],
    ),
    (
        "run",
        &[
            Group::Postgres,
            Group::Repository,
            Group::Sealing,
            Group::Stream,
            Group::Backup,
            Group::Retention,
            Group::Run,
            Group::Jobs,
            Group::Memory,
            Group::Opening,
        ],
    ),
    ("restore", &[Group::Repository, Group::Opening, Group::Restore, Group::Jobs, Group::Memory]),
    ("list", &[Group::Repository]),
    ("verify", &[Group::Repository, Group::Opening, Group::Jobs]),
    ("expire", &[Group::Repository, Group::Retention]),
    ("hold", &[Group::Repository]),
    ("release", &[Group::Repository]),
    ("wal-get", &[Group::Repository, Group::Opening]),
    ("inspect", &[Group::Repository, Group::Opening]),
];

/// Adds to each command the flags of its settings.
pub(super) fn add(grammar: Command) -> Command {
    let mut grammar = grammar;
    for key in KEYS.iter().filter(|key| key.group == Group::Everywhere) {
        if let Some(arg) = arg(key) {
            grammar = grammar.arg(arg.global(true).help_heading("Global options"));
        }
    }
    for (command, groups) in COMMANDS {
        grammar = grammar.mut_subcommand(command, |mut command| {
            for group in *groups {
                for key in KEYS.iter().filter(|key| key.group == *group) {
                    if let Some(arg) = arg(key) {
                        command = command.arg(arg.help_heading(heading(*group)));
                    }
                }
            }
            command
        });
    }
    grammar.mut_subcommand("config", |command| {
        command.mut_subcommand("show", |command| {
            let flags = KEYS.iter().filter(|key| key.group != Group::Everywhere).filter_map(arg);
            command.args(flags.map(|arg| arg.hide(true)))
        })
    })
}

fn heading(group: Group) -> &'static str {
    match group {
        Group::Everywhere => "Global options",
        Group::Postgres => "PostgreSQL",
        Group::Repository => "Repository",
        Group::Sealing | Group::Opening => "Keys",
        Group::Jobs | Group::Memory => "Resources",
        Group::Stream => "WAL stream",
        Group::Backup => "Base backup",
        Group::Restore => "Restore",
        Group::Retention => "Retention",
        Group::Run => "Schedule",
    }
}

/// The flag of a setting that has one.
fn arg(key: &'static Key) -> Option<Arg> {
    let flag = key.flag?;
    let first_sentence = key.help.split_inclusive(". ").next().unwrap_or(key.help).trim_end();
    let default = key.default.map(|text| format!("[default: {text}] ")).unwrap_or_default();
    let short = format!("{} {default}", first_sentence.trim_end_matches('.'));
    let notes = format!("{default}[env: {}] [config: {}]", key.variables().join(", "), key.name);
    let mut arg = Arg::new(key.name)
        .long(flag)
        .value_name(key.value_name())
        .help(short.trim_end().to_owned())
        .long_help(format!("{}\n\n{notes}", key.help));
    if let Some(short) = key.short {
        arg = arg.short(short);
    }
    arg = match key.form {
        Form::List => arg.action(ArgAction::Append),
        Form::Switch => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
        Form::Choice(words) => arg.value_parser(PossibleValuesParser::new(words)),
        Form::Path => arg.value_hint(ValueHint::FilePath),
        _ => arg,
    };
    Some(arg)
}

/// The settings that the command line sets.
pub(super) fn given(matches: &ArgMatches) -> Vec<Given> {
    let mut given = Vec::new();
    let mut level = Some(matches);
    while let Some(matches) = level {
        for id in matches.ids() {
            let Some(key) = key::find(id.as_str()) else { continue };
            let Ok(Some(texts)) = matches.try_get_many::<String>(key.name) else { continue };
            let mut texts: Vec<String> = texts.cloned().collect();
            let value = match key.form {
                Form::List => Value::List(texts),
                _ => Value::Text(texts.pop().unwrap_or_default()),
            };
            given.push(Given { key, value });
        }
        level = matches.subcommand().map(|(_, matches)| matches);
    }
    given
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_of_the_table_is_taken_by_some_command() {
        for key in KEYS.iter().filter(|key| key.flag.is_some()) {
            let taken = key.group == Group::Everywhere
                || COMMANDS.iter().any(|(_, groups)| groups.contains(&key.group));
            assert!(taken, "{}", key.name);
        }
    }

    #[test]
    fn whoever_reads_what_is_sealed_can_be_given_what_opens_it() {
        for (command, operands) in
            [("restore", &[][..]), ("verify", &[]), ("wal-get", &["n", "p"]), ("inspect", &["w"])]
        {
            let flags = ["tidemark", command, "--identity", "i", "--passphrase-file", "p"];
            let arguments = flags.iter().chain(operands);
            let matches = super::super::grammar().try_get_matches_from(arguments).unwrap();
            let names: Vec<_> = given(&matches).iter().map(|given| given.key.name).collect();
            assert!(names.contains(&"keys.identity_file"), "{command}");
            assert!(names.contains(&"keys.passphrase_file"), "{command}");
        }
    }

    #[test]
    fn flags_before_and_after_the_command_are_found() {
        let arguments = ["tidemark", "--log-level", "debug", "list", "--cluster", "a"];
        let matches = super::super::grammar().try_get_matches_from(arguments).unwrap();
        let mut names: Vec<_> = given(&matches).iter().map(|given| given.key.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names, ["cluster", "log.level"]);
    }
}
