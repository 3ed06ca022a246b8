//! What kind of network a folder holds: config.json in the Hugging Face spelling, checked.

use std::path::Path;

use super::compressed;
use super::quantise::Quantisation;
use super::raw::{Ids, RawConfig, RawGeneration, RawRope, read_json};
use super::rope::{Rope, RopeScaling};
use crate::EngineError;

/// The families we run. They differ in biases, query/key norms and windows only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1 to 3, SmolLM2 and others in its image.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k, v.
    Qwen2,
    /// Qwen3: a norm on every query and key head.
    Qwen3,
}

/// A decoder-only transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// Transformer layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub ffn: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head; even.
    pub head_dim: usize,
    /// Token ids are below this.
    pub vocab: usize,
    /// Longest sequence in tokens.
    pub max_context: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_eps: f32,
    /// Rotary positions.
    pub rope: Rope,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// The attention's output projection has a bias.
    pub o_bias: bool,
    /// Query and key heads are normalised before the rotation.
    pub qk_norm: bool,
    /// Per layer: how many last positions (its own included) a token attends to; `None` is all.
    pub windows: Vec<Option<usize>>,
    /// The output matrix is the embedding.
    pub tie_embeddings: bool,
    /// What the layers' matrices are stored in, where it is not bf16.
    pub quantised: Option<Quantisation>,
    /// First token of a sequence, if the model wants one.
    pub bos: Option<u32>,
    /// Tokens that end the output.
    pub eos: Vec<u32>,
}

impl ModelConfig {
    /// Reads `config.json` and, if there, `generation_config.json` of a model folder.
    pub fn load(dir: &Path) -> Result<Self, EngineError> {
        let path = dir.join("config.json");
        let raw: RawConfig = read_json(&path)?;
        let generation = dir.join("generation_config.json");
        let generation = if generation.exists() { read_json(&generation)? } else { RawGeneration::default() };
        Self::resolve(raw, generation).map_err(|reason| EngineError::model(&path, reason))
    }

    /// Query heads per key/value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Parameters of the whole network.
    pub fn parameters(&self) -> usize {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let layer = self.hidden * (2 * q + 2 * kv) + 3 * self.hidden * self.ffn + 2 * self.hidden;
        let tables = if self.tie_embeddings { 1 } else { 2 };
        self.layers * layer + tables * self.vocab * self.hidden + self.hidden
    }

    fn resolve(raw: RawConfig, generation: RawGeneration) -> Result<Self, String> {
        let architecture = architecture(&raw)?;
        let quantised = raw.quantization_config.as_ref().filter(|config| !config.is_null());
        let quantised = quantised.map(compressed::kind).transpose()?;
        if let Some(act) = raw.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(format!("hidden_act is {act}, only silu is known"));
        }
        if raw.mlp_bias == Some(true) {
            return Err("mlp_bias is true, only networks without are known".into());
        }
        let heads = size("num_attention_heads", raw.num_attention_heads, 1 << 10)?;
        let kv_heads = raw.num_key_value_heads.unwrap_or(raw.num_attention_heads);
        let kv_heads = size("num_key_value_heads", kv_heads, 1 << 10)?;
        let hidden = size("hidden_size", raw.hidden_size, 1 << 17)?;
        if heads % kv_heads != 0 {
            return Err(format!("{heads} heads do not divide among {kv_heads} key/value heads"));
        }
        if raw.head_dim.is_none() && hidden % heads != 0 {
            return Err(format!(
                "hidden_size {hidden} does not divide among {heads} heads and head_dim is not given"
            ));
        }
        let head_dim = size("head_dim", raw.head_dim.unwrap_or((hidden / heads) as u64), 1 << 10)?;
        if head_dim % 2 != 0 {
            return Err(format!("head_dim {head_dim} is odd, rotary positions need pairs"));
        }
        let layers = size("num_hidden_layers", raw.num_hidden_layers, 1 << 10)?;
        let positions =
            size("max_position_embeddings", raw.max_position_embeddings.unwrap_or(2048), 1 << 24)?;
        let rms_eps = raw.rms_norm_eps.unwrap_or(1e-6);
        if !(rms_eps > 0.0 && rms_eps < 1.0) {
            return Err(format!("rms_norm_eps is {rms_eps}"));
        }
        let vocab = size("vocab_size", raw.vocab_size, 1 << 22)?;
        let ffn = size("intermediate_size", raw.intermediate_size, 1 << 20)?;
        let rope = rope(&raw, positions)?;
        let windows = windows(architecture, &raw, layers)?;
        // Hugging Face's generate() believes generation_config.json first.
        let eos = generation.eos_token_id.or(raw.eos_token_id).map_or_else(Vec::new, Ids::into_vec);
        let bos = raw.bos_token_id.and_then(|ids| ids.into_vec().first().copied());
        if let Some(id) = eos.iter().chain(&bos).find(|&&id| id as usize >= vocab) {
            return Err(format!("token {id} begins or ends a sequence, the vocabulary has {vocab}"));
        }
        Ok(Self {
            architecture,
            layers,
            hidden,
            ffn,
            heads,
            kv_heads,
            head_dim,
            vocab,
            max_context: context(&rope, positions),
            rms_eps: rms_eps as f32,
            rope,
            qkv_bias: architecture == Architecture::Qwen2 || raw.attention_bias == Some(true),
            o_bias: architecture != Architecture::Qwen2 && raw.attention_bias == Some(true),
            qk_norm: architecture == Architecture::Qwen3,
            windows,
            tie_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            quantised,
            bos,
            eos,
        })
    }
}

fn architecture(raw: &RawConfig) -> Result<Architecture, String> {
    let named = raw.architectures.first().map(String::as_str);
    match (named, raw.model_type.as_deref()) {
        (Some("LlamaForCausalLM"), _) | (None, Some("llama")) => Ok(Architecture::Llama),
        (Some("MistralForCausalLM"), _) | (None, Some("mistral")) => Ok(Architecture::Mistral),
        (Some("Qwen2ForCausalLM"), _) | (None, Some("qwen2")) => Ok(Architecture::Qwen2),
        (Some("Qwen3ForCausalLM"), _) | (None, Some("qwen3")) => Ok(Architecture::Qwen3),
        (named, kind) => Err(format!(
            "architecture {} is not known (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM are)",
            named.or(kind).unwrap_or("(none given)")
        )),
    }
}

/// Sizes from a file are bounded before anything is allocated by them.
fn size(field: &str, value: u64, most: u64) -> Result<usize, String> {
    if (1..=most).contains(&value) {
        Ok(value as usize)
    } else {
        Err(format!("{field} is {value}, must be between 1 and {most}"))
    }
}

fn rope(raw: &RawConfig, positions: usize) -> Result<Rope, String> {
    let given = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
    let partial = raw.partial_rotary_factor.or(given.and_then(|g| g.partial_rotary_factor));
    if partial.is_some_and(|share| share != 1.0) {
        return Err("partial_rotary_factor: only full rotation is known".into());
    }
    let theta = given.and_then(|g| g.rope_theta).or(raw.rope_theta).unwrap_or(10_000.0);
    if !(theta > 1.0 && theta.is_finite()) {
        return Err(format!("rope_theta is {theta}"));
    }
    let scaling = given.map_or(Ok(RopeScaling::None), |given| scaling(given, positions as f64))?;
    Ok(Rope { theta, scaling })
}

fn scaling(given: &RawRope, positions: f64) -> Result<RopeScaling, String> {
    let kind = given.rope_type.as_deref().unwrap_or("default");
    let original = given.original_max_position_embeddings.unwrap_or(positions);
    let need = |field: &str, value: Option<f64>| {
        value
            .filter(|v| v.is_finite() && *v > 0.0)
            .ok_or_else(|| format!("rope scaling {kind} needs a positive {field}"))
    };
    need("original_max_position_embeddings", Some(original))?;
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: need("factor", given.factor)? }),
        "llama3" => {
            let low_freq_factor = need("low_freq_factor", given.low_freq_factor)?;
            let high_freq_factor = need("high_freq_factor", given.high_freq_factor)?;
            if low_freq_factor >= high_freq_factor {
                return Err(format!(
                    "low_freq_factor {low_freq_factor} is not below high_freq_factor {high_freq_factor}"
                ));
            }
            let factor = need("factor", given.factor)?;
            Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original })
        }
        "yarn" => {
            let factor = need("factor", given.factor.or(Some(positions / original)))?;
            let sharpen = |scale: f64| {
                if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
            };
            let attention_factor = match (given.attention_factor, given.mscale, given.mscale_all_dim) {
                (Some(given), _, _) => given,
                (None, Some(part), Some(all)) if part != 0.0 && all != 0.0 => sharpen(part) / sharpen(all),
                _ => sharpen(1.0),
            };
            Ok(RopeScaling::Yarn {
                factor,
                beta_fast: need("beta_fast", Some(given.beta_fast.unwrap_or(32.0)))?,
                beta_slow: need("beta_slow", Some(given.beta_slow.unwrap_or(1.0)))?,
                original,
                attention_factor: need("attention_factor", Some(attention_factor))?,
                truncate: given.truncate.unwrap_or(true),
            })
        }
        other => Err(format!("rope scaling {other} is not known (default, linear, llama3, yarn are)")),
    }
}

/// YaRN stretches the context it was declared for, whether or not max_position_embeddings says so.
fn context(rope: &Rope, positions: usize) -> usize {
    match rope.scaling {
        RopeScaling::Yarn { factor, original, .. } => positions.max((original * factor).min(1e8) as usize),
        _ => positions,
    }
}

fn windows(architecture: Architecture, raw: &RawConfig, layers: usize) -> Result<Vec<Option<usize>>, String> {
    let width = raw.sliding_window.map(|w| size("sliding_window", w, 1 << 32)).transpose()?;
    let on = match architecture {
        Architecture::Mistral => true,
        Architecture::Qwen2 | Architecture::Qwen3 => raw.use_sliding_window == Some(true),
        Architecture::Llama => false,
    };
    let Some(width) = width.filter(|_| on) else {
        return Ok(vec![None; layers]);
    };
    if let Some(types) = &raw.layer_types {
        if types.len() != layers {
            return Err(format!("layer_types has {} entries for {layers} layers", types.len()));
        }
        return types
            .iter()
            .map(|kind| match kind.as_str() {
                "sliding_attention" => Ok(Some(width)),
                "full_attention" => Ok(None),
                other => Err(format!("layer type {other} is not known")),
            })
            .collect();
    }
    let first = match architecture {
        Architecture::Mistral => 0,
        _ => raw.max_window_layers.unwrap_or(28),
    };
    Ok((0..layers).map(|layer| (layer as u64 >= first).then_some(width)).collect())
}
