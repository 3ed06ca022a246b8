//! The few types and functions of libibverbs that are used, found at run time: the binary starts without it.
//!
//! Layouts are those of the library's stable ABI (IBVERBS_1.1) on 64-bit machines; the assertions below are the
//! sizes and offsets that its header gives. Calls on the data path go through the context's table of functions,
//! as the header's inline functions do.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem::{offset_of, size_of};
use std::sync::OnceLock;

use libloading::Library;

/// A device, known by pointer only.
#[repr(C)]
pub(crate) struct Device {
    _opaque: [u8; 0],
}

/// An open device; more follows. Only the table of functions is used.
#[repr(C)]
pub(crate) struct Context {
    pub(crate) device: *mut Device,
    pub(crate) ops: ContextOps,
}

type Unused = *const c_void;

#[repr(C)]
pub(crate) struct ContextOps {
    _compat_0: [Unused; 7],
    pub(crate) alloc_mw: Option<unsafe extern "C" fn(*mut Pd, c_int) -> *mut Mw>,
    _bind_mw: Unused,
    pub(crate) dealloc_mw: Option<unsafe extern "C" fn(*mut Mw) -> c_int>,
    _compat_1: Unused,
    pub(crate) poll_cq: Option<unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int>,
    pub(crate) req_notify_cq: Option<unsafe extern "C" fn(*mut Cq, c_int) -> c_int>,
    _compat_2: [Unused; 12],
    pub(crate) post_send: Option<unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int>,
    pub(crate) post_recv: Option<unsafe extern "C" fn(*mut Qp, *mut RecvWr, *mut *mut RecvWr) -> c_int>,
}

/// A protection domain.
#[repr(C)]
pub(crate) struct Pd {
    pub(crate) context: *mut Context,
    handle: u32,
}

/// A memory region.
#[repr(C)]
pub(crate) struct Mr {
    context: *mut Context,
    pd: *mut Pd,
    addr: *mut c_void,
    length: usize,
    handle: u32,
    pub(crate) lkey: u32,
    pub(crate) rkey: u32,
}

/// A memory window.
#[repr(C)]
pub(crate) struct Mw {
    context: *mut Context,
    pd: *mut Pd,
    pub(crate) rkey: u32,
    handle: u32,
    kind: c_int,
}

/// A completion channel.
#[repr(C)]
pub(crate) struct CompChannel {
    context: *mut Context,
    pub(crate) fd: c_int,
    refcnt: c_int,
}

/// A completion queue; more follows.
#[repr(C)]
pub(crate) struct Cq {
    pub(crate) context: *mut Context,
}

/// A queue pair; more follows.
#[repr(C)]
pub(crate) struct Qp {
    pub(crate) context: *mut Context,
    qp_context: *mut c_void,
    pd: *mut Pd,
    send_cq: *mut Cq,
    recv_cq: *mut Cq,
    srq: *mut c_void,
    handle: u32,
    pub(crate) qp_num: u32,
}

/// One piece of registered memory.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Sge {
    pub(crate) addr: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

/// The union behind a send request's fixed fields: remote address and key of an RDMA write.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct RemoteWrite {
    pub(crate) remote_addr: u64,
    pub(crate) rkey: u32,
    _rest: [u32; 5],
}

/// The window to bind.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct BindMw {
    pub(crate) mw: *mut Mw,
    pub(crate) rkey: u32,
    pub(crate) mr: *mut Mr,
    pub(crate) addr: u64,
    pub(crate) length: u64,
    pub(crate) access: c_uint,
}

/// A send request.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SendWr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut Self,
    pub(crate) sg_list: *mut Sge,
    pub(crate) num_sge: c_int,
    pub(crate) opcode: c_int,
    pub(crate) send_flags: c_uint,
    /// Immediate data, or the key to invalidate.
    pub(crate) imm_or_key: u32,
    pub(crate) rdma: RemoteWrite,
    _qp_type: u64,
    pub(crate) bind: BindMw,
}

impl SendWr {
    pub(crate) fn new(opcode: c_int) -> Self {
        // SAFETY: all zero is a valid value of this plain C struct: null pointers and zeros.
        Self { opcode, ..unsafe { std::mem::zeroed() } }
    }
}

/// A receive request.
#[repr(C)]
pub(crate) struct RecvWr {
    pub(crate) wr_id: u64,
    pub(crate) next: *mut Self,
    pub(crate) sg_list: *mut Sge,
    pub(crate) num_sge: c_int,
}

/// A completion.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Wc {
    pub(crate) wr_id: u64,
    pub(crate) status: c_int,
    pub(crate) opcode: c_int,
    pub(crate) vendor_err: u32,
    pub(crate) byte_len: u32,
    imm_data: u32,
    pub(crate) qp_num: u32,
    _rest: [u32; 4],
}

/// Bounds of a queue pair.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct QpCap {
    pub(crate) max_send_wr: u32,
    pub(crate) max_recv_wr: u32,
    pub(crate) max_send_sge: u32,
    pub(crate) max_recv_sge: u32,
    pub(crate) max_inline_data: u32,
}

/// What a queue pair is made of.
#[repr(C)]
pub(crate) struct QpInitAttr {
    pub(crate) qp_context: *mut c_void,
    pub(crate) send_cq: *mut Cq,
    pub(crate) recv_cq: *mut Cq,
    pub(crate) srq: *mut c_void,
    pub(crate) cap: QpCap,
    pub(crate) qp_type: c_int,
    pub(crate) sq_sig_all: c_int,
}

/// A route.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default)]
pub(crate) struct AhAttr {
    pub(crate) dgid: [u8; 16],
    pub(crate) flow_label: u32,
    pub(crate) sgid_index: u8,
    pub(crate) hop_limit: u8,
    pub(crate) traffic_class: u8,
    pub(crate) dlid: u16,
    pub(crate) sl: u8,
    pub(crate) src_path_bits: u8,
    pub(crate) static_rate: u8,
    pub(crate) is_global: u8,
    pub(crate) port_num: u8,
}

/// State of a queue pair.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct QpAttr {
    pub(crate) qp_state: c_int,
    pub(crate) cur_qp_state: c_int,
    pub(crate) path_mtu: c_int,
    pub(crate) path_mig_state: c_int,
    pub(crate) qkey: u32,
    pub(crate) rq_psn: u32,
    pub(crate) sq_psn: u32,
    pub(crate) dest_qp_num: u32,
    pub(crate) qp_access_flags: c_uint,
    pub(crate) cap: QpCap,
    pub(crate) ah_attr: AhAttr,
    pub(crate) alt_ah_attr: AhAttr,
    pub(crate) pkey_index: u16,
    pub(crate) alt_pkey_index: u16,
    pub(crate) en_sqd_async_notify: u8,
    pub(crate) sq_draining: u8,
    pub(crate) max_rd_atomic: u8,
    pub(crate) max_dest_rd_atomic: u8,
    pub(crate) min_rnr_timer: u8,
    pub(crate) port_num: u8,
    pub(crate) timeout: u8,
    pub(crate) retry_cnt: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) alt_port_num: u8,
    pub(crate) alt_timeout: u8,
    pub(crate) rate_limit: u32,
}

/// What a device can do; the fields that are read.
#[repr(C)]
pub(crate) struct DeviceAttr {
    pub(crate) fw_ver: [c_char; 64],
    _ids: [u64; 2],
    pub(crate) max_mr_size: u64,
    _page_size_cap: u64,
    _vendor: [u32; 3],
    pub(crate) max_qp: c_int,
    pub(crate) max_qp_wr: c_int,
    pub(crate) device_cap_flags: c_uint,
    pub(crate) max_sge: c_int,
    _rest: [u32; 27],
}

/// What a port is; the fields that are read.
#[repr(C)]
#[derive(Default)]
pub(crate) struct PortAttr {
    pub(crate) state: c_int,
    pub(crate) max_mtu: c_int,
    pub(crate) active_mtu: c_int,
    pub(crate) gid_tbl_len: c_int,
    _a: [u32; 4],
    _b: u16,
    pub(crate) lid: u16,
    _sm: u16,
    _c: [u8; 5],
    pub(crate) active_width: u8,
    pub(crate) active_speed: u8,
    _phys: u8,
    pub(crate) link_layer: u8,
    _flags: u8,
    _flags2: u16,
    /// Room for what later versions of the library may write.
    _reserve: [u32; 8],
}

const _: () = {
    assert!(offset_of!(Context, ops) == 8);
    assert!(offset_of!(ContextOps, alloc_mw) == 56 && offset_of!(ContextOps, dealloc_mw) == 72);
    assert!(offset_of!(ContextOps, poll_cq) == 88 && offset_of!(ContextOps, req_notify_cq) == 96);
    assert!(offset_of!(ContextOps, post_send) == 200 && offset_of!(ContextOps, post_recv) == 208);
    assert!(offset_of!(Mr, lkey) == 36 && offset_of!(Mr, rkey) == 40 && offset_of!(Mw, rkey) == 16);
    assert!(size_of::<SendWr>() == 128 && offset_of!(SendWr, opcode) == 28);
    assert!(offset_of!(SendWr, rdma) == 40 && offset_of!(RemoteWrite, rkey) == 8);
    assert!(
        offset_of!(SendWr, bind) == 80 && offset_of!(BindMw, mr) == 16 && offset_of!(BindMw, access) == 40
    );
    assert!(size_of::<RecvWr>() == 32 && size_of::<Sge>() == 16 && size_of::<Wc>() == 48);
    assert!(offset_of!(Wc, byte_len) == 20 && offset_of!(Wc, qp_num) == 28);
    assert!(size_of::<QpInitAttr>() == 64 && offset_of!(QpInitAttr, cap) == 32);
    assert!(offset_of!(QpInitAttr, qp_type) == 52 && offset_of!(Qp, qp_num) == 52);
    assert!(size_of::<QpAttr>() == 144 && offset_of!(QpAttr, path_mtu) == 8);
    assert!(offset_of!(QpAttr, ah_attr) == 56 && offset_of!(QpAttr, pkey_index) == 120);
    assert!(offset_of!(QpAttr, max_rd_atomic) == 126 && offset_of!(QpAttr, rnr_retry) == 132);
    assert!(
        size_of::<AhAttr>() == 32 && offset_of!(AhAttr, dlid) == 24 && offset_of!(AhAttr, port_num) == 30
    );
    assert!(offset_of!(DeviceAttr, max_mr_size) == 80 && offset_of!(DeviceAttr, max_qp_wr) == 112);
    assert!(offset_of!(DeviceAttr, device_cap_flags) == 116 && size_of::<DeviceAttr>() == 232);
    assert!(offset_of!(PortAttr, lid) == 34 && offset_of!(PortAttr, active_width) == 43);
    assert!(offset_of!(PortAttr, link_layer) == 46 && offset_of!(CompChannel, fd) == 8);
};

pub(crate) const ACCESS_LOCAL_WRITE: c_int = 1;
pub(crate) const ACCESS_REMOTE_WRITE: c_int = 2;
pub(crate) const ACCESS_MW_BIND: c_int = 16;
pub(crate) const DEVICE_MW_TYPE_2A: c_uint = 1 << 23;
pub(crate) const DEVICE_MW_TYPE_2B: c_uint = 1 << 24;
pub(crate) const MW_TYPE_2: c_int = 2;
pub(crate) const WR_RDMA_WRITE: c_int = 0;
pub(crate) const WR_SEND: c_int = 2;
pub(crate) const WR_LOCAL_INV: c_int = 7;
pub(crate) const WR_BIND_MW: c_int = 8;
pub(crate) const SEND_SIGNALED: c_uint = 2;
pub(crate) const SEND_INLINE: c_uint = 8;
pub(crate) const QPT_RC: c_int = 2;
pub(crate) const QPS_INIT: c_int = 1;
pub(crate) const QPS_RTR: c_int = 2;
pub(crate) const QPS_RTS: c_int = 3;
pub(crate) const QPS_ERR: c_int = 6;
pub(crate) const PORT_ACTIVE: c_int = 4;
pub(crate) const LINK_ETHERNET: u8 = 2;

/// Bits of the mask of `ibv_modify_qp`.
pub(crate) mod mask {
    use std::ffi::c_int;
    pub(crate) const STATE: c_int = 1;
    pub(crate) const ACCESS: c_int = 1 << 3;
    pub(crate) const PKEY: c_int = 1 << 4;
    pub(crate) const PORT: c_int = 1 << 5;
    pub(crate) const AV: c_int = 1 << 7;
    pub(crate) const PATH_MTU: c_int = 1 << 8;
    pub(crate) const TIMEOUT: c_int = 1 << 9;
    pub(crate) const RETRY: c_int = 1 << 10;
    pub(crate) const RNR_RETRY: c_int = 1 << 11;
    pub(crate) const RQ_PSN: c_int = 1 << 12;
    pub(crate) const MAX_RD: c_int = 1 << 13;
    pub(crate) const MIN_RNR: c_int = 1 << 15;
    pub(crate) const SQ_PSN: c_int = 1 << 16;
    pub(crate) const MAX_DEST_RD: c_int = 1 << 17;
    pub(crate) const DEST_QPN: c_int = 1 << 20;
}

type RegDmabufMr = unsafe extern "C" fn(*mut Pd, u64, usize, u64, c_int, c_int) -> *mut Mr;

macro_rules! library {
    ($($name:ident: fn($($arg:ty),*) -> $ret:ty;)*) => {
        /// The exported functions that are used.
        pub(crate) struct Verbs {
            $(pub(crate) $name: unsafe extern "C" fn($($arg),*) -> $ret,)*
            /// Since rdma-core 34: domain, offset, length, address, file, access.
            pub(crate) reg_dmabuf_mr: Option<RegDmabufMr>,
            _library: Library,
        }

        impl Verbs {
            fn load() -> Result<Self, String> {
                // SAFETY: libibverbs' initialisers only read configuration.
                let library = unsafe { Library::new("libibverbs.so.1") }
                    .map_err(|e| format!("libibverbs.so.1 is not here ({e}); Debian: rdma-core ibverbs-providers"))?;
                $(
                    // SAFETY: the name's default version has this signature by the library's stable ABI.
                    let $name = *unsafe {
                        library.get::<unsafe extern "C" fn($($arg),*) -> $ret>(concat!("ibv_", stringify!($name), "\0"))
                    }
                    .map_err(|e| format!("libibverbs.so.1 lacks ibv_{}: {e}", stringify!($name)))?;
                )*
                // SAFETY: as above.
                let reg_dmabuf_mr = unsafe { library.get::<RegDmabufMr>("ibv_reg_dmabuf_mr\0") };
                Ok(Self { $($name,)* reg_dmabuf_mr: reg_dmabuf_mr.ok().map(|f| *f), _library: library })
            }
        }
    };
}

library! {
    get_device_list: fn(*mut c_int) -> *mut *mut Device;
    free_device_list: fn(*mut *mut Device) -> ();
    get_device_name: fn(*mut Device) -> *const c_char;
    open_device: fn(*mut Device) -> *mut Context;
    close_device: fn(*mut Context) -> c_int;
    query_device: fn(*mut Context, *mut DeviceAttr) -> c_int;
    query_port: fn(*mut Context, u8, *mut PortAttr) -> c_int;
    alloc_pd: fn(*mut Context) -> *mut Pd;
    dealloc_pd: fn(*mut Pd) -> c_int;
    reg_mr: fn(*mut Pd, *mut c_void, usize, c_int) -> *mut Mr;
    dereg_mr: fn(*mut Mr) -> c_int;
    create_comp_channel: fn(*mut Context) -> *mut CompChannel;
    destroy_comp_channel: fn(*mut CompChannel) -> c_int;
    create_cq: fn(*mut Context, c_int, *mut c_void, *mut CompChannel, c_int) -> *mut Cq;
    destroy_cq: fn(*mut Cq) -> c_int;
    get_cq_event: fn(*mut CompChannel, *mut *mut Cq, *mut *mut c_void) -> c_int;
    ack_cq_events: fn(*mut Cq, c_uint) -> ();
    create_qp: fn(*mut Pd, *mut QpInitAttr) -> *mut Qp;
    modify_qp: fn(*mut Qp, *mut QpAttr, c_int) -> c_int;
    destroy_qp: fn(*mut Qp) -> c_int;
    wc_status_str: fn(c_int) -> *const c_char;
}

/// The library, loaded once; why not, where it cannot be.
pub(crate) fn verbs() -> Result<&'static Verbs, String> {
    static VERBS: OnceLock<Result<Verbs, String>> = OnceLock::new();
    VERBS.get_or_init(Verbs::load).as_ref().map_err(Clone::clone)
}
