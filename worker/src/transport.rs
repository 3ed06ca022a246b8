//! Which ways KV takes between this worker and its peers.

use std::sync::Arc;

use kv_transport::verbs::DeviceSelector;
use kv_transport::{Fabric, FabricConfig, FabricError, ReceiverConfig, Region, SenderConfig, Transport};

/// What an operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TransportChoice {
    /// RDMA where this machine has it, else TCP.
    #[default]
    Auto,
    /// Only TCP.
    Tcp,
    /// RDMA: not to have it here is an error.
    Rdma,
}

/// Settings of the transport.
#[derive(Debug, Clone, Default)]
pub struct TransportConfig {
    /// What is wanted.
    pub choice: TransportChoice,
    /// RDMA devices to use; every active port when empty.
    pub devices: Vec<DeviceSelector>,
    /// Peers that cannot do RDMA are refused rather than used over TCP.
    pub require_rdma: bool,
}

/// What is there.
#[derive(Debug, Clone)]
pub struct Ways {
    fabric: Option<Arc<Fabric>>,
    require_rdma: bool,
}

impl TransportConfig {
    /// Opens what is wanted, with the pool's region registered. An error names what is missing.
    pub fn open(&self, region: &Region) -> Result<Ways, FabricError> {
        let required = self.require_rdma || self.choice == TransportChoice::Rdma;
        if self.choice == TransportChoice::Tcp {
            return Ok(Ways { fabric: None, require_rdma: false });
        }
        let fabric = match Fabric::open(&FabricConfig { devices: self.devices.clone() }, region) {
            Ok(fabric) => {
                tracing::info!(rails = fabric.describe(), "RDMA");
                Some(fabric)
            }
            Err(error) if required => return Err(error),
            Err(error @ FabricError::NoDevice(_)) => {
                tracing::info!(%error, "KV goes over TCP");
                None
            }
            // A device is there and cannot be used: somebody should know.
            Err(error) => {
                tracing::warn!(%error, "KV goes over TCP");
                None
            }
        };
        Ok(Ways { fabric, require_rdma: self.require_rdma })
    }
}

impl Ways {
    /// Their names, best first, as peers and operators see them.
    pub fn names(&self) -> Vec<String> {
        let usable = |way: &Transport| match way {
            Transport::Rdma => self.fabric.is_some(),
            Transport::Tcp => !self.require_rdma,
            Transport::Shm => false,
        };
        Transport::ALL.iter().filter(|way| usable(way)).map(|way| way.name().to_owned()).collect()
    }

    /// Makes a sender use them.
    pub fn sender(&self, config: SenderConfig) -> SenderConfig {
        SenderConfig { fabric: self.fabric.clone(), require_rdma: self.require_rdma, ..config }
    }

    /// Makes a receiver use them.
    pub fn receiver(&self, config: ReceiverConfig) -> ReceiverConfig {
        ReceiverConfig { fabric: self.fabric.clone(), require_rdma: self.require_rdma, ..config }
    }
}
