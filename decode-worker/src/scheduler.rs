//! Which choices run in the next step, and which give their blocks back. A pure function.
//!
//! Continuous batching: every decoding choice gets its one token, and prompt tokens (local prefill, recomputation
//! after a preemption) run in the same step, oldest first, by one of three policies:
//!
//! * [`LocalPrefill::Shared`]: a prompt is not cut. One that does not fit a step runs alone, decoding choices wait.
//! * [`LocalPrefill::Chunked`]: decoding choices first, then chunks of a fixed size in what is left of the step.
//! * [`LocalPrefill::Priority`]: decoding choices first, chunks only in what the ITL limit leaves by the learned step
//!   time; a prompt that sat out [`PATIENCE_STEPS`] gets one block's worth all the same, so none starves. The batch
//!   itself grows only while its predicted step stays within the limit; who waits for that joins after [`GROWTH_STEPS`].
//!
//! When a decoding choice needs a block and none is left, the younger one that loses the least work is preempted: it drops its
//! blocks and later computes its tokens again. When nothing at all could run, the oldest takes the blocks of the
//! youngest. The oldest is never preempted, so it always comes to its end, and then the next is the oldest.

use engine::pace::{StepModel, StepShape};

/// Steps that a prompt sits out at most under [`LocalPrefill::Priority`], while it is the oldest one that waits.
pub const PATIENCE_STEPS: usize = 8;
/// Steps that a sequence waits at most before it joins a batch that is at its limit.
pub const GROWTH_STEPS: usize = 64;

/// How prompts and decoding choices share steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalPrefill {
    /// Whole prompts.
    Shared,
    /// Chunks of at most so many tokens.
    Chunked,
    /// Decode first, chunks in what the ITL limit leaves.
    Priority,
}

/// One choice as the scheduler sees it. Views come in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct View {
    /// Tokens whose KV is not computed yet, at least 1.
    pub pending: usize,
    /// Tokens whose KV is in its blocks.
    pub computed: usize,
    /// Blocks it holds.
    pub held: usize,
    /// Steps it has sat out since it last ran.
    pub waited: usize,
    /// It has decoded in this worker's batch.
    pub joined: bool,
}

/// The bounds of a step.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Tokens in one step, over all choices.
    pub step_tokens: usize,
    /// Choices in one step.
    pub max_choices: usize,
    /// Tokens per block.
    pub block_tokens: usize,
    /// How prompts share steps with decoding choices.
    pub prefill: LocalPrefill,
    /// Prompt tokens in one step, at most, unless prompts are not cut.
    pub chunk_tokens: usize,
    /// Gap between tokens that [`LocalPrefill::Priority`] keeps to, ms.
    pub itl_limit_ms: f64,
}

/// What to do next. Numbers are indices into the views.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// Choices that run, with how many tokens.
    pub run: Vec<(usize, usize)>,
    /// Choices that give their blocks back first.
    pub preempt: Vec<usize>,
    /// What runs, as the step model sees it.
    pub shape: StepShape,
    /// Decoding choices that wait because the batch is at the ITL limit.
    pub held_back: usize,
}

/// Plans one step with `available` blocks to hand out.
pub fn plan(views: &[View], rules: &Rules, model: &StepModel, available: usize) -> Plan {
    let mut planner = Planner {
        views,
        rules,
        model,
        available,
        budget: rules.step_tokens,
        gone: vec![false; views.len()],
        plan: Plan::default(),
    };
    if rules.prefill != LocalPrefill::Shared || !planner.whole_prompt_first() {
        planner.decode();
        planner.prompts();
    }
    if planner.plan.run.is_empty() {
        planner.make_way();
    }
    planner.plan
}

struct Planner<'a> {
    views: &'a [View],
    rules: &'a Rules,
    model: &'a StepModel,
    available: usize,
    budget: usize,
    gone: Vec<bool>,
    plan: Plan,
}

impl Planner<'_> {
    fn needs(&self, view: &View, tokens: usize) -> usize {
        (view.computed + tokens).div_ceil(self.rules.block_tokens).saturating_sub(view.held)
    }

    fn is_full(&self) -> bool {
        self.budget == 0 || self.plan.run.len() == self.rules.max_choices
    }

    /// The limit that this step keeps; none where one sequence alone takes longer, or by another policy.
    fn limit_ms(&self) -> f64 {
        let can_keep = || self.model.most_sequences(0.0, self.rules.itl_limit_ms) < usize::MAX;
        match self.rules.prefill {
            LocalPrefill::Priority if can_keep() => self.rules.itl_limit_ms,
            _ => f64::INFINITY,
        }
    }

    /// One token for every decoding choice.
    fn decode(&mut self) {
        let limit = self.limit_ms();
        // A prompt whose time has come finds a place and one block's worth of tokens.
        let is_due = self.views.iter().any(|v| v.pending > 1 && v.waited >= PATIENCE_STEPS);
        let kept_tokens = if is_due { self.rules.block_tokens } else { 0 };
        let kept_places = usize::from(is_due);
        for (index, view) in self.views.iter().enumerate().filter(|(_, v)| v.pending == 1) {
            let places = self.rules.max_choices - self.plan.run.len();
            let has_place = places > if view.joined { 0 } else { kept_places };
            if self.gone[index] || self.budget <= kept_tokens.min(self.rules.step_tokens - 1) || !has_place {
                continue;
            }
            let grown = self.plan.shape.with_sequence(view.computed);
            let may_wait = !view.joined && view.waited < GROWTH_STEPS && !self.plan.run.is_empty();
            if may_wait && self.model.predict_ms(&grown) > limit {
                self.plan.held_back += 1;
                continue;
            }
            let need = self.needs(view, 1);
            while need > self.available && self.preempt_younger(index) {}
            if need <= self.available {
                self.available -= need;
                self.budget -= 1;
                self.plan.shape = grown;
                self.plan.run.push((index, 1));
            }
        }
    }

    /// Takes the blocks of the younger choice that loses the least work; false when there is none. Decoding choices are
    /// planned in order of arrival, so every younger one is still free to go.
    fn preempt_younger(&mut self, than: usize) -> bool {
        let can_go = |i: &usize| !self.gone[*i] && self.views[*i].held > 0;
        // Of equals the youngest.
        let victim =
            (than + 1..self.views.len()).rev().filter(can_go).min_by_key(|i| self.views[*i].computed);
        let Some(victim) = victim else { return false };
        self.gone[victim] = true;
        self.plan.preempt.push(victim);
        self.available += self.views[victim].held;
        true
    }

    /// Prompt tokens, oldest first, in what is left.
    fn prompts(&mut self) {
        let mut chunk_budget = match self.rules.prefill {
            LocalPrefill::Shared => self.budget,
            LocalPrefill::Chunked | LocalPrefill::Priority => {
                self.rules.chunk_tokens.max(self.rules.block_tokens)
            }
        };
        // Nobody's gap grows while nobody decodes.
        let limit = if self.plan.run.is_empty() { f64::INFINITY } else { self.limit_ms() };
        let mut is_oldest = true;
        for (index, view) in self.views.iter().enumerate().filter(|(_, v)| v.pending > 1) {
            if self.gone[index] || self.is_full() {
                continue;
            }
            // Starting needs room for all of it, or two half-computed prompts could wait for each other.
            let need = self.needs(view, view.pending);
            if need > self.available {
                continue;
            }
            let is_due = std::mem::take(&mut is_oldest) && view.waited >= PATIENCE_STEPS;
            let within = self.budget.min(chunk_budget);
            let mut tokens = self.within_ms(view, chunk(view, within, self.rules.block_tokens), limit);
            if tokens == 0 && is_due {
                tokens = chunk(view, within.min(self.rules.block_tokens), self.rules.block_tokens);
            }
            if tokens == 0 {
                continue;
            }
            self.available -= need;
            self.budget -= tokens;
            chunk_budget -= tokens;
            self.plan.shape = self.plan.shape.with_prompt(view.computed, tokens);
            self.plan.run.push((index, tokens));
        }
    }

    /// At most `tokens`, so that the step stays within the limit.
    fn within_ms(&self, view: &View, tokens: usize, limit_ms: f64) -> usize {
        let fits = |tokens: usize| {
            self.model.predict_ms(&self.plan.shape.with_prompt(view.computed, tokens)) <= limit_ms
        };
        if tokens == 0 || fits(tokens) {
            return tokens;
        }
        // Between none, which need not fit either, and too many.
        let (mut fit, mut too_many) = (0, tokens);
        while too_many - fit > 1 {
            let half = fit.midpoint(too_many);
            if fits(half) { fit = half } else { too_many = half }
        }
        chunk(view, fit, self.rules.block_tokens)
    }

    /// A prompt that is longer than a step runs alone until its last piece; true when that is so now.
    fn whole_prompt_first(&mut self) -> bool {
        let decoding = self.views.iter().filter(|v| v.pending == 1).count();
        let left = self.rules.step_tokens.saturating_sub(decoding);
        let fits = |(_, v): &(usize, &View)| v.pending > 1 && self.needs(v, v.pending) <= self.available;
        let Some((index, view)) = self.views.iter().enumerate().find(fits) else { return false };
        let tokens = chunk(view, self.rules.step_tokens, self.rules.block_tokens);
        if view.pending <= left || tokens == 0 {
            return false;
        }
        self.plan.shape = self.plan.shape.with_prompt(view.computed, tokens);
        self.plan.run.push((index, tokens));
        true
    }

    /// Half-computed prompts may hold what each other lacks: the oldest gets it.
    fn make_way(&mut self) {
        let Some(oldest) = self.views.first() else { return };
        let need = self.needs(oldest, oldest.pending);
        for index in (1..self.views.len()).rev() {
            if need <= self.available {
                break;
            }
            if self.views[index].held > 0 && !self.gone[index] {
                self.gone[index] = true;
                self.available += self.views[index].held;
                self.plan.preempt.push(index);
            }
        }
        let tokens = chunk(oldest, self.rules.step_tokens, self.rules.block_tokens);
        if need <= self.available && tokens > 0 {
            self.plan.shape = match oldest.pending {
                1 => self.plan.shape.with_sequence(oldest.computed),
                _ => self.plan.shape.with_prompt(oldest.computed, tokens),
            };
            self.plan.run.push((0, tokens));
        }
    }
}

/// As much as the budget allows; a chunk that is not the last ends on a block's edge.
fn chunk(view: &View, budget: usize, block_tokens: usize) -> usize {
    if view.pending <= budget {
        return view.pending;
    }
    let end = (view.computed + budget) / block_tokens * block_tokens;
    end.saturating_sub(view.computed)
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
