//! The inner tile in plain code: a few rows of A times a panel, sums in whole numbers.

use super::super::gemm::PANEL;

/// Rows of A times (some quads of inputs of) a packed panel, added to `sums [rows, PANEL]`.
pub(crate) struct Tile8 {
    /// Groups of four inputs.
    pub(super) quads: usize,
    /// `[rows, 4 · quads]`, rows `lda` apart.
    pub(super) a: *const i8,
    pub(super) lda: usize,
    /// `[quads, PANEL]` words of four weights, each plus 128.
    pub(super) panel: *const u32,
    /// `[rows, PANEL]`
    pub(super) sums: *mut i32,
    /// What comes next: fetched into the cache meanwhile, `step` words per quad.
    pub(super) next: *const u32,
    pub(super) step: usize,
}

/// # Safety
/// The pointers valid for those sizes.
pub(super) unsafe fn plain<const MR: usize>(tile: &Tile8) {
    for m in 0..MR {
        // SAFETY: the caller's.
        unsafe {
            let sums = std::slice::from_raw_parts_mut(tile.sums.add(m * PANEL), PANEL);
            for quad in 0..tile.quads {
                let a = tile.a.add(m * tile.lda + 4 * quad).cast::<[i8; 4]>().read_unaligned();
                let words = std::slice::from_raw_parts(tile.panel.add(quad * PANEL), PANEL);
                for (sum, word) in sums.iter_mut().zip(words) {
                    for (w, a) in word.to_le_bytes().into_iter().zip(a) {
                        *sum = sum.wrapping_add(i32::from(w) * i32::from(a));
                    }
                }
            }
        }
    }
}
