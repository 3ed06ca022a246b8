//! Sixteen lanes in one AVX-512 register.

use std::arch::x86_64 as x86;

use super::avx2::{transpose8, transpose8_pairs, tree_sum};
use super::lanes::Lanes;

/// One register of sixteen.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(x86::__m512);

impl Lanes for Avx512 {
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm512_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm512_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see the trait.
        unsafe { x86::_mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: see the trait.
        unsafe {
            let wide = x86::_mm512_cvtepu16_epi32(x86::_mm256_loadu_si256(from.cast()));
            Self(x86::_mm512_castsi512_ps(x86::_mm512_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const u32) -> (Self, Self) {
        // SAFETY: see the trait.
        unsafe {
            let pairs = x86::_mm512_loadu_si512(from.cast());
            let high = x86::_mm512_and_si512(pairs, x86::_mm512_set1_epi32(0xffff_0000_u32 as i32));
            let low = x86::_mm512_slli_epi32::<16>(pairs);
            (Self(x86::_mm512_castsi512_ps(low)), Self(x86::_mm512_castsi512_ps(high)))
        }
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm512_add_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm512_sub_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm512_mul_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm512_div_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm512_fmadd_ps(self.0, b.0, c.0)) }
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: see the trait.
        unsafe { Self(x86::_mm512_max_ps(self.0, b.0)) }
    }
    #[inline(always)]
    unsafe fn scale(self, n: Self) -> Self {
        // SAFETY: see the trait.
        unsafe {
            let exponent = x86::_mm512_slli_epi32::<23>(x86::_mm512_castps_si512(n.0));
            let bits = x86::_mm512_add_epi32(x86::_mm512_castps_si512(self.0), exponent);
            Self(x86::_mm512_castsi512_ps(bits))
        }
    }
    #[inline(always)]
    unsafe fn zero_below(self, limit: Self, value: Self) -> Self {
        // SAFETY: see the trait.
        unsafe {
            let below = x86::_mm512_cmp_ps_mask::<{ x86::_CMP_LT_OQ }>(self.0, limit.0);
            Self(x86::_mm512_mask_mov_ps(value.0, below, x86::_mm512_setzero_ps()))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see the trait.
        unsafe {
            let high = x86::_mm256_castpd_ps(x86::_mm512_extractf64x4_pd::<1>(x86::_mm512_castps_pd(self.0)));
            tree_sum(x86::_mm256_add_ps(x86::_mm512_castps512_ps256(self.0), high))
        }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: see the trait.
        unsafe { x86::_mm512_reduce_max_ps(self.0) }
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
