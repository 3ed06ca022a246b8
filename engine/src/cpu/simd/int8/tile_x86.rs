//! The inner tile for x86: a few rows of A times a panel, sums in registers within a group of inputs.

use std::arch::x86_64 as x86;

use super::super::gemm::PANEL;
use super::tile::Tile8;

/// Words of a 512-bit register.
const WIDE: usize = 16;
/// Words of a 256-bit one.
const HALF: usize = 8;

/// Up to 12 rows × 32 columns: 24 sums, two weights and a broadcast in 32 registers; 24 dots for 14 loads. `vpdpbusd` takes
/// unsigned times signed bytes: weights are packed plus 128, activations come signed; sums begin at what that is too much.
///
/// # Safety
/// The pointers valid for the tile's sizes; AVX-512 with VNNI.
#[expect(clippy::needless_range_loop, reason = "indices name registers")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn vnni<const MR: usize>(tile: &Tile8) {
    // SAFETY: the caller's; prefetches may name any address.
    unsafe {
        let (mut panel, mut next, mut a) = (tile.panel, tile.next, tile.a);
        for (index, quads) in tile.ranges().enumerate() {
            let mut sums = [[x86::_mm512_setzero_si512(); 2]; MR];
            for m in 0..MR {
                let group = *tile.groups.add(m * tile.ldg + index);
                sums[m] = [x86::_mm512_set1_epi32(group.sum.wrapping_mul(-128)); 2];
            }
            for _ in quads {
                let mut w = [x86::_mm512_setzero_si512(); 2];
                for v in 0..2 {
                    w[v] = x86::_mm512_loadu_si512(panel.add(v * WIDE).cast());
                    x86::_mm_prefetch::<{ x86::_MM_HINT_T1 }>(next.wrapping_add(v * WIDE).cast());
                }
                for m in 0..MR {
                    let x = x86::_mm512_set1_epi32(a.add(m * tile.lda).cast::<i32>().read_unaligned());
                    for v in 0..2 {
                        sums[m][v] = x86::_mm512_dpbusd_epi32(sums[m][v], w[v], x);
                    }
                }
                panel = panel.add(PANEL);
                next = next.wrapping_add(tile.step);
                a = a.add(4);
            }
            for m in 0..MR {
                let scale = x86::_mm512_set1_ps((*tile.groups.add(m * tile.ldg + index)).scale);
                for v in 0..2 {
                    let at = tile.totals.add(m * PANEL + v * WIDE);
                    let sum = x86::_mm512_cvtepi32_ps(sums[m][v]);
                    x86::_mm512_storeu_ps(at, x86::_mm512_fmadd_ps(sum, scale, x86::_mm512_loadu_ps(at)));
                }
            }
        }
    }
}

/// Up to 4 rows × 16 columns at a time. `vpmaddubsw` adds two products in 16 bits and saturates: with the weight's sign moved
/// to the activation two products are at most 2 · 128 · 127 and fit.
///
/// # Safety
/// The pointers valid for the tile's sizes; AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2<const MR: usize>(tile: &Tile8) {
    for offset in (0..PANEL).step_by(2 * HALF) {
        // SAFETY: the caller's.
        unsafe { avx2_columns::<MR, 2>(tile, offset) };
    }
}

/// One row × 32 columns: the panel's lines in the order in which they lie in memory, for steps that memory bounds.
///
/// # Safety
/// As `avx2`.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2_row(tile: &Tile8) {
    // SAFETY: the caller's.
    unsafe { avx2_columns::<1, 4>(tile, 0) };
}

/// NV vectors of columns from `offset`.
///
/// # Safety
/// As `avx2`.
#[expect(clippy::needless_range_loop, reason = "indices name registers")]
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2_columns<const MR: usize, const NV: usize>(tile: &Tile8, offset: usize) {
    // Each pass over the panel fetches its part of what is next, so that memory works during all of them.
    let passes = PANEL / (NV * HALF);
    let (step, fetched) = (tile.step.div_ceil(passes), offset / (NV * HALF) * tile.quads);
    let (flip, ones) = (x86::_mm256_set1_epi8(-128), x86::_mm256_set1_epi16(1));
    for (index, quads) in tile.ranges().enumerate() {
        // SAFETY: the caller's; prefetches may name any address.
        unsafe {
            let mut sums = [[x86::_mm256_setzero_si256(); NV]; MR];
            for quad in quads {
                let mut w = [x86::_mm256_setzero_si256(); NV];
                let next = tile.next.wrapping_add((fetched + quad) * step);
                for v in 0..NV {
                    let packed = tile.panel.add(quad * PANEL + offset + v * HALF);
                    w[v] = x86::_mm256_xor_si256(x86::_mm256_loadu_si256(packed.cast()), flip);
                    if v % 2 == 0 {
                        x86::_mm_prefetch::<{ x86::_MM_HINT_T1 }>(next.wrapping_add(v * HALF).cast());
                    }
                }
                for m in 0..MR {
                    let x = tile.a.add(m * tile.lda + 4 * quad).cast::<i32>().read_unaligned();
                    let x = x86::_mm256_set1_epi32(x);
                    for v in 0..NV {
                        let pairs = x86::_mm256_maddubs_epi16(
                            x86::_mm256_abs_epi8(w[v]),
                            x86::_mm256_sign_epi8(x, w[v]),
                        );
                        sums[m][v] = x86::_mm256_add_epi32(sums[m][v], x86::_mm256_madd_epi16(pairs, ones));
                    }
                }
            }
            for m in 0..MR {
                let scale = x86::_mm256_set1_ps((*tile.groups.add(m * tile.ldg + index)).scale);
                for v in 0..NV {
                    let at = tile.totals.add(m * PANEL + offset + v * HALF);
                    let sum = x86::_mm256_cvtepi32_ps(sums[m][v]);
                    x86::_mm256_storeu_ps(at, x86::_mm256_fmadd_ps(sum, scale, x86::_mm256_loadu_ps(at)));
                }
            }
        }
    }
}
