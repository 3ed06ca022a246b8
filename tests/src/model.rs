//! A tiny Llama with random weights and a byte-level tokenizer: the real files, the real loaders, small.

use std::path::Path;

use engine::kv::hash::BlockHash;
use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const HIDDEN: usize = 64;
const FFN: usize = 128;
const LAYERS: usize = 4;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 16;
/// Bytes, then the end token and a few that no text makes.
pub const VOCAB: usize = 264;
/// The end token.
pub const EOS: u32 = 256;
/// Longest sequence.
pub const CONTEXT: usize = 8192;

/// Writes the model folder. The same seed gives the same bytes.
pub fn write(dir: &Path, seed: u64) {
    let file = |name: &str, value: &Value| std::fs::write(dir.join(name), value.to_string()).unwrap();
    file(
        "config.json",
        &json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
            "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": false, "eos_token_id": EOS,
        }),
    );
    file("tokenizer.json", &tokenizer());
    file(
        "tokenizer_config.json",
        &json!({
            "eos_token": "<end>",
            "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
        }),
    );
    std::fs::write(dir.join("model.safetensors"), weights(seed)).unwrap();
}

/// One token per byte, as GPT-2's alphabet writes bytes.
fn tokenizer() -> Value {
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let vocab: serde_json::Map<String, Value> =
        alphabet.iter().enumerate().map(|(id, c)| (c.to_string(), json!(id))).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": EOS, "content": "<end>", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true}],
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}

fn weights(seed: u64) -> Vec<u8> {
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
        ("lm_head.weight".into(), vec![VOCAB, HIDDEN]),
    ];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.k_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.v_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HEADS * HEAD_DIM]),
            ("mlp.gate_proj", vec![FFN, HIDDEN]),
            ("mlp.up_proj", vec![FFN, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, FFN]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let data: Vec<Vec<u8>> = shapes.iter().map(|(name, shape)| tensor(seed, name, shape)).collect();
    let views = shapes.iter().zip(&data).map(|((name, shape), data)| {
        (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), data).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// Uniform values from a counter hash; norms near 1. Large enough that the logits are well apart.
fn tensor(seed: u64, name: &str, shape: &[usize]) -> Vec<u8> {
    let norm = name.contains("norm");
    let count: usize = shape.iter().product();
    let root = BlockHash::root(format!("{seed}/{name}").as_bytes()).to_bytes();
    let mut state = u64::from_le_bytes(root[..8].try_into().unwrap());
    (0..count)
        .flat_map(|_| {
            // SplitMix64 (Steele, Lea, Flood 2014).
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let uniform = ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32 * 2.0 - 1.0;
            let value = if norm { 1.0 + uniform * 0.1 } else { uniform * 0.35 };
            bf16::from_f32(value).to_le_bytes()
        })
        .collect()
}
