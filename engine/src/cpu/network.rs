//! A network's weights as the kernels want them.

use std::path::Path;

use half::bf16;

use super::arena::Arena;
use super::simd::gemm::{PANEL, Packed};
use super::simd::int8::Packed8;
use crate::EngineError;
use crate::model::quantise::{kind_of, layer_matrix, to_int8, turned_rows};
use crate::model::{Matrix, ModelConfig, Quantisation, Stored, WeightSource};

/// Rows of the head that are rounded together.
const HEAD_ROWS: usize = 64 * PANEL;

/// A matrix as it is multiplied.
pub(super) enum Multiplied {
    Brain(Packed),
    Int8(Packed8),
}

impl Multiplied {
    fn bytes(&self) -> usize {
        match self {
            Self::Brain(weights) => weights.bytes(),
            Self::Int8(weights) => weights.bytes(),
        }
    }

    /// Outputs.
    pub(super) fn n(&self) -> usize {
        match self {
            Self::Brain(weights) => weights.n,
            Self::Int8(weights) => weights.n,
        }
    }
}

/// A matrix and its bias.
pub(super) struct Linear {
    pub(super) weights: Multiplied,
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
    /// Whether the layers' products are in INT8.
    pub(super) int8: bool,
    /// `[vocab, hidden]`, rows copied out one by one.
    pub(super) embedding: Matrix,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Vec<f32>,
    /// `[vocab, hidden]`
    pub(super) head: Multiplied,
}

impl Network {
    /// `kind` is what [`check`] found; `turn` says that what is rounded here is turned, and the head rounded too.
    pub(super) fn load(
        config: &ModelConfig,
        source: &dyn WeightSource,
        kind: Option<Quantisation>,
        turn: bool,
    ) -> Result<Self, EngineError> {
        let (vocab, hidden) = (config.vocab, config.hidden);
        let embedding = source.matrix("model.embed_tokens.weight", vocab, hidden)?;
        let own = match config.tie_embeddings {
            true => None,
            false => Some(source.matrix("lm_head.weight", vocab, hidden)?),
        };
        let mut arena = Arena::default();
        let head = head_of(&mut arena, own.as_ref().unwrap_or(&embedding), hidden, turn && kind.is_some())?;
        let layers =
            (0..config.layers).map(|index| Layer::load(config, source, kind, turn, &mut arena, index));
        Ok(Self {
            int8: kind.is_some(),
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
    fn load(
        config: &ModelConfig,
        source: &dyn WeightSource,
        kind: Option<Quantisation>,
        turn: bool,
        arena: &mut Arena,
        index: usize,
    ) -> Result<Self, EngineError> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let (hidden, ffn, dim) = (config.hidden, config.ffn, config.head_dim);
        let (q, kv) = (config.heads * dim, config.kv_heads * dim);
        let mut stack = |parts: &[(&str, usize)], columns, bias, align| {
            let parts = parts.iter().map(|&(part, rows)| (name(part), rows));
            let mut stack =
                Stack { arena: &mut *arena, source, declared: config.quantised, turn, columns, align };
            stack.load(kind, &parts.collect::<Vec<_>>(), bias)
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

/// The head as it is multiplied, of a matrix `[vocab, hidden]`.
fn head_of(
    arena: &mut Arena,
    matrix: &Matrix,
    hidden: usize,
    round: bool,
) -> Result<Multiplied, EngineError> {
    let numbers = matrix.numbers();
    let vocab = numbers.len() / hidden;
    if !round {
        let mut head = Packed::zeroed(arena, vocab, hidden)?;
        head.fill(0, numbers);
        return Ok(Multiplied::Brain(head));
    }
    let mut head = Packed8::zeroed(arena, vocab, hidden, true)?;
    // A few rows at a time: all of them in between would take a head's memory once more.
    for (index, rows) in numbers.chunks(HEAD_ROWS * hidden).enumerate() {
        let (numbers, scales) = turned_rows(rows, hidden);
        head.fill(index * HEAD_ROWS, &numbers, &scales);
    }
    Ok(Multiplied::Int8(head))
}

/// Matrices of `columns` inputs below each other, each starting at a multiple of `align` rows.
struct Stack<'a> {
    arena: &'a mut Arena,
    source: &'a dyn WeightSource,
    declared: Option<Quantisation>,
    turn: bool,
    columns: usize,
    align: usize,
}

impl Stack<'_> {
    fn load(
        &mut self,
        kind: Option<Quantisation>,
        parts: &[(String, usize)],
        bias: bool,
    ) -> Result<Linear, EngineError> {
        let weights = match kind {
            None => Multiplied::Brain(self.brain(parts)?),
            Some(_) => Multiplied::Int8(self.int8(parts)?),
        };
        let bias = bias.then(|| self.biases(parts)).transpose()?;
        Ok(Linear { weights, bias })
    }

    fn rows(&self, parts: &[(String, usize)]) -> usize {
        parts.iter().map(|part| part.1.next_multiple_of(self.align)).sum()
    }

    fn brain(&mut self, parts: &[(String, usize)]) -> Result<Packed, EngineError> {
        let rows = self.rows(parts);
        let mut weights = Packed::zeroed(self.arena, rows, self.columns)?;
        let mut first = 0;
        for (name, rows) in parts {
            let matrix = self.source.matrix(&format!("{name}.weight"), *rows, self.columns)?;
            weights.fill(first, matrix.numbers());
            first += rows.next_multiple_of(self.align);
        }
        Ok(weights)
    }

    fn int8(&mut self, parts: &[(String, usize)]) -> Result<Packed8, EngineError> {
        let rows = self.rows(parts);
        let mut weights = Packed8::zeroed(self.arena, rows, self.columns, self.turn)?;
        let mut first = 0;
        for (name, rows) in parts {
            let name = format!("{name}.weight");
            let stored: Stored = layer_matrix(self.source, self.declared, &name, *rows, self.columns)?;
            if let (Stored::Brain(matrix), true) = (&stored, self.turn) {
                let (numbers, scales) = turned_rows(matrix.numbers(), self.columns);
                weights.fill(first, &numbers, &scales);
            } else {
                let (numbers, scales) = to_int8(&stored, self.columns)?;
                weights.fill(first, &numbers, &scales);
            }
            first += rows.next_multiple_of(self.align);
        }
        Ok(weights)
    }

    fn biases(&self, parts: &[(String, usize)]) -> Result<Vec<f32>, EngineError> {
        let mut biases = vec![0.0; self.rows(parts).next_multiple_of(PANEL)];
        let mut first = 0;
        for (name, rows) in parts {
            let bias = self.source.vector(&format!("{name}.bias"), *rows)?;
            biases[first..first + rows].copy_from_slice(&bias);
            first += rows.next_multiple_of(self.align);
        }
        Ok(biases)
    }
}

/// Refuses what the kernels cannot do, before anything is loaded; what the layers' matrices will be.
pub(super) fn check(
    config: &ModelConfig,
    dir: &Path,
    wanted: Option<Quantisation>,
) -> Result<Option<Quantisation>, EngineError> {
    // The packed form pairs inputs; an odd width does not occur in real networks.
    for (name, width) in [("hidden_size", config.hidden), ("intermediate_size", config.ffn)] {
        if width % 2 != 0 {
            return Err(EngineError::model(dir, format!("{name} {width} is odd")));
        }
    }
    let kind = kind_of(wanted, config.quantised)?;
    if kind == Some(Quantisation::Fp8) {
        return Err(EngineError::Unsupported(
            "FP8 on CPU cores: no CPU multiplies e4m3; take --quantize int8, the bf16 checkpoint or --device cuda".into(),
        ));
    }
    Ok(kind)
}
