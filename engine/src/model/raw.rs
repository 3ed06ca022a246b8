//! config.json and generation_config.json as they are written, before anything is believed.

use std::path::Path;

use serde::{Deserialize, de::DeserializeOwned};

use crate::EngineError;

/// The largest JSON file we read: real ones are a few KB.
const MAX_JSON_BYTES: u64 = 16 << 20;

#[derive(Debug, Deserialize)]
pub(super) struct RawConfig {
    #[serde(default)]
    pub(super) architectures: Vec<String>,
    pub(super) model_type: Option<String>,
    pub(super) hidden_size: u64,
    pub(super) intermediate_size: u64,
    pub(super) num_hidden_layers: u64,
    pub(super) num_attention_heads: u64,
    pub(super) num_key_value_heads: Option<u64>,
    pub(super) head_dim: Option<u64>,
    pub(super) vocab_size: u64,
    pub(super) max_position_embeddings: Option<u64>,
    pub(super) rms_norm_eps: Option<f64>,
    pub(super) rope_theta: Option<f64>,
    pub(super) rope_scaling: Option<RawRope>,
    pub(super) rope_parameters: Option<RawRope>,
    pub(super) partial_rotary_factor: Option<f64>,
    pub(super) tie_word_embeddings: Option<bool>,
    pub(super) attention_bias: Option<bool>,
    pub(super) mlp_bias: Option<bool>,
    pub(super) hidden_act: Option<String>,
    pub(super) sliding_window: Option<u64>,
    pub(super) use_sliding_window: Option<bool>,
    pub(super) max_window_layers: Option<u64>,
    pub(super) layer_types: Option<Vec<String>>,
    pub(super) bos_token_id: Option<Ids>,
    pub(super) eos_token_id: Option<Ids>,
    pub(super) quantization_config: Option<serde_json::Value>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct RawRope {
    #[serde(alias = "type")]
    pub(super) rope_type: Option<String>,
    pub(super) rope_theta: Option<f64>,
    pub(super) factor: Option<f64>,
    pub(super) low_freq_factor: Option<f64>,
    pub(super) high_freq_factor: Option<f64>,
    pub(super) original_max_position_embeddings: Option<f64>,
    pub(super) beta_fast: Option<f64>,
    pub(super) beta_slow: Option<f64>,
    pub(super) attention_factor: Option<f64>,
    pub(super) mscale: Option<f64>,
    pub(super) mscale_all_dim: Option<f64>,
    pub(super) truncate: Option<bool>,
    pub(super) partial_rotary_factor: Option<f64>,
}

/// One id or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl Ids {
    pub(super) fn into_vec(self) -> Vec<u32> {
        match self {
            Ids::One(id) => vec![id],
            Ids::Many(ids) => ids,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct RawGeneration {
    pub(super) eos_token_id: Option<Ids>,
}

pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, EngineError> {
    let size =
        std::fs::metadata(path).map_err(|e| EngineError::model(path, format!("cannot be read: {e}")))?.len();
    if size > MAX_JSON_BYTES {
        return Err(EngineError::model(path, format!("{size} bytes, more than {MAX_JSON_BYTES}")));
    }
    let text = std::fs::read(path).map_err(|e| EngineError::model(path, format!("cannot be read: {e}")))?;
    serde_json::from_slice(&text).map_err(|e| EngineError::model(path, format!("not understood: {e}")))
}
