//! Cells arrive where the ticket says, byte for byte, whatever the shape.
#![allow(clippy::unwrap_used)]

mod pair;

use std::sync::Arc;

use bytes::Bytes;
use kv_transport::{Cell, LandingEnd, LandingError, PushError, Region, Sender, SenderConfig};
use pair::{Setup, identity, soon, until};
use proptest::prelude::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_arrives_and_nothing_is_left() {
    let pair = Setup::new(4, 16, 8192).start().await;
    let (src, dst) = ([3, 1, 9, 8], [15, 0, 7, 2]);
    let mut landing = pair.reserve(&dst);
    let push = pair.push_all(landing.ticket().clone(), &src);
    let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
    let (report, landed) = (report.unwrap(), landed.unwrap());
    pair.assert_landed(&src, &dst);
    assert_eq!((report.cells, report.bytes, report.refetched), (16, 16 * 8192, 0));
    assert_eq!((landed.cells, landed.bytes, landed.refetched), (16, 16 * 8192, 0));
    assert_eq!(&landed.payload[..], b"first token");
    assert_eq!((report.transport, landed.transport), ("tcp", "tcp"));
    // The sender's is kept while a write runs, and what one wrote may be committed before it returns.
    until("only the landing's hold", || pair.holds.alive() == 1).await;
    assert!(matches!(landing.committed().await, Err(LandingError::Revoked)), "the hold is yielded once");
    drop(landed);
    pair.assert_quiet().await;
    drop(landing);
    let stats = pair.receiver.stats();
    assert_eq!((stats.committed_total, stats.bytes_total), (1, 16 * 8192));
    assert_eq!(stats.voided_total.iter().map(|(_, n)| n).sum::<u64>(), 0);
    assert_eq!(pair.sender.stats().committed_total, 1);
}

#[tokio::test]
async fn cells_outside_the_ticket_stay_untouched() {
    let pair = Setup::new(2, 8, 1000).start().await;
    let mut landing = pair.reserve(&[5, 2]);
    soon(pair.push_all(landing.ticket().clone(), &[0, 1])).await.unwrap();
    soon(landing.committed()).await.unwrap();
    for plane in 0..2 {
        for slot in [0, 1, 3, 4, 6, 7] {
            assert!(pair::Pair::cell(&pair.target, &pair.grid, plane, slot).iter().all(|b| *b == 0));
        }
    }
}

#[tokio::test]
async fn a_transfer_without_cells_only_commits() {
    let pair = Setup::new(2, 8, 1000).start().await;
    let mut landing = pair.reserve(&[]);
    soon(pair.push_all(landing.ticket().clone(), &[])).await.unwrap();
    assert_eq!(soon(landing.committed()).await.unwrap().cells, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_thread_queues_without_waiting() {
    let pair = Setup::new(8, 8, 4096).start().await;
    let slots: Vec<u32> = (0..8).collect();
    let mut landing = pair.reserve(&slots);
    let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(()))).await.unwrap();
    assert_eq!((&push.meta()[..], push.slots(), push.attempt()), (&b"meta"[..], 8, 1));
    let (queue, planes) = (push.queue(), (0..8).map(|plane| pair.cells(plane, &slots)).collect::<Vec<_>>());
    let engine = std::thread::spawn(move || {
        for (plane, cells) in planes.into_iter().enumerate() {
            queue.send(plane as u32, cells).unwrap();
        }
        queue
    });
    let queue = tokio::task::spawn_blocking(|| engine.join().unwrap()).await.unwrap();
    soon(push.commit(Bytes::new())).await.unwrap();
    soon(landing.committed()).await.unwrap();
    pair.assert_landed(&slots, &slots);
    assert!(queue.send(0, vec![]).is_err(), "the push is over");
}

#[tokio::test]
async fn misuse_is_named_and_leaves_nothing() {
    let pair = Setup::new(2, 4, 512).start().await;
    let landing = pair.reserve(&[0, 1]);
    let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(pair.holds.take()))).await.unwrap();
    let cells = pair.cells(0, &[0, 1]);
    push.cells(0, &cells).await.unwrap();
    assert_eq!(push.cells(0, &cells[..1]).await, Err(PushError::BadCell { plane: 0, index: 0 }));
    assert!(push.cells(2, &cells).await.is_err(), "no such plane");
    let outside = Cell { index: 0, src_slot: 4, checksum: 0 };
    assert!(push.cells(1, &[outside]).await.is_err(), "no such source slot");
    assert_eq!(push.commit(Bytes::new()).await.err(), Some(PushError::Incomplete { missing: 2 }));
    drop(landing);
    pair.assert_quiet().await;
}

#[tokio::test]
async fn an_abort_arrives_with_its_reason() {
    let pair = Setup::new(2, 4, 512).start().await;
    for dropped in [false, true] {
        let mut landing = pair.reserve(&[0, 1]);
        let push =
            soon(pair.sender.open(landing.ticket().clone(), Arc::new(pair.holds.take()))).await.unwrap();
        push.cells(0, &pair.cells(0, &[0, 1])).await.unwrap();
        if dropped {
            drop(push)
        } else {
            push.abort("out of memory")
        }
        let Err(LandingError::Aborted { reason }) = soon(landing.committed()).await else { panic!() };
        assert_eq!(reason, if dropped { "the sender dropped the push" } else { "out of memory" });
        drop(landing);
        pair.assert_quiet().await;
    }
    assert_eq!(pair.receiver.stats().voided(LandingEnd::Aborted), 2);
}

#[tokio::test]
async fn a_revoke_reaches_the_sender_while_it_computes() {
    let pair = Setup::new(2, 4, 512).start().await;
    let landing = pair.reserve(&[0, 1]);
    let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(pair.holds.take()))).await.unwrap();
    soon(landing.revoke().released()).await;
    assert_eq!(soon(push.failed()).await, PushError::Refused(kv_transport::Refusal::Revoked));
    assert!(push.queue().send(0, pair.cells(0, &[0])).is_err());
    drop(push);
    pair.assert_quiet().await;
}

#[tokio::test]
async fn layouts_must_agree() {
    let pair = Setup::new(2, 4, 512).start().await;
    let landing = pair.reserve(&[0]);
    let grid = kv_transport::Grid { planes: 3, ..pair.grid };
    let other = Sender::new(identity("p", 1), Region::zeroed(8192), grid, SenderConfig::default());
    let refused = other.open(landing.ticket().clone(), Arc::new(())).await;
    assert!(matches!(refused, Err(PushError::Layout { theirs_planes: 2, ours_planes: 3, .. })));
}

#[derive(Debug, Clone)]
struct Shape {
    planes: u32,
    cell_bytes: u32,
    src: Vec<u32>,
    dst: Vec<u32>,
    streams: usize,
    window_bytes: usize,
    frame_cells: usize,
    frame_bytes: usize,
}

fn shape() -> impl Strategy<Value = Shape> {
    let slots = || Just((0..24_u32).collect::<Vec<_>>()).prop_shuffle();
    let sizes = prop_oneof![1..64_u32, 1000..5000_u32, Just(65536), Just(300_000)];
    let bounds = (1..5_usize, 1..400_000_usize, 1..65_usize, 1..400_000_usize);
    (1..6_u32, sizes, slots(), slots(), 0..24_usize, bounds).prop_map(
        |(planes, cell_bytes, mut src, mut dst, n, bounds)| {
            src.truncate(n);
            dst.truncate(n);
            let (streams, window_bytes, frame_cells, frame_bytes) = bounds;
            Shape { planes, cell_bytes, src, dst, streams, window_bytes, frame_cells, frame_bytes }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_arrives(shape in shape()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let mut setup = Setup::new(shape.planes, 24, shape.cell_bytes);
            setup.sender.streams = shape.streams;
            setup.sender.window_bytes = shape.window_bytes;
            setup.sender.frame_cells = shape.frame_cells;
            setup.sender.frame_bytes = shape.frame_bytes;
            let pair = setup.start().await;
            let mut landing = pair.reserve(&shape.dst);
            let push = pair.push_all(landing.ticket().clone(), &shape.src);
            let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
            report.unwrap();
            drop(landed.unwrap());
            pair.assert_landed(&shape.src, &shape.dst);
            pair.assert_quiet().await;
            prop_assert_eq!(pair.receiver.stats().discarded_bytes_total, 0);
            Ok(())
        })?;
    }
}
