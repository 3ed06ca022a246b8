//! Disaggregated output equals the engine alone, token for token, whatever the shape of the cluster.

#![allow(clippy::unwrap_used)]

use engine::SamplingParams;
use futures::future::join_all;
use proto::v1;
use router::placement::Policy;
use tandem_tests::cluster::{greedy, request};
use tandem_tests::oracle::Oracle;
use tandem_tests::{Cluster, Spec, model};
use worker::transport::TransportConfig;

const OUTPUT: u32 = 12;

/// Prompts around every edge: one token, a block less one, exactly one, one more, chunks, very long.
const LENGTHS: [usize; 12] = [1, 2, 15, 16, 17, 31, 32, 33, 100, 257, 1000, 4000];

fn prompt(length: usize, seed: u32) -> Vec<u32> {
    (0..length as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97) >> 7) % 256).collect()
}

/// The ways of drawing that must survive the hand-off, with the engine's own view of each.
fn samplings() -> Vec<(v1::SamplingParams, SamplingParams)> {
    let seeded = v1::SamplingParams {
        temperature: Some(0.9),
        top_p: Some(0.95),
        top_k: Some(40),
        seed: Some(7),
        ..greedy(OUTPUT)
    };
    let penalised = v1::SamplingParams {
        temperature: Some(1.3),
        repetition_penalty: Some(1.2),
        presence_penalty: Some(0.5),
        frequency_penalty: Some(0.3),
        min_p: Some(0.02),
        seed: Some(u64::MAX),
        logit_bias: [(65, 3.0), (66, -100.0)].into(),
        ..greedy(OUTPUT)
    };
    [greedy(OUTPUT), seeded, penalised].into_iter().map(|wire| (wire.clone(), engine_view(wire))).collect()
}

fn engine_view(s: v1::SamplingParams) -> SamplingParams {
    let mut logit_bias: Vec<_> = s.logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|(token, _)| *token);
    SamplingParams {
        temperature: s.temperature.unwrap_or(1.0),
        top_p: s.top_p.unwrap_or(1.0),
        top_k: s.top_k.unwrap_or(0),
        min_p: s.min_p.unwrap_or(0.0),
        repetition_penalty: s.repetition_penalty.unwrap_or(1.0),
        presence_penalty: s.presence_penalty.unwrap_or(0.0),
        frequency_penalty: s.frequency_penalty.unwrap_or(0.0),
        seed: s.seed.unwrap_or(0),
        logprobs: None,
        logit_bias,
    }
}

/// All prompts at once, twice (the second time prefixes hit), against the oracle.
async fn equal_on(spec: Spec) {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 1);
    let mut oracle = Oracle::new(dir.path(), 4100);
    let mut cases = Vec::new();
    for (number, (wire, params)) in samplings().into_iter().enumerate() {
        // The longest prompt once per shape is enough; the others with every way of drawing.
        for &length in LENGTHS.iter().filter(|l| **l < 4000 || number == 0) {
            let prompt = prompt(length, number as u32);
            let expected = oracle.generate(&prompt, &params, 0, OUTPUT as usize, &[]);
            cases.push((prompt, wire.clone(), expected));
        }
    }
    let cluster = Cluster::start(dir.path(), &spec).await;
    for round in 0..2 {
        let outputs = join_all(cases.iter().map(|(p, s, _)| cluster.generate(request(p, s.clone())))).await;
        for ((prompt, sampling, expected), output) in cases.iter().zip(outputs) {
            let output = output.unwrap();
            let what = (round, prompt.len(), sampling.temperature, output.complete.timeline.clone());
            assert_eq!(&output.tokens[0], expected, "{what:?}");
            assert_eq!(output.complete.usage.unwrap().prompt_tokens as usize, prompt.len());
            if spec.policy == Policy::Remote {
                let kv = output.complete.kv.unwrap();
                assert_eq!((kv.blocks + kv.cached_blocks) as usize, prompt.len().div_ceil(16), "{what:?}");
                assert_eq!(kv.transport, if spec.transport == shared() { "shm" } else { "tcp" });
            }
        }
    }
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

/// Shared memory where there is any: all processes of a test are on one host, even are one.
fn shared() -> TransportConfig {
    TransportConfig::default()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_by_one() {
    equal_on(Spec::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_by_two_through_shared_memory() {
    equal_on(Spec { prefill: 2, decode: 2, prefill_step: 64, transport: shared(), ..Spec::default() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_by_two_with_small_chunks() {
    let spec = Spec { prefill: 2, decode: 2, prefill_step: 64, decode_step: 48, ..Spec::default() };
    equal_on(spec).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_by_two_adaptive() {
    equal_on(Spec { prefill: 2, decode: 2, policy: Policy::Adaptive, ..Spec::default() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_on_the_decode_worker() {
    equal_on(Spec { prefill: 0, policy: Policy::Local, decode_step: 80, ..Spec::default() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn out_of_blocks_preempts_and_stays_equal() {
    // The longest prompt and its output need 252 of 262 blocks; with the others beside it decoding
    // choices must be preempted, or wait.
    equal_on(Spec { kv_blocks: 262, ..Spec::default() }).await;
    equal_on(Spec { prefill: 0, policy: Policy::Local, kv_blocks: 262, ..Spec::default() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_choices_are_those_of_the_engine() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 2);
    let mut oracle = Oracle::new(dir.path(), 200);
    for policy in [Policy::Remote, Policy::Local] {
        let cluster = Cluster::start(dir.path(), &Spec { policy, ..Spec::default() }).await;
        for length in [1, 16, 40] {
            let prompt = prompt(length, 5);
            let (wire, params) = samplings().remove(1);
            let wire = v1::SamplingParams { n: Some(4), ..wire };
            let output = cluster.generate(request(&prompt, wire)).await.unwrap();
            for choice in 0..4 {
                let expected = oracle.generate(&prompt, &params, choice, OUTPUT as usize, &[]);
                assert_eq!(output.tokens[choice as usize], expected, "{policy:?} {length} choice {choice}");
            }
            assert_eq!(output.complete.usage.unwrap().output_tokens, 4 * OUTPUT);
        }
        cluster.assert_nothing_leaked().await;
        cluster.stop().await;
    }
}
