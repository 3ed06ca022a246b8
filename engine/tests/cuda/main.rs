//! The CUDA engine against the CPU engine, and its kernels against each other. Without a usable GPU every test says
//! so and passes: the same tests run on a machine that has one.

#![allow(clippy::unwrap_used)]

mod blocks;
mod draws;
mod eight_bits;
mod gpudirect;
mod kernels;
mod megakernel;
mod real_model;

use engine::cpu::{CpuEngine, CpuOptions};
use engine::cuda::{CudaEngine, CudaOptions};
use engine::model::{Architecture, ModelConfig, Quantisation, Rope, RopeScaling};
use engine::{Batch, Engine, EngineError, KvDtype, SampleRequest, SamplingParams, Segment};

pub(crate) const BLOCKS: usize = 512;

pub(crate) const BLOCK_TOKENS: usize = 16;

/// A small network of a kind.
pub(crate) fn shape(head_dim: usize, heads: usize, kv_heads: usize) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        layers: 3,
        hidden: 512,
        ffn: 1024,
        heads,
        kv_heads,
        head_dim,
        vocab: 2048,
        max_context: 4096,
        rms_eps: 1e-5,
        rope: Rope { theta: 1e5, scaling: RopeScaling::None },
        qkv_bias: false,
        o_bias: false,
        qk_norm: false,
        windows: vec![None; 3],
        tie_embeddings: false,
        quantised: None,
        bos: None,
        eos: Vec::new(),
    }
}

pub(crate) fn kinds() -> Vec<(&'static str, ModelConfig)> {
    let norms = ModelConfig { qk_norm: true, architecture: Architecture::Qwen3, ..shape(128, 8, 2) };
    let biases = ModelConfig { qkv_bias: true, tie_embeddings: true, ..shape(64, 14, 2) };
    let window = ModelConfig { windows: vec![Some(100); 3], ..shape(128, 8, 8) };
    vec![
        ("dim 64, 9/3 heads", shape(64, 9, 3)),
        ("dim 128, 32/8 heads", shape(128, 32, 8)),
        ("dim 128, 16/1 heads", shape(128, 16, 1)),
        ("query and key norms", norms),
        ("biases, tied", biases),
        ("window", window),
        ("dim 32: plain attention", shape(32, 8, 4)),
    ]
}

pub(crate) fn options() -> CudaOptions {
    CudaOptions { kv_blocks: BLOCKS, block_tokens: BLOCK_TOKENS, max_sequences: 64, ..CudaOptions::default() }
}

/// An engine with random weights; see [`unless_unsupported`].
pub(crate) fn cuda(config: &ModelConfig, options: CudaOptions) -> Option<CudaEngine> {
    unless_unsupported(CudaEngine::from_random(config.clone(), 7, options))
}

/// The engine, or `None` (said aloud) where there is no GPU. Anything else that goes wrong fails the test.
pub(crate) fn unless_unsupported(made: Result<CudaEngine, EngineError>) -> Option<CudaEngine> {
    match made {
        Ok(engine) => Some(engine),
        Err(EngineError::Unsupported(why)) => {
            assert!(std::env::var_os("TANDEM_REQUIRE_CUDA").is_none(), "{why}");
            eprintln!("skipped: {why}");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

pub(crate) fn quantised(kind: Quantisation, prepare: bool) -> CudaOptions {
    CudaOptions { quantise: Some(kind), prepare, ..options() }
}

pub(crate) fn cpu(config: &ModelConfig) -> CpuEngine {
    cpu_in(config, None)
}

pub(crate) fn cpu_in(config: &ModelConfig, quantise: Option<Quantisation>) -> CpuEngine {
    let (kv_dtype, per_token) = (KvDtype::F32, true);
    let options = CpuOptions { kv_blocks: BLOCKS, kv_dtype, quantise, per_token, ..CpuOptions::default() };
    CpuEngine::from_random(config.clone(), 7, options).unwrap()
}

pub(crate) fn prompt(length: usize, seed: u32) -> Vec<u32> {
    (0..length as u32).map(|i| (i.wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) % 2048).collect()
}

/// Block tables that are not in order, as real ones are not.
pub(crate) fn table(sequence: usize, tokens: usize) -> Vec<u32> {
    let count = tokens.div_ceil(BLOCK_TOKENS);
    assert!(count <= 56);
    (0..count).map(|i| (sequence * 56 + count - 1 - i) as u32).collect()
}

/// Logits of the last token of each prompt, run in chunks of at most `chunk`.
pub(crate) fn logits(engine: &mut dyn Engine, prompts: &[Vec<u32>], chunk: usize) -> Vec<Vec<f32>> {
    let tables: Vec<_> = prompts.iter().enumerate().map(|(i, p)| table(i, p.len())).collect();
    let mut last = vec![Vec::new(); prompts.len()];
    let mut done = vec![0; prompts.len()];
    while done.iter().zip(prompts).any(|(done, prompt)| *done < prompt.len()) {
        let open: Vec<usize> = (0..prompts.len()).filter(|&i| done[i] < prompts[i].len()).collect();
        let end = |i: usize| prompts[i].len().min(done[i] + chunk);
        let segments = open.iter().map(|&i| Segment {
            tokens: &prompts[i][done[i]..end(i)],
            position: done[i],
            blocks: &tables[i],
            samples: &[],
        });
        let out = engine.forward_logits(&Batch { segments: segments.collect() }).unwrap();
        let ends: Vec<usize> = open.iter().map(|&i| end(i)).collect();
        for ((i, end), out) in open.into_iter().zip(ends).zip(out) {
            (done[i], last[i]) = (end, out);
        }
    }
    last
}

/// ‖a − b‖ / ‖b‖
pub(crate) fn error(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    let pairs = || a.iter().flatten().zip(b.iter().flatten());
    assert_eq!(a.iter().flatten().count(), b.iter().flatten().count());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let (off, size) =
        pairs().fold((0.0, 0.0), |(off, size), (a, b)| (off + square(a - b), size + square(*b)));
    (off / size).sqrt()
}

pub(crate) const LENGTHS: [usize; 9] = [1, 5, 16, 64, 127, 128, 129, 300, 700];

pub(crate) fn prompts() -> Vec<Vec<u32>> {
    LENGTHS.iter().zip(1..).map(|(&length, seed)| prompt(length, seed)).collect()
}

/// Greedy continuation of all prompts together: prompts in one step, then decode steps.
pub(crate) fn continuation(engine: &mut dyn Engine, prompts: &[Vec<u32>], steps: usize) -> Vec<Vec<u32>> {
    let params = SamplingParams::default();
    let mut sequences = prompts.to_vec();
    let tables: Vec<_> = prompts.iter().enumerate().map(|(i, p)| table(i, p.len() + steps)).collect();
    let mut done = vec![0; prompts.len()];
    for _ in 0..steps {
        let samples: Vec<_> = prompts
            .iter()
            .zip(&sequences)
            .map(|(prompt, all)| {
                let output = &all[prompt.len()..];
                [SampleRequest { params: &params, prompt, output, banned: &[], constraint: None, choice: 0 }]
            })
            .collect();
        let segments = (0..prompts.len()).map(|i| Segment {
            tokens: &sequences[i][done[i]..],
            position: done[i],
            blocks: &tables[i],
            samples: &samples[i],
        });
        let drawn = engine.forward(&Batch { segments: segments.collect() }, &mut |_| {}).unwrap();
        for (i, drawn) in drawn.iter().enumerate() {
            done[i] = sequences[i].len();
            sequences[i].push(drawn[0].token);
        }
    }
    sequences.iter().zip(prompts).map(|(all, prompt)| all[prompt.len()..].to_vec()).collect()
}
