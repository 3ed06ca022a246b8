//! With TLS: who may call what. With `--tls-client-ca` only clients with a certificate, but for probes, which have none and
//! may ask for health. Workers join with the cluster's certificate, and that opens nothing else.

use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tls::Certified;
use tonic::Status;

use crate::http::ApiError;

const WANTED: &str = "this router wants a client certificate that its --tls-client-ca has signed";

const JOIN: &str = "/tandem.v1.Registry/";

/// What the port wants of clients.
#[derive(Debug, Clone, Copy)]
pub struct Wants {
    /// A certificate.
    pub certificate: bool,
}

/// What anybody may ask: whether we live and are ready.
fn is_probe(path: &str) -> bool {
    matches!(path, "/health" | "/live" | "/grpc.health.v1.Health/Check")
}

/// Why a call is refused, if it is. The certificate itself was checked in the handshake.
fn refusal(wants: Wants, path: &str, certified: Option<&Certified>) -> Option<Status> {
    let (is_cluster, has_certificate) =
        certified.map_or((false, false), |c| (c.is_cluster, c.has_certificate));
    match (is_cluster, path.starts_with(JOIN)) {
        _ if is_probe(path) => None,
        (true, true) => None,
        (true, false) => Some(Status::permission_denied("the cluster's certificate is for joining only")),
        (false, true) => Some(Status::unauthenticated(
            "workers join with --cluster-cert, --cluster-key and --cluster-ca, on both sides",
        )),
        (false, false) if wants.certificate && !has_certificate => Some(Status::unauthenticated(WANTED)),
        (false, false) => None,
    }
}

/// Lets through who may call.
pub async fn require(State(wants): State<Wants>, request: Request, next: Next) -> Response {
    match refusal(wants, request.uri().path(), request.extensions().get()) {
        None => next.run(request).await,
        Some(status) => refuse(&request, status),
    }
}

/// The refusal in the words of whoever asks: gRPC, an OpenAI client, a person.
pub(crate) fn refuse(request: &Request, status: Status) -> Response {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if kind.is_some_and(|kind| kind.starts_with("application/grpc")) {
        return status.into_http();
    }
    match request.uri().path().starts_with("/v1/") {
        true => ApiError::from(status).into_response(),
        false => (StatusCode::UNAUTHORIZED, format!("{}\n", status.message())).into_response(),
    }
}
