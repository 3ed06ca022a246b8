//! The tiny networks of `tests/golden/tiny-architectures.json`, as folders.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;

#[derive(Deserialize)]
pub struct Golden {
    pub reference: String,
    /// (suffix of the name, offset, scale); the first match counts.
    scales: Vec<(String, f64, f64)>,
    pub models: Vec<Model>,
}

#[derive(Deserialize)]
pub struct Model {
    pub name: String,
    pub config: serde_json::Value,
    pub tensors: BTreeMap<String, Vec<usize>>,
    pub prompt_ids: Vec<u32>,
    pub output_ids: Vec<u32>,
    pub margins: Vec<f32>,
    pub first_top8: Vec<(u32, f32)>,
    pub last_top8: Vec<(u32, f32)>,
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

pub fn numbers(golden: &Golden, name: &str, count: usize) -> Vec<bf16> {
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

pub fn write(golden: &Golden, model: &Model, dir: &Path) {
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

pub fn golden() -> Option<Golden> {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny-architectures.json");
    let Ok(text) = std::fs::read(&path) else {
        eprintln!("NOT RUN: {} is missing; tests/fixtures/make_tiny_models.py makes it", path.display());
        return None;
    };
    Some(serde_json::from_slice(&text).unwrap())
}
