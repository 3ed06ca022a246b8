//! INT8 activations times weights, packed once at load.
//!
//! Packed form: panels of 32 output columns; in a panel, for each four inputs, 32 words of four weights, each plus 128:
//! `[n / 32, k / 4, 32, 4]`. A panel is one contiguous stream, read once per row block.

use std::ops::Range;

use super::super::gemm::{PANEL, ROW_BLOCK};
use super::super::tile::tiles;
use super::{Finish, Group, Kernels8, Tile8};
use crate::EngineError;
use crate::cpu::arena::{Arena, Piece};

/// Most inputs of a group: sums of products of numbers up to 128 stay within 32 bits.
pub(crate) const MOST_INPUTS: usize = 1 << 17;
/// Quads of inputs that row tiles take turns on: 16 KiB of weights.
const SLICE_QUADS: usize = 128;
/// A weight of zero, four times.
const ZEROS: u32 = 0x8080_8080;

/// A weight matrix `[n, k]` in packed form, with the scales of its rows.
pub(crate) struct Packed8 {
    piece: Piece,
    pub(crate) n: usize,
    pub(crate) k: usize,
    scales: Vec<f32>,
    /// Whether its rows were turned, so that activations have to be.
    pub(crate) turned: bool,
}

impl Packed8 {
    /// Room for `[n, k]`, all zero.
    pub(crate) fn zeroed(arena: &mut Arena, n: usize, k: usize, turned: bool) -> Result<Self, EngineError> {
        let words = n.div_ceil(PANEL) * PANEL * k.div_ceil(4);
        let mut piece = arena.piece(words * 4)?;
        bytemuck::cast_slice_mut::<u8, u32>(piece.bytes_mut()).fill(ZEROS);
        Ok(Self { piece, n, k, scales: vec![0.0; n], turned })
    }

    /// Writes rows of the matrix, row-major `[rows, k]`, and their scales, at output columns `first..`.
    pub(crate) fn fill(&mut self, first: usize, numbers: &[i8], scales: &[f32]) {
        let (k, panel_words) = (self.k, self.panel_words());
        self.scales[first..first + scales.len()].copy_from_slice(scales);
        let words: &mut [u32] = bytemuck::cast_slice_mut(self.piece.bytes_mut());
        let rows = numbers.len() / k;
        let mut row = 0;
        while row < rows {
            let column = (first + row) % PANEL;
            let count = (PANEL - column).min(rows - row);
            let panel = &mut words[(first + row) / PANEL * panel_words..][..panel_words];
            for (quad, line) in panel.chunks_exact_mut(PANEL).enumerate() {
                for i in 0..count {
                    let from = &numbers[(row + i) * k..][..k][4 * quad..];
                    let mut four = [0i8; 4];
                    let some = from.len().min(4);
                    four[..some].copy_from_slice(&from[..some]);
                    line[column + i] = u32::from_le_bytes(four.map(|x| x as u8)) ^ ZEROS;
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
        PANEL * self.k.div_ceil(4)
    }

    /// # Safety
    /// `panel` below `panels()`.
    unsafe fn panel(&self, panel: usize) -> *const u32 {
        // SAFETY: the piece holds `panels()` panels.
        unsafe { self.piece.as_ptr().cast::<u32>().add(panel * self.panel_words()) }
    }
}

/// One matrix product.
pub(crate) struct Gemm8<'a> {
    /// `[rows, k]`, rows `lda` apart, zeros up to a whole number of quads.
    pub(crate) a: *const i8,
    pub(crate) lda: usize,
    /// Inputs that share a scale, a multiple of four.
    pub(crate) group: usize,
    /// Of the rows of `a`: `[rows, k / group]`, rows `ldg` apart.
    pub(crate) groups: *const Group,
    pub(crate) ldg: usize,
    pub(crate) weights: &'a Packed8,
    /// Padded to whole panels.
    pub(crate) bias: Option<&'a [f32]>,
    /// `[rows, n]`, rows `ldo` apart.
    pub(crate) out: *mut f32,
    pub(crate) ldo: usize,
    /// Add to `out` instead of overwriting it.
    pub(crate) add: bool,
}

// SAFETY: the pointers are used under the contract of `run`: disjoint writes, shared reads.
unsafe impl Sync for Gemm8<'_> {}

impl Gemm8<'_> {
    /// Computes rows × panels of the product.
    ///
    /// # Safety
    /// The job's pointers valid for these rows; nobody else writes the same rows and columns of `out` or
    /// anything of `a`; panels in range; `kernels` are supported by the CPU.
    pub(crate) unsafe fn run(&self, kernels: &Kernels8, rows: Range<usize>, panels: Range<usize>) {
        assert!(rows.len() <= ROW_BLOCK && self.group <= MOST_INPUTS);
        let mut totals = Totals([0.0; ROW_BLOCK * PANEL]);
        let totals = &mut totals.0[..rows.len() * PANEL];
        let (quads, group, most) = (self.weights.k.div_ceil(4), self.group / 4, kernels.tile.len());
        // One tile streams the panel as it is; several take turns on a slice that stays in the first cache.
        let slice = if rows.len() > most { SLICE_QUADS.next_multiple_of(group) } else { quads.max(1) };
        let last = panels.end.saturating_sub(1);
        for panel in panels {
            totals.fill(0.0);
            // Each tile fetches its share of the next panel, so that memory works all the time.
            let step = PANEL.div_ceil(rows.len().div_ceil(most).max(1));
            let mut fetched = 0;
            for first in (0..quads).step_by(slice) {
                let quads = slice.min(quads - first);
                for (start, count) in tiles(rows.len(), most) {
                    // SAFETY: the caller's; `count` is between 1 and the number of tile functions.
                    unsafe {
                        kernels.tile[count - 1](&Tile8 {
                            quads,
                            group,
                            a: self.a.add((rows.start + start) * self.lda + 4 * first),
                            lda: self.lda,
                            groups: self.groups.add((rows.start + start) * self.ldg + first / group),
                            ldg: self.ldg,
                            panel: self.weights.panel(panel).add(first * PANEL),
                            next: self.weights.panel((panel + 1).min(last)).wrapping_add(fetched),
                            step,
                            totals: totals[start * PANEL..].as_mut_ptr(),
                        });
                    }
                    fetched += quads * step;
                }
            }
            let column = panel * PANEL;
            let columns = column..self.weights.n.min(column + PANEL);
            // SAFETY: the caller's.
            unsafe {
                (kernels.finish)(&Finish {
                    totals,
                    panel: PANEL,
                    column_scales: &self.weights.scales[columns.clone()],
                    bias: self.bias.map(|bias| &bias[columns]),
                    out: self.out.add(rows.start * self.ldo + column),
                    ldo: self.ldo,
                    add: self.add,
                });
            }
        }
    }
}

#[repr(align(64))]
struct Totals([f32; ROW_BLOCK * PANEL]);
