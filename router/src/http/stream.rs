//! The answer in pieces: server-sent events, one JSON object each, `[DONE]` at the end.
//!
//! Dropping the body is the client going away: the request's stream is dropped with it, which cancels the request.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use proto::v1::{self, generate_response::Event};
use serde::Serialize;
use serde_json::Value;

use super::answer;
use super::error::ApiError;
use super::logprobs;
use super::run::{Events, Head, Kind, Usage};
use crate::relay::finish_reason;
use crate::timeline;

/// Starts the answer.
pub fn respond(head: Head, events: Events, choices: usize) -> Response {
    let writer = Writer {
        head,
        choices: vec![Told::default(); choices],
        usage: Usage::default(),
        last: v1::Complete::default(),
    };
    let pieces = futures::stream::unfold(Some((writer, events)), |state| async move {
        let (mut writer, mut events) = state?;
        match events.next().await {
            Some((first, Ok(event))) => Some((writer.event(first, event), Some((writer, events)))),
            Some((_, Err(status))) => Some((event_text(&ApiError::from(status).body()), None)),
            None => Some((writer.end(), None)),
        }
    });
    let body = Body::from_stream(pieces.map(|text| Ok::<_, Infallible>(Bytes::from(text))));
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // Proxies that collect answers would spoil it.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, body).into_response()
}

struct Writer {
    head: Head,
    choices: Vec<Told>,
    usage: Usage,
    last: v1::Complete,
}

/// What the client knows of a choice.
#[derive(Clone, Default)]
struct Told {
    role: bool,
    calls: usize,
    /// Characters, for `text_offset`.
    offset: usize,
}

/// One event's object.
#[derive(Serialize)]
struct Piece<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: &'a [Delta],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeline: Option<Value>,
}

/// What is new of a choice.
#[derive(Serialize)]
struct Delta {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<MessageDelta>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    logprobs: Option<Value>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct MessageDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Value>,
}

impl Writer {
    fn event(&mut self, first: u32, event: Event) -> String {
        match event {
            Event::Chunk(chunk) => {
                let index = first + chunk.index;
                match self.head.kind {
                    Kind::Chat => self.chat_chunk(index, chunk),
                    Kind::Text => self.text_chunk(index, chunk),
                }
            }
            Event::Complete(complete) => {
                self.usage.add(&complete);
                let ends = complete.choices.iter().map(|end| self.end_of(first + end.index, end));
                let ends: Vec<Delta> = ends.collect();
                self.last = complete;
                self.piece(&ends)
            }
        }
    }

    fn chat_chunk(&mut self, index: u32, chunk: v1::Chunk) -> String {
        let Some(told) = self.choices.get_mut(index as usize) else { return String::new() };
        let role = (!std::mem::replace(&mut told.role, true)).then_some("assistant");
        let calls = chunk.tool_calls.iter().map(|call| {
            let mut value = answer::call(call);
            value["index"] = told.calls.into();
            told.calls += 1;
            value
        });
        let tool_calls: Vec<Value> = calls.collect();
        let logprobs = match chunk.logprobs.is_empty() {
            true => None,
            false => Some(logprobs::of_chat(&self.head.shared.text, &chunk.logprobs)),
        };
        // Half a character, or the beginning of a stop string: nothing to tell yet.
        if chunk.text.is_empty() && tool_calls.is_empty() && role.is_none() && logprobs.is_none() {
            return String::new();
        }
        let content = (tool_calls.is_empty() || !chunk.text.is_empty()).then_some(chunk.text);
        let delta = Some(MessageDelta { role, content, tool_calls });
        self.piece(&[Delta { index, delta, text: None, logprobs, finish_reason: None }])
    }

    fn text_chunk(&mut self, index: u32, chunk: v1::Chunk) -> String {
        let Some(told) = self.choices.get_mut(index as usize) else { return String::new() };
        let logprobs = (!chunk.logprobs.is_empty()).then(|| {
            let text = &self.head.shared.text;
            let (value, offset) = logprobs::of_text(text, &chunk.logprobs, told.offset);
            told.offset = offset;
            value
        });
        if chunk.text.is_empty() && logprobs.is_none() {
            return String::new();
        }
        let text = Some(chunk.text);
        self.piece(&[Delta { index, delta: None, text, logprobs, finish_reason: None }])
    }

    fn end_of(&self, index: u32, end: &v1::ChoiceEnd) -> Delta {
        let (delta, text) = match self.head.kind {
            Kind::Chat => (Some(MessageDelta::default()), None),
            Kind::Text => (None, Some(String::new())),
        };
        Delta { index, delta, text, logprobs: None, finish_reason: Some(finish_reason(end)) }
    }

    /// The last events: usage and timeline where they are wanted.
    fn end(&mut self) -> String {
        let mut text = String::new();
        if self.head.include_usage || self.head.with_timeline {
            let usage = self.head.include_usage.then(|| self.usage.json());
            let timeline = self.head.with_timeline.then(|| timeline::json(&self.last));
            text = event_text(&Piece { usage, timeline, ..self.blank(&[]) });
        }
        text.push_str("data: [DONE]\n\n");
        text
    }

    fn piece(&self, choices: &[Delta]) -> String {
        // Clients that asked for usage expect the field everywhere.
        let usage = self.head.include_usage.then_some(Value::Null);
        event_text(&Piece { usage, ..self.blank(choices) })
    }

    fn blank<'a>(&'a self, choices: &'a [Delta]) -> Piece<'a> {
        Piece {
            id: &self.head.id,
            object: match self.head.kind {
                Kind::Chat => "chat.completion.chunk",
                Kind::Text => "text_completion",
            },
            created: self.head.created,
            model: &self.head.model,
            choices,
            usage: None,
            timeline: None,
        }
    }
}

fn event_text(value: &impl Serialize) -> String {
    format!("data: {}\n\n", serde_json::to_string(value).unwrap_or_default())
}
