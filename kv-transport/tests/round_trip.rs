//! Cells arrive where the ticket says, byte for byte, whatever the shape.

mod pair;

use std::sync::Arc;

use bytes::Bytes;
use pair::{Setup, soon};
use proptest::prelude::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_arrives_and_nothing_is_left() {
    let pair = Setup::new(4, 16, 8192).start().await;
    let (src, dst) = ([3, 1, 9, 8], [15, 0, 7, 2]);
    let mut landing = pair.reserve(&dst);
    let (report, landed) = soon(async {
        tokio::join!(
            pair.push_all(landing.ticket().clone(), &src),
            landing.committed()
        )
    })
    .await;
    let (report, landed) = (report.unwrap(), landed.unwrap());
    pair.assert_landed(&src, &dst);
    assert_eq!(
        (report.cells, report.bytes, report.refetched),
        (16, 16 * 8192, 0)
    );
    assert_eq!(
        (landed.cells, landed.bytes, landed.refetched),
        (16, 16 * 8192, 0)
    );
    assert_eq!(&landed.payload[..], b"first token");
    assert_eq!((report.transport, landed.transport), ("tcp", "tcp"));
    assert_eq!(pair.holds.alive(), 1);
    drop(landed);
    drop(landing);
    pair.assert_quiet().await;
    let stats = pair.receiver.stats();
    assert_eq!((stats.committed_total, stats.bytes_total), (1, 16 * 8192));
    assert_eq!(stats.voided_total.iter().map(|(_, n)| n).sum::<u64>(), 0);
}
