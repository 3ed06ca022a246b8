//! One attention task: gather, then tile by tile load, score, weigh, add; see `attention`.

use super::Kernels;
use super::attention::{AttentionLayer, AttentionTask, TILE};
use super::lanes::{LANES, Lanes};
use super::product::{Ahead, LINE, Matrix, Product};
use super::rows::exp;
use super::tile::tiles;
use crate::KvDtype;

/// Rows up to which V is read as bf16 by the product itself: few tiles of rows read it, so that making f32 of it in a buffer first costs
/// more than it saves.
const ROWS_IN_PLACE: usize = 8;

/// Of a task's buffers.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    rows: usize,
    pub(super) dim: usize,
    /// `dim` up to whole vectors.
    pub(super) padded: usize,
}

impl Sizes {
    pub(super) fn of(layer: &AttentionLayer<'_>, task: &AttentionTask<'_>) -> Self {
        let dim = layer.layout.head_dim;
        Self { rows: task.count * layer.group, dim, padded: dim.next_multiple_of(LANES) }
    }

    pub(super) fn total(self) -> usize {
        // q and sums, scores, totals and maxima, then keys and values.
        self.rows * (2 * self.padded + TILE + LANES + 1) + TILE * (self.padded + self.dim)
    }
}

/// A task being computed; all slices lie in the thread's scratch.
pub(super) struct Work<'a, L> {
    kernels: &'a Kernels,
    pub(super) layer: &'a AttentionLayer<'a>,
    pub(super) task: &'a AttentionTask<'a>,
    pub(super) sizes: Sizes,
    /// `[rows, dim]`
    q: &'a mut [f32],
    /// `[rows, padded]`: the weighted values so far.
    sums: &'a mut [f32],
    /// `[rows, TILE]`
    scores: &'a mut [f32],
    /// `[rows]`: largest score so far.
    maxima: &'a mut [f32],
    /// `[rows, LANES]`: sum of weights so far, by lane.
    totals: &'a mut [f32],
    /// `[dim, TILE]`
    pub(super) keys: &'a mut [f32],
    /// `[TILE, padded]`
    pub(super) values: &'a mut [f32],
    /// Where the K rows of a tile and of the next are.
    pub(super) rows: [*const u8; TILE],
    pub(super) next: [*const u8; TILE],
    lanes: std::marker::PhantomData<L>,
}

impl<'a, L: Lanes> Work<'a, L> {
    #[inline(always)]
    pub(super) fn new(
        kernels: &'a Kernels,
        layer: &'a AttentionLayer<'a>,
        task: &'a AttentionTask<'a>,
        sizes: Sizes,
        scratch: &'a mut [f32],
    ) -> Self {
        let Sizes { rows, dim, padded } = sizes;
        let (q, rest) = scratch.split_at_mut(rows * padded);
        let (sums, rest) = rest.split_at_mut(rows * padded);
        let (scores, rest) = rest.split_at_mut(rows * TILE);
        let (totals, rest) = rest.split_at_mut(rows * LANES);
        let (keys, rest) = rest.split_at_mut(dim * TILE);
        let (values, rest) = rest.split_at_mut(TILE * padded);
        let maxima = &mut rest[..rows];
        sums.fill(0.0);
        maxima.fill(f32::NEG_INFINITY);
        totals.fill(0.0);
        if dim < padded {
            values.fill(0.0);
        }
        Self {
            kernels,
            layer,
            task,
            sizes,
            q,
            sums,
            scores,
            maxima,
            totals,
            keys,
            values,
            rows: [std::ptr::null(); TILE],
            next: [std::ptr::null(); TILE],
            lanes: std::marker::PhantomData,
        }
    }

    /// # Safety
    /// As the module's `run`.
    #[inline(always)]
    pub(super) unsafe fn run(&mut self) {
        let end = self.task.position + self.task.count;
        let first = self.first_visible(self.task.position) / TILE * TILE;
        // SAFETY: the caller's.
        unsafe {
            self.gather_queries();
            self.find_rows(first, TILE.min(end - first));
            for start in (first..end).step_by(TILE) {
                let count = TILE.min(end - start);
                self.rows = self.next;
                if start + TILE < end {
                    self.find_rows(start + TILE, TILE.min(end - start - TILE));
                }
                // Rows of queries before this tile have no part in it.
                let skipped = start.saturating_sub(self.task.position) * self.layer.group;
                self.load_keys(count);
                self.score(skipped, count);
                self.weigh(skipped, start, count);
                if !self.in_place() {
                    self.load_values(count);
                }
                self.add_values(skipped, count);
            }
            self.write();
        }
    }

    #[inline(always)]
    fn first_visible(&self, position: usize) -> usize {
        self.layer.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// # Safety
    /// As `run`.
    #[inline(always)]
    unsafe fn gather_queries(&mut self) {
        let (dim, group) = (self.sizes.dim, self.layer.group);
        for row in 0..self.sizes.rows {
            let (query, head) = (row / group, self.task.kv_head * group + row % group);
            // SAFETY: a head of a query row.
            let from = unsafe { self.layer.q.add((self.task.row + query) * self.layer.ldq + head * dim) };
            // SAFETY: `dim` numbers on both sides.
            unsafe { std::ptr::copy_nonoverlapping(from, self.q[row * dim..].as_mut_ptr(), dim) };
        }
    }

    /// Whether weights are multiplied by V where it lies.
    #[inline(always)]
    fn in_place(&self) -> bool {
        let Sizes { rows, dim, padded } = self.sizes;
        rows <= ROWS_IN_PLACE && dim == padded && self.layer.layout.dtype == KvDtype::Bf16
    }

    /// Bytes from a K row to the V row of the same position.
    pub(super) fn to_values(&self) -> usize {
        self.layer.layout.block_bytes() / 2
    }

    /// `scores = q · keys` for rows from `skipped`.
    ///
    /// # Safety
    /// As `run`.
    #[inline(always)]
    unsafe fn score(&mut self, skipped: usize, count: usize) {
        let Sizes { rows, dim, .. } = self.sizes;
        self.scores[skipped * TILE..].fill(0.0);
        let product = Product {
            k: dim,
            a: self.q[skipped * dim..].as_ptr(),
            lda: dim,
            b: Matrix::Numbers { at: self.keys.as_ptr(), stride: TILE },
            c: self.scores[skipped * TILE..].as_mut_ptr(),
            ldc: TILE,
            vectors: count.div_ceil(LANES),
            ahead: self.ahead(&self.rows, self.to_values()),
        };
        // SAFETY: the buffers have these sizes.
        unsafe { self.accumulate(product, rows - skipped) };
    }

    /// Scores become weights; sums and totals are scaled to the new maximum.
    ///
    /// # Safety
    /// As `run`.
    #[inline(always)]
    unsafe fn weigh(&mut self, skipped: usize, start: usize, count: usize) {
        let (padded, width) = (self.sizes.padded, count.next_multiple_of(LANES));
        for row in skipped..self.sizes.rows {
            let position = self.task.position + row / self.layer.group;
            let seen = (position + 1 - start).min(width);
            let hidden = self.first_visible(position).saturating_sub(start).min(width);
            let scores = &mut self.scores[row * TILE..][..width];
            scores[..hidden].fill(f32::NEG_INFINITY);
            scores[seen..].fill(f32::NEG_INFINITY);
            // SAFETY: rows of `width`, LANES and `padded` numbers.
            unsafe {
                let at = scores.as_mut_ptr();
                let mut largest = L::load(at);
                for i in (LANES..width).step_by(LANES) {
                    largest = largest.max(L::load(at.add(i)));
                }
                let before = self.maxima[row];
                let largest = largest.largest();
                let now = if largest > before { largest } else { before };
                if now == f32::NEG_INFINITY {
                    scores.fill(0.0);
                    continue;
                }
                let total = self.totals.as_mut_ptr().add(row * LANES);
                let mut sum = L::load(total);
                if now != before {
                    self.maxima[row] = now;
                    let shrink = exp::<L>(L::splat(before - now));
                    sum = sum.mul(shrink);
                    let sums = self.sums.as_mut_ptr().add(row * padded);
                    for i in (0..padded).step_by(LANES) {
                        L::load(sums.add(i)).mul(shrink).store(sums.add(i));
                    }
                }
                let shift = L::splat(now);
                for i in (0..width).step_by(LANES) {
                    let weight = exp::<L>(L::load(at.add(i)).sub(shift));
                    weight.store(at.add(i));
                    sum = sum.add(weight);
                }
                sum.store(total);
            }
        }
    }

    /// `sums += weights · values`.
    ///
    /// # Safety
    /// As `run`.
    #[inline(always)]
    unsafe fn add_values(&mut self, skipped: usize, count: usize) {
        let Sizes { rows, padded, .. } = self.sizes;
        let b = if self.in_place() {
            Matrix::Brain { rows: self.rows.as_ptr(), offset: self.to_values() }
        } else {
            Matrix::Numbers { at: self.values.as_ptr(), stride: padded }
        };
        let product = Product {
            k: count,
            a: self.scores[skipped * TILE..].as_ptr(),
            lda: TILE,
            b,
            c: self.sums[skipped * padded..].as_mut_ptr(),
            ldc: padded,
            vectors: padded / LANES,
            ahead: self.ahead(&self.next, 0),
        };
        // SAFETY: the buffers have these sizes.
        unsafe { self.accumulate(product, rows - skipped) };
    }

    /// Rows of KV that are wanted after a product.
    #[inline(always)]
    fn ahead(&self, rows: &[*const u8; TILE], offset: usize) -> Ahead {
        let bytes = self.sizes.dim * self.layer.layout.dtype.bytes();
        let line_bits = bytes.div_ceil(LINE).next_power_of_two().trailing_zeros();
        Ahead { rows: rows.as_ptr(), offset, line_bits, at: 0, step: 0, every: 1 }
    }

    /// # Safety
    /// The product's pointers valid for `rows`.
    #[inline(always)]
    unsafe fn accumulate(&self, mut product: Product, rows: usize) {
        let most = self.kernels.accumulate.len();
        let steps = product.steps::<L>() * rows.div_ceil(most);
        product.ahead.spread(TILE, steps);
        let (a, c, step) = (product.a, product.c, product.ahead.step * product.steps::<L>());
        for (index, (start, count)) in tiles(rows, most).enumerate() {
            // SAFETY: the caller's; `count` is between 1 and the number of functions.
            unsafe {
                product.a = a.add(start * product.lda);
                product.c = c.add(start * product.ldc);
                product.ahead.at = index * step;
                self.kernels.accumulate[count - 1](&product);
            }
        }
    }

    /// `out = sums / total`.
    ///
    /// # Safety
    /// As `run`.
    #[inline(always)]
    unsafe fn write(&mut self) {
        let Sizes { rows, dim, padded } = self.sizes;
        let group = self.layer.group;
        for row in 0..rows {
            let (query, head) = (row / group, self.task.kv_head * group + row % group);
            // SAFETY: a row of LANES; then a head of an output row, which is this task's.
            unsafe {
                let total = L::load(self.totals.as_ptr().add(row * LANES)).sum();
                let to = self.layer.out.add((self.task.row + query) * self.layer.ldo + head * dim);
                for i in 0..dim {
                    *to.add(i) = self.sums[row * padded + i] / total;
                }
            }
        }
    }
}
