//! Mutual TLS between the parts of a cluster: the real binary for each of them, and every certificate that must not do.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

use kv_transport::Secure;
use proto::v1;
use proto::v1::decode_worker_client::DecodeWorkerClient;
use tandem_tests::certs::{Ca, Pair};
use tandem_tests::secured::{Secured, curl, run, uri};
use tls::{ClusterFiles, Part};
use tonic::Code;
use tonic::transport::Endpoint;
use worker::secure::KvSecure;

const TANDEM: &str = env!("CARGO_BIN_EXE_tandem");

fn files(pair: &Pair, ca: &Path) -> ClusterFiles {
    ClusterFiles { cert: pair.cert.clone(), key: pair.key.clone(), ca: ca.to_owned() }
}

/// A call to a decode worker with that certificate: what it is refused with.
async fn call_decode(address: &str, files: ClusterFiles) -> tonic::Status {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let channel = tls::dial::lazy(&endpoint, files, Part::Worker("decode".into()));
    DecodeWorkerClient::new(channel).decode(v1::DecodeRequest::default()).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_link_is_encrypted_and_each_side_known() {
    let cluster = Secured::start(TANDEM, true, true, &["--strategy", "disaggregated"]).await;
    let (code, said) = cluster.call(&["generate", "hello there", "--max-tokens", "8", "--json"]);
    assert!(code == Some(0) && said.contains("\"transport\":\"tcp\""), "{said}");

    // A worker's one port: pages for whoever has a certificate, health for everybody, nothing without TLS.
    let (ca, decode) = (cluster.ca.cert.as_path(), cluster.address_of("decode"));
    let own = cluster.ca.issue_for(cluster.dir.path(), "spare", 1, &[&uri("spare")]);
    let page = |path: &str| format!("https://{decode}{path}");
    let (_, said) = curl(&page("/health"), Some(ca), None);
    assert!(said.contains(" 200") && said.contains("ready"), "{said}");
    let (_, said) = curl(&page("/metrics"), Some(ca), None);
    assert!(said.contains(" 401") && said.contains("wants a certificate that its --cluster-ca"), "{said}");
    let (_, said) = curl(&page("/metrics"), Some(ca), Some(&own));
    let left = said
        .lines()
        .find_map(|line| line.strip_prefix("tandem_certificate_expiry_seconds{plane=\"cluster\"} "));
    let left: f64 = left.unwrap_or_else(|| panic!("{said}")).parse().unwrap();
    assert!((80_000.0..86_401.0).contains(&left), "{left}");
    let (_, said) = curl(&format!("http://{decode}/metrics"), None, None);
    assert!(said.contains(" 400") && said.contains("this port is encrypted"), "{said}");

    // Calls are for routers: another worker's certificate does not do, nor one of a stranger's, nor none.
    let status = call_decode(&decode, files(&own, ca)).await;
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    assert!(status.message().contains("only routers may call a worker"), "{status:?}");
    let router = Pair { cert: cluster.file("router.pem"), key: cluster.file("router.key") };
    let status = call_decode(&decode, files(&router, ca)).await;
    assert_eq!(
        status.code(),
        Code::FailedPrecondition,
        "a router gets as far as its empty request: {status:?}"
    );
    let stranger = Ca::new(cluster.dir.path(), "stranger");
    let strangers = stranger.issue_for(cluster.dir.path(), "strangers", 1, &["tandem://router"]);
    let chain = |status: &tonic::Status| format!("{status:?}");
    let status = call_decode(&decode, files(&strangers, ca)).await;
    assert!(chain(&status).contains("does not accept our --cluster-cert"), "{status:?}");
    let status = call_decode(&decode, files(&router, &stranger.cert)).await;
    assert!(chain(&status).contains("is not signed by our --cluster-ca"), "{status:?}");
    cluster
        .until("the worker's log says it too", |c| c.log("decode").contains("of another authority than ours"))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_cannot_be_known_are_not_used_and_the_log_says_why() {
    let mut cluster = Secured::start(TANDEM, true, true, &[]).await;
    // Without TLS, beside a router with.
    let mut plain = Command::new(TANDEM);
    plain.args(["--log", "info", "decode", "--name", "plain", "--listen", "127.0.0.1:0", "--kv-mib", "32"]);
    plain.args(["--model-name", "tiny", "--model"]).arg(cluster.file("model"));
    let etcd = cluster.etcd.as_ref().unwrap();
    let secured = etcd.secured.as_ref().unwrap();
    plain.args(["--etcd", &etcd.url, "--etcd-ca"]).arg(&secured.ca.cert);
    plain.arg("--etcd-cert").arg(&secured.client.cert).arg("--etcd-key").arg(&secured.client.key);
    cluster.run("plain", plain);
    cluster
        .until("the router refuses it", |c| {
            c.log("router")
                .lines()
                .any(|line| line.contains("plain") && line.contains("start it with --cluster-cert"))
        })
        .await;
    // Of another authority: it registers, and no connection to it is ever made.
    let stranger = Ca::new(cluster.dir.path(), "stranger");
    stranger.issue_for(cluster.dir.path(), "alien", 1, &[&uri("alien")]);
    let alien = cluster.command("decode", "alien");
    let words = alien.get_args().map(|word| word.to_owned()).collect::<Vec<_>>();
    let mut alien = Command::new(TANDEM);
    alien.args(words.into_iter().map(|word| match word == cluster.ca.cert.as_os_str() {
        true => stranger.cert.clone().into_os_string(),
        false => word,
    }));
    cluster.run("alien", alien);
    cluster.until("it is there", |c| c.lists("alien")).await;
    cluster.drain("decode");
    cluster.until("decode is gone", |c| !c.lists("decode")).await;
    let (code, said) = cluster.call(&["generate", "hello", "--max-tokens", "4", "--timeout", "20"]);
    assert!(code != Some(0) && said.contains("--cluster-ca"), "{code:?} {said}");
    // A router without TLS beside a worker with.
    cluster.drain("router");
    let mut router = Command::new(TANDEM);
    router.args(["--log", "info", "router", "--listen", &cluster.address, "--model-name", "tiny", "--model"]);
    router.arg(cluster.file("model"));
    let etcd = cluster.etcd.as_ref().unwrap();
    let secured = etcd.secured.as_ref().unwrap();
    router.args(["--etcd", &etcd.url, "--etcd-ca"]).arg(&secured.ca.cert);
    router.arg("--etcd-cert").arg(&secured.client.cert).arg("--etcd-key").arg(&secured.client.key);
    cluster.run("plain-router", router);
    cluster
        .until("it does not use them", |c| {
            c.log("plain-router").contains("start this router with --cluster-cert")
        })
        .await;
}

/// The router keeps the registry: workers join over its one port, each as itself.
#[tokio::test(flavor = "multi_thread")]
async fn workers_join_a_router_as_themselves_only() {
    let mut cluster = Secured::start(TANDEM, true, false, &[]).await;
    let (code, said) = cluster.call(&["generate", "hello there", "--max-tokens", "8", "-q"]);
    assert_eq!(code, Some(0), "{said}");
    // The cluster's certificate opens joining and nothing else on that port; clients' ways do not lead to joining.
    let endpoint = Endpoint::from_shared(format!("http://{}", cluster.address)).unwrap();
    let own = cluster.ca.issue_for(cluster.dir.path(), "spare", 1, &[&uri("spare")]);
    let channel = tls::dial::lazy(&endpoint, files(&own, &cluster.ca.cert), Part::Router);
    let status = v1::inference_client::InferenceClient::new(channel.clone())
        .list_workers(v1::ListWorkersRequest {})
        .await
        .unwrap_err();
    assert!(status.message().contains("for joining only"), "{status:?}");
    let member = cluster::Member {
        worker: "decode".into(),
        role: cluster::Role::Decode,
        address: "127.0.0.1:9".into(),
        model: "tiny".into(),
        compat_hash: String::new(),
        incarnation: u64::MAX,
        transports: vec![],
        tls: true,
        auto_role: false,
        zone: String::new(),
        block_tokens: 16,
        total_blocks: 1,
        max_context_tokens: 1,
        max_sequences: 1,
    };
    let first = v1::JoinRequest {
        member_json: serde_json::to_string(&member).unwrap(),
        load_json: serde_json::to_string(&cluster::Load::default()).unwrap(),
    };
    let status = v1::registry_client::RegistryClient::new(channel)
        .join(tokio_stream::iter([first]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    assert!(status.message().contains("speaks for tandem://worker/spare, not for tandem://worker/decode"));

    // A worker whose router is somebody else, and one that cannot say who it is.
    let stranger = Ca::new(cluster.dir.path(), "stranger");
    let refused = |mut command: Command, words: &str| {
        let (code, said) = run(&mut command);
        assert!(code != Some(0) && said.contains(words), "{code:?}: {said}");
    };
    let worker = |name: &str, pair: Option<&Pair>, ca: &Path, registry: String| {
        let mut command = Command::new(TANDEM);
        command.args(["decode", "--listen", "127.0.0.1:0", "--name", name, "--kv-mib", "32"]);
        command.args(["--model-name", "tiny", "--model"]).arg(cluster.file("model"));
        command.args(["--registry", &registry]);
        if let Some(pair) = pair {
            command.arg("--cluster-cert").arg(&pair.cert).arg("--cluster-key").arg(&pair.key);
            command.arg("--cluster-ca").arg(ca);
        }
        command
    };
    let here = cluster.address.clone();
    let ca = cluster.ca.cert.as_path();
    refused(worker("spare", Some(&own), &stranger.cert, here.clone()), "is not signed by our --cluster-ca");
    refused(worker("spare", None, ca, format!("https://{here}")), "needs --cluster-cert");
    refused(worker("other", Some(&own), ca, here.clone()), "speaks for tandem://worker/spare, not for");
    let strangers = stranger.issue_for(cluster.dir.path(), "strangers", 1, &[&uri("spare")]);
    refused(worker("spare", Some(&strangers), ca, here.clone()), "does not accept our --cluster-cert");
    let old = cluster.ca.issue_for(cluster.dir.path(), "old", -1, &[&uri("spare")]);
    refused(worker("spare", Some(&old), ca, here.clone()), "expired on");
    let mixed = Pair { cert: own.cert.clone(), key: old.key.clone() };
    refused(worker("spare", Some(&mixed), ca, here.clone()), "--cluster-key");
    let gone = Pair { cert: "/nowhere.pem".into(), key: own.key.clone() };
    refused(worker("spare", Some(&gone), ca, here.clone()), "--cluster-cert /nowhere.pem: cannot be read");
    refused(worker("spare", Some(&own), &own.key, here.clone()), "--cluster-ca");
    let mut half = worker("spare", None, ca, here.clone());
    half.arg("--cluster-cert").arg(&own.cert);
    assert_eq!(run(&mut half).0, Some(2));
    // RDMA writes are not encrypted: that has to be said.
    let mut rdma = worker("spare", Some(&own), ca, here.clone());
    rdma.args(["--transport", "rdma"]);
    refused(rdma, "--allow-plain-rdma");
    let mut plain = worker("spare", None, ca, here);
    plain.arg("--allow-plain-rdma");
    refused(plain, "means nothing without --cluster-cert");
    // One that is not encrypted waits, as for a router that starts later, and says what may be wrong.
    let mut command = worker("waiting", None, ca, cluster.address.clone());
    command.args(["--log", "info"]);
    cluster.run("waiting", command);
    cluster.until("it says so", |c| c.log("waiting").contains("start this worker with --cluster-cert")).await;
}

#[test]
fn a_router_that_keeps_the_registry_needs_both_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new(dir.path(), "ca");
    let pair = ca.issue_for(dir.path(), "router", 1, &["tandem://router"]);
    let mut command = Command::new(TANDEM);
    command.args(["router", "--listen", "127.0.0.1:0", "--cluster-cert"]).arg(&pair.cert);
    command.arg("--cluster-key").arg(&pair.key).arg("--cluster-ca").arg(&ca.cert);
    let (code, said) = run(&mut command);
    assert!(code == Some(1) && said.contains("it needs --tls-cert and --tls-key too"), "{code:?}: {said}");
    let worker = ca.issue_for(dir.path(), "worker", 1, &["tandem://worker/*"]);
    let mut command = Command::new(TANDEM);
    command.args(["router", "--listen", "127.0.0.1:0", "--etcd", "http://127.0.0.1:1", "--cluster-cert"]);
    command.arg(&worker.cert).arg("--cluster-key").arg(&worker.key).arg("--cluster-ca").arg(&ca.cert);
    let (code, said) = run(&mut command);
    assert!(
        code == Some(1) && said.contains("speaks for tandem://worker/*, not for tandem://router"),
        "{said}"
    );
}

/// The KV plane of a running worker: who cannot be known is told so before a byte of KV moves.
#[tokio::test(flavor = "multi_thread")]
async fn kv_connections_need_the_right_certificates_on_both_sides() {
    let cluster = Secured::start(TANDEM, true, false, &[]).await;
    let (dir, ca, address) = (cluster.dir.path(), cluster.ca.cert.as_path(), cluster.address_of("decode"));
    let connect = async |pair: &Pair, ca: &Path, worker: &str| {
        let stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        KvSecure(files(pair, ca)).secure(stream, worker).await.map(drop).map_err(|error| error.to_string())
    };
    let own = cluster.ca.issue_for(dir, "spare", 1, &[&uri("spare")]);
    assert_eq!(connect(&own, ca, "decode").await, Ok(()));
    let refused = async |pair: &Pair, ca: &Path, worker: &str, words: &str| {
        let said = connect(pair, ca, worker).await.unwrap_err();
        assert!(said.contains(words), "{said}");
    };
    let stranger = Ca::new(dir, "stranger");
    let strangers = stranger.issue_for(dir, "strangers", 1, &[&uri("spare")]);
    refused(&strangers, ca, "decode", "does not accept our --cluster-cert").await;
    refused(&own, &stranger.cert, "decode", "is not signed by our --cluster-ca").await;
    let old = cluster.ca.issue_for(dir, "old", -1, &[&uri("spare")]);
    refused(&old, ca, "decode", "expired on").await;
    let gone = Pair { cert: "/nowhere.pem".into(), key: own.key.clone() };
    refused(&gone, ca, "decode", "--cluster-cert /nowhere.pem: cannot be read").await;
    // Somebody else answers where a worker is expected, though with a good certificate.
    refused(&own, ca, "decode-9", "speaks for tandem://worker/decode, not for tandem://worker/decode-9")
        .await;
    let etcd = tandem_tests::etcd::Etcd::start().await;
    let plain = etcd.url.trim_start_matches("http://").to_owned();
    let stream = tokio::net::TcpStream::connect(&plain).await.unwrap();
    let said = KvSecure(files(&own, ca)).secure(stream, "decode").await.map(drop).unwrap_err().to_string();
    assert!(said.contains("TLS: "), "{said}");
}
