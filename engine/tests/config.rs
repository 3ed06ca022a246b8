//! Model folders as they are in the wild, and broken ones.

#![allow(clippy::unwrap_used)]

use engine::model::{Architecture, ModelConfig, RopeScaling};
use proptest::prelude::*;
use serde_json::{Value, json};

fn load(config: &Value, generation: Option<Value>) -> Result<ModelConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    if let Some(generation) = generation {
        std::fs::write(dir.path().join("generation_config.json"), generation.to_string()).unwrap();
    }
    ModelConfig::load(dir.path()).map_err(|e| e.to_string())
}

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": false, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    })
}

fn with(mut config: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

#[test]
fn llama_3_1_8b() {
    let config = load(&llama(), None).unwrap();
    assert_eq!(config.architecture, Architecture::Llama);
    assert_eq!((config.head_dim, config.group(), config.max_context), (128, 4, 131_072));
    assert_eq!(config.parameters(), 8_030_261_248);
    assert_eq!(config.eos, [128_001, 128_008, 128_009]);
    assert!(!config.qkv_bias && !config.qk_norm && !config.tie_embeddings);
    assert!(matches!(config.rope.scaling, RopeScaling::Llama3 { .. }));
    let frequencies = config.rope.frequencies(128);
    assert_eq!(frequencies[0], 1.0);
    assert!((f64::from(frequencies[63]) - 500_000f64.powf(-126.0 / 128.0) / 8.0).abs() < 1e-12);
}

#[test]
fn the_newer_spelling_means_the_same() {
    let mut newer = llama();
    let mut rope = newer["rope_scaling"].take();
    rope["rope_theta"] = json!(500_000.0);
    newer["rope_parameters"] = rope;
    newer.as_object_mut().unwrap().remove("rope_theta");
    assert_eq!(load(&newer, None).unwrap(), load(&llama(), None).unwrap());
}

#[test]
fn generation_config_wins_on_end_tokens() {
    let config = load(&llama(), Some(json!({"eos_token_id": 7}))).unwrap();
    assert_eq!(config.eos, [7]);
}

#[test]
fn qwen_and_mistral() {
    let qwen2 = with(
        llama(),
        json!({
            "architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": false,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            "max_position_embeddings": 32768,
        }),
    );
    let config = load(&qwen2, None).unwrap();
    assert!(config.qkv_bias && !config.o_bias && config.windows.iter().all(Option::is_none));
    assert_eq!(config.max_context, 131_072);
    assert!((config.rope.attention_factor() - 1.138_629_4).abs() < 1e-6);

    let windowed = with(qwen2, json!({"use_sliding_window": true, "max_window_layers": 30}));
    let config = load(&windowed, None).unwrap();
    assert_eq!(config.windows.iter().flatten().count(), 2);
    assert_eq!(config.windows[31], Some(4096));

    let qwen3 = with(
        llama(),
        json!({
            "architectures": ["Qwen3ForCausalLM"], "head_dim": 64, "rope_scaling": null, "hidden_size": 1024,
        }),
    );
    let config = load(&qwen3, None).unwrap();
    assert!(config.qk_norm && !config.qkv_bias);
    assert_eq!((config.head_dim, config.heads * config.head_dim), (64, 2048));

    let mistral = with(
        llama(),
        json!({
            "architectures": ["MistralForCausalLM"], "sliding_window": 4096, "rope_scaling": null,
        }),
    );
    assert!(load(&mistral, None).unwrap().windows.iter().all(|w| *w == Some(4096)));
}

#[test]
fn refusals_say_what_is_wrong() {
    for (change, words) in [
        (json!({"architectures": ["MixtralForCausalLM"]}), "MixtralForCausalLM is not known"),
        (json!({"num_key_value_heads": 7}), "32 heads do not divide among 7"),
        (json!({"hidden_size": 4097}), "4097 does not divide"),
        (json!({"num_hidden_layers": 0}), "num_hidden_layers is 0"),
        (json!({"vocab_size": 4_000_000_000_000u64}), "vocab_size"),
        (json!({"head_dim": 127}), "odd"),
        (json!({"hidden_act": "gelu"}), "gelu"),
        (json!({"quantization_config": {"bits": 4}}), "quantization_config: quant_method (none) is not read"),
        (json!({"rope_scaling": {"rope_type": "longrope"}}), "longrope is not known"),
        (json!({"rope_scaling": {"rope_type": "llama3", "factor": 8}}), "low_freq_factor"),
        (json!({"rope_theta": -1.0}), "rope_theta"),
        (json!({"eos_token_id": 999_999}), "token 999999"),
        (json!({"rms_norm_eps": 0.0}), "rms_norm_eps"),
        (json!({"hidden_size": "big"}), "not understood"),
    ] {
        let reason = load(&with(llama(), change), None).unwrap_err();
        assert!(reason.contains(words) && reason.contains("config.json"), "{reason}");
    }
}

#[test]
fn compat_hash_sees_config_weights_and_suffix() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), llama().to_string()).unwrap();
    let config = ModelConfig::load(dir.path()).unwrap();
    assert!(config.compat_hash(dir.path(), "").is_err(), "no weights");
    let file = dir.path().join("model.safetensors");
    let mut bytes = vec![2, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'];
    bytes.extend(vec![7u8; 5000]);
    std::fs::write(&file, &bytes).unwrap();
    let first = config.compat_hash(dir.path(), "bf16").unwrap();
    assert_eq!(first, config.compat_hash(dir.path(), "bf16").unwrap());
    assert_ne!(first, config.compat_hash(dir.path(), "f32").unwrap());
    bytes[12] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    assert_ne!(first, config.compat_hash(dir.path(), "bf16").unwrap());
    let other = ModelConfig { rms_eps: 1e-6, ..config };
    assert_ne!(first, other.compat_hash(dir.path(), "bf16").unwrap());
}

proptest! {
    #[test]
    fn broken_json_is_an_error_never_a_panic(at in 0usize..700, byte in any::<u8>()) {
        let mut text = llama().to_string().into_bytes();
        let at = at % text.len();
        text[at] = byte;
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        let _ = ModelConfig::load(dir.path());
    }
}
