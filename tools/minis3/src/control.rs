//! The control endpoint: faults, quirks and counters as JSON over HTTP.

use std::sync::Arc;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use s3s::Body;
use tokio::net::TcpListener;

use crate::connection::Answer;
use crate::faults::Fault;
use crate::quirks::Quirks;
use crate::service::Shared;

/// Longest request body.
const BODY_BYTES_MAX: usize = 64 << 10;

pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let shared = Arc::clone(&shared);
                async move { answer(&shared, request).await }
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(shared: &Shared, request: Request<Incoming>) -> Answer {
    let (parts, body) = request.into_parts();
    let mut body = Body::from(body);
    let body = match body.store_all_limited(BODY_BYTES_MAX).await {
        Ok(body) => body,
        Err(error) => return Ok(text(StatusCode::BAD_REQUEST, error.to_string())),
    };
    let path = parts.uri.path();
    let id = path.strip_prefix("/faults/").and_then(|id| id.parse::<u64>().ok());
    Ok(match (&parts.method, path, id) {
        (&Method::GET, "/health", _) => json(&serde_json::json!({ "ok": true })),
        (&Method::GET, "/counters", _) => json(&shared.counters.counts()),
        (&Method::DELETE, "/counters", _) => {
            shared.counters.reset();
            json(&serde_json::json!({ "ok": true }))
        }
        (&Method::GET, "/faults", _) => json(&shared.faults.all()),
        (&Method::POST, "/faults", _) => match serde_json::from_slice::<Fault>(&body) {
            Ok(fault) => json(&serde_json::json!({ "id": shared.faults.add(fault) })),
            Err(error) => text(StatusCode::BAD_REQUEST, error.to_string()),
        },
        (&Method::DELETE, "/faults", _) => {
            shared.faults.clear();
            json(&serde_json::json!({ "ok": true }))
        }
        (&Method::DELETE, _, Some(id)) => {
            shared.faults.remove(id);
            json(&serde_json::json!({ "ok": true }))
        }
        (&Method::GET, "/quirks", _) => json(&shared.quirks()),
        (&Method::PUT, "/quirks", _) => match serde_json::from_slice::<Quirks>(&body) {
            Ok(quirks) => {
                shared.set_quirks(quirks);
                json(&shared.quirks())
            }
            Err(error) => text(StatusCode::BAD_REQUEST, error.to_string()),
        },
        _ => text(StatusCode::NOT_FOUND, format!("no {} {path} here", parts.method)),
    })
}

fn json(value: &impl serde::Serialize) -> Response<Body> {
    match serde_json::to_string_pretty(value) {
        Ok(document) => text(StatusCode::OK, document),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn text(status: StatusCode, mut body: String) -> Response<Body> {
    body.push('\n');
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    response
}
