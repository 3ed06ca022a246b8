//! Draws that the device makes against the host's from the same logits.

use engine::model::ModelConfig;
use engine::sampling::sample;
use engine::{Batch, Constraint, Engine, SampleRequest, Sampled, SamplingParams, Segment};

use crate::{cuda, options, prompt, shape};

const ROUNDS: u32 = 24;

/// Every filter alone and with the others, penalties, biases, bans, greedy among them.
fn requests() -> Vec<SamplingParams> {
    let plain = SamplingParams { temperature: 1.0, seed: 11, ..SamplingParams::default() };
    let mut all = Vec::new();
    for temperature in [0.0, 0.2, 1.0, 2.0] {
        for (top_k, top_p, min_p) in [
            (0, 1.0, 0.0),
            (1, 1.0, 0.0),
            (40, 1.0, 0.0),
            (0, 0.9, 0.0),
            (0, 0.1, 0.0),
            (0, 1.0, 0.05),
            (300, 0.8, 0.01),
            (1_000_000, 0.999, 0.0),
        ] {
            all.push(SamplingParams { temperature, top_k, top_p, min_p, ..plain.clone() });
        }
        let temperature = SamplingParams { temperature, ..plain.clone() };
        let (repetition_penalty, frequency_penalty) = (1.4, 0.3);
        all.push(SamplingParams {
            repetition_penalty,
            frequency_penalty,
            top_p: 0.95,
            ..temperature.clone()
        });
        all.push(SamplingParams { presence_penalty: -1.5, ..temperature.clone() });
        all.push(SamplingParams { logit_bias: vec![(7, 3.0), (9, -100.0), (7, 2.0)], ..temperature.clone() });
        all.push(SamplingParams { logprobs: Some(0), ..temperature.clone() });
        all.push(SamplingParams { logprobs: Some(20), repetition_penalty: 0.5, ..temperature });
    }
    all
}

/// Allows every third token.
#[derive(Debug)]
struct EveryThird;

impl Constraint for EveryThird {
    fn restrict(&self, _choice: u32, _output: &[u32], logits: &mut [f32]) {
        let outside = logits.iter_mut().enumerate().filter(|(token, _)| token % 3 != 1);
        outside.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
    }
}

/// Equal but where a rounding lies between: at most one draw in two hundred. The vocabulary is as large as real ones.
#[test]
fn the_device_draws_what_the_host_draws() {
    let config = ModelConfig { vocab: 49_999, ..shape(64, 4, 2) };
    let Some(mut engine) = cuda(&config, options()) else { return };
    let all = requests();
    let prompts: Vec<_> = (0..all.len() as u32).map(|i| prompt(9, i)).collect();
    let tables: Vec<_> = (0..all.len() as u32).map(|i| [i]).collect();
    let (mut drawn, mut other) = (0, 0);
    for round in 0..ROUNDS {
        // The last tokens count as output. Each row is drawn from twice.
        let samples: Vec<Vec<_>> = all
            .iter()
            .zip(&prompts)
            .map(|(params, prompt)| {
                let (banned, constraint) = (&[3, 5, 60_000][..], Some(&EveryThird as &dyn Constraint));
                let edited = params.repetition_penalty != 1.0 || !params.logit_bias.is_empty();
                let banned = if edited { banned } else { &[] };
                let constraint = constraint.filter(|_| params.min_p > 0.0 || params.logprobs == Some(0));
                let request = |choice| SampleRequest {
                    params,
                    prompt: &prompt[..5],
                    output: &prompt[5..],
                    banned,
                    constraint,
                    choice,
                };
                vec![request(round), request(round + ROUNDS)]
            })
            .collect();
        let segments = prompts.iter().zip(&tables).zip(&samples).map(|((tokens, blocks), samples)| Segment {
            tokens,
            position: 0,
            blocks,
            samples,
        });
        let batch = Batch { segments: segments.collect() };
        let logits = engine.forward_logits(&batch).unwrap();
        let tokens = engine.forward(&batch, &mut |_| ()).unwrap();
        for ((logits, samples), tokens) in logits.iter().zip(&samples).zip(tokens) {
            assert_eq!(samples.len(), tokens.len());
            for (request, token) in samples.iter().zip(tokens) {
                let Sampled { token: expected, logprob, top } = sample(&mut logits.clone(), request);
                drawn += 1;
                other += usize::from(token.token != expected);
                if token.token != expected {
                    println!("{} instead of {expected}: {:?}", token.token, request.params);
                }
                let certain = request.params.temperature == 0.0 || request.params.top_k == 1;
                if token.token == expected {
                    assert!(
                        (token.logprob - logprob).abs() < 1e-5 || logprob.is_nan() && token.logprob.is_nan()
                    );
                }
                assert_eq!(
                    token.top.iter().map(|t| t.0).collect::<Vec<_>>(),
                    top.iter().map(|t| t.0).collect::<Vec<_>>()
                );
                assert!(token.top.iter().zip(&top).all(|(a, b)| (a.1 - b.1).abs() < 1e-5));
                assert!(!certain || token.token == expected, "nothing is rounded in {:?}", request.params);
            }
        }
    }
    println!("{other} of {drawn} draws differ");
    assert!(other * 200 <= drawn, "{other} of {drawn} draws differ");
}

/// Logits that make the filters' corner cases: all equal, all but one minus infinity. By bias, since a network has none such.
#[test]
fn corner_cases_are_drawn_from_too() {
    let config = ModelConfig { vocab: 300, ..shape(64, 4, 2) };
    let Some(mut engine) = cuda(&config, options()) else { return };
    let all: Vec<u32> = (0..300).collect();
    let params = SamplingParams { temperature: 1.0, top_p: 0.5, ..SamplingParams::default() };
    let mut draw = |banned: &[u32], params: &SamplingParams| {
        let samples =
            [SampleRequest { params, prompt: &[], output: &[], banned, constraint: None, choice: 0 }];
        let segment = Segment { tokens: &[1, 2, 3], position: 0, blocks: &[0], samples: &samples };
        engine.forward(&Batch { segments: vec![segment] }, &mut |_| ()).unwrap()[0][0].token
    };
    assert_eq!(draw(&all, &params), 0, "nothing is left");
    assert_eq!(draw(&all[..299], &params), 299);
    let strong = SamplingParams { logit_bias: vec![(17, 100.0)], min_p: 1.0, ..params.clone() };
    assert_eq!(draw(&[], &strong), 17);
    // Everything far below the best but a hundred nats apart: weights of nothing.
    let weak = SamplingParams { logit_bias: all[1..].iter().map(|&t| (t, -100.0)).collect(), ..params };
    assert_eq!(draw(&[], &weak), 0);
}
