//! Blocks made for decode workers whose pools have another block size or element type, until they are sent.
//!
//! A stage is memory laid out as such a worker's pool, and a sender from it. What the engine computed is converted into it layer
//! by layer, on the engine's thread, and goes out like any other block; the receiver sees no difference.

use std::sync::Arc;

use engine::kv::convert::Conversion;
use engine::kv::pool::BlockPool;
use engine::shared::SharedMemory;
use engine::{KvDtype, KvLayout, KvMemory};
use kv_transport::{GpuDirect, Grid, Packing, Region, Sender, SenderConfig};
use parking_lot::Mutex;
use prost::Message;
use proto::v1;
use telemetry::Counter;
use tls::ClusterFiles;
use tonic::Status;
use worker::transport::TransportConfig;

/// Layouts besides its own that one worker makes: a cluster has two, three during a change.
const MAX_STAGES: usize = 4;

/// Memory in one other layout.
pub(crate) struct Stage {
    pub conversion: Conversion,
    pub sender: Sender,
    /// Slots of the stage.
    pub pool: Arc<BlockPool>,
    memory: Arc<SharedMemory>,
}

/// The stages of a worker, made when first wanted.
pub(crate) struct Stages {
    pub layout: KvLayout,
    /// Bytes of each.
    pub bytes: usize,
    pub transport: TransportConfig,
    pub tls: Option<ClusterFiles>,
    pub config: SenderConfig,
    pub made: Mutex<Vec<Arc<Stage>>>,
    /// Blocks that were made and committed.
    pub converted: Counter,
}

impl Stages {
    /// What a ticket needs: None when its receiver's pool is laid out as ours, or when the ticket cannot be read, which the
    /// transport then says.
    pub fn wanted(&self, ticket: &[u8], ours: &Sender) -> Result<Option<Arc<Stage>>, Status> {
        let Ok(ticket) = kv_transport::Ticket::decode(ticket) else { return Ok(None) };
        let form = v1::TicketMeta::decode(ticket.meta).ok().and_then(|meta| meta.form);
        let Some(form) = form else { return Ok(None) };
        let bad = |why: String| Status::invalid_argument(format!("ticket.meta.form: {why}"));
        let dtype = KvDtype::named(&form.dtype).ok_or_else(|| {
            bad(format!("KV of type {:?} cannot be made here; bf16, f32 and fp8 can", form.dtype))
        })?;
        let block_tokens = form.block_tokens as usize;
        if (block_tokens, dtype) == (self.layout.block_tokens, self.layout.dtype) {
            return Ok(None);
        }
        let one = KvLayout { block_tokens, dtype, blocks: 1, ..self.layout };
        if !(1..=worker::config::MAX_BLOCK_TOKENS).contains(&block_tokens) || one.total_bytes() > self.bytes {
            return Err(bad(format!(
                "blocks of {block_tokens} tokens do not fit in {} MiB",
                self.bytes >> 20
            )));
        }
        self.stage(KvLayout { blocks: self.bytes / one.total_bytes(), ..one }, ours).map(Some)
    }

    /// How cells are packed over TCP for whoever issued the ticket, of our pool's layout or of the stage's: not, unless both
    /// sides want it.
    pub fn packing(&self, ticket: &[u8], stage: Option<&Stage>) -> Option<Packing> {
        let packing = self.transport.packing(stage.map_or(&self.layout, |stage| stage.conversion.to()))?;
        let ticket = kv_transport::Ticket::decode(ticket).ok()?;
        let meta = v1::TicketMeta::decode(ticket.meta).ok()?;
        (meta.wire == packing.name()).then_some(packing)
    }

    fn stage(&self, layout: KvLayout, ours: &Sender) -> Result<Arc<Stage>, Status> {
        let mut made = self.made.lock();
        if let Some(stage) = made.iter().find(|stage| *stage.conversion.to() == layout) {
            return Ok(Arc::clone(stage));
        }
        if made.len() == MAX_STAGES {
            return Err(Status::failed_precondition(format!(
                "this prefill worker makes KV of {MAX_STAGES} other layouts already: restart it if they are gone"
            )));
        }
        let stage = Arc::new(self.make(layout, ours).map_err(|why| {
            Status::failed_precondition(format!("KV for another layout cannot be made here: {why}"))
        })?);
        tracing::info!(
            block_tokens = layout.block_tokens,
            dtype = layout.dtype.name(),
            blocks = layout.blocks,
            "a decode worker's pool is laid out otherwise: KV for it is converted"
        );
        made.push(Arc::clone(&stage));
        Ok(stage)
    }

    fn make(&self, layout: KvLayout, ours: &Sender) -> Result<Stage, String> {
        let conversion = Conversion::between(self.layout, layout).map_err(|e| e.to_string())?;
        let blocks = u32::try_from(layout.blocks).map_err(|e| e.to_string())?;
        let memory = Arc::new(SharedMemory::new(layout.total_bytes()).map_err(|e| e.to_string())?);
        // SAFETY: as many bytes, unmoved as long as the memory lives, which the region holds. A slot is written only while
        // its block is ours and no push knows of it (`Stage::fill`).
        let region =
            unsafe { Region::from_raw(memory.as_ptr(), layout.total_bytes(), Arc::clone(&memory) as _) };
        let region = region.backed_by(memory.file());
        // The stage is in host memory, wherever the pool is.
        let transport = TransportConfig { gpudirect: GpuDirect::Off, ..self.transport.clone() };
        let ways = transport.open(&region, self.tls.as_ref()).map_err(|e| e.to_string())?;
        let grid: Grid = worker::pool::grid(&layout);
        let sender = ours.beside(region, grid, ways.sender(self.config.clone()));
        Ok(Stage { conversion, sender, pool: BlockPool::new(blocks), memory })
    }
}

impl Stage {
    /// Makes block `at` of a sequence of `tokens` tokens in `slot`; its checksum, or None when what it is made of is no longer
    /// what was computed. `table` has the sequence's blocks in the engine's pool; those that the block is made of, and the
    /// slot, must be held by the caller, final, and in no push yet.
    pub fn fill(
        &self,
        kv: &dyn KvMemory,
        (layer, at, tokens): (usize, usize, usize),
        table: &[u32],
        slot: u32,
    ) -> Option<u32> {
        let (from, to) = (kv.layout(), self.conversion.to());
        let base = kv.host_address()?;
        let is_intact = |block: &u32| kv.checksum(layer, *block) == kv.source_checksum(layer, *block);
        if !table.get(self.conversion.sources(at, tokens))?.iter().all(is_intact) {
            return None;
        }
        // SAFETY: within the pool, which `kv` keeps; final blocks that their owner holds are not written.
        let source = |block: usize| unsafe {
            std::slice::from_raw_parts(base.add(from.offset(layer, table[block])), from.block_bytes())
        };
        // SAFETY: within the stage; the slot is the caller's, and nobody reads it before it is queued.
        let made = unsafe {
            std::slice::from_raw_parts_mut(self.memory.as_ptr().add(to.offset(layer, slot)), to.block_bytes())
        };
        self.conversion.fill(at, tokens, source, made);
        Some(crc32c::crc32c(made))
    }
}
