//! Scratch memory of a step.

use std::sync::Arc;

use super::driver::{Device, Memory};
use crate::EngineError;
use crate::model::ModelConfig;

/// Rows of a box of queries that the Hopper kernel loads.
pub(super) const QUERIES_SM90: usize = 128;
/// Blocks of decode attention that fill a multiprocessor.
const DECODE_BLOCKS: usize = 2;

/// Scratch of one step, for `rows` rows.
pub(super) struct Buffers {
    /// Residual stream, `[rows, hidden]` bf16.
    pub(super) x: Memory,
    /// Normed residual stream; also attention's wanted rows.
    pub(super) normed: Memory,
    /// `[rows, (heads + 2 · kv_heads) · dim]`
    pub(super) qkv: Memory,
    /// `[rows, heads · dim]`
    pub(super) attended: Memory,
    /// `[rows, 2 · ffn]`
    pub(super) gate_up: Memory,
    /// `[rows, ffn]`
    pub(super) gated: Memory,
    /// The wanted rows' residual stream.
    pub(super) x_wanted: Memory,
    /// What goes into the next product, in eight bits with a scale a row; empty without quantisation.
    pub(super) quantised: Memory,
    pub(super) row_scales: Memory,
    /// `[wanted, vocab]` f32
    pub(super) logits: Memory,
    /// `[wanted]` i32
    pub(super) tokens: Memory,
    /// Splits of decode attention: sums and statistics.
    pub(super) partial: Memory,
    pub(super) stats: Memory,
    /// [`Plan::numbers`].
    pub(super) inputs: Memory,
}

/// Sizes that the buffers are made for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Capacity {
    pub(super) rows: usize,
    /// Most rows whose logits are wanted at once.
    pub(super) wanted: usize,
    /// Most entries of [`Plan::numbers`].
    pub(super) inputs: usize,
    /// Room for quantised rows.
    pub(super) quantise: bool,
}

impl Buffers {
    pub(super) fn new(
        device: &Arc<Device>,
        config: &ModelConfig,
        capacity: Capacity,
    ) -> Result<Self, EngineError> {
        let Capacity { rows, wanted, inputs, quantise } = capacity;
        let quantised_rows = if quantise { rows } else { 0 };
        let attended = config.heads * config.head_dim;
        let qkv = attended + 2 * config.kv_heads * config.head_dim;
        let memory = |numbers: usize, size| Memory::new(device, numbers * size, "the step's buffers");
        let splits = wanted * config.heads + max_split_blocks(device) * 8;
        Ok(Self {
            x: memory(rows * config.hidden, 2)?,
            normed: memory(rows * config.hidden.max(attended), 2)?,
            // A box of the prefill kernel may reach beyond the last row.
            qkv: memory((rows + QUERIES_SM90) * qkv, 2)?,
            attended: memory(rows * attended, 2)?,
            gate_up: memory(rows * 2 * config.ffn, 2)?,
            gated: memory(rows * config.ffn, 2)?,
            x_wanted: memory(wanted * config.hidden, 2)?,
            quantised: memory(quantised_rows * config.hidden.max(attended).max(config.ffn), 1)?,
            row_scales: memory(quantised_rows, 4)?,
            logits: memory(wanted * config.vocab, 4)?,
            tokens: memory(wanted, 4)?,
            partial: memory(splits * config.head_dim, 4)?,
            stats: memory(splits, 8)?,
            inputs: memory(inputs, 4)?,
        })
    }
}

/// Blocks of decode attention that fill the device.
pub(super) fn max_split_blocks(device: &Device) -> usize {
    device.multiprocessors as usize * DECODE_BLOCKS
}
