//! `tidemark inspect`: what is inside a WAL segment or an object of the repository.

mod object;
mod segment;

use std::path::Path;

use serde_json::Value;

use super::invocation::Invocation;
use super::terminal::Terminal;
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

/// Text collected before it is written.
const OUTPUT_BYTES: usize = 64 << 10;

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
    if path.is_file() {
        return inspect_segment(&segment::SegmentFile::find(path)?, &args, &invocation.terminal);
    }
    let found = object::inspect(&args.what, depth, &invocation).await?;
    show(&found, &args, &invocation.terminal)
}

fn show(found: &Value, args: &Args, terminal: &Terminal) -> Result<()> {
    if args.json {
        return terminal.json_line(found);
    }
    let mut text = String::new();
    lines(found, 0, &mut text);
    terminal.data(&text)
}

/// Shows a segment file, its records as they are read.
fn inspect_segment(
    file: &segment::SegmentFile<'_>,
    args: &Args,
    terminal: &Terminal,
) -> Result<()> {
    let summary = file.summary()?;
    if !args.all {
        return show(&summary, args, terminal);
    }
    let mut text = String::new();
    let (before, between, end) = if args.json {
        text.push_str(&summary.to_string());
        // The records become one more member.
        text.pop();
        (",\"records\":[", ",", "]}\n")
    } else {
        lines(&summary, 0, &mut text);
        ("records:\n  ", "\n  ", "\n")
    };
    let mut separator = before;
    file.records(&mut |record| {
        text.push_str(std::mem::replace(&mut separator, between));
        text.push_str(&match args.json {
            true => record.to_string(),
            false => line_of(&record).unwrap_or_default(),
        });
        if text.len() >= OUTPUT_BYTES {
            terminal.data(&text)?;
            text.clear();
        }
        Ok(())
    })?;
    if separator == before {
        text.push_str(before.trim_end());
    }
    terminal.data(&(text + end))
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
                match line_of(item) {
                    Some(line) => text.push_str(&format!("{indent}{line}\n")),
                    None => lines(item, depth + 1, text),
                }
            }
        }
        other => text.push_str(&format!("{indent}{}\n", flat(other).unwrap_or_default())),
    }
}

/// A small value as one line.
fn line_of(item: &Value) -> Option<String> {
    flat(item).or_else(|| {
        let members = item.as_object()?.iter();
        let flat = members.map(|(name, value)| Some(format!("{name} {}", flat(value)?)));
        Some(flat.collect::<Option<Vec<_>>>()?.join(", "))
    })
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
