//! What a worker owns of its RDMA devices: every rail (a port with an address), its pool registered once on each.

use std::sync::Arc;

use super::device::{DeviceSelector, Gid, PortInfo, open_all};
use super::ffi::{self, Verbs};
use super::memory::{Direct, Domain, GpuDirect, Memory};
use crate::Region;
use crate::transport::Side;

/// Rails a worker uses at most.
const MAX_RAILS: usize = 8;

/// Which devices are used.
#[derive(Debug, Clone, Default)]
pub struct FabricConfig {
    /// Only these; every active port when empty.
    pub devices: Vec<DeviceSelector>,
    /// Whether they reach the device's memory of a pool by themselves.
    pub gpudirect: GpuDirect,
}

/// Why there is no RDMA here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FabricError {
    /// No library or no device: install or load what the text names.
    #[error("{0}")]
    NoDevice(String),
    /// A device that was asked for is not there or not usable.
    #[error("RDMA device {selector}: {reason}")]
    Selected {
        /// What was asked for.
        selector: String,
        /// What is wrong.
        reason: String,
    },
    /// Ports exist, none can be used: the text says why for each.
    #[error("no usable RDMA port: {0}")]
    NoPort(String),
    /// The pool cannot be registered: raise the memlock limit or take a smaller pool.
    #[error("cannot register {bytes} bytes of KV pool with {device}: {reason}")]
    Register {
        /// With which device.
        device: String,
        /// How much.
        bytes: usize,
        /// The kernel's words, and what to do.
        reason: String,
    },
    /// GPUDirect was required: the text says for each way why it is closed.
    #[error("{device} cannot reach the KV pool on its device by itself (GPUDirect): {reason}")]
    GpuDirect {
        /// Which network card.
        device: String,
        /// Why.
        reason: String,
    },
}

/// The rails of a worker. Shared by its sender and its receiver.
#[derive(Debug)]
pub struct Fabric {
    rails: Vec<Arc<Rail>>,
}

impl Fabric {
    /// Opens the devices and registers the region with each.
    pub fn open(config: &FabricConfig, region: &Region) -> Result<Arc<Self>, FabricError> {
        let verbs = ffi::verbs().map_err(FabricError::NoDevice)?;
        let opened = open_all(verbs).map_err(FabricError::NoDevice)?;
        let mut found = Vec::new();
        let mut unusable = Vec::new();
        let (mut seen, mut failure) = (Vec::new(), None);
        for device in opened {
            let context = Arc::new(ContextOwner { verbs, context: device.context });
            seen.extend(device.ports.iter().map(|port| format!("{}:{}", port.device, port.port)));
            for port in &device.ports {
                match choose(&config.devices, port) {
                    Choice::Not => {}
                    Choice::Unusable(why) => unusable.push(format!("{}:{} {why}", port.device, port.port)),
                    Choice::Take(gid) if found.len() < MAX_RAILS => {
                        let limits = Limits {
                            max_mr_bytes: device.max_mr_bytes,
                            max_wr: device.max_wr,
                            max_sge: device.max_sge,
                        };
                        match Rail::open(context.clone(), port, gid, limits, (region, config.gpudirect)) {
                            Ok(rail) => found.push(Arc::new(rail)),
                            // That GPUDirect was required outweighs what other ports say.
                            Err(_) if matches!(failure, Some(FabricError::GpuDirect { .. })) => {}
                            Err(error) => failure = Some(error),
                        }
                    }
                    Choice::Take(_) => {}
                }
            }
        }
        for selector in &config.devices {
            let name = &selector.device;
            if !found.iter().any(|rail| rail.port.device == *name) && failure.is_none() {
                let reason = unusable.iter().find(|why| why.starts_with(&format!("{name}:"))).cloned();
                let reason = reason.unwrap_or(format!("not found; there are {}", seen.join(", ")));
                return Err(FabricError::Selected { selector: name.clone(), reason });
            }
        }
        match (found.is_empty(), failure) {
            (_, Some(error @ FabricError::GpuDirect { .. })) => Err(error),
            (true, Some(error)) => Err(error),
            (true, None) => Err(FabricError::NoPort(unusable.join("; "))),
            (false, _) => Ok(Arc::new(Self { rails: found })),
        }
    }

    /// Number of rails.
    pub fn len(&self) -> usize {
        self.rails.len()
    }

    /// Whether there is no rail; never so for an open fabric.
    pub fn is_empty(&self) -> bool {
        self.rails.is_empty()
    }

    /// Ports in use, each with its address: for logs.
    pub fn describe(&self) -> String {
        let one = |rail: &Arc<Rail>| {
            let PortInfo { device, port, mtu_bytes, .. } = &rail.port;
            let memory = rail.memory.describe();
            format!("{device}:{port} gid {} ({}) mtu {mtu_bytes}{memory}", rail.gid.index, rail.gid.kind)
        };
        self.rails.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    /// Rails whose card reads and writes the device's memory of the pool by itself, now.
    pub fn direct(&self) -> usize {
        self.rails.iter().filter(|rail| rail.memory.side() == Side::Device).count()
    }

    pub(crate) fn rail(&self, at: usize) -> Option<&Arc<Rail>> {
        self.rails.get(at % self.rails.len().max(1))
    }

    /// The rail whose address begins most like the peer's: the one in its subnet.
    pub(crate) fn nearest(&self, gid: &[u8; 16]) -> Option<&Arc<Rail>> {
        let peer = u128::from_be_bytes(*gid);
        self.rails.iter().max_by_key(|rail| (u128::from(rail.gid.address) ^ peer).leading_zeros())
    }
}

enum Choice {
    Not,
    Take(Gid),
    Unusable(String),
}

fn choose(selectors: &[DeviceSelector], port: &PortInfo) -> Choice {
    let named = selectors.iter().find(|s| s.device == port.device && s.port.is_none_or(|p| p == port.port));
    if named.is_none() && !selectors.is_empty() {
        return Choice::Not;
    }
    if !port.active {
        return Choice::Unusable("is not active: check cable, switch and `ip link`".into());
    }
    let gid = match named.and_then(|selector| selector.gid) {
        Some(index) => port.gids.iter().find(|gid| gid.index == index),
        // On its own, loopback comes into question only when somebody names it, and so does what cannot be routed.
        None => port.gids.iter().find(|gid| named.is_some() || gid.is_routable()),
    };
    match gid {
        Some(gid) => Choice::Take(gid.clone()),
        None => Choice::Unusable(
            "has no usable GID: give its interface an IP address, or name one as device:port:gid".into(),
        ),
    }
}

struct Limits {
    max_mr_bytes: u64,
    max_wr: u32,
    max_sge: u32,
}

/// An open device, closed with its last user.
struct ContextOwner {
    verbs: &'static Verbs,
    context: *mut ffi::Context,
}

// SAFETY: libibverbs' contexts may be used from any thread; the pointer is valid until the owner is dropped.
unsafe impl Send for ContextOwner {}
// SAFETY: as above.
unsafe impl Sync for ContextOwner {}

impl Drop for ContextOwner {
    fn drop(&mut self) {
        // SAFETY: opened once; everything made in it held a reference and is gone.
        unsafe { (self.verbs.close_device)(self.context) };
    }
}

/// A protection domain, freed behind what is registered in it.
struct DomainOwner {
    pd: *mut ffi::Pd,
    context: Arc<ContextOwner>,
}

impl DomainOwner {
    fn new(context: Arc<ContextOwner>) -> std::io::Result<Self> {
        // SAFETY: an open context.
        let pd = unsafe { (context.verbs.alloc_pd)(context.context) };
        if pd.is_null() { Err(std::io::Error::last_os_error()) } else { Ok(Self { pd, context }) }
    }
}

impl Drop for DomainOwner {
    fn drop(&mut self) {
        // SAFETY: every queue pair, window and region of it is gone; freed once, the context by its owner afterwards.
        unsafe { (self.context.verbs.dealloc_pd)(self.pd) };
    }
}

/// A port with an address, a protection domain and the worker's pool registered in it.
pub(crate) struct Rail {
    pub(crate) verbs: &'static Verbs,
    pub(crate) port: PortInfo,
    pub(crate) gid: Gid,
    pub(crate) max_wr: u32,
    pub(crate) max_sge: u32,
    pub(crate) context: *mut ffi::Context,
    pub(crate) pd: *mut ffi::Pd,
    /// Dropped before the domain, and that before the region.
    pub(crate) memory: Memory,
    _domain: DomainOwner,
    _region: Region,
}

// SAFETY: libibverbs' objects may be used from any thread; the pointers are valid while the rail lives.
unsafe impl Send for Rail {}
// SAFETY: as above: calls on a protection domain and a region are thread-safe in libibverbs.
unsafe impl Sync for Rail {}

impl std::fmt::Debug for Rail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rail").field("device", &self.port.device).field("port", &self.port.port).finish()
    }
}

impl Rail {
    fn open(
        owner: Arc<ContextOwner>,
        port: &PortInfo,
        gid: Gid,
        limits: Limits,
        (region, gpudirect): (&Region, GpuDirect),
    ) -> Result<Self, FabricError> {
        let (verbs, context) = (owner.verbs, owner.context);
        let register = |reason: String| FabricError::Register {
            device: port.device.clone(),
            bytes: region.len(),
            reason,
        };
        if region.len() as u64 > limits.max_mr_bytes {
            return Err(register(format!("the device registers at most {} bytes", limits.max_mr_bytes)));
        }
        let owner =
            DomainOwner::new(owner).map_err(|error| register(format!("no protection domain: {error}")))?;
        // With windows nobody may write by the region's own key.
        let remote = if port.windows { ffi::ACCESS_MW_BIND } else { ffi::ACCESS_REMOTE_WRITE };
        let domain = Domain { verbs, pd: owner.pd, access: ffi::ACCESS_LOCAL_WRITE | remote };
        // SAFETY: the region's bytes are valid and unmoved while it lives, and the rail keeps a clone of it; what
        // the device may write in it is what landings own, by the same claims as any other write.
        let host = unsafe { domain.register(region.base() as u64, region.len()) }.map_err(|error| {
            let hint = match error.raw_os_error() {
                Some(libc::ENOMEM | libc::EPERM | libc::EAGAIN) => {
                    "; raise the memlock limit (ulimit -l unlimited)"
                }
                _ => "",
            };
            register(format!("{error}{hint}"))
        })?;
        let device = match region.device() {
            Some(device) if gpudirect != GpuDirect::Off => {
                Direct::open(domain, device.as_ref(), region.len())
            }
            None if gpudirect == GpuDirect::Require => {
                Err("the pool is on no device whose memory is a file".into())
            }
            _ => Err(String::new()),
        };
        if let Err(reason) = &device
            && gpudirect == GpuDirect::Require
        {
            return Err(FabricError::GpuDirect { device: port.device.clone(), reason: reason.clone() });
        }
        Ok(Self {
            verbs,
            port: port.clone(),
            gid,
            max_wr: limits.max_wr,
            max_sge: limits.max_sge,
            context,
            pd: owner.pd,
            memory: Memory::new(host, device),
            _domain: owner,
            _region: region.clone(),
        })
    }

    /// A queue pair on the device's memory broke. One that breaks before any cell went well says that the card cannot reach the
    /// device after all, whatever its registration promised: the next one uses the host side.
    pub(crate) fn doubts(&self, reason: &str) {
        if !self.memory.is_proven() {
            self.gives_up(reason);
        }
    }

    pub(crate) fn gives_up(&self, reason: &str) {
        if self.memory.gives_up() {
            let rail = &self.port.device;
            tracing::warn!(
                rail,
                reason,
                "GPUDirect does not work here; RDMA goes through host memory from now on"
            );
        }
    }
}
