//! The engine that computes nothing: the same batches, contract and KV pool, but a step takes the time that a profile says, and
//! token ids are a function of what came before. So a whole cluster of real processes can be run for a device or a
//! network that is not at hand.

mod cost;
mod memory;
mod profile;

pub use cost::{Cost, StepLoad};
pub use profile::{Exchange, Profile, ProfileError};

use std::sync::Arc;
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::xxh3_64_with_seed;

use self::memory::SimKv;
use crate::model::ModelConfig;
use crate::roofline::Chunk;
use crate::sampling::{GREEDY_BELOW, sample};
use crate::{
    Batch, Engine, EngineError, EngineInfo, KvDtype, KvLayout, KvMemory, SampleRequest, Sampled, Segment,
};

/// Size of the engine.
#[derive(Debug, Clone)]
pub struct SimOptions {
    /// Blocks of the KV pool.
    pub kv_blocks: usize,
    /// Tokens per block.
    pub block_tokens: usize,
    /// Element type of the KV pool.
    pub kv_dtype: KvDtype,
    /// Most tokens of one step.
    pub max_batch_tokens: usize,
}

/// See the module's documentation.
pub struct SimEngine {
    kv: Arc<SimKv>,
    cost: Cost,
    info: EngineInfo,
    eos: Vec<u32>,
    max_batch_tokens: usize,
    layers: usize,
}

impl SimEngine {
    /// Answers in the vocabulary of `text`, takes the time of `shape`.
    pub fn new(
        text: &ModelConfig,
        shape: &ModelConfig,
        profile: &Profile,
        options: SimOptions,
    ) -> Result<Self, EngineError> {
        let layout = layout(shape, profile, &options);
        let info = EngineInfo {
            backend: "sim",
            device: format!("sim ({}, {} layers of width {})", profile.name, shape.layers, shape.hidden),
            max_context_tokens: text.max_context,
            vocab_size: text.vocab,
        };
        Ok(Self {
            kv: Arc::new(SimKv::new(layout)?),
            cost: Cost::new(shape, profile),
            info,
            eos: text.eos.clone(),
            max_batch_tokens: options.max_batch_tokens,
            layers: shape.layers,
        })
    }

    /// Same sequence, same token, on any worker; never one that ends the output.
    fn token(&self, segment: &Segment<'_>, request: &SampleRequest<'_>) -> u32 {
        let last = segment.tokens.last().copied().unwrap_or(0);
        let position = (segment.position + segment.tokens.len()) as u64;
        let mut bytes = [0u8; 16];
        bytes[..8].copy_from_slice(&position.to_le_bytes());
        bytes[8..12].copy_from_slice(&last.to_le_bytes());
        bytes[12..].copy_from_slice(&request.choice.to_le_bytes());
        let vocab = self.info.vocab_size as u64;
        // Greedy is the same whatever the seed, as with logits.
        let is_greedy = request.params.temperature < GREEDY_BELOW;
        let seed = if is_greedy { 0 } else { request.params.seed };
        let first = xxh3_64_with_seed(&bytes, seed) % vocab;
        let is_free = |token: &u32| !self.eos.contains(token) && !request.banned.contains(token);
        (0..vocab).map(|step| ((first + step) % vocab) as u32).find(is_free).unwrap_or(0)
    }

    /// Whoever asks for a form or for probabilities gets them, from logits that have the token as their peak.
    fn draw(&self, segment: &Segment<'_>, request: &SampleRequest<'_>) -> Sampled {
        let token = self.token(segment, request);
        let is_plain = request.constraint.is_none()
            && request.params.logprobs.is_none()
            && request.params.logit_bias.is_empty();
        if is_plain {
            return Sampled { token, logprob: f32::NAN, top: Vec::new() };
        }
        sample(&mut self.logits(token), request)
    }

    fn logits(&self, peak: u32) -> Vec<f32> {
        let mut logits = vec![0.0; self.info.vocab_size];
        logits[peak as usize] = 8.0;
        logits
    }
}

fn layout(shape: &ModelConfig, profile: &Profile, options: &SimOptions) -> KvLayout {
    KvLayout {
        layers: shape.layers,
        blocks: options.kv_blocks,
        kv_heads: shape.kv_heads,
        block_tokens: options.block_tokens,
        head_dim: (shape.head_dim / profile.cell_divisor.max(1)).max(2),
        dtype: options.kv_dtype,
    }
}

/// Bytes of one block over all layers, as transports see it.
pub fn block_bytes(shape: &ModelConfig, profile: &Profile, block_tokens: usize, kv_dtype: KvDtype) -> usize {
    layout(shape, profile, &SimOptions { kv_blocks: 1, block_tokens, kv_dtype, max_batch_tokens: 1 })
        .total_bytes()
}

fn sleep_until(at: Instant) {
    let left = at.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        std::thread::sleep(left);
    }
}

impl Engine for SimEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn kv(&self) -> Arc<dyn KvMemory> {
        Arc::clone(&self.kv) as Arc<dyn KvMemory>
    }

    fn forward(
        &mut self,
        batch: &Batch<'_>,
        on_layer: &mut dyn FnMut(usize),
    ) -> Result<Vec<Vec<Sampled>>, EngineError> {
        let started = Instant::now();
        batch.validate(self.kv.layout(), &self.info)?;
        let tokens = batch.tokens();
        if tokens > self.max_batch_tokens {
            let most = self.max_batch_tokens;
            return Err(EngineError::BadBatch(format!("{tokens} tokens in a step of at most {most}")));
        }
        let mut load = StepLoad::default();
        for segment in &batch.segments {
            let draws = !segment.samples.is_empty();
            self.cost
                .add(&mut load, Chunk { position: segment.position, tokens: segment.tokens.len(), draws });
        }
        let seconds = self.cost.seconds(&load);
        let at = |seconds: f64| started + Duration::from_secs_f64(seconds);
        // Nobody waits for the layers of a step that only decodes.
        let is_prefill = tokens > batch.segments.len();
        for layer in 0..self.layers {
            if is_prefill {
                sleep_until(at(self.cost.layer_final_seconds(seconds, &load, layer)));
            }
            on_layer(layer);
        }
        let drawn = batch.segments.iter().map(|s| s.samples.iter().map(|r| self.draw(s, r)).collect());
        let drawn = drawn.collect();
        sleep_until(at(seconds));
        Ok(drawn)
    }

    fn forward_logits(&mut self, batch: &Batch<'_>) -> Result<Vec<Vec<f32>>, EngineError> {
        batch.validate(self.kv.layout(), &self.info)?;
        let params = crate::SamplingParams::default();
        let greedy = SampleRequest {
            params: &params,
            prompt: &[],
            output: &[],
            banned: &[],
            constraint: None,
            choice: 0,
        };
        let logits = batch.segments.iter().map(|segment| self.logits(self.token(segment, &greedy)));
        Ok(logits.collect())
    }

    fn copy_blocks(&mut self, pairs: &[(u32, u32)]) -> Result<(), EngineError> {
        let blocks = self.kv.layout().blocks;
        match pairs.iter().find(|(from, to)| (*from).max(*to) as usize >= blocks) {
            Some(pair) => {
                Err(EngineError::BadBatch(format!("copy of blocks {pair:?}, the pool has {blocks}")))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::SamplingParams;
    use crate::roofline::shapes;

    fn engine(shape: &str) -> SimEngine {
        let text = shapes::named("smollm2").unwrap();
        let shape = shapes::named(shape).unwrap();
        let profile = Profile::built_in("h100").unwrap();
        let options =
            SimOptions { kv_blocks: 4096, block_tokens: 16, kv_dtype: KvDtype::Bf16, max_batch_tokens: 8192 };
        SimEngine::new(&text, &shape, &profile, options).unwrap()
    }

    fn run(engine: &mut SimEngine, tokens: &[u32], position: usize) -> (u32, Vec<Duration>, Duration) {
        let params = SamplingParams::default();
        let samples = [SampleRequest {
            params: &params,
            prompt: &[],
            output: &[],
            banned: &[],
            constraint: None,
            choice: 0,
        }];
        let blocks: Vec<u32> = (0..4096).collect();
        let segments = vec![Segment { tokens, position, blocks: &blocks, samples: &samples }];
        let (started, mut layers) = (Instant::now(), Vec::new());
        let drawn = engine.forward(&Batch { segments }, &mut |_| layers.push(started.elapsed())).unwrap();
        (drawn[0][0].token, layers, started.elapsed())
    }

    /// An 8B prompt of 2048 tokens takes 47.5 ms on an H100, its layers come one after the other on the way.
    #[test]
    fn a_step_takes_the_profiles_time_and_layers_come_on_the_way() {
        let mut engine = engine("llama-8b");
        let prompt: Vec<u32> = (100..2148).collect();
        let (_, layers, whole) = run(&mut engine, &prompt, 0);
        let ms = whole.as_secs_f64() * 1e3;
        // The machine may be busy: late is possible, early is not.
        assert!(ms > 45.0, "{ms}");
        assert_eq!(layers.len(), 32);
        let first = layers[0].as_secs_f64() * 1e3;
        assert!(first > 1.0 && layers.is_sorted() && layers[15].as_secs_f64() * 1e3 > 20.0, "{layers:?}");
    }

    #[test]
    fn tokens_are_a_function_of_the_sequence() {
        let (mut one, mut other) = (engine("smollm2"), engine("llama-1b"));
        let prompt: Vec<u32> = (100..140).collect();
        let whole = run(&mut one, &prompt, 0).0;
        assert_eq!(whole, run(&mut other, &prompt[32..], 32).0, "in chunks, elsewhere, of another shape");
        assert_ne!(whole, run(&mut one, &prompt[..39], 0).0);
    }

    #[test]
    fn a_large_pool_costs_little_memory() {
        let shape = shapes::named("llama-70b").unwrap();
        let text = shapes::named("smollm2").unwrap();
        let profile = Profile { cell_divisor: 1, ..Profile::built_in("h100").unwrap() };
        let options =
            SimOptions { kv_blocks: 20_000, block_tokens: 16, kv_dtype: KvDtype::Bf16, max_batch_tokens: 64 };
        let engine = SimEngine::new(&text, &shape, &profile, options).unwrap();
        let kv = engine.kv();
        assert!(kv.layout().total_bytes() > 100_000_000_000);
        assert_eq!(kv.checksum(0, 0), kv.checksum(79, 19_999));
        let start = kv.host_address().unwrap();
        // SAFETY: the last byte of the pool, which lives as long as `kv`.
        unsafe { start.add(kv.layout().total_bytes() - 1).write(0) };
    }
}
