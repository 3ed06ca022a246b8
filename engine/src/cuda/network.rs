//! A network's weights on the device.

use std::sync::Arc;

use half::bf16;

use super::driver::{Device, Grid, Memory, Stream, args};
use super::gemm::{Operands, Product, Shape};
use super::kernels::Kernels;
use crate::EngineError;
use crate::model::quantise::layer_matrix;
use crate::model::{ModelConfig, Quantisation, RandomWeights, Stored, WeightSource};

/// Where the weights come from.
pub(super) enum Origin<'a> {
    Source(&'a dyn WeightSource),
    /// Drawn on the device: the same numbers, without the seconds per billion that the host takes.
    Random(RandomWeights),
}

/// A matrix `[n, k]`, row-major, with its bias.
pub(super) struct Linear {
    weights: Memory,
    /// Per row, and what the weights are, where they are of eight bits.
    scales: Option<(Quantisation, Memory)>,
    bias: Option<Memory>,
    n: usize,
    k: usize,
}

impl Linear {
    /// What kind of product this matrix makes.
    pub(super) fn shape(&self, add: bool, wide: bool) -> Shape {
        let operands = self.operands();
        let bias = self.bias.is_some();
        Shape { n: self.n, k: self.k, operands, bias, add, wide, gated: false }
    }

    /// The product of gate and up in one, `silu(gate) · up`.
    pub(super) fn gated_shape(&self) -> Shape {
        Shape { n: self.n / 2, gated: true, ..self.shape(false, false) }
    }

    pub(super) fn product(&self, x: u64, out: u64) -> Product {
        let bias = self.bias.as_ref().map_or(0, |bias| bias.at);
        let scales = self.scales.as_ref().map_or(0, |(_, scales)| scales.at);
        Product { weights: self.weights.at, x, norm: (0, 0.0), rounded: (0, 0), out, bias, scales }
    }

    /// Numbers of a row of x.
    pub(super) fn inputs(&self) -> usize {
        self.k
    }

    fn operands(&self) -> Operands {
        match self.scales.as_ref().map(|(kind, _)| *kind) {
            None => Operands::Bf16,
            Some(Quantisation::Fp8) => Operands::Fp8,
            Some(Quantisation::Int8) => Operands::Int8,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.weights.bytes
    }
}

/// One transformer layer.
pub(super) struct Layer {
    pub(super) attention_norm: Memory,
    /// q, k and v below each other: `[(heads + 2 · kv_heads) · head_dim, hidden]`.
    pub(super) qkv: Linear,
    /// Norms of query and key heads, `[head_dim]` each.
    head_norms: Option<(Memory, Memory)>,
    /// `[hidden, heads · head_dim]`
    pub(super) o: Linear,
    pub(super) mlp_norm: Memory,
    /// Gate, then up: `[2 · ffn, hidden]`.
    pub(super) gate_up: Linear,
    /// `[hidden, ffn]`
    pub(super) down: Linear,
}

impl Layer {
    /// Where the weights of the norms of q's and k's heads are, or 0.
    pub(super) fn head_norms(&self) -> (u64, u64) {
        self.head_norms.as_ref().map_or((0, 0), |(q, k)| (q.at, k.at))
    }
}

/// All of it.
pub(super) struct Network {
    /// `[vocab, hidden]`
    pub(super) embedding: Arc<Linear>,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Memory,
    /// `[vocab, hidden]`; the embedding itself where they are tied.
    pub(super) head: Arc<Linear>,
}

impl Network {
    pub(super) fn load(loader: &Loader<'_>, config: &ModelConfig) -> Result<Self, EngineError> {
        let (vocab, hidden) = (config.vocab, config.hidden);
        let table = |name| loader.linear(&[(name, vocab)], hidden, false).map(Arc::new);
        let embedding = table("model.embed_tokens")?;
        let head = if config.tie_embeddings { Arc::clone(&embedding) } else { table("lm_head")? };
        let layers = (0..config.layers).map(|index| loader.layer(config, index));
        Ok(Self {
            embedding,
            layers: layers.collect::<Result<_, _>>()?,
            norm: loader.vector("model.norm.weight", hidden)?,
            head,
        })
    }

    /// What the layers' products are made of.
    pub(super) fn operands(&self) -> Operands {
        self.layers.first().map_or(Operands::Bf16, |layer| layer.qkv.operands())
    }

    /// Bytes of weights that one decode step reads.
    pub(super) fn streamed_bytes(&self) -> usize {
        let layer = |l: &Layer| l.qkv.bytes() + l.o.bytes() + l.gate_up.bytes() + l.down.bytes();
        self.head.bytes() + self.layers.iter().map(layer).sum::<usize>()
    }
}

/// Brings weights onto the device.
pub(super) struct Loader<'a> {
    pub(super) device: &'a Arc<Device>,
    pub(super) kernels: &'a Kernels,
    pub(super) stream: &'a Stream,
    pub(super) origin: Origin<'a>,
    /// What the weights of the layers become; embedding and head stay bf16.
    pub(super) quantise: Option<Quantisation>,
}

impl Loader<'_> {
    fn layer(&self, config: &ModelConfig, index: usize) -> Result<Layer, EngineError> {
        let (hidden, ffn, dim) = (config.hidden, config.ffn, config.head_dim);
        let (q, kv) = (config.heads * dim, config.kv_heads * dim);
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let linear = |parts: &[(&str, usize)], k, bias| {
            let names: Vec<_> = parts.iter().map(|&(part, n)| (name(part), n)).collect();
            let parts: Vec<_> = names.iter().map(|(name, n)| (name.as_str(), *n)).collect();
            match (&self.origin, config.quantised) {
                (Origin::Source(source), Some(kind)) => self.stored(*source, kind, &parts, k, bias),
                _ => self.linear(&parts, k, bias).and_then(|linear| self.quantised(linear)),
            }
        };
        let norm = |part: &str, length| self.vector(&name(part), length);
        let head_norms = || -> Result<_, EngineError> {
            Ok((norm("self_attn.q_norm.weight", dim)?, norm("self_attn.k_norm.weight", dim)?))
        };
        let qkv = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)];
        Ok(Layer {
            attention_norm: norm("input_layernorm.weight", hidden)?,
            qkv: linear(&qkv, hidden, config.qkv_bias)?,
            head_norms: config.qk_norm.then(head_norms).transpose()?,
            o: linear(&[("self_attn.o_proj", hidden)], q, config.o_bias)?,
            mlp_norm: norm("post_attention_layernorm.weight", hidden)?,
            gate_up: linear(&[("mlp.gate_proj", ffn), ("mlp.up_proj", ffn)], hidden, false)?,
            down: linear(&[("mlp.down_proj", hidden)], ffn, false)?,
        })
    }

    /// Matrices of `k` inputs below each other.
    fn linear(&self, parts: &[(&str, usize)], k: usize, bias: bool) -> Result<Linear, EngineError> {
        let n = parts.iter().map(|part| part.1).sum();
        let weights = Memory::new(self.device, n * k * 2, "the weights")?;
        let mut at = weights.at;
        for &(name, rows) in parts {
            self.matrix(at, &format!("{name}.weight"), rows, k)?;
            at += (rows * k * 2) as u64;
        }
        let bias = bias.then(|| self.biases(parts)).transpose()?;
        Ok(Linear { weights, scales: None, bias, n, k })
    }

    fn biases(&self, parts: &[(&str, usize)]) -> Result<Memory, EngineError> {
        let mut all: Vec<bf16> = Vec::new();
        for &(name, rows) in parts {
            all.extend(self.numbers(&format!("{name}.bias"), rows)?);
        }
        self.uploaded(&all)
    }

    /// The same from a checkpoint of eight bits.
    fn stored(
        &self,
        source: &dyn WeightSource,
        kind: Quantisation,
        parts: &[(&str, usize)],
        k: usize,
        bias: bool,
    ) -> Result<Linear, EngineError> {
        let n: usize = parts.iter().map(|part| part.1).sum();
        let weights = Memory::new(self.device, n * k, "the weights")?;
        let (mut at, mut scales) = (weights.at, Vec::with_capacity(n));
        for &(name, rows) in parts {
            let stored = layer_matrix(source, Some(kind), &format!("{name}.weight"), rows, k)?;
            let Stored::Eight(eight) = stored else {
                return Err(EngineError::Unsupported(format!("{name} is not {}", kind.name())));
            };
            self.stream.upload(at, eight.bytes.as_slice())?;
            at += (rows * k) as u64;
            scales.extend_from_slice(&eight.scales);
        }
        let on_device = Memory::new(self.device, n * 4, "the weights' scales")?;
        self.stream.upload(on_device.at, &scales)?;
        let bias = bias.then(|| self.biases(parts)).transpose()?;
        Ok(Linear { weights, scales: Some((kind, on_device)), bias, n, k })
    }

    fn quantised(&self, linear: Linear) -> Result<Linear, EngineError> {
        let (Some(kernels), Some(kind)) = (&self.kernels.quantise, self.quantise) else {
            return Ok(linear);
        };
        let weights = Memory::new(self.device, linear.n * linear.k, "the quantised weights")?;
        let scales = Memory::new(self.device, linear.n * 4, "the weights' scales")?;
        let (to, out, from, width) = (weights.at, scales.at, linear.weights.at, (linear.k / 8) as i32);
        let grid = Grid::new((linear.n, 1, 1), 256);
        kernels.rows.launch(self.stream, grid, args![to, out, from, width])?;
        // The bf16 weights go now: a model may fit only without them.
        self.stream.synchronize()?;
        Ok(Linear { weights, scales: Some((kind, scales)), ..linear })
    }

    fn matrix(&self, to: u64, name: &str, rows: usize, columns: usize) -> Result<(), EngineError> {
        match &self.origin {
            Origin::Source(source) => self.stream.upload(to, source.matrix(name, rows, columns)?.numbers()),
            Origin::Random(random) => {
                let (count, state, deviation) =
                    (rows * columns, random.state(name), RandomWeights::DEVIATION);
                let grid = Grid::new((4096, 1, 1), 256);
                self.kernels.random_weights.launch(self.stream, grid, args![to, count, state, deviation])
            }
        }
    }

    /// A vector, rounded to bf16: norms and biases of checkpoints are.
    fn numbers(&self, name: &str, length: usize) -> Result<Vec<bf16>, EngineError> {
        let numbers = match &self.origin {
            Origin::Source(source) => source.vector(name, length)?,
            Origin::Random(random) => random.vector(name, length)?,
        };
        Ok(numbers.into_iter().map(bf16::from_f32).collect())
    }

    fn vector(&self, name: &str, length: usize) -> Result<Memory, EngineError> {
        self.uploaded(&self.numbers(name, length)?)
    }

    fn uploaded(&self, numbers: &[bf16]) -> Result<Memory, EngineError> {
        let memory = Memory::new(self.device, numbers.len() * 2, "a vector")?;
        self.stream.upload(memory.at, numbers)?;
        Ok(memory)
    }
}
