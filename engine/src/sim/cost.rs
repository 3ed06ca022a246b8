//! How long a step takes by a profile. Pure, and cheap enough for hundreds of millions of steps.

use super::Profile;
use crate::model::ModelConfig;
use crate::roofline::{Chunk, Numbers, Part, Work, kv_bytes_per_token};

/// What a step does, added up chunk by chunk.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepLoad {
    rows: f64,
    drawn: f64,
    decode_kv_tokens: f64,
    attention_seconds: f64,
}

/// A network on a device, ready to be asked.
#[derive(Debug, Clone)]
pub struct Cost {
    flops: f64,
    bytes: f64,
    /// Operations of one row through the layers' products; bytes of their weights.
    row_flops: f64,
    layer_weight_bytes: f64,
    head_flops: f64,
    head_bytes: f64,
    /// Operations of one pair of tokens in attention, all layers.
    pair_flops: f64,
    kv_seconds_per_token: f64,
    layers: f64,
    fixed_seconds: f64,
    sequence_seconds: f64,
    /// Of one exchange of activations: fixed, per row.
    exchange: [f64; 2],
    products: Curve,
    attention: Curve,
}

impl Cost {
    /// For a network of this shape.
    pub fn new(shape: &ModelConfig, profile: &Profile) -> Self {
        let numbers = Numbers { weights: profile.weights, kv: profile.kv };
        let one = [Chunk { position: 0, tokens: 1, draws: true }];
        let part = |part| Work::of_part(shape, numbers, part, &one);
        let (head, attention) = (part(Part::Head), part(Part::Attention));
        let all = Work::of(shape, numbers, &one);
        let devices = profile.devices.max(1) as f64;
        let bytes = profile.bytes_per_second * devices;
        let layers = shape.layers as f64;
        let exchange = profile.exchange.filter(|_| devices > 1.0).map_or([0.0; 2], |exchange| {
            // A ring moves each number twice, less what is there already; after attention and after the MLP.
            let row = 2.0 * (devices - 1.0) / devices * shape.hidden as f64 * 2.0;
            [2.0 * layers * exchange.latency_seconds, 2.0 * layers * row / exchange.bytes_per_second]
        });
        Self {
            flops: profile.flops_per_second * devices,
            bytes,
            row_flops: all.product_flops - head.product_flops,
            layer_weight_bytes: all.weight_bytes - head.weight_bytes,
            head_flops: head.product_flops,
            head_bytes: head.weight_bytes,
            pair_flops: attention.attention_flops,
            kv_seconds_per_token: kv_bytes_per_token(shape, profile.kv) / (bytes * profile.kv_read),
            layers,
            fixed_seconds: profile.step_seconds + profile.layer_seconds * layers,
            sequence_seconds: profile.sequence_seconds,
            exchange,
            products: Curve::new(&profile.products),
            attention: Curve::new(&profile.attention),
        }
    }

    /// Adds a chunk to a step.
    pub fn add(&self, load: &mut StepLoad, chunk: Chunk) {
        load.rows += chunk.tokens as f64;
        load.drawn += f64::from(u8::from(chunk.draws));
        if chunk.tokens == 1 {
            load.decode_kv_tokens += (chunk.position + 1) as f64;
        } else {
            let reached = self.flops * self.attention.at(chunk.tokens as f64);
            load.attention_seconds += chunk.pairs() * self.pair_flops / reached;
        }
    }

    /// Adds `sequences` that decode with `context_tokens` behind them in sum.
    pub fn add_decoding(&self, load: &mut StepLoad, sequences: usize, context_tokens: usize) {
        load.rows += sequences as f64;
        load.drawn += sequences as f64;
        load.decode_kv_tokens += (context_tokens + sequences) as f64;
    }

    /// Seconds of the step.
    pub fn seconds(&self, load: &StepLoad) -> f64 {
        if load.rows == 0.0 {
            return 0.0;
        }
        self.fixed_seconds
            + self.products_seconds(load)
            + load.attention_seconds
            + load.decode_kv_tokens * self.kv_seconds_per_token
            + load.drawn * self.sequence_seconds
            + self.exchange[0]
            + load.rows * self.exchange[1]
    }

    fn products_seconds(&self, load: &StepLoad) -> f64 {
        let layers = (load.rows * self.row_flops / self.flops).max(self.layer_weight_bytes / self.bytes);
        (layers + self.head_floor(load)) / self.products.at(load.rows)
    }

    fn head_floor(&self, load: &StepLoad) -> f64 {
        let head = (load.drawn * self.head_flops / self.flops).max(self.head_bytes / self.bytes);
        if load.drawn > 0.0 { head } else { 0.0 }
    }

    /// When the KV of a layer is final in a step of `seconds`: layers share the time before the head evenly, and a layer's
    /// keys and values stand after about a quarter of it; the engine says so when the layer is done.
    pub fn layer_final_seconds(&self, seconds: f64, load: &StepLoad, layer: usize) -> f64 {
        let head = self.head_floor(load) / self.products.at(load.rows);
        (seconds - head).max(0.0) * (layer + 1) as f64 / self.layers
    }
}

/// Points (x, fraction) with straight lines between them over ln x; flat outside.
#[derive(Debug, Clone)]
struct Curve {
    /// (ln x, fraction).
    points: Vec<(f64, f64)>,
}

impl Curve {
    fn new(points: &[[f64; 2]]) -> Self {
        Self { points: points.iter().map(|[x, fraction]| (x.max(1.0).ln(), *fraction)).collect() }
    }

    fn at(&self, x: f64) -> f64 {
        let x = x.max(1.0).ln();
        let after = self.points.partition_point(|(point, _)| *point < x);
        match (after.checked_sub(1).and_then(|i| self.points.get(i)), self.points.get(after)) {
            (Some((x0, y0)), Some((x1, y1))) => y0 + (y1 - y0) * (x - x0) / (x1 - x0),
            (Some((_, y)), None) | (None, Some((_, y))) => *y,
            (None, None) => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::roofline::shapes;

    fn ms(shape: &str, profile: &str, chunks: &[Chunk]) -> f64 {
        let cost = Cost::new(&shapes::named(shape).unwrap(), &Profile::built_in(profile).unwrap());
        let mut load = StepLoad::default();
        chunks.iter().for_each(|chunk| cost.add(&mut load, *chunk));
        cost.seconds(&load) * 1e3
    }

    fn close(what: &str, is: f64, measured: f64, share: f64) {
        assert!((is / measured - 1.0).abs() < share, "{what}: {is:.2} ms, measured {measured}");
    }

    /// bench/RESULTS-H100.md, 8B shape, bf16.
    #[test]
    fn follows_the_measured_h100() {
        for (batch, measured) in [(1, 5.72), (8, 6.06), (32, 7.91), (64, 9.78), (128, 13.37), (256, 21.12)] {
            let is = ms("llama-8b", "h100", &vec![Chunk::decode(1200); batch]);
            close(&format!("batch {batch}"), is, measured, 0.03);
        }
        for (tokens, measured) in [(128, 6.83), (512, 12.64), (2048, 47.55), (8192, 211.98)] {
            close(
                &format!("{tokens} tokens"),
                ms("llama-8b", "h100", &[Chunk::prompt(tokens)]),
                measured,
                0.05,
            );
        }
        for (size, measured) in
            [(128, 16.42), (256, 20.56), (512, 28.73), (1024, 43.36), (2048, 72.29), (4096, 130.01)]
        {
            let mut step = vec![Chunk::decode(1200); 128];
            step.push(Chunk { position: 4096, tokens: size, draws: false });
            close(&format!("chunk {size}"), ms("llama-8b", "h100", &step), measured, 0.06);
        }
    }

    /// The same page in FP8.
    #[test]
    fn follows_the_measured_h100_in_fp8() {
        for (batch, measured) in [(1, 5.39), (8, 5.31), (32, 6.58), (128, 11.81), (256, 19.43)] {
            let is = ms("llama-8b", "h100-fp8", &vec![Chunk::decode(1200); batch]);
            close(&format!("batch {batch}"), is, measured, 0.04);
        }
        for (tokens, measured) in [(512, 7.89), (2048, 29.86), (8192, 137.31)] {
            close(
                &format!("{tokens} tokens"),
                ms("llama-8b", "h100-fp8", &[Chunk::prompt(tokens)]),
                measured,
                0.06,
            );
        }
    }

    /// A shape that was not fitted: Qwen3 8B within a tenth.
    #[test]
    fn carries_over_to_another_shape() {
        for (batch, measured) in [(1, 6.03), (32, 8.45), (128, 14.47)] {
            close(
                &format!("batch {batch}"),
                ms("qwen3-8b", "h100", &vec![Chunk::decode(1200); batch]),
                measured,
                0.1,
            );
        }
        for (tokens, measured) in [(512, 12.33), (2048, 47.52), (8192, 207.65)] {
            close(&format!("{tokens}"), ms("qwen3-8b", "h100", &[Chunk::prompt(tokens)]), measured, 0.1);
        }
    }

    #[test]
    fn decoding_added_at_once_is_decoding_added_one_by_one() {
        let shape = shapes::named("llama-8b").unwrap();
        let cost = Cost::new(&shape, &Profile::built_in("h100").unwrap());
        let (mut one, mut all) = (StepLoad::default(), StepLoad::default());
        [10, 500, 3000].iter().for_each(|&context| cost.add(&mut one, Chunk::decode(context)));
        cost.add_decoding(&mut all, 3, 3510);
        assert!((cost.seconds(&one) - cost.seconds(&all)).abs() < 1e-12);
    }

    #[test]
    fn layers_share_the_time_before_the_head() {
        let shape = shapes::named("llama-8b").unwrap();
        let cost = Cost::new(&shape, &Profile::built_in("h100").unwrap());
        let mut load = StepLoad::default();
        cost.add(&mut load, Chunk::prompt(2048));
        let seconds = cost.seconds(&load);
        let last = cost.layer_final_seconds(seconds, &load, 31);
        assert!(last < seconds && last > 0.98 * seconds);
        assert!((cost.layer_final_seconds(seconds, &load, 0) * 32.0 - last).abs() < 1e-9);
    }
}
