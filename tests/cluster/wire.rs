//! The replication client against real servers: what is streamed is what is on disk, and every
//! refusal says what to do.

use std::path::Path;
use std::time::Duration;

use tidemark::clock::Clock;
use tidemark::error::{Error, Kind};
use tidemark::pg::{Lsn, TimelineId};
use tidemark::wire::{
    BaseBackupEvent, BaseBackupOptions, CheckpointMode, ConnectOptions, Connection, Session,
    SlotLife, StandbyStatus, Tablespace, WalEvent, WalStream,
};

use crate::harness::postgres::Stop;
use crate::harness::{Account, Binaries, Postgres, Settings};

fn options(conninfo: &str) -> ConnectOptions {
    let env = |name: &str| (name == "HOME").then(|| "/nonexistent".to_owned());
    ConnectOptions::parse(conninfo, &env).unwrap().with_application_name("wire-test")
}

async fn connect(conninfo: &str) -> Result<Connection, Error> {
    Connection::connect(&options(conninfo), Session::Physical, &Clock::system()).await
}

async fn replicate(server: &Postgres) -> Connection {
    connect(&server.conninfo()).await.unwrap()
}

async fn refusal(conninfo: &str, session: Session) -> (Kind, String) {
    let error =
        Connection::connect(&options(conninfo), session, &Clock::system()).await.unwrap_err();
    println!("{error:?}");
    assert!(!format!("{error:?}").contains("s3cret"), "{error:?}");
    (error.kind(), format!("{error:?}"))
}

fn current_lsn(server: &Postgres) -> Lsn {
    server.psql("select pg_current_wal_flush_lsn()").parse().unwrap()
}

/// The bytes `[start, end)` of a timeline's WAL as they are in `pg_wal`.
fn wal_on_disk(data: &Path, timeline: TimelineId, start: Lsn, end: Lsn) -> Vec<u8> {
    let size = tidemark::pg::SegmentSize::DEFAULT;
    let mut bytes = Vec::new();
    let mut at = start;
    while at < end {
        let name = size.file_name(timeline, size.number_of(at));
        let file = std::fs::read(data.join("pg_wal").join(name)).unwrap();
        let until = size.end_of(at).min(end);
        let from = at.saturating_since(size.start_of(at)) as usize;
        let len = until.saturating_since(at) as usize;
        bytes.extend_from_slice(&file[from..from + len]);
        at = until;
    }
    bytes
}

/// Streams until `end` is received; every so often the future is dropped to see that nothing is lost.
async fn receive_until(stream: &mut WalStream, start: Lsn, end: Lsn) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut at = start;
    let mut patience = Duration::from_micros(50);
    while at < end {
        let Ok(event) = tokio::time::timeout(patience, stream.next()).await else {
            patience = (patience * 2).min(Duration::from_secs(20));
            continue;
        };
        patience = Duration::from_micros(50);
        if let WalEvent::Wal { start_lsn, data, .. } = event.unwrap() {
            assert_eq!(start_lsn, at);
            bytes.extend_from_slice(&data);
            at = at.checked_add(data.len() as u64).unwrap();
        }
    }
    bytes
}

struct Archive {
    tablespace: Tablespace,
    tar: Vec<u8>,
}

async fn take_backup(connection: Connection, options: &BaseBackupOptions) -> Vec<Archive> {
    let mut backup = connection.base_backup(options).await.unwrap();
    let mut archives: Vec<Archive> = Vec::new();
    let mut announced = Vec::new();
    let mut start = None;
    let mut end = None;
    let mut progress = 0;
    while let Some(event) = backup.next().await.unwrap() {
        match event {
            BaseBackupEvent::Start { start_lsn, tablespaces, .. } => {
                start = Some(start_lsn);
                announced = tablespaces;
            }
            BaseBackupEvent::Archive { index } => {
                assert_eq!(index, archives.len());
                let tablespace = announced[index].clone();
                archives.push(Archive { tablespace, tar: Vec::new() });
            }
            BaseBackupEvent::Data(data) => {
                archives.last_mut().unwrap().tar.extend_from_slice(&data);
            }
            BaseBackupEvent::Progress { done_bytes } => {
                assert!(done_bytes >= progress);
                progress = done_bytes;
            }
            BaseBackupEvent::End { end_lsn, .. } => end = Some(end_lsn),
        }
    }
    assert!(start.unwrap() < end.unwrap());
    assert_eq!(archives.len(), announced.len());
    archives
}

/// Names in a tar archive, by the system's tar.
fn list(tar: &[u8]) -> Vec<String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, tar).unwrap();
    let listed = std::process::Command::new("tar").arg("-tf").arg(file.path()).output().unwrap();
    assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
    String::from_utf8(listed.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn a_base_backup_holds_every_archive() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let place = Account::current().make_dir(server.home(), "ts");
    server.psql(&format!("create tablespace ts location '{}'", place.display()));
    server.psql("create table t tablespace ts as select generate_series(1, 300000) n");
    let options = BaseBackupOptions {
        label: "it's a 'label'".to_owned(),
        checkpoint: CheckpointMode::Fast,
        rate_max_kib: None,
    };
    let archives = take_backup(replicate(&server).await, &options).await;
    assert_eq!(archives.len(), 2);
    for archive in &archives {
        let names = list(&archive.tar);
        let has = |name: &str| names.iter().any(|found| found == name);
        match archive.tablespace.oid {
            None => {
                assert!(has("backup_label") && has("tablespace_map") && has("global/pg_control"));
                assert!(!has("backup_manifest"));
                let label = String::from_utf8_lossy(&archive.tar);
                assert!(label.contains("LABEL: it's a 'label'"));
            }
            Some(oid) => {
                assert_eq!(
                    oid.to_string(),
                    server.psql("select oid from pg_tablespace where spcname = 'ts'")
                );
                assert_eq!(archive.tablespace.location.as_deref(), place.to_str());
                assert!(archive.tablespace.size_kib.unwrap() > 10_000);
                assert!(archive.tar.len() > 10 << 20);
                assert!(names.iter().all(|name| name.starts_with("PG_")), "{names:?}");
            }
        }
    }
    let slow = BaseBackupOptions { rate_max_kib: Some(1 << 20), ..BaseBackupOptions::default() };
    assert_eq!(take_backup(replicate(&server).await, &slow).await.len(), 2);
    assert!(!server.log().contains("unexpected EOF"), "{}", server.log_tail());
}

#[tokio::test]
async fn wal_is_streamed_byte_for_byte_and_the_slot_follows_what_is_durable() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let mut connection = replicate(&server).await;
    let identity = connection.identify_system().await.unwrap();
    assert_eq!(
        identity.system_id.to_string(),
        server.psql("select system_identifier from pg_control_system()")
    );
    assert_eq!(connection.segment_size().await.unwrap().bytes(), 16 << 20);
    connection.create_slot("wire", SlotLife::Permanent).await.unwrap();
    let slot = connection.read_slot("wire").await.unwrap().unwrap();
    let start = slot.restart_lsn.unwrap().align_down(8192);
    let mut stream =
        connection.start_replication(Some("wire"), start, identity.timeline).await.unwrap();
    server.psql("create table t as select n, repeat('x', 200) from generate_series(1, 100000) n");
    let end = current_lsn(&server);
    assert!(end.saturating_since(start) > 20 << 20);
    let received = receive_until(&mut stream, start, end).await;
    let len = end.saturating_since(start) as usize;
    assert!(received[..len] == wal_on_disk(server.data(), identity.timeline, start, end));
    let status = StandbyStatus {
        written_end_lsn: end,
        durable_end_lsn: end,
        applied_end_lsn: Lsn::INVALID,
        reply_requested: true,
    };
    stream.send_status(status).await.unwrap();
    loop {
        let event = stream.next().await.unwrap();
        if matches!(event, WalEvent::Keepalive { reply_requested: false, .. }) {
            break;
        }
    }
    let mut connection = stream.finish().await.unwrap();
    let moved = connection.read_slot("wire").await.unwrap().unwrap();
    assert_eq!(moved.restart_lsn, Some(end));
    if connection.version().major() >= 15 {
        assert_eq!(moved.restart_timeline, Some(identity.timeline));
    }
    connection.drop_slot("wire").await.unwrap();
    assert_eq!(connection.read_slot("wire").await.unwrap(), None);
    connection.close().await;
    assert!(!server.log().contains("unexpected EOF"), "{}", server.log_tail());
}

#[tokio::test]
async fn slots_and_positions_that_cannot_be_served_are_told_apart() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let mut connection = replicate(&server).await;
    let identity = connection.identify_system().await.unwrap();
    let (timeline, end) = (identity.timeline, identity.flushed_end_lsn);
    connection.create_slot("s", SlotLife::Permanent).await.unwrap();
    let kind = |result: Result<(), Error>| {
        let error = result.unwrap_err();
        println!("{error:?}");
        error.kind()
    };
    assert_eq!(kind(connection.create_slot("s", SlotLife::Permanent).await), Kind::Conflict);
    assert_eq!(kind(connection.create_slot("No Good", SlotLife::Permanent).await), Kind::Config);
    assert_eq!(kind(connection.drop_slot("missing").await), Kind::NotFound);
    assert_eq!(connection.read_slot("missing").await.unwrap(), None);
    let asked = connection.timeline_history(TimelineId::FIRST).await.unwrap_err();
    assert_eq!(asked.kind(), Kind::NotFound);
    assert_eq!(connection.show("no.such").await.unwrap_err().kind(), Kind::NotFound);
    // The connection survives every refusal.
    assert_eq!(connection.show("wal_level").await.unwrap(), "replica");

    let holder = connection.start_replication(Some("s"), end, timeline).await.unwrap();
    let start = async |slot: Option<&'static str>, at: Lsn| -> Error {
        let started = replicate(&server).await.start_replication(slot, at, timeline).await;
        let error = match started {
            Ok(mut stream) => loop {
                if let Err(error) = stream.next().await {
                    break error;
                }
            },
            Err(error) => error,
        };
        println!("{error:?}");
        error
    };
    assert_eq!(start(Some("s"), end).await.kind(), Kind::Conflict);
    assert_eq!(start(Some("missing"), end).await.kind(), Kind::NotFound);
    assert_eq!(start(None, Lsn(0x7000_0000_0000)).await.kind(), Kind::Conflict);
    assert_eq!(start(None, Lsn(0)).await.kind(), Kind::NotFound);

    let short = options(&server.conninfo()).with_read_timeout(Duration::from_secs(1));
    let mut other = Connection::connect(&short, Session::Physical, &Clock::system()).await.unwrap();
    assert_eq!(kind(other.drop_slot("s").await), Kind::Conflict);
    drop(holder);
    other.drop_slot("s").await.unwrap();

    other.create_slot("passing", SlotLife::Temporary).await.unwrap();
    assert!(other.read_slot("passing").await.unwrap().is_some());
    other.close().await;
    let mut later = replicate(&server).await;
    while later.read_slot("passing").await.unwrap().is_some() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_slot_that_lost_its_wal_is_not_found() {
    let settings = Settings::default()
        .conf("max_slot_wal_keep_size = 1MB")
        .conf("min_wal_size = 32MB")
        .conf("max_wal_size = 32MB");
    let server = Postgres::start(&Binaries::of_this_run(), &settings);
    let mut connection = replicate(&server).await;
    connection.create_slot("s", SlotLife::Permanent).await.unwrap();
    let slot = connection.read_slot("s").await.unwrap().unwrap();
    for _ in 0..6 {
        server.psql(
            "create table if not exists t(); drop table t; select pg_switch_wal(); checkpoint",
        );
    }
    let lost = connection.read_slot("s").await.unwrap().unwrap();
    println!("{lost:?}");
    assert_eq!(lost.restart_lsn, None);
    let started =
        connection.start_replication(Some("s"), slot.restart_lsn.unwrap(), TimelineId::FIRST).await;
    let error = match started {
        Ok(mut stream) => stream.next().await.unwrap_err(),
        Err(error) => error,
    };
    println!("{error:?}");
    assert_eq!(error.kind(), Kind::NotFound);
}

#[tokio::test]
async fn a_timeline_is_followed_to_its_end_and_the_next_one_begun() {
    let settings = Settings::default().conf("wal_keep_size = 256MB");
    let primary = Postgres::start(&Binaries::of_this_run(), &settings);
    primary.psql("create table t as select generate_series(1, 1000) n");
    let standby = primary.standby();
    standby.promote();
    standby.psql("insert into t values (0)");
    let start = Lsn(0x200_0000);
    let mut stream =
        replicate(&standby).await.start_replication(None, start, TimelineId::FIRST).await.unwrap();
    let mut received = Vec::new();
    let (next_timeline, next_start) = loop {
        match stream.next().await.unwrap() {
            WalEvent::Wal { data, .. } => received.extend_from_slice(&data),
            WalEvent::Keepalive { .. } => {}
            WalEvent::TimelineEnded { next_timeline, next_start_lsn } => {
                break (next_timeline, next_start_lsn);
            }
        }
    };
    assert_eq!(next_timeline.get(), 2);
    assert_eq!(start.checked_add(received.len() as u64), Some(next_start));
    let mut connection = stream.finish().await.unwrap();
    let (name, content) = connection.timeline_history(next_timeline).await.unwrap();
    assert_eq!(name, "00000002.history");
    assert_eq!(content, std::fs::read(standby.data().join("pg_wal").join(&name)).unwrap());

    // A timeline that ends where we begin ends at once.
    let mut stream =
        connection.start_replication(None, next_start, TimelineId::FIRST).await.unwrap();
    let ended = WalEvent::TimelineEnded { next_timeline, next_start_lsn: next_start };
    assert_eq!(stream.next().await.unwrap(), ended);
    let connection = stream.finish().await.unwrap();
    let end = current_lsn(&standby);
    let mut stream = connection.start_replication(None, next_start, next_timeline).await.unwrap();
    let received = receive_until(&mut stream, next_start, end).await;
    let len = end.saturating_since(next_start) as usize;
    assert!(received[..len] == wal_on_disk(standby.data(), next_timeline, next_start, end));
}

#[tokio::test]
async fn the_host_that_target_session_attrs_asks_for_is_found() {
    let primary = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let standby = primary.standby();
    let ports = format!("port={},{}", primary.port(), standby.port());
    for session in [Session::Physical, Session::Database] {
        for (attrs, expected) in [
            ("any", &primary),
            ("primary", &primary),
            ("read-write", &primary),
            ("standby", &standby),
            ("read-only", &standby),
            ("prefer-standby", &standby),
        ] {
            let text = format!(
                "host=127.0.0.1,127.0.0.1 {ports} user=postgres target_session_attrs={attrs}"
            );
            let options = options(&text);
            let mut connection =
                Connection::connect(&options, session, &Clock::system()).await.unwrap();
            let port = connection.show("port").await.unwrap();
            assert_eq!(port, expected.port().to_string(), "{session:?} {attrs}");
            connection.close().await;
        }
    }
    standby.stop(Stop::Fast);
    let text = format!("host=127.0.0.1,127.0.0.1 {ports} user=postgres");
    let (kind, text) =
        refusal(&format!("{text} target_session_attrs=standby"), Session::Physical).await;
    assert_eq!(kind, Kind::Unavailable);
    assert!(text.contains("not a standby") && text.contains("refused"), "{text}");
    let reversed = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=postgres target_session_attrs=prefer-standby",
        standby.port(),
        primary.port()
    );
    connect(&reversed).await.unwrap();
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let settings = Settings::default()
        .conf("password_encryption = 'scram-sha-256'")
        .conf("max_wal_senders = 4")
        .hba("local all postgres trust")
        .hba("host all postgres 127.0.0.1/32 trust")
        .hba("host replication postgres 127.0.0.1/32 trust")
        .hba("host replication scram,plain,weak 127.0.0.1/32 scram-sha-256")
        .hba("host replication clear 127.0.0.1/32 password")
        .hba("host replication missing 127.0.0.1/32 trust");
    let server = Postgres::start(&Binaries::of_this_run(), &settings);
    for role in ["scram", "clear", "nohba"] {
        server.psql(&format!("create role {role} login replication password 's3cret-{role}'"));
    }
    server.psql("create role weak login password 's3cret-weak'");
    let at = format!("host=127.0.0.1 port={}", server.port());
    let expect = async |extra: &str, kind: Kind, words: &[&str]| {
        let (found, text) = refusal(&format!("{at} {extra}"), Session::Physical).await;
        assert_eq!(found, kind, "{text}");
        for word in words {
            assert!(text.contains(word), "{word}: {text}");
        }
    };
    expect("user=scram password=s3cret-wrong", Kind::Denied, &["28P01", "Check the password"])
        .await;
    expect("user=scram", Kind::Denied, &["asks for the password of role 'scram'", ".pgpass"]).await;
    expect("user=clear password=s3cret-wrong", Kind::Denied, &["28P01"]).await;
    expect("user=nohba password=s3cret-nohba", Kind::Denied, &["28000", "host replication nohba"])
        .await;
    expect("user=missing", Kind::Denied, &["28000", "role 'missing' exists"]).await;
    expect(
        "user=weak password=s3cret-weak",
        Kind::Denied,
        &["42501", "ALTER ROLE \"weak\" REPLICATION"],
    )
    .await;
    expect("user=scram sslmode=require", Kind::Config, &["does not offer TLS", "ssl = on"]).await;
    expect("user=scram require_auth=none", Kind::Denied, &["require_auth forbids"]).await;
    expect("user=clear password=x require_auth=!password", Kind::Denied, &["require_auth"]).await;
    let (kind, _) = refusal(&format!("{at} user=postgres dbname=nope"), Session::Database).await;
    assert_eq!(kind, Kind::NotFound);

    connect(&format!("{at} user=scram password=s3cret-scram")).await.unwrap().close().await;
    connect(&format!("{at} user=clear password=s3cret-clear")).await.unwrap().close().await;

    let mut held = Vec::new();
    while let Ok(connection) = connect(&server.conninfo()).await {
        held.push(connection);
    }
    assert!((1..=4).contains(&held.len()));
    expect("user=postgres", Kind::Unavailable, &["53300", "All of max_wal_senders"]).await;
    server.stop(Stop::Fast);
    expect("user=postgres", Kind::Unavailable, &["refused", "Is PostgreSQL running"]).await;
}

#[tokio::test]
async fn refusals_name_the_file_the_limit_and_the_timeline() {
    let settings = Settings::default()
        .hba("local all postgres trust")
        .hba("host all postgres,limited 127.0.0.1/32 trust")
        .hba("host replication postgres 127.0.0.1/32 trust");
    let server = Postgres::start(&Binaries::of_this_run(), &settings);
    server.psql("create role limited login connection limit 0");
    let text = format!("host=127.0.0.1 port={} user=limited", server.port());
    let (kind, text) = refusal(&text, Session::Database).await;
    assert_eq!(kind, Kind::Unavailable);
    assert!(text.contains("ALTER ROLE \"limited\" CONNECTION LIMIT"), "{text}");

    let mut connection = replicate(&server).await;
    let identity = connection.identify_system().await.unwrap();
    let elsewhere = TimelineId::try_from(99).unwrap();
    let started = connection.start_replication(None, identity.flushed_end_lsn, elsewhere).await;
    let error = match started {
        Ok(mut stream) => stream.next().await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(error.kind(), Kind::Conflict, "{error:?}");

    let hidden = server.data().join("hidden");
    std::fs::write(&hidden, "x").unwrap();
    std::process::Command::new("chmod").args(["0000"]).arg(&hidden).status().unwrap();
    let options =
        BaseBackupOptions { checkpoint: CheckpointMode::Fast, ..BaseBackupOptions::default() };
    let mut backup = replicate(&server).await.base_backup(&options).await.unwrap();
    let error = loop {
        if let Err(error) = backup.next().await {
            break error;
        }
    };
    assert_eq!(error.kind(), Kind::Denied, "{error:?}");
    assert!(error.hint_text().unwrap().contains("may not read that file"), "{error:?}");
}

#[tokio::test]
async fn passwords_by_md5_and_from_a_file_are_accepted() {
    if Binaries::of_this_run().major() >= 19 {
        return;
    }
    let settings = Settings::default()
        .conf("password_encryption = 'md5'")
        .hba("local all postgres trust")
        .hba("host all postgres 127.0.0.1/32 trust")
        .hba("host all all 127.0.0.1/32 md5")
        .hba("host replication all 127.0.0.1/32 md5");
    let server = Postgres::start(&Binaries::of_this_run(), &settings);
    server.psql("create role m login replication password 'a:b\\c'");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pass");
    write_private(&file, "127.0.0.1:*:replication:m:a\\:b\\\\c\n");
    let text = format!("host=127.0.0.1 port={} user=m", server.port());
    let mut connection = connect(&format!("{text} passfile={}", file.display())).await.unwrap();
    connection.identify_system().await.unwrap();
    let wrong = refusal(&format!("{text} password=s3cret"), Session::Physical).await;
    assert_eq!(wrong.0, Kind::Denied);
}

#[tokio::test]
async fn wal_level_minimal_says_what_to_change() {
    let settings = Settings::default().conf("wal_level = minimal").conf("max_wal_senders = 0");
    let server = Postgres::start(&Binaries::of_this_run(), &settings);
    let (_, text) = refusal(&server.conninfo(), Session::Physical).await;
    assert!(text.contains("wal_level = replica"), "{text}");
}

#[tokio::test]
async fn unix_sockets_are_used_and_their_owner_checked() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let text = format!("host={} port={} user=postgres", server.home().display(), server.port());
    // TLS is never asked for on a Unix socket, whatever sslmode says, as with libpq.
    connect(&format!("{text} sslmode=require")).await.unwrap();
    let (kind, _) = refusal(&format!("{text} requirepeer=daemon"), Session::Physical).await;
    assert_eq!(kind, Kind::Denied);
    let (kind, found) = refusal("host=/nonexistent user=postgres", Session::Physical).await;
    assert_eq!(kind, Kind::Unavailable);
    assert!(found.contains("/nonexistent/.s.PGSQL.5432"), "{found}");
}

#[tokio::test]
async fn a_quiet_server_is_asked_for_a_sign_of_life_and_a_dead_one_given_up() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let limit = Duration::from_secs(2);
    let patient = options(&server.conninfo()).with_read_timeout(limit);
    let mut connection =
        Connection::connect(&patient, Session::Physical, &Clock::system()).await.unwrap();
    let identity = connection.identify_system().await.unwrap();
    let mut stream = connection
        .start_replication(None, identity.flushed_end_lsn, identity.timeline)
        .await
        .unwrap();
    let quiet = async {
        loop {
            stream.next().await.unwrap();
        }
    };
    assert!(tokio::time::timeout(limit * 3, quiet).await.is_err(), "the stream ended");
    let walsender: u32 = server.psql("select pid from pg_stat_replication").parse().unwrap();
    crate::harness::postgres::send_signal(walsender, "STOP");
    let ends = async {
        loop {
            if let Err(error) = stream.next().await {
                break error;
            }
        }
    };
    let error = tokio::time::timeout(Duration::from_secs(60), ends).await.unwrap();
    crate::harness::postgres::send_signal(walsender, "CONT");
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.message().contains("silent"), "{error}");
}

#[tokio::test]
async fn a_server_that_shuts_down_sends_everything_first() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let mut connection = replicate(&server).await;
    let identity = connection.identify_system().await.unwrap();
    let start = identity.flushed_end_lsn.align_down(8192);
    let mut stream = connection.start_replication(None, start, identity.timeline).await.unwrap();
    server.psql("create table t as select generate_series(1, 100000) n");
    let stopping = std::thread::spawn(move || {
        server.stop(Stop::Fast);
        server
    });
    let mut at = start;
    let error = loop {
        match stream.next().await {
            Ok(WalEvent::Wal { start_lsn, data, .. }) => {
                at = start_lsn.checked_add(data.len() as u64).unwrap();
            }
            Ok(WalEvent::Keepalive { reply_requested: true, .. }) => {
                let status = StandbyStatus {
                    written_end_lsn: at,
                    durable_end_lsn: at,
                    ..StandbyStatus::default()
                };
                stream.send_status(status).await.unwrap();
            }
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    println!("{error:?}");
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.message().contains("shutting down"), "{error}");
    let server = stopping.join().unwrap();
    server.run();
    let checkpoint: Lsn =
        server.psql("select checkpoint_lsn from pg_control_checkpoint()").parse().unwrap();
    assert!(at > checkpoint, "received up to {at}, the checkpoint is at {checkpoint}");
}

#[tokio::test]
async fn queries_answer_rows_and_survive_errors_and_dropped_futures() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let clock = Clock::system();
    let mut connection =
        Connection::connect(&options(&server.conninfo()), Session::Database, &clock).await.unwrap();
    let rows = connection.query("select n, null from generate_series(1, 3) n").await.unwrap();
    assert_eq!(rows.len(), 3);
    assert_eq!((rows[2].parse::<u8>(0).unwrap(), rows[2].get(1).unwrap()), (3, None));
    assert!(connection.query("select nope").await.is_err());
    let slow = connection.query("select pg_sleep(0.3), 'stale'");
    assert!(tokio::time::timeout(Duration::from_millis(50), slow).await.is_err());
    assert_eq!(connection.query_one("select 'fresh'").await.unwrap().text(0).unwrap(), "fresh");
    assert_eq!(connection.show("search_path").await.unwrap(), "");
    assert_eq!(connection.parameter("application_name"), Some("wire-test"));
    assert_eq!(connection.version().major(), server.binaries().major());
}

/// Certificates of a small authority, as files of the server or ours.
struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    pem: String,
}

impl Authority {
    fn new(name: &str) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: rcgen::Issuer::new(params, key), pem }
    }

    /// Certificate and key, for a common name and alternative names.
    fn issue(&self, common_name: &str, names: &[&str]) -> (String, String) {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, common_name);
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

fn write_private(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// A server with TLS on, and the folder of our own files.
fn tls_server(authority: &Authority, certificate: &(String, String)) -> Postgres {
    let settings = Settings::default()
        .conf("password_encryption = 'scram-sha-256'")
        .hba("local all postgres trust")
        .hba("host all postgres 127.0.0.1/32 trust")
        .hba("hostssl replication scram 127.0.0.1/32 scram-sha-256")
        .hba("hostssl replication cert 127.0.0.1/32 cert")
        .hba("hostnossl replication plain 127.0.0.1/32 trust");
    let server = Postgres::start(&Binaries::of_this_run(), &settings);
    for role in ["scram", "cert", "plain"] {
        server.psql(&format!("create role {role} login replication password 's3cret-{role}'"));
    }
    install_certificate(&server, authority, certificate);
    server.psql("alter system set ssl = on");
    server.psql("select pg_reload_conf()");
    wait_for_tls(&server);
    server
}

fn install_certificate(server: &Postgres, authority: &Authority, certificate: &(String, String)) {
    for (name, text) in
        [("server.crt", &certificate.0), ("server.key", &certificate.1), ("ca.crt", &authority.pem)]
    {
        let path = server.data().join(name);
        write_private(&path, text);
        Account::current().give(&path);
    }
    server.psql("alter system set ssl_ca_file = 'ca.crt'");
}

fn wait_for_tls(server: &Postgres) {
    for _ in 0..100 {
        if server.psql("show ssl") == "on" {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{}", server.log_tail());
}

#[tokio::test]
async fn every_sslmode_demands_what_libpq_demands() {
    let authority = Authority::new("tidemark test authority");
    let stranger = Authority::new("another authority");
    let certificate = authority.issue("db.example.org", &["localhost", "db.example.org"]);
    let server = tls_server(&authority, &certificate);
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        write_private(&path, text);
        path.display().to_string()
    };
    let root = file("root.crt", &authority.pem);
    let strange = file("strange.crt", &stranger.pem);
    let at = format!("hostaddr=127.0.0.1 port={} user=scram password=s3cret-scram", server.port());
    let try_with = async |extra: String| connect(&format!("{at} {extra}")).await.map(|_| ());

    for (extra, accepted) in [
        ("host=wrong sslmode=prefer".to_owned(), true),
        ("host=wrong sslmode=allow".to_owned(), true),
        ("host=wrong sslmode=require".to_owned(), true),
        ("host=wrong sslmode=disable".to_owned(), false),
        (format!("host=wrong sslmode=require sslrootcert={root}"), true),
        (format!("host=wrong sslmode=require sslrootcert={strange}"), false),
        (format!("host=wrong sslmode=verify-ca sslrootcert={root}"), true),
        (format!("host=wrong sslmode=verify-ca sslrootcert={strange}"), false),
        (format!("host=wrong sslmode=verify-full sslrootcert={root}"), false),
        (format!("host=db.example.org sslmode=verify-full sslrootcert={root}"), true),
        (format!("host=localhost sslmode=verify-full sslrootcert={root} sslsni=0"), true),
        (format!("host=localhost sslmode=verify-full sslrootcert={strange}"), false),
        ("host=localhost sslmode=verify-full sslrootcert=system".to_owned(), false),
        ("host=localhost sslmode=verify-ca".to_owned(), false),
        ("host=localhost sslmode=require channel_binding=require".to_owned(), true),
        ("host=localhost sslmode=require channel_binding=disable".to_owned(), true),
        ("host=localhost sslmode=require ssl_max_protocol_version=TLSv1.2 channel_binding=require".to_owned(), true),
        ("host=localhost sslmode=require require_auth=scram-sha-256".to_owned(), true),
    ] {
        let result = try_with(extra.clone()).await;
        println!("{extra}: {result:?}");
        assert_eq!(result.is_ok(), accepted, "{extra}: {result:?}");
    }
    // With 'prefer' a certificate that is not trusted means no TLS, with libpq as with us.
    let plain = format!("hostaddr=127.0.0.1 port={} user=plain", server.port());
    connect(&format!("{plain} sslmode=prefer")).await.unwrap();
    connect(&format!("{plain} sslmode=allow")).await.unwrap();
    assert!(connect(&format!("{plain} sslmode=require")).await.is_err());
    connect(&format!("{plain} sslmode=prefer sslrootcert={strange}")).await.unwrap();

    let direct = try_with("sslmode=require sslnegotiation=direct".to_owned()).await;
    assert_eq!(direct.is_ok(), server.binaries().major() >= 17, "{direct:?}");

    let (cert, key) = authority.issue("cert", &[]);
    let (cert, key) = (file("client.crt", &cert), file("client.key", &key));
    let at = format!("hostaddr=127.0.0.1 port={} user=cert sslmode=require", server.port());
    connect(&format!("{at} sslcert={cert} sslkey={key}")).await.unwrap();
    connect(&format!("{at} sslcert={cert} sslkey={key} sslcertmode=require")).await.unwrap();
    assert!(
        connect(&format!("{at} sslcert={cert} sslkey={key} sslcertmode=disable")).await.is_err()
    );
    let (kind, text) = refusal(&at, Session::Physical).await;
    assert_eq!(kind, Kind::Denied);
    assert!(text.contains("name one with sslcert"), "{text}");
    let (other, other_key) = stranger.issue("cert", &[]);
    let (other, other_key) = (file("other.crt", &other), file("other.key", &other_key));
    let text = format!("{at} sslcert={other} sslkey={other_key}");
    assert_eq!(refusal(&text, Session::Physical).await.0, Kind::Denied);
    std::process::Command::new("chmod").args(["0644", &key]).status().unwrap();
    let open = connect(&format!("{at} sslcert={cert} sslkey={key}")).await.unwrap_err();
    assert!(open.message().contains("may be read by others"), "{open:?}");
}

#[tokio::test]
async fn certificates_as_postgresqls_manual_makes_them_are_trusted() {
    // openssl req -new -x509 -nodes: self-signed, its own authority, a common name and nothing else.
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "db.example.org");
    let pem = params.self_signed(&key).unwrap().pem();
    let authority = Authority::new("unused");
    let server = tls_server(&authority, &(pem.clone(), key.serialize_pem()));
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root.crt");
    write_private(&root, &pem);
    let at = format!(
        "hostaddr=127.0.0.1 port={} user=scram password=s3cret-scram sslmode=verify-full \
         sslrootcert={}",
        server.port(),
        root.display()
    );
    connect(&format!("{at} host=db.example.org channel_binding=require")).await.unwrap();
    assert!(connect(&format!("{at} host=other.example.org")).await.is_err());
}

#[tokio::test]
async fn certificates_without_extensions_encrypt_and_say_who_we_are() {
    // Made by openssl x509 -req before its version 3.2, as PostgreSQL's manual has it: of X.509 version 1.
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/x509_v1");
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let read = |name: &str| std::fs::read_to_string(kept.join(name)).unwrap();
    for name in ["root.crt", "client.crt", "client.key"] {
        write_private(&at(name), &read(name));
    }
    let authority = Authority { pem: read("root.crt"), ..Authority::new("unused") };
    let server = tls_server(&authority, &(read("server.crt"), read("server.key")));
    let text = format!("hostaddr=127.0.0.1 port={} user", server.port());
    for version in ["TLSv1.2", "TLSv1.3"] {
        let version = format!("ssl_max_protocol_version={version}");
        let scram = format!("{text}=scram password=s3cret-scram {version}");
        for more in ["sslmode=prefer", "sslmode=require channel_binding=require"] {
            connect(&format!("{scram} {more}")).await.unwrap();
        }
        let root = at("root.crt").display().to_string();
        let verify = format!("{scram} host=db.example.org sslmode=verify-full sslrootcert={root}");
        let (kind, found) = refusal(&verify, Session::Physical).await;
        assert_eq!(kind, Kind::Denied);
        assert!(found.contains("X.509 version 1") && found.contains("Reissue it"), "{found}");
        let (cert, key) = (at("client.crt"), at("client.key"));
        let (cert, key) = (cert.display(), key.display());
        connect(&format!("{text}=cert sslmode=require sslcert={cert} sslkey={key} {version}"))
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn psql_and_we_agree_on_connection_strings() {
    let server = Postgres::start(&Binaries::of_this_run(), &Settings::default());
    let (port, home) = (server.port(), server.home().display().to_string());
    let encoded = home.replace('/', "%2F");
    let texts = [
        format!(
            "host=127.0.0.1 port={port} user=postgres dbname=postgres application_name='a b\\'c'"
        ),
        format!("postgresql://postgres@127.0.0.1:{port}/postgres?application_name=a%20b"),
        format!("postgres://postgres@{encoded}:{port}/postgres?application_name=x%3Dy"),
        format!("postgresql:///postgres?host={home}&port={port}&user=postgres&application_name=q"),
        format!("postgresql://postgres@nonexistent.invalid:1,127.0.0.1:{port}/postgres"),
        format!(
            "host=127.0.0.1 port={port} user=postgres dbname=postgres options='-c work_mem=5MB -c statement_timeout=3s'"
        ),
        format!(
            "host=127.0.0.1 hostaddr=127.0.0.1 port=' {port} ' user = postgres dbname= postgres"
        ),
    ];
    let sql = "select concat_ws('|', current_user, current_database(), \
               current_setting('application_name'), current_setting('work_mem'), \
               current_setting('statement_timeout'), inet_server_port())";
    for text in texts {
        let mut psql = server.binaries().client("psql");
        let answer = psql.args(["-X", "-A", "-t", "-c", sql, "-d", &text]).output().unwrap();
        assert!(answer.status.success(), "{text}: {}", String::from_utf8_lossy(&answer.stderr));
        let theirs = String::from_utf8_lossy(&answer.stdout).trim().replace("|psql|", "||");
        let env = |_: &str| None;
        let options = ConnectOptions::parse(&text, &env).unwrap();
        let mut connection =
            Connection::connect(&options, Session::Database, &Clock::system()).await.unwrap();
        let ours = connection.query_one(sql).await.unwrap().text(0).unwrap().to_owned();
        assert_eq!(ours, theirs, "{text}");
    }
}
