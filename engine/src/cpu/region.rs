//! Page-aligned memory: the KV pool and the packed weights.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use memmap2::{Advice, MmapMut, MmapOptions};

use crate::shared::SharedMemory;
use crate::{EngineError, KvLayout, KvMemory};

/// Zeroed memory, page aligned, in huge pages where the kernel gives them. Physical pages come on first
/// touch.
pub(crate) struct Region {
    map: MmapMut,
    file: Option<Arc<OwnedFd>>,
}

impl Region {
    pub(crate) fn new(bytes: usize, what: &str) -> Result<Self, EngineError> {
        check_available(bytes, what)?;
        let map = MmapOptions::new().len(bytes.max(1)).map_anon();
        let map = map.map_err(|e| EngineError::OutOfMemory(format!("{what}, {bytes} bytes: {e}")))?;
        Ok(Self::of(map, None))
    }

    /// Memory that other processes of this host can be let read, where the kernel has such.
    pub(crate) fn shareable(bytes: usize, what: &str) -> Result<Self, EngineError> {
        check_available(bytes, what)?;
        match SharedMemory::new(bytes) {
            Ok(SharedMemory { map, file }) => Ok(Self::of(map, Some(file))),
            Err(error) => {
                tracing::info!(%error, "{what} cannot be shared with other processes");
                Self::new(bytes, what)
            }
        }
    }

    fn of(map: MmapMut, file: Option<Arc<OwnedFd>>) -> Self {
        // Only speed depends on it.
        let _ = map.advise(Advice::HugePage);
        Self { map, file }
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.map.as_ptr().cast_mut()
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }
}

fn check_available(bytes: usize, what: &str) -> Result<(), EngineError> {
    match available_bytes() {
        Some(available) if bytes > available => {
            Err(EngineError::OutOfMemory(format!("{what} needs {bytes} bytes, {available} are available")))
        }
        _ => Ok(()),
    }
}

/// `MemAvailable`; `None` where /proc does not say.
fn available_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The KV pool in host memory.
///
/// The engine writes blocks while it computes, transports read blocks that are final and write blocks that
/// were reserved for them. Who may touch which block when is decided by the block pool's states, not by
/// borrows, so all access goes through raw pointers.
pub(crate) struct KvRegion {
    layout: KvLayout,
    region: Region,
}

impl KvRegion {
    pub(crate) fn new(layout: KvLayout) -> Result<Self, EngineError> {
        let sizes = [layout.layers, layout.blocks, layout.kv_heads, layout.block_tokens, layout.head_dim];
        let bytes = sizes.iter().try_fold(2 * layout.dtype.bytes(), |n, &size| n.checked_mul(size));
        let bytes = bytes.filter(|&n| n > 0 && n <= isize::MAX as usize).ok_or_else(|| {
            EngineError::OutOfMemory(format!("a KV pool of {layout:?} is empty or larger than memory"))
        })?;
        Ok(Self { layout, region: Region::shareable(bytes, "the KV pool")? })
    }

    /// Start of a block of a layer: `block_bytes()` valid bytes.
    pub(crate) fn block(&self, layer: usize, block: u32) -> *mut u8 {
        assert!(layer < self.layout.layers && (block as usize) < self.layout.blocks);
        // SAFETY: layer and block are inside the layout, whose total is the region's size.
        unsafe { self.region.as_ptr().add(self.layout.offset(layer, block)) }
    }

    pub(crate) fn copy(&self, from: u32, to: u32) {
        if from == to {
            return;
        }
        for layer in 0..self.layout.layers {
            let (from, to) = (self.block(layer, from), self.block(layer, to));
            // SAFETY: two different blocks of the pool, `block_bytes` each, do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(from, to, self.layout.block_bytes()) };
        }
    }
}

impl KvMemory for KvRegion {
    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn host_address(&self) -> Option<*mut u8> {
        Some(self.region.as_ptr())
    }

    fn shared_file(&self) -> Option<Arc<OwnedFd>> {
        self.region.file.clone()
    }

    fn checksum(&self, layer: usize, block: u32) -> u32 {
        let start = self.block(layer, block);
        // SAFETY: `block_bytes` bytes of the pool. The caller asks for blocks that are final or reserved,
        // which the engine does not write.
        crc32c::crc32c(unsafe { std::slice::from_raw_parts(start, self.layout.block_bytes()) })
    }
}

// SAFETY: plain memory without thread affinity; shared access is by raw pointers under the block pool's rules.
unsafe impl Send for KvRegion {}
// SAFETY: as above.
unsafe impl Sync for KvRegion {}
