//! Work on single rows: norms, rotary positions, writing KV, SwiGLU.

use half::bf16;

use super::lanes::{LANES, Lanes};
use crate::KvDtype;
use crate::kv::fp8;

/// `out = x / rms(x) · weight`.
pub(crate) struct NormRow<'a> {
    /// `[weight.len()]`; may equal `out`.
    pub(crate) x: *const f32,
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: *mut f32,
}

/// # Safety
/// Pointers valid for the weight's length; the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn norm<L: Lanes>(row: &NormRow<'_>) {
    let n = row.weight.len();
    // SAFETY: the caller's.
    unsafe {
        let mut squares = L::splat(0.0);
        let whole = n / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            let x = L::load(row.x.add(i));
            squares = x.fma(x, squares);
        }
        if whole < n {
            let mut tail = [0.0f32; LANES];
            std::ptr::copy_nonoverlapping(row.x.add(whole), tail.as_mut_ptr(), n - whole);
            let x = L::load(tail.as_ptr());
            squares = x.fma(x, squares);
        }
        let scale = 1.0 / (squares.sum() / n as f32 + row.eps).sqrt();
        for i in 0..n {
            *row.out.add(i) = *row.x.add(i) * scale * *row.weight.get_unchecked(i);
        }
    }
}

/// After the QKV product: norms of heads, rotation, and the KV into its block.
pub(crate) struct QkvRow<'a> {
    /// `[heads + 2 · kv_heads, head_dim]`: q, k, v of one token, rotated in place.
    pub(crate) qkv: *mut f32,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// `[head_dim / 2]` of the token's position.
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
    /// Weights `[head_dim]` of the query and key norms, and their epsilon.
    pub(crate) head_norms: Option<(&'a [f32], &'a [f32], f32)>,
    /// Queries are multiplied by it.
    pub(crate) query_scale: f32,
    /// The token's block of this layer, `[2, kv_heads, block_tokens, head_dim]`.
    pub(crate) block: *mut u8,
    pub(crate) block_tokens: usize,
    /// The token's place in the block.
    pub(crate) slot: usize,
    pub(crate) dtype: KvDtype,
}

/// # Safety
/// Pointers valid as the fields say, and not shared; the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn qkv<L: Lanes>(row: &QkvRow<'_>) {
    let (dim, half) = (row.head_dim, row.head_dim / 2);
    // SAFETY: the caller's.
    unsafe {
        for head in 0..row.heads + row.kv_heads {
            let x = row.qkv.add(head * dim);
            let query = head < row.heads;
            if let Some((q, k, eps)) = row.head_norms {
                norm::<L>(&NormRow { x, weight: if query { q } else { k }, eps, out: x });
            }
            let scale = if query { row.query_scale } else { 1.0 };
            let (low, high) =
                (std::slice::from_raw_parts_mut(x, half), std::slice::from_raw_parts_mut(x.add(half), half));
            for i in 0..half {
                let (a, b) = (low[i], high[i]);
                low[i] = (a * row.cos[i] - b * row.sin[i]) * scale;
                high[i] = (b * row.cos[i] + a * row.sin[i]) * scale;
            }
        }
        // K then V, each [kv_heads, block_tokens, head_dim].
        for part in 0..2 * row.kv_heads {
            let from = std::slice::from_raw_parts(row.qkv.add((row.heads + part) * dim), dim);
            let at = (part * row.block_tokens + row.slot) * dim;
            match row.dtype {
                KvDtype::F32 => {
                    std::ptr::copy_nonoverlapping(from.as_ptr(), row.block.cast::<f32>().add(at), dim);
                }
                KvDtype::Bf16 => {
                    let to = std::slice::from_raw_parts_mut(row.block.cast::<u16>().add(at), dim);
                    for (to, &x) in to.iter_mut().zip(from) {
                        *to = bf16_bits(x);
                    }
                }
                KvDtype::Fp8 => {
                    let to = std::slice::from_raw_parts_mut(row.block.add(at), dim);
                    for (to, &x) in to.iter_mut().zip(from) {
                        *to = fp8::from_f32(x);
                    }
                }
            }
        }
    }
}

/// Round to nearest even without a branch; NaN through `half`.
#[inline(always)]
fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if x.is_nan() { bf16::NAN.to_bits() } else { rounded }
}

/// `out = silu(gate) · up`.
pub(crate) struct SwigluRow {
    /// `[n]`, padded to whole vectors, as all three.
    pub(crate) gate: *const f32,
    pub(crate) up: *const f32,
    pub(crate) out: *mut f32,
    pub(crate) n: usize,
}

/// # Safety
/// Pointers valid for `n`; `out` not shared; the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn swiglu<L: Lanes>(row: &SwigluRow) {
    // SAFETY: the caller's; the last vector goes through buffers.
    unsafe {
        let whole = row.n / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            gated::<L>(L::load(row.gate.add(i)), L::load(row.up.add(i))).store(row.out.add(i));
        }
        let rest = row.n - whole;
        if rest > 0 {
            let (mut gate, mut up) = ([0.0f32; LANES], [0.0f32; LANES]);
            std::ptr::copy_nonoverlapping(row.gate.add(whole), gate.as_mut_ptr(), rest);
            std::ptr::copy_nonoverlapping(row.up.add(whole), up.as_mut_ptr(), rest);
            gated::<L>(L::load(gate.as_ptr()), L::load(up.as_ptr())).store(gate.as_mut_ptr());
            std::ptr::copy_nonoverlapping(gate.as_ptr(), row.out.add(whole), rest);
        }
    }
}

/// # Safety
/// The instructions of `L`.
#[inline(always)]
unsafe fn gated<L: Lanes>(gate: L, up: L) -> L {
    // SAFETY: the caller's.
    unsafe {
        let one = L::splat(1.0);
        let decay = exp::<L>(L::splat(0.0).sub(gate));
        gate.div(one.add(decay)).mul(up)
    }
}

/// eˣ within 2 units in the last place; 0 below −87.3 (so for −∞), the value at 88 above it.
///
/// # Safety
/// The instructions of `L`.
#[inline(always)]
pub(super) unsafe fn exp<L: Lanes>(x: L) -> L {
    // SAFETY: the caller's.
    unsafe {
        let low = L::splat(-87.3);
        // min(x, 88) by negation; max keeps its second operand when the first is NaN.
        let zero = L::splat(0.0);
        let clamped = zero.sub(zero.sub(x.max(low)).max(L::splat(-88.0)));
        // n = round(x / ln 2): adding 1.5 · 2²³ leaves n in the low bits of the representation.
        let magic = L::splat(12_582_912.0);
        let shifted = clamped.fma(L::splat(std::f32::consts::LOG2_E), magic);
        let n = shifted.sub(magic);
        let r = n.fma(L::splat(-0.693_359_4), clamped);
        let r = n.fma(L::splat(2.121_944_4e-4), r);
        // Taylor to r⁷, |r| ≤ ln 2 / 2: below 1e-8.
        let mut p = L::splat(1.0 / 5040.0);
        for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = p.fma(r, L::splat(coefficient));
        }
        x.zero_below(low, p.scale(shifted))
    }
}
