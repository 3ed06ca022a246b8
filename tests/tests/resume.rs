//! A request that loses its worker goes on from what the client has: nothing lost, doubled or changed, wherever
//! the cut is.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::{Join, MemoryRegistry};
use proto::v1::{self, FinishReason};
use router::placement::Policy;
use tandem_tests::cluster::{Output, greedy, request};
use tandem_tests::cutter::{Cuts, PrefillCut, Redirect};
use tandem_tests::page::Metrics;
use tandem_tests::{Cluster, Spec, model};

const OUTPUT: u32 = 9;

async fn start(policy: Policy) -> (tempfile::TempDir, Cluster, Cuts) {
    start_with(Spec { prefill: 2, decode: 2, policy, ..Spec::default() }).await
}

async fn start_with(spec: Spec) -> (tempfile::TempDir, Cluster, Cuts) {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 5);
    let cuts = Cuts::default();
    let registry = MemoryRegistry::new();
    let join: Arc<dyn Join> = Arc::new(Redirect::new(Arc::new(registry.clone()), cuts.clone()));
    let cluster = Cluster::start_on(dir.path(), &spec, join, Arc::new(registry)).await;
    (dir, cluster, cuts)
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|i| (i * 11 + i / 5) % 256).collect()
}

fn seeded() -> v1::SamplingParams {
    v1::SamplingParams {
        temperature: Some(0.9),
        top_p: Some(0.95),
        seed: Some(7),
        logprobs: Some(2),
        ..greedy(OUTPUT)
    }
}

fn penalised() -> v1::SamplingParams {
    v1::SamplingParams {
        temperature: Some(1.3),
        repetition_penalty: Some(1.2),
        presence_penalty: Some(0.5),
        frequency_penalty: Some(0.3),
        seed: Some(u64::MAX),
        logit_bias: [(65, 3.0), (66, -100.0)].into(),
        ..greedy(OUTPUT)
    }
}

/// What a client can tell of an answer.
fn seen(output: &Output) -> impl PartialEq + std::fmt::Debug + '_ {
    let ends = &output.complete.choices;
    let mut ends: Vec<_> =
        ends.iter().map(|e| (e.index, e.finish_reason, &e.matched_stop, e.output_tokens)).collect();
    ends.sort_unstable();
    (&output.tokens, &output.text, &output.logprobs, ends)
}

/// Runs a request undisturbed, then cut after every number of tokens.
async fn equal_at_every_cut(cluster: &Cluster, cuts: &Cuts, prompt: &[u32], sampling: v1::SamplingParams) {
    let undisturbed = cluster.generate(request(prompt, sampling.clone())).await.unwrap();
    let tokens: usize = undisturbed.tokens.iter().map(Vec::len).sum();
    for at in 0..tokens {
        cuts.decode_after(&[at]);
        let output = cluster.generate(request(prompt, sampling.clone())).await.unwrap();
        assert_eq!(seen(&output), seen(&undisturbed), "cut after {at} tokens");
        assert_eq!(cuts.left(), 0);
        assert_eq!(output.complete.timeline.unwrap().attempts, 2);
    }
    // Twice in one answer.
    cuts.decode_after(&[tokens / 3, tokens / 3]);
    let output = cluster.generate(request(prompt, sampling.clone())).await.unwrap();
    assert_eq!(seen(&output), seen(&undisturbed));
    assert_eq!(output.complete.timeline.unwrap().attempts, 3);
}

async fn all_samplings(policy: Policy) {
    let (_dir, cluster, cuts) = start(policy).await;
    // The prompt's end and its output lie on every side of a block's edge.
    for (length, sampling) in [(40, greedy(OUTPUT)), (30, seeded()), (25, penalised()), (1, seeded())] {
        equal_at_every_cut(&cluster, &cuts, &prompt(length), sampling).await;
    }
    for sampling in [seeded(), penalised()] {
        let four = v1::SamplingParams { n: Some(4), ..sampling };
        equal_at_every_cut(&cluster, &cuts, &prompt(37), four).await;
    }
    let page = Metrics::of(cluster.address).await;
    assert!(page.value("tandem_resumes_total") > 100.0);
    // A cut before the first token can be told by either leg first: by the stream, or by the push that it ended.
    let reasons = ["unavailable", "aborted", "unreachable", "corrupt", "full", "other"];
    let retries: f64 =
        reasons.iter().map(|r| page.value(&format!("tandem_retries_total{{reason=\"{r}\"}}"))).sum();
    let samplings = [OUTPUT, OUTPUT, OUTPUT, OUTPUT, 4 * OUTPUT, 4 * OUTPUT];
    assert_eq!(retries, samplings.iter().map(|tokens| f64::from(tokens + 2)).sum::<f64>());
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_cut_with_remote_prefill() {
    all_samplings(Policy::Remote).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_cut_with_local_prefill() {
    all_samplings(Policy::Local).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_falls_silent_is_lost() {
    // Longer than a worker may be silent (2 s), so that only what is lost is found so.
    let worker_silence = Duration::from_millis(3500);
    let (_dir, cluster, cuts) =
        start_with(Spec { prefill: 2, decode: 2, worker_silence, ..Spec::default() }).await;
    let p = prompt(40);
    let undisturbed = cluster.generate(request(&p, seeded())).await.unwrap();
    cuts.mute();
    for at in [0, 4] {
        cuts.decode_after(&[at]);
        let began = Instant::now();
        let output = cluster.generate(request(&p, seeded())).await.unwrap();
        assert_eq!(seen(&output), seen(&undisturbed), "silent after {at} tokens");
        assert_eq!((output.complete.timeline.unwrap().attempts, cuts.left()), (2, 0));
        assert!(began.elapsed() >= worker_silence);
    }
    // A prefill call that nobody ever hears of; another prompt, since this one is cached.
    let p = prompt(77);
    cuts.prefill_at(&[PrefillCut::Lost]);
    let cut = cluster.generate(request(&p, seeded())).await.unwrap();
    assert_eq!((cut.complete.timeline.clone().unwrap().attempts, cuts.left()), (2, 0));
    let undisturbed = cluster.generate(request(&p, seeded())).await.unwrap();
    assert_eq!(seen(&cut), seen(&undisturbed));
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_strings_and_tokens_survive_the_cut() {
    let (_dir, cluster, cuts) = start(Policy::Remote).await;
    let p = prompt(33);
    let whole = cluster.generate(request(&p, seeded())).await.unwrap();
    // Three characters from the middle: held back and matched over any cut between them.
    let stop: String = whole.text[0].chars().skip(4).take(3).collect();
    let stopped = v1::SamplingParams { stop: vec![stop.clone(), "never".into()], ..seeded() };
    let output = cluster.generate(request(&p, stopped.clone())).await.unwrap();
    assert_eq!(output.complete.choices[0].matched_stop, stop);
    equal_at_every_cut(&cluster, &cuts, &p, stopped.clone()).await;
    equal_at_every_cut(&cluster, &cuts, &p, v1::SamplingParams { n: Some(3), ..stopped }).await;

    let whole = cluster.generate(request(&p, greedy(OUTPUT))).await.unwrap();
    let ended = v1::SamplingParams {
        stop_token_ids: vec![whole.tokens[0][5]],
        min_tokens: Some(3),
        ..greedy(OUTPUT)
    };
    let output = cluster.generate(request(&p, ended.clone())).await.unwrap();
    assert_eq!(output.complete.choices[0].finish_reason(), FinishReason::Stop);
    equal_at_every_cut(&cluster, &cuts, &p, ended).await;
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grammar_survives_the_cut() {
    for policy in [Policy::Remote, Policy::Local] {
        let (_dir, cluster, cuts) = start(policy).await;
        let schema = r#"{"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99},
            "b": {"enum": ["x", "yy"]}}, "required": ["a", "b"], "additionalProperties": false}"#;
        let constraint = v1::Constraint { form: Some(v1::constraint::Form::JsonSchema(schema.into())) };
        // Room for white space, of which a random model is fond.
        let sampling = v1::SamplingParams {
            constraint: Some(constraint),
            max_tokens: Some(60),
            logit_bias: [(220, -100.0), (198, -100.0), (197, -100.0), (201, -100.0)].into(),
            ..seeded()
        };
        let p = prompt(33);
        let four = v1::SamplingParams { n: Some(4), ..sampling.clone() };
        let output = cluster.generate(request(&p, four)).await.unwrap();
        for text in &output.text {
            let value: serde_json::Value =
                serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(value["a"].as_u64().is_some_and(|a| a < 100) && value["b"].is_string(), "{text}");
        }
        let stopped = |end: &v1::ChoiceEnd| end.finish_reason() == FinishReason::Stop;
        assert!(output.complete.choices.iter().all(stopped));
        equal_at_every_cut(&cluster, &cuts, &p, v1::SamplingParams { n: Some(2), ..sampling }).await;
        cluster.assert_nothing_leaked().await;
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_prefill_worker_is_replaced() {
    let (_dir, cluster, cuts) = start(Policy::Remote).await;
    let p = prompt(200);
    let undisturbed = cluster.generate(request(&p, seeded())).await.unwrap();
    for lost in [&[PrefillCut::Before][..], &[PrefillCut::After], &[PrefillCut::Before, PrefillCut::After]] {
        cuts.prefill_at(lost);
        let output = cluster.generate(request(&p, seeded())).await.unwrap();
        assert_eq!(seen(&output), seen(&undisturbed), "{lost:?}");
    }
    // While a resumed request is computed again, too.
    cuts.decode_after(&[4]);
    cuts.prefill_at(&[PrefillCut::After, PrefillCut::Before]);
    let output = cluster.generate(request(&p, seeded())).await.unwrap();
    assert_eq!(seen(&output), seen(&undisturbed));
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_in_vain_are_bounded() {
    let (_dir, cluster, cuts) = start(Policy::Local).await;
    cuts.decode_after(&[0; 7]);
    let error = cluster.generate(request(&prompt(20), greedy(4))).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::Unavailable, "{error}");
    assert_eq!(cuts.left(), 1);
    // With a token in each, they are not in vain.
    cuts.decode_after(&[1; 8]);
    let output = cluster.generate(request(&prompt(20), greedy(12))).await.unwrap();
    assert_eq!((output.tokens[0].len(), cuts.left()), (12, 0));
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}
