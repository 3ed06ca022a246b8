//! What a step must at least cost: its operations over the device's rate, its bytes over the memory's.

use engine::model::ModelConfig;
use serde::Serialize;

/// What the device was measured to reach.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Ceilings {
    /// Multiply-adds count as two.
    pub flops_per_second: f64,
    /// Reading memory.
    pub bytes_per_second: f64,
}

/// Work of one step.
#[derive(Debug, Clone, Copy, Default)]
pub struct Work {
    /// Operations; a multiply-add counts as two.
    pub flops: f64,
    /// Bytes of weights and KV, each read once.
    pub bytes: f64,
}

impl Work {
    /// Chunks `(position, tokens)`, each drawing one token at its end.
    pub fn of(
        config: &ModelConfig,
        weight_bytes: usize,
        chunks: impl IntoIterator<Item = (usize, usize)>,
    ) -> Self {
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let layer = config.hidden * (2 * q + 2 * kv) + 3 * config.hidden * config.ffn;
        let mut work = Self { flops: 0.0, bytes: weight_bytes as f64 };
        for (position, tokens) in chunks {
            let (position, tokens) = (position as f64, tokens as f64);
            // Every token sees those before it: q·k and weights·v.
            let pairs = tokens * position + tokens * (tokens + 1.0) / 2.0;
            let attention = 4.0 * pairs * q as f64 * config.layers as f64;
            let products = 2.0 * tokens * (layer * config.layers) as f64;
            let head = 2.0 * (config.vocab * config.hidden) as f64;
            work.flops += attention + products + head;
            work.bytes += (position + tokens) * (config.layers * 2 * kv * 2) as f64;
        }
        work
    }

    /// The least time, milliseconds, and which side sets it.
    pub fn floor_ms(&self, ceilings: &Ceilings) -> Option<(f64, &'static str)> {
        if ceilings.flops_per_second == 0.0 || ceilings.bytes_per_second == 0.0 {
            return None;
        }
        let compute = self.flops / ceilings.flops_per_second * 1e3;
        let memory = self.bytes / ceilings.bytes_per_second * 1e3;
        Some(if compute > memory { (compute, "compute") } else { (memory, "memory") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counted by hand for Llama 3.1 8B: 6.98e9 weights in the layers, 131,072 bytes of KV a token.
    #[test]
    fn an_8b_model_costs_what_it_should() {
        let config = super::super::shapes::named("llama-8b").expect("a shape");
        let work = Work::of(&config, 0, [(0, 2048)]);
        let products = 2.0 * 2048.0 * 6_979_321_856.0;
        let attention = 4.0 * (2048.0 * 2049.0 / 2.0) * 4096.0 * 32.0;
        let head = 2.0 * 128_256.0 * 4096.0;
        assert!((work.flops - products - attention - head).abs() < 1e6, "{}", work.flops);
        assert_eq!(work.bytes, 2048.0 * 131_072.0);
    }

    #[test]
    fn decode_is_bound_by_memory_and_prefill_by_compute() {
        let config = super::super::shapes::named("llama-8b").expect("a shape");
        let h100 = Ceilings { flops_per_second: 763e12, bytes_per_second: 3.0e12 };
        let side = |chunk| Work::of(&config, 15_000_000_000, [chunk]).floor_ms(&h100).map(|floor| floor.1);
        assert_eq!(side((1200, 1)), Some("memory"));
        assert_eq!(side((0, 2048)), Some("compute"));
    }
}
