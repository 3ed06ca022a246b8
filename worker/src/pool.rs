//! The KV pool as the transport sees it: a registered region and a grid of cells.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use engine::{DeviceKv, EngineError, KvLayout, KvMemory, PeerKv};
use kv_transport::{DeviceMemory, Exposed, Grid, PeerMemory, Region};

/// A cell is one block of one layer; a plane is a layer, a slot is a block.
pub fn grid(layout: &KvLayout) -> Grid {
    Grid {
        planes: u32::try_from(layout.layers).unwrap_or(u32::MAX),
        plane_stride: layout.layer_bytes() as u64,
        cell_bytes: u32::try_from(layout.block_bytes()).unwrap_or(u32::MAX),
    }
}

/// The pool's memory as a region, kept alive by it. None when the pool is not in host memory.
pub fn region(kv: &Arc<dyn KvMemory>) -> Option<Region> {
    let start = kv.host_address()?;
    let keepalive: Arc<dyn std::any::Any + Send + Sync> = Arc::new(Arc::clone(kv));
    // SAFETY: `host_address` promises `total_bytes` valid, unmoved bytes while the `KvMemory` lives, and
    // the region holds a reference to it.
    let region = unsafe { Region::from_raw(start, kv.layout().total_bytes(), keepalive) };
    let region = match kv.shared_file() {
        Some(file) => region.backed_by(file),
        None => region,
    };
    let device = Arc::clone(kv).on_device().map(|device| (device.file(), device));
    Some(match device {
        Some((Ok(file), device)) => region.on_device(Arc::new(OnDevice { file: Arc::new(file), device })),
        Some((Err(error), _)) => {
            tracing::info!(%error, "KV goes through host memory");
            region
        }
        None => region,
    })
}

/// The pool on its device as the transport sees it.
struct OnDevice {
    file: Arc<OwnedFd>,
    device: Arc<dyn DeviceKv>,
}

impl DeviceMemory for OnDevice {
    fn file(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.file)
    }

    fn open(&self, file: OwnedFd, bytes: usize) -> io::Result<Arc<dyn PeerMemory>> {
        let peer = Arc::clone(&self.device).open(file, bytes).map_err(io::Error::other)?;
        Ok(Arc::new(Peer(peer)))
    }

    fn expose(&self) -> io::Result<Exposed> {
        let engine::Exposed { address, dmabuf, peermem } = self.device.expose().map_err(io::Error::other)?;
        Ok(Exposed { address, dmabuf, peermem })
    }

    fn sums(&self, cells: &[usize], cell_bytes: usize) -> io::Result<Vec<u32>> {
        self.device.sums(cells, cell_bytes).map_err(io::Error::other)
    }
}

struct Peer(Arc<dyn PeerKv>);

impl PeerMemory for Peer {
    fn copy(&self, cells: &[(usize, usize)], cell_bytes: usize) -> io::Result<Vec<u32>> {
        self.0.copy(cells, cell_bytes).map_err(|error: EngineError| io::Error::other(error))
    }
}
