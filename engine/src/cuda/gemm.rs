//! Matrix products, with what makes them chosen by measurement: cuBLASLt, kernels for few rows, kernels for many.
//!
//! The library's heuristic is up to 18 % off for the shapes of transformers, so at start-up its best candidates
//! are timed for each shape of the network at some numbers of rows; a product of any other number of rows
//! takes the algorithm of the next larger one.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::cublaslt::{result as blas, sys};

use super::blas::{Plan, WORKSPACE_BYTES, failed};
use super::driver::{Device, Event, Memory, Stream};
use super::thin::Thin;
use super::wide::Wide;
use crate::EngineError;

/// Prepared products are forgotten beyond this many: prompts come in all lengths.
const MAX_PLANS: usize = 8192;

/// A product `out[rows, n] (+)= x[rows, k] · weights[n, k]ᵀ (+ bias[n])`, everything row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) operands: Operands,
    pub(super) bias: bool,
    /// Adds to what `out` holds.
    pub(super) add: bool,
    /// `out` is f32 instead of bf16.
    pub(super) wide: bool,
    /// `out = silu(x · weightsᵀ) · (x · upᵀ)`, where `up` are the n rows after those of `weights`. Not by the library.
    pub(super) gated: bool,
}

/// How a product is made.
#[derive(Clone, Copy)]
enum Choice {
    Library(sys::cublasLtMatmulAlgo_t),
    Thin,
    /// A variant of it.
    Wide(usize),
    /// Of a gated product: the two and what joins them, one after the other.
    Apart,
}

/// What measuring found: up to that many rows.
struct Tuned {
    rows: usize,
    choice: Choice,
    ms: f32,
}

/// What a SwiGLU of its own costs: launch, and a pass over memory at what it reaches on an H100.
const SWIGLU_MS: f32 = 0.003;
const PASS_BYTES_PER_MS: f32 = 2.5e9;
/// What rounding x costs a step, and a norm before the product, neither of which thin products need.
const ROUNDING_MS: f32 = 0.002;
const NORM_MS: f32 = 0.002;

/// Types of `x` and `weights`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Operands {
    Bf16,
    /// e4m3 with one f32 scale per row of `x` and per row of `weights`.
    Fp8,
    /// INT8 with such scales. The library makes 32-bit whole numbers of it (`wide`), to be measured only.
    Int8,
}

/// Where the parts of one product lie on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    pub(super) weights: u64,
    /// bf16.
    pub(super) x: u64,
    /// RMSNorm's weights and epsilon, where it is of x / rms(x) * weights: for products that say they can.
    pub(super) norm: (u64, f32),
    /// x in the weights' eight bits, and the scales of its rows; for products that take it so.
    pub(super) rounded: (u64, u64),
    pub(super) out: u64,
    pub(super) bias: u64,
    /// One per row of `weights`; eight bits only.
    pub(super) scales: u64,
}

/// The library, its scratch, and what is known of each shape.
pub(super) struct Gemms {
    handle: sys::cublasLtHandle_t,
    workspace: Memory,
    thin: Thin,
    /// On Hopper.
    wide: Option<Wide>,
    /// Per shape, ascending.
    tuned: HashMap<Shape, Vec<Tuned>>,
    plans: HashMap<(Shape, usize), Plan>,
}

impl Gemms {
    pub(super) fn new(device: &Arc<Device>, thin: Thin, wide: Option<Wide>) -> Result<Self, EngineError> {
        let handle = blas::create_handle().map_err(failed("cuBLASLt"))?;
        let workspace = Memory::new(device, WORKSPACE_BYTES, "cuBLASLt's workspace")?;
        Ok(Self { handle, workspace, thin, wide, tuned: HashMap::new(), plans: HashMap::new() })
    }

    /// Queues one product.
    pub(super) fn run(
        &mut self,
        stream: &Stream,
        shape: Shape,
        rows: usize,
        product: &Product,
    ) -> Result<(), EngineError> {
        if rows == 0 {
            return Ok(());
        }
        let choice = self.tuned_for(shape, rows);
        if matches!(choice, Some(Choice::Thin)) {
            return self.thin.run(stream, shape, rows, product);
        }
        if let Some(wide) = self.wide.as_ref().filter(|wide| wide.can(shape)) {
            let variant =
                if let Some(Choice::Wide(known)) = choice { known } else { wide.usual(shape, rows) };
            return wide.run(stream, variant, shape, rows, product);
        }
        if self.plans.len() > MAX_PLANS {
            self.plans.clear();
        }
        if !self.plans.contains_key(&(shape, rows)) {
            let mut plan = Plan::new(shape, rows)?;
            plan.algorithm = Some(self.algorithm(&plan, shape, rows)?);
            self.plans.insert((shape, rows), plan);
        }
        self.plans[&(shape, rows)].run(self.handle, &self.workspace, stream, product)
    }

    /// Whether measuring chose to make this gated product in one.
    pub(super) fn joins(&self, shape: Shape, rows: usize) -> bool {
        !matches!(self.tuned_for(shape, rows), None | Some(Choice::Apart))
    }

    /// Whether this product takes x in eight bits.
    pub(super) fn takes_rounded(&self, shape: Shape, rows: usize) -> bool {
        shape.operands != Operands::Bf16 && !self.norms(shape, rows)
    }

    /// Whether this product takes its norm with it: a thin one, which takes x in bf16.
    pub(super) fn norms(&self, shape: Shape, rows: usize) -> bool {
        matches!(self.tuned_for(shape, rows), Some(Choice::Thin))
    }

    /// What was best for the next larger number of rows that was measured; beyond them all the last, unless that is thin.
    fn tuned_for(&self, shape: Shape, rows: usize) -> Option<Choice> {
        let known = self.tuned.get(&shape)?;
        let beyond = known.last().filter(|last| !matches!(last.choice, Choice::Thin));
        known.iter().find(|tuned| rows <= tuned.rows).or(beyond).map(|tuned| tuned.choice)
    }

    /// Times the candidates of `shape` for each of `rows` (ascending) on this product's memory. `weights` are
    /// the same matrix of all layers: taking turns keeps the second-level cache from flattering thin products.
    pub(super) fn tune(
        &mut self,
        stream: &Stream,
        shape: Shape,
        rows: &[usize],
        product: &Product,
        weights: &[u64],
    ) -> Result<(), EngineError> {
        for &rows in rows {
            let mut best: Option<Tuned> = None;
            let before = before(shape, product);
            let mut offer = |choice, ms: f32| {
                let ms = if matches!(choice, Choice::Thin) { ms } else { ms + before };
                if best.as_ref().is_none_or(|best| ms < best.ms) {
                    best = Some(Tuned { rows, choice, ms });
                }
            };
            if let Some(wide) = self.wide.as_ref().filter(|wide| wide.can(shape)) {
                for variant in wide.variants(shape) {
                    let run =
                        |weights| wide.run(stream, variant, shape, rows, &Product { weights, ..*product });
                    offer(Choice::Wide(variant), time(stream, rows, weights, run)?);
                }
            } else {
                let mut plan = Plan::new(shape, rows)?;
                for algorithm in plan.candidates(self.handle)? {
                    plan.algorithm = Some(algorithm);
                    let time = time(stream, rows, weights, |weights| {
                        plan.run(self.handle, &self.workspace, stream, &Product { weights, ..*product })
                    });
                    // A candidate may turn out not to run: the others do.
                    if let Ok(ms) = time {
                        offer(Choice::Library(algorithm), ms);
                    }
                }
            }
            if self.thin.can(shape, rows) {
                offer(Choice::Thin, self.time_thin(stream, shape, rows, product, weights)?);
            }
            if let Some(best) = best {
                let way = match best.choice {
                    Choice::Library(_) => "library",
                    Choice::Thin => "thin",
                    Choice::Wide(_) => "wide",
                    Choice::Apart => "apart",
                };
                tracing::debug!(?shape, rows, ms = best.ms, way, "product tuned");
                self.tuned.entry(shape).or_default().push(best);
            }
        }
        Ok(())
    }

    /// Takes the fused SwiGLU where it beats the two steps, whose product is `apart` and was tuned.
    pub(super) fn tune_gated(
        &mut self,
        stream: &Stream,
        shape: Shape,
        apart: Shape,
        rows: &[usize],
        product: &Product,
        weights: &[u64],
    ) -> Result<(), EngineError> {
        let eight = shape.operands != Operands::Bf16;
        for &rows in rows {
            let Some(apart) = self.tuned.get(&apart).and_then(|known| known.iter().find(|t| t.rows == rows))
            else {
                continue;
            };
            // gate and up are written and read again, what comes of them is written; eight bits are rounded on the way, which
            // wide products leave to a pass of its own.
            let numbers = (rows * shape.n) as f32;
            let swiglu = SWIGLU_MS + 6.0 * numbers / PASS_BYTES_PER_MS;
            let less = if eight { 2.0 * numbers / PASS_BYTES_PER_MS } else { swiglu };
            let mut best = Tuned { rows, choice: Choice::Apart, ms: apart.ms };
            let mut offer = |choice, ms: f32| {
                if ms < best.ms {
                    best = Tuned { rows, choice, ms };
                }
            };
            if self.thin.can(shape, rows) {
                offer(Choice::Thin, self.time_thin(stream, shape, rows, product, weights)? - swiglu);
            }
            if let Some(wide) = self.wide.as_ref().filter(|wide| wide.can(shape)) {
                let before = before(shape, product);
                for variant in wide.variants(shape) {
                    let run =
                        |weights| wide.run(stream, variant, shape, rows, &Product { weights, ..*product });
                    offer(Choice::Wide(variant), time(stream, rows, weights, run)? + before - less);
                }
            }
            self.tuned.entry(shape).or_default().push(best);
        }
        Ok(())
    }

    fn time_thin(
        &self,
        stream: &Stream,
        shape: Shape,
        rows: usize,
        product: &Product,
        weights: &[u64],
    ) -> Result<f32, EngineError> {
        time(stream, rows, weights, |weights| {
            self.thin.run(stream, shape, rows, &Product { weights, ..*product })
        })
    }

    /// The tuned algorithm for this many rows if it can do it, otherwise the library's first choice.
    fn algorithm(
        &self,
        plan: &Plan,
        shape: Shape,
        rows: usize,
    ) -> Result<sys::cublasLtMatmulAlgo_t, EngineError> {
        match self.tuned_for(shape, rows) {
            Some(Choice::Library(algorithm)) if plan.can(self.handle, &algorithm) => return Ok(algorithm),
            _ => {}
        }
        plan.candidates(self.handle)?.first().copied().ok_or_else(|| {
            EngineError::Unsupported(format!("cuBLASLt has no algorithm for {rows} rows of {shape:?}"))
        })
    }
}

impl Drop for Gemms {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: made in `new`.
        let _ = unsafe { blas::destroy_handle(self.handle) };
    }
}

// SAFETY: handles without thread affinity, used by one thread at a time.
unsafe impl Send for Gemms {}

/// Milliseconds of the kernels that a product needs before it if it is not thin.
fn before(shape: Shape, product: &Product) -> f32 {
    let rounding = if shape.operands == Operands::Bf16 { 0.0 } else { ROUNDING_MS };
    rounding + if product.norm.0 == 0 { 0.0 } else { NORM_MS }
}

/// Milliseconds of one product, the best of three rounds.
fn time(
    stream: &Stream,
    rows: usize,
    weights: &[u64],
    mut run: impl FnMut(u64) -> Result<(), EngineError>,
) -> Result<f32, EngineError> {
    let (start, end) = (Event::new(true)?, Event::new(true)?);
    // Large products use every byte many times.
    let turns = if rows >= 256 { 1 } else { weights.len().clamp(1, 4) };
    let mut best = f32::INFINITY;
    for round in 0..4 {
        start.record(stream)?;
        weights[..turns].iter().try_for_each(|&weights| run(weights))?;
        end.record(stream)?;
        end.synchronize()?;
        if round > 0 {
            best = best.min(end.since(&start)? / turns as f32);
        }
    }
    Ok(best)
}

#[cfg(test)]
#[path = "gemm_tests.rs"]
mod tests;
