//! The command line against golden files: help texts, and what a person is told when something is
//! wrong. `INSTA_UPDATE=always cargo test --test it cli` writes them anew; read the difference.

use std::process::Command;

use tempfile::TempDir;

use crate::transcript::{golden as compare, transcript};

/// One person's machine: a home, no settings, no server.
struct Machine {
    home: TempDir,
    variables: Vec<(String, String)>,
}

impl Machine {
    fn new() -> Self {
        Self { home: tempfile::tempdir().unwrap(), variables: Vec::new() }
    }

    fn with(mut self, name: &str, value: &str) -> Self {
        self.variables.push((name.to_owned(), value.to_owned()));
        self
    }

    fn path(&self, name: &str) -> String {
        self.home.path().join(name).display().to_string()
    }

    /// Writes a file below the home.
    fn write(&self, name: &str, text: &str) {
        let path = self.home.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// Runs `tidemark ARGS`: its exit status and all it wrote, as a golden file shows them.
    fn run(&self, args: &[&str]) -> String {
        let (status, stdout, stderr) = self.outcome(args);
        let text = transcript(args, status, &stdout, &stderr);
        text.replace(&self.home.path().display().to_string(), "[HOME]")
    }

    fn outcome(&self, args: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_tidemark"))
            .args(args)
            .env_clear()
            .env("HOME", self.home.path())
            // No server listens there: nothing of this machine is reached by accident.
            .env("PGHOST", self.home.path())
            .env("PGUSER", "nobody")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .current_dir(self.home.path())
            .output()
            .unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }
}

/// Compares with `tests/golden/<folder>/<name>.snap`.
#[track_caller]
fn golden(folder: &str, name: &str, text: &str) {
    compare(folder, name, text, &[]);
}

const COMMANDS: &[&str] = &[
    "demo",
    "init",
    "keygen",
    "check",
    "backup",
    "stream",
    "run",
    "restore",
    "list",
    "verify",
    "expire",
    "hold",
    "release",
    "wal-get",
    "inspect",
    "config",
    "completions",
];

#[test]
fn help_says_what_it_always_said() {
    let machine = Machine::new();
    golden("cli", "help", &machine.run(&["--help"]));
    golden("cli", "help-short", &machine.run(&["-h"]));
    for command in COMMANDS {
        golden("cli", &format!("help-{command}"), &machine.run(&[command, "--help"]));
    }
    golden("cli", "help-config-show", &machine.run(&["config", "show", "--help"]));
}

#[test]
fn every_command_has_a_golden_help() {
    let (_, help, _) = Machine::new().outcome(&["--help"]);
    let commands = help.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    let names = commands.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names: Vec<&str> = names.map(|line| line.split_whitespace().next().unwrap()).collect();
    let missing: Vec<_> =
        names.iter().filter(|name| **name != "help" && !COMMANDS.contains(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn configuration_is_shown_with_its_origins_and_without_its_secrets() {
    let machine = Machine::new()
        .with("TIDEMARK_CLUSTER", "orders")
        .with("TIDEMARK_POSTGRES", "postgresql://backup:hunter2@db.example.com/postgres");
    let file = "encryption = \"none\"\n\n[[repository]]\nurl = \"s3://bucket/prefix\"\n\
                secret_access_key = \"hunter2\"\naccess_key_id = \"AKIA\"\n\n\
                [wal]\nflush_interval = \"500ms\"\n";
    machine.write(".config/tidemark/tidemark.toml", file);
    golden("cli", "config-show-default", &Machine::new().run(&["config", "show"]));
    golden("cli", "config-show-explained", &Machine::new().run(&["config", "show", "--explain"]));
    let shown = machine.run(&["config", "show", "--slot", "other"]);
    golden("cli", "config-show", &shown);
    let json = machine.run(&["config", "show", "--json"]);
    golden("cli", "config-show-json", &json);
    assert!(!shown.contains("hunter2") && !json.contains("hunter2"));
}

#[test]
fn what_config_show_prints_is_a_configuration_file() {
    let machine = Machine::new();
    let (_, text, _) =
        machine.outcome(&["config", "show", "--cluster", "a\"b", "--recipient", "x"]);
    machine.write("again.toml", &text);
    let (status, again, stderr) = machine.outcome(&["config", "show", "--config", "again.toml"]);
    assert_eq!((status, stderr.as_str()), (0, ""));
    let values = |text: &str| {
        let lines =
            text.lines().map(|line| line.split(" # ").next().unwrap().trim_end().to_owned());
        lines.filter(|line| !line.starts_with('#')).collect::<Vec<_>>()
    };
    assert_eq!(values(&text), values(&again));
}

#[test]
fn keys_are_made_and_never_overwritten() {
    let machine = Machine::new();
    golden("cli", "keygen", &machine.run(&["keygen"]));
    golden("cli", "keygen-output", &machine.run(&["keygen", "--output", "key.txt"]));
    golden("errors", "keygen-exists", &machine.run(&["keygen", "--output", "key.txt"]));
    golden("cli", "keygen-json", &machine.run(&["keygen", "--output", "key2.txt", "--json"]));
}

#[test]
fn completions_are_made_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (status, script, _) = Machine::new().outcome(&["completions", shell]);
        assert_eq!(status, 0);
        assert!(script.contains("wal-get") && script.contains("to-time"), "{shell}");
    }
}

#[test]
fn a_command_line_that_makes_no_sense_is_explained() {
    let machine = Machine::new();
    for (name, args) in [
        ("no-command", &[][..]),
        ("unknown-command", &["restroe"]),
        ("unknown-option", &["list", "--clustr", "a"]),
        ("option-without-value", &["list", "--cluster"]),
        ("two-targets", &["restore", "--into", "d", "--to-latest", "--to-immediate"]),
        ("unknown-choice", &["stream", "--encryption", "rot13"]),
        ("duration-nonsense", &["stream", "--flush-interval", "10 parsecs"]),
        ("size-nonsense", &["stream", "--lag-ceiling", "lots"]),
        ("number-out-of-bounds", &["stream", "--compression-level", "99"]),
        ("log-level-nonsense", &["list", "--log-level", "a=b=c"]),
        ("no-repository", &["list"]),
        ("unknown-repository-scheme", &["list", "--repository", "gs://bucket/x"]),
        ("no-such-repository", &["list", "--repository", "r"]),
        ("expire-without-rules", &["expire", "--repository", "r"]),
        ("postgres-nonsense", &["stream", "--repository", "r", "--postgres", "hots=db"]),
        ("no-server", &["stream", "--repository", "r"]),
        ("json-error", &["list", "--json", "--repository", "r"]),
        ("cluster-nonsense", &["list", "--repository", "r", "--cluster", "a/b"]),
        ("inspect-nothing", &["inspect", "--repository", "r", "nothing"]),
    ] {
        golden("errors", name, &machine.run(args));
    }
}

#[test]
fn a_configuration_file_that_makes_no_sense_is_explained() {
    let machine = Machine::new();
    for (name, text) in [
        ("file-unknown-key", "cluster = \"a\"\n\n[wal]\nflush_intervall = \"1s\"\n"),
        ("file-unknown-section", "[pstgres]\nurl = \"host=a\"\n"),
        ("file-strange-key", "colour_of_bikeshed = 1\n"),
        ("file-key-elsewhere", "[wal]\nslot = \"a\"\n"),
        ("file-not-toml", "cluster = = 1\n"),
        ("file-wrong-type", "[keys]\nrecipients = \"age1\"\n"),
        ("file-wrong-value", "[wal]\nflush_interval = \"soon\"\n"),
        ("file-two-repositories", "[[repository]]\nurl = \"a\"\n[[repository]]\nurl = \"b\"\n"),
        ("file-repository-no-list", "[repository]\nurl = \"a\"\n"),
    ] {
        machine.write("t.toml", text);
        golden("errors", name, &machine.run(&["config", "show", "--config", "t.toml"]));
    }
    golden("errors", "file-missing", &machine.run(&["list", "--config", "missing.toml"]));
}

#[test]
fn keys_that_make_no_sense_are_explained_without_repeating_them() {
    let machine = Machine::new();
    let recipient = ["check", "--repository", "r", "--recipient", "age1nonsense"];
    let run =
        machine.run(&["init", "--repository", &machine.path("r"), recipient[3], recipient[4]]);
    golden("errors", "recipient-nonsense", &run);
    machine.write("key.txt", "AGE-SECRET-KEY-1NONSENSE\n");
    let both =
        machine.with("TIDEMARK_KEYS_PASSPHRASE", "a").with("TIDEMARK_KEYS_PASSPHRASE_FILE", "b");
    golden("errors", "two-passphrases", &both.run(&["init", "--repository", "r"]));
}

#[test]
fn misspelt_variables_are_pointed_out() {
    let machine = Machine::new().with("TIDEMARK_CLUSTR", "a");
    let (status, _, stderr) = machine.outcome(&["config", "show"]);
    assert_eq!(status, 0);
    assert!(
        stderr.contains("TIDEMARK_CLUSTR is not used; did you mean TIDEMARK_CLUSTER?"),
        "{stderr}"
    );
}

/// A shell runs the program with what `setup` leaves of the machine.
fn shell(setup: &str, args: &str, redirect: &str) -> Option<i32> {
    let program = env!("CARGO_BIN_EXE_tidemark");
    Command::new("/bin/sh")
        .args(["-c", &format!("{setup}; exec {program} {args} {redirect}")])
        .env_clear()
        .env("TIDEMARK_CLUSTR", "a warning")
        .env("TIDEMARK_CONFIG", "")
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap()
        .code()
}

#[test]
fn postgres_is_never_told_that_the_wal_ends_when_something_else_is_wrong() {
    // Not even a socket, a signal handler or a timer can be had.
    for descriptors in 4..10 {
        let setup = format!("ulimit -n {descriptors}");
        let status = shell(&setup, "wal-get --repository /nonexistent a b", "");
        assert_eq!(status, Some(200), "{descriptors} file descriptors");
    }
    let nowhere = "wal-get --repository /nonexistent a b";
    assert_eq!(shell(":", nowhere, "2>/dev/full"), Some(200));
}

/// What `restore` writes for `wal-get` to hand over.
const PLAN: &str = r#"{"format":1,"cluster":"main","system_id":"7","wal_segment_bytes":1048576,
    "path":[{"timeline":1,"start_lsn":"0/0","end_lsn":null}],
    "start_lsn":"0/3000028","end_lsn":"0/3200000","preplaced_end_lsn":"0/0"}"#;

#[test]
fn a_standby_is_told_that_there_is_nothing_yet_whatever_is_wrong() {
    let machine = Machine::new();
    machine.write("garbage.toml", "[[[");
    machine.write("data/pg_wal/tidemark/wal-get.json", PLAN);
    let config = machine.path("garbage.toml");
    let path = machine.path("data/pg_wal/RECOVERYXLOG");
    let segment = "000000010000000000000030";
    let garbage = ["wal-get", "--config", &config, segment, &path];
    let nonsense = ["wal-get", segment, &path, "--clustr", "main"];
    let told = |args: &[&str], wanted: i32| {
        let (status, _, stderr) = machine.outcome(args);
        assert!(status == wanted && stderr.starts_with("error: "), "{args:?}: {status} {stderr}");
    };
    let told_both = |wanted| [&garbage, &nonsense].map(|args| told(args, wanted));
    told_both(200);
    machine.write("data/standby.signal", "");
    // A plan says what it needs.
    told_both(200);
    std::fs::remove_dir_all(machine.path("data/pg_wal/tidemark")).unwrap();
    told_both(1);
}

#[test]
fn who_fetches_ahead_ends_as_no_child_of_a_postmaster_does_that_crashed() {
    let machine = Machine::new();
    machine.write("data/pg_wal/tidemark/wal-get.json", PLAN);
    machine.write("data/pg_wal/tidemark/prefetch.lock", "");
    machine.write("data/pg_wal/tidemark/spool/wanted", "");
    let path = machine.path("data/pg_wal/RECOVERYXLOG");
    let segment = "000000010000000000000030";
    for url in ["/nonexistent", "gs://nowhere"] {
        let args = ["wal-get", "--repository", url, "--prefetch", segment, &path];
        let (status, _, stderr) = machine.outcome(&args);
        assert!(status == 1 && stderr.starts_with("error: "), "{status} {stderr}");
        let cause = machine.path("data/pg_wal/tidemark/spool/error");
        assert!(!std::fs::read_to_string(&cause).unwrap().is_empty());
        std::fs::remove_file(&cause).unwrap();
    }
}

#[test]
fn a_log_that_cannot_be_written_ends_nothing() {
    assert_eq!(shell(":", "completions bash", "2>/dev/full"), Some(0));
}

#[test]
fn json_is_one_document_whatever_happens() {
    let machine = Machine::new();
    let url = machine.path("repository");
    std::fs::create_dir(&url).unwrap();
    for (args, status, member) in [
        (&["check", "--json", "--repository", &url][..], 4, "checks"),
        (&["list", "--json", "--repository", &url], 6, "error"),
        (&["list", "--json", "--nonsense"], 2, "error"),
    ] {
        let (code, stdout, stderr) = machine.outcome(args);
        assert_eq!(code, status, "{args:?}: {stdout}{stderr}");
        let document: serde_json::Value = serde_json::from_str(&stdout)
            .unwrap_or_else(|error| panic!("{args:?}: {error}: {stdout}"));
        assert!(document[member].is_object() || document[member].is_array(), "{document}");
    }
}

#[test]
fn whoever_waits_for_an_answer_is_ended_by_one_signal() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let server = format!("host=127.0.0.1 port={port} user=a dbname=a connect_timeout=600");
    let endpoint = format!("http://127.0.0.1:{port}");
    let s3 = ["--repository", "s3://bucket", "--s3-endpoint", &endpoint, "--s3-region", "here"];
    for (words, status) in [
        ([&["check", "--repository", "/nonexistent", "--postgres", &server][..], &[]].concat(), 10),
        ([&["list"][..], &s3].concat(), 10),
        ([&["restore", "--dry-run"][..], &s3].concat(), 10),
        ([&["wal-get"][..], &s3, &["000000010000000000000001", "x"]].concat(), 200),
    ] {
        let child = Command::new(env!("CARGO_BIN_EXE_tidemark"))
            .args(&words)
            .env_clear()
            .envs([("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")])
            .envs([("TIDEMARK_CONFIG", ""), ("TIDEMARK_ENCRYPTION", "none")])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let _asked = silent.accept().unwrap();
        let pid = child.id().to_string();
        assert!(Command::new("/bin/kill").args(["-TERM", &pid]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{words:?}: {told}");
        assert!(told.contains("stopped before it was done"), "{words:?}: {told}");
    }
}

#[test]
fn a_reader_that_went_away_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tidemark"))
        .args(["completions", "zsh"])
        .env_clear()
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
