//! Mutual TLS on a worker's one address: calls only from routers, KV only from the workers that a ticket is for, pages for
//! whoever has a certificate of the cluster's authority, health for everybody.

use std::io;
use std::sync::Arc;

use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::future::{BoxFuture, FutureExt};
use kv_transport::{Secure, Socket, SpeaksFor};
use tls::cluster::KV;
use tls::server::Secured;
use tls::{Certified, ClusterFiles, Names, Part};
use tokio::net::TcpStream;
use tonic::Status;

/// What a worker's port speaks.
pub const PROTOCOLS: &[&[u8]] = &[KV, tls::cluster::H2, b"http/1.1"];

/// The way to other workers' KV.
#[derive(Debug)]
pub struct KvSecure(pub ClusterFiles);

impl Secure for KvSecure {
    fn secure<'a>(&'a self, stream: TcpStream, receiver: &'a str) -> BoxFuture<'a, io::Result<Socket>> {
        async move {
            let secured = self.0.connect(stream, Part::Worker(receiver.to_owned()), KV).await?;
            let (stream, session) = secured.into_inner();
            let leaf = session.peer_certificates().and_then(|chain| chain.first());
            let names = leaf.map(Names::of).unwrap_or_default();
            Ok(Socket::encrypted(stream, session.into(), Some(speaks_for(names))))
        }
        .boxed()
    }
}

fn speaks_for(names: Names) -> SpeaksFor {
    Arc::new(move |worker| names.cover(&Part::Worker(worker.to_owned())))
}

/// A KV connection that came in.
pub fn kv_socket(secured: Secured) -> Socket {
    let (stream, session, certified) = secured.into_parts();
    let speaks_for = certified.has_certificate.then(|| speaks_for(certified.names));
    Socket::encrypted(stream, session.into(), speaks_for)
}

/// Why a call is refused, if it is.
fn refusal(path: &str, certified: Option<&Certified>) -> Option<Status> {
    if matches!(path, "/health" | "/live" | "/grpc.health.v1.Health/Check") {
        return None;
    }
    let Some(certified) = certified.filter(|certified| certified.has_certificate) else {
        return Some(Status::unauthenticated(
            "this worker wants a certificate that its --cluster-ca has signed",
        ));
    };
    let is_call = path.starts_with("/tandem.");
    (is_call && !certified.names.cover(&Part::Router)).then(|| {
        Status::permission_denied(format!(
            "only routers may call a worker; your certificate speaks for {}, not for {}",
            certified.names,
            Part::Router
        ))
    })
}

/// Lets routers, certified readers of pages, and probes through. The certificate itself was checked in the handshake.
pub(crate) async fn require(request: Request, next: Next) -> Response {
    let Some(status) = refusal(request.uri().path(), request.extensions().get()) else {
        return next.run(request).await;
    };
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if kind.is_some_and(|kind| kind.starts_with("application/grpc")) {
        return status.into_http();
    }
    (StatusCode::UNAUTHORIZED, format!("{}\n", status.message())).into_response()
}
