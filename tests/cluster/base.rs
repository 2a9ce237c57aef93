//! Base backups of real servers: what is stored is what the server holds, and nothing half-done is
//! ever visible.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tidemark::capture::base::{
    self, BackupReport, Base, BaseOptions, PageChecksums, Progress, WalStreaming,
    pages::{self, Rechecked},
};
use tidemark::clock::Clock;
use tidemark::error::{Kind, Result};
use tidemark::pg::backup_label::BackupFrom;
use tidemark::pg::{Lsn, LsnRange, SegmentSize, SystemId, TimelineId};
use tidemark::pipeline::{Budget, Level, Worker};
use tidemark::repo::marks::{Barrier, put_barrier};
use tidemark::repo::{
    BackupId, Check, ChecksumFailure, EntryKind, FrameBatch, LeaseOptions, Manifest, PackName,
    PackOptions,
};
use tidemark::restore::Target;
use tidemark::store::Store;
use tidemark::store::memory::{Call, Outcome};
use tidemark::wire::{CheckpointMode, ConnectOptions};
use tokio_util::sync::CancellationToken;

use super::restore;
use super::stream::{Place, Running, connect_options, never_idle, settings, wal_end};
use crate::harness::proxy::{Fault, Proxy};
use crate::harness::{Account, Binaries, Postgres, Settings};

fn options() -> BaseOptions {
    BaseOptions {
        label: "a 'test'".into(),
        checkpoint: CheckpointMode::Fast,
        rate_max_kib: None,
        page_checksums: PageChecksums::Warn,
        pack: PackOptions {
            budget: Budget::backup(128 << 20, 2, Level::default()),
            level: Level::default(),
            pack_bytes: 64 << 20,
        },
        wal_stall_max: Duration::from_secs(60),
    }
}

fn alone(place: &Place, server: &Postgres) -> Base {
    let mut lease = LeaseOptions::new("backup");
    lease.ttl = Duration::from_secs(10);
    Base {
        options: options(),
        postgres: connect_options(server),
        writer: place.writer.clone(),
        wal: WalStreaming::Elsewhere(Box::new((never_idle(place.stream(server)).options, lease))),
        progress: Arc::new(Progress::new()),
    }
}

async fn take(base: &Base) -> Result<BackupReport> {
    base::backup(base, &CancellationToken::new()).await
}

/// Every file of a backup, by path.
async fn files(place: &Place, manifest: &Manifest) -> BTreeMap<String, Vec<u8>> {
    let reader = place.repository.reader(Vec::new());
    let backup = manifest.public.id;
    let mut files = BTreeMap::new();
    let mut worker = Worker::new(Level::default()).unwrap();
    for summary in &manifest.packs {
        let pack = reader.pack(PackName { backup, number: summary.number }).await.unwrap();
        let footer = reader.pack_footer(&pack, summary.stored_bytes, summary.footer).await.unwrap();
        for entry in &footer.entries {
            if let EntryKind::File { size_bytes, .. } = &entry.kind {
                let file: &mut Vec<u8> = files.entry(entry.path.to_string()).or_default();
                file.resize(*size_bytes as usize, 0);
            }
        }
        for batch in FrameBatch::plan(&footer, 4 << 20, |_| true) {
            let fetched = reader.fetch(&pack, batch).await.unwrap();
            fetched
                .open(&footer, Check::Hashes, &mut worker, |frame, plain| {
                    let mut at = 0;
                    for span in &frame.spans {
                        let path = footer.entries[span.entry as usize].path.to_string();
                        let (from, len) = (span.file_offset as usize, span.bytes as usize);
                        let file = files.get_mut(&path).unwrap();
                        file[from..from + len].copy_from_slice(&plain[at..at + len]);
                        at += len;
                    }
                    Ok(())
                })
                .unwrap();
        }
    }
    files
}

/// Compares the files of a backup with a data folder that has not changed since, and returns how many
/// were compared.
fn compare(files: &BTreeMap<String, Vec<u8>>, data: &Path) -> usize {
    let differs = ["backup_label", "tablespace_map", "global/pg_control"];
    let mut compared = 0;
    for (path, content) in files {
        if differs.contains(&path.as_str()) || path.starts_with("pg_stat") {
            continue;
        }
        let truth =
            std::fs::read(data.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
        assert!(&truth == content, "{path} differs: {} and {} bytes", truth.len(), content.len());
        compared += 1;
    }
    compared
}

fn fill(server: &Postgres, rows: u32) {
    server.psql(&format!(
        "create table t (id bigserial primary key, body text);
         insert into t (body) select repeat(md5(i::text), 30) from generate_series(1, {rows}) i;
         analyze t"
    ));
}

async fn stored_names(place: &Place, prefix: &str) -> Vec<String> {
    let objects = place.memory.list_all(prefix).await.unwrap();
    objects.into_iter().map(|object| object.name.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn alone_on_a_silent_database_it_completes_and_holds_every_file() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings().conf("autovacuum = off"));
    fill(&server, 3000);
    let location = Account::current().make_dir(server.home(), "space");
    server.psql(&format!("create tablespace space location '{}'", location.display()));
    server.psql("create table far tablespace space as select * from t");
    server.psql("checkpoint");
    let place = Place::of(&server).await;
    let base = alone(&place, &server);
    let report = take(&base).await.unwrap();
    assert_eq!(report.from, BackupFrom::Primary);
    let manifest = &report.manifest;
    assert_eq!(manifest.public.checksum_failure_count, 0);
    assert_eq!(manifest.tablespaces.len(), 1);
    assert_eq!(manifest.tablespaces[0].location, location.display().to_string());
    assert_eq!(manifest.settings["max_connections"], "100");

    // The slot vanishes with its connection, and what is listed can be restored.
    server.wait_for("select count(*) from pg_replication_slots", "0");
    let catalog = place.catalog().await;
    assert_eq!(catalog.backups.len(), 1);
    let public = &manifest.public;
    let needed = tidemark::pg::LsnRange::new(public.start_lsn, public.end_lsn).unwrap();
    catalog.wal.cover(public.timeline, needed).unwrap();
    place.check_wal(&[&server]).await;

    let files = files(&place, manifest).await;
    server.psql("checkpoint");
    let compared = compare(&files, server.data());
    assert!(compared > 900, "{compared} files");
    let oid = server.psql("select oid from pg_tablespace where spcname = 'space'");
    assert!(files.keys().any(|path| path.starts_with(&format!("pg_tblspc/{oid}/PG_"))));
    for path in ["backup_label", "tablespace_map", "global/pg_control", "PG_VERSION"] {
        assert!(files.contains_key(path), "{path}");
    }
    let progress = base.progress.snapshot();
    assert_eq!(progress.file_count, files.len() as u64);
    assert_eq!(progress.id, Some(public.id));
}

/// As after a reboot without that file system: the link is there, and the server sends an empty archive.
#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_whose_directory_is_missing_fails_the_backup() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings().conf("autovacuum = off"));
    let location = Account::current().make_dir(server.home(), "space");
    server.psql(&format!("create tablespace space location '{}'", location.display()));
    server.psql("create table far tablespace space as select 1 as one");
    server.psql("checkpoint");
    let oid = server.psql("select oid from pg_tablespace where spcname = 'space'");
    let place = Place::of(&server).await;
    let away = location.with_extension("away");
    std::fs::rename(&location, &away).unwrap();
    let error = take(&alone(&place, &server)).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(error.message().contains(&format!("unable to back up tablespace {oid}")), "{error}");
    assert!(error.message().contains(&location.display().to_string()), "{error}");
    assert!(error.hint_text().unwrap().contains("Mount its file system"), "{error}");
    assert!(stored_names(&place, "main/base/").await.is_empty());

    std::fs::rename(&away, &location).unwrap();
    let report = take(&alone(&place, &server)).await.unwrap();
    assert!(files(&place, &report.manifest).await.keys().any(|path| path.contains(&oid)));

    // As after DROP TABLESPACE: a link, and no tablespace that it would be of.
    let none = Account::current().make_dir(server.home(), "none");
    std::os::unix::fs::symlink(none, server.data().join("pg_tblspc/4000000000")).unwrap();
    take(&alone(&place, &server)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_a_running_stream_it_leaves_the_wal_to_that() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    fill(&server, 2000);
    let place = Place::of(&server).await;
    let running = Running::start(place.stream(&server)).await;
    running.streaming().await;
    // As another process, which finds the lease taken.
    let report = take(&alone(&place, &server)).await.unwrap();
    assert_eq!(running.status.snapshot().gaps.len(), 0);
    // And in the same process.
    let wal = WalStreaming::InThisProcess(Arc::clone(&running.status));
    let again = take(&Base { wal, ..alone(&place, &server) }).await.unwrap();
    assert!(again.manifest.public.start_lsn > report.manifest.public.start_lsn);
    server.wait_for("select slot_name from pg_replication_slots", "tidemark");
    running.stop().await.unwrap();
    assert_eq!(place.catalog().await.backups.len(), 2);
    assert_eq!(place.check_wal(&[&server]).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_taken_from_a_standby_that_is_asked_to_flush() {
    let primary = Postgres::start(&Binaries::of_this_run(), &settings());
    fill(&primary, 1000);
    let standby = primary.standby();
    primary.psql("insert into t (body) values ('later')");
    let end = wal_end(&primary);
    while standby.psql("select pg_last_wal_replay_lsn()").parse::<tidemark::pg::Lsn>().unwrap()
        < end
    {
        std::thread::sleep(Duration::from_millis(50));
    }
    primary.psql("checkpoint");
    let place = Place::of(&primary).await;
    let report = take(&alone(&place, &standby)).await.unwrap();
    assert_eq!(report.from, BackupFrom::Standby);
    place.check_wal(&[&standby]).await;
}

/// The hint leads to a backup behind the damage, and damage that lies behind the end of one is none of its.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_whose_restartpoint_is_in_damaged_wal_is_backed_up_as_the_hint_says() {
    let primary = Postgres::start(&Binaries::of_this_run(), &settings());
    fill(&primary, 1000);
    let standby = primary.standby();
    let replay = || {
        let end = wal_end(&primary);
        standby.wait_for(&format!("select pg_last_wal_replay_lsn() >= '{end}'"), "t");
        end
    };
    primary.psql("checkpoint");
    let segment = SegmentSize::new(1 << 20).unwrap();
    let damaged_end = segment.end_of(replay());
    let place = Place::of(&primary).await;
    let far = Lsn(damaged_end.0 + (1 << 30));
    for (start, end) in [(Lsn(1 << 20), damaged_end), (far, segment.end_of(far))] {
        let barrier = Barrier::damaged(LsnRange::new(start, end).unwrap());
        let repository = place.writer.repository();
        put_barrier(repository, TimelineId::FIRST, &barrier).await.unwrap();
    }
    let refused = take(&alone(&place, &standby)).await.unwrap_err();
    assert_eq!(refused.kind(), Kind::Conflict);
    let hint = refused.hint_text().unwrap();
    assert!(hint.contains(&format!("it must begin behind {damaged_end}")), "{hint}");
    primary.psql("select pg_switch_wal()");
    primary.psql("checkpoint");
    replay();
    standby.psql("checkpoint");
    let report = take(&alone(&place, &standby)).await.unwrap();
    assert!(report.manifest.public.start_lsn > damaged_end);
    assert_eq!(report.from, BackupFrom::Standby);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_whose_primary_fails_over_during_the_copy_is_backed_up_across_timelines() {
    let primary = Postgres::start(&Binaries::of_this_run(), &settings());
    fill(&primary, 20_000);
    let next = primary.standby();
    // It follows whoever is promoted, for it streams from that one.
    let standby = next.standby();
    let replayed = |end: Lsn| {
        standby.wait_for(&format!("select pg_last_wal_replay_lsn() >= '{end}'"), "t");
    };
    replayed(wal_end(&primary));
    let place = Place::of(&primary).await;
    let mut slow = alone(&place, &standby);
    slow.options.rate_max_kib = Some(8192);
    let mut progress = slow.progress.subscribe();
    let failing_over = async {
        progress.wait_for(|now| now.received_bytes > 4 << 20).await.unwrap();
        primary.stop(crate::harness::postgres::Stop::Fast);
        next.promote();
        next.psql("insert into t (body) select md5(i::text) from generate_series(1, 1000) i");
        replayed(wal_end(&next));
        // Writes pages out, and so moves the point that replay must reach onto the new timeline.
        standby.psql("checkpoint");
    };
    let (report, ()) = tokio::join!(take(&slow), failing_over);
    let manifest = report.unwrap().manifest;
    let public = &manifest.public;
    assert_eq!((public.timeline.get(), public.end_timeline.get()), (1, 2));
    place.check_wal(&[&standby]).await;
    let planned = restore::plan(&place, &restore::request(Target::Latest)).await.unwrap();
    assert_eq!((planned.backup.id, planned.timeline.get()), (public.id, 2));
    let folder = restore::Folder::new();
    restore::run(&place, &planned, &restore::options(&folder.data())).await.unwrap();
    assert_eq!(restore::rows(&Binaries::of_this_run(), &folder.data()).len(), 21_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_page_is_named_and_fails_the_backup_only_if_wanted() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    fill(&server, 3000);
    server.psql("checkpoint");
    let path = server.psql("select pg_relation_filepath('t')");
    server.stop(crate::harness::postgres::Stop::Fast);
    let file = server.data().join(&path);
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[3 * 8192 + 4000] ^= 0x10;
    std::fs::write(&file, bytes).unwrap();
    server.run();
    let place = Place::of(&server).await;
    let mut base = alone(&place, &server);
    base.options.page_checksums = PageChecksums::Fail;
    let error = take(&base).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.message().contains(&format!("block 3 of '{path}'")), "{error}");
    assert!(stored_names(&place, "main/base/").await.is_empty());

    let report = take(&alone(&place, &server)).await.unwrap();
    let failures = &report.manifest.checksum_failures;
    assert_eq!((failures.len(), failures[0].block, failures[0].path.clone()), (1, 3, path));
    assert_eq!(report.manifest.public.checksum_failure_count, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_was_copied_badly_is_forgiven_only_if_it_was_changed_since_or_is_gone() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    fill(&server, 3000);
    server.psql("create table gone as select * from t");
    server.psql("vacuum (freeze) t, gone");
    server.psql("checkpoint");
    let start_lsn: Lsn = server.psql("select pg_current_wal_insert_lsn()").parse().unwrap();
    let id = server.psql("select system_identifier from pg_control_system()");
    let (system_id, timeline) = (id.parse().unwrap(), TimelineId::FIRST);
    let origin = pages::Origin { system_id, timeline, start_lsn };
    let suspect = |relation: &str, fork: &str| ChecksumFailure {
        path: server.psql(&format!("select pg_relation_filepath('{relation}')")) + fork,
        block: 0,
        expected: 1,
        found: 2,
    };
    let (data, map) = (suspect("t", ""), suspect("t", "_vm"));
    let suspects = [data.clone(), map.clone(), suspect("gone", "")];
    server.psql("drop table gone");
    server.psql("checkpoint");
    let (postgres, clock) = (connect_options(&server), Clock::system());
    let recheck = || pages::recheck(&suspects, &origin, &postgres, &clock);
    // It was never written since, so no replay mends what was copied, whatever that was.
    let damaged = Rechecked { damaged: vec![data], unread: Vec::new() };
    assert_eq!(recheck().await, damaged);
    server.psql("update t set body = '' where ctid = '(0,1)'");
    server.psql("checkpoint");
    assert_eq!(recheck().await, Rechecked::default());
}

/// A verdict is kept, and what breaks in between is tried again.
#[tokio::test(flavor = "multi_thread")]
async fn suspects_are_gone_on_with_when_the_connection_breaks_between_them() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    fill(&server, 3000);
    server.psql("vacuum (freeze) t");
    server.psql("checkpoint");
    let start_lsn: Lsn = server.psql("select pg_current_wal_insert_lsn()").parse().unwrap();
    let id = server.psql("select system_identifier from pg_control_system()");
    let (system_id, timeline) = (id.parse().unwrap(), TimelineId::FIRST);
    let origin = pages::Origin { system_id, timeline, start_lsn };
    let path = server.psql("select pg_relation_filepath('t')");
    let suspect = |block| ChecksumFailure { path: path.clone(), block, expected: 1, found: 2 };
    let suspects: Vec<ChecksumFailure> = (0..20).map(suspect).collect();
    server.psql("update t set body = reverse(body) where ctid >= '(4,1)' and ctid < '(5,1)'");
    server.psql("checkpoint");

    // About ten of these pages pass in hexadecimal before each reset.
    let proxy = Proxy::start(([127, 0, 0, 1], server.port()).into()).await;
    let text = format!(
        "host=127.0.0.1 port={} user=postgres dbname=postgres sslmode=disable",
        proxy.address().port()
    );
    let postgres = ConnectOptions::parse(&text, &|_| None).unwrap();
    let clock = Clock::system();
    proxy.set(Fault::ResetAfter(500 << 10));
    let known = pages::recheck(&suspects, &origin, &postgres, &clock).await;
    assert!(proxy.hits() > 0);
    assert_eq!(known.unread, []);
    assert_eq!(known.damaged.len(), 19);
    assert!(!known.damaged.contains(&suspects[4]));

    // One that never gets through leaves what is known, and says what is not.
    let few = &suspects[5..17];
    proxy.set(Fault::ResetAfter(60 << 10));
    let known = pages::recheck(few, &origin, &postgres, &clock).await;
    assert!(!known.damaged.is_empty() && !known.unread.is_empty(), "{known:?}");
    assert_eq!(known.damaged.len() + known.unread.len(), few.len());
}

/// Of several hosts another one may answer than the one that was copied: a file that it lacks says nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_is_forgiven_by_no_server_that_lacks_what_was_copied() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    fill(&server, 10);
    let standby = server.standby();
    server.psql("checkpoint");
    let start_lsn: Lsn = server.psql("select pg_current_wal_lsn()").parse().unwrap();
    standby.wait_for(&format!("select pg_last_wal_replay_lsn() >= '{start_lsn}'"), "t");
    let id = server.psql("select system_identifier from pg_control_system()");
    let (system_id, timeline): (SystemId, _) = (id.parse().unwrap(), TimelineId::FIRST);
    let origin = pages::Origin { system_id, timeline, start_lsn };
    let gone = ChecksumFailure { path: "base/1/987654".into(), block: 0, expected: 1, found: 2 };
    let suspects = [gone];
    let unread = Rechecked { damaged: Vec::new(), unread: suspects.to_vec() };
    let clock = Clock::system();
    let recheck = async |server: &Postgres, origin| {
        pages::recheck(&suspects, &origin, &connect_options(server), &clock).await
    };
    for host in [&server, &standby] {
        assert_eq!(recheck(host, origin).await, Rechecked::default());
        let ahead = Lsn(start_lsn.0 + (1 << 30));
        assert_eq!(recheck(host, pages::Origin { start_lsn: ahead, ..origin }).await, unread);
        let another = SystemId(system_id.0 ^ 1);
        assert_eq!(recheck(host, pages::Origin { system_id: another, ..origin }).await, unread);
    }
    let timeline = TimelineId::new(2).unwrap();
    assert_eq!(recheck(&server, pages::Origin { timeline, ..origin }).await, unread);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_fails_or_is_stopped_leaves_nothing_to_trip_over() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    fill(&server, 20_000);
    let place = Place::of(&server).await;

    let mut slow = alone(&place, &server);
    slow.options.rate_max_kib = Some(4096);
    let cancel = CancellationToken::new();
    let stopper = cancel.clone();
    let mut progress = slow.progress.subscribe();
    let stopping = tokio::spawn(async move {
        progress.wait_for(|now| now.received_bytes > 4 << 20).await.unwrap();
        stopper.cancel();
    });
    let error = base::backup(&slow, &cancel).await.unwrap_err();
    stopping.await.unwrap();
    assert_eq!(error.kind(), Kind::Cancelled);
    assert!(place.catalog().await.backups.is_empty());
    assert!(stored_names(&place, "main/base/").await.is_empty());

    place.memory.fail_next(Call::Part, Outcome::Denied);
    place.memory.fail_next(Call::Complete, Outcome::Denied);
    let mut parts = alone(&place, &server);
    parts.options.pack.budget.part_bytes = 256 << 10;
    assert!(take(&parts).await.is_err());
    assert!(place.catalog().await.backups.is_empty());

    let report = take(&alone(&place, &server)).await.unwrap();
    let listed: Vec<BackupId> =
        place.catalog().await.backups.iter().map(|backup| backup.manifest.id).collect();
    assert_eq!(listed, [report.manifest.public.id]);
    server.wait_for("select count(*) from pg_replication_slots", "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_goes_on_under_load_and_pages_written_meanwhile_are_no_damage() {
    let server = Postgres::start(
        &Binaries::of_this_run(),
        &Settings::default().conf("full_page_writes = on").conf("checkpoint_timeout = 30s"),
    );
    fill(&server, 40_000);
    let place = Place::of(&server).await;
    let stop = CancellationToken::new();
    let client = server.client().await;
    let writing = tokio::spawn({
        let stop = stop.clone();
        async move {
            let mut count = 0;
            while !stop.is_cancelled() {
                let sql =
                    "update t set body = md5(random()::text) || body where id % 97 = 3; checkpoint";
                client.batch_execute(sql).await.unwrap();
                count += 1;
            }
            count
        }
    });
    let running = Running::start(place.stream(&server)).await;
    running.streaming().await;
    for _ in 0..3 {
        let report = take(&alone(&place, &server)).await.unwrap();
        assert_eq!(report.manifest.public.checksum_failure_count, 0);
    }
    stop.cancel();
    assert!(writing.await.unwrap() > 0);
    running.stop().await.unwrap();
}

fn slot_position(server: &Postgres) -> String {
    server.psql("select restart_lsn from pg_replication_slots where slot_name = 'tidemark'")
}

#[tokio::test(flavor = "multi_thread")]
async fn into_a_second_repository_it_leaves_slot_and_name_of_the_first_alone() {
    let logged = settings().conf("log_replication_commands = on").conf("log_line_prefix = '%a: '");
    let server = Postgres::start(&Binaries::of_this_run(), &logged);
    fill(&server, 1000);
    let (first, second) = (Place::of(&server).await, Place::of(&server).await);
    let running = Running::start(first.stream(&server)).await;
    running.durable(wal_end(&server)).await;

    // While the sidecar of the first streams by the slot, and as soon as it is stopped.
    take(&alone(&second, &server)).await.unwrap();
    running.stop().await.unwrap();
    let left_at = slot_position(&server);
    server.psql("insert into t (body) values ('only the slot keeps this for the first')");
    // The second of these finds the slot amidst what its own repository holds.
    for _ in 0..2 {
        take(&alone(&second, &server)).await.unwrap();
        assert_eq!(slot_position(&server), left_at);
    }
    server.wait_for("select count(*) from pg_replication_slots", "1");
    assert_eq!(second.catalog().await.backups.len(), 3);
    // Commits that wait for 'tidemark' wait for the first.
    let log = server.log();
    let streams = log.lines().filter(|line| line.contains("command: START_REPLICATION SLOT"));
    let (of_first, of_backups): (Vec<&str>, Vec<&str>) =
        streams.partition(|line| line.contains("SLOT \"tidemark\""));
    assert!(of_first.iter().all(|line| line.starts_with("tidemark: ")), "{of_first:#?}");
    assert_eq!(of_backups.len(), 3, "{of_backups:#?}");
    assert!(of_backups.iter().all(|line| line.starts_with("tidemark_backup: ")), "{of_backups:#?}");

    let running = Running::start(first.stream(&server)).await;
    server.psql("insert into t (body) values ('a commit is not kept waiting')");
    let now = running.durable(wal_end(&server)).await;
    assert!(now.gaps.is_empty(), "{:?}", now.gaps);
    running.stop().await.unwrap();
    let covered = first.check_wal(&[&server]).await;
    assert_eq!(covered.values().map(Vec::len).collect::<Vec<_>>(), [1], "{covered:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn between_two_lives_of_a_sidecar_it_stores_what_follows_and_moves_no_slot() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    fill(&server, 1000);
    let place = Place::of(&server).await;
    let running = Running::start(place.stream(&server)).await;
    running.durable(wal_end(&server)).await;
    running.stop().await.unwrap();
    let left_at = slot_position(&server);
    // Several segments, and a checkpoint behind them: a new slot begins after.
    for _ in 0..3 {
        server.psql(
            "insert into t (body) select repeat(md5(i::text), 30) from generate_series(1, 3000) i",
        );
        server.psql("checkpoint");
    }
    take(&alone(&place, &server)).await.unwrap();
    assert_eq!(slot_position(&server), left_at);
    let covered = place.check_wal(&[&server]).await;
    assert_eq!(covered.values().map(Vec::len).collect::<Vec<_>>(), [1], "{covered:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_keeps_nothing_keeps_nothing_after_it() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    server.psql("select pg_create_physical_replication_slot('tidemark')");
    let place = Place::of(&server).await;
    take(&alone(&place, &server)).await.unwrap();
    let slots = "select slot_name, temporary, restart_lsn is null from pg_replication_slots";
    server.wait_for(slots, "tidemark|f|t");
}

/// Begins a slow backup of its own process beside `running`, which ends in the middle of it.
async fn slow_backup_left_alone(
    place: &Place,
    server: &Postgres,
    running: Running,
    left: impl FnOnce(),
) -> Result<BackupReport> {
    let mut slow = alone(place, server);
    slow.options.rate_max_kib = Some(8192);
    slow.options.wal_stall_max = Duration::from_secs(600);
    let mut progress = slow.progress.subscribe();
    let leaving = async {
        progress.wait_for(|now| now.received_bytes > 4 << 20).await.unwrap();
        running.stop().await.unwrap();
        left();
    };
    let (taken, ()) = tokio::join!(take(&slow), leaving);
    taken
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_process_that_streams_ends_its_work_is_taken_over() {
    let server = Postgres::start(&Binaries::of_this_run(), &settings());
    fill(&server, 5000);
    let place = Place::of(&server).await;
    let running = Running::start(place.stream(&server)).await;
    running.streaming().await;
    let left = || fill_more(&server);
    let report = slow_backup_left_alone(&place, &server, running, left).await.unwrap();
    assert_eq!(place.catalog().await.backups[0].manifest.id, report.manifest.public.id);
    let covered = place.check_wal(&[&server]).await;
    assert_eq!(covered.values().map(Vec::len).collect::<Vec<_>>(), [1], "{covered:?}");
}

fn fill_more(server: &Postgres) {
    server.psql(
        "insert into t (body) select repeat(md5(i::text), 30) from generate_series(1, 5000) i",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_server_has_removed_what_that_process_left_the_backup_fails_and_says_so() {
    let conf =
        Settings::default().segment_mib(1).conf("max_wal_size = 4MB").conf("min_wal_size = 2MB");
    let server = Postgres::start(&Binaries::of_this_run(), &conf);
    fill(&server, 5000);
    let place = Place::of(&server).await;
    let running = Running::start(place.stream(&server)).await;
    running.streaming().await;
    let left = || {
        server.psql("select pg_drop_replication_slot('tidemark')");
        for _ in 0..4 {
            fill_more(&server);
            server.psql("checkpoint");
        }
    };
    let error = slow_backup_left_alone(&place, &server, running, left).await.unwrap_err();
    assert!(error.message().contains("the base backup still needs is gone"), "{error}");
    assert!(place.catalog().await.backups.is_empty());
}
