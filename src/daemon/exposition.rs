//! The numbers of a running stream as a page that Prometheus reads.
//!
//! Written anew at every request from what the engine and the store keep anyway, so it costs nothing
//! in between.
//!
//! # Shape
//! The Prometheus text format, version 0.0.4: of each metric its help, its type and its samples, each
//! with the label `cluster`. Units are bytes and seconds.
//!
//! # Invariants
//! No secret is here: names of objects, addresses and texts of errors are left out.

use std::fmt::{Display, Write as _};
use std::time::Duration;

use jiff::Timestamp;

use crate::capture::stream::{Phase, Snapshot, Status};
use crate::metrics::Latency;
use crate::pg::Lsn;
use crate::repo::Repository;
use crate::store::{RequestCounts, Store};

/// Content type of the page.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Bounds of the histograms, in milliseconds: from an fsync of a good disk to an outage, close
/// together around the flush interval's second, which most commits wait for.
const BOUNDS_MS: [u64; 18] = [
    1, 2, 5, 10, 20, 50, 100, 200, 500, 750, 1000, 1500, 2000, 5000, 10_000, 30_000, 60_000,
    300_000,
];

/// The page about a stream into `repository`.
#[must_use]
pub fn page(status: &Status, repository: &Repository) -> String {
    let mut page = Page { text: String::new(), cluster: repository.cluster().to_string() };
    page.family("tidemark_build_info", Type::Gauge, "The version that runs; always 1.");
    page.sample("tidemark_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    let now = status.snapshot();
    page.stream(&now);
    page.positions(&now);
    page.slot(&now);
    page.histogram(
        "tidemark_commit_durable_seconds",
        "Time from a commit on the server, by its clock, until the repository held it.",
        status.latency(),
    );
    let store = &**repository.store();
    page.store(store, &store.requests());
    page.text
}

/// What a metric is.
#[derive(Clone, Copy, Debug)]
enum Type {
    Counter,
    Gauge,
    Histogram,
}

impl Type {
    fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// The text, growing.
struct Page {
    text: String,
    cluster: String,
}

impl Page {
    fn family(&mut self, name: &str, of_type: Type, help: &str) {
        let of_type = of_type.name();
        // Writing to a String cannot fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {of_type}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.text, "{name}{{cluster=\"{}\"", escaped(&self.cluster));
        for (label, text) in labels {
            let _ = write!(self.text, ",{label}=\"{}\"", escaped(text));
        }
        let _ = writeln!(self.text, "}} {value}");
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, Type::Counter, help);
        self.sample(name, &[], value);
    }

    /// A gauge, left out while there is no value.
    fn gauge(&mut self, name: &str, help: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            self.family(name, Type::Gauge, help);
            self.sample(name, &[], value);
        }
    }

    fn histogram(&mut self, name: &str, help: &str, latency: &Latency) {
        self.family(name, Type::Histogram, help);
        let buckets = latency.buckets(&BOUNDS_MS.map(Duration::from_millis));
        let bucket = format!("{name}_bucket");
        for (bound, count) in BOUNDS_MS.iter().zip(&buckets.counts) {
            let bound = Duration::from_millis(*bound).as_secs_f64().to_string();
            self.sample(&bucket, &[("le", bound.as_str())], count);
        }
        self.sample(&bucket, &[("le", "+Inf")], buckets.count);
        let sum = Duration::from_micros(buckets.sum_us).as_secs_f64();
        self.sample(&format!("{name}_sum"), &[], sum);
        self.sample(&format!("{name}_count"), &[], buckets.count);
    }

    fn stream(&mut self, now: &Snapshot) {
        let phases = [
            (Phase::Connecting, "connecting"),
            (Phase::Streaming, "streaming"),
            (Phase::WaitingForRepository, "waiting-for-repository"),
            (Phase::Stopping, "stopping"),
            (Phase::Stopped, "stopped"),
        ];
        let name = "tidemark_stream_phase";
        self.family(name, Type::Gauge, "1 for what the stream is doing, 0 for what it is not.");
        for (phase, text) in phases {
            self.sample(name, &[("phase", text)], u8::from(now.phase == phase));
        }
        self.gauge(
            "tidemark_stream_synchronous",
            "Whether commits on the server wait for this stream, while there is a connection.",
            now.is_connected().then_some(u8::from(now.synchronous)),
        );
        self.counter(
            "tidemark_stream_connections_total",
            "Times the connection to the server was made.",
            now.connection_count,
        );
        self.gauge(
            "tidemark_server_failing",
            "Whether there is no connection to the server because of an error.",
            Some(u8::from(now.server_error.is_some())),
        );
        self.gauge(
            "tidemark_repository_failing",
            "Whether the repository does not take WAL because of an error.",
            Some(u8::from(now.repository_error.is_some())),
        );
        self.gauge(
            "tidemark_wal_gaps",
            "Gaps in the WAL that this process has found or made.",
            Some(now.gaps.len()),
        );
        self.gauge(
            "tidemark_base_backup_needed",
            "Whether no base backup leads to what is streamed now, so that a new one is needed.",
            Some(u8::from(now.base_backup_needed)),
        );
        self.gauge(
            "tidemark_base_backup_newest_start_timestamp_seconds",
            "When the newest base backup that can be restored was begun, as far as this process knows.",
            now.newest_base_backup_start.map(seconds),
        );
        self.counter(
            "tidemark_base_backup_failures_total",
            "Base backups by schedule that failed.",
            now.base_backup_failure_count,
        );
        self.counter(
            "tidemark_upkeep_failures_total",
            "Runs of expiring or sweeping that failed or were refused a deletion.",
            now.upkeep_failure_count,
        );
    }

    fn positions(&mut self, now: &Snapshot) {
        self.gauge(
            "tidemark_wal_lag_bytes",
            "WAL that the server has and the repository does not hold, while there is a connection.",
            now.is_connected().then(|| now.lag_bytes()),
        );
        let name = "tidemark_wal_position_bytes";
        self.family(name, Type::Gauge, "Positions in the WAL, each the end of what is there.");
        for (place, lsn) in [
            ("server", now.is_connected().then_some(now.server_end_lsn)),
            ("received", Some(now.received_end_lsn)),
            ("durable", Some(now.durable_end_lsn)),
            ("acknowledged", Some(now.acknowledged_end_lsn)),
        ] {
            if let Some(lsn) = lsn.filter(|lsn| *lsn != Lsn::INVALID) {
                self.sample(name, &[("place", place)], lsn.0);
            }
        }
        self.gauge(
            "tidemark_wal_newest_durable_commit_timestamp_seconds",
            "When the newest commit that is durable was made, by the server's clock.",
            now.newest_durable_commit.and_then(|time| time.to_timestamp()).map(seconds),
        );
        self.gauge(
            "tidemark_wal_caught_up_timestamp_seconds",
            "When everything the server had was last seen durable.",
            now.all_stored_at.map(seconds),
        );
        self.gauge(
            "tidemark_wal_uploads_in_flight",
            "Sealed extents that the store does not hold yet.",
            Some(now.uploads_in_flight),
        );
        self.gauge(
            "tidemark_wal_unstored_bytes",
            "Sealed bytes held in memory until the store has them.",
            Some(now.unstored_bytes),
        );
        self.counter("tidemark_wal_extents_total", "WAL extents stored.", now.extent_count);
        self.counter("tidemark_wal_plain_bytes_total", "WAL stored.", now.plain_bytes);
        self.counter(
            "tidemark_wal_stored_bytes_total",
            "Bytes of the objects it is stored in.",
            now.stored_bytes,
        );
    }

    fn slot(&mut self, now: &Snapshot) {
        if !now.is_connected() {
            return;
        }
        if let Some(state) = &now.slot.wal_status {
            let name = "tidemark_slot_wal_status";
            self.family(name, Type::Gauge, "The slot's wal_status as the server shows it.");
            self.sample(name, &[("state", state)], 1);
        }
        self.gauge(
            "tidemark_slot_safe_wal_bytes",
            "WAL that may still be written before the slot is at risk.",
            now.slot.safe_wal_bytes,
        );
    }

    fn store(&mut self, store: &dyn Store, counts: &RequestCounts) {
        let latencies = store.latencies();
        self.histogram(
            "tidemark_store_upload_seconds",
            "Time to put an object, or a part of one, with all tries.",
            &latencies.upload,
        );
        self.histogram(
            "tidemark_store_fsync_seconds",
            "Time of an fsync, of a store in a directory.",
            &latencies.fsync,
        );
        let name = "tidemark_store_requests_total";
        self.family(name, Type::Counter, "Requests made to the store, tries that failed included.");
        for (kind, count) in [
            ("put", counts.puts),
            ("multipart_begin", counts.multipart_begins),
            ("part", counts.parts),
            ("multipart_complete", counts.multipart_completes),
            ("multipart_abort", counts.multipart_aborts),
            ("get", counts.gets),
            ("head", counts.heads),
            ("list", counts.lists),
            ("delete", counts.deletes),
        ] {
            self.sample(name, &[("kind", kind)], count);
        }
        self.counter("tidemark_store_retries_total", "Tries beyond the first.", counts.retries);
        self.counter(
            "tidemark_store_throttled_total",
            "Answers of the store that asked to slow down.",
            counts.throttled,
        );
        self.counter(
            "tidemark_store_sent_bytes_total",
            "Bytes of bodies sent to the store, tries that failed included.",
            counts.sent_bytes,
        );
        self.counter(
            "tidemark_store_received_bytes_total",
            "Bytes of bodies received from the store.",
            counts.received_bytes,
        );
    }
}

fn seconds(time: Timestamp) -> f64 {
    time.as_duration().as_secs_f64()
}

/// The text as a label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bytes::Bytes;

    use super::*;
    use crate::clock::Clock;
    use crate::store::ObjectName;

    async fn repository() -> Repository {
        let clock = Clock::simulated("2026-01-01T00:00:00Z".parse().unwrap(), 1);
        Repository::in_memory(&clock).await.1
    }

    #[tokio::test]
    async fn a_page_has_each_metric_once_with_its_help_and_its_type() {
        let page = page(&Status::new(), &repository().await);
        let mut known: BTreeSet<&str> = BTreeSet::new();
        let mut current = "";
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(known.insert(name) && help.ends_with('.'), "{line}");
                current = name;
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                assert_eq!(rest.split_once(' ').unwrap().0, current, "{line}");
            } else {
                let (sample, value) = line.rsplit_once(' ').unwrap();
                assert!(sample.starts_with(current) && sample.contains("{cluster=\"main\""));
                assert!(value.parse::<f64>().is_ok(), "{line}");
            }
        }
        assert!(known.len() > 20 && page.ends_with('\n'));
    }

    #[tokio::test]
    async fn latencies_are_counted_by_bounds_that_add_up() {
        let (status, repository) = (Status::new(), repository().await);
        status.latency().record_all([600, 900, 400_000].map(Duration::from_millis));
        let name = ObjectName::new("a").unwrap();
        repository.store().put_if_absent(&name, Bytes::from_static(b"x")).await.unwrap();
        let page = page(&status, &repository);
        let has = |line: &str| assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        has("tidemark_commit_durable_seconds_bucket{cluster=\"main\",le=\"0.5\"} 0");
        has("tidemark_commit_durable_seconds_bucket{cluster=\"main\",le=\"0.75\"} 1");
        has("tidemark_commit_durable_seconds_bucket{cluster=\"main\",le=\"300\"} 2");
        has("tidemark_commit_durable_seconds_bucket{cluster=\"main\",le=\"+Inf\"} 3");
        has("tidemark_commit_durable_seconds_count{cluster=\"main\"} 3");
        has("tidemark_store_upload_seconds_bucket{cluster=\"main\",le=\"+Inf\"} 2");
    }

    #[tokio::test]
    async fn nothing_is_said_of_a_server_that_is_not_connected() {
        let (status, repository) = (Status::new(), repository().await);
        let of_server =
            ["tidemark_wal_lag_bytes{", "place=\"server\"", "tidemark_slot_safe_wal_bytes{"];
        let said = |status: &Status| {
            let page = page(status, &repository);
            of_server.map(|sample| page.contains(sample))
        };
        status.update(|now| {
            (now.server_end_lsn, now.durable_end_lsn) = (Lsn(900), Lsn(800));
            now.slot.safe_wal_bytes = Some(5);
        });
        assert_eq!(said(&status), [false; 3]);
        status.update(|now| now.phase = Phase::Streaming);
        assert_eq!(said(&status), [true; 3]);
        status.update(|now| {
            now.phase = Phase::Connecting;
            now.server_error = Some("it is away".into());
        });
        assert_eq!(said(&status), [false; 3]);
    }

    #[test]
    fn labels_are_escaped() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
