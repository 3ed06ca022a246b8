//! What eight bits cost a real model: how likely it finds fixed texts, beside bf16.
//!
//! Needs `TANDEM_TEST_MODEL`, the folder of SmolLM2-135M-Instruct; says so and passes when it is not set.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use engine::cpu::{CpuEngine, CpuOptions};
use engine::model::Quantisation;
use engine::{Batch, Engine, Segment};

/// Mean negative log-likelihood of each token after those before it, over all texts.
fn nll(folder: &Path, quantise: Option<Quantisation>, texts: &[Vec<u32>]) -> f64 {
    let options = CpuOptions { kv_blocks: 128, quantise, ..CpuOptions::default() };
    let mut engine = CpuEngine::load(folder, options).unwrap();
    let blocks: Vec<u32> = (0..128).collect();
    let (mut sum, mut count) = (0.0, 0);
    for tokens in texts {
        let positions: Vec<usize> = (0..tokens.len() - 1).collect();
        // Each token a segment of its own, so that each gets its logits. They share blocks, which this engine takes: a
        // layer's KV of all rows is there before any row looks.
        for positions in positions.chunks(64) {
            let segments = positions.iter().map(|&position| Segment {
                tokens: &tokens[position..=position],
                position,
                blocks: &blocks,
                samples: &[],
            });
            let logits = engine.forward_logits(&Batch { segments: segments.collect() }).unwrap();
            for (&position, logits) in positions.iter().zip(logits) {
                let top = logits.iter().copied().fold(f32::MIN, f32::max);
                let total: f64 = logits.iter().map(|x| f64::from(x - top).exp()).sum();
                sum += total.ln() - f64::from(logits[tokens[position + 1] as usize] - top);
                count += 1;
            }
        }
    }
    sum / f64::from(count)
}

/// The reference's prompts with their answers: talk, as the model is made for.
fn talk() -> Vec<Vec<u32>> {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../tests/golden/smollm2-public.json")).unwrap();
    let ids = |row: &serde_json::Value, name: &str| -> Vec<u32> {
        serde_json::from_value(row[name].clone()).unwrap()
    };
    let rows = golden["rows"].as_array().unwrap();
    rows.iter().map(|row| [ids(row, "prompt_ids"), ids(row, "output_ids")].concat()).collect()
}

#[test]
fn int8_finds_text_as_likely_as_bf16_does() {
    let Some(folder) = std::env::var_os("TANDEM_TEST_MODEL").map(PathBuf::from) else {
        eprintln!("NOT RUN: TANDEM_TEST_MODEL is not set to the folder of SmolLM2-135M-Instruct");
        return;
    };
    let tokenizer = tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    let text = include_str!("../../tests/golden/plain_text.txt");
    let technical = vec![tokenizer.encode(text, false).unwrap().get_ids().to_vec()];
    for (name, texts) in [("technical text", technical), ("talk", talk())] {
        let (plain, int8) = (nll(&folder, None, &texts), nll(&folder, Some(Quantisation::Int8), &texts));
        let tokens: usize = texts.iter().map(Vec::len).sum();
        println!(
            "{name}, {tokens} tokens: mean negative log-likelihood {plain:.4} in bf16, {int8:.4} in INT8 ({:+.2} %); perplexity {:.3} and {:.3} ({:+.2} %)",
            (int8 / plain - 1.0) * 100.0,
            plain.exp(),
            int8.exp(),
            ((int8 - plain).exp() - 1.0) * 100.0
        );
        // Small models suffer most: +1.6 % and +1.2 % of perplexity were seen.
        assert!(((int8 - plain).exp() - 1.0).abs() < 0.02, "{name}: {plain} {int8}");
    }
}
