//! INT8 products with many rows on Hopper: results leave the tensor cores as bf16, scaled.

use std::sync::Arc;

use super::driver::{Device, Grid, Kernel, Module, Stream, args};
use super::gemm::{Operands, Product, Shape};
use super::tensor_map;
use crate::EngineError;

/// Rows and depth of a tile.
const ROWS: usize = 128;
const DEPTH: usize = 128;
/// Columns of a tile, and stages of tiles on their way.
const VARIANTS: [(usize, usize); 3] = [(64, 8), (128, 6), (256, 4)];

/// One kernel per width of tiles.
pub(super) struct Wide {
    kernels: Vec<Kernel>,
    multiprocessors: usize,
}

impl Wide {
    pub(super) fn new(device: &Device, module: &Arc<Module>) -> Result<Self, EngineError> {
        let kernels = VARIANTS.iter().map(|(columns, stages)| {
            let kernel = module.kernel(&format!("wide8_{columns}"))?;
            kernel.allow_shared(shared_bytes(*columns, *stages))?;
            Ok(kernel)
        });
        let kernels = kernels.collect::<Result<_, EngineError>>()?;
        Ok(Self { kernels, multiprocessors: device.multiprocessors as usize })
    }

    /// Whether there are kernels for this.
    pub(super) fn can(&self, shape: Shape) -> bool {
        shape.operands == Operands::Int8 && !shape.wide && !shape.gated && shape.k.is_multiple_of(16)
    }

    /// The variants, to choose among by measuring.
    pub(super) fn variants(&self) -> std::ops::Range<usize> {
        0..self.kernels.len()
    }

    /// What to take unmeasured.
    pub(super) fn usual(&self, rows: usize) -> usize {
        if rows <= ROWS { 0 } else { self.kernels.len() - 1 }
    }

    pub(super) fn run(
        &self,
        stream: &Stream,
        variant: usize,
        shape: Shape,
        rows: usize,
        product: &Product,
    ) -> Result<(), EngineError> {
        let (columns, stages) = VARIANTS[variant];
        let Product { weights, rounded: (x, row_scales), out, bias, scales, .. } = *product;
        // The maps count in pairs of numbers.
        let x_map = tensor_map::of_rows(x, rows, shape.k / 2, ROWS)?;
        let w_map = tensor_map::of_rows(weights, shape.n, shape.k / 2, columns)?;
        let tiles = rows.div_ceil(ROWS) * shape.n.div_ceil(columns);
        let (rows, n, k, add) = (rows as i32, shape.n as i32, shape.k as i32, i32::from(shape.add));
        let mut grid = Grid::new((tiles.min(self.multiprocessors), 1, 1), 384);
        grid.shared = shared_bytes(columns, stages) as u32;
        let kernel = &self.kernels[variant];
        kernel.launch_chained(
            stream,
            grid,
            args![x_map, w_map, out, row_scales, scales, bias, rows, n, k, add],
        )
    }
}

/// `Shared<N, STAGES>` of the kernel, and room to align it.
fn shared_bytes(columns: usize, stages: usize) -> usize {
    stages * (ROWS + columns) * DEPTH + 2 * stages * 8 + 1024
}
