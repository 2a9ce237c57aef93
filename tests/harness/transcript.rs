//! What a command printed, as a golden file shows it.
//!
//! `INSTA_UPDATE=always cargo test ...` writes the golden files anew; read the difference.

use std::path::Path;

/// Text that differs from run to run, and what stands in its place: a regular expression and words.
pub type Masks<'a> = &'a [(&'a str, &'a str)];

/// `tidemark ARGS`, its exit status and all it wrote.
pub fn transcript(args: &[&str], status: i32, stdout: &str, stderr: &str) -> String {
    let mut text = format!("$ tidemark {}\n[exit status {status}]\n", args.join(" "));
    for (name, content) in [("stdout", stdout), ("stderr", stderr)] {
        if !content.is_empty() {
            text.push_str(&format!("--- {name}\n{content}"));
        }
    }
    text
}

/// Compares with `tests/golden/<folder>/<name>.snap`, in which keys and times are masked always.
#[track_caller]
pub fn golden(folder: &str, name: &str, text: &str, masks: Masks<'_>) {
    let mut settings = insta::Settings::clone_current();
    settings
        .set_snapshot_path(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(folder));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    for (pattern, words) in masks {
        settings.add_filter(pattern, *words);
    }
    settings.add_filter(r"age1[0-9a-z]{58}", "[PUBLIC KEY]");
    settings.add_filter(r"AGE-SECRET-KEY-1[0-9A-Z]{58}", "[SECRET KEY]");
    settings.add_filter(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "[TIME]");
    settings.bind(|| insta::assert_snapshot!(name, text));
}
