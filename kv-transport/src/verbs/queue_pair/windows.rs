//! Memory windows: who may write.

use std::ptr::null_mut;

use super::completions::{BOUND, INVALIDATED};
use super::{PairBroken, QueuePair, last_error};
use crate::verbs::ffi::{self, SendWr};

/// A memory window of this queue pair, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Window(pub(super) usize);

pub(super) struct WindowState {
    pub(super) mw: *mut ffi::Mw,
    pub(super) rkey: u32,
    pub(super) free: bool,
}

impl QueuePair {
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
}
