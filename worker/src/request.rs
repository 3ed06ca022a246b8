//! A request as it comes over the wire, checked against what the engine can do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use constraint::Vocabulary;
use engine::kv::hash::{self, BlockHash};
use engine::{KvLayout, SampleRequest, Sampled, SamplingParams};
use proto::v1;
use tonic::Status;

use crate::form::Form;

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
    /// Requests made for another model or version are refused.
    pub compat_hash: String,
    /// Requests meant for another start of this worker are refused.
    pub incarnation: u64,
    /// For grammars.
    pub vocabulary: Vocabulary,
}

impl Limits {
    /// What a sender of KV must know of the pool besides the compatibility hash.
    pub fn form(&self) -> v1::KvForm {
        let block_tokens = u32::try_from(self.layout.block_tokens).unwrap_or(u32::MAX);
        v1::KvForm { block_tokens, dtype: self.layout.dtype.name().to_owned() }
    }
}

/// A request on a worker: clients choose ids, and several routers may see the same one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    origin: String,
    id: String,
}

impl Key {
    /// Of the request of that id that came through that router.
    pub fn new(origin: &str, id: &str) -> Self {
        Self { origin: origin.to_owned(), id: id.to_owned() }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.id)
    }
}

/// One request, valid.
#[derive(Debug, Clone)]
pub struct Request {
    /// Its id, as the client knows it.
    pub id: String,
    /// Unique among running ones: the id and the router it came through.
    pub key: Key,
    /// Counts from 1.
    pub attempt: u32,
    /// Prompt token ids, at least one.
    pub prompt: Arc<[u32]>,
    /// What each choice has put out so far, on other workers.
    pub outputs: Arc<[Vec<u32>]>,
    /// The choices that go on.
    pub open: Arc<[u32]>,
    /// The prompt and what all open outputs begin with: computed once, for all of them.
    pub stem: Arc<[u32]>,
    /// How tokens are drawn.
    pub sampling: Arc<SamplingParams>,
    /// The form of the output, where it must have one.
    pub form: Option<Arc<Form>>,
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
    /// Hashes of the stem's full blocks.
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
        let mut sampling = s.sampling.unwrap_or_default();
        let grammar = std::mem::take(&mut sampling.grammar);
        let sampling = sampling_from_wire(sampling);
        sampling
            .validate(limits.vocab_size)
            .map_err(|e| Status::invalid_argument(format!("sampling.{e}")))?;
        let (outputs, open) = outputs_from_wire(s.outputs, s.n, max_tokens, limits.vocab_size)?;
        let shared = common_prefix(open.iter().map(|choice| outputs[*choice as usize].as_slice()));
        let stem: Arc<[u32]> = s.prompt.iter().chain(shared).copied().collect();
        let root = root(&limits.compat_hash);
        let hashes = hash::chain(root, &stem, limits.layout.block_tokens);
        if s.origin.len() > 128 {
            return invalid("sequence.origin: at most 128 bytes".into());
        }
        Ok(Self {
            key: Key::new(&s.origin, &s.request_id),
            id: s.request_id,
            attempt: s.attempt,
            prompt: s.prompt.into(),
            outputs: outputs.into(),
            open: open.into(),
            stem,
            sampling: Arc::new(sampling),
            form: (!grammar.is_empty()).then(|| Form::start(grammar, &limits.vocabulary)),
            max_tokens,
            min_tokens: s.min_tokens as usize,
            stop_token_ids: s.stop_token_ids.into(),
            n: s.n,
            deadline: (s.deadline_ms > 0).then(|| Instant::now() + Duration::from_millis(s.deadline_ms)),
            root,
            hashes: hashes.into(),
        })
    }

    /// Why what was drawn is not to be used, if so.
    pub fn form_failure(&self) -> Option<Status> {
        self.form.as_ref().and_then(|form| form.failure())
    }

    /// Hashes of the blocks that may come from a cache: all full ones, but never the whole stem, since the
    /// last token must be computed for its logits.
    pub fn reusable(&self, block_tokens: usize) -> &[BlockHash] {
        &self.hashes[..((self.stem.len() - 1) / block_tokens).min(self.hashes.len())]
    }

    /// Output tokens that the stem ends with.
    pub fn stem_output(&self) -> &[u32] {
        &self.stem[self.prompt.len()..]
    }

    /// The choices whose next token is drawn where the stem ends; the others have put out more already.
    pub fn drawn_at_stem(&self) -> impl Iterator<Item = u32> + '_ {
        let end = self.stem_output().len();
        self.open.iter().copied().filter(move |choice| self.outputs[*choice as usize].len() == end)
    }

    /// The draws at the stem's end.
    pub fn stem_draws(&self) -> Vec<SampleRequest<'_>> {
        let output = self.stem_output();
        self.drawn_at_stem().map(|choice| self.draw(choice, output)).collect()
    }

    /// The next draw of a choice that has put out these tokens.
    pub fn draw<'a>(&'a self, choice: u32, output: &'a [u32]) -> SampleRequest<'a> {
        let banned = self.banned(output.len());
        let constraint = self.form.as_deref().map(|form| form as _);
        SampleRequest { params: &self.sampling, prompt: &self.prompt, output, banned, constraint, choice }
    }

    /// Stop tokens that may not be drawn as output token number `position`.
    pub fn banned(&self, position: usize) -> &[u32] {
        if position < self.min_tokens { &self.stop_token_ids } else { &[] }
    }
}

/// Checked outputs, one per choice, and the choices that go on.
fn outputs_from_wire(
    outputs: Vec<v1::ChoiceOutput>,
    n: u32,
    max_tokens: usize,
    vocab_size: usize,
) -> Result<(Vec<Vec<u32>>, Vec<u32>), Status> {
    if outputs.is_empty() {
        return Ok((vec![Vec::new(); n as usize], (0..n).collect()));
    }
    let invalid = |text: String| Err(Status::invalid_argument(text));
    if outputs.len() != n as usize {
        return invalid(format!("sequence.outputs: {} for {n} choices", outputs.len()));
    }
    let open: Vec<u32> = (0..n).zip(&outputs).filter(|(_, o)| !o.ended).map(|(choice, _)| choice).collect();
    if open.is_empty() {
        return invalid("sequence.outputs: every choice has ended".into());
    }
    for output in &outputs {
        let room = if output.ended { max_tokens } else { max_tokens - 1 };
        if output.tokens.len() > room {
            return invalid(format!("sequence.outputs: {} tokens of {max_tokens}", output.tokens.len()));
        }
        if let Some(bad) = output.tokens.iter().find(|t| **t as usize >= vocab_size) {
            return invalid(format!(
                "sequence.outputs: token {bad} is not in the vocabulary of {vocab_size}"
            ));
        }
    }
    Ok((outputs.into_iter().map(|output| output.tokens).collect(), open))
}

/// What all of them begin with.
fn common_prefix<'a>(mut lists: impl Iterator<Item = &'a [u32]>) -> &'a [u32] {
    let first = lists.next().unwrap_or_default();
    lists.fold(first, |common, list| {
        let same = common.iter().zip(list).take_while(|(a, b)| a == b).count();
        &common[..same]
    })
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

/// The span of the caller, if it told.
pub fn traceparent<T>(call: &tonic::Request<T>) -> Option<&str> {
    call.metadata().get(telemetry::trace::TRACEPARENT).and_then(|value| value.to_str().ok())
}

/// A drawn token for the wire.
pub fn sampled_to_wire(
    choice: u32,
    position: usize,
    sampled: &Sampled,
    params: &SamplingParams,
) -> v1::SampledToken {
    let logprob = params.logprobs.map(|_| v1::TokenLogprob {
        token_id: sampled.token,
        logprob: sampled.logprob,
        top: sampled.top.iter().map(|&(token_id, logprob)| v1::TopLogprob { token_id, logprob }).collect(),
    });
    let position = u32::try_from(position).unwrap_or(u32::MAX);
    v1::SampledToken { choice, token_id: sampled.token, logprob, position }
}

/// A load for the wire.
pub fn load_to_wire(load: &cluster::Load) -> v1::Load {
    v1::Load {
        queued_tokens: load.queued_tokens,
        running: load.running,
        waiting: load.waiting,
        free_blocks: load.free_blocks,
        tokens_per_second: load.tokens_per_second,
        draining: load.draining,
        stuck: load.stuck,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::KvDtype;

    fn limits() -> Limits {
        let layout = KvLayout {
            layers: 1,
            blocks: 64,
            kv_heads: 1,
            block_tokens: 4,
            head_dim: 8,
            dtype: KvDtype::F32,
        };
        Limits {
            vocab_size: 100,
            max_context_tokens: 256,
            layout,
            compat_hash: "c".into(),
            incarnation: 7,
            vocabulary: Vocabulary::of(std::path::Path::new("."), 100, &[0]),
        }
    }

    fn with_outputs(outputs: &[(&[u32], bool)]) -> Result<Request, Status> {
        let outputs: Vec<_> = outputs
            .iter()
            .map(|(tokens, ended)| v1::ChoiceOutput { tokens: tokens.to_vec(), ended: *ended })
            .collect();
        let n = outputs.len().max(1) as u32;
        let sequence = v1::Sequence {
            request_id: "r".into(),
            attempt: 1,
            prompt: vec![1, 2, 3],
            max_tokens: 4,
            n,
            sampling: Some(v1::EngineSampling { top_p: 1.0, repetition_penalty: 1.0, ..Default::default() }),
            outputs,
            ..Default::default()
        };
        Request::from_wire(Some(sequence), "c", 7, &limits())
    }

    #[test]
    fn the_stem_is_what_open_choices_share() {
        let fresh = with_outputs(&[]).unwrap();
        assert_eq!((&*fresh.stem, &*fresh.open), (&[1, 2, 3][..], &[0][..]));

        let resumed = with_outputs(&[(&[5, 6, 7], false), (&[9], true), (&[5, 6], false)]).unwrap();
        assert_eq!(&*resumed.stem, [1, 2, 3, 5, 6]);
        assert_eq!(&*resumed.open, [0, 2]);
        // Choice 0 is ahead of the stem; only choice 2 draws there.
        assert_eq!(resumed.drawn_at_stem().collect::<Vec<_>>(), [2]);
        assert_eq!(resumed.stem_draws()[0].output, [5, 6]);
        assert_eq!(resumed.reusable(4).len(), 1);
    }

    #[test]
    fn outputs_are_checked() {
        for (outputs, words) in [
            (&[(&[1u32][..], true)][..], "every choice has ended"),
            (&[(&[1, 2, 3, 4], false)], "4 tokens of 4"),
            (&[(&[100], false)], "token 100"),
        ] {
            let error = with_outputs(outputs).unwrap_err();
            assert!(error.message().contains(words), "{error}");
        }
    }
}
