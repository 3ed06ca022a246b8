//! KV between a GPU and its host side: what a transport through host memory waits for.

use anyhow::{Result, bail};
use engine::cuda::{Copied, CudaEngine, CudaOptions};

use super::measure::{Drawing, Times, prompts, times};
use super::report::{Row, Table};
use super::{BLOCK_TOKENS, Device, Kind, Settings};

/// KV that is copied at once.
const BYTES: usize = 512 << 20;
/// The prompt whose KV is brought out while it is computed.
const PROMPT: usize = 2048;

/// Of which GPU, where they are to be measured.
pub(super) fn wanted(settings: &Settings) -> Result<Option<usize>> {
    match settings.device {
        _ if !settings.kinds.contains(&Kind::Copies) => Ok(None),
        Device::Cuda { ordinal } => Ok(Some(ordinal)),
        Device::Cpu { .. } => {
            bail!("--table copies: KV on the CPU lies where transports read it; take --device cuda")
        }
    }
}

pub(super) fn measure(settings: &Settings, ordinal: usize, progress: &mut dyn FnMut(&str)) -> Result<Table> {
    progress("an engine with a host side");
    let config = &settings.config;
    let block =
        BLOCK_TOKENS * config.layers * 2 * config.kv_heads * config.head_dim * settings.kv_dtype.bytes();
    let count = (BYTES / block).max(1);
    let options = CudaOptions {
        device: ordinal,
        kv_blocks: (2 * count).max(PROMPT / BLOCK_TOKENS),
        block_tokens: BLOCK_TOKENS,
        max_batch_tokens: PROMPT,
        prepare: true,
        graphs: false,
        kv_dtype: settings.kv_dtype,
        quantise: settings.quantise,
        ..CudaOptions::default()
    };
    let mut engine = CudaEngine::from_random(config.clone(), 1, options)?;
    progress("copies");
    // Every other block: no two of a worker's need be neighbours.
    let blocks: Vec<u32> = (0..2 * count as u32).step_by(2).collect();
    let mut plain = None;
    let mut rows = Vec::new();
    for Copied { what, milliseconds, plain: is_plain } in engine.copies(&blocks, settings.runs)? {
        let took = Times::of(milliseconds);
        if is_plain {
            plain = Some(took.median_ms);
        }
        let rate = (count * block) as f64 / took.median_ms / 1e6;
        rows.push(row(format!("{what}, {rate:.1} GB/s"), took, count * BLOCK_TOKENS, plain));
    }
    let steps = prompts(1, PROMPT, config.vocab, BLOCK_TOKENS, PROMPT);
    let mut alone = None;
    for publish in [false, true] {
        engine.set_publish(publish);
        let what = if publish { "its KV brought out" } else { "its KV left there" };
        progress(what);
        let took = times(&mut engine, &steps, &Drawing::default(), settings.runs)?;
        alone = alone.or(Some(took.median_ms));
        rows.push(row(format!("prompt of {PROMPT} tokens, {what}"), took, PROMPT, alone));
    }
    Ok(Table { title: "copies".into(), rows })
}

/// A row beside what it is compared with.
fn row(name: String, took: Times, tokens: usize, beside: Option<f64>) -> Row {
    Row {
        name,
        took,
        tokens_per_second: tokens as f64 / took.median_ms * 1e3,
        floor_ms: beside,
        bound: beside.map(|_| "beside it".into()),
        fraction: beside.map(|ms| ms / took.median_ms),
    }
}
