//! Activations times weights: `out [rows, n] = a [rows, k] · wᵀ`, weights packed once at load.
//!
//! Packed form: panels of 32 output columns; in a panel, for each pair of inputs, 32 words of two bf16:
//! `[n / 32, k / 2, 32, 2]`. A panel is one contiguous stream, read once per row block; one word feeds two
//! steps of the sum over K.

use std::ops::Range;

use half::bf16;

use super::lanes::{LANES, Lanes};
use super::tile::{self, for_rows};
use crate::EngineError;
use crate::cpu::region::Region;

/// Columns of a panel.
pub(crate) const PANEL: usize = 32;

/// A weight matrix `[n, k]` in packed form.
pub(crate) struct Packed {
    region: Region,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

impl Packed {
    /// Room for `[n, k]`, all zero.
    pub(crate) fn zeroed(n: usize, k: usize) -> Result<Self, EngineError> {
        let words = n.div_ceil(PANEL) * PANEL * k.div_ceil(2);
        Ok(Self { region: Region::new(words * 4, "a weight matrix")?, n, k })
    }

    /// Writes rows of the matrix, row-major `[rows, k]`, at output columns `first..`.
    pub(crate) fn fill(&mut self, first: usize, numbers: &[bf16]) {
        let (k, panel_words) = (self.k, self.panel_words());
        let words: &mut [u32] = bytemuck::cast_slice_mut(self.region.bytes_mut());
        // By groups of the columns that share a panel: its cache lines are written whole.
        let rows = numbers.len() / k;
        let mut row = 0;
        while row < rows {
            let column = (first + row) % PANEL;
            let count = (PANEL - column).min(rows - row);
            let panel = &mut words[(first + row) / PANEL * panel_words..][..panel_words];
            for (pair, line) in panel.chunks_exact_mut(PANEL).enumerate() {
                for i in 0..count {
                    let at = (row + i) * k + 2 * pair;
                    let low = u32::from(numbers[at].to_bits());
                    let high = if 2 * pair + 1 < k { u32::from(numbers[at + 1].to_bits()) } else { 0 };
                    line[column + i] = low | high << 16;
                }
            }
            row += count;
        }
    }

    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.panels() * self.panel_words() * 4
    }

    fn panel_words(&self) -> usize {
        PANEL * self.k.div_ceil(2)
    }

    /// # Safety
    /// `panel` below `panels()`.
    unsafe fn panel(&self, panel: usize) -> *const u32 {
        // SAFETY: the region holds `panels()` panels.
        unsafe { self.region.as_ptr().cast::<u32>().add(panel * self.panel_words()).cast_const() }
    }
}

/// One matrix product.
pub(crate) struct Gemm<'a> {
    /// `[rows, k]`, rows `lda` apart. With an odd k one number more per row is read, and multiplied by 0.
    pub(crate) a: *const f32,
    pub(crate) lda: usize,
    pub(crate) weights: &'a Packed,
    /// Padded to whole panels.
    pub(crate) bias: Option<&'a [f32]>,
    /// `[rows, n]`, rows `ldo` apart.
    pub(crate) out: *mut f32,
    pub(crate) ldo: usize,
    /// Add to `out` instead of overwriting it.
    pub(crate) add: bool,
}

// SAFETY: the pointers are used under the contract of `run`: disjoint writes, shared reads.
unsafe impl Sync for Gemm<'_> {}

/// Computes rows × panels of the product.
///
/// # Safety
/// The job's pointers valid for these rows; nobody else writes the same rows and columns of `out` or anything
/// of `a`; panels in range; the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn run<L: Lanes>(job: &Gemm<'_>, rows: Range<usize>, panels: Range<usize>) {
    for panel in panels {
        for (start, count) in tile::tiles::<L>(rows.len()) {
            let row = rows.start + start;
            // SAFETY: the caller's.
            unsafe {
                if L::WIDE {
                    for_rows!(count, 2, panel_tile, L, job, row, panel, 0);
                } else {
                    for_rows!(count, 1, panel_tile, L, job, row, panel, 0);
                    for_rows!(count, 1, panel_tile, L, job, row, panel, LANES);
                }
            }
        }
    }
}

/// MR rows × NV vectors of a panel, from its column `offset`.
///
/// # Safety
/// As `run`.
#[inline(always)]
unsafe fn panel_tile<L: Lanes, const MR: usize, const NV: usize>(
    job: &Gemm<'_>,
    row: usize,
    panel: usize,
    offset: usize,
) {
    // SAFETY: the caller's; the last panel's missing columns go through a buffer.
    unsafe {
        let weights = job.weights;
        let a = job.a.add(row * job.lda);
        let b = weights.panel(panel).add(offset);
        let mut sums = tile::pairs::<L, MR, NV>(weights.k.div_ceil(2), a, job.lda, b, PANEL);
        let column = panel * PANEL + offset;
        if let Some(bias) = job.bias {
            for v in 0..NV {
                let bias = L::load(bias.as_ptr().add(column + v * LANES));
                for sums in &mut sums {
                    sums[v] = sums[v].add(bias);
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                let column = column + v * LANES;
                let out = job.out.add((row + m) * job.ldo + column);
                if column + LANES <= weights.n {
                    let sum = if job.add { L::load(out).add(*sum) } else { *sum };
                    sum.store(out);
                } else {
                    let mut buffer = [0.0f32; LANES];
                    sum.store(buffer.as_mut_ptr());
                    for (i, &sum) in buffer.iter().enumerate().take(weights.n.saturating_sub(column)) {
                        *out.add(i) = if job.add { *out.add(i) + sum } else { sum };
                    }
                }
            }
        }
    }
}
