//! A receiver and a sender on loopback, with known bytes, for every test of the crate.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)] // a test's own parts; each binary uses some

pub mod proxy;
pub mod raw;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_transport::mux::{MuxConfig, split};
use kv_transport::{
    Cell, DeviceMemory, Fabric, FabricConfig, Grid, Identity, Landing, Receiver, ReceiverConfig, Region,
    Reserve, Sender, SenderConfig,
};
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use tokio::net::TcpListener;

/// Holds that are alive.
#[derive(Debug, Clone, Default)]
pub struct Holds(Arc<AtomicUsize>);

/// Stands for the blocks of a pool.
#[derive(Debug)]
pub struct Hold(Arc<AtomicUsize>);

impl Holds {
    pub fn take(&self) -> Hold {
        self.0.fetch_add(1, Ordering::SeqCst);
        Hold(self.0.clone())
    }

    pub fn alive(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

pub fn identity(worker: &str, incarnation: u64) -> Identity {
    Identity { worker: worker.to_owned(), incarnation }
}

/// Waits, without sleeping, until something that other tasks do has happened.
pub async fn until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !happened() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::task::yield_now().await;
        // What is waited for may be done by another process, on the same processor.
        std::thread::yield_now();
    }
}

/// Nothing in these tests may take longer.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("took too long")
}

/// A pair of workers with one grid.
pub struct Pair {
    pub grid: Grid,
    pub receiver: Receiver,
    pub sender: Sender,
    pub source: Region,
    pub target: Region,
    pub address: std::net::SocketAddr,
    pub holds: Holds,
}

pub struct Setup {
    pub grid: Grid,
    pub receiver: ReceiverConfig,
    pub sender: SenderConfig,
    /// What the tickets advertise instead of the receiver's own address.
    pub endpoint: Option<String>,
    /// Which sides have RDMA: sender, receiver.
    pub rdma: (bool, bool),
    /// The sender's region can be lent.
    pub shared: bool,
    /// Where the cells of sender and receiver live, if not in their regions.
    pub devices: [Option<Arc<dyn DeviceMemory>>; 2],
}

/// Memory in a sealed file, as an engine makes it.
pub fn shared_region(bytes: usize) -> Region {
    use rustix::fs::{MemfdFlags, SealFlags};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create(c"test", flags).unwrap();
    rustix::fs::ftruncate(&file, bytes as u64).unwrap();
    // SAFETY: nobody else has the file, and its seals forbid to shrink it.
    let map = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE)
        .unwrap();
    let base = map.as_ptr().cast_mut();
    // SAFETY: the mapping is kept by the region.
    unsafe { Region::from_raw(base, bytes, Arc::new(map)) }.backed_by(Arc::new(file))
}

/// Every RDMA device here, with a region.
pub fn fabric(region: &Region) -> Arc<Fabric> {
    Fabric::open(&FabricConfig::default(), region).unwrap()
}

impl Setup {
    pub fn new(planes: u32, slots: u64, cell_bytes: u32) -> Self {
        let grid = Grid { planes, plane_stride: slots * u64::from(cell_bytes), cell_bytes };
        Self {
            grid,
            receiver: ReceiverConfig::default(),
            sender: SenderConfig::default(),
            endpoint: None,
            rdma: (false, false),
            shared: false,
            devices: [None, None],
        }
    }

    pub async fn start(self) -> Pair {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.start_on(listener)
    }

    pub fn start_on(mut self, listener: TcpListener) -> Pair {
        let grid = self.grid;
        let bytes = (u64::from(grid.planes) * grid.plane_stride) as usize;
        let source = if self.shared { shared_region(bytes) } else { Region::zeroed(bytes) };
        let [from, to] = std::mem::take(&mut self.devices);
        let on = |region: Region, device| match device {
            Some(device) => region.on_device(device),
            None => region,
        };
        let (source, target) = (on(source, from), on(Region::zeroed(bytes), to));
        let mut random = vec![0; bytes];
        StdRng::seed_from_u64(7).fill_bytes(&mut random);
        source.copy_in(0, &random).unwrap();
        let address = listener.local_addr().unwrap();
        self.sender.fabric = self.rdma.0.then(|| fabric(&source));
        self.receiver.fabric = self.rdma.1.then(|| fabric(&target));
        self.receiver.endpoints = vec![self.endpoint.unwrap_or(address.to_string())];
        let receiver = Receiver::new(identity("decode", 1), target.clone(), grid, self.receiver);
        let sender = Sender::new(identity("prefill", 1), source.clone(), grid, self.sender);
        let (kv, rpc) = split(listener, MuxConfig::default());
        let serving = receiver.clone();
        tokio::spawn(async move {
            let _rpc = rpc;
            serving.serve_all(kv).await;
        });
        Pair { grid, receiver, sender, source, target, address, holds: Holds::default() }
    }
}

impl Pair {
    pub fn reserve(&self, slots: &[u32]) -> Landing<Hold> {
        self.reserve_for(slots, Duration::from_secs(20))
    }

    pub fn reserve_for(&self, slots: &[u32], time: Duration) -> Landing<Hold> {
        let deadline = tokio::time::Instant::now().into_std() + time;
        let (slots, meta) = (slots.to_vec(), Bytes::from_static(b"meta"));
        self.receiver
            .reserve(Reserve { slots, meta, attempt: 1, sender: None, deadline, hold: self.holds.take() })
            .unwrap()
    }

    /// The cells of a plane, from source slot `src[i]` to the ticket's slot `i`.
    pub fn cells(&self, plane: u32, src: &[u32]) -> Vec<Cell> {
        let cell = |(index, &src_slot): (usize, &u32)| {
            let place = self.grid.cell(plane, src_slot).unwrap();
            Cell { index: index as u32, src_slot, checksum: self.source.checksum(0, place).unwrap() }
        };
        src.iter().enumerate().map(cell).collect()
    }

    pub fn cell(region: &Region, grid: &Grid, plane: u32, slot: u32) -> Vec<u8> {
        let place = grid.cell(plane, slot).unwrap();
        let mut bytes = vec![0; place.len()];
        region.copy_out(place.start, &mut bytes).unwrap();
        bytes
    }

    /// Every cell of the target equals its source.
    pub fn assert_landed(&self, src: &[u32], dst: &[u32]) {
        for plane in 0..self.grid.planes {
            for (&src, &dst) in src.iter().zip(dst) {
                let (want, got) = (
                    Self::cell(&self.source, &self.grid, plane, src),
                    Self::cell(&self.target, &self.grid, plane, dst),
                );
                assert!(want == got, "plane {plane}, {src} to {dst}");
            }
        }
    }

    /// Pushes all planes and commits.
    pub async fn push_all(
        &self,
        ticket: Bytes,
        src: &[u32],
    ) -> Result<kv_transport::PushReport, kv_transport::PushError> {
        let push = self.sender.open(ticket, Arc::new(self.holds.take())).await?;
        for plane in 0..self.grid.planes {
            push.cells(plane, &self.cells(plane, src)).await?;
        }
        push.commit(Bytes::from_static(b"first token")).await
    }

    /// Pushes a cell into a landing that was revoked meanwhile, until the push has failed.
    pub async fn push_too_late(&self, src: u32, dst: u32) {
        let landing = self.reserve(&[dst]);
        let push =
            soon(self.sender.open(landing.ticket().clone(), Arc::new(self.holds.take()))).await.unwrap();
        soon(landing.revoke().released()).await;
        let _ = push.queue().send(0, self.cells(0, &[src]));
        soon(push.failed()).await;
        drop(push);
        self.assert_quiet().await;
    }

    /// Nothing is left behind on either side.
    pub async fn assert_quiet(&self) {
        until("everything released", || {
            let stats = self.receiver.stats();
            self.holds.alive() == 0
                && (stats.reserved, stats.receiving, stats.revoking) == (0, 0, 0)
                && self.sender.stats().pushes == 0
        })
        .await;
    }
}
