//! Sampling against plain definitions of each step.

use super::*;
use crate::batch::SamplingParams;
use proptest::prelude::*;

fn request(params: &SamplingParams) -> SampleRequest<'_> {
    SampleRequest { params, prompt: &[], output: &[], banned: &[], constraint: None, choice: 0 }
}

fn params() -> SamplingParams {
    SamplingParams { temperature: 1.0, ..SamplingParams::default() }
}

#[test]
fn greedy_takes_the_lowest_id_on_ties_and_survives_nan() {
    let greedy = SamplingParams::default();
    let draw = |logits: &[f32]| sample(&mut logits.to_vec(), &request(&greedy)).token;
    assert_eq!(draw(&[1.0, 3.0, 3.0, 2.0]), 1);
    assert_eq!(draw(&[f32::NAN, -1.0, f32::NAN]), 1);
    assert_eq!(draw(&[f32::NAN; 4]), 0);
    assert_eq!(draw(&[f32::NEG_INFINITY, f32::INFINITY, f32::INFINITY]), 1);
    assert_eq!(draw(&[-0.0, 0.0]), 0);
    assert_eq!(draw(&[]), 0);
}

#[test]
fn penalties_bias_and_bans() {
    let run = |params: SamplingParams, prompt: &[u32], output: &[u32], banned: &[u32]| {
        let request = SampleRequest { params: &params, prompt, output, banned, constraint: None, choice: 0 };
        let mut logits = vec![2.0, 1.8, -1.0, 1.7];
        edits::apply(&mut logits, &request);
        logits
    };
    let base = SamplingParams::default();
    let repeated = SamplingParams { repetition_penalty: 2.0, ..base.clone() };
    assert_eq!(run(repeated, &[0, 2, 0], &[2, 0], &[]), [1.0, 1.8, -2.0, 1.7]);
    let counted = SamplingParams { presence_penalty: 0.5, frequency_penalty: 0.25, ..base.clone() };
    assert_eq!(run(counted, &[3], &[0, 2, 0], &[]), [1.0, 1.8, -1.75, 1.7]);
    let biased = SamplingParams { logit_bias: vec![(2, 10.0), (9, 1.0)], ..base.clone() };
    assert_eq!(run(biased, &[], &[], &[]), [2.0, 1.8, 9.0, 1.7]);
    assert_eq!(run(base, &[], &[], &[0, 77]), [f32::NEG_INFINITY, 1.8, -1.0, 1.7]);
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let params = SamplingParams { logprobs: Some(2), logit_bias: vec![(2, 100.0)], ..params() };
    let sampled = sample(&mut [1.0, 2.0, 0.0], &request(&params));
    let sum = (1f64.exp() + 2f64.exp() + 1.0).ln();
    assert_eq!(sampled.token, 2);
    assert!((f64::from(sampled.logprob) + sum).abs() < 1e-6);
    assert_eq!(sampled.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 0]);
    assert!((f64::from(sampled.top[0].1) - (2.0 - sum)).abs() < 1e-6);
    let plain = sample(&mut [1.0, 2.0, 0.0], &request(&SamplingParams::default()));
    assert!(plain.logprob.is_nan() && plain.top.is_empty());
}

#[test]
fn frequencies_follow_the_softmax() {
    let params = SamplingParams { temperature: 0.7, seed: 5, ..params() };
    let logits = [1.0f32, 0.3, -0.5, 2.0];
    let weights: Vec<f64> = logits.iter().map(|&l| (f64::from(l) / 0.7f64).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut counts = [0usize; 4];
    let draws = 20_000;
    for choice in 0..draws {
        let request = SampleRequest { choice, ..request(&params) };
        counts[sample(&mut logits.to_vec(), &request).token as usize] += 1;
    }
    for (count, weight) in counts.iter().zip(&weights) {
        let (seen, expected) = (*count as f64 / f64::from(draws), weight / total);
        assert!((seen - expected).abs() < 0.015, "{seen} against {expected}");
    }
}

#[test]
fn validation_names_the_field() {
    let refused = |change: fn(&mut SamplingParams), field: &str| {
        let mut params = params();
        change(&mut params);
        let reason = params.validate(10).unwrap_err();
        assert!(reason.starts_with(field), "{reason}");
    };
    refused(|p| p.temperature = f32::NAN, "temperature");
    refused(|p| p.temperature = 2.5, "temperature");
    refused(|p| p.top_p = 0.0, "top_p");
    refused(|p| p.min_p = -0.1, "min_p");
    refused(|p| p.repetition_penalty = 0.0, "repetition_penalty");
    refused(|p| p.presence_penalty = f32::INFINITY, "presence_penalty");
    refused(|p| p.frequency_penalty = -3.0, "frequency_penalty");
    refused(|p| p.logprobs = Some(21), "logprobs");
    refused(|p| p.logit_bias = vec![(10, 0.0)], "logit_bias");
    refused(|p| p.logit_bias = vec![(1, f32::NAN)], "logit_bias");
    assert_eq!(params().validate(10), Ok(()));
}

/// The allowed set by full sorting, as a definition.
fn allowed(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
    let mut sorted: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
    sorted.sort_by(best_first);
    if params.top_k > 0 {
        sorted.truncate(params.top_k as usize);
    }
    let max = f64::from(sorted[0].1);
    let weight = |l: f32| ((f64::from(l) - max) / f64::from(params.temperature)).exp();
    let total: f64 = sorted.iter().map(|t| weight(t.1)).sum();
    let mut sum = 0.0;
    let mut kept = Vec::new();
    for (id, logit) in sorted {
        // A hair of slack: the order of summation may differ.
        if sum > f64::from(params.top_p) * total * (1.0 + 1e-9) {
            break;
        }
        sum += weight(logit);
        if weight(logit) >= f64::from(params.min_p) {
            kept.push(id);
        }
    }
    kept
}

proptest! {
    #[test]
    fn draws_stay_within_the_filters(
        logits in proptest::collection::vec(-8.0f32..8.0, 1..300),
        temperature in 0.1f32..2.0, top_p in 0.05f32..=1.0, top_k in 0u32..50, min_p in 0.0f32..0.5,
        seed in any::<u64>(), choice in 0u32..4,
    ) {
        let params = SamplingParams { temperature, top_p, top_k, min_p, seed, ..SamplingParams::default() };
        let request = SampleRequest { choice, ..request(&params) };
        let token = sample(&mut logits.clone(), &request).token;
        prop_assert_eq!(token, sample(&mut logits.clone(), &request).token);
        prop_assert!(allowed(&logits, &params).contains(&token));
    }

    #[test]
    fn anything_goes_in_without_a_panic(
        bits in proptest::collection::vec(any::<u32>(), 0..80), temperature in 0.0f32..2.0,
        top_p in 0.01f32..=1.0, top_k in 0u32..9, prompt in proptest::collection::vec(any::<u32>(), 0..9),
    ) {
        let mut logits: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let params = SamplingParams {
            temperature, top_p, top_k, repetition_penalty: 1.3, frequency_penalty: 0.4, logprobs: Some(3),
            ..SamplingParams::default()
        };
        let request = SampleRequest { prompt: &prompt, output: &prompt, ..request(&params) };
        let vocab = logits.len().max(1);
        let sampled = sample(&mut logits, &request);
        prop_assert!((sampled.token as usize) < vocab);
    }
}
