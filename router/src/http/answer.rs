//! The whole answer at once.

use axum::Json;
use axum::http::HeaderValue;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use proto::v1::{self, generate_response::Event};
use serde_json::{Value, json};

use super::error::ApiError;
use super::logprobs;
use super::run::{Events, Head, Kind, TIMELINE, Usage};
use crate::relay::finish_reason;
use crate::timeline;

#[derive(Default)]
struct Choice {
    text: String,
    calls: Vec<v1::ToolCall>,
    logprobs: Vec<v1::TokenLogprob>,
    end: Option<v1::ChoiceEnd>,
}

/// Collects everything, then answers.
pub async fn respond(head: Head, mut events: Events, choices: usize) -> Result<Response, ApiError> {
    let mut collected: Vec<Choice> = (0..choices).map(|_| Choice::default()).collect();
    let mut usage = Usage::default();
    let mut last = v1::Complete::default();
    while let Some((first, event)) = events.next().await {
        match event? {
            Event::Chunk(chunk) => {
                if let Some(choice) = collected.get_mut((first + chunk.index) as usize) {
                    choice.text.push_str(&chunk.text);
                    choice.calls.extend(chunk.tool_calls);
                    choice.logprobs.extend(chunk.logprobs);
                }
            }
            Event::Complete(complete) => {
                usage.add(&complete);
                for end in &complete.choices {
                    if let Some(choice) = collected.get_mut((first + end.index) as usize) {
                        choice.end = Some(end.clone());
                    }
                }
                last = complete;
            }
        }
    }
    let body = json!({
        "id": head.id,
        "object": match head.kind { Kind::Chat => "chat.completion", Kind::Text => "text_completion" },
        "created": head.created,
        "model": head.model,
        "choices": collected.into_iter().enumerate().map(|(i, c)| choice(&head, i, c)).collect::<Vec<_>>(),
        "usage": usage.json(),
    });
    let mut response = Json(body).into_response();
    if head.with_timeline
        && let Ok(value) = HeaderValue::from_str(&timeline::json(&last).to_string())
    {
        response.headers_mut().insert(TIMELINE, value);
    }
    Ok(response)
}

fn choice(head: &Head, index: usize, choice: Choice) -> Value {
    let finish_reason = choice.end.as_ref().map(finish_reason);
    let matched_stop = choice.end.map(|end| end.matched_stop).filter(|stop| !stop.is_empty());
    let mut value = json!({"index": index, "finish_reason": finish_reason, "stop_reason": matched_stop});
    match head.kind {
        Kind::Text => {
            value["logprobs"] = match choice.logprobs.is_empty() {
                true => Value::Null,
                false => logprobs::of_text(&head.shared.text, &choice.logprobs, 0).0,
            };
            value["text"] = choice.text.into();
        }
        Kind::Chat => {
            let is_silent = choice.text.is_empty() && !choice.calls.is_empty();
            let content = if is_silent { Value::Null } else { choice.text.into() };
            value["message"] = json!({"role": "assistant", "content": content, "refusal": null});
            if !choice.calls.is_empty() {
                value["message"]["tool_calls"] = choice.calls.iter().map(call).collect();
            }
            value["logprobs"] = match choice.logprobs.is_empty() {
                true => Value::Null,
                false => logprobs::of_chat(&head.shared.text, &choice.logprobs),
            };
        }
    }
    value
}

/// A call in OpenAI's words.
pub fn call(call: &v1::ToolCall) -> Value {
    json!({
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    })
}
