//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::error::ApiError;
use crate::service::InferenceService;

/// The one model that this cluster serves.
pub async fn list(State(service): State<InferenceService>) -> Json<Value> {
    Json(json!({"object": "list", "data": [model(&service)]}))
}

/// The same, if it has that name.
pub async fn one(
    State(service): State<InferenceService>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    match id == service.shared.text.name {
        true => Ok(Json(model(&service))),
        false => Err(ApiError::no_model(format!(
            "model: {id} is not served here, {} is",
            service.shared.text.name
        ))),
    }
}

fn model(service: &InferenceService) -> Value {
    let text = &service.shared.text;
    json!({
        "id": text.name,
        "object": "model",
        "created": service.started_unix,
        "owned_by": "tandem",
        "max_model_len": text.max_context_tokens,
    })
}
