//! Matrix products through cuBLASLt, with algorithms chosen by measurement.
//!
//! The library's heuristic is up to 18 % off for the shapes of transformers, so at start-up its best candidates
//! are timed for each shape of the network at some numbers of rows; a product of any other number of rows
//! takes the algorithm of the next larger one.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use cudarc::cublaslt::{result as blas, sys};

use super::driver::{Device, Event, Memory, Stream};
use super::thin::Thin;
use super::wide::Wide;
use crate::EngineError;

/// What NVIDIA advises for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
const CANDIDATES: usize = 8;
/// `CUBLAS_OP_T`, which the bindings of cuBLASLt leave out.
const TRANSPOSED: i32 = 1;
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
    /// `out = silu(x · weightsᵀ) · (x · upᵀ)`, where `up` are the n rows after those of `weights`. Thin only.
    pub(super) gated: bool,
}

/// How a product is made.
#[derive(Clone, Copy)]
enum Choice {
    Library(sys::cublasLtMatmulAlgo_t),
    Thin,
    /// A variant of it.
    Wide(usize),
}

/// What measuring found: up to that many rows.
struct Tuned {
    rows: usize,
    choice: Choice,
    ms: f32,
}

/// What a SwiGLU of its own costs a thin step: launch and a pass over little memory, as seen on an H100.
const SWIGLU_MS: f32 = 0.003;
/// What rounding x costs a step, which thin products do not need.
const ROUNDING_MS: f32 = 0.002;

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
            let variant = if let Some(Choice::Wide(known)) = choice { known } else { wide.usual(rows) };
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

    /// Whether measuring chose a way for this.
    pub(super) fn knows(&self, shape: Shape, rows: usize) -> bool {
        self.tuned_for(shape, rows).is_some()
    }

    /// Whether this product takes x in eight bits.
    pub(super) fn takes_rounded(&self, shape: Shape, rows: usize) -> bool {
        shape.operands != Operands::Bf16 && !matches!(self.tuned_for(shape, rows), Some(Choice::Thin))
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
            let rounding = if shape.operands == Operands::Bf16 { 0.0 } else { ROUNDING_MS };
            let mut offer = |choice, ms: f32| {
                let ms = if matches!(choice, Choice::Thin) { ms } else { ms + rounding };
                if best.as_ref().is_none_or(|best| ms < best.ms) {
                    best = Some(Tuned { rows, choice, ms });
                }
            };
            if let Some(wide) = self.wide.as_ref().filter(|wide| wide.can(shape)) {
                for variant in wide.variants() {
                    let run =
                        |weights| wide.run(stream, variant, shape, rows, &Product { weights, ..*product });
                    offer(Choice::Wide(variant), time(stream, rows, weights, run)?);
                }
            } else {
                let mut plan = Plan::new(shape, rows)?;
                for algorithm in self.candidates(&plan)? {
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
                };
                tracing::debug!(?shape, rows, ms = best.ms, way, "product tuned");
                self.tuned.entry(shape).or_default().push(best);
            }
        }
        Ok(())
    }

    /// Takes the fused SwiGLU for as many rows as it beats the two steps, whose product is `apart`.
    pub(super) fn tune_gated(
        &mut self,
        stream: &Stream,
        shape: Shape,
        apart: Shape,
        rows: &[usize],
        product: &Product,
        weights: &[u64],
    ) -> Result<(), EngineError> {
        for &rows in rows.iter().filter(|&&rows| self.thin.can(shape, rows)) {
            let ms = self.time_thin(stream, shape, rows, product, weights)?;
            let apart =
                self.tuned.get(&apart).and_then(|known| known.iter().find(|tuned| tuned.rows == rows));
            if apart.is_some_and(|apart| apart.ms + SWIGLU_MS < ms) {
                break;
            }
            self.tuned.entry(shape).or_default().push(Tuned { rows, choice: Choice::Thin, ms });
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
        self.candidates(plan)?.first().copied().ok_or_else(|| {
            EngineError::Unsupported(format!("cuBLASLt has no algorithm for {rows} rows of {shape:?}"))
        })
    }

    fn candidates(&self, plan: &Plan) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, EngineError> {
        let preference = blas::create_matmul_pref().map_err(failed("a preference"))?;
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        // SAFETY: a plain structure of numbers, for which zero is a value.
        let mut results: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] = unsafe { std::mem::zeroed() };
        let mut found = 0;
        // SAFETY: live descriptors, and room for the answers.
        let status = unsafe {
            let bytes = WORKSPACE_BYTES;
            let _ = blas::set_matmul_pref_attribute(preference, attribute, ptr::from_ref(&bytes).cast(), 8);
            let status = sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                plan.operation,
                plan.a,
                plan.b,
                plan.d,
                plan.d,
                preference,
                CANDIDATES as i32,
                results.as_mut_ptr(),
                &mut found,
            );
            let _ = blas::destroy_matmul_pref(preference);
            status
        };
        status.result().map_err(failed("choosing an algorithm"))?;
        let usable = |r: &&sys::cublasLtMatmulHeuristicResult_t| r.state.result().is_ok();
        Ok(results[..found.max(0) as usize].iter().filter(usable).map(|r| r.algo).collect())
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

/// A prepared product.
///
/// The library thinks in columns: its A is the weights (k × n, transposed), B is x (k × rows), D is out (n × rows).
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
    algorithm: Option<sys::cublasLtMatmulAlgo_t>,
    shape: Shape,
}

impl Plan {
    fn new(shape: Shape, rows: usize) -> Result<Self, EngineError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cudaDataType_t as Type;
        let operand = match shape.operands {
            Operands::Bf16 => Type::CUDA_R_16BF,
            Operands::Fp8 => Type::CUDA_R_8F_E4M3,
            Operands::Int8 => Type::CUDA_R_8I,
        };
        let out = if shape.wide { Type::CUDA_R_32F } else { Type::CUDA_R_16BF };
        let (compute, numbers, out) = match shape.operands {
            Operands::Int8 => {
                (sys::cublasComputeType_t::CUBLAS_COMPUTE_32I, Type::CUDA_R_32I, Type::CUDA_R_32I)
            }
            _ => (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, Type::CUDA_R_32F, out),
        };
        let (n, k, rows) = (shape.n as u64, shape.k as u64, rows as u64);
        let layout = |kind, rows: u64, columns| {
            blas::create_matrix_layout(kind, rows, columns, rows as i64).map_err(failed("a layout"))
        };
        let plan = Self {
            operation: blas::create_matmul_desc(compute, numbers).map_err(failed("a product"))?,
            a: layout(operand, k, n)?,
            b: layout(operand, k, rows)?,
            d: layout(out, n, rows)?,
            algorithm: None,
            shape,
        };
        plan.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if shape.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &Type::CUDA_R_16BF)?;
        }
        if shape.operands == Operands::Fp8 {
            let mode = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode)?;
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode)?;
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_FAST_ACCUM, &1i8)?;
            // The heuristic refuses a product without scales; `run` sets the real ones.
            let somewhere = 256u64;
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &somewhere)?;
            plan.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &somewhere)?;
        }
        Ok(plan)
    }

    fn set<T>(&self, which: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), EngineError> {
        // SAFETY: a live descriptor and a value of the attribute's type.
        unsafe {
            blas::set_matmul_desc_attribute(
                self.operation,
                which,
                ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        }
        .map_err(failed("a product's attribute"))
    }

    fn can(&self, handle: sys::cublasLtHandle_t, algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
        // SAFETY: a plain structure of numbers; live descriptors.
        unsafe {
            let mut answer: sys::cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
            let status = sys::cublasLtMatmulAlgoCheck(
                handle,
                self.operation,
                self.a,
                self.b,
                self.d,
                self.d,
                algorithm,
                &mut answer,
            );
            status.result().is_ok() && answer.workspaceSize <= WORKSPACE_BYTES
        }
    }

    fn run(
        &self,
        handle: sys::cublasLtHandle_t,
        workspace: &Memory,
        stream: &Stream,
        product: &Product,
    ) -> Result<(), EngineError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        if self.shape.bias {
            self.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &product.bias)?;
        }
        if self.shape.operands == Operands::Fp8 {
            self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &product.scales)?;
            self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &product.rounded.1)?;
        }
        let (alpha, beta) = match (self.shape.operands, self.shape.add) {
            (Operands::Int8, add) => (1, u32::from(add)),
            (_, true) => (1.0f32.to_bits(), 1.0f32.to_bits()),
            (_, false) => (1.0f32.to_bits(), 0),
        };
        let x = if self.shape.operands == Operands::Bf16 { product.x } else { product.rounded.0 };
        let algorithm = self.algorithm.as_ref().map_or(ptr::null(), ptr::from_ref);
        // SAFETY: the descriptors say how large the matrices are; the engine's buffers are that large.
        unsafe {
            blas::matmul(
                handle,
                self.operation,
                ptr::from_ref(&alpha).cast(),
                ptr::from_ref(&beta).cast(),
                product.weights as *const c_void,
                self.a,
                x as *const c_void,
                self.b,
                product.out as *const c_void,
                self.d,
                product.out as *mut c_void,
                self.d,
                algorithm,
                workspace.at as *mut c_void,
                WORKSPACE_BYTES,
                stream.raw.cast(),
            )
        }
        .map_err(|e| EngineError::Device(format!("product {:?}: {e:?}", self.shape)))
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `new`.
        unsafe {
            let _ = blas::destroy_matmul_desc(self.operation);
            let _ = blas::destroy_matrix_layout(self.a);
            let _ = blas::destroy_matrix_layout(self.b);
            let _ = blas::destroy_matrix_layout(self.d);
        }
    }
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

fn failed(what: &str) -> impl Fn(blas::CublasError) -> EngineError {
    move |error| EngineError::Device(format!("{what}: {error:?}"))
}
