//! Sixteen lanes in two AVX2 registers, and what AVX-512 shares with them.

use std::arch::x86_64 as x86;

use super::lanes::Lanes;

/// Two registers of eight.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(x86::__m256, x86::__m256);

impl Lanes for Avx2 {
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm256_set1_ps(x), x86::_mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm256_loadu_ps(from), x86::_mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see the trait.
        unsafe {
            x86::_mm256_storeu_ps(to, self.0);
            x86::_mm256_storeu_ps(to.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: see the trait.
        unsafe {
            let half = |from: *const u16| {
                let wide = x86::_mm256_cvtepu16_epi32(x86::_mm_loadu_si128(from.cast()));
                x86::_mm256_castsi256_ps(x86::_mm256_slli_epi32::<16>(wide))
            };
            Self(half(from), half(from.add(8)))
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const u32) -> (Self, Self) {
        // SAFETY: see the trait.
        unsafe {
            let mask = x86::_mm256_set1_epi32(0xffff_0000_u32 as i32);
            let (a, b) = (x86::_mm256_loadu_si256(from.cast()), x86::_mm256_loadu_si256(from.add(8).cast()));
            let low = |x| x86::_mm256_castsi256_ps(x86::_mm256_slli_epi32::<16>(x));
            let high = |x| x86::_mm256_castsi256_ps(x86::_mm256_and_si256(x, mask));
            (Self(low(a), low(b)), Self(high(a), high(b)))
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm256_add_ps(self.0, b.0), x86::_mm256_add_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm256_sub_ps(self.0, b.0), x86::_mm256_sub_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm256_mul_ps(self.0, b.0), x86::_mm256_mul_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm256_div_ps(self.0, b.0), x86::_mm256_div_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm256_fmadd_ps(self.0, b.0, c.0), x86::_mm256_fmadd_ps(self.1, b.1, c.1)) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm256_max_ps(self.0, b.0), x86::_mm256_max_ps(self.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn scale(self, n: Self) -> Self {
        // SAFETY: see the trait.
        unsafe {
            let scaled = |p, n| {
                let exponent = x86::_mm256_slli_epi32::<23>(x86::_mm256_castps_si256(n));
                x86::_mm256_castsi256_ps(x86::_mm256_add_epi32(x86::_mm256_castps_si256(p), exponent))
            };
            Self(scaled(self.0, n.0), scaled(self.1, n.1))
        }
    }
    #[inline(always)]
    unsafe fn zero_below(self, limit: Self, value: Self) -> Self {
        // SAFETY: see the trait.
        unsafe {
            let kept = |x, limit, value| {
                x86::_mm256_andnot_ps(x86::_mm256_cmp_ps::<{ x86::_CMP_LT_OQ }>(x, limit), value)
            };
            Self(kept(self.0, limit.0, value.0), kept(self.1, limit.1, value.1))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see the trait.
        unsafe { tree_sum(x86::_mm256_add_ps(self.0, self.1)) }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: see the trait.
        unsafe {
            let eight = x86::_mm256_max_ps(self.0, self.1);
            let four =
                x86::_mm_max_ps(x86::_mm256_castps256_ps128(eight), x86::_mm256_extractf128_ps::<1>(eight));
            let two = x86::_mm_max_ps(four, x86::_mm_movehl_ps(four, four));
            x86::_mm_cvtss_f32(x86::_mm_max_ss(two, x86::_mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    unsafe fn prefetch(line: *const u32) {
        // SAFETY: see the trait.
        unsafe { x86::_mm_prefetch::<{ x86::_MM_HINT_T1 }>(line.cast()) };
    }
    #[inline(always)]
    unsafe fn transpose8(rows: &[*const u32; 8], to: *mut f32, stride: usize) {
        // SAFETY: see the trait.
        unsafe { transpose8(rows, to, stride) }
    }
    #[inline(always)]
    unsafe fn transpose8_pairs(rows: &[*const u32; 8], to: *mut f32, stride: usize) {
        // SAFETY: see the trait.
        unsafe { transpose8_pairs(rows, to, stride) }
    }
}

/// Lane i + lane i+4, then +2, +1.
///
/// # Safety
/// The CPU must have AVX.
#[inline(always)]
pub(super) unsafe fn tree_sum(eight: x86::__m256) -> f32 {
    // SAFETY: AVX is there.
    unsafe {
        let four =
            x86::_mm_add_ps(x86::_mm256_castps256_ps128(eight), x86::_mm256_extractf128_ps::<1>(eight));
        let two = x86::_mm_add_ps(four, x86::_mm_movehl_ps(four, four));
        x86::_mm_cvtss_f32(x86::_mm_add_ss(two, x86::_mm_shuffle_ps::<1>(two, two)))
    }
}

/// See [`Lanes::transpose8`].
///
/// # Safety
/// The CPU must have AVX; pointers as in the trait.
#[inline(always)]
pub(super) unsafe fn transpose8(rows: &[*const u32; 8], to: *mut f32, stride: usize) {
    // SAFETY: the caller's.
    unsafe {
        for (i, column) in columns(rows).into_iter().enumerate() {
            x86::_mm256_storeu_ps(to.add(i * stride), column);
        }
    }
}

/// See [`Lanes::transpose8_pairs`].
///
/// # Safety
/// The CPU must have AVX2; pointers as in the trait.
#[inline(always)]
pub(super) unsafe fn transpose8_pairs(rows: &[*const u32; 8], to: *mut f32, stride: usize) {
    // SAFETY: the caller's.
    unsafe {
        let high = x86::_mm256_castsi256_ps(x86::_mm256_set1_epi32(0xffff_0000_u32 as i32));
        for (i, column) in columns(rows).into_iter().enumerate() {
            let first = x86::_mm256_slli_epi32::<16>(x86::_mm256_castps_si256(column));
            x86::_mm256_storeu_ps(to.add(2 * i * stride), x86::_mm256_castsi256_ps(first));
            x86::_mm256_storeu_ps(to.add((2 * i + 1) * stride), x86::_mm256_and_ps(column, high));
        }
    }
}

/// The columns of eight rows of eight words.
///
/// # Safety
/// The CPU must have AVX; eight words are readable at each row.
#[inline(always)]
unsafe fn columns(rows: &[*const u32; 8]) -> [x86::__m256; 8] {
    // SAFETY: the caller's.
    unsafe {
        let mut r = [x86::_mm256_setzero_ps(); 8];
        for (r, row) in r.iter_mut().zip(rows) {
            *r = x86::_mm256_loadu_ps(row.cast());
        }
        // Words of row pairs interleaved, then pairs of pairs, then 128-bit halves.
        let (a0, a1) = (x86::_mm256_unpacklo_ps(r[0], r[1]), x86::_mm256_unpackhi_ps(r[0], r[1]));
        let (a2, a3) = (x86::_mm256_unpacklo_ps(r[2], r[3]), x86::_mm256_unpackhi_ps(r[2], r[3]));
        let (a4, a5) = (x86::_mm256_unpacklo_ps(r[4], r[5]), x86::_mm256_unpackhi_ps(r[4], r[5]));
        let (a6, a7) = (x86::_mm256_unpacklo_ps(r[6], r[7]), x86::_mm256_unpackhi_ps(r[6], r[7]));
        let b = [
            (x86::_mm256_shuffle_ps::<0x44>(a0, a2), x86::_mm256_shuffle_ps::<0x44>(a4, a6)),
            (x86::_mm256_shuffle_ps::<0xee>(a0, a2), x86::_mm256_shuffle_ps::<0xee>(a4, a6)),
            (x86::_mm256_shuffle_ps::<0x44>(a1, a3), x86::_mm256_shuffle_ps::<0x44>(a5, a7)),
            (x86::_mm256_shuffle_ps::<0xee>(a1, a3), x86::_mm256_shuffle_ps::<0xee>(a5, a7)),
        ];
        std::array::from_fn(|i| {
            let (low, high) = b[i % 4];
            if i < 4 {
                x86::_mm256_permute2f128_ps::<0x20>(low, high)
            } else {
                x86::_mm256_permute2f128_ps::<0x31>(low, high)
            }
        })
    }
}
