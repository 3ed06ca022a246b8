//! A reliable connection: writes into the peer's pool, small announcements behind them, windows that give and take
//! the right to write. One task owns it.

mod completions;
mod connecting;
mod posting;
mod windows;

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::null_mut;
use std::sync::Arc;

use tokio::io::unix::AsyncFd;

pub(crate) use self::completions::Done;
pub(crate) use self::posting::WriteTo;
pub(crate) use self::windows::Window;
use self::windows::WindowState;
use super::fabric::Rail;
use super::ffi;
use super::memory::Registered;
use crate::Region;
use crate::transport::Side;

/// Bytes of an announcement at most, and of a buffer for one.
pub(crate) const CONTROL_BYTES: usize = 1024;
/// Pieces of source memory in one write.
const MAX_PIECES: u32 = 16;

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

    /// Requests that may be posted now.
    pub(crate) fn room(&self) -> u32 {
        self.control.sends.saturating_sub(self.in_flight)
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
