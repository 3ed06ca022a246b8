//! A KV pool of any size in a few megabytes: one small piece of memory, mapped again and again.
//!
//! Nothing is computed, so all KV is zero: the engine writes none, and what a transport writes is what another such pool
//! holds. Transports, checksums and block ownership are the real ones; only the bytes are not worth their memory.

use std::ptr::null_mut;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::{EngineError, KvLayout, KvMemory};

/// Bytes that are really there, at least.
const WINDOW: usize = 4 << 20;
/// Mappings of the window, at most; Linux allows 65,530 in a process.
const MOST_MAPPINGS: usize = 16_384;

pub(super) struct SimKv {
    layout: KvLayout,
    start: *mut u8,
    mapped: usize,
}

impl SimKv {
    pub(super) fn new(layout: KvLayout) -> Result<Self, EngineError> {
        let bytes = layout.total_bytes();
        let failed = |what: &str, error: rustix::io::Errno| {
            EngineError::OutOfMemory(format!("a simulated KV pool of {bytes} bytes: {what}: {error}"))
        };
        let window = WINDOW.max(bytes.div_ceil(MOST_MAPPINGS).next_multiple_of(WINDOW));
        let mapped = bytes.max(1).next_multiple_of(window);
        let file = memfd_create("tandem-sim-kv", MemfdFlags::CLOEXEC).map_err(|e| failed("memfd", e))?;
        ftruncate(&file, window as u64).map_err(|e| failed("ftruncate", e))?;
        // SAFETY: a fresh range of addresses that nothing else uses.
        let start = unsafe {
            mmap_anonymous(null_mut(), mapped, ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE)
        };
        let start = start.map_err(|e| failed("mmap", e))?.cast::<u8>();
        // Unmaps on every way out from here.
        let kv = Self { layout, start, mapped };
        for at in (0..mapped).step_by(window) {
            let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
            // SAFETY: inside the range reserved above; the file is `window` bytes long.
            unsafe {
                mmap(start.add(at).cast(), window, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0)
            }
            .map_err(|e| failed("mmap of the window", e))?;
        }
        Ok(kv)
    }
}

impl Drop for SimKv {
    fn drop(&mut self) {
        // SAFETY: the range of `new`; whoever uses it holds a reference to this value.
        let _ = unsafe { munmap(self.start.cast(), self.mapped) };
    }
}

impl KvMemory for SimKv {
    fn layout(&self) -> &KvLayout {
        &self.layout
    }

    fn host_address(&self) -> Option<*mut u8> {
        Some(self.start)
    }

    fn checksum(&self, layer: usize, block: u32) -> u32 {
        let offset = self.layout.offset(layer, block);
        // SAFETY: a block inside the layout, whose total is mapped.
        crc32c::crc32c(unsafe {
            std::slice::from_raw_parts(self.start.add(offset), self.layout.block_bytes())
        })
    }
}

// SAFETY: plain memory without thread affinity; shared access is by raw pointers under the block pool's rules.
unsafe impl Send for SimKv {}
// SAFETY: as above.
unsafe impl Sync for SimKv {}
