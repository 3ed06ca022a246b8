//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::HeaderMap;
use axum::response::Response;
use proto::v1::{self, generate_request::Input};
use serde::Deserialize;

use super::error::ApiError;
use super::request::{self, Common};
use super::run::{Kind, Run};
use crate::keys::Client;
use crate::service::InferenceService;

/// Prompts in one request.
const MAX_PROMPTS: usize = 128;

/// The fields that only this API has.
#[derive(Debug, Deserialize)]
struct CompletionRequest {
    prompt: Prompt,
    logprobs: Option<u32>,
    echo: Option<bool>,
    suffix: Option<String>,
    best_of: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    ManyTokens(Vec<Vec<u32>>),
}

/// Goes on from one prompt or several.
pub async fn serve(
    State(service): State<InferenceService>,
    client: Option<Extension<Arc<Client>>>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let (common, calls) = read(body)?;
    Run::start(service, (&headers, client), Kind::Text, &common, calls).await?.respond().await
}

/// What a body asks for: a call for each prompt.
pub fn read(body: Result<Bytes, BytesRejection>) -> Result<(Common, Vec<v1::GenerateRequest>), ApiError> {
    let (mut common, own) = request::read::<CompletionRequest>(body)?;
    refuse_unserved(&own, &common)?;
    let sampling = common.sampling(own.logprobs)?;
    let calls: Vec<_> = inputs(own.prompt)
        .into_iter()
        .map(|input| v1::GenerateRequest {
            request_id: String::new(),
            input: Some(input),
            sampling: Some(sampling.clone()),
            model: common.model.clone().unwrap_or_default(),
        })
        .collect();
    if calls.is_empty() || calls.len() > MAX_PROMPTS {
        let why = format!("prompt: {} prompts, 1 to {MAX_PROMPTS}", calls.len());
        return Err(ApiError::invalid(Some("prompt"), why));
    }
    Ok((common, calls))
}

fn inputs(prompt: Prompt) -> Vec<Input> {
    let tokens = |ids| Input::TokenIds(v1::TokenIds { ids });
    match prompt {
        Prompt::Text(text) => vec![Input::Text(text)],
        // An empty list fits this first; it is refused as no prompt.
        Prompt::Texts(texts) => texts.into_iter().map(Input::Text).collect(),
        Prompt::Tokens(ids) => vec![tokens(ids)],
        Prompt::ManyTokens(lists) => lists.into_iter().map(tokens).collect(),
    }
}

/// What OpenAI's API has and this one does not: said, not passed over.
fn refuse_unserved(own: &CompletionRequest, common: &Common) -> Result<(), ApiError> {
    let unserved = [
        ("echo", own.echo.unwrap_or(false)),
        ("suffix", own.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty())),
        ("best_of", own.best_of.is_some_and(|best_of| best_of > common.n.unwrap_or(1))),
    ];
    match unserved.iter().find(|(_, asked)| *asked) {
        Some((field, _)) => {
            Err(ApiError::invalid(Some(field), format!("{field}: not served here; leave it away")))
        }
        None => Ok(()),
    }
}
