//! Connections: what happens to a request before and after S3 proper.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, DATE, ETAG, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use s3s::config::{S3Config, StaticConfigProvider};
use s3s::dto::{Timestamp, TimestampFormat};
use s3s::host::SingleDomain;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, StdError};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::control;
use crate::faults::{Effect, Op};
use crate::service::{Keys, MiniS3, Shared, ms_of, timestamp};
use crate::{Config, Tls};

/// Bytes of a refused upload that are read so that the client gets to see the answer.
const DRAIN_BYTES_MAX: u64 = 64 << 20;
/// How far the date of a signed request may be from the server's clock: AWS's fifteen minutes.
const SKEW_MS_MAX: u64 = 15 * 60 * 1000;

/// Binds both ports and serves them until the runtime ends.
pub(crate) async fn listen(
    config: &Config,
    shared: &Arc<Shared>,
) -> io::Result<(SocketAddr, Option<SocketAddr>)> {
    let listener = TcpListener::bind(config.listen).await?;
    let address = listener.local_addr()?;
    let tls = config.tls.as_ref().map(acceptor).transpose()?;
    let front = Arc::new(Front { service: service(config, shared)?, shared: Arc::clone(shared) });
    let control = match config.control {
        None => None,
        Some(control) => {
            let control = TcpListener::bind(control).await?;
            let address = control.local_addr()?;
            tokio::spawn(control::serve(control, Arc::clone(shared)));
            Some(address)
        }
    };
    tokio::spawn(accept(listener, tls, front));
    Ok((address, control))
}

fn service(config: &Config, shared: &Arc<Shared>) -> io::Result<S3Service> {
    let mut builder = S3ServiceBuilder::new(MiniS3(Arc::clone(shared)));
    builder.set_auth(Keys(Arc::clone(shared)));
    let mut settings = S3Config::default();
    settings.xml_max_body_size = 4 << 20;
    // It judges dates by the machine's clock; we do by ours, which can be set.
    settings.presigned_url_max_skew_time_secs = u32::MAX;
    builder.set_config(Arc::new(StaticConfigProvider::new(Arc::new(settings))));
    if let Some(domain) = &config.domain {
        builder.set_host(SingleDomain::new(domain).map_err(io::Error::other)?);
    }
    Ok(builder.build())
}

fn acceptor(tls: &Tls) -> io::Result<TlsAcceptor> {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(tls.certificate_pem.as_bytes()).collect();
    let key = PrivateKeyDer::from_pem_slice(tls.key_pem.as_bytes()).map_err(io::Error::other)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_no_client_auth()
        .with_single_cert(chain.map_err(io::Error::other)?, key)
        .map_err(io::Error::other)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, front: Arc<Front>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        tokio::spawn(serve(stream, tls.clone(), Arc::clone(&front)));
    }
}

async fn serve(stream: TcpStream, tls: Option<TlsAcceptor>, front: Arc<Front>) {
    match tls {
        None => serve_on(stream, front).await,
        Some(tls) => {
            if let Ok(stream) = tls.accept(stream).await {
                serve_on(stream, front).await;
            }
        }
    }
}

async fn serve_on(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, front: Arc<Front>) {
    let service = service_fn(move |request| {
        let front = Arc::clone(&front);
        async move { front.answer(request).await }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .max_buf_size(1 << 20)
        .serve_connection(TokioIo::new(stream), service);
    // An error here is a connection that broke, by a fault of ours or by the client.
    let _ = connection.await;
}

struct Front {
    service: S3Service,
    shared: Arc<Shared>,
}

/// Ends the connection without an answer.
fn hang_up<T>() -> io::Result<T> {
    Err(io::Error::other("connection closed by a fault"))
}

impl Front {
    async fn answer(&self, request: Request<Incoming>) -> io::Result<Response<Body>> {
        let op = op_of(&request);
        let path = request.uri().path().to_owned();
        self.shared.counters.request(op, announced(request.headers()));
        let effect = self.shared.faults.draw(op, &path);
        if effect.is_some() {
            self.shared.counters.fault();
        }
        let mut response = match &effect {
            None => self.serve(request).await?,
            Some(effect) => self.suffer(effect, request).await?,
        };
        self.shared.counters.sent(announced(response.headers()));
        if let Some(date) = http_date(self.shared.time_ms()) {
            response.headers_mut().insert(DATE, date);
        }
        if op != Op::Other && !response.headers().contains_key("x-amz-request-id") {
            response.headers_mut().insert("x-amz-request-id", HeaderValue::from_static("MINIS3"));
        }
        Ok(response)
    }

    async fn serve(&self, request: Request<Incoming>) -> io::Result<Response<Body>> {
        if let Some(refusal) = self.wrong_date(&request).or_else(|| self.wrong_region(&request)) {
            drain(request.into_body()).await;
            return Ok(refusal);
        }
        let answer = self.service.call(request.map(Body::from)).await;
        answer.map_err(|error| io::Error::other(StdError::from(error)))
    }

    async fn suffer(
        &self,
        effect: &Effect,
        request: Request<Incoming>,
    ) -> io::Result<Response<Body>> {
        match effect {
            Effect::Error { status, code } => {
                drain(request.into_body()).await;
                Ok(refusal(*status, code, "a fault was asked for"))
            }
            Effect::ErrorAfter { status, code } => {
                self.serve(request).await?;
                Ok(refusal(*status, code, "a fault was asked for, the work was done"))
            }
            Effect::ErrorIn200 { code } => {
                drain(request.into_body()).await;
                Ok(refusal(200, code, "a fault was asked for"))
            }
            Effect::Page => {
                drain(request.into_body()).await;
                let mut page =
                    Response::new(Body::from("<html><body>Back soon</body></html>".to_owned()));
                page.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/html"));
                Ok(page)
            }
            Effect::Reset => hang_up(),
            Effect::LostReply => {
                let _ = self.serve(request).await?;
                hang_up()
            }
            Effect::ResetUpload { after_bytes } => {
                let mut body = Body::from(request.into_body());
                let mut read = 0;
                while let Some(Ok(chunk)) = body.next().await {
                    read += chunk.len() as u64;
                    if read >= *after_bytes {
                        break;
                    }
                }
                hang_up()
            }
            Effect::CutDownload { after_bytes } => {
                let response = self.serve(request).await?;
                Ok(response.map(|body| Tampered::cut(body, *after_bytes)))
            }
            Effect::Rot { at_byte } => {
                let response = self.serve(request).await?;
                Ok(response.map(|body| Tampered::flip(body, *at_byte)))
            }
            Effect::WrongEtag => {
                let mut response = self.serve(request).await?;
                let etag = HeaderValue::from_static("\"00000000000000000000000000000bad\"");
                response.headers_mut().insert(ETAG, etag);
                Ok(response)
            }
            Effect::Delay { ms } => {
                tokio::time::sleep(Duration::from_millis(*ms)).await;
                self.serve(request).await
            }
            Effect::Hang => std::future::pending().await,
            Effect::HangAfter => {
                let _ = self.serve(request).await?;
                std::future::pending().await
            }
            Effect::LosePart => {
                let part = part_of(&request);
                let response = self.serve(request).await?;
                if let Some((bucket, id, number)) = part {
                    self.shared.lose_part(&bucket, &id, number);
                }
                Ok(response)
            }
        }
    }

    /// AWS's answer to a request that was signed at another time than this server's.
    fn wrong_date(&self, request: &Request<Incoming>) -> Option<Response<Body>> {
        request.headers().get("authorization")?;
        let signed_ms = amz_date_ms(request.headers().get("x-amz-date")?.to_str().ok()?)?;
        (self.shared.time_ms().abs_diff(signed_ms) > SKEW_MS_MAX).then(|| {
            self.shared.skewed_count.fetch_add(1, Ordering::Relaxed);
            let message =
                "The difference between the request time and the current time is too large.";
            refusal(403, "RequestTimeTooSkewed", message)
        })
    }

    /// AWS's answer to a request that was signed for another region.
    fn wrong_region(&self, request: &Request<Incoming>) -> Option<Response<Body>> {
        let expected = self.shared.region.as_deref()?;
        let authorization = request.headers().get("authorization")?.to_str().ok()?;
        let scope = authorization.split_once("Credential=")?.1.split(',').next()?;
        let region = scope.split('/').nth(2)?;
        (region != expected).then(|| {
            let message = format!(
                "The authorization header is malformed; the region '{region}' is wrong; \
                 expecting '{expected}'"
            );
            refusal(400, "AuthorizationHeaderMalformed", &message)
        })
    }
}

/// Milliseconds of a time as requests are signed with, `20261129T101500Z`.
fn amz_date_ms(text: &str) -> Option<u64> {
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    let part = |text: &str, from: usize, until: usize| text.get(from..until).map(str::to_owned);
    let date = [part(date, 0, 4)?, part(date, 4, 6)?, part(date, 6, 8)?].join("-");
    let time = [part(time, 0, 2)?, part(time, 2, 4)?, part(time, 4, 6)?].join(":");
    let text = format!("{date}T{time}Z");
    Some(ms_of(&Timestamp::parse(TimestampFormat::DateTime, &text).ok()?))
}

fn http_date(time_ms: u64) -> Option<HeaderValue> {
    let mut text = Vec::new();
    timestamp(time_ms).format(TimestampFormat::HttpDate, &mut text).ok()?;
    HeaderValue::from_bytes(&text).ok()
}

fn announced(headers: &hyper::HeaderMap) -> u64 {
    let length = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    length.and_then(|length| length.parse().ok()).unwrap_or(0)
}

/// Reads a body so that the client is done sending when it gets its answer.
async fn drain(body: Incoming) {
    let mut body = Body::from(body);
    let mut read = 0;
    while let Some(Ok(chunk)) = body.next().await {
        read += chunk.len() as u64;
        if read > DRAIN_BYTES_MAX {
            return;
        }
    }
}

fn refusal(status: u16, code: &str, message: &str) -> Response<Body> {
    let document = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code>\
         <Message>{message}</Message><RequestId>MINIS3</RequestId></Error>"
    );
    let mut response = Response::new(Body::from(document));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or_default();
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/xml"));
    response
}

/// Which operation a request is for, as far as it matters here.
fn op_of(request: &Request<Incoming>) -> Op {
    let query = request.uri().query().unwrap_or("");
    let has = |name: &str| {
        query.split('&').any(|pair| pair.split('=').next().is_some_and(|key| key == name))
    };
    let path = request.uri().path().trim_start_matches('/');
    let in_bucket = path.split_once('/').is_some_and(|(_, key)| !key.is_empty());
    match (request.method(), in_bucket) {
        (&Method::PUT, true) if has("partNumber") => Op::UploadPart,
        (&Method::PUT, true) if !has("retention") && !has("legal-hold") => Op::PutObject,
        (&Method::POST, true) if has("uploads") => Op::CreateMultipartUpload,
        (&Method::POST, true) if has("uploadId") => Op::CompleteMultipartUpload,
        (&Method::POST, false) if has("delete") => Op::DeleteObjects,
        (&Method::GET, true) if has("uploadId") => Op::ListParts,
        (&Method::GET, true) if !has("retention") && !has("legal-hold") => Op::GetObject,
        (&Method::GET, false) if has("uploads") => Op::ListMultipartUploads,
        (&Method::GET, false) if has("versions") => Op::ListVersions,
        (&Method::GET, false) if has("list-type") => Op::ListObjects,
        (&Method::HEAD, true) => Op::HeadObject,
        (&Method::DELETE, true) if has("uploadId") => Op::AbortMultipartUpload,
        (&Method::DELETE, true) => Op::DeleteObject,
        _ => Op::Other,
    }
}

/// Bucket, upload and number of the part that a path-style request brings.
fn part_of(request: &Request<Incoming>) -> Option<(String, String, u32)> {
    let query = request.uri().query()?;
    let value = |name: &str| {
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(key, _)| *key == name).map(|(_, value)| value.to_owned()).next()
    };
    let bucket = request.uri().path().trim_start_matches('/').split('/').next()?.to_owned();
    Some((bucket, value("uploadId")?, value("partNumber")?.parse().ok()?))
}

/// A body that breaks off, or of which one bit is flipped.
struct Tampered {
    inner: Body,
    at: u64,
    cut_at: Option<u64>,
    flip_at: Option<u64>,
}

impl Tampered {
    fn cut(inner: Body, cut_at: u64) -> Body {
        Body::http_body_unsync(Self { inner, at: 0, cut_at: Some(cut_at), flip_at: None })
    }

    fn flip(inner: Body, flip_at: u64) -> Body {
        Body::http_body_unsync(Self { inner, at: 0, cut_at: None, flip_at: Some(flip_at) })
    }

    fn tamper(&mut self, mut chunk: Bytes) -> io::Result<Bytes> {
        let (start, end) = (self.at, self.at + chunk.len() as u64);
        self.at = end;
        if let Some(cut_at) = self.cut_at.filter(|cut_at| *cut_at < end) {
            let keep = usize::try_from(cut_at.saturating_sub(start)).unwrap_or(0);
            chunk.truncate(keep);
            return if chunk.is_empty() { hang_up() } else { Ok(chunk) };
        }
        if let Some(flip_at) = self.flip_at.filter(|flip_at| (start..end).contains(flip_at)) {
            let mut bytes = BytesMut::from(chunk);
            let index = usize::try_from(flip_at - start).unwrap_or(0);
            if let Some(byte) = bytes.get_mut(index) {
                *byte ^= 1;
            }
            return Ok(bytes.freeze());
        }
        Ok(chunk)
    }
}

impl HttpBody for Tampered {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if self.cut_at.is_some_and(|cut_at| self.at > cut_at) {
            return Poll::Ready(Some(hang_up()));
        }
        match Pin::new(&mut self.inner).poll_next_unpin(context) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(io::Error::other(error)))),
            Poll::Ready(Some(Ok(chunk))) => Poll::Ready(Some(self.tamper(chunk).map(Frame::data))),
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// For services that cannot fail.
pub(crate) type Answer = Result<Response<Body>, Infallible>;
