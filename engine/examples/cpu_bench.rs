//! Speed of the CPU engine, with the memory's speed beside it.
//!
//! `cargo run --release -p engine --example cpu_bench -- [FOLDER | 135m | 1.1b] [THREADS] [KV: bf16 | f32] [int8 | int8-per-token]`

use std::path::Path;
use std::time::Instant;

use engine::cpu::{CpuEngine, CpuOptions};
use engine::model::{Architecture, ModelConfig, Quantisation, Rope, RopeScaling};
use engine::{Batch, Engine, KvDtype, SampleRequest, SamplingParams, Segment};

type Failure = Box<dyn std::error::Error>;

const BLOCK_TOKENS: usize = 16;

fn shape(
    layers: usize,
    hidden: usize,
    ffn: usize,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        layers,
        hidden,
        ffn,
        heads,
        kv_heads,
        head_dim: 64,
        vocab,
        max_context: 8192,
        rms_eps: 1e-5,
        rope: Rope { theta: 1e5, scaling: RopeScaling::None },
        qkv_bias: false,
        o_bias: false,
        qk_norm: false,
        windows: vec![None; layers],
        tie_embeddings: true,
        quantised: None,
        bos: None,
        eos: vec![],
    }
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let model = arguments.first().map_or("135m", String::as_str);
    let threads = arguments.get(1).map_or(Ok(0), |text| text.parse())?;
    let kv_dtype =
        if arguments.get(2).is_some_and(|text| text == "f32") { KvDtype::F32 } else { KvDtype::Bf16 };
    let options = CpuOptions {
        kv_blocks: 2560,
        block_tokens: BLOCK_TOKENS,
        kv_dtype,
        threads,
        quantise: arguments.get(3).map(|_| Quantisation::Int8),
        per_token: arguments.get(3).is_some_and(|text| text == "int8-per-token"),
        ..CpuOptions::default()
    };
    let started = Instant::now();
    let mut engine = match model {
        "135m" => CpuEngine::from_random(shape(30, 576, 1536, 9, 3, 49152), 1, options)?,
        "1.1b" => CpuEngine::from_random(shape(22, 2048, 5632, 32, 4, 32000), 1, options)?,
        folder => CpuEngine::load(Path::new(folder), options)?,
    };
    println!(
        "{}, {:.0} M parameters, ready in {:.1} s",
        engine.info().device,
        engine.config().parameters() as f64 / 1e6,
        started.elapsed().as_secs_f64()
    );
    for peak in engine.peaks() {
        println!("{}: {:.0} G operations/s", peak.name, peak.ops_per_second / 1e9);
    }
    println!("memory read: {:.1} GB/s", engine.ceilings()?.bytes_per_second / 1e9);
    prefill(&mut engine, 512)?;
    for batch in [1, 4, 8, 16, 32] {
        decode(&mut engine, batch, 128)?;
    }
    decode(&mut engine, 1, 1024)?;
    prefill(&mut engine, 2048)
}

fn tokens(engine: &CpuEngine, count: usize) -> Vec<u32> {
    let vocab = engine.info().vocab_size as u32;
    (0..count as u32).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect()
}

fn prefill(engine: &mut CpuEngine, count: usize) -> Result<(), Failure> {
    let (tokens, blocks) = (tokens(engine, count), (0..2560).collect::<Vec<u32>>());
    let params = SamplingParams::default();
    let samples = [SampleRequest {
        params: &params,
        prompt: &[],
        output: &[],
        banned: &[],
        constraint: None,
        choice: 0,
    }];
    let mut best = f64::MAX;
    for _ in 0..4 {
        let segment = Segment { tokens: &tokens, position: 0, blocks: &blocks, samples: &samples };
        let started = Instant::now();
        engine.forward(&Batch { segments: vec![segment] }, &mut |_| {})?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    println!("prefill {count:5}: {:7.0} tok/s", count as f64 / best);
    Ok(())
}

fn decode(engine: &mut CpuEngine, batch: usize, context: usize) -> Result<(), Failure> {
    let prompt = tokens(engine, context);
    let per_sequence = (context + 64).div_ceil(BLOCK_TOKENS) as u32;
    let tables: Vec<Vec<u32>> =
        (0..batch as u32).map(|i| (i * per_sequence..(i + 1) * per_sequence).collect()).collect();
    for blocks in &tables {
        engine.forward(
            &Batch { segments: vec![Segment { tokens: &prompt, position: 0, blocks, samples: &[] }] },
            &mut |_| {},
        )?;
    }
    let params = SamplingParams::default();
    let samples = [SampleRequest {
        params: &params,
        prompt: &[],
        output: &[],
        banned: &[],
        constraint: None,
        choice: 0,
    }];
    let (steps, mut times) = (32, Vec::new());
    for step in 0..steps {
        let segments = tables.iter().map(|blocks| Segment {
            tokens: &prompt[step..=step],
            position: context + step,
            blocks,
            samples: &samples,
        });
        let batch = Batch { segments: segments.collect() };
        let started = Instant::now();
        engine.forward(&batch, &mut |_| {})?;
        times.push(started.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    println!(
        "decode B={batch:2} at {context:4}: {:6.1} tok/s, {:5.2} ms/step, weights at {:4.1} GB/s",
        batch as f64 / median,
        median * 1e3,
        engine.streamed_bytes() as f64 / median / 1e9
    );
    Ok(())
}
