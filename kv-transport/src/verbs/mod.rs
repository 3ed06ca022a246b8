//! RDMA: devices found and opened at run time, queue pairs, memory windows. The rest of the crate sees only safe
//! calls on ranges of a registered [`Region`](crate::Region).

mod device;
mod fabric;
pub(crate) mod ffi;
mod memory;
mod offer;
mod queue_pair;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::single_range_in_vec_init)] // pieces are ranges
mod key_tests;

pub use device::{DeviceSelector, Gid, GidKind, PortInfo, ports};
pub use fabric::{Fabric, FabricConfig, FabricError};
pub use memory::GpuDirect;

/// Whether libibverbs is here and registers dmabufs.
pub fn takes_dmabufs() -> bool {
    ffi::verbs().is_ok_and(|verbs| verbs.reg_dmabuf_mr.is_some())
}

pub(crate) use offer::{Answer, Offer};
pub(crate) use queue_pair::{Control, Done, PairBroken, QueuePair, Window, WriteTo};
