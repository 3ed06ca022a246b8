//! The inner tile of products with weights: a few rows of A times one or two vectors of columns, held in registers over all of K.
//!
//! Every instance is a function of its own (see `kernels!`): inlined into their callers they spill.

use std::sync::atomic::{Ordering, compiler_fence};

use super::gemm::PANEL;
use super::lanes::{LANES, Lanes};

/// Rows of A times (some pairs of inputs of) a packed panel, added to `sums [rows, PANEL]`.
pub(crate) struct PanelTile {
    /// Pairs of inputs.
    pub(super) pairs: usize,
    /// `[rows, 2 · pairs]` f32, rows `lda` apart.
    pub(super) a: *const f32,
    pub(super) lda: usize,
    /// `[pairs, PANEL]` words of two bf16.
    pub(super) panel: *const u32,
    /// `[rows, PANEL]`
    pub(super) sums: *mut f32,
    /// What comes next: fetched into the cache meanwhile, `step` words per pair.
    pub(super) next: *const u32,
    pub(super) step: usize,
}

/// Computes a panel tile of MR rows, NV vectors at a time.
///
/// # Safety
/// The pointers valid for those sizes; the instructions of `L`.
#[expect(clippy::needless_range_loop, reason = "indices name registers")]
#[inline(always)]
pub(super) unsafe fn panel<L: Lanes, const MR: usize, const NV: usize>(tile: &PanelTile) {
    // SAFETY: the caller's.
    unsafe {
        let (a, lda) = (tile.a, tile.lda);
        // Each pass over the panel fetches its part of what is next, so that memory works during all of them.
        let passes = PANEL / (NV * LANES);
        let step = tile.step.div_ceil(passes);
        for pass in 0..passes {
            let (offset, next) = (pass * NV * LANES, tile.next.wrapping_add(pass * tile.pairs * step));
            let zero = L::splat(0.0);
            let mut sums = [[zero; NV]; MR];
            for m in 0..MR {
                for v in 0..NV {
                    sums[m][v] = L::load(tile.sums.add(m * PANEL + offset + v * LANES));
                }
            }
            let mut b = tile.panel.add(offset);
            for pair in 0..tile.pairs {
                let (mut first, mut second) = ([zero; NV], [zero; NV]);
                for v in 0..NV {
                    (first[v], second[v]) = L::load_pairs(b.add(v * LANES));
                    L::prefetch(next.wrapping_add(pair * step + v * LANES));
                }
                b = b.add(PANEL);
                for m in 0..MR {
                    let x = L::splat(*a.add(m * lda + 2 * pair));
                    for v in 0..NV {
                        sums[m][v] = x.fma(first[v], sums[m][v]);
                    }
                    keep_order(m);
                }
                for m in 0..MR {
                    let x = L::splat(*a.add(m * lda + 2 * pair + 1));
                    for v in 0..NV {
                        sums[m][v] = x.fma(second[v], sums[m][v]);
                    }
                    keep_order(m);
                }
            }
            for m in 0..MR {
                for v in 0..NV {
                    sums[m][v].store(tile.sums.add(m * PANEL + offset + v * LANES));
                }
            }
        }
    }
}

/// Keeps the compiler from loading all rows' numbers before the first is used, which would spill the sums. No
/// instruction.
#[inline(always)]
pub(super) fn keep_order(row: usize) {
    if row % 4 == 3 {
        compiler_fence(Ordering::SeqCst);
    }
}

/// Cuts `rows` into equal tiles of at most `most`: (first, count).
pub(super) fn tiles(rows: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = rows.div_ceil(most);
    (0..count).map(move |i| {
        let (start, end) = (i * rows / count, (i + 1) * rows / count);
        (start, end - start)
    })
}
