//! What the S3 store makes of listings that do not say all, or do not say it in order.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use minis3::{EmptyListToken, Quirks, Server};
use tidemark::error::{Error, Kind};
use tidemark::store::{ObjectName, Store};

use crate::s3_server::{memory, open};

fn name(text: &str) -> ObjectName {
    ObjectName::new(text).unwrap()
}

/// A server with three objects of a store.
async fn three() -> (Server, Arc<dyn Store>) {
    let server = memory();
    let store = open(&server, "p");
    for text in ["wal/1", "wal/2", "wal/3"] {
        store.put_if_absent(&name(text), Bytes::from_static(b"body")).await.unwrap();
    }
    (server, store)
}

async fn names(store: &Arc<dyn Store>) -> Vec<String> {
    let listed = store.list_all("wal/").await.unwrap();
    listed.into_iter().map(|object| object.name.to_string()).collect()
}

/// Both ways to list fail for good, and say this.
async fn refused(store: &Arc<dyn Store>, words: &str) -> Error {
    store.list("wal/", None).await.unwrap_err();
    let error = store.list_all("wal/").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported, "{error:?}");
    assert!(error.message().starts_with("unable to list 'wal/' in s3://tidemark/p: "), "{error:?}");
    assert!(error.message().contains(words), "{error:?}");
    error
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_that_name_nothing_do_not_end_a_listing() {
    let (server, store) = three().await;
    server.set_quirks(Quirks { empty_list_pages: 3, ..Quirks::default() });
    assert_eq!(names(&store).await, ["wal/1", "wal/2", "wal/3"]);
    let page = store.list("wal/", Some(&name("wal/2"))).await.unwrap();
    assert_eq!((page.objects.len(), page.more), (1, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn more_to_come_without_a_way_to_it_is_an_error_and_no_end() {
    let (server, store) = three().await;
    server.set_quirks(Quirks {
        empty_list_pages: 1,
        empty_list_token: EmptyListToken::Missing,
        ..Quirks::default()
    });
    refused(&store, "there is more, but not how to get there").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_leads_nowhere_is_not_followed_for_ever() {
    let (server, store) = three().await;
    server.set_quirks(Quirks {
        empty_list_pages: 1,
        empty_list_token: EmptyListToken::Same,
        ..Quirks::default()
    });
    refused(&store, "its continuation token leads nowhere").await;
    assert!(store.requests().lists <= 4, "{:?}", store.requests());
    server.set_quirks(Quirks { empty_list_pages: u32::MAX, ..Quirks::default() });
    refused(&store, "1000 pages in a row name nothing").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_out_of_order_are_refused_since_others_would_be_passed_over() {
    let (server, store) = three().await;
    server.set_quirks(Quirks { list_backwards: true, ..Quirks::default() });
    let error = refused(&store, "lists 'p/wal/2' after 'p/wal/3'").await;
    assert!(error.hint_text().unwrap().contains("byte order"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_time_is_made_up_for_an_object_whose_time_is_not_told() {
    let (server, store) = three().await;
    server.set_quirks(Quirks { objects_without_time: true, ..Quirks::default() });
    for listed in store.list_all("wal/").await.unwrap() {
        assert_eq!(listed.modified, None);
        assert_eq!(store.head(&listed.name).await.unwrap().unwrap().modified, None);
    }
}

/// Begins an upload and leaves it.
async fn abandon(store: &Arc<dyn Store>, text: &str) {
    let upload = store.begin_multipart(&name(text)).await.unwrap();
    upload.put_part(1, Bytes::from_static(b"part")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_of_unknown_age_is_never_stale() {
    let server = memory();
    let store = open(&server, "p");
    abandon(&store, "main/a").await;
    server.set_quirks(Quirks { uploads_without_time: true, ..Quirks::default() });
    assert_eq!(store.abort_stale_multiparts("main/", Duration::ZERO).await.unwrap(), 0);
    server.set_quirks(Quirks::default());
    assert_eq!(store.abort_stale_multiparts("main/", Duration::ZERO).await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_of_others_stay_even_when_the_server_lists_them() {
    let server = memory();
    let (ours, beside) = (open(&server, "p"), open(&server, "p-other"));
    for (store, text) in [(&ours, "main/a"), (&ours, "main-other/a"), (&beside, "main/a")] {
        abandon(store, text).await;
    }
    server.set_quirks(Quirks { list_all_uploads: true, ..Quirks::default() });
    assert_eq!(ours.abort_stale_multiparts("main/", Duration::ZERO).await.unwrap(), 1);
    assert_eq!(ours.abort_stale_multiparts("", Duration::ZERO).await.unwrap(), 1);
    assert_eq!(server.upload_count("tidemark"), 1, "that of the other root");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_of_uploads_that_does_not_end_is_an_error() {
    let server = memory();
    let store = open(&server, "p");
    server.set_quirks(Quirks { endless_uploads: true, ..Quirks::default() });
    let day = Duration::from_secs(24 * 3600);
    let refused = async |words: &str| {
        let error = store.abort_stale_multiparts("main/", day).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported, "{error:?}");
        assert!(error.message().contains(words), "{error:?}");
    };
    refused("there is more, but not how to get there").await;
    abandon(&store, "main/a").await;
    refused("its markers lead nowhere").await;
    assert!(store.requests().lists <= 3, "{:?}", store.requests());
}
