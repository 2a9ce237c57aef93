//! That the test server is what it says: seen by the SDK itself, not by our driver.

use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_sdk_s3::types::{
    BucketVersioningStatus, ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart,
    ObjectLockLegalHold, ObjectLockLegalHoldStatus, ObjectLockMode, ObjectLockRetention,
    ObjectLockRetentionMode, VersioningConfiguration,
};
use minis3::{BucketConfig, Config, Server};

use crate::s3_server;

fn client(server: &Server) -> Client {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .endpoint_url(&server.endpoint)
        .region(Region::new("us-east-1"))
        .credentials_provider(Credentials::new(
            &server.config.access_key,
            &server.config.secret_key,
            None,
            None,
            "test",
        ))
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .force_path_style(true)
        .build();
    Client::from_conf(config)
}

fn locked() -> Server {
    let bucket = BucketConfig { name: "bucket".to_owned(), versioning: true, object_lock: true };
    Server::start(Config { buckets: vec![bucket], ..Config::default() }).unwrap()
}

fn plain() -> Server {
    let bucket = BucketConfig { name: "bucket".to_owned(), ..BucketConfig::default() };
    Server::start(Config { buckets: vec![bucket], ..Config::default() }).unwrap()
}

fn body(text: &'static str) -> ByteStream {
    ByteStream::from_static(text.as_bytes())
}

/// The error code of a call that must fail.
macro_rules! refused {
    ($call:expr) => {
        $call.send().await.unwrap_err().into_service_error().meta().code().unwrap().to_owned()
    };
}

async fn read(client: &Client, key: &str, version: Option<&str>) -> Vec<u8> {
    let got =
        client.get_object().bucket("bucket").key(key).set_version_id(version.map(str::to_owned));
    got.send().await.unwrap().body.collect().await.unwrap().to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_are_kept_hidden_and_removed_one_by_one() {
    let server = plain();
    let client = client(&server);
    let enabled = VersioningConfiguration::builder().status(BucketVersioningStatus::Enabled);
    let request = client.put_bucket_versioning().bucket("bucket");
    request.versioning_configuration(enabled.build()).send().await.unwrap();
    let mut ids = Vec::new();
    for text in ["one", "two", "three"] {
        let put =
            client.put_object().bucket("bucket").key("k").body(body(text)).send().await.unwrap();
        ids.push(put.version_id().unwrap().to_owned());
    }
    assert_eq!(read(&client, "k", None).await, b"three");
    assert_eq!(read(&client, "k", Some(&ids[0])).await, b"one");
    let deleted = client.delete_object().bucket("bucket").key("k").send().await.unwrap();
    assert_eq!(deleted.delete_marker(), Some(true));
    assert_eq!(refused!(client.get_object().bucket("bucket").key("k")), "NoSuchKey");
    assert!(client.list_objects_v2().bucket("bucket").send().await.unwrap().contents().is_empty());
    let all = client.list_object_versions().bucket("bucket").send().await.unwrap();
    assert_eq!((all.versions().len(), all.delete_markers().len()), (3, 1));
    let marker = deleted.version_id().unwrap();
    client.delete_object().bucket("bucket").key("k").version_id(marker).send().await.unwrap();
    assert_eq!(read(&client, "k", None).await, b"three");
    for id in &ids {
        client.delete_object().bucket("bucket").key("k").version_id(id).send().await.unwrap();
    }
    let all = client.list_object_versions().bucket("bucket").send().await.unwrap();
    assert!(all.versions().is_empty() && all.delete_markers().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_marker_does_not_stand_in_the_way_of_if_none_match() {
    let server = locked();
    let client = client(&server);
    let put = || client.put_object().bucket("bucket").key("k").if_none_match("*").body(body("x"));
    put().send().await.unwrap();
    assert_eq!(refused!(put()), "PreconditionFailed");
    client.delete_object().bucket("bucket").key("k").send().await.unwrap();
    put().send().await.unwrap();
}

fn in_days(days: i64) -> DateTime {
    DateTime::from_secs(jiff::Timestamp::now().as_second() + days * 86_400)
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_protects_versions_and_governance_can_be_bypassed() {
    let server = locked();
    let client = client(&server);
    for (key, mode) in [("g", ObjectLockMode::Governance), ("c", ObjectLockMode::Compliance)] {
        let put = client.put_object().bucket("bucket").key(key).body(body("x"));
        let put = put.object_lock_mode(mode.clone()).object_lock_retain_until_date(in_days(1));
        let id = put.send().await.unwrap().version_id().unwrap().to_owned();
        let head = client.head_object().bucket("bucket").key(key).send().await.unwrap();
        assert_eq!(head.object_lock_mode(), Some(&mode));
        let delete = || client.delete_object().bucket("bucket").key(key).version_id(&id);
        assert_eq!(refused!(delete()), "AccessDenied");
        let shorter = ObjectLockRetention::builder()
            .mode(ObjectLockRetentionMode::from(mode.as_str()))
            .retain_until_date(in_days(0));
        let shorten = || {
            let request = client.put_object_retention().bucket("bucket").key(key);
            request.retention(shorter.clone().build())
        };
        assert_eq!(refused!(shorten()), "AccessDenied");
        let bypassed = delete().bypass_governance_retention(true).send().await;
        assert_eq!(bypassed.is_ok(), mode == ObjectLockMode::Governance);
    }
    let longer = ObjectLockRetention::builder()
        .mode(ObjectLockRetentionMode::Compliance)
        .retain_until_date(in_days(9));
    let request = client.put_object_retention().bucket("bucket").key("c").retention(longer.build());
    request.send().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_legal_hold_protects_until_it_is_lifted() {
    let server = locked();
    let client = client(&server);
    let put = client.put_object().bucket("bucket").key("k").body(body("x"));
    let id = put.send().await.unwrap().version_id().unwrap().to_owned();
    let hold = |status| {
        let hold = ObjectLockLegalHold::builder().status(status).build();
        client.put_object_legal_hold().bucket("bucket").key("k").legal_hold(hold).send()
    };
    hold(ObjectLockLegalHoldStatus::On).await.unwrap();
    let delete = || client.delete_object().bucket("bucket").key("k").version_id(&id);
    assert_eq!(refused!(delete()), "AccessDenied");
    assert_eq!(refused!(delete().bypass_governance_retention(true)), "AccessDenied");
    hold(ObjectLockLegalHoldStatus::Off).await.unwrap();
    delete().send().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_are_refused_where_the_bucket_has_none() {
    let server = plain();
    let client = client(&server);
    let put = client.put_object().bucket("bucket").key("k").body(body("x"));
    let put = put.object_lock_mode(ObjectLockMode::Governance);
    assert_eq!(refused!(put.object_lock_retain_until_date(in_days(1))), "InvalidRequest");
}

#[tokio::test(flavor = "multi_thread")]
async fn checksums_of_every_kind_are_verified() {
    let server = plain();
    let client = client(&server);
    for algorithm in [
        ChecksumAlgorithm::Crc32,
        ChecksumAlgorithm::Crc32C,
        ChecksumAlgorithm::Crc64Nvme,
        ChecksumAlgorithm::Sha1,
        ChecksumAlgorithm::Sha256,
    ] {
        let key = algorithm.as_str().to_owned();
        let put = client.put_object().bucket("bucket").key(&key).body(body("hello"));
        put.checksum_algorithm(algorithm).send().await.unwrap();
    }
    let put = |key: &str| client.put_object().bucket("bucket").key(key).body(body("hello"));
    assert_eq!(refused!(put("wrong").checksum_crc32_c("AAAAAA==")), "BadDigest");
    assert_eq!(refused!(put("wrong").checksum_crc64_nvme("AAAAAAAAAAA=")), "BadDigest");
    assert_eq!(refused!(put("wrong").content_md5("AAAAAAAAAAAAAAAAAAAAAA==")), "BadDigest");
    put("right").content_md5("XUFAKrxLKna5cZ2REBfFkg==").send().await.unwrap();
    assert!(!server.keys("bucket").contains(&"wrong".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_body_with_a_signed_trailer_is_stored_without_its_framing() {
    let server = plain();
    let client = client(&server);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("body");
    let text: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 253) as u8).collect();
    std::fs::write(&path, &text).unwrap();
    let stream = ByteStream::from_path(&path).await.unwrap();
    client.put_object().bucket("bucket").key("k").body(stream).send().await.unwrap();
    assert!(read(&client, "k", None).await == text);
}

#[tokio::test(flavor = "multi_thread")]
async fn completing_checks_numbers_tags_sizes_and_checksums() {
    let server = plain();
    let client = client(&server);
    let begin = client.create_multipart_upload().bucket("bucket").key("k");
    let begun = begin.checksum_algorithm(ChecksumAlgorithm::Crc32C).send().await.unwrap();
    let id = begun.upload_id().unwrap();
    let part = |number: i32, size: usize| {
        let part = client.upload_part().bucket("bucket").key("k").upload_id(id).part_number(number);
        part.checksum_algorithm(ChecksumAlgorithm::Crc32C).body(vec![number as u8; size].into())
    };
    let small = part(1, 100).send().await.unwrap();
    let last = part(2, 100).send().await.unwrap();
    let completed = |number, etag: &str, sum: Option<&str>| {
        let part = CompletedPart::builder().part_number(number).e_tag(etag);
        part.set_checksum_crc32_c(sum.map(str::to_owned)).build()
    };
    let complete = |parts: Vec<CompletedPart>| {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let request = client.complete_multipart_upload().bucket("bucket").key("k").upload_id(id);
        request.multipart_upload(parts)
    };
    let (one, two) = (small.e_tag().unwrap(), last.e_tag().unwrap());
    let (sum_1, sum_2) = (small.checksum_crc32_c(), last.checksum_crc32_c());
    let both = vec![completed(1, one, sum_1), completed(2, two, sum_2)];
    assert_eq!(refused!(complete(both)), "EntityTooSmall");
    let swapped = vec![completed(2, two, sum_2), completed(1, one, sum_1)];
    assert_eq!(refused!(complete(swapped)), "InvalidPartOrder");
    assert_eq!(refused!(complete(vec![completed(1, two, sum_1)])), "InvalidPart");
    assert_eq!(refused!(complete(vec![completed(1, one, None)])), "InvalidRequest");
    assert_eq!(refused!(complete(vec![completed(1, one, sum_2)])), "InvalidPart");
    let listed = client.list_parts().bucket("bucket").key("k").upload_id(id).send().await.unwrap();
    assert_eq!(listed.parts().len(), 2);
    complete(vec![completed(2, two, sum_2)]).send().await.unwrap();
    assert_eq!(read(&client, "k", None).await, vec![2; 100]);
    assert_eq!(refused!(complete(vec![completed(2, two, sum_2)])), "NoSuchUpload");
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_roll_up_folders_page_by_page() {
    let server = plain();
    let client = client(&server);
    for key in ["a/1", "a/2", "b", "c/1", "c/2/3", "d"] {
        client.put_object().bucket("bucket").key(key).body(body("x")).send().await.unwrap();
    }
    let (mut found, mut token) = (Vec::new(), None);
    loop {
        let request = client.list_objects_v2().bucket("bucket").delimiter("/").max_keys(1);
        let page = request.set_continuation_token(token).send().await.unwrap();
        found.extend(page.contents().iter().map(|object| object.key().unwrap().to_owned()));
        found.extend(page.common_prefixes().iter().map(|p| p.prefix().unwrap().to_owned()));
        token = page.next_continuation_token().map(str::to_owned);
        if token.is_none() {
            break;
        }
    }
    assert_eq!(found, ["a/", "b", "c/", "d"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_are_no_names_of_ours_are_passed_over() {
    let server = s3_server::memory();
    let client = client(&server);
    for index in 0..1100 {
        let key = format!("p/.hidden/{index:04}");
        client.put_object().bucket("tidemark").key(key).body(body("")).send().await.unwrap();
    }
    for key in ["p/", "p/a b", "p/name", "p/zz%", "q"] {
        client.put_object().bucket("tidemark").key(key).body(body("")).send().await.unwrap();
    }
    let listed = s3_server::open(&server, "p").list_all("").await.unwrap();
    let listed: Vec<String> = listed.into_iter().map(|object| object.name.to_string()).collect();
    assert_eq!(listed, ["name"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_request_may_be_fifteen_minutes_from_the_servers_clock() {
    const MINUTE_MS: i64 = 60_000;
    let server = plain();
    let put = async |client: &Client| {
        client.put_object().bucket("bucket").key("k").body(body("x")).send().await.map(drop)
    };
    for ahead in [-14, 14] {
        server.set_clock_ahead_ms(ahead * MINUTE_MS);
        put(&client(&server)).await.unwrap();
    }
    assert_eq!(server.skewed_count(), 0);
    for (ahead, count) in [(-16, 1), (16, 2)] {
        server.set_clock_ahead_ms(ahead * MINUTE_MS);
        let patient = client(&server);
        let hasty = patient.config().to_builder().retry_config(RetryConfig::disabled()).build();
        let put_once = Client::from_conf(hasty).put_object().bucket("bucket").key("k");
        assert_eq!(refused!(put_once.body(body("x"))), "RequestTimeTooSkewed");
        assert_eq!(server.skewed_count(), count);
    }
    // The answer's date tells a client that tries again by how much it is wrong.
    let patient = client(&server);
    put(&patient).await.unwrap();
    put(&patient).await.unwrap();
    assert_eq!(server.skewed_count(), 3);
    // Once the clocks agree again it is the correction that is wrong, until the next answer.
    server.set_clock_ahead_ms(0);
    assert_eq!(
        refused!(patient.put_object().bucket("bucket").key("k").body(body("x"))),
        "RequestTimeTooSkewed"
    );
    put(&patient).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_endpoint_sets_faults_and_shows_counters() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = plain();
    let control = server.control_endpoint.clone().unwrap();
    let ask = async |method: &str, path: &str, body: &str| {
        let address = control.strip_prefix("http://").unwrap();
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let fault = r#"{"on":["GetObject"],"times":1,"effect":{"kind":"error","status":403,"code":"AccessDenied"}}"#;
    assert!(ask("POST", "/faults", fault).await.contains("200 OK"));
    assert!(ask("POST", "/faults", "{}").await.contains("400 Bad Request"));
    assert!(ask("PUT", "/quirks", r#"{"ignore_conditions":true}"#).await.contains("200 OK"));
    assert!(server.quirks().ignore_conditions);
    let client = client(&server);
    client.put_object().bucket("bucket").key("k").body(body("x")).send().await.unwrap();
    assert_eq!(refused!(client.get_object().bucket("bucket").key("k")), "AccessDenied");
    assert_eq!(read(&client, "k", None).await, b"x");
    let counters = ask("GET", "/counters", "").await;
    assert!(counters.contains("\"GetObject\": 2"), "{counters}");
    assert!(ask("GET", "/health", "").await.contains("\"ok\": true"));
}
