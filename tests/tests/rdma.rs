//! A whole cluster whose KV goes over RDMA, and over nothing else. Needs a device: `make test-rdma`.

#![allow(clippy::unwrap_used)]

use engine::SamplingParams;
use futures::future::join_all;
use tandem_tests::cluster::{greedy, request};
use tandem_tests::oracle::Oracle;
use tandem_tests::page::Metrics;
use tandem_tests::{Cluster, Spec, model};
use worker::transport::{TransportChoice, TransportConfig};

const OUTPUT: u32 = 8;

fn over(choice: TransportChoice) -> Spec {
    let require_rdma = choice == TransportChoice::Rdma;
    let transport = TransportConfig { choice, require_rdma, ..TransportConfig::default() };
    Spec { prefill: 2, decode: 2, prefill_step: 64, transport, ..Spec::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn tokens_over_rdma_equal_the_engine_alone_and_tcp() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 1);
    let mut oracle = Oracle::new(dir.path(), 700);
    let cases: Vec<(Vec<u32>, Vec<u32>)> = [1, 15, 16, 17, 100, 257, 600]
        .map(|length| {
            let prompt: Vec<u32> =
                (0..length).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 7) % 256).collect();
            let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
            let expected = oracle.generate(&prompt, &params, 0, OUTPUT as usize, &[]);
            (prompt, expected)
        })
        .into();
    for (choice, way) in [(TransportChoice::Rdma, "rdma"), (TransportChoice::Tcp, "tcp")] {
        let cluster = Cluster::start(dir.path(), &over(choice)).await;
        for round in 0..2 {
            let outputs =
                join_all(cases.iter().map(|(p, _)| cluster.generate(request(p, greedy(OUTPUT))))).await;
            for ((prompt, expected), output) in cases.iter().zip(outputs) {
                let output = output.unwrap();
                assert_eq!(&output.tokens[0], expected, "{way}, round {round}, {} tokens", prompt.len());
                let kv = output.complete.kv.unwrap();
                // What the decode worker had already moves nothing, by no way in particular.
                assert!(kv.transport == way || kv.blocks == 0, "{kv:?}");
            }
        }
        let page = Metrics::of(cluster.prefill[0].address).await;
        let sent = page.value("tandem_kv_sent_bytes_total");
        let written = page.value("tandem_kv_rdma_sent_bytes_total");
        assert!(sent > 0.0, "the first prefill worker took part");
        assert_eq!(written, if way == "rdma" { sent } else { 0.0 });
        cluster.assert_nothing_leaked().await;
        cluster.stop().await;
    }
}
