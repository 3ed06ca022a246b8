//! One attention task: gather, then tile by tile score, weigh, add; see `attention`.

use super::Kernels;
use super::attention::{AttentionLayer, AttentionTask, TILE};
use super::lanes::{LANES, Lanes};
use super::rows::exp;
use super::tile::{Product, tiles};
use crate::KvDtype;
use crate::kv::fp8;

/// Of a task's buffers.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    rows: usize,
    dim: usize,
    /// `dim` up to whole vectors.
    padded: usize,
}

impl Sizes {
    pub(super) fn of(layer: &AttentionLayer<'_>, task: &AttentionTask<'_>) -> Self {
        let dim = layer.layout.head_dim;
        Self { rows: task.count * layer.group, dim, padded: dim.next_multiple_of(LANES) }
    }

    pub(super) fn total(self) -> usize {
        // q and sums, scores, totals and maxima, then keys, their pairs, values.
        self.rows * (2 * self.padded + TILE + LANES + 1) + TILE * (2 * self.padded + self.dim)
    }
}

/// A task being computed; all slices lie in the thread's scratch.
pub(super) struct Work<'a, L> {
    kernels: &'a Kernels,
    layer: &'a AttentionLayer<'a>,
    task: &'a AttentionTask<'a>,
    sizes: Sizes,
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
    keys: &'a mut [f32],
    /// `[dim / 2, TILE]` words of two bf16.
    pairs: &'a mut [f32],
    /// `[TILE, padded]`
    values: &'a mut [f32],
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
        let (pairs, rest) = rest.split_at_mut(padded * TILE);
        let (values, rest) = rest.split_at_mut(TILE * padded);
        let maxima = &mut rest[..rows];
        sums.fill(0.0);
        maxima.fill(f32::NEG_INFINITY);
        totals.fill(0.0);
        values.fill(0.0);
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
            pairs,
            values,
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
            for start in (first..end).step_by(TILE) {
                let count = TILE.min(end - start);
                self.load_keys(start, count);
                self.load_values(start, count);
                // Rows of queries before this tile have no part in it.
                let skipped = start.saturating_sub(self.task.position) * self.layer.group;
                self.score(skipped, count);
                self.weigh(skipped, start);
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

    /// Start of a position's K (part 0) or V (part 1) row.
    ///
    /// # Safety
    /// The position is in the table.
    #[inline(always)]
    unsafe fn kv_row(&self, position: usize, part: usize) -> *const u8 {
        let layout = self.layer.layout;
        let block = self.task.blocks[position / layout.block_tokens] as usize;
        let row = (part * layout.kv_heads + self.task.kv_head) * layout.block_tokens
            + position % layout.block_tokens;
        let offset = block * layout.block_bytes() + row * layout.head_dim * layout.dtype.bytes();
        // SAFETY: inside the layer's blocks.
        unsafe { self.layer.kv.add(offset) }
    }

    /// `keys [dim, TILE]`: K transposed; columns past `count` repeat the last key.
    ///
    /// # Safety
    /// As `run`.
    #[inline(always)]
    unsafe fn load_keys(&mut self, start: usize, count: usize) {
        let dim = self.sizes.dim;
        if self.layer.layout.dtype == KvDtype::Fp8 {
            // SAFETY: the caller's.
            return unsafe { self.load_fp8_keys(start, count) };
        }
        let bf16 = self.layer.layout.dtype == KvDtype::Bf16;
        let words = if bf16 { dim / 2 } else { dim };
        // SAFETY: rows of `words` words; buffers of `dim · TILE`.
        unsafe {
            for key in (0..count).step_by(8) {
                let rows: [*const u32; 8] =
                    std::array::from_fn(|i| self.kv_row(start + (key + i).min(count - 1), 0).cast());
                let to: *mut u32 = if bf16 { self.pairs.as_mut_ptr() } else { self.keys.as_mut_ptr() }.cast();
                let to = to.add(key);
                let whole = words / 8 * 8;
                for word in (0..whole).step_by(8) {
                    L::transpose8(&rows.map(|row| row.add(word)), to.add(word * TILE), TILE);
                }
                for word in whole..words {
                    for (i, row) in rows.iter().enumerate() {
                        *to.add(word * TILE + i) = row.add(word).read_unaligned();
                    }
                }
            }
            if bf16 {
                for word in 0..words {
                    for column in (0..count).step_by(LANES) {
                        let from: *const u32 = self.pairs.as_ptr().add(word * TILE + column).cast();
                        let (even, odd) = L::load_pairs(from);
                        even.store(self.keys.as_mut_ptr().add(2 * word * TILE + column));
                        odd.store(self.keys.as_mut_ptr().add((2 * word + 1) * TILE + column));
                    }
                }
            }
        }
    }

    /// # Safety
    /// As `load_keys`.
    unsafe fn load_fp8_keys(&mut self, start: usize, count: usize) {
        let (dim, numbers) = (self.sizes.dim, &*fp8::TO_F32);
        for key in 0..count.next_multiple_of(LANES).min(TILE) {
            // SAFETY: a row of `dim` bytes.
            let row = unsafe { std::slice::from_raw_parts(self.kv_row(start + key.min(count - 1), 0), dim) };
            for (i, &bits) in row.iter().enumerate() {
                self.keys[i * TILE + key] = numbers[bits as usize];
            }
        }
    }

    /// `values [TILE, padded]`.
    ///
    /// # Safety
    /// As `run`.
    #[inline(always)]
    unsafe fn load_values(&mut self, start: usize, count: usize) {
        let Sizes { dim, padded, .. } = self.sizes;
        for key in 0..count {
            // SAFETY: rows of `dim` numbers on both sides.
            unsafe {
                let from = self.kv_row(start + key, 1);
                let to = self.values.as_mut_ptr().add(key * padded);
                match self.layer.layout.dtype {
                    KvDtype::F32 => std::ptr::copy_nonoverlapping(from.cast(), to, dim),
                    KvDtype::Bf16 => {
                        let from = from.cast::<u16>();
                        let whole = dim / LANES * LANES;
                        for i in (0..whole).step_by(LANES) {
                            L::load_bf16(from.add(i)).store(to.add(i));
                        }
                        for i in whole..dim {
                            *to.add(i) = f32::from_bits(u32::from(*from.add(i)) << 16);
                        }
                    }
                    KvDtype::Fp8 => {
                        let numbers = &*fp8::TO_F32;
                        for i in 0..dim {
                            *to.add(i) = numbers[*from.add(i) as usize];
                        }
                    }
                }
            }
        }
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
            b: self.keys.as_ptr(),
            ldb: TILE,
            c: self.scores[skipped * TILE..].as_mut_ptr(),
            ldc: TILE,
            vectors: count.div_ceil(LANES),
        };
        // SAFETY: the buffers have these sizes.
        unsafe { self.accumulate(&product, rows - skipped) };
    }

    /// Scores become weights; sums and totals are scaled to the new maximum.
    ///
    /// # Safety
    /// As `run`.
    #[inline(always)]
    unsafe fn weigh(&mut self, skipped: usize, start: usize) {
        let padded = self.sizes.padded;
        for row in skipped..self.sizes.rows {
            let position = self.task.position + row / self.layer.group;
            let seen = (position + 1 - start).min(TILE);
            let hidden = self.first_visible(position).saturating_sub(start).min(TILE);
            let scores = &mut self.scores[row * TILE..][..TILE];
            scores[..hidden].fill(f32::NEG_INFINITY);
            scores[seen..].fill(f32::NEG_INFINITY);
            // SAFETY: rows of TILE, LANES and `padded` numbers.
            unsafe {
                let at = scores.as_mut_ptr();
                let mut largest = L::load(at);
                for i in (LANES..TILE).step_by(LANES) {
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
                for i in (0..TILE).step_by(LANES) {
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
        let product = Product {
            k: count,
            a: self.scores[skipped * TILE..].as_ptr(),
            lda: TILE,
            b: self.values.as_ptr(),
            ldb: padded,
            c: self.sums[skipped * padded..].as_mut_ptr(),
            ldc: padded,
            vectors: padded / LANES,
        };
        // SAFETY: the buffers have these sizes.
        unsafe { self.accumulate(&product, rows - skipped) };
    }

    /// # Safety
    /// The product's pointers valid for `rows`.
    unsafe fn accumulate(&self, product: &Product, rows: usize) {
        for (start, count) in tiles(rows, self.kernels.accumulate.len()) {
            // SAFETY: the caller's; `count` is between 1 and the number of functions.
            unsafe {
                self.kernels.accumulate[count - 1](&Product {
                    a: product.a.add(start * product.lda),
                    c: product.c.add(start * product.ldc),
                    ..*product
                });
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
