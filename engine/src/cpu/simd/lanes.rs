//! Sixteen f32 lanes: one vocabulary for every instruction set.
//!
//! Kernels are written once over this trait and compiled for AVX-512, AVX2 and plain scalar code. Every
//! operation is exactly rounded and every reduction has one fixed tree, so the three give the same bits.

/// Number of lanes.
pub(crate) const LANES: usize = 16;

/// # Safety
/// All functions: the CPU must have the instructions of the implementation; pointers must be valid for the
/// sixteen elements (`transpose`: for the rows and columns it names).
pub(crate) trait Lanes: Copy {
    /// Enough registers for tiles of 8 × 2 vectors (else 6 × 1).
    const WIDE: bool;

    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// Sixteen bf16.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Sixteen pairs of bf16: the first of each pair, the second of each pair.
    unsafe fn load_pairs(from: *const u32) -> (Self, Self);
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn div(self, b: Self) -> Self;
    /// `self · b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    /// The second operand where either is NaN.
    unsafe fn max(self, b: Self) -> Self;
    /// Adds the low bits of `n`'s representation to the exponent of `self`.
    unsafe fn scale(self, n: Self) -> Self;
    /// `if self < limit { 0 } else { value }`.
    unsafe fn zero_below(self, limit: Self, value: Self) -> Self;
    /// Lane i + lane i+8, then +4, +2, +1.
    unsafe fn sum(self) -> f32;
    unsafe fn largest(self) -> f32;
    /// Brings a cache line nearer; any address is allowed.
    unsafe fn prefetch(_line: *const u32) {}
    /// Columns of eight rows of eight f32 become rows, `stride` numbers apart.
    unsafe fn transpose8(rows: &[*const u32; 8], to: *mut f32, stride: usize);
    /// The same of eight rows of sixteen bf16: sixteen rows of f32.
    unsafe fn transpose8_pairs(rows: &[*const u32; 8], to: *mut f32, stride: usize);
}

/// No instructions assumed. Slow: `mul_add` is a library call where the target has none.
#[derive(Clone, Copy)]
pub(crate) struct Scalar([f32; LANES]);

impl Scalar {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], b.0[i])))
    }
}

impl Lanes for Scalar {
    const WIDE: bool = false;

    unsafe fn splat(x: f32) -> Self {
        Self([x; LANES])
    }
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see the trait.
        Self(std::array::from_fn(|i| unsafe { from.add(i).read_unaligned() }))
    }
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see the trait.
        self.0.iter().enumerate().for_each(|(i, &x)| unsafe { to.add(i).write_unaligned(x) });
    }
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: see the trait.
        let words: [u16; LANES] = std::array::from_fn(|i| unsafe { from.add(i).read_unaligned() });
        Self(words.map(|word| f32::from_bits(u32::from(word) << 16)))
    }
    unsafe fn load_pairs(from: *const u32) -> (Self, Self) {
        // SAFETY: see the trait.
        let pairs: [u32; LANES] = std::array::from_fn(|i| unsafe { from.add(i).read_unaligned() });
        (Self(pairs.map(|p| f32::from_bits(p << 16))), Self(pairs.map(|p| f32::from_bits(p & 0xffff_0000))))
    }
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }
    unsafe fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| a / b)
    }
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }
    unsafe fn max(self, b: Self) -> Self {
        self.zip(b, |a, b| if a > b { a } else { b })
    }
    unsafe fn scale(self, n: Self) -> Self {
        self.zip(n, |p, n| f32::from_bits(p.to_bits().wrapping_add(n.to_bits() << 23)))
    }
    unsafe fn zero_below(self, limit: Self, value: Self) -> Self {
        Self(std::array::from_fn(|i| if self.0[i] < limit.0[i] { 0.0 } else { value.0[i] }))
    }
    unsafe fn sum(self) -> f32 {
        let mut lanes = self.0;
        for step in [8, 4, 2, 1] {
            for i in 0..step {
                lanes[i] += lanes[i + step];
            }
        }
        lanes[0]
    }
    unsafe fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
    unsafe fn transpose8(rows: &[*const u32; 8], to: *mut f32, stride: usize) {
        for (i, &row) in rows.iter().enumerate() {
            for column in 0..8 {
                // SAFETY: see the trait.
                unsafe { *to.add(column * stride + i) = f32::from_bits(row.add(column).read_unaligned()) };
            }
        }
    }
    unsafe fn transpose8_pairs(rows: &[*const u32; 8], to: *mut f32, stride: usize) {
        for (i, &row) in rows.iter().enumerate() {
            for column in 0..8 {
                // SAFETY: see the trait.
                unsafe {
                    let pair = row.add(column).read_unaligned();
                    *to.add(2 * column * stride + i) = f32::from_bits(pair << 16);
                    *to.add((2 * column + 1) * stride + i) = f32::from_bits(pair & 0xffff_0000);
                }
            }
        }
    }
}
