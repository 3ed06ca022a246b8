//! What these cores reach, so that measurements can be put beside it: dots of registers alone, and reads of memory.

use std::time::Instant;

use super::region::Region;
use super::simd::level::Level;
use super::team::Team;
use crate::EngineError;

/// Far beyond any cache.
const READ_BYTES: usize = 512 << 20;
const READ_PIECES: usize = 256;
/// Of [`SUMS`] dots each: some milliseconds.
const ROUNDS: usize = 400_000;
/// Enough to hide the latency of any of these, and few enough for sixteen registers.
const SUMS: usize = 12;
const RUNS: usize = 5;

/// An instruction's rate over all threads; a multiply-add counts as two operations.
#[derive(Debug, Clone, Copy)]
pub struct Peak {
    /// Which.
    pub name: &'static str,
    /// Over all threads.
    pub ops_per_second: f64,
}

/// Rounds of independent dots, and the operations of one dot.
struct Dots {
    name: &'static str,
    ops: usize,
    run: unsafe fn(usize),
}

/// Rates of the instructions of a level that products could be made of, as far as this CPU has them.
pub(super) fn peaks(team: &mut Team, level: Level) -> Vec<Peak> {
    let threads = team.threads();
    let measured = known(level).into_iter().map(|dots| {
        let seconds = fastest(|| {
            // SAFETY: the CPU has the instructions: `known` asked.
            team.run(threads * 4, &|_| unsafe { (dots.run)(ROUNDS / 4) });
        });
        let ops = (threads * ROUNDS * SUMS * dots.ops) as f64;
        Peak { name: dots.name, ops_per_second: ops / seconds }
    });
    measured.collect()
}

/// Bytes a second, read by all threads.
pub(super) fn read(team: &mut Team) -> Result<f64, EngineError> {
    let mut region = Region::new(READ_BYTES, "measuring memory")?;
    region.bytes_mut().fill(1);
    let words: &[u64] = bytemuck::cast_slice(region.bytes_mut());
    let piece = words.len() / READ_PIECES;
    let seconds = fastest(|| {
        team.run(READ_PIECES, &|i| {
            let words = &words[i * piece..][..piece];
            let sums = words.chunks_exact(8).fold([0u64; 8], |mut sums, line| {
                sums.iter_mut().zip(line).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
                sums
            });
            std::hint::black_box(sums);
        });
    });
    Ok(READ_BYTES as f64 / seconds)
}

fn fastest(mut work: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        let started = Instant::now();
        work();
        best = best.min(started.elapsed().as_secs_f64());
    }
    best
}

#[cfg(not(target_arch = "x86_64"))]
fn known(_: Level) -> Vec<Dots> {
    Vec::new()
}

#[cfg(target_arch = "x86_64")]
fn known(level: Level) -> Vec<Dots> {
    let mut all = Vec::new();
    if level >= Level::Avx512 {
        all.push(Dots { name: "f32 multiply-add, 512 bits", ops: 32, run: x86::fma512 });
        if is_x86_feature_detected!("avx512bf16") {
            all.push(Dots { name: "bf16 dot, 512 bits", ops: 64, run: x86::bf16 });
        }
        if is_x86_feature_detected!("avx512vnni") {
            all.push(Dots { name: "int8 dot, 512 bits", ops: 128, run: x86::vnni });
        }
    } else if level >= Level::Avx2 {
        all.push(Dots { name: "f32 multiply-add, 256 bits", ops: 16, run: x86::fma256 });
        all.push(Dots { name: "int8 dot, 256 bits", ops: 64, run: x86::maddubs });
    }
    all
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::SUMS;

    macro_rules! dots {
        ($name:ident, $features:literal, $zero:expr, |$sum:ident, $x:ident| $step:expr) => {
            /// # Safety
            /// The instructions.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name(rounds: usize) {
                let mut sums = [$zero; SUMS];
                let $x = black_box($zero);
                for _ in 0..rounds {
                    for $sum in &mut sums {
                        *$sum = $step;
                    }
                    // Nothing is known of them from round to round.
                    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
                }
                black_box(sums);
            }
        };
    }
    dots!(fma512, "avx512f", _mm512_setzero_ps(), |sum, x| _mm512_fmadd_ps(x, x, *sum));
    dots!(fma256, "avx2,fma", _mm256_setzero_ps(), |sum, x| _mm256_fmadd_ps(x, x, *sum));
    dots!(vnni, "avx512f,avx512vnni", _mm512_setzero_si512(), |sum, x| _mm512_dpbusd_epi32(*sum, x, x));
    // What the tile is made of: see `int8::tile_x86`. All of it depends on the sum, or it would be computed once.
    dots!(maddubs, "avx2", _mm256_setzero_si256(), |sum, x| _mm256_add_epi32(
        *sum,
        _mm256_madd_epi16(_mm256_maddubs_epi16(x, _mm256_sign_epi8(x, *sum)), x)
    ));
    dots!(bf16, "avx512f,avx512bf16", _mm512_setzero_ps(), |sum, x| {
        // SAFETY: as many bits, any of which are numbers.
        let x: __m512bh = unsafe { std::mem::transmute(x) };
        _mm512_dpbf16_ps(*sum, x, x)
    });
}
