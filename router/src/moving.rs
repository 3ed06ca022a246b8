//! A running sequence leaves a decode worker that drains: another one reserves, the first pushes its KV and stops,
//! and the client's stream goes on with the other's tokens. Until then, and whenever it fails, the first goes on.

use std::time::{Duration, Instant};

use cluster::Role;
use futures::future::{BoxFuture, FutureExt};
use proto::v1;
use tonic::{Status, Streaming};

use crate::fleet::{Assignment, Worker};
use crate::journey::Journey;
use crate::legs::{self, KvFrom};
use crate::placement::{self, Demand, Policy};

/// Between two tries to move a sequence.
const RETRY: Duration = Duration::from_millis(200);

/// A decode worker that runs the request, and the stream of its tokens.
pub(crate) struct Decoding {
    pub worker: Worker,
    pub tokens: Streaming<v1::DecodeEvent>,
    pub attempt: u32,
    pub _load: Assignment,
    /// Longest silence, and since when it is silent.
    pub silence: Duration,
    pub heard: Instant,
}

impl Decoding {
    /// The next thing that the worker says; may be asked for again after it was dropped.
    pub async fn next(&mut self) -> Result<Option<v1::DecodeEvent>, Status> {
        let left = self.silence.saturating_sub(self.heard.elapsed());
        let word = legs::heard(left, self.tokens.message()).await?;
        self.heard = Instant::now();
        Ok(word)
    }

    /// The worker's name.
    pub fn name(&self) -> &str {
        &self.worker.member.worker
    }
}

/// What is known of a move.
#[derive(Default)]
pub(crate) struct Moving {
    wanted: Option<Instant>,
    trying: Option<BoxFuture<'static, Result<Decoding, Status>>>,
    /// Where the sequence runs by now; its tokens come after the first worker's last word.
    pub arrived: Option<Decoding>,
}

impl Moving {
    /// The worker asks to be rid of the sequence.
    pub fn want(&mut self) {
        self.wanted.get_or_insert_with(Instant::now);
    }

    /// When the next step is due; never, while nothing is wanted or all is done.
    pub async fn step(&mut self) -> Option<Result<Decoding, Status>> {
        if let Some(trying) = &mut self.trying {
            let ended = trying.await;
            self.trying = None;
            return Some(ended);
        }
        match self.wanted {
            Some(at) if self.arrived.is_none() => {
                tokio::time::sleep_until(at.into()).await;
                None
            }
            _ => std::future::pending().await,
        }
    }
}

impl Journey {
    /// Does what a step of `moving` calls for.
    pub(crate) fn advance_move(
        &mut self,
        moving: &mut Moving,
        from: &Decoding,
        stepped: Option<Result<Decoding, Status>>,
    ) {
        let moves = &self.shared.metrics.moves;
        match stepped {
            Some(Ok(arrived)) => {
                moves.of("moved").increment(1);
                self.timeline.known.moves += 1;
                moving.arrived = Some(arrived);
            }
            Some(Err(status)) => {
                moves.of("failed").increment(1);
                tracing::info!(request = %self.prepared.sequence.request_id, worker = from.name(),
                    status = %status.message(), "the sequence could not move and stays for now");
                moving.wanted = Some(Instant::now() + RETRY);
            }
            None => {
                let still = self.shared.fleet.get(from.name()).is_none_or(|worker| worker.is_draining());
                moving.wanted = still.then(|| Instant::now() + RETRY);
                moving.trying = if still { self.begin_move(from) } else { None };
            }
        }
    }

    /// Starts a try, if there is a worker to go to.
    fn begin_move(&mut self, from: &Decoding) -> Option<BoxFuture<'static, Result<Decoding, Status>>> {
        let prompt = &self.prepared.sequence.prompt;
        let fleet = self.shared.fleet.clone();
        let lost = self.losses.workers();
        let mut others = fleet.candidates(Role::Decode, prompt, &mut self.chains, lost, &mut rand::rng());
        let own = &from.worker.member;
        let fits = |c: &placement::Candidate| {
            *c.compat_hash == *own.compat_hash && c.block_tokens == own.block_tokens as usize
        };
        others.retain(|c| *c.worker != *from.name() && fits(c));
        let demand =
            Demand { prompt_tokens: prompt.len() + self.relay.sent(), salt: rand::random::<u32>() as usize };
        let model = *self.shared.model.lock();
        let place = placement::place(&demand, &[], &others, Policy::Local, &model).ok()?;
        let to = fleet.get(&place.decode)?;
        self.prepared.sequence.attempt += 1;
        let sequence = self.sequence_now();
        let (id, attempt) = (sequence.request_id.clone(), sequence.attempt);
        let origin = sequence.origin.clone();
        let trace = self.span.traceparent();
        let (old, running) = (from.worker.clone(), from.attempt);
        let silence = self.shared.worker_silence;
        let go = async move {
            let load = to.assign(0);
            let kv = KvFrom::Decode { worker: old.member.worker.clone() };
            let (reserved, tokens) = legs::reserve((&fleet, silence), &to, sequence, kv, trace).await?;
            let moved = legs::move_out(&old, (origin, id.clone()), running, reserved.ticket).await?;
            tracing::info!(request = %id, from = %old.member.worker, to = %to.member.worker,
                bytes = moved.kv.map_or(0, |kv| kv.bytes), stopped_ms = moved.stopped_ms, "moved");
            Ok(Decoding { worker: to, tokens, attempt, _load: load, silence, heard: Instant::now() })
        };
        Some(go.boxed())
    }
}
