//! How fast the fleet is, learned from what requests took.

/// What the router has learned of the fleet's speed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Model {
    /// What a remote prefill costs besides queueing and computing: round trips, exposed transfer.
    pub remote_overhead_ms: f64,
    /// Speed of prefill workers: a guess until one has computed a prompt.
    remote_tokens_per_second: f64,
    is_remote_known: bool,
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

    /// One that has seen no prefill yet.
    pub const fn new(remote_overhead_ms: f64, remote_tokens_per_second: f64) -> Self {
        Self { remote_overhead_ms, remote_tokens_per_second, is_remote_known: false, local: (0.0, 0.0) }
    }

    /// A remote prefill of so many tokens took `compute_ms`, and `overhead_ms` besides and without its queue.
    pub fn learn_remote(&mut self, tokens: usize, compute_ms: f64, overhead_ms: f64) {
        let learn = |old: &mut f64, new: f64, share: f64| *old += (new - *old) * share;
        learn(&mut self.remote_overhead_ms, overhead_ms.clamp(0.0, 10_000.0), LEARN);
        if compute_ms > 0.0 && tokens >= TELLING_TOKENS {
            let share = if std::mem::replace(&mut self.is_remote_known, true) { LEARN } else { 1.0 };
            learn(&mut self.remote_tokens_per_second, tokens as f64 / compute_ms * 1e3, share);
        }
        let as_fast = self.local.0 / self.remote_tokens_per_second * 1e3;
        learn(&mut self.local.1, as_fast, FORGET);
    }

    /// On a decode worker `tokens`, those queued before it included, took `ms` from placement to the first token.
    pub fn learn_local(&mut self, tokens: usize, ms: f64) {
        if ms > 0.0 && tokens >= TELLING_TOKENS {
            let share = if self.local.0 > 0.0 { LEARN } else { 1.0 };
            self.local.0 += (tokens as f64 - self.local.0) * share;
            self.local.1 += (ms - self.local.1) * share;
        }
    }

    /// What prefills on decode workers took, as a speed.
    fn measured_locally(&self) -> Option<f64> {
        let (tokens, ms) = self.local;
        (tokens > 0.0 && ms > 0.0).then(|| tokens / ms * 1e3)
    }

    /// Speed assumed for a prefill worker where no peer has measured its own: where none ever computed a prompt, not slower than decode
    /// workers are beside their sequences.
    pub(super) fn prefill_tokens_per_second(&self) -> f64 {
        match self.measured_locally() {
            Some(local) if !self.is_remote_known => local.max(self.remote_tokens_per_second),
            _ => self.remote_tokens_per_second,
        }
    }

    /// How fast decode workers prefill beside their sequences. Never faster than a prefill worker.
    pub(super) fn local_tokens_per_second(&self) -> f64 {
        let most = self.prefill_tokens_per_second();
        self.measured_locally().map_or(most, |local| local.min(most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_prefill_pool_only_what_was_measured_counts() {
        let mut model = Model::FIRST_GUESS;
        assert_eq!((model.local_tokens_per_second(), model.prefill_tokens_per_second()), (500.0, 500.0));
        (0..3).for_each(|_| model.learn_local(1000, 50.0));
        assert_eq!(model.local_tokens_per_second(), 20_000.0);
        // A prefill worker that joins is tried: it counts as fast as that.
        assert_eq!(model.prefill_tokens_per_second(), 20_000.0);
        // Its first prompt says what it is; no decode worker is faster.
        model.learn_remote(1000, 100.0, 5.0);
        assert_eq!(
            (model.prefill_tokens_per_second(), model.local_tokens_per_second()),
            (10_000.0, 10_000.0)
        );
    }

    #[test]
    fn slow_local_prefills_do_not_make_the_pool_slow() {
        let mut model = Model::FIRST_GUESS;
        model.learn_local(1000, 10_000.0);
        assert_eq!((model.local_tokens_per_second(), model.prefill_tokens_per_second()), (100.0, 500.0));
    }
}
