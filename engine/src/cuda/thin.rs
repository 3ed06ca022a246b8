//! Products with few rows: kernels that read the weights once, at the memory's speed.

use std::sync::Arc;

use super::driver::{Device, Grid, Kernel, Module, Stream, args};
use super::gemm::{Operands, Product, Shape};
use crate::EngineError;

/// Weights' rows of a tile, of tall ones twice as many; k advances in these steps.
const ROWS: usize = 16;
const STEP: usize = 64;
/// Rows of x that a variant takes, in eights.
const TILES: [usize; 3] = [1, 2, 4];
/// Blocks that a multiprocessor takes.
const BLOCKS: usize = 2;
/// Most rows of x.
pub(super) const MOST: usize = 32;

/// One variant per number of rows.
pub(super) struct Thin {
    /// Of each type of weights, plain and gated.
    bf16: [Vec<Kernel>; 2],
    int8: [Vec<Kernel>; 2],
    fp8: [Vec<Kernel>; 2],
    /// Results in f32.
    wide: Vec<Kernel>,
    /// Blocks that are on the device at once.
    most_blocks: usize,
}

impl Thin {
    pub(super) fn new(device: &Device, module: &Arc<Module>) -> Result<Self, EngineError> {
        let of = |name: &str| -> Result<Vec<Kernel>, EngineError> {
            TILES.iter().map(|tiles| module.kernel(&format!("{name}_{tiles}"))).collect()
        };
        let both = |name: &str| -> Result<[Vec<Kernel>; 2], EngineError> {
            Ok([of(name)?, of(&format!("{name}_gated"))?])
        };
        Ok(Self {
            bf16: both("thin_bf16")?,
            int8: both("thin_int8")?,
            fp8: both("thin_fp8")?,
            wide: of("thin_bf16_wide")?,
            most_blocks: BLOCKS * device.multiprocessors as usize,
        })
    }

    /// Whether there is a kernel for this.
    pub(super) fn can(&self, shape: Shape, rows: usize) -> bool {
        // f32 results are of bf16 weights, and not added to others.
        let wide = shape.wide && (shape.add || shape.operands != Operands::Bf16);
        rows <= MOST && shape.k.is_multiple_of(STEP) && !wide
    }

    pub(super) fn run(
        &self,
        stream: &Stream,
        shape: Shape,
        rows: usize,
        product: &Product,
    ) -> Result<(), EngineError> {
        let variant = TILES.iter().position(|tiles| rows <= tiles * 8).unwrap_or(TILES.len() - 1);
        let kernels = match (shape.operands, shape.wide) {
            (Operands::Bf16, true) => &self.wide,
            (Operands::Bf16, false) => &self.bf16[usize::from(shape.gated)],
            (Operands::Int8, _) => &self.int8[usize::from(shape.gated)],
            (Operands::Fp8, _) => &self.fp8[usize::from(shape.gated)],
        };
        let Product { weights, x, norm: (norm, eps), out, bias, scales, .. } = *product;
        let eight = shape.operands != Operands::Bf16;
        let tall = !shape.gated && (variant == 1 || (variant == 2 && eight));
        let tiles = shape.n.div_ceil(if tall { 2 * ROWS } else { ROWS });
        // Each block takes as many as any other, or one less.
        let blocks = tiles.div_ceil(tiles.div_ceil(self.most_blocks));
        let (rows, n, k, add) = (rows as i32, shape.n as i32, shape.k as i32, i32::from(shape.add));
        kernels[variant].launch_chained(
            stream,
            Grid::new((blocks, 1, 1), 256),
            args![out, x, weights, scales, bias, norm, eps, rows, n, k, add],
        )
    }
}
