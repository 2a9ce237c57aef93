//! What all peers share: one PostgreSQL with the data set, and certificates for the S3 servers.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::harness::{Account, Binaries, Postgres, Settings};
use crate::report::Report;
use crate::s3::Certificates;
use crate::{Options, processes};

/// The server and its surroundings; all of it is gone when dropped.
#[derive(Debug)]
pub struct Stage {
    /// The server that is backed up.
    pub postgres: Postgres,
    /// For the S3 servers.
    pub certificates: Certificates,
    /// What a tool may run in parallel.
    pub jobs: u32,
}

impl Stage {
    /// Makes the server and fills it.
    pub fn build(options: &Options, report: &mut Report) -> Self {
        processes::adopt_daemons();
        let binaries = Binaries::of_this_run();
        report.version("PostgreSQL", &binaries.major().to_string());
        let settings = Settings::default()
            .conf("archive_mode = on")
            .conf("archive_command = 'true'")
            .conf("shared_buffers = 512MB")
            .conf("max_wal_size = 4GB")
            .conf("checkpoint_timeout = 30min")
            .conf("autovacuum = off");
        let began = Instant::now();
        let postgres = Postgres::start(&binaries, &settings);
        postgres.psql("create extension pgcrypto");
        let pgbench = |words: &[&str]| {
            let mut command = postgres.binaries().client("pgbench");
            command.args(["-h", "127.0.0.1", "-U", "postgres", "-p"]);
            command.arg(postgres.port().to_string()).args(words).arg("postgres");
            let done = command.output().unwrap();
            assert!(done.status.success(), "pgbench: {}", String::from_utf8_lossy(&done.stderr));
        };
        pgbench(&["-i", "-q", "-I", "dtGvp", "-s", &options.scale.to_string()]);
        // Rows of random bytes: nothing makes them smaller. JSON as applications write it.
        let noise_rows = u64::from(options.noise_mib) << 10;
        postgres.psql(&format!(
            "create table noise as select g as id, gen_random_bytes(1000) as body \
             from generate_series(1, {noise_rows}) g"
        ));
        postgres.psql(&format!("create table events as {}", json_rows(noise_rows / 3)));
        postgres.psql("create index on events ((body ->> 'user'))");
        // A history: pages that were changed, dead rows, indexes that were split.
        pgbench(&["-n", "-T", "20", "-c", "4", "-j", "2"]);
        postgres.psql("checkpoint");
        let size = "select sum(pg_database_size(oid)) from pg_database";
        let data_bytes = postgres.psql(size).parse().unwrap();
        println!(
            "data set: {:.2} GiB, made in {:.0} s",
            data_bytes as f64 / f64::from(1 << 30),
            began.elapsed().as_secs_f64()
        );
        let certificates = Certificates::make(postgres.home());
        report.data_set(data_bytes, options);
        Self { postgres, certificates, jobs: options.jobs }
    }

    /// A folder for everything else.
    pub fn home(&self) -> &Path {
        self.postgres.home()
    }

    /// Deletes a folder of ours.
    pub fn delete(&self, name: &Path) {
        assert!(name.starts_with(self.home()));
        let _ = std::fs::remove_dir_all(name);
    }

    /// Sets `archive_command` and waits until the archiver has it.
    pub fn archive_with(&self, command: &str, timeout_s: u32) {
        let command = if command.is_empty() { "true" } else { command };
        self.postgres.psql(&format!("alter system set archive_command = '{command}'"));
        self.segment_at_least_every(timeout_s);
        std::thread::sleep(Duration::from_millis(500));
    }

    /// Sets `archive_timeout`, which counts without an `archive_command` as well; 0 is never.
    pub fn segment_at_least_every(&self, timeout_s: u32) {
        self.postgres.psql(&format!("alter system set archive_timeout = {timeout_s}"));
        self.postgres.psql("select pg_reload_conf()");
    }

    /// Removes the slots that peers left.
    pub fn drop_slots(&self) {
        let drop =
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots where not active";
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.postgres.psql("select count(*) from pg_replication_slots") != "0" {
            self.postgres.psql(drop);
            assert!(Instant::now() < deadline, "a replication slot stays in use");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// A folder for a restore that does not exist yet.
    pub fn new_target(&self) -> std::path::PathBuf {
        let parent = Account::current().make_dir(self.home(), "restored");
        parent.join("data")
    }
}

/// SQL for so many rows of JSON as applications write it: names, identifiers, times, amounts.
fn json_rows(rows: u64) -> String {
    format!(
        "select g as id, jsonb_build_object('user', 'user-' || (random() * 50000)::int, \
         'session', md5(random()::text), 'at', now() - random() * interval '300 days', \
         'amount', round((random() * 1000)::numeric, 2), 'action', \
         (array['view', 'click', 'purchase', 'refund', 'login'])[1 + (random() * 4)::int], \
         'tags', jsonb_build_array('tag-' || g % 17, 'tag-' || g % 101), \
         'note', repeat(md5(g::text), 2) || ' ' || md5(random()::text)) as body \
         from generate_series(1, {rows}) g"
    )
}
