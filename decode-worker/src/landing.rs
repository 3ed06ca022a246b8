//! From a reservation to a runnable sequence: room, ticket, what landed.

use std::sync::{Arc, Weak};
use std::time::Instant;

use engine::kv::pool::{Block, BlockState};
use kv_transport::{Landed, Landing, LandingError, Packing, Reserve};
use parking_lot::Mutex;
use prost::Message;
use proto::v1::{self, decode_event::Event};
use tonic::Status;
use worker::{Request, serve};

use crate::cargo::{self, Cargo};
use crate::error;
use crate::order::{Events, Hold, Start, Submission};
use crate::seal::Seal;
use crate::service::DecodeService;

/// A request that waits for its KV.
pub(crate) struct Waiting {
    pub request: Arc<Request>,
    pub events: Events,
    /// Blocks at the start of the stem that were here already.
    pub cached: Vec<Block>,
    /// What a move brings; None when a prefill worker sends the stem.
    pub cargo: Option<Cargo>,
    pub hold: Hold,
    landing: Landing<Arc<Reserved>>,
    reserved: QuarantineOnDrop,
}

impl Waiting {
    /// The right to write, for the sender.
    pub fn ticket(&self) -> bytes::Bytes {
        self.landing.ticket().clone()
    }
}

impl DecodeService {
    /// Room for the blocks that this worker lacks, and the ticket that gives the right to fill them.
    pub(crate) fn reserve(
        &self,
        request: Arc<Request>,
        events: Events,
        cached: Vec<Block>,
        cargo: Option<Cargo>,
        sender: Option<String>,
        hold: Hold,
    ) -> Result<Waiting, Status> {
        let held = cached.len();
        let (missing, meta) = match &cargo {
            Some(cargo) => (cargo.slots(held), cargo.to_meta(held, &self.limits)),
            None => {
                let first_block = u32::try_from(held).unwrap_or(u32::MAX);
                let (compat_hash, form) = (self.limits.compat_hash.clone(), Some(self.limits.form()));
                let wire = self.receiver.packing().map_or("", Packing::name).to_owned();
                let meta =
                    v1::TicketMeta { first_block, compat_hash, form, wire, ..v1::TicketMeta::default() };
                (self.limits.layout.blocks_for(request.stem.len()) - held, meta)
            }
        };
        let blocks = self
            .pool
            .alloc(missing, BlockState::Reserved)
            .map_err(|e| serve::shed(&format!("out of KV blocks on this decode worker: {e}")))?;
        let slots = blocks.iter().map(Block::id).collect();
        let blocks = Arc::new(Reserved::new(blocks));
        let reserved = QuarantineOnDrop::of(&blocks);
        let latest = Instant::now() + self.reservation;
        let landing = self
            .receiver
            .reserve(Reserve {
                slots,
                meta: meta.encode_to_vec().into(),
                attempt: request.attempt,
                sender,
                deadline: request.deadline.map_or(latest, |d| d.min(latest)),
                hold: blocks,
            })
            .map_err(error::reserve)?;
        Ok(Waiting { request, events, cached, cargo, hold, landing, reserved })
    }

    /// Waits for the KV and its tokens, then hands the sequence to the engine.
    pub(crate) async fn land(self, mut waiting: Waiting) {
        let landed = tokio::select! {
            landed = waiting.landing.committed() => landed,
            () = waiting.events.closed() => return,
            // Whoever waits for the request was told by its observer.
            _ = waiting.hold.attempt.ended() => return,
        };
        let events = waiting.events.clone();
        if let Err(status) = self.landed(waiting, landed) {
            let _ = events.send(Err(status));
        }
    }

    fn landed(
        &self,
        waiting: Waiting,
        landed: Result<Landed<Arc<Reserved>>, LandingError>,
    ) -> Result<(), Status> {
        let Waiting { request, events, cached, cargo, hold, reserved, .. } = waiting;
        let landed = landed.map_err(error::landing)?;
        failpoints::at("committed", 0, String::new);
        hold.span.event("kv landed");
        let blocks = landed.hold.take(BlockState::Running);
        drop(reserved);
        let seal = Some(Seal::new(&blocks, landed.checksums, landed.on_device));
        let held = cached.len();
        let commit = v1::Commit::decode(landed.payload)
            .map_err(|e| Status::data_loss(format!("the commit is unreadable: {e}")))?;
        let block_tokens = self.limits.layout.block_tokens;
        let (blocks, computed, start) = match cargo {
            None => {
                self.check_first(&request, &commit.first)?;
                let tokens = v1::Tokens { tokens: commit.first.clone(), local_prefill: None };
                let _ = events.send(Ok(v1::DecodeEvent { event: Some(Event::Tokens(tokens)), load: None }));
                let table: Vec<Block> = cached.into_iter().chain(blocks).collect();
                (table, request.stem.len(), Start::Landed(commit.first))
            }
            Some(cargo) => {
                let since =
                    cargo::tokens_since(&request, &commit, self.limits.vocab_size).ok_or_else(|| {
                        Status::data_loss("the commit's tokens do not follow what the client has")
                    })?;
                let mut blocks = blocks.into_iter();
                let shared = cargo.shared - cached.len();
                let table: Vec<Block> = cached.into_iter().chain(blocks.by_ref().take(shared)).collect();
                let own = |n: usize| blocks.by_ref().take(n).collect::<Vec<Block>>();
                let own = cargo.choices.iter().map(|c| c.blocks).map(own).collect::<Vec<_>>();
                let choices = own.into_iter().zip(since).collect();
                (table, cargo.shared * block_tokens, Start::Moved(choices))
            }
        };
        let cached = held;
        self.submit(Submission { request, events, blocks, computed, cached, start, seal, hold })
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
}

/// Blocks that a peer may write into. The transport keeps them until no write can be in flight.
pub(crate) struct Reserved(Mutex<Vec<Block>>);

impl Reserved {
    pub fn new(blocks: Vec<Block>) -> Self {
        Self(Mutex::new(blocks))
    }

    fn set_state(&self, state: BlockState) {
        self.0.lock().iter().for_each(|block| block.set_state(state));
    }

    pub fn take(&self, state: BlockState) -> Vec<Block> {
        self.set_state(state);
        std::mem::take(&mut *self.0.lock())
    }
}

/// A reservation that ends without landing: what the transport still keeps is in quarantine.
pub(crate) struct QuarantineOnDrop(Weak<Reserved>);

impl QuarantineOnDrop {
    pub fn of(reserved: &Arc<Reserved>) -> Self {
        Self(Arc::downgrade(reserved))
    }
}

impl Drop for QuarantineOnDrop {
    fn drop(&mut self) {
        if let Some(reserved) = self.0.upgrade() {
            reserved.set_state(BlockState::Quarantined);
        }
    }
}
