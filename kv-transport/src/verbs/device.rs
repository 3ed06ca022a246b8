//! Which RDMA ports this machine has, and which of a port's addresses (GIDs) to use.

use std::ffi::{CStr, c_int};
use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use super::ffi::{self, PortAttr, Verbs};

/// What kind of address a GID is; best last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum GidKind {
    /// Not usable: empty, or of a kind that is unknown.
    None,
    /// RoCE v1: cannot be routed.
    RoceV1,
    /// RoCE v2 on a link-local address.
    RoceV2LinkLocal,
    /// InfiniBand.
    Ib,
    /// RoCE v2 on an IPv6 address.
    RoceV2Ipv6,
    /// RoCE v2 on an IPv4 address.
    RoceV2Ipv4,
}

impl fmt::Display for GidKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::RoceV1 => "RoCE v1",
            Self::RoceV2LinkLocal => "RoCE v2, link-local",
            Self::Ib => "InfiniBand",
            Self::RoceV2Ipv6 => "RoCE v2, IPv6",
            Self::RoceV2Ipv4 => "RoCE v2, IPv4",
        })
    }
}

/// One address of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gid {
    /// Index in the port's table.
    pub index: u8,
    /// The address.
    pub address: Ipv6Addr,
    /// What it is.
    pub kind: GidKind,
    /// The network interface it belongs to; empty for InfiniBand.
    pub interface: String,
}

impl Gid {
    /// Whether other machines can be told it: neither loopback, nor link-local, nor a kind that cannot be routed.
    pub fn is_routable(&self) -> bool {
        let loopback =
            self.address.is_loopback() || self.address.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback());
        self.kind >= GidKind::Ib && !loopback
    }
}

/// A port of a device.
#[derive(Debug, Clone)]
pub struct PortInfo {
    /// The device's name, as in /sys/class/infiniband.
    pub device: String,
    /// Number of the port, from 1.
    pub port: u8,
    /// Whether the link is up.
    pub active: bool,
    /// Whether it is Ethernet (RoCE, iWARP), not InfiniBand.
    pub ethernet: bool,
    /// Bytes of the largest packet, now.
    pub mtu_bytes: u32,
    /// Its InfiniBand address, 0 on Ethernet.
    pub lid: u16,
    /// Its usable addresses, best first.
    pub gids: Vec<Gid>,
    /// What the device says about itself: `4: ACTIVE`, `100 Gb/sec (4X EDR)`, and so on.
    pub rate: String,
    /// Whether windows can be bound to one queue pair, so that a key is worthless to everyone else.
    pub windows: bool,
}

/// Which port and address to use: `device`, `device:port` or `device:port:gid`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSelector {
    /// The device's name.
    pub device: String,
    /// Its port; any when not given.
    pub port: Option<u8>,
    /// The index of its address; the best when not given.
    pub gid: Option<u8>,
}

impl std::str::FromStr for DeviceSelector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(':');
        let device = parts.next().filter(|d| !d.is_empty()).ok_or("the device's name is missing")?.to_owned();
        let mut number = |what: &str| match parts.next() {
            None => Ok(None),
            Some(part) => {
                part.parse().map(Some).map_err(|_| format!("{what} `{part}` is not a number up to 255"))
            }
        };
        let (port, gid) = (number("port")?, number("GID index")?);
        match parts.next() {
            None => Ok(Self { device, port, gid }),
            Some(_) => Err(format!("`{text}` has too many parts: device[:port[:gid]]")),
        }
    }
}

impl fmt::Display for DeviceSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.device)?;
        // A GID belongs to a port: without one, the first.
        match (self.port, self.gid) {
            (None, None) => Ok(()),
            (port, None) => write!(f, ":{}", port.unwrap_or(1)),
            (port, Some(gid)) => write!(f, ":{}:{gid}", port.unwrap_or(1)),
        }
    }
}

/// An open device's context together with what was read about its ports.
pub(crate) struct Opened {
    pub(crate) context: *mut ffi::Context,
    pub(crate) ports: Vec<PortInfo>,
    pub(crate) max_mr_bytes: u64,
    pub(crate) max_wr: u32,
    pub(crate) max_sge: u32,
}

/// Every port of every device. An error says why there can be none: no library, or no device.
pub fn ports() -> Result<Vec<PortInfo>, String> {
    let verbs = ffi::verbs()?;
    let opened = open_all(verbs)?;
    let mut all = Vec::new();
    for device in opened {
        all.extend(device.ports);
        // SAFETY: opened above, and nothing was made in it.
        unsafe { (verbs.close_device)(device.context) };
    }
    Ok(all)
}

/// Opens every device.
pub(crate) fn open_all(verbs: &Verbs) -> Result<Vec<Opened>, String> {
    let mut count: c_int = 0;
    // SAFETY: fills `count`; the list is ours until it is freed below.
    let list = unsafe { (verbs.get_device_list)(&raw mut count) };
    if list.is_null() {
        let error = std::io::Error::last_os_error();
        let why = if error.raw_os_error() == Some(libc::ENOSYS) {
            "the kernel has no RDMA device support loaded (ib_uverbs)".to_owned()
        } else {
            error.to_string()
        };
        return Err(format!("no RDMA devices: {why}"));
    }
    let mut opened = Vec::new();
    for at in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the list holds `count` devices.
        let device = unsafe { *list.add(at) };
        // SAFETY: a device of the list; the list keeps it until freed, an open context for longer.
        let context = unsafe { (verbs.open_device)(device) };
        // SAFETY: as above; the name is a C string inside the device.
        let name = unsafe { CStr::from_ptr((verbs.get_device_name)(device)) }.to_string_lossy().into_owned();
        if context.is_null() {
            tracing::warn!(device = name, error = %std::io::Error::last_os_error(), "cannot open an RDMA device");
            continue;
        }
        match describe(verbs, context, &name) {
            Some(described) => opened.push(described),
            // SAFETY: opened above, nothing was made in it.
            None => drop(unsafe { (verbs.close_device)(context) }),
        }
    }
    // SAFETY: the list of above, freed once.
    unsafe { (verbs.free_device_list)(list) };
    if opened.is_empty() { Err("no RDMA devices on this machine".into()) } else { Ok(opened) }
}

fn describe(verbs: &Verbs, context: *mut ffi::Context, name: &str) -> Option<Opened> {
    // SAFETY: all zero is a valid value of this plain C struct.
    let mut device: ffi::DeviceAttr = unsafe { std::mem::zeroed() };
    // SAFETY: an open context; fills the struct, whose size is asserted.
    if unsafe { (verbs.query_device)(context, &raw mut device) } != 0 {
        return None;
    }
    let windows = device.device_cap_flags & (ffi::DEVICE_MW_TYPE_2A | ffi::DEVICE_MW_TYPE_2B) != 0;
    let folder = PathBuf::from("/sys/class/infiniband").join(name).join("ports");
    let mut ports = Vec::new();
    for port in 1..=8_u8 {
        let mut attr = PortAttr::default();
        // SAFETY: an open context; fills the struct, which is larger than what the library writes.
        if unsafe { (verbs.query_port)(context, port, &raw mut attr) } != 0 {
            break;
        }
        let at = folder.join(port.to_string());
        let ethernet = attr.link_layer == ffi::LINK_ETHERNET;
        ports.push(PortInfo {
            device: name.to_owned(),
            port,
            active: attr.state == ffi::PORT_ACTIVE,
            ethernet,
            mtu_bytes: 128_u32.checked_shl(attr.active_mtu.try_into().unwrap_or(0)).unwrap_or(0),
            lid: attr.lid,
            gids: gids(&at, attr.gid_tbl_len, ethernet),
            rate: read(&at.join("rate")),
            windows,
        });
    }
    let positive = |n: c_int| u32::try_from(n).unwrap_or(0);
    Some(Opened {
        context,
        ports,
        max_mr_bytes: device.max_mr_size,
        max_wr: positive(device.max_qp_wr),
        max_sge: positive(device.max_sge),
    })
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The usable addresses of a port, best first.
fn gids(port: &Path, len: c_int, ethernet: bool) -> Vec<Gid> {
    let mut gids: Vec<Gid> = (0..u8::try_from(len.clamp(0, 255)).unwrap_or(u8::MAX))
        .filter_map(|index| {
            let address: Ipv6Addr = read(&port.join(format!("gids/{index}"))).parse().ok()?;
            // Reading the type of an empty entry fails.
            let kind = kind(address, &read(&port.join(format!("gid_attrs/types/{index}"))), ethernet);
            let interface = read(&port.join(format!("gid_attrs/ndevs/{index}")));
            (kind != GidKind::None).then_some(Gid { index, address, kind, interface })
        })
        .collect();
    gids.sort_by_key(|gid| (std::cmp::Reverse(gid.kind), gid.index));
    gids
}

fn kind(address: Ipv6Addr, named: &str, ethernet: bool) -> GidKind {
    if address.is_unspecified() || address.segments().get(4..) == Some(&[0; 4]) {
        return GidKind::None;
    }
    match named {
        _ if !ethernet => GidKind::Ib,
        "RoCE v2" if address.to_ipv4_mapped().is_some() => GidKind::RoceV2Ipv4,
        "RoCE v2" if address.is_unicast_link_local() => GidKind::RoceV2LinkLocal,
        "RoCE v2" => GidKind::RoceV2Ipv6,
        "IB/RoCE v1" => GidKind::RoceV1,
        _ => GidKind::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_is_read_or_refused_by_name() {
        let all: DeviceSelector = "mlx5_0:1:3".parse().unwrap();
        assert_eq!(all, DeviceSelector { device: "mlx5_0".into(), port: Some(1), gid: Some(3) });
        assert_eq!("mlx5_0".parse::<DeviceSelector>().unwrap().port, None);
        assert!("mlx5_0:x".parse::<DeviceSelector>().unwrap_err().contains("port `x`"));
        assert!("mlx5_0:1:900".parse::<DeviceSelector>().unwrap_err().contains("GID"));
        assert!(":1".parse::<DeviceSelector>().is_err());
        assert!("a:1:1:1".parse::<DeviceSelector>().is_err());
    }

    #[test]
    fn what_nobody_else_can_reach_is_not_routable() {
        let gid = |address: &str, kind| {
            Gid { index: 0, address: address.parse().unwrap(), kind, interface: String::new() }.is_routable()
        };
        assert!(gid("::ffff:10.0.0.1", GidKind::RoceV2Ipv4) && gid("fe80::1", GidKind::Ib));
        assert!(!gid("::ffff:127.0.0.1", GidKind::RoceV2Ipv4) && !gid("::1", GidKind::RoceV2Ipv6));
        assert!(!gid("fe80::1", GidKind::RoceV2LinkLocal) && !gid("::ffff:10.0.0.1", GidKind::RoceV1));
    }

    #[test]
    fn routable_roce_addresses_come_first() {
        let v4: Ipv6Addr = "::ffff:10.0.0.1".parse().unwrap();
        let local: Ipv6Addr = "fe80::1".parse().unwrap();
        assert_eq!(kind(v4, "RoCE v2", true), GidKind::RoceV2Ipv4);
        assert_eq!(kind(v4, "IB/RoCE v1", true), GidKind::RoceV1);
        assert_eq!(kind(local, "RoCE v2", true), GidKind::RoceV2LinkLocal);
        assert_eq!(kind("fe80::5".parse().unwrap(), "IB/RoCE v1", false), GidKind::Ib);
        assert_eq!(kind(Ipv6Addr::UNSPECIFIED, "RoCE v2", true), GidKind::None);
        assert!(GidKind::RoceV2Ipv4 > GidKind::RoceV2LinkLocal);
    }
}
