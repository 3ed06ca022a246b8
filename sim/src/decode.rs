//! A decode worker: the real scheduler and block pool, steps that take modelled time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use decode_worker::outlook::{Expected, NoRoom, Outlook, Wanted};
use decode_worker::scheduler::{self, Rules, View};
use engine::kv::pool::BlockPool;
use engine::pace::{StepModel, StepShape};
use engine::roofline::Chunk;
use engine::sim::{Cost, StepLoad};
use worker::rate::Rate;

use crate::choice::Choice;
use crate::clock::{Ns, ms, ns};

/// Landed KV that is compared before a step, at most; as in the decode worker.
const UNSEAL_BYTES: f64 = (32 << 20) as f64;

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
    model: StepModel,
    outlook: Outlook,
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
    pub(crate) fn new(blocks: u32, rules: Rules, landing_bytes_per_second: f64) -> Self {
        Self {
            landing_bytes_per_second,
            pool: BlockPool::new(blocks),
            rules,
            model: StepModel::default(),
            outlook: Outlook::new(rules.block_tokens),
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

    /// Counts a request in, if it is expected to fit.
    pub(crate) fn expect(&self, blocks: usize, max_tokens: usize) -> Result<Expected, NoRoom> {
        let wanted = Wanted { sequences: 1, blocks, max_tokens };
        self.outlook.admit(&wanted, self.pool.available())
    }

    /// Its last token is out.
    pub(crate) fn ended(&self, tokens: usize) {
        self.outlook.ended(tokens);
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
        self.views.extend(self.choices.iter().map(Choice::view));
        let plan = scheduler::plan(&self.views, &self.rules, &self.model, self.pool.available());
        for &victim in &plan.preempt {
            self.choices[victim].preempt();
            self.preemptions += 1;
        }
        let block_tokens = self.rules.block_tokens;
        let mut load = StepLoad::default();
        let mut shape = StepShape::default();
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
            shape = shape.with_run(choice.computed, count);
            let draws = choice.computed + count == choice.tokens;
            cost.add(&mut load, Chunk { position: choice.computed, tokens: count, draws });
            runs += 1;
        }
        if runs == 0 && unsealing == 0.0 {
            return None;
        }
        self.largest_batch = self.largest_batch.max(runs);
        let computing = ns(cost.seconds(&load));
        if runs > 0 {
            self.model.add(&shape, ms(computing));
            self.outlook.ran(&shape, &self.model, &self.rules);
        }
        let took = (computing + ns(unsealing)).max(1);
        self.step = Some((now, took));
        Some(took)
    }

    /// Ends the step that runs: tokens drawn at `now`.
    pub(crate) fn end(&mut self, now: Ns, drawn: &mut Vec<Drawn>) {
        let Some((_, took)) = self.step.take() else { return };
        self.busy += took;
        let block_tokens = self.rules.block_tokens;
        let mut tokens = 0;
        let mut has_ended = false;
        for choice in &mut self.choices {
            let count = std::mem::take(&mut choice.running);
            if count == 0 {
                choice.waited += 1;
                continue;
            }
            tokens += count;
            choice.advance(count, &self.pool, block_tokens);
            if choice.computed < choice.tokens {
                continue;
            }
            choice.tokens += 1;
            choice.expected.iter().for_each(|expected| expected.grew(1));
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
