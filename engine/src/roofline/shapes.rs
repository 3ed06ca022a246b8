//! Networks by name: their shapes only.

use crate::model::{Architecture, ModelConfig, Rope, RopeScaling};

/// Names that [`named`] knows.
pub const NAMES: [&str; 6] = ["smollm2", "llama-1b", "llama-8b", "llama-70b", "llama-70b-layer", "qwen3-8b"];

/// A shape by its name.
pub fn named(name: &str) -> Option<ModelConfig> {
    let llama = |layers, hidden, ffn, heads, kv_heads, head_dim, vocab| ModelConfig {
        architecture: Architecture::Llama,
        layers,
        hidden,
        ffn,
        heads,
        kv_heads,
        head_dim,
        vocab,
        max_context: 32_768,
        rms_eps: 1e-5,
        rope: Rope { theta: 5e5, scaling: RopeScaling::None },
        qkv_bias: false,
        o_bias: false,
        qk_norm: false,
        windows: vec![None; layers],
        tie_embeddings: false,
        quantised: None,
        bos: None,
        eos: Vec::new(),
    };
    Some(match name {
        "smollm2" => ModelConfig { tie_embeddings: true, ..llama(30, 576, 1536, 9, 3, 64, 49_152) },
        "llama-1b" => llama(22, 2048, 5632, 32, 4, 64, 32_000),
        "llama-8b" => llama(32, 4096, 14_336, 32, 8, 128, 128_256),
        "llama-70b" => llama(80, 8192, 28_672, 64, 8, 128, 128_256),
        // One of the 80 layers, with a vocabulary that does not count.
        "llama-70b-layer" => llama(1, 8192, 28_672, 64, 8, 128, 1024),
        "qwen3-8b" => ModelConfig {
            architecture: Architecture::Qwen3,
            qk_norm: true,
            ..llama(36, 4096, 12_288, 32, 8, 128, 151_936)
        },
        _ => return None,
    })
}
