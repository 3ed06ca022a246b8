//! The KV pool as the transport sees it: a registered region and a grid of cells.

use std::sync::Arc;

use engine::{KvLayout, KvMemory};
use kv_transport::{Grid, Region};

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
    Some(match kv.shared_file() {
        Some(file) => region.backed_by(file),
        None => region,
    })
}
