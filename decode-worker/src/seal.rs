//! Landed KV stays sealed until its first step: the checksums that its producer made are compared once more with what
//! lies in the pool where steps read it. A pool on a device makes them there; in host memory they are made here, a bounded
//! piece at a time so that running sequences are not held up.

use engine::KvMemory;
use engine::kv::pool::Block;

/// Blocks with the checksums of their cells.
pub(crate) struct Seal {
    blocks: Vec<u32>,
    /// Layer after layer, in the order of the blocks.
    sums: Vec<u32>,
    /// In the same order: what came to the device directly.
    on_device: Vec<bool>,
    next: usize,
    bad: Vec<usize>,
}

impl Seal {
    /// Over what has just landed.
    pub fn new(blocks: &[Block], sums: Vec<u32>, on_device: Vec<bool>) -> Self {
        Self { blocks: blocks.iter().map(Block::id).collect(), sums, on_device, next: 0, bad: Vec::new() }
    }

    /// The blocks under it.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Which of their cells came to the device directly, layer after layer.
    pub fn on_device(&self) -> &[bool] {
        &self.on_device
    }

    /// Compares up to `cells` more; how many it did.
    pub fn check(&mut self, kv: &dyn KvMemory, cells: usize) -> usize {
        let end = self.sums.len().min(self.next.saturating_add(cells));
        for cell in self.next..end {
            let (layer, at) = (cell / self.blocks.len(), cell % self.blocks.len());
            if kv.source_checksum(layer, self.blocks[at]) != self.sums[cell] {
                self.bad.push(at);
            }
        }
        let done = end - self.next;
        self.next = end;
        done
    }

    /// Whether all are compared.
    pub fn is_checked(&self) -> bool {
        self.next == self.sums.len()
    }

    /// Which blocks are not what was sent, by their place among those that landed.
    pub fn bad(&self) -> &[usize] {
        &self.bad
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::kv::pool::{BlockPool, BlockState};
    use engine::{KvDtype, KvLayout};

    struct Memory(KvLayout);

    impl KvMemory for Memory {
        fn layout(&self) -> &KvLayout {
            &self.0
        }

        fn host_address(&self) -> Option<*mut u8> {
            None
        }

        fn checksum(&self, layer: usize, block: u32) -> u32 {
            layer as u32 * 100 + block
        }
    }

    #[test]
    fn every_cell_is_compared_in_bounded_pieces() {
        let layout =
            KvLayout { layers: 3, blocks: 8, kv_heads: 1, block_tokens: 4, head_dim: 4, dtype: KvDtype::F32 };
        let blocks = BlockPool::new(8).alloc(4, BlockState::Running).unwrap();
        let mut sums: Vec<u32> =
            (0..3).flat_map(|layer| blocks.iter().map(move |b| layer * 100 + b.id())).collect();
        sums[4 + 2] ^= 1;
        let mut seal = Seal::new(&blocks, sums, Vec::new());
        let memory = Memory(layout);
        assert_eq!([seal.check(&memory, 5), seal.check(&memory, 5), seal.check(&memory, 5)], [5, 5, 2]);
        assert!(seal.is_checked());
        assert_eq!(seal.bad(), [2]);
    }
}
