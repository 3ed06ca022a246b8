//! A worker whose engine makes no steps is not healthy, whatever its port says; its requests go on elsewhere.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use proto::v1;
use tandem_tests::cluster::{collect, greedy, request};
use tandem_tests::gate::Gate;
use tandem_tests::oracle::Oracle;
use tandem_tests::page;
use tandem_tests::{Cluster, Spec, model};

async fn state(cluster: &mut Cluster, worker: &str) -> String {
    let workers = cluster.client.list_workers(v1::ListWorkersRequest {}).await.unwrap().into_inner().workers;
    workers.into_iter().find(|w| w.worker == worker).map(|w| w.state).unwrap_or_default()
}

async fn stuck_and_back(worker: &str) {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 5);
    let gate = Gate::default();
    let gates = [(worker.to_owned(), gate.clone())].into();
    let progress_timeout = Duration::from_millis(500);
    let spec = Spec { prefill: 2, decode: 2, progress_timeout, gates, ..Spec::default() };
    let mut cluster = Cluster::start(dir.path(), &spec).await;
    let prompts: Vec<Vec<u32>> = (0..8).map(|i| (0..60 + i).map(|t| (t * 3 + i) % 256).collect()).collect();
    let mut oracle = Oracle::new(dir.path(), 400);

    // Placement spreads them over both workers of the pool, so some are on the one that hangs.
    gate.shut();
    let running: Vec<_> = prompts
        .iter()
        .map(|p| tokio::spawn(collect(cluster.client.clone(), request(p, greedy(300)))))
        .collect();
    for (prompt, answer) in prompts.iter().zip(running) {
        let expected = oracle.generate(prompt, &engine::SamplingParams::default(), 0, 300, &[]);
        assert_eq!(answer.await.unwrap().unwrap().tokens[0], expected);
    }
    let node = cluster.prefill.iter().chain(&cluster.decode).find(|n| n.name == worker).unwrap().address;
    assert_eq!(state(&mut cluster, worker).await, "stuck");
    assert_eq!(page::get(node, "/health").await.0, 503);
    assert_eq!(page::get(node, "/live").await.0, 200);

    gate.open();
    let opened = Instant::now();
    while state(&mut cluster, worker).await != "ready" {
        assert!(opened.elapsed() < Duration::from_secs(10), "it never came back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(page::get(node, "/health").await.0, 200);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_decode_worker_loses_its_requests_to_others() {
    stuck_and_back("decode-0").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_prefill_worker_loses_its_requests_to_others() {
    stuck_and_back("prefill-0").await;
}
