//! What the engine is told, and what of it cannot be.

use super::buffers::Capacity;
use super::driver::Device;
use crate::model::{ModelConfig, Quantisation};
use crate::{EngineError, KvDtype, KvLayout};

/// Attention kernels, for comparing them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// The fastest that fits the device and the head size.
    Best,
    /// What devices before Hopper run.
    Portable,
    /// One warp per query and head, any head size.
    Plain,
}

/// Size and preparation of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CudaOptions {
    /// Which device.
    pub device: usize,
    /// Blocks of the KV pool.
    pub kv_blocks: usize,
    /// Tokens per block.
    pub block_tokens: usize,
    /// Element type of the KV pool: bf16, or fp8, which halves what decode steps read of it.
    pub kv_dtype: KvDtype,
    /// Most tokens of one step.
    pub max_batch_tokens: usize,
    /// Most segments of one step.
    pub max_sequences: usize,
    /// Products are measured, and graphs captured, at start-up. Without it the library's first choice is taken and
    /// graphs are captured when first needed: for tests, which start many engines.
    pub prepare: bool,
    /// Decode steps are replayed from captured graphs.
    pub graphs: bool,
    /// The pool has a host side, for transports. Costs page-locked host memory of the pool's size.
    pub host_side: bool,
    /// Every step's KV is brought to the host side before `on_layer`: for a worker that pushes.
    pub publish: bool,
    /// Weights of the layers are rounded to eight bits with a scale per output, activations per token: half the bytes, twice
    /// the arithmetic. Hopper only.
    pub quantise: Option<Quantisation>,
    /// Which kernels attend.
    pub attention: Attention,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            device: 0,
            kv_blocks: 1024,
            block_tokens: 16,
            kv_dtype: KvDtype::Bf16,
            max_batch_tokens: 2048,
            max_sequences: 256,
            prepare: false,
            graphs: true,
            host_side: true,
            publish: false,
            quantise: None,
            attention: Attention::Best,
        }
    }
}

/// Refuses what the kernels cannot do, before anything is loaded.
pub(super) fn check(config: &ModelConfig, options: &CudaOptions) -> Result<(), EngineError> {
    let refuse = |what: String| Err(EngineError::Unsupported(format!("on a cuda device: {what}")));
    if options.kv_dtype == KvDtype::F32 {
        return refuse("the KV pool is bf16 or fp8; take --kv-dtype bf16".into());
    }
    if options.max_batch_tokens == 0 || options.max_sequences == 0 {
        return refuse("a step of no tokens".into());
    }
    for (name, size, unit) in [
        ("hidden_size", config.hidden, 8),
        ("intermediate_size", config.ffn, 8),
        ("head_dim", config.head_dim, 16),
    ] {
        if size % unit != 0 {
            return refuse(format!("{name} {size} is not a multiple of {unit}"));
        }
    }
    if config.qk_norm && !config.head_dim.is_power_of_two() {
        return refuse(format!("norms of heads of {} numbers, not a power of two", config.head_dim));
    }
    Ok(())
}

/// The copy engine and the tensor cores take eight-bit numbers by sixteens.
pub(super) fn check_widths(config: &ModelConfig, kind: Option<Quantisation>) -> Result<(), EngineError> {
    let attended = config.heads * config.head_dim;
    for (name, size) in
        [("hidden_size", config.hidden), ("intermediate_size", config.ffn), ("heads", attended)]
    {
        if let Some(kind) = kind.filter(|_| size % 16 != 0) {
            let what = format!("{} products of {name} {size}, not a multiple of 16", kind.name());
            return Err(EngineError::Unsupported(format!("on a cuda device: {what}")));
        }
    }
    Ok(())
}

/// Room for a layer of KV in bf16, which chunks attend to where the pool is in eight bits.
pub(super) fn widened_bytes(layout: &KvLayout) -> usize {
    if layout.dtype == KvDtype::Fp8 { 2 * layout.layer_bytes() } else { 0 }
}

pub(super) fn check_memory(
    device: &Device,
    config: &ModelConfig,
    layout: &KvLayout,
) -> Result<(), EngineError> {
    let (weights, free) = (config.parameters() * 2, device.free_bytes());
    let pool = layout.total_bytes() + widened_bytes(layout);
    if weights.saturating_add(pool) > free {
        return Err(EngineError::OutOfMemory(format!(
            "{}: the weights need {weights} bytes and the KV pool {pool}, {free} of {} are free; use fewer KV \
             blocks (--kv-mib), a smaller model or another device",
            device.name, device.total_bytes
        )));
    }
    Ok(())
}

pub(super) fn capacity(config: &ModelConfig, options: &CudaOptions, quantise: bool) -> Capacity {
    let rows = options.max_batch_tokens.max(options.max_sequences);
    let per_sequence = config.max_context.div_ceil(options.block_tokens);
    // Tables of all sequences at full length, and once more the blocks written; no more than the pool has, shared or not.
    let tables = options.max_sequences * per_sequence.min(options.kv_blocks);
    let lists = 10 * rows + 4 * options.max_sequences;
    Capacity {
        rows,
        wanted: options.max_sequences,
        inputs: lists + 3 * tables + 2 * options.kv_blocks,
        quantise,
    }
}
