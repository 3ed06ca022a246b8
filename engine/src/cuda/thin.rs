//! Products with few rows: kernels that read the weights once, at the memory's speed.

use std::sync::Arc;

use super::driver::{Grid, Kernel, Module, Stream, args};
use super::gemm::{Operands, Product, Shape};
use crate::EngineError;

/// Weights' rows of one block; k advances in these steps.
const ROWS: usize = 16;
const STEP: usize = 64;
/// Rows of x that a variant takes, in eights.
const TILES: [usize; 3] = [1, 2, 4];
/// Most rows of x.
pub(super) const MOST: usize = 32;

/// One variant per number of rows.
pub(super) struct Thin {
    plain: Vec<Kernel>,
    wide: Vec<Kernel>,
    gated: Vec<Kernel>,
    /// Weights of eight bits, plain and gated.
    int8: [Vec<Kernel>; 2],
    fp8: [Vec<Kernel>; 2],
}

impl Thin {
    pub(super) fn new(module: &Arc<Module>, module8: &Arc<Module>) -> Result<Self, EngineError> {
        let of = |module: &Arc<Module>, name: &str| -> Result<Vec<Kernel>, EngineError> {
            TILES.iter().map(|tiles| module.kernel(&format!("{name}_{tiles}"))).collect()
        };
        let both = |name: &str| -> Result<[Vec<Kernel>; 2], EngineError> {
            Ok([of(module8, name)?, of(module8, &format!("{name}_gated"))?])
        };
        Ok(Self {
            plain: of(module, "thin")?,
            wide: of(module, "thin_wide")?,
            gated: of(module, "thin_gated")?,
            int8: both("thin_int8")?,
            fp8: both("thin_fp8")?,
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
        let kernels = match (shape.operands, shape.gated, shape.wide) {
            (Operands::Bf16, true, _) => &self.gated,
            (Operands::Bf16, false, true) => &self.wide,
            (Operands::Bf16, false, false) => &self.plain,
            (Operands::Int8, gated, _) => &self.int8[usize::from(gated)],
            (Operands::Fp8, gated, _) => &self.fp8[usize::from(gated)],
        };
        let Product { weights, x, out, bias, scales, .. } = *product;
        let eight = shape.operands != Operands::Bf16;
        let tall = eight && variant > 0 && !shape.gated;
        let blocks = shape.n.div_ceil(if tall { 2 * ROWS } else { ROWS });
        let (rows, n, k, add) = (rows as i32, shape.n as i32, shape.k as i32, i32::from(shape.add));
        let (kernel, grid) = (&kernels[variant], Grid::new((blocks, 1, 1), 256));
        if eight {
            return kernel.launch_chained(
                stream,
                grid,
                args![out, x, weights, scales, bias, rows, n, k, add],
            );
        }
        kernel.launch_chained(stream, grid, args![out, x, weights, bias, rows, n, k, add])
    }
}
