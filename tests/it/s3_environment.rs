//! What the S3 driver takes from its environment, which the tests of this process share: each is run again
//! in a process of its own.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use bytes::Bytes;
use tidemark::clock::Clock;
use tidemark::error::Kind;
use tidemark::store::{self, ObjectName, Store, StoreOptions};

const MARK: &str = "TIDEMARK_TEST_CHILD";

/// Runs the test of that name again in a process that has this environment; `None` in that process.
fn with_environment(test: &str, variables: &[(&str, &str)]) -> Option<Child> {
    if std::env::var_os(MARK).is_some() {
        return None;
    }
    let test = format!("s3_environment::{test}");
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", &test, "--nocapture"]).env(MARK, "1");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("AWS_") {
            child.env_remove(name);
        }
    }
    child.env("AWS_EC2_METADATA_DISABLED", "true").envs(variables.iter().copied());
    Some(child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// What such a process wrote.
fn passed(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout.as_slice(), &output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    text
}

fn open(options: &StoreOptions) -> std::sync::Arc<dyn Store> {
    store::open("s3://tidemark/p", options, &Clock::system()).unwrap()
}

/// The head of the next request, which is then answered with a refusal.
fn next_request(server: &TcpListener) -> String {
    let (mut socket, _) = server.accept().unwrap();
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let mut byte = [0];
        socket.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let refusal = "<Error><Code>MethodNotAllowed</Code><Message>no</Message></Error>";
    let length = refusal.len();
    let status = "HTTP/1.1 405 No\r\nContent-Type: application/xml\r\nConnection: close";
    let answer = format!("{status}\r\nContent-Length: {length}\r\n\r\n{refusal}");
    socket.write_all(answer.as_bytes()).unwrap();
    String::from_utf8(head).unwrap()
}

#[tokio::test]
async fn an_endpoint_from_anywhere_is_held_to_the_same_rules() {
    let name = "an_endpoint_from_anywhere_is_held_to_the_same_rules";
    if std::env::var_os(MARK).is_some() {
        let store = open(&StoreOptions::default());
        let name = ObjectName::new("a").unwrap();
        println!("{:?}", store.put_if_absent(&name, "b".into()).await.unwrap_err());
        return;
    }
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let plain = format!("http://{}", server.local_addr().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let profile = folder.path().join("config");
    let text = format!(
        "[default]\nservices = here\n[services here]\ns3 =\n  endpoint_url = {plain}\n\
         [profile all]\nendpoint_url = {plain}\n"
    );
    std::fs::write(&profile, text).unwrap();
    let (file, plain) = (profile.to_str().unwrap(), plain.as_str());
    let keys = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];
    for variables in [
        &[("AWS_ENDPOINT_URL_S3", plain), ("AWS_ENDPOINT_URL", "https://b:9")][..],
        &[("AWS_ENDPOINT_URL", plain)],
        &[("AWS_CONFIG_FILE", file)],
        &[("AWS_CONFIG_FILE", file), ("AWS_PROFILE", "all")],
    ] {
        let child = with_environment(name, &[&keys[..], variables].concat()).unwrap();
        let request = next_request(&server).to_ascii_lowercase();
        assert!(request.starts_with("put /tidemark/p/a?"), "path style: {request}");
        let unsigned = request.contains("unsigned-payload");
        assert!(!unsigned, "without TLS the body is signed: {request}");
        passed(child);
    }
    let secret = "http://user:hush@a:9";
    for variable in ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"] {
        let child = with_environment(name, &[&keys[..], &[(variable, secret)]].concat()).unwrap();
        let told = passed(child);
        assert!(told.contains("an endpoint with a user name in it"), "{told}");
        assert!(!told.contains("hush"), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_were_changed_in_the_profile_are_found() {
    let name = "keys_that_were_changed_in_the_profile_are_found";
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("credentials");
    match with_environment(name, &[("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap())]) {
        Some(child) => drop(passed(child)),
        None => change_keys().await,
    }
}

/// In a process whose environment names a file of credentials, not yet written.
async fn change_keys() {
    let file = std::env::var("AWS_SHARED_CREDENTIALS_FILE").unwrap();
    let server = minis3::Server::in_memory().unwrap();
    let change = |id: &str, in_file: bool| {
        server.set_keys(id, &format!("secret of {id}"));
        let text = format!(
            "[default]\naws_access_key_id = {id}\naws_secret_access_key = secret of {id}\n"
        );
        if in_file {
            std::fs::write(&file, text).unwrap();
        }
    };
    change("first", true);
    let options =
        StoreOptions { endpoint: Some(server.endpoint.clone()), ..StoreOptions::default() };
    let store = open(&options);
    let name = ObjectName::new("a").unwrap();
    let put = async || store.put_if_absent(&name, Bytes::new()).await;
    put().await.unwrap();
    change("second", true);
    let heads = (0..8).map(|_| store.head(&name));
    for head in futures::future::join_all(heads).await {
        assert!(head.unwrap().is_some());
    }
    put().await.unwrap();
    // At most once a minute.
    change("third", true);
    let error = put().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Denied, "{error}");
    // Keys that are wrong everywhere cost one request more.
    let store = open(&options);
    change("fourth", false);
    assert_eq!(store.get(&name, None).await.unwrap_err().kind(), Kind::Denied);
    assert_eq!(store.get(&name, None).await.unwrap_err().kind(), Kind::Denied);
    assert_eq!(store.requests().gets, 3, "one try more, once");
}
