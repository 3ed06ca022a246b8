//! Products with many rows on Hopper, by kernels of our own: in INT8, whose results the library would write in 32 bits, and gate
//! and up of an MLP in one with SwiGLU, which it cannot.

use std::sync::Arc;

use super::driver::{Device, Grid, Kernel, Module, Stream, args};
use super::gemm::{Operands, Product, Shape};
use super::tensor_map;
use crate::EngineError;

/// Rows of a tile, and bytes of k that are brought at once.
const ROWS: usize = 128;
const DEPTH: usize = 128;
/// Rows that a warp group stores.
const GROUP_ROWS: usize = 64;

/// A tile of weights, and how many are on their way.
#[derive(Clone, Copy)]
struct Tile {
    columns: usize,
    stages: usize,
}

const PLAIN: [Tile; 3] =
    [Tile { columns: 64, stages: 7 }, Tile { columns: 128, stages: 5 }, Tile { columns: 256, stages: 3 }];
/// Half of it gate, half up.
const GATED: Tile = Tile { columns: 256, stages: 4 };

pub(super) struct Wide {
    /// INT8, one per width of tiles.
    plain: Vec<Kernel>,
    int8: Kernel,
    fp8: Kernel,
    bf16: Kernel,
    multiprocessors: usize,
}

impl Wide {
    pub(super) fn new(device: &Device, module: &Arc<Module>) -> Result<Self, EngineError> {
        let kernel = |name: String, tile: Tile, width| {
            let kernel = module.kernel(&name)?;
            kernel.allow_shared(shared_bytes(tile, width))?;
            Ok::<_, EngineError>(kernel)
        };
        let gated = |kind| kernel(format!("gated_{kind}_{}", GATED.columns), GATED, GATED.columns / 2);
        let plain =
            PLAIN.iter().map(|&tile| kernel(format!("wide_int8_{}", tile.columns), tile, tile.columns));
        Ok(Self {
            plain: plain.collect::<Result<_, _>>()?,
            int8: gated("int8")?,
            fp8: gated("fp8")?,
            bf16: gated("bf16")?,
            multiprocessors: device.multiprocessors as usize,
        })
    }

    /// Whether there are kernels for this.
    pub(super) fn can(&self, shape: Shape) -> bool {
        let known = if shape.gated { !shape.bias && !shape.add } else { shape.operands == Operands::Int8 };
        // The copy engine's rows begin at multiples of 16 bytes.
        known && !shape.wide && shape.n.is_multiple_of(8) && row_bytes(shape).is_multiple_of(16)
    }

    /// The variants, to choose among by measuring.
    pub(super) fn variants(&self, shape: Shape) -> std::ops::Range<usize> {
        0..if shape.gated { 1 } else { PLAIN.len() }
    }

    /// What to take unmeasured.
    pub(super) fn usual(&self, shape: Shape, rows: usize) -> usize {
        if rows <= ROWS { 0 } else { self.variants(shape).end - 1 }
    }

    pub(super) fn run(
        &self,
        stream: &Stream,
        variant: usize,
        shape: Shape,
        rows: usize,
        product: &Product,
    ) -> Result<(), EngineError> {
        let (kernel, tile) = match (shape.gated, shape.operands) {
            (false, _) => (&self.plain[variant], PLAIN[variant]),
            (true, Operands::Int8) => (&self.int8, GATED),
            (true, Operands::Fp8) => (&self.fp8, GATED),
            (true, Operands::Bf16) => (&self.bf16, GATED),
        };
        // Columns of `out` in a tile are rows of one box of weights.
        let width = if shape.gated { tile.columns / 2 } else { tile.columns };
        let bytes = row_bytes(shape);
        let Product { weights, rounded: (rounded, row_scales), out, bias, scales, .. } = *product;
        let x = if shape.operands == Operands::Bf16 { product.x } else { rounded };
        // The maps count in pairs of bytes.
        let matrix_rows = if shape.gated { 2 * shape.n } else { shape.n };
        let x_map = tensor_map::of_rows(x, rows, bytes / 2, ROWS)?;
        let w_map = tensor_map::of_rows(weights, matrix_rows, bytes / 2, width)?;
        let load_map = tensor_map::of_rows(out, rows, shape.n, ROWS)?;
        let store_map = tensor_map::of_rows(out, rows, shape.n, GROUP_ROWS)?;
        let tiles = rows.div_ceil(ROWS) * shape.n.div_ceil(width);
        let (rows, n, bytes, add) = (rows as i32, shape.n as i32, bytes as i32, i32::from(shape.add));
        let fills = i32::from(tiles >= self.multiprocessors);
        let mut grid = Grid::new((tiles.min(self.multiprocessors), 1, 1), 384);
        grid.shared = shared_bytes(tile, width) as u32;
        kernel.launch_chained(
            stream,
            grid,
            args![x_map, w_map, load_map, store_map, row_scales, scales, bias, rows, n, bytes, add, fills],
        )
    }
}

fn row_bytes(shape: Shape) -> usize {
    shape.k * if shape.operands == Operands::Bf16 { 2 } else { 1 }
}

/// `Shared` of the kernel whose tiles are `width` columns of `out`, and room to align it.
fn shared_bytes(tile: Tile, width: usize) -> usize {
    tile.stages * (ROWS + tile.columns) * DEPTH + 2 * ROWS * width + (2 * tile.stages + 2) * 8 + 1024
}
