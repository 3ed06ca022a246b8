//! SmolLM2 against references. Needs `TANDEM_TEST_MODEL`.

use engine::cuda::{CudaEngine, CudaOptions};
use engine::model::Quantisation;
use engine::{Batch, Engine, KvDtype, Segment};

use crate::{continuation, options, quantised, table, unless_unsupported};

/// The model on the GPU, or `None` (said aloud) where one of the two is missing.
fn real(options: CudaOptions) -> Option<CudaEngine> {
    let Some(folder) = std::env::var_os("TANDEM_TEST_MODEL") else {
        eprintln!("skipped: TANDEM_TEST_MODEL is not set to the folder of SmolLM2-135M-Instruct");
        return None;
    };
    unless_unsupported(CudaEngine::load(folder.as_ref(), options))
}

/// SmolLM2 against Hugging Face transformers in float32. Needs `TANDEM_TEST_MODEL`.
#[test]
fn greedy_tokens_of_the_real_model_equal_the_reference() {
    /// bf16 activations move logits of this model: another token was seen at a margin of 0.166.
    const CLEAR: f64 = 0.3;
    let Some(mut engine) = real(options()) else { return };
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../../tests/golden/smollm2-public.json")).unwrap();
    let numbers = |v: &serde_json::Value| -> Vec<u32> { serde_json::from_value(v.clone()).unwrap() };
    for row in golden["rows"].as_array().unwrap().iter().filter(|row| numbers(&row["prompt_ids"]).len() < 800)
    {
        let expected = numbers(&row["output_ids"]);
        let margins: Vec<f64> = serde_json::from_value(row["margins"].clone()).unwrap();
        let prompt = numbers(&row["prompt_ids"]);
        let got = continuation(&mut engine, &[prompt], expected.len()).remove(0);
        match expected.iter().zip(&got).position(|(a, b)| a != b) {
            None => println!("{}: {} tokens equal", row["id"], got.len()),
            Some(at) => {
                println!("{}: differs at {at} of {}, margin {}", row["id"], got.len(), margins[at]);
                assert!(margins[at] < CLEAR, "{}: {got:?}, not {expected:?}", row["id"]);
            }
        }
    }
}

/// Relative error of logits (without their mean, which no probability depends on) against transformers in float32:
/// of a whole prefill, and of a text whose last tokens are decoded one by one, with kernels apart and with one for
/// all layers.
#[test]
fn logits_of_the_real_model_agree_with_the_reference() {
    let references = references();
    let (fp8, int8) = (Some(Quantisation::Fp8), Some(Quantisation::Int8));
    for (name, quantise, kv_dtype, most) in [
        ("bf16", None, KvDtype::Bf16, 0.05),
        ("bf16, KV in fp8", None, KvDtype::Fp8, 0.15),
        ("INT8", int8, KvDtype::Bf16, 0.15),
        ("INT8, KV in fp8", int8, KvDtype::Fp8, 0.2),
        ("FP8", fp8, KvDtype::Bf16, 0.3),
        ("FP8, KV in fp8", fp8, KvDtype::Fp8, 0.3),
    ] {
        let Some(mut engine) = real(CudaOptions { quantise, kv_dtype, ..options() }) else { return };
        for (way, decoded, megakernel) in
            [("a prefill", 0, false), ("kernels apart", 16, false), ("one kernel for all layers", 16, true)]
        {
            engine.set_megakernel(Some(megakernel));
            if megakernel && !engine.has_megakernel() {
                continue;
            }
            let off = error_against(&references, &mut engine, decoded);
            println!("{name}, {way}: relative error of logits against transformers' {off:.4}");
            assert!(off < most, "{name}, {way}: {off}");
        }
    }
}

/// What transformers computed for the last token of a text.
struct Reference {
    tokens: Vec<u32>,
    ids: Vec<u32>,
    logits: Vec<f64>,
}

fn references() -> Vec<Reference> {
    let read = |text: &str| -> serde_json::Value { serde_json::from_str(text).unwrap() };
    let texts = read(include_str!("../../../tests/golden/smollm2-public.json"));
    let golden = read(include_str!("../../../tests/golden/smollm2-logits.json"));
    let numbers = |v: &serde_json::Value| -> Vec<u32> { serde_json::from_value(v.clone()).unwrap() };
    let rows = texts["rows"].as_array().unwrap().iter().zip(golden["rows"].as_array().unwrap());
    rows.map(|(text, row)| {
        let mut tokens = [numbers(&text["prompt_ids"]), numbers(&text["output_ids"])].concat();
        tokens.truncate(row["tokens"].as_u64().unwrap() as usize);
        let logits = serde_json::from_value(row["logits"].clone()).unwrap();
        Reference { tokens, ids: numbers(&row["ids"]), logits }
    })
    .collect()
}

/// Relative error of the last token's logits over all texts, of which the last tokens are decoded one by one.
fn error_against(references: &[Reference], engine: &mut CudaEngine, decoded: usize) -> f64 {
    let (mut off, mut size) = (0.0, 0.0);
    for Reference { tokens, ids, logits } in references {
        let blocks = table(0, tokens.len());
        let mut run = |range: std::ops::Range<usize>| {
            let segment = Segment {
                tokens: &tokens[range.clone()],
                position: range.start,
                blocks: &blocks,
                samples: &[],
            };
            engine.forward_logits(&Batch { segments: vec![segment] }).unwrap().remove(0)
        };
        let prefilled = tokens.len() - decoded;
        let mut last = run(0..prefilled);
        for at in prefilled..tokens.len() {
            last = run(at..at + 1);
        }
        let found: Vec<f64> = ids.iter().map(|&id| f64::from(last[id as usize])).collect();
        let mean = |all: &[f64]| all.iter().sum::<f64>() / all.len() as f64;
        let (found_mean, mean) = (mean(&found), mean(logits));
        for (found, expected) in found.iter().zip(logits) {
            off += (found - found_mean - (expected - mean)).powi(2);
            size += (expected - mean).powi(2);
        }
    }
    (off / size).sqrt()
}

/// Top-1 agreement with bf16 on the real model, every position of the reference's prompts and answers.
#[test]
fn eight_bits_agree_on_the_real_model() {
    for (kind, percent) in [(Quantisation::Fp8, 80), (Quantisation::Int8, 85)] {
        agreement(kind, percent);
    }
}

fn agreement(kind: Quantisation, percent: usize) {
    let Some(mut plain) = real(options()) else { return };
    let mut rounded = real(quantised(kind, false)).unwrap();
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../../tests/golden/smollm2-public.json")).unwrap();
    let (mut same, mut all) = (0, 0);
    for row in golden["rows"].as_array().unwrap() {
        let numbers = |name: &str| -> Vec<u32> { serde_json::from_value(row[name].clone()).unwrap() };
        let tokens = [numbers("prompt_ids"), numbers("output_ids")].concat();
        let tokens = &tokens[..tokens.len().min(200)];
        let blocks = table(0, tokens.len());
        for position in 0..tokens.len() {
            let next = |engine: &mut CudaEngine| {
                let segment =
                    Segment { tokens: &tokens[position..=position], position, blocks: &blocks, samples: &[] };
                engine::sampling::argmax(
                    &engine.forward_logits(&Batch { segments: vec![segment] }).unwrap()[0],
                )
            };
            same += usize::from(next(&mut plain) == next(&mut rounded));
            all += 1;
        }
    }
    println!("{} and bf16 choose the same token at {same} of {all} positions", kind.name());
    assert!(same * 100 > all * percent, "{same} of {all}");
}
