//! The inner tiles: a few rows of A times one or two vectors of columns of B, held in registers over all of K.

use super::lanes::{LANES, Lanes};

/// Calls `$tile::<L, MR, NV>` for a row count known at run time, at most 12.
macro_rules! for_rows {
    ($rows:expr, $nv:literal, $tile:ident, $lanes:ty, $($argument:expr),*) => {
        match $rows {
            1 => $tile::<$lanes, 1, $nv>($($argument),*),
            2 => $tile::<$lanes, 2, $nv>($($argument),*),
            3 => $tile::<$lanes, 3, $nv>($($argument),*),
            4 => $tile::<$lanes, 4, $nv>($($argument),*),
            5 => $tile::<$lanes, 5, $nv>($($argument),*),
            6 => $tile::<$lanes, 6, $nv>($($argument),*),
            7 => $tile::<$lanes, 7, $nv>($($argument),*),
            8 => $tile::<$lanes, 8, $nv>($($argument),*),
            9 => $tile::<$lanes, 9, $nv>($($argument),*),
            10 => $tile::<$lanes, 10, $nv>($($argument),*),
            11 => $tile::<$lanes, 11, $nv>($($argument),*),
            _ => $tile::<$lanes, 12, $nv>($($argument),*),
        }
    };
}
pub(super) use for_rows;

/// Most rows of a tile.
pub(super) const fn max_rows<L: Lanes>() -> usize {
    if L::WIDE { 12 } else { 6 }
}

/// Cuts `rows` into equal tiles of at most `max_rows`.
pub(super) fn tiles<L: Lanes>(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = rows.div_ceil(max_rows::<L>());
    (0..count).map(move |i| {
        let (start, end) = (i * rows / count, (i + 1) * rows / count);
        (start, end - start)
    })
}

/// `A [MR, 2 · pairs] (f32) · B [pairs, .., 2] (bf16 pairs)`: the accumulators.
///
/// # Safety
/// `a` valid for MR rows `lda` apart of `2 · pairs`; `b` for `pairs` rows `ldb` words apart of NV vectors;
/// the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn pairs<L: Lanes, const MR: usize, const NV: usize>(
    pairs: usize,
    a: *const f32,
    lda: usize,
    b: *const u32,
    ldb: usize,
) -> [[L; NV]; MR] {
    // SAFETY: the caller's.
    unsafe {
        let zero = L::splat(0.0);
        let mut sums = [[zero; NV]; MR];
        for pair in 0..pairs {
            let (mut first, mut second) = ([zero; NV], [zero; NV]);
            for v in 0..NV {
                (first[v], second[v]) = L::load_pairs(b.add(pair * ldb + v * LANES));
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = L::splat(*a.add(m * lda + 2 * pair));
                for v in 0..NV {
                    sums[v] = x.fma(first[v], sums[v]);
                }
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = L::splat(*a.add(m * lda + 2 * pair + 1));
                for v in 0..NV {
                    sums[v] = x.fma(second[v], sums[v]);
                }
            }
        }
        sums
    }
}

/// A small f32 product.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// Inner size.
    pub(super) k: usize,
    /// `[rows, k]`.
    pub(super) a: *const f32,
    pub(super) lda: usize,
    /// `[k, columns]`.
    pub(super) b: *const f32,
    pub(super) ldb: usize,
    /// `[rows, columns]`.
    pub(super) c: *mut f32,
    pub(super) ldc: usize,
}

/// `C += A · B` for `rows` rows and `vectors` vectors of columns.
///
/// # Safety
/// The pointers valid for those sizes; the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn accumulate<L: Lanes>(product: &Product, rows: usize, vectors: usize) {
    // SAFETY: the caller's; tiles stay inside.
    unsafe {
        for (start, count) in tiles::<L>(rows) {
            let mut vector = 0;
            while vector < vectors {
                let part = Product {
                    a: product.a.add(start * product.lda),
                    b: product.b.add(vector * LANES),
                    c: product.c.add(start * product.ldc + vector * LANES),
                    ..*product
                };
                if L::WIDE && vector + 2 <= vectors {
                    for_rows!(count, 2, accumulate_tile, L, &part);
                    vector += 2;
                } else {
                    for_rows!(count, 1, accumulate_tile, L, &part);
                    vector += 1;
                }
            }
        }
    }
}

/// # Safety
/// As `accumulate`, for MR rows and NV vectors.
#[inline(always)]
unsafe fn accumulate_tile<L: Lanes, const MR: usize, const NV: usize>(part: &Product) {
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[L::splat(0.0); NV]; MR];
        for (m, sums) in sums.iter_mut().enumerate() {
            for (v, sum) in sums.iter_mut().enumerate() {
                *sum = L::load(part.c.add(m * part.ldc + v * LANES));
            }
        }
        for k in 0..part.k {
            let mut b = [L::splat(0.0); NV];
            for (v, b) in b.iter_mut().enumerate() {
                *b = L::load(part.b.add(k * part.ldb + v * LANES));
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = L::splat(*part.a.add(m * part.lda + k));
                for v in 0..NV {
                    sums[v] = x.fma(b[v], sums[v]);
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                sum.store(part.c.add(m * part.ldc + v * LANES));
            }
        }
    }
}
