//! Damage and loss on the wire: fetched again, or failed on both sides; never a wrong byte that counts as landed.
#![allow(clippy::unwrap_used)]

mod pair;

use bytes::Bytes;
use kv_transport::wire::{Header, Kind};
use kv_transport::{LandingEnd, LandingError, PushError, Refusal};
use pair::proxy::{Fate, judge, run};
use pair::{Pair, Setup, soon};
use tokio::net::TcpListener;

const SLOTS: [u32; 8] = [7, 6, 5, 4, 3, 2, 1, 0];

async fn through(mut setup: Setup, judge: pair::proxy::Judge) -> Pair {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    setup.endpoint = Some(listener.local_addr().unwrap().to_string());
    let pair = setup.start().await;
    tokio::spawn(run(listener, pair.address, judge));
    pair
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_byte_is_fetched_again() {
    // The first time each frame passes, its last cell is damaged.
    let mut flips = 4;
    let flip = move |header: &Header, payload: &mut [u8]| {
        if header.kind == Kind::Write && flips > 0 {
            flips -= 1;
            *payload.last_mut().unwrap() ^= 1;
        }
        Fate::Pass
    };
    let mut setup = Setup::new(4, 8, 4096);
    setup.sender.frame_cells = 4;
    let pair = through(setup, judge(flip)).await;
    let mut landing = pair.reserve(&SLOTS);
    let push = pair.push_all(landing.ticket().clone(), &SLOTS);
    let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
    assert_eq!((report.unwrap().refetched, landed.unwrap().refetched), (4, 4));
    pair.assert_landed(&SLOTS, &SLOTS);
    assert_eq!(pair.receiver.stats().checksum_failures_total, 4);
    assert_eq!(pair.sender.stats().refetched_cells_total, 4);
    pair.assert_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cell_that_is_always_damaged_fails_both_sides() {
    let flip = |header: &Header, payload: &mut [u8]| {
        if header.kind == Kind::Write {
            payload[0] ^= 0x80;
        }
        Fate::Pass
    };
    let pair = through(Setup::new(1, 8, 4096), judge(flip)).await;
    let mut landing = pair.reserve(&SLOTS[..1]);
    let push = pair.push_all(landing.ticket().clone(), &SLOTS[..1]);
    let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
    assert_eq!(report.err(), Some(PushError::Corrupt));
    assert_eq!(landed.err(), Some(LandingError::Corrupt));
    let stats = pair.receiver.stats();
    assert_eq!((stats.checksum_failures_total, stats.voided(LandingEnd::Corrupt)), (4, 1));
    pair.assert_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_header_ends_the_connection_not_the_receiver() {
    let pair = Setup::new(1, 8, 4096).start().await;
    let mut landing = pair.reserve(&[0]);
    let (mut raw, transfer) = pair::raw::Raw::attached(&pair, landing.ticket()).await;
    let mut bytes = Vec::new();
    Header::bare(Kind::Commit, transfer, 1, 0).put(&mut bytes);
    bytes[20] ^= 1;
    tokio::io::AsyncWriteExt::write_all(&mut raw.stream, &bytes).await.unwrap();
    assert!(raw.closed().await);
    assert_eq!(soon(landing.committed()).await.err(), Some(LandingError::PeerGone));
    assert_eq!(pair.receiver.stats().protocol_errors_total, 1);
    let mut next = pair.reserve(&[0]);
    soon(pair.push_all(next.ticket().clone(), &[1])).await.unwrap();
    soon(next.committed()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_connection_fails_both_sides_and_no_byte_follows() {
    let mut writes = 0;
    let cut = move |header: &Header, _: &mut [u8]| {
        writes += usize::from(header.kind == Kind::Write);
        if writes == 3 { Fate::Cut } else { Fate::Pass }
    };
    let mut setup = Setup::new(8, 8, 16384);
    setup.sender.frame_cells = 2;
    let pair = through(setup, judge(cut)).await;
    let mut landing = pair.reserve(&SLOTS);
    let push = pair.push_all(landing.ticket().clone(), &SLOTS);
    let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
    let error = report.err().unwrap();
    assert!(matches!(error, PushError::PeerGone | PushError::Refused(Refusal::PeerGone)), "{error}");
    assert_eq!(landed.err(), Some(LandingError::PeerGone));
    pair.assert_quiet().await;
    // The memory is somebody else's now.
    let len = pair.target.len();
    pair.target.copy_in(0, &vec![0x5A; len]).unwrap();
    // A new push to the same peer works, over new connections.
    let mut again = pair.reserve(&[0]);
    let direct = direct(again.ticket(), pair.address.to_string());
    soon(pair.push_all(direct, &[3])).await.unwrap();
    soon(again.committed()).await.unwrap();
    let mut bytes = vec![0; len];
    pair.target.copy_out(0, &mut bytes).unwrap();
    for plane in 0..8_u32 {
        let own = pair.grid.cell(plane, 0).unwrap();
        let end = ((plane as usize) + 1) * pair.grid.plane_stride as usize;
        assert!(bytes[own.end..end].iter().all(|b| *b == 0x5A), "a late byte in plane {plane}");
    }
}

/// The same ticket with another endpoint.
fn direct(ticket: &Bytes, endpoint: String) -> Bytes {
    let mut ticket = kv_transport::Ticket::decode(ticket).unwrap();
    ticket.endpoints = vec![endpoint];
    ticket.encode().unwrap()
}
