//! Products by cuBLASLt.

use std::ffi::c_void;
use std::ptr;

use cudarc::cublaslt::{result as blas, sys};

use super::driver::{Memory, Stream};
use super::gemm::{Operands, Product, Shape};
use crate::EngineError;

/// What NVIDIA advises for Hopper.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;
const CANDIDATES: usize = 8;
/// `CUBLAS_OP_T`, which the bindings of cuBLASLt leave out.
const TRANSPOSED: i32 = 1;

/// A prepared product.
///
/// The library thinks in columns: its A is the weights (k × n, transposed), B is x (k × rows), D is out (n × rows).
pub(super) struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    d: sys::cublasLtMatrixLayout_t,
    pub(super) algorithm: Option<sys::cublasLtMatmulAlgo_t>,
    shape: Shape,
}

impl Plan {
    pub(super) fn new(shape: Shape, rows: usize) -> Result<Self, EngineError> {
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

    /// The library's best guesses.
    pub(super) fn candidates(
        &self,
        handle: sys::cublasLtHandle_t,
    ) -> Result<Vec<sys::cublasLtMatmulAlgo_t>, EngineError> {
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
                handle,
                self.operation,
                self.a,
                self.b,
                self.d,
                self.d,
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

    /// Whether an algorithm that was measured with other rows does for this.
    pub(super) fn can(&self, handle: sys::cublasLtHandle_t, algorithm: &sys::cublasLtMatmulAlgo_t) -> bool {
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

    pub(super) fn run(
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

pub(super) fn failed(what: &str) -> impl Fn(blas::CublasError) -> EngineError {
    move |error| EngineError::Device(format!("{what}: {error:?}"))
}
