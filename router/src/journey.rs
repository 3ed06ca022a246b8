//! One request's journey: place → reserve → prefill → tokens, again elsewhere if a worker is lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::Role;
use futures::future::{BoxFuture, FutureExt, OptionFuture};
use parking_lot::Mutex;
use proto::v1::decode_worker_client::DecodeWorkerClient;
use proto::v1::prefill_worker_client::PrefillWorkerClient;
use proto::v1::{self, decode_event::Event};
use tokio::sync::mpsc;
use tonic::{Code, Status, Streaming};

use crate::admission::{Admission, Turned};
use crate::fleet::{Chains, Fleet, Worker};
use crate::metrics::Metrics;
use crate::placement::{self, Demand, Model, NoPlace, Placement, Policy};
use crate::relay::{self, Relay};
use crate::request::Prepared;
use crate::text::model::TextModel;
use crate::timeline::{Timeline, millis};

/// Tries that a request may lose to failing workers. Waiting for room is not losing.
const MAX_LOST: usize = 6;
/// How long one leg waits for the other's word: what it did, or that it was the cause of a failure.
const LEG_PATIENCE: Duration = Duration::from_millis(250);
const SHED_PAUSE: Duration = Duration::from_millis(20);
/// Weight of the newest sample in the fleet's speed model.
const LEARN: f64 = 0.1;

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
    /// Learned speeds.
    pub model: Mutex<Model>,
    /// What is counted.
    pub metrics: Metrics,
}

/// Where messages to the client go. Its bound is the client's backpressure.
pub type Out = mpsc::Sender<Result<v1::GenerateResponse, Status>>;

/// One request on its way.
pub struct Journey {
    shared: Arc<Shared>,
    prepared: Prepared,
    deadline: Option<Instant>,
    out: Out,
    relay: Relay,
    timeline: Timeline,
    kv: v1::KvTransfer,
    cached_tokens: u32,
    chains: Chains,
    lost: Vec<String>,
}

/// Why an attempt ended without finishing.
struct Lost {
    status: Status,
    /// Who is to blame, if anybody.
    worker: Option<String>,
}

impl Lost {
    fn at(worker: &str) -> impl Fn(Status) -> Self + '_ {
        move |status| Self { status, worker: Some(worker.to_owned()) }
    }
}

impl From<Status> for Lost {
    fn from(status: Status) -> Self {
        Self { status, worker: None }
    }
}

/// Whether the connection itself failed, rather than the worker saying no.
fn is_dead(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

impl Journey {
    /// A prepared request.
    pub fn new(
        shared: Arc<Shared>,
        prepared: Prepared,
        deadline: Option<Instant>,
        timeline: Timeline,
        out: Out,
    ) -> Self {
        let relay = Relay::new(&prepared);
        Self {
            shared,
            prepared,
            deadline,
            out,
            relay,
            timeline,
            kv: v1::KvTransfer::default(),
            cached_tokens: 0,
            chains: Chains::default(),
            lost: Vec::new(),
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
        let last = match ended {
            Ok(()) => Ok(relay::complete(self.complete())),
            Err(status) => {
                shared.metrics.ended_badly(&status);
                Err(status)
            }
        };
        let _ = out.send(last).await;
    }

    async fn attempts(&mut self) -> Result<(), Status> {
        let entered = Instant::now();
        let shared = Arc::clone(&self.shared);
        let _place = shared.admission.enter(shared.queue_patience).await.map_err(|turned| {
            match turned {
                Turned::QueueFull => shared.metrics.shed.of("queue_full").increment(1),
                Turned::Timeout => shared.metrics.shed.of("queue_timeout").increment(1),
                Turned::Stopping => {}
            }
            turned.status()
        })?;
        loop {
            self.timeline.known.queue_ms = millis(entered.elapsed());
            // A number of its own for every try: a worker that still holds the last one lets it go for this.
            self.prepared.sequence.attempt += 1;
            self.relay.begin_attempt();
            let Err(lost) = self.attempt().await else { return Ok(()) };
            let waited = entered.elapsed();
            match lost.status.code() {
                // The worker is full: wait for room, up to the queue's patience.
                Code::ResourceExhausted if waited < shared.queue_patience => {
                    shared.metrics.lost(&lost.status, false);
                    shared.fleet.changed(SHED_PAUSE).await;
                    continue;
                }
                Code::Unavailable
                | Code::Aborted
                | Code::DataLoss
                | Code::FailedPrecondition
                | Code::Internal
                | Code::Unknown
                | Code::Cancelled
                    if self.lost.len() + 1 < MAX_LOST && lost.worker.is_some() =>
                {
                    let sequence = &self.prepared.sequence;
                    tracing::warn!(request = %sequence.request_id, attempt = sequence.attempt, worker = ?lost.worker,
                        status = %lost.status.message(), "attempt lost, trying again");
                    shared.metrics.lost(&lost.status, is_dead(&lost.status));
                    if let Some(worker) = &lost.worker
                        && is_dead(&lost.status)
                    {
                        shared.fleet.note_unreachable(worker);
                    }
                    self.lost.extend(lost.worker);
                }
                code => {
                    if code == Code::ResourceExhausted {
                        shared.metrics.shed.of("workers_full").increment(1);
                    }
                    return Err(lost.status);
                }
            }
        }
    }

    /// One try: both legs at once; the failure of either ends the other.
    async fn attempt(&mut self) -> Result<(), Lost> {
        let placed_at = Instant::now();
        let placement = self.place()?;
        self.timeline.known.placement_ms = millis(placed_at.elapsed());
        self.timeline.known.decode_worker.clone_from(&placement.decode);
        self.timeline.known.placement_reason = placement.reason.into();
        let gone = |name: &str| Status::unavailable(format!("worker {name} left"));
        let decode = self
            .worker(&placement.decode)
            .ok_or_else(|| Lost::at(&placement.decode)(gone(&placement.decode)))?;
        let _load = decode.assign(0);

        let reserving = Instant::now();
        let (reserved, mut tokens) =
            self.reserve(&decode, &placement).await.map_err(Lost::at(&placement.decode))?;
        self.timeline.known.reserve_ms = millis(reserving.elapsed());
        self.cached_tokens = reserved.cached_tokens;
        self.kv.cached_blocks = reserved.cached_blocks;

        let prefill = self.prefill(&placement, reserved.ticket);
        self.shared.metrics.placements.of(&self.timeline.known.placement_reason).increment(1);
        let mut prefilling = prefill.is_some();
        let mut prefill: OptionFuture<_> = prefill.into();
        let prefill_name = placement.prefill.as_deref().unwrap_or(&placement.decode).to_owned();
        loop {
            tokio::select! {
                biased;
                Some(reply) = &mut prefill, if prefilling => {
                    prefilling = false;
                    match reply {
                        Ok(reply) => self.note_prefill(&prefill_name, reply, placed_at),
                        Err(status) => {
                            let word = tokio::time::timeout(LEG_PATIENCE, tokens.message()).await;
                            let decode_is_dead = matches!(&word, Ok(Err(s)) if is_dead(s));
                            let at = if decode_is_dead { &placement.decode } else { &prefill_name };
                            return Err(Lost::at(at)(status));
                        }
                    }
                }
                event = tokens.message() => match event {
                    Ok(Some(event)) => {
                        self.shared.fleet.note_load(&placement.decode, event.load);
                        if self.pass_on(event.event, &placement).await? {
                            // A short answer can be over before the prefill leg has reported.
                            if prefilling
                                && let Ok(Some(Ok(reply))) = tokio::time::timeout(LEG_PATIENCE, &mut prefill).await
                            {
                                self.note_prefill(&prefill_name, reply, placed_at);
                            }
                            return Ok(());
                        }
                    }
                    Ok(None) => return Err(Lost::at(&placement.decode)(Status::unavailable("the decode worker closed the stream"))),
                    // A decode worker that lives and lacks its KV is the prefill worker's victim.
                    Err(status) => {
                        let at = if prefilling && !is_dead(&status) { &prefill_name } else { &placement.decode };
                        return Err(Lost::at(at)(status));
                    }
                },
            }
        }
    }

    fn place(&mut self) -> Result<Placement, Status> {
        let sequence = &self.prepared.sequence;
        let fleet = &self.shared.fleet;
        let mut pool = |role| fleet.candidates(role, &sequence.prompt, &mut self.chains, &self.lost);
        let (prefill, decode) = (pool(Role::Prefill), pool(Role::Decode));
        let demand = Demand { prompt_tokens: sequence.prompt.len(), salt: rand::random::<u32>() as usize };
        let model = *self.shared.model.lock();
        placement::place(&demand, &prefill, &decode, self.shared.policy, &model).map_err(|e| {
            Status::unavailable(match e {
                NoPlace::NoDecodeWorker => "the decode pool is empty: no decode worker is registered and ready",
                NoPlace::NoPrefillWorker => "the prefill pool is empty: no prefill worker fits a decode worker, and local prefill is off",
            })
        })
    }

    fn worker(&self, name: &str) -> Option<Worker> {
        self.shared.fleet.get(name)
    }

    fn sequence_now(&self) -> v1::Sequence {
        let left = |at: Instant| at.saturating_duration_since(Instant::now()).as_millis().max(1);
        let deadline_ms = self.deadline.map_or(0, |at| u64::try_from(left(at)).unwrap_or(u64::MAX));
        v1::Sequence { deadline_ms, ..self.prepared.sequence.clone() }
    }

    async fn reserve(
        &self,
        decode: &Worker,
        placement: &Placement,
    ) -> Result<(v1::Reserved, Streaming<v1::DecodeEvent>), Status> {
        let request = v1::DecodeRequest {
            sequence: Some(self.sequence_now()),
            compat_hash: decode.member.compat_hash.clone(),
            incarnation: decode.member.incarnation,
            local_prefill_max_tokens: placement.local_prefill_max_tokens,
        };
        let mut events = DecodeWorkerClient::new(decode.channel.clone())
            .max_encoding_message_size(proto::MAX_MESSAGE_BYTES)
            .decode(request)
            .await?
            .into_inner();
        let first = events.message().await?;
        let load = first.as_ref().and_then(|f| f.load);
        self.shared.fleet.note_load(&placement.decode, load);
        match first.and_then(|f| f.event) {
            Some(Event::Reserved(reserved)) => Ok((reserved, events)),
            _ => Err(Status::internal("the decode worker's first message is no reservation")),
        }
    }

    /// The prefill leg, when there is one.
    fn prefill(
        &mut self,
        placement: &Placement,
        ticket: bytes::Bytes,
    ) -> Option<BoxFuture<'static, Result<v1::PrefillReply, Status>>> {
        let name = match &placement.prefill {
            Some(name) if !ticket.is_empty() => name.clone(),
            _ => {
                self.timeline.known.prefill_worker.clone_from(&placement.decode);
                if placement.prefill.is_some() {
                    self.timeline.known.placement_reason = "local:prefix-hit".into();
                }
                self.kv.transport = "none".into();
                return None;
            }
        };
        self.timeline.known.prefill_worker.clone_from(&name);
        let Some(worker) = self.worker(&name) else {
            let gone = Status::unavailable(format!("prefill worker {name} left"));
            return Some(async move { Err(gone) }.boxed());
        };
        let request = v1::PrefillRequest {
            sequence: Some(self.sequence_now()),
            compat_hash: worker.member.compat_hash.clone(),
            incarnation: worker.member.incarnation,
            ticket,
        };
        let assignment = worker.assign(self.prepared.sequence.prompt.len());
        Some(
            async move {
                let _until_done = assignment;
                let mut client = PrefillWorkerClient::new(worker.channel)
                    .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
                client.prefill(request).await.map(tonic::Response::into_inner)
            }
            .boxed(),
        )
    }

    fn note_prefill(&mut self, worker: &str, reply: v1::PrefillReply, placed_at: Instant) {
        self.shared.fleet.note_load(worker, reply.load);
        self.note_prefix(worker);
        if let Some(kv) = reply.kv {
            self.kv = v1::KvTransfer { cached_blocks: self.kv.cached_blocks, ..kv };
        }
        let Some(timing) = reply.timing else { return };
        self.note_timing(&timing);
        let computed = self.prepared.sequence.prompt.len() as f64 - f64::from(timing.cached_tokens);
        let overhead = millis(placed_at.elapsed()) - timing.queue_ms - timing.prefill_ms;
        let mut model = self.shared.model.lock();
        let learn = |old: &mut f64, new: f64| *old += (new - *old) * LEARN;
        learn(&mut model.remote_overhead_ms, overhead.clamp(0.0, 10_000.0));
        if timing.prefill_ms > 0.0 && computed >= 64.0 {
            learn(&mut model.default_tokens_per_second, computed / timing.prefill_ms * 1e3);
        }
    }

    fn note_timing(&mut self, timing: &v1::PrefillTiming) {
        let known = &mut self.timeline.known;
        known.queue_ms += timing.queue_ms;
        known.prefill_ms = timing.prefill_ms;
        known.exposed_transfer_ms = timing.exposed_transfer_ms;
    }

    fn note_prefix(&mut self, worker: &str) {
        if let Some(w) = self.worker(worker) {
            let chain = self.chains.of(&self.prepared.sequence.prompt, &w.member);
            self.shared.fleet.note_prefix(worker, chain);
        }
    }

    /// Passes one event on to the client; true at the end.
    async fn pass_on(&mut self, event: Option<Event>, placement: &Placement) -> Result<bool, Status> {
        let shared = Arc::clone(&self.shared);
        let chunks = match event {
            Some(Event::Tokens(tokens)) => {
                if let Some(timing) = &tokens.local_prefill {
                    self.note_timing(timing);
                }
                if !self.timeline.has_token() {
                    self.note_prefix(&placement.decode);
                }
                self.relay.tokens(tokens.tokens, &shared.text, &mut self.timeline)?
            }
            Some(Event::Finished(finished)) => {
                self.relay.finished(&finished.choices, &shared.text, &mut self.timeline)
            }
            _ => return Err(Status::internal("the decode worker sent an unexpected message")),
        };
        for chunk in chunks {
            // A closed stream is a cancelled request: `run` sees it.
            let _ = self.out.send(Ok(relay::chunk(chunk))).await;
        }
        Ok(self.relay.is_done())
    }

    fn complete(self) -> v1::Complete {
        let sequence = &self.prepared.sequence;
        let (choices, output_tokens) = self.relay.complete();
        self.shared.metrics.ended_well(&self.timeline, sequence.prompt.len(), output_tokens);
        v1::Complete {
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
        }
    }
}
