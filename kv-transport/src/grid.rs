//! Where cells lie in a region: planes of equally sized slots.

use std::ops::Range;

/// Most planes a grid may have.
pub const MAX_PLANES: u32 = 1 << 14;
/// Largest cell, in bytes.
pub const MAX_CELL_BYTES: u32 = 64 << 20;
/// Most cells one transfer may move.
pub const MAX_CELLS: u64 = 1 << 26;

/// The layout of cells in a region: cell (plane `p`, slot `s`) lies at `p * plane_stride + s * cell_bytes`.
///
/// Sender and receiver must agree on `planes` and `cell_bytes`; strides may differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Number of planes.
    pub planes: u32,
    /// Bytes from one plane's first cell to the next one's.
    pub plane_stride: u64,
    /// Bytes of a cell; every cell is contiguous.
    pub cell_bytes: u32,
}

impl Grid {
    /// Whether the numbers make sense at all: at least one plane and one slot, within the bounds.
    pub fn is_sane(&self) -> bool {
        (1..=MAX_PLANES).contains(&self.planes)
            && (1..=MAX_CELL_BYTES).contains(&self.cell_bytes)
            && self.plane_stride >= u64::from(self.cell_bytes)
            && self.plane_stride.checked_mul(u64::from(self.planes)).is_some()
    }

    /// Slots that fit into one plane.
    pub fn slots(&self) -> u64 {
        self.plane_stride.checked_div(u64::from(self.cell_bytes)).unwrap_or(0)
    }

    /// Byte range of a cell, or nothing when plane or slot lies outside the grid.
    pub fn cell(&self, plane: u32, slot: u32) -> Option<Range<usize>> {
        if plane >= self.planes || u64::from(slot) >= self.slots() {
            return None;
        }
        let start = u64::from(plane)
            .checked_mul(self.plane_stride)?
            .checked_add(u64::from(slot).checked_mul(u64::from(self.cell_bytes))?)?;
        let start = usize::try_from(start).ok()?;
        let end = start.checked_add(usize::try_from(self.cell_bytes).ok()?)?;
        Some(start..end)
    }

    /// Whether every cell of the given slots lies inside a region of `len` bytes.
    pub fn covers(&self, slots: &[u32], len: usize) -> bool {
        let Some(last) = slots.iter().max() else {
            return true;
        };
        self.planes
            .checked_sub(1)
            .and_then(|plane| self.cell(plane, *last))
            .is_some_and(|range| range.end <= len)
    }

    /// Cells of a transfer of `slots` slots, or nothing when that is more than a transfer may move.
    pub fn cells_of(&self, slots: usize) -> Option<usize> {
        let cells = u64::from(self.planes).checked_mul(u64::try_from(slots).ok()?)?;
        if cells > MAX_CELLS { None } else { usize::try_from(cells).ok() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_lie_where_the_formula_says_and_nowhere_else() {
        let grid = Grid { planes: 3, plane_stride: 100, cell_bytes: 30 };
        assert!(grid.is_sane());
        assert_eq!(grid.slots(), 3);
        assert_eq!(grid.cell(2, 2), Some(260..290));
        assert_eq!(grid.cell(3, 0), None);
        assert_eq!(grid.cell(0, 3), None);
        assert!(grid.covers(&[0, 2], 290));
        assert!(!grid.covers(&[0, 2], 289));
        assert!(grid.covers(&[], 0));
    }

    #[test]
    fn absurd_grids_are_not_sane() {
        for (planes, plane_stride, cell_bytes) in
            [(0, 8, 8), (1, 8, 0), (1, 7, 8), (u32::MAX, 8, 8), (2, u64::MAX, 8)]
        {
            assert!(!Grid { planes, plane_stride, cell_bytes }.is_sane());
        }
        let zero = Grid { planes: 1, plane_stride: 8, cell_bytes: 0 };
        assert_eq!(zero.cell(0, 0), None);
    }
}
