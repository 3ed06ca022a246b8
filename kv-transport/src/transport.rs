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
}

impl Transport {
    /// All of them, the best first.
    pub const ALL: [Self; 3] = [Self::Shm, Self::Rdma, Self::Tcp];

    /// Short name, as in `ListWorkers` and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
            Self::Shm => "shm",
        }
    }

    fn bit(self) -> u8 {
        match self {
            Self::Tcp => 1,
            Self::Rdma => 2,
            Self::Shm => 4,
        }
    }
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
        match self.0.load(Ordering::Relaxed) {
            2 => "rdma",
            3 => "rdma+tcp",
            4 => "shm",
            5 => "shm+tcp",
            6 => "shm+rdma",
            7 => "shm+rdma+tcp",
            _ => "tcp",
        }
    }
}
