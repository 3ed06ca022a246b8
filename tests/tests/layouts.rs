//! Pools of another block size or element type than the prefill workers': KV is converted on its way, and no token differs.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use engine::KvDtype;
use futures::future::join_all;
use tandem_tests::cluster::{greedy, request};
use tandem_tests::oracle::Mixed;
use tandem_tests::page::Metrics;
use tandem_tests::{Cluster, Spec, model};
use tonic::Code;

const OUTPUT: u32 = 12;
/// Around the edges of blocks of either size, of chunks, and as long as most of a stage (3 MiB).
const LENGTHS: [usize; 10] = [1, 15, 16, 17, 32, 47, 63, 257, 1000, 3000];

fn prompt(length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| (i * 31 + i / 7 + length as u32) % 256).collect()
}

/// All prompts at once, twice: the second time decode workers hold some of the blocks already.
async fn equal_between(from: (usize, KvDtype), to: (usize, KvDtype)) {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 1);
    let mut oracle = Mixed::new(dir.path(), 3100, from, to);
    let spec = Spec {
        forms: [from, to],
        prefill: 2,
        decode: 2,
        prefill_step: 64,
        kv_blocks: 1500,
        ..Spec::default()
    };
    let cluster = Cluster::start(dir.path(), &spec).await;
    let prompts: Vec<_> = LENGTHS.iter().map(|length| prompt(*length)).collect();
    let expected: Vec<_> = prompts.iter().map(|p| oracle.generate(p, OUTPUT as usize)).collect();
    let mut converted = 0;
    for round in 0..2 {
        let outputs = join_all(prompts.iter().map(|p| cluster.generate(request(p, greedy(OUTPUT))))).await;
        for ((prompt, expected), output) in prompts.iter().zip(&expected).zip(outputs) {
            let output = output.unwrap();
            assert_eq!(
                output.tokens[0],
                *expected,
                "{} tokens, round {round}, {from:?} to {to:?}",
                prompt.len()
            );
            let kv = output.complete.kv.unwrap();
            assert!(kv.converted || kv.blocks == 0, "{kv:?}");
            converted += kv.blocks;
        }
    }
    let mut counted = 0.0;
    for node in &cluster.prefill {
        counted += Metrics::of(node.address).await.value("tandem_kv_converted_blocks_total");
    }
    assert_eq!(counted, f64::from(converted));
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_block_sizes() {
    use KvDtype::Bf16;
    for (from, to) in [(16, 32), (32, 16), (16, 5), (7, 16)] {
        let run = equal_between((from, Bf16), (to, Bf16));
        tokio::time::timeout(Duration::from_secs(120), run).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_element_types() {
    use KvDtype::{Bf16, F32};
    for (from, to) in [((16, F32), (16, Bf16)), ((16, Bf16), (24, F32))] {
        tokio::time::timeout(Duration::from_secs(120), equal_between(from, to)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_that_no_stage_can_hold_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 1);
    let forms = [(16, KvDtype::Bf16), (32, KvDtype::Bf16)];
    let spec = Spec { forms, queue_patience: Duration::from_millis(200), ..Spec::default() };
    let cluster = Cluster::start(dir.path(), &spec).await;
    let refused = cluster.generate(request(&prompt(7000), greedy(1))).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("--convert-mib"), "{refused}");
    assert_eq!(cluster.generate(request(&prompt(40), greedy(3))).await.unwrap().tokens[0].len(), 3);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}
