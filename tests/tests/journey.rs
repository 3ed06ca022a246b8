//! What a client sees: delta pushes, ends, limits, cancellation, deadlines, refusals, lost workers.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use futures::future::join_all;
use proto::v1::{self, FinishReason, generate_request::Input};
use router::placement::Policy;
use tandem_tests::cluster::{greedy, request};
use tandem_tests::oracle::Oracle;
use tandem_tests::page::Metrics;
use tandem_tests::{Cluster, Spec, model};
use tonic::Code;
use tonic_types::StatusExt;

async fn start(spec: Spec) -> (tempfile::TempDir, Cluster) {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 3);
    let cluster = Cluster::start(dir.path(), &spec).await;
    (dir, cluster)
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|i| (i * 7 + i / 3) % 256).collect()
}

fn text(text: &str, sampling: v1::SamplingParams) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(Input::Text(text.into())),
        sampling: Some(sampling),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_turn_moves_only_the_new_blocks() {
    let (_dir, cluster) = start(Spec::default()).await;
    let first = prompt(160);
    let one = cluster.generate(request(&first, greedy(20))).await.unwrap();
    let kv = one.complete.kv.unwrap();
    // 4 layers, 2 (K, V) × 2 heads × 16 tokens × 16 dims × 2 bytes a block and layer.
    assert_eq!((kv.blocks, kv.cached_blocks, kv.bytes), (10, 0, 10 * 4 * 2048));

    let mut second = first;
    second.extend(&one.tokens[0]);
    second.extend(prompt(30));
    let two = cluster.generate(request(&second, greedy(5))).await.unwrap();
    let kv = two.complete.kv.unwrap();
    // 210 tokens are 14 blocks; 179 of them (all but the last drawn one) left KV here: 11 full blocks.
    assert_eq!((kv.blocks, kv.cached_blocks, kv.bytes), (3, 11, 3 * 4 * 2048));
    assert_eq!(two.complete.usage.unwrap().cached_tokens, 176);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_placement_expected_stands_beside_what_came() {
    for (policy, is_local) in [(Policy::Remote, false), (Policy::Local, true)] {
        let (_dir, cluster) = start(Spec { policy, ..Spec::default() }).await;
        for turn in 0..3 {
            let prompt: Vec<u32> = prompt(60).into_iter().map(|token| (token + turn) % 256).collect();
            let answer = cluster.generate(request(&prompt, greedy(4))).await.unwrap();
            let timeline = answer.complete.timeline.unwrap();
            let expected = timeline.expected.unwrap();
            assert_eq!(timeline.prefill_worker == timeline.decode_worker, is_local, "{timeline:?}");
            assert!(expected.local_ms > 0.0 && expected.remote_ms > 0.0, "{expected:?}");
            let (least, most) = (timeline.reserve_ms, timeline.total_ms);
            assert!((least..=most).contains(&expected.measured_ms), "{timeline:?}");
        }
        let metrics = Metrics::of(cluster.address).await;
        let way = if is_local { "local" } else { "remote" };
        for what in ["expected", "measured", "error"] {
            assert_eq!(
                metrics.value(&format!("tandem_placement_{what}_seconds_count{{way=\"{way}\"}}")),
                3.0
            );
        }
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_are_as_asked() {
    let (dir, cluster) = start(Spec::default()).await;
    let mut oracle = Oracle::new(dir.path(), 200);
    let p = prompt(40);
    let expected = oracle.generate(&p, &engine::SamplingParams::default(), 0, 30, &[]);

    let length = cluster.generate(request(&p, greedy(30))).await.unwrap();
    assert_eq!(length.tokens[0], expected);
    assert_eq!(length.complete.choices[0].finish_reason(), FinishReason::Length);

    // A stop token ends the output with itself; min_tokens keeps it from being drawn before.
    let stop = v1::SamplingParams { stop_token_ids: vec![expected[4]], ..greedy(30) };
    let ended = cluster.generate(request(&p, stop.clone())).await.unwrap();
    let first = expected.iter().position(|t| *t == expected[4]).unwrap();
    assert_eq!(ended.tokens[0], expected[..=first]);
    assert_eq!(ended.complete.choices[0].finish_reason(), FinishReason::Stop);
    let later = v1::SamplingParams { min_tokens: Some(20), ..stop };
    let later = cluster.generate(request(&p, later)).await.unwrap();
    assert!(later.tokens[0].len() >= 20 && !later.tokens[0][..19].contains(&expected[4]));

    // A stop string ends the text before itself.
    let whole = &length.text[0];
    let stop: String = whole.chars().skip(5).take(2).collect();
    let cut = v1::SamplingParams { stop: vec![stop.clone()], ..greedy(30) };
    let cut = cluster.generate(request(&p, cut)).await.unwrap();
    assert_eq!(cut.text[0], whole[..whole.find(&stop).unwrap()]);
    assert_eq!(cut.complete.choices[0].matched_stop, stop);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logprobs_and_bias_reach_the_engine() {
    let (_dir, cluster) = start(Spec::default()).await;
    let sampling = v1::SamplingParams { logprobs: Some(3), logit_bias: [(65, 100.0)].into(), ..greedy(4) };
    let mut stream =
        cluster.client.clone().generate(request(&prompt(20), sampling)).await.unwrap().into_inner();
    let mut seen = 0;
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(v1::generate_response::Event::Chunk(chunk)) = message.event {
            for (token, logprob) in chunk.token_ids.iter().zip(&chunk.logprobs) {
                assert_eq!((*token, logprob.token_id, logprob.top.len()), (65, 65, 3));
                assert!(logprob.logprob < 0.0 && logprob.top[0].logprob >= logprob.top[1].logprob);
                seen += 1;
            }
        }
    }
    assert_eq!(seen, 4);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_name_the_field_and_cost_nothing() {
    let (_dir, cluster) = start(Spec::default()).await;
    let ok = greedy(4);
    let with = |change: &dyn Fn(&mut v1::SamplingParams)| {
        let mut sampling = ok.clone();
        change(&mut sampling);
        request(&prompt(5), sampling)
    };
    let chat =
        v1::GenerateRequest { input: Some(Input::Chat(v1::ChatMessages::default())), ..Default::default() };
    let cases: Vec<(v1::GenerateRequest, Code, &str)> = vec![
        (text("", ok.clone()), Code::InvalidArgument, "text: empty"),
        (v1::GenerateRequest::default(), Code::InvalidArgument, "input"),
        (chat, Code::InvalidArgument, "chat.messages"),
        (request(&[], ok.clone()), Code::InvalidArgument, "no tokens"),
        (request(&[9999], ok.clone()), Code::InvalidArgument, "token_ids: 9999"),
        (request(&prompt(8192), ok.clone()), Code::InvalidArgument, "8192"),
        (request(&prompt(8190), greedy(3)), Code::InvalidArgument, "max_tokens"),
        (text(&"x".repeat(10_000_000), ok.clone()), Code::InvalidArgument, "text: 10000000 bytes"),
        (with(&|s| s.temperature = Some(-1.0)), Code::InvalidArgument, "sampling.temperature"),
        (with(&|s| s.temperature = Some(f32::NAN)), Code::InvalidArgument, "sampling.temperature"),
        (with(&|s| s.top_p = Some(0.0)), Code::InvalidArgument, "sampling.top_p"),
        (with(&|s| s.min_p = Some(1.5)), Code::InvalidArgument, "sampling.min_p"),
        (with(&|s| s.max_tokens = Some(0)), Code::InvalidArgument, "sampling.max_tokens"),
        (with(&|s| s.n = Some(0)), Code::InvalidArgument, "sampling.n"),
        (with(&|s| s.n = Some(99)), Code::InvalidArgument, "sampling.n"),
        (with(&|s| s.stop = vec![String::new()]), Code::InvalidArgument, "sampling.stop"),
        (with(&|s| s.logprobs = Some(21)), Code::InvalidArgument, "sampling.logprobs"),
        (with(&|s| s.logit_bias = [(9999, 1.0)].into()), Code::InvalidArgument, "sampling.logit_bias"),
        (v1::GenerateRequest { model: "other".into(), ..with(&|_| ()) }, Code::NotFound, "model: other"),
        (
            v1::GenerateRequest { request_id: "x".repeat(200), ..with(&|_| ()) },
            Code::InvalidArgument,
            "request_id",
        ),
    ];
    for (request, code, words) in cases {
        let error = cluster.generate(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(words), "{words}: {error}");
    }
    assert_eq!(cluster.generate(request(&prompt(5), ok)).await.unwrap().tokens[0].len(), 4);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_larger_than_the_pool_is_refused() {
    let (_dir, cluster) = start(Spec { kv_blocks: 20, ..Spec::default() }).await;
    let error = cluster.generate(request(&prompt(400), greedy(4))).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("KV blocks"), "{error}");
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_and_deadline_release_everything() {
    for policy in [Policy::Remote, Policy::Local] {
        let (_dir, cluster) =
            start(Spec { policy, prefill_step: 32, decode_step: 32, ..Spec::default() }).await;
        // Dropped at once, after the first message, and by a deadline.
        for length in [10, 3000] {
            let mut client = cluster.client.clone();
            drop(client.generate(request(&prompt(length), greedy(5000))).await.unwrap());
            let mut stream =
                client.generate(request(&prompt(length), greedy(5000))).await.unwrap().into_inner();
            stream.message().await.unwrap();
            drop(stream);
            let mut late = tonic::Request::new(request(&prompt(length), greedy(5000)));
            late.set_timeout(Duration::from_millis(50));
            let ended = async {
                let mut stream = client.generate(late).await?.into_inner();
                while stream.message().await?.is_some() {}
                Ok::<_, tonic::Status>(())
            };
            let code = ended.await.unwrap_err().code();
            assert!(matches!(code, Code::DeadlineExceeded | Code::Cancelled), "{code:?}");
        }
        cluster.assert_nothing_leaked().await;
        assert_eq!(cluster.generate(request(&prompt(50), greedy(4))).await.unwrap().tokens[0].len(), 4);
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_cluster_queues_then_sheds_with_a_hint() {
    let spec = Spec { max_sequences: 1, max_waiting: 0, ..Spec::default() };
    let (_dir, cluster) = start(spec.clone()).await;
    // One slot, eight requests: the others wait for it in turn.
    let all = join_all((0..8).map(|i| cluster.generate(request(&prompt(30 + i), greedy(5))))).await;
    assert!(all.iter().all(Result::is_ok), "{all:?}");
    cluster.stop().await;

    let (_dir, cluster) = start(Spec { queue_patience: Duration::from_millis(100), ..spec }).await;
    let mut client = cluster.client.clone();
    let mut running = client.generate(request(&prompt(30), greedy(8000))).await.unwrap().into_inner();
    running.message().await.unwrap();
    let shed = cluster.generate(request(&prompt(31), greedy(5))).await.unwrap_err();
    assert_eq!(shed.code(), Code::ResourceExhausted, "{shed}");
    assert!(shed.get_details_retry_info().is_some_and(|r| r.retry_delay.is_some()));
    drop(running);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_prefill_worker_is_waited_for() {
    // Every request finds room to decode, but the prefill worker takes one prompt at a time: the others come
    // back at once, while the decode worker may still hold their last try.
    let (dir, cluster) = start(Spec { prefill_slots: Some(1), ..Spec::default() }).await;
    let mut oracle = Oracle::new(dir.path(), 1200);
    let prompts: Vec<Vec<u32>> = (0..24).map(|i| prompt(600 + i * 17)).collect();
    let outputs = join_all(prompts.iter().map(|p| cluster.generate(request(p, greedy(6))))).await;
    for (p, output) in prompts.iter().zip(outputs) {
        let expected = oracle.generate(p, &engine::SamplingParams::default(), 0, 6, &[]);
        assert_eq!(output.unwrap().tokens[0], expected);
    }
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn empty_pools_are_named() {
    let (_dir, cluster) = start(Spec { prefill: 0, decode: 0, ..Spec::default() }).await;
    let error = cluster.generate(request(&prompt(5), greedy(1))).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("decode pool is empty"), "{error}");
    cluster.stop().await;

    let (_dir, cluster) = start(Spec { prefill: 0, ..Spec::default() }).await;
    let error = cluster.generate(request(&prompt(5), greedy(1))).await.unwrap_err();
    assert!(error.message().contains("prefill pool is empty"), "{error}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn duplicate_request_ids_are_refused_while_running() {
    let (_dir, cluster) = start(Spec::default()).await;
    let named =
        |tokens| v1::GenerateRequest { request_id: "same".into(), ..request(&prompt(9), greedy(tokens)) };
    let mut client = cluster.client.clone();
    let mut running = client.generate(named(8000)).await.unwrap().into_inner();
    running.message().await.unwrap();
    let error = cluster.generate(named(1)).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");
    drop(running);
    cluster.assert_nothing_leaked().await;
    assert!(cluster.generate(named(1)).await.is_ok());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_drains_without_losing_a_request() {
    let spec = Spec { prefill: 2, decode: 2, ..Spec::default() };
    let (dir, mut cluster) = start(spec).await;
    let mut oracle = Oracle::new(dir.path(), 400);
    let prompts: Vec<Vec<u32>> = (0..12).map(|i| prompt(20 + i * 9)).collect();
    let client = cluster.client.clone();
    let running = prompts
        .iter()
        .map(|p| tokio::spawn(tandem_tests::cluster::collect(client.clone(), request(p, greedy(150)))));
    let running: Vec<_> = running.collect();
    cluster.prefill.remove(0).drain().await.unwrap();
    cluster.decode.remove(0).drain().await.unwrap();
    for (p, output) in prompts.iter().zip(join_all(running).await) {
        let expected = oracle.generate(p, &engine::SamplingParams::default(), 0, 150, &[]);
        assert_eq!(output.unwrap().unwrap().tokens[0], expected);
    }
    cluster.wait_for(2).await;
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}
