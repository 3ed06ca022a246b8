//! What became of requests.

use std::ffi::{CStr, c_int};
use std::ptr::null_mut;

use super::{PairBroken, QueuePair, Window};
use crate::verbs::ffi::Wc;

/// Completions looked at in one call.
const BATCH: usize = 32;

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

pub(super) const SENT: u64 = 1 << 56;
pub(super) const RECEIVED: u64 = 2 << 56;
pub(super) const BOUND: u64 = 3 << 56;
pub(super) const INVALIDATED: u64 = 4 << 56;

impl QueuePair {
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

    pub(super) fn drain_events(&self) {
        let (mut cq, mut context) = (null_mut(), null_mut());
        // SAFETY: the channel is alive and does not block; every event is acknowledged at once.
        unsafe {
            while (self.rail.verbs.get_cq_event)(self.channel, &raw mut cq, &raw mut context) == 0 {
                (self.rail.verbs.ack_cq_events)(cq, 1);
            }
        }
    }
}
