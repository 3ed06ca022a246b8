//! Who may call what, with keys: everything of the client API wants one, telling workers what to do wants an operator's.
//! Health, metrics, the status page, reflection and joining have their own rules and want none.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use tonic::Status;

use super::{Client, Keys};
use crate::certified::refuse;
use crate::metrics::KeyMetrics;

const WANTED: &str =
    "this router wants an API key: Authorization: Bearer KEY (tandem: --api-key-file, or TANDEM_API_KEY)";

/// The keys, and what is counted.
#[derive(Clone)]
pub struct Guard {
    /// Who may call.
    pub keys: Keys,
    /// What is counted.
    pub metrics: Arc<KeyMetrics>,
}

impl Guard {
    /// Whose call this is; None where no key is wanted.
    fn check(&self, path: &str, headers: &HeaderMap) -> Result<Option<Arc<Client>>, Status> {
        let is_operation = path.starts_with("/tandem.v1.Operator/");
        if !(is_operation || path.starts_with("/tandem.v1.Inference/") || path.starts_with("/v1/")) {
            return Ok(None);
        }
        let refused = |reason: &str, status: Status| {
            self.metrics.refused.of(reason).increment(1);
            Err(status)
        };
        let Some(key) = bearer(headers) else {
            return refused("missing", Status::unauthenticated(WANTED));
        };
        let Some(client) = self.keys.find(key) else {
            return refused("unknown", Status::unauthenticated("this API key is not known (any more)"));
        };
        if is_operation && !path.ends_with("/GetStatus") && !client.entry.is_operator {
            let why = "this API key is no operator's; its line in the file of keys lacks the word `operator`";
            return refused("not_operator", Status::permission_denied(why));
        }
        Ok(Some(client))
    }
}

/// `Authorization: Bearer KEY`, or `x-api-key: KEY`.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let authorization = text("authorization").and_then(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
    });
    authorization.or_else(|| text("x-api-key")).filter(|key| !key.is_empty())
}

/// Lets through who has a key, and tells the rest of the router whose call it is.
pub async fn require(State(guard): State<Guard>, mut request: Request, next: Next) -> Response {
    match guard.check(request.uri().path(), request.headers()) {
        Ok(Some(client)) => {
            request.extensions_mut().insert(client);
            next.run(request).await
        }
        Ok(None) => next.run(request).await,
        Err(status) => {
            let mut response = refuse(&request, status);
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            response
        }
    }
}
