//! How fast one worker of each role is: a few coefficients, measured by `tandem bench engine` or on the live cluster.

use serde::{Deserialize, Serialize};

/// Seconds that work takes on one worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Profile {
    /// Seconds of a prefill whatever its length.
    pub prefill_base_seconds: f64,
    /// Seconds per prompt token.
    pub prefill_token_seconds: f64,
    /// Seconds per prompt token squared: attention.
    pub prefill_token_squared_seconds: f64,
    /// Seconds of a decode step whatever its batch: reading the weights.
    pub step_base_seconds: f64,
    /// Seconds of a decode step per sequence.
    pub step_sequence_seconds: f64,
    /// Seconds of a decode step per token of KV that its sequences have.
    pub step_kv_token_seconds: f64,
    /// Tokens that a worker's KV pool holds.
    pub kv_tokens: f64,
    /// Sequences at once on one decode worker.
    pub max_sequences: f64,
    /// Seconds from the decision for a worker until it takes requests.
    pub start_seconds: f64,
}

impl Default for Profile {
    fn default() -> Self {
        Self::H100_8B
    }
}

impl Profile {
    /// An 8B model in bf16 on one H100, fitted to bench/RESULTS-H100.md within 8 % from batch 1 to 256 and prompts of 512 to
    /// 8192 tokens; 40 GiB of KV; a minute to start.
    pub const H100_8B: Self = Self {
        prefill_base_seconds: 0.0025,
        prefill_token_seconds: 20.8e-6,
        prefill_token_squared_seconds: 0.58e-9,
        step_base_seconds: 5.66e-3,
        step_sequence_seconds: 6.0e-6,
        step_kv_token_seconds: 45.2e-9,
        kv_tokens: 327_680.0,
        max_sequences: 256.0,
        start_seconds: 60.0,
    };

    /// Seconds of computing a prompt of which `cached` tokens are there already.
    pub fn prefill_seconds(&self, tokens: f64, cached: f64) -> f64 {
        let new = (tokens - cached).max(1.0);
        // Attention of the new tokens reads all before them: the area of a trapezoid.
        let squares = new * (tokens + cached);
        self.prefill_base_seconds
            + self.prefill_token_seconds * new
            + self.prefill_token_squared_seconds * squares
    }

    /// Seconds of one decode step of `sequences` with `kv_tokens` between them.
    pub fn step_seconds(&self, sequences: f64, kv_tokens: f64) -> f64 {
        self.step_base_seconds
            + self.step_sequence_seconds * sequences
            + self.step_kv_token_seconds * kv_tokens
    }

    /// Sequences of `context` tokens each that one worker can run with steps of at most `itl` seconds; at least 1.
    pub fn largest_batch(&self, itl: f64, context: f64) -> f64 {
        let per_sequence = self.step_sequence_seconds + self.step_kv_token_seconds * context;
        let in_time = (itl - self.step_base_seconds) / per_sequence;
        in_time.min(self.kv_tokens / context.max(1.0)).min(self.max_sequences).floor().max(1.0)
    }

    /// Sequences that one worker has at once when `tokens_per_second` of output are asked of it, each sequence with
    /// `context` tokens; `None` when it cannot keep up with any batch.
    pub fn batch_at(&self, tokens_per_second: f64, context: f64) -> Option<f64> {
        let per_sequence = self.step_sequence_seconds + self.step_kv_token_seconds * context;
        let left = 1.0 - tokens_per_second * per_sequence;
        (left > 0.0).then(|| tokens_per_second * self.step_base_seconds / left)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn follows_the_measured_h100() {
        let p = Profile::H100_8B;
        for (batch, ms) in [(1.0, 5.72), (8.0, 6.06), (32.0, 7.91), (128.0, 13.37), (256.0, 21.12)] {
            let is = p.step_seconds(batch, batch * 1200.0) * 1e3;
            assert!((is / ms - 1.0).abs() < 0.08, "batch {batch}: {is} ms, measured {ms}");
        }
        for (tokens, ms) in [(512.0, 12.64), (2048.0, 47.55), (8192.0, 211.98)] {
            let is = p.prefill_seconds(tokens, 0.0) * 1e3;
            assert!((is / ms - 1.0).abs() < 0.08, "{tokens} tokens: {is} ms, measured {ms}");
        }
    }

    #[test]
    fn a_batch_that_keeps_up_makes_the_tokens() {
        let p = Profile::H100_8B;
        let batch = p.batch_at(5000.0, 1000.0).unwrap();
        let rate = batch / p.step_seconds(batch, batch * 1000.0);
        assert!((rate - 5000.0).abs() < 1.0, "{rate}");
        assert!(p.batch_at(1e6, 1000.0).is_none());
    }

    #[test]
    fn cached_tokens_save_their_time_only() {
        let p = Profile::H100_8B;
        let (whole, half) = (p.prefill_seconds(8000.0, 0.0), p.prefill_seconds(8000.0, 4000.0));
        assert!(half < whole && half > whole * 0.5, "the later half sees longer attention");
    }
}
