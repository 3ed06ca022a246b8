//! Registered memory: the only file that touches raw pointers and scattered system calls.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::device::DeviceMemory;
use crate::summed::copy_summed;

/// Pieces one system call moves at most, the head or tail buffer included. Linux allows 1024.
pub(crate) const MAX_PIECES: usize = 72;

/// A piece of registered memory, kept alive by whoever owns it.
///
/// The transport never hands out references into it: bytes enter and leave through system calls and copies
/// that are checked against its length.
#[derive(Clone)]
pub struct Region {
    base: NonNull<u8>,
    len: usize,
    file: Option<Arc<OwnedFd>>,
    device: Option<Arc<dyn DeviceMemory>>,
    _keepalive: Arc<dyn Any + Send + Sync>,
}

// SAFETY: a region is an address and a length; `from_raw` demands that the memory may be accessed from any
// thread, and the keepalive is itself Send + Sync.
unsafe impl Send for Region {}
// SAFETY: as above; concurrent accesses to the same bytes are excluded by the claims of the transfer states.
unsafe impl Sync for Region {}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("len", &self.len).finish_non_exhaustive()
    }
}

struct Pages {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: `Pages` owns its allocation and gives no access to it but through `Region`.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated in `Region::zeroed` with exactly this layout, freed once.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

impl Region {
    /// Registers `len` bytes at `base`.
    ///
    /// # Safety
    /// The bytes must be valid for reads and writes, unmoved, from any thread, for as long as `keepalive`
    /// lives. While a landing owns a cell, or a push reads one, nobody else may write it or hold a reference
    /// to it; other bytes of the region are the owner's business.
    pub unsafe fn from_raw(base: *mut u8, len: usize, keepalive: Arc<dyn Any + Send + Sync>) -> Self {
        let (base, len) = NonNull::new(base).map_or((NonNull::dangling(), 0), |base| (base, len));
        Self { base, len, file: None, device: None, _keepalive: keepalive }
    }

    /// The file of which the memory is a mapping, from its beginning, sealed against shrinking: peers on this host may be
    /// handed it to read.
    #[must_use]
    pub fn backed_by(self, file: Arc<OwnedFd>) -> Self {
        Self { file: Some(file), ..self }
    }

    /// Where its cells really live: a peer on this host whose cells do so too copies them there, and not through this memory.
    #[must_use]
    pub fn on_device(self, device: Arc<dyn DeviceMemory>) -> Self {
        Self { device: Some(device), ..self }
    }

    /// Whether its cells live on a device that peers on this host may reach.
    pub fn is_on_device(&self) -> bool {
        self.device.is_some()
    }

    pub(crate) fn device(&self) -> Option<Arc<dyn DeviceMemory>> {
        self.device.clone()
    }

    /// Whether peers on this host can be let read it.
    pub fn is_shareable(&self) -> bool {
        self.file.is_some()
    }

    pub(crate) fn file(&self) -> Option<Arc<OwnedFd>> {
        self.file.clone()
    }

    /// Allocates page-aligned zeroed memory and registers it.
    pub fn zeroed(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), 4096).unwrap_or(Layout::new::<u8>());
        // SAFETY: the layout's size is not zero.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(raw) else { handle_alloc_error(layout) };
        let len = len.min(layout.size());
        Self { base, len, file: None, device: None, _keepalive: Arc::new(Pages { base, layout }) }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first byte, for registration with a device. Dangling when empty.
    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The address of a range after checking that it lies inside.
    fn at(&self, range: &Range<usize>) -> io::Result<*mut u8> {
        if range.start > range.end || range.end > self.len {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "range outside the region"));
        }
        // SAFETY: start ≤ end ≤ len, so the result stays inside the region or one past its end.
        Ok(unsafe { self.base.as_ptr().add(range.start) })
    }

    /// CRC-32C of a range as it stands in memory now, continuing from `before` (0 to begin).
    pub fn checksum(&self, before: u32, range: Range<usize>) -> io::Result<u32> {
        let at = self.at(&range)?;
        // SAFETY: in bounds and alive; by `from_raw`'s contract and the claim on the cell nobody writes it now.
        Ok(crc32c::crc32c_append(before, unsafe { std::slice::from_raw_parts(at, range.len()) }))
    }

    /// Shows a range as it stands in memory now, for as long as `look` runs.
    pub(crate) fn with_bytes<T>(&self, range: Range<usize>, look: impl FnOnce(&[u8]) -> T) -> io::Result<T> {
        let at = self.at(&range)?;
        // SAFETY: in bounds and alive; a push reads only cells whose bytes are final, so nobody writes them meanwhile
        // (`from_raw`'s contract).
        Ok(look(unsafe { std::slice::from_raw_parts(at, range.len()) }))
    }

    /// Lets a range be filled, for as long as `fill` runs.
    pub(crate) fn with_bytes_mut<T>(
        &self,
        range: Range<usize>,
        fill: impl FnOnce(&mut [u8]) -> T,
    ) -> io::Result<T> {
        let at = self.at(&range)?;
        // SAFETY: in bounds and alive; the range lies in a cell that was claimed for this write, so nobody else reads or writes
        // it (`from_raw`'s contract).
        Ok(fill(unsafe { std::slice::from_raw_parts_mut(at, range.len()) }))
    }

    /// Copies `bytes` to `offset`.
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let at = self.at(&(offset..offset.saturating_add(bytes.len())))?;
        // SAFETY: in bounds and alive; `bytes` is an ordinary slice and nobody holds references into the region.
        unsafe { std::ptr::copy(bytes.as_ptr(), at, bytes.len()) };
        Ok(())
    }

    /// Copies `len` bytes at `from` to `offset`; yields the CRC-32C of what is there now.
    ///
    /// # Safety
    /// `from` must be valid for reads of `len` bytes, which may change meanwhile, and not overlap the region.
    pub(crate) unsafe fn copy_from(&self, offset: usize, from: *const u8, len: usize) -> io::Result<u32> {
        let at = self.at(&(offset..offset.saturating_add(len)))?;
        // SAFETY: in bounds and alive; a claim keeps everybody else from the target, and the rest is the caller's word.
        Ok(unsafe { copy_summed(from, at, len) })
    }

    /// Copies from `offset` into `bytes`.
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) -> io::Result<()> {
        let at = self.at(&(offset..offset.saturating_add(bytes.len())))?;
        // SAFETY: as in `copy_in`, the other way.
        unsafe { std::ptr::copy(at, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// One `readv`: fills `places` in order, then `tail`. At most [`MAX_PIECES`] pieces are used.
    pub(crate) fn read_from(
        &self,
        fd: BorrowedFd<'_>,
        places: impl Iterator<Item = Range<usize>>,
        tail: &mut [u8],
    ) -> io::Result<usize> {
        let mut pieces = Pieces::new();
        for place in places.take(MAX_PIECES - 1) {
            pieces.push(self.at(&place)?, place.len());
        }
        pieces.push(tail.as_mut_ptr(), tail.len());
        // SAFETY: every piece was bounds-checked and stays alive during the call; `tail` is borrowed mutably.
        let n = unsafe { libc::readv(fd.as_raw_fd(), pieces.list.as_ptr(), pieces.count()) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// One `sendmsg`: sends `head`, then `places` in order. At most [`MAX_PIECES`] pieces are used.
    pub(crate) fn write_to(
        &self,
        fd: BorrowedFd<'_>,
        head: &[u8],
        places: impl Iterator<Item = Range<usize>>,
    ) -> io::Result<usize> {
        let mut pieces = Pieces::new();
        pieces.push(head.as_ptr().cast_mut(), head.len());
        for place in places.take(MAX_PIECES - 1) {
            pieces.push(self.at(&place)?, place.len());
        }
        // SAFETY: an all-zero msghdr is a valid value of that plain C struct.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.list.as_mut_ptr();
        message.msg_iovlen = pieces.used as _;
        // SAFETY: the pieces are only read by the call, in bounds and alive during it.
        let n = unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}

/// The list of pieces of one scattered call, on the stack.
struct Pieces {
    list: [libc::iovec; MAX_PIECES],
    used: usize,
}

impl Pieces {
    fn new() -> Self {
        Self { list: [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_PIECES], used: 0 }
    }

    /// Appends a piece, or grows the last one when this one follows it in memory.
    fn push(&mut self, base: *mut u8, len: usize) {
        if len == 0 {
            return;
        }
        if let Some(last) = self.used.checked_sub(1).and_then(|i| self.list.get_mut(i))
            && last.iov_base as usize + last.iov_len == base as usize
        {
            last.iov_len += len;
            return;
        }
        if let Some(slot) = self.list.get_mut(self.used) {
            *slot = libc::iovec { iov_base: base.cast(), iov_len: len };
            self.used += 1;
        }
    }

    fn count(&self) -> libc::c_int {
        libc::c_int::try_from(self.used).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_outside_are_refused() {
        let region = Region::zeroed(64);
        assert!(region.copy_in(60, &[1; 5]).is_err());
        assert!(region.copy_in(usize::MAX, &[1; 5]).is_err());
        assert!(region.copy_out(64, &mut [0; 1]).is_err());
        assert!(region.checksum(0, 10..65).is_err());
        assert!(region.copy_in(60, &[7; 4]).is_ok());
        assert_eq!(region.checksum(0, 60..64).unwrap(), crc32c::crc32c(&[7; 4]));
    }

    #[test]
    fn memory_lives_as_long_as_a_region_names_it() {
        let owner = Arc::new([0_u8; 16]);
        let weak = Arc::downgrade(&owner);
        let base = owner.as_ptr().cast_mut();
        // SAFETY: the array lives in the Arc, which the region keeps; nobody else touches it.
        let region = unsafe { Region::from_raw(base, 16, owner) };
        let second = region.clone();
        drop(region);
        assert!(weak.upgrade().is_some());
        drop(second);
        assert!(weak.upgrade().is_none());
    }
}
