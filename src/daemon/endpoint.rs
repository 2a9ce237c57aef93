//! The HTTP endpoint that Prometheus asks: one page, read only.
//!
//! # Shape
//! `GET /metrics` is answered with the page, anything else with 404 or 405. One request a connection:
//! a scrape every few seconds needs no more.
//!
//! # Invariants
//! Nothing of what is sent here is kept or believed: of a request only the first line is looked at, it
//! may have `REQUEST_BYTES_MAX`, it must come within `REQUEST_TIME_MAX`, and at most
//! `CONNECTIONS_MAX` are listened to at a time.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::error::{Error, Result};

/// Longest request, its headers included.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// Longest that a request may take to come, or an answer to be taken.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(5);
/// Connections at a time; others wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 8;
/// After a connection could not be accepted, for want of file descriptors say.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Makes the page.
pub type Page = Arc<dyn Fn() -> String + Send + Sync>;

/// A place to be asked at.
#[derive(Debug)]
pub struct Endpoint {
    listener: TcpListener,
}

impl Endpoint {
    /// Listens at `address`.
    ///
    /// # Errors
    /// What the system says: `unavailable` while the address is another's, or not this machine's yet.
    pub async fn bind(address: SocketAddr) -> Result<Self> {
        match TcpListener::bind(address).await {
            Ok(listener) => Ok(Self { listener }),
            Err(error) => {
                let message = format!("unable to listen at {address}");
                Err(Error::io(message, &error).hint(
                    "See who has that address; if it stays so, choose another with 'metrics.listen'.",
                ))
            }
        }
    }

    /// Where it listens: with the port that was given when none was chosen.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }

    /// Answers until dropped.
    pub async fn serve(self, content_type: &'static str, page: Page) -> Infallible {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            // Never closed, so there is always a place in the end.
            let place = Arc::clone(&places).acquire_owned().await.ok();
            match self.listener.accept().await {
                Ok((socket, _)) => {
                    let page = Arc::clone(&page);
                    tokio::spawn(async move {
                        let answered = tokio::time::timeout(
                            REQUEST_TIME_MAX,
                            answer(socket, content_type, &page),
                        );
                        // Whoever asks and goes away, or says nothing, gets nothing.
                        if let Ok(Err(error)) = answered.await {
                            tracing::debug!("a request for metrics was not answered: {error}");
                        }
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::debug!("unable to accept a request for metrics: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn answer(mut socket: TcpStream, content_type: &str, page: &Page) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|four| four == b"\r\n\r\n") {
        let mut piece = [0; 1024];
        let count = socket.read(&mut piece).await?;
        request.extend_from_slice(piece.get(..count).unwrap_or_default());
        if count == 0 || request.len() > REQUEST_BYTES_MAX {
            break;
        }
    }
    let (status, content_type, body) = match wanted(&request) {
        Wanted::Page => ("200 OK", content_type, page()),
        Wanted::Elsewhere => ("404 Not Found", "text/plain", "metrics are at /metrics\n".into()),
        Wanted::OtherMethod => ("405 Method Not Allowed", "text/plain", "only GET\n".into()),
        Wanted::Nothing => ("400 Bad Request", "text/plain", "not an HTTP request\n".into()),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).await?;
    socket.write_all(body.as_bytes()).await?;
    socket.shutdown().await
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Page,
    Elsewhere,
    OtherMethod,
    Nothing,
}

fn wanted(request: &[u8]) -> Wanted {
    let line = request.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target, version) = (words.next(), words.next(), words.next());
    let is_http = version.is_some_and(|version| version.starts_with(b"HTTP/1."));
    let path = target.and_then(|target| target.split(|byte| *byte == b'?').next());
    match (method, path) {
        _ if !is_http || words.next().is_some() => Wanted::Nothing,
        (Some(b"GET"), Some(b"/metrics")) => Wanted::Page,
        (Some(b"GET"), _) => Wanted::Elsewhere,
        _ => Wanted::OtherMethod,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn requests_are_told_apart_by_their_first_line() {
        for (request, expected) in [
            ("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", Wanted::Page),
            ("GET /metrics?x=y HTTP/1.0\r\n\r\n", Wanted::Page),
            ("GET / HTTP/1.1\r\n\r\n", Wanted::Elsewhere),
            ("GET /metrics/ HTTP/1.1\r\n\r\n", Wanted::Elsewhere),
            ("POST /metrics HTTP/1.1\r\n\r\n", Wanted::OtherMethod),
            ("GET /metrics", Wanted::Nothing),
            ("GET /a b HTTP/1.1\r\n\r\n", Wanted::Nothing),
            ("\u{16}\u{3}\u{1}", Wanted::Nothing),
            ("", Wanted::Nothing),
        ] {
            assert_eq!(wanted(request.as_bytes()), expected, "{request:?}");
        }
    }

    async fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(request).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn the_page_is_made_for_each_request_and_bad_ones_hold_nothing_up() {
        let endpoint = Endpoint::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let address = endpoint.address().unwrap();
        let taken = Endpoint::bind(address).await.unwrap_err();
        assert_eq!(taken.kind(), Kind::Unavailable);
        let asked = std::sync::atomic::AtomicU64::new(0);
        let page: Page = Arc::new(move || {
            let count = asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) + 1;
            format!("a_total {count}\n")
        });
        let serving = tokio::spawn(endpoint.serve("text/plain", page));
        // Some say nothing; as long as a place is left the others are answered.
        let mut silent = Vec::new();
        for _ in 1..CONNECTIONS_MAX {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        for count in 1..4 {
            let answer = ask(address, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n").await;
            assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
            assert!(answer.contains("Content-Length: 10\r\n"), "{answer}");
            assert!(answer.ends_with(&format!("\r\n\r\na_total {count}\n")), "{answer}");
        }
        assert!(ask(address, b"GET / HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 404 "));
        let long = [b"GET /".as_slice(), &[b'a'; 2 * REQUEST_BYTES_MAX]].concat();
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(&long).await.unwrap();
        let mut first = [0; 12];
        socket.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 400");
        serving.abort();
    }
}
