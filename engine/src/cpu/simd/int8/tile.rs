//! The inner tile in plain code: a few rows of A times a panel, whole numbers within a group, f32 over groups.

use super::super::gemm::PANEL;

/// What a group of a row's numbers shares.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub(crate) struct Group {
    pub(crate) scale: f32,
    /// Of its numbers: what weights that are 128 too large add too much, over 128.
    pub(crate) sum: i32,
}

/// Rows of A times (some quads of inputs of) a packed panel, added to `totals [rows, PANEL]`.
pub(crate) struct Tile8 {
    /// Groups of four inputs.
    pub(super) quads: usize,
    /// Of them share a scale, from the first on; fewer in the last group.
    pub(super) group: usize,
    /// `[rows, 4 · quads]`, rows `lda` apart.
    pub(super) a: *const i8,
    pub(super) lda: usize,
    /// `[rows, quads / group]`, rows `ldg` apart.
    pub(super) groups: *const Group,
    pub(super) ldg: usize,
    /// `[quads, PANEL]` words of four weights, each plus 128.
    pub(super) panel: *const u32,
    /// `[rows, PANEL]`
    pub(super) totals: *mut f32,
    /// What comes next: fetched into the cache meanwhile, `step` words per quad.
    pub(super) next: *const u32,
    pub(super) step: usize,
}

impl Tile8 {
    /// The groups' quads.
    #[inline(always)]
    pub(super) fn ranges(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let (quads, group) = (self.quads, self.group);
        (0..quads.div_ceil(group)).map(move |i| i * group..quads.min((i + 1) * group))
    }
}

/// # Safety
/// The pointers valid for those sizes.
pub(super) unsafe fn plain<const MR: usize>(tile: &Tile8) {
    for m in 0..MR {
        // SAFETY: the caller's.
        unsafe {
            let totals = std::slice::from_raw_parts_mut(tile.totals.add(m * PANEL), PANEL);
            for (index, quads) in tile.ranges().enumerate() {
                let group = *tile.groups.add(m * tile.ldg + index);
                let mut sums = [group.sum.wrapping_mul(-128); PANEL];
                for quad in quads {
                    let a = tile.a.add(m * tile.lda + 4 * quad).cast::<[i8; 4]>().read_unaligned();
                    let words = std::slice::from_raw_parts(tile.panel.add(quad * PANEL), PANEL);
                    for (sum, word) in sums.iter_mut().zip(words) {
                        for (w, a) in word.to_le_bytes().into_iter().zip(a) {
                            *sum = sum.wrapping_add(i32::from(w) * i32::from(a));
                        }
                    }
                }
                for (total, sum) in totals.iter_mut().zip(sums) {
                    *total = (sum as f32).mul_add(group.scale, *total);
                }
            }
        }
    }
}
