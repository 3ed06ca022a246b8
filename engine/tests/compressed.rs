//! Checkpoints of eight bits: as compressed-tensors writes them, against rounding at load; and everything that is refused.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use engine::cpu::{CpuEngine, CpuOptions};
use engine::model::quantise::int8_rows;
use engine::model::{ModelConfig, Quantisation};
use engine::{Batch, Engine, KvDtype, Segment};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tiny::{Golden, Model, golden, numbers, write};

mod tiny;

/// What llm-compressor's W8A8 recipe leaves in config.json.
fn scheme() -> Value {
    let numbers = |strategy: &str, dynamic: bool| {
        json!({
            "actorder": null, "block_structure": null, "dynamic": dynamic, "group_size": null, "num_bits": 8,
            "observer": "minmax", "observer_kwargs": {}, "strategy": strategy, "symmetric": true, "type": "int",
        })
    };
    json!({
        "config_groups": {"group_0": {
            "input_activations": numbers("token", true), "output_activations": null, "targets": ["Linear"],
            "weights": numbers("channel", false),
        }},
        "format": "int-quantized", "global_compression_ratio": 1.5, "ignore": ["lm_head"], "kv_cache_scheme": null,
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
    })
}

fn is_of_a_layer(name: &str) -> bool {
    name.ends_with("_proj.weight")
}

/// The model as a checkpoint of INT8.
fn write_int8(golden: &Golden, model: &Model, dir: &Path) {
    let mut config = model.config.clone();
    config["quantization_config"] = scheme();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, shape) in &model.tensors {
        let numbers = numbers(golden, name, shape.iter().product());
        if is_of_a_layer(name) {
            let (rounded, scales) = int8_rows(&numbers, shape[1]);
            let bytes = rounded.iter().map(|&x| x as u8).collect();
            let scale_bytes = scales.iter().flat_map(|x| x.to_le_bytes()).collect();
            tensors.push((name.clone(), Dtype::I8, shape.clone(), bytes));
            tensors.push((format!("{name}_scale"), Dtype::F32, vec![shape[0], 1], scale_bytes));
        } else {
            let bytes = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
            tensors.push((name.clone(), Dtype::BF16, shape.clone(), bytes));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

/// `per_token`, since a checkpoint is not turned and its head is left alone.
fn options(quantise: Option<Quantisation>) -> CpuOptions {
    CpuOptions { kv_blocks: 8, kv_dtype: KvDtype::F32, quantise, per_token: true, ..CpuOptions::default() }
}

fn logits(engine: &mut CpuEngine, tokens: &[u32]) -> Vec<f32> {
    let segment = Segment { tokens, position: 0, blocks: &[5, 1, 4, 2, 7], samples: &[] };
    engine.forward_logits(&Batch { segments: vec![segment] }).unwrap().remove(0)
}

#[test]
fn a_checkpoint_gives_the_bits_of_rounding_at_load() {
    let Some(golden) = golden() else { return };
    for model in &golden.models {
        let (plain, eight) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(&golden, model, plain.path());
        write_int8(&golden, model, eight.path());
        assert_eq!(ModelConfig::load(eight.path()).unwrap().quantised, Some(Quantisation::Int8));
        let int8 = Some(Quantisation::Int8);
        let mut at_load = CpuEngine::load(plain.path(), options(int8)).unwrap();
        let expected = logits(&mut at_load, &model.prompt_ids);
        // The checkpoint decides; saying the same is no contradiction.
        for quantise in [None, int8] {
            let mut stored = CpuEngine::load(eight.path(), options(quantise)).unwrap();
            assert_eq!(stored.streamed_bytes(), at_load.streamed_bytes());
            assert_eq!(logits(&mut stored, &model.prompt_ids), expected, "{}", model.name);
        }
        let unrounded = logits(&mut CpuEngine::load(plain.path(), options(None)).unwrap(), &model.prompt_ids);
        let off: f64 =
            expected.iter().zip(&unrounded).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
        let size: f64 = unrounded.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>().sqrt();
        println!("{}: INT8 logits {:.4} from bf16", model.name, off / size);
        // These networks are 32 numbers wide and amplify noise.
        assert!(off > 0.0 && off < size * 0.2, "{}: {}", model.name, off / size);
    }
}

#[test]
fn other_schemes_are_refused_by_name() {
    let Some(golden) = golden() else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = &golden.models[0];
    write_int8(&golden, model, dir.path());
    let group = "/config_groups/group_0";
    for (at, value, words) in [
        ("/quant_method", json!("gptq"), "quant_method gptq is not read"),
        ("/format", json!("pack-quantized"), "format pack-quantized is not read"),
        ("/format", json!("float-quantized"), "num_bits 8 of type int, only 8 of type float"),
        (
            "/ignore",
            json!(["lm_head", "model.layers.0.mlp.down_proj"]),
            "ignore names model.layers.0.mlp.down_proj",
        ),
        ("/kv_cache_scheme", json!({"num_bits": 8}), "kv_cache_scheme is set"),
        ("/config_groups", json!({}), "0 config_groups"),
        ("GROUP/targets", json!(["re:.*q_proj"]), "group_0.targets"),
        ("GROUP/input_activations", Value::Null, "input_activations is missing: weight-only"),
        ("GROUP/input_activations/dynamic", json!(false), "input_activations.dynamic is false"),
        ("GROUP/input_activations/dynamic", json!("local"), "input_activations.dynamic"),
        ("GROUP/input_activations/symmetric", json!(false), "input_activations.symmetric is false"),
        ("GROUP/input_activations/strategy", json!("tensor"), "input_activations.strategy tensor"),
        ("GROUP/weights/strategy", json!("group"), "weights.strategy group"),
        ("GROUP/weights/group_size", json!(128), "weights.group_size"),
        ("GROUP/weights/num_bits", json!(4), "weights.num_bits 4"),
        ("GROUP/weights/symmetric", json!(false), "weights.symmetric is false"),
        ("GROUP/weights/actorder", json!("group"), "weights.actorder"),
        ("GROUP/weights/num_bits", json!("eight"), "not understood"),
    ] {
        let mut config = model.config.clone();
        config["quantization_config"] = scheme();
        *config["quantization_config"].pointer_mut(&at.replace("GROUP", group)).unwrap() = value;
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let refused = ModelConfig::load(dir.path()).unwrap_err().to_string();
        assert!(refused.contains(words) && refused.contains("quantization_config"), "{refused}");
    }
}

#[test]
fn what_contradicts_itself_is_refused() {
    let Some(golden) = golden() else { return };
    let model = &golden.models[0];
    let (plain, eight) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(&golden, model, plain.path());
    write_int8(&golden, model, eight.path());
    let load = |dir: &Path, quantise| CpuEngine::load(dir, options(quantise)).err().unwrap().to_string();
    assert!(load(eight.path(), Some(Quantisation::Fp8)).contains("the checkpoint is int8 already"));
    assert!(load(plain.path(), Some(Quantisation::Fp8)).contains("FP8 on CPU cores"));
    // config.json says the one, the tensors the other.
    std::fs::copy(plain.path().join("model.safetensors"), eight.path().join("model.safetensors")).unwrap();
    assert!(load(eight.path(), None).contains("is bf16, config.json declares int8"));
    write_int8(&golden, model, eight.path());
    std::fs::copy(plain.path().join("config.json"), eight.path().join("config.json")).unwrap();
    let refused = load(eight.path(), None);
    assert!(refused.contains("BF16, F16 or F32 expected, I8 found"), "{refused}");
    let refused = load(eight.path(), Some(Quantisation::Int8));
    assert!(refused.contains("is int8, config.json declares bf16"), "{refused}");
}
