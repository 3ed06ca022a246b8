//! INT8 products: `out [rows, n] = (a · wᵀ) · scales of the row's groups · scale of the column`, a and w in eight bits.
//!
//! Inputs share a scale in groups of [`GROUP`]: a group's sum is a whole number, so every instruction set gets the same one
//! however it orders it; groups are then added in f32, first to last, by one multiply-add each. Kernels: VNNI (512 bits, four products an
//! instruction and lane), AVX2, plain code; chosen at run time. Bounds: a decode step reads each weight once (one byte), the bound
//! is memory; a prompt multiplies 128 numbers per cycle with VNNI on Zen 4 (two operations each), 22 with AVX2 on Zen 3 (as measured:
//! sign, two multiplies and add per 32), the bound is that rate. A group's end costs three instructions per sum, beside 32 (VNNI) or 128.

mod gemm;
mod rows;
#[cfg(test)]
mod tests;
mod tile;
#[cfg(target_arch = "x86_64")]
mod tile_x86;

use super::level::Level;
pub(crate) use gemm::{Gemm8, MOST_INPUTS, Packed8};
pub(crate) use rows::{EightRow, Finish};
pub(crate) use tile::Group;
use tile::Tile8;

/// Inputs that share a scale: an outlier costs its group precision, not its row. See bench/RESULTS-cpu.md for what other sizes cost.
pub(crate) const GROUP: usize = 128;

/// One instruction set's kernels. All are unsafe to call, as those of `super::Kernels` are.
pub(crate) struct Kernels8 {
    pub(crate) name: &'static str,
    /// By rows of the tile, from 1.
    tile: &'static [unsafe fn(&Tile8)],
    /// Rounds a row of activations.
    pub(crate) quantise: unsafe fn(&EightRow),
    finish: unsafe fn(&Finish<'_>),
}

static SCALAR: Kernels8 = Kernels8 {
    name: "scalar",
    tile: &[tile::plain::<1>, tile::plain::<2>],
    quantise: rows::quantise,
    finish: rows::finish,
};

#[cfg(target_arch = "x86_64")]
static AVX2: Kernels8 = Kernels8 {
    name: "avx2",
    tile: &[tile_x86::avx2_row, tile_x86::avx2::<2>, tile_x86::avx2::<3>, tile_x86::avx2::<4>],
    quantise: rows::quantise_avx2,
    finish: rows::finish_avx2,
};

#[cfg(target_arch = "x86_64")]
static VNNI: Kernels8 = Kernels8 {
    name: "avx512_vnni",
    tile: &[
        tile_x86::vnni::<1>,
        tile_x86::vnni::<2>,
        tile_x86::vnni::<3>,
        tile_x86::vnni::<4>,
        tile_x86::vnni::<5>,
        tile_x86::vnni::<6>,
        tile_x86::vnni::<7>,
        tile_x86::vnni::<8>,
        tile_x86::vnni::<9>,
        tile_x86::vnni::<10>,
        tile_x86::vnni::<11>,
        tile_x86::vnni::<12>,
    ],
    quantise: rows::quantise_avx512,
    finish: rows::finish_avx512,
};

impl Kernels8 {
    /// Those of a level or below that this CPU can run, best first.
    pub(crate) fn up_to(level: Level) -> Vec<&'static Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if level >= Level::Avx512 && is_x86_feature_detected!("avx512vnni") {
                found.push(&VNNI);
            }
            if level >= Level::Avx2 {
                found.push(&AVX2);
            }
        }
        found.push(&SCALAR);
        found
    }

    /// The best of them.
    pub(crate) fn best(level: Level) -> &'static Self {
        Self::up_to(level)[0]
    }
}
