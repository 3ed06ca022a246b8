//! Activations times weights: `out [rows, n] = a [rows, k] · wᵀ`, weights packed once at load.
//!
//! Packed form: panels of 32 output columns; in a panel, for each pair of inputs, 32 words of two bf16:
//! `[n / 32, k / 2, 32, 2]`. A panel is one contiguous stream, read once per row block; one word feeds two
//! steps of the sum over K.

use std::ops::Range;

use half::bf16;

use super::Kernels;
use super::tile::{PanelTile, tiles};
use crate::EngineError;
use crate::cpu::arena::{Arena, Piece};

/// Columns of a panel.
pub(crate) const PANEL: usize = 32;

/// A weight matrix `[n, k]` in packed form.
pub(crate) struct Packed {
    piece: Piece,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

impl Packed {
    /// Room for `[n, k]`, all zero.
    pub(crate) fn zeroed(arena: &mut Arena, n: usize, k: usize) -> Result<Self, EngineError> {
        let words = n.div_ceil(PANEL) * PANEL * k.div_ceil(2);
        Ok(Self { piece: arena.piece(words * 4)?, n, k })
    }

    /// Writes rows of the matrix, row-major `[rows, k]`, at output columns `first..`.
    pub(crate) fn fill(&mut self, first: usize, numbers: &[bf16]) {
        let (k, panel_words) = (self.k, self.panel_words());
        let words: &mut [u32] = bytemuck::cast_slice_mut(self.piece.bytes_mut());
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
        // SAFETY: the piece holds `panels()` panels.
        unsafe { self.piece.as_ptr().cast::<u32>().add(panel * self.panel_words()) }
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

impl Gemm<'_> {
    /// Computes rows × panels of the product.
    ///
    /// # Safety
    /// The job's pointers valid for these rows; nobody else writes the same rows and columns of `out` or
    /// anything of `a`; panels in range; `kernels` are supported by the CPU.
    pub(crate) unsafe fn run(&self, kernels: &Kernels, rows: Range<usize>, panels: Range<usize>) {
        assert!(rows.len() <= ROW_BLOCK);
        let mut sums = Sums([0.0; ROW_BLOCK * PANEL]);
        let sums = &mut sums.0[..rows.len() * PANEL];
        let (pairs, most) = (self.weights.k.div_ceil(2), kernels.panel.len());
        // One tile streams the panel as it is; several take turns on a slice that stays in the first cache.
        let slice = if rows.len() > most { SLICE_PAIRS } else { pairs.max(1) };
        let last = panels.end.saturating_sub(1);
        for panel in panels {
            sums.fill(0.0);
            // Each tile fetches its share of the next panel, so that memory works all the time.
            let step = PANEL.div_ceil(rows.len().div_ceil(most).max(1));
            let mut fetched = 0;
            for first in (0..pairs).step_by(slice) {
                let pairs = slice.min(pairs - first);
                for (start, count) in tiles(rows.len(), most) {
                    // SAFETY: the caller's; `count` is between 1 and the number of tile functions.
                    unsafe {
                        kernels.panel[count - 1](&PanelTile {
                            pairs,
                            a: self.a.add((rows.start + start) * self.lda + 2 * first),
                            lda: self.lda,
                            panel: self.weights.panel(panel).add(first * PANEL),
                            next: self.weights.panel((panel + 1).min(last)).wrapping_add(fetched),
                            step,
                            sums: sums[start * PANEL..].as_mut_ptr(),
                        });
                    }
                    fetched += pairs * step;
                }
            }
            // SAFETY: the caller's.
            unsafe { self.write(sums, rows.start, panel) };
        }
    }

    /// # Safety
    /// As `run`.
    unsafe fn write(&self, sums: &[f32], row: usize, panel: usize) {
        let column = panel * PANEL;
        let columns = PANEL.min(self.weights.n - column);
        let bias = self.bias.map(|bias| &bias[column..column + columns]);
        for (m, sums) in sums.chunks_exact(PANEL).enumerate() {
            // SAFETY: `columns` numbers of a row of `out`, ours alone.
            let out = unsafe {
                std::slice::from_raw_parts_mut(self.out.add((row + m) * self.ldo + column), columns)
            };
            match (bias, self.add) {
                (None, false) => out.copy_from_slice(&sums[..columns]),
                (None, true) => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum),
                (Some(bias), false) => {
                    out.iter_mut().zip(sums).zip(bias).for_each(|((out, sum), bias)| *out = sum + bias);
                }
                (Some(bias), true) => {
                    out.iter_mut().zip(sums).zip(bias).for_each(|((out, sum), bias)| *out += sum + bias);
                }
            }
        }
    }
}

/// Most rows of one call: their activations stay in the second-level cache.
pub(crate) const ROW_BLOCK: usize = 96;
/// Pairs of inputs that row tiles take turns on: 16 KiB of weights.
const SLICE_PAIRS: usize = 128;

#[repr(align(64))]
struct Sums([f32; ROW_BLOCK * PANEL]);
