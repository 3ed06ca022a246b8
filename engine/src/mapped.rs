//! Files read through the page cache, without a copy.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::EngineError;

/// A whole file, mapped read-only.
pub(crate) struct Mapped {
    map: Mmap,
}

impl Mapped {
    pub(crate) fn open(path: &Path) -> Result<Self, EngineError> {
        let unreadable = |e: std::io::Error| EngineError::model(path, format!("cannot be read: {e}"));
        let file = File::open(path).map_err(unreadable)?;
        // SAFETY: the map is read-only and private to this value. A file that someone else truncates while
        // it is mapped raises SIGBUS on access, like every memory-mapped model; model folders are written
        // by atomic rename and not changed in place.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        Ok(Self { map })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map
    }
}
