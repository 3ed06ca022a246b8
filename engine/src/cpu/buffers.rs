//! The activations of a step.

use super::region::Region;
use super::simd::int8::Group;
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

/// Rows rounded to INT8, each with what its groups of inputs share.
pub(super) struct Buffer8 {
    numbers: Region,
    pub(super) stride: usize,
    groups: Region,
    /// Groups from row to row.
    pub(super) group_stride: usize,
    /// Inputs of a group.
    pub(super) group: usize,
}

impl Buffer8 {
    fn new(rows: usize, width: usize, group: usize) -> Result<Self, EngineError> {
        let (stride, group_stride) = (width.next_multiple_of(64) + 64, width.div_ceil(group));
        let region = |bytes| Region::new(bytes, "rounded activations");
        let (numbers, groups) =
            (region(rows * stride)?, region(rows * group_stride * std::mem::size_of::<Group>())?);
        Ok(Self { numbers, stride, groups, group_stride, group })
    }

    /// # Safety
    /// `row` below the buffer's rows.
    pub(super) unsafe fn row(&self, row: usize) -> *mut i8 {
        // SAFETY: inside the region.
        unsafe { self.numbers.as_ptr().cast::<i8>().add(row * self.stride) }
    }

    /// # Safety
    /// `row` below the buffer's rows.
    pub(super) unsafe fn groups(&self, row: usize) -> *mut Group {
        // SAFETY: inside the region.
        unsafe { self.groups.as_ptr().cast::<Group>().add(row * self.group_stride) }
    }
}

// SAFETY: plain memory; concurrent access is to disjoint rows or read-only, as each loop says.
unsafe impl Sync for Buffer8 {}

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
    /// `normed` or `attended`, whichever the next product takes, in INT8; and `gated`. Only where the network is.
    pub(super) rounded: Option<(Buffer8, Buffer8)>,
    /// `[tokens, head_dim / 2]`
    pub(super) cos: Vec<f32>,
    pub(super) sin: Vec<f32>,
    pub(super) frequencies: Vec<f32>,
}

impl Buffers {
    /// With INT8 rows beside, whose scales are for `group` inputs each, where the network is in INT8.
    pub(super) fn new(
        config: &ModelConfig,
        tokens: usize,
        group: Option<usize>,
    ) -> Result<Self, EngineError> {
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let mlp_rows = tokens.min(MLP_ROWS);
        let rounded = |group| -> Result<_, EngineError> {
            Ok((
                Buffer8::new(tokens, config.hidden.max(q), group)?,
                Buffer8::new(mlp_rows, config.ffn, group)?,
            ))
        };
        Ok(Self {
            x: Buffer::new(tokens, config.hidden)?,
            normed: Buffer::new(tokens, config.hidden)?,
            qkv: Buffer::new(tokens, q + 2 * kv)?,
            attended: Buffer::new(tokens, q)?,
            gate_up: Buffer::new(mlp_rows, 2 * config.ffn.next_multiple_of(32))?,
            gated: Buffer::new(mlp_rows, config.ffn)?,
            rounded: group.map(rounded).transpose()?,
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

    /// The same in INT8, for what goes into a product.
    pub(super) fn rounded(self, buffers: &Buffers) -> Option<&Buffer8> {
        let (wide, gated) = buffers.rounded.as_ref()?;
        Some(if self == Side::Gated { gated } else { wide })
    }

    /// Holds only the rows that are in the MLP now.
    pub(super) fn is_mlp(self) -> bool {
        matches!(self, Side::GateUp | Side::Gated)
    }
}
