//! With `--tls-client-ca`: only clients with a certificate may call. Probes have none and may ask for health.

use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tonic::Status;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};

use crate::http::ApiError;

const WANTED: &str = "this router wants a client certificate that its --tls-client-ca has signed";

/// What anybody may ask: whether we live and are ready.
fn is_probe(path: &str) -> bool {
    matches!(path, "/health" | "/live" | "/grpc.health.v1.Health/Check")
}

/// Lets certified clients and probes through. The certificate itself was checked in the handshake.
pub async fn require(request: Request, next: Next) -> Response {
    let info = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>();
    let is_certified = info.and_then(TlsConnectInfo::peer_certs).is_some_and(|chain| !chain.is_empty());
    if is_certified || is_probe(request.uri().path()) {
        return next.run(request).await;
    }
    refuse(&request, Status::unauthenticated(WANTED))
}

/// The refusal in the words of whoever asks: gRPC, an OpenAI client, a person.
fn refuse(request: &Request, status: Status) -> Response {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if kind.is_some_and(|kind| kind.starts_with("application/grpc")) {
        return status.into_http();
    }
    match request.uri().path().starts_with("/v1/") {
        true => ApiError::from(status).into_response(),
        false => (StatusCode::UNAUTHORIZED, format!("{}\n", status.message())).into_response(),
    }
}
