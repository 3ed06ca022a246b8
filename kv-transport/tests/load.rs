//! Many at once, slow peers, and revokes at any moment under full load.
#![allow(clippy::unwrap_used)]

mod pair;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kv_transport::{LandingEnd, PushError, Refusal};
use pair::proxy::{Fate, judge};
use pair::{Pair, Setup, soon, until};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_transfers_leave_nothing_behind() {
    let pair = Arc::new(Setup::new(3, 400, 2048).start().await);
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..100_u32 {
        let pair = pair.clone();
        tasks.spawn(async move {
            let mut random = StdRng::seed_from_u64(u64::from(i));
            let (src, dst) = ((0..4).map(|k| random.random_range(0..100) * 4 + k), (0..4).map(|k| i * 4 + k));
            let (src, dst): (Vec<_>, Vec<_>) = (src.collect(), dst.collect());
            let mut landing = pair.reserve(&dst);
            let ticket = landing.ticket().clone();
            match i % 5 {
                // The receiver gives up while the sender pushes.
                0 => {
                    let (pushed, ()) =
                        tokio::join!(pair.push_all(ticket, &src), soon(landing.revoke().released()));
                    assert!(matches!(pushed, Err(PushError::Refused(Refusal::Revoked))), "{pushed:?}");
                }
                // The sender gives up.
                1 => {
                    let push = pair.sender.open(ticket, Arc::new(pair.holds.take())).await.unwrap();
                    push.cells(0, &pair.cells(0, &src)).await.unwrap();
                    drop(push);
                    assert!(soon(landing.committed()).await.is_err());
                }
                _ => {
                    let (pushed, landed) = tokio::join!(pair.push_all(ticket, &src), landing.committed());
                    pushed.unwrap();
                    let _hold = landed.unwrap();
                    pair.assert_landed(&src, &dst);
                }
            }
        });
    }
    while let Some(done) = soon(tasks.join_next()).await {
        done.unwrap();
    }
    pair.assert_quiet().await;
    let stats = pair.receiver.stats();
    assert_eq!((stats.committed_total, stats.voided(LandingEnd::Revoked)), (60, 20));
    assert_eq!(stats.voided(LandingEnd::Aborted), 20);
    assert_eq!(pair.sender.stats().connects_total, 2, "all of them shared two connections");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoked_memory_never_changes_whenever_the_revoke_comes() {
    let mut setup = Setup::new(4, 64, 64 << 10);
    setup.sender.streams = 3;
    let pair = Arc::new(setup.start().await);
    let slots: Vec<u32> = (0..64).collect();
    let mut refused = 0;
    for round in 0..40_u64 {
        let landing = pair.reserve(&slots);
        let (ticket, before) = (landing.ticket().clone(), pair.receiver.stats().bytes_total);
        let (pusher, src) = (pair.clone(), slots.clone());
        let push = tokio::spawn(async move { pusher.push_all(ticket, &src).await });
        // Somewhere within the transfer of 16 MiB.
        until("some bytes in", || pair.receiver.stats().bytes_total >= before + round * 390_000).await;
        soon(landing.revoke().released()).await;
        let len = pair.target.len();
        let mark = vec![round as u8; len];
        pair.target.copy_in(0, &mark).unwrap();
        refused += usize::from(push.await.unwrap().is_err());
        // A second transfer of nothing through every connection: all late bytes are behind us.
        let mut fence = pair.reserve(&[]);
        soon(pair.push_all(fence.ticket().clone(), &[])).await.unwrap();
        soon(fence.committed()).await.unwrap();
        let mut after = vec![0; len];
        pair.target.copy_out(0, &mut after).unwrap();
        assert!(after == mark, "round {round}: a late byte");
        pair.assert_quiet().await;
    }
    assert!(refused > 0, "no revoke came in time to be tested");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_receiver_holds_the_sender_back() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut setup = Setup::new(64, 8, 16 << 10);
    setup.endpoint = Some(listener.local_addr().unwrap().to_string());
    setup.sender.window_bytes = 64 << 10;
    setup.sender.frame_bytes = 32 << 10;
    let pair = setup.start().await;
    // The wire stands still until the gate opens.
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let mut closed = true;
    let hold_back = move |header: &kv_transport::wire::Header, _: &mut [u8]| {
        if closed && header.kind == kv_transport::wire::Kind::Write {
            tokio::task::block_in_place(|| gate.recv()).unwrap();
            closed = false;
        }
        Fate::Pass
    };
    tokio::spawn(pair::proxy::run(listener, pair.address, judge(hold_back)));
    let slots: Vec<u32> = (0..8).collect();
    let mut landing = pair.reserve(&slots);
    let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(()))).await.unwrap();
    let accepted = std::sync::atomic::AtomicUsize::new(0);
    let pushing = async {
        for plane in 0..64 {
            for cell in pair.cells(plane, &slots) {
                push.cells(plane, &[cell]).await.unwrap();
                accepted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
    };
    let mut pushing = Box::pin(pushing);
    let stuck = tokio::time::timeout(Duration::from_millis(200), pushing.as_mut()).await;
    assert!(stuck.is_err(), "8 MiB cannot be accepted with a window of 64 KiB");
    assert_eq!(accepted.load(std::sync::atomic::Ordering::Relaxed), 4, "four cells fill the window");
    open.send(()).unwrap();
    soon(pushing).await;
    soon(push.commit(Bytes::new())).await.unwrap();
    soon(landing.committed()).await.unwrap();
    pair.assert_landed(&slots, &slots);
}

#[tokio::test]
async fn a_stuck_peer_stalls_and_lets_go_of_the_source() {
    // Accepts, says hello through a real receiver, then nothing moves any more.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut setup = Setup::new(8, 8, 1 << 20);
    setup.endpoint = Some(listener.local_addr().unwrap().to_string());
    setup.sender.progress_timeout = Duration::from_millis(100);
    setup.sender.streams = 1;
    setup.sender.window_bytes = usize::MAX;
    let pair: Pair = setup.start().await;
    let address = pair.address;
    tokio::spawn(async move {
        let (mut client, _) = listener.accept().await.unwrap();
        let mut server = tokio::net::TcpStream::connect(address).await.unwrap();
        let mut hello = vec![0; 4096];
        // Hello and attach go through, with their answers; what follows stays in the socket.
        for _ in 0..2 {
            use tokio::io::{AsyncReadExt, AsyncWriteExt};
            let n = client.read(&mut hello).await.unwrap();
            server.write_all(&hello[..n]).await.unwrap();
            let n = server.read(&mut hello).await.unwrap();
            client.write_all(&hello[..n]).await.unwrap();
        }
        std::future::pending::<()>().await;
    });
    let slots: Vec<u32> = (0..8).collect();
    let landing = pair.reserve(&slots);
    let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(pair.holds.take()))).await.unwrap();
    for plane in 0..8 {
        push.queue().send(plane, pair.cells(plane, &slots)).unwrap();
    }
    assert_eq!(soon(push.commit(Bytes::new())).await.err(), Some(PushError::Stalled));
    assert_eq!(pair.holds.alive(), 1, "only the landing's");
    drop(landing);
    assert_eq!(pair.holds.alive(), 0);
}
