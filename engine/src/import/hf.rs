//! GGUF metadata told as a Hugging Face configuration.

use serde_json::{Value as Json, json};

use super::gguf::{Gguf, Value};

/// What the metadata says about the network.
pub(super) struct Model {
    pub(super) name: String,
    pub(super) architecture: &'static str,
    pub(super) model_type: &'static str,
    /// GGUF writers of this architecture interleave the rows of q and k.
    pub(super) permuted: bool,
    pub(super) layers: usize,
    pub(super) hidden: u64,
    pub(super) ffn: u64,
    pub(super) heads: u64,
    pub(super) kv_heads: u64,
    pub(super) head_dim: u64,
    pub(super) context: u64,
    pub(super) vocab: usize,
    pub(super) eps: f64,
    pub(super) theta: f64,
    pub(super) scaling: Json,
    pub(super) tied: bool,
    pub(super) attention_bias: bool,
    pub(super) bos: Option<u64>,
    pub(super) eos: Option<u64>,
    pub(super) pad: Option<u64>,
}

impl Model {
    pub(super) fn read(gguf: &Gguf<'_>) -> Result<Self, String> {
        let arch = gguf.text("general.architecture")?;
        let (architecture, model_type, permuted) = match arch {
            "llama" => ("LlamaForCausalLM", "llama", true),
            "qwen2" => ("Qwen2ForCausalLM", "qwen2", false),
            "qwen3" => ("Qwen3ForCausalLM", "qwen3", false),
            other => {
                return Err(format!("architecture {other} is not known (llama, qwen2, qwen3 are)"));
            }
        };
        let key = |name: &str| format!("{arch}.{name}");
        let optional = |name: &str| gguf.integer(&key(name));
        let need = |name: &str| {
            let value = optional(name)?.filter(|n| (1..1 << 24).contains(n));
            value.ok_or_else(|| format!("{} is missing or not a sensible size", key(name)))
        };
        if optional("expert_count")?.unwrap_or(0) > 0 {
            return Err("mixtures of experts are not known".into());
        }
        if gguf.tensor("rope_freqs.weight").is_some() {
            return Err(
                "rope_freqs.weight: import models with tabulated frequencies from their safetensors".into()
            );
        }
        let (hidden, heads) = (need("embedding_length")?, need("attention.head_count")?);
        let kv_heads = optional("attention.head_count_kv")?.unwrap_or(heads);
        if kv_heads == 0 || heads % kv_heads != 0 {
            return Err(format!("{heads} heads do not divide among {kv_heads} key/value heads"));
        }
        let head_dim = optional("attention.key_length")?.unwrap_or(hidden / heads).max(1);
        if optional("rope.dimension_count")?.is_some_and(|dims| dims != head_dim) {
            return Err(format!("{} is not the head size {head_dim}", key("rope.dimension_count")));
        }
        let context = need("context_length")?;
        let embedding = gguf.tensor("token_embd.weight").ok_or("tensor token_embd.weight is missing")?;
        Ok(Self {
            name: gguf.text("general.name").unwrap_or(arch).to_owned(),
            architecture,
            model_type,
            permuted,
            layers: need("block_count")? as usize,
            hidden,
            ffn: need("feed_forward_length")?,
            heads,
            kv_heads,
            head_dim,
            context,
            vocab: embedding.shape[0],
            // Written as f32; as a decimal it is what the original configuration said.
            eps: decimal(gguf.float(&key("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-5)),
            theta: decimal(gguf.float(&key("rope.freq_base"))?.unwrap_or(10_000.0)),
            scaling: scaling(gguf, arch, context)?,
            tied: gguf.tensor("output.weight").is_none(),
            attention_bias: gguf.tensor("blk.0.attn_q.bias").is_some(),
            bos: gguf.integer("tokenizer.ggml.bos_token_id")?,
            eos: gguf.integer("tokenizer.ggml.eos_token_id")?,
            pad: gguf.integer("tokenizer.ggml.padding_token_id")?,
        })
    }

    pub(super) fn config_json(&self) -> Json {
        let mut config = json!({
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "vocab_size": self.vocab,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "rope_scaling": self.scaling,
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos,
            "pad_token_id": self.pad,
            "torch_dtype": "bfloat16",
        });
        if self.model_type != "qwen2" {
            config["attention_bias"] = json!(self.attention_bias);
        }
        config
    }

    pub(super) fn generation_json(&self) -> Json {
        json!({ "bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad })
    }
}

/// The shortest decimal of the f32 that the file holds.
fn decimal(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

fn scaling(gguf: &Gguf<'_>, arch: &str, context: u64) -> Result<Json, String> {
    let key = |name: &str| format!("{arch}.rope.scaling.{name}");
    let kind = match gguf.get(&key("type")) {
        None => return Ok(Json::Null),
        Some(Value::Text(kind)) => *kind,
        Some(other) => return Err(format!("{} is {other:?}", key("type"))),
    };
    let factor = gguf.float(&key("factor"))?;
    match kind {
        "none" => Ok(Json::Null),
        "linear" => Ok(json!({ "rope_type": "linear", "factor": factor.unwrap_or(1.0) })),
        "yarn" => Ok(json!({
            "rope_type": "yarn",
            "factor": factor.unwrap_or(1.0),
            "original_max_position_embeddings": gguf.integer(&key("original_context_length"))?.unwrap_or(context),
        })),
        other => Err(format!("rope scaling {other} is not known (none, linear, yarn are)")),
    }
}
