//! `tidemark inspect`: what is inside a WAL segment or an object of the repository.

mod object;
mod segment;

use std::path::Path;

use serde_json::Value;

use super::invocation::Invocation;
use crate::error::Result;

/// Show what is inside a WAL segment file, or a pack, manifest, extent or key of the repository.
///
/// A name of an existing file is read as a WAL segment; anything else is the name of an object, with
/// or without the cluster in front. What is sealed needs the identity; headers and public parts do
/// not.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A WAL segment file, or an object's name as 'tidemark list' and errors print it.
    #[arg(value_name = "WHAT", value_hint = clap::ValueHint::FilePath)]
    pub(super) what: String,
    /// List everything: each WAL record, each file and frame of a pack.
    #[arg(long, short)]
    pub(super) all: bool,
    /// Print the result as JSON on standard output.
    #[arg(long)]
    pub(super) json: bool,
}

/// How much to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Depth {
    /// Numbers and landmarks.
    Summary,
    /// Everything.
    All,
}

pub(super) async fn run(args: Args, invocation: Invocation) -> Result<()> {
    let depth = if args.all { Depth::All } else { Depth::Summary };
    let path = Path::new(&args.what);
    let found = if path.is_file() {
        segment::inspect_file(path, depth)?
    } else {
        object::inspect(&args.what, depth, &invocation).await?
    };
    if args.json {
        return invocation.terminal.json_line(&found);
    }
    let mut text = String::new();
    lines(&found, 0, &mut text);
    invocation.terminal.data(&text)
}

/// A value as indented lines; a list of small values keeps one line each.
fn lines(value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                let name = name.replace('_', " ");
                match flat(value) {
                    Some(flat) => text.push_str(&format!("{indent}{name}: {flat}\n")),
                    None => {
                        text.push_str(&format!("{indent}{name}:\n"));
                        lines(value, depth + 1, text);
                    }
                }
            }
        }
        Value::Array(items) => {
            for item in items {
                let line = flat(item).or_else(|| {
                    let members = item.as_object()?.iter();
                    let flat =
                        members.map(|(name, value)| Some(format!("{name} {}", flat(value)?)));
                    Some(flat.collect::<Option<Vec<_>>>()?.join(", "))
                });
                match line {
                    Some(line) => text.push_str(&format!("{indent}{line}\n")),
                    None => lines(item, depth + 1, text),
                }
            }
        }
        other => text.push_str(&format!("{indent}{}\n", flat(other).unwrap_or_default())),
    }
}

/// A value that is one word or number.
fn flat(value: &Value) -> Option<String> {
    match value {
        Value::Null => Some("none".to_owned()),
        Value::Bool(value) => Some(value.to_string()),
        Value::Number(value) => Some(value.to_string()),
        Value::String(value) => Some(value.clone()),
        Value::Array(items) if items.is_empty() => Some("none".to_owned()),
        Value::Array(_) | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_become_lines() {
        let mut text = String::new();
        lines(&json!({ "a_b": 1, "list": [{ "x": 1, "y": "z" }], "none": [] }), 0, &mut text);
        assert_eq!(text, "a b: 1\nlist:\n  x 1, y z\nnone: none\n");
    }
}
