//! Point-in-time recovery against the truth: a busy server is streamed into S3, and restored to many
//! targets; each restored cluster is compared with what the server held at that moment, row for row.

use std::collections::BTreeMap;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use crate::harness::postgres::{Stop, send_signal};
use crate::harness::{Account, Binaries, Postgres, S3, Settings, Tidemark};

/// What identifies one moment for `tidemark restore`, and what the cluster held then.
struct Moment {
    arguments: Vec<String>,
    truth: BTreeMap<String, String>,
}

/// A server under load whose writers can be stopped for a moment, so that its contents can be read.
struct Busy {
    server: Postgres,
    pgbench: Child,
    round: u32,
    moments: u32,
}

impl Busy {
    fn start(binaries: &Binaries) -> Self {
        let settings = Settings::default().conf("track_commit_timestamp = on");
        let server = Postgres::start(binaries, &settings);
        let space = Account::current().make_dir(server.home(), "space");
        server.psql(&format!("create tablespace side location '{}'", space.display()));
        server.psql(
            "create table side_table (id serial primary key, body text) tablespace side;
             create table pgbench_like_log (id bigserial primary key, at timestamptz default now());
             create extension if not exists amcheck",
        );
        let made = server
            .binaries()
            .client("pgbench")
            .args(["-i", "-q", "-s", "1", "-h", "127.0.0.1", "-U", "postgres", "-p"])
            .args([&server.port().to_string(), "postgres"])
            .output()
            .unwrap();
        assert!(made.status.success(), "pgbench: {}", String::from_utf8_lossy(&made.stderr));
        let pgbench = server
            .binaries()
            .client("pgbench")
            .args(["-n", "-c", "4", "-j", "2", "-T", "3600", "-R", "200"])
            .args(["-h", "127.0.0.1", "-U", "postgres", "-p"])
            .args([&server.port().to_string(), "postgres"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { server, pgbench, round: 0, moments: 0 }
    }

    /// DDL, large objects, both tablespaces, prepared transactions: one round of each.
    fn change_much(&mut self) {
        self.round += 1;
        let n = self.round;
        self.server.psql(&format!(
            "create table ddl_{n} as select g as id, md5(g::text) as body from generate_series(1, 500) g;
             create index on ddl_{n} (body);
             insert into side_table (body) select repeat(md5(g::text), 20) from generate_series(1, 200) g;
             delete from side_table where id % 7 = {n} % 7;
             select lo_from_bytea(0, decode(repeat(md5('{n}'), 3000), 'hex'))"
        ));
        if n.is_multiple_of(3) {
            self.server.psql(&format!(
                "drop table ddl_{}; truncate pgbench_like_log; alter table ddl_{n} add column more int default 7",
                n - 1
            ));
        }
        self.server.psql(&format!(
            "begin; insert into side_table (body) values ('prepared {n}'); prepare transaction 'p{n}'"
        ));
        if n > 1 {
            let verb = if n.is_multiple_of(2) { "commit" } else { "rollback" };
            self.server.psql(&format!("{verb} prepared 'p{}'", n - 1));
        }
        if n.is_multiple_of(4) {
            self.server.psql("checkpoint");
        }
        if n.is_multiple_of(5) {
            self.server.psql(&format!("vacuum full ddl_{n}"));
        }
    }

    /// Stops the writers, names this moment in one of the four ways, reads everything, goes on.
    fn moment(&mut self, kind: u32) -> Moment {
        let pid = self.pgbench.id();
        let deadline = Instant::now() + Duration::from_secs(60);
        send_signal(pid, "STOP");
        let moment = loop {
            if let Some(moment) = self.try_moment(kind) {
                break moment;
            }
            assert!(Instant::now() < deadline, "the writers do not stop");
        };
        self.server.psql("insert into pgbench_like_log default values");
        send_signal(pid, "CONT");
        moment
    }

    /// `None` when a writer's transaction ended between the moment and the reading: what a writer sent
    /// before it was stopped may be read by its backend at any time after.
    fn try_moment(&mut self, kind: u32) -> Option<Moment> {
        // A statement that was on its way ends on the server by itself, or waits for a row that a stopped
        // writer has locked; wait until nothing else runs.
        let deadline = Instant::now() + Duration::from_secs(10);
        let active = "select count(*) from pg_stat_activity where backend_type = 'client backend' \
                      and state = 'active' and wait_event_type is distinct from 'Lock' \
                      and pid <> pg_backend_pid()";
        while self.server.psql(active) != "0" {
            assert!(Instant::now() < deadline, "the writers do not stop");
            std::thread::sleep(Duration::from_millis(20));
        }
        let open = "select string_agg(backend_xid::text, ',' order by pid) from pg_stat_activity \
                    where backend_type = 'client backend' and application_name = 'pgbench'";
        let open_before = self.server.psql(open);
        let xid = self.server.psql(
            "insert into pgbench_like_log default values; \
             select xmin from pgbench_like_log order by id desc limit 1",
        );
        self.moments += 1;
        let name = format!("moment-{}", self.moments);
        let arguments: Vec<String> = match kind % 4 {
            0 => {
                std::thread::sleep(Duration::from_millis(5));
                let time = self.server.psql("select clock_timestamp()");
                // Something that must not be in the restore.
                vec!["--to-time".into(), time]
            }
            1 => vec!["--to-xid".into(), xid],
            2 => {
                self.server.psql(&format!("select pg_create_restore_point('{name}')"));
                vec!["--to-name".into(), name]
            }
            _ => vec!["--to-lsn".into(), self.server.psql("select pg_current_wal_insert_lsn()")],
        };
        let truth = contents(&self.server);
        (self.server.psql(open) == open_before).then_some(Moment { arguments, truth })
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        send_signal(self.pgbench.id(), "CONT");
        let _ = self.pgbench.kill();
        let _ = self.pgbench.wait();
    }
}

/// Every user table's rows (as a hash of all of them in order, and their number), large objects,
/// prepared transactions, and the schema.
fn contents(server: &Postgres) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let schema = "select string_agg(c.relname || ' ' || c.relkind::text || ' ' || c.relnatts || ' ' || \
                  coalesce(t.spcname, '-'), ', ' order by c.relname) from pg_class c \
                  left join pg_tablespace t on t.oid = c.reltablespace \
                  where c.relnamespace = 'public'::regnamespace";
    found.insert("schema".into(), server.psql(schema));
    let tables = "select relname from pg_class where relkind = 'r' \
                  and relnamespace = 'public'::regnamespace order by 1";
    for table in server.psql(tables).lines() {
        let rows = format!(
            "select count(*) || ' ' || coalesce(md5(string_agg(r::text, E'\\n' order by r::text)), '') \
             from \"{table}\" r"
        );
        found.insert(format!("table {table}"), server.psql(&rows));
    }
    let objects = "select count(*) || ' ' || coalesce(md5(string_agg(loid || ':' || pageno || ':' || \
                   encode(data, 'hex'), ',' order by loid, pageno)), '') from pg_largeobject";
    found.insert("large objects".into(), server.psql(objects));
    let prepared = "select coalesce(string_agg(gid, ',' order by gid), '') from pg_prepared_xacts";
    found.insert("prepared transactions".into(), server.psql(prepared));
    found
}

/// Restores `moment` and compares. The restored server is checked by PostgreSQL's own tools as well.
fn check(tidemark: &Tidemark, binaries: &Binaries, number: usize, moment: &Moment) {
    let target = tidemark.new_target(&format!("restore-{number}"));
    let space = target.parent().unwrap().join("side");
    let source = moment.truth.get("space").cloned();
    let mut arguments = vec!["restore".to_owned(), "--into".into(), target.display().to_string()];
    arguments.extend(moment.arguments.iter().cloned());
    if let Some(source) = source {
        arguments.push("--tablespace".into());
        arguments.push(format!("{source}={}", space.display()));
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    tidemark.run(&arguments).ok();
    if binaries.brings("pg_verifybackup", "on a restore") {
        let checked = binaries
            .command("pg_verifybackup")
            .args(["-n", "-e", "-q", "-i", "postgresql.auto.conf", "-i", "recovery.signal"])
            .arg(&target)
            .output()
            .unwrap();
        let words = String::from_utf8_lossy(&checked.stderr).into_owned();
        assert!(checked.status.success(), "{:?}: pg_verifybackup: {words}", moment.arguments);
    }
    let restored = Postgres::adopt(binaries, &target);
    restored.run();
    let deadline = Instant::now() + Duration::from_secs(120);
    while restored.psql("select pg_is_in_recovery()") != "f" {
        assert!(Instant::now() < deadline, "{:?}: {}", moment.arguments, restored.log_tail());
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut found = contents(&restored);
    if let Some(space) = moment.truth.get("space") {
        found.insert("space".into(), space.clone());
    }
    assert_eq!(found, moment.truth, "{:?}\n{}", moment.arguments, restored.log_tail());
    if binaries.brings("pg_amcheck", "on a restore") {
        let checked = binaries
            .command("pg_amcheck")
            .args([
                "-h",
                "127.0.0.1",
                "-U",
                "postgres",
                "-p",
                &restored.port().to_string(),
                "postgres",
            ])
            .output()
            .unwrap();
        assert!(
            checked.status.success(),
            "pg_amcheck: {}",
            String::from_utf8_lossy(&checked.stdout)
        );
    }
    restored.stop(Stop::Fast);
    if binaries.brings("pg_checksums", "on a restore") {
        let checked =
            binaries.command("pg_checksums").args(["--check", "-D"]).arg(&target).output().unwrap();
        assert!(
            checked.status.success(),
            "pg_checksums: {}",
            String::from_utf8_lossy(&checked.stdout)
        );
    }
    std::fs::remove_dir_all(target.parent().unwrap()).unwrap();
}

#[test]
fn every_chosen_moment_comes_back_row_for_row() {
    let count: usize =
        std::env::var("TIDEMARK_TEST_TARGETS").map_or(20, |text| text.parse().unwrap());
    let binaries = Binaries::of_this_run();
    let s3 = S3::start();
    let tidemark = s3.tidemark("backups/prefix");
    let mut busy = Busy::start(&binaries);
    let conninfo = busy.server.conninfo();
    let mut stream = tidemark.spawn(&["stream", "--postgres", &conninfo]);
    busy.server.wait_for_stream();
    tidemark.run(&["backup", "--postgres", &conninfo, "--checkpoint", "fast"]).ok();

    let space = busy.server.home().join("space").display().to_string();
    let mut moments = Vec::new();
    for number in 0..count {
        busy.change_much();
        let mut moment = busy.moment(u32::try_from(number).unwrap());
        moment.truth.insert("space".into(), space.clone());
        moments.push(moment);
        if number == count / 2 {
            tidemark.run(&["backup", "--postgres", &conninfo, "--checkpoint", "fast"]).ok();
        }
    }
    // Everything asked for must be in the repository before the source goes away.
    assert!(stream.is_running(), "{}", stream.log());
    assert_eq!(stream.terminate(), Some(0));
    drop(busy);

    let listed = tidemark.run(&["list", "--json"]).ok().json();
    assert_eq!(listed["gaps"].as_array().map(Vec::len), Some(0), "{listed:#}");
    tidemark.run(&["verify"]).ok();
    for (number, moment) in moments.iter().enumerate() {
        check(&tidemark, &binaries, number, moment);
    }
}
