//! More than fits: bounded, fair, and the answers that are given are right.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use engine::SamplingParams;
use futures::future::join_all;
use proto::v1::inference_client::InferenceClient;
use proto::v1::{self, generate_response::Event};
use tandem_tests::cluster::{greedy, request};
use tandem_tests::oracle::Oracle;
use tandem_tests::page::Metrics;
use tandem_tests::{Cluster, Spec, model};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt;

fn prompt(length: u32, seed: u32) -> Vec<u32> {
    (0..length).map(|i| (i * 7 + seed * 31) % 256).collect()
}

/// Tokens of a request sent under a client key.
async fn ask(
    mut client: InferenceClient<Channel>,
    key: &'static str,
    request: v1::GenerateRequest,
) -> Result<Vec<u32>, Status> {
    let mut call = tonic::Request::new(request);
    call.metadata_mut().insert("x-client-key", key.parse().unwrap());
    let mut stream = client.generate(call).await?.into_inner();
    let mut tokens = Vec::new();
    while let Some(message) = stream.message().await? {
        if let Some(Event::Chunk(chunk)) = message.event {
            tokens.extend(chunk.token_ids);
        }
    }
    Ok(tokens)
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_times_too_much_is_shed_and_another_client_is_served() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 5);
    let spec = Spec { max_running: 6, max_queued: 10, max_sequences: 4, max_waiting: 1, ..Spec::default() };
    let cluster = Cluster::start(dir.path(), &spec).await;
    let mut oracle = Oracle::new(dir.path(), 200);
    let expected: Vec<Vec<u32>> =
        (0..8).map(|i| oracle.generate(&prompt(60 + i, i), &SamplingParams::default(), 0, 60, &[])).collect();
    let asked = |i: u32| request(&prompt(60 + i % 8, i % 8), greedy(60));

    let shed = Arc::new(AtomicU32::new(0));
    let flood = (0..160u32).map(|i| {
        let (client, shed) = (cluster.client.clone(), Arc::clone(&shed));
        let (request, expected) = (asked(i), expected[i as usize % 8].clone());
        tokio::spawn(async move {
            match ask(client, "flood", request).await {
                Ok(tokens) => assert_eq!(tokens, expected),
                Err(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
                    assert!(status.get_details_retry_info().is_some_and(|r| r.retry_delay.is_some()));
                    shed.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
    });
    let flood: Vec<_> = flood.collect();
    while shed.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    // The flood has filled the queue; one who sends a request at a time is never shed.
    for i in 0..4 {
        let tokens = ask(cluster.client.clone(), "polite", asked(i)).await.unwrap();
        assert_eq!(tokens, expected[i as usize]);
        let page = Metrics::of(cluster.address).await;
        assert!(page.value("tandem_requests_queued") <= 10.0);
        assert!(page.value("tandem_requests_running") <= 6.0);
    }
    join_all(flood).await.into_iter().for_each(|ended| ended.unwrap());
    let page = Metrics::of(cluster.address).await;
    let shed = f64::from(shed.load(Ordering::Relaxed));
    assert_eq!(page.value("tandem_shed_total{reason=\"queue_full\"}"), shed);
    assert_eq!(page.value("tandem_requests_total{outcome=\"ok\"}"), 164.0 - shed);
    assert_eq!(page.value("tandem_requests_running") + page.value("tandem_requests_queued"), 0.0);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_holds_in_the_queue() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 5);
    let cluster = Cluster::start(dir.path(), &Spec { max_running: 1, ..Spec::default() }).await;
    let mut running =
        cluster.client.clone().generate(request(&prompt(30, 0), greedy(8000))).await.unwrap().into_inner();
    running.message().await.unwrap();
    let mut late = tonic::Request::new(request(&prompt(30, 1), greedy(4)));
    late.metadata_mut().insert("grpc-timeout", "80m".parse().unwrap());
    let mut queued = cluster.client.clone().generate(late).await.unwrap().into_inner();
    let ended = queued.message().await.unwrap_err();
    assert_eq!(ended.code(), Code::DeadlineExceeded, "{ended}");
    assert_eq!(Metrics::of(cluster.address).await.value("tandem_requests_queued"), 0.0);
    drop(running);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_prompt_does_not_wait_behind_a_long_one() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 5);
    let cluster = Cluster::start(dir.path(), &Spec { prefill_step: 64, ..Spec::default() }).await;
    let long = tokio::spawn(ask(cluster.client.clone(), "", request(&prompt(8000, 0), greedy(1))));
    let prefill = cluster.prefill[0].address;
    while Metrics::of(prefill).await.value("tandem_queued_tokens") < 4000.0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    ask(cluster.client.clone(), "", request(&prompt(20, 1), greedy(1))).await.unwrap();
    assert!(!long.is_finished(), "the long prompt was done before the short one");
    assert_eq!(long.await.unwrap().unwrap().len(), 1);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}
