//! Room for a test push of `tandem doctor`, given back when it has come.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use engine::KvMemory;
use engine::kv::pool::{Block, BlockPool, BlockState};
use futures::future::{BoxFuture, FutureExt};
use kv_transport::{Receiver, Reserve, Sender};
use prost::Message;
use proto::v1;
use tokio::sync::Semaphore;
use tonic::Status;
use worker::probe::{self, Probe};
use worker::request::Limits;
use worker::serve;

use crate::error;
use crate::landing::{QuarantineOnDrop, Reserved};

/// Longest that the room is kept, and so that a push may take.
const PATIENCE: Duration = Duration::from_secs(8);
/// Probes at once: one, and one that has just ended.
pub(crate) const AT_ONCE: usize = 2;
/// Share of the free blocks that a probe may take.
const SHARE: usize = 4;

/// A decode worker's side of probes, both ways.
pub(crate) struct DecodeProbe {
    pub limits: Arc<Limits>,
    pub pool: Arc<BlockPool>,
    pub kv: Arc<dyn KvMemory>,
    pub receiver: Receiver,
    pub sender: Sender,
    /// [`AT_ONCE`].
    pub turn: Arc<Semaphore>,
}

impl Probe for DecodeProbe {
    fn reserve(&self, bytes: u64, from: String) -> Result<Bytes, Status> {
        let busy = |_| Status::resource_exhausted("another probe is under way on this worker");
        let turn = Arc::clone(&self.turn).try_acquire_owned().map_err(busy)?;
        let block_bytes = (self.limits.layout.block_bytes() * self.limits.layout.layers) as u64;
        let wanted = usize::try_from(bytes.div_ceil(block_bytes)).unwrap_or(usize::MAX).max(1);
        let blocks = self.pool.alloc(wanted.min(self.pool.available() / SHARE).max(1), BlockState::Reserved);
        let blocks =
            blocks.map_err(|e| serve::shed(&format!("out of KV blocks on this decode worker: {e}")))?;
        let slots = blocks.iter().map(Block::id).collect();
        let blocks = Arc::new(Reserved::new(blocks));
        let quarantine = QuarantineOnDrop::of(&blocks);
        let meta = v1::TicketMeta {
            compat_hash: self.limits.compat_hash.clone(),
            form: Some(self.limits.form()),
            ..v1::TicketMeta::default()
        };
        let reserve = Reserve {
            slots,
            meta: meta.encode_to_vec().into(),
            attempt: 0,
            sender: Some(from),
            deadline: Instant::now() + PATIENCE,
            hold: blocks,
        };
        let mut landing = self.receiver.reserve(reserve).map_err(error::reserve)?;
        let ticket = landing.ticket().clone();
        tokio::spawn(async move {
            // Whatever became of it, the blocks go back; late writes are the quarantine's business.
            drop(landing.committed().await.map(|landed| landed.hold.take(BlockState::Running)));
            drop((landing, quarantine, turn));
        });
        Ok(ticket)
    }

    fn push(&self, ticket: Bytes) -> BoxFuture<'_, Result<v1::PushProbeReply, Status>> {
        probe::push(&self.sender, &self.pool, &self.kv, ticket).boxed()
    }
}
