//! Many pieces of memory in one call of the copy engines.
//!
//! A kernel that copies takes multiprocessors from the step beside it; a call per piece costs the host microseconds each.

use cudarc::driver::sys;

use super::driver::{Stream, failed};
use crate::EngineError;

/// Queues copies of the `pieces` (where each begins on both sides, bytes of it).
pub(super) fn copy(
    stream: &Stream,
    to: u64,
    from: u64,
    pieces: &[(usize, usize)],
) -> Result<(), EngineError> {
    if pieces.is_empty() {
        return Ok(());
    }
    let at = |base: u64| pieces.iter().map(|&(start, _)| base + start as u64).collect::<Vec<u64>>();
    let (mut targets, mut sources) = (at(to), at(from));
    let mut sizes: Vec<usize> = pieces.iter().map(|piece| piece.1).collect();
    let nowhere = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    let mut attributes = sys::CUmemcpyAttributes {
        srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: nowhere,
        dstLocHint: nowhere,
        flags: 0,
    };
    let mut first = 0;
    // SAFETY: lists of one length; callers say where memory of both sides is. All attributes are those of the first piece.
    unsafe {
        sys::cuMemcpyBatchAsync_v2(
            targets.as_mut_ptr(),
            sources.as_mut_ptr(),
            sizes.as_mut_ptr(),
            pieces.len(),
            &mut attributes,
            &mut first,
            1,
            stream.raw,
        )
    }
    .result()
    .map_err(failed("copies of KV blocks"))
}

/// Blocks of `bytes` each as pieces; neighbours are one.
pub(super) fn pieces(blocks: &[i32], bytes: usize) -> Vec<(usize, usize)> {
    let mut sorted = blocks.to_vec();
    sorted.sort_unstable();
    let mut pieces: Vec<(usize, usize)> = Vec::new();
    for block in sorted {
        let start = block as usize * bytes;
        match pieces.last_mut() {
            Some(last) if last.0 + last.1 == start => last.1 += bytes,
            _ => pieces.push((start, bytes)),
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_piece() {
        assert_eq!(pieces(&[], 64), []);
        assert_eq!(pieces(&[7], 64), [(448, 64)]);
        assert_eq!(pieces(&[9, 3, 4, 8, 5, 0], 10), [(0, 10), (30, 30), (80, 20)]);
    }
}
