//! Peers that break the protocol, on purpose or not: they hurt nobody but themselves.
#![allow(clippy::unwrap_used)]

mod pair;

use kv_transport::wire::{Header, Hello, Kind};
use kv_transport::{LandingEnd, LandingError, Refusal};
use pair::raw::{Raw, cell};
use pair::{Pair, Setup, identity, soon, until};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test]
async fn no_byte_lands_after_the_hold_is_gone() {
    let pair = Setup::new(1, 4, 1 << 20).start().await;
    let landing = pair.reserve(&[2]);
    let bytes = vec![0xEE; 1 << 20];
    let (mut raw, transfer) = Raw::attached(&pair, landing.ticket()).await;
    // A quarter of the cell arrives and is in place.
    raw.write(transfer, 1, &[cell(0, 0, &bytes)], 1 << 20, &bytes[..1 << 18]).await;
    until("a quarter in place", || pair.receiver.stats().bytes_total == 1 << 18).await;
    assert_eq!(pair.receiver.stats().receiving, 1);
    soon(landing.revoke().released()).await;
    assert_eq!(pair.holds.alive(), 0);
    // The memory has a new owner, who writes it; the rest of the old cell arrives afterwards.
    let place = pair.grid.cell(0, 2).unwrap();
    pair.target.copy_in(place.start, &vec![0x11; 1 << 20]).unwrap();
    raw.stream.write_all(&bytes[1 << 18..]).await.unwrap();
    let notice = raw.hear().await;
    assert_eq!(
        (notice.kind, notice.seq, Refusal::from_code(notice.arg)),
        (Kind::Refused, 0, Refusal::Revoked)
    );
    let answer = raw.hear().await;
    assert_eq!(
        (answer.kind, answer.seq, Refusal::from_code(answer.arg)),
        (Kind::Refused, 1, Refusal::Revoked)
    );
    // So do a whole further frame and a commit.
    raw.write(transfer, 2, &[cell(0, 0, &bytes)], 1 << 20, &bytes).await;
    assert_eq!(raw.hear().await.kind, Kind::Refused);
    raw.commit(transfer, b"").await;
    assert_eq!(raw.hear().await.kind, Kind::Refused);
    assert!(Pair::cell(&pair.target, &pair.grid, 0, 2).iter().all(|b| *b == 0x11));
    assert_eq!(pair.receiver.stats().voided(LandingEnd::Revoked), 1);
}

#[tokio::test]
async fn commits_and_cells_may_come_twice_or_early() {
    let pair = Setup::new(2, 4, 100).start().await;
    let mut landing = pair.reserve(&[3]);
    let (mut raw, transfer) = Raw::attached(&pair, landing.ticket()).await;
    raw.commit(transfer, b"first").await;
    raw.write(transfer, 1, &[cell(1, 0, &[1; 100])], 100, &[1; 100]).await;
    assert_eq!((raw.hear().await.kind, pair.receiver.stats().committed_total), (Kind::Ack, 0));
    // The same cell again, with other bytes under a matching checksum: verified cells are not rewritten.
    raw.write(transfer, 2, &[cell(1, 0, &[2; 100])], 100, &[2; 100]).await;
    let again = raw.hear().await;
    assert_eq!((again.kind, again.arg), (Kind::Ack, 0));
    raw.write(transfer, 3, &[cell(0, 0, &[3; 100]), cell(1, 0, &[4; 100])], 200, &[3; 200]).await;
    assert_eq!(raw.hear().await.kind, Kind::Ack);
    assert_eq!(raw.hear().await.kind, Kind::CommitAck);
    let landed = soon(landing.committed()).await.unwrap();
    for _ in 0..2 {
        raw.commit(transfer, b"second").await;
        assert_eq!(raw.hear().await.kind, Kind::CommitAck);
    }
    drop(landing);
    raw.commit(transfer, b"third").await;
    assert_eq!(raw.hear().await.kind, Kind::CommitAck);
    assert_eq!(&landed.payload[..], b"first");
    assert_eq!(Pair::cell(&pair.target, &pair.grid, 1, 3), [1; 100]);
    assert_eq!(Pair::cell(&pair.target, &pair.grid, 0, 3), [3; 100]);
    assert_eq!(pair.receiver.stats().duplicate_cells_total, 2);
}

#[tokio::test]
async fn two_connections_cannot_write_one_cell_at_once() {
    let pair = Setup::new(1, 4, 1000).start().await;
    let mut landing = pair.reserve(&[0]);
    let (mut one, transfer) = Raw::attached(&pair, landing.ticket()).await;
    let (mut two, _) = Raw::attached(&pair, landing.ticket()).await;
    one.write(transfer, 1, &[cell(0, 0, &[1; 1000])], 1000, &[1; 500]).await;
    until("half in place", || pair.receiver.stats().bytes_total == 500).await;
    two.write(transfer, 2, &[cell(0, 0, &[2; 1000])], 1000, &[2; 1000]).await;
    let busy = two.hear().await;
    assert_eq!((busy.kind, busy.arg), (Kind::Ack, 1), "to be sent again");
    one.stream.write_all(&[1; 500]).await.unwrap();
    assert_eq!(one.hear().await.arg, 0);
    one.commit(transfer, b"").await;
    assert_eq!(one.hear().await.kind, Kind::CommitAck);
    soon(landing.committed()).await.unwrap();
    assert_eq!(Pair::cell(&pair.target, &pair.grid, 0, 0), [1; 1000]);
}

#[tokio::test]
async fn a_cell_outside_the_ticket_ends_the_connection() {
    let pair = Setup::new(2, 4, 100).start().await;
    for (plane, index, promised) in
        [(2, 0, 100), (0, 1, 100), (u32::MAX, u32::MAX, 100), (0, 0, 99), (0, 0, 101)]
    {
        let mut landing = pair.reserve(&[1]);
        let (mut raw, transfer) = Raw::attached(&pair, landing.ticket()).await;
        raw.write(transfer, 1, &[cell(plane, index, &[7; 100])], promised, &[7; 101]).await;
        assert!(raw.closed().await);
        assert_eq!(soon(landing.committed()).await.err(), Some(LandingError::PeerGone));
    }
    assert_eq!(pair.receiver.stats().bytes_total, 0);
}

#[tokio::test]
async fn a_receiver_is_named_wrongly_or_in_another_version() {
    let pair = Setup::new(1, 4, 100).start().await;
    for to in [identity("decode", 2), identity("else", 1), identity("", 0)] {
        let (mut raw, ack) = Raw::dial(&pair, identity("raw", 1), to).await;
        assert_eq!((ack.refused, ack.from), (Some(Refusal::Stale), identity("decode", 1)));
        assert!(raw.closed().await);
    }
    let mut hello = Hello { from: identity("raw", 1), to: identity("decode", 1) }.encode().unwrap();
    hello[10] = 99;
    let end = hello.len() - 4;
    let crc = crc32c::crc32c(&hello[8..end]);
    hello[end..].copy_from_slice(&crc.to_le_bytes());
    let mut stream = TcpStream::connect(pair.address).await.unwrap();
    stream.write_all(&hello).await.unwrap();
    let mut answer = Vec::new();
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    let ack = kv_transport::wire::HelloAck::parse(&answer[2..answer.len() - 4]).unwrap();
    assert_eq!(ack.refused, Some(Refusal::Protocol));
}

/// A receiver that says hello and then whatever it is given.
async fn false_receiver(replies: Vec<u8>) -> std::net::SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let ack = kv_transport::wire::HelloAck { from: identity("decode", 1), refused: None };
        stream.write_all(&ack.encode().unwrap()).await.unwrap();
        let _ = stream.write_all(&replies).await;
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
    });
    address
}

/// What a hostile peer sends after its hello.
#[derive(Debug, Clone)]
enum Blow {
    Noise(Vec<u8>),
    /// A header with a right checksum and wild contents.
    Wild {
        kind: u8,
        count: u16,
        body: u32,
        payload: u32,
        transfer_known: bool,
        seq: u32,
        arg: u64,
        follow: Vec<u8>,
    },
    /// A write of a known cell whose payload is cut short.
    Short {
        index: u32,
        bytes: usize,
    },
}

fn blow() -> impl Strategy<Value = Blow> {
    let noise = || prop::collection::vec(any::<u8>(), 0..300);
    let lengths = || prop_oneof![0..2000_u32, any::<u32>()];
    let kinds = prop_oneof![Just(1_u8), Just(2), Just(3), Just(4), Just(17), Just(18), Just(19), Just(20)];
    prop_oneof![
        noise().prop_map(Blow::Noise),
        (kinds, any::<u16>(), lengths(), lengths(), any::<bool>(), any::<u32>(), any::<u64>(), noise())
            .prop_map(|(kind, count, body, payload, transfer_known, seq, arg, follow)| Blow::Wild {
                kind,
                count,
                body,
                payload,
                transfer_known,
                seq,
                arg,
                follow
            }),
        (0..3_u32, 0..1200_usize).prop_map(|(index, bytes)| Blow::Short { index, bytes }),
    ]
}

fn wild(blow: &Blow, transfer: u128) -> Vec<u8> {
    let kinds = [
        Kind::Attach,
        Kind::Write,
        Kind::Commit,
        Kind::Abort,
        Kind::Attached,
        Kind::Ack,
        Kind::CommitAck,
        Kind::Refused,
    ];
    let mut out = Vec::new();
    match blow {
        Blow::Noise(bytes) => out.extend(bytes),
        Blow::Wild { kind, count, body, payload, transfer_known, seq, arg, follow } => {
            let kind = kinds.into_iter().find(|k| *k as u8 == *kind).unwrap();
            let transfer = if *transfer_known { transfer } else { 5 };
            let crc = crc32c::crc32c(follow);
            let header = Header {
                kind,
                count: *count,
                body_bytes: *body,
                payload_bytes: *payload,
                body_crc: crc,
                transfer,
                arg: *arg,
                seq: *seq,
            };
            header.put(&mut out);
            out.extend(follow);
        }
        Blow::Short { index, bytes } => {
            let mut body = Vec::new();
            cell(0, *index, &[5; 1000]).put(&mut body);
            let mut header = Header::bare(Kind::Write, transfer, 1, 0);
            (header.count, header.payload_bytes) = (1, 1000);
            header.put_with_body(&body, &mut out);
            out.extend(vec![6; *bytes]);
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn others_go_on_whatever_a_peer_sends(blows in prop::collection::vec(blow(), 1..6), hello in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let pair = Setup::new(2, 4, 1000).start().await;
            let (victim, mut honest) = (pair.reserve(&[0, 1]), pair.reserve(&[2, 3]));
            let push = soon(pair.sender.open(honest.ticket().clone(), std::sync::Arc::new(()))).await.unwrap();
            let (mut stream, transfer) = if hello {
                let (raw, transfer) = Raw::attached(&pair, victim.ticket()).await;
                (raw.stream, transfer)
            } else {
                (TcpStream::connect(pair.address).await.unwrap(), 0)
            };
            for blow in &blows {
                // It may be closed already; that is its own affair.
                let _ = stream.write_all(&wild(blow, transfer)).await;
            }
            for plane in 0..2 {
                push.cells(plane, &pair.cells(plane, &[1, 0])).await.unwrap();
            }
            soon(push.commit(bytes::Bytes::new())).await.unwrap();
            soon(honest.committed()).await.unwrap();
            pair.assert_landed(&[1, 0], &[2, 3]);
            drop((stream, victim));
            pair.assert_quiet().await;
            // The sender's two connections stay; the hostile one is gone.
            until("the hostile connection ends", || pair.receiver.stats().connections <= 2).await;
        });
    }

    #[test]
    fn a_sender_survives_any_reply(
        replies in prop::collection::vec((blow(), any::<bool>(), any::<u64>(), 0..4_u32), 0..12),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut setup = Setup::new(2, 4, 1000);
            setup.sender.streams = 1;
            setup.sender.progress_timeout = std::time::Duration::from_millis(50);
            let pair = setup.start().await;
            let landing = pair.reserve(&[0, 1]);
            let mut ticket = kv_transport::Ticket::decode(landing.ticket()).unwrap();
            let mut bytes = Vec::new();
            Header::bare(Kind::Attached, ticket.transfer, 1, 0).put(&mut bytes);
            for (blow, plausible, arg, seq) in &replies {
                if *plausible {
                    let kind = [Kind::Ack, Kind::CommitAck, Kind::Attached][*arg as usize % 3];
                    Header::bare(kind, ticket.transfer, *seq, *arg >> 2).put(&mut bytes);
                } else {
                    bytes.extend(wild(blow, ticket.transfer));
                }
            }
            ticket.endpoints = vec![false_receiver(bytes).await.to_string()];
            // It may fail in any way, but it ends, and lets go of its source.
            let outcome = soon(pair.push_all(ticket.encode().unwrap(), &[2, 3])).await;
            drop((outcome, landing));
            pair.assert_quiet().await;
        });
    }
}
