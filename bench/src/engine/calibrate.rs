//! A profile for the simulator from steps measured on the engine at hand.
//!
//! Attention is told from products by running the same chunk with and without tokens before it; what is left is products,
//! expressed as fractions of the best rates seen.

use anyhow::Result;
use engine::model::ModelConfig;
use engine::roofline::{self, Dtype, Numbers, Part, Work};
use engine::sim::{Exchange, Profile};

use super::measure::{Chunk, Drawing, decodes, fill, table, times, tokens};
use super::{BLOCK_TOKENS, Measured, Settings, build};

/// Rows of decode steps and of chunks; together the products' curve.
const BATCHES: [usize; 6] = [1, 2, 4, 8, 16, 32];
const CHUNKS: [usize; 5] = [32, 64, 128, 256, 512];
/// Tokens behind a chunk, and behind a decoding sequence: none to speak of, and many.
const FEW: usize = BLOCK_TOKENS;
const MANY: usize = 1024;
/// Sequences whose KV is read to measure reading.
const READERS: usize = 8;

/// Measures and fits. The engine is built anew.
pub fn calibrate(settings: &Settings, progress: &mut dyn FnMut(&str)) -> Result<Profile> {
    progress("weights");
    let settings = Settings { max_batch: 32, context: MANY, max_prompt: MANY + 512, ..settings.clone() };
    let mut bench = Bench { measured: build(&settings)?, settings: &settings };
    progress("filling KV");
    fill(bench.measured.engine(), settings.max_batch, MANY, settings.config.vocab, BLOCK_TOKENS)?;
    let mut seen = Seen::default();
    for batch in BATCHES {
        progress(&format!("batch {batch}"));
        seen.decode.push((batch, bench.decode(batch, FEW)?));
    }
    progress("reading KV");
    let (few, many) = (bench.decode(READERS, FEW)?, bench.decode(READERS, MANY)?);
    seen.kv_token_seconds = (many - few).max(1e-12) / (READERS * (MANY - FEW)) as f64;
    for chunk in CHUNKS {
        progress(&format!("chunk of {chunk}"));
        seen.chunks.push((chunk, bench.chunk(chunk, 0)?, bench.chunk(chunk, MANY)?));
    }
    Ok(fit(&settings, bench.measured.engine().info().device.clone(), &seen))
}

struct Bench<'a> {
    measured: Measured,
    settings: &'a Settings,
}

impl Bench<'_> {
    fn seconds(&mut self, step: Vec<Chunk>) -> Result<f64> {
        Ok(times(self.measured.engine(), &[step], &Drawing::default(), self.settings.runs)?.median_ms / 1e3)
    }

    fn decode(&mut self, batch: usize, context: usize) -> Result<f64> {
        self.seconds(decodes(batch, context, self.settings.config.vocab, BLOCK_TOKENS))
    }

    fn chunk(&mut self, count: usize, position: usize) -> Result<f64> {
        let tokens = tokens(count, self.settings.config.vocab, 5);
        let blocks = table(0, position + count, BLOCK_TOKENS);
        self.seconds(vec![Chunk { tokens, position, blocks, draws: true }])
    }
}

/// What was measured, seconds.
#[derive(Default)]
struct Seen {
    /// Batch, step with few tokens behind each.
    decode: Vec<(usize, f64)>,
    kv_token_seconds: f64,
    /// Tokens, step with none and with many tokens before them.
    chunks: Vec<(usize, f64, f64)>,
}

fn fit(settings: &Settings, device: String, seen: &Seen) -> Profile {
    let config = &settings.config;
    let work = |rows: usize, draws: usize| {
        let part = |n: usize, drawn| vec![roofline::Chunk { position: 0, tokens: 1, draws: drawn }; n];
        let mut chunks = part(draws, true);
        chunks.extend(part(rows - draws, false));
        Work::of(config, Numbers::BF16, &chunks)
    };
    let pair_flops = work(1, 1).attention_flops;
    // Seconds of a pair of tokens in the attention of a chunk of so many.
    let pair = |(count, alone, behind): &(usize, f64, f64)| {
        ((behind - alone).max(0.0) / (count * MANY) as f64).max(1e-15)
    };
    let mut products: Vec<(usize, usize, f64)> = Vec::new();
    for (batch, seconds) in &seen.decode {
        let read = seen.kv_token_seconds * (batch * (FEW + 1)) as f64;
        products.push((*batch, *batch, (seconds - read).max(1e-9)));
    }
    for chunk in seen.chunks.iter().filter(|chunk| chunk.0 > BATCHES[BATCHES.len() - 1]) {
        let pairs = roofline::Chunk { position: 0, tokens: chunk.0, draws: true }.pairs();
        products.push((chunk.0, 1, (chunk.1 - pairs * pair(chunk)).max(1e-9)));
    }
    let rate = |(rows, draws, seconds): &(usize, usize, f64)| work(*rows, *draws).product_flops / seconds;
    let flops = products.iter().map(rate).fold(0.0, f64::max);
    let bytes = products.first().map_or(0.0, |(rows, draws, s)| work(*rows, *draws).weight_bytes / s);
    let fraction = |(rows, draws, seconds): &(usize, usize, f64)| {
        [*rows as f64, round(floor(config, flops, bytes, *rows, *draws) / seconds)]
    };
    let attention =
        |chunk: &(usize, f64, f64)| [chunk.0 as f64, round((pair_flops / pair(chunk) / flops).max(1e-4))];
    let kv_bytes = roofline::kv_bytes_per_token(config, Dtype::Bf16);
    Profile {
        name: "measured".into(),
        source: format!("tandem bench engine --write-profile, {} on {device}", settings.name),
        flops_per_second: flops,
        bytes_per_second: bytes,
        memory_bytes: 8e9,
        weights: Dtype::Bf16,
        kv: Dtype::Bf16,
        devices: 1,
        products: products.iter().map(fraction).collect(),
        attention: seen.chunks.iter().map(attention).collect(),
        kv_read: round(kv_bytes / seen.kv_token_seconds / bytes),
        step_seconds: 0.0,
        layer_seconds: 0.0,
        sequence_seconds: 0.0,
        exchange: None,
        link: Exchange { latency_seconds: 1e-4, bytes_per_second: 1.5e9 },
        landing_bytes_per_second: 5e9,
        hop_seconds: 5e-4,
        cell_divisor: 1,
    }
}

/// Layers and head each bound by what binds them, as the simulator counts it.
fn floor(config: &ModelConfig, flops: f64, bytes: f64, rows: usize, draws: usize) -> f64 {
    let part = |part, n: usize| {
        let chunks = vec![roofline::Chunk { position: 0, tokens: 1, draws: true }; n];
        Work::of_part(config, Numbers::BF16, part, &chunks)
    };
    let mut layers = Work::default();
    for p in [Part::Qkv, Part::Output, Part::GateUp, Part::Down] {
        layers += part(p, rows);
    }
    let bound = |work: Work| (work.product_flops / flops).max(work.weight_bytes / bytes);
    bound(layers) + bound(part(Part::Head, draws))
}

fn round(x: f64) -> f64 {
    (x * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use engine::roofline::shapes;
    use engine::sim::{Cost, StepLoad};

    use super::super::{Device, Kind};
    use super::*;

    /// Times made by a known profile come back out of the fitted one.
    #[test]
    fn a_known_profile_is_found_again() {
        let config = shapes::named("smollm2").unwrap();
        let known = Profile { layer_seconds: 0.0, ..Profile::built_in("h100").unwrap() };
        let cost = Cost::new(&config, &known);
        let seconds = |cost: &Cost, chunks: &[roofline::Chunk]| {
            let mut load = StepLoad::default();
            chunks.iter().for_each(|chunk| cost.add(&mut load, *chunk));
            cost.seconds(&load)
        };
        let decode =
            |cost: &Cost, batch, context| seconds(cost, &vec![roofline::Chunk::decode(context); batch]);
        let chunk = |cost: &Cost, tokens, position| {
            seconds(cost, &[roofline::Chunk { position, tokens, draws: true }])
        };
        let seen = Seen {
            decode: BATCHES.iter().map(|&b| (b, decode(&cost, b, FEW))).collect(),
            kv_token_seconds: (decode(&cost, 8, MANY) - decode(&cost, 8, FEW)) / (8 * (MANY - FEW)) as f64,
            chunks: CHUNKS.iter().map(|&c| (c, chunk(&cost, c, 0), chunk(&cost, c, MANY))).collect(),
        };
        let settings = Settings {
            name: "smollm2".into(),
            config: config.clone(),
            quantise: None,
            kv_dtype: engine::KvDtype::Bf16,
            kinds: vec![Kind::Decode],
            runs: 1,
            max_batch: 1,
            max_prompt: 1,
            prompts: Vec::new(),
            context: 1,
            device: Device::Cpu { threads: 1 },
            profile: false,
        };
        let fitted = fit(&settings, "test".into(), &seen);
        fitted.check("fitted").unwrap();
        let again = Cost::new(&config, &fitted);
        for (batch, context) in [(1, 100), (8, 700), (32, 300)] {
            let (is, want) = (decode(&again, batch, context), decode(&cost, batch, context));
            assert!((is / want - 1.0).abs() < 0.02, "batch {batch}: {is} {want}");
        }
        for (tokens, position) in [(64, 0), (256, 512), (512, 0)] {
            let (is, want) = (chunk(&again, tokens, position), chunk(&cost, tokens, position));
            assert!((is / want - 1.0).abs() < 0.02, "chunk {tokens}: {is} {want}");
        }
    }
}
