//! What the device at hand reaches, so that measurements can be put beside it.

use std::sync::Arc;

use super::driver::{Device, Event, Grid, Memory, Stream, args};
use super::gemm::{Gemms, Operands, Product, Shape};
use super::kernels::Kernels;
use crate::EngineError;
use crate::model::RandomWeights;

/// Rates that were reached.
#[derive(Debug, Clone, Copy)]
pub struct Ceilings {
    /// Product of two 8192 × 8192 matrices of random numbers, of the type that the layers are computed in; a multiply-add
    /// counts as two.
    pub flops_per_second: f64,
    /// Reading 2 GiB.
    pub bytes_per_second: f64,
}

const SIDE: usize = 8192;
const READ_BYTES: usize = 2 << 30;

pub(super) fn measure(
    device: &Arc<Device>,
    stream: &Stream,
    kernels: &Kernels,
    gemms: &mut Gemms,
    operands: Operands,
) -> Result<Ceilings, EngineError> {
    let memory = Memory::new(device, READ_BYTES, "measuring the device")?;
    let (at, count) = (memory.at, READ_BYTES / 2);
    let (state, deviation) = (1u64, RandomWeights::DEVIATION);
    kernels.random_weights.launch(
        stream,
        Grid::new((4096, 1, 1), 256),
        args![at, count, state, deviation],
    )?;

    let (out, vectors) = (memory.at, READ_BYTES / 16);
    let grid = Grid::new((device.multiprocessors as usize * 8, 1, 1), 512);
    let read = fastest(stream, || kernels.read_all.launch(stream, grid, args![out, at, vectors]))?;

    let matrix = (SIDE * SIDE * 2) as u64;
    // FP8 wants a scale per row; any do for timing.
    let ones = Memory::new(device, SIDE * 4, "measuring the device")?;
    stream.upload(ones.at, &vec![1.0f32; SIDE])?;
    let (x, scales) = (at + matrix, ones.at);
    let product = Product {
        weights: at,
        x,
        norm: (0, 0.0),
        rounded: (x, scales),
        out: at + 2 * matrix,
        bias: 0,
        scales,
    };
    let mut multiply = |wide| -> Result<f64, EngineError> {
        let shape = Shape { n: SIDE, k: SIDE, operands, bias: false, add: false, wide, gated: false };
        gemms.tune(stream, shape, &[SIDE], &product, &[at])?;
        fastest(stream, || gemms.run(stream, shape, SIDE, &product))
    };
    // The library's INT8 products end as 32-bit numbers, ours as bf16: whichever is faster.
    let seconds = match operands {
        Operands::Int8 => multiply(false)?.min(multiply(true).unwrap_or(f64::INFINITY)),
        _ => multiply(false)?,
    };
    Ok(Ceilings {
        flops_per_second: 2.0 * (SIDE as f64).powi(3) / seconds,
        bytes_per_second: READ_BYTES as f64 / read,
    })
}

/// Seconds of the fastest of ten runs.
fn fastest(stream: &Stream, mut work: impl FnMut() -> Result<(), EngineError>) -> Result<f64, EngineError> {
    let (start, end) = (Event::new(true)?, Event::new(true)?);
    let mut best = f32::INFINITY;
    for _ in 0..10 {
        start.record(stream)?;
        work()?;
        end.record(stream)?;
        end.synchronize()?;
        best = best.min(end.since(&start)?);
    }
    Ok(f64::from(best) / 1e3)
}
