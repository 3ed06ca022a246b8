//! Between two devices of one host: cells are copied there, and the regions are only the way for when that fails. The devices
//! here are files of bytes; the engine's tests do the same between GPU pools.
#![allow(clippy::unwrap_used)]

mod pair;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kv_transport::{DeviceMemory, Exposed, PeerMemory, SenderConfig};
use pair::{Pair, Setup, soon};
use parking_lot::Mutex;

const CELL: usize = 4096;
const CELLS: usize = 4 * 16;

/// Bytes in a file, which are not those of the region.
struct Device {
    file: Arc<OwnedFd>,
    /// Copies that still succeed.
    works: AtomicUsize,
    /// Copies that arrive damaged.
    breaks: AtomicUsize,
    lock: Mutex<()>,
}

impl Device {
    fn new() -> Arc<Self> {
        use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
        let file = memfd_create(c"device", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, (CELLS * CELL) as u64).unwrap();
        Arc::new(Self {
            file: Arc::new(file),
            works: AtomicUsize::new(usize::MAX),
            breaks: AtomicUsize::new(0),
            lock: Mutex::default(),
        })
    }

    fn read(&self, at: usize) -> Vec<u8> {
        let mut bytes = vec![0; CELL];
        rustix::io::pread(&self.file, &mut bytes[..], at as u64).unwrap();
        bytes
    }
}

/// What a receiver does: the trait is on a handle, since a mapping keeps its own pool.
struct Handle(Arc<Device>);

impl DeviceMemory for Handle {
    fn file(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0.file)
    }

    fn open(&self, file: OwnedFd, bytes: usize) -> io::Result<Arc<dyn PeerMemory>> {
        assert_eq!(bytes, CELLS * CELL);
        Ok(Arc::new(Peer { file, ours: Arc::clone(&self.0) }))
    }

    fn expose(&self) -> io::Result<Exposed> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sums(&self, cells: &[usize], _: usize) -> io::Result<Vec<u32>> {
        Ok(cells.iter().map(|at| crc32c::crc32c(&self.0.read(*at))).collect())
    }
}

struct Peer {
    file: OwnedFd,
    ours: Arc<Device>,
}

fn take(count: &AtomicUsize) -> bool {
    count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
}

impl PeerMemory for Peer {
    fn copy(&self, cells: &[(usize, usize)], cell_bytes: usize) -> io::Result<Vec<u32>> {
        let _one = self.ours.lock.lock();
        if !take(&self.ours.works) {
            return Err(io::Error::other("the device is gone"));
        }
        let is_broken = take(&self.ours.breaks);
        let mut sums = Vec::new();
        for &(from, to) in cells {
            let mut bytes = vec![0; cell_bytes];
            assert_eq!(rustix::io::pread(&self.file, &mut bytes[..], from as u64)?, cell_bytes);
            bytes[7] ^= u8::from(is_broken);
            rustix::io::pwrite(&self.ours.file, &bytes, to as u64)?;
            sums.push(crc32c::crc32c(&bytes));
        }
        Ok(sums)
    }
}

/// A pair whose cells live on devices, the sender's with the region's bytes.
async fn on_devices(frame_cells: usize) -> (Pair, Arc<Device>) {
    let (from, to) = (Device::new(), Device::new());
    let pair = Setup {
        shared: true,
        devices: [Some(Arc::new(Handle(Arc::clone(&from)))), Some(Arc::new(Handle(Arc::clone(&to))))],
        sender: SenderConfig { streams: 1, frame_cells, ..SenderConfig::default() },
        ..Setup::new(4, 16, CELL as u32)
    }
    .start()
    .await;
    let mut bytes = vec![0; CELLS * CELL];
    pair.source.copy_out(0, &mut bytes).unwrap();
    rustix::io::pwrite(&from.file, &bytes, 0).unwrap();
    (pair, to)
}

/// Every cell lies where the landing says, as it was at its source, and nowhere else.
fn assert_landed(pair: &Pair, device: &Device, [src, dst]: [&[u32]; 2], on_device: &[bool]) {
    let slots = src.len();
    for plane in 0..pair.grid.planes {
        for (at, (&src, &dst)) in src.iter().zip(dst).enumerate() {
            let want = Pair::cell(&pair.source, &pair.grid, plane, src);
            let place = pair.grid.cell(plane, dst).unwrap();
            let (there, here) = (device.read(place.start), Pair::cell(&pair.target, &pair.grid, plane, dst));
            let is_there = on_device[plane as usize * slots + at];
            assert!(want == if is_there { there } else { here }, "plane {plane}, {src} to {dst}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cells_go_from_device_to_device_and_not_through_the_regions() {
    let (pair, device) = on_devices(64).await;
    let (src, dst) = ([3, 1, 9, 8], [15, 0, 7, 2]);
    for round in 1..=2 {
        let mut landing = pair.reserve(&dst);
        let push = pair.push_all(landing.ticket().clone(), &src);
        let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
        let (report, landed) = (report.unwrap(), landed.unwrap());
        assert_eq!((report.transport, landed.transport), ("cuda_ipc", "cuda_ipc"));
        assert_eq!(landed.on_device, [true; 16]);
        assert_landed(&pair, &device, [&src, &dst], &landed.on_device);
        assert!(Pair::cell(&pair.target, &pair.grid, 0, 15).iter().all(|byte| *byte == 0));
        drop((landed, landing));
        pair.assert_quiet().await;
        let bytes = round * 16 * CELL as u64;
        let (received, sent) = (pair.receiver.stats(), pair.sender.stats());
        assert_eq!((received.cuda_ipc_bytes_total, received.shm_bytes_total), (bytes, 0));
        assert_eq!((sent.cuda_ipc_bytes_total, sent.cuda_ipc_peers, sent.shm_peers), (bytes, 1, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_fails_leaves_the_rest_to_host_memory() {
    let (pair, device) = on_devices(2).await;
    device.works.store(3, Ordering::SeqCst);
    let (src, dst) = ([3, 1, 9, 8], [15, 0, 7, 2]);
    for way in ["cuda_ipc+shm", "shm"] {
        let mut landing = pair.reserve(&dst);
        let push = pair.push_all(landing.ticket().clone(), &src);
        let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
        let landed = landed.unwrap();
        report.unwrap();
        assert_eq!(landed.transport, way);
        let there = landed.on_device.iter().filter(|there| **there).count();
        assert_eq!(there, if way == "shm" { 0 } else { 6 }, "three copies of two cells");
        assert_landed(&pair, &device, [&src, &dst], &landed.on_device);
        drop((landed, landing));
        pair.assert_quiet().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_copy_is_made_again() {
    let (pair, device) = on_devices(64).await;
    device.breaks.store(1, Ordering::SeqCst);
    let mut landing = pair.reserve(&[5, 4, 3, 2]);
    let push = pair.push_all(landing.ticket().clone(), &[1, 2, 3, 4]);
    let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
    let landed = landed.unwrap();
    report.unwrap();
    assert!(landed.refetched >= 1, "{}", landed.refetched);
    assert_eq!(landed.on_device, [true; 16]);
    assert_landed(&pair, &device, [&[1, 2, 3, 4], &[5, 4, 3, 2]], &landed.on_device);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_device_on_each_side_host_memory_is_shared() {
    for missing in 0..2 {
        let mut devices = [Some(Device::new()), Some(Device::new())];
        devices[missing] = None;
        let devices =
            devices.map(|device| device.map(|device| Arc::new(Handle(device)) as Arc<dyn DeviceMemory>));
        let pair = Setup { shared: true, devices, ..Setup::new(4, 16, CELL as u32) }.start().await;
        let mut landing = pair.reserve(&[5, 6]);
        let push = pair.push_all(landing.ticket().clone(), &[0, 7]);
        let (report, landed) = soon(async { tokio::join!(push, landing.committed()) }).await;
        let landed = landed.unwrap();
        assert_eq!((report.unwrap().transport, landed.transport), ("shm", "shm"));
        assert_eq!(landed.on_device, [false; 8]);
        pair.assert_landed(&[0, 7], &[5, 6]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_copied_once_the_landing_is_over() {
    let (pair, device) = on_devices(64).await;
    pair.push_too_late(1, 3).await;
    assert!(device.read(3 * CELL).iter().all(|byte| *byte == 0));
}
