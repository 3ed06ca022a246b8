//! One HTTP request under way: its prompts' streams as one, and everything that its answer says besides.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Extension;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use futures::stream::{Stream, StreamExt, select_all};
use proto::v1::{self, generate_response::Event};
use tonic::Status;

use super::error::ApiError;
use super::request::Common;
use super::{answer, stream};
use crate::journey::Shared;
use crate::keys::Client;
use crate::service::{Caller, InferenceService};

/// Which API is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text,
}

/// The events of all prompts, with the number that each prompt's first choice has in the answer.
pub type Events = Pin<Box<dyn Stream<Item = (u32, Result<Event, Status>)> + Send>>;

/// What every part of an answer says.
#[derive(Clone)]
pub struct Head {
    pub kind: Kind,
    pub id: String,
    pub created: u64,
    pub model: String,
    pub include_usage: bool,
    /// The client wants to know where the time went.
    pub with_timeline: bool,
    pub shared: Arc<Shared>,
}

/// A request whose first event has come.
pub struct Run {
    head: Head,
    request_id: String,
    is_stream: bool,
    events: Events,
    choices: usize,
}

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub const TIMELINE: HeaderName = HeaderName::from_static("x-tandem-timeline");

impl Run {
    /// Sends the calls off and waits for the first event, so that what fails before it is an HTTP error.
    pub async fn start(
        service: InferenceService,
        (headers, client): (&HeaderMap, Option<Extension<Arc<Client>>>),
        kind: Kind,
        common: &Common,
        calls: Vec<v1::GenerateRequest>,
    ) -> Result<Self, ApiError> {
        let client = client.map(|Extension(client)| client);
        let named = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
        let request_id = match named(&REQUEST_ID).filter(|id| !id.is_empty()) {
            Some(id) => id.to_owned(),
            None => proto::new_request_id(),
        };
        let n = common.n.unwrap_or(1);
        let choices = calls.len() * n as usize;
        let is_one = calls.len() == 1;
        let mut streams = Vec::with_capacity(calls.len());
        for (number, mut call) in (0..).zip(calls) {
            call.request_id = if is_one { request_id.clone() } else { format!("{request_id}-{number}") };
            let first = n * number;
            let stream = service.start(call, Caller::of(headers, client.clone())).await?;
            streams.push(stream.filter_map(move |message| async move {
                let event = message.map(|message| message.event).transpose()?;
                Some((first, event))
            }));
        }
        let mut events = select_all(streams.into_iter().map(Box::pin));
        let first = events.next().await;
        if let Some((_, Err(status))) = first {
            return Err(status.into());
        }
        let events: Events = Box::pin(futures::stream::iter(first).chain(events));
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let head = Head {
            kind,
            id: format!("{prefix}-{request_id}"),
            created: now.as_secs(),
            model: service.shared.text.name.clone(),
            include_usage: common.include_usage(),
            with_timeline: named(&TIMELINE).is_some_and(|value| !matches!(value, "" | "0" | "false")),
            shared: Arc::clone(&service.shared),
        };
        Ok(Self { head, request_id, is_stream: common.is_stream(), events, choices })
    }

    /// The answer, whole or in pieces.
    pub async fn respond(self) -> Result<Response, ApiError> {
        let mut response = match self.is_stream {
            true => stream::respond(self.head, self.events, self.choices),
            false => answer::respond(self.head, self.events, self.choices).await?,
        };
        if let Ok(id) = HeaderValue::from_str(&self.request_id) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        Ok(response)
    }
}

/// Tokens of all prompts of a request.
#[derive(Debug, Default, Clone, Copy)]
pub struct Usage {
    prompt: u32,
    output: u32,
    cached: u32,
}

impl Usage {
    /// One more prompt has ended.
    pub fn add(&mut self, complete: &v1::Complete) {
        let usage = complete.usage.unwrap_or_default();
        self.prompt += usage.prompt_tokens;
        self.output += usage.output_tokens;
        self.cached += usage.cached_tokens;
    }

    /// In OpenAI's words.
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.output,
            "total_tokens": self.prompt + self.output,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }
}
