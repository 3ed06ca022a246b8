//! The kernels, for the best instruction set that the CPU has.
//!
//! Activations are f32, weights bf16, sums f32 by fused multiply-add, each output summed over K from first
//! to last by one accumulator. So a sequence's numbers do not depend on what else is in the batch, on how its
//! prompt was cut, on the number of threads, or on the instruction set.

pub(crate) mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod gemm;
mod lanes;
pub(crate) mod rows;
mod tile;

use std::ops::Range;

use attention::{AttentionLayer, AttentionTask};
use gemm::Gemm;
use rows::{NormRow, QkvRow, SwigluRow};

/// One instruction set's kernels.
///
/// All are unsafe to call: the CPU must have the instructions (true for what [`Kernels::supported`] returns)
/// and the pointers in the job must be valid as its fields say.
pub(crate) struct Kernels {
    pub(crate) name: &'static str,
    /// Rows × panels of a matrix product.
    pub(crate) gemm: unsafe fn(&Gemm<'_>, Range<usize>, Range<usize>),
    pub(crate) attention: unsafe fn(&AttentionLayer<'_>, &AttentionTask<'_>),
    pub(crate) norm: unsafe fn(&NormRow<'_>),
    pub(crate) qkv: unsafe fn(&QkvRow<'_>),
    pub(crate) swiglu: unsafe fn(&SwigluRow),
}

macro_rules! kernels {
    ($module:ident, $name:literal, $lanes:ty, $(#[$feature:meta])*) => {
        mod $module {
            use super::*;

            // Each instance is compiled for its instruction set as a whole; the generic bodies inline here.
            // SAFETY (of calling): see `Kernels`.
            $(#[$feature])*
            unsafe fn gemm(job: &Gemm<'_>, rows: Range<usize>, panels: Range<usize>) {
                // SAFETY: passed on to the caller.
                unsafe { gemm::run::<$lanes>(job, rows, panels) }
            }
            $(#[$feature])*
            unsafe fn attention(layer: &AttentionLayer<'_>, task: &AttentionTask<'_>) {
                // SAFETY: passed on to the caller.
                unsafe { attention::run::<$lanes>(layer, task) }
            }
            $(#[$feature])*
            unsafe fn norm(row: &NormRow<'_>) {
                // SAFETY: passed on to the caller.
                unsafe { rows::norm::<$lanes>(row) }
            }
            $(#[$feature])*
            unsafe fn qkv(row: &QkvRow<'_>) {
                // SAFETY: passed on to the caller.
                unsafe { rows::qkv::<$lanes>(row) }
            }
            $(#[$feature])*
            unsafe fn swiglu(row: &SwigluRow) {
                // SAFETY: passed on to the caller.
                unsafe { rows::swiglu::<$lanes>(row) }
            }

            pub(super) static KERNELS: Kernels = Kernels { name: $name, gemm, attention, norm, qkv, swiglu };
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernels!(with_avx512, "avx512", avx512::Avx512, #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]);
#[cfg(target_arch = "x86_64")]
kernels!(with_avx2, "avx2", avx2::Avx2, #[target_feature(enable = "avx2,fma")]);
kernels!(with_nothing, "scalar", lanes::Scalar,);

impl Kernels {
    /// What this CPU can run, best first.
    pub(crate) fn supported() -> Vec<&'static Kernels> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 {
                found.push(&with_avx512::KERNELS);
            }
            if avx2 {
                found.push(&with_avx2::KERNELS);
            }
        }
        found.push(&with_nothing::KERNELS);
        found
    }

    /// The best of them.
    pub(crate) fn best() -> &'static Kernels {
        Self::supported()[0]
    }
}

#[cfg(test)]
mod tests;
