//! The kernels, for the best instruction set that the CPU has.
//!
//! Activations are f32, weights bf16, sums f32 by fused multiply-add, each output summed over K from first
//! to last by one accumulator. So a sequence's numbers do not depend on what else is in the batch, on how its
//! prompt was cut, on the number of threads, or on the instruction set.

pub(crate) mod attention;
mod attention_load;
mod attention_work;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod gemm;
pub(crate) mod int8;
mod lanes;
pub(crate) mod level;
mod product;
pub(crate) mod rows;
mod tile;

use attention::{AttentionLayer, AttentionTask};
use level::Level;
use product::Product;
use rows::{NormRow, QkvRow, SwigluRow};
use tile::PanelTile;

/// One instruction set's kernels.
///
/// All are unsafe to call: the CPU must have the instructions (true for [`Kernels::up_to`] its level)
/// and the pointers in the job must be valid as its fields say.
pub(crate) struct Kernels {
    pub(crate) name: &'static str,
    /// By rows of the tile, from 1.
    pub(crate) panel: &'static [unsafe fn(&PanelTile)],
    /// By rows of the product, from 1.
    pub(crate) accumulate: &'static [unsafe fn(&Product)],
    pub(crate) attention: unsafe fn(&AttentionLayer<'_>, &AttentionTask<'_>),
    pub(crate) norm: unsafe fn(&NormRow<'_>),
    pub(crate) qkv: unsafe fn(&QkvRow<'_>),
    pub(crate) swiglu: unsafe fn(&SwigluRow),
}

macro_rules! kernels {
    ($module:ident, $name:literal, $lanes:ty, $features:literal,
     [$($panel:ident $panel_rows:literal x $vectors:literal),*], [$($accumulate:ident $rows:literal),*]) => {
        mod $module {
            use super::*;

            // Each instance is compiled for its instruction set as a whole; the generic bodies inline here.
            $(
                #[cfg_attr(target_arch = "x86_64", target_feature(enable = $features))]
                #[inline(never)]
                unsafe fn $panel(job: &PanelTile) {
                    // SAFETY: passed on to the caller.
                    unsafe { tile::panel::<$lanes, $panel_rows, $vectors>(job) }
                }
            )*
            $(
                #[cfg_attr(target_arch = "x86_64", target_feature(enable = $features))]
                #[inline(never)]
                unsafe fn $accumulate(job: &Product) {
                    // SAFETY: passed on to the caller.
                    unsafe { product::accumulate::<$lanes, $rows>(job) }
                }
            )*
            #[cfg_attr(target_arch = "x86_64", target_feature(enable = $features))]
            unsafe fn attention(layer: &AttentionLayer<'_>, task: &AttentionTask<'_>) {
                // SAFETY: passed on to the caller.
                unsafe { attention::run::<$lanes>(&KERNELS, layer, task) }
            }
            #[cfg_attr(target_arch = "x86_64", target_feature(enable = $features))]
            unsafe fn norm(row: &NormRow<'_>) {
                // SAFETY: passed on to the caller.
                unsafe { rows::norm::<$lanes>(row) }
            }
            #[cfg_attr(target_arch = "x86_64", target_feature(enable = $features))]
            unsafe fn qkv(row: &QkvRow<'_>) {
                // SAFETY: passed on to the caller.
                unsafe { rows::qkv::<$lanes>(row) }
            }
            #[cfg_attr(target_arch = "x86_64", target_feature(enable = $features))]
            unsafe fn swiglu(row: &SwigluRow) {
                // SAFETY: passed on to the caller.
                unsafe { rows::swiglu::<$lanes>(row) }
            }

            pub(super) static KERNELS: Kernels = Kernels {
                name: $name,
                panel: &[$($panel),*],
                accumulate: &[$($accumulate),*],
                attention,
                norm,
                qkv,
                swiglu,
            };
        }
    };
}

// Tiles: rows × vectors of columns.
#[cfg(target_arch = "x86_64")]
kernels!(with_avx512, "avx512", avx512::Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma", [
    panel1 1 x 2, panel2 2 x 2, panel3 3 x 2, panel4 4 x 2, panel5 5 x 2, panel6 6 x 2, panel7 7 x 2, panel8 8 x 2
], [
    accumulate1 1, accumulate2 2, accumulate3 3, accumulate4 4, accumulate5 5, accumulate6 6, accumulate7 7, accumulate8 8
]);
// One row takes the panel's lines in the order in which they lie in memory, in four chains of sums. Unpacked weights take four of
// the sixteen registers, so a sixth row would spill.
#[cfg(target_arch = "x86_64")]
kernels!(with_avx2, "avx2", avx2::Avx2, "avx2,fma", [
    panel1 1 x 2, panel2 2 x 1, panel3 3 x 1, panel4 4 x 1, panel5 5 x 1
], [
    accumulate1 1, accumulate2 2, accumulate3 3, accumulate4 4, accumulate5 5, accumulate6 6
]);
kernels!(with_nothing, "scalar", lanes::Scalar, "sse2", [panel1 1 x 1, panel2 2 x 1], [accumulate1 1, accumulate2 2]);

impl Kernels {
    /// Those of a level or below, best first.
    pub(crate) fn up_to(level: Level) -> impl Iterator<Item = &'static Kernels> {
        let all = [
            #[cfg(target_arch = "x86_64")]
            (Level::Avx512, &with_avx512::KERNELS),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, &with_avx2::KERNELS),
            (Level::Scalar, &with_nothing::KERNELS),
        ];
        all.into_iter().filter(move |(needed, _)| *needed <= level).map(|(_, kernels)| kernels)
    }

    /// The best of them.
    pub(crate) fn best(level: Level) -> &'static Kernels {
        Self::up_to(level).next().expect("plain code runs everywhere")
    }
}

#[cfg(test)]
mod tests;
