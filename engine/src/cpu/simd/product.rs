//! Attention's products: a few rows of A times one or two vectors of columns of B, held in registers over all of K. What is needed
//! after a product is fetched from memory during it, evenly, so that memory works all the time.

use super::lanes::{LANES, Lanes};
use super::tile::keep_order;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// Lines of a fetch: few, so that they do not wait for each other; and more than one, since a loop that stops for each is slow.
const LINES: usize = 8;

/// Rows that are wanted after a product: brought nearer, line by line, evenly over its steps.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    /// Their addresses, to which `offset` is added.
    pub(super) rows: *const *const u8,
    pub(super) offset: usize,
    /// Lines of a row: a power of two.
    pub(super) line_bits: u32,
    /// The next line, and lines per step, in 65536ths.
    pub(super) at: usize,
    pub(super) step: usize,
    /// Steps between fetches.
    pub(super) every: usize,
}

impl Ahead {
    /// `rows` rows over `steps` steps.
    pub(super) fn spread(&mut self, rows: usize, steps: usize) {
        let lines = rows << self.line_bits;
        self.step = (lines << 16) / steps.max(1);
        self.every = (LINES * steps / lines).max(1);
    }

    /// Those of the next `steps` steps.
    ///
    /// # Safety
    /// No more steps in all than were said.
    #[inline(always)]
    unsafe fn fetch<L: Lanes>(&mut self, steps: usize) {
        let end = self.at + steps * self.step;
        for line in self.at >> 16..end >> 16 {
            let within = line & ((1 << self.line_bits) - 1);
            // SAFETY: the caller's; prefetches may name any address.
            unsafe {
                let row = *self.rows.add(line >> self.line_bits);
                L::prefetch(row.wrapping_add(self.offset + within * LINE).cast());
            }
        }
        self.at = end;
    }
}

/// What a product multiplies by: rows of columns.
#[derive(Clone, Copy)]
pub(crate) enum Matrix {
    /// Rows of f32, `stride` numbers apart.
    Numbers { at: *const f32, stride: usize },
    /// Rows of bf16 where they lie, `offset` bytes from these addresses.
    Brain { rows: *const *const u8, offset: usize },
}

/// A vector of a row.
trait Rows: Copy {
    unsafe fn load<L: Lanes>(self, row: usize, column: usize) -> L;
}

#[derive(Clone, Copy)]
struct Numbers(*const f32, usize);

impl Rows for Numbers {
    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: usize, column: usize) -> L {
        // SAFETY: the product's.
        unsafe { L::load(self.0.add(row * self.1 + column)) }
    }
}

#[derive(Clone, Copy)]
struct Brain(*const *const u8, usize);

impl Rows for Brain {
    #[inline(always)]
    unsafe fn load<L: Lanes>(self, row: usize, column: usize) -> L {
        // SAFETY: the product's.
        unsafe { L::load_bf16((*self.0.add(row)).add(self.1).cast::<u16>().add(column)) }
    }
}

/// A small f32 product: `C += A · B`.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    /// Inner size.
    pub(super) k: usize,
    /// `[rows, k]`, rows `lda` apart.
    pub(super) a: *const f32,
    pub(super) lda: usize,
    /// `[k, vectors · LANES]`
    pub(super) b: Matrix,
    /// `[rows, vectors · LANES]`, rows `ldc` apart.
    pub(super) c: *mut f32,
    pub(super) ldc: usize,
    /// Vectors of columns.
    pub(super) vectors: usize,
    pub(super) ahead: Ahead,
}

impl Product {
    /// Steps of a tile of rows: of K, for each vector or two of columns.
    #[inline(always)]
    pub(super) fn steps<L: Lanes>(&self) -> usize {
        self.k * if L::WIDE { self.vectors.div_ceil(2) } else { self.vectors }
    }
}

/// Computes a product of MR rows.
///
/// # Safety
/// The pointers valid for those sizes; the instructions of `L`.
#[inline(always)]
pub(super) unsafe fn accumulate<L: Lanes, const MR: usize>(product: &Product) {
    // SAFETY: the caller's.
    unsafe {
        match product.b {
            Matrix::Numbers { at, stride } => accumulate_by::<L, Numbers, MR>(product, Numbers(at, stride)),
            Matrix::Brain { rows, offset } => accumulate_by::<L, Brain, MR>(product, Brain(rows, offset)),
        }
    }
}

/// # Safety
/// As `accumulate`.
#[inline(always)]
unsafe fn accumulate_by<L: Lanes, B: Rows, const MR: usize>(product: &Product, b: B) {
    let (mut vector, mut ahead) = (0, product.ahead);
    while vector < product.vectors {
        // SAFETY: the caller's.
        unsafe {
            if L::WIDE && vector + 2 <= product.vectors {
                accumulate_columns::<L, B, MR, 2>(product, b, &mut ahead, vector * LANES);
                vector += 2;
            } else {
                accumulate_columns::<L, B, MR, 1>(product, b, &mut ahead, vector * LANES);
                vector += 1;
            }
        }
    }
}

/// # Safety
/// As `accumulate`, for NV vectors from `column`.
#[expect(clippy::needless_range_loop, reason = "indices name registers")]
#[inline(always)]
unsafe fn accumulate_columns<L: Lanes, B: Rows, const MR: usize, const NV: usize>(
    product: &Product,
    from: B,
    ahead: &mut Ahead,
    column: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let (a, lda, ldc) = (product.a, product.lda, product.ldc);
        let c = product.c.add(column);
        let mut sums = [[L::splat(0.0); NV]; MR];
        for m in 0..MR {
            for v in 0..NV {
                sums[m][v] = L::load(c.add(m * ldc + v * LANES));
            }
        }
        for first in (0..product.k).step_by(product.ahead.every) {
            let end = product.k.min(first + product.ahead.every);
            ahead.fetch::<L>(end - first);
            for k in first..end {
                let mut b = [L::splat(0.0); NV];
                for v in 0..NV {
                    b[v] = from.load(k, column + v * LANES);
                }
                for m in 0..MR {
                    let x = L::splat(*a.add(m * lda + k));
                    for v in 0..NV {
                        sums[m][v] = x.fma(b[v], sums[m][v]);
                    }
                    keep_order(m);
                }
            }
        }
        for m in 0..MR {
            for v in 0..NV {
                sums[m][v].store(c.add(m * ldc + v * LANES));
            }
        }
    }
}
