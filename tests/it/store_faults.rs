//! What the S3 store makes of servers and networks at their worst, and how it says so.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use minis3::{Config, Effect, Fault, Op, Quirks, Server};
use tidemark::clock::Clock;
use tidemark::error::{Error, Kind};
use tidemark::store::{self, Checksum, ObjectName, PutOutcome, Replace, Store, StoreOptions};

use crate::proxy::{self, Proxy};
use crate::s3_server::{self, memory, open};

fn name(text: &str) -> ObjectName {
    ObjectName::new(text).unwrap()
}

fn bytes(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

async fn put(store: &Arc<dyn Store>, text: &str) -> Result<PutOutcome, Error> {
    store.put_if_absent(&name(text), bytes("body")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_whose_answer_was_lost_is_known_as_ours() {
    let server = memory();
    let store = open(&server, "p");
    for effect in
        [Effect::LostReply, Effect::ErrorAfter { status: 500, code: "InternalError".into() }]
    {
        let key =
            format!("lost-{}", server.faults().add(Fault::new(effect).on(Op::PutObject).times(1)));
        assert_eq!(put(&store, &key).await.unwrap(), PutOutcome::Created, "{key}");
        assert_eq!(put(&store, &key).await.unwrap(), PutOutcome::AlreadyThere, "{key}");
    }
    assert_eq!(store.requests().retries, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_whose_answer_was_lost_is_known_as_ours_without_metadata_too() {
    let server = memory();
    server.set_quirks(Quirks { drop_metadata: true, ..Quirks::default() });
    let store = open(&server, "p");
    server.faults().add(Fault::new(Effect::LostReply).on(Op::PutObject).times(1));
    assert_eq!(put(&store, "a").await.unwrap(), PutOutcome::Created);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rival_that_wins_between_two_tries_is_not_taken_for_us() {
    let server = memory();
    let (store, rival) = (open(&server, "p"), open(&server, "p"));
    // Our first try fails before anything is stored; the rival comes before the second.
    server.faults().add(Fault::new(Effect::error(500, "InternalError")).on(Op::PutObject).times(1));
    let held_up = Fault::new(Effect::Delay { ms: 1500 }).on(Op::PutObject).times(1);
    let held_up = server.faults().add(held_up);
    let name = name("a");
    let (ours, theirs) = tokio::join!(store.put_if_absent(&name, bytes("ours")), async {
        while server.faults().hits(held_up) == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        rival.put_if_absent(&name, bytes("them")).await
    });
    assert_eq!((ours.unwrap(), theirs.unwrap()), (PutOutcome::AlreadyThere, PutOutcome::Created));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replacement_whose_answer_was_lost_is_known_as_ours() {
    let server = memory();
    let store = open(&server, "p");
    server.faults().add(Fault::new(Effect::LostReply).on(Op::PutObject).times(1));
    let Replace::Done(first) = store.replace_if(&name("l"), bytes("1"), None).await.unwrap() else {
        panic!("ours was lost")
    };
    server.faults().add(Fault::new(Effect::LostReply).on(Op::PutObject).times(1));
    let done = store.replace_if(&name("l"), bytes("2"), Some(first)).await.unwrap();
    let (found, tag) = store.read_versioned(&name("l")).await.unwrap().unwrap();
    assert_eq!((found, done), (bytes("2"), Replace::Done(tag)));
}

async fn upload(store: &Arc<dyn Store>, text: &str) -> Result<PutOutcome, Error> {
    let upload = store.begin_multipart(&name(text)).await?;
    upload.put_part(2, bytes("tail")).await?;
    upload.put_part(1, Bytes::from(vec![7; 5 << 20])).await?;
    upload.complete().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_whose_answer_was_lost_is_known_as_ours() {
    let server = memory();
    let store = open(&server, "p");
    for effect in [Effect::LostReply, Effect::ErrorAfter { status: 503, code: "SlowDown".into() }] {
        let fault = Fault::new(effect).on(Op::CompleteMultipartUpload).times(1);
        let key = format!("lost-{}", server.faults().add(fault));
        assert_eq!(upload(&store, &key).await.unwrap(), PutOutcome::Created, "{key}");
        assert_eq!(upload(&store, &key).await.unwrap(), PutOutcome::AlreadyThere, "{key}");
    }
    assert_eq!(server.upload_count("tidemark"), 0, "the losers' parts are gone");
}

/// Who called it once more, as a backup does that outlasts an outage, must not take it for a rival's.
#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_could_not_be_looked_at_is_known_as_ours() {
    let server = memory();
    for conditions_before_upload_id in [false, true] {
        server.set_quirks(Quirks { conditions_before_upload_id, ..Quirks::default() });
        let store = with(&server, "s3://tidemark/p", |options| options.attempts_max = 1);
        let name = name(&format!("unseen-{conditions_before_upload_id}"));
        let upload = store.begin_multipart(&name).await.unwrap();
        upload.put_part(1, bytes("all")).await.unwrap();
        let fault = Fault::new(Effect::error(503, "SlowDown")).on(Op::HeadObject).times(1);
        server.faults().add(fault);
        assert_eq!(upload.complete().await.unwrap_err().kind(), Kind::Unavailable);
        assert_eq!(upload.complete().await.unwrap(), PutOutcome::Created, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_in_the_body_of_a_200_is_an_error() {
    let server = memory();
    let store = open(&server, "p");
    let effect = Effect::ErrorIn200 { code: "InternalError".into() };
    let fault = server.faults().add(Fault::new(effect).on(Op::CompleteMultipartUpload).times(2));
    assert_eq!(upload(&store, "retried").await.unwrap(), PutOutcome::Created);
    assert_eq!(server.faults().hits(fault), 2);
    server.faults().clear();
    let effect = Effect::ErrorIn200 { code: "InternalError".into() };
    server.faults().add(Fault::new(effect).on(Op::CompleteMultipartUpload));
    let mut options = s3_server::options(&server);
    options.attempts_max = 3;
    let store = store::open("s3://tidemark/p", &options, &Clock::system()).unwrap();
    let error = upload(&store, "never").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert_eq!(store.head(&name("never")).await.unwrap(), None);
}

/// A reverse proxy whose server restarts says 200 to everything.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_for_people_is_no_answer_to_a_put() {
    let server = memory();
    let store = with(&server, "s3://tidemark/p", |_| {});
    server.faults().add(Fault::new(Effect::Page));
    let error = put(&store, "a").await.unwrap_err();
    assert_says(&error, Kind::Unavailable, &["unable to write object 'a'"], "proxies");
    for error in [
        store.replace_if(&name("a"), bytes("1"), None).await.unwrap_err(),
        store.head(&name("a")).await.unwrap_err(),
        store.get(&name("a"), None).await.unwrap_err(),
        store.get(&name("a"), Some(0..4)).await.unwrap_err(),
        store.read_versioned(&name("a")).await.unwrap_err(),
        store.list("", None).await.unwrap_err(),
        store.delete(&[name("a")]).await.unwrap_err(),
        store.begin_multipart(&name("a")).await.err().unwrap(),
    ] {
        assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
    }
    server.faults().clear();
    // The server is there again when it is asked what became of it, or it is not.
    for ops in [vec![Op::PutObject], vec![Op::PutObject, Op::HeadObject]] {
        for op in ops {
            server.faults().add(Fault::new(Effect::Page).on(op));
        }
        let error = put(&store, "a").await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
        server.faults().clear();
        assert_eq!(store.head(&name("a")).await.unwrap(), None);
    }
    for op in [Op::PutObject, Op::UploadPart, Op::CompleteMultipartUpload] {
        server.faults().add(Fault::new(Effect::Page).on(op).times(1));
    }
    assert_eq!(put(&store, "a").await.unwrap(), PutOutcome::Created);
    assert_eq!(store.get(&name("a"), None).await.unwrap(), bytes("body"));
    assert_eq!(upload(&store, "b").await.unwrap(), PutOutcome::Created);
}

/// What a proxy says that has lost its server is nothing that the server said.
#[tokio::test(flavor = "multi_thread")]
async fn a_404_without_a_code_is_no_word_of_the_server() {
    let server = memory();
    let store = open(&server, "p");
    put(&store, "a").await.unwrap();
    let lost = |op| server.faults().add(Fault::new(Effect::error(404, "")).on(op).times(2));
    lost(Op::GetObject);
    assert_eq!(store.get(&name("a"), None).await.unwrap(), bytes("body"));
    lost(Op::GetObject);
    assert_eq!(store.get(&name("a"), Some(1..3)).await.unwrap(), bytes("od"));
    lost(Op::HeadObject);
    assert!(store.head(&name("a")).await.unwrap().is_some());
    lost(Op::PutObject);
    let Replace::Done(tag) = store.replace_if(&name("l"), bytes("1"), None).await.unwrap() else {
        panic!("ours was lost")
    };
    lost(Op::PutObject);
    lost(Op::GetObject);
    let replaced = store.replace_if(&name("l"), bytes("2"), Some(tag)).await.unwrap();
    assert!(matches!(replaced, Replace::Done(_)), "{replaced:?}");
    lost(Op::GetObject);
    assert_eq!(store.read_versioned(&name("l")).await.unwrap().unwrap().0, bytes("2"));
    for op in [Op::UploadPart, Op::CompleteMultipartUpload] {
        lost(op);
    }
    assert_eq!(upload(&store, "b").await.unwrap(), PutOutcome::Created);
    lost(Op::AbortMultipartUpload);
    store.begin_multipart(&name("c")).await.unwrap().abort().await.unwrap();
    assert_eq!(server.upload_count("tidemark"), 0);
    server.set_quirks(Quirks { refuse_bulk_delete: true, ..Quirks::default() });
    lost(Op::DeleteObject);
    store.delete(&[name("a")]).await.unwrap();
    assert_eq!(server.keys("tidemark"), ["p/b", "p/l"]);
    // For as long as it lasts it is an outage; what the server itself misses is missing at once.
    server.faults().add(Fault::new(Effect::error(404, "")).on(Op::GetObject).key("p/b"));
    let store = with(&server, "s3://tidemark/p", |_| {});
    let error = store.get(&name("b"), None).await.unwrap_err();
    assert_says(&error, Kind::Unavailable, &["'b'"], "proxies");
    server.faults().add(Fault::new(Effect::error(404, "")).on(Op::HeadObject).key("p/b"));
    let error = store.head(&name("b")).await.unwrap_err();
    assert_says(&error, Kind::Unavailable, &["'b'"], "proxies");
    let retries = store.requests().retries;
    assert_eq!(store.get(&name("a"), None).await.unwrap_err().kind(), Kind::NotFound);
    assert_eq!(store.read_versioned(&name("a")).await.unwrap(), None);
    assert_eq!(store.head(&name("a")).await.unwrap(), None);
    assert_eq!(store.requests().retries, retries);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_without_an_etag_is_believed_when_the_object_is_ours() {
    let server = memory();
    for drop_metadata in [false, true] {
        let quirks = Quirks { put_without_etag: true, drop_metadata, ..Quirks::default() };
        server.set_quirks(quirks);
        let store = open(&server, if drop_metadata { "bare" } else { "p" });
        assert_eq!(put(&store, "a").await.unwrap(), PutOutcome::Created);
        assert_eq!(put(&store, "a").await.unwrap(), PutOutcome::AlreadyThere);
        let Replace::Done(tag) = store.replace_if(&name("l"), bytes("1"), None).await.unwrap()
        else {
            panic!("ours was lost")
        };
        let found = store.read_versioned(&name("l")).await.unwrap();
        assert_eq!(found, Some((bytes("1"), tag)));
        assert_eq!(store.requests().retries, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_that_an_outage_stopped_is_called_again() {
    let server = memory();
    let mut options = s3_server::options(&server);
    options.attempts_max = 1;
    let store = store::open("s3://tidemark/p", &options, &Clock::system()).unwrap();
    let error = |effect, op| server.faults().add(Fault::new(effect).on(op).times(1));
    for (key, done) in [("undone", false), ("done", true)] {
        let upload = store.begin_multipart(&name(key)).await.unwrap();
        upload.put_part(1, bytes("body")).await.unwrap();
        error(
            match done {
                true => Effect::ErrorAfter { status: 503, code: "SlowDown".into() },
                false => Effect::ErrorIn200 { code: "InternalError".into() },
            },
            Op::CompleteMultipartUpload,
        );
        // Nobody tells what became of it.
        error(Effect::error(503, "SlowDown"), Op::HeadObject);
        let failed = upload.complete().await.unwrap_err();
        assert_eq!(failed.kind(), Kind::Unavailable, "{failed}");
        assert_eq!(upload.complete().await.unwrap(), PutOutcome::Created, "{key}");
        assert_eq!(store.get(&name(key), None).await.unwrap(), "body");
    }
    assert_eq!(server.upload_count("tidemark"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_the_store_confirmed_and_lost_makes_no_object() {
    let server = memory();
    let store = open(&server, "p");
    server.faults().add(Fault::new(Effect::LosePart).on(Op::UploadPart).times(1));
    let error = upload(&store, "holed").await.unwrap_err();
    assert!(error.to_string().contains("InvalidPart"), "{error}");
    // Nothing that was stored is damaged, and trying again helps.
    assert_eq!(error.kind(), Kind::Unavailable);
    assert_eq!(store.head(&name("holed")).await.unwrap(), None);
    assert_eq!(server.upload_count("tidemark"), 0, "what failed for good is discarded");
    assert_eq!(upload(&store, "holed").await.unwrap(), PutOutcome::Created);
    // Asked again, the same upload says the same, and blames nobody for what we discarded.
    server.faults().add(Fault::new(Effect::LosePart).on(Op::UploadPart).times(1));
    let upload = store.begin_multipart(&name("again")).await.unwrap();
    upload.put_part(1, bytes("body")).await.unwrap();
    for kind in [Kind::Unavailable, Kind::Conflict] {
        let error = upload.complete().await.unwrap_err();
        assert_says(&error, kind, &["'again'", "InvalidPart"], "does not have it any more");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_that_was_stored_and_never_answered_is_known_as_ours() {
    let server = memory();
    let mut options = s3_server::options(&server);
    options.attempt_timeout = Duration::from_millis(700);
    let store = store::open("s3://tidemark/p", &options, &Clock::system()).unwrap();
    server.faults().add(Fault::new(Effect::HangAfter).on(Op::PutObject).times(1));
    assert_eq!(put(&store, "a").await.unwrap(), PutOutcome::Created);
    assert_eq!(put(&store, "a").await.unwrap(), PutOutcome::AlreadyThere);
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_that_break_off_are_sent_again() {
    let server = memory();
    let store = open(&server, "p");
    let reset = Fault::new(Effect::ResetUpload { after_bytes: 1 << 20 }).on(Op::UploadPart);
    server.faults().add(reset.times(2));
    server.faults().add(Fault::new(Effect::LostReply).on(Op::UploadPart).times(1));
    assert_eq!(upload(&store, "parts").await.unwrap(), PutOutcome::Created);
    assert_eq!(store.requests().retries, 3);
    let got = store.get(&name("parts"), None).await.unwrap();
    assert_eq!((got.len(), &got[5 << 20..]), ((5 << 20) + 4, b"tail".as_slice()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_breaks_off_is_begun_again() {
    let server = memory();
    let store = open(&server, "p");
    let body = Bytes::from((0..3_000_000_u32).map(|at| (at % 251) as u8).collect::<Vec<u8>>());
    store.put_if_absent(&name("big"), body.clone()).await.unwrap();
    for after_bytes in [0, 1, 1_000_000, 2_999_999] {
        let fault = Fault::new(Effect::CutDownload { after_bytes }).on(Op::GetObject).times(1);
        server.faults().add(fault);
        assert!(store.get(&name("big"), None).await.unwrap() == body, "cut after {after_bytes}");
    }
    let fault = Fault::new(Effect::CutDownload { after_bytes: 10 }).on(Op::GetObject).times(1);
    server.faults().add(fault);
    let got = store.get(&name("big"), Some(1_000_000..1_000_100)).await.unwrap();
    assert_eq!(got, body.slice(1_000_000..1_000_100));
    assert_eq!(store.requests().retries, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_range_that_is_read_in_pieces_goes_on_where_the_answer_broke_off() {
    let server = memory();
    let store = open(&server, "p");
    let body = Bytes::from((0..3_000_000_u32).map(|at| (at % 251) as u8).collect::<Vec<u8>>());
    let name = name("big");
    store.put_if_absent(&name, body.clone()).await.unwrap();
    for (after_bytes, gets) in [(0, 2), (1, 2), (1_000_000, 2), (2_899_999, 2), (2_900_000, 1)] {
        let fault = Fault::new(Effect::CutDownload { after_bytes }).on(Op::GetObject).times(1);
        server.faults().add(fault);
        let before = store.requests();
        let mut reading = store.read(&name, 50_000..2_950_000).await.unwrap();
        let mut from = 50_000;
        for piece in [1, 699_999, 2_000_000, 0, 200_000] {
            let got = reading.next(piece).await.unwrap();
            assert!(got == body.slice(from..from + piece), "{piece} from {from}");
            from += piece;
        }
        assert_eq!(reading.next(1).await.unwrap_err().kind(), Kind::Bug);
        let since = store.requests().since(&before);
        assert_eq!(
            (since.gets, since.received_bytes),
            (gets, 2_900_000),
            "cut after {after_bytes}"
        );
    }
    let mut options = s3_server::options(&server);
    options.attempts_max = 3;
    let store = store::open("s3://tidemark/p", &options, &Clock::system()).unwrap();
    server.faults().add(Fault::new(Effect::CutDownload { after_bytes: 10 }).on(Op::GetObject));
    let before = store.requests();
    let read = async { store.read(&name, 0..2_500_000).await?.next(2_500_000).await };
    let error = read.await.unwrap_err();
    assert_says(&error, Kind::Unavailable, &["unable to read object 'big'"], "");
    assert!(store.requests().since(&before).gets <= 3 * 3, "tries are bounded");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_burst_of_slow_down_is_waited_out_by_all() {
    let server = memory();
    let store = open(&server, "p");
    put(&store, "warm").await.unwrap();
    let fault = server.faults().add(Fault::new(Effect::slow_down()).on(Op::PutObject).times(6));
    let begun = Instant::now();
    let puts = (0..12).map(|index| {
        let store = Arc::clone(&store);
        tokio::spawn(async move { put(&store, &format!("burst-{index}")).await })
    });
    for put in puts.collect::<Vec<_>>() {
        assert_eq!(put.await.unwrap().unwrap(), PutOutcome::Created);
    }
    assert_eq!(server.faults().hits(fault), 6);
    assert_eq!(store.requests().throttled, 6);
    assert!(begun.elapsed() >= Duration::from_millis(250), "it was told to slow down");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_and_a_delete_survive_bursts_of_errors() {
    let server = memory();
    let store = open(&server, "p");
    put(&store, "a").await.unwrap();
    for op in [Op::ListObjects, Op::DeleteObjects, Op::HeadObject] {
        server.faults().add(Fault::new(Effect::slow_down()).on(op).times(1));
        server.faults().add(Fault::new(Effect::Reset).on(op).times(1));
    }
    assert_eq!(store.list_all("").await.unwrap().len(), 1);
    assert!(store.head(&name("a")).await.unwrap().is_some());
    store.delete(&[name("a")]).await.unwrap();
    assert!(server.keys("tidemark").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_answers_is_given_up() {
    let server = memory();
    let mut options = s3_server::options(&server);
    options.attempt_timeout = Duration::from_millis(200);
    options.attempts_max = 3;
    let store = store::open("s3://tidemark/p", &options, &Clock::system()).unwrap();
    server.faults().add(Fault::new(Effect::Hang).on(Op::GetObject));
    let error = store.get(&name("a"), None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(error.is_transient());
    assert_eq!(store.requests().gets, 3);
}

/// A link in front of `server`, and how to open it, with a second for each try besides what its bytes need.
async fn behind_proxy(server: &Server) -> (Proxy, StoreOptions) {
    let address = server.endpoint.trim_start_matches("http://").parse().unwrap();
    let proxy = Proxy::start(address).await;
    let mut options = s3_server::options(server);
    options.endpoint = Some(format!("http://{}", proxy.address()));
    options.attempt_timeout = Duration::from_secs(1);
    (proxy, options)
}

/// What could be put over a slow link can be fetched over it, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_has_the_time_that_its_length_needs_whether_or_not_that_was_known() {
    let server = memory();
    let (proxy, mut options) = behind_proxy(&server).await;
    options.attempts_max = 1;
    let store = store::open("s3://tidemark/p", &options, &Clock::system()).unwrap();
    let (name, body) = (name("a"), Bytes::from(vec![7; 256 << 10]));
    store.put_if_absent(&name, body.clone()).await.unwrap();
    proxy.set(proxy::Fault::Slow(128 << 10));
    for range in [Some(0..body.len() as u64), None] {
        assert_eq!(store.get(&name, range).await.unwrap(), body);
    }
    // A body that stands still is given up all the same.
    let (got, ()) = tokio::join!(store.get(&name, None), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        proxy.set(proxy::Fault::Stall);
    });
    assert_eq!(got.unwrap_err().kind(), Kind::Unavailable);
}

/// A connection that trickles is never silent for long, and would keep a restore waiting for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_piece_that_trickles_in_is_asked_for_again() {
    let server = memory();
    let (proxy, mut options) = behind_proxy(&server).await;
    let store = store::open("s3://tidemark/p", &options, &Clock::system()).unwrap();
    let body = Bytes::from((0..300_000_u32).map(|at| (at % 251) as u8).collect::<Vec<u8>>());
    let name = name("a");
    store.put_if_absent(&name, body.clone()).await.unwrap();
    proxy.set(proxy::Fault::Slow(4 << 10));
    let mut reading = store.read(&name, 0..300_000).await.unwrap();
    let (got, ()) = tokio::join!(reading.next(200_000), async {
        tokio::time::sleep(Duration::from_millis(4500)).await;
        proxy.set(proxy::Fault::None);
    });
    assert!(got.unwrap() == body.slice(..200_000));
    assert!(store.requests().retries > 0, "it was asked for again");
    assert!(reading.next(100_000).await.unwrap() == body.slice(200_000..));
    // What never comes faster is an outage in the end.
    proxy.set(proxy::Fault::Slow(4 << 10));
    options.attempts_max = 2;
    let store = store::open("s3://tidemark/p", &options, &Clock::system()).unwrap();
    let mut reading = store.read(&name, 0..300_000).await.unwrap();
    assert_eq!(reading.next(200_000).await.unwrap_err().kind(), Kind::Unavailable);
    assert_eq!(store.requests().gets, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_is_too_long_is_not_read() {
    let server = memory();
    let store = open(&server, "p");
    let body = Bytes::from(vec![7; (1 << 20) + 1]);
    store.put_if_absent(&name("l"), body.clone()).await.unwrap();
    let error = store.read_versioned(&name("l")).await.unwrap_err();
    assert!(error.message().contains("at most 1048576 are read"), "{error}");
    assert_eq!(store.get(&name("l"), None).await.unwrap(), body);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_try_begins_after_the_overall_timeout() {
    let server = memory();
    let mut options = s3_server::options(&server);
    options.overall_timeout = Duration::from_millis(600);
    options.attempts_max = 1000;
    let store = store::open("s3://tidemark/p", &options, &Clock::system()).unwrap();
    server.faults().add(Fault::new(Effect::error(500, "InternalError")).on(Op::GetObject));
    let name = name("a");
    let ended = tokio::time::timeout(Duration::from_secs(60), store.get(&name, None));
    let error = ended.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert!(store.requests().gets < 1000, "{:?}", store.requests());
}

/// A store with other options than those that lead to the server.
fn with(server: &Server, url: &str, change: impl FnOnce(&mut StoreOptions)) -> Arc<dyn Store> {
    let mut options = s3_server::options(server);
    options.attempts_max = 2;
    change(&mut options);
    store::open(url, &options, &Clock::system()).unwrap()
}

/// Asserts kind, words of the message and words of the hint.
fn assert_says(error: &Error, kind: Kind, message: &[&str], hint: &str) {
    assert_eq!(error.kind(), kind, "{error:?}");
    for words in message {
        assert!(error.message().contains(words), "'{words}' is not in {error:?}");
    }
    let shown = error.hint_text().unwrap_or_default();
    assert!(shown.contains(hint), "'{hint}' is not in {error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_bucket_is_a_matter_of_configuration() {
    let server = memory();
    let store = with(&server, "s3://no-such-bucket/p", |_| {});
    let error = store.get(&name("a"), None).await.unwrap_err();
    let place = "s3://no-such-bucket/p";
    assert_says(&error, Kind::Config, &["NoSuchBucket", "'a'", place], "bucket's name");
    for error in [
        put(&store, "a").await.unwrap_err(),
        store.list("", None).await.unwrap_err(),
        store.delete(&[name("a")]).await.unwrap_err(),
        store.begin_multipart(&name("a")).await.err().unwrap(),
    ] {
        assert_says(&error, Kind::Config, &["NoSuchBucket", place], "bucket's name");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_keys_are_told_apart() {
    let server = memory();
    let store = with(&server, "s3://tidemark/p", |options| {
        options.credentials.as_mut().unwrap().access_key_id = "somebody".to_owned();
    });
    let error = put(&store, "a").await.unwrap_err();
    assert_says(&error, Kind::Denied, &["InvalidAccessKeyId"], "access key id");
    let store = with(&server, "s3://tidemark/p", |options| {
        options.credentials.as_mut().unwrap().secret_access_key = "wrong".to_owned().into();
    });
    let error = put(&store, "a").await.unwrap_err();
    assert_says(&error, Kind::Denied, &["SignatureDoesNotMatch"], "secret access key");
    assert_eq!(store.requests().retries, 0, "refusals are not repeated");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_refusals_say_what_to_do() {
    let server = memory();
    let cases = [
        (403, "AccessDenied", Kind::Denied, "s3:PutObject"),
        (400, "ExpiredToken", Kind::Denied, "renew"),
        (403, "RequestTimeTooSkewed", Kind::Denied, "clock"),
        (507, "InsufficientStorage", Kind::Unavailable, "make room"),
        (301, "PermanentRedirect", Kind::Config, "region"),
    ];
    for (status, code, kind, hint) in cases {
        server.faults().clear();
        server.faults().add(Fault::new(Effect::error(status, code)));
        let store = with(&server, "s3://tidemark/p", |_| {});
        let error = put(&store, "a").await.unwrap_err();
        assert_says(&error, kind, &[code, "s3://tidemark/p", "'a'"], hint);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_region_names_the_right_one() {
    let server =
        Server::start(Config { region: Some("eu-central-9".to_owned()), ..Config::default() })
            .unwrap();
    let store = with(&server, "s3://tidemark/p", |options| {
        options.region = Some("us-west-2".to_owned());
    });
    let error = put(&store, "a").await.unwrap_err();
    assert_says(&error, Kind::Config, &["AuthorizationHeaderMalformed"], "eu-central-9");
    let store = with(&server, "s3://tidemark/p", |options| {
        options.region = Some("eu-central-9".to_owned());
    });
    assert_eq!(put(&store, "a").await.unwrap(), PutOutcome::Created);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_is_not_there_is_unavailable() {
    let server = memory();
    let store = with(&server, "s3://tidemark/p", |options| {
        options.endpoint = Some("http://127.0.0.1:9".to_owned());
    });
    let error = put(&store, "a").await.unwrap_err();
    assert_says(&error, Kind::Unavailable, &["refused"], "endpoint");
    let store = with(&server, "s3://tidemark/p", |options| {
        options.endpoint = Some("http://no-such-host.invalid".to_owned());
    });
    let error = put(&store, "a").await.unwrap_err();
    assert_says(&error, Kind::Unavailable, &["'a'"], "endpoint");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_makes_no_sense_is_refused_before_any_request() {
    for endpoint in [
        "minio.example.com",
        "ftp://x",
        "http://",
        "https://user:hush@host",
        "user:hush@host:9000",
        "http://user:1#hush@host",
        "http://user:hush#hush@host",
        "https://hush@host",
    ] {
        let options =
            StoreOptions { endpoint: Some(endpoint.to_owned()), ..StoreOptions::default() };
        let error = store::open("s3://b", &options, &Clock::system()).err().unwrap();
        assert_eq!(error.kind(), Kind::Config, "{error:?}");
        assert!(!format!("{error:?}").contains("hush"), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_nobody_vouches_for_is_refused_with_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    let (server, ca_file) = s3_server::tls(folder.path());
    let store = with(&server, "s3://tidemark/p", |_| {});
    let error = put(&store, "a").await.unwrap_err();
    assert_says(&error, Kind::Denied, &["certificate"], "ca_file");
    assert_eq!(store.requests().retries, 0);
    let store = with(&server, "s3://tidemark/p", |options| options.ca_file = Some(ca_file));
    assert_eq!(put(&store, "a").await.unwrap(), PutOutcome::Created);
    let bad = folder.path().join("bad.pem");
    for text in ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        std::fs::write(&bad, text).unwrap();
        let store = with(&server, "s3://tidemark/p", |options| options.ca_file = Some(bad.clone()));
        let error = put(&store, "a").await.unwrap_err();
        assert_says(&error, Kind::Config, &["bad.pem"], "PEM");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_the_store_lost_is_not_papered_over() {
    let server = memory();
    let store = open(&server, "p");
    server.faults().add(Fault::new(Effect::WrongEtag).on(Op::UploadPart).times(1));
    let error = upload(&store, "a").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable, "{error}");
    assert_eq!(store.head(&name("a")).await.unwrap(), None);
    assert_eq!(server.upload_count("tidemark"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_knows_no_checksums_gets_none() {
    let server = memory();
    server.set_quirks(Quirks { refuse_checksums: true, ..Quirks::default() });
    let store = open(&server, "p");
    assert_eq!(put(&store, "a").await.unwrap(), PutOutcome::Created);
    assert_eq!(upload(&store, "b").await.unwrap(), PutOutcome::Created);
    assert_eq!(store.requests().puts, 2, "refused once, then sent without");
    let store = open(&server, "p");
    assert_eq!(upload(&store, "c").await.unwrap(), PutOutcome::Created);
    let strict = with(&server, "s3://tidemark/p", |options| options.checksum = Checksum::Crc32c);
    let error = put(&strict, "d").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    let none = with(&server, "s3://tidemark/p", |options| options.checksum = Checksum::None);
    assert_eq!(put(&none, "d").await.unwrap(), PutOutcome::Created);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_bulk_delete_is_served_one_by_one() {
    let server = memory();
    server.set_quirks(Quirks { refuse_bulk_delete: true, ..Quirks::default() });
    let store = open(&server, "p");
    let names: Vec<ObjectName> = (0..40).map(|index| name(&format!("x{index}"))).collect();
    for name in &names {
        store.put_if_absent(name, Bytes::new()).await.unwrap();
    }
    store.delete(&names).await.unwrap();
    store.delete(&names).await.unwrap();
    assert!(server.keys("tidemark").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_without_the_right_to_it_is_not_tried_again() {
    let server = memory();
    let store = open(&server, "p");
    put(&store, "a").await.unwrap();
    server.set_quirks(Quirks { deny_deletes: true, ..Quirks::default() });
    let error = store.delete(&[name("a")]).await.unwrap_err();
    assert_says(&error, Kind::Denied, &["unable to delete object 'a'"], "s3:DeleteObject");
    let requests = store.requests();
    assert_eq!((requests.deletes, requests.retries), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_probe_finds_out_stores_that_say_yes_and_do_nothing() {
    let server = memory();
    let store = open(&server, "p");
    server.set_quirks(Quirks { ignore_conditions: true, ..Quirks::default() });
    let found = store.probe().await.unwrap();
    assert!(!found.conditional_put && !found.conditional_complete && !found.conditional_replace);
    assert!(!store.probe_replace().await.unwrap());
    server.set_quirks(Quirks { ignore_conditions_on_complete: true, ..Quirks::default() });
    let found = store.probe().await.unwrap();
    assert!(found.conditional_put && found.conditional_replace && !found.conditional_complete);
    server.set_quirks(Quirks { ignore_checksums: true, ..Quirks::default() });
    assert_eq!(store.probe().await.unwrap().wrong_checksum_refused, Some(false));
    server.set_quirks(Quirks { stale_list_ms: 60_000, ..Quirks::default() });
    assert!(!store.probe().await.unwrap().consistent_list);
    server.set_quirks(Quirks::default());
    server.faults().add(Fault::new(Effect::error(403, "AccessDenied")).on(Op::DeleteObjects));
    assert!(!store.probe().await.unwrap().delete);
    assert!(store.probe_replace().await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_stumbles_over_quotes_replaces_all_the_same() {
    let server = memory();
    server.set_quirks(Quirks { bare_tags: true, ..Quirks::default() });
    assert!(open(&server, "p").probe().await.unwrap().conditional_replace);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_probe_reports_versions_and_locks() {
    let bucket = minis3::BucketConfig {
        name: "tidemark".to_owned(),
        object_lock: true,
        ..minis3::BucketConfig::default()
    };
    let server = Server::start(Config { buckets: vec![bucket], ..Config::default() }).unwrap();
    let found = open(&server, "p").probe().await.unwrap();
    assert_eq!((found.versioning, found.object_lock), (Some(true), Some(true)));
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_that_are_not_ours_are_passed_over_in_listings() {
    let server = memory();
    // A prefix that holds only names we would never give, more than a page of them.
    let foreign = open(&server, "p");
    for batch in 0..11 {
        let puts = (0..100).map(|index| {
            let foreign = Arc::clone(&foreign);
            tokio::spawn(async move { put(&foreign, &format!("a{batch:02}{index:02}")).await })
        });
        for put in puts.collect::<Vec<_>>() {
            put.await.unwrap().unwrap();
        }
    }
    let _ = put(&foreign, "z").await.unwrap();
    let page = foreign.list("", None).await.unwrap();
    assert_eq!((page.objects.len(), page.more), (1000, true));
    // Seen from the bucket's root "p/..." are fine names; from "p/a" as a folder nothing is there.
    let elsewhere = open(&server, "p/a");
    let page = elsewhere.list("", None).await.unwrap();
    assert_eq!((page.objects.len(), page.more), (0, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completion_without_an_etag_is_verified_all_the_same() {
    let server = memory();
    server.set_quirks(Quirks { complete_without_etag: true, ..Quirks::default() });
    assert_eq!(upload(&open(&server, "p"), "a").await.unwrap(), PutOutcome::Created);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_server_remembers_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config { root: Some(folder.path().to_owned()), ..Config::default() };
    let server = Server::start(config.clone()).unwrap();
    let store = open(&server, "p");
    put(&store, "kept").await.unwrap();
    upload(&store, "parts").await.unwrap();
    put(&store, "gone").await.unwrap();
    store.delete(&[name("gone")]).await.unwrap();
    drop(server);
    let server = Server::start(config).unwrap();
    let store = open(&server, "p");
    assert_eq!(store.get(&name("kept"), None).await.unwrap(), bytes("body"));
    assert_eq!(store.head(&name("parts")).await.unwrap().unwrap().size_bytes, (5 << 20) + 4);
    assert_eq!(store.list_all("").await.unwrap().len(), 2);
    let files = std::fs::read_dir(folder.path().join("data")).unwrap().count();
    assert_eq!(files, 3, "a put and two parts");
}
