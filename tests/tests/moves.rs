//! Draining: running sequences move to another decode worker, KV and all, and no client notices.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::{Join, MemoryRegistry};
use futures::future::join_all;
use proto::v1::operator_client::OperatorClient;
use proto::v1::{self, generate_response::Event};
use router::placement::Policy;
use tandem_tests::cluster::{Output, collect, greedy, request};
use tandem_tests::page::Metrics;
use tandem_tests::{Cluster, Spec, model};
use tonic::Code;

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|i| (i * 13 + i / 4) % 256).collect()
}

fn seeded(tokens: u32) -> v1::SamplingParams {
    v1::SamplingParams { temperature: Some(0.9), seed: Some(11), logprobs: Some(1), ..greedy(tokens) }
}

fn penalised(tokens: u32) -> v1::SamplingParams {
    let n = Some(3);
    v1::SamplingParams { repetition_penalty: Some(1.2), frequency_penalty: Some(0.4), n, ..seeded(tokens) }
}

async fn set_draining(cluster: &Cluster, worker: &str, draining: bool) -> Result<u32, tonic::Status> {
    let mut operator = OperatorClient::connect(format!("http://{}", cluster.address)).await.unwrap();
    let request = v1::SetDrainingRequest { worker: worker.into(), draining };
    Ok(operator.set_draining(request).await?.into_inner().sequences)
}

fn seen(output: &Output) -> impl PartialEq + std::fmt::Debug + '_ {
    (&output.tokens, &output.text, &output.logprobs)
}

/// Starts requests, lets each bring a few tokens, drains the first decode worker, and compares.
async fn move_all(policy: Policy) {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 5);
    let cluster = Cluster::start(dir.path(), &Spec { decode: 2, policy, ..Spec::default() }).await;
    let mut requests = Vec::new();
    for length in [1, 15, 16, 17, 90, 400] {
        requests.extend([greedy(400), seeded(400), penalised(300)].map(|s| request(&prompt(length), s)));
    }
    let undisturbed = join_all(requests.iter().map(|r| cluster.generate(r.clone()))).await;

    // Everything runs on the first worker, then leaves it.
    set_draining(&cluster, "decode-1", true).await.unwrap();
    let running: Vec<_> =
        requests.iter().map(|r| tokio::spawn(collect(cluster.client.clone(), r.clone()))).collect();
    let decode = cluster.decode[0].address;
    let started = Instant::now();
    while Metrics::of(decode).await.value("tandem_sequences{state=\"running\"}") < 10.0 {
        assert!(started.elapsed() < Duration::from_secs(20), "the sequences never ran");
    }
    set_draining(&cluster, "decode-1", false).await.unwrap();
    set_draining(&cluster, "decode-0", true).await.unwrap();
    let mut moves = 0;
    for (output, undisturbed) in join_all(running).await.into_iter().zip(&undisturbed) {
        let output = output.unwrap().unwrap();
        assert_eq!(seen(&output), seen(undisturbed.as_ref().unwrap()));
        moves += output.complete.timeline.unwrap().moves;
    }
    assert!(moves >= 10, "{moves} sequences moved");
    let router = Metrics::of(cluster.address).await;
    assert_eq!(router.value("tandem_migrations_total{outcome=\"moved\"}"), f64::from(moves));
    assert_eq!(router.value("tandem_resumes_total"), 0.0);
    let left = Metrics::of(decode).await;
    assert_eq!(left.value("tandem_kv_pushes_total{outcome=\"committed\"}"), f64::from(moves));
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sequences_move_and_stay_equal_with_remote_prefill() {
    move_all(Policy::Remote).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sequences_move_and_stay_equal_with_local_prefill() {
    move_all(Policy::Local).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn alone_a_draining_worker_finishes_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 5);
    let cluster = Cluster::start(dir.path(), &Spec::default()).await;
    let asked = request(&prompt(50), greedy(300));
    let undisturbed = cluster.generate(asked.clone()).await.unwrap();
    let mut stream = cluster.client.clone().generate(asked).await.unwrap().into_inner();
    stream.message().await.unwrap();
    set_draining(&cluster, "decode-0", true).await.unwrap();
    let refused = cluster.generate(request(&prompt(5), greedy(1))).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    let mut tokens = 1;
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(Event::Chunk(chunk)) = message.event {
            tokens += chunk.token_ids.len();
        }
    }
    assert_eq!(tokens, undisturbed.tokens[0].len());
    set_draining(&cluster, "decode-0", false).await.unwrap();
    cluster.generate(request(&prompt(5), greedy(1))).await.unwrap();

    let unknown = set_draining(&cluster, "nobody", true).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    assert!(unknown.message().contains("decode-0, prefill-0"), "{unknown}");
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

/// Every worker of both pools is drained and replaced, one after the other, under load.
#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 5);
    let spec = Spec { prefill: 2, decode: 2, ..Spec::default() };
    let registry = MemoryRegistry::new();
    let join: Arc<dyn Join> = Arc::new(registry.clone());
    let mut cluster = Cluster::start_on(dir.path(), &spec, Arc::clone(&join), Arc::new(registry)).await;
    let requests: Vec<_> = (0..6u32)
        .map(|i| {
            let sampling = if i % 2 == 0 { greedy(600) } else { penalised(300) };
            request(&prompt(10 + i * 37), sampling)
        })
        .collect();
    let undisturbed: Vec<Output> = join_all(requests.iter().map(|r| cluster.generate(r.clone())))
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();

    let stop = tokio_util::sync::CancellationToken::new();
    let load: Vec<_> = requests
        .iter()
        .cloned()
        .zip(undisturbed)
        .map(|(asked, expected)| {
            let (client, stop) = (cluster.client.clone(), stop.clone());
            tokio::spawn(async move {
                let mut answers = 0;
                while !stop.is_cancelled() {
                    let output = collect(client.clone(), asked.clone()).await.unwrap();
                    assert_eq!(seen(&output), seen(&expected));
                    answers += 1;
                }
                answers
            })
        })
        .collect();
    for (pool, is_prefill) in [("prefill", true), ("decode", false)] {
        for number in 0..2 {
            let nodes = if is_prefill { &mut cluster.prefill } else { &mut cluster.decode };
            nodes.remove(0).drain().await.unwrap();
            let step = if is_prefill { spec.prefill_step } else { spec.decode_step };
            let name = format!("{pool}-{number}");
            let node = cluster.node(dir.path(), &spec, name, step, &join, is_prefill).await;
            if is_prefill {
                cluster.prefill.push(node)
            } else {
                cluster.decode.push(node)
            }
            cluster.wait_for(4).await;
        }
    }
    stop.cancel();
    let answers: Vec<u32> = join_all(load).await.into_iter().map(Result::unwrap).collect();
    assert!(answers.iter().all(|n| *n > 0), "{answers:?}");
    let router = Metrics::of(cluster.address).await;
    assert!(router.value("tandem_migrations_total{outcome=\"moved\"}") > 0.0);
    assert_eq!(
        router.value("tandem_requests_total{outcome=\"ok\"}"),
        f64::from(6 + answers.iter().sum::<u32>())
    );
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}
