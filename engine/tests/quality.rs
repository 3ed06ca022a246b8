//! What eight bits cost a real model: how likely it finds fixed texts, beside bf16.
//!
//! Needs `TANDEM_TEST_MODEL`, the folder of SmolLM2-135M-Instruct; says so and passes when it is not set.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use engine::cpu::{CpuEngine, CpuOptions};
use engine::model::Quantisation;
use engine::{Batch, Engine, KvDtype, Segment};

/// Means over all tokens of all texts.
#[derive(Default)]
struct Compared {
    tokens: usize,
    /// Negative log-likelihood of each token after those before it, in bf16 and rounded.
    nll: [f64; 2],
    /// Kullback-Leibler divergence of the rounded from bf16: how far the drawn-from distributions lie apart, whether or not the
    /// text happens to like it. Perplexities of a few thousand tokens are known to half a percent, this to a few.
    divergence: f64,
}

fn load(folder: &Path, options: CpuOptions) -> CpuEngine {
    CpuEngine::load(folder, CpuOptions { kv_blocks: 128, ..options }).unwrap()
}

/// Log-probabilities after each of the positions.
fn run(engine: &mut CpuEngine, tokens: &[u32], positions: &[usize]) -> Vec<Vec<f64>> {
    let blocks: Vec<u32> = (0..128).collect();
    // Each token a segment of its own, so that each gets its logits. They share blocks, which this engine takes: a layer's
    // KV of all rows is there before any row looks.
    let segments = positions.iter().map(|&position| Segment {
        tokens: &tokens[position..=position],
        position,
        blocks: &blocks,
        samples: &[],
    });
    let logits = engine.forward_logits(&Batch { segments: segments.collect() }).unwrap();
    let normal = |logits: Vec<f32>| {
        let top = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
        let total: f64 = logits.iter().map(|&x| (f64::from(x) - top).exp()).sum();
        logits.into_iter().map(|x| f64::from(x) - top - total.ln()).collect()
    };
    logits.into_iter().map(normal).collect()
}

/// Each rounding against bf16.
fn compare(folder: &Path, roundings: &[CpuOptions], texts: &[Vec<u32>]) -> Vec<Compared> {
    let mut plain = load(folder, CpuOptions::default());
    let mut rounded: Vec<_> = roundings.iter().map(|options| load(folder, options.clone())).collect();
    let mut sums: Vec<_> = roundings.iter().map(|_| Compared::default()).collect();
    for tokens in texts {
        let positions: Vec<usize> = (0..tokens.len() - 1).collect();
        for positions in positions.chunks(64) {
            let expected = run(&mut plain, tokens, positions);
            for (engine, sums) in rounded.iter_mut().zip(&mut sums) {
                for ((&position, p), q) in positions.iter().zip(&expected).zip(run(engine, tokens, positions))
                {
                    let next = tokens[position + 1] as usize;
                    sums.tokens += 1;
                    sums.nll = [sums.nll[0] - p[next], sums.nll[1] - q[next]];
                    sums.divergence += p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
                }
            }
        }
    }
    let means = sums.into_iter().map(|sums| {
        let mean = |sum: f64| sum / sums.tokens as f64;
        Compared { nll: sums.nll.map(mean), divergence: mean(sums.divergence), ..sums }
    });
    means.collect()
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

/// What each rounding may change perplexity by, and diverge. Small models suffer most.
#[test]
fn rounded_networks_find_text_as_likely_as_bf16_does() {
    let Some(folder) = std::env::var_os("TANDEM_TEST_MODEL").map(PathBuf::from) else {
        eprintln!("NOT RUN: TANDEM_TEST_MODEL is not set to the folder of SmolLM2-135M-Instruct");
        return;
    };
    let tokenizer = tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    let text = include_str!("../../tests/golden/plain_text.txt");
    let technical = vec![tokenizer.encode(text, false).unwrap().get_ids().to_vec()];
    let int8 = CpuOptions { quantise: Some(Quantisation::Int8), ..CpuOptions::default() };
    let fp8 = CpuOptions { kv_dtype: KvDtype::Fp8, ..CpuOptions::default() };
    let limits = [("INT8", 0.01, 0.01), ("KV in fp8", 0.05, 0.05)];
    for (texts, of) in [("technical text", technical), ("talk", talk())] {
        for (compared, (name, perplexity, most)) in
            compare(&folder, &[int8.clone(), fp8.clone()], &of).into_iter().zip(limits)
        {
            let Compared { tokens, nll: [plain, rounded], divergence } = compared;
            let loss = (rounded - plain).exp() - 1.0;
            println!(
                "{name}, {texts}, {tokens} tokens: mean negative log-likelihood {plain:.4} in bf16, {rounded:.4}; perplexity {:.3} and {:.3} ({:+.2} %); divergence {divergence:.5}",
                plain.exp(),
                rounded.exp(),
                loss * 100.0
            );
            assert!(loss.abs() < perplexity, "{name}, {texts}: {plain} {rounded}");
            assert!(divergence < most, "{name}, {texts}: {divergence}");
        }
    }
}
