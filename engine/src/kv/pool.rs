//! Who owns which block of the KV pool: free, cached for reuse, or in the hands of sequences.
//!
//! ```text
//!            alloc                      drop of the last handle, not published
//!   Free ───────────► Live(Running │ Reserved │ Quarantined) ───────────► Free
//!                        ▲   │ drop of the last handle, published
//!                 lookup │   ▼
//!                       Cached ── evicted by alloc, least recently used first ──► Live
//! ```
//!
//! A [`Block`] is a counted handle: cloning shares the block, dropping the last handle releases it. So a
//! block can be leaked only by leaking a handle, and can never be in two hands that do not know it.
//! Invariant, at every step: `free + cached + running + reserved + quarantined == total`.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;

use super::block::State;
pub use super::block::{Block, BlockCounts, BlockState, OutOfBlocks};
use super::hash::BlockHash;

#[derive(Debug, Clone)]
struct Slot {
    state: State,
    owners: u32,
    hash: Option<BlockHash>,
    /// Grows along a chain: parents are published (and looked up) before their suffixes.
    rank: u64,
    /// When the last owner let go; the clock ticks on every alloc and lookup, so that a sequence's
    /// blocks, dropped together, tie.
    released: u64,
}

/// Order of eviction: least recently released first; among equals the suffix before its parent.
type EvictionKey = (u64, Reverse<u64>, u32);

#[derive(Debug)]
struct Inner {
    slots: Vec<Slot>,
    free: Vec<u32>,
    cached: BTreeSet<EvictionKey>,
    published: HashMap<BlockHash, u32>,
    counts: BlockCounts,
    clock: u64,
    next_rank: u64,
}

/// The blocks of one KV pool. See the module's documentation.
#[derive(Debug)]
pub struct BlockPool {
    inner: Mutex<Inner>,
}

impl BlockPool {
    /// A pool of `blocks` free blocks, ids `0..blocks`.
    pub fn new(blocks: u32) -> Arc<Self> {
        let slot = Slot { state: State::Free, owners: 0, hash: None, rank: 0, released: 0 };
        let total = blocks as usize;
        let inner = Inner {
            slots: vec![slot; total],
            free: (0..blocks).rev().collect(),
            cached: BTreeSet::new(),
            published: HashMap::new(),
            counts: BlockCounts { free: total, total, ..BlockCounts::default() },
            clock: 0,
            next_rank: 0,
        };
        Arc::new(Self { inner: Mutex::new(inner) })
    }

    /// Takes `n` blocks or none: free ones first, then cached ones, least recently used first.
    pub fn alloc(self: &Arc<Self>, n: usize, state: BlockState) -> Result<Vec<Block>, OutOfBlocks> {
        let mut inner = self.inner.lock();
        let available = inner.free.len() + inner.cached.len();
        if n > available {
            return Err(OutOfBlocks { wanted: n, available });
        }
        inner.clock += 1;
        let blocks = (0..n).filter_map(|_| inner.take(state)).map(|id| self.handle(id)).collect();
        inner.debug_check();
        Ok(blocks)
    }

    /// The longest prefix of the chain that is here, each block with one more owner. Cached blocks
    /// become Running; live ones keep their state.
    pub fn lookup(self: &Arc<Self>, hashes: &[BlockHash]) -> Vec<Block> {
        let mut inner = self.inner.lock();
        inner.clock += 1;
        let found = hashes.iter().map_while(|hash| inner.reuse(hash)).map(|id| self.handle(id)).collect();
        inner.debug_check();
        found
    }

    /// How many blocks `lookup` would return; takes nothing and refreshes nothing.
    pub fn peek(&self, hashes: &[BlockHash]) -> usize {
        let inner = self.inner.lock();
        hashes.iter().take_while(|hash| inner.published.contains_key(hash)).count()
    }

    /// Makes a full block findable under its hash. Nothing happens when another block is published
    /// under this hash already, or this block under another one.
    pub fn publish(&self, block: &Block, hash: BlockHash) {
        debug_assert!(std::ptr::eq(self, Arc::as_ptr(&block.pool)), "block of another pool");
        let mut inner = self.inner.lock();
        let id = block.id;
        if inner.slots[id as usize].hash.is_some() || inner.published.contains_key(&hash) {
            return;
        }
        inner.published.insert(hash, id);
        let rank = inner.bump_rank();
        let slot = &mut inner.slots[id as usize];
        slot.hash = Some(hash);
        slot.rank = rank;
        inner.debug_check();
    }

    /// How many blocks are in which state now.
    pub fn counts(&self) -> BlockCounts {
        self.inner.lock().counts
    }

    /// Blocks that an `alloc` could take now.
    pub fn available(&self) -> usize {
        let counts = self.counts();
        counts.free + counts.cached
    }

    /// Frees every cached block and forgets every published hash, of live blocks too.
    pub fn clear_cache(&self) {
        let mut inner = self.inner.lock();
        while let Some((_, _, id)) = inner.cached.pop_first() {
            inner.move_to(id, State::Free);
            inner.free.push(id);
        }
        inner.published.clear();
        for slot in &mut inner.slots {
            slot.hash = None;
        }
        inner.debug_check();
    }

    /// Recounts everything: the invariant, and that lists, hashes and owners agree.
    pub fn check(&self) -> Result<(), String> {
        self.inner.lock().check()
    }

    pub(super) fn set_state(&self, id: u32, state: BlockState) {
        let mut inner = self.inner.lock();
        inner.move_to(id, State::Live(state));
        inner.debug_check();
    }

    pub(super) fn owners(&self, id: u32) -> u32 {
        self.inner.lock().slots[id as usize].owners
    }

    pub(super) fn share(&self, id: u32) {
        self.inner.lock().slots[id as usize].owners += 1;
    }

    pub(super) fn release(&self, id: u32) {
        self.inner.lock().release(id);
    }

    fn handle(self: &Arc<Self>, id: u32) -> Block {
        Block { id, pool: Arc::clone(self) }
    }
}

impl Inner {
    fn take(&mut self, state: BlockState) -> Option<u32> {
        let id = self.free.pop().or_else(|| self.cached.pop_first().map(|(_, _, id)| id))?;
        if let Some(hash) = self.slots[id as usize].hash.take() {
            self.published.remove(&hash);
        }
        self.slots[id as usize].owners = 1;
        self.move_to(id, State::Live(state));
        Some(id)
    }

    fn reuse(&mut self, hash: &BlockHash) -> Option<u32> {
        let id = *self.published.get(hash)?;
        if self.slots[id as usize].state == State::Cached {
            let key = self.eviction_key(id);
            self.cached.remove(&key);
            self.move_to(id, State::Live(BlockState::Running));
        }
        let rank = self.bump_rank();
        let slot = &mut self.slots[id as usize];
        slot.owners += 1;
        slot.rank = rank;
        Some(id)
    }

    fn release(&mut self, id: u32) {
        let clock = self.clock;
        let slot = &mut self.slots[id as usize];
        slot.owners -= 1;
        if slot.owners > 0 {
            return;
        }
        slot.released = clock;
        if slot.hash.is_some() {
            self.move_to(id, State::Cached);
            let key = self.eviction_key(id);
            self.cached.insert(key);
        } else {
            self.move_to(id, State::Free);
            self.free.push(id);
        }
        self.debug_check();
    }

    fn move_to(&mut self, id: u32, state: State) {
        let before = std::mem::replace(&mut self.slots[id as usize].state, state);
        *self.counts.of(before) -= 1;
        *self.counts.of(state) += 1;
    }

    fn eviction_key(&self, id: u32) -> EvictionKey {
        let slot = &self.slots[id as usize];
        (slot.released, Reverse(slot.rank), id)
    }

    fn bump_rank(&mut self) -> u64 {
        self.next_rank += 1;
        self.next_rank
    }

    fn debug_check(&self) {
        debug_assert!(self.counts.balanced(), "block counts out of balance: {:?}", self.counts);
        debug_assert_eq!(self.counts.free, self.free.len());
        debug_assert_eq!(self.counts.cached, self.cached.len());
    }

    fn check(&self) -> Result<(), String> {
        let mut counted = BlockCounts { total: self.slots.len(), ..BlockCounts::default() };
        for (id, slot) in self.slots.iter().enumerate() {
            *counted.of(slot.state) += 1;
            let id = id as u32;
            let live = matches!(slot.state, State::Live(_));
            if live != (slot.owners > 0) {
                return Err(format!("block {id} is {:?} with {} owners", slot.state, slot.owners));
            }
            if slot.hash.is_some_and(|hash| self.published.get(&hash) != Some(&id)) {
                return Err(format!("block {id} carries a hash that does not lead to it"));
            }
            if (slot.state == State::Cached) != self.cached.contains(&self.eviction_key(id)) {
                return Err(format!("block {id} is {:?}, the eviction order disagrees", slot.state));
            }
        }
        let free: BTreeSet<u32> = self.free.iter().copied().collect();
        if free.len() != self.free.len()
            || free.iter().any(|&id| self.slots[id as usize].state != State::Free)
        {
            return Err("the free list holds a block twice or one that is not free".into());
        }
        let published = self.slots.iter().filter(|slot| slot.hash.is_some()).count();
        if published != self.published.len() {
            return Err(format!("{} hashes published, {published} blocks carry one", self.published.len()));
        }
        if counted != self.counts || !counted.balanced() || counted.free != free.len() {
            return Err(format!("counted {counted:?}, kept {:?}, free list {}", self.counts, free.len()));
        }
        Ok(())
    }
}
