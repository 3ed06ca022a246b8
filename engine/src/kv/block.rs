//! A block's handle, its states, and how many are in which.

use std::sync::Arc;

use super::pool::BlockPool;

/// What the owners of a live block do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockState {
    /// Holds the KV of a sequence that runs.
    Running,
    /// Promised to a transfer that has not committed yet.
    Reserved,
    /// Given up, but a remote write may still be in flight.
    Quarantined,
}

/// There are fewer free and cached blocks than wanted. Nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} KV blocks wanted, {available} available")]
pub struct OutOfBlocks {
    /// Blocks asked for.
    pub wanted: usize,
    /// Blocks that could have been given: free and cached ones.
    pub available: usize,
}

/// How many blocks are in which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockCounts {
    /// Hold nothing.
    pub free: usize,
    /// Hold published KV that nobody uses now.
    pub cached: usize,
    /// In use by sequences.
    pub running: usize,
    /// Promised to transfers.
    pub reserved: usize,
    /// Waiting until no remote write can be in flight.
    pub quarantined: usize,
    /// All blocks of the pool.
    pub total: usize,
}

impl BlockCounts {
    pub(super) fn of(&mut self, state: State) -> &mut usize {
        match state {
            State::Free => &mut self.free,
            State::Cached => &mut self.cached,
            State::Live(BlockState::Running) => &mut self.running,
            State::Live(BlockState::Reserved) => &mut self.reserved,
            State::Live(BlockState::Quarantined) => &mut self.quarantined,
        }
    }

    /// The invariant.
    pub fn balanced(&self) -> bool {
        self.free + self.cached + self.running + self.reserved + self.quarantined == self.total
    }
}

/// What a block of the pool is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Free,
    Cached,
    Live(BlockState),
}

/// One owner's handle on a live block. Clone to share, drop to release.
pub struct Block {
    pub(super) id: u32,
    pub(super) pool: Arc<BlockPool>,
}

impl Block {
    /// The block's id, as it stands in block tables.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Changes what the owners do with it, for all of them.
    pub fn set_state(&self, state: BlockState) {
        self.pool.set_state(self.id, state);
    }

    /// Number of handles on this block.
    pub fn owners(&self) -> u32 {
        self.pool.owners(self.id)
    }
}

impl Clone for Block {
    fn clone(&self) -> Self {
        self.pool.share(self.id);
        Self { id: self.id, pool: Arc::clone(&self.pool) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.pool.release(self.id);
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Block({})", self.id)
    }
}
