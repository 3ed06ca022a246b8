//! Which ways KV takes between this worker and its peers.

use std::sync::Arc;

use engine::{KvDtype, KvLayout};
use kv_transport::verbs::DeviceSelector;
use kv_transport::{
    Fabric, FabricConfig, FabricError, GpuDirect, Packing, ReceiverConfig, Region, Secure, SenderConfig,
    Transport,
};
use tls::ClusterFiles;

use crate::secure::KvSecure;

/// What an operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TransportChoice {
    /// Device to device or shared memory with peers on this host, RDMA where this machine has it, else TCP.
    #[default]
    Auto,
    /// Only TCP.
    Tcp,
    /// RDMA: not to have it here is an error.
    Rdma,
}

/// As what KV travels over TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvWire {
    /// As the pools hold it.
    #[default]
    Plain,
    /// bf16 KV as eight-bit numbers with a scale for each head's vector, where the other side wants it too.
    Int8,
    /// The same as e4m3 numbers.
    Fp8,
}

/// Settings of the transport.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TransportConfig {
    /// What is wanted.
    pub choice: TransportChoice,
    /// RDMA devices to use; every active port when empty.
    pub devices: Vec<DeviceSelector>,
    /// Peers that cannot do RDMA are refused rather than used over TCP.
    pub require_rdma: bool,
    /// Whether network cards read and write the device's memory by themselves.
    pub gpudirect: GpuDirect,
    /// With certificates: RDMA may be used although what it writes is not encrypted.
    pub plain_rdma: bool,
    /// As what KV travels over TCP.
    pub wire: KvWire,
}

/// What is there.
#[derive(Debug, Clone)]
pub struct Ways {
    fabric: Option<Arc<Fabric>>,
    require_rdma: bool,
    /// Memory is shared with peers on this host.
    shares: bool,
    /// The pool can be shared, and its device's memory.
    is_shareable: bool,
    is_on_device: bool,
    tls: Option<ClusterFiles>,
}

impl TransportConfig {
    /// How cells of a pool of that layout are packed over TCP, if they are.
    pub fn packing(&self, layout: &KvLayout) -> Option<Packing> {
        let name = match self.wire {
            KvWire::Plain => return None,
            KvWire::Int8 => Packing::INT8,
            KvWire::Fp8 => Packing::FP8,
        };
        let packing = Packing::named(name, u16::try_from(layout.head_dim).ok()?);
        packing.filter(|_| layout.dtype == KvDtype::Bf16)
    }

    /// Opens what is wanted, with the pool's region registered. An error names what is missing.
    /// With certificates KV over TCP is encrypted, and RDMA, which is not, is used only where that was allowed.
    pub fn open(&self, region: &Region, tls: Option<&ClusterFiles>) -> Result<Ways, FabricError> {
        let required = self.require_rdma || self.choice == TransportChoice::Rdma;
        let (is_secure, tls) = (tls.is_some(), tls.cloned());
        let shares = self.choice == TransportChoice::Auto && !required;
        let (is_shareable, is_on_device) = (region.is_shareable(), region.is_on_device());
        let ways =
            |fabric, require_rdma| Ways { fabric, require_rdma, shares, is_shareable, is_on_device, tls };
        if self.choice == TransportChoice::Tcp {
            return Ok(ways(None, false));
        }
        if is_secure && !self.plain_rdma && !required && self.gpudirect != GpuDirect::Require {
            tracing::info!("KV goes over TCP, encrypted; RDMA is not, and --allow-plain-rdma was not given");
            return Ok(ways(None, false));
        }
        let config = FabricConfig { devices: self.devices.clone(), gpudirect: self.gpudirect };
        let fabric = match Fabric::open(&config, region) {
            Ok(fabric) => {
                tracing::info!(rails = fabric.describe(), "RDMA");
                Some(fabric)
            }
            Err(error) if required || self.gpudirect == GpuDirect::Require => return Err(error),
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
        if is_secure && fabric.is_some() {
            tracing::warn!("KV over RDMA is not encrypted; only its set-up is authenticated");
        }
        Ok(ways(fabric, self.require_rdma))
    }
}

impl Ways {
    /// Their names, best first, as peers and operators see them.
    pub fn names(&self) -> Vec<String> {
        let usable = |way: &Transport| match way {
            Transport::Rdma => self.fabric.is_some(),
            Transport::Tcp => !self.require_rdma,
            Transport::Shm => self.shares && self.is_shareable,
            Transport::CudaIpc => self.shares && self.is_shareable && self.is_on_device,
        };
        Transport::ALL.iter().filter(|way| usable(way)).map(|way| way.name().to_owned()).collect()
    }

    /// Makes a sender use them.
    pub fn sender(&self, config: SenderConfig) -> SenderConfig {
        let secure = self.tls.clone().map(|files| Arc::new(KvSecure(files)) as Arc<dyn Secure>);
        let (fabric, require_rdma) = (self.fabric.clone(), self.require_rdma);
        SenderConfig { fabric, require_rdma, lend: self.shares, secure, ..config }
    }

    /// Makes a receiver use them.
    pub fn receiver(&self, config: ReceiverConfig) -> ReceiverConfig {
        let (require_rdma, secure) = (self.require_rdma, self.tls.is_some());
        ReceiverConfig { fabric: self.fabric.clone(), require_rdma, secure, borrow: self.shares, ..config }
    }
}
