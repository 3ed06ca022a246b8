//! The activations of a step.

use super::region::Region;
use crate::EngineError;
use crate::model::ModelConfig;

/// Rows that go through the MLP together: bounds its scratch.
pub(super) const MLP_ROWS: usize = 384;
/// f32 rows, a cache line more than a power of two apart where they would collide in the cache.
pub(super) struct Buffer {
    region: Region,
    pub(super) stride: usize,
}

impl Buffer {
    pub(super) fn new(rows: usize, width: usize) -> Result<Self, EngineError> {
        let stride = width.next_multiple_of(16) + 16;
        Ok(Self { region: Region::new(rows * stride * 4, "activations")?, stride })
    }

    pub(super) fn at(&self) -> *mut f32 {
        self.region.as_ptr().cast()
    }

    /// # Safety
    /// `row` below the buffer's rows.
    pub(super) unsafe fn row(&self, row: usize) -> *mut f32 {
        // SAFETY: inside the region.
        unsafe { self.at().add(row * self.stride) }
    }
}

// SAFETY: plain memory; concurrent access is to disjoint rows or read-only, as each loop below says.
unsafe impl Sync for Buffer {}

/// The activations of a step.
pub(super) struct Buffers {
    /// Residual stream `[tokens, hidden]`.
    pub(super) x: Buffer,
    /// `[tokens, hidden]`
    pub(super) normed: Buffer,
    /// `[tokens, (heads + 2 · kv_heads) · head_dim]`
    pub(super) qkv: Buffer,
    /// `[tokens, heads · head_dim]`
    pub(super) attended: Buffer,
    /// `[MLP_ROWS, 2 · ffn]`, gate padded to whole panels.
    pub(super) gate_up: Buffer,
    /// `[MLP_ROWS, ffn]`
    pub(super) gated: Buffer,
    /// `[tokens, head_dim / 2]`
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
    pub(super) frequencies: Vec<f32>,
}

impl Buffers {
    pub(super) fn new(config: &ModelConfig, tokens: usize) -> Result<Self, EngineError> {
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let mlp_rows = tokens.min(MLP_ROWS);
        Ok(Self {
            x: Buffer::new(tokens, config.hidden)?,
            normed: Buffer::new(tokens, config.hidden)?,
            qkv: Buffer::new(tokens, q + 2 * kv)?,
            attended: Buffer::new(tokens, q)?,
            gate_up: Buffer::new(mlp_rows, 2 * config.ffn.next_multiple_of(32))?,
            gated: Buffer::new(mlp_rows, config.ffn)?,
            cos: Vec::new(),
            sin: Vec::new(),
            frequencies: config.rope.frequencies(config.head_dim),
        })
    }
}

/// A buffer, as the source or target of a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Normed,
    Qkv,
    Attended,
    Residual,
    GateUp,
    Gated,
}

impl Side {
    pub(super) fn of(self, buffers: &Buffers) -> &Buffer {
        match self {
            Side::Normed => &buffers.normed,
            Side::Qkv => &buffers.qkv,
            Side::Attended => &buffers.attended,
            Side::Residual => &buffers.x,
            Side::GateUp => &buffers.gate_up,
            Side::Gated => &buffers.gated,
        }
    }

    /// Holds only the rows that are in the MLP now.
    pub(super) fn is_mlp(self) -> bool {
        matches!(self, Side::GateUp | Side::Gated)
    }
}
