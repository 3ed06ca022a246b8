//! The KV pool on the device, and its host side that transports read and write.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::bulk;
use super::driver::{Device, Grid, Memory, Pinned, Stream, args};
use super::exchange::Lanes;
use super::kernels::Kernels;
use super::mapping::Mapping;
use crate::{DeviceKv, EngineError, KvLayout, KvMemory};

const CHECKSUM_THREADS: usize = 256;

/// One allocation on the device and one of the same layout in page-locked host memory.
///
/// Transports know host memory: blocks are published to the host side before they are pushed and loaded from
/// it after they have landed; between two processes of one host they go from device to device (`exchange.rs`). The host side
/// costs as much memory as the pool, and in return any block that was published once, say a cached prefix, is pushed again
/// without a copy.
pub(super) struct DevicePool {
    /// Dropped before the memory that their kernels read.
    lanes: Lanes,
    layout: KvLayout,
    kernels: Arc<Kernels>,
    device: Arc<Device>,
    memory: PoolMemory,
    host: Option<HostSide>,
    /// Whether `sums` speaks of what the host side holds.
    published: Vec<AtomicBool>,
}

/// Ids of blocks, and where the device reads them.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a> {
    pub(super) ids: &'a [i32],
    pub(super) at: u64,
}

enum PoolMemory {
    /// Peers on this host may map it.
    Shareable(Mapping),
    Plain(Memory),
}

struct HostSide {
    memory: Pinned,
    /// CRC-32C of each (layer, block), made by a kernel from device memory when it was published.
    sums: Pinned,
}

impl DevicePool {
    pub(super) fn new(
        device: &Arc<Device>,
        kernels: Arc<Kernels>,
        layout: KvLayout,
        host_side: bool,
    ) -> Result<Arc<Self>, EngineError> {
        let sizes =
            [layout.blocks, layout.kv_heads, layout.block_tokens, layout.head_dim, 2 * layout.dtype.bytes()];
        let bytes = sizes.iter().try_fold(layout.layers, |n, &size| n.checked_mul(size));
        let bytes = bytes.filter(|&n| n > 0 && layout.block_bytes().is_multiple_of(16)).ok_or_else(|| {
            EngineError::Unsupported(format!("a KV pool of {layout:?}: blocks must be multiples of 16 bytes"))
        })?;
        let cells = layout.layers * layout.blocks;
        let host = || -> Result<HostSide, EngineError> {
            let memory = Pinned::shareable(device, bytes, "the KV pool's host side")?;
            Ok(HostSide { memory, sums: Pinned::new(device, cells * 4, "the KV pool's checksums")? })
        };
        let memory = match Mapping::new(device, bytes, "the KV pool")? {
            Some(mapping) => PoolMemory::Shareable(mapping),
            None => PoolMemory::Plain(Memory::new(device, bytes, "the KV pool")?),
        };
        Ok(Arc::new(Self {
            lanes: Lanes::default(),
            layout,
            kernels,
            device: Arc::clone(device),
            memory,
            host: host_side.then(host).transpose()?,
            published: (0..cells).map(|_| AtomicBool::new(false)).collect(),
        }))
    }

    pub(super) fn layers(&self) -> usize {
        self.layout.layers
    }

    /// Start of a layer on the device.
    pub(super) fn layer(&self, layer: usize) -> u64 {
        self.at() + (layer * self.layout.layer_bytes()) as u64
    }

    fn at(&self) -> u64 {
        match &self.memory {
            PoolMemory::Shareable(mapping) => mapping.at,
            PoolMemory::Plain(memory) => memory.at,
        }
    }

    /// Its memory, where peers on this host may map it.
    pub(super) fn mapping(&self) -> Option<&Mapping> {
        match &self.memory {
            PoolMemory::Shareable(mapping) => Some(mapping),
            PoolMemory::Plain(_) => None,
        }
    }

    pub(super) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(super) fn lanes(&self) -> &Lanes {
        &self.lanes
    }

    pub(super) fn kernels(&self) -> &Kernels {
        &self.kernels
    }

    /// The checksums that the device made last of these cells, numbered through all layers.
    pub(super) fn sums_of(&self, cells: &[i32]) -> Vec<u32> {
        let sums = self.host.as_ref().map(|host| host.sums.as_slice::<u32>()).unwrap_or_default();
        cells.iter().map(|&cell| sums.get(cell as usize).copied().unwrap_or_default()).collect()
    }

    /// Queues one layer of blocks for the host side.
    pub(super) fn bring(&self, stream: &Stream, layer: usize, blocks: Blocks<'_>) -> Result<(), EngineError> {
        self.copy(stream, self.host_layer(layer)?, self.layer(layer), blocks)
    }

    /// Queues one layer of blocks from the host side to the device.
    pub(super) fn load(&self, stream: &Stream, layer: usize, blocks: Blocks<'_>) -> Result<(), EngineError> {
        self.copy(stream, self.layer(layer), self.host_layer(layer)?, blocks)
    }

    /// Queues checksums of one layer of blocks as they stand on the device.
    pub(super) fn checksums(
        &self,
        stream: &Stream,
        layer: usize,
        blocks: Blocks<'_>,
    ) -> Result<(), EngineError> {
        let host = self.host()?;
        let sums = host.sums.device_address() + (layer * self.layout.blocks * 4) as u64;
        let bytes = self.layout.block_bytes();
        let slice = (bytes.div_ceil(CHECKSUM_THREADS).next_multiple_of(4)) as i32;
        let (from, ids, bytes_i32) = (self.layer(layer), blocks.at, bytes as i32);
        let grid = Grid::new((blocks.ids.len(), 1, 1), CHECKSUM_THREADS as u32);
        self.kernels.checksums.launch(stream, grid, args![sums, from, ids, bytes_i32, slice])
    }

    fn host(&self) -> Result<&HostSide, EngineError> {
        self.host.as_ref().ok_or_else(|| EngineError::Unsupported("this KV pool has no host side".into()))
    }

    /// Start of a layer on the host side.
    fn host_layer(&self, layer: usize) -> Result<u64, EngineError> {
        Ok(self.host()?.memory.device_address() + (layer * self.layout.layer_bytes()) as u64)
    }

    fn copy(&self, stream: &Stream, to: u64, from: u64, blocks: Blocks<'_>) -> Result<(), EngineError> {
        bulk::copy(stream, to, from, &bulk::pieces(blocks.ids, self.layout.block_bytes()))
    }

    /// Queues copies of whole blocks on the device; `pairs` (from, to) lie there.
    pub(super) fn fork(&self, stream: &Stream, pairs: u64, count: usize) -> Result<(), EngineError> {
        let (pool, layer) = (self.at(), self.layout.layer_bytes() / 16);
        let vectors = (self.layout.block_bytes() / 16) as i32;
        let grid = Grid::new((self.layout.layers, count, 1), 256);
        self.kernels.fork_blocks.launch(stream, grid, args![pool, pairs, layer, vectors])
    }

    /// Whether the device's checksums speak of what both sides hold: not after someone else wrote the host side.
    pub(super) fn mark(&self, layer: usize, blocks: &[i32], published: bool) {
        for &block in blocks {
            self.published[layer * self.layout.blocks + block as usize].store(published, Ordering::Release);
        }
    }
}

impl KvMemory for DevicePool {
    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn host_address(&self) -> Option<*mut u8> {
        self.host.as_ref().map(|host| host.memory.at)
    }

    fn shared_file(&self) -> Option<Arc<OwnedFd>> {
        self.host.as_ref()?.memory.file()
    }

    fn on_device(self: Arc<Self>) -> Option<Arc<dyn DeviceKv>> {
        (self.mapping().is_some() && self.host.is_some()).then_some(self as Arc<dyn DeviceKv>)
    }

    fn checksum(&self, layer: usize, block: u32) -> u32 {
        let Some(host) = &self.host else { return 0 };
        let (start, bytes) = (self.layout.offset(layer, block), self.layout.block_bytes());
        crc32c::crc32c(&host.memory.as_slice::<u8>()[start..start + bytes])
    }

    fn source_checksum(&self, layer: usize, block: u32) -> u32 {
        let cell = layer * self.layout.blocks + block as usize;
        match &self.host {
            Some(host) if self.published[cell].load(Ordering::Acquire) => host.sums.as_slice::<u32>()[cell],
            _ => self.checksum(layer, block),
        }
    }
}
