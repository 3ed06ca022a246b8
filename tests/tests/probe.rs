//! Test pushes between workers: measured, and nothing of them is left.

#![allow(clippy::unwrap_used)]

use proto::v1;
use proto::v1::operator_client::OperatorClient;
use tandem_tests::cluster::{greedy, request};
use tandem_tests::{Cluster, Spec, model};
use tonic::Code;
use tonic::transport::Channel;

async fn start(spec: &Spec) -> (tempfile::TempDir, Cluster, OperatorClient<Channel>) {
    let dir = tempfile::tempdir().unwrap();
    model::write(dir.path(), 5);
    let cluster = Cluster::start(dir.path(), spec).await;
    let channel =
        Channel::from_shared(format!("http://{}", cluster.address)).unwrap().connect().await.unwrap();
    (dir, cluster, OperatorClient::new(channel))
}

fn pair(from: &str, to: &str, bytes: u64) -> v1::ProbeRequest {
    v1::ProbeRequest { from: from.into(), to: to.into(), bytes }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_is_measured_beside_requests() {
    let (_dir, cluster, mut operator) = start(&Spec { decode: 2, ..Spec::default() }).await;
    let prompt: Vec<u32> = (0..200).map(|i| i % 256).collect();
    let expected = cluster.generate(request(&prompt, greedy(30))).await.unwrap().tokens;
    let block_bytes = 4 * 2 * 2 * 16 * 16 * 2;
    for (from, to) in [("prefill-0", "decode-0"), ("prefill-0", "decode-1"), ("decode-0", "decode-1")] {
        let (probed, output) = tokio::join!(
            operator.probe(pair(from, to, 500_000)),
            cluster.generate(request(&prompt, greedy(30))),
        );
        let reply = probed.unwrap().into_inner();
        assert_eq!((reply.transport.as_str(), reply.small_bytes), ("tcp", block_bytes));
        assert_eq!(reply.large_bytes, 500_000_u64.div_ceil(block_bytes) * block_bytes);
        assert!(reply.small_ms > 0.0 && reply.large_ms > 0.0, "{reply:?}");
        // One process, one clock.
        for clock in [reply.from.unwrap(), reply.to.unwrap()] {
            assert!(clock.skew_ms.abs() <= clock.round_trip_ms / 2.0 + 1.0, "{clock:?}");
        }
        assert_eq!(output.unwrap().tokens, expected);
    }
    // Far more than there is room for: a quarter of what is free.
    let reply = operator.probe(pair("prefill-0", "decode-1", 1 << 30)).await.unwrap().into_inner();
    assert!(reply.large_bytes <= 150 * block_bytes, "{reply:?}");
    let refused = operator.probe(pair("decode-0", "prefill-0", 1)).await.unwrap_err();
    assert!(
        refused.code() == Code::FailedPrecondition && refused.message().contains("prefill worker"),
        "{refused}"
    );
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_measured_is_said() {
    let forms = [(16, engine::KvDtype::Bf16), (32, engine::KvDtype::Bf16)];
    let (_dir, cluster, mut operator) = start(&Spec { forms, ..Spec::default() }).await;
    let cases = [
        (pair("prefill-0", "nobody", 1), Code::NotFound, "nobody"),
        (pair("prefill-0", "decode-0", 0), Code::InvalidArgument, "bytes"),
        (pair("prefill-0", "decode-0", u64::MAX), Code::InvalidArgument, "bytes"),
        // Blocks of 16 and of 32 tokens.
        (pair("prefill-0", "decode-0", 1), Code::FailedPrecondition, "prefill-0"),
    ];
    for (call, code, word) in cases {
        let refused = operator.probe(call.clone()).await.unwrap_err();
        assert_eq!(refused.code(), code, "{call:?}: {refused}");
        assert!(refused.message().contains(word), "{refused}");
    }
    cluster.assert_nothing_leaked().await;
    cluster.stop().await;
}
