//! The vocabulary of one engine step: segments in, sampled tokens out.

use crate::{EngineError, EngineInfo, KvLayout};

/// How a sequence draws its tokens. Zero-cost defaults: greedy, nothing penalised, nothing biased.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy. Logits are divided by it otherwise.
    pub temperature: f32,
    /// Nucleus: smallest set of tokens whose probability reaches this. 1 is off.
    pub top_p: f32,
    /// Only the k most likely tokens. 0 is off.
    pub top_k: u32,
    /// Only tokens at least this fraction as likely as the most likely one. 0 is off.
    pub min_p: f32,
    /// Divides (positive) or multiplies (negative) logits of tokens seen in prompt or output. 1 is off.
    /// Keskar et al. 2019, CTRL, section 4.1.
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens that occurred in the output. 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the output. 0 is off.
    pub frequency_penalty: f32,
    /// Together with the choice and the output position it determines every draw, on any worker.
    pub seed: u64,
    /// Return the log-probability of the drawn token and of this many most likely ones.
    pub logprobs: Option<u32>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            logprobs: None,
            logit_bias: Vec::new(),
        }
    }
}

/// What an output must look like, as a function of the output so far.
pub trait Constraint: Send + Sync + std::fmt::Debug {
    /// Sets the logits of all tokens that may not follow `output` to minus infinity. `choice` only helps to find again
    /// what was worked out for an earlier part of the same output.
    fn restrict(&self, choice: u32, output: &[u32], logits: &mut [f32]);
}

/// One token to draw from the logits of a segment's last token.
#[derive(Debug, Clone, Copy)]
pub struct SampleRequest<'a> {
    /// How to draw.
    pub params: &'a SamplingParams,
    /// The prompt's tokens (for the repetition penalty).
    pub prompt: &'a [u32],
    /// The tokens drawn so far; its length is the output position that enters the random draw.
    pub output: &'a [u32],
    /// Tokens that may not be drawn now (end tokens while `min_tokens` is not reached).
    pub banned: &'a [u32],
    /// The form that the output must have.
    pub constraint: Option<&'a dyn Constraint>,
    /// Which of the `n` parallel choices of a request this is; enters the random draw.
    pub choice: u32,
}

/// Consecutive tokens of one sequence, at `position..position + tokens.len()`.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// The tokens to run. Never empty.
    pub tokens: &'a [u32],
    /// Position of the first one in its sequence; KV for everything before it is in `blocks` already.
    pub position: usize,
    /// Block table: block `i` holds positions `i * block_tokens ..`. Covers every token of the segment.
    pub blocks: &'a [u32],
    /// Draws from the last token's logits; empty when no logits are wanted.
    pub samples: &'a [SampleRequest<'a>],
}

impl Segment<'_> {
    fn check(&self, layout: &KvLayout, info: &EngineInfo) -> Result<(), String> {
        if self.tokens.is_empty() {
            return Err("no tokens".into());
        }
        let end = self.position.checked_add(self.tokens.len());
        let end = end.filter(|&end| end <= info.max_context_tokens).ok_or_else(|| {
            format!(
                "{} tokens at {} pass the context of {}",
                self.tokens.len(),
                self.position,
                info.max_context_tokens
            )
        })?;
        if let Some(token) = self.tokens.iter().find(|&&token| token as usize >= info.vocab_size) {
            return Err(format!("token {token}, the vocabulary has {}", info.vocab_size));
        }
        let needed = layout.blocks_for(end);
        let table = self.blocks.get(..needed).ok_or_else(|| {
            format!("{end} tokens need {needed} blocks, the table has {}", self.blocks.len())
        })?;
        match table.iter().find(|&&block| block as usize >= layout.blocks) {
            Some(block) => Err(format!("block {block}, the pool has {}", layout.blocks)),
            None => Ok(()),
        }
    }
}

/// One step: a ragged list of segments of different sequences.
#[derive(Debug, Clone, Default)]
pub struct Batch<'a> {
    /// The segments. No block is written by two of them.
    pub segments: Vec<Segment<'a>>,
}

impl Batch<'_> {
    /// Number of tokens over all segments.
    pub fn tokens(&self) -> usize {
        self.segments.iter().map(|s| s.tokens.len()).sum()
    }

    /// What every backend checks before it touches memory: token ids, positions, block tables.
    pub fn validate(&self, layout: &KvLayout, info: &EngineInfo) -> Result<(), EngineError> {
        for (index, segment) in self.segments.iter().enumerate() {
            segment
                .check(layout, info)
                .map_err(|reason| EngineError::BadBatch(format!("segment {index}: {reason}")))?;
        }
        Ok(())
    }
}

/// A drawn token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token's id.
    pub token: u32,
    /// Its natural-log probability under the model (before temperature and filters). NaN unless asked for.
    pub logprob: f32,
    /// The most likely tokens with their log-probabilities, best first, when asked for.
    pub top: Vec<(u32, f32)>,
}
