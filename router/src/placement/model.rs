//! How fast the fleet is, learned from what requests took.

/// What the router has learned of the fleet's speed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Model {
    /// What a remote prefill costs besides queueing and computing: round trips, exposed transfer.
    pub remote_overhead_ms: f64,
    /// Speed assumed for a worker where no peer has measured its own.
    pub default_tokens_per_second: f64,
    /// What prefills on decode workers took, older ones forgotten: tokens, those queued before it included, and ms until the
    /// first token.
    local: (f64, f64),
}

/// Share of a new measurement in what is learned.
const LEARN: f64 = 0.1;

/// The same where nothing was measured: what is not tried any more is slowly forgotten.
const FORGET: f64 = 0.005;

/// Shorter prompts say more about a step's fixed cost than about speed.
const TELLING_TOKENS: usize = 64;

impl Model {
    /// Before anything is known: a small model on a CPU.
    pub const FIRST_GUESS: Self = Self::new(15.0, 500.0);

    /// One that has seen no prefill on a decode worker yet.
    pub const fn new(remote_overhead_ms: f64, default_tokens_per_second: f64) -> Self {
        Self { remote_overhead_ms, default_tokens_per_second, local: (0.0, 0.0) }
    }

    /// A remote prefill of so many tokens took `compute_ms`, and `overhead_ms` besides and without its queue.
    pub fn learn_remote(&mut self, tokens: usize, compute_ms: f64, overhead_ms: f64) {
        let learn = |old: &mut f64, new: f64, share: f64| *old += (new - *old) * share;
        learn(&mut self.remote_overhead_ms, overhead_ms.clamp(0.0, 10_000.0), LEARN);
        if compute_ms > 0.0 && tokens >= TELLING_TOKENS {
            learn(&mut self.default_tokens_per_second, tokens as f64 / compute_ms * 1e3, LEARN);
        }
        let at_default = self.local.0 / self.default_tokens_per_second * 1e3;
        learn(&mut self.local.1, at_default, FORGET);
    }

    /// On a decode worker `tokens`, those queued before it included, took `ms` from placement to the first token.
    pub fn learn_local(&mut self, tokens: usize, ms: f64) {
        if ms > 0.0 && tokens >= TELLING_TOKENS {
            let share = if self.local.0 > 0.0 { LEARN } else { 1.0 };
            self.local.0 += (tokens as f64 - self.local.0) * share;
            self.local.1 += (ms - self.local.1) * share;
        }
    }

    /// How fast decode workers prefill beside their sequences. Never faster than a prefill worker.
    pub(super) fn local_tokens_per_second(&self) -> f64 {
        match self.local {
            (tokens, ms) if tokens > 0.0 && ms > 0.0 => {
                (tokens / ms * 1e3).min(self.default_tokens_per_second)
            }
            _ => self.default_tokens_per_second,
        }
    }
}
