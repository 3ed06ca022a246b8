//! Memory of one process: on the device, and page-locked on the host.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::driver::{Device, failed};
use crate::EngineError;
use crate::shared::SharedMemory;

/// Device memory from cuMemAlloc, zeroed (not from the asynchronous pool, whose memory other processes cannot open).
pub(super) struct Memory {
    pub(super) at: u64,
    pub(super) bytes: usize,
    device: Arc<Device>,
}

impl Memory {
    pub(super) fn new(device: &Arc<Device>, bytes: usize, what: &str) -> Result<Self, EngineError> {
        let bytes = bytes.max(16);
        // SAFETY: freed on drop.
        let at = unsafe { result::malloc_sync(bytes) }.map_err(|e| device.out_of_memory(what, bytes, e))?;
        let memory = Self { at, bytes, device: Arc::clone(device) };
        clear(at, bytes)?;
        Ok(memory)
    }
}

/// Zeroes device memory of the caller's.
pub(super) fn clear(at: u64, bytes: usize) -> Result<(), EngineError> {
    // SAFETY: the caller has allocated or mapped `bytes` bytes there.
    unsafe { result::memset_d8_sync(at, 0, bytes) }.map_err(failed("clearing memory"))?;
    // Despite its name it only queues, on the default stream, for which ours do not wait.
    result::ctx::synchronize().map_err(failed("clearing memory"))
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = self.device.enter();
        // SAFETY: allocated in `new`; the engine's streams are synchronised before its memory goes.
        let _ = unsafe { result::free_sync(self.at) };
    }
}

/// Page-locked host memory that the device can read and write, zeroed.
pub(super) struct Pinned {
    pub(super) at: *mut u8,
    pub(super) bytes: usize,
    device: Arc<Device>,
    /// What it is a mapping of, when other processes may read it.
    shared: Option<SharedMemory>,
}

impl Pinned {
    /// Memory that other processes of this host can be let read, where the kernel has such.
    pub(super) fn shareable(device: &Arc<Device>, bytes: usize, what: &str) -> Result<Self, EngineError> {
        let bytes = bytes.max(16);
        let registered = SharedMemory::new(bytes).map_err(|e| e.to_string()).and_then(|shared| {
            shared.populate();
            let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
            // SAFETY: `bytes` mapped bytes, unregistered on drop before they are unmapped.
            let done = unsafe { sys::cuMemHostRegister_v2(shared.as_ptr().cast(), bytes, flags) };
            done.result().map(|()| shared).map_err(|e| format!("{e:?}"))
        });
        match registered {
            Ok(shared) => {
                Ok(Self { at: shared.as_ptr(), bytes, device: Arc::clone(device), shared: Some(shared) })
            }
            Err(error) => {
                tracing::info!(error, "{what} cannot be shared with other processes");
                Self::new(device, bytes, what)
            }
        }
    }

    /// Its file, when other processes may read it.
    pub(super) fn file(&self) -> Option<Arc<OwnedFd>> {
        self.shared.as_ref().map(SharedMemory::file)
    }

    pub(super) fn new(device: &Arc<Device>, bytes: usize, what: &str) -> Result<Self, EngineError> {
        let bytes = bytes.max(16);
        // Not write-combined: the transport and the checksums read it. Usable from every context.
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: freed on drop.
        let at = unsafe { result::malloc_host(bytes, flags) }.map_err(|e| {
            EngineError::OutOfMemory(format!("{what} needs {bytes} bytes of page-locked host memory ({e:?})"))
        })?;
        // SAFETY: `bytes` bytes were allocated.
        unsafe { std::ptr::write_bytes(at.cast::<u8>(), 0, bytes) };
        Ok(Self { at: at.cast(), bytes, device: Arc::clone(device), shared: None })
    }

    /// The same memory as the device addresses it (unified addressing: the same number).
    pub(super) fn device_address(&self) -> u64 {
        self.at as u64
    }

    pub(super) fn as_slice<T: bytemuck::Pod>(&self) -> &[T] {
        // SAFETY: `bytes` initialised bytes, aligned to a page; the device writes only between a launch and
        // the synchronisation that precedes reading.
        bytemuck::cast_slice(unsafe {
            std::slice::from_raw_parts(self.at, self.bytes / size_of::<T>() * size_of::<T>())
        })
    }

    pub(super) fn as_mut_slice<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        let bytes = self.bytes / size_of::<T>() * size_of::<T>();
        // SAFETY: as above, borrowed mutably.
        bytemuck::cast_slice_mut(unsafe { std::slice::from_raw_parts_mut(self.at, bytes) })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.device.enter();
        if self.shared.is_some() {
            // SAFETY: registered in `shareable`, still mapped.
            let _ = unsafe { sys::cuMemHostUnregister(self.at.cast()) };
            return;
        }
        // SAFETY: allocated in `new`.
        let _ = unsafe { result::free_host(self.at.cast()) };
    }
}

// SAFETY: plain memory.
unsafe impl Send for Pinned {}
// SAFETY: plain memory; who may write when is decided by its users.
unsafe impl Sync for Pinned {}
