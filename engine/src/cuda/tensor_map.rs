//! Tensor maps: how Hopper's bulk copy engine finds boxes of a matrix.

use cudarc::driver::sys;

use crate::EngineError;

/// Columns of a box: 128 bytes of bf16, the width of the swizzle.
const BOX_COLUMNS: usize = 64;

/// Boxes of 64 columns and `box_rows` rows of a bf16 matrix `[rows, columns]`; what lies outside reads as zero.
pub(super) fn of_rows(
    at: u64,
    rows: usize,
    columns: usize,
    box_rows: usize,
) -> Result<sys::CUtensorMap, EngineError> {
    if i32::try_from(rows + 1).is_err() {
        return Err(EngineError::Unsupported(format!(
            "a KV pool of {rows} rows: the copy engine's coordinates are 32-bit; use fewer blocks"
        )));
    }
    // SAFETY: a plain structure of numbers.
    let mut map: sys::CUtensorMap = unsafe { std::mem::zeroed() };
    let size = [columns as u64, rows as u64];
    let stride = [columns as u64 * 2];
    let boxes = [BOX_COLUMNS as u32, box_rows as u32];
    let steps = [1u32, 1];
    // SAFETY: the arrays have the rank's lengths; the address is that of device memory this large.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut map,
            sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            at as *mut std::ffi::c_void,
            size.as_ptr(),
            stride.as_ptr(),
            boxes.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(super::driver::failed("a tensor map"))?;
    Ok(map)
}
