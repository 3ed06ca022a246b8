//! Over real verbs into and out of memory of a device's own, which is not the region's. The devices here are mappings beside the
//! regions, registered by address as with peer memory, so that everything runs but the bus between card and GPU.
//! They need an RDMA device: `make test-rdma`.
#![allow(clippy::unwrap_used)]

mod pair;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use kv_transport::{
    DeviceMemory, Exposed, Fabric, FabricConfig, FabricError, GpuDirect, PeerMemory, PushError, Refusal,
    Region,
};
use memmap2::{MmapOptions, MmapRaw};
use pair::{Pair, Setup, soon, until};

const PLANES: u32 = 8;
const SLOTS: u32 = 64;
const CELL: u32 = 16 << 10;
const BYTES: usize = PLANES as usize * SLOTS as usize * CELL as usize;

/// A device: memory, and what can be wrong with it.
struct Twin {
    memory: MmapRaw,
    /// What a card is shown instead, where it does not reach the memory.
    elsewhere: Option<MmapRaw>,
    peermem: Result<(), String>,
    /// Whether there is a file that passes for a dmabuf.
    has_file: bool,
    /// Cells that are damaged before they are looked at.
    damages: AtomicUsize,
    /// Calls that still succeed.
    works: AtomicUsize,
}

impl Twin {
    fn plain() -> Self {
        Self {
            memory: MmapOptions::new().len(BYTES).map_anon().unwrap().into(),
            elsewhere: None,
            peermem: Ok(()),
            has_file: false,
            damages: AtomicUsize::new(0),
            works: AtomicUsize::new(usize::MAX),
        }
    }

    fn new() -> Arc<Self> {
        Arc::new(Self::plain())
    }

    fn out_of_reach() -> Arc<Self> {
        let elsewhere = MmapOptions::new().len(BYTES).map_anon().unwrap().into();
        Arc::new(Self { elsewhere: Some(elsewhere), ..Self::plain() })
    }

    fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= BYTES);
        let mut bytes = vec![0; len];
        // SAFETY: inside the mapping; a card may write meanwhile, and what is read is compared.
        unsafe { self.memory.as_ptr().add(at).copy_to(bytes.as_mut_ptr(), len) };
        bytes
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= BYTES);
        // SAFETY: inside the mapping; nobody holds references into it.
        unsafe { self.memory.as_mut_ptr().add(at).copy_from(bytes.as_ptr(), bytes.len()) };
    }

    fn holds_only(&self, byte: u8) -> bool {
        self.read(0, BYTES).iter().all(|b| *b == byte)
    }
}

fn take(count: &AtomicUsize) -> bool {
    count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
}

impl DeviceMemory for Twin {
    fn file(&self) -> Arc<OwnedFd> {
        unreachable!("nothing is lent here")
    }

    fn open(&self, _: OwnedFd, _: usize) -> io::Result<Arc<dyn PeerMemory>> {
        unreachable!("nothing is borrowed here")
    }

    fn expose(&self) -> io::Result<Exposed> {
        let file = || rustix::fs::memfd_create(c"no dmabuf", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        Ok(Exposed {
            address: self.elsewhere.as_ref().unwrap_or(&self.memory).as_ptr() as u64,
            dmabuf: if self.has_file { Ok(file()) } else { Err("this device makes none".into()) },
            peermem: self.peermem.clone(),
        })
    }

    fn sums(&self, cells: &[usize], cell_bytes: usize) -> io::Result<Vec<u32>> {
        if !take(&self.works) {
            return Err(io::Error::other("the device is gone"));
        }
        let sum = |at: &usize| {
            if take(&self.damages) {
                self.write(*at, &[!self.read(*at, 1)[0]]);
            }
            crc32c::crc32c(&self.read(*at, cell_bytes))
        };
        Ok(cells.iter().map(sum).collect())
    }
}

/// A pair of which some sides are on devices; the sender's holds what its region does.
async fn on_devices(devices: [Option<&Arc<Twin>>; 2]) -> Pair {
    let known = devices.map(|twin| twin.map(|twin| Arc::clone(twin) as Arc<dyn DeviceMemory>));
    let mut setup = Setup { rdma: (true, true), devices: known, ..Setup::new(PLANES, SLOTS.into(), CELL) };
    setup.sender.rdma_retry = Duration::from_millis(300);
    setup.sender.lend = false;
    setup.sender.frame_bytes = 8 * CELL as usize;
    let pair = setup.start().await;
    if let Some(twin) = devices[0] {
        let mut bytes = vec![0; BYTES];
        pair.source.copy_out(0, &mut bytes).unwrap();
        twin.write(0, &bytes);
    }
    pair
}

/// Every cell lies where the landing says, as it was at its source.
fn assert_landed(pair: &Pair, twin: &Twin, slots: &[u32], on_device: &[bool]) {
    for plane in 0..PLANES {
        for (at, &slot) in slots.iter().enumerate() {
            let want = Pair::cell(&pair.source, &pair.grid, plane, slot);
            let there = twin.read(pair.grid.cell(plane, slot).unwrap().start, CELL as usize);
            let here = Pair::cell(&pair.target, &pair.grid, plane, slot);
            let is_there = on_device[plane as usize * slots.len() + at];
            assert!(want == if is_there { there } else { here }, "plane {plane}, slot {slot}");
        }
    }
}

/// Pushes everything in those slots: by which way it came, and what landed on the device.
async fn push(pair: &Pair, slots: &[u32]) -> (&'static str, Vec<bool>) {
    let mut landing = pair.reserve(slots);
    let push = pair.push_all(landing.ticket().clone(), slots);
    let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
    report.unwrap();
    let landed = landed.unwrap();
    (landed.transport, landed.on_device.clone())
}

fn all(there: bool, slots: &[u32]) -> Vec<bool> {
    vec![there; PLANES as usize * slots.len()]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn cells_go_from_device_to_device_and_touch_no_region() {
    let (from, to) = (Twin::new(), Twin::new());
    let pair = on_devices([Some(&from), Some(&to)]).await;
    let slots = [3, 1, 9, 8, 63];
    let cells: Vec<_> = (0..PLANES).map(|plane| pair.cells(plane, &slots)).collect();
    // The sender's host side holds something else.
    let mut whole = vec![0; BYTES];
    pair.source.copy_out(0, &mut whole).unwrap();
    pair.source.copy_in(0, &vec![0xEE; BYTES]).unwrap();
    for _ in 0..2 {
        let mut landing = pair.reserve(&slots);
        let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(()))).await.unwrap();
        for (plane, cells) in (0..).zip(&cells) {
            soon(push.cells(plane, cells)).await.unwrap();
        }
        assert_eq!(soon(push.commit(Bytes::new())).await.unwrap().transport, "rdma");
        let landed = soon(landing.committed()).await.unwrap();
        assert_eq!((landed.transport, &landed.on_device), ("rdma", &all(true, &slots)));
    }
    pair.source.copy_in(0, &whole).unwrap();
    assert_landed(&pair, &to, &slots, &all(true, &slots));
    let mut region = vec![1; BYTES];
    pair.target.copy_out(0, &mut region).unwrap();
    assert!(region.iter().all(|byte| *byte == 0), "a cell went into the host side");
    assert_eq!(pair.receiver.stats().rdma_bytes_total, 2 * u64::from(PLANES * CELL) * slots.len() as u64);
    pair.assert_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn either_side_alone_may_be_on_a_device() {
    let slots: Vec<u32> = (0..SLOTS).collect();
    let twin = Twin::new();
    let pair = on_devices([None, Some(&twin)]).await;
    assert_eq!(push(&pair, &slots).await, ("rdma", all(true, &slots)));
    assert_landed(&pair, &twin, &slots, &all(true, &slots));
    let pair = on_devices([Some(&twin), None]).await;
    assert_eq!(push(&pair, &slots).await, ("rdma", all(false, &slots)));
    pair.assert_landed(&slots, &slots);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_cell_that_is_damaged_on_the_device_is_sent_again() {
    let (from, to) = (Twin::new(), Twin::new());
    let pair = on_devices([Some(&from), Some(&to)]).await;
    let slots: Vec<u32> = (0..SLOTS).collect();
    assert_eq!(push(&pair, &slots).await, ("rdma", all(true, &slots)));
    to.write(0, &vec![0; BYTES]);
    to.damages.store(3, Ordering::SeqCst);
    assert_eq!(push(&pair, &slots).await, ("rdma", all(true, &slots)));
    assert_landed(&pair, &to, &slots, &all(true, &slots));
    let stats = pair.receiver.stats();
    assert_eq!((stats.checksum_failures_total, stats.queue_pairs_lost_total), (3, 0));
}

async fn breaks(by_sender: bool) {
    let (from, to) = (Twin::new(), Twin::new());
    let pair = on_devices([Some(&from), Some(&to)]).await;
    let slots: Vec<u32> = (0..SLOTS).collect();
    let mut landing = pair.reserve(&slots);
    let open = soon(pair.sender.open(landing.ticket().clone(), Arc::new(()))).await.unwrap();
    soon(open.cells(0, &pair.cells(0, &slots))).await.unwrap();
    soon(open.settled()).await.unwrap();
    if by_sender {
        pair.sender.break_queue_pairs()
    } else {
        pair.receiver.break_queue_pairs()
    }
    for plane in 1..PLANES {
        soon(open.cells(plane, &pair.cells(plane, &slots))).await.unwrap();
    }
    until("the queue pair is lost", || pair.sender.stats().fallbacks_total.iter().any(|(_, n)| *n > 0)).await;
    soon(open.commit(Bytes::new())).await.unwrap();
    let landed = soon(landing.committed()).await.unwrap();
    assert_landed(&pair, &to, &slots, &landed.on_device);
    let there = landed.on_device.iter().filter(|there| **there).count();
    let by_rdma = pair.receiver.stats().rdma_bytes_total / u64::from(CELL);
    assert_eq!(there as u64, by_rdma, "what came by RDMA is on the device, the rest is not");
    assert!(there >= SLOTS as usize && pair.receiver.stats().duplicate_cells_total == 0);
    drop(landed);
    until("RDMA is back", || pair.sender.stats().rdma_peers == 1).await;
    assert_eq!(push(&pair, &slots).await, ("rdma", all(true, &slots)));
    pair.assert_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_break_at_the_sender_leaves_each_cell_marked_where_it_is() {
    breaks(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_break_at_the_receiver_leaves_each_cell_marked_where_it_is() {
    breaks(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn no_byte_lands_on_the_device_in_a_block_that_was_handed_out_again() {
    let (from, to) = (Twin::new(), Twin::new());
    let pair = on_devices([Some(&from), Some(&to)]).await;
    let slots: Vec<u32> = (0..SLOTS).collect();
    let mut in_flight = 0;
    for round in 0..10_u8 {
        let landing = pair.reserve(&slots);
        let push = soon(pair.sender.open(landing.ticket().clone(), Arc::new(()))).await.unwrap();
        let queue = push.queue();
        for plane in 0..PLANES {
            queue.send(plane, pair.cells(plane, &slots)).unwrap();
        }
        let goal = pair.receiver.stats().bytes_total + u64::from(round % 4) * (BYTES as u64 / 8);
        until("some of it landed", || pair.receiver.stats().bytes_total >= goal).await;
        soon(landing.revoke().released()).await;
        to.write(0, &vec![round + 1; BYTES]);
        in_flight += usize::from(pair.receiver.stats().bytes_total < u64::from(round + 1) * BYTES as u64);
        assert!(matches!(soon(push.failed()).await, PushError::Refused(Refusal::Revoked)));
        drop(push);
        pair.assert_quiet().await;
        assert!(to.holds_only(round + 1), "round {round}: a byte landed after the release");
    }
    assert!(in_flight > 0, "every transfer was complete before its revoke");
    assert_eq!(pair.receiver.stats().queue_pairs_lost_total, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_card_that_does_not_reach_the_device_costs_queue_pairs_and_no_transfer() {
    let slots: Vec<u32> = (0..SLOTS).collect();
    for receives in [false, true] {
        let (twin, good) = (Twin::out_of_reach(), Twin::new());
        let pair =
            on_devices(if receives { [Some(&good), Some(&twin)] } else { [Some(&twin), Some(&good)] }).await;
        let device = if receives { &twin } else { &good };
        // A receiver whose first cells are all wrong cannot know whose card is to blame, and blames its own.
        let lost = if receives { 1 } else { 2 };
        for _ in 0..lost {
            let (way, on_device) = push(&pair, &slots).await;
            assert!(way.ends_with("tcp"), "{way}");
            assert_landed(&pair, device, &slots, &on_device);
            until("RDMA is back", || pair.sender.stats().rdma_peers == 1).await;
        }
        let (way, on_device) = push(&pair, &slots).await;
        assert_eq!(way, "rdma", "through the host side of the one that fails");
        assert_landed(&pair, device, &slots, &on_device);
        assert_eq!(pair.sender.stats().queue_pairs_total, lost + 1);
        pair.assert_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: make test-rdma"]
async fn a_device_that_fails_in_mid_push_leaves_the_rest_to_host_memory() {
    let (from, to) = (Twin::new(), Twin::new());
    let pair = on_devices([Some(&from), Some(&to)]).await;
    to.works.store(3, Ordering::SeqCst);
    let slots: Vec<u32> = (0..SLOTS).collect();
    let (way, on_device) = push(&pair, &slots).await;
    assert_eq!(way, "rdma+tcp");
    assert_eq!(on_device.iter().filter(|there| **there).count(), 3 * 8, "three frames of eight cells");
    assert_landed(&pair, &to, &slots, &on_device);
    until("RDMA is back", || pair.sender.stats().rdma_peers == 1).await;
    assert_eq!(push(&pair, &slots).await, ("rdma", all(false, &slots)));
    pair.assert_landed(&slots, &slots);
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn what_cannot_be_registered_is_named_and_the_next_way_taken() {
    let open = |twin: Twin, gpudirect| {
        let region = Region::zeroed(BYTES).on_device(Arc::new(twin));
        Fabric::open(&FabricConfig { gpudirect, ..FabricConfig::default() }, &region)
    };
    let closed = || Err("its module is not loaded".to_owned());
    // The kernel's soft-RoCE takes no dmabuf.
    let fabric = open(Twin { has_file: true, ..Twin::plain() }, GpuDirect::Require).unwrap();
    assert_eq!(fabric.direct(), 1);
    assert!(fabric.describe().ends_with("GPUDirect by peermem"), "{}", fabric.describe());

    let fabric = open(Twin { peermem: closed(), has_file: true, ..Twin::plain() }, GpuDirect::Auto).unwrap();
    let text = fabric.describe();
    assert_eq!(fabric.direct(), 0);
    assert!(text.contains("dmabuf: the card or its driver refuses it: "), "{text}");
    assert!(text.contains("its module is not loaded"), "{text}");

    let error = open(Twin { peermem: closed(), ..Twin::plain() }, GpuDirect::Require).unwrap_err();
    assert!(matches!(error, FabricError::GpuDirect { .. }), "{error}");
    assert!(error.to_string().contains("this device makes none"), "{error}");

    let fabric = open(Twin::plain(), GpuDirect::Off).unwrap();
    assert!(fabric.direct() == 0 && !fabric.describe().contains("memory"), "{}", fabric.describe());
    let require = FabricConfig { gpudirect: GpuDirect::Require, ..FabricConfig::default() };
    let error = Fabric::open(&require, &Region::zeroed(BYTES)).unwrap_err();
    assert!(error.to_string().contains("on no device"), "{error}");
}
