//! Regions whose cells really live on a device: peers on one host copy from device to device, and network cards read and write
//! the device's memory by themselves where they can (`verbs/memory.rs`).
//!
//! The device's memory is a file, as shared host memory is: whoever is handed it maps it, and the memory lives as long as
//! somebody does. What is done with it is the device's business; this crate knows only offsets and checksums.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::runtime::{Handle, RuntimeFlavor};

use crate::borrow::Borrowed;
use crate::incoming::{Arriving, Plan};
use crate::landing_shared::{Checked, LandingShared};
use crate::serve::{Close, Connection};
use crate::transport::{Side, Transport};
use crate::wire::LentCell;

/// Where the cells of a region live, at the same offsets as in the region.
pub trait DeviceMemory: Send + Sync {
    /// The file that stands for it, to be handed to processes of this host.
    fn file(&self) -> Arc<OwnedFd>;

    /// Maps the memory of a peer, of at least `bytes` bytes, beside this. An error where the devices cannot reach each other, or the
    /// file is something else.
    fn open(&self, file: OwnedFd, bytes: usize) -> io::Result<Arc<dyn PeerMemory>>;

    /// How network cards may get at it. An error where nothing that they wrote could be used.
    fn expose(&self) -> io::Result<Exposed>;

    /// CRC-32C of cells of `cell_bytes` at these offsets, as they stand on the device behind everything that network cards had
    /// written when this was called. Blocks until it is done.
    fn sums(&self, cells: &[usize], cell_bytes: usize) -> io::Result<Vec<u32>>;
}

/// The ways to register a device's memory with a network card; each, or why it is closed.
pub struct Exposed {
    /// Where it begins, to the device.
    pub address: u64,
    /// As a dmabuf, from the first byte on.
    pub dmabuf: Result<OwnedFd, String>,
    /// By its address, with a module that tells cards what that means.
    pub peermem: Result<(), String>,
}

/// A peer's memory, mapped.
pub trait PeerMemory: Send + Sync {
    /// Copies cells of `cell_bytes`, each from an offset of the peer's memory to one of ours, and makes their CRC-32C as they
    /// stand here then, in the same order. Blocks until both is done. The offsets of ours lie inside; the peer's were sent by it
    /// and lie within the bytes that were mapped.
    fn copy(&self, cells: &[(usize, usize)], cell_bytes: usize) -> io::Result<Vec<u32>>;
}

/// Runs what waits for the device; other tasks of this thread go on elsewhere meanwhile, where there is an elsewhere.
pub(crate) fn waiting<T>(wait: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(wait),
        _ => wait(),
    }
}

/// The cells of one frame on their way from device to device.
struct Exchange {
    landing: Arc<LandingShared>,
    peer: Arc<dyn PeerMemory>,
    /// From, to.
    ways: Vec<(usize, usize)>,
    /// What to compare; `good` once that is done.
    cells: Vec<Checked>,
    cell_bytes: usize,
}

impl Exchange {
    /// Copies and compares; bits of the cells to be sent again. Nothing when the landing is over. The landing keeps its memory for
    /// as long as this runs, whatever becomes of who waits for it.
    fn run(mut self) -> io::Result<Option<u64>> {
        let Some(write) = self.landing.begin() else { return Ok(None) };
        let sums = self.peer.copy(&self.ways, self.cell_bytes)?;
        for (cell, sum) in self.cells.iter_mut().zip(&sums) {
            cell.good = *sum == cell.checksum;
        }
        let bytes = self.ways.len() * self.cell_bytes;
        Ok(Some(write.finish((bytes, Transport::CudaIpc, Side::Device), &self.cells)))
    }
}

impl Connection {
    /// Takes a frame's cells from the peer's device to ours. False when they must come another way.
    pub(crate) async fn copy_on_device(
        &self,
        plan: &mut Plan,
        lent: &[LentCell],
        borrowed: &Borrowed,
    ) -> Result<bool, Close> {
        let Some(peer) = borrowed.device() else { return Ok(false) };
        if !lent.iter().all(|cell| borrowed.holds(cell.offset, plan.cell_bytes)) {
            return Err(Close::Protocol("a cell outside the lent memory"));
        }
        let taken = plan.cells.iter().zip(lent).enumerate().filter(|(_, (arriving, _))| arriving.take);
        let (ways, cells) = taken
            .map(|(at, (arriving, lent))| {
                let Arriving { cell, checksum, .. } = *arriving;
                ((lent.offset as usize, arriving.place.start), Checked { at, cell, checksum, good: false })
            })
            .unzip();
        let (landing, cell_bytes) = (Arc::clone(&plan.landing), plan.cell_bytes);
        let exchange = Exchange { landing, peer, ways, cells, cell_bytes };
        let bytes = (exchange.ways.len() * exchange.cell_bytes) as u64;
        if bytes == 0 {
            return Ok(true);
        }
        let done = tokio::task::spawn_blocking(move || exchange.run()).await;
        match done.map_err(io::Error::other).and_then(|copied| copied) {
            Ok(None) => Ok(true),
            Ok(Some(bad)) => {
                plan.bad |= bad;
                let counters = &self.receiver.counters;
                counters.bytes.add(bytes);
                counters.cuda_ipc_bytes.add(bytes);
                counters.checksum_failures.add(u64::from(bad.count_ones()));
                Ok(true)
            }
            Err(error) => {
                tracing::warn!(peer = %self.peer.worker, %error, "KV goes through host memory from now on");
                borrowed.give_up_device();
                Ok(false)
            }
        }
    }
}
