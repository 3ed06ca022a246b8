//! A sequence on a decode worker.

use std::rc::Rc;
use std::sync::Arc;

use decode_worker::outlook::Expected;
use decode_worker::scheduler::View;
use engine::kv::hash::BlockHash;
use engine::kv::pool::{Block, BlockPool, BlockState};

use crate::clock::Ns;
use crate::load::name;

/// A sequence.
pub(crate) struct Choice {
    pub(crate) request: u32,
    pub(crate) prompt: usize,
    /// Tokens of the whole answer.
    pub(crate) output: usize,
    /// Prompt and what was drawn so far.
    pub(crate) tokens: usize,
    pub(crate) computed: usize,
    pub(crate) blocks: Vec<Block>,
    pub(crate) chain: Rc<[BlockHash]>,
    pub(crate) published: usize,
    /// When its newest token came; 0: none yet.
    pub(crate) last: Ns,
    pub(crate) first: Ns,
    pub(crate) arrived: Ns,
    /// Its share of what the worker expects to grow.
    pub(crate) expected: Option<Expected>,
    pub(crate) running: usize,
    /// Steps it has sat out since it last ran.
    pub(crate) waited: usize,
    /// It has decoded here.
    joined: bool,
}

impl Choice {
    /// With its KV landed and its first token drawn, or with nothing but what the cache had.
    pub(crate) fn new(
        request: u32,
        prompt: usize,
        output: usize,
        chain: Rc<[BlockHash]>,
        arrived: Ns,
    ) -> Self {
        Self {
            request,
            prompt,
            output,
            tokens: prompt,
            computed: 0,
            blocks: Vec::new(),
            chain,
            published: 0,
            last: 0,
            first: 0,
            arrived,
            expected: None,
            running: 0,
            waited: 0,
            joined: false,
        }
    }

    /// What the scheduler needs to know.
    pub(crate) fn view(&self) -> View {
        View {
            pending: self.tokens - self.computed,
            computed: self.computed,
            held: self.blocks.len(),
            waited: self.waited,
            joined: self.joined,
        }
    }

    fn hash(&self, index: usize) -> BlockHash {
        self.chain.get(index).copied().unwrap_or_else(|| name(4, u64::from(self.request), index as u64))
    }

    pub(crate) fn advance(&mut self, count: usize, pool: &BlockPool, block_tokens: usize) {
        self.waited = 0;
        self.joined |= count == 1 && self.computed + 1 == self.tokens;
        self.computed += count;
        let full = self.computed / block_tokens;
        for at in self.published..full {
            pool.publish(&self.blocks[at], self.hash(at));
        }
        self.published = self.published.max(full);
    }

    /// Gives its blocks back; its tokens will be computed again.
    pub(crate) fn preempt(&mut self) {
        self.blocks.clear();
        (self.computed, self.published) = (0, 0);
    }

    /// Takes what the prefix cache has.
    pub(crate) fn adopt(&mut self, pool: &Arc<BlockPool>, block_tokens: usize) {
        let reusable = (self.tokens - 1) / block_tokens;
        let hashes: Vec<BlockHash> = (0..reusable).map(|at| self.hash(at)).collect();
        self.blocks = pool.lookup(&hashes);
        self.computed = self.blocks.len() * block_tokens;
        self.published = self.blocks.len();
    }

    /// Makes room for `count` more tokens. False when the pool has none left.
    pub(crate) fn grow(&mut self, count: usize, pool: &Arc<BlockPool>, block_tokens: usize) -> bool {
        let need = (self.computed + count).div_ceil(block_tokens).saturating_sub(self.blocks.len());
        if need == 0 {
            return true;
        }
        match pool.alloc(need, BlockState::Running) {
            Ok(new) => {
                self.blocks.extend(new);
                true
            }
            Err(_) => false,
        }
    }
}
