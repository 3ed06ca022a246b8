//! `tandem.v1.Inference`: the client API.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::http::HeaderMap;
use parking_lot::Mutex;
use proto::v1;
use telemetry::trace::{Span, TRACEPARENT};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::journey::{Journey, Shared, Traced, Whose};
use crate::keys::Client;
use crate::metrics::outcome;
use crate::request;
use crate::timeline::{Timeline, millis};

/// Messages that may wait for a slow client before its request is held back.
const CLIENT_BUFFER: usize = 64;

/// The messages of one request, as they come.
pub type Chunks = ReceiverStream<Result<v1::GenerateResponse, Status>>;

/// The gRPC face of the router.
#[derive(Clone)]
pub struct InferenceService {
    /// What all requests share.
    pub shared: Arc<Shared>,
    running: Arc<Mutex<HashSet<String>>>,
    /// When this router began, in seconds of Unix time.
    pub started_unix: u64,
}

impl InferenceService {
    /// Over that state.
    pub fn new(shared: Arc<Shared>) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { shared, running: Arc::default(), started_unix: since.as_secs() }
    }

    /// Tokenizing takes milliseconds for long prompts: off the async threads.
    async fn off_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, Status> + Send + 'static,
    ) -> Result<T, Status> {
        let shared = Arc::clone(&self.shared);
        tokio::task::spawn_blocking(move || work(&shared))
            .await
            .map_err(|_| Status::invalid_argument("input: the tokenizer failed on this text"))?
    }

    /// Checks a request and sends it on its journey. What it ends with is counted.
    pub async fn start(&self, call: v1::GenerateRequest, caller: Caller<'_>) -> Result<Chunks, Status> {
        let started = self.try_start(call, caller).await;
        if let Err(refused) = &started {
            self.shared.metrics.ended_badly(refused);
        }
        started
    }

    async fn try_start(&self, call: v1::GenerateRequest, caller: Caller<'_>) -> Result<Chunks, Status> {
        let received = Instant::now();
        failpoints::at("received", 0, || call.request_id.clone());
        let deadline = caller.time.map(|left| received + left);
        self.shared.keys.call(caller.client.as_deref().map(Client::name));
        // Counted in before any work is done, out when the journey ends or is refused.
        let permit = caller.client.as_ref().map(|client| client.begin(&self.shared.keys)).transpose()?;
        let span = self.span(&call, caller.traceparent);
        let mut timeline = Timeline::new(received);
        let refuse = |refused: &Status| span.fail(outcome(refused.code()), refused.message());
        let prepared =
            self.off_thread(move |shared| request::read(call, &shared.text)).await.inspect_err(refuse)?;
        timeline.known.tokenize_ms = millis(received.elapsed());
        timeline.mark("tokenize", received);
        let claim = self.claim(&prepared.sequence.request_id).inspect_err(refuse)?;
        let (out, stream) = mpsc::channel(CLIENT_BUFFER);
        let traced = Traced { timeline, span };
        let whose = Whose { key: caller.key(), permit };
        let journey = Journey::new(Arc::clone(&self.shared), prepared, whose, deadline, traced, out);
        tokio::spawn(async move {
            journey.run().await;
            drop(claim);
        });
        Ok(ReceiverStream::new(stream))
    }

    /// The span that a request is served under, named by the GenAI conventions.
    fn span(&self, call: &v1::GenerateRequest, parent: Option<&str>) -> Span {
        let operation = match call.input {
            Some(v1::generate_request::Input::Chat(_)) => "chat",
            _ => "text_completion",
        };
        let model = &self.shared.text.name;
        let span = self.shared.tracer.serve(format!("{operation} {model}"), parent);
        span.set("gen_ai.operation.name", operation);
        span.set("gen_ai.provider.name", "tandem");
        span.set("gen_ai.request.model", model.clone());
        span
    }

    fn claim(&self, id: &str) -> Result<Claim, Status> {
        match self.running.lock().insert(id.to_owned()) {
            true => Ok(Claim { running: Arc::clone(&self.running), id: id.to_owned() }),
            false => {
                self.shared.metrics.duplicates.increment(1);
                Err(Status::already_exists(format!("request_id: {id} is running")))
            }
        }
    }
}

/// A request id in use; free again when dropped.
struct Claim {
    running: Arc<Mutex<HashSet<String>>>,
    id: String,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.running.lock().remove(&self.id);
    }
}

#[tonic::async_trait]
impl v1::inference_server::Inference for InferenceService {
    type GenerateStream = Chunks;

    async fn generate(
        &self,
        call: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let time = deadline(&call).inspect_err(|refused| self.shared.metrics.ended_badly(refused))?;
        let (metadata, extensions, call) = call.into_parts();
        let headers = metadata.into_headers();
        let client = extensions.get::<Arc<Client>>().cloned();
        self.start(call, Caller { time, ..Caller::of(&headers, client) }).await.map(Response::new)
    }

    async fn tokenize(
        &self,
        call: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        use v1::tokenize_request::Input;
        let reply = self
            .off_thread(move |shared| match call.into_inner().input {
                None => Err(Status::invalid_argument("input: one of text or chat is required")),
                Some(Input::Text(rendered)) => {
                    let ids = shared.text.encode_text(&rendered).map_err(request::text_error)?;
                    Ok(v1::TokenizeResponse { ids, rendered })
                }
                Some(Input::Chat(chat)) => {
                    let (rendered, ids) = shared.text.encode_chat(&chat).map_err(request::text_error)?;
                    Ok(v1::TokenizeResponse { ids, rendered })
                }
            })
            .await?;
        Ok(Response::new(reply))
    }

    async fn get_model_info(
        &self,
        _call: Request<v1::GetModelInfoRequest>,
    ) -> Result<Response<v1::GetModelInfoResponse>, Status> {
        let text = &self.shared.text;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Ok(Response::new(v1::GetModelInfoResponse {
            model: text.name.clone(),
            vocab_size: count(text.vocab_size),
            max_context_tokens: count(text.max_context_tokens),
            eos_token_ids: text.eos_token_ids.clone(),
            has_chat_template: text.has_chat_template(),
        }))
    }

    async fn list_workers(
        &self,
        _call: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        Ok(Response::new(v1::ListWorkersResponse { workers: self.shared.fleet.statuses() }))
    }
}

/// What a call says of itself besides the request.
pub struct Caller<'a> {
    named: &'a str,
    /// Whose API key it shows, where keys are wanted.
    pub client: Option<Arc<Client>>,
    /// How long the client waits.
    pub time: Option<Duration>,
    /// The client's own span.
    pub traceparent: Option<&'a str>,
}

impl<'a> Caller<'a> {
    /// From a call's headers.
    pub fn of(headers: &'a HeaderMap, client: Option<Arc<Client>>) -> Self {
        let traceparent = headers.get(TRACEPARENT).and_then(|value| value.to_str().ok());
        Self { named: client_key(headers), client, time: None, traceparent }
    }

    /// Whose turn it takes: who has the key, since a name alone would buy more turns.
    fn key(&self) -> &str {
        self.client.as_deref().map_or(self.named, Client::name)
    }
}

/// Whose request it is, for fairness: `x-client-key`, else `x-api-key`, else `authorization`. All others share.
fn client_key(headers: &HeaderMap) -> &str {
    let named = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    ["x-client-key", "x-api-key", "authorization"].into_iter().find_map(named).unwrap_or_default()
}

/// The client's deadline, from the header that every gRPC client sends for it:
/// at most eight digits and a unit (gRPC over HTTP/2, "Timeout").
fn deadline<T>(call: &Request<T>) -> Result<Option<Duration>, Status> {
    let Some(value) = call.metadata().get("grpc-timeout") else { return Ok(None) };
    let bad = || Status::invalid_argument("grpc-timeout: not a number with one of the units H M S m u n");
    let text = value.to_str().map_err(|_| bad())?;
    let unit = text.chars().last().ok_or_else(bad)?;
    let digits = &text[..text.len() - unit.len_utf8()];
    if digits.is_empty() || digits.len() > 8 {
        return Err(bad());
    }
    let amount: u64 = digits.parse().map_err(|_| bad())?;
    match unit {
        'H' => Ok(Some(Duration::from_secs(amount * 3600))),
        'M' => Ok(Some(Duration::from_secs(amount * 60))),
        'S' => Ok(Some(Duration::from_secs(amount))),
        'm' => Ok(Some(Duration::from_millis(amount))),
        'u' => Ok(Some(Duration::from_micros(amount))),
        'n' => Ok(Some(Duration::from_nanos(amount))),
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_of_the_grpc_specification() {
        let parse = |text: &str| {
            let mut call = Request::new(());
            call.metadata_mut().insert("grpc-timeout", text.parse().unwrap());
            deadline(&call)
        };
        assert_eq!(parse("1500m").unwrap(), Some(Duration::from_millis(1500)));
        assert_eq!(parse("99999999H").unwrap(), Some(Duration::from_secs(99999999 * 3600)));
        for bad in ["", "5", "m", "123456789S", "1x", "-1S"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert_eq!(deadline(&Request::new(())).unwrap(), None);
    }
}
