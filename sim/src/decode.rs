//! A decode worker: the real scheduler and block pool, steps that take modelled time.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use decode_worker::scheduler::{self, Rules, View};
use engine::kv::hash::BlockHash;
use engine::kv::pool::{Block, BlockPool, BlockState};
use engine::pace::StepModel;
use engine::roofline::Chunk;
use engine::sim::{Cost, StepLoad};
use worker::rate::Rate;

use crate::clock::{Ns, ns};
use crate::load::name;

/// Landed KV that is compared before a step, at most; as in the decode worker.
const UNSEAL_BYTES: f64 = (32 << 20) as f64;

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
    pub(crate) is_local: bool,
    pub(crate) arrived: Ns,
    running: usize,
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
            is_local: true,
            arrived,
            running: 0,
        }
    }

    fn hash(&self, index: usize) -> BlockHash {
        self.chain.get(index).copied().unwrap_or_else(|| name(4, u64::from(self.request), index as u64))
    }

    pub(crate) fn advance(&mut self, count: usize, pool: &BlockPool, block_tokens: usize) {
        self.computed += count;
        let full = self.computed / block_tokens;
        for at in self.published..full {
            pool.publish(&self.blocks[at], self.hash(at));
        }
        self.published = self.published.max(full);
    }

    /// Takes what the prefix cache has.
    fn adopt(&mut self, pool: &Arc<BlockPool>, block_tokens: usize) {
        let reusable = (self.tokens - 1) / block_tokens;
        let hashes: Vec<BlockHash> = (0..reusable).map(|at| self.hash(at)).collect();
        self.blocks = pool.lookup(&hashes);
        self.computed = self.blocks.len() * block_tokens;
        self.published = self.blocks.len();
    }

    fn grow(&mut self, count: usize, pool: &Arc<BlockPool>, block_tokens: usize) -> bool {
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

/// How much of a step prompts may take.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Budget {
    /// Tokens of a step, decoding ones included.
    Tokens(usize),
    /// What brings the step to so many nanoseconds, but at least a block.
    Time(Ns, usize),
}

/// A token, or the end.
pub(crate) struct Drawn {
    pub(crate) request: u32,
    pub(crate) previous: Ns,
    pub(crate) is_first: bool,
    pub(crate) ended: Option<Choice>,
    pub(crate) arrived: Ns,
}

pub(crate) struct DecodeWorker {
    pub(crate) pool: Arc<BlockPool>,
    landing_bytes_per_second: f64,
    rules: Rules,
    budget: Budget,
    choices: Vec<Choice>,
    inbox: VecDeque<Choice>,
    /// Landed, with the bytes that are not compared yet.
    sealed: VecDeque<(Choice, f64)>,
    rate: Rate,
    step: Option<(Ns, Ns)>,
    views: Vec<View>,
    pub(crate) link_free: Ns,
    /// It looks again for blocks then.
    pub(crate) looks_at: Ns,
    pub(crate) busy: Ns,
    pub(crate) preemptions: u64,
    /// Reservations that wait for their KV.
    pub(crate) reserved: usize,
    pub(crate) largest_batch: usize,
}

impl DecodeWorker {
    pub(crate) fn new(blocks: u32, rules: Rules, budget: Budget, landing_bytes_per_second: f64) -> Self {
        Self {
            landing_bytes_per_second,
            pool: BlockPool::new(blocks),
            rules,
            budget,
            choices: Vec::new(),
            inbox: VecDeque::new(),
            sealed: VecDeque::new(),
            rate: Rate::default(),
            step: None,
            views: Vec::new(),
            link_free: 0,
            looks_at: 0,
            busy: 0,
            preemptions: 0,
            reserved: 0,
            largest_batch: 0,
        }
    }

    pub(crate) fn admit(&mut self, choice: Choice) {
        self.inbox.push_back(choice);
    }

    /// Lets in what landed; it runs when its bytes are compared.
    pub(crate) fn land(&mut self, choice: Choice, bytes: f64) {
        self.sealed.push_back((choice, bytes));
    }

    /// Compares a bounded piece of what landed, oldest first; the bytes.
    fn unseal(&mut self) -> f64 {
        let most = if self.landing_bytes_per_second.is_finite() { UNSEAL_BYTES } else { f64::MAX };
        let mut left = most;
        while let Some((_, bytes)) = self.sealed.front_mut() {
            let now = bytes.min(left);
            *bytes -= now;
            left -= now;
            if *bytes > 0.0 {
                break;
            }
            self.choices.extend(self.sealed.pop_front().map(|(choice, _)| choice));
        }
        most - left
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.step.is_none()
    }

    /// Whether a step runs that is not over at this time: what woke the worker was meant for an idle one.
    pub(crate) fn is_busy_at(&self, now: Ns) -> bool {
        self.step.is_some_and(|(began, took)| began + took != now)
    }

    pub(crate) fn has_work(&self) -> bool {
        !self.choices.is_empty() || !self.inbox.is_empty() || !self.sealed.is_empty()
    }

    /// Everything that was let in: reservations, waiting and running sequences.
    pub(crate) fn sequences(&self) -> usize {
        self.choices.len() + self.inbox.len() + self.sealed.len() + self.reserved
    }

    /// Prompt tokens to compute here, sequences, measured speed.
    pub(crate) fn load(&self) -> (usize, usize, f64) {
        let pending = |choice: &Choice| choice.tokens - choice.computed;
        let queued = self.choices.iter().chain(&self.inbox).map(pending).filter(|p| *p > 1).sum();
        (queued, self.choices.len() + self.inbox.len() + self.sealed.len(), self.rate.tokens_per_second())
    }

    /// Begins a step; how long it takes. `None` when nothing can run.
    pub(crate) fn begin(&mut self, cost: &Cost, now: Ns) -> Option<Ns> {
        self.choices.extend(self.inbox.drain(..));
        let unsealing = self.unseal() / self.landing_bytes_per_second;
        if self.choices.is_empty() && unsealing == 0.0 {
            return None;
        }
        self.views.clear();
        self.views.extend(self.choices.iter().map(|choice| View {
            pending: choice.tokens - choice.computed,
            computed: choice.computed,
            held: choice.blocks.len(),
            waited: 0,
            joined: true,
        }));
        let rules = Rules { step_tokens: self.step_tokens(cost), ..self.rules };
        let plan = scheduler::plan(&self.views, &rules, &StepModel::default(), self.pool.available());
        for &victim in &plan.preempt {
            let choice = &mut self.choices[victim];
            choice.blocks.clear();
            (choice.computed, choice.published) = (0, 0);
            self.preemptions += 1;
        }
        let block_tokens = self.rules.block_tokens;
        let mut load = StepLoad::default();
        let mut runs = 0;
        for &(index, count) in &plan.run {
            let choice = &mut self.choices[index];
            let mut count = count;
            if choice.blocks.is_empty() && choice.computed == 0 {
                choice.adopt(&self.pool, block_tokens);
                count = count.min(choice.tokens - choice.computed);
            }
            if !choice.grow(count, &self.pool, block_tokens) {
                continue;
            }
            choice.running = count;
            let draws = choice.computed + count == choice.tokens;
            cost.add(&mut load, Chunk { position: choice.computed, tokens: count, draws });
            runs += 1;
        }
        if runs == 0 && unsealing == 0.0 {
            return None;
        }
        self.largest_batch = self.largest_batch.max(runs);
        let took = ns(cost.seconds(&load) + unsealing).max(1);
        self.step = Some((now, took));
        Some(took)
    }

    /// Tokens of the next step, decoding ones included.
    fn step_tokens(&self, cost: &Cost) -> usize {
        let (limit, most) = match self.budget {
            Budget::Tokens(tokens) => return tokens,
            Budget::Time(limit, most) => (limit, most),
        };
        let mut decoding = StepLoad::default();
        let mut sequences = 0;
        let mut prompt_at = None;
        for choice in &self.choices {
            match choice.tokens - choice.computed {
                1 => {
                    cost.add(&mut decoding, Chunk::decode(choice.computed));
                    sequences += 1;
                }
                _ => prompt_at = prompt_at.or(Some(choice.computed)),
            }
        }
        let (Some(position), true) = (prompt_at, sequences > 0) else { return most };
        let fits = |tokens: usize| {
            let mut load = decoding;
            cost.add(&mut load, Chunk { position, tokens, draws: true });
            ns(cost.seconds(&load)) <= limit
        };
        // At least a block, or prompts would starve beside decoding sequences.
        let (mut low, mut high) = (self.rules.block_tokens, most);
        while low < high {
            let middle = (low + high).div_ceil(2);
            if fits(middle) { low = middle } else { high = middle - 1 }
        }
        sequences + low
    }

    /// Ends the step that runs: tokens drawn at `now`.
    pub(crate) fn end(&mut self, now: Ns, drawn: &mut Vec<Drawn>) {
        let Some((_, took)) = self.step.take() else { return };
        self.busy += took;
        let block_tokens = self.rules.block_tokens;
        let mut tokens = 0;
        let mut has_ended = false;
        for choice in self.choices.iter_mut().filter(|choice| choice.running > 0) {
            let count = std::mem::take(&mut choice.running);
            tokens += count;
            choice.advance(count, &self.pool, block_tokens);
            if choice.computed < choice.tokens {
                continue;
            }
            choice.tokens += 1;
            let is_first = choice.last == 0;
            if is_first {
                choice.first = now;
            }
            drawn.push(Drawn {
                request: choice.request,
                previous: choice.last,
                is_first,
                ended: None,
                arrived: choice.arrived,
            });
            choice.last = now;
            has_ended |= choice.tokens - choice.prompt >= choice.output;
        }
        if tokens > 0 {
            self.rate.add(tokens, Duration::from_nanos(took));
        }
        if has_ended {
            let is_over = |choice: &mut Choice| choice.tokens - choice.prompt >= choice.output;
            for ended in self.choices.extract_if(.., is_over) {
                drawn.push(Drawn {
                    request: ended.request,
                    previous: 0,
                    is_first: false,
                    arrived: ended.arrived,
                    ended: Some(ended),
                });
            }
        }
    }
}
