//! A request as it comes over the wire, checked against what the engine can do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::kv::hash::{self, BlockHash};
use engine::{KvLayout, Sampled, SamplingParams};
use proto::v1;
use tonic::Status;

/// Most parallel choices of one request.
pub const MAX_CHOICES: u32 = 16;

/// What the engine can take.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Token ids are below it.
    pub vocab_size: usize,
    /// Prompt and output together, in tokens.
    pub max_context_tokens: usize,
    /// Blocks in the pool.
    pub layout: KvLayout,
    /// Requests made for another model, layout or version are refused.
    pub compat_hash: String,
    /// Requests meant for another start of this worker are refused.
    pub incarnation: u64,
}

/// One request, valid.
#[derive(Debug, Clone)]
pub struct Request {
    /// Its id, unique among running ones.
    pub id: String,
    /// Counts from 1.
    pub attempt: u32,
    /// Prompt token ids, at least one.
    pub prompt: Arc<[u32]>,
    /// How tokens are drawn.
    pub sampling: Arc<SamplingParams>,
    /// Output tokens per choice, at most.
    pub max_tokens: usize,
    /// Before that many output tokens no stop token may be drawn.
    pub min_tokens: usize,
    /// Tokens that end a choice.
    pub stop_token_ids: Arc<[u32]>,
    /// Parallel choices.
    pub n: u32,
    /// When the client no longer waits.
    pub deadline: Option<Instant>,
    /// Where the chain of block hashes starts.
    pub root: BlockHash,
    /// Hashes of the prompt's full blocks.
    pub hashes: Arc<[BlockHash]>,
}

impl Request {
    /// Checks and converts. The status names the field.
    pub fn from_wire(
        sequence: Option<v1::Sequence>,
        compat_hash: &str,
        incarnation: u64,
        limits: &Limits,
    ) -> Result<Self, Status> {
        let invalid = |text: String| Err(Status::invalid_argument(text));
        if compat_hash != limits.compat_hash {
            return Err(Status::failed_precondition(format!(
                "compat_hash: the request is for {compat_hash}, this worker serves {}",
                limits.compat_hash
            )));
        }
        if incarnation != 0 && incarnation != limits.incarnation {
            return Err(Status::failed_precondition(format!(
                "incarnation: the request is for start {incarnation} of this worker, this is {}",
                limits.incarnation
            )));
        }
        let Some(s) = sequence else { return invalid("sequence: missing".into()) };
        if s.request_id.is_empty() || s.request_id.len() > 128 {
            return invalid("sequence.request_id: 1 to 128 bytes".into());
        }
        if s.prompt.is_empty() {
            return invalid("sequence.prompt: empty".into());
        }
        if let Some(bad) = s.prompt.iter().find(|t| **t as usize >= limits.vocab_size) {
            return invalid(format!(
                "sequence.prompt: token {bad} is not in the vocabulary of {}",
                limits.vocab_size
            ));
        }
        let max_tokens = s.max_tokens as usize;
        if max_tokens == 0 || s.prompt.len() + max_tokens > limits.max_context_tokens {
            return invalid(format!(
                "sequence.max_tokens: {} prompt tokens and {max_tokens} output tokens, the context is {} tokens",
                s.prompt.len(),
                limits.max_context_tokens
            ));
        }
        let needs = limits.layout.blocks_for(s.prompt.len() + max_tokens);
        if needs > limits.layout.blocks {
            return invalid(format!(
                "sequence: needs {needs} KV blocks, the whole pool has {}; lower max_tokens or raise --kv-blocks",
                limits.layout.blocks
            ));
        }
        if s.n == 0 || s.n > MAX_CHOICES {
            return invalid(format!("sequence.n: 1 to {MAX_CHOICES}, not {}", s.n));
        }
        let sampling = sampling_from_wire(s.sampling.unwrap_or_default());
        sampling
            .validate(limits.vocab_size)
            .map_err(|e| Status::invalid_argument(format!("sampling.{e}")))?;
        let root = root(&limits.compat_hash);
        let hashes = hash::chain(root, &s.prompt, limits.layout.block_tokens);
        Ok(Self {
            id: s.request_id,
            attempt: s.attempt,
            prompt: s.prompt.into(),
            sampling: Arc::new(sampling),
            max_tokens,
            min_tokens: s.min_tokens as usize,
            stop_token_ids: s.stop_token_ids.into(),
            n: s.n,
            deadline: (s.deadline_ms > 0).then(|| Instant::now() + Duration::from_millis(s.deadline_ms)),
            root,
            hashes: hashes.into(),
        })
    }

    /// Hashes of the blocks that may come from a cache: all full ones, but never the whole prompt, since
    /// the last token must be computed for its logits.
    pub fn reusable(&self, block_tokens: usize) -> &[BlockHash] {
        &self.hashes[..((self.prompt.len() - 1) / block_tokens).min(self.hashes.len())]
    }

    /// Stop tokens that may not be drawn as output token number `position`.
    pub fn banned(&self, position: usize) -> &[u32] {
        if position < self.min_tokens { &self.stop_token_ids } else { &[] }
    }
}

/// The root of the hash chain: equal only where KV is interchangeable.
pub fn root(compat_hash: &str) -> BlockHash {
    BlockHash::root(compat_hash.as_bytes())
}

fn sampling_from_wire(s: v1::EngineSampling) -> SamplingParams {
    let mut logit_bias: Vec<(u32, f32)> = s.logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|(token, _)| *token);
    SamplingParams {
        temperature: s.temperature,
        top_p: s.top_p,
        top_k: s.top_k,
        min_p: s.min_p,
        repetition_penalty: s.repetition_penalty,
        presence_penalty: s.presence_penalty,
        frequency_penalty: s.frequency_penalty,
        seed: s.seed,
        logprobs: s.logprobs,
        logit_bias,
    }
}

/// A drawn token for the wire.
pub fn sampled_to_wire(choice: u32, sampled: &Sampled, params: &SamplingParams) -> v1::SampledToken {
    let logprob = params.logprobs.map(|_| v1::TokenLogprob {
        token_id: sampled.token,
        logprob: sampled.logprob,
        top: sampled.top.iter().map(|&(token_id, logprob)| v1::TopLogprob { token_id, logprob }).collect(),
    });
    v1::SampledToken { choice, token_id: sampled.token, logprob }
}

/// A load for the wire.
pub fn load_to_wire(load: &cluster::Load) -> v1::Load {
    v1::Load {
        queued_tokens: load.queued_tokens,
        running: load.running,
        waiting: load.waiting,
        free_blocks: load.free_blocks,
        tokens_per_second: load.tokens_per_second,
    }
}
