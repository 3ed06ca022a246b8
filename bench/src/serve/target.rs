//! Who is asked: a Tandem router over gRPC, or any OpenAI endpoint over HTTP.

use std::time::Instant;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use proto::v1::generate_request::Input;
use proto::v1::generate_response::Event;
use proto::v1::inference_client::InferenceClient;
use proto::v1::{GenerateRequest, SamplingParams, Timeline, TokenIds};
use serde_json::{Value, json};
use tonic::Code;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::Channel;

use super::load::Planned;

/// A longer line of a stream is an error.
const MOST_LINE: usize = 1 << 20;

/// An endpoint.
#[derive(Clone)]
pub enum Target {
    /// Tandem's own API.
    Grpc {
        /// Connected.
        channel: Channel,
        /// Shown with every call.
        key: Option<AsciiMetadataValue>,
    },
    /// `/v1/completions`, streamed.
    OpenAi {
        /// http://host:port.
        base: String,
        /// The served model's name.
        model: String,
        /// Sent as a bearer token.
        key: Option<String>,
        /// Connections are kept.
        client: Box<Client<HttpConnector, Full<Bytes>>>,
    },
}

/// How a request failed.
#[derive(Debug, Clone, PartialEq)]
pub enum Failure {
    /// Refused because there is too much to do (429, RESOURCE_EXHAUSTED).
    Shed,
    /// Anything else.
    Failed(String),
}

/// When tokens came: a time for each event, and how many it brought.
pub type Times = Vec<(Instant, u32)>;

/// What came back.
#[derive(Debug, Clone, Default)]
pub struct Answered {
    /// Its tokens.
    pub times: Times,
    /// What placement had expected. A Tandem router tells it over gRPC.
    pub forecast: Option<Forecast>,
}

/// Placement's expectation for the way that it took, and what came: choosing workers until the first token, ms.
#[derive(Debug, Clone, Copy)]
pub struct Forecast {
    /// The decode worker prefilled.
    pub is_local: bool,
    /// Before.
    pub expected_ms: f64,
    /// After.
    pub measured_ms: f64,
}

impl Forecast {
    fn of(timeline: &Timeline) -> Option<Self> {
        let told = timeline.expected.as_ref()?;
        let is_local = timeline.prefill_worker == timeline.decode_worker;
        let expected_ms = if is_local { told.local_ms } else { told.remote_ms };
        let are_times = [expected_ms, told.measured_ms].iter().all(|ms| ms.is_finite() && *ms > 0.0);
        are_times.then_some(Self { is_local, expected_ms, measured_ms: told.measured_ms })
    }
}

impl Target {
    /// An OpenAI endpoint at `base`.
    pub fn openai(base: &str, model: &str, key: Option<String>) -> Result<Self, String> {
        let base = base.trim_end_matches('/').to_owned();
        let base = if base.contains("://") { base } else { format!("http://{base}") };
        if !base.starts_with("http://") {
            return Err(format!("{base}: only http:// is spoken here"));
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Box::new(Client::builder(TokioExecutor::new()).build(connector));
        Ok(Self::OpenAi { base, model: model.to_owned(), key, client })
    }

    /// Sends one request and reads its answer to the end.
    pub async fn ask(&self, request: &Planned) -> Result<Answered, Failure> {
        match self {
            Self::Grpc { channel, key } => grpc(channel.clone(), key.clone(), request).await,
            Self::OpenAi { base, model, key, client } => {
                let body = json!({
                    "model": model, "prompt": request.prompt, "max_tokens": request.output, "min_tokens": request.output,
                    "ignore_eos": true, "temperature": 0, "stream": true, "stream_options": {"include_usage": true},
                });
                let mut post = Request::post(format!("{base}/v1/completions"))
                    .header("content-type", "application/json");
                if let Some(key) = key {
                    post = post.header("authorization", format!("Bearer {key}"));
                }
                let post =
                    post.body(Full::from(body.to_string())).map_err(|e| Failure::Failed(e.to_string()))?;
                openai(client, post).await.map(|times| Answered { times, forecast: None })
            }
        }
    }
}

async fn grpc(
    channel: Channel,
    key: Option<AsciiMetadataValue>,
    request: &Planned,
) -> Result<Answered, Failure> {
    let sampling = SamplingParams {
        temperature: Some(0.0),
        max_tokens: Some(request.output),
        ignore_eos: Some(true),
        ..SamplingParams::default()
    };
    let message = GenerateRequest {
        input: Some(Input::TokenIds(TokenIds { ids: request.prompt.clone() })),
        sampling: Some(sampling),
        ..GenerateRequest::default()
    };
    let failed = |status: tonic::Status| match status.code() {
        Code::ResourceExhausted => Failure::Shed,
        code => Failure::Failed(format!("{code:?}: {}", status.message())),
    };
    let mut message = tonic::Request::new(message);
    if let Some(key) = key {
        message.metadata_mut().insert("authorization", key);
    }
    let mut stream = InferenceClient::new(channel).generate(message).await.map_err(failed)?.into_inner();
    let mut times = Times::new();
    while let Some(message) = stream.message().await.map_err(failed)? {
        match message.event {
            Some(Event::Chunk(chunk)) if !chunk.token_ids.is_empty() => {
                times.push((Instant::now(), u32::try_from(chunk.token_ids.len()).unwrap_or(u32::MAX)));
            }
            Some(Event::Complete(end)) => {
                return Ok(Answered { times, forecast: end.timeline.as_ref().and_then(Forecast::of) });
            }
            _ => {}
        }
    }
    Err(Failure::Failed("the stream ended without its last message".into()))
}

async fn openai(
    client: &Client<HttpConnector, Full<Bytes>>,
    post: Request<Full<Bytes>>,
) -> Result<Times, Failure> {
    let failed = |error: &dyn std::error::Error| Failure::Failed(error.to_string());
    let response = client.request(post).await.map_err(|e| failed(&e))?;
    match response.status() {
        StatusCode::OK => {}
        StatusCode::TOO_MANY_REQUESTS => return Err(Failure::Shed),
        status => {
            let body = http_body_util::Limited::new(response.into_body(), MOST_LINE).collect().await;
            let body = body.map(|b| String::from_utf8_lossy(&b.to_bytes()).into_owned()).unwrap_or_default();
            return Err(Failure::Failed(format!("{status}: {}", body.chars().take(300).collect::<String>())));
        }
    }
    let mut body = response.into_body();
    let (mut times, mut text, mut tokens) = (Times::new(), BytesMut::new(), None);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|e| failed(&e))?.into_data() else { continue };
        let now = Instant::now();
        text.extend_from_slice(&data);
        while let Some(end) = text.iter().position(|b| *b == b'\n') {
            let line = text.split_to(end + 1);
            match event(&line)? {
                Told::Tokens => times.push((now, 1)),
                Told::Usage(count) => tokens = Some(count),
                Told::End => return Ok(shared(times, tokens)),
                Told::Nothing => {}
            }
        }
        if text.len() > MOST_LINE {
            return Err(Failure::Failed("a line of the stream has no end".into()));
        }
    }
    Err(Failure::Failed("the stream ended without [DONE]".into()))
}

/// An event may bring several tokens, and does not say how many; the usage at the end tells of all.
fn shared(mut times: Times, tokens: Option<u32>) -> Times {
    let events = u32::try_from(times.len()).unwrap_or(u32::MAX).max(1);
    let more = tokens.unwrap_or(0).saturating_sub(events);
    for (i, (_, count)) in (0u32..).zip(&mut times) {
        *count += more / events + u32::from(i >= events - more % events);
    }
    times
}

#[derive(Debug, PartialEq)]
enum Told {
    Usage(u32),
    Tokens,
    End,
    Nothing,
}

/// A line of server-sent events.
fn event(line: &[u8]) -> Result<Told, Failure> {
    let Some(data) = line.strip_prefix(b"data:") else { return Ok(Told::Nothing) };
    let data = data.trim_ascii();
    if data == b"[DONE]" {
        return Ok(Told::End);
    }
    let wrong = |why: String| Failure::Failed(format!("in the stream: {why}"));
    let value: Value = serde_json::from_slice(data).map_err(|e| wrong(e.to_string()))?;
    if let Some(error) = value.get("error").filter(|e| !e.is_null()) {
        return Err(wrong(error.to_string()));
    }
    if let Some(tokens) = value["usage"]["completion_tokens"].as_u64() {
        return Ok(Told::Usage(u32::try_from(tokens).unwrap_or(u32::MAX)));
    }
    let text = &value["choices"][0]["text"];
    // Text may be held back until a character is whole: an event without text is still a token, but for the last one.
    let is_last = !value["choices"][0]["finish_reason"].is_null();
    Ok(match text.as_str() {
        Some("") if is_last => Told::Nothing,
        Some(_) => Told::Tokens,
        None => Told::Nothing,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn events_are_told_apart() {
        let told = |line: &str| event(line.as_bytes());
        assert_eq!(told("data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}]}\n"), Ok(Told::Tokens));
        assert_eq!(
            told("data:{\"choices\":[{\"text\":\"\",\"finish_reason\":\"length\"}]}\r\n"),
            Ok(Told::Nothing)
        );
        assert_eq!(told("data: {\"choices\":[],\"usage\":{\"completion_tokens\":9}}\n"), Ok(Told::Usage(9)));
        let now = Instant::now();
        let counts = |tokens| shared(vec![(now, 1); 4], tokens).iter().map(|t| t.1).collect::<Vec<_>>();
        assert_eq!((counts(Some(10)), counts(None)), (vec![2, 2, 3, 3], vec![1; 4]));
        assert_eq!(told("data: [DONE]\n"), Ok(Told::End));
        assert_eq!(told(": a comment\n"), Ok(Told::Nothing));
        assert_eq!(told("\n"), Ok(Told::Nothing));
        assert!(told("data: {\"error\":{\"message\":\"no\"}}\n").is_err());
        assert!(told("data: {nonsense\n").is_err());
        assert!(Target::openai("https://h:1", "m", None).is_err());
    }
}
