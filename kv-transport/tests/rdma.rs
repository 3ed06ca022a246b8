//! Over real verbs: the same transfers, by queue pairs and memory windows of a soft-RoCE device or a network card.
//! They need one, so they are run by name: `make test-rdma` brings its own kernel with such devices.
#![allow(clippy::unwrap_used)]

mod pair;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use kv_transport::verbs::{GidKind, PortInfo, ports};
use kv_transport::{Fallback, LandingError, PushError, Refusal, Sender, SenderConfig};
use pair::{Pair, Setup, fabric, identity, soon, until};

fn rdma(planes: u32, slots: u64, cell_bytes: u32) -> Setup {
    Setup { rdma: (true, true), ..Setup::new(planes, slots, cell_bytes) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn everything_arrives_and_the_queue_pair_stays() {
    let pair = rdma(4, 64, 16 << 10).start().await;
    let (src, dst): (Vec<u32>, Vec<u32>) = ([3, 1, 9, 8, 10, 11].into(), [15, 0, 7, 2, 3, 4].into());
    for round in 1..=3 {
        let mut landing = pair.reserve(&dst);
        let push = pair.push_all(landing.ticket().clone(), &src);
        let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
        let (report, landed) = (report.unwrap(), landed.unwrap());
        pair.assert_landed(&src, &dst);
        assert_eq!((report.transport, landed.transport), ("rdma", "rdma"));
        assert_eq!((report.refetched, landed.refetched), (0, 0));
        assert_eq!(&landed.payload[..], b"first token");
        drop(landed);
        pair.assert_quiet().await;
        let (sent, got) = (pair.sender.stats(), pair.receiver.stats());
        assert_eq!((sent.queue_pairs_total, sent.rdma_peers), (1, 1), "kept warm");
        assert_eq!((sent.rdma_bytes_total, got.rdma_bytes_total), (got.bytes_total, got.bytes_total));
        assert_eq!(got.bytes_total, round * 4 * 6 * (16 << 10));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn several_peers_push_at_once() {
    let pair = rdma(3, 64, 8 << 10).start().await;
    let region = pair.source.clone();
    let slots = |peer: u32| (0..12).map(|slot| peer * 12 + slot).collect::<Vec<u32>>();
    let mut landings: Vec<_> = (0..4).map(|peer| pair.reserve(&slots(peer))).collect();
    let pushes = landings.iter().enumerate().map(|(peer, landing)| {
        let config = SenderConfig { fabric: Some(fabric(&region)), ..SenderConfig::default() };
        let sender = Sender::new(identity(&format!("p{peer}"), 1), region.clone(), pair.grid, config);
        let (ticket, src) = (landing.ticket().clone(), slots(peer as u32));
        let cells: Vec<_> = (0..3).map(|plane| pair.cells(plane, &src)).collect();
        async move {
            let push = sender.open(ticket, Arc::new(())).await?;
            for (plane, cells) in cells.iter().enumerate() {
                push.cells(plane as u32, cells).await?;
            }
            push.commit(Bytes::new()).await
        }
    });
    for report in soon(futures::future::join_all(pushes)).await {
        assert_eq!(report.unwrap().transport, "rdma");
    }
    for landing in &mut landings {
        soon(landing.committed()).await.unwrap();
    }
    for peer in 0..4 {
        pair.assert_landed(&slots(peer), &slots(peer));
    }
    assert_eq!(pair.receiver.stats().queue_pairs_total, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_cell_that_is_not_what_its_producer_said_is_fetched_again_and_never_accepted() {
    let pair = rdma(1, 8, 4096).start().await;
    let mut landing = pair.reserve(&[0, 1]);
    let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(()))).await.unwrap();
    let mut cells = pair.cells(0, &[4, 5]);
    cells[1].checksum ^= 1;
    soon(push.cells(0, &cells)).await.unwrap();
    assert_eq!(soon(push.commit(Bytes::new())).await.unwrap_err(), PushError::Corrupt);
    assert_eq!(soon(landing.committed()).await.unwrap_err(), LandingError::Corrupt);
    assert_eq!(pair.receiver.stats().checksum_failures_total, 4);
    pair.assert_quiet().await;
}

async fn breaks_and_returns(by_sender: bool) {
    let mut setup = rdma(8, 64, 64 << 10);
    setup.sender.rdma_retry = Duration::from_millis(300);
    let pair = setup.start().await;
    let slots: Vec<u32> = (0..64).collect();
    let mut landing = pair.reserve(&slots);
    let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(()))).await.unwrap();
    soon(push.cells(0, &pair.cells(0, &slots))).await.unwrap();
    soon(push.settled()).await.unwrap();
    assert_eq!(pair.receiver.stats().rdma_bytes_total, 64 * (64 << 10));
    for plane in 1..4 {
        soon(push.cells(plane, &pair.cells(plane, &slots))).await.unwrap();
    }
    if by_sender {
        pair.sender.break_queue_pairs()
    } else {
        pair.receiver.break_queue_pairs()
    }
    for plane in 4..8 {
        soon(push.cells(plane, &pair.cells(plane, &slots))).await.unwrap();
    }
    until("the queue pair is lost", || pair.sender.stats().fallbacks_total.iter().any(|(_, n)| *n > 0)).await;
    let report = soon(push.commit(Bytes::new())).await.unwrap();
    let landed = soon(landing.committed()).await.unwrap();
    pair.assert_landed(&slots, &slots);
    let got = pair.receiver.stats();
    assert_eq!((got.duplicate_cells_total, got.discarded_bytes_total), (0, 0), "only what was not verified");
    assert_eq!(got.bytes_total, 8 * 64 * (64 << 10));
    // All may have been verified before the break was noticed.
    let both = if got.rdma_bytes_total < got.bytes_total { "rdma+tcp" } else { "rdma" };
    assert_eq!((report.transport, landed.transport), (both, both));
    drop(landed);

    until("RDMA is back", || pair.sender.stats().rdma_peers == 1).await;
    let mut landing = pair.reserve(&slots);
    let push = pair.push_all(landing.ticket().clone(), &slots);
    let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
    assert_eq!((report.unwrap().transport, landed.unwrap().transport), ("rdma", "rdma"));
    pair.assert_landed(&slots, &slots);
    pair.assert_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_queue_pair_that_breaks_at_the_sender_moves_the_same_transfer_to_tcp_and_rdma_returns() {
    breaks_and_returns(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_queue_pair_that_breaks_at_the_receiver_moves_the_same_transfer_to_tcp_and_rdma_returns() {
    breaks_and_returns(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn no_byte_lands_in_a_block_that_was_handed_out_again() {
    let pair = rdma(8, 64, 64 << 10).start().await;
    let slots: Vec<u32> = (0..64).collect();
    let mut in_flight = 0;
    for round in 0..10_u8 {
        let landing = pair.reserve(&slots);
        let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(()))).await.unwrap();
        let queue = push.queue();
        for plane in 0..8 {
            queue.send(plane, pair.cells(plane, &slots)).unwrap();
        }
        // Somewhere in the middle of what was queued.
        let goal = pair.receiver.stats().bytes_total + u64::from(round % 4) * (3 << 20);
        until("some of it landed", || pair.receiver.stats().bytes_total >= goal).await;
        soon(landing.revoke().released()).await;
        // The blocks belong to somebody else now.
        let all = vec![round + 1; pair.target.len()];
        pair.target.copy_in(0, &all).unwrap();
        let before = pair.receiver.stats();
        in_flight += usize::from(before.bytes_total < u64::from(round + 1) * pair.target.len() as u64);
        assert!(matches!(soon(push.failed()).await, PushError::Refused(Refusal::Revoked)));
        drop(push);
        // Whatever was in flight has gone where it went once the sender reads nothing any more.
        pair.assert_quiet().await;
        let mut now = vec![0; pair.target.len()];
        pair.target.copy_out(0, &mut now).unwrap();
        assert!(now == all, "round {round}: a byte landed after the release");
    }
    assert!(in_flight > 0, "every transfer was complete before its revoke");
    // Revoking cost no queue pair: the sender confirmed that it writes no more before its key was taken back.
    assert_eq!(pair.receiver.stats().queue_pairs_lost_total, 0);
    assert_eq!(pair.sender.stats().queue_pairs_total, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_peer_without_rdma_is_used_over_tcp_with_a_reason() {
    let pair = Setup { rdma: (true, false), ..Setup::new(2, 8, 4096) }.start().await;
    let mut landing = pair.reserve(&[1, 2]);
    let report = soon(pair.push_all(landing.ticket().clone(), &[1, 2])).await.unwrap();
    soon(landing.committed()).await.unwrap();
    assert_eq!(report.transport, "tcp");
    let stats = pair.sender.stats();
    assert!(stats.fallbacks_total.contains(&(Fallback::Refused, 1)), "{stats:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn rdma_that_is_required_is_never_replaced() {
    let mut setup = Setup { rdma: (true, false), ..Setup::new(2, 8, 4096) };
    setup.sender.require_rdma = true;
    let pair = setup.start().await;
    let landing = pair.reserve(&[1]);
    let error = soon(pair.push_all(landing.ticket().clone(), &[1])).await.unwrap_err();
    assert_eq!(error, PushError::Downgrade { reason: "no RDMA here".into() });
    drop(landing);

    let mut setup = Setup { rdma: (false, true), ..Setup::new(2, 8, 4096) };
    setup.receiver.require_rdma = true;
    let pair = setup.start().await;
    let landing = pair.reserve(&[1]);
    let error = soon(pair.push_all(landing.ticket().clone(), &[1])).await.unwrap_err();
    assert_eq!(error, PushError::Refused(Refusal::Downgrade));
    assert_eq!(pair.receiver.stats().bytes_total, 0);
    assert!(Pair::cell(&pair.target, &pair.grid, 0, 1).iter().all(|b| *b == 0));
}

/// A second soft-RoCE device, on an interface and in a network of its own.
async fn second_device() {
    for command in [
        "ip link add d1 type dummy",
        "ip link set d1 mtu 4200 up",
        "ip addr add 10.78.0.1/24 dev d1",
        "rdma link add rxe2 type rxe netdev d1",
    ] {
        let mut words = command.split(' ');
        let status = std::process::Command::new(words.next().unwrap()).args(words).status().unwrap();
        assert!(status.success(), "{command}");
    }
    let usable = |port: &PortInfo| {
        port.device == "rxe2" && port.active && port.gids.iter().any(|gid| gid.kind == GidKind::RoceV2Ipv4)
    };
    until("the device has its address", || ports().unwrap().iter().any(usable)).await;
}

/// Packets that a soft-RoCE device has sent.
fn packets(device: &str) -> u64 {
    let file = format!("/sys/class/infiniband/{device}/ports/1/hw_counters/sent_pkts");
    std::fs::read_to_string(file).unwrap().trim().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn cells_are_spread_over_two_rails_and_one_that_breaks_leaves_them_to_the_other() {
    second_device().await;
    let mut setup = rdma(8, 64, 64 << 10);
    setup.sender.rdma_retry = Duration::from_millis(300);
    let pair = setup.start().await;
    let slots: Vec<u32> = (0..64).collect();
    let whole = async || {
        let mut landing = pair.reserve(&slots);
        let push = pair.push_all(landing.ticket().clone(), &slots);
        let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
        pair.assert_landed(&slots, &slots);
        pair.target.copy_in(0, &vec![0; pair.target.len()]).unwrap();
        (report.unwrap().transport, landed.unwrap().transport)
    };
    assert_eq!(whole().await, ("rdma", "rdma"));
    until("both rails are up", || pair.sender.stats().queue_pairs_total == 2).await;
    let before = [packets("rxe0"), packets("rxe2")];
    assert_eq!(whole().await, ("rdma", "rdma"));
    // 32 MiB in packets of 4 KiB: each rail took a good part of them.
    for (device, before) in ["rxe0", "rxe2"].into_iter().zip(before) {
        assert!(packets(device) - before > 1000, "{device} sent {} packets", packets(device) - before);
    }

    // Each in turn breaks in the middle of a transfer, which goes on by RDMA.
    for rail in 0..2 {
        let lost = pair.sender.stats().fallbacks_total.iter().map(|(_, n)| n).sum::<u64>();
        let mut landing = pair.reserve(&slots);
        let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(()))).await.unwrap();
        for plane in 0..8 {
            if plane == 4 {
                pair.sender.break_rails(1 << rail);
            }
            soon(push.cells(plane, &pair.cells(plane, &slots))).await.unwrap();
        }
        let report = soon(push.commit(Bytes::new())).await.unwrap();
        assert_eq!((report.transport, soon(landing.committed()).await.unwrap().transport), ("rdma", "rdma"));
        pair.assert_landed(&slots, &slots);
        pair.target.copy_in(0, &vec![0; pair.target.len()]).unwrap();
        let now = || pair.sender.stats().fallbacks_total.iter().map(|(_, n)| n).sum::<u64>();
        until("the rail is lost", || now() > lost).await;
        until("and back", || pair.sender.stats().queue_pairs_total == 3 + rail).await;
    }

    // Both at once: TCP.
    let mut landing = pair.reserve(&slots);
    let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(()))).await.unwrap();
    soon(push.cells(0, &pair.cells(0, &slots))).await.unwrap();
    pair.sender.break_queue_pairs();
    for plane in 1..8 {
        soon(push.cells(plane, &pair.cells(plane, &slots))).await.unwrap();
    }
    soon(push.commit(Bytes::new())).await.unwrap();
    soon(landing.committed()).await.unwrap();
    pair.assert_landed(&slots, &slots);
    pair.assert_quiet().await;
}

/// This test binary again, as another process that plays one side.
fn child(role: &str, vars: &[(&str, String)]) -> std::process::Child {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", role, "--nocapture"]).stdout(std::process::Stdio::piped());
    command.envs(vars.iter().map(|(k, v)| (*k, v))).spawn().unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap()).collect()
}

const PLANES: u32 = 8;
// A few: in the guest a page that is touched first costs a tenth of a millisecond or two, and each process touches all of them thrice.
const SLOTS: u32 = 16;

/// Not a test: the sending process of those below. Pushes round and round, until it is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of another test"]
async fn role_sender() {
    let Ok(ticket) = std::env::var("TANDEM_TICKET") else { return };
    let pair = rdma(PLANES, SLOTS.into(), 64 << 10).start().await;
    let slots: Vec<u32> = (0..SLOTS).collect();
    let push = soon(pair.sender.open(unhex(&ticket).into(), Arc::new(()))).await.unwrap();
    for plane in 0..PLANES - 1 {
        push.cells(plane, &pair.cells(plane, &slots)).await.unwrap();
    }
    std::future::pending::<()>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_sender_that_is_killed_in_mid_push_frees_the_memory_for_good() {
    let pair = rdma(PLANES, SLOTS.into(), 64 << 10).start().await;
    let slots: Vec<u32> = (0..SLOTS).collect();
    for round in 0..3_u8 {
        let mut landing = pair.reserve(&slots);
        let before = pair.receiver.stats().rdma_bytes_total;
        let mut sender = child("role_sender", &[("TANDEM_TICKET", hex(landing.ticket()))]);
        until("cells arrive", || pair.receiver.stats().rdma_bytes_total > before + (1 << 20)).await;
        sender.kill().unwrap();
        assert_eq!(soon(landing.committed()).await.unwrap_err(), LandingError::PeerGone);
        pair.assert_quiet().await;
        let all = vec![round + 1; pair.target.len()];
        pair.target.copy_in(0, &all).unwrap();
        sender.wait().unwrap();
        let mut now = vec![0; pair.target.len()];
        pair.target.copy_out(0, &mut now).unwrap();
        assert!(now == all, "a byte of a dead sender landed after the release");
    }
}

/// Not a test: the receiving process of the one below. Prints its address and a ticket, then lives until killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a part of another test"]
async fn role_receiver() {
    if std::env::var("TANDEM_RECEIVER").is_err() {
        return;
    }
    let pair = rdma(PLANES, SLOTS.into(), 64 << 10).start().await;
    let landing = pair.reserve(&(0..SLOTS).collect::<Vec<u32>>());
    println!("\nticket {}", hex(landing.ticket()));
    std::future::pending::<()>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_receiver_that_is_killed_in_mid_push_fails_the_push_and_frees_its_source() {
    use std::io::BufRead;
    let pair = rdma(PLANES, SLOTS.into(), 64 << 10).start().await;
    let slots: Vec<u32> = (0..SLOTS).collect();
    let mut receiver = child("role_receiver", &[("TANDEM_RECEIVER", "1".into())]);
    let lines = std::io::BufReader::new(receiver.stdout.take().unwrap()).lines();
    let ticket = tokio::task::spawn_blocking(move || {
        lines.map(Result::unwrap).find_map(|line| line.strip_prefix("ticket ").map(unhex)).unwrap()
    });
    let ticket = soon(ticket).await.unwrap();
    let push = soon(pair.sender.open(ticket.into(), Arc::new(pair.holds.take()))).await.unwrap();
    let queue = push.queue();
    for plane in 0..PLANES - 1 {
        queue.send(plane, pair.cells(plane, &slots)).unwrap();
    }
    until("cells go out", || pair.sender.stats().rdma_bytes_total > 1 << 20).await;
    receiver.kill().unwrap();
    let error = soon(push.failed()).await;
    assert!(matches!(error, PushError::PeerGone), "{error:?}");
    drop(push);
    pair.assert_quiet().await;
    receiver.wait().unwrap();
}

/// Not a test: a process that may lock little memory and is not privileged.
#[test]
#[ignore = "a part of another test"]
fn role_small_memlock() {
    if std::env::var("TANDEM_MEMLOCK").is_err() {
        return;
    }
    let region = kv_transport::Region::zeroed(64 << 20);
    let error = kv_transport::Fabric::open(&kv_transport::FabricConfig::default(), &region).unwrap_err();
    println!("\nerror {error}");
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_memlock_limit_that_is_too_small_is_named() {
    use std::os::unix::process::CommandExt;
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "role_small_memlock", "--nocapture"]).env("TANDEM_MEMLOCK", "1");
    let limit = || {
        let limit = libc::rlimit { rlim_cur: 1 << 20, rlim_max: 1 << 20 };
        // SAFETY: plain system calls between fork and exec.
        let failed = unsafe {
            libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) != 0 || libc::setuid(65534) != 0
        };
        if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure makes system calls only.
    let output = unsafe { command.pre_exec(limit) }.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("cannot register 67108864 bytes") && text.contains("memlock"), "{text}");
}
