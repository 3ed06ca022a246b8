//! Cells that travel packed: what arrives, what its checksums say, who is refused.
#![allow(clippy::unwrap_used)]

mod pair;

use std::sync::Arc;

use bytes::Bytes;
use kv_transport::wire::{Header, Kind};
use kv_transport::{LandingEnd, LandingError, Packing, PushError, PushReport, Refusal, Sender, SenderConfig};
use pair::raw::{Raw, cell};
use pair::{Pair, Setup, identity, soon, until};
use proptest::prelude::*;

const ROW: u16 = 16;
const ROW_BYTES: u32 = 32;

fn packing() -> Packing {
    Packing::named(Packing::INT8, ROW).unwrap()
}

/// A pair whose receiver unpacks; cells of so many rows of random bits.
fn setup(planes: u32, slots: u64, rows: u32) -> Setup {
    let mut setup = Setup::new(planes, slots, rows * ROW_BYTES);
    setup.receiver.packing = Some(packing());
    setup
}

async fn push_packed(pair: &Pair, ticket: Bytes, src: &[u32]) -> Result<PushReport, PushError> {
    let push = pair.sender.open_ahead(ticket, Arc::new(pair.holds.take()), Some(packing())).await?;
    for plane in 0..pair.grid.planes {
        push.cells(plane, &pair.cells(plane, src)).await?;
    }
    push.commit(Bytes::from_static(b"first token")).await
}

fn packed(cell: &[u8]) -> Vec<u8> {
    let mut packed = vec![0; packing().packed_bytes(cell.len()).unwrap()];
    packing().pack(cell, &mut packed);
    packed
}

fn unpacked(packed: &[u8], cell_bytes: usize) -> Vec<u8> {
    let mut cell = vec![0; cell_bytes];
    packing().unpack(packed, &mut cell);
    cell
}

/// Every cell of the target is what its source packs to, and the sums that were kept are of the target.
fn assert_landed(pair: &Pair, src: &[u32], dst: &[u32], checksums: &[u32]) {
    let mut sums = checksums.iter();
    for plane in 0..pair.grid.planes {
        for (&src, &dst) in src.iter().zip(dst) {
            let source = Pair::cell(&pair.source, &pair.grid, plane, src);
            let target = Pair::cell(&pair.target, &pair.grid, plane, dst);
            assert!(target == unpacked(&packed(&source), source.len()), "plane {plane}, {src} to {dst}");
            assert_eq!(sums.next(), Some(&crc32c::crc32c(&target)));
        }
    }
    assert_eq!(sums.next(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_the_bytes_arrive_and_the_sums_are_of_what_lies_there() {
    let pair = setup(4, 16, 256).start().await;
    let (src, dst) = ([3, 1, 9, 8], [15, 0, 7, 2]);
    let mut landing = pair.reserve(&dst);
    let push = push_packed(&pair, landing.ticket().clone(), &src);
    let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
    let (report, landed) = (report.unwrap(), landed.unwrap());
    assert_landed(&pair, &src, &dst, &landed.checksums);
    let on_the_wire = 16 * packing().packed_bytes(8192).unwrap() as u64;
    assert_eq!((report.bytes, report.packed_bytes, report.transport), (16 * 8192, on_the_wire, "tcp"));
    assert_eq!(landed.bytes, 16 * 8192);
    let (sent, received) = (pair.sender.stats(), pair.receiver.stats());
    assert_eq!((sent.bytes_total, sent.packed_bytes_total), (on_the_wire, on_the_wire));
    assert_eq!((received.bytes_total, received.packed_bytes_total), (on_the_wire, on_the_wire));
    drop((landed, landing));
    pair.assert_quiet().await;
}

/// The second hop of KV, and a block that is pushed again, are exact: so their sums are too.
#[tokio::test]
async fn what_landed_is_pushed_on_without_further_loss() {
    let pair = setup(2, 8, 64).start().await;
    let mut landing = pair.reserve(&[4]);
    soon(push_packed(&pair, landing.ticket().clone(), &[0])).await.unwrap();
    let first = soon(landing.committed()).await.unwrap();
    let onward = Sender::new(identity("decode", 1), pair.target.clone(), pair.grid, SenderConfig::default());
    let mut landing = pair.reserve(&[7]);
    let push =
        soon(onward.open_ahead(landing.ticket().clone(), Arc::new(()), Some(packing()))).await.unwrap();
    for (plane, checksum) in first.checksums.iter().enumerate() {
        push.cells(plane as u32, &[kv_transport::Cell { index: 0, src_slot: 4, checksum: *checksum }])
            .await
            .unwrap();
    }
    soon(push.commit(Bytes::new())).await.unwrap();
    assert_eq!(soon(landing.committed()).await.unwrap().checksums, first.checksums);
}

#[tokio::test]
async fn who_does_not_unpack_gets_plain_cells_or_refuses() {
    let pair = Setup::new(2, 4, 8 * ROW_BYTES).start().await;
    let landing = pair.reserve(&[1]);
    let refused = soon(push_packed(&pair, landing.ticket().clone(), &[0])).await.err();
    assert_eq!(refused, Some(PushError::Refused(Refusal::Packing)));
    assert_eq!(pair.receiver.stats().receiving, 0);
    let mut landing = pair.reserve(&[2]);
    soon(pair.push_all(landing.ticket().clone(), &[0])).await.unwrap();
    soon(landing.committed()).await.unwrap();
    pair.assert_landed(&[0], &[2]);
    // And one that unpacks takes plain ones.
    let pair = setup(2, 4, 8).start().await;
    let mut landing = pair.reserve(&[1]);
    assert_eq!(soon(pair.push_all(landing.ticket().clone(), &[0])).await.unwrap().packed_bytes, 0);
    soon(landing.committed()).await.unwrap();
    pair.assert_landed(&[0], &[1]);
}

#[tokio::test]
async fn lent_memory_is_copied_as_it_is() {
    let mut setup = setup(2, 4, 64);
    setup.shared = true;
    let pair = setup.start().await;
    let mut landing = pair.reserve(&[1, 3]);
    let report = soon(push_packed(&pair, landing.ticket().clone(), &[0, 2])).await.unwrap();
    soon(landing.committed()).await.unwrap();
    assert_eq!((report.transport, report.packed_bytes), ("shm", 0));
    pair.assert_landed(&[0, 2], &[1, 3]);
}

#[tokio::test]
async fn a_source_that_is_not_what_was_computed_never_lands() {
    let pair = setup(1, 4, 64).start().await;
    let mut landing = pair.reserve(&[2]);
    let push = pair.sender.open_ahead(landing.ticket().clone(), Arc::new(()), Some(packing()));
    let push = soon(push).await.unwrap();
    let cells = pair.cells(0, &[1]);
    let place = pair.grid.cell(0, 1).unwrap();
    let mut byte = [0];
    pair.source.copy_out(place.start + 77, &mut byte).unwrap();
    pair.source.copy_in(place.start + 77, &[byte[0] ^ 1]).unwrap();
    push.cells(0, &cells).await.unwrap();
    assert_eq!(soon(push.commit(Bytes::new())).await.err(), Some(PushError::Corrupt));
    assert_eq!(soon(landing.committed()).await.err(), Some(LandingError::Corrupt));
    assert!(Pair::cell(&pair.target, &pair.grid, 0, 2).iter().all(|b| *b == 0), "not one byte was written");
}

/// A frame of packed cells that says what it is told to.
async fn say(
    raw: &mut Raw,
    transfer: u128,
    (count, code): (u16, u64),
    cells: &[kv_transport::wire::CellDescriptor],
    payload: &[u8],
) {
    let mut header = Header::bare(Kind::Packed, transfer, 1, code);
    header.count = count;
    let mut body = Vec::new();
    cells.iter().for_each(|cell| cell.put(&mut body));
    raw.say(header, &body, payload).await;
}

#[tokio::test]
async fn hostile_frames_end_their_connection_only() {
    let pair = setup(2, 4, 4).start().await;
    let good = packed(&[5; 128]);
    let one = |bytes: &[u8]| [cell(0, 0, bytes)];
    let cases: [(&str, (u16, u64), _, Vec<u8>); 7] = [
        (
            "another row",
            (1, Packing::named(Packing::INT8, ROW * 2).unwrap().code()),
            one(&good),
            good.clone(),
        ),
        ("another kind", (1, packing().code() + 1), one(&good), good.clone()),
        ("no packing", (1, 0), one(&good), good.clone()),
        ("as long as a plain cell", (1, packing().code()), one(&[5; 128]), vec![5; 128]),
        ("shorter", (1, packing().code()), one(&good), good[1..].to_vec()),
        ("outside the ticket", (1, packing().code()), [cell(2, 0, &good)], good.clone()),
        ("more cells than described", (2, packing().code()), one(&good), good.repeat(2)),
    ];
    for (what, counts, cells, payload) in cases {
        let mut landing = pair.reserve(&[1]);
        let (mut raw, transfer) = Raw::attached(&pair, landing.ticket()).await;
        say(&mut raw, transfer, counts, &cells, &payload).await;
        assert!(raw.closed().await, "{what}");
        assert_eq!(soon(landing.committed()).await.err(), Some(LandingError::PeerGone), "{what}");
    }
    assert_eq!(pair.receiver.stats().bytes_total, 0);
    assert_eq!(pair.receiver.stats().voided(LandingEnd::PeerGone), 7);
    // Nobody else noticed.
    let mut landing = pair.reserve(&[1]);
    soon(push_packed(&pair, landing.ticket().clone(), &[0])).await.unwrap();
    soon(landing.committed()).await.unwrap();
}

#[tokio::test]
async fn a_packed_cell_that_was_damaged_is_asked_for_again() {
    let pair = setup(1, 4, 4).start().await;
    let mut landing = pair.reserve(&[1]);
    let (mut raw, transfer) = Raw::attached(&pair, landing.ticket()).await;
    let good = packed(&Pair::cell(&pair.source, &pair.grid, 0, 0));
    let mut bad = good.clone();
    bad[9] ^= 4;
    say(&mut raw, transfer, (1, packing().code()), &[cell(0, 0, &good)], &bad).await;
    let answer = raw.hear().await;
    assert_eq!((answer.kind, answer.arg), (Kind::Ack, 1));
    say(&mut raw, transfer, (1, packing().code()), &[cell(0, 0, &good)], &good).await;
    assert_eq!(raw.hear().await.arg, 0);
    // Once more, with other bytes: a verified cell is not written again.
    say(&mut raw, transfer, (1, packing().code()), &[cell(0, 0, &bad)], &bad).await;
    assert_eq!(raw.hear().await.arg, 0);
    raw.commit(transfer, b"").await;
    assert_eq!(raw.hear().await.kind, Kind::CommitAck);
    let landed = soon(landing.committed()).await.unwrap();
    assert_landed(&pair, &[0], &[1], &landed.checksums);
    assert_eq!((landed.refetched, pair.receiver.stats().duplicate_cells_total), (1, 1));
}

#[tokio::test]
async fn no_packed_byte_lands_after_the_hold_is_gone() {
    let pair = setup(1, 4, 4096).start().await;
    let landing = pair.reserve(&[2]);
    let bytes = packed(&vec![0xEE; 4096 * ROW_BYTES as usize]);
    let (mut raw, transfer) = Raw::attached(&pair, landing.ticket()).await;
    let mut header = Header::bare(Kind::Packed, transfer, 1, packing().code());
    (header.count, header.payload_bytes) = (1, bytes.len() as u32);
    let (mut body, mut frame) = (Vec::new(), Vec::new());
    cell(0, 0, &bytes).put(&mut body);
    header.put_with_body(&body, &mut frame);
    use tokio::io::AsyncWriteExt;
    frame.extend(&bytes[..1000]);
    raw.stream.write_all(&frame).await.unwrap();
    until("it receives", || pair.receiver.stats().receiving == 1).await;
    soon(landing.revoke().released()).await;
    assert_eq!(pair.holds.alive(), 0);
    raw.stream.write_all(&bytes[1000..]).await.unwrap();
    for seq in [0, 1] {
        let answer = raw.hear().await;
        assert_eq!((answer.seq, Refusal::from_code(answer.arg)), (seq, Refusal::Revoked));
    }
    raw.commit(transfer, b"").await;
    assert_eq!(raw.hear().await.kind, Kind::Refused, "the stream is still in step");
    assert!(Pair::cell(&pair.target, &pair.grid, 0, 2).iter().all(|b| *b == 0));
}

#[derive(Debug, Clone)]
struct Shape {
    planes: u32,
    rows: u32,
    src: Vec<u32>,
    dst: Vec<u32>,
    bounds: (usize, usize, usize, usize),
}

fn shape() -> impl Strategy<Value = Shape> {
    let slots = || Just((0..24_u32).collect::<Vec<_>>()).prop_shuffle();
    let rows = prop_oneof![1..8_u32, 30..150_u32, Just(2048), Just(20_000)];
    let bounds = (1..5_usize, 1..400_000_usize, 1..65_usize, 1..2_000_000_usize);
    (1..6_u32, rows, slots(), slots(), 0..24_usize, bounds).prop_map(
        |(planes, rows, mut src, mut dst, n, bounds)| {
            src.truncate(n);
            dst.truncate(n);
            Shape { planes, rows, src, dst, bounds }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_arrives(shape in shape()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let mut setup = setup(shape.planes, 24, shape.rows);
            let (streams, window_bytes, frame_cells, frame_bytes) = shape.bounds;
            setup.sender = SenderConfig { streams, window_bytes, frame_cells, frame_bytes, ..setup.sender };
            let pair = setup.start().await;
            let mut landing = pair.reserve(&shape.dst);
            let push = push_packed(&pair, landing.ticket().clone(), &shape.src);
            let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
            report.unwrap();
            assert_landed(&pair, &shape.src, &shape.dst, &landed.unwrap().checksums);
            pair.assert_quiet().await;
            prop_assert_eq!(pair.receiver.stats().discarded_bytes_total, 0);
            Ok(())
        })?;
    }
}
