//! Memory for weights: a few large regions, filled from the front.
//!
//! Most matrices of a small network are smaller than a huge page, so in a mapping each they would lie in small pages: streaming
//! them would then look up an address every 4 KiB, and the hardware's prefetch stops at each such page's end.

use std::sync::Arc;

use super::region::Region;
use crate::EngineError;

/// Of a region, unless one matrix needs more; pages that are never touched cost nothing.
const REGION_BYTES: usize = 64 << 20;
/// Where pieces begin: cache lines.
const LINE: usize = 64;

/// Hands out pieces of regions.
#[derive(Default)]
pub(crate) struct Arena {
    region: Option<Arc<Region>>,
    used: usize,
}

impl Arena {
    /// `bytes` zeroed bytes, at the beginning of a cache line.
    pub(crate) fn piece(&mut self, bytes: usize) -> Result<Piece, EngineError> {
        let at = self.used.next_multiple_of(LINE);
        let (region, at) = match &self.region {
            Some(region) if at + bytes <= region.len() => (Arc::clone(region), at),
            _ => (Arc::new(Region::new(bytes.max(REGION_BYTES), "weights")?), 0),
        };
        self.region = Some(Arc::clone(&region));
        self.used = at + bytes;
        Ok(Piece { region, at, bytes })
    }
}

/// A part of a region that nobody else was given.
pub(crate) struct Piece {
    region: Arc<Region>,
    at: usize,
    bytes: usize,
}

impl Piece {
    pub(crate) fn as_ptr(&self) -> *const u8 {
        // SAFETY: inside the region.
        unsafe { self.region.as_ptr().add(self.at) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: inside the region, which lives as long as this; pieces do not overlap, so this one's borrow is enough.
        unsafe { std::slice::from_raw_parts_mut(self.region.as_ptr().add(self.at), self.bytes) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zero_and_apart() {
        let mut arena = Arena::default();
        let sizes = [1, 64, 100, REGION_BYTES - 100, REGION_BYTES + 1, 7];
        let mut pieces: Vec<Piece> = sizes.iter().map(|&bytes| arena.piece(bytes).unwrap()).collect();
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert_eq!(piece.as_ptr() as usize % LINE, 0);
            assert_eq!(piece.bytes_mut().len(), sizes[i]);
            let ends = [0, sizes[i] - 1];
            assert!(ends.iter().all(|&at| piece.bytes_mut()[at] == 0));
            ends.iter().for_each(|&at| piece.bytes_mut()[at] = i as u8 + 1);
        }
        for (i, piece) in pieces.iter_mut().enumerate() {
            assert!([0, sizes[i] - 1].iter().all(|&at| piece.bytes_mut()[at] == i as u8 + 1));
        }
    }
}
