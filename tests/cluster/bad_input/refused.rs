//! Servers and stores that do not let us in, and a repository of another cluster.

use super::{Scene, golden_error};
use crate::harness::{Account, Binaries, Postgres, S3, Settings, Tidemark};

/// The secret that must be in no message.
const WRONG_SECRET: &str = "hunter2hunter2";

/// A server with a role for each refusal.
fn strict_server(binaries: &Binaries) -> Postgres {
    let settings = Settings::default()
        .hba("host all postgres 127.0.0.1/32 trust")
        .hba("host replication postgres,clerk,nobody_here 127.0.0.1/32 trust")
        .hba("host all,replication keeper 127.0.0.1/32 scram-sha-256")
        .hba("host all outsider 127.0.0.1/32 trust");
    let server = Postgres::start(binaries, &settings);
    server.psql("create role keeper login replication password 'the right one'");
    server.psql("create role clerk login");
    server.psql("create role outsider login replication");
    server
}

/// The words of PostgreSQL 15 in place of those of other majors.
fn as_15_says(text: &str) -> String {
    [
        // 13
        (", SSL off\n", ", no encryption\n"),
        (", SSL off (", ", no encryption ("),
        // 16 and later
        (
            "permission denied to start WAL sender: Only roles with the REPLICATION attribute may start a WAL sender process.",
            "must be superuser or replication role to start walsender",
        ),
    ]
    .iter()
    .fold(text.to_owned(), |text, (theirs, fifteens)| text.replace(theirs, fifteens))
}

#[test]
fn a_server_that_refuses_is_explained() {
    let binaries = Binaries::of_this_run();
    let server = strict_server(&binaries);
    let tidemark = Tidemark::with_directory();
    let as_user = |rest: &str| format!("host=127.0.0.1 port={} {rest}", server.port());
    let wrong_password = as_user(&format!("user=keeper password={WRONG_SECRET}"));
    // A repository that is there already must make no difference: what is refused ends.
    for round in ["with a new repository", "with one that is there"] {
        for (name, conninfo) in [
            ("server-wrong-password", wrong_password.clone()),
            ("server-no-password", as_user("user=keeper")),
            ("server-no-replication-right", as_user("user=clerk")),
            ("server-no-hba-line", as_user("user=outsider")),
            ("server-no-such-role", as_user("user=nobody_here")),
        ] {
            let mut text = String::new();
            for command in ["stream", "backup", "check"] {
                let args = [command, "--quiet", "--postgres", &conninfo];
                let output = tidemark.run(&args);
                let said = format!("{}{}", output.stdout, output.stderr);
                assert!(!said.contains(WRONG_SECRET), "{said}");
                text += &output.transcript(&args);
            }
            if round == "with a new repository" {
                text = text.replace(tidemark.url(), "[REPOSITORY]");
                golden_error(name, &as_15_says(&text), &[]);
            }
        }
        if round == "with a new repository" {
            // Nothing was begun: no folder, no key that somebody would have to keep.
            assert!(!std::path::Path::new(tidemark.url()).join("main").exists());
            let identity = tidemark.home().join(".config/tidemark/identity.txt");
            assert!(!identity.exists());
        }
        tidemark.run(&["init", "--quiet", "--postgres", &server.conninfo()]).ok();
    }

    // The repository of the scene belongs to another server.
    let scene = Scene::shared();
    let copy = scene.copy("of-another");
    let conninfo = server.conninfo();
    let mut known = scene.known();
    let theirs = scene.tidemark.run(&["list", "--json"]).ok().json()["system_id"].clone();
    known.push((theirs.as_str().expect("a text").to_owned(), "[SYSTEM OF THE REPOSITORY]"));
    let text: String = ["init", "stream", "backup", "check"]
        .iter()
        .map(|command| {
            let args = [command, "--quiet", "--postgres", &conninfo];
            copy.tidemark.run(&args).transcript(&args)
        })
        .collect();
    golden_error("repository-of-another-cluster", &text, &known);
    assert_eq!(
        server.psql("select count(*) from pg_replication_slots"),
        "0",
        "a slot that nobody reads would keep WAL for ever"
    );
}

/// A share that is not mounted looks like an empty folder; WAL acknowledged into it would be missing in
/// the repository that comes back.
#[test]
fn a_repository_that_is_gone_is_not_begun_anew_while_its_slot_is_there() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let conninfo = server.conninfo();
    let tidemark = Tidemark::with_directory();
    let init = ["init", "--quiet", "--postgres", &conninfo];
    tidemark.run(&init).ok();
    server.psql("select pg_create_physical_replication_slot('tidemark', true)");
    let repository = std::path::Path::new(tidemark.url());
    std::fs::rename(repository, repository.with_extension("elsewhere")).unwrap();
    let text: String = ["stream", "run", "backup"]
        .iter()
        .map(|command| {
            let args = [command, "--quiet", "--postgres", &conninfo];
            tidemark.run(&args).transcript(&args)
        })
        .collect();
    let text = text.replace(tidemark.url(), "[REPOSITORY]");
    golden_error("repository-gone", &text, &[]);
    assert!(!repository.exists(), "nothing is made where it was");
    tidemark.run(&init).ok();
    tidemark.run(&["backup", "--quiet", "--postgres", &conninfo]).ok();
}

/// Whoever sets a server up may make the slot beforehand, and may let us in for replication only.
#[test]
fn a_slot_that_never_kept_wal_is_no_sign_of_a_repository() {
    let binaries = Binaries::of_this_run();
    let settings = Settings::default()
        .hba("host all postgres 127.0.0.1/32 trust")
        .hba("host replication postgres,replicator 127.0.0.1/32 trust");
    let server = Postgres::start(&binaries, &settings);
    server.psql("create role replicator login replication");
    server.psql("select pg_create_physical_replication_slot('tidemark')");
    let conninfo = format!("host=127.0.0.1 port={} user=replicator", server.port());
    let tidemark = Tidemark::with_directory();
    let done = tidemark.run(&["backup", "--quiet", "--postgres", &conninfo]);
    if binaries.major() >= 15 {
        done.ok();
    } else {
        // A server that tells of slots to ordinary connections only must let one in.
        assert_eq!(done.code, Some(5), "{}", done.stderr);
        assert!(done.stderr.contains("before PostgreSQL 15 without an ordinary connection"));
    }
}

#[test]
fn a_store_that_refuses_is_explained() {
    let s3 = S3::start();
    let tidemark = s3.tidemark("prefix");
    let known = [(tidemark.home().display().to_string(), "[HOME]")];
    let show = |name: &str, tidemark: &Tidemark| {
        let text: String = [&["list"][..], &["restore", "--dry-run"], &["verify"]]
            .iter()
            .map(|args| {
                let output = tidemark.run(args);
                let said = format!("{}{}", output.stdout, output.stderr);
                assert!(!said.contains(WRONG_SECRET), "{said}");
                output.transcript(args)
            })
            .collect();
        golden_error(name, &text, &known);
    };
    show("store-wrong-bucket", &tidemark.at("s3://no-such-bucket/prefix"));
    let wrong = s3.tidemark("prefix").with_env("AWS_SECRET_ACCESS_KEY", WRONG_SECRET);
    show("store-wrong-secret", &wrong);
    let unknown = s3.tidemark("prefix").with_env("AWS_ACCESS_KEY_ID", "AKIANOBODY");
    show("store-unknown-access-key", &unknown);
    show("store-nothing-there", &tidemark);

    let folder = Tidemark::with_directory();
    let locked = Account::current().make_dir(folder.home(), "file").join("repository");
    std::fs::write(&locked, "a file, not a folder").unwrap();
    let known = [(folder.home().display().to_string(), "[HOME]")];
    let args = ["list"];
    let text = folder.at(&locked.display().to_string()).run(&args).transcript(&args);
    golden_error("store-not-a-folder", &text, &known);
}
