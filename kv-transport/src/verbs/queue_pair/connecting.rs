//! From nothing to a connection, and out of it.

use std::ffi::c_int;
use std::ptr::null_mut;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{ChannelFd, PairBroken, QueuePair, checked, last_error};
use crate::verbs::ffi::{self, QpAttr, mask};
use crate::verbs::offer::Offer;

/// Bytes that go into the request itself rather than being fetched by the device.
const INLINE_BYTES: u32 = 220;
/// 4.096 µs · 2^16 = 0.27 s without an acknowledgement until a packet is sent again.
const ACK_TIMEOUT: u8 = 16;
/// Repetitions before the peer counts as lost, about 2 s. 7 would mean for ever on some devices.
const RETRIES: u8 = 6;

impl QueuePair {
    pub(super) fn make(&mut self) -> Result<(), PairBroken> {
        let (verbs, rail) = (self.rail.verbs, &self.rail);
        // SAFETY: an open context; a null result is checked.
        self.channel = unsafe { (verbs.create_comp_channel)(rail.context) };
        if self.channel.is_null() {
            return Err(last_error("no completion channel"));
        }
        // SAFETY: the channel was just made.
        let fd = unsafe { (*self.channel).fd };
        // SAFETY: a descriptor of ours; only its flags change.
        if unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) } != 0 {
            return Err(last_error("completion channel"));
        }
        // SAFETY: the channel owns the descriptor; `drop` ends the registration before it destroys the channel.
        let events = unsafe { AsyncFd::register_with_interest(ChannelFd(fd), Interest::READABLE) };
        self.events = Some(events.map_err(|e| PairBroken(format!("completion channel: {e}")))?);
        let entries = self.control.sends as usize + self.control.receive_buffers + 1;
        let entries = c_int::try_from(entries).unwrap_or(c_int::MAX);
        // SAFETY: an open context and a channel of it.
        self.cq = unsafe { (verbs.create_cq)(rail.context, entries, null_mut(), self.channel, 0) };
        if self.cq.is_null() {
            return Err(last_error("no completion queue"));
        }
        // SAFETY: the buffers live as long as `self`, which deregisters them first.
        self.buffers_mr = unsafe {
            (verbs.reg_mr)(rail.pd, self.buffers.base().cast(), self.buffers.len(), ffi::ACCESS_LOCAL_WRITE)
        };
        if self.buffers_mr.is_null() {
            return Err(last_error("cannot register announcement buffers"));
        }
        for inline in [INLINE_BYTES, 0] {
            let mut attr = ffi::QpInitAttr {
                qp_context: null_mut(),
                send_cq: self.cq,
                recv_cq: self.cq,
                srq: null_mut(),
                cap: ffi::QpCap {
                    max_send_wr: self.control.sends,
                    max_recv_wr: u32::try_from(self.control.receive_buffers).unwrap_or(1).max(1),
                    max_send_sge: u32::try_from(self.max_sge).unwrap_or(1),
                    max_recv_sge: 1,
                    max_inline_data: inline,
                },
                qp_type: ffi::QPT_RC,
                sq_sig_all: 0,
            };
            // SAFETY: domain and queue are alive; the struct is filled as the header wants it.
            self.qp = unsafe { (verbs.create_qp)(rail.pd, &raw mut attr) };
            if !self.qp.is_null() {
                self.inline_bytes = attr.cap.max_inline_data as usize;
                return Ok(());
            }
        }
        Err(last_error("no queue pair"))
    }

    fn modify(&mut self, what: &str, mut attr: QpAttr, mask: c_int) -> Result<(), PairBroken> {
        // SAFETY: the queue pair is alive; the struct's layout is asserted.
        checked(what, unsafe { (self.rail.verbs.modify_qp)(self.qp, &raw mut attr, mask | mask::STATE) })
    }

    pub(super) fn init(&mut self) -> Result<(), PairBroken> {
        let attr = QpAttr {
            qp_state: ffi::QPS_INIT,
            port_num: self.rail.port.port,
            qp_access_flags: ffi::ACCESS_REMOTE_WRITE.unsigned_abs(),
            ..QpAttr::default()
        };
        self.modify("queue pair to INIT", attr, mask::PKEY | mask::PORT | mask::ACCESS)
    }

    /// What the peer must know.
    pub(crate) fn offer(&self) -> Offer {
        Offer {
            gid: self.rail.gid.address.octets(),
            lid: self.rail.port.lid,
            // SAFETY: the queue pair is alive.
            number: unsafe { (*self.qp).qp_num },
            psn: self.psn,
            mtu_bytes: self.rail.port.mtu_bytes,
            ethernet: self.rail.port.ethernet,
        }
    }

    /// Connects to the peer's queue pair.
    pub(crate) fn connect(&mut self, peer: &Offer) -> Result<(), PairBroken> {
        if peer.ethernet != self.rail.port.ethernet {
            return Err(PairBroken("one side is on Ethernet, the other on InfiniBand".into()));
        }
        let mtu = peer.mtu_bytes.min(self.rail.port.mtu_bytes).clamp(256, 4096);
        let our_net = self.rail.gid.address.octets();
        let attr = QpAttr {
            qp_state: ffi::QPS_RTR,
            // 256 is 1, 4096 is 5.
            path_mtu: mtu.ilog2().cast_signed() - 7,
            dest_qp_num: peer.number & 0xFF_FFFF,
            rq_psn: peer.psn & 0xFF_FFFF,
            max_dest_rd_atomic: 1,
            min_rnr_timer: 12,
            ah_attr: ffi::AhAttr {
                dgid: peer.gid,
                sgid_index: self.rail.gid.index,
                hop_limit: 64,
                dlid: peer.lid,
                // Within one InfiniBand subnet the local address is enough.
                is_global: u8::from(peer.ethernet || our_net.get(..8) != peer.gid.get(..8)),
                port_num: self.rail.port.port,
                ..ffi::AhAttr::default()
            },
            ..QpAttr::default()
        };
        let bits =
            mask::AV | mask::PATH_MTU | mask::DEST_QPN | mask::RQ_PSN | mask::MAX_DEST_RD | mask::MIN_RNR;
        self.modify("queue pair to RTR (no route to the peer's GID?)", attr, bits)?;
        let attr = QpAttr {
            qp_state: ffi::QPS_RTS,
            sq_psn: self.psn,
            timeout: ACK_TIMEOUT,
            retry_cnt: RETRIES,
            rnr_retry: RETRIES,
            max_rd_atomic: 1,
            ..QpAttr::default()
        };
        let bits = mask::SQ_PSN | mask::TIMEOUT | mask::RETRY | mask::RNR_RETRY | mask::MAX_RD;
        self.modify("queue pair to RTS", attr, bits)
    }

    /// Breaks it: everything in flight ends with an error, nothing arrives any more.
    pub(crate) fn fail(&mut self) {
        let attr = QpAttr { qp_state: ffi::QPS_ERR, ..QpAttr::default() };
        if let Err(error) = self.modify("queue pair to ERR", attr, 0) {
            tracing::debug!(error = error.0, "queue pair");
        }
    }
}
