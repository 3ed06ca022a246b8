//! One prompt inside the prefill worker: how far it is, its blocks, where they go.

use std::sync::Arc;
use std::time::Instant;

use engine::kv::pool::{Block, BlockPool, BlockState};
use engine::{KvLayout, KvMemory, SampleRequest, Sampled};
use kv_transport::{Cell, CellQueue};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tonic::Status;
use worker::Request;

use crate::scheduler::View;
use crate::stage::Stage;

/// The blocks that a push reads from. The transport keeps them until no read can be in flight.
#[derive(Default)]
pub(crate) struct Source(pub Mutex<Vec<Block>>);

/// A computed prompt.
pub(crate) struct Computed {
    pub first: Vec<Sampled>,
    pub queue_ms: f64,
    pub prefill_ms: f64,
    pub cached_tokens: usize,
    /// When compute ended: from here on, transfer is exposed.
    pub at: Instant,
}

/// A prompt on its way.
pub(crate) struct Job {
    pub request: Arc<Request>,
    pub source: Arc<Source>,
    pub cells: CellQueue,
    /// Prompt block that the ticket's first slot stands for; earlier ones are at the receiver already.
    pub first_block: usize,
    /// Where blocks are made for the receiver, when its layout is not ours.
    pub stage: Option<Arc<Stage>>,
    /// The slots of the stage, from `first_block` on.
    pub staged: Vec<u32>,
    pub done: oneshot::Sender<Result<Computed, Status>>,
    pub submitted: Instant,
    pub progress: Progress,
}

/// What changes while a prompt is computed.
#[derive(Default)]
pub(crate) struct Progress {
    pub table: Vec<u32>,
    pub computed: usize,
    pub waited: usize,
    pub cached_tokens: usize,
    pub published: usize,
    pub started: Option<Instant>,
}

impl Job {
    pub fn view(&self, layout: &KvLayout) -> View {
        let p = &self.progress;
        let stem = self.request.stem.len();
        View {
            remaining: stem - p.computed,
            computed: p.computed,
            waited: p.waited,
            missing_blocks: if p.table.is_empty() { layout.blocks_for(stem) } else { 0 },
            deadline_ms: self
                .request
                .deadline
                .map(|at| at.saturating_duration_since(Instant::now()).as_secs_f64() * 1e3),
        }
    }

    /// Whether the KV of the whole stem is there.
    pub fn is_computed(&self) -> bool {
        self.progress.computed == self.request.stem.len()
    }

    /// The draws at the end of a chunk of `count` tokens: none unless the stem ends with it.
    pub fn draws(&self, count: usize) -> Vec<SampleRequest<'_>> {
        match self.progress.computed + count == self.request.stem.len() {
            true => self.request.stem_draws(),
            false => Vec::new(),
        }
    }

    /// Takes cached blocks and allocates the rest, those of the stage included. False when a pool has not enough.
    pub fn start(&mut self, pool: &Arc<BlockPool>, layout: &KvLayout) -> bool {
        if self.progress.started.is_some() {
            return true;
        }
        let mut staged = Vec::new();
        if let Some(stage) = &self.stage {
            let wanted = stage.conversion.to().blocks_for(self.request.stem.len());
            match stage.pool.alloc(wanted.saturating_sub(self.first_block), BlockState::Running) {
                Ok(slots) => staged = slots,
                Err(_) => return false,
            }
        }
        let mut blocks = pool.lookup(self.request.reusable(layout.block_tokens));
        let cached = blocks.len();
        match pool.alloc(layout.blocks_for(self.request.stem.len()) - cached, BlockState::Running) {
            Ok(new) => blocks.extend(new),
            Err(_) => return false,
        }
        let p = &mut self.progress;
        p.table = blocks.iter().map(Block::id).collect();
        p.computed = cached * layout.block_tokens;
        p.cached_tokens = p.computed;
        p.published = cached;
        p.started = Some(Instant::now());
        self.staged = staged.iter().map(Block::id).collect();
        blocks.extend(staged);
        *self.source.0.lock() = blocks;
        true
    }

    /// Queues one layer of what is final of the stem's tokens up to `to` and was not up to `from`, for the push.
    pub fn push(&self, kv: &dyn KvMemory, layer: usize, from: usize, to: usize) {
        let tokens = self.request.stem.len();
        let target = self.stage.as_ref().map_or(kv.layout(), |stage| stage.conversion.to());
        let end = if to == tokens { target.blocks_for(to) } else { to / target.block_tokens };
        let cells: Option<Vec<Cell>> = ((from / target.block_tokens).max(self.first_block)..end)
            .map(|at| {
                let index = (at - self.first_block) as u32;
                let (src_slot, checksum) = match &self.stage {
                    None => {
                        let block = self.progress.table[at];
                        (block, kv.source_checksum(layer, block))
                    }
                    Some(stage) => {
                        let slot = self.staged[at - self.first_block];
                        (slot, stage.fill(kv, (layer, at, tokens), &self.progress.table, slot)?)
                    }
                };
                Some(Cell { index, src_slot, checksum })
            })
            .collect();
        // Without its cells the push can never commit; it ends when nothing more comes.
        let Some(cells) = cells else {
            return tracing::error!(request = %self.request.id, layer, "KV changed before it could be converted");
        };
        if !cells.is_empty() {
            // A push that failed says so to whoever waits for its commit; the job is dropped then.
            let _ = self.cells.send(layer as u32, cells);
            failpoints::at("layer-pushed", layer, String::new);
        }
    }

    /// Tokens of the stem whose KV is final once `count` more are computed: those of full blocks, and at the end all.
    pub fn final_tokens_after(&self, count: usize, layout: &KvLayout) -> usize {
        let end = self.progress.computed + count;
        if end == self.request.stem.len() { end } else { end / layout.block_tokens * layout.block_tokens }
    }

    /// Notes that `count` more tokens are computed, and offers full blocks to the prefix cache.
    pub fn advance(&mut self, count: usize, pool: &Arc<BlockPool>, layout: &KvLayout) {
        let p = &mut self.progress;
        p.computed += count;
        p.waited = 0;
        let full = p.computed / layout.block_tokens;
        let blocks = self.source.0.lock();
        for at in p.published..full {
            pool.publish(&blocks[at], self.request.hashes[at]);
        }
        p.published = p.published.max(full);
    }
}
