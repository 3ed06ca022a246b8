//! The OpenAI-compatible face of the router, on the same port as gRPC: a thin translation of [`crate::service`].
//!
//! `POST /v1/chat/completions`, `POST /v1/completions`, `GET /v1/models`; fields as in OpenAI's API reference
//! (<https://platform.openai.com/docs/api-reference>), further ones as vLLM names them. Unknown fields are accepted.

mod answer;
mod chat;
mod completions;
mod error;
mod logprobs;
mod models;
mod request;
mod run;
mod stream;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{any, get, post};

use crate::service::InferenceService;
pub use error::ApiError;

/// What OpenAI's clients call.
pub fn routes(service: InferenceService) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::serve).fallback(not_allowed))
        .route("/v1/completions", post(completions::serve).fallback(not_allowed))
        .route("/v1/models", get(models::list).fallback(not_allowed))
        .route("/v1/models/{*id}", get(models::one).fallback(not_allowed))
        .route("/v1/{*rest}", any(unknown))
        .layer(DefaultBodyLimit::max(proto::MAX_MESSAGE_BYTES))
        .with_state(service)
}

/// What bodies of the two calls ask of the router. Nothing is asked: for tests that bring bytes.
#[doc(hidden)]
pub fn read_bodies(body: &[u8]) -> Vec<proto::v1::GenerateRequest> {
    let bytes = || Ok(axum::body::Bytes::copy_from_slice(body));
    let chat = chat::read(bytes()).map(|(_, call)| call);
    let texts = completions::read(bytes()).map(|(_, calls)| calls).unwrap_or_default();
    chat.into_iter().chain(texts).collect()
}

async fn unknown(uri: axum::http::Uri) -> ApiError {
    ApiError::not_found(format!(
        "{} is not served here; there are /v1/chat/completions, /v1/completions and /v1/models",
        uri.path()
    ))
}

async fn not_allowed(method: axum::http::Method, uri: axum::http::Uri) -> ApiError {
    ApiError::method_not_allowed(format!("{method} is not allowed on {}", uri.path()))
}
