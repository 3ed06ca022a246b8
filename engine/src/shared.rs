//! Memory in a file that has no name: other processes of this host can be handed the file, and read what is in it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use memmap2::{Advice, MmapMut, MmapOptions};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

const PAGE: usize = 4096;

/// Zeroed memory, page aligned. Its file can neither be resized nor mapped for writing by anybody else.
pub struct SharedMemory {
    pub(crate) map: MmapMut,
    pub(crate) file: Arc<OwnedFd>,
}

impl std::fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedMemory").field("bytes", &self.map.len()).finish_non_exhaustive()
    }
}

impl SharedMemory {
    /// At least one byte. Physical pages come on first touch. An error where the kernel has no such files (before Linux 5.1).
    pub fn new(bytes: usize) -> io::Result<Self> {
        let bytes = bytes.max(1);
        let file = memfd_create(c"tandem-kv", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, bytes as u64)?;
        // SAFETY: the file is ours alone until `file()` is handed out, and its seals forbid then to shrink it.
        let map = unsafe { MmapOptions::new().len(bytes).map_mut(&file)? };
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE | SealFlags::SEAL;
        fcntl_add_seals(&file, seals)?;
        Ok(Self { map, file: Arc::new(file) })
    }

    /// Touches every page now, on several threads: cheaper than one by one when somebody needs them.
    pub(crate) fn populate(&self) {
        let pages = self.map.len().div_ceil(PAGE);
        let workers = std::thread::available_parallelism().map_or(1, |n| n.get()).min(8);
        let share = pages.div_ceil(workers) * PAGE;
        std::thread::scope(|scope| {
            for start in (0..self.map.len()).step_by(share.max(PAGE)) {
                let bytes = share.min(self.map.len() - start);
                // Older kernels do not know the advice: pages come on first touch then.
                scope.spawn(move || self.map.advise_range(Advice::PopulateWrite, start, bytes).ok());
            }
        });
    }

    /// Its first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.as_ptr().cast_mut()
    }

    /// Its file.
    pub fn file(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_may_read_and_neither_write_nor_resize() {
        let memory = SharedMemory::new(8192).unwrap();
        let file = memory.file();
        // SAFETY: nobody resizes the file; that is what is tested.
        let other = unsafe { MmapOptions::new().len(8192).map(&*file).unwrap() };
        // SAFETY: 8192 bytes, mapped.
        unsafe { memory.as_ptr().add(5000).write(7) };
        assert_eq!((other[5000], other[5001]), (7, 0));
        assert!(ftruncate(&file, 4096).is_err() && ftruncate(&file, 16384).is_err());
        // SAFETY: refused.
        assert!(unsafe { MmapOptions::new().len(8192).map_mut(&*file) }.is_err());
    }
}
