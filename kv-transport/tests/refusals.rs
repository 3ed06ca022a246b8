//! Who may not write: the stale, the forged, the late, the second; and what time does to a landing.
#![allow(clippy::unwrap_used)]

mod pair;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kv_transport::wire::Kind;
use kv_transport::{
    LandingEnd, LandingError, PushError, Receiver, ReceiverConfig, Refusal, Reserve, ReserveError, Ticket,
};
use pair::raw::{Raw, cell};
use pair::{Setup, identity, soon};

fn refused(error: Option<PushError>, why: Refusal) {
    assert_eq!(error, Some(PushError::Refused(why)));
}

#[tokio::test]
async fn another_incarnation_refuses_the_ticket() {
    let mut setup = Setup::new(2, 4, 512);
    setup.sender.streams = 1;
    let pair = setup.start().await;
    let config = ReceiverConfig { endpoints: vec![pair.address.to_string()], ..ReceiverConfig::default() };
    let before = Receiver::new(identity("decode", 0), pair.target.clone(), pair.grid, config);
    let deadline = std::time::Instant::now() + Duration::from_secs(9);
    let reserve =
        Reserve { slots: vec![0], meta: Bytes::new(), attempt: 0, sender: None, deadline, hold: () };
    let landing = before.reserve(reserve).unwrap();
    refused(pair.sender.open(landing.ticket().clone(), Arc::new(())).await.err(), Refusal::Stale);
    assert_eq!(pair.receiver.stats().stale_refused_total, 1);
}

#[tokio::test]
async fn a_forged_secret_is_refused_and_counted() {
    let pair = Setup::new(2, 4, 512).start().await;
    let mut landing = pair.reserve(&[0, 1]);
    let mut raw = Raw::connect(&pair).await;
    for guess in 0..3 {
        raw.attach(landing.ticket(), [guess; 16]).await;
        let reply = raw.hear().await;
        assert_eq!((reply.kind, Refusal::from_code(reply.arg)), (Kind::Refused, Refusal::Forged));
    }
    // Writing without having shown the secret is thrown away.
    let transfer = Ticket::decode(landing.ticket()).unwrap().transfer;
    raw.write(transfer, 1, &[cell(0, 0, &[9; 512])], 512, &[9; 512]).await;
    assert_eq!(Refusal::from_code(raw.hear().await.arg), Refusal::Unknown);
    raw.commit(transfer, b"").await;
    assert_eq!(raw.hear().await.kind, Kind::Refused);
    let stats = pair.receiver.stats();
    assert_eq!((stats.forged_refused_total, stats.bytes_total, stats.discarded_bytes_total), (3, 0, 512));
    // The honest sender is not disturbed.
    soon(pair.push_all(landing.ticket().clone(), &[2, 3])).await.unwrap();
    soon(landing.committed()).await.unwrap();
    pair.assert_landed(&[2, 3], &[0, 1]);
}

#[tokio::test]
async fn a_second_sender_is_refused_and_the_first_goes_on() {
    let pair = Setup::new(1, 4, 512).start().await;
    let mut landing = pair.reserve(&[0]);
    let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(()))).await.unwrap();
    let (ticket, mut raw) = (landing.ticket().clone(), Raw::connect(&pair).await);
    raw.attach(&ticket, ticket[22..38].try_into().unwrap()).await;
    assert_eq!(Refusal::from_code(raw.hear().await.arg), Refusal::Taken);
    drop(raw);
    refused(pair.sender.open(ticket, Arc::new(())).await.err(), Refusal::Taken);
    push.cells(0, &pair.cells(0, &[1])).await.unwrap();
    soon(push.commit(Bytes::new())).await.unwrap();
    soon(landing.committed()).await.unwrap();
}

#[tokio::test]
async fn a_used_ticket_is_stale() {
    let pair = Setup::new(1, 4, 512).start().await;
    let mut landing = pair.reserve(&[0]);
    soon(pair.push_all(landing.ticket().clone(), &[1])).await.unwrap();
    refused(pair.push_all(landing.ticket().clone(), &[1]).await.err(), Refusal::Stale);
    let landed = soon(landing.committed()).await.unwrap();
    assert_eq!(&landed.payload[..], b"first token");
}

/// Also when cells and commit were sent behind the ticket, so that answers about them are still on their way.
#[tokio::test]
async fn a_ticket_that_was_refused_for_want_of_room_may_be_shown_again() {
    let mut setup = Setup::new(1, 4, 512);
    (setup.sender.streams, setup.receiver.max_attached) = (1, 1);
    let pair = setup.start().await;
    let (mut first, mut second) = (pair.reserve(&[0]), pair.reserve(&[1]));
    let push = soon(pair.sender.open(first.ticket().clone(), Arc::new(()))).await.unwrap();
    for _ in 0..3 {
        refused(soon(pair.sender.open(second.ticket().clone(), Arc::new(()))).await.err(), Refusal::Busy);
    }
    push.cells(0, &pair.cells(0, &[2])).await.unwrap();
    soon(push.commit(Bytes::new())).await.unwrap();
    soon(first.committed()).await.unwrap();
    drop(first);
    soon(pair.push_all(second.ticket().clone(), &[3])).await.unwrap();
    soon(second.committed()).await.unwrap();
    pair.assert_landed(&[2, 3], &[0, 1]);
}

#[tokio::test]
async fn what_was_sent_behind_a_refused_ticket_is_thrown_away_and_the_reason_stays() {
    let pair = Setup::new(2, 4, 512).start().await;
    let mut landing = pair.reserve(&[0]);
    soon(pair.push_all(landing.ticket().clone(), &[1])).await.unwrap();
    soon(landing.committed()).await.unwrap();
    for round in 1..=5 {
        let push = soon(pair.sender.open_ahead(landing.ticket().clone(), Arc::new(()), None)).await.unwrap();
        for plane in 0..2 {
            push.queue().send(plane, pair.cells(plane, &[2])).unwrap();
        }
        refused(soon(push.commit(Bytes::new())).await.err(), Refusal::Stale);
        assert_eq!(pair.receiver.stats().bytes_total, 1024, "round {round}");
    }
    pair.assert_landed(&[1], &[0]);
}

#[tokio::test(start_paused = true)]
async fn a_reservation_nobody_uses_expires() {
    let pair = Setup::new(1, 4, 512).start().await;
    let mut landing = pair.reserve_for(&[0], Duration::from_secs(5));
    let start = tokio::time::Instant::now();
    assert_eq!(landing.committed().await.err(), Some(LandingError::Expired));
    assert_eq!(start.elapsed().as_secs(), 5);
    assert_eq!(pair.holds.alive(), 0);
    assert_eq!(pair.receiver.stats().voided(LandingEnd::Expired), 1);
}

#[tokio::test]
async fn an_expired_ticket_opens_nothing() {
    let pair = Setup::new(1, 4, 512).start().await;
    let landing = pair.reserve_for(&[0], Duration::from_millis(1));
    pair::until("expired", || pair.receiver.stats().voided(LandingEnd::Expired) == 1).await;
    assert_eq!(pair.holds.alive(), 0, "nobody has to wait for the landing");
    let error = pair.sender.open(landing.ticket().clone(), Arc::new(())).await.err().unwrap();
    // Whichever side's clock speaks first.
    let expired = [PushError::Expired, PushError::Refused(Refusal::Expired)].contains(&error);
    assert!(expired || matches!(error, PushError::Connect { .. }), "{error}");
}

#[tokio::test]
async fn no_byte_for_too_long_is_a_stall() {
    let mut setup = Setup::new(2, 4, 512);
    setup.receiver.progress_timeout = Duration::from_millis(30);
    let pair = setup.start().await;
    let mut landing = pair.reserve(&[0, 1]);
    let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(pair.holds.take()))).await.unwrap();
    push.cells(0, &pair.cells(0, &[0, 1])).await.unwrap();
    assert_eq!(soon(landing.committed()).await.err(), Some(LandingError::Stalled));
    assert_eq!(soon(push.failed()).await, PushError::Refused(Refusal::Stalled));
    drop(push);
    pair.assert_quiet().await;
}

#[tokio::test]
async fn a_receiver_that_never_answers_is_a_stall() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut setup = Setup::new(1, 4, 512);
    setup.endpoint = Some(listener.local_addr().unwrap().to_string());
    setup.sender.connect_timeout = Duration::from_millis(30);
    let pair = setup.start().await;
    let landing = pair.reserve(&[0]);
    let error = soon(pair.sender.open(landing.ticket().clone(), Arc::new(()))).await.err().unwrap();
    assert!(matches!(error, PushError::Connect { .. }), "{error}");
}

#[tokio::test]
async fn shutdown_ends_everything_at_once() {
    let pair = Setup::new(2, 4, 512).start().await;
    let mut landing = pair.reserve(&[0, 1]);
    let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(pair.holds.take()))).await.unwrap();
    pair.receiver.shutdown();
    assert_eq!(soon(landing.committed()).await.err(), Some(LandingError::Shutdown));
    let error = soon(push.failed()).await;
    assert!(matches!(error, PushError::Refused(Refusal::Shutdown) | PushError::PeerGone), "{error}");
    drop(push);
    pair.assert_quiet().await;
    pair::until("connections closed", || pair.receiver.stats().connections == 0).await;
    let deadline = std::time::Instant::now() + Duration::from_secs(9);
    let late = Reserve {
        slots: vec![0],
        meta: Bytes::new(),
        attempt: 0,
        sender: None,
        deadline,
        hold: pair.holds.take(),
    };
    assert_eq!(pair.receiver.reserve(late).err(), Some(ReserveError::Shutdown));
    assert_eq!(pair.holds.alive(), 0);
}

#[tokio::test]
async fn impossible_reservations_are_refused() {
    let mut setup = Setup::new(2, 4, 512);
    setup.receiver.max_transfers = 1;
    let pair = setup.start().await;
    let reserve = |slots: Vec<u32>, seconds| {
        let deadline = std::time::Instant::now() + Duration::from_secs(seconds);
        let reserve = Reserve {
            slots,
            meta: Bytes::new(),
            attempt: 0,
            sender: None,
            deadline,
            hold: pair.holds.take(),
        };
        pair.receiver.reserve(reserve)
    };
    assert_eq!(reserve(vec![4], 9).err(), Some(ReserveError::BadSlot { slot: 4 }));
    assert_eq!(reserve(vec![1, 1], 9).err(), Some(ReserveError::BadSlot { slot: 1 }));
    assert_eq!(reserve(vec![1], 0).err(), Some(ReserveError::Expired));
    let _one = reserve(vec![1], 9).unwrap();
    assert_eq!(reserve(vec![2], 9).err(), Some(ReserveError::Full { max: 1 }));
    assert_eq!(pair.holds.alive(), 1);
}
