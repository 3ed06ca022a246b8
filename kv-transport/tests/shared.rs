//! Between two processes of one host: cells are copied from memory that the sender lends.
#![allow(clippy::unwrap_used)]

mod pair;

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::Arc;

use bytes::Bytes;
use kv_transport::wire::{CellDescriptor, Header, Kind, LENT_CELL_BYTES, Lend, LentCell};
use kv_transport::{PushError, ReceiverConfig, SenderConfig};
use pair::raw::{Raw, cell};
use pair::{Pair, Setup, soon};

async fn lending(planes: u32, slots: u64, cell_bytes: u32) -> Pair {
    Setup { shared: true, ..Setup::new(planes, slots, cell_bytes) }.start().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cells_are_copied_and_nothing_is_sent() {
    for cell_bytes in [512, 4096, 300 << 10] {
        let pair = lending(4, 16, cell_bytes).await;
        let (src, dst) = ([3, 1, 9, 8], [15, 0, 7, 2]);
        for round in 1..=2 {
            let mut landing = pair.reserve(&dst);
            let push = pair.push_all(landing.ticket().clone(), &src);
            let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
            let (report, landed) = (report.unwrap(), landed.unwrap());
            pair.assert_landed(&src, &dst);
            assert_eq!((report.transport, landed.transport), ("shm", "shm"));
            assert_eq!((report.cells, landed.cells), (16, 16));
            drop((landed, landing));
            pair.assert_quiet().await;
            let bytes = round * 16 * u64::from(cell_bytes);
            let (received, sent) = (pair.receiver.stats(), pair.sender.stats());
            assert_eq!((received.bytes_total, received.shm_bytes_total), (bytes, bytes));
            assert_eq!((sent.bytes_total, sent.shm_bytes_total, sent.shm_peers), (bytes, bytes, 1));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_does_not_share_gets_it_over_tcp() {
    let receiver = Setup {
        shared: true,
        receiver: ReceiverConfig { borrow: false, ..ReceiverConfig::default() },
        ..Setup::new(2, 8, 4096)
    };
    let sender = Setup {
        shared: true,
        sender: SenderConfig { lend: false, ..SenderConfig::default() },
        ..Setup::new(2, 8, 4096)
    };
    for setup in [receiver, sender] {
        let pair = setup.start().await;
        let mut landing = pair.reserve(&[5, 6]);
        let push = pair.push_all(landing.ticket().clone(), &[0, 7]);
        let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
        assert_eq!((report.unwrap().transport, landed.unwrap().transport), ("tcp", "tcp"));
        pair.assert_landed(&[0, 7], &[5, 6]);
        assert_eq!(pair.sender.stats().shm_peers, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lent_bytes_that_differ_from_their_checksum_are_not_accepted() {
    let pair = lending(1, 8, 4096).await;
    let landing = pair.reserve(&[0, 1]);
    let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(pair.holds.take()))).await.unwrap();
    let mut cells = pair.cells(0, &[0, 1]);
    cells[1].checksum ^= 1;
    push.cells(0, &cells).await.unwrap();
    assert_eq!(soon(push.failed()).await, PushError::Corrupt);
    assert!(pair.receiver.stats().checksum_failures_total > 1, "fetched again before it gave up");
    drop((push, landing));
    pair.assert_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_copied_once_the_landing_is_over() {
    let pair = lending(1, 8, 4096).await;
    pair.push_too_late(1, 3).await;
    assert!(Pair::cell(&pair.target, &pair.grid, 0, 3).iter().all(|byte| *byte == 0));
}

/// A lender of our own making. `answer` yields the file for a shown key.
fn lender(name: &str, file: Option<std::os::fd::OwnedFd>) -> std::thread::JoinHandle<Vec<u8>> {
    use std::io::Read;
    use std::os::fd::AsFd;
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut key = vec![0; 16];
        stream.read_exact(&mut key).unwrap();
        if let Some(file) = file {
            let files = [file.as_fd()];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
            ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(&files));
            let bytes = [std::io::IoSlice::new(&[1])];
            rustix::net::sendmsg(&stream, &bytes, &mut ancillary, rustix::net::SendFlags::empty()).unwrap();
        }
        key
    })
}

/// A file of that size, sealed or not.
fn file(bytes: u64, is_sealed: bool) -> std::os::fd::OwnedFd {
    use rustix::fs::{MemfdFlags, SealFlags};
    let file = rustix::fs::memfd_create(c"lent", MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    if is_sealed {
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    }
    file
}

async fn lend(raw: &mut Raw, lend: &Lend) -> u64 {
    raw.say(Header::bare(Kind::Lend, 0, 0, 0), &lend.encode().unwrap(), &[]).await;
    let answer = raw.hear().await;
    assert_eq!(answer.kind, Kind::Borrowed);
    answer.arg
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_mapped_safely_is_not_borrowed() {
    let pair = Setup::new(1, 4, 512).start().await;
    let mut raw = Raw::connect(&pair).await;
    let name = |what: &str| format!("tandem-test-{what}-{}", std::process::id());
    let offer = |what: &str, bytes| Lend { key: [7; 16], bytes, name: name(what) };
    assert_eq!(lend(&mut raw, &offer("nobody", 4096)).await, 1, "no such socket");
    for (what, given, promised) in [
        ("no-file", None, 4096),
        ("unsealed", Some(file(4096, false)), 4096),
        ("short", Some(file(4096, true)), 8192),
        ("empty", Some(file(4096, true)), 0),
        ("absurd", Some(file(4096, true)), u64::MAX),
    ] {
        let serving = lender(&name(what), given);
        assert_eq!(lend(&mut raw, &offer(what, promised)).await, 1, "{what}");
        assert_eq!(serving.join().unwrap(), [7; 16], "the key is shown");
    }
    let serving = lender(&name("good"), Some(file(4096, true)));
    assert_eq!(lend(&mut raw, &offer("good", 4096)).await, 0, "and a good one still is");
    serving.join().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_frames_about_lent_memory_end_the_connection_and_nothing_else() {
    let pair = Setup::new(1, 4, 512).start().await;
    let landing = pair.reserve(&[2]);
    let lent = |offset, cells: &[CellDescriptor]| {
        let mut body = Vec::new();
        cells.iter().for_each(|cell| LentCell { cell: *cell, offset }.put(&mut body));
        body
    };
    let zeros = cell(0, 0, &[0; 512]);
    let frame = |transfer| Header { count: 1, ..Header::bare(Kind::Lent, transfer, 1, 0) };

    let (mut raw, transfer) = Raw::attached(&pair, landing.ticket()).await;
    raw.say(frame(transfer), &lent(0, &[zeros]), &[]).await;
    assert!(raw.closed().await, "nothing was lent");
    drop(landing);

    let name = format!("tandem-test-outside-{}", std::process::id());
    for offset in [3585, 4096, u64::MAX, u64::MAX - 511] {
        let landing = pair.reserve(&[2]);
        let serving = lender(&name, Some(file(4096, true)));
        let (mut raw, transfer) = Raw::attached(&pair, landing.ticket()).await;
        let offer = Lend { key: rand::random(), bytes: 4096, name: name.clone() };
        assert_eq!(lend(&mut raw, &offer).await, 0);
        serving.join().unwrap();
        raw.say(frame(transfer), &lent(offset, &[zeros]), &[]).await;
        assert!(raw.closed().await, "offset {offset}");
        drop(landing);
    }

    let landing = pair.reserve(&[2]);
    let mut raw = Raw::connect(&pair).await;
    raw.say(Header::bare(Kind::Lend, 0, 0, 0), b"short", &[]).await;
    assert!(raw.closed().await, "a damaged lend");
    let (mut raw, transfer) = Raw::attached(&pair, landing.ticket()).await;
    raw.say(frame(transfer), &[0; LENT_CELL_BYTES - 1], &[]).await;
    assert!(raw.closed().await, "half a cell");
    drop(landing);
    pair.assert_quiet().await;

    let mut landing = pair.reserve(&[1]);
    soon(pair.push_all(landing.ticket().clone(), &[3])).await.unwrap();
    assert_eq!(soon(landing.committed()).await.unwrap().payload, Bytes::from_static(b"first token"));
}
