//! Model folders with broken weights are refused by file and tensor.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use engine::model::{WeightSource, Weights};
use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};

fn save(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (*name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn numbers() -> Vec<f32> {
    vec![1.0, -2.5, 0.1, 3.0e-3, 70000.0, 0.0]
}

fn bytes_of<const N: usize>(convert: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
    numbers().into_iter().flat_map(convert).collect()
}

#[test]
fn every_dtype_becomes_bf16_or_f32() {
    let dir = tempfile::tempdir().unwrap();
    save(
        &dir.path().join("model.safetensors"),
        &[
            ("single", Dtype::F32, vec![2, 3], bytes_of(f32::to_le_bytes)),
            ("brain", Dtype::BF16, vec![2, 3], bytes_of(|x| bf16::from_f32(x).to_le_bytes())),
            ("half", Dtype::F16, vec![6], bytes_of(|x| f16::from_f32(x).to_le_bytes())),
            ("byte", Dtype::U8, vec![6], vec![0; 6]),
        ],
    );
    let weights = Weights::open(dir.path()).unwrap();
    let rounded: Vec<bf16> = numbers().into_iter().map(bf16::from_f32).collect();
    assert_eq!(weights.matrix("single", 2, 3).unwrap().numbers(), rounded);
    assert_eq!(weights.matrix("brain", 2, 3).unwrap().numbers(), rounded);
    assert_eq!(weights.vector("half", 6).unwrap()[1], -2.5);
    assert!(weights.has("byte") && !weights.has("word"));
    for (result, words) in [
        (weights.vector("byte", 6).err(), "tensor byte: BF16, F16 or F32 expected, U8 found"),
        (weights.vector("word", 6).err(), "tensor word is missing"),
        (weights.vector("half", 7).err(), "tensor half: shape [7] expected, [6] found"),
        (weights.matrix("brain", 3, 2).err(), "tensor brain: shape [3, 2] expected, [2, 3] found"),
    ] {
        let reason = result.unwrap().to_string();
        assert!(reason.contains(words), "{reason}");
    }
}

#[test]
fn shards_are_found_by_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let tensor = |name| [(name, Dtype::F32, vec![6], bytes_of(f32::to_le_bytes))];
    save(&dir.path().join("model-1-of-2.safetensors"), &tensor("a"));
    save(&dir.path().join("model-2-of-2.safetensors"), &tensor("b"));
    save(&dir.path().join("consolidated.safetensors"), &tensor("a"));
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::write(
        &index,
        r#"{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}"#,
    )
    .unwrap();
    let weights = Weights::open(dir.path()).unwrap();
    assert!(weights.has("a") && weights.has("b"));
    std::fs::write(&index, r#"{"weight_map": {"a": "../elsewhere.safetensors"}}"#).unwrap();
    assert!(Weights::open(dir.path()).err().unwrap().to_string().contains("not a file of this folder"));
    std::fs::write(&index, r#"{"weight_map": {"a": "model-9.safetensors"}}"#).unwrap();
    assert!(Weights::open(dir.path()).err().unwrap().to_string().contains("model-9.safetensors"));
}

proptest! {
    #[test]
    fn truncated_or_damaged_files_never_panic(cut in 0usize..200, at in 0usize..200, bit in 0u8..8) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        save(&path, &[("x", Dtype::F32, vec![6], bytes_of(f32::to_le_bytes))]);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..cut.min(whole.len() - 1)]).unwrap();
        prop_assert!(Weights::open(dir.path()).is_err());
        let mut damaged = whole;
        let at = at % damaged.len();
        damaged[at] ^= 1 << bit;
        std::fs::write(&path, damaged).unwrap();
        if let Ok(weights) = Weights::open(dir.path()) {
            let _ = weights.vector("x", 6);
        }
    }
}
