//! Where the time of a step goes: per part, and as a trace to look at.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;
use engine::profile::{Part, Span};
use engine::roofline::{self, Dtype, Numbers, Work};
use serde::Serialize;
use serde_json::{Value, json};

use super::measure::{Chunk, Drawing, decodes, fill, prompts, with_batch};
use super::{BLOCK_TOKENS, Ceilings, Measured, Settings};

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
    /// Tera-operations a second, for products and attention.
    pub tera_flops: Option<f64>,
    /// Terabytes of weights and KV a second.
    pub tera_bytes: Option<f64>,
    /// What the ceilings allow, and which of them binds.
    pub floor_ms: Option<f64>,
    /// `compute` or `memory`.
    pub bound: Option<&'static str>,
}

/// What floors are made of.
pub(super) struct Floors<'a> {
    pub(super) ceilings: &'a Ceilings,
    /// Operations a second of attention, where its instruction is not that of the products.
    pub(super) attention: Option<f64>,
    /// Bytes of weights that a decode step reads.
    pub(super) streamed: usize,
}

/// Profiles a prompt of 2048 tokens (on a CPU also of 512) and decode steps.
pub(super) fn measure(
    settings: &Settings,
    measured: &mut Measured,
    floors: &Floors<'_>,
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<Profile>> {
    let (vocab, context) = (settings.config.vocab, settings.context);
    let mut steps = Vec::new();
    let lengths = if matches!(measured, Measured::Cpu(_)) { [512, 2048] } else { [2048, 8192] };
    for length in lengths.into_iter().filter(|&length| length <= settings.max_prompt) {
        let mut prompt = prompts(1, length, vocab, BLOCK_TOKENS, super::STEP_TOKENS);
        steps.push((format!("prefill of {length} tokens"), prompt.swap_remove(0)));
    }
    for batch in [1, 32, 128].into_iter().filter(|&batch| batch <= settings.max_batch) {
        steps.push((format!("decode, batch {batch}"), decodes(batch, context, vocab, BLOCK_TOKENS)));
    }
    fill(measured.engine(), settings.max_batch, context, vocab, BLOCK_TOKENS)?;
    let mut profiles = Vec::new();
    for (step, chunks) in steps {
        progress(&format!("profile: {step}"));
        // The first run warms up.
        with_batch(&chunks, &Drawing::default(), |batch| measured.profile(batch))?;
        let runs = settings.runs.max(1);
        let all: Result<Vec<_>, _> = (0..runs)
            .map(|_| with_batch(&chunks, &Drawing::default(), |batch| measured.profile(batch)))
            .collect();
        let spans = median(all?);
        profiles.push(Profile { step, parts: parts(settings, &chunks, &spans, floors), spans });
    }
    Ok(profiles)
}

/// The run whose length is the middle one.
fn median(mut runs: Vec<Vec<Span>>) -> Vec<Span> {
    runs.sort_by(|a, b| length(a).total_cmp(&length(b)));
    let middle = runs.len() / 2;
    runs.swap_remove(middle)
}

fn length(spans: &[Span]) -> f64 {
    spans.iter().map(|span| span.ms).sum()
}

fn parts(settings: &Settings, chunks: &[Chunk], spans: &[Span], floors: &Floors<'_>) -> Vec<PartRow> {
    let mut sums: BTreeMap<Part, f64> = BTreeMap::new();
    for span in spans {
        *sums.entry(span.part).or_default() += span.ms;
    }
    let weights = settings.quantise.map_or(Dtype::Bf16, |_| Dtype::Int8);
    let numbers = Numbers { weights, kv: settings.kv_type() };
    let chunks: Vec<_> = chunks.iter().map(super::tables::chunk_of).collect();
    let of = |part| Work::of_part(&settings.config, numbers, part, &chunks);
    let layers: f64 = roofline::Part::ALL[..5].iter().map(|&part| of(part).weight_bytes).sum();
    let row = |(part, ms): (Part, f64)| {
        let work = counted(part).map(|counted| match counted {
            // What the engine says it reads: it knows whether its head is rounded.
            roofline::Part::Head => Work { weight_bytes: floors.streamed as f64 - layers, ..of(counted) },
            _ => of(counted),
        });
        let flops_per_second = match (part, floors.attention) {
            (Part::Attention, Some(flops)) => flops,
            _ => floors.ceilings.flops_per_second,
        };
        let ceilings = Ceilings { flops_per_second, ..*floors.ceilings };
        let floor = work.and_then(|work| work.floor_ms(&ceilings));
        PartRow {
            part: part.name(),
            ms,
            tera_flops: work.map(|work| work.flops() / ms / 1e9),
            tera_bytes: work.map(|work| work.bytes() / ms / 1e9),
            floor_ms: floor.map(|floor| floor.0),
            bound: floor.map(|floor| floor.1.name()),
        }
    };
    sums.into_iter().map(row).collect()
}

/// The part as the roofline counts it.
fn counted(part: Part) -> Option<roofline::Part> {
    Some(match part {
        Part::Qkv => roofline::Part::Qkv,
        Part::Attention => roofline::Part::Attention,
        Part::Output => roofline::Part::Output,
        Part::GateUp => roofline::Part::GateUp,
        Part::Down => roofline::Part::Down,
        Part::Head => roofline::Part::Head,
        _ => return None,
    })
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
        writeln!(
            f,
            "| {} | ms, all layers | share | TFLOP/s | TB/s of weights and KV | reached |",
            self.step
        )?;
        writeln!(f, "|---|---|---|---|---|---|")?;
        for part in &self.parts {
            write!(f, "| {} | {:.3} | {:.0} % ", part.part, part.ms, part.ms / total * 100.0)?;
            match (part.tera_flops, part.tera_bytes) {
                (Some(flops), Some(bytes)) => write!(f, "| {} | {bytes:.4} ", significant(flops))?,
                _ => write!(f, "| | ")?,
            }
            match (part.floor_ms, part.bound) {
                (Some(floor), Some(bound)) => writeln!(f, "| {:.0} % ({bound}) |", floor / part.ms * 100.0)?,
                _ => writeln!(f, "| |")?,
            }
        }
        writeln!(f, "| sum | {total:.3} | | | | |")
    }
}

/// GPUs make hundreds of them, CPU cores tenths.
fn significant(tera: f64) -> String {
    if tera < 10.0 { format!("{tera:.3}") } else { format!("{tera:.0}") }
}
