//! Where the time of a step goes: per part, and as a trace to look at.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;
use engine::cuda::{Part, Span};
use serde::Serialize;
use serde_json::{Value, json};

use super::measure::{Chunk, Drawing, decodes, fill, prompts, with_batch};
use super::{BLOCK_TOKENS, Measured, Settings};

/// One step's parts.
#[derive(Debug, Serialize)]
pub struct Profile {
    /// Which step.
    pub step: String,
    /// Sums over the layers, in the order of the step.
    pub parts: Vec<PartRow>,
    #[serde(skip)]
    spans: Vec<Span>,
}

/// One part, over all layers.
#[derive(Debug, Serialize)]
pub struct PartRow {
    /// Which.
    pub part: &'static str,
    /// Milliseconds on the device, gaps between kernels included.
    pub ms: f64,
    /// Tera-operations a second, for products.
    pub tera_flops: Option<f64>,
    /// Terabytes of weights a second, for products of bf16 weights.
    pub tera_bytes: Option<f64>,
}

/// Profiles a prompt of 2048 tokens and decode steps. CUDA only.
pub(super) fn measure(
    settings: &Settings,
    measured: &mut Measured,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<Profile>> {
    let (vocab, context) = (settings.config.vocab, settings.context);
    let mut steps = Vec::new();
    for length in [2048, 8192].into_iter().filter(|&length| length <= settings.max_prompt) {
        let mut prompt = prompts(1, length, vocab, BLOCK_TOKENS, super::STEP_TOKENS);
        steps.push((format!("prefill of {length} tokens"), prompt.swap_remove(0)));
    }
    for batch in [1, 32, 128].into_iter().filter(|&batch| batch <= settings.max_batch) {
        steps.push((format!("decode, batch {batch}"), decodes(batch, context, vocab, BLOCK_TOKENS)));
    }
    fill(measured.engine(), settings.max_batch, context, vocab, BLOCK_TOKENS)?;
    let Measured::Cuda(engine) = measured else { return Ok(Vec::new()) };
    let mut profiles = Vec::new();
    for (step, chunks) in steps {
        progress(&format!("profile: {step}"));
        // The first run warms up.
        with_batch(&chunks, &Drawing::default(), |batch| engine.profile(batch))?;
        let spans = with_batch(&chunks, &Drawing::default(), |batch| engine.profile(batch))?;
        profiles.push(Profile { step, parts: parts(settings, &chunks, &spans), spans });
    }
    Ok(profiles)
}

fn parts(settings: &Settings, chunks: &[Chunk], spans: &[Span]) -> Vec<PartRow> {
    let mut sums: BTreeMap<Part, f64> = BTreeMap::new();
    for span in spans {
        *sums.entry(span.part).or_default() += span.ms;
    }
    let tokens: usize = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
    let row = |(part, ms): (Part, f64)| {
        let weights = weights(settings, part);
        let rows = if part == Part::Head { chunks.len() } else { tokens };
        let rate = |amount: f64| weights.map(|weights| weights * amount / ms / 1e9);
        let bytes = if settings.quantise.is_some() && part != Part::Head { 1.0 } else { 2.0 };
        PartRow { part: part.name(), ms, tera_flops: rate(2.0 * rows as f64), tera_bytes: rate(bytes) }
    };
    sums.into_iter().map(row).collect()
}

/// Numbers in a product's matrix, over all layers.
fn weights(settings: &Settings, part: Part) -> Option<f64> {
    let config = &settings.config;
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let of_layer = match part {
        Part::Qkv => config.hidden * (q + 2 * kv),
        Part::Output => config.hidden * q,
        Part::GateUp => 2 * config.hidden * config.ffn,
        Part::Down => config.hidden * config.ffn,
        Part::Head => return Some((config.hidden * config.vocab) as f64),
        _ => return None,
    };
    Some((of_layer * config.layers) as f64)
}

/// All profiles as a trace for chrome://tracing and Perfetto, one row of the view each.
pub fn trace(profiles: &[Profile]) -> Value {
    let event = |row: usize, span: &Span| {
        json!({
            "name": span.part.name(), "ph": "X", "pid": 1, "tid": row,
            "ts": span.start_ms * 1e3, "dur": span.ms * 1e3,
        })
    };
    let name = |(row, profile): (usize, &Profile)| json!({"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": profile.step}});
    let names = profiles.iter().enumerate().map(name);
    let spans =
        profiles.iter().enumerate().flat_map(|(row, p)| p.spans.iter().map(move |span| event(row, span)));
    json!({"traceEvents": names.chain(spans).collect::<Vec<_>>()})
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: f64 = self.parts.iter().map(|part| part.ms).sum();
        writeln!(f, "| {} | ms, all layers | share | TFLOP/s | TB/s of weights |", self.step)?;
        writeln!(f, "|---|---|---|---|---|")?;
        for part in &self.parts {
            write!(f, "| {} | {:.3} | {:.0} % ", part.part, part.ms, part.ms / total * 100.0)?;
            match (part.tera_flops, part.tera_bytes) {
                (Some(flops), Some(bytes)) => writeln!(f, "| {flops:.0} | {bytes:.2} |")?,
                _ => writeln!(f, "| | |")?,
            }
        }
        writeln!(f, "| sum | {total:.3} | | | |")
    }
}
