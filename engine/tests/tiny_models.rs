//! Every architecture we know, tiny, against Hugging Face transformers in float32.
//!
//! `tests/fixtures/make_tiny_models.py` made the file and says how the weights are computed; here they are written
//! as a model folder and loaded as any other.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use engine::cpu::{CpuEngine, CpuOptions};
use engine::{Batch, Engine, KvDtype, Segment};
use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    reference: String,
    /// (suffix of the name, offset, scale); the first match counts.
    scales: Vec<(String, f64, f64)>,
    models: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    name: String,
    config: serde_json::Value,
    tensors: BTreeMap<String, Vec<usize>>,
    prompt_ids: Vec<u32>,
    output_ids: Vec<u32>,
    margins: Vec<f32>,
    first_top8: Vec<(u32, f32)>,
    last_top8: Vec<(u32, f32)>,
}

fn splitmix64(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn fnv1a(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

fn numbers(golden: &Golden, name: &str, count: usize) -> Vec<bf16> {
    let (_, offset, scale) = golden.scales.iter().find(|row| name.ends_with(&row.0)).unwrap();
    let seed = fnv1a(name);
    (1..=count as u64)
        .map(|i| {
            let bits = splitmix64(seed.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15))) >> 40;
            let value = offset + scale * (bits as f64 / f64::from(1u32 << 23) - 1.0);
            bf16::from_f32(value as f32)
        })
        .collect()
}

fn write(golden: &Golden, model: &Model, dir: &Path) {
    std::fs::write(dir.join("config.json"), model.config.to_string()).unwrap();
    let data: Vec<(&String, &Vec<usize>, Vec<u8>)> = model
        .tensors
        .iter()
        .map(|(name, shape)| {
            let numbers = numbers(golden, name, shape.iter().product());
            (name, shape, numbers.iter().flat_map(|x| x.to_le_bytes()).collect())
        })
        .collect();
    let views = data
        .iter()
        .map(|(name, shape, bytes)| (*name, TensorView::new(Dtype::BF16, (*shape).clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

fn golden() -> Option<Golden> {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny-architectures.json");
    let Ok(text) = std::fs::read(&path) else {
        eprintln!("NOT RUN: {} is missing; tests/fixtures/make_tiny_models.py makes it", path.display());
        return None;
    };
    Some(serde_json::from_slice(&text).unwrap())
}

/// Largest difference to the reference's best eight logits.
fn off(logits: &[f32], top: &[(u32, f32)]) -> f32 {
    top.iter().map(|&(id, value)| (logits[id as usize] - value).abs()).fold(0.0, f32::max)
}

#[test]
fn every_architecture_equals_the_reference() {
    let Some(golden) = golden() else { return };
    println!("{}", golden.reference);
    for model in &golden.models {
        let dir = tempfile::tempdir().unwrap();
        write(&golden, model, dir.path());
        // With an f32 pool the arithmetic is the reference's but for the order of sums; a bf16 pool rounds K
        // and V to 8 bits.
        for (kv_dtype, tolerance) in [(KvDtype::F32, 2e-4), (KvDtype::Bf16, 0.2)] {
            let options = CpuOptions { kv_blocks: 8, kv_dtype, ..CpuOptions::default() };
            let mut engine = CpuEngine::load(dir.path(), options).unwrap();
            let blocks = [5, 1, 4, 2, 7];
            let (mut tokens, mut position) = (model.prompt_ids.clone(), 0);
            let mut compared = 0;
            for (step, (&expected, &margin)) in model.output_ids.iter().zip(&model.margins).enumerate() {
                let segment = Segment { tokens: &tokens, position, blocks: &blocks, samples: &[] };
                let logits = engine.forward_logits(&Batch { segments: vec![segment] }).unwrap().remove(0);
                let name = format!("{}, {} KV, step {step}", model.name, kv_dtype.name());
                if step == 0 {
                    let off = off(&logits, &model.first_top8);
                    println!("{name}: logits within {off}");
                    assert!(off < tolerance, "{name}: first logits off by {off}");
                }
                let token = engine::sampling::argmax(&logits);
                if token != expected {
                    assert!(margin < 2.0 * tolerance, "{name}: {token}, not {expected}; margin {margin}");
                    break;
                }
                if step + 1 == model.output_ids.len() {
                    let off = off(&logits, &model.last_top8);
                    assert!(off < 2.0 * tolerance, "{name}: last logits off by {off}");
                }
                compared += 1;
                position += tokens.len();
                tokens = vec![token];
            }
            if kv_dtype == KvDtype::F32 {
                assert_eq!(compared, model.output_ids.len(), "{}: stopped at a near tie", model.name);
            }
        }
    }
}
