//! A network's weights as the kernels want them.

use std::path::Path;

use half::bf16;

use super::simd::gemm::{PANEL, Packed};
use crate::EngineError;
use crate::model::{Matrix, ModelConfig, WeightSource};

/// A matrix and its bias.
pub(super) struct Linear {
    pub(super) weights: Packed,
    /// Padded to whole panels.
    pub(super) bias: Option<Vec<f32>>,
}

/// One transformer layer.
pub(super) struct Layer {
    pub(super) attention_norm: Vec<f32>,
    /// q, k and v in one: `[(heads + 2 · kv_heads) · head_dim, hidden]`.
    pub(super) qkv: Linear,
    /// Norms of query and key heads, `[head_dim]` each.
    pub(super) head_norms: Option<(Vec<f32>, Vec<f32>)>,
    /// `[hidden, heads · head_dim]`
    pub(super) o: Linear,
    pub(super) mlp_norm: Vec<f32>,
    /// Gate, padded to whole panels, then up: `[2 · ffn, hidden]`.
    pub(super) gate_up: Linear,
    /// `[hidden, ffn]`
    pub(super) down: Linear,
}

/// All of it.
pub(super) struct Network {
    /// `[vocab, hidden]`, rows copied out one by one.
    pub(super) embedding: Matrix,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Vec<f32>,
    /// `[vocab, hidden]`
    pub(super) head: Packed,
}

impl Network {
    pub(super) fn load(config: &ModelConfig, source: &dyn WeightSource) -> Result<Self, EngineError> {
        let (vocab, hidden) = (config.vocab, config.hidden);
        let embedding = source.matrix("model.embed_tokens.weight", vocab, hidden)?;
        let mut head = Packed::zeroed(vocab, hidden)?;
        if config.tie_embeddings {
            head.fill(0, embedding.numbers());
        } else {
            head.fill(0, source.matrix("lm_head.weight", vocab, hidden)?.numbers());
        }
        let layers = (0..config.layers).map(|index| Layer::load(config, source, index));
        Ok(Self {
            embedding,
            layers: layers.collect::<Result<_, _>>()?,
            norm: source.vector("model.norm.weight", hidden)?,
            head,
        })
    }

    /// A token's row.
    pub(super) fn embed(&self, token: u32, out: &mut [f32]) {
        let width = out.len();
        let row: &[bf16] = &self.embedding.numbers()[token as usize * width..][..width];
        for (out, x) in out.iter_mut().zip(row) {
            *out = x.to_f32();
        }
    }

    /// Bytes that one decode step streams.
    pub(super) fn streamed_bytes(&self) -> usize {
        let layer = |l: &Layer| [&l.qkv, &l.o, &l.gate_up, &l.down].map(|linear| linear.weights.bytes());
        self.head.bytes() + self.layers.iter().flat_map(layer).sum::<usize>()
    }
}

impl Layer {
    fn load(config: &ModelConfig, source: &dyn WeightSource, index: usize) -> Result<Self, EngineError> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let (hidden, ffn, dim) = (config.hidden, config.ffn, config.head_dim);
        let (q, kv) = (config.heads * dim, config.kv_heads * dim);
        let stack = |parts: &[(&str, usize)], columns, bias, align| {
            let parts = parts.iter().map(|&(part, rows)| (name(part), rows));
            Linear::stack(source, parts.collect(), columns, bias, align)
        };
        let head_norms = || -> Result<_, EngineError> {
            let norm = |part: &str| source.vector(&name(part), dim);
            Ok((norm("self_attn.q_norm.weight")?, norm("self_attn.k_norm.weight")?))
        };
        Ok(Self {
            attention_norm: source.vector(&name("input_layernorm.weight"), hidden)?,
            qkv: stack(
                &[("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)],
                hidden,
                config.qkv_bias,
                1,
            )?,
            head_norms: config.qk_norm.then(head_norms).transpose()?,
            o: stack(&[("self_attn.o_proj", hidden)], q, config.o_bias, 1)?,
            mlp_norm: source.vector(&name("post_attention_layernorm.weight"), hidden)?,
            gate_up: stack(&[("mlp.gate_proj", ffn), ("mlp.up_proj", ffn)], hidden, false, PANEL)?,
            down: stack(&[("mlp.down_proj", hidden)], ffn, false, 1)?,
        })
    }
}

impl Linear {
    /// Matrices of `columns` inputs below each other, each starting at a multiple of `align` rows.
    fn stack(
        source: &dyn WeightSource,
        parts: Vec<(String, usize)>,
        columns: usize,
        bias: bool,
        align: usize,
    ) -> Result<Self, EngineError> {
        let rows = parts.iter().map(|part| part.1.next_multiple_of(align)).sum();
        let mut weights = Packed::zeroed(rows, columns)?;
        let mut biases = bias.then(|| vec![0.0; rows.next_multiple_of(PANEL)]);
        let mut first = 0;
        for (name, rows) in parts {
            weights.fill(first, source.matrix(&format!("{name}.weight"), rows, columns)?.numbers());
            if let Some(biases) = &mut biases {
                biases[first..first + rows].copy_from_slice(&source.vector(&format!("{name}.bias"), rows)?);
            }
            first += rows.next_multiple_of(align);
        }
        Ok(Self { weights, bias: biases })
    }
}

/// Refuses what the kernels cannot do, before anything is loaded.
pub(super) fn check(config: &ModelConfig, dir: &Path) -> Result<(), EngineError> {
    // The packed form pairs inputs; an odd width does not occur in real networks.
    for (name, width) in [("hidden_size", config.hidden), ("intermediate_size", config.ffn)] {
        if width % 2 != 0 {
            return Err(EngineError::model(dir, format!("{name} {width} is odd")));
        }
    }
    Ok(())
}
