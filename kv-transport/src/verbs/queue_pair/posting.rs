//! Requests and buffers for announcements.

use std::ffi::c_int;
use std::ops::Range;
use std::ptr::null_mut;

use super::completions::{RECEIVED, SENT};
use super::{CONTROL_BYTES, PairBroken, QueuePair, checked};
use crate::verbs::ffi::{self, SendWr, Sge};

/// One write: local pieces, in order, to a contiguous range of the peer's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WriteTo {
    pub(crate) remote: u64,
    pub(crate) pieces: Vec<Range<usize>>,
}

impl QueuePair {
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
    pub(super) fn post(&mut self, requests: &mut [SendWr]) -> Result<(), PairBroken> {
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
}
