//! Clusters whose KV travels as int8 or fp8: half the bytes, the answers of an engine whose prompt's KV was packed and unpacked, which are
//! nearly those of plain KV, and plain KV where one side does not want it.

#![allow(clippy::unwrap_used)]

use engine::KvDtype;
use futures::future::join_all;
use proto::v1;
use tandem_tests::cluster::{Output, greedy, request};
use tandem_tests::oracle::Mixed;
use tandem_tests::page::Metrics;
use tandem_tests::{Cluster, Spec, model};
use worker::transport::{KvWire, TransportConfig};

const OUTPUT: u32 = 12;
/// Around the edges of blocks and chunks.
const LENGTHS: [usize; 8] = [1, 15, 16, 17, 63, 257, 1000, 3000];
/// Bytes of a packed head's vector of the tiny model, and of a plain one.
const PACKED: (u64, u64) = (16 + 2, 32);
/// How far a log-probability may be from that of plain KV. Random weights are touchy, and fp8 has fewer bits than int8.
const CLOSE: [f32; 2] = [0.5, 1.0];

fn prompt(length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| (i * 31 + i / 7 + length as u32) % 256).collect()
}

/// All prompts at once, with the log-probabilities of the best two.
async fn answers(cluster: &Cluster) -> Vec<Output> {
    let sampling = v1::SamplingParams { logprobs: Some(2), ..greedy(OUTPUT) };
    let prompts: Vec<_> = LENGTHS.iter().map(|length| prompt(*length)).collect();
    let all = join_all(prompts.iter().map(|p| cluster.generate(request(p, sampling.clone())))).await;
    all.into_iter().map(Result::unwrap).collect()
}

/// Equal wherever the best token leads by more than rounding can move; log-probabilities close for as long as the tokens are equal.
fn assert_close(plain: &Output, packed: &Output, close: f32) {
    let mut furthest = 0.0_f32;
    for (at, (plain, packed)) in plain.logprobs[0].iter().zip(&packed.logprobs[0]).enumerate() {
        if plain.token_id != packed.token_id {
            let lead = plain.top[0].logprob - plain.top[1].logprob;
            assert!(lead < 2.0 * close, "token {at} differs although it led by {lead}");
            return;
        }
        furthest = furthest.max((plain.logprob - packed.logprob).abs());
        assert!(furthest <= close, "token {at}: {} and {}", plain.logprob, packed.logprob);
    }
    println!("all tokens equal, log-probabilities within {furthest}");
}

async fn received(cluster: &Cluster, series: &str) -> u64 {
    let mut sum = 0.0;
    for node in &cluster.decode {
        sum += Metrics::of(node.address).await.value(series);
    }
    sum as u64
}

#[tokio::test(flavor = "multi_thread")]
async fn half_the_bytes_and_nearly_the_same_answers() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 1);
    let spec = Spec { prefill: 2, decode: 2, prefill_step: 64, kv_blocks: 1500, ..Spec::default() };
    let cluster = Cluster::start(dir.path(), &spec).await;
    let plain = answers(&cluster).await;
    cluster.stop().await;
    // The last one: made for the decode workers' blocks first, then packed.
    let converted = [(16, KvDtype::F32), (24, KvDtype::Bf16)];
    for (wire, name, forms, close) in [
        (KvWire::Int8, "int8", spec.forms, CLOSE[0]),
        (KvWire::Fp8, "fp8", spec.forms, CLOSE[1]),
        (KvWire::Int8, "int8", converted, CLOSE[0]),
    ] {
        let cluster = Cluster::start(dir.path(), &Spec { wires: [wire; 2], forms, ..spec.clone() }).await;
        let mut oracle = Mixed::new(dir.path(), 3100, forms[0], forms[1]).packed(name);
        let expected: Vec<_> =
            LENGTHS.iter().map(|length| oracle.generate(&prompt(*length), OUTPUT as usize)).collect();
        let mut on_the_wire = 0;
        // The second time decode workers hold blocks that came packed, and go on from them.
        for round in 0..2 {
            for ((plain, expected), packed) in plain.iter().zip(&expected).zip(answers(&cluster).await) {
                assert_eq!(packed.tokens[0], *expected, "round {round}, {name}, {forms:?}");
                let kv = packed.complete.kv.clone().unwrap();
                assert_eq!(kv.packed_bytes, kv.bytes / PACKED.1 * PACKED.0, "{kv:?}");
                assert!(kv.blocks == 0 && round > 0 || kv.transport == "tcp", "{kv:?}");
                on_the_wire += kv.packed_bytes;
                assert_close(plain, &packed, close);
            }
        }
        assert_eq!(received(&cluster, "tandem_kv_packed_received_bytes_total").await, on_the_wire);
        assert_eq!(received(&cluster, "tandem_kv_received_bytes_total").await, on_the_wire);
        assert_eq!(
            received(&cluster, "tandem_kv_corrupt_blocks_total").await,
            0,
            "the seals are of what landed"
        );
        cluster.assert_nothing_leaked().await;
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_takes_two_and_tcp_and_bf16() {
    use KvWire::{Fp8, Int8, Plain};
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 1);
    let f32s = [(16, KvDtype::Bf16), (16, KvDtype::F32)];
    let shared = TransportConfig::default();
    for spec in [
        Spec { wires: [Int8, Plain], ..Spec::default() },
        Spec { wires: [Plain, Int8], ..Spec::default() },
        Spec { wires: [Fp8, Int8], ..Spec::default() },
        Spec { wires: [Int8, Int8], forms: f32s, ..Spec::default() },
        Spec { wires: [Int8, Int8], transport: shared, ..Spec::default() },
    ] {
        let cluster = Cluster::start(dir.path(), &spec).await;
        let kv = cluster.generate(request(&prompt(100), greedy(3))).await.unwrap().complete.kv.unwrap();
        assert!(kv.blocks == 7 && kv.packed_bytes == 0, "{kv:?}");
        cluster.assert_nothing_leaked().await;
        cluster.stop().await;
    }
}
