//! The planner's process on a real cluster in this test, asked by a client made from KEDA's protocol.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use autoscaler::Config;
use futures::future::join_all;
use planner::{Bounds, Policy, Profile, Slo};
use proto::keda::external_scaler_client::ExternalScalerClient;
use proto::keda::{GetMetricsRequest, ScaledObjectRef};
use tandem_tests::cluster::{greedy, request};
use tandem_tests::page::{self, Metrics};
use tandem_tests::{Cluster, Spec, model};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

type Keda = ExternalScalerClient<Channel>;

/// A process that looks ten times a second and believes that a decode worker runs one sequence at a time.
async fn start(routers: SocketAddr, stop: &CancellationToken) -> (SocketAddr, Keda) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let bounds = Bounds { min: 1, max: 8 };
    let config = Config {
        tls: None,
        cluster_tls: None,
        api_key: None,
        routers: routers.to_string(),
        policy: Policy::new(Slo { ttft: 2.0, itl: 0.05 }, bounds, bounds),
        profile: Profile { max_sequences: 1.0, ..Profile::H100_8B },
        interval: Duration::from_millis(100),
        switch_roles: false,
    };
    tokio::spawn(autoscaler::run(config, listener, stop.clone()));
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    (address, ExternalScalerClient::new(channel))
}

fn object(pool: &str) -> ScaledObjectRef {
    let scaler_metadata = HashMap::from([("pool".to_owned(), pool.to_owned())]);
    ScaledObjectRef { name: "tandem".into(), namespace: "serving".into(), scaler_metadata }
}

/// What KEDA would set: it asks for the name first.
async fn workers(keda: &mut Keda, pool: &str) -> Result<i64, tonic::Status> {
    let spec = keda.get_metric_spec(object(pool)).await?.into_inner().metric_specs.remove(0);
    assert_eq!((spec.target_size, spec.target_size_float), (1, 1.0), "one worker is worth 1");
    let asked =
        GetMetricsRequest { scaled_object_ref: Some(object(pool)), metric_name: spec.metric_name.clone() };
    let value = keda.get_metrics(asked).await?.into_inner().metric_values.remove(0);
    assert_eq!(value.metric_name, spec.metric_name);
    assert_eq!(value.metric_value as f64, value.metric_value_float);
    Ok(value.metric_value)
}

/// Asks until the answer is what is wanted; the deadline only ends a test that would hang.
async fn until(
    keda: &mut Keda,
    pool: &str,
    what: &str,
    wanted: impl Fn(&Result<i64, tonic::Status>) -> bool,
) {
    let asking = async {
        loop {
            let answer = workers(keda, pool).await;
            if wanted(&answer) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), asking).await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn keda_is_told_what_the_load_needs() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 3);
    let cluster = Cluster::start(dir.path(), &Spec { kv_blocks: 512, ..Spec::default() }).await;
    let stop = CancellationToken::new();
    let (address, mut keda) = start(cluster.address, &stop).await;
    until(&mut keda, "decode", "the size it found", |w| matches!(w, Ok(1))).await;
    assert!(keda.is_active(object("prefill")).await.unwrap().into_inner().result);
    let mut active = keda.stream_is_active(object("decode")).await.unwrap().into_inner();
    assert!(active.message().await.unwrap().unwrap().result);

    let unknown = workers(&mut keda, "both").await.unwrap_err();
    assert_eq!(unknown.code(), Code::InvalidArgument);
    assert!(unknown.message().contains("`pool` is \"both\""), "{unknown:?}");
    let missing = keda.is_active(ScaledObjectRef::default()).await.unwrap_err();
    assert!(missing.message().contains("`pool` is missing"), "{missing:?}");

    let prompt: Vec<u32> = (0..50).collect();
    let load = async {
        let one = || async {
            loop {
                cluster.generate(request(&prompt, greedy(64))).await.unwrap();
            }
        };
        join_all((0..6).map(|_| one())).await;
    };
    tokio::select! {
        _ = load => {}
        () = until(&mut keda, "decode", "more decode workers under load", |w| matches!(w, Ok(2..))) => {}
    }
    let page = Metrics::of(address).await;
    assert!(page.value("tandem_planner_workers{pool=\"decode\"}") >= 2.0);
    assert!(page.value("tandem_planner_looks_total{outcome=\"ok\"}") >= 3.0);
    documented(&page);
    stop.cancel();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_seen_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 3);
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let stop = CancellationToken::new();
    let (blind, mut keda) = start(nobody, &stop).await;
    until(&mut keda, "decode", "a refusal", |w| matches!(w, Err(s) if s.message().contains("not seen yet")))
        .await;
    assert_eq!(page::get(blind, "/health").await.0, 503);

    let cluster = Cluster::start(dir.path(), &Spec { decode: 2, ..Spec::default() }).await;
    let (address, mut keda) = start(cluster.address, &stop).await;
    until(&mut keda, "decode", "the size it found", |w| matches!(w, Ok(2))).await;
    assert_eq!(page::get(address, "/health").await.0, 200);
    cluster.stop().await;
    let failed =
        || async { Metrics::of(address).await.value("tandem_planner_looks_total{outcome=\"failed\"}") };
    while failed().await < 3.0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(workers(&mut keda, "decode").await.unwrap(), 2, "the last sizes stand");
    stop.cancel();
}

/// docs/METRICS.md has what the page shows, and nothing else of the planner.
fn documented(page: &Metrics) {
    let table = include_str!("../../docs/METRICS.md").lines().filter(|l| l.contains("| planner |"));
    let table: Vec<_> = table.map(|l| l.split('`').nth(1).unwrap().to_owned()).collect();
    let mut shown: Vec<_> = page.types.keys().cloned().collect();
    shown.sort();
    assert_eq!(shown, table);
}
