//! The ways bytes can go, and which of them a transfer used.

use std::sync::atomic::{AtomicU8, Ordering};

/// A way for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Through a connection of the kernel's.
    Tcp,
    /// Written by the sender's network card into the receiver's memory.
    Rdma,
    /// Copied by the receiver from memory that both map.
    Shm,
    /// Copied on the receiver's device from memory of the sender's.
    CudaIpc,
}

impl Transport {
    /// All of them, the best first.
    pub const ALL: [Self; 4] = [Self::CudaIpc, Self::Shm, Self::Rdma, Self::Tcp];

    /// Short name, as in `ListWorkers` and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
            Self::Shm => "shm",
            Self::CudaIpc => "cuda_ipc",
        }
    }

    fn bit(self) -> u8 {
        match self {
            Self::Tcp => 1,
            Self::Rdma => 2,
            Self::Shm => 4,
            Self::CudaIpc => 8,
        }
    }
}

/// Which memory of a pool whose cells live on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// The region, in host memory.
    Host,
    /// The device's own.
    Device,
}

/// The ways a transfer used.
#[derive(Debug, Default)]
pub(crate) struct Used(AtomicU8);

impl Used {
    pub(crate) fn add(&self, way: Transport) {
        self.0.fetch_or(way.bit(), Ordering::Relaxed);
    }

    /// Their names; a transfer that moved from one to the other names both. One without bytes says tcp.
    pub(crate) fn name(&self) -> &'static str {
        NAMES.get(usize::from(self.0.load(Ordering::Relaxed))).copied().unwrap_or("tcp")
    }
}

/// By the bits of the ways.
const NAMES: [&str; 16] = [
    "tcp",
    "tcp",
    "rdma",
    "rdma+tcp",
    "shm",
    "shm+tcp",
    "shm+rdma",
    "shm+rdma+tcp",
    "cuda_ipc",
    "cuda_ipc+tcp",
    "cuda_ipc+rdma",
    "cuda_ipc+rdma+tcp",
    "cuda_ipc+shm",
    "cuda_ipc+shm+tcp",
    "cuda_ipc+shm+rdma",
    "cuda_ipc+shm+rdma+tcp",
];
