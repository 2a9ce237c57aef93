//! One suite of promises for every store: memory, directory, S3 by minis3 (signed over http, unsigned
//! over TLS, CRC-64), and any S3 named by the environment.
//!
//! For the last: `TIDEMARK_TEST_S3_URL=s3://bucket/prefix`, and if it is not AWS
//! `TIDEMARK_TEST_S3_ENDPOINT` and `TIDEMARK_TEST_S3_REGION`; credentials by the standard chain. The
//! suite writes below a prefix of its own and removes what it wrote.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use tidemark::clock::Clock;
use tidemark::error::Kind;
use tidemark::store::{self, Checksum, ObjectName, PutOutcome, Replace, Store, StoreOptions};

use crate::s3_server;

/// A store to hold to the promises, and what must live as long as it.
struct Place {
    name: &'static str,
    store: Arc<dyn Store>,
    /// Below here nothing else writes.
    folder: String,
    _keep: Box<dyn std::any::Any>,
}

impl Place {
    fn name(&self, text: &str) -> ObjectName {
        ObjectName::new(format!("{}{text}", self.folder)).unwrap()
    }

    async fn read(&self, text: &str) -> Bytes {
        self.store.get(&self.name(text), None).await.unwrap()
    }

    async fn put(&self, text: &str, body: &'static str) -> PutOutcome {
        let body = Bytes::from_static(body.as_bytes());
        self.store.put_if_absent(&self.name(text), body).await.unwrap()
    }
}

/// Every place there is.
async fn places() -> Vec<Place> {
    let clock = Clock::system();
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}", folder.path().join("repository").display());
    let mut places = vec![
        place("memory", store::open("memory:", &StoreOptions::default(), &clock).unwrap(), ()),
        place("directory", store::open(&url, &StoreOptions::default(), &clock).unwrap(), folder),
    ];
    let server = s3_server::memory();
    let store = s3_server::open(&server, "some/prefix");
    places.push(place("minis3", store, server));
    let server = s3_server::memory();
    let crc64 = StoreOptions { checksum: Checksum::Crc64Nvme, ..s3_server::options(&server) };
    let store = store::open("s3://tidemark", &crc64, &clock).unwrap();
    places.push(place("minis3 with crc64nvme", store, server));
    let folder = tempfile::tempdir().unwrap();
    let (server, ca_file) = s3_server::tls(folder.path());
    let tls = StoreOptions { ca_file: Some(ca_file), ..s3_server::options(&server) };
    let store = store::open("s3://tidemark/tls", &tls, &clock).unwrap();
    places.push(place("minis3 over TLS, in a folder", store, (server, folder)));
    if let Ok(url) = std::env::var("TIDEMARK_TEST_S3_URL") {
        let options = StoreOptions {
            endpoint: std::env::var("TIDEMARK_TEST_S3_ENDPOINT").ok(),
            region: std::env::var("TIDEMARK_TEST_S3_REGION").ok(),
            ..StoreOptions::default()
        };
        places.push(place("environment", store::open(&url, &options, &clock).unwrap(), ()));
    }
    places
}

fn place(name: &'static str, store: Arc<dyn Store>, keep: impl std::any::Any) -> Place {
    let random = u64::from_le_bytes(Clock::system().random().unwrap());
    Place { name, store, folder: format!("contract-{random:016x}/"), _keep: Box::new(keep) }
}

/// Runs a promise against every place and cleans up behind it.
async fn everywhere(promise: impl AsyncFn(&Place)) {
    for place in places().await {
        eprintln!("{}", place.name);
        promise(&place).await;
        let left = place.store.list_all(&place.folder).await.unwrap();
        let left: Vec<ObjectName> = left.into_iter().map(|object| object.name).collect();
        place.store.delete(&left).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_put_is_read_back_whole_and_by_range() {
    everywhere(async |place| {
        assert_eq!(place.put("a/b", "0123456789").await, PutOutcome::Created);
        let name = place.name("a/b");
        assert_eq!(place.read("a/b").await.as_ref(), b"0123456789");
        for (range, expected) in
            [(0..10, "0123456789"), (3..4, "3"), (7..10, "789"), (0..1, "0"), (4..4, "")]
        {
            let got = place.store.get(&name, Some(range)).await.unwrap();
            assert_eq!(got.as_ref(), expected.as_bytes());
        }
        let info = place.store.head(&name).await.unwrap().unwrap();
        assert_eq!((info.name, info.size_bytes), (name, 10));
        let age = Clock::system().now().duration_since(info.modified.unwrap());
        assert!(age.abs() < jiff::SignedDuration::from_mins(5), "{age}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_is_read_in_pieces_of_any_size() {
    everywhere(async |place| {
        place.put("a", "0123456789").await;
        let name = place.name("a");
        let mut reading = place.store.read(&name, 1..9).await.unwrap();
        for expected in ["12", "", "3", "45678"] {
            assert_eq!(reading.next(expected.len()).await.unwrap(), expected);
        }
        let mut reading = place.store.read(&name, 1..9).await.unwrap();
        assert_eq!(reading.next(9).await.unwrap_err().kind(), Kind::Bug);
        assert!(place.store.read(&name, 4..4).await.unwrap().next(0).await.unwrap().is_empty());
        for (name, range, kind) in [("a", 5..11, Kind::Corrupt), ("nowhere", 0..6, Kind::NotFound)]
        {
            let name = place.name(name);
            let read = async { place.store.read(&name, range).await?.next(6).await };
            assert_eq!(read.await.unwrap_err().kind(), kind);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_object_is_an_object() {
    everywhere(async |place| {
        assert_eq!(place.put("empty", "").await, PutOutcome::Created);
        assert_eq!(place.put("empty", "x").await, PutOutcome::AlreadyThere);
        assert!(place.read("empty").await.is_empty());
        assert_eq!(place.store.head(&place.name("empty")).await.unwrap().unwrap().size_bytes, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_beyond_the_end_is_an_error_not_a_short_answer() {
    everywhere(async |place| {
        place.put("short", "0123456789").await;
        for range in [5..11, 10..11, 20..30] {
            let error = place.store.get(&place.name("short"), Some(range)).await.unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "{error}");
            assert!(error.to_string().contains("has only 10"), "{error}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_exist_is_not_found() {
    everywhere(async |place| {
        let name = place.name("nowhere/at-all");
        for range in [None, Some(0..1), Some(0..0)] {
            let error = place.store.get(&name, range).await.unwrap_err();
            assert_eq!(error.kind(), Kind::NotFound, "{error}");
            assert!(error.to_string().contains("nowhere/at-all"), "{error}");
        }
        assert_eq!(place.store.head(&name).await.unwrap(), None);
        assert_eq!(place.store.read_versioned(&name).await.unwrap(), None);
        assert!(place.store.list_all(&place.folder).await.unwrap().is_empty());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_won_once_and_keeps_what_the_winner_wrote() {
    everywhere(async |place| {
        assert_eq!(place.put("once", "first").await, PutOutcome::Created);
        assert_eq!(place.put("once", "second").await, PutOutcome::AlreadyThere);
        assert_eq!(place.put("once", "first").await, PutOutcome::AlreadyThere);
        assert_eq!(place.read("once").await.as_ref(), b"first");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_sixteen_rivals_for_a_name_one_wins() {
    everywhere(async |place| {
        for round in 0..4 {
            let name = place.name(&format!("race-{round}"));
            let bodies: Vec<Bytes> =
                (0..16).map(|rival| Bytes::from(format!("rival {rival}").repeat(1000))).collect();
            let puts = bodies.iter().map(|body| place.store.put_if_absent(&name, body.clone()));
            let outcomes: Vec<PutOutcome> =
                join_all(puts).await.into_iter().map(Result::unwrap).collect();
            let winners: Vec<usize> =
                (0..16).filter(|rival| outcomes[*rival] == PutOutcome::Created).collect();
            assert_eq!(winners.len(), 1, "{outcomes:?}");
            assert_eq!(place.store.get(&name, None).await.unwrap(), bodies[winners[0]]);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replacement_happens_only_if_nothing_changed() {
    everywhere(async |place| {
        let name = place.name("lease");
        let body = |text: &str| Bytes::copy_from_slice(text.as_bytes());
        let Replace::Done(first) = place.store.replace_if(&name, body("1"), None).await.unwrap()
        else {
            panic!("nothing was there")
        };
        let lost = place.store.replace_if(&name, body("2"), None).await.unwrap();
        assert_eq!(lost, Replace::Lost);
        let (found, tag) = place.store.read_versioned(&name).await.unwrap().unwrap();
        assert_eq!((found, &tag), (body("1"), &first));
        let done = place.store.replace_if(&name, body("3"), Some(first.clone())).await.unwrap();
        let Replace::Done(second) = done else { panic!("{done:?}") };
        let lost = place.store.replace_if(&name, body("4"), Some(first)).await.unwrap();
        assert_eq!(lost, Replace::Lost);
        let (found, tag) = place.store.read_versioned(&name).await.unwrap().unwrap();
        assert_eq!((found, &tag), (body("3"), &second));
        place.store.delete(std::slice::from_ref(&name)).await.unwrap();
        let lost = place.store.replace_if(&name, body("5"), Some(second)).await.unwrap();
        assert_eq!(lost, Replace::Lost, "what is gone cannot be as expected");
        assert_eq!(place.store.read_versioned(&name).await.unwrap(), None);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_sixteen_rivals_that_replace_one_wins() {
    everywhere(async |place| {
        let name = place.name("lease");
        let mut tag = None;
        for round in 0..4 {
            let bodies: Vec<Bytes> =
                (0..16).map(|rival| Bytes::from(format!("round {round} rival {rival}"))).collect();
            let replaces =
                bodies.iter().map(|body| place.store.replace_if(&name, body.clone(), tag.clone()));
            let outcomes: Vec<Replace> =
                join_all(replaces).await.into_iter().map(Result::unwrap).collect();
            let winners: Vec<usize> =
                (0..16).filter(|rival| matches!(outcomes[*rival], Replace::Done(_))).collect();
            assert_eq!(winners.len(), 1, "{outcomes:?}");
            let (found, now) = place.store.read_versioned(&name).await.unwrap().unwrap();
            assert_eq!(found, bodies[winners[0]]);
            assert_eq!(outcomes[winners[0]], Replace::Done(now.clone()));
            tag = Some(now);
        }
    })
    .await;
}

/// Parts of unequal sizes, the last one small; each byte tells its part and place.
fn parts() -> Vec<Bytes> {
    let sizes = [(5 << 20) + 1, 6 << 20, 5 << 20, 7_654_321, 17];
    sizes
        .iter()
        .enumerate()
        .map(|(part, size)| {
            let bytes: Vec<u8> = (0..*size).map(|at: usize| (at / 7 + part * 31) as u8).collect();
            Bytes::from(bytes)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_any_size_in_any_order_make_one_object() {
    let parts = parts();
    let whole: Vec<u8> = parts.concat();
    everywhere(async |place| {
        for (index, order) in [[1, 2, 3, 4, 5], [5, 3, 4, 1, 2], [2, 1, 5, 4, 3]].iter().enumerate()
        {
            let name = place.name(&format!("parts-{index}"));
            let upload = place.store.begin_multipart(&name).await.unwrap();
            let puts = order.iter().map(|number| {
                let body = parts[*number as usize - 1].clone();
                upload.put_part(*number, body)
            });
            join_all(puts).await.into_iter().for_each(Result::unwrap);
            assert_eq!(place.store.head(&name).await.unwrap(), None, "invisible until complete");
            assert_eq!(upload.complete().await.unwrap(), PutOutcome::Created);
            let got = place.store.get(&name, None).await.unwrap();
            assert!(got == whole, "{}: order {order:?}", place.name);
            let range = (5 << 20) - 10..(5 << 20) + 100;
            let got = place.store.get(&name, Some(range.clone())).await.unwrap();
            assert_eq!(got.as_ref(), &whole[range.start as usize..range.end as usize]);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_put_one_after_the_other_out_of_order_make_one_object() {
    let parts = parts();
    let whole: Vec<u8> = parts.concat();
    everywhere(async |place| {
        let name = place.name("parts");
        let upload = place.store.begin_multipart(&name).await.unwrap();
        for number in [4, 2, 5, 1, 3] {
            upload.put_part(number, parts[number as usize - 1].clone()).await.unwrap();
        }
        assert_eq!(upload.complete().await.unwrap(), PutOutcome::Created);
        assert!(place.store.get(&name, None).await.unwrap() == whole, "{}", place.name);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_in_parts_does_not_replace_an_object() {
    everywhere(async |place| {
        let name = place.name("taken");
        let uploads = [
            place.store.begin_multipart(&name).await.unwrap(),
            place.store.begin_multipart(&name).await.unwrap(),
        ];
        for (index, upload) in uploads.iter().enumerate() {
            upload.put_part(1, Bytes::from(format!("upload {index}"))).await.unwrap();
        }
        assert_eq!(uploads[1].complete().await.unwrap(), PutOutcome::Created);
        assert_eq!(uploads[0].complete().await.unwrap(), PutOutcome::AlreadyThere);
        assert_eq!(place.read("taken").await.as_ref(), b"upload 1");
        assert_eq!(place.put("taken", "put").await, PutOutcome::AlreadyThere);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_upload_leaves_nothing() {
    everywhere(async |place| {
        let name = place.name("aborted");
        let upload = place.store.begin_multipart(&name).await.unwrap();
        upload.put_part(1, Bytes::from_static(b"x")).await.unwrap();
        upload.abort().await.unwrap();
        upload.abort().await.unwrap();
        assert!(upload.complete().await.is_err());
        assert_eq!(place.store.head(&name).await.unwrap(), None);
        assert!(place.store.list_all(&place.folder).await.unwrap().is_empty());
        assert_eq!(place.put("aborted", "x").await, PutOutcome::Created);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_part_is_refused() {
    everywhere(async |place| {
        let upload = place.store.begin_multipart(&place.name("hole")).await.unwrap();
        upload.put_part(1, Bytes::from(vec![1; 5 << 20])).await.unwrap();
        upload.put_part(3, Bytes::from_static(b"x")).await.unwrap();
        let error = upload.complete().await.unwrap_err();
        assert_eq!(error.kind(), Kind::Bug, "{error}");
        assert!(upload.put_part(0, Bytes::new()).await.is_err());
        assert!(upload.put_part(10_001, Bytes::new()).await.is_err());
        let _ = upload.abort().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_uploads_are_swept_and_young_ones_are_not() {
    everywhere(async |place| {
        let upload = place.store.begin_multipart(&place.name("young")).await.unwrap();
        upload.put_part(1, Bytes::from_static(b"x")).await.unwrap();
        let hour = Duration::from_secs(3600);
        assert_eq!(place.store.abort_stale_multiparts(&place.folder, hour).await.unwrap(), 0);
        assert_eq!(upload.complete().await.unwrap(), PutOutcome::Created);
        let upload = place.store.begin_multipart(&place.name("stale")).await.unwrap();
        upload.put_part(1, Bytes::from_static(b"x")).await.unwrap();
        let swept =
            place.store.abort_stale_multiparts(&place.folder, Duration::ZERO).await.unwrap();
        // A directory knows that the upload's owner, we, is alive.
        if place.name == "directory" {
            assert_eq!(swept, 0);
            upload.abort().await.unwrap();
        } else {
            assert_eq!(swept, 1);
            assert!(upload.complete().await.is_err());
        }
        assert_eq!(place.store.head(&place.name("stale")).await.unwrap(), None);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stale_uploads_are_swept_in_one_folder_and_not_in_those_whose_names_go_on() {
    everywhere(async |place| {
        for text in ["main/a", "main-2/a"] {
            let upload = place.store.begin_multipart(&place.name(text)).await.unwrap();
            upload.put_part(1, Bytes::from_static(b"x")).await.unwrap();
        }
        let sweep = async |text: &str| {
            let folder = format!("{}{text}", place.folder);
            place.store.abort_stale_multiparts(&folder, Duration::ZERO).await.unwrap()
        };
        // A directory's unfinished files went with their owners.
        let expected = if place.name == "directory" { [0, 0] } else { [1, 1] };
        assert_eq!([sweep("main").await, sweep("main-2/").await], expected, "{}", place.name);
        assert_eq!(sweep("").await, 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_are_complete_ordered_and_bounded() {
    everywhere(async |place| {
        let mut names: BTreeSet<String> = BTreeSet::new();
        for index in 0..2345 {
            names.insert(format!("{}wal/{index:08}", place.folder));
        }
        for other in ["base/x/manifest", "base/x/pack-1", "base-x", "wal.history", "wam", "a/b/c/d"]
        {
            names.insert(format!("{}{other}", place.folder));
        }
        let all: Vec<ObjectName> =
            names.iter().map(|name| ObjectName::new(name.clone()).unwrap()).collect();
        for batch in all.chunks(64) {
            let puts = batch.iter().map(|name| place.store.put_if_absent(name, Bytes::new()));
            join_all(puts)
                .await
                .into_iter()
                .for_each(|put| assert_eq!(put.unwrap(), PutOutcome::Created));
        }
        let listed = place.store.list_all(&place.folder).await.unwrap();
        let listed: Vec<String> =
            listed.into_iter().map(|object| object.name.to_string()).collect();
        assert!(listed.iter().eq(names.iter()), "{}", place.name);

        let below = |prefix: &str| {
            let prefix = format!("{}{prefix}", place.folder);
            names.iter().filter(|name| name.starts_with(&prefix)).count()
        };
        for prefix in [
            "wal/",
            "wal",
            "wal/0000",
            "base/",
            "base/x/pack",
            "base",
            "a/",
            "none/",
            "wal/00000007",
        ] {
            let listed = place.store.list_all(&format!("{}{prefix}", place.folder)).await.unwrap();
            assert_eq!(listed.len(), below(prefix), "{}: {prefix}", place.name);
        }

        let mut after = None;
        loop {
            let page = place.store.list(&place.folder, after.as_ref()).await.unwrap();
            let page_names = page.objects.iter().map(|object| &object.name);
            let in_order: Vec<&ObjectName> = after.iter().chain(page_names).collect();
            assert!(in_order.is_sorted_by(|a, b| a < b), "{}: each page goes on", place.name);
            assert!(!(page.more && page.objects.is_empty()), "{}", place.name);
            after = page.next_after().unwrap();
            if after.is_none() {
                break;
            }
        }

        let after = place.name("wal/00002000");
        let prefix = format!("{}wal/", place.folder);
        let page = place.store.list(&prefix, Some(&after)).await.unwrap();
        assert_eq!(page.objects.len(), 344);
        assert!(!page.more);
        assert_eq!(page.objects[0].name, place.name("wal/00002001"));
        let page = place.store.list(&prefix, Some(&place.name("wam"))).await.unwrap();
        assert!(page.objects.is_empty() && !page.more);
        let page = place.store.list(&prefix, Some(&place.name("base-x"))).await.unwrap();
        assert_eq!(page.objects[0].name, place.name("wal/00000000"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_is_idempotent_and_takes_many_names() {
    everywhere(async |place| {
        let names: Vec<ObjectName> =
            (0..1500).map(|index| place.name(&format!("gone/{index}"))).collect();
        for batch in names[..1200].chunks(64) {
            let puts = batch.iter().map(|name| place.store.put_if_absent(name, Bytes::new()));
            join_all(puts).await.into_iter().for_each(|put| assert!(put.is_ok()));
        }
        place.put("stays", "x").await;
        place.store.delete(&names).await.unwrap();
        place.store.delete(&names).await.unwrap();
        place.store.delete(&[]).await.unwrap();
        let left = place.store.list_all(&place.folder).await.unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(place.put("gone/7", "again").await, PutOutcome::Created);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_probe_finds_every_promise_kept_and_leaves_nothing() {
    everywhere(async |place| {
        let found = place.store.probe().await.unwrap();
        assert!(found.conditional_put, "{}: {found:?}", place.name);
        assert!(found.conditional_complete, "{}: {found:?}", place.name);
        assert!(found.conditional_replace, "{}: {found:?}", place.name);
        assert!(place.store.probe_replace().await.unwrap(), "{}", place.name);
        assert!(found.ranged_get && found.consistent_list && found.delete, "{found:?}");
        if place.name == "environment" {
            eprintln!("{found:#?}");
        }
        let skew = found.clock_skew.unwrap();
        assert!(skew.abs() < jiff::SignedDuration::from_secs(5), "{}: {skew}", place.name);
        if place.name.starts_with("minis3") {
            assert_eq!(found.wrong_checksum_refused, Some(true));
            assert_eq!((found.versioning, found.object_lock), (Some(false), Some(false)));
        }
        assert!(place.store.list_all("tidemark-probe/").await.unwrap().is_empty());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_is_told_and_asking_leaves_nothing() {
    everywhere(async |place| {
        let time = place.store.time().await.unwrap().unwrap();
        let skew = time.duration_since(jiff::Timestamp::now());
        assert!(skew.abs() < jiff::SignedDuration::from_secs(5), "{}: {skew}", place.name);
        assert_eq!(place.store.requests().puts, 0, "{}", place.name);
        assert!(place.store.list_all("").await.unwrap().is_empty(), "{}", place.name);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_are_counted_by_kind() {
    everywhere(async |place| {
        let before = place.store.requests();
        place.put("a", "12345").await;
        place.read("a").await;
        let upload = place.store.begin_multipart(&place.name("b")).await.unwrap();
        upload.put_part(1, Bytes::from_static(b"123")).await.unwrap();
        upload.complete().await.unwrap();
        let made = place.store.requests().since(&before);
        assert_eq!((made.puts, made.gets, made.parts), (1, 1, 1), "{}", place.name);
        assert_eq!((made.multipart_begins, made.multipart_completes), (1, 1), "{}", place.name);
        assert_eq!((made.sent_bytes, made.received_bytes), (8, 5), "{}", place.name);
        assert_eq!((made.retries, made.throttled), (0, 0), "{}", place.name);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn how_long_puts_and_fsyncs_took_is_kept() {
    everywhere(async |place| {
        let latencies = place.store.latencies();
        assert_eq!(latencies.upload.summary().count, 0);
        place.put("timed", "x").await;
        let upload = place.store.begin_multipart(&place.name("parts")).await.unwrap();
        upload.put_part(1, Bytes::from_static(b"one part, which may be small")).await.unwrap();
        upload.complete().await.unwrap();
        let uploads = latencies.upload.summary();
        assert_eq!(uploads.count, 2, "the object and the part");
        assert!(uploads.max_us > 0);
        // A file and its folder each time, and the folders above them once.
        let syncs = latencies.fsync.summary().count;
        let expected = if place.name == "directory" { 4..=8 } else { 0..=0 };
        assert!(expected.contains(&syncs), "{syncs}");
    })
    .await;
}
