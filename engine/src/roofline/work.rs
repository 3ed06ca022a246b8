//! Operations and bytes of a network's parts for the chunks of one step.

use std::ops::AddAssign;

use super::{Bound, Ceilings, Dtype};
use crate::model::ModelConfig;

/// Consecutive tokens of one sequence in a step: a whole prompt, a piece of one, or one token that decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Tokens before them, whose KV is there.
    pub position: usize,
    /// Tokens.
    pub tokens: usize,
    /// Whether a token is drawn at the end.
    pub draws: bool,
}

impl Chunk {
    /// A whole prompt.
    pub fn prompt(tokens: usize) -> Self {
        Self { position: 0, tokens, draws: true }
    }

    /// A sequence that decodes with `position` tokens behind it.
    pub fn decode(position: usize) -> Self {
        Self { position, tokens: 1, draws: true }
    }

    /// Pairs of a token and one that it attends to, itself included.
    pub fn pairs(&self) -> f64 {
        let (position, tokens) = (self.position as f64, self.tokens as f64);
        tokens * position + tokens * (tokens + 1.0) / 2.0
    }
}

/// How weights and KV are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    /// Weights of the layers; embedding and head stay at 16 bits when they are smaller.
    pub weights: Dtype,
    /// KV.
    pub kv: Dtype,
}

impl Numbers {
    /// Both in bf16.
    pub const BF16: Self = Self { weights: Dtype::Bf16, kv: Dtype::Bf16 };

    /// Weights in this, KV in bf16.
    pub fn weights(weights: Dtype) -> Self {
        Self { weights, kv: Dtype::Bf16 }
    }

    /// Quantisers leave the head alone: its rounding shows in every token.
    fn head(self) -> Dtype {
        if self.weights == Dtype::F32 { Dtype::F32 } else { Dtype::Bf16 }
    }
}

/// A piece of the network. All but the head are counted over all layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Queries, keys, values of the hidden state.
    Qkv,
    /// Scores and weighted values.
    Attention,
    /// Back to the hidden state.
    Output,
    /// The two products into the MLP.
    GateUp,
    /// The one out of it.
    Down,
    /// Logits of the tokens that draw.
    Head,
}

impl Part {
    /// In the order of a forward pass.
    pub const ALL: [Self; 6] =
        [Self::Qkv, Self::Attention, Self::Output, Self::GateUp, Self::Down, Self::Head];

    /// In a table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qkv => "qkv",
            Self::Attention => "attention",
            Self::Output => "attention output",
            Self::GateUp => "gate and up",
            Self::Down => "down",
            Self::Head => "head",
        }
    }

    /// Inputs and outputs of the part's matrix of one layer; `None` for attention, which has none.
    fn matrix(self, config: &ModelConfig) -> Option<(usize, usize)> {
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        match self {
            Self::Qkv => Some((config.hidden, q + 2 * kv)),
            Self::Attention => None,
            Self::Output => Some((q, config.hidden)),
            Self::GateUp => Some((config.hidden, 2 * config.ffn)),
            Self::Down => Some((config.ffn, config.hidden)),
            Self::Head => Some((config.hidden, config.vocab)),
        }
    }
}

/// Work of one step, or of a part of it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Operations of products; a multiply-add counts as two.
    pub product_flops: f64,
    /// Operations of attention.
    pub attention_flops: f64,
    /// Weights, each read once.
    pub weight_bytes: f64,
    /// KV, each token of each sequence read or written once.
    pub kv_bytes: f64,
    /// What products read and write besides: inputs and outputs at 16 bits. Not in the floor, since fused kernels and caches
    /// save an unknown part of it.
    pub activation_bytes: f64,
}

impl Work {
    /// Of a whole step.
    pub fn of(config: &ModelConfig, numbers: Numbers, chunks: &[Chunk]) -> Self {
        let mut all = Self::default();
        Part::ALL.iter().for_each(|part| all += Self::of_part(config, numbers, *part, chunks));
        all
    }

    /// Of one part, over all layers.
    pub fn of_part(config: &ModelConfig, numbers: Numbers, part: Part, chunks: &[Chunk]) -> Self {
        let rows = match part {
            Part::Head => chunks.iter().filter(|chunk| chunk.draws).count(),
            _ => chunks.iter().map(|chunk| chunk.tokens).sum(),
        } as f64;
        let Some((inputs, outputs)) = part.matrix(config) else { return attention(config, numbers, chunks) };
        let (layers, dtype) = match part {
            Part::Head => (1.0, numbers.head()),
            _ => (config.layers as f64, numbers.weights),
        };
        let weights = (inputs * outputs) as f64 * layers;
        let is_read = rows > 0.0;
        Self {
            product_flops: 2.0 * rows * weights,
            weight_bytes: if is_read { weights * dtype.bytes() } else { 0.0 },
            activation_bytes: rows * (inputs + outputs) as f64 * layers * Dtype::Bf16.bytes(),
            ..Self::default()
        }
    }

    /// Operations.
    pub fn flops(&self) -> f64 {
        self.product_flops + self.attention_flops
    }

    /// Bytes of weights and KV.
    pub fn bytes(&self) -> f64 {
        self.weight_bytes + self.kv_bytes
    }

    /// Operations per byte of weights and KV.
    pub fn intensity(&self) -> f64 {
        self.flops() / self.bytes()
    }

    /// The least time, milliseconds, and which side sets it; `None` where no ceiling is known.
    pub fn floor_ms(&self, ceilings: &Ceilings) -> Option<(f64, Bound)> {
        if ceilings.flops_per_second <= 0.0 || ceilings.bytes_per_second <= 0.0 {
            return None;
        }
        let compute = self.flops() / ceilings.flops_per_second * 1e3;
        let memory = self.bytes() / ceilings.bytes_per_second * 1e3;
        Some(if compute > memory { (compute, Bound::Compute) } else { (memory, Bound::Memory) })
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.product_flops += other.product_flops;
        self.attention_flops += other.attention_flops;
        self.weight_bytes += other.weight_bytes;
        self.kv_bytes += other.kv_bytes;
        self.activation_bytes += other.activation_bytes;
    }
}

/// Every token sees those before it: q·k and weights·v, two operations each.
fn attention(config: &ModelConfig, numbers: Numbers, chunks: &[Chunk]) -> Work {
    let layers = config.layers as f64;
    let q = (config.heads * config.head_dim) as f64;
    let pairs: f64 = chunks.iter().map(Chunk::pairs).sum();
    let tokens: f64 = chunks.iter().map(|chunk| (chunk.position + chunk.tokens) as f64).sum();
    let rows: f64 = chunks.iter().map(|chunk| chunk.tokens as f64).sum();
    Work {
        attention_flops: 4.0 * pairs * q * layers,
        kv_bytes: tokens * kv_bytes_per_token(config, numbers.kv),
        activation_bytes: 2.0 * rows * q * layers * Dtype::Bf16.bytes(),
        ..Work::default()
    }
}

/// KV of one token, all layers.
pub fn kv_bytes_per_token(config: &ModelConfig, kv: Dtype) -> f64 {
    (config.layers * 2 * config.kv_heads * config.head_dim) as f64 * kv.bytes()
}

/// Weights that lie in memory: the layers, the embedding, and the head unless it is the embedding.
pub fn weight_bytes(config: &ModelConfig, numbers: Numbers) -> f64 {
    let tables = if config.tie_embeddings { 1 } else { 2 };
    let table = (config.vocab * config.hidden * tables) as f64;
    let layers = config.parameters() as f64 - table;
    layers * numbers.weights.bytes() + table * numbers.head().bytes()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::shapes::named;
    use super::*;

    /// Counted by hand for Llama 3.1 8B: 6.98e9 weights in the layers, 131,072 bytes of KV a token.
    #[test]
    fn an_8b_model_costs_what_it_should() {
        let config = named("llama-8b").unwrap();
        let work = Work::of(&config, Numbers::BF16, &[Chunk::prompt(2048)]);
        let products = 2.0 * 2048.0 * 6_979_321_856.0;
        let attention = 4.0 * (2048.0 * 2049.0 / 2.0) * 4096.0 * 32.0;
        let head = 2.0 * 128_256.0 * 4096.0;
        assert!((work.flops() - products - attention - head).abs() < 1e6, "{}", work.flops());
        assert_eq!(work.kv_bytes, 2048.0 * 131_072.0);
        assert_eq!(work.weight_bytes, 2.0 * (6_979_321_856.0 + 128_256.0 * 4096.0));
    }

    /// Llama 3 70B by hand: a layer has 8192 × (10240 + 8192) + 3 × 8192 × 28672 = 855,638,016 weights.
    #[test]
    fn a_70b_model_costs_what_it_should() {
        let config = named("llama-70b").unwrap();
        assert_eq!(config.parameters(), 70_553_706_496);
        assert_eq!(kv_bytes_per_token(&config, Dtype::Bf16), 327_680.0);
        let decode = Work::of(&config, Numbers::BF16, &[Chunk::decode(0)]);
        assert_eq!(decode.weight_bytes, 2.0 * (80.0 * 855_638_016.0 + 128_256.0 * 8192.0));
        assert_eq!(decode.product_flops, decode.weight_bytes, "one operation a byte and sequence");
        let int8 = Work::of(&config, Numbers::weights(Dtype::Int8), &[Chunk::decode(0)]);
        assert_eq!(int8.weight_bytes, 80.0 * 855_638_016.0 + 2.0 * 128_256.0 * 8192.0);
        assert_eq!(weight_bytes(&config, Numbers::BF16), 141_107_412_992.0);
    }

    #[test]
    fn decode_is_bound_by_memory_and_prefill_by_compute() {
        let config = named("llama-8b").unwrap();
        let h100 = Ceilings { flops_per_second: 763e12, bytes_per_second: 3.0e12 };
        let side = |chunk| Work::of(&config, Numbers::BF16, &[chunk]).floor_ms(&h100).map(|floor| floor.1);
        assert_eq!(side(Chunk::decode(1200)), Some(Bound::Memory));
        assert_eq!(side(Chunk::prompt(2048)), Some(Bound::Compute));
        let none = Work::of(&config, Numbers::BF16, &[Chunk::prompt(1)]).floor_ms(&Ceilings::default());
        assert_eq!(none, None);
    }

    /// A prompt costs the same work in one piece or in several, but for weights, which every piece reads.
    #[test]
    fn chunks_add_up() {
        let config = named("llama-8b").unwrap();
        let whole = Work::of(&config, Numbers::BF16, &[Chunk::prompt(1000)]);
        let mut pieces = Work::default();
        for (position, tokens, draws) in [(0, 600, false), (600, 400, true)] {
            pieces += Work::of(&config, Numbers::BF16, &[Chunk { position, tokens, draws }]);
        }
        assert!((whole.flops() / pieces.flops() - 1.0).abs() < 1e-12);
        assert!(pieces.weight_bytes > 1.8 * whole.weight_bytes && pieces.kv_bytes > whole.kv_bytes);
    }

    /// However large the batch, sequences bring their own KV: intensity has a limit, and at 2048 tokens of context it is below
    /// an H100's balance point for a 70B model.
    #[test]
    fn decode_with_context_never_reaches_the_balance_point() {
        let config = named("llama-70b").unwrap();
        let at = |batch, context| Work::of(&config, Numbers::BF16, &vec![Chunk::decode(context); batch]);
        assert!((at(1, 0).intensity() - 1.0).abs() < 1e-3);
        assert!(at(100_000, 2048).intensity() < 220.0);
        assert!(at(400, 0).intensity() > 295.0);
    }
}
