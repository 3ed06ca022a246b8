//! Every architecture we know, tiny, against Hugging Face transformers in float32.
//!
//! `tests/fixtures/make_tiny_models.py` made the file and says how the weights are computed; here they are written
//! as a model folder and loaded as any other.

#![allow(clippy::unwrap_used)]

use engine::cpu::{CpuEngine, CpuOptions};
use engine::{Batch, Engine, KvDtype, Segment};
use tiny::{golden, write};

mod tiny;

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
