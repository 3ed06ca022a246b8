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
}

impl Thin {
    pub(super) fn new(module: &Arc<Module>) -> Result<Self, EngineError> {
        let all = |name: &str| -> Result<Vec<Kernel>, EngineError> {
            TILES.iter().map(|tiles| module.kernel(&format!("{name}_{tiles}"))).collect()
        };
        Ok(Self { plain: all("thin")?, wide: all("thin_wide")?, gated: all("thin_gated")? })
    }

    /// Whether there is a kernel for this.
    pub(super) fn can(&self, shape: Shape, rows: usize) -> bool {
        let adds_wide = shape.wide && shape.add;
        shape.operands == Operands::Bf16 && rows <= MOST && shape.k.is_multiple_of(STEP) && !adds_wide
    }

    pub(super) fn run(
        &self,
        stream: &Stream,
        shape: Shape,
        rows: usize,
        product: &Product,
    ) -> Result<(), EngineError> {
        let variant = TILES.iter().position(|tiles| rows <= tiles * 8).unwrap_or(TILES.len() - 1);
        let kernels = match (shape.gated, shape.wide) {
            (true, _) => &self.gated,
            (false, true) => &self.wide,
            (false, false) => &self.plain,
        };
        let Product { weights, x, out, bias, .. } = *product;
        let (rows, n, k, add) = (rows as i32, shape.n as i32, shape.k as i32, i32::from(shape.add));
        let grid = Grid::new((shape.n.div_ceil(ROWS), 1, 1), 256);
        kernels[variant].launch_chained(stream, grid, args![out, x, weights, bias, rows, n, k, add])
    }
}
