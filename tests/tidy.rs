//! The house rules a machine can check: who may import whom, where a crate may be named, words that
//! say nothing, sizes of files, and paths of somebody's machine.
//!
//! Std only. Each failure lists every offence with its file.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Level 0: everybody may import these.
const EVERYBODY: &[&str] = &["error", "clock", "file", "metrics"];

/// Who may import whom besides level 0, by module. Change it when the design changes, never to
/// excuse an import.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("clock", &[]),
    ("file", &[]),
    ("metrics", &[]),
    ("pg", &[]),
    ("pipeline", &[]),
    ("wire", &["pg"]),
    ("wal", &["pg"]),
    ("store", &[]),
    ("repo", &["pipeline", "store", "pg"]),
    ("capture", &["wire", "wal", "repo", "pg"]),
    ("restore", &["repo", "wal", "pg"]),
    ("config", &["pg", "pipeline", "wire", "wal", "store", "repo", "capture", "restore"]),
    ("daemon", &["pg", "pipeline", "wire", "wal", "store", "repo", "capture", "restore", "config"]),
    (
        "cli",
        &[
            "pg", "pipeline", "wire", "wal", "store", "repo", "capture", "restore", "config",
            "daemon",
        ],
    ),
    ("fuzz", &["pg", "pipeline", "wire", "wal", "store", "repo", "capture", "restore", "config"]),
];

/// Modules that know nothing of an asynchronous runtime.
const SYNCHRONOUS: &[&str] = &["pg", "wal", "pipeline"];

/// What may be named in one file (or one folder below a module) only: the codec, the cipher, the
/// key wrapping, the SDK and the parser of the configuration file.
const ONE_HOME: &[&[&str]] = &[
    &["zstd"],
    &["ring::aead"],
    &["ring::hkdf"],
    &["age"],
    &["aws_sdk_s3", "aws_config", "aws_smithy_http_client", "aws_smithy_types"],
    &["toml"],
];

/// Words that say nothing about the thing they name.
const EMPTY_WORDS: &[&str] =
    &["util", "utils", "common", "helper", "helpers", "misc", "manager", "handler", "processor"];

/// Most lines of code in a file; comments, blank lines and the unit tests at its end not counted.
const CODE_LINES_MAX: usize = 800;

/// Crates that must never come in: a second TLS, a second calendar.
const BANNED_CRATES: &[&str] =
    &["openssl", "openssl-sys", "native-tls", "aws-lc-rs", "aws-lc-sys", "chrono"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `folder` that git would keep, with their paths from the root.
fn files(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root().join(folder)];
    while let Some(folder) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_symlink() || [".git", "target", "artifacts", "corpus"].contains(&&*name) {
                continue;
            }
            if path.is_dir() {
                open.push(path);
            } else {
                found.push(path.strip_prefix(root()).unwrap().to_path_buf());
            }
        }
    }
    found.sort();
    found
}

fn rust_files(folder: &str) -> Vec<(PathBuf, String)> {
    let files = files(folder).into_iter().filter(|p| p.extension().is_some_and(|e| e == "rs"));
    files.map(|path| (path.clone(), std::fs::read_to_string(root().join(path)).unwrap())).collect()
}

/// The top module a file of `src` belongs to; `main` and `lib` stand above the table.
fn module_of(path: &Path) -> String {
    let below = path.strip_prefix("src").unwrap();
    let first = below.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_owned()
}

/// The source with comments blanked, and the texts of strings and characters too.
fn code_only(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut out = String::with_capacity(source.len());
    let mut i = 0;
    while i < chars.len() {
        let c = chars[i];
        if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && chars[i] != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            let mut depth = 0;
            loop {
                if at(i) == '/' && at(i + 1) == '*' {
                    depth += 1;
                    i += 2;
                } else if at(i) == '*' && at(i + 1) == '/' {
                    depth -= 1;
                    i += 2;
                } else {
                    if at(i) == '\n' {
                        out.push('\n');
                    }
                    i += 1;
                }
                if depth == 0 || i >= chars.len() {
                    break;
                }
            }
        } else if c == 'r'
            && (at(i + 1) == '"' || at(i + 1) == '#')
            && raw_hashes(&chars, i).is_some()
        {
            let hashes = raw_hashes(&chars, i).unwrap();
            i += 2 + hashes;
            let ends = |i: usize| at(i) == '"' && (1..=hashes).all(|n| at(i + n) == '#');
            while i < chars.len() && !ends(i) {
                if chars[i] == '\n' {
                    out.push('\n');
                }
                i += 1;
            }
            i += 1 + hashes;
            out.push_str("\"\"");
        } else if c == '"' {
            i += 1;
            while i < chars.len() && chars[i] != '"' {
                if chars[i] == '\n' {
                    out.push('\n');
                }
                i += if chars[i] == '\\' { 2 } else { 1 };
            }
            i += 1;
            out.push_str("\"\"");
        } else if c == '\'' && (at(i + 1) == '\\' || at(i + 2) == '\'') {
            i += if at(i + 1) == '\\' { 3 } else { 2 };
            while i < chars.len() && chars[i] != '\'' {
                i += 1;
            }
            i += 1;
            out.push_str("''");
        } else {
            out.push(c);
            i += 1;
        }
    }
    out
}

/// The number of `#` of a raw string that begins at `i` (its `r`), if one does.
fn raw_hashes(chars: &[char], i: usize) -> Option<usize> {
    let before = i.checked_sub(1).map_or(' ', |i| chars[i]);
    if before.is_alphanumeric() && before != 'b' {
        return None;
    }
    let hashes = chars[i + 1..].iter().take_while(|c| **c == '#').count();
    (chars.get(i + 1 + hashes) == Some(&'"')).then_some(hashes)
}

/// Code without the unit tests at its end, which may reach for what they need. A module of tests in a file
/// of its own ends nothing.
fn without_tests(code: &str) -> &str {
    let begins_tests = |at: &usize| {
        let mut rest = code[*at..].lines().skip(1).skip_while(|line| line.starts_with("#["));
        rest.next().is_some_and(|line| line.contains("mod ") && !line.ends_with(';'))
    };
    let mut places = code.match_indices("#[cfg(test)]\n").map(|(at, _)| at);
    places.find(begins_tests).map_or(code, |at| &code[..at])
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The places where `word` stands alone.
fn word_places<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        let before = code[..*at].chars().next_back().unwrap_or(' ');
        let after = code[at + word.len()..].chars().next().unwrap_or(' ');
        !is_word(before) && !is_word(after)
    })
}

/// The modules of this crate that a piece of code names, as `crate::module` or in a group.
fn imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for at in word_places(code, "crate") {
        let Some(rest) = code[at + "crate".len()..].strip_prefix("::") else { continue };
        let Some(group) = rest.strip_prefix('{') else {
            found.insert(rest.chars().take_while(|c| is_word(*c)).collect());
            continue;
        };
        let mut depth = 1;
        let mut first = String::new();
        let mut begun = true;
        for c in group.chars() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => begun = true,
                _ if depth == 1 && begun && is_word(c) => first.push(c),
                _ if depth == 1 && !first.is_empty() => begun = false,
                _ => {}
            }
            if (!begun || depth == 0 || c == ',') && !first.is_empty() {
                found.insert(std::mem::take(&mut first));
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

/// The words of a name: `BlockHandler` and `block_handler` alike.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    for c in name.chars() {
        if c == '_' || c == '-' || c == '.' {
            words.push(String::new());
        } else {
            let last = words.last_mut().unwrap();
            if c.is_uppercase() && last.chars().next_back().is_some_and(char::is_lowercase) {
                words.push(c.to_lowercase().to_string());
            } else {
                last.extend(c.to_lowercase());
            }
        }
    }
    words
}

/// The names a piece of code declares: items, bindings, fields and parameters.
fn declared(code: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut previous = "";
    for (at, token) in tokens(code) {
        let after = code[at + token.len()..].trim_start();
        let item = ["fn", "struct", "enum", "trait", "mod", "type", "const", "static", "let"];
        let typed = after.starts_with(':') && !after.starts_with("::");
        if item.contains(&previous) || previous == "mut" || typed {
            names.insert(token.to_owned());
        }
        previous = token;
    }
    names
}

fn tokens(code: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let start = from + code[from..].find(is_word)?;
        let length = code[start..].find(|c| !is_word(c)).unwrap_or(code.len() - start);
        from = start + length;
        Some((start, &code[start..from]))
    })
}

#[track_caller]
fn no_offence(rule: &str, offences: &[String]) {
    assert!(offences.is_empty(), "{rule}:\n  {}", offences.join("\n  "));
}

#[test]
fn imports_point_down_the_table() {
    let table: BTreeMap<&str, &[&str]> = MAY_IMPORT.iter().copied().collect();
    let mut offences = Vec::new();
    for (path, source) in rust_files("src") {
        let module = module_of(&path);
        if module == "main" || module == "lib" || path.ends_with("tests.rs") {
            continue;
        }
        let Some(allowed) = table.get(module.as_str()) else {
            offences.push(format!("{}: module '{module}' is not in the table", path.display()));
            continue;
        };
        for import in imports(without_tests(&code_only(&source))) {
            let known = table.contains_key(import.as_str());
            let fine = import == module
                || EVERYBODY.contains(&import.as_str())
                || allowed.contains(&import.as_str());
            if known && !fine {
                offences.push(format!("{}: '{module}' imports '{import}'", path.display()));
            }
        }
    }
    no_offence("imports that do not point down the table", &offences);
}

#[test]
fn the_runtime_stays_out_of_where_bytes_are_decoded_and_compressed() {
    let mut offences = Vec::new();
    for (path, source) in rust_files("src") {
        let code = code_only(&source);
        let code = without_tests(&code);
        if SYNCHRONOUS.contains(&module_of(&path).as_str())
            && word_places(code, "tokio").next().is_some()
        {
            offences.push(path.display().to_string());
        }
    }
    no_offence("tokio in pg, wal or pipeline", &offences);
}

#[test]
fn codec_cipher_and_sdk_are_named_in_one_place_each() {
    let mut offences = Vec::new();
    for names in ONE_HOME {
        let mut homes = BTreeSet::new();
        for (path, source) in rust_files("src") {
            let code = code_only(&source);
            let code = without_tests(&code);
            let named = |name: &&&str| {
                word_places(code, name).any(|at| {
                    let path_begins = code[at + name.len()..].starts_with("::");
                    let inside_path = code[..at].ends_with("::");
                    !inside_path && (path_begins || code[..at].ends_with("use "))
                })
            };
            if names.iter().any(|name| named(&name)) {
                let below: PathBuf = path.components().take(3).collect();
                homes.insert(below.display().to_string().trim_end_matches(".rs").to_owned());
            }
        }
        if homes.len() > 1 {
            offences.push(format!("{}: {homes:?}", names.join(", ")));
        }
    }
    no_offence("named in more than one place", &offences);
}

#[test]
fn names_say_something() {
    let empty =
        |name: &str| words(name).last().is_some_and(|last| EMPTY_WORDS.contains(&last.as_str()));
    let mut offences = Vec::new();
    for folder in ["src", "tests", "benches", "tools", "fuzz"] {
        for path in files(folder) {
            let stem = path.file_stem().unwrap().to_string_lossy().into_owned();
            if empty(&stem)
                || path.parent().is_some_and(|folder| {
                    folder.file_name().is_some_and(|name| empty(&name.to_string_lossy()))
                })
            {
                offences.push(path.display().to_string());
            }
        }
        for (path, source) in rust_files(folder) {
            for name in declared(&code_only(&source)).iter().filter(|name| empty(name)) {
                offences.push(format!("{}: {name}", path.display()));
            }
        }
    }
    no_offence("names that say nothing", &offences);
}

#[test]
fn files_are_short_enough_to_read_and_say_what_they_are_for() {
    let mut offences = Vec::new();
    for folder in ["src", "tests", "benches", "tools", "fuzz"] {
        for (path, source) in rust_files(folder) {
            let code = code_only(&source);
            let lines = without_tests(&code).lines().filter(|line| !line.trim().is_empty());
            let lines = lines.count();
            if lines > CODE_LINES_MAX {
                offences.push(format!("{}: {lines} lines of code", path.display()));
            }
            if !source.starts_with("//!") {
                offences.push(format!("{}: no module documentation at its head", path.display()));
            }
        }
    }
    no_offence("files too long or without a purpose", &offences);
}

#[test]
fn no_path_of_somebodys_machine_is_left() {
    // Written in two pieces, so that this file is clean too.
    let paths = [["/wo", "rk/"].concat(), ["/ro", "ot/"].concat()];
    let mut offences = Vec::new();
    for path in files("") {
        let Ok(text) = std::fs::read_to_string(root().join(&path)) else { continue };
        for (number, line) in text.lines().enumerate() {
            if paths.iter().any(|path| line.contains(path.as_str())) {
                offences.push(format!("{}:{}: {}", path.display(), number + 1, line.trim()));
            }
        }
    }
    no_offence("paths of somebody's machine", &offences);
}

#[test]
fn there_is_one_tls_and_one_calendar() {
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    let product = product_crates(&lock);
    let found: Vec<String> = BANNED_CRATES
        .iter()
        .filter(|name| product.contains(**name))
        .map(|name| (*name).to_owned())
        .collect();
    no_offence("crates that must not come in", &found);
}

#[test]
fn what_is_fuzzed_is_what_is_built() {
    let versions = |path: &str| -> BTreeMap<String, BTreeSet<String>> {
        let lock = std::fs::read_to_string(root().join(path)).unwrap();
        let mut versions: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for package in lock.split("[[package]]").skip(1) {
            let value = |key: &str| package.split(key).nth(1)?.split('"').next();
            let (name, version) = (value("name = \"").unwrap(), value("version = \"").unwrap());
            versions.entry(name.to_owned()).or_default().insert(version.to_owned());
        }
        versions
    };
    let (product, fuzzed) = (versions("Cargo.lock"), versions("fuzz/Cargo.lock"));
    let other = |(name, versions): &(&String, &BTreeSet<String>)| {
        product.get(*name).is_some_and(|known| !versions.is_subset(known))
    };
    let offences: Vec<String> = fuzzed
        .iter()
        .filter(other)
        .map(|(name, versions)| format!("{name} {versions:?}"))
        .collect();
    no_offence("crates of which fuzz/Cargo.lock has another version", &offences);
    assert!(fuzzed.len() > 100, "{} crates in fuzz/Cargo.lock", fuzzed.len());
}

/// The crates `tidemark` is built from, read from the lock file: what it depends on, and so on.
/// Development dependencies are in the lock file too, so those of test equipment are left out.
fn product_crates(lock: &str) -> BTreeSet<String> {
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let section = manifest.split("\n[dependencies]\n").nth(1).unwrap();
    let section = section.split("\n[").next().unwrap();
    let direct = section.lines().filter_map(|line| line.split_once(" = ")).map(|(name, _)| name);
    let mut graph: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in lock.split("[[package]]") {
        let Some(name) = package.split("name = \"").nth(1).and_then(|s| s.split('"').next()) else {
            continue;
        };
        let list = package.split("dependencies = [").nth(1).unwrap_or_default();
        let needs = list.split(']').next().unwrap_or_default().split('"').skip(1).step_by(2);
        let needs = needs.map(|need| need.split(' ').next().unwrap_or(need));
        graph.entry(name).or_default().extend(needs);
    }
    let mut found = BTreeSet::new();
    let mut open: Vec<&str> = direct.collect();
    while let Some(name) = open.pop() {
        if found.insert(name.to_owned()) {
            open.extend(graph.get(name).into_iter().flatten());
        }
    }
    found
}

#[test]
fn the_checks_see_what_they_are_meant_to_see() {
    let code =
        code_only("use crate::{error::{A, b}, wal};\n// crate::store\nlet x = \"crate::wire\";");
    let found: Vec<String> = imports(&code).into_iter().collect();
    assert_eq!(found, ["error", "wal"]);
    assert_eq!(code_only("a '\"' b /* \" */ c r#\"x\"y\"# 'l"), "a '' b  c \"\" 'l");
    assert_eq!(words("FrameHandler"), ["frame", "handler"]);
    let tests = "a\n#[cfg(test)]\n#[allow(x)]\nmod tests {}\n";
    assert_eq!(without_tests(tests), "a\n");
    assert_eq!(without_tests("#[cfg(test)]\nfn a() {}\n"), "#[cfg(test)]\nfn a() {}\n");
    assert!(declared("fn a(b_helper: u8)").contains("b_helper"));
    assert!(!declared("tokio_util::x").contains("tokio_util"));
}
