//! `tidemark config show`: every setting, its value, and where that came from.

use clap::Subcommand;
use serde_json::json;

use super::invocation::Invocation;
use crate::config::file;
use crate::config::key::{Form, LIST_SECTION};
use crate::config::settings::{Origin, Shown};
use crate::error::Result;

/// Show the configuration.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print every setting with its value and where that came from, secrets masked.
    ///
    /// The output is a configuration file; settings that nothing sets stand in it as remarks. Takes
    /// the flags of all commands, to show what they would do.
    Show(Show),
}

#[derive(Debug, clap::Args)]
struct Show {
    /// Explain every setting too.
    #[arg(long)]
    explain: bool,
    /// Print the result as JSON on standard output.
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn json(&self) -> bool {
        let Action::Show(show) = &self.action;
        show.json
    }
}

pub(super) fn run(args: Args, invocation: Invocation) -> Result<()> {
    let Action::Show(show) = args.action;
    let settings = invocation.config.settings.shown();
    let text = if show.json { as_json(&settings) } else { as_toml(&settings, &show) };
    invocation.terminal.data(&text)
}

fn as_json(settings: &[Shown]) -> String {
    let rows: Vec<_> = settings
        .iter()
        .map(|shown| {
            let value =
                shown.value.as_ref().map(|items| match (shown.key.form, items.as_slice()) {
                    (Form::List, items) => json!(items),
                    (_, [text, ..]) => json!(text),
                    (_, []) => json!(null),
                });
            let origin = match &shown.origin {
                Origin::Flag(flag) => json!({ "kind": "flag", "name": format!("--{flag}") }),
                Origin::Variable(name) => json!({ "kind": "environment", "name": name }),
                Origin::Line(path, line) => json!({ "kind": "file", "name": path, "line": line }),
                Origin::Default => json!({ "kind": "default" }),
            };
            json!({ "key": shown.key.name, "value": value, "origin": origin })
        })
        .collect();
    format!("{}\n", json!({ "settings": rows }))
}

fn as_toml(settings: &[Shown], show: &Show) -> String {
    let mut text = String::new();
    let mut section = "";
    for shown in settings {
        let key = shown.key;
        if key.section() != section {
            section = key.section();
            let list = section == LIST_SECTION;
            text.push_str(&if list {
                format!("\n[[{section}]]\n")
            } else {
                format!("\n[{section}]\n")
            });
        }
        if show.explain {
            text.push_str(&format!(
                "\n# {}\n# Environment: {}",
                key.help,
                key.variables().join(", ")
            ));
            let short = key.short.map(|short| format!("-{short}, ")).unwrap_or_default();
            let flag = key.flag.map(|flag| format!(". Flag: {short}--{flag}")).unwrap_or_default();
            text.push_str(&flag);
            text.push('\n');
        }
        match &shown.value {
            Some(items) => {
                let value = toml_value(key.form, items);
                text.push_str(&format!(
                    "{:<40} # {}\n",
                    format!("{} = {value}", key.leaf()),
                    shown.origin
                ));
            }
            None => text.push_str(&format!("# {} is not set\n", key.leaf())),
        }
    }
    text
}

fn toml_value(form: Form, items: &[String]) -> String {
    let quoted = |text: &String| file::quoted(text);
    match form {
        Form::List => format!("[{}]", items.iter().map(quoted).collect::<Vec<_>>().join(", ")),
        Form::Integer { .. } | Form::Switch => items.first().cloned().unwrap_or_default(),
        _ => items.first().map(quoted).unwrap_or_default(),
    }
}
