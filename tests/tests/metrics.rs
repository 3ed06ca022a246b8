//! docs/METRICS.md is what the pages show: nothing missing, nothing undocumented.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use proto::v1;
use tandem_tests::cluster::{greedy, request};
use tandem_tests::page::{self, Metrics};
use tandem_tests::{Cluster, Spec, model};

/// A documented metric: its type and its labels with all their values.
type Documented = (String, BTreeMap<String, BTreeSet<String>>);

/// The rows of the table that stand for a kind of process: name → (type, labels).
fn documented(process: &str) -> BTreeMap<String, Documented> {
    let cell = |text: &str| text.trim().replace('`', "");
    include_str!("../../docs/METRICS.md")
        .lines()
        .filter(|line| line.starts_with("| `tandem_"))
        .map(|line| line.trim_matches('|').split('|').map(cell).collect::<Vec<_>>())
        .filter(|row| row[3].split(", ").any(|on| on == process))
        .map(|row| {
            let named = row[2].split("; ").filter_map(|label| label.split_once(": "));
            let values = |text: &str| text.split(", ").map(str::to_owned).collect();
            let labels = named.map(|(label, text)| (label.to_owned(), values(text))).collect();
            (row[0].clone(), (row[1].clone(), labels))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pages_are_the_documented_ones() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 3);
    let cluster = Cluster::start(dir.path(), &Spec::default()).await;
    let prompt: Vec<u32> = (0..100).collect();
    cluster.generate(request(&prompt, greedy(8))).await.unwrap();
    cluster.generate(request(&[], greedy(8))).await.unwrap_err();

    let (prefill, decode) = (cluster.prefill[0].address, cluster.decode[0].address);
    let (mut pages, mut table) = (BTreeMap::new(), BTreeMap::new());
    for (process, address) in [("router", cluster.address), ("prefill", prefill), ("decode", decode)] {
        let shown = Metrics::of(address).await;
        let shown: BTreeMap<String, Documented> = shown
            .types
            .iter()
            .map(|(name, kind)| {
                let mut labels = shown.labels.get(name).cloned().unwrap_or_default();
                // What this test happens to serve.
                for label in ["model", "version", "key"] {
                    labels.entry(label.to_owned()).and_modify(|values| *values = ["any".to_owned()].into());
                }
                (name.clone(), (kind.clone(), labels))
            })
            .collect();
        pages.insert(process, shown);
        table.insert(process, documented(process));
        assert_eq!(page::get(address, "/health").await, (200, "ready\n".into()));
        assert_eq!(page::get(address, "/live").await.0, 200);
    }
    assert_eq!(pages, table, "left are the pages, right is docs/METRICS.md");
    let router = Metrics::of(cluster.address).await;
    assert_eq!(router.value("tandem_requests_total{outcome=\"ok\"}"), 1.0);
    assert_eq!(router.value("tandem_requests_total{outcome=\"invalid_argument\"}"), 1.0);
    assert_eq!(router.value("tandem_placements_total{reason=\"remote:policy\"}"), 1.0);
    assert_eq!(router.value("tandem_inter_token_latency_seconds_count"), 7.0);
    assert_eq!(router.value("tandem_workers{state=\"ready\"}"), 2.0);
    assert_eq!(router.value("tandem_registry_connected"), 1.0);
    let (prefill, decode) = (Metrics::of(prefill).await, Metrics::of(decode).await);
    assert_eq!(prefill.value("tandem_step_tokens_total"), 100.0);
    assert_eq!(decode.value("tandem_step_tokens_total"), 7.0);
    // 7 blocks of 4 layers, 2 (K, V) × 2 heads × 16 tokens × 16 dims × 2 bytes each.
    assert_eq!(decode.value("tandem_kv_received_bytes_total"), 7.0 * 4.0 * 2048.0);
    assert_eq!(prefill.value("tandem_kv_sent_bytes_total"), 7.0 * 4.0 * 2048.0);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

/// A second request under a running one's id, and an attempt for another start of a worker, are counted.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 3);
    let cluster = Cluster::start(dir.path(), &Spec::default()).await;
    let named =
        |tokens| v1::GenerateRequest { request_id: "same".into(), ..request(&[1, 2], greedy(tokens)) };
    let mut client = cluster.client.clone();
    let mut running = client.generate(named(8000)).await.unwrap().into_inner();
    running.message().await.unwrap();
    cluster.generate(named(1)).await.unwrap_err();
    drop(running);
    assert_eq!(Metrics::of(cluster.address).await.value("tandem_duplicate_requests_total"), 1.0);

    let decode = cluster.decode[0].address;
    let mut worker =
        v1::decode_worker_client::DecodeWorkerClient::connect(format!("http://{decode}")).await.unwrap();
    let sequence =
        v1::Sequence { request_id: "x".into(), prompt: vec![1], n: 1, max_tokens: 1, ..Default::default() };
    let stale = v1::DecodeRequest { sequence: Some(sequence), incarnation: 1, ..Default::default() };
    worker.decode(stale).await.unwrap_err();
    let refused = Metrics::of(decode).await.value("tandem_calls_refused_total{reason=\"stale\"}");
    assert_eq!(refused, 1.0);
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}
