//! One try at a request: place → reserve → prefill → tokens. Both legs at once; the failure of either ends the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::Role;
use futures::future::OptionFuture;
use proto::v1::{self, decode_event::Event};
use tonic::Status;

use crate::fleet::Worker;
use crate::journey::Journey;
use crate::legs::{self, KvFrom, Prefilling};
use crate::moving::{Decoding, Moving};
use crate::placement::{self, Demand, NoPlace, Placement};
use crate::relay;
use crate::timeline::millis;

/// How long one leg waits for the other's word: what it did, or that it was the cause of a failure.
const LEG_PATIENCE: Duration = Duration::from_millis(250);

/// Why an attempt ended without finishing.
pub(crate) struct Lost {
    pub status: Status,
    /// Who is to blame, if anybody.
    pub worker: Option<String>,
}

impl Lost {
    pub fn at(worker: &str) -> impl Fn(Status) -> Self + '_ {
        move |status| Self { status, worker: Some(worker.to_owned()) }
    }
}

impl From<Status> for Lost {
    fn from(status: Status) -> Self {
        Self { status, worker: None }
    }
}

/// Whether the connection itself failed, rather than the worker saying no.
pub(crate) fn is_dead(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

impl Journey {
    /// One try.
    pub(crate) async fn attempt(&mut self) -> Result<(), Lost> {
        let placed_at = Instant::now();
        let placement = self.place()?;
        self.timeline.placed(placed_at, placement.expected);
        failpoints::at("placed", 0, || {
            format!("{} {}", placement.prefill.as_deref().unwrap_or_default(), placement.decode)
        });
        // Counted from here on, or prompts that come together would all go to the worker that is least busy now.
        let tokens = self.prepared.sequence.prompt.len();
        let promised = placement.prefill.as_deref().and_then(|name| self.shared.fleet.get(name));
        let promised = promised.map(|worker| worker.assign(tokens));
        let (mut decoding, reserved) = self.reserve(&placement, placed_at).await?;
        let prefill = self.prefill(&placement, reserved.ticket)?;
        drop(promised);
        self.shared.metrics.placements.of(&self.timeline.known.placement_reason).increment(1);
        let mut prefilling = prefill.is_some();
        let mut prefill: OptionFuture<_> = prefill.into();
        let prefill_name = placement.prefill.as_deref().unwrap_or(&placement.decode).to_owned();
        let mut moving = Moving::default();
        loop {
            tokio::select! {
                biased;
                Some(reply) = &mut prefill, if prefilling => {
                    prefilling = false;
                    match reply {
                        Ok(reply) => self.note_prefill(&prefill_name, reply, placed_at),
                        Err(status) => {
                            let word = tokio::time::timeout(LEG_PATIENCE, decoding.next()).await;
                            let decode_is_dead = matches!(&word, Ok(Err(s)) if is_dead(s));
                            let at = if decode_is_dead { decoding.name() } else { &prefill_name };
                            return Err(Lost::at(at)(status));
                        }
                    }
                }
                stepped = moving.step() => self.advance_move(&mut moving, &decoding, stepped),
                event = decoding.next() => match event {
                    Ok(Some(event)) => {
                        self.shared.fleet.note_load(decoding.name(), event.load);
                        match event.event {
                            // It is alive.
                            None => {}
                            Some(Event::Leaving(_)) => moving.want(),
                            Some(Event::Moved(_)) => decoding = self.follow(&mut moving, &decoding).await?,
                            event => {
                                let at_decode = Lost::at(decoding.name());
                                if self.pass_on(event, decoding.name()).await.map_err(at_decode)? {
                                    // A short answer can be over before the prefill leg has reported.
                                    if prefilling
                                        && let Ok(Some(Ok(reply))) = tokio::time::timeout(LEG_PATIENCE, &mut prefill).await
                                    {
                                        self.note_prefill(&prefill_name, reply, placed_at);
                                    }
                                    return Ok(());
                                }
                            }
                        }
                    }
                    // Its last word is lost, but not the sequence. What is missing shows as a gap.
                    Ok(None) | Err(_) if moving.arrived.is_some() => {
                        decoding = self.follow(&mut moving, &decoding).await?;
                    }
                    Ok(None) => return Err(Lost::at(decoding.name())(Status::unavailable("the decode worker closed the stream"))),
                    // A decode worker that lives and lacks its KV is the prefill worker's victim, which knows why.
                    Err(status) if prefilling && !is_dead(&status) => {
                        let word = tokio::time::timeout(LEG_PATIENCE, &mut prefill).await;
                        let cause = if let Ok(Some(Err(cause))) = word { cause } else { status };
                        return Err(Lost::at(&prefill_name)(cause));
                    }
                    Err(status) => return Err(Lost::at(decoding.name())(status)),
                },
            }
        }
    }

    /// The first worker has said its last word: from here on the other one's tokens count.
    async fn follow(&mut self, moving: &mut Moving, from: &Decoding) -> Result<Decoding, Lost> {
        if moving.arrived.is_none()
            && let Ok(stepped) = tokio::time::timeout(LEG_PATIENCE, moving.step()).await
        {
            self.advance_move(moving, from, stepped);
        }
        let arrived = std::mem::take(moving).arrived;
        let lost =
            || Lost::at(from.name())(Status::unavailable("the sequence moved, but nobody knows where to"));
        let mut arrived = arrived.ok_or_else(lost)?;
        // What it said meanwhile waits to be read.
        arrived.heard = Instant::now();
        arrived.name().clone_into(&mut self.timeline.known.decode_worker);
        Ok(arrived)
    }

    async fn reserve(
        &mut self,
        placement: &Placement,
        placed_at: Instant,
    ) -> Result<(Decoding, v1::Reserved), Lost> {
        let worker = self.worker(&placement.decode)?;
        let load = worker.assign(0);
        let sequence = self.sequence_now();
        if !sequence.outputs.is_empty() {
            self.shared.metrics.resumes.increment(1);
        }
        let attempt = sequence.attempt;
        let reserving = Instant::now();
        let worker_name = placement.prefill.clone().unwrap_or_default();
        let local_max_tokens = placement.local_prefill_max_tokens;
        let from = KvFrom::Prefill { worker: worker_name, local_max_tokens };
        let trace = self.span.traceparent();
        let silence = self.shared.worker_silence;
        let (reserved, tokens) = legs::reserve((&self.shared.fleet, silence), &worker, sequence, from, trace)
            .await
            .map_err(Lost::at(&placement.decode))?;
        self.timeline.mark("reserve", reserving);
        self.note_reserved(placement, &reserved, millis(reserving - placed_at), millis(reserving.elapsed()));
        let heard = Instant::now();
        Ok((Decoding { worker, tokens, attempt, _load: load, silence, heard }, reserved))
    }

    fn place(&mut self) -> Result<Placement, Status> {
        let sequence = &self.prepared.sequence;
        let fleet = &self.shared.fleet;
        let mut pool = |role| {
            let lost = self.losses.workers();
            fleet.candidates(role, &sequence.prompt, &mut self.chains, lost, &mut rand::rng())
        };
        let (prefill, decode) = (pool(Role::Prefill), pool(Role::Decode));
        let prompt_tokens = sequence.prompt.len() + self.relay.sent();
        let demand = Demand { prompt_tokens, salt: rand::random::<u32>() as usize };
        let model = *self.shared.model.lock();
        placement::place(&demand, &prefill, &decode, self.shared.policy, &model).map_err(|e| {
            Status::unavailable(match e {
                NoPlace::NoDecodeWorker => "the decode pool is empty: no decode worker is registered and ready",
                NoPlace::NoPrefillWorker => "the prefill pool is empty: no prefill worker fits a decode worker, and local prefill is off",
            })
        })
    }

    fn worker(&self, name: &str) -> Result<Worker, Lost> {
        let gone = || Lost::at(name)(Status::unavailable(format!("worker {name} left")));
        self.shared.fleet.get(name).ok_or_else(gone)
    }

    /// The prefill leg, when there is one.
    fn prefill(&mut self, placement: &Placement, ticket: bytes::Bytes) -> Result<Option<Prefilling>, Lost> {
        let name = match &placement.prefill {
            Some(name) if !ticket.is_empty() => name,
            _ => {
                self.timeline.known.prefill_worker.clone_from(&placement.decode);
                if placement.prefill.is_some() {
                    self.timeline.known.placement_reason = "local:prefix-hit".into();
                }
                if self.kv.transport.is_empty() {
                    self.kv.transport = "none".into();
                }
                return Ok(None);
            }
        };
        self.timeline.known.prefill_worker.clone_from(name);
        let silence = self.shared.worker_silence;
        Ok(Some(legs::prefill(
            silence,
            &self.worker(name)?,
            self.sequence_now(),
            ticket,
            self.span.traceparent(),
        )))
    }

    fn note_reserved(
        &mut self,
        placement: &Placement,
        reserved: &v1::Reserved,
        placing_ms: f64,
        reserving_ms: f64,
    ) {
        let known = &mut self.timeline.known;
        known.decode_worker.clone_from(&placement.decode);
        known.placement_reason = placement.reason.into();
        known.attempts = self.prepared.sequence.attempt;
        if !self.timeline.has_token() {
            let known = &mut self.timeline.known;
            known.placement_ms = placing_ms;
            known.reserve_ms = reserving_ms;
            self.cached_tokens = reserved.cached_tokens;
            self.kv.cached_blocks = reserved.cached_blocks;
        }
    }

    fn note_prefill(&mut self, worker: &str, reply: v1::PrefillReply, placed_at: Instant) {
        self.shared.fleet.note_load(worker, reply.load);
        self.note_prefix(worker);
        if let Some(kv) = reply.kv {
            self.kv.bytes += kv.bytes;
            self.kv.blocks += kv.blocks;
            self.kv.refetched += kv.refetched;
            self.kv.transport = kv.transport;
            self.kv.converted |= kv.converted;
            self.kv.packed_bytes += kv.packed_bytes;
        }
        let Some(timing) = reply.timing else { return };
        self.note_timing(&timing);
        let computed = self.prepared.sequence.prompt.len().saturating_sub(timing.cached_tokens as usize);
        let overhead = millis(placed_at.elapsed()) - timing.queue_ms - timing.prefill_ms;
        self.shared.model.lock().learn_remote(computed, timing.prefill_ms, overhead);
    }

    /// Times of the first prefill; what a later one costs is a gap between tokens.
    fn note_timing(&mut self, timing: &v1::PrefillTiming) {
        let known = &mut self.timeline.known;
        if !self.losses.any() || known.prefill_ms == 0.0 {
            known.queue_ms += timing.queue_ms;
            known.prefill_ms = timing.prefill_ms;
            known.exposed_transfer_ms = timing.exposed_transfer_ms;
        }
    }

    fn note_prefix(&mut self, worker: &str) {
        self.shared.fleet.note_prefix(worker, &self.prepared.sequence.prompt, &mut self.chains);
    }

    /// Passes one event on to the client; true at the end.
    async fn pass_on(&mut self, event: Option<Event>, decode: &str) -> Result<bool, Status> {
        let shared = Arc::clone(&self.shared);
        match event {
            Some(Event::Tokens(tokens)) => {
                if let Some(timing) = &tokens.local_prefill {
                    self.note_timing(timing);
                    if let Some((placed, expected)) = self.timeline.first_wait() {
                        self.shared.model.lock().learn_local(expected.local_tokens, millis(placed.elapsed()));
                    }
                }
                if !self.timeline.has_token() {
                    self.note_prefix(decode);
                }
                for chunk in self.relay.tokens(tokens.tokens, &shared.text, &mut self.timeline)? {
                    failpoints::at("token", self.relay.sent(), String::new);
                    // A closed stream is a cancelled request: `run` sees it.
                    let _ = self.out.send(Ok(relay::chunk(chunk))).await;
                }
                Ok(self.relay.is_done())
            }
            Some(Event::Finished(_)) => {
                Err(Status::internal("the decode worker ended choices before their end"))
            }
            _ => Err(Status::internal("the decode worker sent an unexpected message")),
        }
    }
}
