//! What a device lets network cards do with its memory (GPUDirect RDMA).

use std::path::Path;

use cudarc::driver::sys;

use super::driver::{Device, failed};
use crate::{EngineError, Exposed};

/// When kernels see what a network card wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writes {
    /// In order, by themselves.
    Ordered,
    /// After a flush from the host.
    Flushed,
    /// Never for sure.
    Unordered,
}

/// What the driver says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuDirect {
    /// Memory that other processes can map can be shown to cards, too.
    pub is_capable: bool,
    /// As a dmabuf, without a further module.
    pub has_dmabuf: bool,
    /// When kernels see writes.
    pub writes: Writes,
}

impl GpuDirect {
    /// From the values of the driver's attributes; what it does not know it cannot do.
    pub(super) fn of(attribute: impl Fn(sys::CUdevice_attribute_enum) -> Option<i32>) -> Self {
        use sys::CUdevice_attribute_enum as Attribute;
        let is = |which| attribute(which).unwrap_or(0) != 0;
        let order = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING).unwrap_or(0);
        let flush = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS);
        let owner = sys::CUGPUDirectRDMAWritesOrdering::CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER as i32;
        let host = sys::CUflushGPUDirectRDMAWritesOptions::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST as i32;
        let writes = match flush {
            _ if order >= owner => Writes::Ordered,
            Some(ways) if ways & host != 0 => Writes::Flushed,
            _ => Writes::Unordered,
        };
        Self {
            is_capable: is(Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED),
            has_dmabuf: is(Attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED),
            writes,
        }
    }

    /// Of a device, which has a name.
    pub fn ask(ordinal: usize) -> Result<(String, Self), EngineError> {
        let device = Device::open(ordinal)?;
        Ok((device.name.clone(), device.gpudirect))
    }

    /// Why no card can use its memory, whatever modules are loaded.
    pub fn refusal(&self) -> Option<&'static str> {
        match self {
            Self { is_capable: false, .. } => {
                Some("the driver shows no shareable memory of this GPU to network cards")
            }
            Self { writes: Writes::Unordered, .. } => {
                Some("this GPU's kernels cannot be made to see in order what network cards write")
            }
            _ => None,
        }
    }
}

/// Whether a module is loaded that tells network cards what device addresses mean.
pub fn has_peermem() -> bool {
    ["nvidia_peermem", "nv_peer_mem"].iter().any(|module| Path::new("/sys/module").join(module).exists())
}

/// The ways to memory at that address, whose dmabuf `dmabuf` makes.
pub(super) fn expose(
    device: &Device,
    address: u64,
    dmabuf: impl FnOnce() -> Result<std::os::fd::OwnedFd, EngineError>,
) -> Result<Exposed, EngineError> {
    if let Some(why) = device.gpudirect.refusal() {
        return Err(EngineError::Unsupported(why.into()));
    }
    let no_dmabuf = || "the driver makes no dmabufs; its open kernel modules do, since Linux 5.12".to_owned();
    let dmabuf = match device.gpudirect.has_dmabuf {
        true => dmabuf().map_err(|error| error.to_string()),
        false => Err(no_dmabuf()),
    };
    let peermem = if has_peermem() { Ok(()) } else { Err("nvidia_peermem is not loaded".to_owned()) };
    Ok(Exposed { address, dmabuf, peermem })
}

/// Until this returns nothing that network cards had written is hidden from kernels that start later.
pub(super) fn settle_writes(device: &Device) -> Result<(), EngineError> {
    if device.gpudirect.writes == Writes::Ordered {
        return Ok(());
    }
    use sys::{CUflushGPUDirectRDMAWritesScope as Scope, CUflushGPUDirectRDMAWritesTarget as Target};
    let target = Target::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX;
    // SAFETY: the device's context is current on this thread.
    unsafe {
        sys::cuFlushGPUDirectRDMAWrites(target, Scope::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER)
            .result()
            .map_err(failed("waiting for a network card's writes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sys::CUdevice_attribute_enum as Attribute;

    #[test]
    fn writes_are_flushed_only_where_they_are_not_in_order_and_refused_where_they_cannot_be() {
        let with = |order: i32, flush: i32| {
            GpuDirect::of(move |which| match which {
                Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING => Some(order),
                Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS => Some(flush),
                _ => Some(1),
            })
        };
        assert_eq!([with(100, 0), with(200, 1), with(0, 3)].map(|d| d.writes), {
            [Writes::Ordered, Writes::Ordered, Writes::Flushed]
        });
        assert!(with(0, 2).refusal().is_some() && with(0, 1).refusal().is_none());
        let ancient = GpuDirect::of(|_| None);
        assert!(!ancient.is_capable && !ancient.has_dmabuf && ancient.refusal().is_some());
    }
}
