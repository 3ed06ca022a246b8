//! From the device memory of another process's pool into ours, without the host.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{Device, Grid, Pinned, Stream, args};
use super::mapping::Mapping;
use super::pool::DevicePool;
use crate::{DeviceKv, EngineError, KvMemory, PeerKv};

/// Cells of one call at most, as long as they are of one frame; more grow it.
const CELLS: usize = 64;
/// Thread blocks that copy one cell.
const COPY_PARTS: usize = 4;

impl DeviceKv for DevicePool {
    fn file(&self) -> Result<OwnedFd, EngineError> {
        let mapping = self.mapping();
        mapping.ok_or_else(|| EngineError::Unsupported("this KV pool cannot be shared".into()))?.file()
    }

    fn open(self: Arc<Self>, file: OwnedFd, bytes: usize) -> Result<Arc<dyn PeerKv>, EngineError> {
        self.device().enter()?;
        let theirs = Mapping::of_file(self.device(), &file, bytes)?;
        Ok(Arc::new(PeerPool { bytes, lanes: Mutex::default(), theirs, ours: self }))
    }
}

/// Another pool, mapped beside ours.
struct PeerPool {
    bytes: usize,
    /// Those that no copy uses now: connections copy beside each other.
    lanes: Mutex<Vec<Lane>>,
    theirs: Mapping,
    ours: Arc<DevicePool>,
}

/// What copies are queued on, and told by.
struct Lane {
    stream: Stream,
    /// Where each cell lies in their pool, in bytes.
    from: Pinned,
    /// Its number in ours, through all layers.
    to: Pinned,
    device: Arc<Device>,
}

impl Lane {
    fn new(device: &Arc<Device>, cells: usize) -> Result<Self, EngineError> {
        let pinned = |bytes| Pinned::new(device, cells * bytes, "cells on their way");
        let (from, to) = (pinned(size_of::<u64>())?, pinned(size_of::<i32>())?);
        Ok(Self { stream: Stream::new(device)?, from, to, device: Arc::clone(device) })
    }

    fn room(&self) -> usize {
        self.to.bytes / size_of::<i32>()
    }
}

impl PeerPool {
    /// One with room for this many cells.
    fn lane(&self, cells: usize) -> Result<Lane, EngineError> {
        let free = self.lanes.lock().unwrap_or_else(PoisonError::into_inner).pop();
        match free.filter(|lane| lane.room() >= cells) {
            Some(lane) => Ok(lane),
            None => Lane::new(self.ours.device(), cells.next_power_of_two().max(CELLS)),
        }
    }
}

impl PeerKv for PeerPool {
    fn copy(&self, cells: &[(usize, usize)], cell_bytes: usize) -> Result<Vec<u32>, EngineError> {
        let ours = self.ours.layout();
        let fits = |&(from, to): &(usize, usize)| {
            let inside = |at: usize, total: usize| at.checked_add(cell_bytes).is_some_and(|end| end <= total);
            from.is_multiple_of(16) && inside(from, self.bytes) && inside(to, ours.total_bytes())
        };
        if cell_bytes != ours.block_bytes() || !cells.iter().all(fits) {
            return Err(EngineError::BadBatch(format!(
                "cells of {cell_bytes} bytes that are not the pool's"
            )));
        }
        self.ours.device().enter()?;
        let mut lane = self.lane(cells.len())?;
        let numbers: Vec<i32> = cells.iter().map(|&(_, to)| (to / cell_bytes) as i32).collect();
        lane.to.as_mut_slice()[..cells.len()].copy_from_slice(&numbers);
        let sources = lane.from.as_mut_slice::<u64>();
        sources.iter_mut().zip(cells).for_each(|(source, &(from, _))| *source = from as u64);
        let (from, ids) = (lane.from.device_address(), lane.to.device_address());
        let (to, theirs, vectors) = (self.ours.layer(0), self.theirs.at, (cell_bytes / 16) as i32);
        let grid = Grid::new((COPY_PARTS, cells.len(), 1), 256);
        let kernels = self.ours.kernels();
        kernels.copy_cells.launch(&lane.stream, grid, args![to, theirs, ids, from, vectors])?;
        // Cells are numbered through all layers: to the kernel the pool is one layer.
        self.ours.checksums(&lane.stream, 0, ids, cells.len())?;
        lane.stream.synchronize()?;
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner).push(lane);
        Ok(self.ours.sums_of(&numbers))
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // What it reads may go next, after a failed copy for instance.
        let _ = self.device.enter();
        let _ = self.stream.synchronize();
    }
}
