//! A prefill worker: the real scheduler and block pool, steps that take modelled time.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use engine::kv::hash::BlockHash;
use engine::kv::pool::{Block, BlockPool, BlockState};
use engine::pace::{StepModel, StepShape};
use engine::roofline::Chunk;
use engine::sim::{Cost, StepLoad};
use prefill_worker::scheduler::{self, Rules, View};
use worker::rate::Rate;

use crate::clock::{Ns, ms, ns};

struct Job {
    request: u32,
    prompt: usize,
    chain: Rc<[BlockHash]>,
    submitted: Ns,
    started: Option<Ns>,
    computed: usize,
    waited: usize,
    published: usize,
    cached: usize,
    blocks: Vec<Block>,
    /// The chunk that runs now.
    running: usize,
}

/// A piece of a prompt whose KV leaves for the decode worker.
pub(crate) struct Push {
    pub(crate) request: u32,
    /// Blocks `from..to` of the prompt.
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// When its first layer was final, and when its last one.
    pub(crate) first_layer: Ns,
    pub(crate) last_layer: Ns,
}

/// A prompt that is computed.
pub(crate) struct Computed {
    pub(crate) request: u32,
    pub(crate) queue: Ns,
    pub(crate) compute: Ns,
    pub(crate) cached: usize,
    pub(crate) source: Vec<Block>,
}

/// What a step brought.
#[derive(Default)]
pub(crate) struct Brought {
    pub(crate) pushes: Vec<Push>,
    pub(crate) computed: Vec<Computed>,
}

pub(crate) struct PrefillWorker {
    pub(crate) pool: Arc<BlockPool>,
    rules: Rules,
    jobs: Vec<Job>,
    rate: Rate,
    model: StepModel,
    step: Option<(Ns, Ns)>,
    /// Its link is busy until then.
    pub(crate) link_free: Ns,
    /// It looks again for blocks then.
    pub(crate) looks_at: Ns,
    pub(crate) busy: Ns,
}

impl PrefillWorker {
    pub(crate) fn new(blocks: u32, rules: Rules) -> Self {
        Self {
            pool: BlockPool::new(blocks),
            rules,
            jobs: Vec::new(),
            rate: Rate::default(),
            model: StepModel::default(),
            step: None,
            link_free: 0,
            looks_at: 0,
            busy: 0,
        }
    }

    pub(crate) fn submit(&mut self, request: u32, prompt: usize, chain: Rc<[BlockHash]>, now: Ns) {
        self.jobs.push(Job {
            request,
            prompt,
            chain,
            submitted: now,
            started: None,
            computed: 0,
            waited: 0,
            published: 0,
            cached: 0,
            blocks: Vec::new(),
            running: 0,
        });
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.step.is_none()
    }

    /// Whether a step runs that is not over at this time: what woke the worker was meant for an idle one.
    pub(crate) fn is_busy_at(&self, now: Ns) -> bool {
        self.step.is_some_and(|(began, took)| began + took != now)
    }

    pub(crate) fn has_jobs(&self) -> bool {
        !self.jobs.is_empty()
    }

    /// Prompt tokens accepted and not computed, prompts, measured speed.
    pub(crate) fn load(&self) -> (usize, usize, f64) {
        let queued = self.jobs.iter().map(|job| job.prompt - job.computed).sum();
        (queued, self.jobs.len(), self.rate.tokens_per_second())
    }

    /// Begins a step; how long it takes. `None` when nothing can run.
    pub(crate) fn begin(&mut self, cost: &Cost, now: Ns) -> Option<Ns> {
        let block_tokens = self.rules.block_tokens;
        let views: Vec<View> = self
            .jobs
            .iter()
            .map(|job| View {
                remaining: job.prompt - job.computed,
                computed: job.computed,
                waited: job.waited,
                missing_blocks: if job.started.is_none() { job.prompt.div_ceil(block_tokens) } else { 0 },
                deadline_ms: None,
            })
            .collect();
        let plan = scheduler::plan(&views, &self.rules, &self.model, self.pool.available());
        let mut load = StepLoad::default();
        let mut shape = StepShape::default();
        for (index, count) in plan {
            let job = &mut self.jobs[index];
            if !start(job, &self.pool, block_tokens, now) {
                continue;
            }
            job.running = count.min(job.prompt - job.computed);
            let draws = job.computed + job.running == job.prompt;
            cost.add(&mut load, Chunk { position: job.computed, tokens: job.running, draws });
            shape = shape.with_prompt(job.computed, job.running);
        }
        if shape.prompt_tokens == 0 {
            return None;
        }
        let took = ns(cost.seconds(&load)).max(1);
        self.model.add(&shape, ms(took));
        self.step = Some((now, took));
        Some(took)
    }

    /// Ends the step that runs.
    pub(crate) fn end(&mut self, layers: usize) -> Brought {
        let Some((began, took)) = self.step.take() else { return Brought::default() };
        self.busy += took;
        let mut brought = Brought::default();
        let tokens = self.jobs.iter().map(|job| job.running).sum();
        self.rate.add(tokens, Duration::from_nanos(took));
        let (first_layer, last_layer) = (began + took / layers.max(1) as Ns, began + took);
        let mut left = Vec::with_capacity(self.jobs.len());
        for mut job in std::mem::take(&mut self.jobs) {
            if job.running == 0 {
                job.waited += 1;
                left.push(job);
                continue;
            }
            let block_tokens = self.rules.block_tokens;
            // What the cache had leaves with the first chunk.
            let is_first = job.computed == job.cached;
            let from = if is_first { 0 } else { job.computed / block_tokens };
            job.computed += std::mem::take(&mut job.running);
            job.waited = 0;
            let is_done = job.computed == job.prompt;
            let to = if is_done { job.prompt.div_ceil(block_tokens) } else { job.computed / block_tokens };
            brought.pushes.push(Push { request: job.request, from, to, first_layer, last_layer });
            publish(&mut job, &self.pool, block_tokens);
            match is_done {
                false => left.push(job),
                true => {
                    let started = job.started.unwrap_or(began);
                    brought.computed.push(Computed {
                        request: job.request,
                        queue: started - job.submitted,
                        compute: last_layer - started,
                        cached: job.cached,
                        source: job.blocks,
                    });
                }
            }
        }
        self.jobs = left;
        brought
    }
}

/// Takes cached blocks and allocates the rest, as the real job does. False when the pool has not enough.
fn start(job: &mut Job, pool: &Arc<BlockPool>, block_tokens: usize, now: Ns) -> bool {
    if job.started.is_some() {
        return true;
    }
    // The last token is always computed: its logits are wanted.
    let reusable = ((job.prompt - 1) / block_tokens).min(job.chain.len());
    let mut blocks = pool.lookup(&job.chain[..reusable]);
    let cached = blocks.len();
    match pool.alloc(job.prompt.div_ceil(block_tokens) - cached, BlockState::Running) {
        Ok(new) => blocks.extend(new),
        Err(_) => return false,
    }
    job.cached = cached * block_tokens;
    job.computed = job.cached;
    job.published = cached;
    job.started = Some(now);
    job.blocks = blocks;
    true
}

fn publish(job: &mut Job, pool: &Arc<BlockPool>, block_tokens: usize) {
    let full = (job.computed / block_tokens).min(job.chain.len());
    for at in job.published..full {
        pool.publish(&job.blocks[at], job.chain[at]);
    }
    job.published = job.published.max(full);
}
