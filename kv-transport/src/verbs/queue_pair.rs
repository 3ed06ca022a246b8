//! A reliable connection: writes into the peer's pool, small announcements behind them, windows that give and take
//! the right to write. One task owns it.

use std::ffi::{CStr, c_int};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::null_mut;
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::fabric::Rail;
use super::ffi::{self, QpAttr, SendWr, Sge, Wc, mask};
use super::memory::Registered;
use super::offer::Offer;
use crate::Region;
use crate::transport::Side;

/// Bytes of an announcement at most, and of a buffer for one.
pub(crate) const CONTROL_BYTES: usize = 1024;
/// Pieces of source memory in one write.
const MAX_PIECES: u32 = 16;
/// Bytes that go into the request itself rather than being fetched by the device.
const INLINE_BYTES: u32 = 220;
/// 4.096 µs · 2^16 = 0.27 s without an acknowledgement until a packet is sent again.
const ACK_TIMEOUT: u8 = 16;
/// Repetitions before the peer counts as lost, about 2 s. 7 would mean for ever on some devices.
const RETRIES: u8 = 6;
/// Completions looked at in one call.
const BATCH: usize = 32;

/// The queue pair does not work any more; the text says why.
#[derive(Debug, Clone)]
pub(crate) struct PairBroken(pub(crate) String);

/// How a queue pair is dimensioned.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Control {
    /// Requests in flight.
    pub(crate) sends: u32,
    /// Announcements on their way out at a time.
    pub(crate) send_buffers: usize,
    /// Announcements that may arrive before they are looked at.
    pub(crate) receive_buffers: usize,
}

/// One write: local pieces, in order, to a contiguous range of the peer's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WriteTo {
    pub(crate) remote: u64,
    pub(crate) pieces: Vec<Range<usize>>,
}

/// A request that is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    /// The announcement in this buffer, and every write before it, is at the peer.
    Sent(usize),
    /// An announcement of that many bytes is in this buffer.
    Received(usize, usize),
    /// The window may be used by the peer.
    Bound(Window),
    /// Nothing can be written through the window any more.
    Invalidated(Window),
}

/// A memory window of this queue pair, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Window(usize);

struct WindowState {
    mw: *mut ffi::Mw,
    rkey: u32,
    free: bool,
}

struct ChannelFd(RawFd);

impl AsRawFd for ChannelFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

pub(crate) struct QueuePair {
    /// Dropped first: the descriptor must leave the reactor before it is closed.
    events: Option<AsyncFd<ChannelFd>>,
    rail: Arc<Rail>,
    /// Which memory of the pool it reads and lets be written.
    side: Side,
    channel: *mut ffi::CompChannel,
    cq: *mut ffi::Cq,
    qp: *mut ffi::Qp,
    buffers: Region,
    buffers_mr: *mut ffi::Mr,
    windows: Vec<WindowState>,
    control: Control,
    inline_bytes: usize,
    max_sge: usize,
    psn: u32,
    /// Requests posted whose completion, or that of a later one, was not seen.
    in_flight: u32,
    /// Requests that the completion of a buffer stands for.
    weights: Vec<u32>,
}

// SAFETY: libibverbs' objects may be used from any thread, by one at a time: every call takes `&mut self`, or
// touches only the channel's descriptor.
unsafe impl Send for QueuePair {}
// SAFETY: shared references give access to plain numbers and to `AsyncFd`, which is Sync.
unsafe impl Sync for QueuePair {}

impl std::fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueuePair").field("rail", &self.rail).finish_non_exhaustive()
    }
}

fn last_error(what: &str) -> PairBroken {
    PairBroken(format!("{what}: {}", io::Error::last_os_error()))
}

fn checked(what: &str, code: c_int) -> Result<(), PairBroken> {
    match code {
        0 => Ok(()),
        code => Err(PairBroken(format!("{what}: {}", io::Error::from_raw_os_error(code.abs())))),
    }
}

const SENT: u64 = 1 << 56;
const RECEIVED: u64 = 2 << 56;
const BOUND: u64 = 3 << 56;
const INVALIDATED: u64 = 4 << 56;

impl QueuePair {
    /// A queue pair that can receive and is not connected yet. Inside a runtime only.
    pub(crate) fn new(rail: Arc<Rail>, control: Control) -> Result<Self, PairBroken> {
        let sends = control.sends.min(rail.max_wr.max(1));
        let max_sge = MAX_PIECES.min(rail.max_sge.max(1));
        let buffers = control.send_buffers + control.receive_buffers;
        let mut pair = Self {
            events: None,
            channel: null_mut(),
            cq: null_mut(),
            qp: null_mut(),
            buffers: Region::zeroed(buffers * CONTROL_BYTES),
            buffers_mr: null_mut(),
            windows: Vec::new(),
            control: Control { sends, ..control },
            inline_bytes: 0,
            max_sge: max_sge as usize,
            psn: rand::random::<u32>() & 0xFF_FFFF,
            in_flight: 0,
            weights: vec![0; control.send_buffers],
            side: rail.memory.side(),
            rail,
        };
        // From here on dropping `pair` frees what was made.
        pair.make()?;
        pair.init()?;
        for buffer in 0..control.receive_buffers {
            pair.receive_into(buffer)?;
        }
        Ok(pair)
    }

    fn make(&mut self) -> Result<(), PairBroken> {
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

    fn init(&mut self) -> Result<(), PairBroken> {
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

    /// Requests that may be posted now.
    pub(crate) fn room(&self) -> u32 {
        self.control.sends.saturating_sub(self.in_flight)
    }

    /// Pieces that one write takes.
    pub(crate) fn max_pieces(&self) -> usize {
        self.max_sge
    }

    /// Posts writes into the peer's pool with its key, then the announcement, which completes as `Sent(buffer)`.
    /// Needs room for one request more than there are writes.
    pub(crate) fn write_and_announce(
        &mut self,
        writes: &[WriteTo],
        key: u32,
        announcement: &[u8],
        buffer: usize,
    ) -> Result<(), PairBroken> {
        let mut pieces: Vec<Sge> =
            Vec::with_capacity(writes.iter().map(|w| w.pieces.len()).sum::<usize>() + 1);
        let memory = self.memory();
        let (base, lkey) = (memory.base, memory.lkey());
        for piece in writes.iter().flat_map(|w| &w.pieces) {
            if piece.end > memory.len || piece.start > piece.end {
                return Err(PairBroken("a piece outside the region".into()));
            }
            let length = u32::try_from(piece.len()).map_err(|_| PairBroken("a piece too long".into()))?;
            pieces.push(Sge { addr: base + piece.start as u64, length, lkey });
        }
        let at = buffer * CONTROL_BYTES;
        if buffer >= self.control.send_buffers || announcement.len() > CONTROL_BYTES {
            return Err(PairBroken("no such announcement buffer".into()));
        }
        self.buffers.copy_in(at, announcement).map_err(|e| PairBroken(e.to_string()))?;
        pieces.push(self.buffer(at, announcement.len()));
        let mut requests = Vec::with_capacity(writes.len() + 1);
        let mut first = 0;
        for write in writes {
            let mut request = SendWr::new(ffi::WR_RDMA_WRITE);
            request.rdma.remote_addr = write.remote;
            request.rdma.rkey = key;
            request.num_sge = c_int::try_from(write.pieces.len()).unwrap_or(c_int::MAX);
            request.sg_list = pieces.get_mut(first).map_or(null_mut(), |piece| piece);
            first += write.pieces.len();
            requests.push(request);
        }
        let mut request = SendWr::new(ffi::WR_SEND);
        request.wr_id = SENT | buffer as u64;
        request.num_sge = 1;
        request.sg_list = pieces.get_mut(first).map_or(null_mut(), |piece| piece);
        request.send_flags = ffi::SEND_SIGNALED;
        if announcement.len() <= self.inline_bytes {
            request.send_flags |= ffi::SEND_INLINE;
        }
        requests.push(request);
        let weight = u32::try_from(requests.len()).unwrap_or(u32::MAX);
        if let Some(kept) = self.weights.get_mut(buffer) {
            *kept = weight;
        }
        self.post(&mut requests)
    }

    fn buffer(&self, at: usize, len: usize) -> Sge {
        // SAFETY: the buffers are registered while `self` lives.
        let lkey = unsafe { (*self.buffers_mr).lkey };
        Sge { addr: self.buffers.base() as u64 + at as u64, length: u32::try_from(len).unwrap_or(0), lkey }
    }

    /// Posts a chain of requests.
    fn post(&mut self, requests: &mut [SendWr]) -> Result<(), PairBroken> {
        let count = u32::try_from(requests.len()).unwrap_or(u32::MAX);
        if self.room() < count {
            return Err(PairBroken("more requests than the queue holds".into()));
        }
        let mut next: *mut SendWr = null_mut();
        for request in requests.iter_mut().rev() {
            request.next = next;
            next = request;
        }
        let mut bad = null_mut();
        // SAFETY: the queue pair is alive; the chain and its lists of pieces live until the call returns, which
        // copies them; the memory they name is registered and kept by `self`, the rail, and the push's claims.
        let code = unsafe {
            match (*(*self.qp).context).ops.post_send {
                Some(post) => post(self.qp, next, &raw mut bad),
                None => libc::ENOSYS,
            }
        };
        checked("cannot post a request", code)?;
        self.in_flight += count;
        Ok(())
    }

    /// Lets an announcement arrive in a buffer.
    pub(crate) fn receive_into(&mut self, buffer: usize) -> Result<(), PairBroken> {
        let mut piece = self.buffer((self.control.send_buffers + buffer) * CONTROL_BYTES, CONTROL_BYTES);
        let mut request = ffi::RecvWr {
            wr_id: RECEIVED | buffer as u64,
            next: null_mut(),
            sg_list: &raw mut piece,
            num_sge: 1,
        };
        let mut bad = null_mut();
        // SAFETY: as in `post`; the buffer belongs to `self`.
        let code = unsafe {
            match (*(*self.qp).context).ops.post_recv {
                Some(post) => post(self.qp, &raw mut request, &raw mut bad),
                None => libc::ENOSYS,
            }
        };
        checked("cannot post a receive", code)
    }

    /// The announcement in a buffer.
    pub(crate) fn received(&self, buffer: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len.min(CONTROL_BYTES)];
        let at = (self.control.send_buffers + buffer) * CONTROL_BYTES;
        // Within the buffers for every number that a completion can name.
        let _ = self.buffers.copy_out(at, &mut bytes);
        bytes
    }

    pub(crate) fn side(&self) -> Side {
        self.side
    }

    fn memory(&self) -> &Registered {
        self.rail.memory.of(self.side)
    }

    /// Where the pool begins, to the peer's writes.
    pub(crate) fn base(&self) -> u64 {
        self.memory().base
    }

    /// Cells came or went as they should, or did not: false when that shows that the card does not reach the device.
    pub(crate) fn proves(&self, went_well: bool) -> bool {
        let is_direct = self.side == Side::Device;
        if is_direct && went_well {
            self.rail.memory.proves();
        }
        went_well || !is_direct || self.rail.memory.is_proven()
    }

    /// It broke: where it was the first on the device's memory, that was why.
    pub(crate) fn doubts(&self, PairBroken(reason): &PairBroken) {
        if self.side == Side::Device {
            self.rail.doubts(reason);
        }
    }

    /// The device failed: the next queue pair uses the host side.
    pub(crate) fn gives_up(&self, reason: &str) {
        self.rail.gives_up(reason);
    }

    /// Whether keys can be given and taken one by one.
    pub(crate) fn has_windows(&self) -> bool {
        self.rail.port.windows
    }

    /// The region's own key, for devices without windows.
    pub(crate) fn region_key(&self) -> u32 {
        self.memory().rkey()
    }

    /// Starts to give the peer of this queue pair, and nobody else, a key to the region: `Bound` follows.
    pub(crate) fn bind(&mut self) -> Result<Window, PairBroken> {
        let at = match self.windows.iter().position(|window| window.free) {
            Some(at) => at,
            None => self.new_window()?,
        };
        let window = self.windows.get_mut(at).ok_or(PairBroken("no such window".into()))?;
        window.free = false;
        // The low byte is the owner's to choose; a new one makes every earlier key of the window worthless.
        window.rkey = (window.rkey & !0xFF) | (window.rkey.wrapping_add(1) & 0xFF);
        let (mw, rkey) = (window.mw, window.rkey);
        let memory = self.memory();
        let mut request = SendWr::new(ffi::WR_BIND_MW);
        request.wr_id = BOUND | at as u64;
        request.send_flags = ffi::SEND_SIGNALED;
        request.bind = ffi::BindMw {
            mw,
            rkey,
            mr: memory.mr,
            addr: memory.base,
            length: memory.len as u64,
            access: ffi::ACCESS_REMOTE_WRITE.unsigned_abs(),
        };
        self.post(std::slice::from_mut(&mut request))?;
        Ok(Window(at))
    }

    fn new_window(&mut self) -> Result<usize, PairBroken> {
        // SAFETY: the domain is alive.
        let mw = unsafe {
            match (*self.rail.context).ops.alloc_mw {
                Some(alloc) => alloc(self.rail.pd, ffi::MW_TYPE_2),
                None => null_mut(),
            }
        };
        if mw.is_null() {
            return Err(last_error("no memory window"));
        }
        // SAFETY: just allocated.
        let rkey = unsafe { (*mw).rkey };
        self.windows.push(WindowState { mw, rkey, free: false });
        Ok(self.windows.len() - 1)
    }

    /// The key of a bound window.
    pub(crate) fn key(&self, window: Window) -> u32 {
        self.windows.get(window.0).map_or(0, |window| window.rkey)
    }

    /// Starts to take a key back: after `Invalidated` nothing can be written with it.
    pub(crate) fn invalidate(&mut self, window: Window) -> Result<(), PairBroken> {
        let mut request = SendWr::new(ffi::WR_LOCAL_INV);
        request.wr_id = INVALIDATED | window.0 as u64;
        request.imm_or_key = self.key(window);
        request.send_flags = ffi::SEND_SIGNALED;
        self.post(std::slice::from_mut(&mut request))
    }

    /// What is done since the last look. On an error what succeeded before it is in `done`.
    pub(crate) fn poll(&mut self, done: &mut Vec<Done>) -> Result<(), PairBroken> {
        loop {
            let mut entries = [Wc::default(); BATCH];
            // SAFETY: the queue is alive; the array holds as many entries as said.
            let n = unsafe {
                match (*(*self.cq).context).ops.poll_cq {
                    Some(poll) => poll(self.cq, BATCH as c_int, entries.as_mut_ptr()),
                    None => -1,
                }
            };
            let n = usize::try_from(n).map_err(|_| PairBroken("the completion queue failed".into()))?;
            for entry in entries.iter().take(n) {
                if entry.status != 0 {
                    return Err(PairBroken(self.explain(entry)));
                }
                done.push(self.finished(entry));
            }
            if n < BATCH {
                return Ok(());
            }
        }
    }

    fn finished(&mut self, entry: &Wc) -> Done {
        let number = usize::try_from(entry.wr_id & (SENT - 1)).unwrap_or(usize::MAX);
        let weight = match entry.wr_id & !(SENT - 1) {
            SENT => self.weights.get(number).copied().unwrap_or(0),
            RECEIVED => return Done::Received(number, entry.byte_len as usize),
            _ => 1,
        };
        self.in_flight = self.in_flight.saturating_sub(weight);
        match entry.wr_id & !(SENT - 1) {
            BOUND => {
                if let Some(window) = self.windows.get(number) {
                    // The window's owner keeps this field: the next bind must name the present key.
                    // SAFETY: allocated by us and not freed before `self`.
                    unsafe { (*window.mw).rkey = window.rkey };
                }
                Done::Bound(Window(number))
            }
            INVALIDATED => {
                if let Some(window) = self.windows.get_mut(number) {
                    window.free = true;
                }
                Done::Invalidated(Window(number))
            }
            _ => Done::Sent(number),
        }
    }

    fn explain(&self, entry: &Wc) -> String {
        // SAFETY: the library returns a static C string for every status.
        let text = unsafe { CStr::from_ptr((self.rail.verbs.wc_status_str)(entry.status)) }.to_string_lossy();
        format!(
            "{text} (status {}, vendor {:#x}) on {}",
            entry.status, entry.vendor_err, self.rail.port.device
        )
    }

    /// Asks to be woken at the next completion. Look once more before waiting.
    pub(crate) fn arm(&mut self) {
        // SAFETY: the queue is alive.
        unsafe {
            if let Some(arm) = (*(*self.cq).context).ops.req_notify_cq {
                arm(self.cq, 0);
            }
        }
    }

    /// Waits for a completion after [`QueuePair::arm`]. Cancel-safe.
    pub(crate) async fn event(&self) {
        let Some(events) = &self.events else { return std::future::pending().await };
        if let Ok(mut guard) = events.readable().await {
            guard.clear_ready();
        }
        self.drain_events();
    }

    fn drain_events(&self) {
        let (mut cq, mut context) = (null_mut(), null_mut());
        // SAFETY: the channel is alive and does not block; every event is acknowledged at once.
        unsafe {
            while (self.rail.verbs.get_cq_event)(self.channel, &raw mut cq, &raw mut context) == 0 {
                (self.rail.verbs.ack_cq_events)(cq, 1);
            }
        }
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        self.events = None;
        if !self.qp.is_null() {
            // Already in this state it takes no more packets, whatever destroying it does.
            self.fail();
        }
        let verbs = self.rail.verbs;
        // SAFETY: each object was made by `make` or is null, and is freed once, users before what they use. After
        // `destroy_qp` nothing of the peer can reach memory through it; buffers are freed after their region.
        unsafe {
            // Windows before the queue pair they are bound to: soft-RoCE waits for them for ever otherwise.
            for window in &self.windows {
                if let Some(dealloc) = (*self.rail.context).ops.dealloc_mw {
                    dealloc(window.mw);
                }
            }
            if !self.qp.is_null() && (verbs.destroy_qp)(self.qp) != 0 {
                tracing::error!("a queue pair could not be destroyed; it stays in the error state");
            }
            if !self.buffers_mr.is_null() {
                (verbs.dereg_mr)(self.buffers_mr);
            }
            if !self.cq.is_null() {
                if !self.channel.is_null() {
                    self.drain_events();
                }
                (verbs.destroy_cq)(self.cq);
            }
            if !self.channel.is_null() {
                (verbs.destroy_comp_channel)(self.channel);
            }
        }
    }
}
