//! Errors in OpenAI's words: `{"error": {"message", "type", "param", "code"}}`.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// An error on its way to a client.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    retry_seconds: Option<u64>,
}

impl ApiError {
    /// The request must change.
    pub fn invalid(param: Option<&str>, message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "invalid_request_error",
            code: None,
            param: param.map(str::to_owned),
            message: message.into(),
            retry_seconds: None,
        }
    }

    /// No such page.
    pub fn not_found(message: String) -> Self {
        Self { status: StatusCode::NOT_FOUND, ..Self::invalid(None, message) }
    }

    /// The page takes other methods.
    pub fn method_not_allowed(message: String) -> Self {
        Self { status: StatusCode::METHOD_NOT_ALLOWED, ..Self::invalid(None, message) }
    }

    /// More bytes than the router reads.
    pub fn too_large(message: String) -> Self {
        Self { status: StatusCode::PAYLOAD_TOO_LARGE, ..Self::invalid(None, message) }
    }

    /// No such model.
    pub fn no_model(message: String) -> Self {
        Self { code: Some("model_not_found"), param: Some("model".into()), ..Self::not_found(message) }
    }

    /// The body, also sent as the last event of a stream that fails.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl From<Status> for ApiError {
    fn from(status: Status) -> Self {
        let (http, kind, code) = match status.code() {
            Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
                (StatusCode::BAD_REQUEST, "invalid_request_error", None)
            }
            Code::NotFound => return Self::no_model(status.message().to_owned()),
            Code::AlreadyExists => {
                (StatusCode::CONFLICT, "invalid_request_error", Some("request_id_running"))
            }
            Code::ResourceExhausted => {
                (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("rate_limit_exceeded"))
            }
            Code::Unauthenticated => {
                (StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key"))
            }
            Code::PermissionDenied => (StatusCode::FORBIDDEN, "permission_error", None),
            Code::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("unavailable")),
            Code::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, "server_error", Some("timeout")),
            // What nginx uses for a client that has gone; nobody reads it.
            Code::Cancelled => {
                (StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST), "server_error", None)
            }
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "server_error", None),
        };
        let told = status.get_error_details().retry_info().and_then(|info| info.retry_delay);
        let retry_seconds = match status.code() {
            Code::ResourceExhausted | Code::Unavailable => {
                Some(told.map_or(1, |delay| delay.as_secs().max(1)))
            }
            _ => None,
        };
        let is_context = status.message().contains("the context");
        Self {
            status: http,
            kind,
            code: if http == StatusCode::BAD_REQUEST && is_context {
                Some("context_length_exceeded")
            } else {
                code
            },
            param: (http == StatusCode::BAD_REQUEST).then(|| param(status.message())).flatten(),
            message: status.message().to_owned(),
            retry_seconds,
        }
    }
}

/// Messages begin with the field's name; OpenAI's clients know no `sampling.` and no `constraint`.
fn param(message: &str) -> Option<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
    let field = &message[..message.find(|c| !is_name(c))?];
    match field.strip_prefix("sampling.").or(field.strip_prefix("chat.")) {
        Some(field) if field.starts_with("constraint") => Some("response_format".to_owned()),
        Some(field) => Some(field.to_owned()),
        None => message[field.len()..].starts_with(':').then(|| field.to_owned()).filter(|f| !f.is_empty()),
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        if let Some(seconds) = self.retry_seconds {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_field_is_named_as_the_client_knows_it() {
        let error = ApiError::from(Status::invalid_argument("sampling.top_p: is 7, up to 1"));
        assert_eq!(error.body()["error"]["param"], "top_p");
        let error = ApiError::from(Status::invalid_argument("sampling.top_p is 7, must be up to 1"));
        assert_eq!(error.param.as_deref(), Some("top_p"));
        assert_eq!(error.status, StatusCode::BAD_REQUEST);
        let error = ApiError::from(Status::unavailable("no decode worker: wait"));
        assert_eq!((error.param, error.retry_seconds), (None, Some(1)));
    }
}
