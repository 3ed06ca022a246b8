//! KV that changes in the pool after it landed, before its first step, is never decoded from.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use engine::SamplingParams;
use proto::v1::generate_response::Event;
use tandem_tests::cluster::{collect, greedy, request};
use tandem_tests::gate::Gate;
use tandem_tests::oracle::Oracle;
use tandem_tests::page::Metrics;
use tandem_tests::{Cluster, Spec, model};

const LAYERS: usize = 4;

/// Flips a bit in the landed block number `at` of the prompt, on one layer, in the pool.
async fn flipped(at: usize, layer: usize, byte: usize) {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 5);
    let gate = Gate::default();
    let spec = Spec { gates: [("decode-0".to_owned(), gate.clone())].into(), ..Spec::default() };
    let cluster = Cluster::start(dir.path(), &spec).await;
    let mut oracle = Oracle::new(dir.path(), 400);
    let mut expected =
        |prompt: &[u32], tokens| oracle.generate(prompt, &SamplingParams::default(), 0, tokens, &[]);

    // One request holds the engine in the middle of a step, so that another can land but not begin.
    let first: Vec<u32> = (0..50).collect();
    let holding = tokio::spawn(collect(cluster.client.clone(), request(&first, greedy(300))));
    let decode = cluster.decode[0].address;
    while Metrics::of(decode).await.value("tandem_sequences{state=\"running\"}") < 1.0 {}
    gate.shut();
    while !gate.holds() {
        tokio::task::yield_now().await;
    }
    let before: Vec<Vec<u32>> = (0..LAYERS).map(|layer| gate.sums(layer)).collect();
    let second: Vec<u32> = (0..75).map(|t| 255 - t).collect();
    let mut stream =
        cluster.client.clone().generate(request(&second, greedy(40))).await.unwrap().into_inner();
    let mut tokens = Vec::new();
    // Its first token comes with the commit: it has landed.
    let Some(Event::Chunk(chunk)) = stream.message().await.unwrap().unwrap().event else {
        panic!("no token")
    };
    tokens.extend(chunk.token_ids);
    let after = gate.sums(layer);
    let landed: Vec<u32> =
        (0..after.len() as u32).filter(|b| after[*b as usize] != before[layer][*b as usize]).collect();
    assert!(landed.len() >= 5, "75 tokens are 5 blocks: {landed:?}");
    gate.flip(layer, landed[at], byte);
    gate.open();
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(Event::Chunk(chunk)) = message.event {
            tokens.extend(chunk.token_ids);
        }
    }
    assert_eq!(tokens, expected(&second, 40));
    assert_eq!(holding.await.unwrap().unwrap().tokens[0], expected(&first, 300));
    let page = Metrics::of(decode).await;
    assert_eq!(page.value("tandem_kv_corrupt_blocks_total"), 1.0);
    assert_eq!(page.value("tandem_kv_checksum_failures_total"), 0.0);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flip_in_the_pool_is_found_and_computed_again() {
    for (at, layer, byte) in [(0, 0, 0), (2, 1, 77), (4, 3, 2047)] {
        tokio::time::timeout(Duration::from_secs(60), flipped(at, layer, byte)).await.unwrap();
    }
}
