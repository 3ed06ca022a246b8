//! Which worker holds which prompt prefix, as far as the router has seen. Bounded: the least recently
//! used entries go first. A wrong guess costs time, never correctness: the worker itself decides.

use std::collections::HashMap;

use engine::kv::hash::BlockHash;

/// Block hash → workers that held it when last seen.
#[derive(Debug)]
pub struct PrefixIndex {
    entries: HashMap<BlockHash, Entry>,
    capacity: usize,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    workers: Vec<String>,
    touched: u64,
}

/// Holders remembered per block.
const MAX_HOLDERS: usize = 8;

impl PrefixIndex {
    /// Remembers at most `capacity` blocks (each costs about 100 bytes and its holders' names).
    pub fn new(capacity: usize) -> Self {
        Self { entries: HashMap::new(), capacity: capacity.max(1), clock: 0 }
    }

    /// The worker now holds these blocks.
    pub fn insert(&mut self, worker: &str, chain: &[BlockHash]) {
        self.clock += 1;
        for hash in chain {
            let entry = self
                .entries
                .entry(*hash)
                .or_insert_with(|| Entry { workers: Vec::with_capacity(1), touched: 0 });
            entry.touched = self.clock;
            if !entry.workers.iter().any(|w| w == worker) {
                if entry.workers.len() == MAX_HOLDERS {
                    entry.workers.remove(0);
                }
                entry.workers.push(worker.to_owned());
            }
        }
        if self.entries.len() > self.capacity {
            self.evict();
        }
    }

    /// Blocks of the chain's start that the worker holds.
    pub fn hits(&self, worker: &str, chain: &[BlockHash]) -> usize {
        let holds =
            |hash: &&BlockHash| self.entries.get(hash).is_some_and(|e| e.workers.iter().any(|w| w == worker));
        chain.iter().take_while(holds).count()
    }

    /// The worker is gone, or started anew with nothing.
    pub fn forget(&mut self, worker: &str) {
        self.entries.retain(|_, entry| {
            entry.workers.retain(|w| w != worker);
            !entry.workers.is_empty()
        });
    }

    /// Blocks remembered.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Makes room for a tenth, so that its cost is spread.
    fn evict(&mut self) {
        let mut ages: Vec<u64> = self.entries.values().map(|e| e.touched).collect();
        let excess = (self.entries.len() - self.capacity + self.capacity / 10).min(ages.len() - 1);
        let (_, oldest_kept, _) = ages.select_nth_unstable(excess);
        let oldest_kept = *oldest_kept;
        self.entries.retain(|_, entry| entry.touched >= oldest_kept);
        while self.entries.len() > self.capacity {
            let Some(&any) = self.entries.keys().next() else { return };
            self.entries.remove(&any);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::kv::hash;

    fn chain(seed: u32, blocks: usize) -> Vec<BlockHash> {
        let tokens: Vec<u32> = (0..blocks as u32 * 4).map(|t| t + seed * 1000).collect();
        hash::chain(BlockHash::root(b"test"), &tokens, 4)
    }

    #[test]
    fn longest_prefix_per_worker() {
        let mut index = PrefixIndex::new(100);
        let c = chain(0, 5);
        index.insert("a", &c[..3]);
        index.insert("b", &c);
        assert_eq!((index.hits("a", &c), index.hits("b", &c), index.hits("x", &c)), (3, 5, 0));
        index.forget("b");
        assert_eq!((index.hits("a", &c), index.hits("b", &c), index.len()), (3, 0, 3));
    }

    #[test]
    fn bounded_and_oldest_first() {
        let mut index = PrefixIndex::new(100);
        for seed in 0..50 {
            index.insert("a", &chain(seed, 10));
            assert!(index.len() <= 100);
        }
        assert_eq!(index.hits("a", &chain(49, 10)), 10);
        assert_eq!(index.hits("a", &chain(0, 10)), 0);
    }
}
