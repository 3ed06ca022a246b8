//! Cells that come to the device without the host: copied from another process's pool, or written by a network card; and the
//! checksums of what is there then.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::driver::{Device, Grid, Pinned, Stream, args};
use super::gpudirect;
use super::mapping::Mapping;
use super::pool::{Blocks, DevicePool};
use crate::{DeviceKv, EngineError, Exposed, KvMemory, PeerKv};

/// Cells of one call at most, as long as they are of one frame; more grow it.
const CELLS: usize = 64;
/// Thread blocks that copy one cell.
const COPY_PARTS: usize = 4;
/// KV of a prompt comes frame by frame as its layers are computed. So long after a frame another one may follow.
const BETWEEN_FRAMES: Duration = Duration::from_millis(20);

impl DeviceKv for DevicePool {
    fn file(&self) -> Result<OwnedFd, EngineError> {
        let mapping = self.mapping();
        mapping.ok_or_else(|| EngineError::Unsupported("this KV pool cannot be shared".into()))?.file()
    }

    fn open(self: Arc<Self>, file: OwnedFd, bytes: usize) -> Result<Arc<dyn PeerKv>, EngineError> {
        self.device().enter()?;
        let theirs = Mapping::of_file(self.device(), &file, bytes)?;
        Ok(Arc::new(PeerPool { bytes, theirs, ours: self }))
    }

    fn expose(&self) -> Result<Exposed, EngineError> {
        let mapping = self.mapping();
        let mapping =
            mapping.ok_or_else(|| EngineError::Unsupported("this KV pool cannot be shared".into()))?;
        self.device().enter()?;
        gpudirect::expose(self.device(), mapping.at, || mapping.dmabuf())
    }

    fn sums(&self, cells: &[usize], cell_bytes: usize) -> Result<Vec<u32>, EngineError> {
        self.summed(cells, cell_bytes, |_| gpudirect::settle_writes(self.device()))
    }
}

/// Another pool, mapped beside ours.
struct PeerPool {
    bytes: usize,
    theirs: Mapping,
    ours: Arc<DevicePool>,
}

/// What copies and checksums are queued on. Connections work beside each other.
#[derive(Default)]
pub(super) struct Lanes(Mutex<Idle>);

#[derive(Default)]
struct Idle {
    /// Those that none uses now.
    lanes: Vec<Lane>,
    /// When one was last wanted.
    wanted: Option<Instant>,
}

/// One of them, and what its kernels are told by.
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

impl Lanes {
    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One with room for this many cells.
    fn take(&self, device: &Arc<Device>, cells: usize) -> Result<Lane, EngineError> {
        let free = {
            let mut idle = self.idle();
            idle.wanted = Some(Instant::now());
            idle.lanes.pop()
        };
        match free.filter(|lane| lane.room() >= cells) {
            Some(lane) => Ok(lane),
            None => Lane::new(device, cells.next_power_of_two().max(CELLS)),
        }
    }

    fn give(&self, lane: Lane) {
        self.idle().lanes.push(lane);
    }

    /// Whether KV is arriving, whose kernels want a place on the device between those of a step.
    pub(super) fn are_wanted(&self) -> bool {
        self.idle().wanted.is_some_and(|at| at.elapsed() < BETWEEN_FRAMES)
    }
}

impl DevicePool {
    /// Checksums of cells at these offsets as they stand on the device behind what `bring` queues or waits for.
    fn summed(
        &self,
        cells: &[usize],
        cell_bytes: usize,
        bring: impl FnOnce(&mut Lane) -> Result<(), EngineError>,
    ) -> Result<Vec<u32>, EngineError> {
        let (bytes, total) = (self.layout().block_bytes(), self.layout().total_bytes());
        if cell_bytes != bytes || !cells.iter().all(|at| at.is_multiple_of(bytes) && *at < total) {
            return Err(EngineError::BadBatch(format!(
                "cells of {cell_bytes} bytes that are not the pool's"
            )));
        }
        if cells.is_empty() {
            return Ok(Vec::new());
        }
        self.device().enter()?;
        let mut lane = self.lanes().take(self.device(), cells.len())?;
        let numbers: Vec<i32> = cells.iter().map(|at| (at / bytes) as i32).collect();
        lane.to.as_mut_slice()[..cells.len()].copy_from_slice(&numbers);
        bring(&mut lane)?;
        // Cells are numbered through all layers: to the kernel the pool is one layer.
        self.checksums(&lane.stream, 0, Blocks { ids: &numbers, at: lane.to.device_address() })?;
        lane.stream.synchronize()?;
        self.lanes().give(lane);
        Ok(self.sums_of(&numbers))
    }
}

impl PeerKv for PeerPool {
    fn copy(&self, cells: &[(usize, usize)], cell_bytes: usize) -> Result<Vec<u32>, EngineError> {
        let fits = |&(from, _): &(usize, usize)| {
            from.is_multiple_of(16) && from.checked_add(cell_bytes).is_some_and(|end| end <= self.bytes)
        };
        if !cells.iter().all(fits) {
            return Err(EngineError::BadBatch("cells outside the peer's pool".into()));
        }
        let places: Vec<usize> = cells.iter().map(|&(_, to)| to).collect();
        self.ours.summed(&places, cell_bytes, |lane| {
            let sources = lane.from.as_mut_slice::<u64>();
            sources.iter_mut().zip(cells).for_each(|(source, &(from, _))| *source = from as u64);
            let (from, ids) = (lane.from.device_address(), lane.to.device_address());
            let (to, theirs, vectors) = (self.ours.layer(0), self.theirs.at, (cell_bytes / 16) as i32);
            let grid = Grid::new((COPY_PARTS, cells.len(), 1), 256);
            let kernels = self.ours.kernels();
            kernels.copy_cells.launch(&lane.stream, grid, args![to, theirs, ids, from, vectors])
        })
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // What it reads may go next, after a failed copy for instance.
        let _ = self.device.enter();
        let _ = self.stream.synchronize();
    }
}
