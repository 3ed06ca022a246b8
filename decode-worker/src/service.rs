//! `DecodeWorker.Decode`: reserve → land → tokens. One request, one screen.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use cluster::Load;
use engine::kv::pool::{Block, BlockPool, BlockState};
use kv_transport::{Landing, Receiver, Reserve};
use parking_lot::Mutex;
use prost::Message;
use proto::v1::{self, decode_event::Event};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Response, Status};
use worker::attempts::{Attempts, Running};
use worker::metrics::Refusals;
use worker::request::{Limits, load_to_wire};
use worker::{Request, serve};

use crate::engine_loop::{Events, Hold, Submission};
use crate::error;

type Stream = UnboundedReceiverStream<Result<v1::DecodeEvent, Status>>;

/// The gRPC face of a decode worker.
#[derive(Clone)]
pub(crate) struct DecodeService {
    pub limits: Arc<Limits>,
    pub pool: Arc<BlockPool>,
    pub receiver: Receiver,
    pub engine: Sender<Submission>,
    pub slots: Arc<Semaphore>,
    pub attempts: Attempts,
    pub load: Arc<watch::Sender<Load>>,
    pub reservation: Duration,
    pub refusals: Refusals,
}

#[tonic::async_trait]
impl v1::decode_worker_server::DecodeWorker for DecodeService {
    type DecodeStream = Stream;

    async fn decode(
        &self,
        call: tonic::Request<v1::DecodeRequest>,
    ) -> Result<Response<Self::DecodeStream>, Status> {
        self.start(call.into_inner()).map(Response::new).map_err(|status| self.refusals.count(status))
    }
}

impl DecodeService {
    /// Reserves room for a request and opens its stream.
    fn start(&self, call: v1::DecodeRequest) -> Result<Stream, Status> {
        if self.load.borrow().draining {
            return Err(Status::unavailable("this decode worker is draining"));
        }
        let request = Request::from_wire(call.sequence, &call.compat_hash, call.incarnation, &self.limits)?;
        let request = Arc::new(request);
        let attempt = Arc::new(self.attempts.start(&request.id, request.attempt)?);
        let slot = Arc::clone(&self.slots)
            .try_acquire_many_owned(request.open.len() as u32)
            .map_err(|_| serve::shed("all sequence slots of this decode worker are taken"))?;
        let hold = Hold { _slot: slot, attempt: Arc::clone(&attempt) };

        let block_tokens = self.limits.layout.block_tokens;
        let cached = self.pool.lookup(request.reusable(block_tokens));
        let uncached = request.stem.len() - cached.len() * block_tokens;
        let (events, stream) = mpsc::unbounded_channel();
        if uncached <= call.local_prefill_max_tokens as usize {
            self.announce(&events, bytes::Bytes::new(), cached.len());
            self.submit(request, events, cached, None, hold)?;
        } else {
            let (landing, reserved) = self.reserve(&request, &cached)?;
            self.announce(&events, landing.ticket().clone(), cached.len());
            tokio::spawn(self.clone().land(request, events, cached, landing, reserved, attempt, hold));
        }
        Ok(UnboundedReceiverStream::new(stream))
    }

    fn announce(&self, events: &Events, ticket: bytes::Bytes, cached_blocks: usize) {
        self.load
            .send_modify(|load| load.free_blocks = u32::try_from(self.pool.available()).unwrap_or(u32::MAX));
        let cached_tokens = cached_blocks * self.limits.layout.block_tokens;
        let reserved = v1::Reserved {
            ticket,
            cached_tokens: u32::try_from(cached_tokens).unwrap_or(u32::MAX),
            cached_blocks: u32::try_from(cached_blocks).unwrap_or(u32::MAX),
        };
        let event = Some(Event::Reserved(reserved));
        let _ = events.send(Ok(v1::DecodeEvent { event, load: Some(load_to_wire(&self.load.borrow())) }));
    }

    /// Room for the blocks that this worker lacks, and the ticket that gives the right to fill them.
    fn reserve(
        &self,
        request: &Request,
        cached: &[Block],
    ) -> Result<(Landing<Arc<Reserved>>, QuarantineOnDrop), Status> {
        let missing = self.limits.layout.blocks_for(request.stem.len()) - cached.len();
        let blocks = self
            .pool
            .alloc(missing, BlockState::Reserved)
            .map_err(|e| serve::shed(&format!("out of KV blocks on this decode worker: {e}")))?;
        let slots = blocks.iter().map(Block::id).collect();
        let hold = Arc::new(Reserved(Mutex::new(blocks)));
        let guard = QuarantineOnDrop(Arc::downgrade(&hold));
        let meta = v1::TicketMeta {
            first_block: u32::try_from(cached.len()).unwrap_or(u32::MAX),
            compat_hash: self.limits.compat_hash.clone(),
        };
        let latest = Instant::now() + self.reservation;
        let landing = self
            .receiver
            .reserve(Reserve {
                slots,
                meta: meta.encode_to_vec().into(),
                attempt: request.attempt,
                deadline: request.deadline.map_or(latest, |d| d.min(latest)),
                hold,
            })
            .map_err(error::reserve)?;
        Ok((landing, guard))
    }

    /// Waits for the KV and the first tokens, then hands the sequence to the engine.
    #[allow(clippy::too_many_arguments)]
    async fn land(
        self,
        request: Arc<Request>,
        events: Events,
        cached: Vec<Block>,
        mut landing: Landing<Arc<Reserved>>,
        reserved: QuarantineOnDrop,
        attempt: Arc<Running>,
        hold: Hold,
    ) {
        let landed = tokio::select! {
            landed = landing.committed() => landed.map_err(error::landing),
            () = events.closed() => return,
            () = attempt.superseded() => Err(Status::aborted("a newer attempt took over")),
        };
        let result = landed.and_then(|landed| {
            let blocks = landed.hold.take(BlockState::Running);
            drop(reserved);
            let commit = v1::Commit::decode(landed.payload)
                .map_err(|e| Status::data_loss(format!("the commit is unreadable: {e}")))?;
            self.check_first(&request, &commit.first)?;
            let tokens = v1::Tokens { tokens: commit.first.clone(), local_prefill: None };
            let _ = events.send(Ok(v1::DecodeEvent { event: Some(Event::Tokens(tokens)), load: None }));
            let table = cached.into_iter().chain(blocks).collect();
            self.submit(request, events.clone(), table, Some(commit.first), hold)
        });
        if let Err(status) = result {
            let _ = events.send(Err(status));
        }
    }

    fn check_first(&self, request: &Request, first: &[v1::SampledToken]) -> Result<(), Status> {
        let position = request.stem_output().len();
        let in_order = request.drawn_at_stem().eq(first.iter().map(|t| t.choice));
        let fits = |t: &v1::SampledToken| {
            (t.token_id as usize) < self.limits.vocab_size && t.position as usize == position
        };
        match in_order && first.iter().all(fits) {
            true => Ok(()),
            false => Err(Status::data_loss("the commit does not hold the next token of every choice")),
        }
    }

    fn submit(
        &self,
        request: Arc<Request>,
        events: Events,
        blocks: Vec<Block>,
        landed: Option<Vec<v1::SampledToken>>,
        hold: Hold,
    ) -> Result<(), Status> {
        let computed = match landed {
            None => blocks.len() * self.limits.layout.block_tokens,
            Some(_) => request.stem.len(),
        };
        self.engine
            .send(Submission { request, events, blocks, computed, landed, hold })
            .map_err(|_| Status::unavailable("the engine of this decode worker has stopped"))
    }
}

/// Blocks that a peer may write into. The transport keeps them until no write can be in flight.
pub(crate) struct Reserved(Mutex<Vec<Block>>);

impl Reserved {
    fn set_state(&self, state: BlockState) {
        self.0.lock().iter().for_each(|block| block.set_state(state));
    }

    fn take(&self, state: BlockState) -> Vec<Block> {
        self.set_state(state);
        std::mem::take(&mut *self.0.lock())
    }
}

/// A reservation that ends without landing: what the transport still keeps is in quarantine.
pub(crate) struct QuarantineOnDrop(Weak<Reserved>);

impl Drop for QuarantineOnDrop {
    fn drop(&mut self) {
        if let Some(reserved) = self.0.upgrade() {
            reserved.set_state(BlockState::Quarantined);
        }
    }
}
