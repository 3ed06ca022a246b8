//! One choice of a request inside the decode worker: its tokens, its blocks, when it ends.

use std::sync::Arc;

use engine::kv::hash::BlockHash;
use engine::kv::pool::{Block, BlockPool};
use engine::{KvLayout, SampleRequest};
use proto::v1::FinishReason;
use worker::Request;

use crate::scheduler::View;

/// A choice, or the *stem* of a request: what all its open choices begin with, computed once for all.
pub(crate) struct Choice {
    pub request: Arc<Request>,
    /// Key of the request in the loop's table of groups.
    pub group: u64,
    pub index: u32,
    is_stem: bool,
    /// Prompt and output.
    pub tokens: Vec<u32>,
    /// Tokens whose KV is in `blocks`.
    pub computed: usize,
    /// Steps it has sat out since it last ran.
    pub waited: usize,
    /// It has decoded here.
    pub joined: bool,
    /// Block table; `ids` is the same as plain numbers, for the engine.
    blocks: Vec<Block>,
    ids: Vec<u32>,
    hashes: Vec<BlockHash>,
    published: usize,
}

impl Choice {
    /// The stem of a request; its first `computed` tokens are in `blocks`.
    pub fn stem(request: Arc<Request>, group: u64, blocks: Vec<Block>, computed: usize) -> Self {
        let ids = blocks.iter().map(Block::id).collect();
        let tokens = request.stem.to_vec();
        let hashes = request.hashes.to_vec();
        let index = request.open.first().copied().unwrap_or(0);
        let is_stem = true;
        let (waited, joined) = (0, false);
        Self {
            request,
            group,
            index,
            is_stem,
            tokens,
            computed,
            waited,
            joined,
            blocks,
            ids,
            hashes,
            published: 0,
        }
    }

    /// One choice that ran elsewhere: `blocks` hold the KV of its first tokens, `since` is what it put out
    /// besides the request's outputs.
    pub fn moved(request: Arc<Request>, group: u64, index: u32, blocks: Vec<Block>, since: Vec<u32>) -> Self {
        let mut choice = Self::stem(request, group, blocks, 0);
        choice.becomes(index);
        choice.tokens.extend(since);
        choice
    }

    /// Handles on the blocks that are full and never change again.
    pub fn full_blocks(&self, layout: &KvLayout) -> &[Block] {
        let full = self.computed / layout.block_tokens;
        &self.blocks[..full.min(self.blocks.len())]
    }

    /// Handles on the blocks that hold any KV.
    pub fn used_blocks(&self, layout: &KvLayout) -> &[Block] {
        let used = layout.blocks_for(self.computed);
        &self.blocks[..used.min(self.blocks.len())]
    }

    /// Output tokens so far.
    pub fn output(&self) -> &[u32] {
        &self.tokens[self.request.prompt.len()..]
    }

    /// What the scheduler needs to know.
    pub fn view(&self) -> View {
        View {
            pending: self.tokens.len() - self.computed,
            computed: self.computed,
            held: self.blocks.len(),
            waited: self.waited,
            joined: self.joined,
        }
    }

    /// Block ids, for the engine.
    pub fn table(&self) -> &[u32] {
        &self.ids
    }

    /// Whether running `count` tokens reaches the end, where a token is drawn.
    pub fn draws(&self, count: usize) -> bool {
        self.computed + count == self.tokens.len()
    }

    /// The draws at this choice's end: one, or all choices' first ones for a stem.
    pub fn draw_requests(&self) -> Vec<SampleRequest<'_>> {
        match self.is_stem {
            true => self.request.stem_draws(),
            false => vec![self.request.draw(self.index, self.output())],
        }
    }

    /// Stands for all choices.
    pub fn is_stem(&self) -> bool {
        self.is_stem
    }

    /// Whether the KV of all its tokens is there.
    pub fn is_computed(&self) -> bool {
        self.computed == self.tokens.len()
    }

    /// The choices that a computed stem stands for. The first takes over its blocks. The others share the
    /// full ones and compute the tokens of the last, partly filled one again: cheaper than copying, and
    /// nothing is ever written by two.
    pub fn branch(self, layout: &KvLayout) -> Vec<Self> {
        let full = self.computed / layout.block_tokens;
        let open = Arc::clone(&self.request.open);
        let fork = |index: &u32| {
            let request = Arc::clone(&self.request);
            let mut choice =
                Self::stem(request, self.group, self.blocks[..full].to_vec(), full * layout.block_tokens);
            choice.published = full;
            choice.becomes(*index);
            choice
        };
        let mut choices: Vec<Self> = open.iter().skip(1).map(fork).collect();
        let mut first = self;
        first.becomes(first.index);
        choices.insert(0, first);
        choices
    }

    /// A stem's copy becomes one choice, with all that it has put out.
    fn becomes(&mut self, index: u32) {
        self.index = index;
        self.is_stem = false;
        self.tokens.truncate(self.request.prompt.len());
        self.tokens.extend(&self.request.outputs[index as usize]);
    }

    /// Makes room for `count` more tokens. False when the pool has none left.
    pub fn grow(&mut self, count: usize, pool: &Arc<BlockPool>, layout: &KvLayout) -> bool {
        let need = layout.blocks_for(self.computed + count).saturating_sub(self.blocks.len());
        match pool.alloc(need, engine::kv::pool::BlockState::Running) {
            Ok(new) => {
                self.ids.extend(new.iter().map(Block::id));
                self.blocks.extend(new);
                true
            }
            Err(_) => false,
        }
    }

    /// Takes what the prefix cache has; only for a choice that holds nothing.
    pub fn adopt_cached(&mut self, pool: &Arc<BlockPool>, layout: &KvLayout) {
        let reusable = ((self.tokens.len() - 1) / layout.block_tokens).min(self.hashes.len());
        self.blocks = pool.lookup(&self.hashes[..reusable]);
        self.ids = self.blocks.iter().map(Block::id).collect();
        self.computed = self.blocks.len() * layout.block_tokens;
        self.published = self.blocks.len();
    }

    /// Notes that `count` more tokens are computed, and offers full blocks to the prefix cache.
    pub fn advance(&mut self, count: usize, pool: &Arc<BlockPool>, layout: &KvLayout) {
        self.waited = 0;
        self.joined |= count == 1 && self.is_computed_after(count);
        self.computed += count;
        let full = self.computed / layout.block_tokens;
        while self.hashes.len() < full {
            let at = self.hashes.len() * layout.block_tokens;
            let parent = self.hashes.last().copied().unwrap_or(self.request.root);
            self.hashes.push(parent.next(&self.tokens[at..at + layout.block_tokens]));
        }
        for at in self.published..full {
            pool.publish(&self.blocks[at], self.hashes[at]);
        }
        self.published = self.published.max(full);
    }

    fn is_computed_after(&self, count: usize) -> bool {
        !self.is_stem && self.computed + count == self.tokens.len()
    }

    /// Gives all blocks back; its tokens will be computed again.
    pub fn preempt(&mut self) {
        self.blocks.clear();
        self.ids.clear();
        self.computed = 0;
        self.published = 0;
    }

    /// Whether the newest token ends it.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        let output = self.output();
        let last = output.last()?;
        if self.request.stop_token_ids.contains(last) && output.len() >= self.request.min_tokens {
            Some(FinishReason::Stop)
        } else if output.len() >= self.request.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}
