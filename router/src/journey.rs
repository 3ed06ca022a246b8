//! One request's journey: admitted, tried until it ends, on other workers if one is lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proto::v1;
use tokio::sync::mpsc;
use tonic::{Code, Status};

use crate::admission::{Admission, Claim, Turned};
use crate::attempt::{Lost, is_dead};
use crate::fleet::{Chains, Fleet};
use crate::keys::Permit;
use crate::losses::{self, Losses};
use crate::metrics::{KeyMetrics, Metrics};
use crate::placement::{Model, Policy};
use crate::relay::{self, Relay};
use crate::request::Prepared;
use crate::status::Board;
use crate::text::model::TextModel;
use crate::timeline::{Timeline, millis};
use telemetry::trace::{Span, Tracer};

/// Full workers are asked again after this, then after twice as long, up to sixteen times.
const SHED_PAUSE: Duration = Duration::from_millis(20);
const MAX_SHED_PAUSE: Duration = Duration::from_millis(320);

/// What every journey of this router shares.
pub struct Shared {
    /// The text side of the model.
    pub text: TextModel,
    /// The workers.
    pub fleet: Fleet,
    /// The door.
    pub admission: Admission,
    /// Local or remote prefill.
    pub policy: Policy,
    /// Longest wait for a place.
    pub queue_patience: Duration,
    /// Longest silence of a worker's stream.
    pub worker_silence: Duration,
    /// Learned speeds.
    pub model: Mutex<Model>,
    /// What is counted.
    pub metrics: Metrics,
    /// What is counted for API keys.
    pub keys: Arc<KeyMetrics>,
    /// Where spans go.
    pub tracer: Tracer,
    /// What operators see.
    pub board: Board,
    /// This start of this router, to workers.
    pub origin: String,
}

/// Where messages to the client go. Its bound is the client's backpressure.
pub type Out = mpsc::Sender<Result<v1::GenerateResponse, Status>>;

/// What is known of a request's time when its journey begins.
pub struct Traced {
    /// Its stages.
    pub timeline: Timeline,
    /// Its span.
    pub span: Span,
}

/// Whose request it is.
pub struct Whose<'a> {
    /// Whose turn it takes.
    pub key: &'a str,
    /// Its right to run, where API keys are wanted.
    pub permit: Option<Permit>,
}

/// One request on its way.
pub struct Journey {
    pub(crate) shared: Arc<Shared>,
    pub(crate) prepared: Prepared,
    claim: Claim,
    permit: Option<Permit>,
    deadline: Option<Instant>,
    pub(crate) out: Out,
    pub(crate) relay: Relay,
    pub(crate) timeline: Timeline,
    pub(crate) kv: v1::KvTransfer,
    pub(crate) cached_tokens: u32,
    pub(crate) chains: Chains,
    pub(crate) losses: Losses,
    pub(crate) span: Span,
}

impl Journey {
    /// A prepared request.
    pub fn new(
        shared: Arc<Shared>,
        prepared: Prepared,
        whose: Whose<'_>,
        deadline: Option<Instant>,
        Traced { timeline, span }: Traced,
        out: Out,
    ) -> Self {
        let relay = Relay::new(&prepared);
        let sequence = &prepared.sequence;
        let tokens = sequence.prompt.len() + sequence.max_tokens as usize * sequence.n as usize;
        let claim = Claim::new(whose.key, tokens, whose.permit.as_ref().map_or(1, Permit::weight));
        Self {
            shared,
            prepared,
            claim,
            permit: whose.permit,
            deadline,
            out,
            relay,
            timeline,
            kv: v1::KvTransfer::default(),
            cached_tokens: 0,
            chains: Chains::default(),
            losses: Losses::default(),
            span,
        }
    }

    /// The whole journey. The client hears of an error as the stream's status.
    pub async fn run(mut self) {
        let out = self.out.clone();
        let deadline = self.deadline;
        let late = async move {
            match deadline {
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        let shared = Arc::clone(&self.shared);
        let ended = tokio::select! {
            ended = self.attempts() => ended,
            () = late => Err(Status::deadline_exceeded("the request's deadline passed")),
            () = out.closed() => Err(Status::cancelled("the client has gone")),
        };
        let used = self.prepared.sequence.prompt.len() + self.relay.sent();
        shared.keys.tokens(self.permit.as_ref().map(Permit::name), used);
        if let Some(permit) = &self.permit {
            permit.spend(used);
        }
        let last = match ended {
            Ok(()) => Ok(relay::complete(self.complete())),
            Err(status) => {
                shared.metrics.ended_badly(&status);
                if status.code() != Code::Cancelled {
                    shared.board.note_failed();
                }
                self.span.fail(crate::metrics::outcome(status.code()), status.message());
                Err(status)
            }
        };
        let _ = out.send(last).await;
    }

    async fn attempts(&mut self) -> Result<(), Status> {
        let entered = Instant::now();
        let shared = Arc::clone(&self.shared);
        let _place = shared.admission.enter(self.claim, shared.queue_patience).await.map_err(|turned| {
            let why = if turned == Turned::QueueFull { "queue_full" } else { "queue_timeout" };
            shared.metrics.shed.of(why).increment(1);
            shared.admission.shed(turned.why())
        })?;
        failpoints::at("admitted", 0, String::new);
        // Since when it has been looking for room or for a worker, without a break.
        let mut looking = entered;
        let mut shed_pause = SHED_PAUSE;
        loop {
            if !self.timeline.has_token() {
                self.timeline.known.queue_ms = millis(entered.elapsed());
                self.timeline.mark("queue", entered);
            }
            // A number of its own for every try: a worker that still holds the last one lets it go for this.
            self.prepared.sequence.attempt += 1;
            let sent = self.relay.sent();
            let Err(lost) = self.attempt().await else { return Ok(()) };
            if self.relay.sent() > sent {
                looking = Instant::now();
                shed_pause = SHED_PAUSE;
            }
            let has_time = looking.elapsed() < shared.queue_patience;
            let pause = match lost.status.code() {
                // Every worker is full, or, for a request that has lost one, gone: wait up to the queue's patience.
                Code::ResourceExhausted if has_time => {
                    shared.metrics.lost(&lost.status, false);
                    shed_pause = (shed_pause * 2).min(MAX_SHED_PAUSE);
                    Some(shed_pause / 2)
                }
                Code::Unavailable if lost.worker.is_none() && self.losses.any() && has_time => {
                    Some(SHED_PAUSE)
                }
                code if losses::is_worth_retrying(code) && lost.worker.is_some() => self.lose(&lost),
                _ => None,
            };
            match pause {
                Some(pause) if pause.is_zero() => {}
                Some(pause) => shared.fleet.changed(pause).await,
                None => {
                    if lost.status.code() == Code::ResourceExhausted {
                        shared.metrics.shed.of("workers_full").increment(1);
                        return Err(shared.admission.shed(lost.status.message()));
                    }
                    return Err(lost.status);
                }
            }
        }
    }

    /// Notes a lost attempt; the pause before the next one, if there may be one.
    fn lose(&mut self, lost: &Lost) -> Option<Duration> {
        let pause = self.losses.lose(lost.worker.clone(), self.relay.sent())?;
        let dead = is_dead(&lost.status);
        self.shared.metrics.lost(&lost.status, dead);
        if let Some(worker) = lost.worker.as_ref().filter(|_| dead) {
            self.shared.fleet.note_unreachable(worker);
        }
        let sequence = &self.prepared.sequence;
        tracing::warn!(request = %sequence.request_id, attempt = sequence.attempt, worker = ?lost.worker,
            sent = self.relay.sent(), status = %lost.status.message(), "attempt lost, trying again");
        Some(pause)
    }

    /// The request as a worker must hear of it now: with what the client has already and the time that is left.
    pub(crate) fn sequence_now(&self) -> v1::Sequence {
        let left = |at: Instant| at.saturating_duration_since(Instant::now()).as_millis().max(1);
        let deadline_ms = self.deadline.map_or(0, |at| u64::try_from(left(at)).unwrap_or(u64::MAX));
        let origin = self.shared.origin.clone();
        v1::Sequence { deadline_ms, outputs: self.relay.outputs(), origin, ..self.prepared.sequence.clone() }
    }

    fn complete(self) -> v1::Complete {
        let sequence = &self.prepared.sequence;
        let (choices, output_tokens) = self.relay.complete();
        self.timeline.trace(&self.span);
        trace_ends(&self.span, &choices, sequence.prompt.len(), output_tokens);
        let shared = self.shared;
        shared.metrics.gaps(self.timeline.gaps_ms());
        let complete = v1::Complete {
            choices,
            usage: Some(v1::Usage {
                prompt_tokens: sequence.prompt.len() as u32,
                output_tokens,
                cached_tokens: self.cached_tokens,
            }),
            timeline: Some(self.timeline.finish()),
            kv: Some(self.kv),
            request_id: sequence.request_id.clone(),
            seed: sequence.sampling.as_ref().map_or(0, |s| s.seed),
        };
        shared.metrics.ended_well(&complete, shared.board.slo());
        shared.board.note_ended(&complete);
        complete
    }
}

/// What the GenAI conventions want of an answer (<https://opentelemetry.io/docs/specs/semconv/gen-ai/>).
fn trace_ends(span: &Span, choices: &[v1::ChoiceEnd], prompt_tokens: usize, output_tokens: u32) {
    span.set("gen_ai.usage.input_tokens", i64::try_from(prompt_tokens).unwrap_or(i64::MAX));
    span.set("gen_ai.usage.output_tokens", i64::from(output_tokens));
    span.set_list("gen_ai.response.finish_reasons", choices.iter().map(relay::finish_reason).collect());
}
